"""Answers equal transformers' and PEFT's: mixed in one batch, on any number of ranks, after eviction and reload."""

import asyncio
from pathlib import Path

import pytest

from loraplex import AsyncClient, Generation
from tests.e2e.processes import Server
from tests.e2e.tiny import Oracle, byte_tokenizer

PLAIN = ["r1", "r4", "r8", "r12", "r16", "r64", "attention", "patterns"]
NAMES = [None, *PLAIN, "dora", "bias", "head", "loha", "vera", "ia3", "activated1"]
PROMPTS = ["The quick brown fox", "ABC " * 30]  # only the first one activates the last adapter
TOKENS = 12


async def ask_all_at_once(server: Server) -> dict[tuple[str | None, str], Generation]:
    """Requests for all adapters and the base, with two prompts each."""
    questions = [(name, prompt) for prompt in PROMPTS for name in NAMES]
    async with AsyncClient(server.address) as client:
        answers = await asyncio.gather(
            *(
                client.generate(prompt, adapter=name, max_new_tokens=TOKENS, ignore_eos=True, logprobs=True)
                for name, prompt in questions
            )
        )
    return dict(zip(questions, answers, strict=True))


def assert_equal_to_oracle(answers: dict[tuple[str | None, str], Generation], oracle: Oracle) -> None:
    for (name, prompt), answer in answers.items():
        tokens, logprobs = oracle.generate(byte_tokenizer().encode(prompt), name, TOKENS)
        assert [token.id for token in answer.sequences[0].tokens] == tokens, (name, prompt)
        assert [token.logprob for token in answer.sequences[0].tokens] == pytest.approx(logprobs, abs=2e-3)


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
async def test_a_mixed_batch_equals_peft_even_after_eviction_and_reload(
    tp: int, model: Path, adapters: Path, oracle: Oracle
):
    flags = f"--adapters={adapters}", "--kv-blocks=512", "--max-adapters-on-device=3", "--threads=1", f"--tp={tp}"
    with Server(str(model), *flags) as server:
        assert_equal_to_oracle(await ask_all_at_once(server), oracle)
        assert_equal_to_oracle(await ask_all_at_once(server), oracle)  # most have been evicted in the meantime
        server.assert_nothing_is_held()


def test_the_adapters_answer_differently(oracle: Oracle):
    answers = {tuple(oracle.generate(byte_tokenizer().encode(PROMPTS[0]), name, TOKENS)[0]) for name in NAMES}
    assert len(answers) == len(NAMES)
