"""Steps that are recorded as CUDA graphs, once for each form, and repeated for its steps: the host launches one graph
instead of hundreds of kernels.

Kernels take all that differs between steps from the form's memory on the device: the lengths of lists, too. Their grids
cover the whole room. A graph begins with the tokens of the rows and, if one is sampled after each of them, ends with
that: the next step of the same sequences needs nothing else.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from loraplex_shard.device.parallel import Group
from loraplex_shard.ops.base import Compute, Outputs, Score
from loraplex_shard.ops.cuda.forms import Form, FormStep, Layout
from loraplex_shard.ops.cuda.runs import Runs
from loraplex_shard.ops.cuda.step import Kind
from loraplex_shard.ops.cuda.tiles import Cuts
from loraplex_shard.sampling.cuda import draw_into
from loraplex_shard.shapes.batch import Inputs
from loraplex_shard.shapes.cache import KVCache

logger = logging.getLogger(__name__)

# Records what a function asks of the device, while the device may or may not compute it. Returns the function's result,
# and what computes it again in the same memory.
Record = Callable[[Callable[[], Outputs]], tuple[Outputs, Callable[[], None]]]


class GraphRecorder:
    """Records CUDA graphs. They share memory, since only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, compute: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may load adapters meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = compute()
        self._pool = graph.pool()
        return result, graph.replay


@dataclass(frozen=True, slots=True)
class Recording:
    """What all steps of one form do, and the memory that they read."""

    layout: Layout
    memory: torch.Tensor
    outputs: Outputs
    replay: Callable[[], None]


class Recordings:
    """The recorded steps of all caches."""

    def __init__(self, record: Record | None) -> None:
        """`record`: None if nothing can be recorded on the device."""
        self._record = record
        self._of_caches: WeakKeyDictionary[KVCache, dict[tuple[Form, int], Recording]] = WeakKeyDictionary()

    @property
    def possible(self) -> bool:
        return self._record is not None

    def run(
        self,
        form: Form,
        inputs: Inputs,
        runs: Runs,
        cuts: Mapping[Kind, Cuts],
        cache: KVCache,
        group: Group,
        compute: Compute,
        score: Score,
    ) -> Outputs:
        """What the step makes of the inputs, which fit into the form. The next run with this cache may overwrite it."""
        device = inputs.tokens.device
        recordings = self._of_caches.setdefault(cache, {})
        key = form, inputs.block_tables.data_ptr()
        recording = recordings.get(key)
        layout = recording.layout if recording else Layout(form, {kind: each.rows for kind, each in cuts.items()})
        if len(inputs.new_places) > form.tokens:
            inputs = inputs.with_blocks_written()
        # A GPU reads pinned memory by itself. torch keeps it from being used again before that.
        numbers = layout.fill(inputs, runs, cuts, cache.spare_index, pinned=device.type == "cuda")
        if recording:
            recording.memory.copy_(numbers, non_blocking=True)
            recording.replay()
            outputs = recording.outputs
        else:
            memory = torch.empty_like(numbers, device=device)
            memory.copy_(numbers, non_blocking=True)
            step = layout.step(memory, inputs)

            def whole() -> Outputs:
                return _whole(step, inputs.tokens, group, compute, score)

            outputs = whole()  # kernels are compiled, and libraries get their memory, before anything is recorded
            self._add(recordings, key, layout, memory, whole)
        count = len(inputs)
        return outputs if count == form.tokens else outputs.first(count)

    def _add(
        self,
        recordings: dict[tuple[Form, int], Recording],
        key: tuple[Form, int],
        layout: Layout,
        memory: torch.Tensor,
        whole: Callable[[], Outputs],
    ) -> None:
        assert self._record is not None
        try:
            recordings[key] = Recording(layout, memory, *self._record(whole))
        except RuntimeError as error:  # such as an operation that waits for the device, or too little memory
            logger.warning("steps are not recorded as CUDA graphs from now on, and take longer: %s", error)
            self._record = None


def _whole(step: FormStep, tokens: torch.Tensor, group: Group, compute: Compute, score: Score) -> Outputs:
    """`tokens`: those of all rows."""
    batch = step.cuda.batch
    batch.block_tables.view(-1)[step.new_places] = step.new_blocks.int()
    batch.token_ids.copy_(tokens[step.token_rows, batch.positions])
    hidden = compute(step.cuda)
    if not step.draws:
        return Outputs(hidden)
    scored = score(hidden)
    if scored is None:
        drawn = torch.zeros_like(batch.positions)
    else:
        drawn = scored[0].argmax(-1)
        draw_into(drawn, scored[0], step.draws)
    group.broadcast_(drawn)
    tokens[step.token_rows, batch.positions + 1] = drawn.int()
    return Outputs(hidden, drawn, scored)
