"""Kinds of adapters beyond a product of A and B: in one batch with the base, their logits equal PEFT's."""

import dataclasses
import warnings
from copy import deepcopy
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import (
    AdaLoraConfig,
    BdLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    MontecloraConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen2Config

from loraplex_protos.errors import AdapterInvalidError, InvalidRequestError
from loraplex_shard.device.parallel import Group
from loraplex_shard.kernels.library import instruction_set
from loraplex_shard.lora.merge import Recipe, merge
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.config import AdapterConfig
from loraplex_shard.lora.peft.parsing import parse_config
from loraplex_shard.lora.peft.products import as_lora, most_bytes
from loraplex_shard.lora.peft.reading import read_adapter, read_deltas
from loraplex_shard.lora.peft.targets import Target
from loraplex_shard.lora.sources.files import TENSORS
from loraplex_shard.lora.weights.deltas import name_of_a, name_of_b
from loraplex_shard.models.decoder import Decoder
from loraplex_shard.ops.base import Operations
from loraplex_shard.ops.quantized import quantize
from loraplex_shard.settings import Quantize
from loraplex_shard.shapes.batch import Segment
from tests.shard.decoders import Sequences, load, load_reference, save_checkpoint
from tests.shard.families import SIZES
from tests.shard.lora_models import broken, edit_config, edit_tensors, read
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
    "BD-LoRA": {
        "r": 4,
        "use_bdlora": BdLoraConfig(
            target_modules_bd_a=["o_proj", "down_proj"], target_modules_bd_b=["q_proj"], nblocks=2, match_strict=False
        ),
    },
    "MonteCLoRA, which samples in training alone": {"monteclora_config": MontecloraConfig()},
    "LoHa": {"kind": LoHaConfig, "r": 3, "alpha": 2, "init_weights": False, "rank_pattern": {"up_proj": 2}},
    "LoKr": {"kind": LoKrConfig, "r": 2, "alpha": 3, "init_weights": False},
    "LoKr of two products": {"kind": LoKrConfig, "r": 1, "decompose_both": True, "init_weights": False},
    "LoKr by 4": {"kind": LoKrConfig, "r": 2, "decompose_factor": 4, "init_weights": False},
    "VeRA": {"kind": VeraConfig, "r": 6, "init_weights": False},
    "VeRA whose projections are not saved": {
        "kind": VeraConfig,
        "r": 6,
        "init_weights": False,
        "save_projection": False,
        "projection_prng_key": 5,
    },
    "MiSS": {"kind": MissConfig, "r": 5, "init_weights": False},
    "MiSS, mini": {"kind": MissConfig, "r": 5, "mini_r": 2, "init_weights": "mini"},
    "AdaLoRA": {"kind": AdaLoraConfig, "init_r": 3, "lora_alpha": 5, "total_step": 9, "init_lora_weights": False},
    "AdaLoRA that has dropped ranks": {
        "kind": AdaLoraConfig,
        "init_r": 3,
        "total_step": 9,
        "init_lora_weights": False,
        "rank_pattern": {
            "model.layers.0.self_attn.q_proj.lora_E": [True, False, True],
            "model.layers.1.mlp.up_proj.lora_E": [False, False, False],
        },
    },
    "(IA)3": {"kind": IA3Config, "feedforward_modules": ["down_proj"], "init_ia3_weights": False},
    "(IA)3 of a part": {
        "kind": IA3Config,
        "target_modules": ["k_proj", "v_proj", "down_proj"],
        "feedforward_modules": r".*\.down_proj",
        "init_ia3_weights": False,
    },
}
BASES = {
    "biases": Qwen2Config(**SIZES),
    "no biases, tied": LlamaConfig(**{**SIZES, "tie_word_embeddings": True}),
}
# Once these are loaded they are LoRA, and one case of each will do.
AS_LORA = [kind for kind, options in KINDS.items() if options.get("kind", IA3Config) is not IA3Config]
CASES = [
    pytest.param(kind, base, kernels, id=f"{kind}-{base}-{'kernels' if kernels else 'reference'}")
    for kind, base, kernels in product(KINDS, BASES, (False, True))
    if kind not in AS_LORA or (base, kernels) == ("biases", True)
]


