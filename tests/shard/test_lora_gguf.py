"""An adapter of llama.cpp (a GGUF file) is served like the adapter of PEFT that it was converted from."""

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.checkpoint.gguf.file import GgufTensor
from loraplex_shard.lora.listing import LocalListing
from loraplex_shard.lora.peft.gguf_tensors import as_torch
from loraplex_shard.lora.peft.reading import check_shapes, read_adapter
from loraplex_shard.lora.sources.files import TENSORS
from loraplex_shard.lora.sources.local import LocalSource
from loraplex_shard.lora.uploads import check_upload, received
from loraplex_shard.lora.weights.deltas import HostAdapter
from tests.shard.lora_models import ALL_MODULES, BASE, HEAD_DIM, LAYERS, layouts, save_adapter, whole_deltas

PREFIX = "base_model.model."
Tensors = dict[str, torch.Tensor]


def as_gguf(
    directory: Path,
    alpha: float = 8.0,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    architecture: str = "llama",
    type: str = "adapter",
    invocation: list[int] | None = None,
    edit: Callable[[Tensors], object] = lambda tensors: None,
) -> Path:
    """The same adapter as llama.cpp's convert_lora_to_gguf.py would have written it."""
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    tensors: Tensors = {}
    for name, tensor in load_file(directory / TENSORS).items():
        if ".base_layer." in name:  # PEFT saves the embedding and the head of the base
            continue
        module, _, half = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if module.endswith(("q_proj", "k_proj")) and half == "lora_B":
            heads = len(tensor) // HEAD_DIM
            tensor = tensor.reshape(heads, 2, HEAD_DIM // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
        tensor = tensor.T if half == "lora_embedding_A" else tensor
        tensors[f"{known.get_name(module)}.weight.lora_{half[-1].lower()}"] = tensor.contiguous()
    edit(tensors)
    folder = directory.with_name("gguf")
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "any name-F32-LoRA.gguf", architecture)
    writer.add_type(type)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    if invocation:
        writer.add_array("adapter.alora.invocation_tokens", invocation)
    for name, tensor in tensors.items():
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def serve(folder: Path) -> HostAdapter:
    files = LocalSource(folder.parent).locate(folder.name, "", "").read()
    return read_adapter(files, layouts(), BASE, torch.float32)


def assert_same(ours: HostAdapter, theirs: HostAdapter, **tolerance: float) -> None:
    actual, expected = whole_deltas([ours.weights]), whole_deltas([theirs.weights])
    assert actual.keys() == expected.keys()
    for module, delta in expected.items():
        torch.testing.assert_close(actual[module], delta, **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize(
    "trained",
    [
        {"target_modules": ALL_MODULES},
        {"target_modules": ["k_proj", "down_proj"], "layers_to_transform": [1, 2]},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}},
    ],
    ids=["all layers", "some layers", "several lora_ranks"],
)
def test_a_gguf_file_is_the_same_as_pefts_adapter(trained: dict[str, object], tmp_path: Path) -> None:
    save_adapter(tmp_path / "peft", **trained)
    ours = serve(as_gguf(tmp_path / "peft"))
    assert_same(ours, serve(tmp_path / "peft"))
    assert ours.warnings == ()


def test_a_gguf_file_with_an_adapted_embedding_is_the_same_as_pefts_adapter(tmp_path: Path) -> None:
    save_adapter(tmp_path / "peft", target_modules=["embed_tokens", "q_proj"])
    ours, theirs = (serve(folder).weights.own.embedding for folder in (as_gguf(tmp_path / "peft"), tmp_path / "peft"))
    assert ours is not None and theirs is not None
    torch.testing.assert_close(ours.shrink @ ours.expand, theirs.shrink @ theirs.expand)


@pytest.mark.parametrize(("kind", "rtol"), [("F16", 1e-3), ("BF16", 1e-2)])
def test_floats_of_16_bits_are_read(kind: str, rtol: float, tmp_path: Path) -> None:
    save_adapter(tmp_path / "peft")
    folder = as_gguf(tmp_path / "peft", kind=gguf.GGMLQuantizationType[kind])
    assert_same(serve(folder), serve(tmp_path / "peft"), rtol=rtol, atol=rtol)


