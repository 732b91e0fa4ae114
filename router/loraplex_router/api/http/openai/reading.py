"""Reads what completions and chat completions share: the model's name, sampling, stopping."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from loraplex_router.api.http.model_names import read_model_name
from loraplex_router.api.http.openai.formats import read_format
from loraplex_router.api.http.openai.other_fields import NAMED, check_unsupported
from loraplex_router.api.http.openai.schema import ChatCompletionRequest, GenerationRequest
from loraplex_router.api.http.unknown_fields import unknown_fields
from loraplex_router.vocabulary.references import AdapterReference
from loraplex_router.vocabulary.sampling import RANGES, Sampling
from loraplex_router.vocabulary.violations import Violations, naming

LEAST_TOP_P = 1e-6  # OpenAI's 0 means only the likeliest token


def read_model(body: GenerationRequest, base: Sequence[str]) -> AdapterReference | None:
    """The adapter that the model's name refers to, with its source from LoRAX's fields; None is the base."""
    return _read_name(body.model, body, base) or _read_name(body.lora_path, body, base)


def named_by(body: GenerationRequest, base: Sequence[str]) -> AbstractContextManager[None]:
    """A context whose errors about the adapter name the field that has it."""
    by_path = body.lora_path and read_model_name(body.model, base) is None
    return naming("lora_path") if by_path else nullcontext()


def read_adapters(body: GenerationRequest, base: Sequence[str]) -> tuple[AdapterReference | None, ...]:
    """Those that are to answer in place of the model."""
    return tuple(_read_name(name, body, base) for name in body.adapters or ())


def _read_name(name: str, body: GenerationRequest, base: Sequence[str]) -> AdapterReference | None:
    named = read_model_name(name, base)
    return named and AdapterReference(named.id, body.adapter_source or "", token=body.api_token or "")


def read_most(given: int | None) -> int | None:
    """Treats llama.cpp's max_tokens of -1 as absent."""
    return None if given == -1 else given


def read_options(body: GenerationRequest, defaults: Sampling) -> dict[str, Any]:
    """The shared arguments of the router's Request, with the model's own defaults. Raises InvalidRequestError for
    unsupported ones."""
    found = Violations()
    others = body.model_extra or {}
    check_unsupported(others, found, chat=isinstance(body, ChatCompletionRequest))
    found.check(body.n != 0, "n", "must be at least 1")
    both = body.prompt_logprobs is not None and bool(body.stream)
    found.check(not both, "prompt_logprobs", "cannot be used with stream")
    found.raise_any()
    return {
        "sampling": _read_sampling(body, defaults),
        "open_parameters": RANGES.keys() - body.given.keys(),
        "stop": (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        "include_stop": bool(body.include_stop_str_in_output),
        "stop_token_ids": tuple(body.stop_token_ids or ()),
        "ignore_eos": bool(body.ignore_eos or body.ignore_eos_token),
        "show_special_tokens": body.skip_special_tokens is False,
        "truncate": body.truncate_prompt_tokens,
        "background": body.service_tier == "flex",
        "cache_salt": body.cache_salt or "",
        "min_new_tokens": body.min_tokens or 0,
        "allowed_token_ids": None if body.allowed_token_ids is None else tuple(body.allowed_token_ids),
        "bad_words": tuple(body.bad_words or ()),
        "grammar": read_format(body),
        "warnings": unknown_fields(body, harmless=NAMED),
    }


def _read_sampling(body: GenerationRequest, defaults: Sampling) -> Sampling:
    sampling = {"temperature": 1.0, **defaults.given, **body.given}
    for name in ("top_k", "top_n_sigma"):
        if sampling.get(name, 1) <= 0:
            del sampling[name]
    if body.top_p == 0:
        sampling["top_p"] = LEAST_TOP_P
    if body.seed is not None:
        sampling["seed"] = body.seed % 2**64
    return Sampling(**sampling)
