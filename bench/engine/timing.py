"""Measuring in turns. A virtual machine is faster in one minute than in the next, so whatever is compared is measured
in the same rounds, one after the other, and a figure is the median of the rounds' own ratios."""

import operator
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

Key = TypeVar("Key")


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turns(works: Mapping[Key, Callable[[], float]], rounds: int, *, warm_up: bool = True) -> dict[Key, list[float]]:
    """What each work returns in each round. One more round that warms up goes before them."""
    for work in works.values() if warm_up else ():
        work()
    measured: dict[Key, list[float]] = {key: [] for key in works}
    for _ in range(rounds):
        for key, work in works.items():
            measured[key].append(work())
    return measured


def median_of(formula: Callable[..., float], *measured: list[float]) -> float:
    """The median of the formula's value in each round."""
    return statistics.median(map(formula, *measured))


def ratio(of: list[float], to: list[float]) -> float:
    """The median of the rounds' own ratios."""
    return median_of(operator.truediv, of, to)


def seconds_per_byte() -> Callable[[], float]:
    """Measures what all threads together need to read a byte from memory: a sum over 512 MiB."""
    numbers = torch.ones(512 << 18)  # float32
    return lambda: seconds(numbers.sum) / numbers.nbytes


def seconds_per_product() -> Callable[[], float]:
    """Measures what all threads together need for a product and its sum in a large matrix product of torch's, by the
    better of bfloat16 and float32."""
    size = 1024
    matrices: list[Any] = [torch.ones(size, size, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    return lambda: min(seconds(lambda m=m: m @ m) for m in matrices) / size**3