def save_adapter(base: Path, directory: Path, **options: object) -> None:
    model = load_reference(base)
    torch.manual_seed(1)
    kind = options.pop("kind", LoraConfig)
    fields = {"target_modules": LINEAR, "task_type": "CAUSAL_LM", **options}
    if kind is LoraConfig:
        fields = {"r": 3, "init_lora_weights": False, **fields}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice
        adapted = get_peft_model(model, kind(**fields))
        for name, parameter in adapted.named_parameters():
            if not parameter.requires_grad:
                continue
            if kind is not LoraConfig:
                parameter.data = 0.4 * torch.randn_like(parameter) + ("ia3_l" in name)
            elif "lora_A" not in name and "lora_B.default.weight" not in name:
                parameter.data *= 1 + torch.rand_like(parameter)
        adapted.save_pretrained(directory)


def logits_of_peft(base: Path, directory: Path) -> torch.Tensor:
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        logits: torch.Tensor = PeftModel.from_pretrained(load_reference(base), directory)(torch.tensor([TOKENS])).logits
    return logits[0]


def base_of(decoder: Decoder) -> BaseModel:
    return BaseModel("any", tensors=decoder.tensors, served=decoder.served, matrices=decoder.matrices)


@pytest.mark.parametrize(("kind", "base", "kernels"), CASES)
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


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["DoRA", "VeRA", "LoHa", "(IA)3"])
def test_on_a_rounded_base_logits_change_as_pefts_do_on_the_same_base(
    kind: str, quantization: Quantize, tmp_path: Path
) -> None:
    directory = save_checkpoint(BASES["biases"], tmp_path / "base")
    save_adapter(directory, tmp_path / "adapter", **KINDS[kind])
    decoder = load(directory, quantize=quantization)
    base = base_of(decoder)
    own = read_adapter(read(tmp_path / "adapter"), decoder.layouts, base, torch.float32).weights
    reference = load_reference(directory)
    for module in [part.module for layout in decoder.layouts for part in layout.parts]:
        reference.get_submodule(module).weight.data = base.served.read(module, slice(None)).clone()
    embedding = reference.model.embed_tokens.weight
    embedding.data = quantize(embedding.data, 8).dequantized()
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        without = reference(torch.tensor([TOKENS])).logits[0]
        adapted = PeftModel.from_pretrained(reference, tmp_path / "adapter")
        expected = adapted(torch.tensor([TOKENS])).logits[0] - without
    batch = {"base": TOKENS, "own": TOKENS}
    actual = Sequences(decoder, 4).step(batch, (Segment(len(TOKENS), 2 * len(TOKENS), own),))
    # What is multiplied with rounded matrices is rounded as well.
    assert torch.cosine_similarity((actual["own"] - actual["base"]).flatten(), expected.flatten(), dim=0) > 0.99