def test_q8_0_is_read_and_less_is_refused() -> None:
    weights = torch.randn(3, 64).numpy()
    for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0):
        stored = gguf.quants.quantize(weights, kind)
        if kind is gguf.GGMLQuantizationType.Q8_0:
            tensor = GgufTensor((3, 64), kind, stored)
            assert abs(as_torch("lora", tensor).numpy() - weights).max() < 0.05
        else:
            with pytest.raises(AdapterInvalidError, match="lora is in Q4_0; only F32"):
                as_torch("lora", GgufTensor((3, 64), kind, stored))


def test_without_alpha_the_factor_is_1_as_in_llama_cpp(tmp_path: Path) -> None:
    save_adapter(tmp_path / "peft", r=4, lora_alpha=4)
    assert_same(serve(as_gguf(tmp_path / "peft", alpha=0.0)), serve(tmp_path / "peft"))


def test_a_gguf_file_may_be_activated_uploaded_and_listed(tmp_path: Path) -> None:
    save_adapter(tmp_path / "peft")
    (file,) = as_gguf(tmp_path / "peft", invocation=[7, 8]).iterdir()
    sizes = {file.name: file.stat().st_size}
    check_upload(sizes)
    with received({"": sizes}, iter([file.read_bytes()])) as uploads:
        uploaded = read_adapter(uploads[""].read(), layouts(), BASE, torch.float32)
    assert uploaded.invocation is not None and uploaded.invocation.token_ids == (7, 8)
    assert_same(uploaded, serve(tmp_path / "peft"))
    listing = LocalListing(
        tmp_path, lambda config: (), lambda config: None, lambda *read: check_shapes(*read, layouts(), BASE)
    )
    assert {adapter.id: adapter.fault for adapter in listing.adapters()} == {"gguf": "", "peft": ""}


def test_beside_pefts_files_the_gguf_file_is_not_read(tmp_path: Path) -> None:
    save_adapter(tmp_path / "peft")
    (tmp_path / "peft" / "adapter-f16.gguf").write_bytes(b"anything")
    assert serve(tmp_path / "peft").lora_rank == 4


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"type": "model"}, "general.type is 'model': it is not an adapter"),
        ({"architecture": "qwen2"}, "general.architecture is 'qwen2', but the base is LlamaForCausalLM.* llama"),
        ({"edit": lambda own: own.update({"blk.0.attn_norm.weight": torch.ones(24)})}, "blk.0.attn_norm.weight: only"),
        ({"edit": lambda own: own.update({"blk.9.attn_q.weight.lora_a": torch.ones(4, 24)})}, "blk.9.attn_q.*: only"),
        ({"edit": lambda own: own.pop("blk.0.attn_q.weight.lora_a")}, "missing .*layers.0.self_attn.q_proj.lora_A"),
        ({"edit": lambda own: own.update({"blk.0.attn_q.weight.lora_b": torch.ones(7, 4)})}, "q_proj.lora_B"),
        ({"edit": lambda own: own.clear()}, "no tensors of LoRA"),
        ({"alpha": float("nan")}, "lora_alpha"),
    ],
)
def test_what_is_wrong_with_a_gguf_file_is_said(changes: dict[str, object], reason: str, tmp_path: Path) -> None:
    save_adapter(tmp_path / "peft")
    with pytest.raises(AdapterInvalidError, match=reason):
        serve(as_gguf(tmp_path / "peft", **changes))  # type: ignore[arg-type]


def test_a_gguf_file_that_is_cut_short_or_one_of_two_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path / "peft")
    (file,) = as_gguf(tmp_path / "peft").iterdir()
    whole = file.read_bytes()
    for length in (0, 3, 20, 200, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(AdapterInvalidError):
            serve(file.parent)
    file.write_bytes(whole)
    file.with_name("b.gguf").write_bytes(whole)
    with pytest.raises(AdapterInvalidError, match="a folder of its own"):
        serve(file.parent)
