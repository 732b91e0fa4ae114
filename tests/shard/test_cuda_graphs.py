"""Recorded forward passes compute what the calls would: in any bucket, with any adapters, whatever lies behind a step's
tokens. A list of the kernels' calls, with the memory that they had, takes a CUDA graph's place."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import LlamaConfig
from triton.runtime.interpreter import GridExecutor

from loraplex_protos.generation_pb2 import Sampling
from loraplex_protos.shard_pb2 import StepResponse
from loraplex_shard.device.parallel import Group
from loraplex_shard.ops.base import Outputs
from loraplex_shard.ops.cuda.forms import BUCKETS, Form
from loraplex_shard.ops.cuda.graphs import Record, Recordings
from loraplex_shard.ops.cuda.operations import CudaOperations
from loraplex_shard.ops.cuda.runs import Runs
from loraplex_shard.ops.cuda.step import CudaStep, Kind
from loraplex_shard.ops.cuda.tiles import Cuts, cut_batch
from loraplex_shard.sampling.grammars import GrammarCompiler
from loraplex_shard.shapes.adapter import AdapterWeights
from loraplex_shard.shapes.batch import Inputs, Segment
from loraplex_shard.shapes.cache import KVCache
from loraplex_shard.shapes.heads import Heads
from loraplex_shard.shapes.layout import LinearLayout, LinearPart
from loraplex_shard.shapes.own_weights import NOTHING, OwnWeights
from loraplex_shard.stepping.runner import Runner
from tests.shard.decoders import adapter_for, load, save_checkpoint
from tests.shard.operations import paged_batch
from tests.shard.planner import BLOCK_SIZE, MAX_MODEL_LEN, NUM_BLOCKS, Planner, random_tokens

# What lies behind a step's tokens is computed, too, and is whatever was in the memory.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

CPU = torch.device("cpu")
ALLOCATIONS = "aten::empty", "aten::new_empty", "aten::empty_like"
Compute = Callable[[], Outputs]
# By row. The last one's tokens are sampled after the recorded pass.
SAMPLINGS = (
    Sampling(),
    Sampling(temperature=1, seed=3),
    Sampling(temperature=2, seed=4, top_k=9),
    Sampling(),
    Sampling(temperature=1, seed=5, repetition_penalty=1.5),
)
Calls = list[Callable[[], None]]


class _Listing(TorchDispatchMode):
    """Lists torch's calls. One that returns new memory will write there again."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode, operations arrive that consist of others
            if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if func.name().partition(".")[0] in ALLOCATIONS:
            self._calls.append(lambda: _poison(result))
        elif not func.is_view:
            self._calls.append(lambda: _again(func, args, kwargs, result))
        return result


def _again(func: Any, args: Any, kwargs: Any, result: Any) -> None:
    anew = func(*args, **kwargs)
    if isinstance(result, torch.Tensor) and anew is not result:
        result.copy_(anew)


def _poison(memory: torch.Tensor) -> None:
    memory.fill_(torch.nan if memory.is_floating_point() else -1)


def listed(compute: Compute) -> tuple[Outputs, Callable[[], None]]:
    """Records the list."""
    calls: Calls = []
    launch = GridExecutor.__call__

    def list_launch(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        calls.append(lambda: launch(self, *args, **kwargs))
        with _disable_current_modes():  # the interpreter uses torch, too
            launch(self, *args, **kwargs)

    with patch.object(GridExecutor, "__call__", list_launch), _Listing(calls):
        result = compute()

    @torch.inference_mode()
    def replay() -> None:
        for call in calls:
            call()

    return result, replay


def computed(compute: Compute) -> tuple[Outputs, Callable[[], None]]:
    """Records nothing, and computes anew."""
    result = compute()
    return result, lambda: _copy(result, compute())


def _copy(result: Outputs, anew: Outputs) -> None:
    for old, new in zip(result.tensors, anew.tensors, strict=True):
        old.copy_(new)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MAX_MODEL_LEN,
    )
    return save_checkpoint(config, tmp_path_factory.mktemp("llama"))


class Slots:
    def __init__(self, layouts: tuple[LinearLayout, ...]) -> None:
        """The last adapter touches the lm head, too: its tokens are sampled after the recorded pass."""
        head = layouts[-1:]
        assert head[0].name == "lm_head"
        touched = layouts[:-1], layouts[:1] + layouts[2:-1], layouts[:1] + head
        self.adapters = [adapter_for(layouts, touched=some) for some in touched]

    def adapter_in(self, slot: int) -> AdapterWeights:
        return self.adapters[slot - 1]


