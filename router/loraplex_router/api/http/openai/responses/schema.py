"""The JSON of requests to /v1/responses. A null stands for an absent field. Other fields are read as those of chat
completions, vLLM's among them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from loraplex_router.api.calls import MAX_TOOLS
from loraplex_router.api.http.fields import MAX_MESSAGES, Items, Name
from loraplex_router.api.http.unknown_fields import OpenBody

PREFIXES = {  # of items' ids, by type
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
    "reasoning": "rs",
}


class Part(OpenBody):
    """Of a message, or of a tool's output. Other fields are shown in stored responses."""

    type: str = Field(description="input_text, output_text, text, refusal or reasoning_text; others are refused.")
    text: str | None = None
    refusal: str | None = None


class Item(OpenBody):
    """Of the input; which fields it needs is up to its type. Other fields are shown in stored responses."""

    type: str | None = Field(
        default=None,
        description="message (or absent), function_call, function_call_output, custom_tool_call, "
        "custom_tool_call_output, reasoning, or item_reference, which stands for an item of a kept response.",
    )
    id: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | Items[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: str | None = None
    input: str | None = None
    output: str | Items[Part] | None = None


class Tool(OpenBody):
    """Other fields are shown in responses."""

    type: str = Field(
        description="function, custom, or namespace; those that OpenAI's servers run are left out with a warning."
    )
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    format: dict[str, Any] | None = Field(
        default=None, description="Of a custom tool's input: described, not enforced."
    )
    tools: Items["Tool"] | None = Field(default=None, max_length=MAX_TOOLS, description="Of a namespace.")


class Choice(BaseModel):
    """Of a tool, or of those allowed."""

    type: Literal["function", "custom", "allowed_tools"]
    name: str | None = None
    namespace: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: Items["Choice"] | None = None


class Format(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class Text(BaseModel):
    format: Format | None = None
    verbosity: str | None = Field(default=None, description="Without effect; the answer has a warning.")


class Reasoning(BaseModel):
    effort: str | None = Field(default=None, description="For chat templates that read it.")


class ResponsesBody(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: Name = Field(default="", description="The base model (also: empty), an adapter, or base:adapter.")
    input: str | Annotated[Items[Item], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, lt=2**32)
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    tools: Items[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | Choice | None = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["auto", "disabled"] | None = Field(
        default=None, description="auto: of a prompt that is too long, the last tokens that fit are kept, as in vLLM."
    )
    include: Items[str] | None = Field(default=None, description="message.output_text.logprobs; nothing else to show.")
    top_logprobs: int | None = Field(default=None, ge=0, lt=2**32)
    metadata: dict[str, Any] | None = Field(default=None, description="Repeated in the answer.")
    previous_response_id: str | None = Field(
        default=None, description="A response that this router has kept, and that the input continues."
    )
    store: bool | None = Field(default=None, description="false: the response is not kept for later requests.")
    user: str | None = None
    max_tool_calls: int | None = Field(default=None, description="Without effect: it limits OpenAI's own tools.")
