"""The JSON of requests to /v1/messages. A null stands for an absent field. Unknown fields of a request are refused;
those of its parts say nothing to the model and are ignored, as `cache_control` is: all prefixes are cached."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from loraplex_router.api.calls import MAX_TOOLS
from loraplex_router.api.http.fields import BIAS, MAX_MESSAGES, STRICT, Bias, Items
from loraplex_router.vocabulary.sampling import Sampling


class Block(BaseModel):
    """A part of a message, of the system prompt or of a tool's result; which fields it needs is up to its type."""

    type: str = Field(description="text, tool_use, tool_result or thinking; others are refused.")
    text: str | None = None
    thinking: str | None = Field(default=None, description="Of an earlier answer, for chat templates that read it.")
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: "str | Items[Block] | None" = None
    is_error: bool | None = Field(default=None, description="For chat templates that read it.")


Content = str | Items[Block]


class Turn(BaseModel):
    role: Literal["user", "assistant", "system"]
    content: Content


class Tool(BaseModel):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")
    type: str | None = Field(default=None, description="custom, or absent; Anthropic's own tools are refused.")
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = Field(default=None, description=STRICT)


class ToolChoice(BaseModel):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(BaseModel):
    type: Literal["enabled", "disabled", "adaptive"] = Field(
        description="enabled or disabled: the chat template's enable_thinking; adaptive: as the template has it."
    )
    budget_tokens: int | None = Field(default=None, description="Not enforced; the answer has a warning.")
    display: Literal["summarized", "omitted"] | None = Field(
        default=None, description="omitted: the answer's blocks of thoughts are empty."
    )


class OutputFormat(BaseModel):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: OutputFormat | None = None
    effort: str | None = Field(default=None, description="The chat template's reasoning_effort.")


class ConversationBody(BaseModel):
    """What is counted."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, sent: Any) -> Any:
        return {name: value for name, value in sent.items() if value is not None} if isinstance(sent, dict) else sent

    model: str = Field(description="The base model, an adapter, or base:adapter.")
    messages: Items[Turn] = Field(
        min_length=1, max_length=MAX_MESSAGES, description="The answer continues a last one of the assistant's."
    )
    system: Content | None = None
    tools: Items[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = Field(default=None, description="Without effect: all prefixes are cached.")
    context_management: dict[str, Any] | None = Field(
        default=None, description="Not applied; the answer has a warning."
    )
    speed: Literal["standard"] | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="As in vLLM.")


class MessagesBody(ConversationBody, Sampling):
    """Besides Anthropic's, all sampling parameters of chat completions."""

    max_tokens: Annotated[int, Field(ge=1, lt=2**32)]
    stop_sequences: Items[str] | None = None
    stream: bool | None = None
    logit_bias: Bias | None = Field(default=None, description=BIAS)
    metadata: dict[str, Any] | None = Field(default=None, description="Without effect.")
    service_tier: Literal["auto", "standard_only"] | None = None
