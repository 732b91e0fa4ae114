"""How well documents fit a query, as vLLM's, Jina's and Cohere's clients ask for it: /score and /rerank."""

from collections.abc import Mapping

from fastapi import APIRouter

from loraplex_router.api.http.face import Face
from loraplex_router.api.http.openai_errors import write_error
from loraplex_router.api.http.scoring.routes import reranking, scoring

FIELD_NAMES: Mapping[str, str] = {
    "prompt": "documents",
    "inputs": "documents",
    "adapter.id": "model",
    "truncate": "truncate_prompt_tokens",
}


def _face(prefix: str, router: APIRouter) -> Face:
    return Face(prefix, (router,), write_error, FIELD_NAMES, invalid_status=400)


FACES = (
    *(_face(prefix, scoring) for prefix in ("/score", "/v1/score")),
    *(_face(prefix, reranking) for prefix in ("/rerank", "/v1/rerank", "/v2/rerank")),
)
