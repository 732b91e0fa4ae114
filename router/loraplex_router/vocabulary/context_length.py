"""Checks that prompt and answer fit into the context, once the prompt's tokens are known."""

from collections.abc import Callable, Sequence

from loraplex_protos.errors import FieldViolation, InvalidRequestError, quote
from loraplex_router.vocabulary.chat import FIELD, Chat
from loraplex_router.vocabulary.request import AS_MANY_AS_FIT, Request
from loraplex_router.vocabulary.violations import Violations


class ContextLengthError(InvalidRequestError):
    """The prompt, or prompt and answer together, do not fit into the context. Clients see an InvalidRequestError."""


def max_counted(max_model_len: int) -> int:
    """Maximum number of prompt tokens to count: far beyond the limit, the exact number does not matter."""
    return 2 * max_model_len


def count_kept(request: Request, max_model_len: int) -> int | None:
    """Number of trailing prompt tokens to keep; None: all."""
    if request.truncate != AS_MANY_AS_FIT:
        return request.truncate
    answer = 0 if request.detail.pool else request.max_new_tokens or 1
    return max(1, max_model_len - answer)


def room_for(request: Request, prompt_length: int, max_model_len: int) -> int:
    """Maximum number of tokens that each sequence may generate.

    Raises InvalidRequestError if the prompt is empty, ContextLengthError if prompt and answer do not fit into the
    context.
    """
    found = Violations()
    name = _prompt_field(request)
    found.check(prompt_length > 0, name, "is empty: send text, chat messages or token ids")
    found.raise_any()
    most = max_counted(max_model_len)
    counted = f"has {prompt_length}" if prompt_length <= most else f"has more than {most}"
    room = max_model_len - prompt_length
    limit = f"this model's maximum context length is {max_model_len} tokens"  # clients match these words
    if request.detail.pool:
        found.check(room >= 0, name, f"{counted} tokens; the context has room for {max_model_len}")
        found.raise_any(ContextLengthError)
        return 0
    found.check(room >= 1, name, f"{counted} tokens: {limit}, answer included")
    wanted = request.max_new_tokens
    if wanted is not None and room >= 1:
        # vLLM's words: clients read them to ask again for less.
        asked = f"you requested {wanted} output tokens and your prompt contains {prompt_length} input tokens"
        said = f"{wanted} is too large: {limit}. However, {asked}, which leave room for {room}"
        found.check(wanted <= room or request.fewer_if_full, "stopping.max_new_tokens", said)
    least = request.min_new_tokens
    found.check(least <= max(room, 1), "stopping.min_new_tokens", f"{least} is too large: there is room for {room}")
    found.raise_any(ContextLengthError)
    return room if wanted is None else min(wanted, room)


def check_tokens(request: Request, prompt: Sequence[int], vocab_size: int, text_of: Callable[[int], str]) -> None:
    """Raises InvalidRequestError if the prompt has a token that the model has no embedding for, which happens if
    someone added tokens only to the tokenizer. `text_of` returns a token's text."""
    largest = max(prompt, default=0)
    if largest >= vocab_size:
        name = FIELD if isinstance(request.prompt, Chat) else _prompt_field(request)
        lacking = f"the model only has embeddings for tokens below {vocab_size}"
        text = quote(text_of(largest))
        raise InvalidRequestError(FieldViolation(name, f"contains {text}, which is token {largest}: {lacking}"))


def _prompt_field(request: Request) -> str:
    return "inputs" if request.detail.pool else "prompt"
