"""Fields that clients can make long. Validation stops at the first error in one of them."""

from typing import Annotated, Any, TypeAlias, TypeVar, cast

from pydantic import AliasChoices, BeforeValidator, Discriminator, Field, Tag

from loraplex_router.vocabulary.chat import RenderedChat
from loraplex_router.vocabulary.request import Prompt
from loraplex_router.vocabulary.sampling import MAX_BIASED

MAX_MESSAGES = 4096  # in a conversation; OpenAI accepts 2048

T = TypeVar("T")

TokenId = Annotated[int, Field(ge=0, lt=2**32)]
CountOrAll = Annotated[int, Field(ge=-1, lt=2**32)]
Name = Annotated[str, BeforeValidator(lambda given: "" if given is None else given)]
UseActivation = Annotated[  # vLLM's older names for it are sent as well
    bool | None, Field(validation_alias=AliasChoices("use_activation", "activation", "softmax"))
]
Items: TypeAlias = Annotated[list[T], Field(fail_fast=True)]


def _kind(given: Any) -> str | None:
    """The first element determines the kind of the whole list. Trying each kind would take several times as long, and
    report every element."""
    if isinstance(given, str):
        return "str"
    if not isinstance(given, list):
        return None
    first = given[0] if given else ""
    if isinstance(first, list):
        return "list[list[int]]"
    return "list[str]" if isinstance(first, str) else "list[int]"


Prompts = Annotated[
    Annotated[str, Tag("str")]
    | Annotated[Items[str], Tag("list[str]")]
    | Annotated[Items[TokenId], Tag("list[int]")]
    | Annotated[Items[Items[TokenId]], Tag("list[list[int]]")],
    Discriminator(
        _kind,
        custom_error_type="prompts",
        custom_error_message="must be a text, a list of texts, a list of token ids, or a list of such lists",
    ),
]


def read_prompts(given: str | list[str] | list[int] | list[list[int]], add_special_tokens: bool = True) -> list[Prompt]:
    """One text, several, the token ids of one, or those of several."""
    if isinstance(given, str):
        given = [given]
    if given and isinstance(given[0], int):
        return [tuple(given)]
    parts = cast(list[Any], given)
    if not parts or isinstance(parts[0], str):
        return parts[:] if add_special_tokens else [RenderedChat(text) for text in parts]
    return [tuple(part) for part in parts]


def _few(given: Any) -> Any:
    if isinstance(given, dict) and len(given) > MAX_BIASED:
        raise ValueError(f"at most {MAX_BIASED} tokens")
    return given


STRICT = "true: refused if a keyword of the schema cannot be enforced. Otherwise, a warning names the keyword."
BIAS = "By token id, from -100 to 100."
Bias = Annotated[dict[TokenId, float], BeforeValidator(_few)]
