"""Forward passes that are recorded as CUDA graphs, once for each form of a step, and repeated for its steps: the host
launches one graph instead of hundreds of kernels.

Kernels take all that differs between steps from the step's memory on the device, which is the same in all steps of a
form: the lengths of lists, too. Their grids cover the whole room.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from loraplex_shard.ops.cuda.step import CudaStep, Form
from loraplex_shard.shapes.cache import KVCache

logger = logging.getLogger(__name__)

Compute = Callable[[CudaStep], torch.Tensor]
# Records what a function asks of the device, while the device may or may not compute it. Returns the function's result,
# and what computes it again in the same memory.
Record = Callable[[Callable[[], torch.Tensor]], tuple[torch.Tensor, Callable[[], None]]]


class GraphRecorder:
    """Records CUDA graphs. They share memory, since only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, compute: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may load adapters meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = compute()
        self._pool = graph.pool()
        return result, graph.replay


@dataclass(frozen=True, slots=True)
class Recording:
    """A forward pass for the steps of one form."""

    step: CudaStep
    result: torch.Tensor
    replay: Callable[[], None]

    def run(self, step: CudaStep, cache: KVCache) -> torch.Tensor:
        self.step.load(step, cache.spare_index)
        self.replay()
        return self.result


class Recordings:
    """The recorded passes of all caches."""

    def __init__(self, record: Record | None) -> None:
        """`record`: None if nothing can be recorded on the device."""
        self._record = record
        self._of_caches: WeakKeyDictionary[KVCache, dict[tuple[Form, int], Recording]] = WeakKeyDictionary()

    @property
    def possible(self) -> bool:
        return self._record is not None

    def run(self, step: CudaStep, cache: KVCache, compute: Compute) -> torch.Tensor:
        """What `compute` returns for the step, which has a form. The next run with this cache may overwrite it."""
        assert step.form is not None
        recordings, tokens = self._of_caches.setdefault(cache, {}), len(step.batch.token_ids)
        key = step.form, step.batch.block_tables.data_ptr()
        if key not in recordings:
            copy = step.with_room(cache.spare_index)
            hidden = compute(copy)  # kernels are compiled, and libraries get their memory, before anything is recorded
            self._add(recordings, key, copy, compute)
        else:
            hidden = recordings[key].run(step, cache)
        return hidden[:tokens]

    def _add(
        self, recordings: dict[tuple[Form, int], Recording], key: tuple[Form, int], step: CudaStep, compute: Compute
    ) -> None:
        assert self._record is not None
        try:
            recordings[key] = Recording(step, *self._record(lambda: compute(step)))
        except RuntimeError as error:  # such as an operation that waits for the device, or too little memory
            logger.warning("steps are not recorded as CUDA graphs from now on, and take longer: %s", error)
            self._record = None
