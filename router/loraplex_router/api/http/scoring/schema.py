"""The JSON of /score and /rerank. A null stands for an absent field."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field

from loraplex_router.api.http.fields import CountOrAll, Items, Name, UseActivation
from loraplex_router.api.http.unknown_fields import OpenBody

TEXT = 'must be a text, {"text": ...}, or {"content": [{"type": "text", "text": ...}]}: the model reads text'


def _text(given: Any) -> Any:
    """Of a text as Jina's, Cohere's and vLLM's clients may write it."""
    match given:
        case {"text": str(text)} | {"content": str(text)} | {"content": [{"type": "text", "text": str(text)}]}:
            return text
        case dict():
            raise ValueError(TEXT)
    return given


def _texts(given: Any) -> Any:
    """One alone is a list of one."""
    return given if isinstance(given, list) or given is None else [given]


Text = Annotated[str, BeforeValidator(_text)]
Texts = Annotated[Items[Text], BeforeValidator(_texts)]
Count = Annotated[int, Field(ge=0, lt=2**32)]


class Options(OpenBody):
    model: Name = Field(default="", description="The base model (also: empty), an adapter, or base:adapter.")
    truncate_prompt_tokens: CountOrAll | None = Field(
        default=None, description="How many tokens to keep of a pair; -1: as many as fit."
    )
    max_tokens_per_query: Count | None = Field(default=None, description="How many to keep of it; 0: all.")
    max_tokens_per_doc: Count | None = Field(default=None, description="How many to keep of each; 0: all.")
    use_activation: UseActivation = Field(default=None, description="false: logits in place of scores.")


class ScoreBody(Options):
    """Two texts, or two lists of as many texts, or one and a list, under any of vLLM's names for them."""

    queries: Texts | None = None
    documents: Texts | None = None
    items: Texts | None = None
    text_1: Texts | None = None
    text_2: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None


class RerankBody(Options):
    query: Text
    documents: Texts
    top_n: int | None = Field(default=None, description="How many to answer; absent or 0: all.")
    return_documents: bool | None = Field(default=None, description="false: the answer does not repeat them.")


class Score(BaseModel):
    index: int
    object: str
    score: float


class ScoreAnswer(BaseModel):
    id: str
    object: str
    created: int
    model: str
    data: list[Score]
    usage: dict[str, int | None]


class RerankDocument(BaseModel):
    text: str
    multi_modal: None


class RerankResult(BaseModel):
    index: int = Field(description="Of the document in the request.")
    document: RerankDocument | None = Field(default=None, description="Absent if return_documents is false.")
    relevance_score: float


class RerankAnswer(BaseModel):
    id: str
    model: str
    usage: dict[str, int]
    results: list[RerankResult] = Field(description="The best first.")
