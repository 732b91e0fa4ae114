"""The internal request, common to all faces. checks.py and context_length.py check it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from loraplex_router.vocabulary.chat import Chat, RenderedChat, TextPair
from loraplex_router.vocabulary.grammar import Grammar
from loraplex_router.vocabulary.references import AdapterReference, MergedReference
from loraplex_router.vocabulary.sampling import Sampling
from loraplex_router.vocabulary.sequence import Detail
from loraplex_router.vocabulary.violations import naming

AS_MANY_AS_FIT = -1  # prompt tokens, next to the answer in the context

# Text, text without added special tokens, a pair of texts, a conversation, or token ids.
Prompt: TypeAlias = str | RenderedChat | TextPair | Chat | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """A generation as a client asked for it."""

    prompt: Prompt
    suffix: str = ""  # the answer belongs between the prompt and this text
    request_id: str = ""
    adapter: AdapterReference | MergedReference | None = None
    adapters: tuple[AdapterReference | None, ...] = ()  # in place of `adapter`: each answers; None is the base model
    sampling: Sampling = field(default_factory=Sampling)
    open_parameters: frozenset[str] = frozenset()  # those of sampling that an adapter's own defaults may set
    max_new_tokens: int | None = None
    fewer_if_full: bool = False  # where the context has less room than max_new_tokens, the answer ends when it is full
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False  # the answer includes the stop text or token
    ignore_eos: bool = False  # with a grammar: continue as long as it allows more
    show_special_tokens: bool = False  # in the text
    truncate: int | None = None  # number of prompt tokens to keep, from the end, or AS_MANY_AS_FIT
    n: int = 1
    detail: Detail = field(default_factory=Detail)
    grammar: Grammar | None = None
    allowed_token_ids: tuple[int, ...] | None = None  # the only ones that are sampled; None: all
    bad_words: tuple[str, ...] = ()  # the answer does not contain their tokens
    separates_thoughts: bool = False  # of an answer in a chat: a grammar begins after them
    background: bool = False  # computed while the replica has nothing else to compute
    cache_salt: str = ""  # cached prefixes are shared by requests with the same salt
    session: str = ""  # requests with the same one get the same version of an alias with weights
    deadline: float | None = None  # by time.monotonic: nobody wants the answer later
    warnings: tuple[str, ...] = ()  # what its sender should know

    def parts(self) -> list["Request"]:
        """One request per adapter."""
        return [replace(self, adapter=adapter, adapters=()) for adapter in self.adapters] or [self]

    def named(self, place: int) -> AbstractContextManager[None]:
        """A context whose errors about a part's adapter name the field of this request that has it."""
        return naming(f"adapters[{place}]") if self.adapters else nullcontext()


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """A request for the embeddings of texts."""

    inputs: tuple[Prompt, ...]
    adapter: AdapterReference | MergedReference | None = None
    truncate: int | None = None  # as in a Request
    session: str = ""
    warnings: tuple[str, ...] = ()
    request_id: str = ""
    background: bool = False  # as in a Request

    @property
    def detail(self) -> Detail:
        return Detail(pool=True)

    def parts(self) -> Iterator[Request]:
        """One request per input."""
        return map(self.part, range(len(self.inputs)))

    def part(self, place: int) -> Request:
        """The request for one of the inputs."""
        numbered = bool(self.request_id) and len(self.inputs) > 1
        return Request(
            self.inputs[place],
            request_id=f"{self.request_id}-{place}" if numbered else self.request_id,
            adapter=self.adapter,
            truncate=self.truncate,
            detail=self.detail,
            background=self.background,
            warnings=self.warnings,
        )


@dataclass(frozen=True, slots=True)
class ClassifyRequest(EmbedRequest):
    """A request for what a classifier makes of texts."""

    @property
    def detail(self) -> Detail:
        return Detail(pool=True, classify=True)
