"""Adapters of experts, in every layout that trainers write, compared with PEFT on transformers' model."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.device.parallel import Group
from loraplex_shard.kernels.library import instruction_set
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.reading import read_adapter
from loraplex_shard.models.decoder import Decoder
from loraplex_shard.settings import Quantize
from loraplex_shard.shapes.adapter import AdapterWeights
from loraplex_shard.shapes.batch import Segment
from tests.shard.decoders import Sequences, load, load_reference, save_checkpoint
from tests.shard.families import FAMILIES
from tests.shard.lora_models import read
from tests.shard.operations import BLOCK_SIZE, cpu_operations

TOKENS = [5, 80, 3, 3, 41, 7, 66, 0, 95, 12, 30]
ANY = BaseModel("any")
LORA_RANK = 3
Tensors = dict[str, torch.Tensor]


def save(directory: Path, tensors: Tensors, **config: object) -> Path:
    """An adapter in a layout that PEFT does not write."""
    directory.mkdir()
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": LORA_RANK, "lora_alpha": 5, **config}
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    save_file(
        {
            f"base_model.model.model.layers.{name}.weight": tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        },
        directory / "adapter_model.safetensors",
    )
    return directory


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape) * 0.2


def logits_of_peft(base: Path, adapter: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(load_reference(base), adapter)
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([TOKENS])).logits[0]
    return logits


def weights_for(decoder: Decoder, adapter: Path) -> AdapterWeights:
    return read_adapter(read(adapter), decoder.layouts, ANY, torch.float32).weights


def logits(decoder: Decoder, adapter: Path) -> torch.Tensor:
    """The logits of TOKENS, in uneven chunks and one by one, beside another sequence without the adapter."""
    weights, driver, found, others = weights_for(decoder, adapter), Sequences(decoder, BLOCK_SIZE), [], []
    plain = Sequences(decoder, BLOCK_SIZE)
    for chunk in (TOKENS[:5], TOKENS[5:6], TOKENS[6:9], TOKENS[9:10], TOKENS[10:]):
        segments = (Segment(2, 2 + len(chunk), weights),)
        both = driver.step({"plain": [3, 9], "adapted": chunk}, segments)
        found.append(both["adapted"])
        others.append(both["plain"] - plain.step({"plain": [3, 9]})["plain"])
    assert torch.cat(others).abs().max() < 1e-3
    return torch.cat(found)


@pytest.fixture(scope="module", params=["mixtral", "qwen3 moe"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(FAMILIES[request.param], tmp_path_factory.mktemp("base"))


def names(base: Path) -> tuple[str, list[str], int, int]:
    """Where the base's experts are, their modules' names, their number and their width."""
    experts = load(base).spec.experts
    assert experts is not None
    return experts.experts, [*experts.gate_up, experts.down], experts.count, experts.intermediate_size


def by_expert(base: Path, directory: Path) -> Path:
    experts, modules, count, size = names(base)
    tensors: Tensors = {}
    for layer in range(3):
        for expert in range(count):
            for module, inputs, outputs in zip(modules, (48, 48, size), (size, size, 48), strict=True):
                name = f"{layer}.{experts}.{expert}.{module}"
                tensors |= {f"{name}.lora_A": random(LORA_RANK, inputs), f"{name}.lora_B": random(outputs, LORA_RANK)}
        for name, outputs in (("q_proj", FAMILY_WIDTH[modules[0]]), ("o_proj", 48)):
            inputs = 48 if name == "q_proj" else FAMILY_WIDTH[modules[0]]
            tensors[f"{layer}.self_attn.{name}.lora_A"] = random(LORA_RANK, inputs)
            tensors[f"{layer}.self_attn.{name}.lora_B"] = random(outputs, LORA_RANK)
    return save(directory, tensors, target_modules=["q_proj", "o_proj", *modules])


FAMILY_WIDTH = {"w1": 48, "gate_proj": 60}  # for all query heads


def all_parameters(base: Path, directory: Path) -> Path:
    return of_parameters(base, directory, ["gate_up_proj", "mlp.experts.down_proj", "gate.weight"])


def one_parameter(base: Path, directory: Path) -> Path:
    return of_parameters(base, directory, ["gate_up_proj"])


def of_parameters(base: Path, directory: Path, parameters: list[str]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(
            r=LORA_RANK,
            lora_alpha=5,
            target_modules=["v_proj"],
            target_parameters=parameters,
            rank_pattern={"experts.gate_up_proj": 2},
            task_type="CAUSAL_LM",
            init_lora_weights=False,
        )
        torch.manual_seed(1)
        model = get_peft_model(load_reference(base), config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.2)
        model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("family", ["granite moe", "gpt oss", "granite 4, experts", "olmoe"])
@pytest.mark.parametrize("parameters", [["gate_up_proj", "down_proj", "router.weight"], ["experts.down_proj"]])
def test_an_adapter_of_parameters_has_the_logits_of_peft(family: str, parameters: list[str], tmp_path: Path) -> None:
    base = save_checkpoint(FAMILIES[family], tmp_path / "base")
    adapter = of_parameters(base, tmp_path / "adapter", parameters)
    expected = logits_of_peft(base, adapter)
    for ops in (None, cpu_operations(instruction_set())):
        torch.testing.assert_close(logits(load(base, ops=ops), adapter), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [by_expert, all_parameters, one_parameter])
def test_an_adapter_of_experts_has_the_logits_of_peft(
    base: Path, make: Callable[[Path, Path], Path], tmp_path: Path
) -> None:
    torch.manual_seed(2)
    adapter = make(base, tmp_path / "adapter")
    expected = logits_of_peft(base, adapter)
    for ops in (None, cpu_operations(instruction_set())):
        torch.testing.assert_close(logits(load(base, ops=ops), adapter), expected, rtol=1e-3, atol=1e-3)
    plain = load_reference(base)(torch.tensor([TOKENS])).logits[0]
    assert (expected - plain).abs().max() > 0.1


def test_shared_matrices_of_experts_are_stored_once(base: Path, tmp_path: Path) -> None:
    """In SGLang's layout, experts share the A matrices that read the hidden states and the B matrices that write
    them."""
    torch.manual_seed(3)
    experts, modules, count, size = names(base)
    shared: Tensors = {}
    whole: Tensors = {}
    for layer in range(3):
        for alias, module, a, b in (
            ("w1", modules[0], random(1, LORA_RANK, 48), random(count, size, LORA_RANK)),
            ("w3", modules[1], random(1, LORA_RANK, 48), random(count, size, LORA_RANK)),
            ("w2", modules[2], random(count, LORA_RANK, size), random(1, 48, LORA_RANK)),
        ):
            shared |= {f"{layer}.mlp.experts.{alias}.lora_A": a, f"{layer}.mlp.experts.{alias}.lora_B": b}
            for expert in range(count):
                name = f"{layer}.{experts}.{expert}.{module}"
                whole[f"{name}.lora_A"] = a[expert if len(a) > 1 else 0]
                whole[f"{name}.lora_B"] = b[expert if len(b) > 1 else 0]
    decoder = load(base)
    written = [
        save(tmp_path / "shared", shared, target_modules=modules),
        save(tmp_path / "whole", whole, target_modules=modules),
    ]
    assert logits(decoder, written[0]).equal(logits(decoder, written[1]))


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantized_experts_take_adapters(base: Path, quantization: Quantize, tmp_path: Path) -> None:
    torch.manual_seed(4)
    adapter = by_expert(base, tmp_path / "adapter")
    expected, actual = (
        logits(load(base, ops=ops, quantize=quantization), adapter) for ops in (None, cpu_operations(instruction_set()))
    )
    assert float((actual - expected).norm() / expected.norm()) < 0.05


def test_each_rank_holds_its_units_of_every_expert(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    adapter = by_expert(base, tmp_path / "adapter")
    whole = load(base)
    ranks = [load(base, group=Group(rank, 2)) for rank in range(2)]
    layout = next(each for each in whole.layouts if each.name == "layers.1.experts.down.2")
    parts = [weights_for(rank, adapter).layers[layout.name] for rank in ranks]
    joined = torch.cat([part.shrink for part in parts], dim=1)
    assert joined.equal(weights_for(whole, adapter).layers[layout.name].shrink)
    number = [each.name for each in whole.layouts].index(layout.name)
    matrices = [[m for m in each.modules() if getattr(m, "layout", None) == each.layouts[number]] for each in ranks]
    stored = [matrix.weight.matrix for (matrix,) in matrices]
    (original,) = [m for m in whole.modules() if getattr(m, "layout", None) == layout]
    assert torch.cat(stored, dim=1).equal(original.weight.matrix)


def test_an_adapter_of_only_attention_has_no_table_of_experts(base: Path, tmp_path: Path) -> None:
    decoder = load(base)
    attention, experts = (
        weights_for(decoder, make(base, tmp_path / make.__name__)) for make in (_attention, one_parameter)
    )
    (head,) = [layout for layout in decoder.layouts if layout.name == "lm_head"]
    assert len(attention.table) == head.index + 1 < len(experts.table)


def _attention(base: Path, directory: Path) -> Path:
    tensors = {f"{layer}.self_attn.k_proj.lora_A": random(LORA_RANK, 48) for layer in range(3)}
    width = load(base).spec.kv_heads * load(base).spec.head_dim
    tensors |= {f"{layer}.self_attn.k_proj.lora_B": random(width, LORA_RANK) for layer in range(3)}
    return save(directory, tensors, target_modules=["k_proj"])


def test_parameters_that_are_not_experts_are_refused_by_name(base: Path, tmp_path: Path) -> None:
    adapter = save(tmp_path / "adapter", {}, target_modules=[], target_parameters=["self_attn.sinks"])
    with pytest.raises(AdapterInvalidError, match=r"target_parameters: self_attn\.sinks"):
        weights_for(load(base), adapter)
    adapter = save(tmp_path / "empty", {}, target_modules=[], target_parameters=["experts.down_proj"])
    with pytest.raises(AdapterInvalidError, match="missing"):
        weights_for(load(base), adapter)


def test_experts_stored_as_one_tensor_are_the_same(base: Path, tmp_path: Path) -> None:
    """transformers keeps experts like this in memory, as do GGUF files."""
    model = load_reference(base)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    expected, actual = (Sequences(load(each)).step({"a": TOKENS})["a"] for each in (base, tmp_path))
    assert actual.equal(expected)
