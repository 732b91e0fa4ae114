"""The one internal request, whichever face it came through, and what can be wrong with it."""

import re
import secrets
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from math import isfinite
from typing import TypeAlias

from loraplex_protos.adapter_names import RULE, is_id
from loraplex_protos.errors import FieldViolation, InvalidRequestError, quote
from loraplex_router.vocabulary.chat import FIELD, Chat, RenderedChat
from loraplex_router.vocabulary.grammar import Grammar
from loraplex_router.vocabulary.references import AdapterReference, MergedReference
from loraplex_router.vocabulary.sequence import Detail, Sampling

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
MAX_VIOLATIONS = 16  # told of one request
MAX_N = 64
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKENS = 64
MAX_TOP_LOGPROBS = 32
MAX_INPUTS = 1024
MAX_BIASED = 1024
MAX_REFERENCE_LENGTH = 512
AS_MANY_AS_FIT = -1  # tokens of a prompt, into the context with the answer
MAX_MERGED = 16
MERGE_STRATEGIES = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
MAJORITY_SIGN_METHODS = ("total", "frequency")


# Text, text that gets no special tokens, a conversation, or token ids.
Prompt: TypeAlias = str | RenderedChat | Chat | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """What the caller set; None where it left the choice to the server."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] | None = None

    def resolve(self, index: int = 0) -> Sampling:
        """With the defaults applied, for sequence `index` of the request: see Sampling in generation.proto."""
        narrowed = any(value is not None for value in (self.top_k, self.top_p, self.typical_p, self.min_p))
        temperature = self.temperature if self.temperature is not None else float(narrowed)
        seed = self.seed if self.seed is not None else secrets.randbits(64)
        given = {name: getattr(self, name) for name in self.__slots__ if getattr(self, name) is not None}
        return Sampling(**{**given, "temperature": temperature, "seed": (seed + index) % 2**64})


@dataclass(frozen=True, slots=True)
class Request:
    """A generation as a client asked for it."""

    prompt: Prompt
    request_id: str = ""
    adapter: AdapterReference | MergedReference | None = None
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False  # the answer ends with the stop text or token, not before it
    ignore_eos: bool = False  # with a grammar: go on as long as that allows it
    show_special_tokens: bool = False  # in the text
    truncate: int | None = None  # how many tokens of the prompt to keep, from its end, or AS_MANY_AS_FIT
    n: int = 1
    detail: Detail = field(default_factory=Detail)
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """Texts whose embeddings a client asked for."""

    inputs: tuple[Prompt, ...]
    adapter: AdapterReference | MergedReference | None = None
    truncate: int | None = None  # as in a Request

    def parts(self) -> list[Request]:
        """One request for each input."""
        pooled = Request("", adapter=self.adapter, truncate=self.truncate, detail=Detail(pool=True))
        return [replace(pooled, prompt=prompt) for prompt in self.inputs]


class ContextLengthError(InvalidRequestError):
    """The prompt, or the prompt and the answer, do not fit into the context. Clients see an InvalidRequestError."""


class Violations:
    """Collects what is wrong, so that a caller sees all of it at once, or the first of very much."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []

    def check(self, right: bool, name: str, description: str) -> None:
        if not right and len(self._found) < MAX_VIOLATIONS:
            self._found.append(FieldViolation(name, description))

    def add(self, violations: Iterable[FieldViolation]) -> None:
        self._found += islice(violations, MAX_VIOLATIONS - len(self._found))

    def raise_any(self, kind: type[InvalidRequestError] = InvalidRequestError) -> None:
        """Raises InvalidRequestError, or this kind of it, if anything was wrong."""
        if self._found:
            raise kind(*self._found)


def check_request(request: Request, vocab_size: int, sources: Collection[str]) -> None:
    """Raises InvalidRequestError naming every wrong field. The prompt's length is not known yet: see `room_for`.
    `sources` are the names of those that adapters come from."""
    found = Violations()
    found.check(
        not request.request_id or REQUEST_ID.fullmatch(request.request_id) is not None,
        "request_id",
        "use at most 128 characters of A-Z a-z 0-9 . _ : -",
    )
    found.check(1 <= request.n <= MAX_N, "n", f"must be from 1 to {MAX_N}")
    kept = request.truncate in (None, AS_MANY_AS_FIT) or request.truncate >= 1
    found.check(kept, "truncate", "must be at least 1, or absent")
    if isinstance(request.prompt, tuple):
        known = min(request.prompt, default=0) >= 0 and max(request.prompt, default=0) < vocab_size
        found.check(known, "token_ids", f"every id must be below {vocab_size}")
    _check_sampling(request.sampling, found)
    _check_bias(request.sampling.logit_bias or (), vocab_size, found)
    _check_stopping(request, vocab_size, found)
    if request.grammar is not None:
        found.add(request.grammar.check())
    for name in ("top_logprobs", "prompt_top_logprobs"):
        right = getattr(request.detail, name) <= MAX_TOP_LOGPROBS
        found.check(right, f"detail.{name}", f"must be at most {MAX_TOP_LOGPROBS}")
    check_adapter(request.adapter, sources, found)
    found.raise_any()


def check_embed_request(request: EmbedRequest, vocab_size: int, sources: Collection[str]) -> None:
    """Raises InvalidRequestError, as check_request does."""
    found = Violations()
    found.check(1 <= len(request.inputs) <= MAX_INPUTS, "inputs", f"send 1 to {MAX_INPUTS} inputs")
    found.raise_any()
    for part in request.parts():
        check_request(part, vocab_size, sources)


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
    found.check(bool(reference.id), f"{name}.id", "name an adapter, or leave `adapter` out for the base model")
    right = not reference.id or is_id(reference.id)
    found.check(right, f"{name}.id", f"{quote(reference.id)} cannot be an adapter's name: {RULE}")
    for field_name in ("revision", "token"):
        short = len(getattr(reference, field_name)) <= MAX_REFERENCE_LENGTH
        found.check(short, f"{name}.{field_name}", f"at most {MAX_REFERENCE_LENGTH} characters")
    known = reference.source in ("", *sources)
    found.check(known, f"{name}.source", f"must be one of this server's ({', '.join(sources)}), or empty")


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


