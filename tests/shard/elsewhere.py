"""Where the shard is tested: the environment's LORAPLEX_TEST_DEVICE, which `python -m bench.gpu` sets for some files.

Tests of operations make their tensors on the CPU. For a GPU, calls are wrapped: tensors are copied there, and what the
call wrote and returned is copied back.
"""

import os
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import wraps
from typing import Any, TypeVar, cast

import torch

from loraplex_shard.ops.base import Operations
from loraplex_shard.ops.reference import ReferenceOperations
from loraplex_shard.shapes.adapter import AdapterWeights
from loraplex_shard.shapes.batch import Segment

# cpu; cuda; or interpreter: the operations for CUDA, on the CPU.
TESTED = os.environ.get("LORAPLEX_TEST_DEVICE", "cpu")
DEVICE = torch.device("cuda" if TESTED == "cuda" else "cpu")

Called = TypeVar("Called")


def tested_operations() -> Operations:
    """The operations of models that tests load, on DEVICE."""
    if TESTED == "cpu":
        return ReferenceOperations()
    from loraplex_shard.ops.cuda.operations import CudaOperations

    return CudaOperations(DEVICE)


class Elsewhere:
    """An object whose methods compute on a device, for tensors on the CPU. What is not a tensor, such as a packed
    weight, stays there."""

    def __init__(self, wrapped: object, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._wrapped, self._move = wrapped, move

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._wrapped, name)
        return _moving(found, self._move) if callable(found) else found


def elsewhere(called: Called) -> Called:
    """A function, or an object with methods, for tensors on the CPU; the same one if that is where it computes."""
    if DEVICE.type == "cpu":
        return called
    if callable(called):
        return cast(Called, _moving(called, _to_device))
    return cast(Called, Elsewhere(called, _to_device))


def _to_device(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(DEVICE)


def _moving(function: Callable[..., Any], move: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        moved: dict[int, tuple[Any, Any]] = {}  # by identity: what was there, and its copy
        args, named = _moved((args, named), move, moved)
        result = function(*args, **named)
        for before, copy in moved.values():
            if isinstance(before, torch.Tensor) and not before.equal(after := copy.cpu()):
                before.copy_(after)
        return _back(result, {id(copy): before for before, copy in moved.values()})

    return call


def _moved(value: Any, move: Callable[[torch.Tensor], torch.Tensor], moved: dict[int, tuple[Any, Any]]) -> Any:
    """The value with all tensors on the CPU copied, the same tensor once."""
    if id(value) in moved:
        return moved[id(value)][1]
    if isinstance(value, torch.Tensor | AdapterWeights):
        memory = value if isinstance(value, torch.Tensor) else value.memory
        if memory.device.type != "cpu":
            return value
        # An adapter has the addresses of its memory.
        copy = move(value) if isinstance(value, torch.Tensor) else value.at(move(memory))
        moved[id(value)] = value, copy
        return copy
    if isinstance(value, dict):
        return {key: _moved(each, move, moved) for key, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_moved(each, move, moved) for each in value)
    if isinstance(value, Segment):
        return value._replace(adapter=_moved(value.adapter, move, moved))
    if is_dataclass(value) and not isinstance(value, type):
        own = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
        return replace(value, **_moved(own, move, moved))
    return value


def _back(result: Any, originals: dict[int, Any]) -> Any:
    if isinstance(result, torch.Tensor):
        return originals[id(result)] if id(result) in originals else result.cpu()
    return tuple(_back(each, originals) for each in result) if type(result) is tuple else result
