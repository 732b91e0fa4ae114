"""The committed adapters give the answers in their README."""

import json
import re

import pytest
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from examples.adapters import base
from examples.adapters.train import FOLDER, TASKS

EVERY_ADAPTER = pytest.mark.parametrize("name", TASKS)


def documented() -> dict[str, dict[str, str]]:
    """For each prompt in the README (a line that starts with >), the answer of each model ("name: answer")."""
    shown: dict[str, dict[str, str]] = {}
    for block in re.findall(r"```\n(> .*?)```", (FOLDER / "README.md").read_text(), re.DOTALL):
        message, *answers = block.splitlines()
        shown[message.removeprefix("> ")] = dict(line.split(": ", 1) for line in answers)
    return shown


@EVERY_ADAPTER
def test_an_adapter_gives_the_documented_answers(
    name: str, adapted: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    expected = {message: answers[name] for message, answers in documented().items() if name in answers}
    assert len(expected) >= 2, "the README shows too little of it"
    adapted.set_adapter(name)
    assert base.answer(adapted, tokenizer, list(expected), max_new_tokens=60) == list(expected.values())


def test_one_prompt_has_four_different_answers() -> None:
    assert any(
        set(answers) == {"base", *TASKS} and len(set(answers.values())) == 4 for answers in documented().values()
    )


def test_the_base_alone_gives_the_documented_beginning(adapted: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    message, beginning = next((message, says["base"]) for message, says in documented().items() if "base" in says)
    with adapted.disable_adapter():
        [said] = base.answer(adapted, tokenizer, [message], max_new_tokens=8)
    assert beginning.startswith(said.strip())


@EVERY_ADAPTER
def test_an_adapter_is_about_a_megabyte_of_plain_lora(name: str) -> None:
    assert (FOLDER / name / "adapter_model.safetensors").stat().st_size < 1_000_000
    config = json.loads((FOLDER / name / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == base.NAME
    assert (config["bias"], config["use_dora"], config["modules_to_save"]) == ("none", False, None)


def test_the_adapters_differ_in_lora_rank_and_targets() -> None:
    configs = [json.loads((FOLDER / name / "adapter_config.json").read_text()) for name in TASKS]
    assert len({config["r"] for config in configs}) == 3
    assert len({tuple(sorted(config["target_modules"])) for config in configs}) == 3
    assert any(config["use_rslora"] for config in configs)
