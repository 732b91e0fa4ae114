"""Layers that keep a state of each sequence: however sequences are cut, mixed and moved from row to row, they are
computed as transformers computes each of them alone."""

import sys
import warnings
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from loraplex_shard.device.parallel import Group, GroupSizeError
from loraplex_shard.kernels.library import instruction_set
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.reading import read_adapter
from loraplex_shard.models import Model
from loraplex_shard.models.transformers.checking import check_model
from loraplex_shard.models.transformers.probing import without_kernels
from loraplex_shard.shapes.batch import Segment
from tests.shard.class_outcomes import save_adapter
from tests.shard.decoders import ROWS, Sequences, adapter_for, load, load_reference, save_checkpoint, whole_delta
from tests.shard.lora_models import read
from tests.shard.operations import cpu_operations
from tests.shard.tiny_classes import MAMBA, VOCAB, tiny_config

MIXED = ["linear_attention", "full_attention"]
FAMILIES: dict[str, PreTrainedConfig] = {
    "gated delta net": tiny_config("qwen3_5_text"),
    "gated delta net and experts": tiny_config("qwen3_next"),
    "Mamba 2": tiny_config("granitemoehybrid", layer_types=MIXED, num_hidden_layers=2, **MAMBA),
    "Mamba 2 beside attention": tiny_config("falcon_h1"),
    "Mamba 2 alone": tiny_config("mamba2"),
    "Mamba, which goes on token by token": tiny_config("jamba"),
    "short convolutions": tiny_config("lfm2"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(FAMILIES[request.param], tmp_path_factory.mktemp("model"))


def test_sequences_in_any_chunks_beside_each_other_are_computed_as_each_alone(directory: Path) -> None:
    model, random = load(directory, ops=cpu_operations(instruction_set())), Random(0)
    lengths = [1, 40, 7, 23, 2, 31, 12, 5, 17, 3, 9, 28]
    texts = {str(number): [random.randrange(VOCAB) for _ in range(length)] for number, length in enumerate(lengths)}
    adapted = set(list(texts)[::2])
    found = compute(model, texts, adapted, random)
    plain, merged = load_reference(directory), merge(load_reference(directory), model)
    for name, tokens in texts.items():
        with torch.inference_mode():
            expected = (merged if name in adapted else plain)(input_ids=torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=2e-3 * float(expected.std()))


def compute(model: Model, texts: dict[str, list[int]], adapted: set[str], random: Random) -> dict[str, torch.Tensor]:
    """The logits of all texts: in chunks of any lengths, of any of those that have a row, in an order of their own in
    each step. Who is done leaves the row to the next."""
    driver, adapter, done = Sequences(model, block_size=16), adapter_for(model.layouts), dict.fromkeys(texts, 0)
    logits: dict[str, list[torch.Tensor]] = {name: [] for name in texts}
    while unfinished := [name for name in texts if done[name] < len(texts[name])][:ROWS]:
        chosen = random.sample(unfinished, random.randint(1, len(unfinished)))
        chosen.sort(key=adapted.__contains__)  # tokens of one adapter are side by side
        chunks = {name: texts[name][done[name] :][: random.choice([1, 1, 2, 3, 9])] for name in chosen}
        first, last = (sum(len(c) for n, c in chunks.items() if n not in others) for others in (adapted, set()))
        for name, found in driver.step(chunks, (Segment(first, last, adapter),) * (first < last)).items():
            logits[name].append(found)
            done[name] += len(found)
            if done[name] == len(texts[name]):
                driver.end(name)
    return {name: torch.cat(found) for name, found in logits.items()}


def merge(reference: PreTrainedModel, model: Model) -> PreTrainedModel:
    """With that adapter in its weights."""
    for layout in model.layouts:
        for part in layout.parts:
            a, b = whole_delta(part.module, part.out_features, layout.in_features)
            holder, of_experts, expert = part.module.partition(".experts.")
            if of_experts:
                add_to_expert(reference.get_submodule(f"{holder}.experts"), *expert.split("."), b @ a)
                continue
            module = reference.get_submodule(part.module)
            module.weight = torch.nn.Parameter(module.weight + b @ a)
    return reference


def add_to_expert(experts: torch.nn.Module, number: str, projection: str, delta: torch.Tensor) -> None:
    fused = experts.down_proj if projection == "down_proj" else experts.gate_up_proj
    first = fused.shape[1] // 2 if projection == "up_proj" else 0
    fused.data[int(number), first : first + len(delta)] += delta


def test_an_adapter_on_all_linear_layers_has_the_effect_that_it_has_in_peft(directory: Path, tmp_path: Path) -> None:
    """Mamba's code reads the weight of dt_proj without calling it, so PEFT's delta of it has no effect either."""
    model, tokens = load(directory), [5, 80, 3, 3, 41, 7, 66]
    modules = load_reference(directory).named_modules()
    linear = [name for name, module in modules if type(module) is torch.nn.Linear and name != "lm_head"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = save_adapter(directory, tmp_path, linear)
    base = BaseModel("any", embedding=model.embedding_name, head=model.head_name, uncalled=model.uncalled)
    adapter = read_adapter(read(tmp_path), model.layouts, base, torch.float32)
    assert any("dt_proj" in warning for warning in adapter.warnings) == any("dt_proj" in name for name in linear)
    with torch.inference_mode():
        expected = adapted(input_ids=torch.tensor([tokens])).logits[0]
    actual = Sequences(model).step({"a": tokens}, (Segment(0, len(tokens), adapter.weights),))["a"]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_packages_with_kernels_are_left_out_where_tensors_have_no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installing flash-linear-attention or mamba_ssm does not get a model refused."""
    package = SimpleNamespace(scan=lambda states: "a kernel")
    monkeypatch.setitem(sys.modules, "kernels_of_another", package)
    scan = use_kernel_func_from_hub_with_fallback("scan", "kernels_of_another")(lambda states: "plain torch")
    with without_kernels():
        assert scan(None) == "plain torch"
    assert scan(None) == "a kernel"


def test_layers_whose_code_would_forget_their_state_go_on_token_by_token() -> None:
    for name, config in FAMILIES.items():
        told = SimpleNamespace(
            model_id="", architecture=MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type], config=config
        )
        for layer in check_model(told, 64).recurrent:
            assert layer.continues == ("token by token" not in name)


def test_states_are_counted(directory: Path) -> None:
    model = load(directory)
    cache = model.new_cache(1, 16, sequences=3)
    assert model.state_bytes > 0
    assert sum(state.nbytes for state in cache.states) == 3 * model.state_bytes


def test_states_are_not_cut_into_ranks(directory: Path) -> None:
    with pytest.raises(GroupSizeError, match="keeps states, which are not cut for ranks: use tp 1"):
        load(directory, group=Group(0, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_layers_around_a_state_are_quantized(directory: Path, dtype: torch.dtype) -> None:
    tokens, ops = list(range(20)), cpu_operations(instruction_set())
    plain, rounded = (
        torch.cat([driver.step({"a": chunk})["a"] for chunk in (tokens[:9], tokens[9:18], tokens[18:19], tokens[19:])])
        for driver in (
            Sequences(load(directory, dtype, ops=ops, quantize=quantize), block_size=16)
            for quantize in ("none", "int8")
        )
    )
    error = float((rounded - plain).norm() / plain.norm())
    assert 0 < error < 0.5  # some tokens come to other experts
