"""Tiny random GGUF files."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np


def random_tensors() -> dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]:
    """A Llama with one layer, in which each tensor is quantized differently."""
    shapes = {
        "token_embd.weight": (96, 64),
        "output.weight": (96, 64),
        "blk.0.attn_q.weight": (64, 64),
        "blk.0.attn_k.weight": (32, 64),
        "blk.0.attn_v.weight": (32, 64),
        "blk.0.attn_output.weight": (64, 64),
        "blk.0.ffn_gate.weight": (96, 64),
        "blk.0.ffn_up.weight": (96, 64),
        "blk.0.ffn_down.weight": (64, 96),
        "blk.0.attn_norm.weight": (64,),
        "blk.0.ffn_norm.weight": (64,),
        "output_norm.weight": (64,),
    }
    kinds = ("Q8_0", "Q5_0", "Q4_0", "Q4_1", "F16", "BF16", "F32", "Q5_1", "Q4_1", "F32", "F32", "F32")
    random = np.random.default_rng(0)
    tensors = {}
    for (name, shape), kind in zip(shapes.items(), map(gguf.GGMLQuantizationType.__getitem__, kinds), strict=True):
        tensors[name] = gguf.quants.quantize(random.normal(0.0, 0.2, shape).astype(np.float32), kind), kind
    return tensors


def write_gguf(
    path: Path,
    tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]],
    architecture: str = "llama",
    edit: Callable[[gguf.GGUFWriter], None] | None = None,
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_vocab_size(96)
    writer.add_layer_norm_rms_eps(1e-5)
    if edit is not None:
        edit(writer)
    return _write(writer, path, tensors)


def write_tensors(path: Path, tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]) -> Path:
    """Another file of a model that is split into several."""
    return _write(gguf.GGUFWriter(path, "llama"), path, tensors)


def _write(
    writer: gguf.GGUFWriter, path: Path, tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]
) -> Path:
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
