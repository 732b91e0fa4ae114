"""What observers of the replicas are told."""

from typing import Protocol

from loraplex_router.engine.generation import Generation
from loraplex_router.engine.observer import EngineObserver
from loraplex_router.replicas.replica import Replica
from loraplex_router.wire.shards import ShardsObserver


class ReplicaObserver(EngineObserver, ShardsObserver, Protocol):
    """The events of one replica's engine and shards."""


class Observer(Protocol):
    """The events of all replicas."""

    def replica(self, name: str) -> ReplicaObserver:
        """The observer of the replica with this name."""

    def watch(self, replica: Replica) -> None:
        """A replica has become ready."""

    def forget(self, name: str) -> None:
        """A replica is gone, or could not be reached."""

    def silent(self) -> None:
        """A replica has not answered for a while."""

    def lost(self, reason: str) -> None:
        """A replica that was ready is gone: it stopped, failed, or was silent for too long."""

    def ended(self, generation: Generation) -> None:
        """A generation has ended while it was on no replica."""
