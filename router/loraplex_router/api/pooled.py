"""Embeddings, classifications and tokens of generation.proto."""

from collections.abc import Iterable, Sequence

from loraplex_protos import generation_pb2 as pb
from loraplex_router.api.translation import read_adapter, read_prompt
from loraplex_router.text.tokenizer import Spans, TokenSpan
from loraplex_router.vocabulary.classification import best, by_token, scores
from loraplex_router.vocabulary.pooled import Classification, Embedding
from loraplex_router.vocabulary.request import ClassifyRequest, EmbedRequest


def read_embed_request(message: pb.EmbedRequest) -> EmbedRequest:
    """Raises InvalidRequestError if an input has no prompt; everything else is checked by the service."""
    return EmbedRequest(tuple(map(read_prompt, message.inputs)), read_adapter(message), session=message.session)


def read_classify_request(message: pb.ClassifyRequest) -> ClassifyRequest:
    """As read_embed_request."""
    return ClassifyRequest(tuple(map(read_prompt, message.inputs)), read_adapter(message), session=message.session)


def write_embeddings(embeddings: Iterable[Embedding]) -> pb.EmbedResponse:
    return pb.EmbedResponse(
        embeddings=[
            pb.Embedding(
                values=found.values,
                prompt_tokens=found.prompt_tokens,
                warnings=found.warnings,
                adapter_digest=found.adapter_digest,
                adapter_version=found.adapter_version,
            )
            for found in embeddings
        ]
    )


def write_classifications(
    found: Sequence[Classification], places: Sequence[Sequence[TokenSpan]], raw_logits: bool
) -> pb.ClassifyResponse:
    """`places`: of each one's tokens."""
    return pb.ClassifyResponse(
        classifications=[_classification(each, spans, raw_logits) for each, spans in zip(found, places, strict=True)],
        classifier=found[0].classifier,
        adapter_digest=found[0].adapter_digest,
        adapter_version=found[0].adapter_version,
    )


def _classification(found: Classification, spans: Sequence[TokenSpan], raw_logits: bool) -> pb.Classification:
    message, classifier = pb.Classification(prompt_tokens=len(found.tokens)), found.classifier
    if not classifier.of_tokens:
        message.scores.extend(found.logits if raw_logits else scores(classifier, found.logits))
        message.label = classifier.labels[best(found.logits)]
        return message
    for span, logits in zip(spans, by_token(classifier, found.logits), strict=True):
        token = message.tokens.add(id=span.id, text=span.text, start=span.start, stop=span.stop)
        token.scores.extend(logits if raw_logits else scores(classifier, logits))
        token.label = classifier.labels[best(logits)]
    return message


def write_spans(spans: Spans) -> pb.TokenizeResponse:
    return pb.TokenizeResponse(
        tokens=[pb.TokenSpan(id=span.id, text=span.text, start=span.start, stop=span.stop) for span in spans]
    )
