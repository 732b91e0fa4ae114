"""Tokenizer files and templates beside an adapter. They are compared with transformers if it reads the same files."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.own_tokens import Vocabulary
from loraplex_shard.lora.peft.special_tokens import end_tokens, foreign_tokens
from loraplex_shard.lora.sources.files import check_size
from loraplex_shard.lora.sources.text_files import TEXT_SIZE_LIMITS, AdapterText, read_text, text_files

VOCABULARY = {"<s>": 0, "</s>": 1, "<|end|>": 2, "<pad>": 3}
CONFIG, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"


def read(directory: Path) -> AdapterText:
    paths = {str(path.relative_to(directory)): path for path in directory.rglob("*") if path.is_file()}
    return read_text({name: paths[name].read_bytes() for name in text_files(paths)})


def save(directory: Path, **options: Any) -> None:
    tokenizer = Tokenizer(BPE(VOCABULARY, []))
    tokenizer.add_special_tokens(list(VOCABULARY))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
    fast.save_pretrained(directory)


def check_as_transformers(directory: Path) -> None:
    expected, found = AutoTokenizer.from_pretrained(directory), read(directory)
    templates = expected.chat_template or {}
    assert found.chat_templates == (templates if isinstance(templates, dict) else {"default": templates})
    assert {name: token for name, token in found.special_tokens.items() if token} == expected.special_tokens_map


@pytest.mark.parametrize(
    "template", [None, "one", {"default": "one", "tool_use": "two", "rag": "three"}, {"tool_use": "two"}]
)
def test_a_saved_tokenizer_is_read_as_transformers_reads_it(template: Any, tmp_path: Path):
    save(
        tmp_path, bos_token="<s>", eos_token="<|end|>", pad_token="<pad>", image_token="<|end|>", chat_template=template
    )
    check_as_transformers(tmp_path)
    assert read(tmp_path).special_tokens["unk_token"] == ""


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": "one"},
        {"chat_template": [{"name": "default", "template": "one"}, {"name": "rag", "template": "two"}]},
        {"chat_template": None, "eos_token": None},
        {"eos_token": {"__type": "AddedToken", "content": "<|end|>", "lstrip": False}},
        {"extra_special_tokens": {"boi_token": "<pad>"}, "add_bos_token": True},
        {"additional_special_tokens": ["<pad>"]},
        {"added_tokens_decoder": {"2": {"content": "<|end|>", "special": True}}, "eos_token": "</s>"},
    ],
)
@pytest.mark.parametrize("mapped", [{}, {"eos_token": "<|end|>", "pad_token": {"content": "<pad>"}}])
def test_configurations_are_read_as_transformers_reads_them(config: Any, mapped: Any, tmp_path: Path):
    save(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    (tmp_path / SPECIAL).write_text(json.dumps(mapped))
    check_as_transformers(tmp_path)


def test_files_take_precedence_over_the_configuration(tmp_path: Path):
    save(tmp_path, chat_template={"default": "one", "rag": "two"})
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "chat_template": "of the configuration"}))
    check_as_transformers(tmp_path)
    assert read(tmp_path).chat_templates == {"default": "one", "rag": "two"}


def test_a_processors_template_is_used_if_there_is_no_other():
    files = {"chat_template.json": b'{"chat_template": "one"}'}
    assert read_text(files).chat_templates == {"default": "one"}
    assert read_text({**files, "chat_template.jinja": b"two"}).chat_templates == {"default": "two"}


def test_a_handwritten_configuration_does_not_change_the_models_tokens():
    assert read_text({CONFIG: b'{"chat_template": "one"}'}).special_tokens == {}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (CONFIG, b"{"),
        (CONFIG, b"[]"),
        (CONFIG, b"[" * 100_000),
        (CONFIG, b'{"chat_template": 5}'),
        (CONFIG, b'{"chat_template": "\\ud800"}'),
        (CONFIG, b'{"eos_token": "\\ud800"}'),
        (CONFIG, b'{"chat_template": "' + b"x" * (2**18 + 1) + b'"}'),
        ("chat_template.jinja", b"\xff"),
        ("generation_config.json", b'{"eos_token_id": "two"}'),
        ("generation_config.json", b'{"eos_token_id": -1}'),
    ],
)
def test_unreadable_files_have_a_reason(name: str, content: bytes):
    text = read_text({name: content})
    assert text == AdapterText(error=text.error) and text.error.startswith(f"{name}: ")


def test_end_tokens_are_the_adapters_own_if_the_model_has_them():
    base = BaseModel("Any", vocab_size=3, tokenizer=Tokenizer(BPE(VOCABULARY, [])))
    generation = b'{"eos_token_id": [1, 7]}'
    text = read_text({CONFIG: b'{"eos_token": "<|end|>"}', "generation_config.json": generation})
    ids, wrong = end_tokens(text, base, Vocabulary(base.vocab_size))
    assert ids == (1, 2) and len(wrong) == 1 and "eos_token_id 7 is beyond" in wrong[0]
    for unknown in (b"<|other|>", b"<pad>"):  # the model has no embedding for <pad>
        ids, wrong = end_tokens(
            read_text({CONFIG: b'{"eos_token": "' + unknown + b'"}'}), base, Vocabulary(base.vocab_size)
        )
        assert ids == () and unknown.decode() in wrong[0]


def test_only_tokenizer_files_are_read():
    names = ["chat_template.jinja", "additional_chat_templates/a.jinja", "additional_chat_templates/../../b.jinja"]
    names += ["tokenizer.model", "additional_chat_templates/x/y.jinja", "checkpoint-1/chat_template.jinja"]
    assert text_files(names) == ("chat_template.jinja", "additional_chat_templates/a.jinja")


def test_a_tokenizer_that_differs_from_the_models_has_a_warning():
    plain = Tokenizer(WordLevel({"a": 0, "b": 1, "<s>": 2, "</s>": 3}, unk_token="a"))
    plain.add_special_tokens(["<s>", "</s>"])
    base = BaseModel("LlamaForCausalLM", vocab_size=4, tokenizer=plain)

    def doubts(tokens: dict[str, str], **more: str) -> list[str]:
        added = {id: {"content": token, "special": True} for id, token in tokens.items()}
        return foreign_tokens(read_text({CONFIG: json.dumps({"added_tokens_decoder": added, **more}).encode()}), base)

    assert doubts({"2": "<s>", "3": "</s>"}) == []
    assert doubts({"2": "<s>", "4": "[PAD]"}, pad_token="[PAD]") == []
    assert doubts({"4": "<|im_start|>"}) == ["its tokenizer has tokens that this model does not have: '<|im_start|>'"]
    (renamed,) = doubts({"3": "<s>", "2": "</s>"})
    assert renamed == "its tokenizer numbers tokens in another way than the model's: '</s>', '<s>'"
    assert doubts({"7": "<s>"}) == ["its tokenizer numbers tokens in another way than the model's: '<s>'"]


@pytest.mark.parametrize("name", TEXT_SIZE_LIMITS)
def test_text_files_have_a_size(name: str) -> None:
    check_size(name, TEXT_SIZE_LIMITS[name])
    with pytest.raises(AdapterInvalidError, match=f"{name} has .* bytes; the limit is"):
        check_size(name, TEXT_SIZE_LIMITS[name] + 1)
