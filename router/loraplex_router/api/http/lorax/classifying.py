"""Classification for LoRAX's and vLLM's clients. Both call /classify: LoRAX's bodies have `inputs`, vLLM's have `input`
or `messages`."""

import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Annotated, Any, TypeAlias

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Discriminator, Field, Tag

from loraplex_protos.errors import FieldViolation, InvalidRequestError, LoraplexError
from loraplex_router.api.http.answer_headers import answer_headers
from loraplex_router.api.http.call import Call
from loraplex_router.api.http.conversation import Conversation, read_conversation
from loraplex_router.api.http.disconnects import finish_before_disconnect
from loraplex_router.api.http.errors import LORAX_ERRORS, Error, document_errors, read_error
from loraplex_router.api.http.face import Face
from loraplex_router.api.http.fields import CountOrAll, Items, Name, Prompts, UseActivation, read_prompts
from loraplex_router.api.http.json_body import JsonAnswer, JsonRoute
from loraplex_router.api.http.lorax.reading import adapter_token, read_adapter
from loraplex_router.api.http.lorax.schema import Parameters
from loraplex_router.api.http.model_names import answered_name, read_model_name
from loraplex_router.api.http.openai_errors import ERRORS, OpenaiError, write_error
from loraplex_router.api.http.unknown_fields import OpenBody, unknown_fields
from loraplex_router.api.turns import in_turn
from loraplex_router.text.tokenizer import TokenSpan
from loraplex_router.vocabulary.classification import LabelledToken, best, by_token, group_entities, scores
from loraplex_router.vocabulary.pooled import Classification
from loraplex_router.vocabulary.request import ClassifyRequest, Prompt
from loraplex_router.vocabulary.violations import Violations

NAMES_ADAPTER = "`truncate`, and those that name an adapter."


class LoraxClassify(OpenBody):
    inputs: str
    parameters: Parameters | None = Field(default=None, description=NAMES_ADAPTER)


class LoraxClassifyBatch(OpenBody):
    inputs: Items[str]
    parameters: Parameters | None = Field(default=None, description=NAMES_ADAPTER)


class LoraxEntity(BaseModel):
    """Of a classifier of tokens: tokens whose labels make up one entity, as transformers' pipeline groups them."""

    entity_group: str = Field(description="The label, without B- or I-. Tokens labelled O are in no entity.")
    entity: str = Field(description="The name of `entity_group` in older versions.")
    score: float = Field(description="The mean over the entity's tokens.")
    index: int = Field(description="Of the entity's first token, among all of the input.")
    word: str
    start: int = Field(description="The word is the input's characters from this one to `end`.")
    end: int


class LoraxLabel(BaseModel):
    """Of a classifier of whole texts: each label, the highest score first."""

    label: str
    score: float


class VllmOptions(OpenBody):
    model: Name = Field(default="", description="The base model (also: empty), an adapter, or base:adapter.")
    use_activation: UseActivation = Field(default=None, description="false: logits instead of probabilities.")
    truncate_prompt_tokens: CountOrAll | None = Field(
        default=None, description="How many tokens of each input to keep, from its end; -1: as many as fit."
    )


class VllmClassify(VllmOptions):
    input: Prompts
    add_special_tokens: bool | None = None


class VllmClassifyChat(VllmOptions, Conversation):
    pass


def _kind(body: object) -> str:
    """Which of the three a body is meant to be."""
    if not isinstance(body, dict) or "inputs" in body:
        return "Lorax"
    return "VllmChat" if "messages" in body else "Vllm" if "input" in body or "model" in body else "Lorax"


Classify: TypeAlias = Annotated[
    Annotated[LoraxClassify, Tag("Lorax")]
    | Annotated[VllmClassify, Tag("Vllm")]
    | Annotated[VllmClassifyChat, Tag("VllmChat")],
    Discriminator(_kind),
]


class VllmClass(BaseModel):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class VllmClasses(BaseModel):
    id: str
    object: str
    created: int
    model: str
    data: list[VllmClass]
    usage: dict[str, int | None]


Found = list[LoraxEntity] | list[LoraxLabel]

VLLM = Face("", (), write_error, {"inputs": "input", "adapter.id": "model"}, invalid_status=400)  # answers its bodies

EITHER_ERRORS = {
    **document_errors(Error | OpenaiError, {404: "No such model or adapter.", 422: LORAX_ERRORS[422]["description"]}),
    400: ERRORS[400],
}

router = APIRouter(route_class=JsonRoute)


class EitherRoute(JsonRoute):
    """Answers vLLM's bodies that are malformed in vLLM's form, too."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                if _kind(error.body) == "Lorax":
                    raise
                return VLLM.answer(read_error(error))

        return answer


either = APIRouter(route_class=EitherRoute)


@either.post("/classify", tags=["LoRAX"], responses={200: {"model": Found | VllmClasses}, **EITHER_ERRORS})
async def classify(body: Classify, call: Call) -> Response:
    """The labels from the model's or the adapter's classifier. LoRAX's `inputs` are answered with entities if the
    classifier labels tokens, else with all labels; vLLM's `input` or `messages` with the probability of each label."""
    if not isinstance(body, LoraxClassify):
        try:
            return await _classify_vllm(body, call)
        except LoraplexError as error:
            return VLLM.answer(error)
    (found,), headers = await _classify_lorax([body.inputs], body, call)
    return JsonAnswer(found, headers=headers)


