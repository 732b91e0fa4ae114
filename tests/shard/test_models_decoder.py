"""The decoder's guarantees besides its results: how it loads, what it shares, and what it does not change."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from loraplex_shard.checkpoint import open_checkpoint
from loraplex_shard.kernels.library import instruction_set
from loraplex_shard.layers.parameters import ParameterForm
from loraplex_shard.models.loading import load_decoder
from loraplex_shard.ops.reference import ReferenceOperations
from loraplex_shard.shapes.batch import Segment
from tests.shard.decoders import CPU, WHOLE, Sequences, adapter_for, load, load_reference, save_checkpoint, whole_delta
from tests.shard.operations import cpu_operations

TOKENS = [5, 80, 3, 3, 41, 7, 66, 0, 95]


def config(tied: bool = False) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(config(), tmp_path_factory.mktemp("checkpoint"))


def test_a_sharded_checkpoint_is_the_same_model(directory: Path, tmp_path: Path) -> None:
    sharded = save_checkpoint(config(), tmp_path, max_shard_size="30KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    expected, actual = (Sequences(load(d)).step({"a": TOKENS})["a"] for d in (directory, sharded))
    assert actual.equal(expected)


def test_a_tied_lm_head_is_not_a_copy_of_the_embedding(tmp_path: Path) -> None:
    decoder = load(save_checkpoint(config(tied=True), tmp_path))
    assert decoder.lm_head.weight.matrix.data_ptr() == decoder.embedding.weight.matrix.data_ptr()


def test_progress_counts_every_tensor(directory: Path) -> None:
    checkpoint, seen = open_checkpoint(str(directory)), []
    form = ParameterForm(torch.float32, CPU, "none")
    load_decoder(checkpoint, WHOLE, ReferenceOperations(), form, 16, lambda *counts: seen.append(counts))
    total = len(checkpoint.names)
    assert seen == [(done, total) for done in range(1, total + 1)]


def test_an_adapter_on_all_layers_equals_the_model_with_its_delta_merged(directory: Path, tmp_path: Path) -> None:
    model = load_reference(directory)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, module in modules.items():
        shrink, expand = whole_delta(name, module.out_features, module.in_features)
        module.weight.data += expand @ shrink
    model.save_pretrained(tmp_path)
    merged = Sequences(load(tmp_path)).step({"a": TOKENS})["a"]
    decoder = load(directory)
    segments = (Segment(2, 2 + len(TOKENS), adapter_for(decoder.layouts)),)
    mixed = Sequences(decoder).step({"before": [1, 2], "a": TOKENS, "after": [3]}, segments)
    torch.testing.assert_close(mixed["a"], merged, rtol=1e-4, atol=1e-4)
    base = Sequences(decoder).step({"before": [1, 2], "after": [3]})
    torch.testing.assert_close(mixed["before"], base["before"])
    torch.testing.assert_close(mixed["after"], base["after"])


def test_a_blocks_former_content_does_not_matter(directory: Path) -> None:
    decoder = load(directory)
    clean, dirty = Sequences(decoder), Sequences(decoder)
    for layer in dirty.cache.layers:
        layer.keys.fill_(torch.nan)
        layer.values.fill_(torch.nan)
    for chunk in (TOKENS[:6], TOKENS[6:7], TOKENS[7:]):
        assert torch.equal(dirty.step({"a": chunk})["a"], clean.step({"a": chunk})["a"])


def test_a_sequence_that_is_not_finite_does_not_change_others_in_its_batch(directory: Path) -> None:
    decoder = load(directory)
    broken = adapter_for(decoder.layouts)
    for layer in broken.layers.values():
        layer.shrink.fill_(torch.nan)
    driver, alone = Sequences(decoder), Sequences(decoder)
    driver.step({"broken": TOKENS, "a": TOKENS}, (Segment(0, len(TOKENS), broken),))
    alone.step({"a": TOKENS})
    together = driver.step({"broken": [1], "a": [2]})
    assert together["broken"].isnan().all()
    torch.testing.assert_close(together["a"], alone.step({"a": [2]})["a"])


def test_the_cache_has_the_announced_size_and_a_spare_block(directory: Path) -> None:
    decoder = load(directory, torch.bfloat16)
    cache = decoder.new_cache(num_blocks=5, block_size=4)
    total = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert total == 6 * decoder.cache_block_bytes(block_size=4)
    assert cache.layers[0].keys.shape == (6, 2, 8, 4)


def test_the_layouts_name_every_linear_layer(directory: Path) -> None:
    layouts = {layout.name: layout for layout in load(directory).layouts}
    in_layers = {f"layers.{i}.{name}" for i in range(2) for name in ("qkv", "o", "gate_up", "down")}
    assert layouts.keys() == in_layers | {"lm_head"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config())
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {part.module for layout in layouts.values() for part in layout.parts} == linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_kernels_compute_the_same_as_the_reference(directory: Path, dtype: torch.dtype) -> None:
    kernels = cpu_operations(instruction_set())
    ours, reference = load(directory, dtype, ops=kernels), load(directory, dtype)
    adapter, tolerance = adapter_for(ours.layouts, dtype), 2e-4 if dtype == torch.float32 else 0.25
    drivers = [Sequences(decoder, block_size=16) for decoder in (ours, reference)]
    steps = [
        ({"a": TOKENS, "b": [3, 1]}, (Segment(9, 11, adapter),)),
        ({"a": [4], "b": [5]}, ()),
        ({"b": [6], "a": [7]}, (Segment(0, 1, adapter),)),
        ({"a": [8], "b": [9]}, (Segment(0, 2, adapter),)),
        ({"c": TOKENS[:2]}, ()),
        ({"a": [1], "c": [2]}, ()),
    ]
    for chunks, segments in steps:
        actual, expected = (driver.step(chunks, segments) for driver in drivers)
        for name in chunks:
            torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=tolerance)
