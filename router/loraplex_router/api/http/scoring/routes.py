"""vLLM's /score; and its /rerank, whose answers Jina's and Cohere's clients can read."""

import secrets
import time
from typing import Any

from fastapi import APIRouter, Response

from loraplex_protos.errors import FieldViolation, InvalidRequestError
from loraplex_router.api.http.answer_headers import answer_headers
from loraplex_router.api.http.call import Call
from loraplex_router.api.http.disconnects import finish_before_disconnect
from loraplex_router.api.http.json_body import JsonAnswer, JsonRoute
from loraplex_router.api.http.model_names import answered_name, read_model_name
from loraplex_router.api.http.openai_errors import ERRORS
from loraplex_router.api.http.scoring.schema import Options, RerankAnswer, RerankBody, ScoreAnswer, ScoreBody
from loraplex_router.api.http.unknown_fields import unknown_fields
from loraplex_router.service.scoring import ScoreRequest, Scores, score

NAMES = (("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2"))

scoring = APIRouter(tags=["Scoring"], route_class=JsonRoute)
reranking = APIRouter(tags=["Scoring"], route_class=JsonRoute)


@scoring.post("", responses={200: {"model": ScoreAnswer}, **ERRORS})
async def score_pairs(body: ScoreBody, call: Call) -> Response:
    """The score of each pair: by a classifier with one label, else by the cosine of embeddings."""
    queries, documents = _read_pairs(body)
    found = await _score(body, queries, documents, call)
    usage: dict[str, Any] = {**_usage(found), "completion_tokens": 0, "prompt_tokens_details": None}
    answer = {
        "id": f"score-{secrets.token_hex(16)}",
        "object": "list",
        "created": int(time.time()),
        "model": answered_name(body.model, call.service.model_names),
        "data": [{"index": index, "object": "score", "score": value} for index, value in enumerate(found.values)],
        "usage": usage,
    }
    return JsonAnswer(answer, headers=answer_headers(found.answers, call.request_id))


@reranking.post("", responses={200: {"model": RerankAnswer}, **ERRORS}, response_model_exclude_none=True)
async def rerank(body: RerankBody, call: Call) -> Response:
    """The documents with their scores, the best first."""
    found = await _score(body, [body.query], body.documents, call)
    order = sorted(range(len(found.values)), key=found.values.__getitem__, reverse=True)
    most = body.top_n if body.top_n and body.top_n > 0 else len(order)
    results: list[dict[str, Any]] = []
    for index in order[:most]:
        shown = {} if body.return_documents is False else {"document": _document(body.documents[index])}
        results.append({"index": index, **shown, "relevance_score": found.values[index]})
    answer = {
        "id": f"rerank-{secrets.token_hex(16)}",
        "model": answered_name(body.model, call.service.model_names),
        "usage": _usage(found),
        "results": results,
    }
    return JsonAnswer(answer, headers=answer_headers(found.answers, call.request_id))


def _read_pairs(body: ScoreBody) -> tuple[list[str], list[str]]:
    for first, second in NAMES:
        queries, documents = getattr(body, first), getattr(body, second)
        if queries is not None and documents is not None:
            return queries, documents
    raise InvalidRequestError(FieldViolation("queries", "send queries and documents, text_1 and text_2, or the like"))


async def _score(body: Options, queries: list[str], documents: list[str], call: Call) -> Scores:
    request = ScoreRequest(
        tuple(queries),
        tuple(documents),
        read_model_name(body.model, call.service.model_names),
        body.truncate_prompt_tokens,
        body.max_tokens_per_query or 0,
        body.max_tokens_per_doc or 0,
        body.use_activation is False,
        call.session,
        unknown_fields(body),
        call.request_id,
        call.background,
    )
    return await finish_before_disconnect(score(call.service, request, call.key), call.receive)


def _document(text: str) -> dict[str, Any]:
    return {"text": text, "multi_modal": None}


def _usage(found: Scores) -> dict[str, int]:
    return {"prompt_tokens": found.prompt_tokens, "total_tokens": found.prompt_tokens}