router.include_router(either)


@router.post("/classify_batch", tags=["LoRAX"], responses={200: {"model": list[Found]}, **LORAX_ERRORS})
async def classify_batch(body: LoraxClassifyBatch, call: Call) -> Response:
    """Classifies several texts."""
    found, headers = await _classify_lorax(body.inputs, body, call)
    return JsonAnswer(found, headers=headers)


async def _classify_lorax(
    texts: Sequence[str], body: LoraxClassify | LoraxClassifyBatch, call: Call
) -> tuple[list[list[dict[str, Any]]], dict[str, str]]:
    """What is found in each text, and the answer's headers."""
    given = body.parameters or Parameters()
    request = ClassifyRequest(
        tuple(texts),
        read_adapter(given, adapter_token(call)),
        given.truncate,
        warnings=unknown_fields(body, given),
        request_id=call.request_id,
    )
    found = await finish_before_disconnect(
        call.service.pooling.classify(call.complete(request), call.key), call.receive
    )
    places = [await call.service.pooling.places(text, each, call.key) for text, each in zip(texts, found, strict=True)]
    size = sum(len(each.logits) for each in found)
    return await in_turn(size, lambda: list(map(_write_lorax, texts, found, places))), answer_headers(
        found, call.request_id
    )


def _write_lorax(text: str, found: Classification, places: Sequence[TokenSpan]) -> list[dict[str, Any]]:
    if not found.classifier.of_tokens:
        pairs = zip(found.classifier.labels, scores(found.classifier, found.logits), strict=True)
        ranked = sorted(pairs, key=lambda pair: pair[1], reverse=True)
        return [{"label": label, "score": score} for label, score in ranked]
    return [
        {
            "entity_group": entity.group,
            "entity": entity.group,
            "score": entity.score,
            "index": entity.index,
            "word": text[entity.start : entity.stop],
            "start": entity.start,
            "end": entity.stop,
        }
        for entity in group_entities(_labelled(found, places))
    ]


def _labelled(found: Classification, places: Sequence[TokenSpan]) -> list[LabelledToken]:
    """The tokens that represent a part of the text, each with its likeliest label."""
    tokens, classifier = [], found.classifier
    for index, (span, logits) in enumerate(zip(places, by_token(classifier, found.logits), strict=True)):
        if span.start < span.stop:
            place = best(logits)
            label, score = classifier.labels[place], scores(classifier, logits)[place]
            tokens.append(LabelledToken(label, score, index, span.start, span.stop))
    return tokens


async def _classify_vllm(body: VllmClassify | VllmClassifyChat, call: Call) -> Response:
    names = call.service.model_names
    request = ClassifyRequest(
        _read_vllm(body),
        read_model_name(body.model, names),
        body.truncate_prompt_tokens,
        warnings=unknown_fields(body),
        request_id=call.request_id,
    )
    found = await finish_before_disconnect(
        call.service.pooling.classify(call.complete(request), call.key), call.receive
    )
    if found[0].classifier.of_tokens:
        reason = "is for classifiers of whole texts, but this one classifies tokens: send LoRAX's `inputs`"
        raise InvalidRequestError(FieldViolation("input", reason))
    tokens = sum(len(each.tokens) for each in found)
    activated = body.use_activation is not False
    data = await in_turn(
        sum(len(each.logits) for each in found),
        lambda: [_write_vllm(index, each, activated) for index, each in enumerate(found)],
    )
    answer = {
        "id": f"classify-{secrets.token_hex(16)}",
        "object": "list",
        "created": int(time.time()),
        "model": answered_name(body.model, names),
        "data": data,
        "usage": {
            "prompt_tokens": tokens,
            "total_tokens": tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
        },
    }
    return JsonAnswer(answer, headers=answer_headers(found, call.request_id))


def _read_vllm(body: VllmClassify | VllmClassifyChat) -> tuple[Prompt, ...]:
    if isinstance(body, VllmClassify):
        return tuple(read_prompts(body.input, body.add_special_tokens is not False))
    found = Violations()
    # In vLLM, a conversation to classify does not begin an answer, unless requested.
    body.add_generation_prompt = bool(body.add_generation_prompt)
    chat = read_conversation(body, found)
    found.raise_any()
    return (chat,)


def _write_vllm(index: int, found: Classification, activated: bool) -> dict[str, Any]:
    classifier = found.classifier
    return {
        "index": index,
        "label": classifier.labels[best(found.logits)],
        "probs": scores(classifier, found.logits) if activated else found.logits.tolist(),
        "num_classes": len(classifier.labels),
    }
