"""What recurrent layers do with the states that they are given, found out by running a model on tensors that have
shapes and no values."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.integrations import hub_kernels

from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.models.transformers.attention import AttentionCall, Sees, attended_by
from loraplex_shard.models.transformers.module_calls import ModuleCalls
from loraplex_shard.models.transformers.pass_through_cache import PassThroughCache, StateKey, States
from loraplex_shard.models.transformers.recurrent import RecurrentLayer, SequenceCall
from loraplex_shard.shapes.cache import StateForm

META = torch.device("meta")
SEQUENCES = 2  # that go on by one token in one call


class StateRecorder(dict[StateKey, torch.Tensor]):
    """States that nobody has yet, and the modules that ask for them or leave them there."""

    def __init__(self, calls: ModuleCalls) -> None:
        super().__init__()
        self._calls = calls
        self._names: set[str] = set()

    def get(self, key: StateKey, default: Any = None) -> Any:
        self._names.add(self._calls.innermost)
        return super().get(key, default)

    def __setitem__(self, key: StateKey, state: torch.Tensor) -> None:
        self._names.add(self._calls.innermost)
        super().__setitem__(key, state)

    @property
    def modules(self) -> list[str]:
        """Of the outermost of them: where one is in another, it is called with the other."""
        return [n for n in sorted(self._names) if not any(n.startswith(f"{other}.") for other in self._names)]


class Probe:
    """Of one recurrent layer, in a forward pass that it is called in."""

    def __init__(self, name: str, cache: PassThroughCache, tokens: int) -> None:
        self._name, self._cache, self._tokens = name, cache, tokens
        self.found: RecurrentLayer | None = None

    def forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """In the place of the module's: does what it does, and finds out about it."""

        def compute(*args: Any, **kwargs: Any) -> Any:
            if self.found is not None:
                raise CheckpointError(f"{self._name}, which keeps a state, is called several times for a token")
            self._check_rows((args, kwargs))
            states, answer = self._run(forward, {}, args, kwargs)
            self._check_rows(answer)
            forms = {key: StateForm(tuple(state.shape[1:]), state.dtype) for key, state in sorted(states.items())}
            several = SequenceCall(slice(0, self._tokens), torch.zeros(1, device=META), False, ())
            each = SequenceCall(torch.arange(SEQUENCES, device=META), torch.zeros(SEQUENCES, device=META), False, ())
            if not self._goes_on(forward, each, forms, (args, kwargs)):
                raise CheckpointError(f"{self._name} does not go on from its state")
            self.found = RecurrentLayer(self._name, forms, self._goes_on(forward, several, forms, (args, kwargs)))
            return answer

        return compute

    def _check_rows(self, tree: Any) -> None:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, torch.Tensor) and leaf.shape[:2] != (1, self._tokens):
                raise CheckpointError(f"{self._name} keeps a state, but has not one row per token: {list(leaf.shape)}")

    def _run(self, forward: Callable[..., Any], states: States, args: Any, kwargs: Any) -> tuple[States, Any]:
        with self._cache.holding(states), attended_by(NoAttention()):
            return states, forward(*args, **kwargs)

    def _goes_on(
        self, forward: Callable[..., Any], call: SequenceCall, forms: Mapping[StateKey, StateForm], given: Any
    ) -> bool:
        """Whether all states have a say in what is answered to this call."""
        count = len(call.rows)
        args, kwargs = tree_map_only(torch.Tensor, call.take, given)
        with torch.enable_grad():
            before = {key: _tracked(count, form) for key, form in forms.items()}
            states, answer = self._run(forward, {key: state.clone() for key, state in before.items()}, args, kwargs)
        for key, state in states.items():
            if (tuple(state.shape), state.dtype) != ((count, *forms[key].shape), forms[key].dtype):
                raise CheckpointError(f"{self._name} has states of several sizes")
        reached = _reached(leaf for leaf in tree_leaves(answer) if isinstance(leaf, torch.Tensor))
        return all(id(state) in reached for state in before.values() if state.requires_grad)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Has transformers' own code used in place of packages with kernels, as it is for an export of the model. Kernels
    do not take tensors without values."""
    module: Any = hub_kernels
    exporting, module.is_torchdynamo_exporting = module.is_torchdynamo_exporting, lambda: True
    try:
        yield
    finally:
        module.is_torchdynamo_exporting = exporting


class NoAttention:
    """Implements Attending, within a layer that keeps a state: its calls would not be of the whole batch."""

    def attend(self, call: AttentionCall) -> torch.Tensor:
        raise CheckpointError("it keeps a state within its attention")

    def mask(self, tokens: int, sees: Sees, device: torch.device) -> torch.Tensor:
        raise CheckpointError("it keeps a state within its attention")


def _tracked(count: int, form: StateForm) -> torch.Tensor:
    state = torch.empty((count, *form.shape), dtype=form.dtype, device=META)
    return state.requires_grad_(form.dtype.is_floating_point)


def _reached(answers: Iterable[torch.Tensor]) -> set[int]:
    """The ids of the tensors that these were computed from, as far as they require gradients."""
    found, seen, waiting = set[int](), set[Any](), [answer.grad_fn for answer in answers]
    while waiting:
        node: Any = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.add(id(getattr(node, "variable", None)))
            waiting += [other for other, _ in node.next_functions]
    return found


def probe(
    model: nn.Module, names: Iterable[str], cache: PassThroughCache, tokens: int, run: Callable[[], object]
) -> tuple[RecurrentLayer, ...]:
    """What is found out about these layers when `run` runs the model with that cache on that many tokens of one
    sequence. Raises CheckpointError."""
    probes = {name: Probe(name, cache, tokens) for name in names}
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in probes}
    for name, module in modules.items():
        module.forward = probes[name].forward(module.forward)
    try:
        run()
    finally:
        for module in modules.values():
            del module.forward  # the class's own is found again
    return tuple(each.found for each in probes.values() if each.found is not None)
