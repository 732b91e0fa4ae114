"""What activates an adapter, from the configurations of PEFT and of the library before it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.peft.doubts import find_doubts
from loraplex_shard.lora.peft.invocation import read_invocation
from loraplex_shard.lora.peft.parsing import parse_config
from loraplex_shard.lora.peft.reading import read_adapter
from loraplex_shard.lora.weights.deltas import Invocation
from tests.shard.lora_models import BASE, edit_config, edit_tensors, layouts, read, save_adapter

WORDS = ["check", "_", "requirement", "<|start_of_role|>", "<|end_of_role|>"]


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="_"))
    made.pre_tokenizer = pre_tokenizers.Punctuation()
    made.add_special_tokens([AddedToken(word, special=True) for word in WORDS[3:]])
    return made


def test_pefts_tokens_are_read_and_the_adapter_acts_from_the_first(tmp_path: Path) -> None:
    save_adapter(tmp_path, alora_invocation_tokens=[3, 0, 1, 2, 4])
    adapter = read_adapter(read(tmp_path), layouts(), BASE, torch.float32)
    assert adapter.invocation == Invocation((3, 0, 1, 2, 4), lag=0)
    save_adapter(tmp_path)
    assert read_adapter(read(tmp_path), layouts(), BASE, torch.float32).invocation is None


def test_a_text_of_the_library_before_peft_is_read_with_the_models_tokenizer(tmp_path: Path) -> None:
    """As in ibm-granite/granite-3.2-8b-alora-requirement-check: there, an adapter acts from the second token on."""
    save_adapter(tmp_path)
    edit_config(tmp_path, invocation_string="<|start_of_role|>check_requirement<|end_of_role|>")
    base = replace(BASE, tokenizer=tokenizer())
    adapter = read_adapter(read(tmp_path), layouts(), base, torch.float32)
    assert adapter.invocation == Invocation((3, 0, 1, 2, 4), lag=1)
    assert any("second token" in warning for warning in adapter.warnings)
    edit_config(tmp_path, alora_invocation_tokens=[7])
    config = parse_config(read(tmp_path).config)
    assert read_invocation(config, base) == Invocation((7,), lag=0)  # PEFT's own takes precedence
    assert not any("second token" in doubt for doubt in find_doubts(config, base, ()))
    edit_config(tmp_path, alora_invocation_tokens=None, invocation_string=None)
    assert read_invocation(parse_config(read(tmp_path).config), base) is None


@pytest.mark.parametrize("tensor", ["lm_head.weight", "model.layers.0.mlp.up_proj.weight"])
def test_tensors_that_would_act_before_the_invocation_are_refused(tmp_path: Path, tensor: str) -> None:
    save_adapter(tmp_path, alora_invocation_tokens=[5])
    own = BASE.tensors.read(tensor) if BASE.tensors else torch.zeros(1)
    edit_tensors(tmp_path, lambda tensors: tensors.update({f"base_model.model.{tensor}": own}))
    read_adapter(read(tmp_path), layouts(), BASE, torch.float32)  # the base's own
    edit_tensors(tmp_path, lambda tensors: tensors.update({f"base_model.model.{tensor}": own + 1}))
    with pytest.raises(AdapterInvalidError, match="cannot take the place of the base's own"):
        read_adapter(read(tmp_path), layouts(), BASE, torch.float32)
