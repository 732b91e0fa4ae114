"""Merged adapters through a running server equal PEFT's add_weighted_adapter, also beside their parts."""

import asyncio
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loraplex import AsyncClient, Client, InvalidRequestError, MergedAdapters
from tests.e2e.processes import Server
from tests.e2e.tiny import Oracle, byte_tokenizer

PROMPT = "The quick brown fox"
TOKENS = 8
PARTS, WEIGHTS = ("r8", "attention"), (0.8, -0.5)
RECIPES = {
    "linear": MergedAdapters(PARTS, WEIGHTS),
    "ties": MergedAdapters(PARTS, WEIGHTS, "ties", 0.6, "frequency"),
    "magnitude_prune": MergedAdapters(PARTS, WEIGHTS, "magnitude_prune", 0.3),
}


@pytest.fixture(scope="module")
def expected(model: Path, adapters: Path) -> dict[str, list[int]]:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    merging = PeftModel.from_pretrained(base, adapters / PARTS[0], adapter_name=PARTS[0])
    merging.load_adapter(adapters / PARTS[1], adapter_name=PARTS[1])
    for name, recipe in RECIPES.items():
        merging.add_weighted_adapter(
            list(PARTS),
            list(WEIGHTS),
            name,
            combination_type=recipe.strategy,
            density=recipe.density,
            majority_sign_method=recipe.majority_sign_method,
        )
    return {name: continued(merging, name) for name in RECIPES}


def continued(model: PeftModel, adapter: str) -> list[int]:
    model.set_adapter(adapter)
    tokens = byte_tokenizer().encode(PROMPT)
    with torch.inference_mode():
        for _ in range(TOKENS):
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[-TOKENS:]


@pytest.mark.parametrize("tp", [1, 2])
async def test_merged_adapters_equal_pefts_beside_their_parts(
    tp: int, model: Path, adapters: Path, expected: dict[str, list[int]], oracle: Oracle
) -> None:
    options = {"max_new_tokens": TOKENS, "ignore_eos": True}
    asked = {**RECIPES, **{part: part for part in PARTS}}
    for part in PARTS:
        expected = {**expected, part: oracle.generate(byte_tokenizer().encode(PROMPT), part, TOKENS)[0]}
    flags = f"--adapters={adapters}", "--kv-blocks=512", "--threads=1", f"--tp={tp}"
    with Server(str(model), *flags) as server:
        async with AsyncClient(server.address) as client:
            for _ in range(2):
                answers = await asyncio.gather(
                    *(client.generate(PROMPT, adapter=adapter, **options) for adapter in asked.values())
                )
                given = [[token.id for token in answer.sequences[0].tokens] for answer in answers]
                assert dict(zip(asked, given, strict=True)) == expected
                assert len({answer.adapter_digest for answer in answers}) == len(asked)
            listed = [adapter for adapter in await client.adapters() if adapter.source == "merged"]
            assert [adapter.id for adapter in listed] == ["r8,attention"] * len(RECIPES)
            assert {adapter.lora_rank for adapter in listed} == {8}
        server.assert_nothing_is_held()


@pytest.mark.parametrize(
    ("merged", "field"),
    [
        (MergedAdapters([]), "merged_adapters.adapters"),
        (MergedAdapters(["r8"] * 17), "merged_adapters.adapters"),
        (MergedAdapters(["r8", ""]), r"merged_adapters.adapters\[1\].id"),
        (MergedAdapters(PARTS, [1.0]), "merged_adapters.weights"),
        (MergedAdapters(PARTS, [1.0, float("nan")]), "merged_adapters.weights"),
        (MergedAdapters(PARTS, strategy="svd"), "merged_adapters.strategy"),
        (MergedAdapters(PARTS, strategy="ties", density=0.0), "merged_adapters.density"),
        (MergedAdapters(PARTS, strategy="ties", majority_sign_method="most"), "merged_adapters.majority_sign_method"),
        (MergedAdapters(["r8", "r4"]), "merged_adapters.adapters: the lora_rank"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused_by_field(
    server: Server, merged: MergedAdapters, field: str
) -> None:
    with Client(server.address) as client, pytest.raises(InvalidRequestError, match=field):
        client.generate(PROMPT, adapter=merged, max_new_tokens=1)