class Shard:
    """A runner, the adapters in its slots, and what it answered."""

    def __init__(self, checkpoint: Path, record: Record | None) -> None:
        self.records = 0

        def counting(compute: Compute) -> tuple[Outputs, Callable[[], None]]:
            assert record is not None
            self.records += 1
            return record(compute)

        model = load(checkpoint, ops=CudaOperations(CPU, record and counting), max_model_len=MAX_MODEL_LEN)
        self.slots, self.planner = Slots(model.layouts), Planner()
        self.cache = model.new_cache(NUM_BLOCKS, BLOCK_SIZE)
        for layer in self.cache.layers:
            layer.keys.fill_(torch.nan)
            layer.values.fill_(torch.nan)
        grammars = GrammarCompiler(b"{}", model.vocab_size, end_token_ids=(2,))
        self.runner = Runner(model, self.cache, self.slots, Group(0, 1), 24, MAX_MODEL_LEN, CPU, grammars)  # type: ignore[arg-type]
        self.answers: list[StepResponse] = []

    def start(self, row: int, length: int, slot: int) -> None:
        sampling = SAMPLINGS[row % len(SAMPLINGS)]
        self.planner.start(row, random_tokens(length, row), slot=slot, sampling=sampling, logprobs=True)

    def run(self, lengths: dict[int, int]) -> None:
        self.answers.append(self.planner.run(self.runner.step, lengths))

    @property
    def tokens(self) -> list[list[int]]:
        return [list(answer.tokens) for answer in self.answers]

    @property
    def logprobs(self) -> list[float]:
        return [logprob for answer in self.answers for logprob in answer.logprobs]


def mixed(shard: Shard) -> None:
    """Chunks of prompts and decodes, greedy and by chance, of the base and adapters, two of which are loaded anew; then
    fewer sequences, whose tokens lie where others' were."""
    for row, (length, slot) in enumerate([(5, 0), (2, 1), (13, 2)]):
        shard.start(row, length, slot)
    shard.run({0: 2})
    shard.run({0: 3, 1: 1})
    shard.run({0: 1, 1: 1, 2: 1})
    shard.run({0: 1, 1: 1, 2: 2})
    shard.run({2: 10})
    shard.slots.adapters[:2] = reversed(shard.slots.adapters[:2])
    shard.run({0: 1, 1: 1, 2: 1})
    shard.start(3, 12, 1)
    shard.run({3: 9, 2: 1})
    shard.run({0: 1, 2: 1})
    shard.run({1: 1, 2: 1})
    shard.start(4, 1, 3)
    shard.run({2: 1, 4: 1})
    shard.run({2: 1, 4: 1})


def test_recorded_passes_serve_chunks_decodes_and_any_adapters(checkpoint: Path) -> None:
    plain, anew, recorded = (Shard(checkpoint, record) for record in (None, computed, listed))
    for shard in (plain, anew, recorded):
        mixed(shard)
    assert recorded.tokens == anew.tokens == plain.tokens
    assert recorded.logprobs == anew.logprobs  # bit by bit
    assert recorded.logprobs == pytest.approx(plain.logprobs, abs=1e-4)
    assert plain.records == 0
    assert recorded.records < len(recorded.answers)