def most_counted(max_model_len: int) -> int:
    """How many tokens of a prompt are worth counting: so many more than fit need no number."""
    return 2 * max_model_len


def count_kept(request: Request, max_model_len: int) -> int | None:
    """How many of the prompt's last tokens are kept; None: all."""
    if request.truncate != AS_MANY_AS_FIT:
        return request.truncate
    answer = 0 if request.detail.pool else request.max_new_tokens or 1
    return max(1, max_model_len - answer)


def room_for(request: Request, prompt_length: int, max_model_len: int) -> int:
    """How many tokens each sequence may generate.

    Raises InvalidRequestError if the prompt is empty, ContextLengthError if the two do not fit into the context.
    """
    found = Violations()
    name = _prompt_field(request)
    found.check(prompt_length > 0, name, "is empty: send text, chat messages or token ids")
    found.raise_any()
    most = most_counted(max_model_len)
    counted = f"has {prompt_length}" if prompt_length <= most else f"has more than {most}"
    room = max_model_len - prompt_length
    limit = f"this model's maximum context length is {max_model_len} tokens"  # clients look for these words
    if request.detail.pool:
        found.check(room >= 0, name, f"{counted} tokens; the context has room for {max_model_len}")
        found.raise_any(ContextLengthError)
        return 0
    found.check(room >= 1, name, f"{counted} tokens: {limit}, answer included")
    wanted = request.max_new_tokens
    if wanted is not None and room >= 1:
        fits = f"{prompt_length} prompt tokens leave room for {room}"
        found.check(wanted <= room, "stopping.max_new_tokens", f"{wanted} is too many: {limit}, {fits}")
    least = request.min_new_tokens
    found.check(least <= max(room, 1), "stopping.min_new_tokens", f"{least} is too many: there is room for {room}")
    found.raise_any(ContextLengthError)
    return wanted if wanted is not None else room


def check_tokens(request: Request, prompt: Sequence[int], vocab_size: int, text_of: Callable[[int], str]) -> None:
    """Raises InvalidRequestError if the tokenizer made a token of the prompt that the model has no embedding for, as it
    does where somebody added tokens to it alone. text_of says what a token stands for."""
    largest = max(prompt, default=0)
    if largest >= vocab_size:
        name = FIELD if isinstance(request.prompt, Chat) else _prompt_field(request)
        lacking = f"the model has embeddings for tokens below {vocab_size} only"
        text = quote(text_of(largest))
        raise InvalidRequestError(FieldViolation(name, f"contains {text}, which is token {largest}: {lacking}"))


def _prompt_field(request: Request) -> str:
    return "inputs" if request.detail.pool else "prompt"


def _check_sampling(options: SamplingOptions, found: Violations) -> None:
    def within(name: str, low: float, high: float, low_allowed: bool, text: str) -> None:
        value = getattr(options, name)
        right = value is None or (low <= value <= high and (low_allowed or value > low))  # NaN is not
        found.check(right, f"sampling.{name}", f"must be {text}")

    largest = 3.4e38  # a finite float
    within("temperature", 0, largest, True, "at least 0")
    within("top_k", 1, 2**32 - 1, True, "at least 1, or absent to keep all tokens")
    within("top_p", 0, 1, False, "above 0 and at most 1")
    within("typical_p", 0, 1, False, "above 0 and at most 1")
    within("min_p", 0, 1, True, "from 0 to 1")
    within("repetition_penalty", 0, largest, False, "above 0")
    within("frequency_penalty", -2, 2, True, "from -2 to 2")
    within("presence_penalty", -2, 2, True, "from -2 to 2")


def _check_bias(bias: Sequence[tuple[int, float]], vocab_size: int, found: Violations) -> None:
    name = "sampling.logit_bias"
    found.check(len(bias) <= MAX_BIASED, name, f"at most {MAX_BIASED} tokens")
    found.check(all(0 <= token < vocab_size for token, _ in bias), name, f"every id must be below {vocab_size}")
    found.check(all(-100 <= value <= 100 for _, value in bias), name, "every value must be from -100 to 100")


def _check_stopping(request: Request, vocab_size: int, found: Violations) -> None:
    wanted = request.max_new_tokens
    found.check(wanted is None or wanted >= 1, "stopping.max_new_tokens", "must be at least 1, or absent")
    least = request.min_new_tokens
    found.check(least >= 0, "stopping.min_new_tokens", "must be at least 0")
    found.check(
        wanted is None or least <= wanted,
        "stopping.min_new_tokens",
        "must not be above the most tokens that are asked for",
    )
    found.check(len(request.stop) <= MAX_STOPS, "stopping.stop", f"at most {MAX_STOPS} texts")
    lengths = all(1 <= len(stop) <= MAX_STOP_LENGTH for stop in request.stop)
    found.check(lengths, "stopping.stop", f"each text must have 1 to {MAX_STOP_LENGTH} characters")
    tokens = request.stop_token_ids
    found.check(len(tokens) <= MAX_STOP_TOKENS, "stopping.stop_token_ids", f"at most {MAX_STOP_TOKENS} ids")
    known = all(0 <= token < vocab_size for token in tokens)
    found.check(known, "stopping.stop_token_ids", f"every id must be below {vocab_size}")
