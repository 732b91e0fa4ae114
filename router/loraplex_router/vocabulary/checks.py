"""Checks of a request by itself, subject by subject."""

import re
from collections.abc import Collection
from math import isfinite

from loraplex_protos.adapter_names import is_id, why_not
from loraplex_protos.errors import quote
from loraplex_router.vocabulary.references import AdapterReference, MergedReference
from loraplex_router.vocabulary.request import AS_MANY_AS_FIT, EmbedRequest, Prompt, Request
from loraplex_router.vocabulary.violations import Violations

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
MAX_N = 64
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKENS = 64
MAX_BAD_WORDS = 1024
MAX_TOP_LOGPROBS = 32
MAX_INPUTS = 1024
MAX_SALT_LENGTH = 512
MAX_SESSION_LENGTH = 512
MAX_REFERENCE_LENGTH = 512
MAX_MERGED = 16
MAX_ADAPTERS = 16
MAX_VOCABULARY = 2**31
MERGE_STRATEGIES = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
MAJORITY_SIGN_METHODS = ("total", "frequency")


def check_request(request: Request, vocab_size: int, sources: Collection[str]) -> None:
    """Raises InvalidRequestError naming every invalid field. The prompt's length is not known yet: see `room_for`. Nor
    is the vocabulary of an adapter: see `check_vocabulary`. `sources` are the names of the adapter sources."""
    found = Violations()
    found.check(
        not request.request_id or REQUEST_ID.fullmatch(request.request_id) is not None,
        "request_id",
        "use at most 128 characters of A-Z a-z 0-9 . _ : -",
    )
    salted = len(request.cache_salt) <= MAX_SALT_LENGTH
    found.check(salted, "cache_salt", f"at most {MAX_SALT_LENGTH} characters")
    check_session(request.session, found)
    found.check(1 <= request.n <= MAX_N, "n", f"must be from 1 to {MAX_N}")
    _check_adapters(request, sources, found)
    kept = request.truncate in (None, AS_MANY_AS_FIT) or request.truncate >= 1
    found.check(kept, "truncate", "must be at least 1, or absent")
    most = vocab_size if request.adapter is None and not request.adapters else MAX_VOCABULARY
    _check_prompt(request.prompt, most, _token_field(request), found)
    found.add(request.sampling.check(most))
    _check_stopping(request, most, found)
    _check_allowed(request, most, found)
    found.check(len(request.bad_words) <= MAX_BAD_WORDS, "bad_words", f"at most {MAX_BAD_WORDS} texts")
    lengths = all(1 <= len(word) <= MAX_STOP_LENGTH for word in request.bad_words[:MAX_BAD_WORDS])
    found.check(lengths, "bad_words", f"each text must have 1 to {MAX_STOP_LENGTH} characters")
    if request.grammar is not None:
        found.add(request.grammar.check())
    for name in ("top_logprobs", "prompt_top_logprobs"):
        right = getattr(request.detail, name) <= MAX_TOP_LOGPROBS
        found.check(right, f"detail.{name}", f"must be at most {MAX_TOP_LOGPROBS}")
    check_adapter(request.adapter, sources, found)
    found.raise_any()


def check_vocabulary(request: Request, vocab_size: int) -> None:
    """Raises InvalidRequestError for ids of tokens that the adapter, which has this many, does not have."""
    found = Violations()
    if isinstance(request.prompt, tuple):
        known = max(request.prompt, default=0) < vocab_size
        found.check(known, _token_field(request), f"every id must be below {vocab_size}")
    found.add(request.sampling.check(vocab_size))
    known = all(token < vocab_size for token in request.stop_token_ids)
    found.check(known, "stopping.stop_token_ids", f"every id must be below {vocab_size}")
    _check_allowed(request, vocab_size, found)
    found.raise_any()


def _check_allowed(request: Request, vocab_size: int, found: Violations) -> None:
    allowed = request.allowed_token_ids
    found.check(allowed is None or len(allowed) > 0, "allowed_token_ids", "must have one id at least, or be absent")
    found.check(max(allowed or (), default=0) < vocab_size, "allowed_token_ids", f"every id must be below {vocab_size}")


def _token_field(request: Request) -> str:
    return "inputs" if request.detail.pool else "token_ids"


def check_embed_request(request: EmbedRequest, vocab_size: int, sources: Collection[str]) -> None:
    """Raises InvalidRequestError, as check_request does."""
    found = Violations()
    check_session(request.session, found)
    found.check(1 <= len(request.inputs) <= MAX_INPUTS, "inputs", f"send 1 to {MAX_INPUTS} inputs")
    found.raise_any()
    last = request.part(len(request.inputs) - 1)  # all are alike but for their prompts, and none has a longer id
    check_request(last, vocab_size, sources)
    most = vocab_size if request.adapter is None else MAX_VOCABULARY
    for prompt in request.inputs:
        _check_prompt(prompt, most, "inputs", found)
    found.raise_any()


