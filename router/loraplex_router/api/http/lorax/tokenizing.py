"""Text to tokens and back, for LoRAX's and vLLM's clients."""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import orjson
from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field

from loraplex_protos.errors import InvalidRequestError
from loraplex_router.api.http.call import Call
from loraplex_router.api.http.conversation import Conversation, read_conversation
from loraplex_router.api.http.errors import LORAX_ERRORS, only, rename_fields
from loraplex_router.api.http.fields import Items, TokenId
from loraplex_router.api.http.json_body import JsonRoute
from loraplex_router.api.http.json_list import write_list
from loraplex_router.api.http.model_names import read_model_name
from loraplex_router.text.tokenizer import Spans, Tokenizer
from loraplex_router.vocabulary.chat import Chat
from loraplex_router.vocabulary.violations import Violations

# An adapter may be named to use its chat template.
ERRORS = only(LORAX_ERRORS, 401, 403, 404, 413, 422, 424, 502, 503)

JSON = "application/json"


class LoraxTokenize(BaseModel):
    inputs: str
    add_special_tokens: bool | None = None


class LoraxToken(BaseModel):
    id: int
    text: str
    start: int
    stop: int


class VllmTokenize(BaseModel):
    prompt: str
    model: str = Field(default="", description="An adapter, which may have tokens of its own.")
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class VllmTokenizeChat(Conversation):
    model: str = Field(default="", description="An adapter, whose own chat template is used if it has one.")
    add_special_tokens: bool | None = Field(default=None, description="Absent: false. Chat templates write their own.")
    return_token_strs: bool | None = None


class VllmTokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = Field(description="null unless asked for")


class VllmDetokenize(BaseModel):
    tokens: Items[TokenId]
    model: str = Field(default="", description="An adapter, which may have tokens of its own.")


class VllmText(BaseModel):
    prompt: str


router = APIRouter(route_class=JsonRoute)


@router.post("/tokenize", tags=["LoRAX"], responses={200: {"model": list[LoraxToken] | VllmTokens}, **ERRORS})
async def tokenize(body: LoraxTokenize | VllmTokenize | VllmTokenizeChat, call: Call) -> Response:
    """The tokens of a text or conversation: for LoRAX's `inputs` each with its position in the text, for vLLM's
    `prompt` or `messages` their ids."""
    spans = await _spans(body, call)
    if isinstance(body, LoraxTokenize):
        tokens = ({"id": span.id, "text": span.text, "start": span.start, "stop": span.stop} for span in spans)
        return StreamingResponse(write_list(tokens), media_type=JSON)
    names = None
    if body.return_token_strs:
        with _vllms_names():
            adapter = read_model_name(body.model, call.service.model_names)
            names = await call.service.tokenizer_for(adapter, call.key, call.session)
    return StreamingResponse(_write_vllm(spans, call.service.info.max_model_len, names), media_type=JSON)


@router.post("/detokenize", tags=["Operation"], responses={200: {"model": VllmText}, **ERRORS})
async def detokenize(body: VllmDetokenize, call: Call) -> Response:
    """The text of token ids, with special tokens, as vLLM writes it."""
    with _vllms_names():
        adapter = read_model_name(body.model, call.service.model_names)
        text = await call.service.detokenize(body.tokens, adapter, call.key, call.session)
    return JSONResponse({"prompt": text})


@router.get("/tokenizer_info", tags=["Operation"], responses={200: {"model": dict[str, Any]}, **only(ERRORS, 401, 503)})
async def tokenizer_info(call: Call) -> Response:
    """The tokenizer's chat templates and special tokens under their names in tokenizer_config.json, as vLLM reports
    them."""
    call.service.keys.tenant(call.key)
    templates = call.service.chat_templates
    found = [{"name": name, "template": template} for name, template in templates.by_name.items()]
    only_default = templates.by_name.keys() <= {"default"}
    shown = templates.by_name.get("default") if only_default else found
    info = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": call.service.info.max_model_len}
    return JSONResponse({**info, **templates.special_tokens, "chat_template": shown})


@contextmanager
def _vllms_names() -> Iterator[None]:
    """A context whose errors name fields as vLLM does."""
    try:
        yield
    except InvalidRequestError as error:
        raise rename_fields(error, {"adapter.id": "model"}) from error


async def _spans(body: LoraxTokenize | VllmTokenize | VllmTokenizeChat, call: Call) -> Spans:
    if isinstance(body, LoraxTokenize):
        return await call.service.tokenize(
            body.inputs, body.add_special_tokens is not False, None, call.key, call.session
        )
    adds = body.add_special_tokens is not False
    prompt: str | Chat = body.prompt if isinstance(body, VllmTokenize) else ""
    with _vllms_names():
        adapter = read_model_name(body.model, call.service.model_names)
        if isinstance(body, VllmTokenizeChat):
            found, adds = Violations(), bool(body.add_special_tokens)
            prompt = read_conversation(body, found)
            found.raise_any()
        return await call.service.tokenize(prompt, adds, adapter, call.key, call.session)


async def _write_vllm(spans: Spans, max_model_len: int, names: Tokenizer | None) -> AsyncIterator[bytes]:
    counts = {"count": len(spans), "max_model_len": max_model_len}
    yield orjson.dumps(counts).rstrip(b"}") + b',"tokens":'
    async for part in write_list(spans.ids):
        yield part
    yield b',"token_strs":'
    if names is None:
        yield b"null}"
        return
    async for part in write_list(map(names.token_text, spans.ids)):
        yield part
    yield b"}"
