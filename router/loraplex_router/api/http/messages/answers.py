"""The JSON of the answers of /v1/messages, for the OpenAPI document; they are written as plain dictionaries."""

from typing import Any, Literal

from pydantic import BaseModel, Field


class Usage(BaseModel):
    input_tokens: int = Field(description="Of the prompt, without those of a cached prefix.")
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessageAnswer(BaseModel):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]
    stop_sequence: str | None
    usage: Usage


class TokenCount(BaseModel):
    input_tokens: int
