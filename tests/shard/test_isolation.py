"""A failure of one sequence only ends that sequence; its neighbours get the same tokens as without it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from loraplex_protos import shard_pb2 as pb
from loraplex_protos.generation_pb2 import Sampling
from loraplex_shard.device.parallel import Group
from loraplex_shard.lora.store import AdapterStore
from loraplex_shard.lora.weights.arena import in_one_piece
from loraplex_shard.models.decoder import Decoder
from loraplex_shard.sampling.grammars import GrammarCompiler
from loraplex_shard.shapes.adapter import AdapterWeights, Expansion, LayerWeights
from loraplex_shard.stepping.runner import Runner
from tests.e2e.tiny import byte_tokenizer, save_model
from tests.shard.decoders import load
from tests.shard.planner import BLOCK_SIZE, NUM_BLOCKS, Planner

CPU = torch.device("cpu")
TOKENIZER = byte_tokenizer()
VOCAB = len(TOKENIZER)
ROWS = 6
WORD = pb.Grammar(kind=pb.GRAMMAR_KIND_REGEX, text="[a-z]{200}")
PANIC = pb.Grammar(kind=pb.GRAMMAR_KIND_REGEX, text="panic")


class Panic(BaseException):
    """An error like a panic in Rust, which is not an Exception."""


class Panicking:
    """A matcher whose methods fail after `calls` calls."""

    def __init__(self, calls: int) -> None:
        self._calls = calls

    def is_error(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        self._calls -= 1
        if self._calls < 0:
            raise Panic(name)
        return lambda *_: []


class Compiler(GrammarCompiler):
    calls = 0  # after which a matcher of PANIC fails

    def matcher(self, grammar: pb.Grammar) -> LLMatcher:
        return Panicking(self.calls) if grammar == PANIC else super().matcher(grammar)  # type: ignore[return-value]


class Adapters(AdapterStore):
    """A store whose slots hold an adapter that turns values into NaN."""

    def adapter_in(self, slot: int) -> AdapterWeights:
        nan = LayerWeights(0, torch.full((1, 72), torch.nan), (Expansion(0, 1, 0, 24, torch.ones(1, 24)),))
        return in_one_piece({"layers.0.qkv": nan}, layer_count=9)


class Fault(NamedTuple):
    reason: pb.FailureReason.ValueType
    options: dict[str, Any]  # fields of the start


FAULTS = {
    "token": Fault(pb.FAILURE_REASON_UNKNOWN_TOKEN, {"outputs": [VOCAB]}),
    "far token": Fault(pb.FAILURE_REASON_UNKNOWN_TOKEN, {"outputs": [2**32 - 1]}),
    "bias": Fault(pb.FAILURE_REASON_UNKNOWN_TOKEN, {"sampling": Sampling(logit_bias={VOCAB: 9.0})}),
    "not finite": Fault(pb.FAILURE_REASON_NOT_FINITE, {"slot": 1}),
    "prompt not finite": Fault(pb.FAILURE_REASON_NOT_FINITE, {"slot": 1, "prompt_logprobs": True}),
    "output": Fault(pb.FAILURE_REASON_GRAMMAR, {"outputs": [3, 4], "grammar": WORD}),
    "cannot be compiled": Fault(
        pb.FAILURE_REASON_GRAMMAR, {"grammar": pb.Grammar(kind=pb.GRAMMAR_KIND_REGEX, text="(")}
    ),
    "panic": Fault(pb.FAILURE_REASON_GRAMMAR, {"grammar": PANIC}),
}

neighbours = st.fixed_dictionaries(
    {
        "length": st.integers(1, 40),
        "first": st.integers(0, VOCAB - 1),
        "sampling": st.builds(
            Sampling,
            temperature=st.sampled_from([0, 1e-38, 0.8, 3e38]),
            top_k=st.sampled_from([0, 1, 5, 2**32 - 1]),
            top_p=st.sampled_from([1e-6, 0.9, 1]),
            typical_p=st.sampled_from([0.5, 1]),
            min_p=st.sampled_from([0, 0.1, 1]),
            repetition_penalty=st.sampled_from([1e-38, 1, 1.3, 3e38]),
            frequency_penalty=st.sampled_from([-2, 0, 2]),
            seed=st.integers(0, 2**64 - 1),
            logit_bias=st.sampled_from([-100.0, 100.0]).map(lambda value: dict.fromkeys(range(VOCAB), value)),
        ),
        "grammar": st.sampled_from([None, WORD]),
        "logprobs": st.booleans(),
        "prompt_logprobs": st.booleans(),
        "min_new_tokens": st.sampled_from([0, 50]),
        "end_token_ids": st.sampled_from([[], [VOCAB - 1, VOCAB], list(range(VOCAB))]),
    }
)


@pytest.fixture(scope="module")
def make_runner(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Runner]:
    decoder: Decoder = load(save_model(tmp_path_factory.mktemp("bytes")), max_model_len=512)
    adapters = Adapters(decoder.layouts, torch.float32, CPU, Path(), "LlamaForCausalLM")
    compiler = Compiler(TOKENIZER.backend_tokenizer.to_str().encode(), VOCAB, (VOCAB - 1,))
    cache = decoder.new_cache(NUM_BLOCKS, BLOCK_SIZE)
    return lambda: Runner(decoder, cache, adapters, Group(0, 1), ROWS + 1, 512, CPU, compiler)


def run(
    runner: Runner, neighbours: list[dict[str, Any]], fault: Fault | None, begins: int, chunk: int
) -> tuple[dict[int, list[int]], list[pb.FailureReason.ValueType]]:
    """The neighbours' outputs after ten steps, and the failure of the sequence that joined them during one step."""
    planner, reasons = Planner(), list[pb.FailureReason.ValueType]()
    for row, neighbour in enumerate(neighbours):
        options = {name: value for name, value in neighbour.items() if name not in ("length", "first")}
        prompt = [(neighbour["first"] + 7 * place) % VOCAB for place in range(neighbour["length"])]
        planner.start(row, prompt, **options)
    for step in range(10):
        if fault and step == begins:
            planner.start(ROWS, [1, 2, 3], **fault.options)
        lengths = {number: min(row.known - row.computed, chunk) for number, row in planner.rows.items()}
        plan = planner.plan(lengths)
        response = runner.step(plan)
        planner.read(plan, response)
        assert {plan.rows[place] for place in response.failed_chunks} <= {ROWS}
        reasons += response.failure_reasons
        if reasons and ROWS in planner.rows and step > begins:  # the router learns of the failure one plan later
            planner.release(ROWS)
    return {row: planner.rows[row].outputs for row in range(len(neighbours))}, reasons


@given(
    neighbours=st.lists(neighbours, min_size=1, max_size=ROWS),
    fault=st.sampled_from(sorted(FAULTS)),
    begins=st.integers(0, 6),
    chunk=st.sampled_from([3, 64]),
    calls=st.integers(0, 4),
)
@settings(max_examples=40, deadline=None)
def test_a_failing_sequence_does_not_change_its_neighbours_tokens(
    make_runner: Callable[[], Runner],
    neighbours: list[dict[str, Any]],
    fault: str,
    begins: int,
    chunk: int,
    calls: int,
) -> None:
    Compiler.calls = calls
    expected, none = run(make_runner(), neighbours, None, begins, chunk)
    outputs, reasons = run(make_runner(), neighbours, FAULTS[fault], begins, chunk)
    assert not none and reasons and set(reasons) == {FAULTS[fault].reason}
    assert outputs == expected
