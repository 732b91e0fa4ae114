"""Writes transformers' models into GGUF files as llama.cpp's convert_hf_to_gguf.py does."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    architecture: str  # llama.cpp's name
    model_type: str  # transformers' class
    config: Fields  # in addition to SIZES
    metadata: Callable[[PreTrainedConfig], Fields] = lambda config: {}  # in addition to the common fields
    permuted: bool = False
    norms_plus_one: bool = False
    extra: Callable[[PreTrainedConfig], Mapping[str, torch.Tensor]] = lambda config: {}


def random_model(case: Case) -> PreTrainedModel:
    """A random model in which no norm is one and no bias is zero."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(case.model_type, **SIZES | dict(case.config))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "embed" not in name:
                parameter.mul_(3)
    return model


def write(case: Case, model: PreTrainedModel, path: Path) -> Path:
    config = model.config
    writer = gguf.GGUFWriter(path, case.architecture)
    for key, value in {**_common(config), **case.metadata(config)}.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[list] = writer.add_array
        add[type(value)](f"{case.architecture}.{key}", value)
    for name, tensor in {**_tensors(case, model), **case.extra(config)}.items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _common(config: PreTrainedConfig) -> dict[str, Any]:
    eps = [getattr(config, name, None) for name in ("layer_norm_eps", "norm_epsilon", "norm_eps")]
    rope = config.rope_parameters
    said = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": getattr(config, "head_dim", None),
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None),
        "attention.layer_norm_epsilon": next((value for value in eps if value is not None), None),
        "attention.sliding_window": getattr(config, "sliding_window", None),
        "rope.freq_base": rope.get("full_attention", rope).get("rope_theta"),
        "expert_count": getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None),
        "expert_used_count": getattr(config, "num_experts_per_tok", None),
    }
    return {key: value for key, value in said.items() if value is not None}


