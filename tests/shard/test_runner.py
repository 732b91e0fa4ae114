"""Plans give the same tokens as transformers and PEFT, however sequences are divided, mixed, restarted and moved."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from loraplex_protos.generation_pb2 import Sampling
from loraplex_protos.shard_pb2 import FAILURE_REASON_NOT_FINITE, StepRequest
from loraplex_shard.device.parallel import Group
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.sources.local import LocalSource
from loraplex_shard.lora.store import AdapterStore
from loraplex_shard.lora.weights.arena import in_one_piece
from loraplex_shard.models.decoder import Decoder
from loraplex_shard.sampling.grammars import GrammarCompiler
from loraplex_shard.serving.sizing import FixedSlots
from loraplex_shard.shapes.adapter import AdapterWeights, Expansion, LayerWeights
from loraplex_shard.stepping.progress import LOGITS_SLICE
from loraplex_shard.stepping.runner import Runner
from loraplex_shard.stepping.warmup import zero_adapters
from tests.shard.decoders import load
from tests.shard.elsewhere import DEVICE
from tests.shard.planner import (
    BLOCK_SIZE,
    GREEDY,
    MAX_MODEL_LEN,
    NUM_BLOCKS,
    Planner,
    greedy,
    random_tokens,
    save_adapter,
)

RANDOM = Sampling(temperature=1.5, top_p=0.95, repetition_penalty=1.2, frequency_penalty=0.1, seed=11)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> PreTrainedModel:
    return LlamaForCausalLM.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def decoder(checkpoint: Path) -> Decoder:
    return load(checkpoint, max_model_len=MAX_MODEL_LEN)


@pytest.fixture
def adapters(decoder: Decoder, tmp_path: Path) -> AdapterStore:
    return AdapterStore(decoder.layouts, torch.float32, DEVICE, BaseModel("LlamaForCausalLM"), [LocalSource(tmp_path)])


@pytest.fixture
def runner(decoder: Decoder, adapters: AdapterStore) -> Runner:
    return make_runner(decoder, adapters)


def make_runner(decoder: Decoder, adapters: AdapterStore) -> Runner:
    cache = decoder.new_cache(NUM_BLOCKS, BLOCK_SIZE)
    grammars = GrammarCompiler(b"{}", decoder.vocab_size, end_token_ids=(2,))
    return Runner(decoder, cache, adapters, Group(0, 1), 8, MAX_MODEL_LEN, DEVICE, grammars)


def test_prefill_chunks_and_decodes_in_one_batch_give_the_tokens_of_transformers(
    runner: Runner, reference: PreTrainedModel
) -> None:
    prompts = random_tokens(21, 1), random_tokens(50, 2), random_tokens(1, 3)
    planner = Planner()
    planner.start(5, prompts[0])
    planner.run(runner.step, {5: 21})
    planner.start(0, prompts[1])
    planner.run(runner.step, {5: 1, 0: 7})
    planner.start(2, prompts[2])
    planner.run(runner.step, {0: 30, 2: 1, 5: 1})
    planner.run(runner.step, {0: 13, 5: 1})
    planner.decode(runner.step, [0, 5, 2], 10)
    assert planner.rows[5].outputs == greedy(reference, prompts[0], 14)
    assert planner.rows[0].outputs == greedy(reference, prompts[1], 11)
    assert planner.rows[2].outputs == greedy(reference, prompts[2], 11)


def test_adapters_and_the_base_in_one_batch_give_the_tokens_of_peft(
    runner: Runner, adapters: AdapterStore, reference: PreTrainedModel, checkpoint: Path, tmp_path: Path
) -> None:
    models = [reference, *(save_adapter(checkpoint, tmp_path / str(r), seed=r, lora_rank=r) for r in (3, 8))]
    for slot, name in enumerate(("3", "8"), start=1):
        adapters.load(adapters.stage(name, "local", "", "").digest, slot)
    prompts = [random_tokens(length, length) for length in (20, 33, 17, 40, 18)]
    slots = [1, 0, 2, 1, 0]
    planner = Planner()
    for row, (prompt, slot) in enumerate(zip(prompts, slots, strict=True)):
        planner.start(row, prompt, slot=slot)
    planner.run(runner.step, {row: len(prompt) // 2 for row, prompt in enumerate(prompts)})
    planner.run(runner.step, {row: -(-len(prompt) // 2) for row, prompt in enumerate(prompts)})
    planner.decode(runner.step, range(5), 9)
    for row, (prompt, slot) in enumerate(zip(prompts, slots, strict=True)):
        assert planner.rows[row].outputs == greedy(models[slot], prompt, 10)
    assert greedy(models[1], prompts[0], 10) != greedy(models[2], prompts[0], 10)


def test_a_prefix_of_another_sequence_is_not_recomputed(runner: Runner, reference: PreTrainedModel) -> None:
    first, second = random_tokens(48, 1), [*random_tokens(48, 1)[:32], *random_tokens(5, 9)]
    planner = Planner()
    planner.start(0, first)
    planner.run(runner.step, {0: 48})
    planner.start(1, second, prefix=planner.rows[0].blocks[:2])
    planner.run(runner.step, {0: 1, 1: 5})
    planner.decode(runner.step, [0, 1], 6)
    assert planner.rows[0].outputs == greedy(reference, first, 8)
    assert planner.rows[1].outputs == greedy(reference, second, 7)


def test_a_row_forgets_its_former_sequence(runner: Runner) -> None:
    def outputs(planner: Planner) -> list[int]:
        planner.start(3, random_tokens(6, 2), sampling=RANDOM)
        planner.run(runner.step, {3: 6})
        planner.decode(runner.step, [3], 12)
        return planner.rows[3].outputs

    planner = Planner()
    planner.start(3, random_tokens(200, 1), prompt_logprobs=True, logprobs=True, top_logprobs=3)
    planner.run(runner.step, {3: 200})
    planner.release(3)
    after_another = outputs(planner)
    runner.clear()
    assert after_another == outputs(Planner())


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "sampled"])
def test_a_preempted_sequence_continues_as_if_nothing_had_happened(runner: Runner, sampling: Sampling) -> None:
    prompt = random_tokens(30, 4)
    undisturbed, preempted = Planner(), Planner()
    undisturbed.start(0, prompt, sampling=sampling)
    undisturbed.run(runner.step, {0: 30})
    undisturbed.decode(runner.step, [0], 19)
    runner.clear()
    preempted.start(0, prompt, sampling=sampling)
    preempted.run(runner.step, {0: 30})
    preempted.decode(runner.step, [0], 9)
    outputs = preempted.rows[0].outputs
    preempted.release(0)
    preempted.start(6, prompt, outputs=outputs, sampling=sampling)
    preempted.run(runner.step, {6: 33})
    preempted.run(runner.step, {6: 7})
    preempted.decode(runner.step, [6], 9)
    assert preempted.rows[6].outputs == undisturbed.rows[0].outputs


def test_a_seeds_tokens_do_not_depend_on_the_neighbours(runner: Runner) -> None:
    prompt = random_tokens(20, 5)
    alone, together = Planner(), Planner()
    alone.start(0, prompt, sampling=RANDOM)
    alone.run(runner.step, {0: 20})
    alone.decode(runner.step, [0], 15)
    runner.clear()
    for row in range(4):
        together.start(row, random_tokens(9, row), sampling=Sampling(repetition_penalty=2))
    together.start(7, prompt, sampling=RANDOM)
    together.run(runner.step, {0: 9, 1: 9, 2: 4, 3: 9, 7: 20})
    together.decode(runner.step, [0, 1, 3, 7], 15)
    assert together.rows[7].outputs == alone.rows[0].outputs


def test_prompt_logprobs_equal_transformers(runner: Runner, reference: PreTrainedModel) -> None:
    prompt = random_tokens(LOGITS_SLICE + 40, 6)
    planner = Planner()
    planner.start(1, prompt, prompt_logprobs=True)
    planner.start(4, random_tokens(20, 7))
    responses = [planner.run(runner.step, chunks) for chunks in ({1: 10, 4: 20}, {4: 1, 1: len(prompt) - 11}, {1: 1})]
    assert [list(response.prompt_logprob_counts) for response in responses] == [[10, 0], [0, len(prompt) - 11], [0]]
    after = planner.run(runner.step, {4: 1})
    assert not after.prompt_logprob_counts and not after.prompt_logprobs
    with torch.inference_mode():
        expected = reference(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
    actual = torch.tensor([value for response in responses for value in response.prompt_logprobs])
    wanted = expected[range(len(prompt) - 1), prompt[1:]]
    torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)
    ranks = torch.tensor([value for response in responses for value in response.prompt_ranks])
    torch.testing.assert_close(ranks, (expected[:-1] >= wanted[:, None]).sum(-1), atol=1, rtol=0)  # but for near ties


def test_requested_prompt_alternatives_equal_transformers(runner: Runner, reference: PreTrainedModel) -> None:
    prompts = random_tokens(LOGITS_SLICE + 9, 6), random_tokens(12, 7), random_tokens(10, 8)
    planner = Planner()
    for row, (prompt, count) in enumerate(zip(prompts, (0, 3, 1), strict=True)):
        planner.start(row, prompt, prompt_logprobs=True, prompt_top_logprobs=count)
    response = planner.run(runner.step, {row: len(prompt) for row, prompt in enumerate(prompts)})
    assert list(response.prompt_alternative_counts) == [0] * (LOGITS_SLICE + 8) + [3] * 11 + [1] * 9
    with torch.inference_mode():
        scores = [reference(input_ids=torch.tensor([p])).logits[0, :-1].log_softmax(-1) for p in prompts]
    best = [scores[1].topk(3), scores[2].topk(1)]
    expected = torch.cat([found.values.flatten() for found in best])
    torch.testing.assert_close(torch.tensor(response.prompt_alternative_logprobs), expected, atol=1e-4, rtol=1e-4)
    assert list(response.prompt_alternative_tokens) == torch.cat([found.indices.flatten() for found in best]).tolist()


def test_a_restarted_sequence_reports_no_output_as_prompt(runner: Runner) -> None:
    planner = Planner()
    planner.start(0, random_tokens(8, 1), outputs=random_tokens(5, 2), prompt_logprobs=True)
    assert list(planner.run(runner.step, {0: 13}).prompt_logprob_counts) == [7]


def test_logprobs_are_computed_before_temperature_and_penalties(runner: Runner, reference: PreTrainedModel) -> None:
    prompts = random_tokens(12, 1), random_tokens(15, 2), random_tokens(9, 3)
    planner = Planner()
    planner.start(0, prompts[0], sampling=RANDOM, logprobs=True, top_logprobs=4)
    planner.start(1, prompts[1])
    planner.start(2, prompts[2], logprobs=True, top_logprobs=2)
    response = planner.run(runner.step, {0: 12, 1: 15, 2: 9})
    assert list(response.alternative_counts) == [4, 0, 2]
    with torch.inference_mode():
        expected = [reference(input_ids=torch.tensor([p])).logits[0, -1].log_softmax(-1) for p in prompts]
    best = torch.cat([expected[0].topk(4).values, expected[2].topk(2).values])
    places = torch.cat([expected[0].topk(4).indices, expected[2].topk(2).indices])
    chosen = torch.stack([values[token] for values, token in zip(expected, response.tokens, strict=True)])
    torch.testing.assert_close(torch.tensor(response.logprobs), chosen, atol=1e-4, rtol=1e-4)
    assert list(response.alternative_tokens) == places.tolist()
    torch.testing.assert_close(torch.tensor(response.alternative_logprobs), best, atol=1e-4, rtol=1e-4)


def test_nothing_is_reported_without_a_request(runner: Runner) -> None:
    planner = Planner()
    planner.start(0, random_tokens(5, 1))
    response = planner.run(runner.step, {0: 5})
    named = {descriptor.name for descriptor, _ in response.ListFields()}
    assert named <= {"step", "token_counts", "tokens"}


def test_a_plan_without_chunks_does_nothing(runner: Runner) -> None:
    assert runner.step(StepRequest(step=4)).step == 4


class Poison:
    """An adapter store in which every slot holds an adapter that turns values into NaN."""

    def adapter_in(self, slot: int) -> AdapterWeights:
        nan = LayerWeights(0, torch.full((1, 36), torch.nan), (Expansion(0, 1, 0, 12, torch.ones(1, 12)),))
        weights = in_one_piece({"layers.0.qkv": nan}, layer_count=9)
        return weights.at(weights.memory.to(DEVICE))


def test_a_sequence_that_is_not_finite_is_the_only_one_that_fails(decoder: Decoder, reference: PreTrainedModel) -> None:
    runner = make_runner(decoder, Poison())  # type: ignore[arg-type]
    prompts = random_tokens(18, 1), random_tokens(20, 2)
    planner = Planner()
    planner.start(0, prompts[0], logprobs=True, top_logprobs=2)
    planner.start(1, random_tokens(18, 3), slot=1, sampling=RANDOM, logprobs=True, top_logprobs=2)
    plan = planner.plan({0: 18, 1: 18})
    response = runner.step(plan)
    planner.read(plan, response)
    assert list(response.token_counts) == [1, 0]
    assert list(response.failed_chunks) == [1]
    assert list(response.failure_reasons) == [FAILURE_REASON_NOT_FINITE]
    assert (len(response.logprobs), list(response.alternative_counts)) == (1, [2])
    assert len(response.alternative_tokens) == len(response.alternative_logprobs) == 2
    planner.run(runner.step, {0: 1, 1: 1})  # the router does not know yet
    planner.release(1)
    planner.start(2, prompts[1])  # in the blocks that contained NaN
    planner.run(runner.step, {0: 1, 2: 20})
    planner.decode(runner.step, [0, 2], 7)
    assert planner.rows[0].outputs == greedy(reference, prompts[0], 10)
    assert planner.rows[2].outputs == greedy(reference, prompts[1], 8)


def test_the_last_position_of_the_context_can_be_computed(runner: Runner, reference: PreTrainedModel) -> None:
    prompt = random_tokens(MAX_MODEL_LEN - 1, 8)
    planner = Planner()
    planner.start(0, prompt)
    planner.run(runner.step, {0: MAX_MODEL_LEN - 1})
    planner.decode(runner.step, [0], 1)
    assert planner.rows[0].outputs[0] == greedy(reference, prompt, 1)[0]


@pytest.mark.parametrize(
    ("max_batch_tokens", "flat"), [(1, True), (30, False), (MAX_MODEL_LEN + 100, True), (20 * MAX_MODEL_LEN, False)]
)
def test_a_warmed_up_runner_gives_the_same_answers(
    runner: Runner, decoder: Decoder, reference: PreTrainedModel, max_batch_tokens: int, flat: bool
) -> None:
    runner.slots = FixedSlots(zero_adapters(decoder.layouts, torch.float32))
    assert runner.warmup(max_batch_tokens, flat) > 0
    runner.record((1, 2, 512), max_batch_tokens)
    planner = Planner()
    planner.start(0, random_tokens(20, 1))
    planner.run(runner.step, {0: 20})
    planner.decode(runner.step, [0], 5)
    assert planner.rows[0].outputs == greedy(reference, random_tokens(20, 1), 6)


def start_of(plan: StepRequest, **values: object) -> None:
    start = plan.starts[0]
    for name, value in values.items():
        start.ClearField(name)
        if isinstance(value, list):
            getattr(start, name).extend(value)
        else:
            setattr(start, name, value)


MISTAKES: dict[str, Callable[[StepRequest], object]] = {
    "unknown row": lambda plan: plan.rows.__setitem__(0, 8),
    "row that was never started": lambda plan: plan.rows.__setitem__(0, 7),
    "row twice": lambda plan: plan.rows.__setitem__(1, plan.rows[0]),
    "column too short": lambda plan: plan.lengths.pop(),
    "empty chunk": lambda plan: plan.lengths.__setitem__(0, 0),
    "more tokens than known": lambda plan: plan.lengths.__setitem__(0, 11),
    "sample before the end": lambda plan: plan.lengths.__setitem__(0, 9),
    "block out of range": lambda plan: plan.blocks.__setitem__(0, NUM_BLOCKS),
    "block missing": lambda plan: (plan.block_counts.__setitem__(0, 0), plan.blocks.pop()),
    "blocks left over": lambda plan: plan.blocks.append(1),
    "more blocks than the context": lambda plan: (plan.block_counts.__setitem__(1, 40), plan.blocks.extend([1] * 39)),
    "start in an unknown row": lambda plan: start_of(plan, row=8),
    "start without tokens": lambda plan: start_of(plan, tokens=[]),
    "start longer than the context": lambda plan: start_of(plan, tokens=[1] * (MAX_MODEL_LEN + 1)),
    "start without a prompt": lambda plan: start_of(plan, prompt_length=0),
    "prompt longer than the tokens": lambda plan: start_of(plan, prompt_length=11),
    "everything computed before": lambda plan: start_of(plan, computed=10),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_plan_that_does_not_fit_is_refused(runner: Runner, mistake: str) -> None:
    planner = Planner()
    for row in (0, 1):
        planner.start(row, random_tokens(10, row))
    plan = planner.plan({0: 10, 1: 10})
    MISTAKES[mistake](plan)
    with pytest.raises(AssertionError):
        runner.step(plan)


def test_a_slot_without_adapter_is_refused(runner: Runner) -> None:
    planner = Planner()
    planner.start(0, random_tokens(10, 0), slot=3)
    with pytest.raises(KeyError):
        runner.step(planner.plan({0: 10}))
