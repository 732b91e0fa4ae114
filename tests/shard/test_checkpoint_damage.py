"""A checkpoint that contradicts itself is refused with the name of its tensor or field, whatever its form and whichever
code computes the model, or it is the same model."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.gguf_writer import GGUFValue
from safetensors.torch import load_file, save_file
from transformers import Glm4MoeConfig, GPTNeoXConfig, LlamaConfig, PreTrainedConfig

from loraplex_shard.checkpoint import CheckpointError, open_checkpoint
from tests.shard.decoders import load, save_checkpoint
from tests.shard.float_checkpoints import FORMATS
from tests.shard.gguf_models import random_tensors, write_gguf
from tests.shard.quantized_checkpoints import METHODS, WEIGHTS, save_quantized, save_stored
from tests.shard.test_text_parts import MODELS, make

Tensors = dict[str, torch.Tensor]
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
# Of our decoder and of transformers' code: a configuration, and one of its tensors.
PLAIN: dict[str, tuple[PreTrainedConfig | None, str]] = {
    "decoder": (LlamaConfig(**SIZES, tie_word_embeddings=False), "model.layers.1.mlp.down_proj"),
    "transformers": (
        GPTNeoXConfig(**{name: size for name, size in SIZES.items() if "key_value" not in name}),
        "gpt_neox.layers.1.mlp.dense_4h_to_h",
    ),
    "transformers, experts": (
        Glm4MoeConfig(**SIZES, **EXPERTS, head_dim=16, n_group=1, topk_group=1),
        "model.layers.1.mlp.experts.2.down_proj",
    ),
    "text part": (None, "language_model.model.layers.1.mlp.down_proj"),
}
DAMAGES: dict[str, Callable[[Tensors, str], object]] = {
    "is missing": lambda tensors, name: tensors.pop(name),
    "one too many": lambda tensors, name: tensors.update(
        {name.replace("weight", "side.weight"): tensors[name].clone()}
    ),
    "holds NaN": lambda tensors, name: tensors[name][3].fill_(torch.nan),
    "holds infinity": lambda tensors, name: tensors[name][3].fill_(torch.inf),
    "holds integers": lambda tensors, name: tensors.update({name: tensors[name].long()}),
    "is short": lambda tensors, name: tensors.update({name: tensors[name][1:]}),
    "is transposed": lambda tensors, name: tensors.update({name: tensors[name].T.contiguous()}),
    "is a vector": lambda tensors, name: tensors.update({name: tensors[name].flatten()}),
}


@pytest.fixture(scope="module", params=PLAIN)
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    directory, (config, module) = tmp_path_factory.mktemp("plain"), PLAIN[request.param]
    if config is None:
        make(MODELS["llava"]).save_pretrained(directory)
    else:
        save_checkpoint(config, directory)
    return directory, f"{module}.weight"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_tensor_that_cannot_be_right_is_named(damage: str, plain: tuple[Path, str], tmp_path: Path) -> None:
    directory, name = plain
    tensors = load_file(directory / WEIGHTS)
    DAMAGES[damage](tensors, name)
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    # transformers' code makes one tensor of those of all experts.
    named = r"layers\.1\.mlp\.(down_proj|dense_4h_to_h|experts(\.2)?\.down_proj)"
    with pytest.raises(CheckpointError, match=named):
        load(tmp_path, max_model_len=16)


@pytest.mark.parametrize("field", ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_size_below_1_is_named(field: str, value: int, plain: tuple[Path, str], tmp_path: Path) -> None:
    config = json.loads((plain[0] / "config.json").read_text())
    config.get("text_config", config)[field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"config\.json: {field} {value} must be at least 1"):
        open_checkpoint(str(tmp_path))


@pytest.fixture(scope="module", params=[*METHODS, *FORMATS])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory, name = tmp_path_factory.mktemp("stored"), request.param
    if name in METHODS:
        return save_quantized(METHODS[name], directory)[0]
    return save_stored(*FORMATS[name], directory)[0]


def damaged(tensor: torch.Tensor) -> Iterator[torch.Tensor | None]:
    """What it may be instead; None: it is missing."""
    yield None
    if tensor.ndim > 0 and len(tensor) > 1:
        yield tensor[:-1].contiguous()
    if tensor.ndim == 2 and tensor.shape[1] > 1:
        yield tensor[:, :-1].contiguous()
    if tensor.ndim == 2 and tensor.shape[0] != tensor.shape[1]:
        yield tensor.T.contiguous()
    if tensor.dtype in (torch.float16, torch.bfloat16, torch.float32):
        yield tensor.clone().index_fill_(0, torch.tensor([0]), torch.nan) if tensor.ndim else tensor * torch.nan
    if tensor.dtype == torch.int32 and tensor.ndim == 1:  # the groups of columns
        yield tensor - 1
        yield tensor + 1000


def test_each_tensor_of_a_quantized_matrix_is_looked_at(stored: Path, tmp_path: Path) -> None:
    matrix = "model.layers.0.mlp.down_proj"
    original = open_checkpoint(str(stored)).read(f"{matrix}.weight")
    tensors = load_file(stored / WEIGHTS)
    (tmp_path / "config.json").write_bytes((stored / "config.json").read_bytes())
    refused = 0
    for name in (each for each in tensors if each.startswith(f"{matrix}.")):
        for damage in damaged(tensors[name]):
            others = {each: tensor for each, tensor in tensors.items() if each != name}
            save_file(others if damage is None else others | {name: damage}, tmp_path / WEIGHTS, {"format": "pt"})
            try:
                checkpoint = open_checkpoint(str(tmp_path))
                read = checkpoint.read(f"{matrix}.weight") if f"{matrix}.weight" in checkpoint.names else None
            except CheckpointError as error:
                assert matrix in error.message
                refused += 1
            else:  # what it cannot do without is found to be missing later, and so is another shape
                assert read is None or read.shape != original.shape or torch.equal(read, original), name
    assert refused > 1


Metadata = dict[str, GGUFValue]


def number(value: int | str) -> GGUFValue:
    return GGUFValue(value, gguf.GGUFValueType.UINT32 if isinstance(value, int) else gguf.GGUFValueType.STRING)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("llama.attention.head_count", 0, r"llama\.attention\.head_count 0 must be at least 1"),
        ("llama.attention.head_count", 3, r"hidden size \(64\) is not a multiple .* heads \(3\)"),
        ("llama.attention.head_count_kv", 0, r"llama\.attention\.head_count_kv 0 must be at least 1"),
        ("llama.attention.head_count_kv", 3, "num_key_value_heads 3"),
        ("llama.block_count", 2, r"missing tensor model\.layers\.1\."),
        ("llama.embedding_length", 128, r"has shape \[96, 64\], but the configuration asks for \[96, 128\]"),
        ("llama.attention.sliding_window", 4, r"llama\.attention\.sliding_window 4 is not served"),
        ("general.alignment", 0, "general.alignment 0"),
        ("general.alignment", "x", "general.alignment 'x'"),
        ("general.type", "mmproj", "it holds 'mmproj' and not a model"),
    ],
)
def test_metadata_that_cannot_be_right_is_named(key: str, value: int | str, named: str, tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0][key] = number(value)

    file = write_gguf(tmp_path / "model.gguf", random_tensors(), edit=edit)
    with pytest.raises(CheckpointError, match=named):
        load(file, max_model_len=16)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_nan_in_a_gguf_file_has_the_name_that_it_has_there(kind: str, tmp_path: Path) -> None:
    values, form = np.ones((96, 64), np.float32), gguf.GGMLQuantizationType[kind]
    stored = gguf.quants.quantize(values, form)
    if kind == "F32":
        stored[5, 1] = np.nan
    else:
        stored[5, :2] = np.array([np.nan], np.float16).view(np.uint8)
    tensors = random_tensors() | {"blk.0.ffn_up.weight": (stored, form)}
    with pytest.raises(CheckpointError, match=r"tensor blk\.0\.ffn_up\.weight holds NaN"):
        load(write_gguf(tmp_path / "model.gguf", tensors), max_model_len=16, quantize="auto")