def _tensors(case: Case, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == case.architecture)
    known = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    written = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if of_experts := _experts(model.config.model_type, name, tensor):
            written |= of_experts
            continue
        if name.endswith("experts.gate_up_proj"):
            block = f"blk.{name.split('.')[2]}"
            gate, up = tensor.chunk(2, dim=1)
            written |= {f"{block}.ffn_gate_exps.weight": gate, f"{block}.ffn_up_exps.weight": up}
            continue
        if name.endswith("experts.down_proj"):
            written[f"blk.{name.split('.')[2]}.ffn_down_exps.weight"] = tensor
            continue
        module, _, suffix = name.rpartition(".")
        if case.permuted and module.endswith(("q_proj", "k_proj")):
            tensor = tensor.unflatten(0, (-1, 2, model.config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        if case.norms_plus_one and name.endswith("norm.weight"):
            tensor = tensor + 1
        written[f"{known.get_name(module)}.{suffix}"] = tensor.squeeze()
    return written


def _experts(model_type: str, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    block, name = f"blk.{name.split('.')[2]}.ffn_" if "layers" in name else "", name.rpartition(".layers.")[2]
    bias = "bias" if name.endswith("bias") else "weight"
    if model_type == "gpt_oss" and ".experts." in name:
        tensor = tensor if bias == "bias" else tensor.transpose(1, 2)
        if "down_proj" in name:
            return {f"{block}down_exps.{bias}": tensor}
        return {f"{block}gate_exps.{bias}": tensor[:, ::2], f"{block}up_exps.{bias}": tensor[:, 1::2]}
    if name.endswith("sinks"):
        return {f"{block.replace('ffn_', 'attn_')}sinks.weight": tensor}
    if name.endswith("shared_mlp.input_linear.weight"):
        gate, up = tensor.chunk(2)
        return {f"{block}gate_shexp.weight": gate, f"{block}up_shexp.weight": up}
    return {f"{block}gate_inp.weight": tensor} if name.endswith("block_sparse_moe.router.weight") else {}


def llama_3_factors(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    rope = config.rope_parameters
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
    factors = []
    for length in 2 * math.pi / frequencies:
        relative = rope["original_max_position_embeddings"] / length
        smooth = (relative - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        factors.append(1 / ((1 - smooth.clamp(0, 1)) / rope["factor"] + smooth.clamp(0, 1)))
    return {"rope_freqs.weight": torch.stack(factors)}


def phi_3_factors(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    rope = config.rope_parameters
    return {f"rope_factors_{length}.weight": torch.tensor(rope[f"{length}_factor"]) for length in ("short", "long")}


LLAMA_3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.5, 2, 2.5, 3, 4, 5, 6]}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "truncate": False,
}
GRANITE = {"attention_multiplier": 0.1, "embedding_multiplier": 6.0, "residual_multiplier": 0.3, "logits_scaling": 4.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def _granite(config: PreTrainedConfig) -> Fields:
    return {
        "attention.scale": config.attention_multiplier,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": config.logits_scaling,
    }


def _rotated(config: PreTrainedConfig) -> Fields:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {"rope.dimension_count": int(head_dim * config.rope_parameters["partial_rotary_factor"])}


def _phi_3_long(config: PreTrainedConfig) -> Fields:
    trained = config.original_max_position_embeddings
    factor = math.sqrt(1 + math.log(config.max_position_embeddings / trained) / math.log(trained))
    return {"rope.scaling.original_context_length": trained, "rope.scaling.attn_factor": factor, **_rotated(config)}


def _pattern(config: PreTrainedConfig) -> Fields:
    return {"attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config.layer_types]}


def _gemma_2(config: PreTrainedConfig) -> Fields:
    caps = "attn_logit_softcapping", "final_logit_softcapping"
    return {name: getattr(config, name) for name in caps if getattr(config, name) is not None}


CASES = {
    "llama": Case("llama", "llama", {"head_dim": 16}, permuted=True),
    "llama, biases": Case("llama", "llama", {"head_dim": 16, "attention_bias": True, "mlp_bias": True}, permuted=True),
    "llama 3.1": Case(
        "llama",
        "llama",
        {"head_dim": 16, "rope_parameters": LLAMA_3 | {"original_max_position_embeddings": 32}},
        permuted=True,
        extra=llama_3_factors,
    ),
    "llama, linear": Case(
        "llama",
        "llama",
        {"head_dim": 16, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}},
        lambda config: {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
        permuted=True,
    ),
    "mixtral": Case("llama", "mixtral", {"head_dim": 16, "num_local_experts": 4}, permuted=True),
    "qwen2": Case("qwen2", "qwen2", {"tie_word_embeddings": True}),
    "qwen2, yarn": Case(
        "qwen2",
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "rope_theta": 100.0,
            }
        },
        lambda config: {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16,
        },
    ),
    "qwen3": Case("qwen3", "qwen3", {"head_dim": 32}),
    "qwen3moe": Case(
        "qwen3moe",
        "qwen3_moe",
        {"head_dim": 32, "norm_topk_prob": True, **EXPERTS},
        lambda config: {"expert_feed_forward_length": config.moe_intermediate_size},
    ),
    "qwen2moe": Case(
        "qwen2moe",
        "qwen2_moe",
        {"shared_expert_intermediate_size": 48, **EXPERTS},
        lambda config: {
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
        },
    ),
    "gemma": Case("gemma", "gemma", {"head_dim": 32}, norms_plus_one=True),
    "gemma2": Case(
        "gemma2",
        "gemma2",
        {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32},
        _gemma_2,
        norms_plus_one=True,
    ),
    "gemma3": Case(
        "gemma3",
        "gemma3_text",
        {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32, "num_hidden_layers": 7},
        norms_plus_one=True,
    ),
    "phi2": Case("phi2", "phi", {"partial_rotary_factor": 0.5}, _rotated),
    "phi3": Case("phi3", "phi3", {"sliding_window": 8}, _rotated),
    "phi3, long": Case(
        "phi3",
        "phi3",
        {
            "original_max_position_embeddings": 32,
            "sliding_window": 4096,
            "rope_parameters": LONGROPE | {"long_factor": [1.0, 2, 4, 8, 10, 12, 14, 16]},
        },
        _phi_3_long,
        extra=phi_3_factors,
    ),
    "granite": Case("granite", "granite", {"head_dim": 16, **GRANITE}, _granite, permuted=True),
    "granitemoe": Case(
        "granitemoe", "granitemoe", {"head_dim": 16, "num_local_experts": 4, **GRANITE}, _granite, permuted=True
    ),
    "granitemoe, shared": Case(
        "granitemoe",
        "granitemoeshared",
        {"head_dim": 16, "num_local_experts": 4, "shared_intermediate_size": 48, **GRANITE},
        lambda config: {"expert_shared_feed_forward_length": 48, **_granite(config)},
        permuted=True,
    ),
    "gpt-oss": Case(
        "gpt-oss",
        "gpt_oss",
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "rope_parameters": YARN,
        },
        lambda config: {
            "expert_feed_forward_length": config.intermediate_size,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16,
        },
    ),
    "command-r": Case("command-r", "cohere", {"logit_scale": 0.25}, lambda config: {"logit_scale": config.logit_scale}),
    "cohere2": Case(
        "cohere2",
        "cohere2",
        {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 4},
        lambda config: {"logit_scale": config.logit_scale},
    ),
    "starcoder2": Case("starcoder2", "starcoder2", {"use_bias": True, "sliding_window": None}),
    "olmo2": Case("olmo2", "olmo2", {}),
    "olmo3": Case("olmo2", "olmo3", {"sliding_window": 8, "num_hidden_layers": 4}, _pattern),
    "olmoe": Case("olmoe", "olmoe", {**EXPERTS, "intermediate_size": 32}),
    "exaone4": Case("exaone4", "exaone4", {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 5}, _pattern),
    "exaone4, no window": Case(
        "exaone4", "exaone4", {"head_dim": 16, "sliding_window": None, "layer_types": ["full_attention"] * 2}
    ),
    "ministral3": Case(
        "mistral3",
        "ministral3",
        {
            "head_dim": 16,
            "rope_parameters": {
                **{"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0},
                **{"original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.1},
            },
        },
        lambda config: {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.yarn_log_multiplier": 1.0,
            "attention.temperature_scale": 0.1,
        },
        permuted=True,
    ),
    "smollm3": Case("smollm3", "smollm3", {"head_dim": 16, "num_hidden_layers": 4}, permuted=True),
    "glm4": Case("glm4", "glm4", {"head_dim": 16, "attention_bias": True}, _rotated),
    "nemotron": Case("nemotron", "nemotron", {"head_dim": 16}, _rotated, norms_plus_one=True),
    "stablelm": Case(
        "stablelm",
        "stablelm",
        {"partial_rotary_factor": 0.25, "use_qkv_bias": True, "num_attention_heads": 2},
        _rotated,
    ),
    "stablelm, parallel": Case(
        "stablelm", "stablelm", {"partial_rotary_factor": 0.5, "use_parallel_residual": True}, _rotated
    ),
    "arcee": Case("arcee", "arcee", {"head_dim": 16}, permuted=True),
    "ernie4_5": Case("ernie4_5", "ernie4_5", {"head_dim": 16}),
    "qwen2vl": Case("qwen2vl", "qwen2", {}, lambda config: {"rope.dimension_sections": [2, 3, 3, 0]}),
    "qwen3vl": Case("qwen3vl", "qwen3", {"head_dim": 32}, lambda config: {"n_deepstack_layers": 3}),
    "qwen3vlmoe": Case(
        "qwen3vlmoe",
        "qwen3_moe",
        {"head_dim": 32, "norm_topk_prob": True, **EXPERTS},
        lambda config: {"expert_feed_forward_length": config.moe_intermediate_size},
    ),
    "seed_oss": Case("seed_oss", "seed_oss", {"head_dim": 32, "attention_bias": True}),
}