def _check_prompt(prompt: Prompt, vocab_size: int, field: str, found: Violations) -> None:
    if isinstance(prompt, tuple):
        known = min(prompt, default=0) >= 0 and max(prompt, default=0) < vocab_size
        found.check(known, field, f"every id must be below {vocab_size}")


def check_session(session: str, found: Violations) -> None:
    found.check(len(session) <= MAX_SESSION_LENGTH, "session", f"at most {MAX_SESSION_LENGTH} characters")


def check_adapter(
    adapter: AdapterReference | MergedReference | None, sources: Collection[str], found: Violations
) -> None:
    if isinstance(adapter, MergedReference):
        _check_merged(adapter, sources, found)
    elif adapter is not None:
        check_reference(adapter, sources, found)


def check_reference(
    reference: AdapterReference, sources: Collection[str], found: Violations, name: str = "adapter"
) -> None:
    found.check(bool(reference.id), f"{name}.id", "name an adapter, or omit `adapter` for the base model")
    right = not reference.id or is_id(reference.id)
    found.check(right, f"{name}.id", f"{quote(reference.id)} is not a valid adapter name: {why_not(reference.id)}")
    for field_name in ("revision", "token"):
        short = len(getattr(reference, field_name)) <= MAX_REFERENCE_LENGTH
        found.check(short, f"{name}.{field_name}", f"at most {MAX_REFERENCE_LENGTH} characters")
    known = reference.source in ("", *sources)
    found.check(known, f"{name}.source", f"must be one of this server's ({', '.join(sources)}), or empty")


def _check_adapters(request: Request, sources: Collection[str], found: Violations) -> None:
    """Those that all answer."""
    count = len(request.adapters)
    if not count:
        return
    found.check(request.adapter is None, "adapters", "cannot be combined with another adapter: name it here, too")
    fits = count <= MAX_ADAPTERS and count * request.n <= MAX_N
    found.check(fits, "adapters", f"at most {MAX_ADAPTERS}, and {MAX_N} answers of all of them together")
    detail = request.detail.prompt_logprobs
    found.check(not detail, "detail.prompt_logprobs", "cannot be combined with adapters: ask them one by one")
    for place, reference in enumerate(request.adapters[:MAX_ADAPTERS]):
        if reference is not None:
            check_reference(reference, sources, found, f"adapters[{place}]")


def _check_merged(merged: MergedReference, sources: Collection[str], found: Violations) -> None:
    count, weights = len(merged.adapters), merged.weights
    found.check(1 <= count <= MAX_MERGED, "merged_adapters.adapters", f"name 1 to {MAX_MERGED} adapters")
    for place, reference in enumerate(merged.adapters[:MAX_MERGED]):
        check_reference(reference, sources, found, f"merged_adapters.adapters[{place}]")
    found.check(len(weights) in (0, count), "merged_adapters.weights", f"{len(weights)} weights for {count} adapters")
    found.check(all(map(isfinite, weights)), "merged_adapters.weights", "must be finite")
    known = merged.strategy in MERGE_STRATEGIES
    found.check(known, "merged_adapters.strategy", f"must be one of {', '.join(MERGE_STRATEGIES)}")
    pruned = merged.strategy == "linear" or 0 < merged.density <= 1
    found.check(pruned, "merged_adapters.density", "must be above 0 and at most 1")
    elected = merged.majority_sign_method in MAJORITY_SIGN_METHODS
    found.check(elected, "merged_adapters.majority_sign_method", 'must be "total" or "frequency"')


def _check_stopping(request: Request, vocab_size: int, found: Violations) -> None:
    wanted = request.max_new_tokens
    found.check(wanted is None or wanted >= 1, "stopping.max_new_tokens", "must be at least 1, or absent")
    least = request.min_new_tokens
    found.check(least >= 0, "stopping.min_new_tokens", "must be at least 0")
    found.check(
        wanted is None or least <= wanted,
        "stopping.min_new_tokens",
        "must not exceed max_new_tokens",
    )
    found.check(len(request.stop) <= MAX_STOPS, "stopping.stop", f"at most {MAX_STOPS} texts")
    lengths = all(1 <= len(stop) <= MAX_STOP_LENGTH for stop in request.stop[:MAX_STOPS])
    found.check(lengths, "stopping.stop", f"each text must have 1 to {MAX_STOP_LENGTH} characters")
    tokens = request.stop_token_ids
    found.check(len(tokens) <= MAX_STOP_TOKENS, "stopping.stop_token_ids", f"at most {MAX_STOP_TOKENS} ids")
    known = all(0 <= token < vocab_size for token in tokens[:MAX_STOP_TOKENS])
    found.check(known, "stopping.stop_token_ids", f"every id must be below {vocab_size}")