def test_where_nothing_can_be_recorded_after_all_steps_are_computed_as_before(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(compute: Compute) -> tuple[Outputs, Callable[[], None]]:
        raise RuntimeError("operation not permitted when stream is capturing")

    plain, failing = Shard(checkpoint, None), Shard(checkpoint, fail)
    for shard in (plain, failing):
        shard.start(0, 2, 1)
        shard.run({0: 1})
        for _ in range(2):
            shard.run({0: 1})
    assert failing.tokens == plain.tokens
    assert failing.records == 1
    assert "not permitted when stream is capturing" in caplog.text


HEADS = Heads(query=4, kv=2, dim=8)
KINDS = ((HEADS, torch.float32),)


def inputs_of(chunks: list[tuple[int, int]], tables: torch.Tensor | None = None) -> Inputs:
    """Those of a step of chunks (positions before, tokens). All tokens are 0."""
    batch, _ = paged_batch(chunks, 0)
    tables = batch.block_tables if tables is None else tables
    return Inputs(
        np.repeat(batch.rows, np.diff(batch.starts)) % len(tables),
        batch.positions.numpy(),
        batch.cache_indices.numpy(),
        batch.starts,
        batch.context_lengths,
        batch.rows,
        torch.zeros((len(tables), 2 * BUCKETS[-1]), dtype=torch.int32),
        tables,
        segments=(),
    )


def cuts_of(inputs: Inputs) -> dict[Kind, Cuts]:
    return {kind: cut_batch(inputs, *kind) for kind in KINDS}


@pytest.mark.parametrize("bucket", BUCKETS)
def test_in_each_bucket_a_recording_reads_the_steps_own_numbers_and_writes_padding_to_the_spare_block(
    bucket: int,
) -> None:
    cache = KVCache((HEADS,), 8, BLOCK_SIZE, torch.float32, CPU)
    recordings, read = Recordings(computed), list[CudaStep]()

    def compute(step: CudaStep) -> torch.Tensor:
        read.append(step)
        return torch.stack([step.batch.positions, step.batch.cache_indices], dim=1)

    def score(hidden: torch.Tensor) -> None:
        raise AssertionError("nothing is sampled")

    smaller = max((each for each in BUCKETS if each < bucket), default=0) + 1
    tables = torch.zeros((2, 3), dtype=torch.int32)  # the same in all steps
    for tokens in (bucket, smaller, bucket):
        inputs = inputs_of([(before, 1) for before in range(tokens)], tables)
        cuts = cuts_of(inputs)
        form = Form.of(inputs, Runs.of(()), cuts)
        assert form and form.tokens == bucket
        given = replace(inputs, new_places=np.array([1]), new_blocks=np.array([tokens]))
        hidden = recordings.run(form, given, Runs.of(()), cuts, cache, Group(0, 1), compute, score).hidden
        assert hidden.tolist() == np.stack([inputs.positions, inputs.cache_indices], axis=1).tolist()
        assert tables[0].tolist() == [0, tokens, 0]
        assert (read[-1].batch.cache_indices[tokens:] == cache.spare_index).all()
        own, lists = cuts[KINDS[0]], read[-1].tiles[KINDS[0]]
        for name in ("short", "long", "split"):
            worklist = getattr(lists, name)
            assert worklist.entries[: int(worklist.count)].tolist() == getattr(own, name).tolist()
    assert len({id(each) for each in read}) == 1


@pytest.mark.parametrize(
    ("chunks", "form"),
    [
        ([(0, 1)] * 3, Form(4, 512, long=False, widest=0, int8=False, sampled=False)),
        ([(600, 1)] * 300, Form(384, 4096, long=False, widest=0, int8=False, sampled=False)),
        ([(0, 9), (40, 1)], Form(16, 512, long=True, widest=0, int8=False, sampled=False)),
        ([(0, 512)], Form(512, 512, long=True, widest=0, int8=False, sampled=False)),
        ([(0, 513)], None),
        ([(8200, 1)] * 300, None),
    ],
    ids=["decodes", "split decodes", "a chunk and a decode", "the largest", "too many tokens", "too many parts"],
)
def test_a_steps_form_is_the_least_that_it_fits_into(chunks: list[tuple[int, int]], form: Form | None) -> None:
    inputs = inputs_of(chunks)
    assert Form.of(inputs, Runs.of(()), cuts_of(inputs)) == form


@pytest.mark.parametrize(("own", "recordable"), [(NOTHING, True), (OwnWeights(norms=(torch.ones(4),)), False)])
def test_adapters_that_are_computed_one_by_one_are_not_recorded(own: OwnWeights, recordable: bool) -> None:
    ops = CudaOperations(CPU, computed)
    layouts = (LinearLayout("fused", 0, (LinearPart("p", 8, (slice(0, 8),)),), 8, slice(0, 8)),)
    adapter = replace(adapter_for(layouts), own=own)
    assert ops.is_recordable(Runs.of([Segment(0, 2, adapter)])) is recordable


def test_what_was_found_out_about_adapters_is_kept_while_they_are_the_same() -> None:
    layouts = (LinearLayout("fused", 0, (LinearPart("p", 8, (slice(0, 8),)),), 8, slice(0, 8)),)
    adapter, other = (adapter_for(layouts) for _ in range(2))
    runs = Runs.of([Segment(1, 3, adapter)])
    assert runs.after([Segment(1, 3, adapter)]) is runs
    for changed in [Segment(1, 3, other)], [Segment(1, 4, adapter)], [Segment(0, 1, adapter), Segment(1, 3, adapter)]:
        assert runs.after(changed).tiles.tolist() == Runs.of(changed).tiles.tolist() != runs.tiles.tolist()
