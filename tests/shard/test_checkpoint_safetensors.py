"""Checkpoint directories and hub ids: which files are read, and what is refused by name."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, PreTrainedTokenizerFast

from loraplex_shard.checkpoint import CheckpointError, open_checkpoint
from loraplex_shard.checkpoint.base import PoolingMode, PoolingSpec
from loraplex_shard.device.parallel import Group, GroupSizeError
from tests.shard.decoders import Sequences, load, load_reference, save_checkpoint
from tests.stand_in_hub import StandInHub

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def config(tied: bool = False) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=3,
        tie_word_embeddings=tied,
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save_checkpoint(config(), tmp_path / "model")


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / WEIGHTS)
    edit(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def edit_json(path: Path, **fields: object) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | fields))


def test_a_slice_equals_the_slice_of_the_whole_tensor(directory: Path) -> None:
    checkpoint, tensors = open_checkpoint(str(directory)), load_file(directory / WEIGHTS)
    assert checkpoint.names == tensors.keys()
    for name, whole in tensors.items():
        assert checkpoint.shape(name) == tuple(whole.shape)
        assert torch.equal(checkpoint.read(name), whole)
        assert torch.equal(checkpoint.read(name, slice(2, 5)), whole[2:5])
    matrix = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(checkpoint.read(matrix, slice(1, 3), slice(4, 9)), tensors[matrix][1:3, 4:9])


def test_all_missing_tensors_are_named_in_one_error(directory: Path) -> None:
    missing = ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    edit_tensors(directory, lambda tensors: [tensors.pop(name) for name in missing])
    with pytest.raises(CheckpointError, match="missing tensor " + ", ".join(missing)):
        load(directory)


def test_an_unused_tensor_is_named(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(8)}))
    with pytest.raises(
        CheckpointError, match=r"LlamaForCausalLM has no tensor model\.layers\.0\.self_attn\.q_proj\.bias"
    ):
        load(directory)


def test_redundant_tensors_are_ignored(tmp_path: Path) -> None:
    directory = save_checkpoint(config(tied=True), tmp_path)
    embedding = load_file(directory / WEIGHTS)[EMBEDDING]
    redundant = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2), HEAD: embedding.clone()}
    edit_tensors(directory, lambda tensors: tensors.update(redundant))
    decoder = load(directory)
    assert decoder.lm_head.weight.matrix.data_ptr() == decoder.embedding.weight.matrix.data_ptr()


HEADS: dict[str, tuple[bool, Callable[[dict[str, torch.Tensor]], object]]] = {
    "tied, the head differs": (True, lambda t: t.update({HEAD: t[EMBEDDING].flip(0).contiguous()})),
    "tied, one value of the head differs": (True, lambda t: t.update({HEAD: t[EMBEDDING] + torch.eye(16, 8)})),
    "tied, the head is in the file alone": (True, lambda t: t.update({HEAD: t.pop(EMBEDDING)})),
    "tied, the head is the embedding in bfloat16": (True, lambda t: t.update({HEAD: t[EMBEDDING].bfloat16()})),
    "not tied, both are the same": (False, lambda t: t.update({HEAD: t[EMBEDDING].clone()})),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tied", "edit"), HEADS.values(), ids=HEADS.keys())
def test_embedding_and_head_equal_transformers_whatever_the_file_holds(
    tied: bool, edit: Callable[[dict[str, torch.Tensor]], object], dtype: torch.dtype, tmp_path: Path
) -> None:
    directory = save_checkpoint(config(tied=tied), tmp_path)
    edit_tensors(directory, edit)
    ours, theirs = load(directory, dtype), load_reference(directory, dtype)
    assert torch.equal(ours.embedding.weight.matrix, theirs.model.embed_tokens.weight)
    assert torch.equal(ours.lm_head.weight.matrix, theirs.lm_head.weight)


@pytest.mark.parametrize("architectures", [None, [], ["LlamaModel"], ["LLaMAForCausalLM"], ["Llama_ForCausalLM"]])
def test_a_model_saved_without_a_head_equals_transformers(architectures: list[str] | None, tmp_path: Path) -> None:
    """Embedding models are saved like this: names lack their first part, and config.json may name another class, or
    none."""
    directory = save_checkpoint(config(tied=True), tmp_path / "model")
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(directory / WEIGHTS).items()}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    edit_json(directory / "config.json", architectures=architectures)
    prompt = [1, 5, 9, 2]
    expected = load_reference(directory)(torch.tensor([prompt])).logits[0].detach()
    torch.testing.assert_close(Sequences(load(directory)).step({"prompt": prompt})["prompt"], expected)


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        ({}, "mean"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False, "include_prompt": True}, "last"),
        ({"pooling_mode_cls_token": True}, "first"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": "cls"}, "first"),
    ],
)
def test_pooling_follows_the_files_of_sentence_transformers(
    config: dict[str, object], mode: PoolingMode, directory: Path
) -> None:
    assert open_checkpoint(str(directory)).pooling == PoolingSpec()
    (directory / "1_Pooling").mkdir()
    edit_json(directory / "1_Pooling/config.json", **config)
    assert open_checkpoint(str(directory)).pooling == PoolingSpec(mode)
    for kinds in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        save_modules(directory, kinds)
        assert open_checkpoint(str(directory)).pooling == PoolingSpec(mode, normalized="Normalize" in kinds)


def save_modules(directory: Path, kinds: list[str]) -> None:
    modules = [
        {"idx": place, "name": str(place), "path": f"{place}_{kind}", "type": f"sentence_transformers.models.{kind}"}
        for place, kind in enumerate(kinds)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens is not served"),
        ({"pooling_mode": "weightedmean"}, "pooling_mode_weightedmean is not served"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "mode_cls_token, .*_mean_tokens is not"),
        ({"pooling_mode": ["cls", "mean"]}, "pooling_mode_cls, pooling_mode_mean is not served"),
        ({"pooling_mode_lasttoken": True, "include_prompt": False}, "include_prompt false is not served"),
    ],
)
def test_unsupported_pooling_is_refused_by_name(config: dict[str, object], message: str, directory: Path) -> None:
    (directory / "1_Pooling").mkdir()
    edit_json(directory / "1_Pooling/config.json", **config)
    with pytest.raises(CheckpointError, match=rf"1_Pooling/config\.json: .*{message}"):
        open_checkpoint(str(directory)).pooling  # noqa: B018


def test_unsupported_modules_after_pooling_are_refused_by_name(directory: Path) -> None:
    save_modules(directory, ["Transformer", "Pooling", "Dense", "Normalize"])
    with pytest.raises(CheckpointError, match=r"modules\.json: Dense is not served"):
        open_checkpoint(str(directory)).pooling  # noqa: B018
    (directory / "modules.json").write_text('["Pooling"]')
    with pytest.raises(CheckpointError, match=r"modules\.json is not a list of modules"):
        open_checkpoint(str(directory)).pooling  # noqa: B018


def test_a_missing_head_is_refused_with_the_remedy(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors.pop(HEAD))
    with pytest.raises(CheckpointError, match=r"missing tensor lm_head\.weight: .* set tie_word_embeddings .* true"):
        load(directory)


def test_a_tensor_in_two_files_must_be_the_same_in_both(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    edit_json(directory / INDEX, weight_map=dict(zip("ab", files, strict=True)))
    save_file(tensors, directory / files[0])
    save_file({HEAD: tensors[HEAD]}, directory / files[1])
    assert torch.equal(load(directory).lm_head.weight.matrix, tensors[HEAD])
    save_file({HEAD: tensors[HEAD] + 1}, directory / files[1])
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is in several files, and differs in model-00002"):
        load(directory)


def test_a_single_file_takes_precedence_over_an_index_as_in_transformers(directory: Path) -> None:
    edit_json(directory / INDEX, weight_map={"a": "model-00001-of-00002.safetensors"})
    assert torch.equal(load(directory).lm_head.weight.matrix, load_reference(directory).lm_head.weight)


def test_all_files_are_read_if_there_is_no_index(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    first = {HEAD: tensors.pop(HEAD)}
    for number, part in enumerate((first, tensors), 1):
        save_file(part, directory / f"model-0000{number}-of-00002.safetensors")
    assert open_checkpoint(str(directory)).names == {*first, *tensors}
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing tensor"):
        load(directory)


def test_a_tensor_with_a_wrong_shape_is_named_with_both_shapes(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors.update({"model.norm.weight": torch.ones(9)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[9\].*asks for \[8\]"):
        load(directory)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "GPT2LMHeadModel is not served: transformers has no causal language model of this name",
        ),
        ({"model_type": "martian"}, "martian"),
        ({"hidden_act": "xielu"}, "hidden_act 'xielu'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 5}}, "quantization_config: bits 5"),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "rope type 'proportional'"),
        ({"num_key_value_heads": 3}, "num_attention_heads 2 is not a multiple of num_key_value_heads 3"),
        ({"vocab_size": "many"}, "vocab_size"),
        (
            {"model_type": "mixtral", "architectures": [], "num_local_experts": 2, "num_experts_per_tok": 4},
            "num_experts_per_tok 4 is more than the 2 experts",
        ),
        (
            {"model_type": "ministral3", "architectures": [], "rope_parameters": {"rope_type": "default"}},
            "rope_parameters has no llama_4_scaling_beta",
        ),
        ({"model_type": "exaone4", "sliding_window": None}, "config.json: integer modulo by zero"),
    ],
)
def test_an_unsupported_configuration_is_refused_by_name(
    fields: dict[str, object], message: str, directory: Path
) -> None:
    edit_json(directory / "config.json", **fields)
    with pytest.raises(CheckpointError, match=message):
        load(directory)


def test_more_ranks_than_query_heads_are_refused(directory: Path) -> None:
    with pytest.raises(GroupSizeError, match="2 attention heads in 1 groups cannot be cut over 3"):
        load(directory, group=Group(0, 3))


def test_pickled_weights_are_refused_with_the_remedy(directory: Path) -> None:
    torch.save(load_file(directory / WEIGHTS), directory / "pytorch_model.bin")
    (directory / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"(?s)Pickled weights.*are not read.*save_pretrained"):
        open_checkpoint(str(directory))


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_safetensors_file_is_named(length: int, directory: Path) -> None:
    content = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(content[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a readable safetensors file"):
        open_checkpoint(str(directory))


def test_an_index_may_only_name_existing_files_in_its_folder(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    edit_json(directory / INDEX, weight_map={"a": "../model.safetensors"})
    with pytest.raises(CheckpointError, match=r"names '\.\./model\.safetensors'"):
        open_checkpoint(str(directory))
    edit_json(directory / INDEX, weight_map={"a": "model-00001-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors is missing"):
        open_checkpoint(str(directory))
    (directory / INDEX).write_text("{")
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json is not JSON"):
        open_checkpoint(str(directory))


def test_a_directory_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(str(tmp_path))


def save_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "</s>", "hello", "world"]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}"}
    fast.save_pretrained(directory)
    return fast


def test_the_tokenizer_is_read_from_the_directory(directory: Path) -> None:
    fast = save_tokenizer(directory)
    files = open_checkpoint(str(directory)).tokenizer()
    assert Tokenizer.from_str(files.tokenizer_json.decode()).encode("hello").ids == fast("hello")["input_ids"] == [3]
    assert files.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert files.chat_templates == {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}"}


def test_without_tokenizer_files_the_error_says_so(directory: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer can be read"):
        open_checkpoint(str(directory)).tokenizer()


@pytest.mark.parametrize(
    ("generation", "expected"),
    [([7, 9], (2, 7, 9)), (7, (2, 7)), (None, (2, 3)), ([], (2,))],
)
def test_end_tokens_come_from_the_generation_config_or_the_config(
    generation: object, expected: tuple[int, ...], directory: Path
) -> None:
    save_tokenizer(directory)
    edit_json(directory / "generation_config.json", eos_token_id=generation)
    assert open_checkpoint(str(directory)).end_token_ids == expected


def test_invalid_token_ids_are_refused(directory: Path) -> None:
    save_tokenizer(directory)
    edit_json(directory / "generation_config.json", eos_token_id="</s>")
    with pytest.raises(CheckpointError, match="eos_token_id is neither a token's id nor a list of them"):
        open_checkpoint(str(directory)).end_token_ids  # noqa: B018


TEMPLATE = "{% for m in messages %}{{ '<|start|>' + m.role + ': ' + m.content + ' <|end|>\n' }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TEMPLATE, (2, 6, 7)),
        (TEMPLATE.replace("<|end|>", "<|end|>_of_turn"), (2, 6, 7)),
        (TEMPLATE.replace(" <|end|>", "</s>"), (2, 7)),
        (TEMPLATE.replace(" <|end|>", ""), (2, 7)),
        ("{{ raise_exception('Roles must alternate') }}", (2, 7)),
        (None, (2, 7)),
    ],
)
def test_a_sequence_ends_at_the_token_that_its_chat_template_writes_after_an_answer(
    template: str | None, expected: tuple[int, ...], directory: Path
) -> None:
    tokenizer = save_tokenizer(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    tokenizer.chat_template = template
    (directory / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(directory)
    edit_json(directory / "generation_config.json", eos_token_id=7)
    assert open_checkpoint(str(directory)).end_token_ids == expected


@pytest.mark.parametrize("name", ["../elsewhere", "a/b/c", "no such thing"])
def test_a_name_that_is_neither_a_path_nor_a_hub_id_is_refused_before_any_request(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"name a model's directory, a \.gguf file, or a hub id"):
        open_checkpoint(name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    with StandInHub() as stand_in:
        monkeypatch.setenv("HF_ENDPOINT", stand_in.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield stand_in


def test_only_the_needed_files_of_a_hub_model_are_downloaded(directory: Path, hub: StandInHub) -> None:
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    unneeded = {"pytorch_model.bin": b"pickle", "consolidated.safetensors": b"twice", "modeling_llama.py": b"code"}
    hub.push("org/tiny", files | unneeded)
    checkpoint = open_checkpoint("org/tiny")
    assert checkpoint.model_id == "org/tiny"
    assert torch.equal(checkpoint.read("model.norm.weight"), load_file(directory / WEIGHTS)["model.norm.weight"])
    assert not [request for request in hub.requests if any(name in request for name in unneeded)]


def test_the_requested_revision_is_served(directory: Path, hub: StandInHub) -> None:
    commit = hub.push("org/tiny", {path.name: path.read_bytes() for path in directory.iterdir()})
    hub.push("org/tiny", {"config.json": b"{}"})
    assert open_checkpoint("org/tiny", revision=commit).architecture == "LlamaForCausalLM"
    with pytest.raises(CheckpointError, match="org/tiny: the hub has no revision 'absent'"):
        open_checkpoint("org/tiny", revision="absent")


def test_a_private_model_needs_its_token_and_no_message_repeats_one(directory: Path, hub: StandInHub) -> None:
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    hub.push("org/private", files, tokens=frozenset({"hf_right"}))
    with pytest.raises(CheckpointError, match="org/private: the hub answered 401: check the token") as refused:
        open_checkpoint("org/private", token="hf_wrong")
    assert "hf_wrong" not in str(refused.value)
    assert open_checkpoint("org/private", token="hf_right").names


def test_errors_of_the_hub_are_reported(hub: StandInHub) -> None:
    with pytest.raises(CheckpointError, match="org/absent: no such directory, and no such model on the hub"):
        open_checkpoint("org/absent")
    hub.failure = 500
    with pytest.raises(CheckpointError, match=r"org/tiny: .*the hub at http://127\.0\.0\.1:\d+ answered 500"):
        open_checkpoint("org/tiny")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is not a model's directory: there is no config.json"),
        ({"adapter_config.json": "{}"}, "it holds a LoRA adapter. Give the base model here"),
        ({"a.Q4_0.gguf": ""}, "it holds GGUF files. Give the path of one of them: a.Q4_0.gguf"),
        ({"config.json": "{"}, "config.json is not JSON"),
        (
            {"config.json": '{"model_type": "foo", "architectures": ["FooForCausalLM"], "auto_map": {}}'},
            "FooForCausalLM is not served: transformers knows no model_type 'foo'",
        ),
        ({"config.json": "{}"}, "its architecture is not served: transformers knows no model_type None"),
    ],
)
def test_the_error_says_what_a_directory_without_a_model_is(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        open_checkpoint(str(tmp_path))


def test_a_missing_path_is_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist: name a model's directory"):
        open_checkpoint(str(tmp_path / "model"))
    (tmp_path / "model.txt").touch()
    with pytest.raises(CheckpointError, match=r"is not a \.gguf file: name a model's directory"):
        open_checkpoint(str(tmp_path / "model.txt"))


def test_an_unreachable_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"the hub at http://127\.0\.0\.1:9 cannot be reached\. Name a directory"):
        open_checkpoint("org/name")


def test_sampling_defaults_come_from_generation_config(directory: Path) -> None:
    said = {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "repetition_penalty": 1.05,
        "num_beams": 1,
    }
    (directory / "generation_config.json").write_text(json.dumps(said))
    expected = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
    assert open_checkpoint(str(directory)).sampling_defaults == expected


def test_invalid_sampling_defaults_are_ignored_with_a_warning(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = {"temperature": "hot", "top_k": 0, "top_p": 0.0, "min_p": 2, "repetition_penalty": None}
    (directory / "generation_config.json").write_text(json.dumps(said))
    assert open_checkpoint(str(directory)).sampling_defaults == {}
    told = [record.getMessage() for record in caplog.records]
    assert sorted(line.split(": ")[-2].split()[0] for line in told) == ["min_p", "temperature", "top_p"]


K = "model.layers.0.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k: k.index_fill(1, torch.tensor([3]), float("nan")), r"tensor .*k_proj\.weight holds NaN"),
        (lambda k: k.index_fill(1, torch.tensor([3]), float("inf")), r"tensor .*k_proj\.weight holds infinite numbers"),
        (
            lambda k: k.to(torch.int8),
            r"tensor .*k_proj\.weight holds int8, and config\.json has no quantization_config",
        ),
        (lambda k: k.to(torch.float8_e4m3fn), r"tensor .*k_proj\.weight holds float8_e4m3fn, and config\.json has no"),
    ],
)
def test_an_unusable_tensor_is_named(
    change: Callable[[torch.Tensor], torch.Tensor], message: str, directory: Path
) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {K: change(tensors[K])}, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"model: {message}"):
        load(directory)


def test_every_tensor_may_have_its_own_dtype(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    mixed = {name: tensor.to(dtypes[index % 3]) for index, (name, tensor) in enumerate(sorted(tensors.items()))}
    save_file(mixed, directory / "model.safetensors", metadata={"format": "pt"})
    decoder = load(directory)
    assert torch.equal(decoder.layers[0].mlp.down.weight.matrix, mixed["model.layers.0.mlp.down_proj.weight"].float())
