"""The JSON of requests to OpenAI's routes. A null stands for an absent field; unknown fields are ignored."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    model_validator,
)

from loraplex_router.api.http.fields import MAX_MESSAGES, MAX_TOOLS, Bias, Items, Name, Prompts, TokenId
from loraplex_router.api.http.response_format import ResponseFormat

Count = Annotated[int, Field(ge=0, lt=2**32)]
CountOrAll = Annotated[int, Field(ge=-1, lt=2**32)]


class StreamOptions(BaseModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(default=None, description="vLLM's: every chunk has the usage so far.")


class StructuredOutputs(BaseModel):
    """vLLM's: set one of them."""

    json_: str | dict[str, Any] | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Items[str] | None = None
    grammar: str | None = Field(default=None, description="Lark, or GBNF.")


class GenerationRequest(BaseModel):
    """What completions and chat completions have in common. Fields that are refused are here for that."""

    model: Name = Field(default="", description="The base model (also: empty), an adapter, or base:adapter.")
    temperature: float | None = Field(default=None, description="Absent: as the model's files say, or 1.")
    top_p: float | None = None
    n: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | Items[str] | None = None
    max_tokens: CountOrAll | None = Field(default=None, description="-1: as many as the context has room for.")
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Bias | None = Field(default=None, description="By token id, from -100 to 100.")
    seed: int | None = None
    response_format: ResponseFormat | None = None
    # LoRAX's
    adapter_source: str | None = Field(
        default=None, description="One of the server's, as local or hub; absent: the first that has it."
    )
    api_token: str | None = Field(default=None, description="For a private adapter's hub.")
    ignore_eos_token: bool | None = None
    # vLLM's
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: Items[str] | None = None
    guided_grammar: str | None = None
    # llama.cpp's and SGLang's
    json_schema: dict[str, Any] | str | None = None
    regex: str | None = None
    grammar: str | None = Field(default=None, description="GBNF, or Lark.")
    ebnf: str | None = Field(default=None, description="The same.")
    # vLLM's
    min_tokens: Count | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**32)] | None = Field(default=None, description="0 or -1: off.")
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Items[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = Field(default=None, description="false: they are shown in the text.")
    truncate_prompt_tokens: CountOrAll | None = Field(
        default=None, description="How many tokens of the prompt to keep, from its end; -1: as many as fit."
    )
    allowed_token_ids: Items[TokenId] | None = Field(default=None, description="Not supported: refused unless empty.")
    bad_words: Items[str] | None = Field(default=None, description="Not supported: refused unless empty.")
    use_beam_search: bool | None = Field(default=None, description="Not supported: refused if true.")
    return_tokens_as_token_ids: bool | None = Field(
        default=None, description='In logprobs a token is written "token_id:12", which no other token can look like.'
    )
    prompt_logprobs: Count | None = Field(
        default=None, description="Report the prompt's tokens, each with this many alternatives."
    )


class CompletionRequest(GenerationRequest):
    prompt: Prompts
    suffix: str | None = Field(default=None, description="Not supported: refused unless empty.")
    echo: bool | None = None
    logprobs: Annotated[Count | None, BeforeValidator(lambda given: None if given is False else given)] = Field(
        default=None, description="So many alternatives for each token."
    )
    add_special_tokens: bool | None = Field(default=None, description="false: a text is taken without a BOS.")
    best_of: Count | None = None


class AsSent(BaseModel):
    """Checked, and still known in the client's own words: chat templates see all fields that there are, in their
    order."""

    model_config = ConfigDict(extra="allow")

    _sent: dict[str, Any] = PrivateAttr()

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, sent: dict[str, Any], check: ModelWrapValidatorHandler[Self]) -> Self:
        found = check(sent)
        found._sent = sent
        return found

    @property
    def sent(self) -> dict[str, Any]:
        return self._sent


class ContentPart(AsSent):
    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(BaseModel):
    name: str
    arguments: str | dict[str, Any] | None = Field(default=None, description="A JSON object, as text or as it is.")


class MessageToolCall(AsSent):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(AsSent):
    """Chat templates see all fields, also others than these, for example `reasoning_content`."""

    role: str
    content: str | Items[ContentPart] | None = None
    name: str | None = None
    tool_calls: Items[MessageToolCall] | None = None
    tool_call_id: str | None = None


class Function(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(AsSent):
    type: Literal["function"]
    function: Function


class NamedFunction(BaseModel):
    name: str


class NamedTool(BaseModel):
    type: Literal["function"] = "function"
    function: NamedFunction


class Conversation(BaseModel):
    """What a chat template makes a text of."""

    messages: Items[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    tools: Items[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    documents: Items[dict[str, Any]] | None = Field(default=None, description="For chat templates that read them.")
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = Field(
        default=None, description="For chat templates that read it, or enable_thinking: false for none, else true."
    )
    add_generation_prompt: bool | None = Field(default=None, description="false: no answer is begun.")
    chat_template: str | None = Field(default=None, description="Not supported: refused unless empty.")
    continue_final_message: bool | None = Field(
        default=None, description="true: the answer goes on where the last message ends, which is the assistant's."
    )


class ChatCompletionRequest(GenerationRequest, Conversation):
    max_completion_tokens: CountOrAll | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    tool_choice: NamedTool | str | None = Field(
        default=None, description="none, auto, required, or one tool: OpenAI's object, or as LoRAX its name alone."
    )
    parallel_tool_calls: bool | None = None
    functions: Items[dict[str, Any]] | None = Field(default=None, description="Refused unless empty: send tools.")
