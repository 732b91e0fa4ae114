"""A short training of a tiny random model: its effect, its loss, and the saved adapter."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from examples.adapters import train

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def tiny(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def test_training_lowers_the_loss_and_leaves_the_base_as_it_was(
    tiny: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    before = {name: weight.clone() for name, weight in tiny.state_dict().items()}
    task = train.TASKS["sql"]
    batch = train.tensors(tokenizer, train.examples(task, 4, seed=1, held_out=False))

    trained = train.train(tiny, tokenizer, task, steps=4, batch_size=4, learning_rate=1e-2)
    with torch.no_grad():
        loss = train.answer_loss(trained, *batch)
        with trained.disable_adapter():
            untrained_loss = train.answer_loss(trained, *batch)

    assert loss < untrained_loss
    after = trained.unload().state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_the_loss_equals_transformers_loss_on_the_answers_only(
    tiny: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    task = train.TASKS["entities"]
    ids, mask, labels = train.tensors(tokenizer, train.examples(task, 3, seed=1, held_out=False))
    model = get_peft_model(tiny, copy.deepcopy(task.lora))
    assert isinstance(model, PeftModel)
    expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(train.answer_loss(model, ids, mask, labels), expected)


def test_labels_are_the_answer_and_its_end_of_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    data = train.examples(train.TASKS["entities"], 3, seed=1, held_out=False)
    ids, mask, labels = train.tensors(tokenizer, data)
    for example, row, kept, label in zip(data, ids, mask, labels, strict=True):
        assert tokenizer.decode(label[label != train.IGNORED]) == example.answer + "<|im_end|>"
        assert str(tokenizer.decode(row[kept == 1])).endswith(f"<|im_start|>assistant\n{example.answer}<|im_end|>")


def test_the_saved_adapter_is_plain_peft_in_bfloat16(
    tiny: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    trained = train.train(tiny, tokenizer, train.TASKS["sql"], steps=1, batch_size=2)
    train.save(trained, tmp_path)

    assert {file.name for file in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (config["r"], config["bias"], config["use_dora"], config["modules_to_save"]) == (4, "none", False, None)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert len(weights) == 2 * 3 * 2  # A and B for three projections in two layers
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
