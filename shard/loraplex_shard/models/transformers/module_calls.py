"""Records which modules a forward pass calls."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.generic import ModelOutput

from loraplex_shard.checkpoint.base import CheckpointError


class ModuleCalls:
    """The module calls of the forward passes that run within `counted`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._running: list[str] = []  # the modules whose forward functions are running, the innermost last
        self.called: set[str] = set()
        self._top: list[tuple[str, object]] = []  # what the model's own forward calls, and the results
        self._shapes: dict[str, list[tuple[int, ...]]] = {}  # the shapes of inputs, by linear layer

    @contextmanager
    def counted(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for name, module in self._model.named_modules():
                if name:
                    hooks.callback(module.register_forward_pre_hook(self._enterer(name)).remove)
                    leave = self._leaver(name, type(module) in (nn.Linear, Conv1D))
                    hooks.callback(module.register_forward_hook(leave).remove)
            yield

    def _enterer(self, name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, inputs: self._running.append(name)

    def _leaver(self, name: str, linear: bool) -> Callable[[nn.Module, Any, Any], None]:
        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            self._running.pop()
            self.called.add(name)
            if not self._running:
                self._top.append((name, output))
            if linear:
                self._shapes.setdefault(name, []).append(tuple(inputs[0].shape))

        return leave

    def linear(self, tokens: int) -> dict[str, bool]:
        """The linear layers, and whether all of their inputs had one row per token."""
        return {n: all(prod(shape[:-1]) == tokens for shape in shapes) for n, shapes in self._shapes.items()}

    @property
    def innermost(self) -> str:
        """The module that is running."""
        return self._running[-1]

    @property
    def idle(self) -> tuple[str, ...]:
        """Models within the model that were not called at all, such as one that reads images."""
        models = (name for name, module in self._model.named_modules() if isinstance(module, PreTrainedModel))
        return tuple(
            name for name in models if name and not any(f"{called}.".startswith(f"{name}.") for called in self.called)
        )

    @property
    def backbone(self) -> tuple[str, type[ModelOutput]]:
        """The module that returns the last hidden states, and the type of its output."""
        for name, output in self._top:
            if isinstance(output, ModelOutput) and "last_hidden_state" in output:
                return name, type(output)
        raise CheckpointError("it does not have a backbone and a head")
