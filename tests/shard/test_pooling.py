"""Pooled sequences in the runner equal transformers' hidden states, for all chunks and neighbours."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize
from transformers import LlamaForCausalLM, PreTrainedModel

from loraplex_protos.shard_pb2 import FAILURE_REASON_NOT_FINITE, StepResponse
from loraplex_shard.checkpoint.base import PoolingMode, PoolingSpec
from loraplex_shard.device.parallel import Group
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.sources.local import LocalSource
from loraplex_shard.lora.store import AdapterStore
from loraplex_shard.models.decoder import Decoder
from loraplex_shard.sampling.grammars import GrammarCompiler
from loraplex_shard.stepping.runner import Runner
from tests.shard.decoders import load
from tests.shard.planner import (
    BLOCK_SIZE,
    MAX_MODEL_LEN,
    NUM_BLOCKS,
    Planner,
    greedy,
    random_tokens,
    save_adapter,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> PreTrainedModel:
    return LlamaForCausalLM.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def decoder(checkpoint: Path) -> Decoder:
    return load(checkpoint, max_model_len=MAX_MODEL_LEN)


@pytest.fixture
def adapters(decoder: Decoder, tmp_path: Path) -> AdapterStore:
    return AdapterStore(decoder.layouts, torch.float32, CPU, BaseModel("LlamaForCausalLM"), [LocalSource(tmp_path)])


@pytest.fixture
def runner(decoder: Decoder, adapters: AdapterStore) -> Runner:
    grammars = GrammarCompiler(b"{}", decoder.vocab_size, end_token_ids=(2,))
    cache = decoder.new_cache(NUM_BLOCKS, BLOCK_SIZE)
    return Runner(decoder, cache, adapters, Group(0, 1), 8, MAX_MODEL_LEN, CPU, grammars)


def run(planner: Planner, runner: Runner, lengths: dict[int, int], pooled: set[int]) -> StepResponse:
    """Runs one step in which the rows of `pooled` do not sample."""
    plan = planner.plan(lengths)
    for place, row in enumerate(plan.rows):
        plan.samples[place] = plan.samples[place] and row not in pooled
    response = runner.step(plan)
    planner.read(plan, response)
    return response


def vectors(response: StepResponse) -> torch.Tensor:
    return torch.tensor(list(response.pooled)).view(len(response.pooled_chunks), -1)


def expected(model: torch.nn.Module, prompt: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        hidden = model(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0]
    return normalize(hidden.float().mean(0), dim=0)


def test_one_or_many_chunks_give_the_normalized_mean_beside_a_neighbour(
    runner: Runner, reference: PreTrainedModel
) -> None:
    prompts = {row: random_tokens(length, row) for row, length in ((0, 40), (1, 7), (2, 20))}
    planner = Planner()
    planner.start(0, prompts[0], pool=True)
    planner.start(1, prompts[1], pool=True)
    planner.start(2, prompts[2])
    response = run(planner, runner, {0: 15, 1: 7, 2: 20}, {0, 1})
    assert list(response.pooled_chunks) == [1]
    torch.testing.assert_close(vectors(response)[0], expected(reference, prompts[1]), atol=1e-5, rtol=1e-4)
    assert not run(planner, runner, {0: 24, 2: 1}, {0}).pooled
    response = run(planner, runner, {0: 1, 2: 1}, {0})
    torch.testing.assert_close(vectors(response)[0], expected(reference, prompts[0]), atol=1e-5, rtol=1e-4)
    assert planner.rows[2].outputs == greedy(reference, prompts[2], 3)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(
    ("mode", "pool"),
    [("last", lambda hidden: hidden[-1]), ("first", lambda hidden: hidden[0]), ("mean", lambda hidden: hidden.mean(0))],
)
def test_pooling_follows_the_models_files(
    mode: PoolingMode,
    pool: Callable[[torch.Tensor], torch.Tensor],
    normalized: bool,
    decoder: Decoder,
    adapters: AdapterStore,
    reference: PreTrainedModel,
) -> None:
    grammars = GrammarCompiler(b"{}", decoder.vocab_size, end_token_ids=(2,))
    cache = decoder.new_cache(NUM_BLOCKS, BLOCK_SIZE)
    runner = Runner(
        decoder, cache, adapters, Group(0, 1), 8, MAX_MODEL_LEN, CPU, grammars, PoolingSpec(mode, normalized)
    )
    prompt, planner = random_tokens(20, 4), Planner()
    planner.start(0, prompt, pool=True)
    run(planner, runner, {0: 15}, {0})
    (vector,) = vectors(run(planner, runner, {0: 5}, {0}))
    with torch.inference_mode():
        hidden = reference(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0]
    expected = pool(hidden.float())
    expected = normalize(expected, dim=0) if normalized else expected
    torch.testing.assert_close(vector, expected, atol=1e-5, rtol=1e-4)


def test_a_reused_row_forgets_its_former_sum(runner: Runner, reference: PreTrainedModel) -> None:
    planner = Planner()
    planner.start(0, random_tokens(30, 1), pool=True)
    run(planner, runner, {0: 20}, {0})
    prompt = random_tokens(12, 2)
    planner.start(0, prompt, pool=True)
    response = run(planner, runner, {0: 12}, {0})
    torch.testing.assert_close(vectors(response)[0], expected(reference, prompt), atol=1e-5, rtol=1e-4)


def test_an_adapter_changes_the_vector_as_in_peft(
    runner: Runner, adapters: AdapterStore, checkpoint: Path, tmp_path: Path, reference: PreTrainedModel
) -> None:
    model, prompt = save_adapter(checkpoint, tmp_path / "a", seed=1, lora_rank=4), random_tokens(9, 3)
    adapters.load(adapters.stage("a", "local", "", "").digest, 1)
    planner = Planner()
    planner.start(0, prompt, slot=1, pool=True)
    planner.start(1, prompt, pool=True)
    response = run(planner, runner, {0: 9, 1: 9}, {0, 1})
    base, adapted = vectors(response)
    torch.testing.assert_close(adapted, expected(model, prompt), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(base, expected(reference, prompt), atol=1e-5, rtol=1e-4)
    assert (adapted - base).norm() > 0.01


def test_a_vector_that_is_not_finite_only_fails_its_sequence(checkpoint: Path, adapters: AdapterStore) -> None:
    broken = load(checkpoint, max_model_len=MAX_MODEL_LEN)
    broken.embedding.weight.matrix[5] = torch.nan
    grammars = GrammarCompiler(b"{}", broken.vocab_size, end_token_ids=(2,))
    runner = Runner(
        broken, broken.new_cache(NUM_BLOCKS, BLOCK_SIZE), adapters, Group(0, 1), 8, MAX_MODEL_LEN, CPU, grammars
    )
    planner = Planner()
    planner.start(0, [4, 5], pool=True)
    planner.start(1, [4, 6], pool=True)
    response = run(planner, runner, {0: 2, 1: 2}, {0, 1})
    assert (list(response.pooled_chunks), list(response.failed_chunks)) == ([1], [0])
    assert list(response.failure_reasons) == [FAILURE_REASON_NOT_FINITE]
