"""The architectures that our own decoder computes. For each of them, a function turns transformers' configuration into
a DecoderSpec.

A new architecture is one more function in `families`, and a field in DecoderSpec for what is new about it.
"""

from collections.abc import Callable
from dataclasses import replace

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.models.families import dense, gpt, mixtures
from loraplex_shard.models.spec import DecoderSpec


def is_known(architecture: str) -> bool:
    """Whether our own decoder computes this architecture."""
    return architecture in _ARCHITECTURES or architecture in _TEXT_PARTS


def is_text_served_alone(architecture: str) -> bool:
    """Whether this architecture also reads pictures or sound, so that only its text model is served."""
    return architecture in _TEXT_PARTS or architecture in _TEXT_PARTS_ELSEWHERE


def read_spec(architecture: str, config: PreTrainedConfig) -> DecoderSpec:
    """Raises CheckpointError for an unknown architecture, and for a variant that is not served."""
    if architecture in _TEXT_PARTS:
        return _text_part(architecture, config)
    return _read(_ARCHITECTURES.get(architecture), architecture, config)


def _text_part(architecture: str, config: PreTrainedConfig) -> DecoderSpec:
    """The spec of the text model in a model that also reads pictures: that of the text model by itself, with other
    names.
    """
    text = config.get_text_config(decoder=True)
    alone = str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text.model_type, text.model_type))
    spec = _read(_TEXT_TYPES.get(text.model_type) or _ARCHITECTURES.get(alone), alone, text)
    names = replace(spec.names, backbone=_TEXT_PARTS[architecture])
    return replace(spec, tied=getattr(config, "tie_word_embeddings", spec.tied), names=names)


def _read(
    reader: Callable[[PreTrainedConfig], DecoderSpec] | None, architecture: str, config: PreTrainedConfig
) -> DecoderSpec:
    if reader is None:
        raise CheckpointError(f"architecture {architecture!r} is not served")
    try:
        spec = reader(config)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: {type(error).__name__}: {error}") from error
    if spec.experts is not None and spec.experts.chosen > spec.experts.count:
        raise CheckpointError(
            f"config.json: num_experts_per_tok {spec.experts.chosen} is more than the {spec.experts.count} experts"
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise CheckpointError("config.json: use_bidirectional_attention is not served")
    if spec.heads % spec.kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads {spec.heads} is not a multiple of num_key_value_heads {spec.kv_heads}"
        )
    return spec


_ARCHITECTURES: dict[str, Callable[[PreTrainedConfig], DecoderSpec]] = {
    "ArceeForCausalLM": dense.arcee,
    "Cohere2ForCausalLM": dense.cohere2,
    "CohereForCausalLM": dense.cohere,
    "Ernie4_5ForCausalLM": dense.ernie,
    "Exaone4ForCausalLM": dense.exaone4,
    "FalconForCausalLM": gpt.falcon,
    "GPTJForCausalLM": gpt.gptj,
    "Gemma2ForCausalLM": dense.gemma2,
    "Gemma3ForCausalLM": dense.gemma3,
    "GemmaForCausalLM": dense.gemma,
    "Glm4ForCausalLM": dense.glm4,
    "GlmForCausalLM": dense.glm,
    "GptOssForCausalLM": mixtures.gpt_oss,
    "GraniteForCausalLM": dense.granite_dense,
    "GraniteMoeForCausalLM": mixtures.granite_moe,
    "GraniteMoeHybridForCausalLM": mixtures.granite_hybrid,
    "GraniteMoeSharedForCausalLM": mixtures.granite_moe_shared,
    "HeliumForCausalLM": dense.helium,
    "HyperCLOVAXForCausalLM": dense.hyperclovax,
    "LlamaForCausalLM": dense.llama,
    "Ministral3ForCausalLM": dense.ministral3,
    "MinistralForCausalLM": dense.mistral,
    "MistralForCausalLM": dense.mistral,
    "MixtralForCausalLM": mixtures.mixtral,
    "NemotronForCausalLM": dense.nemotron,
    "Olmo2ForCausalLM": dense.olmo2,
    "Olmo3ForCausalLM": dense.olmo2,
    "OlmoeForCausalLM": mixtures.olmoe,
    "Phi3ForCausalLM": dense.phi3,
    "PhiForCausalLM": gpt.phi,
    "Qwen2ForCausalLM": dense.qwen2,
    "Qwen2MoeForCausalLM": mixtures.qwen2_moe,
    "Qwen3ForCausalLM": dense.qwen3,
    "Qwen3MoeForCausalLM": mixtures.qwen3_moe,
    "SeedOssForCausalLM": dense.seed_oss,
    "SmolLM3ForCausalLM": dense.smollm3,
    "StableLmForCausalLM": gpt.stablelm,
    "Starcoder2ForCausalLM": dense.starcoder2,
}

# The name of the text model in models that also read pictures, or sound.
_TEXT_PARTS = dict.fromkeys(
    (
        "AyaVisionForConditionalGeneration",
        "Cohere2VisionForConditionalGeneration",
        "Gemma3ForConditionalGeneration",
        "Glm4vForConditionalGeneration",
        "GotOcr2ForConditionalGeneration",
        "InternVLForConditionalGeneration",
        "LlavaForConditionalGeneration",
        "LightOnOcrForConditionalGeneration",
        "LlavaNextForConditionalGeneration",
        "LlavaNextVideoForConditionalGeneration",
        "LlavaOnevisionForConditionalGeneration",
        "Mistral3ForConditionalGeneration",
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
        "VipLlavaForConditionalGeneration",
        "VoxtralForConditionalGeneration",
    ),
    "model.language_model",
) | dict.fromkeys(("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"), "model.text_model")

# Models whose text model is computed by transformers' code. It is built by itself.
_TEXT_PARTS_ELSEWHERE = frozenset(
    {
        "Gemma3nForConditionalGeneration",
        "Lfm2VlForConditionalGeneration",
        "Llama4ForConditionalGeneration",
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5MoeForConditionalGeneration",
    }
)

# Text models for which transformers has no class of their own, by model_type. For text alone, their positions are
# ordinary ones.
_TEXT_TYPES = {
    "glm4v_text": dense.glm4v,
    "qwen2_5_vl_text": dense.qwen2,
    "qwen2_vl_text": dense.qwen2,
    "qwen3_vl_moe_text": mixtures.qwen3_vl_moe,
    "qwen3_vl_text": dense.qwen3,
}
