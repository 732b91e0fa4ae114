"""What the engine reports to observers: one call per event, none per token."""

from typing import Protocol

from loraplex_protos import shard_pb2 as pb
from loraplex_router.engine.generation import Generation
from loraplex_router.vocabulary.sequence import Plan, Sequence


class EngineObserver(Protocol):
    """The events of one replica's engine. Times are in seconds."""

    def started(self, generation: Generation) -> None:
        """A step was sent that starts the first of its sequences."""

    def started_again(self, generation: Generation, sequence: Sequence) -> None:
        """A step was sent that restarts a sequence, which had been preempted or lost its replica."""

    def first_token(self, generation: Generation) -> None:
        """Its first token has arrived."""

    def ended(self, generation: Generation) -> None:
        """It finished, failed or was cancelled."""

    def planned(self, seconds: float) -> None:
        """The router spent this long planning a step."""

    def step(self, plan: Plan, response: pb.StepResponse) -> None:
        """A step's result has arrived."""

    def applied(self, seconds: float) -> None:
        """The router spent this long applying a step's result."""
