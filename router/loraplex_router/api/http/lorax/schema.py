"""The JSON of LoRAX's routes. A null stands for an absent field."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from loraplex_router.api.http.fields import BIAS, Bias, Items
from loraplex_router.api.http.response_format import ResponseFormat
from loraplex_router.api.http.unknown_fields import OpenBody
from loraplex_router.vocabulary.sampling import Sampling

Uint32 = Annotated[int, Field(ge=0, lt=2**32)]
Uint64 = Annotated[int, Field(ge=0, lt=2**64)]
OTHER_PROMPTS = ("messages", "text", "input_ids", "prompt")


class MergedAdapters(BaseModel):
    """Several adapters, merged into one."""

    ids: Items[str]
    weights: Items[float] = Field(default=[], description="One per adapter. Empty: 1 for each.")
    merge_strategy: str | None = Field(
        default=None, description="linear (the default), ties, dare_linear, dare_ties or magnitude_prune."
    )
    density: float | None = Field(default=None, description="The share of weights to keep. linear keeps all.")
    majority_sign_method: str | None = Field(default=None, description="total (the default) or frequency.")


class Parameters(Sampling):
    model_config = ConfigDict(frozen=True, extra="allow")

    adapter_id: str | None = Field(default=None, description="An adapter's name; absent: the base model.")
    adapter_source: str | None = Field(
        default=None, description="Where the adapter is, for example local or hub. Absent: the first that has it."
    )
    merged_adapters: MergedAdapters | None = None
    api_token: str | None = Field(default=None, description="For a private adapter. Absent: the bearer token.")
    best_of: Uint32 | None = Field(
        default=None, description="How many sequences to sample. The likeliest is the answer."
    )
    temperature: float | None = Field(default=None, description="0: greedy. Absent: 1 if another option samples.")
    top_k: Uint32 | None = None
    do_sample: bool | None = None
    max_new_tokens: Uint32 | None = Field(default=None, description="Absent: as many as the context has room for.")
    ignore_eos_token: bool | None = None
    return_full_text: bool | None = Field(default=None, description="Begin generated_text with the prompt.")
    stop: Items[str] | None = Field(default=None, description="The answer ends with the first of these texts.")
    truncate: Uint32 | None = Field(default=None, description="How many tokens of the prompt to keep, from its end.")
    watermark: bool | None = Field(default=None, description="Not supported: refused if true.")
    details: bool | None = None
    decoder_input_details: bool | None = Field(default=None, description="The prompt's tokens with their logprobs.")
    return_k_alternatives: Uint32 | None = None
    top_n_tokens: Uint32 | None = Field(default=None, description="text-generation's name for return_k_alternatives.")
    apply_chat_template: bool | None = Field(default=None, description="Take the prompt as a user's message.")
    seed: Uint64 | None = None
    logit_bias: Bias | None = Field(default=None, description=BIAS)
    response_format: ResponseFormat | None = None
    grammar: ResponseFormat | None = Field(default=None, description="text-generation's way to ask for a format.")


class GenerateRequest(OpenBody):
    inputs: str
    parameters: Parameters | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_not_another_servers(cls, sent: Any) -> Any:
        """SGLang and the first vLLM have other bodies at /generate."""
        named = [name for name in OTHER_PROMPTS if name in sent] if isinstance(sent, dict) else []
        if named and sent.get("inputs") is None:
            here = "chat/completions" if named[0] == "messages" else "completions"
            raise ValueError(f"has `{named[0]}`: here the prompt is `inputs`; OpenAI's form is for /v1/{here}")
        return sent


class CompatGenerateRequest(GenerateRequest):
    stream: bool | None = None


class EmbedRequest(OpenBody):
    inputs: str
    parameters: Parameters | None = Field(default=None, description="`truncate`, and those that name an adapter.")


# ---- answers: for the OpenAPI document; they are written as plain dictionaries ---------------------------------


class InputToken(BaseModel):
    id: int
    text: str
    logprob: float | None = Field(description="null for the first token, which has no context")


class AlternativeToken(BaseModel):
    id: int
    text: str
    logprob: float


class Token(AlternativeToken):
    special: bool
    skipped: bool
    alternative_tokens: list[AlternativeToken] | None = None


class BestOfSequence(BaseModel):
    generated_text: str
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    seed: int | None
    prefill: list[InputToken]
    tokens: list[Token]


class StreamDetails(BaseModel):
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    prompt_tokens: int
    generated_tokens: int
    seed: int | None = Field(description="Sent again, it repeats the answer. null if the answer was not sampled.")


class Details(StreamDetails):
    skipped_tokens: int = Field(description="Prompt tokens found in the prefix cache.")
    prefill: list[InputToken]
    tokens: list[Token]
    best_of_sequences: list[BestOfSequence] | None = None


class GenerateResponse(BaseModel):
    generated_text: str
    details: Details | None = None


class StreamResponse(BaseModel):
    token: Token
    generated_text: str | None = Field(description="on the last event")
    details: StreamDetails | None = Field(description="on the last event, if asked for")


class Used(BaseModel):
    tenant: str | None = Field(description="null if the server has no API keys")
    adapter: str = Field(description="`[base]` for the base model, `[other]` for adapters beyond 10,000 in a day")
    requests: int
    prompt_tokens: int
    cached_tokens: int = Field(description="of these, found in the prefix cache")
    generated_tokens: int


class Usage(BaseModel):
    """What ended requests have used."""

    since: str = Field(description="when counting began, in ISO 8601")
    usage: list[Used]


class Info(BaseModel):
    """Fields with a default are constant: their settings mean nothing here."""

    model_config = ConfigDict(protected_namespaces=(), json_schema_serialization_defaults_required=True)

    model_id: str
    model_sha: str | None = None
    model_dtype: str
    model_device_type: str | None = None
    model_pipeline_tag: str | None = "text-generation"
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_length: int
    max_total_tokens: int
    waiting_served_ratio: float = 0.0
    max_batch_total_tokens: int
    max_waiting_tokens: int = 0
    validation_workers: int = 0
    eager_prefill: bool = True
    version: str
    sha: str | None = None
    docker_label: str | None = None
    request_logger_url: str | None = None


class EmbedResponse(BaseModel):
    embeddings: list[float]
