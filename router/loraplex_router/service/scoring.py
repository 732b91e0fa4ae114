"""How well documents fit a query: by a classifier that was trained on pairs, or by the likeness of embeddings."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot
from operator import mul

from loraplex_protos.errors import FieldViolation, InvalidRequestError
from loraplex_protos.generation_pb2 import Classifier
from loraplex_router.service.service import Service
from loraplex_router.vocabulary.chat import TextPair
from loraplex_router.vocabulary.classification import scores
from loraplex_router.vocabulary.pooled import Classification, Embedding
from loraplex_router.vocabulary.references import AdapterReference
from loraplex_router.vocabulary.request import ClassifyRequest, EmbedRequest


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """A request for the score of each pair. One query is paired with all documents."""

    queries: tuple[str, ...]
    documents: tuple[str, ...]
    adapter: AdapterReference | None = None
    truncate: int | None = None  # as in a Request
    max_query: int = 0  # tokens of each that are kept, from its beginning; 0: all
    max_document: int = 0
    raw_logits: bool = False  # of a classifier
    session: str = ""  # as in a Request
    warnings: tuple[str, ...] = ()  # likewise
    request_id: str = ""  # likewise
    background: bool = False  # likewise

    def pairs(self, classifier: Classifier) -> tuple[TextPair, ...]:
        queries = self.queries * (len(self.documents) if len(self.queries) == 1 else 1)
        limits = self.max_query, self.max_document
        return tuple(
            TextPair(query, document, *limits, joined=classifier.joins_pairs)
            for query, document in zip(queries, self.documents, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Scores:
    values: list[float]  # one per pair
    prompt_tokens: int  # of all of them together
    answers: Sequence[Classification | Embedding]  # that they were made of


async def score(service: Service, request: ScoreRequest, key: str | None = None) -> Scores:
    """By the adapter's classifier, or else the model's, which must have one label, as vLLM's cross-encoders have; if
    neither has one, by the cosine of embeddings. Raises LoraplexError."""
    _check(request)
    classifier = await service.classifier(request.adapter, key, request.session)
    if classifier is None:
        return await _compare(service, request, key)
    if classifier.of_tokens or len(classifier.labels) != 1:
        what = "classifies tokens" if classifier.of_tokens else f"has {len(classifier.labels)} labels"
        raise InvalidRequestError(FieldViolation("model", f"{what}: only a classifier with one label scores pairs"))
    found = await service.pooling.classify(
        ClassifyRequest(
            request.pairs(classifier),
            request.adapter,
            request.truncate,
            request.session,
            request.warnings,
            request.request_id,
            request.background,
        ),
        key,
    )
    values = [(each.logits if request.raw_logits else scores(each.classifier, each.logits))[0] for each in found]
    return Scores(values, sum(len(each.tokens) for each in found), found)


def _check(request: ScoreRequest) -> None:
    queries, documents = len(request.queries), len(request.documents)
    if not queries:
        raise InvalidRequestError(FieldViolation("queries", "send at least one"))
    if not documents:
        raise InvalidRequestError(FieldViolation("documents", "send at least one"))
    if queries not in (1, documents):
        reason = f"{queries} cannot be paired with {documents} documents: send one, or as many"
        raise InvalidRequestError(FieldViolation("queries", reason))


async def _compare(service: Service, request: ScoreRequest, key: str | None) -> Scores:
    texts = [*(await _shortened(service, request.queries, request.max_query, key))]
    texts += await _shortened(service, request.documents, request.max_document, key)
    asked = EmbedRequest(
        tuple(texts),
        request.adapter,
        request.truncate,
        request.session,
        request.warnings,
        request.request_id,
        request.background,
    )
    found = await service.pooling.embed(asked, key)
    vectors, count = [each.values for each in found], len(request.queries)
    queries = vectors[:count] * (len(request.documents) if count == 1 else 1)
    values = await asyncio.to_thread(lambda: list(map(_cosine, queries, vectors[count:])))  # there may be a thousand
    return Scores(values, sum(each.prompt_tokens for each in found), found)


async def _shortened(service: Service, texts: Sequence[str], most: int, key: str | None) -> Sequence[str]:
    """Each text up to the end of that many tokens; 0: all of it."""
    if not most:
        return texts
    tenant, tokenizer = service.keys.tenant(key), service.tokenizer
    with service.requests.preparing(tenant):
        return [await tokenizer.beginning(text, most, tenant=tenant.name) for text in texts]


def _cosine(one: Sequence[float], other: Sequence[float]) -> float:
    lengths = hypot(*one) * hypot(*other)
    return sum(map(mul, one, other)) / lengths if lengths else 0.0
