"""A model that runs with transformers' modeling code: a rank's part of it, as stepping and serving see it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.device.parallel import Group
from loraplex_shard.layers.parameters import ParameterForm
from loraplex_shard.models.transformers.attention import PagedAttention, attended_by
from loraplex_shard.models.transformers.experts import ExpertsInPlace
from loraplex_shard.models.transformers.linear import EmbeddingInPlace, ForwardContext, LinearInPlace, OnRankZeroAlone
from loraplex_shard.models.transformers.pass_through_cache import PassThroughCache, cache_argument
from loraplex_shard.models.transformers.recurrent import RecurrentLayers
from loraplex_shard.models.transformers.served import LinearMatrices, ServedWeights
from loraplex_shard.models.transformers.tensors import ModelTensors
from loraplex_shard.models.transformers.traits import ModelTraits
from loraplex_shard.ops.base import Operations, Outputs, Segments, Step
from loraplex_shard.shapes.batch import Batch, Inputs, Segment
from loraplex_shard.shapes.cache import KVCache
from loraplex_shard.shapes.layout import LinearLayout

BLOCK_SIZE = 16  # positions in the single block with which a model is tried


class _Reached(Exception):
    """Ends a forward pass once the backbone has returned, since only its hidden states are wanted."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


class TransformersModel:
    """Implements models.base.Model, which has the docstrings.

    The class's own forward runs, so everything that it does is done. For hidden states, it runs until its backbone has
    returned. For logits, it runs with a backbone that returns given hidden states.
    """

    modeling_code = "transformers"

    def __init__(
        self,
        model: PreTrainedModel,
        tensors: ModelTensors,
        traits: ModelTraits,
        context: ForwardContext,
        group: Group,
        ops: Operations,
        form: ParameterForm,
        tied: bool,
    ) -> None:
        """`tied`: whether the lm head is the embedding."""
        self._model, self._traits, self._context, self._group, self._ops = model, traits, context, group, ops
        self._device = form.device
        self._cache = PassThroughCache(model.config)
        self._cache_argument = cache_argument(model)
        self._recurrent = RecurrentLayers(model, traits.recurrent, self._cache, context)
        self.dtype = form.dtype
        self.tensors = tensors
        self.vocab_size = traits.vocab_size
        self.embedding_name, self.head_name, self.generates = traits.embedding, traits.head, traits.generates
        linear = [module for module in model.modules() if isinstance(module, LinearInPlace) and module.adaptable]
        experts = [module for module in model.modules() if isinstance(module, ExpertsInPlace)]
        of_experts = [layout for module in experts for layout in module.layouts]
        self.matrices = LinearMatrices(linear, tensors, form)
        self.served = self._served(tied, form)
        self.uncalled = self._recurrent.uncalled
        self.layouts: tuple[LinearLayout, ...] = (*(module.layout for module in linear), *of_experts)
        self._given: torch.Tensor | None = None
        backbone = model.get_submodule(traits.backbone)
        self._backbone = backbone.forward
        backbone.forward = self._answer

    def _served(self, tied: bool, form: ParameterForm) -> ServedWeights | None:
        """None if the embedding or the lm head is not ours, or if they have other tokens than the logits."""
        name, head = self._traits.embedding, self._traits.head
        embedding = self._model.get_submodule(name) if name else None
        if not isinstance(embedding, EmbeddingInPlace) or embedding.layer.matrix_shape[0] != self.vocab_size:
            return None
        if head and not getattr(self._model.get_submodule(head), "is_head", False):
            return None
        return ServedWeights(self.matrices, embedding.layer, self.tensors, form, self._traits.head, tied)

    @torch.inference_mode()
    def __call__(self, inputs: Inputs, cache: KVCache) -> Outputs:
        batch = inputs.batch()
        return Outputs(self._hidden(batch, batch.positions, cache))

    @torch.inference_mode()
    def check_positions(self) -> None:
        """Raises CheckpointError if the model does not use a batch's positions as they are."""
        cache, positions = self.new_cache(1, BLOCK_SIZE, sequences=1), torch.arange(BLOCK_SIZE, device=self._device)
        table = torch.zeros((1, 1), dtype=torch.int32, device=self._device)
        tokens = torch.full_like(positions, self.vocab_size // 2)
        batch = Batch(
            tokens, positions, positions, np.array((0, BLOCK_SIZE)), np.array((BLOCK_SIZE,)), np.array((0,)), table, ()
        )
        counted, again, backwards, own = (
            self._hidden(batch, at, cache).float() for at in (positions, positions, positions.flip(0), None)
        )
        noise = 10 * (again - counted).abs().max()  # on a GPU, sums of experts' outputs have no fixed order
        if (own - counted).abs().max() > noise:
            raise CheckpointError("it counts positions in its own way")
        if (backwards - counted).abs().max() <= noise and self._depends_on_positions(own):
            raise CheckpointError("it ignores the positions that it is given")

    def _depends_on_positions(self, hidden: torch.Tensor) -> bool:
        """Whether positions matter to the model, which computed these hidden states of equal tokens, [tokens, hidden].
        If they do not, equal tokens have equal results, unless recurrent layers make them differ."""
        if self._traits.recurrent:
            return bool(self._traits.attention) and self._traits.rotates
        return not hidden.allclose(hidden[:1], rtol=0.05, atol=0.05 * float(hidden.std()))

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, segments: tuple[Segment, ...]) -> tuple[torch.Tensor, torch.Tensor] | None:
        rows = torch.zeros(len(hidden), dtype=torch.int64, device=self._device)
        with self._at(None, segments):
            self._given = hidden[None]
            try:
                logits: torch.Tensor = self._run(rows, rows).logits[0]
            except OnRankZeroAlone:
                return None
            finally:
                self._given = None
        return self._ops.upcast(logits.contiguous()) if self._group.rank == 0 else None

    @property
    def state_bytes(self) -> int:
        return sum(form.size_bytes for form in self._recurrent.forms)

    def new_cache(
        self, num_blocks: int, block_size: int, dtype: torch.dtype | None = None, sequences: int = 0
    ) -> KVCache:
        heads, states, dtype = self._traits.attention, self._recurrent.forms, dtype or self.dtype
        first = self._ops.positions_first
        return KVCache(heads, num_blocks, block_size, dtype, self._device, states, sequences, first)

    def cache_block_bytes(self, block_size: int, dtype: torch.dtype | None = None) -> int:
        return KVCache.block_bytes(self._traits.attention, block_size, dtype or self.dtype)

    def _hidden(self, batch: Batch, positions: torch.Tensor | None, cache: KVCache) -> torch.Tensor:
        """Returns [tokens, hidden]. If `positions` is None, the model counts them."""
        step = self._ops.prepare(batch)
        attention = PagedAttention(self._traits.attention, self._ops, step, cache)
        with attended_by(attention), self._recurrent.over(batch, cache), self._at(step, step):
            try:
                self._run(batch.token_ids, positions)
            except _Reached as reached:
                return reached.hidden[0]
        raise AssertionError("the backbone was not reached")

    def _run(self, ids: torch.Tensor, positions: torch.Tensor | None) -> Any:
        self._cache.positions = positions
        return self._model(
            input_ids=ids[None],
            position_ids=None if positions is None else positions[None],
            use_cache=True,
            **{self._cache_argument: self._cache},
        )

    def _answer(self, *args: Any, **kwargs: Any) -> ModelOutput:
        if self._given is not None:
            return self._traits.output(last_hidden_state=self._given)
        raise _Reached(self._backbone(*args, **kwargs).last_hidden_state)

    @contextmanager
    def _at(self, step: Step, segments: Step | Segments) -> Iterator[None]:
        self._context.step, self._context.segments = step, segments
        try:
            yield
        finally:
            self._context.step, self._context.segments = None, ()