def test_the_way_out_of_layer_replication_is_the_model_that_peft_computes(tmp_path: Path) -> None:
    directory = save_checkpoint(BASES["no biases, tied"], tmp_path / "base")
    save_adapter(directory, tmp_path / "adapter", layer_replication=[[0, 2], [1, 2]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(load_reference(directory), tmp_path / "adapter")
        with torch.inference_mode():
            expected = model(torch.tensor([TOKENS])).logits[0]
        layers = model.get_base_model().model.layers
        for index, layer in enumerate(layers):
            layers[index] = deepcopy(layer)
        model.merge_and_unload().save_pretrained(tmp_path / "model")
    actual = Sequences(load(tmp_path / "model")).step({"own": TOKENS})["own"]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    assert len(layers) == 3


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


def test_what_would_take_too_much_as_lora_is_refused_before_it_is_computed(tmp_path: Path) -> None:
    directory = save_checkpoint(BASES["biases"], tmp_path / "base")
    for name, kind in {"loha": {**KINDS["LoHa"], "r": 23}, "vera": KINDS["VeRA"]}.items():
        save_adapter(directory, tmp_path / name, **kind)
    decoder = load(directory)
    with pytest.raises(AdapterInvalidError, match="as LoRA it has lora_rank 529, but at most 512 is served: convert"):
        read_adapter(read(tmp_path / "loha"), decoder.layouts, base_of(decoder), torch.float32)
    weights = read_adapter(read(tmp_path / "vera"), decoder.layouts, base_of(decoder), torch.float32).weights
    whole = sum(tensor.nbytes for layer in weights.layers.values() for tensor in layer.tensors)
    with pytest.raises(AdapterInvalidError, match=f"takes more than {whole - 1:,} bytes"):
        read_adapter(read(tmp_path / "vera"), decoder.layouts, base_of(decoder), torch.float32, limit=whole - 1)
    files = read(tmp_path / "vera")
    read_adapter(files, decoder.layouts, base_of(decoder), torch.float32, limit=whole)
    assert whole <= most_bytes(parse_config(files.config), decoder.layouts)


ALIKE = {"LoKr of two products", "LoKr by 4", "VeRA whose projections are not saved", "MiSS, mini"}
ALIKE |= {"AdaLoRA that has dropped ranks", "(IA)3 of a part", "MonteCLoRA, which samples in training alone"}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ALIKE])
def test_broken_tensors_of_any_kind_are_named(kind: str, tmp_path: Path) -> None:
    directory = save_checkpoint(BASES["biases"], tmp_path / "base")
    few = {} if kind == "BD-LoRA" else {"target_modules": ["q_proj", "down_proj"]}
    save_adapter(directory, tmp_path / "adapter", **{**KINDS[kind], **few})
    decoder, tensors = load(directory), load_file(tmp_path / "adapter" / TENSORS)

    def refusal(tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, tmp_path / "adapter" / TENSORS)
        with pytest.raises(AdapterInvalidError) as caught:
            read_adapter(read(tmp_path / "adapter"), decoder.layouts, base_of(decoder), torch.float32)
        return caught.value.message

    for name in [name for name in tensors if "layers.0" in name or "layers" not in name or "k_proj" in name]:
        tensor = name.removeprefix("base_model.model.")
        module = tensor.removesuffix(".weight").replace(".base_layer", "").rpartition(".")[0] or tensor
        ways = list(broken(tensors, name))
        if "base_model.vera_" in name:  # layers read as much of these as they need
            del ways[4]
        for each in ways:
            message = refusal(each)
            assert tensor in message or module in message
        if "layers.0" in name:
            other = name.replace("layers.0", "layers.7")
            assert other in refusal({**tensors, other: tensors[name].clone()})
    assert "surprise" in refusal({**tensors, "surprise": torch.zeros(3)})


def test_trained_biases_that_a_former_peft_has_not_saved_are_the_models_with_a_warning(tmp_path: Path) -> None:
    directory = save_checkpoint(BASES["biases"], tmp_path / "base")
    save_adapter(directory, tmp_path / "adapter", bias="lora_only", target_modules=["q_proj", "o_proj"])
    edit_tensors(
        tmp_path / "adapter", lambda tensors: [tensors.pop(name) for name in set(tensors) if "base_layer" in name]
    )
    decoder = load(directory)
    adapter = read_adapter(read(tmp_path / "adapter"), decoder.layouts, base_of(decoder), torch.float32)
    assert "bias: lora_only, but its file has no biases" in adapter.warnings[0]
    actual = Sequences(decoder).step({"own": TOKENS}, (Segment(0, len(TOKENS), adapter.weights),))["own"]
    torch.testing.assert_close(actual, logits_of_peft(directory, tmp_path / "adapter"), rtol=1e-3, atol=1e-3)


def test_random_projections_are_not_guessed_for_a_part_of_a_model(tmp_path: Path) -> None:
    directory = save_checkpoint(BASES["biases"], tmp_path / "base")
    save_adapter(directory, tmp_path / "adapter", **KINDS["VeRA whose projections are not saved"])
    decoder = load(directory)
    base = dataclasses.replace(base_of(decoder), is_text_part=True)
    with pytest.raises(AdapterInvalidError, match="save_projection"):
        read_adapter(read(tmp_path / "adapter"), decoder.layouts, base, torch.float32)


