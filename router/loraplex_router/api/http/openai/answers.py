"""The JSON of OpenAI's answers, for the OpenAPI document; they are written as plain dictionaries."""

from typing import Any, Literal

from pydantic import BaseModel, Field

ADAPTER = "Whose answer it is, if the request named several adapters; null is the base model's."
TOKEN_IDS = "vLLM's: of the answer, with the token that ended it. Absent unless asked for with `return_token_ids`."
PROMPT_TOKEN_IDS = "vLLM's: of the prompt. Absent unless asked for with `return_token_ids`."
STOP_REASON = "vLLM's: which of the request's `stop` and `stop_token_ids` ended it."


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None = Field(description=STOP_REASON)
    token_ids: list[int] | None = Field(default=None, description=TOKEN_IDS)
    prompt_token_ids: list[int] | None = Field(default=None, description=PROMPT_TOKEN_IDS)
    adapter: str | None = Field(default=None, description=ADAPTER)


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = Field(default=None, description="What a thinking model thought; also `reasoning`.")
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    function_call: dict[str, str] | None = Field(default=None, description="In place of them, if functions were sent.")


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls", "function_call"]
    stop_reason: str | int | None = Field(description=STOP_REASON)
    token_ids: list[int] | None = Field(default=None, description=TOKEN_IDS)
    adapter: str | None = Field(default=None, description=ADAPTER)


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    prompt_token_ids: list[int] | None = Field(default=None, description=PROMPT_TOKEN_IDS)
    choices: list[ChatChoice]
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    tier: str | None
    invocation: str | None = Field(description="What in a prompt activates it, if it is an activated adapter (aLoRA).")


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]
    first_id: str | None
    last_id: str | None = Field(description="The `after` of the next page.")
    has_more: bool
