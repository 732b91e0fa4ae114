"""The one internal request, whichever face it came through. What can be wrong with it, checks.py and room.py say."""

from dataclasses import dataclass, field, replace
from typing import TypeAlias

from loraplex_router.vocabulary.chat import Chat, RenderedChat
from loraplex_router.vocabulary.grammar import Grammar
from loraplex_router.vocabulary.references import AdapterReference, MergedReference
from loraplex_router.vocabulary.sampling import Sampling
from loraplex_router.vocabulary.sequence import Detail

AS_MANY_AS_FIT = -1  # tokens of a prompt, into the context with the answer

# Text, text that gets no special tokens, a conversation, or token ids.
Prompt: TypeAlias = str | RenderedChat | Chat | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """A generation as a client asked for it."""

    prompt: Prompt
    request_id: str = ""
    adapter: AdapterReference | MergedReference | None = None
    sampling: Sampling = field(default_factory=Sampling)
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
    cache_salt: str = ""  # known prefixes are reused among requests with the same one


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