@pytest.mark.parametrize("kind", ["BD-LoRA", "LoHa", "VeRA"])
def test_kinds_that_peft_does_not_merge_are_not_merged(kind: str, tmp_path: Path) -> None:
    directory = save_checkpoint(BASES["biases"], tmp_path / "base")
    save_adapter(directory, tmp_path / "adapter", **KINDS[kind])
    decoder = load(directory)
    with pytest.raises(InvalidRequestError, match=rf"one of these is of (?i:{kind})"):
        read_deltas(read(tmp_path / "adapter"), decoder.layouts, base_of(decoder))


def test_factors_of_outputs_are_merged_as_peft_merges_them(tmp_path: Path) -> None:
    directory = save_checkpoint(BASES["biases"], tmp_path / "base")
    fields = KINDS["(IA)3 of a part"]
    save_adapter(directory, tmp_path / "a", **fields)
    save_adapter(directory, tmp_path / "b", **{**fields, "target_modules": ["k_proj"]})
    decoder = load(directory)
    base = base_of(decoder)
    deltas = [read_deltas(read(tmp_path / name), decoder.layouts, base) for name in "ab"]
    merged = merge(deltas, Recipe((0.7, 0.4), "linear", 1.0, "total"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(load_reference(directory), tmp_path / "a", "a")
        model.load_adapter(tmp_path / "b", "b")
        model.base_model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "merged")
    for name, ours in ("self_attn.k_proj", "self_attn.k_proj"), ("mlp.down_proj", "mlp.up_proj"):
        theirs = model.get_submodule(f"base_model.model.model.layers.1.{name}").ia3_l["merged"].flatten()
        torch.testing.assert_close(merged[f"model.layers.1.{ours}"].gain, theirs)
    with pytest.raises(InvalidRequestError, match="by the strategy linear"):
        merge(deltas, Recipe((0.7, 0.4), "ties", 0.5, "total"))


def test_columns_of_qalora_are_for_the_means_of_groups_of_inputs() -> None:
    config = AdapterConfig(peft_type="LORA", use_qalora=True, qalora_group_size=4)
    a, b, x = torch.randn(3, 6), torch.randn(10, 3), torch.randn(5, 24)
    tensors = {name_of_a("m"): a, name_of_b("m"): b}
    plain, targets = as_lora(config, tensors, {"m": Target(3, 2.0)}, {"m": (24, 10)})
    matrices = {name: {"x": SimpleNamespace(weight=matrix)} for name, matrix in (("lora_A", a), ("lora_B", b))}
    layer = SimpleNamespace(  # PEFT has it for layers of GPTQ alone
        **matrices, lora_dropout={"x": None}, scaling={"x": 2.0}, qalora_group_size={"x": 4}, training=False,
        in_features=24,
    )  # fmt: skip
    expected = QALoraLinearVariant.forward(layer, "x", x, torch.zeros(5, 10))
    torch.testing.assert_close(targets["m"].scale * x @ plain[name_of_a("m")].T @ plain[name_of_b("m")].T, expected)


def test_a_tied_head_is_replaced_with_the_embedding_unless_it_is_saved(tmp_path: Path) -> None:
    directory = save_checkpoint(BASES["no biases, tied"], tmp_path / "base")
    save_adapter(directory, tmp_path / "adapter", modules_to_save=["lm_head"])
    edit_config(tmp_path / "adapter", modules_to_save=None)
    decoder = load(directory)
    weights = read_adapter(read(tmp_path / "adapter"), decoder.layouts, base_of(decoder), torch.float32).weights
    actual = Sequences(decoder).step({"own": TOKENS}, (Segment(0, len(TOKENS), weights),))
    expected = logits_of_peft(directory, tmp_path / "adapter")
    torch.testing.assert_close(actual["own"], expected, rtol=1e-3, atol=1e-3)
