"""Fields that clients of other servers send to OpenAI's routes. Each is honoured, refused by name, or ignored with a
warning; those that cannot change an answer are ignored without one."""

from collections.abc import Mapping
from typing import Any

from loraplex_router.vocabulary.violations import Violations

# llama.cpp's, SGLang's and Mistral's names for fields of ours.
RENAMED = {
    "repeat_penalty": "repetition_penalty",
    "typ_p": "typical_p",
    "n_predict": "max_tokens",
    "rid": "request_id",
    "no_stop_trim": "include_stop_str_in_output",
    "random_seed": "seed",
}

# What would change the answer, with the values that change nothing, besides null and what is empty.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # OpenAI's
    "audio": (),
    "modalities": (["text"],),
    "web_search_options": (),
    # vLLM's
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "priority": (0,),
    "prompt_embeds": (),
    "logits_processors": (),
    "truncation_side": ("left",),
    "thinking_token_budget": (-1,),
    "repetition_detection": (),
    "kv_transfer_params": (),
    "vllm_xargs": (),
    "structural_tag": (),
    "guided_json_object": (False,),
    "guided_structural_tag": (),
    # SGLang's
    "input_ids": (),
    "input_embeds": (),
    "stop_regex": (),
    "custom_logit_processor": (),
    "session_params": (),
    # llama.cpp's and text-generation-webui's; the other fields of the same samplers mean nothing without these
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "dynatemp_range": (0,),
    "adaptive_target": (-1,),
    "tfs_z": (1,),
    "tfs": (1,),
    "top_a": (0,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "smoothing_factor": (0,),
    "penalty_alpha": (0,),
    "no_repeat_ngram_size": (0,),
    "negative_prompt": (),
    "grammar_lazy": (False,),
    "thinking_budget_tokens": (-1,),
    "reasoning_budget_tokens": (-1,),
    # text-generation-inference's
    "watermark": (False,),
}
UNSUPPORTED_IN_CHATS: dict[str, tuple[Any, ...]] = {
    "echo": (False,),
    "add_special_tokens": (False,),
    "best_of": (1,),
}

WITHOUT_EFFECT = {
    *("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("prediction", "stream_interval", "session_id", "guided_decoding_backend", "spaces_between_special_tokens"),
    *("cache_prompt", "id_slot", "timings_per_token", "routed_dp_rank", "data_parallel_rank"),
    *("dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers", "xtc_threshold"),
    *("mirostat_tau", "mirostat_eta", "dynatemp_exponent", "adaptive_decay", "smoothing_curve"),
}
NAMED = UNSUPPORTED.keys() | UNSUPPORTED_IN_CHATS.keys() | WITHOUT_EFFECT


def rename(sent: Mapping[str, Any]) -> dict[str, Any]:
    """The body with our names for fields. A field that is there under both names is left for `unknown_fields`."""
    known = {other: ours for other, ours in RENAMED.items() if other in sent and sent.get(ours) is None}
    return {known.get(name, name): value for name, value in sent.items() if name not in known.values()}


def check_unsupported(sent: Mapping[str, Any], found: Violations, chat: bool) -> None:
    """Refuses what would change the answer. `sent`: the fields that are not ours."""
    for name, unused in (UNSUPPORTED | UNSUPPORTED_IN_CHATS if chat else UNSUPPORTED).items():
        value = sent.get(name)
        off = value is None or value in ([], {}, "") or value in unused
        found.check(off, name, "is not supported: leave it out")
