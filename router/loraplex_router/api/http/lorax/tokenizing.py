"""Text to tokens and back, for LoRAX's and vLLM's clients."""

from collections.abc import AsyncIterator

import orjson
from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field

from loraplex_protos.errors import FieldViolation, InvalidRequestError
from loraplex_router.api.http.call import Call
from loraplex_router.api.http.conversation import Conversation, read_conversation
from loraplex_router.api.http.errors import LORAX_ERRORS, only
from loraplex_router.api.http.fields import Items, TokenId
from loraplex_router.api.http.json_body import JsonRoute
from loraplex_router.api.http.json_list import write_list
from loraplex_router.api.http.model_names import read_model_name
from loraplex_router.text.tokenizer import Spans, Tokenizer
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
        adapter = read_model_name(body.model, call.service.model_names)
        names, _ = await call.service.tokenizer_for(adapter, call.key, call.session)
    return StreamingResponse(_write_vllm(spans, call.service.info.max_model_len, names), media_type=JSON)


@router.post("/detokenize", tags=["Operation"], responses={200: {"model": VllmText}, **ERRORS})
async def detokenize(body: VllmDetokenize, call: Call) -> Response:
    """The text of token ids, with special tokens, as vLLM writes it."""
    adapter = read_model_name(body.model, call.service.model_names)
    tokenizer, vocabulary = await call.service.tokenizer_for(adapter, call.key, call.session)
    if max(body.tokens, default=0) >= vocabulary:
        raise InvalidRequestError(FieldViolation("tokens", f"every id must be below {vocabulary}"))
    return JSONResponse({"prompt": await tokenizer.decode_verbatim(body.tokens)})


async def _spans(body: LoraxTokenize | VllmTokenize | VllmTokenizeChat, call: Call) -> Spans:
    if not isinstance(body, VllmTokenizeChat):
        text, model = (body.inputs, "") if isinstance(body, LoraxTokenize) else (body.prompt, body.model)
        adapter = read_model_name(model, call.service.model_names)
        return await call.service.tokenize(text, body.add_special_tokens is not False, adapter, call.key, call.session)
    found = Violations()
    chat = read_conversation(body, found)
    found.raise_any()
    adapter = read_model_name(body.model, call.service.model_names)
    return await call.service.tokenize(chat, bool(body.add_special_tokens), adapter, call.key, call.session)


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
