"""A checkpoint's tensors by the names of the model's parameters. transformers renames what older versions saved, and
makes some parameters, such as those of fused experts, from several tensors. Its own conversions are used."""

from collections.abc import Callable
from copy import deepcopy
from functools import cached_property, partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    SkipParameters,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from loraplex_shard.checkpoint.base import Checkpoint, CheckpointError
from loraplex_shard.models.text_part import TextModel
from loraplex_shard.ops.quantized import Quantized


class ModelTensors:
    """Implements layers.parameters.TensorReader and lora.peft.base.StoredTensors."""

    def __init__(self, checkpoint: Checkpoint | TextModel, model: PreTrainedModel, idle: tuple[str, ...] = ()) -> None:
        """Tensors of `idle` modules are ignored."""
        self._checkpoint, self._model = checkpoint, model
        self._idle = tuple(f"{name}." for name in idle)
        self._stored: dict[str, str] = {}  # the checkpoint's name of each parameter
        self._made: dict[str, tuple[WeightConverter, list[tuple[str, str]]]] = {}  # from several: (name, pattern)
        self.unused: set[str] = set()
        self.transposed = frozenset(name for name, module in model.named_modules() if isinstance(module, Conv1D))
        self._transposed = {f"{name}.weight" for name in self.transposed}
        self._read_ahead: dict[str, torch.Tensor] = {}
        self._last = "", torch.empty(0)
        self._sort()

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._stored.keys() | self._makers.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of what `read` returns. Conv1D holds its matrix transposed; it is read like any linear layer's."""
        return self.stored_shape(name)[:: -1 if name in self._transposed else 1]

    def stored_shape(self, name: str) -> tuple[int, ...]:
        if name in self._stored:
            return self._checkpoint.shape(self._stored[name])
        return tuple(self._makers[name][1].shape)

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        if name not in self._stored:
            whole = self._make(name)
            return whole[rows, columns] if whole.dim() == 2 else whole[rows]
        stored = self._stored[name]
        if name in self._transposed:
            return self._checkpoint.read(stored, columns, rows).T
        return self._checkpoint.read(stored, rows, columns)

    def is_rounded(self, name: str) -> bool:
        return name in self._stored and self._checkpoint.is_rounded(self._stored[name])

    def read_quantized(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> Quantized | None:
        stored = self._stored.get(name)
        if stored is None or name in self._transposed:
            return None
        return self._checkpoint.read_quantized(stored, rows, columns)

    def is_zero_bias(self, stored: str) -> bool:
        """Whether the tensor is a bias of zeros. GPTQ's tools give every layer a bias."""
        return stored.endswith(".bias") and not self._checkpoint.read(stored).any()

    def _sort(self) -> None:
        conversions = get_model_conversion_mapping(self._model)
        renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        converters = [each for each in conversions if isinstance(each, WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        known, prefix = self._model.state_dict(), self._model.base_model_prefix
        for stored in sorted(self._checkpoint.names, key=dot_natural_key):
            name, pattern = rename_source_key(stored, renamings, converters, prefix, known)
            if name not in known and stored in known:
                name, pattern = rename_source_key(stored, [], [], prefix, known)
            if name.startswith(self._idle):
                continue
            if name not in known:
                self.unused.add(stored)
            elif pattern is None:
                self._stored[name] = stored
            else:
                self._made.setdefault(name, (deepcopy(by_pattern[pattern]), []))[1].append((stored, pattern))
        for one, other in self._model.all_tied_weights_keys.items():
            for missing, held in ((one, other), (other, one)):
                if missing not in self.names and held in self._stored:
                    self._stored[missing] = self._stored[held]

    @cached_property
    def _makers(self) -> dict[str, tuple[str, torch.Tensor]]:
        """For each parameter that is made of several tensors: its name in `_made`, and a tensor of its shape without
        values.
        """
        makers = {}
        for first in self._made:
            for name, tensor in self._convert(first, values=False).items():
                makers[name] = first, tensor
        return makers

    def release(self) -> None:
        """Frees what was made last."""
        self._last = "", torch.empty(0)
        self._read_ahead = {}

    def _make(self, name: str) -> torch.Tensor:
        """Keeps what it makes until another one is asked for, since it is read in parts."""
        if self._last[0] != name:
            if name not in self._read_ahead:
                self._read_ahead = self._convert(self._makers[name][0], values=True)
            self._last = name, self._read_ahead.pop(name)
        return self._last[1]

    def _convert(self, first: str, values: bool) -> dict[str, torch.Tensor]:
        original, sources = self._made[first]
        converter: Any = deepcopy(original)
        read: Callable[[str], torch.Tensor] = self._checkpoint.read if values else self._without_values
        for stored, pattern in sources:
            converter.add_tensor(first, stored, pattern, partial(read, stored))
        try:
            made = converter.convert(first, model=self._model, config=self._model.config)
        except (SkipParameters, RuntimeError, ValueError, LookupError) as error:
            names = ", ".join(stored for stored, _ in sources[:3])
            raise CheckpointError(f"{self._checkpoint.model_id}: cannot make {first} of {names}: {error}") from error
        return {name: found[0] if isinstance(found, list) else found for name, found in made.items()}

    def _without_values(self, stored: str) -> torch.Tensor:
        return torch.empty(self._checkpoint.shape(stored), device="meta")
