"""What the router can be told. The command turns each field into a flag and a LORAPLEX_* variable of its name."""

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from loraplex_protos.mtls import MtlsSettings
from loraplex_router.wire.discovery import DNS


class EdgeSettings(BaseModel):
    """Where clients reach the router, and how much it takes on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on. 0.0.0.0: all of this machine; ::, with IPv6 too.")
    http_port: int = Field(
        3000, ge=0, le=65535, description="Port of the HTTP API: OpenAI's and LoRAX's routes, /docs. 0: any free one."
    )
    grpc_port: int = Field(50051, ge=0, le=65535, description="Port of the gRPC API. 0: any free one.")
    served_model_name: str = Field(
        "",
        description="What OpenAI's routes call the model: one name, or several separated by commas or blanks. Answers "
        "have the first, requests may have any; an adapter of such a name is asked for as MODEL:NAME. Empty: its path "
        "or hub id.",
    )
    generation_config: Literal["auto", "vllm"] = Field(
        "auto",
        description="What OpenAI's routes make of sampling parameters that a request leaves out. auto: what the "
        "model's generation_config.json says, as with vLLM. vllm: temperature 1 and nothing else.",
    )
    max_batch_tokens: int = Field(
        256, ge=1, le=65536, description="Tokens computed per step: more is faster on long prompts, less is smoother."
    )
    max_queue: int = Field(
        1024, ge=1, description="Sequences that may wait; requests beyond are refused with RESOURCE_EXHAUSTED."
    )
    prefix_cache: Literal["tenant", "shared"] = Field(
        "tenant",
        description="Who reuses a known prefix. tenant: requests of the same API key's tenant, so that nobody can tell "
        "by its speed what others have sent. shared: everybody, which is faster where tenants have prompts in common.",
    )
    max_body_mib: int = Field(
        8, ge=1, le=256, description="The largest request, over HTTP and gRPC, in MiB; it can take ten times as much."
    )
    max_adapters_on_device: int = Field(
        64, ge=1, le=65535, description="Adapters that a replica's sequences can run with at the same time."
    )
    adapter_host_gib: float = Field(
        0.0,
        ge=0,
        description="Host memory for adapters, over all ranks of a replica, in GiB; the least recently used leave. "
        "0: as much as the shards have: 3/8 of what model and KV cache left them, a container's limit considered.",
    )
    cors_origins: str = Field(
        "*",
        pattern=r"^(\*|https?://[^\s*]+( https?://[^\s*]+)*)?$",
        description="Whose web pages may call the HTTP API from a browser: origins (https://app.example), separated by "
        "spaces. *: anybody's. Empty: none.",
    )
    api_keys: Path | None = Field(
        None,
        description="A YAML or JSON file of API keys (hashed) and what each may do, followed when it changes."
        " Absent: anyone may do anything.",
    )
    metrics_adapters: int = Field(
        100, ge=0, le=10_000, description="Adapters with time series of their own; the others share the label `other`."
    )
    lorax_metrics: bool = Field(False, description="Export LoRAX's metrics under its names, too.")
    gateway_metrics: bool = Field(
        False, description="Export what the Gateway API Inference Extension's endpoint picker reads (vllm:...), too."
    )
    otlp_endpoint: str = Field(
        "",
        pattern=r"^(https?://\S+)?$",
        description="Where traces go: the OTLP/gRPC address of an OpenTelemetry collector, http://HOST:4317. "
        "Empty: no traces.",
    )
    trace_sampling: float = Field(
        1.0, ge=0, le=1, description="Which part of the requests is traced that come without a trace of their own."
    )
    log_format: Literal["text", "json"] = Field("text", description="How log lines are written.")
    log_prompts: bool = Field(False, description="Log prompts and answers with each request.")
    drain_seconds: float = Field(
        30.0, ge=0, description="How long running requests may go on after SIGTERM before they are cancelled."
    )

    @property
    def url_host(self) -> str:
        """The host as it stands before a port."""
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def served_model_names(self) -> tuple[str, ...]:
        return tuple(self.served_model_name.replace(",", " ").split())


class RouterSettings(EdgeSettings, MtlsSettings):
    """One router and the replicas that it drives."""

    shards: tuple[str, ...] = Field(
        description="The replicas, separated by semicolons. A replica is the addresses of its ranks, rank 0 first, "
        "separated by commas: HOST:PORT or unix:PATH; rank 0's alone, if the others listen on the ports that follow. "
        "dns:///NAME:PORT names a replica at every address that NAME has, now and later."
    )
    move_seconds: float = Field(
        30.0,
        ge=0,
        description="How long requests whose replica was lost wait for another one to go on in.",
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
