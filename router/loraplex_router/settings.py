"""The router's settings. The command turns each field into a flag and a LORAPLEX_* environment variable."""

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from loraplex_protos.mtls import MtlsSettings
from loraplex_router.text.reasoning import AUTO, FAMILIES, NONE
from loraplex_router.wire.discovery import DNS

MEMORY = "memory"
STORE = r"(memory|rediss?://(\S*@)?([^\s/?@:]+|\[[0-9a-fA-F:]+\])(:\d{1,5})?(/\d*)?(\?\S*)?|unix://\S+)?"

BUCKET = r"(s3|gs|az)://[a-z0-9$][a-z0-9._$-]{1,220}(/(?!\.{1,2}(/|$))[^\s/]+)*/?"


class EdgeSettings(BaseModel):
    """Where clients reach the router, and its limits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on. 0.0.0.0: all IPv4 addresses; ::, IPv6 as well.")
    http_port: int = Field(
        3000, ge=0, le=65535, description="Port of the HTTP API: OpenAI's and LoRAX's routes, /docs. 0: any free port."
    )
    grpc_port: int = Field(50051, ge=0, le=65535, description="Port of the gRPC API. 0: any free port.")
    served_model_name: str = Field(
        "",
        description="The model's name on OpenAI's routes, or several names separated by commas or spaces: answers have "
        "the first, requests may use any. Request an adapter with the same name as MODEL:NAME. Empty: the model's path "
        "or hub id.",
    )
    generation_config: Literal["auto", "vllm"] = Field(
        "auto",
        description="Default sampling parameters of OpenAI's routes. auto: those in the model's "
        "generation_config.json, as in vLLM. vllm: temperature 1 and nothing else.",
    )
    reasoning_parser: str = Field(
        AUTO,
        description="How the model writes its thoughts, by vLLM's names: qwen3, deepseek_r1, granite, mistral, "
        "openai_gptoss and so on. auto: as the prompt and the chat template show it. none: they stay in the answer.",
    )
    max_queue: int = Field(
        1024, ge=1, description="Sequences that may wait; further requests are refused with RESOURCE_EXHAUSTED."
    )
    prefix_cache: Literal["tenant", "shared"] = Field(
        "tenant",
        description="Who shares cached prefixes. tenant: only requests of the same tenant, so response times do not "
        "reveal what others have sent. shared: all tenants, which is faster if they have prompts in common.",
    )
    max_body_mib: int = Field(
        8,
        ge=1,
        le=256,
        description="Largest request, over HTTP and gRPC, in MiB; handling it can take ten times that memory.",
    )
    max_adapters_on_device: int = Field(
        64,
        ge=1,
        le=65535,
        description="Maximum number of adapters on a replica's device, and so in use at the same time.",
    )
    adapter_host_gib: float = Field(
        0.0,
        ge=0,
        description="Host memory for adapters, over all ranks of a replica, in GiB; evicted least recently used first. "
        "0: what the shards offer: 3/8 of what model and KV cache leave, within a container's limit.",
    )
    cors_origins: str = Field(
        "",
        pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^\s*]+( [a-z][a-z0-9+.-]*://[^\s*]+)*)?$",
        description="Origins whose web pages may call the HTTP API from a browser (https://app.example), separated by "
        "spaces. *: all. Empty: none.",
    )
    tls_cert: Path | None = Field(
        None,
        description="Certificate (with its chain, in PEM) of the HTTP and gRPC ports, which then speak TLS alone; a new"
        " one is picked up.",
    )
    tls_key: Path | None = Field(None, description="The private key of --tls-cert, in PEM.")
    api_keys: Path | None = Field(
        None,
        description="A YAML or JSON file of (hashed) API keys and what each may do; changes are picked up."
        " Absent: anyone may do anything.",
    )
    adapter_registry: Path | None = Field(
        None,
        description="A YAML or JSON file that gives adapters names, versions and aliases; changes are picked up."
        " Routers may share it. Absent: adapters have the names that their sources give them.",
    )
    adapter_uploads_mib: int = Field(
        1024,
        ge=0,
        description="Room for adapters that administrators upload, in MiB: beside the registry file if it can be "
        "written, or else in the router's memory. 0: uploads are refused.",
    )
    metrics_auth: Literal["names", "all", "none"] = Field(
        "names",
        description="With API keys, what GET /metrics shows to administrators' keys alone. names: the names of adapters"
        " and tenants, which others see added up as `[other]`. all: everything. none: nothing.",
    )
    adapter_prefetch_gib: float = Field(
        4.0,
        ge=0,
        description="How much of the registry's adapters is fetched to each replica's disk before the first request, "
        "in GiB. 0: nothing.",
    )
    stored_responses_mib: int = Field(
        64,
        ge=0,
        description="Memory of the router for responses that later requests refer to (previous_response_id), in MiB. "
        "0: none are kept.",
    )
    batches: str = Field(
        "",
        description="A folder for OpenAI's files and batches, or a bucket (s3://BUCKET/PREFIX, gs:// or az://), which "
        "survive restarts; routers may share it. Empty: there are none.",
    )
    batches_gib: float = Field(
        8.0, gt=0, description="Room for the files in --batches, inputs and outputs together, in GiB."
    )
    metrics_adapters: int = Field(
        100, ge=0, le=10_000, description="Adapters with their own time series; the others share the label `[other]`."
    )
    lorax_metrics: bool = Field(False, description="Also export LoRAX's metrics under LoRAX's names.")
    gateway_metrics: bool = Field(
        False, description="Also export what the Gateway API Inference Extension's endpoint picker reads (vllm:...)."
    )
    otlp_endpoint: str = Field(
        "",
        pattern=r"^(https?://\S+)?$",
        description="OTLP/gRPC address of an OpenTelemetry collector for traces, and for usage as log events, such as "
        "http://HOST:4317. Empty: none.",
    )
    trace_sampling: float = Field(
        1.0, ge=0, le=1, description="Fraction of requests to trace, among those that arrive without a trace."
    )
    log_format: Literal["text", "json"] = Field("text", description="Format of log lines.")
    log_prompts: bool = Field(False, description="Log prompts and answers with each request.")
    usage_log: Path | None = Field(
        None,
        description="A file to which a line of JSON is appended for each request that ends: tenant, adapter, tokens. "
        "A new one is begun when it is moved away. Absent: none.",
    )
    store: str = Field(
        "",
        description="What routers share: redis://HOST:PORT/DATABASE (rediss:// with TLS). Those that name the same "
        "server count limits and usage together, and clients that lose the connection or the router can resume "
        "streams at any of them. memory: streams can be resumed at this router. Empty: nothing.",
    )
    resume_seconds: float = Field(
        60.0, ge=1, le=86400, description="How long a stream can be resumed after its last token."
    )
    drain_seconds: float = Field(
        30.0,
        ge=0,
        description="How long running requests may continue after SIGTERM before they are cancelled, or handed over to "
        "other routers (--store).",
    )

    @field_validator("reasoning_parser")
    @classmethod
    def _is_known(cls, value: str) -> str:
        name = value.replace("-", "_").lower()
        if name not in (AUTO, NONE, *FAMILIES):
            raise ValueError(f"{value!r} is not one of {', '.join((AUTO, NONE, *sorted(FAMILIES)))}")
        return name

    @field_validator("batches")
    @classmethod
    def _is_a_folder_or_a_bucket(cls, value: str) -> str:
        if "://" in value and not re.fullmatch(BUCKET, value):
            raise ValueError(
                "must be a folder, or a bucket: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX"
            )
        return value

    @model_validator(mode="after")
    def _has_both_files_of_tls_or_none(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            absent = "tls_cert" if self.tls_cert is None else "tls_key"
            raise ValueError(f"{absent}: set both tls_cert and tls_key, or neither")
        return self

    @property
    def scheme(self) -> str:
        """Of the HTTP port's URL."""
        return "http" if self.tls_cert is None else "https"

    @field_validator("store")
    @classmethod
    def _is_a_store(cls, value: str) -> str:
        if not re.fullmatch(STORE, value):
            raise ValueError("must be memory, or the URL of a Redis server: redis://HOST:PORT/DATABASE or unix://PATH")
        return value

    @property
    def url_host(self) -> str:
        """The host as written before a port."""
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def served_model_names(self) -> tuple[str, ...]:
        return tuple(self.served_model_name.replace(",", " ").split())


class RouterSettings(EdgeSettings, MtlsSettings):
    """One router and the replicas that it drives."""

    shards: tuple[str, ...] = Field(
        description="The replicas, separated by semicolons. A replica: its ranks' addresses (HOST:PORT or unix:PATH), "
        "rank 0 first, separated by commas; rank 0's alone is enough if the others listen on the ports after it. "
        "dns:///NAME:PORT stands for one replica per address of NAME, now and later."
    )
    move_seconds: float = Field(
        30.0,
        ge=0,
        description="How long requests of a lost replica wait for another one.",
    )

    @field_validator("shards", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [part.strip() for part in value.split(";")] if isinstance(value, str) else value

    @field_validator("shards")
    @classmethod
    def _are_addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        ranks = [rank for replica in value for rank in replica.removeprefix(DNS).split(",")]
        for rank in ranks:
            if not (rank.startswith("unix:") or re.fullmatch(r"[^\s:/]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}", rank)):
                raise ValueError(f"{rank!r} is not an address: write HOST:PORT, unix:PATH or dns:///NAME:PORT")
        return value
