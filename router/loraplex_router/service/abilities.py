"""What a model and an adapter can do: generate, with an lm head; classify, with a classifier."""

from typing import NoReturn

from loraplex_protos.errors import FieldViolation, InvalidRequestError
from loraplex_protos.generation_pb2 import Classifier, GetModelInfoResponse
from loraplex_router.vocabulary.adapter import Adapter
from loraplex_router.vocabulary.request import Request


def check_generates(info: GetModelInfoResponse) -> None:
    """Raises InvalidRequestError for a model without an lm head."""
    if info.HasField("classifier"):
        _refuse("is a classification model, which has no lm head: it cannot generate; request classification")
    if info.embeds_only:
        _refuse("is an embedding model, saved without an lm head: it cannot generate; request embeddings")


def check_adapter_fits(request: Request, adapter: Adapter, info: GetModelInfoResponse) -> Classifier | None:
    """The classifier for a request to classify. Raises InvalidRequestError if there is none, or if a request to
    generate names an adapter that was trained to classify."""
    if request.detail.classify:
        if adapter.classifier is not None:
            return adapter.classifier
        if not info.HasField("classifier"):
            who = "has no classifier, nor has the adapter" if adapter.digest else "has no classifier"
            _refuse(f"{who}: name an adapter of task_type SEQ_CLS or TOKEN_CLS, or serve a model that classifies")
        return info.classifier
    if not request.detail.pool and adapter.classifier is not None:
        raise InvalidRequestError(
            FieldViolation("adapter.id", "was trained to classify: it cannot generate; request classification")
        )
    return None


def _refuse(reason: str) -> NoReturn:
    raise InvalidRequestError(FieldViolation("model", reason))
