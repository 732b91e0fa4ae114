"""Recurrent layers: they keep a state of each sequence, as Mamba's, gated delta nets and short convolutions do.

To transformers' module all tokens of a call are one sequence, so each sequence has a call of its own; those that go on
by one token share one. From step to step, the states lie in the cache, by row.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map, tree_map_only

from loraplex_shard.models.transformers.linear import ForwardContext
from loraplex_shard.models.transformers.pass_through_cache import PassThroughCache, StateKey
from loraplex_shard.shapes.batch import Batch, Segment
from loraplex_shard.shapes.cache import KVCache, StateForm


@dataclass(frozen=True, slots=True)
class RecurrentLayer:
    """A module that keeps states."""

    name: str
    states: Mapping[StateKey, StateForm]
    continues: bool  # whether it goes on from its states by several tokens at once; else token by token


@dataclass(frozen=True, slots=True)
class SequenceCall:
    """The tokens that are computed in one call."""

    tokens: slice | torch.Tensor  # their places in the batch: a run of one sequence's, or [sequences], one of each
    rows: torch.Tensor  # [sequences]
    begins: bool  # the sequence does: it has no states yet
    segments: tuple[Segment, ...]  # of these tokens

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """[1, tokens of the batch, ...] -> as a module takes it, [1, tokens, ...] or [sequences, 1, ...]."""
        return tensor[:, self.tokens] if isinstance(self.tokens, slice) else tensor[0, self.tokens, None]

    def give(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a module answers -> [1, tokens, ...]."""
        return tensor if isinstance(self.tokens, slice) else tensor.transpose(0, 1)


@dataclass(frozen=True, slots=True)
class SequenceCalls:
    """All calls of a batch."""

    calls: list[SequenceCall]
    places: torch.Tensor  # [tokens]: of the batch's tokens among those of the calls

    def assemble(self, answers: list[Any]) -> Any:
        """The calls' answers, whose tensors are [1, tokens, ...], as one of the whole batch."""

        def join(*parts: Any) -> Any:
            return torch.cat(parts, dim=1)[:, self.places] if isinstance(parts[0], torch.Tensor) else parts[0]

        return answers[0] if len(answers) == 1 else tree_map(join, *answers)


def calls_of(batch: Batch, continues: bool) -> SequenceCalls:
    """For layers that go on by several tokens at once, or for those that do not."""
    device = batch.token_ids.device
    calls: list[SequenceCall] = []
    order: list[int] = []  # of the tokens of all calls: their places in the batch
    steps: list[list[tuple[int, int]]] = []  # of sequences that go on token by token: places in the batch, and rows
    for (start, stop), end, row in zip(
        pairwise(batch.starts.tolist()), batch.context_lengths.tolist(), batch.rows.tolist(), strict=True
    ):
        begins = end == stop - start
        if begins or (continues and stop - start > 1):
            segments = _cut(batch.segments, range(start, stop))
            calls.append(SequenceCall(slice(start, stop), torch.tensor([row], device=device), begins, segments))
            order += range(start, stop)
        else:
            steps += [[] for _ in range(stop - start - len(steps))]
            for step, place in enumerate(range(start, stop)):
                steps[step].append((place, row))
    for each in steps:
        tokens, rows = torch.tensor(each, device=device).T
        places = [place for place, _ in each]
        calls.append(SequenceCall(tokens, rows, False, _cut(batch.segments, places)))
        order += places
    return SequenceCalls(calls, torch.tensor(order, device=device).argsort())


def _cut(segments: Sequence[Segment], tokens: Sequence[int]) -> tuple[Segment, ...]:
    bounds = ((bisect_left(tokens, s.start), bisect_left(tokens, s.stop), s.adapter) for s in segments)
    return tuple(Segment(start, stop, adapter) for start, stop, adapter in bounds if start < stop)


class RecurrentLayers:
    """Those of one model. Takes the places of their modules' forward functions."""

    def __init__(
        self, model: nn.Module, layers: Sequence[RecurrentLayer], cache: PassThroughCache, context: ForwardContext
    ) -> None:
        self._layers, self._cache, self._context = layers, cache, context
        self._states: dict[StateKey, torch.Tensor] = {}
        self._calls: dict[bool, SequenceCalls] = {}
        self.uncalled: tuple[str, ...] = ()  # linear layers whose weights are read without a call, like Mamba's dt_proj
        for layer in layers:
            module: Any = model.get_submodule(layer.name)
            linear = (name for name, each in module.named_modules() if type(each) is nn.Linear)
            self.uncalled += tuple(f"{layer.name}.{name}" for name in linear)
            module.forward = self._called_by_sequence(layer, module.forward)

    @property
    def forms(self) -> list[StateForm]:
        """Of the states, in the order in which a cache has them."""
        return [form for layer in self._layers for form in layer.states.values()]

    @contextmanager
    def over(self, batch: Batch, cache: KVCache) -> Iterator[None]:
        """While the forward pass of this batch is run."""
        keys = chain.from_iterable(layer.states for layer in self._layers)
        self._states = dict(zip(keys, cache.states, strict=True))
        self._calls = {continues: calls_of(batch, continues) for continues in {each.continues for each in self._layers}}
        try:
            yield
        finally:
            self._states, self._calls = {}, {}

    def _called_by_sequence(self, layer: RecurrentLayer, forward: Callable[..., Any]) -> Callable[..., Any]:
        def compute(*args: Any, **kwargs: Any) -> Any:
            calls, segments = self._calls[layer.continues], self._context.segments
            try:
                return calls.assemble([self._compute(call, layer, forward, (args, kwargs)) for call in calls.calls])
            finally:
                self._context.segments = segments

        return compute

    def _compute(self, call: SequenceCall, layer: RecurrentLayer, forward: Callable[..., Any], given: Any) -> Any:
        self._context.segments = call.segments
        held = {} if call.begins else {key: self._states[key][call.rows] for key in layer.states}
        args, kwargs = tree_map_only(torch.Tensor, call.take, given)
        with self._cache.holding(held):
            answer = tree_map_only(torch.Tensor, call.give, forward(*args, **kwargs))
        for key, form in layer.states.items():
            if held[key].dtype != form.dtype:
                raise RuntimeError(f"{layer.name} keeps {held[key].dtype} where {form.dtype} was expected")
            self._states[key][call.rows] = held[key]
        return answer
