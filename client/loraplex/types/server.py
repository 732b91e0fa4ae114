"""What the server says of its model and adapters."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class Classifier:
    """The linear layer on the last hidden states that classifies, of the model or of an adapter."""

    of_tokens: bool
    """It classifies each token by itself, not the input as a whole."""
    labels: tuple[str, ...]


class AdapterTier(StrEnum):
    """The fastest place that holds an adapter's weights."""

    DISK = "disk"
    """In the server's adapter directory or download cache."""
    HOST = "host"
    """Checked and partitioned for the ranks, in host memory."""
    DEVICE = "device"
    """In a slot on the device: the next request starts at once."""


class AdapterState(StrEnum):
    """An adapter's state."""

    AVAILABLE = "available"
    """On the server's disk: in its adapter directory or, for a version in the registry, fetched."""
    FETCHING = "fetching"
    """On its way to disk or into host memory."""
    LOADED = "loaded"
    UNLOADING = "unloading"
    """Will be unloaded once the sequences that need it have ended."""
    BROKEN = "broken"
    """In the server's adapter directory, but cannot be served: `reason` says why."""
    REGISTERED = "registered"
    """A version in the server's registry that is neither loaded nor on disk."""
    ALIAS = "alias"
    """A name in the server's registry that stands for `targets`."""
    FAILED = "failed"
    """A version in the server's registry that cannot be fetched or served: `reason` says why."""


@dataclass(frozen=True, slots=True)
class AdapterResidence:
    """An adapter in one of the server's replicas."""

    replica: str
    """The replica's address."""
    tier: AdapterTier
    running_sequences: int
    waiting_sequences: int
    pinned: bool


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that the server has."""

    id: str
    source: str
    """Where it came from, such as "local" or "hub"; "merged" for merged adapters."""
    revision: str
    """The commit that a hub adapter was resolved to."""
    digest: str
    """sha256 over its files; empty while it is only on disk."""
    tier: AdapterTier | None
    """None while it is being fetched."""
    lora_rank: int
    """The largest lora_rank of its layers."""
    size_bytes: int
    """Bytes in host memory, over all ranks."""
    running_sequences: int
    waiting_sequences: int
    state: AdapterState
    requests: int
    """Number of waiting and running requests."""
    last_used: float | None
    """When a request last arrived or ended, in seconds since 1970; None if not since it was loaded."""
    pinned: bool
    """Whether it stays on one replica's device."""
    residences: tuple[AdapterResidence, ...]
    """The replicas that have it in memory."""
    warnings: tuple[str, ...] = ()
    """Possible problems that do not prevent serving, for example that it was made for another model."""
    reason: str = ""
    """Why it is broken, has failed, or is not fetched yet."""
    fetched_bytes: int | None = None
    """How much of its files is on disk while it is fetched; None if that is not known."""
    total_bytes: int | None = None
    """The size of its files while it is fetched; None if that is not known."""
    invocation: str = ""
    """What in a prompt activates it (aLoRA): before the last place of it, the base model computes. Empty: it is always
    active."""
    invocation_token_ids: tuple[int, ...] = ()
    """The same as tokens."""
    classifier: Classifier | None = None
    """Its own, if it was trained to classify; known once it is loaded."""
    targets: Mapping[str, float] = field(default_factory=dict)
    """Of an alias: what it stands for, and the share of sessions that get it, in per cent."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The server's model and its limits."""

    model_id: str
    architecture: str
    dtype: str
    vocab_size: int
    max_model_len: int
    """Limit on prompt and output tokens together."""
    tensor_parallel_size: int
    kv_block_size: int
    """Token positions per block."""
    kv_blocks: int
    max_batch_tokens: int
    max_adapters_on_device: int
    version: str
    has_chat_template: bool
    served_model_names: tuple[str, ...]
    """The model's names on OpenAI's routes: answers have the first, requests may use any."""
    adapter_sources: tuple[str, ...]
    """The names of the adapter sources, in the order in which they are searched."""
    modeling_code: str
    """Whose code computes it: "loraplex", which is faster, or "transformers"."""
    embeds_only: bool
    """The model has no lm head: it answers `embed`, and `classify` if it has a classifier; it refuses `generate`."""
    state_bytes: int
    """Size of what the model keeps for each sequence besides its blocks, on each rank. If it is not 0, no prefixes are
    reused."""
    memory_bytes: int
    """A rank's memory when it started: all of its GPU, or what the host had free."""
    kv_cache_bytes: int
    """What of it the KV cache has."""
    adapter_bytes: int
    """What of it adapters in slots may take; without a GPU, the staged ones."""
    step_bytes: int
    """What of it the largest steps take; 0 without a GPU, where it is not measured."""
    classifier: Classifier | None = None
    """The model's, if it was trained to classify."""
