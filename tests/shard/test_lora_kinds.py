"""Kinds of adapters beyond a product of A and B: in one batch with the base, their logits equal PEFT's."""

import dataclasses
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, Qwen2Config

from loraplex_protos.errors import InvalidRequestError
from loraplex_shard.device.parallel import Group
from loraplex_shard.kernels.library import instruction_set
from loraplex_shard.lora.merge import Recipe, merge
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.reading import read_adapter, read_deltas
from loraplex_shard.models.decoder import Decoder
from loraplex_shard.ops.base import Operations
from loraplex_shard.settings import Quantize
from loraplex_shard.shapes.batch import Segment
from tests.shard.decoders import Sequences, load, load_reference, save_checkpoint
from tests.shard.families import SIZES
from tests.shard.lora_models import read
from tests.shard.operations import BLOCK_SIZE, cpu_operations

TOKENS = [5, 80, 3, 3, 41, 7, 66, 0, 90, 12, 30]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "DoRA": {"use_dora": True},
    "DoRA, rank-stabilized, also on the head": {
        "use_dora": True,
        "use_rslora": True,
        "target_modules": [*LINEAR, "lm_head"],
    },
    "DoRA with trained biases of the base": {"use_dora": True, "bias": "lora_only"},
    "a bias for B": {"lora_bias": True},
    "the base's biases in adapted layers": {"bias": "lora_only", "target_modules": ["q_proj", "o_proj"]},
    "all of the base's biases": {"bias": "all", "target_modules": ["k_proj", "up_proj"]},
    "its own head": {"modules_to_save": ["lm_head"]},
    "its own linear layer": {"modules_to_save": ["1.self_attn.k_proj"]},
    "its own head, which is also targeted": {"modules_to_save": ["lm_head"], "target_modules": [*LINEAR, "lm_head"]},
}
BASES = {
    "biases": Qwen2Config(**SIZES),
    "no biases, tied": LlamaConfig(**{**SIZES, "tie_word_embeddings": True}),
}


def save_adapter(base: Path, directory: Path, **options: object) -> None:
    model = load_reference(base)
    torch.manual_seed(1)
    fields = {"r": 3, "target_modules": LINEAR, "task_type": "CAUSAL_LM", "init_lora_weights": False, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice
        adapted = get_peft_model(model, LoraConfig(**fields))
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_A" not in name and "lora_B.default.weight" not in name:
                parameter.data *= 1 + torch.rand_like(parameter)
        adapted.save_pretrained(directory)


def logits_of_peft(base: Path, directory: Path) -> torch.Tensor:
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        logits: torch.Tensor = PeftModel.from_pretrained(load_reference(base), directory)(torch.tensor([TOKENS])).logits
    return logits[0]


def base_of(decoder: Decoder) -> BaseModel:
    return BaseModel("any", tensors=decoder.tensors, served=decoder.served)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernels", [False, True], ids=["reference", "kernels"])
def test_logits_equal_pefts(kind: str, base: str, kernels: bool, tmp_path: Path) -> None:
    directory = save_checkpoint(BASES[base], tmp_path / "base")
    save_adapter(directory, tmp_path / "adapter", **KINDS[kind])
    save_adapter(directory, tmp_path / "plain")
    ops: Operations | None = cpu_operations(instruction_set()) if kernels else None
    decoder = load(directory, ops=ops)
    own, plain = (
        read_adapter(read(tmp_path / name), decoder.layouts, base_of(decoder), torch.float32).weights
        for name in ("adapter", "plain")
    )
    length = len(TOKENS)
    segments = Segment(1, 1 + length, own), Segment(1 + length, 1 + 2 * length, plain)
    batch = {"base": [3], "own": TOKENS, "plain": TOKENS}
    actual = Sequences(decoder, BLOCK_SIZE if kernels else 4).step(batch, segments)
    for name, folder in ("own", "adapter"), ("plain", "plain"):
        torch.testing.assert_close(actual[name], logits_of_peft(directory, tmp_path / folder), rtol=1e-3, atol=1e-3)
    assert (actual["own"] - actual["plain"]).abs().max() > 0.01


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_dora_uses_the_norms_of_the_base_as_it_is_served(quantization: Quantize, tmp_path: Path) -> None:
    directory = save_checkpoint(BASES["no biases, tied"], tmp_path / "base")
    decoder = load(directory, quantize=quantization)
    served = base_of(decoder).served
    assert served is not None
    for module, packed in (
        ("model.layers.1.mlp.down_proj", decoder.layers[1].mlp.down.weight),
        ("lm_head", decoder.lm_head.weight),
    ):
        matrix = packed.matrix.float()
        torch.testing.assert_close(served.read(module, slice(0, 7)), matrix[:7])


def test_each_rank_holds_its_outputs_and_only_one_adds_the_bias_of_a_sum(tmp_path: Path) -> None:
    directory = save_checkpoint(BASES["biases"], tmp_path / "base")
    save_adapter(directory, tmp_path / "adapter", lora_bias=True)
    files, whole = read(tmp_path / "adapter"), load(directory)
    base = base_of(whole)
    cuts = [
        read_adapter(files, load(directory, group=Group(rank, 2)).layouts, base, torch.float32).weights.layers
        for rank in range(2)
    ]
    alone = read_adapter(files, whole.layouts, base, torch.float32).weights.layers
    for name, shift in ("layers.0.down", torch.add), ("layers.0.gate_up", lambda a, b: torch.cat((a, b), dim=1)):
        first, second = (cut[name].expansions[0].affine for cut in cuts)
        together = shift(first[1:], second[1:])
        torch.testing.assert_close(together, alone[name].expansions[0].affine[1:])


def test_adapters_with_parts_that_peft_would_drop_are_not_merged(tmp_path: Path) -> None:
    directory = save_checkpoint(BASES["biases"], tmp_path / "base")
    save_adapter(directory, tmp_path / "adapter", use_dora=True)
    decoder = load(directory)
    deltas = read_deltas(read(tmp_path / "adapter"), decoder.layouts, base_of(decoder))
    with pytest.raises(InvalidRequestError, match="cannot be merged"):
        merge([deltas, deltas], Recipe((0.5, 0.5), "linear", 1.0, "total"))


def test_a_tied_head_can_only_be_replaced_if_it_is_saved(tmp_path: Path) -> None:
    directory = save_checkpoint(BASES["no biases, tied"], tmp_path / "base")
    save_adapter(directory, tmp_path / "adapter", modules_to_save=["lm_head"])
    decoder = load(directory)
    base, files = base_of(decoder), read(tmp_path / "adapter")
    assert "lm_head" in read_adapter(files, decoder.layouts, base, torch.float32).weights.layers
    unsaved = dataclasses.replace(files, config=files.config.replace(b'"lm_head"', b'"nothing"'))
    with pytest.raises(Exception, match=r"lm_head\.weight: these differ from the model"):
        read_adapter(unsaved, decoder.layouts, base, torch.float32)
