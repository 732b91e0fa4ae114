"""The JSON of requests to OpenAI's routes. A null stands for an absent field; other_fields.py has what is not declared
here."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from loraplex_router.api.calls import MAX_TOOLS
from loraplex_router.api.http.conversation import Conversation, Function
from loraplex_router.api.http.fields import BIAS, Bias, CountOrAll, Items, Name, Prompts, TokenId
from loraplex_router.api.http.openai.other_fields import rename
from loraplex_router.api.http.response_format import ResponseFormat
from loraplex_router.vocabulary.checks import MAX_ADAPTERS
from loraplex_router.vocabulary.sampling import Sampling

Count = Annotated[int, Field(ge=0, lt=2**32)]


class StreamOptions(BaseModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(default=None, description="vLLM's: every chunk has the usage so far.")


class StructuredOutputs(BaseModel):
    """vLLM's. Set one of the formats. Unknown fields are refused: they would be meant to constrain the answer."""

    model_config = ConfigDict(extra="forbid")

    json_: str | dict[str, Any] | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Items[str] | None = None
    grammar: str | None = Field(default=None, description="Lark, or GBNF.")
    structural_tag: Any = Field(default=None, description="Not supported: refused.")
    disable_fallback: bool | None = Field(default=None, description="No effect: there is one compiler.")
    disable_any_whitespace: bool | None = Field(default=None, description="No effect: there is none to choose.")
    disable_additional_properties: bool | None = Field(default=None, description="No effect: see the page on OpenAI.")
    whitespace_pattern: str | None = Field(default=None, description="No effect: white space is as json.dumps has it.")


class GenerationRequest(Sampling):
    """The common fields of completions and chat completions. `model_extra` has the others."""

    model_config = ConfigDict(frozen=True, extra="allow")

    model: Name = Field(default="", description="The base model (also: empty), an adapter, or base:adapter.")
    temperature: float | None = Field(default=None, description="Absent: as the model's files say, or 1.")
    n: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | Items[str] | None = None
    max_tokens: CountOrAll | None = Field(default=None, description="-1: as many as the context has room for.")
    logit_bias: Bias | None = Field(default=None, description=BIAS)
    response_format: ResponseFormat | None = None
    # loraplex's own
    adapters: Annotated[Items[Name], Field(max_length=MAX_ADAPTERS)] | None = Field(
        default=None,
        description="Several adapters that all answer, with n choices each, which say whose they are. They are named "
        "as in `model`, which then is the base model or absent. The base model can be one of them.",
    )
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = Field(
        default=None, description='"flex": computed while there is nothing else to compute. Others change nothing.'
    )
    # LoRAX's
    adapter_source: str | None = Field(
        default=None, description="Where the adapter is, for example local or hub. Absent: the first that has it."
    )
    api_token: str | None = Field(default=None, description="For a private adapter on the hub.")
    ignore_eos_token: bool | None = None
    # SGLang's
    lora_path: Name = Field(default="", description="The adapter, if `model` is the base model.")
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
    ebnf: str | None = Field(default=None, description="The same as grammar.")
    # vLLM's
    min_tokens: Count | None = None
    cache_salt: str | None = Field(
        default=None, description="Cached prefixes are shared only by requests with the same salt."
    )
    top_k: Annotated[int, Field(ge=-1, lt=2**32)] | None = Field(default=None, description="0 or -1: off.")
    ignore_eos: bool | None = None
    stop_token_ids: Items[TokenId] | None = None
    allowed_token_ids: Items[TokenId] | None = Field(default=None, description="The only tokens that are generated.")
    bad_words: Items[str] | None = Field(
        default=None, description="Texts that the answer does not contain, as their tokens, with a space before or not."
    )
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = Field(default=None, description="false: special tokens are shown in the text.")
    truncate_prompt_tokens: CountOrAll | None = Field(
        default=None, description="How many tokens of the prompt to keep, from its end; -1: as many as fit."
    )
    request_id: str | None = Field(default=None, description="Absent: the X-Request-Id header, or a new one.")
    return_token_ids: bool | None = Field(default=None, description="Report the ids of the prompt and of the answer.")
    return_tokens_as_token_ids: bool | None = Field(
        default=None, description='Write each token in logprobs as "token_id:12", which is unambiguous.'
    )
    prompt_logprobs: Count | None = Field(
        default=None, description="Report the prompt's tokens, each with this many alternatives."
    )

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, sent: Any) -> Any:
        return rename(sent) if isinstance(sent, dict) else sent


class CompletionRequest(GenerationRequest):
    prompt: Prompts
    suffix: str | None = Field(default=None, description="What follows the answer, for models that have tokens for it.")
    echo: bool | None = None
    logprobs: Annotated[Count | None, BeforeValidator(lambda given: None if given is False else given)] = Field(
        default=None, description="How many alternatives to report for each token."
    )
    add_special_tokens: bool | None = Field(default=None, description="false: no BOS token is put before a text.")
    best_of: Count | None = None


class NamedFunction(BaseModel):
    name: str


class NamedTool(BaseModel):
    type: Literal["function"] = "function"
    function: NamedFunction


class AllowedTools(BaseModel):
    mode: Literal["auto", "required"]
    tools: Items[NamedTool] = Field(min_length=1)


class AllowedToolsChoice(BaseModel):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class ChatCompletionRequest(GenerationRequest, Conversation):
    max_completion_tokens: CountOrAll | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    tool_choice: NamedTool | AllowedToolsChoice | str | None = Field(
        default=None,
        description="none, auto, required, one tool (OpenAI's object or, as in LoRAX, its name), or those allowed.",
    )
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = Field(default=None, description="vLLM's. false: a model's thoughts are left out.")
    separate_reasoning: bool | None = Field(default=None, description="SGLang's. false: thoughts stay in the content.")
    functions: Items[Function] | None = Field(
        default=None, max_length=MAX_TOOLS, description="OpenAI's older form of tools: the answer has `function_call`."
    )
    function_call: NamedFunction | Literal["none", "auto"] | None = None
