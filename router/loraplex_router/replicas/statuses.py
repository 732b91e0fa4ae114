"""What a listing says of an adapter."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from loraplex_router.vocabulary.adapter import Adapter, LocalAdapter


class Tier(Enum):
    """The fastest place that holds an adapter."""

    DISK = 1
    HOST = 2
    DEVICE = 3


class State(Enum):
    """What happens to an adapter."""

    AVAILABLE = 1  # in the adapter directory
    FETCHING = 2  # on its way into host memory
    LOADED = 3
    UNLOADING = 4  # as soon as nothing needs it
    BROKEN = 5  # in the adapter directory, but it cannot be served


@dataclass(frozen=True, slots=True)
class Residence:
    """An adapter in one replica."""

    replica: str
    adapter: Adapter

    @property
    def tier(self) -> Tier:
        return Tier.DEVICE if self.adapter.ready else Tier.HOST


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """One line of a listing. `digest` is empty, and nothing else known, of what is only on disk or being fetched."""

    id: str
    source: str
    revision: str
    digest: str
    state: State
    residences: tuple[Residence, ...] = ()
    warnings: tuple[str, ...] = ()  # what may be wrong with it though it is served
    reason: str = ""  # why it is broken

    @property
    def tier(self) -> Tier | None:
        """None while it is being fetched."""
        on_disk = None if self.state is State.FETCHING else Tier.DISK
        return max((residence.tier for residence in self.residences), key=lambda tier: tier.value, default=on_disk)

    @property
    def lora_rank(self) -> int:
        return max((adapter.lora_rank for adapter in self._adapters), default=0)

    @property
    def size_bytes(self) -> int:
        """In the host memory of one replica, over all ranks."""
        return max((adapter.size_bytes for adapter in self._adapters), default=0)

    @property
    def requests(self) -> int:
        """That wait or run."""
        return sum(adapter.requests for adapter in self._adapters)

    @property
    def running(self) -> int:
        return sum(adapter.running for adapter in self._adapters)

    @property
    def waiting(self) -> int:
        return sum(adapter.waiting for adapter in self._adapters)

    @property
    def last_used(self) -> float:
        """When a request with it last came or ended, in seconds since 1970; 0 if never."""
        return max((adapter.last_used for adapter in self._adapters), default=0.0)

    @property
    def pinned(self) -> bool:
        return any(adapter.pinned for adapter in self._adapters)

    @property
    def _adapters(self) -> Iterator[Adapter]:
        return (residence.adapter for residence in self.residences)


def status_on_disk(adapter: LocalAdapter) -> AdapterStatus:
    """Of one that lies in the adapter directory, and is not loaded."""
    state = State.BROKEN if adapter.fault else State.AVAILABLE
    return AdapterStatus(adapter.id, "local", "", "", state, warnings=adapter.warnings, reason=adapter.fault)
