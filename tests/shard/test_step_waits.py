"""A step on a GPU is enqueued without waiting for it, and few copies and launches make it up."""

from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from loraplex_protos.generation_pb2 import Sampling
from loraplex_protos.shard_pb2 import BadWord
from loraplex_shard.checkpoint import open_checkpoint
from loraplex_shard.device.copies import Mark
from loraplex_shard.device.parallel import Group
from loraplex_shard.layers.parameters import ParameterForm
from loraplex_shard.models import load_model
from loraplex_shard.ops.base import Outputs
from loraplex_shard.ops.cuda.operations import CudaOperations
from loraplex_shard.sampling.grammars import GrammarCompiler
from loraplex_shard.shapes.adapter import AdapterWeights
from loraplex_shard.stepping.runner import Runner
from tests.shard.absent_gpu import DEVICE, Counts, counted
from tests.shard.decoders import adapter_for
from tests.shard.planner import BLOCK_SIZE, GREEDY, MAX_MODEL_LEN, NUM_BLOCKS, Planner, random_tokens

BY_CHANCE = Sampling(temperature=1, seed=3, top_k=5, top_p=0.9, min_p=0.01)


class Slots:
    def __init__(self, adapters: Sequence[AdapterWeights]) -> None:
        self._adapters = adapters

    def adapter_in(self, slot: int) -> AdapterWeights:
        return self._adapters[slot - 1]


@pytest.fixture(scope="module")
def runner(checkpoint: Path) -> Runner:
    return make_runner(checkpoint, CudaOperations(DEVICE))


def make_runner(directory: Path, ops: CudaOperations) -> Runner:
    form = ParameterForm(torch.bfloat16, DEVICE, "none")
    model = load_model(open_checkpoint(str(directory)), Group(0, 1), ops, form, MAX_MODEL_LEN)
    grammars = GrammarCompiler(b"{}", model.vocab_size, end_token_ids=(2,))
    but_head = model.layouts[:-1]
    slots = Slots([adapter_for(model.layouts, torch.bfloat16, touched) for touched in (but_head, model.layouts)])
    cache = model.new_cache(NUM_BLOCKS, BLOCK_SIZE)
    return Runner(model, cache, slots, Group(0, 1), 8, MAX_MODEL_LEN, DEVICE, grammars)  # type: ignore[arg-type]


def decode(runner: Runner, slots: Sequence[int], sampling: Sampling = GREEDY, length: int = 21) -> Counts:
    """What is asked of the device for a token of sequences in these slots."""
    runner.clear()
    planner = Planner()
    for row, slot in enumerate(slots):
        planner.start(row, random_tokens(length, row), slot=slot, sampling=sampling)
    with counted() as counts:
        planner.run(runner.step, dict.fromkeys(range(len(slots)), length))
        counts.clear()
        planner.decode(runner.step, range(len(slots)), 1)
    return counts


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        BY_CHANCE,
        Sampling(repetition_penalty=1.2, frequency_penalty=0.1),
        Sampling(logit_bias={5: 1.0}),
    ],
    ids=["greedy", "by chance", "penalties", "biases"],
)
@pytest.mark.parametrize("slots", [[0], [0, 0, 1, 2]], ids=["base", "adapters"])
def test_nobody_waits_for_the_device_before_the_next_step(runner: Runner, slots: list[int], sampling: Sampling) -> None:
    assert decode(runner, slots, sampling)["waits"] == 0


def test_chunks_of_prompts_are_enqueued_without_waiting(runner: Runner) -> None:
    runner.clear()
    planner = Planner()
    for row in range(3):
        planner.start(row, random_tokens(60, row), slot=row)
    with counted() as counts:
        planner.run(runner.step, {0: 60, 1: 20, 2: 7})
    assert counts["waits"] == 0


def test_logprobs_are_sent_without_waiting(runner: Runner) -> None:
    runner.clear()
    planner = Planner()
    planner.start(0, random_tokens(9, 0), logprobs=True, top_logprobs=3, prompt_logprobs=True)
    with counted() as counts:
        planner.run(runner.step, {0: 9})
    assert counts["waits"] == 0


def test_a_step_copies_little_to_the_device(runner: Runner) -> None:
    """Its columns, its tiles of adapters and attention, and where samples go; if adapters touch the lm head, the tiles
    of that."""
    assert (
        decode(runner, [0])["copies"] == decode(runner, [0, 1, 1])["copies"] == decode(runner, [0] * 8)["copies"] == 3
    )
    assert decode(runner, [0, 1, 2])["copies"] == 4


@pytest.mark.parametrize(
    ("slots", "sampling", "copies", "launches"),
    [
        ([0], GREEDY, 1, 0),
        ([0], BY_CHANCE, 1, 0),
        ([0, 1, 1], GREEDY, 1, 0),
        # The lm head with the adapter's delta, then the choice, and where its tokens go.
        ([0, 1, 2], GREEDY, 3, 9),
        # A penalty, the choice, and where its tokens go.
        ([0], Sampling(repetition_penalty=1.2), 4, 22),
    ],
    ids=["base", "by chance", "adapters", "an adapter of the lm head", "penalty"],
)
def test_a_recorded_step_is_one_copy_and_one_launch(
    checkpoint: Path, slots: list[int], sampling: Sampling, copies: int, launches: int
) -> None:
    replays = 0

    def record(compute: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        return compute(), replay

    def replay() -> None:
        nonlocal replays
        replays += 1

    runner = make_runner(checkpoint, CudaOperations(DEVICE, record))
    decode(runner, slots, sampling)  # recorded, for both steps have been seen
    decode(runner, slots, sampling)
    before, counts = replays, decode(runner, slots, sampling)
    assert replays == before + 2  # the prompt and the token
    assert counts["waits"] == 0
    assert counts["copies"] <= copies and counts["launches"] <= launches


@pytest.mark.parametrize(
    ("constraint", "waits"),
    [
        ({"min_new_tokens": 4, "end_token_ids": [2]}, 0),
        ({"allowed_token_ids": [3, 4]}, 0),
        ({"bad_words": [BadWord(tokens=[3, 4])]}, 1),
    ],
    ids=["least length", "allowed tokens", "bad words"],
)
def test_a_step_is_waited_for_if_the_next_one_must_know_its_tokens(
    runner: Runner, constraint: dict[str, object], waits: int
) -> None:
    runner.clear()
    planner = Planner()
    planner.start(0, random_tokens(9, 0), **constraint)
    planner.start(1, random_tokens(9, 1))
    with counted() as counts, patch("loraplex_shard.stepping.progress.Mark", wraps=Mark) as marks:
        planner.run(runner.step, {0: 9, 1: 9})
    assert counts["waits"] == 0
    assert marks.call_count == waits


def test_the_count_notices_what_waits(runner: Runner) -> None:
    with counted() as counts:
        there = torch.tensor([1.0], device=DEVICE)
        assert there.tolist() == [0.0]
        assert not bool(there[0] > 0)
        there.copy_(torch.zeros(1))
    assert counts["waits"] == 4
