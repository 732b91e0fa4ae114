"""Measuring in turns. A virtual machine's speed changes from minute to minute, so things that are compared are measured
one after the other in the same rounds, and a figure is the median of the ratios within each round."""

import operator
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch

Key = TypeVar("Key")


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turns(works: Mapping[Key, Callable[[], float]], rounds: int, *, warm_up: bool = True) -> dict[Key, list[float]]:
    """What each work returns in each round. With `warm_up`, a round that does not count goes first."""
    for work in works.values() if warm_up else ():
        work()
    measured: dict[Key, list[float]] = {key: [] for key in works}
    for _ in range(rounds):
        for key, work in works.items():
            measured[key].append(work())
    return measured


def median_of(formula: Callable[..., float], *measured: list[float]) -> float:
    """The formula's median over the rounds."""
    return statistics.median(map(formula, *measured))


def ratio(of: list[float], to: list[float]) -> float:
    """The median of the ratios within each round."""
    return median_of(operator.truediv, of, to)


def seconds_per_byte() -> Callable[[], float]:
    """Measures the time for all threads together to read a byte from memory, by a sum over 512 MiB."""
    numbers = torch.ones(512 << 18)  # float32
    return lambda: seconds(numbers.sum) / numbers.nbytes


def seconds_per_product() -> Callable[[], float]:
    """Measures the time for all threads together to do one multiply-add in a large matrix product of torch, in bfloat16
    or float32, whichever is faster."""
    size = 1024
    matrices: list[Any] = [torch.ones(size, size, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    return lambda: min(seconds(partial(torch.matmul, each, each)) for each in matrices) / size**3
