"""What the engine tells whoever watches it: one call per event, none of them per token."""

from typing import Protocol

from loraplex_protos import shard_pb2 as pb
from loraplex_router.engine.output import Generation
from loraplex_router.vocabulary.sequence import Plan, Sequence


class EngineObserver(Protocol):
    """The events of one replica's engine. Times are in seconds."""

    def started(self, generation: Generation) -> None:
        """A step leaves that starts the first of its sequences."""

    def started_again(self, generation: Generation, sequence: Sequence) -> None:
        """A step leaves that starts a sequence anew, which had given up its blocks or lost its replica."""

    def first_token(self, generation: Generation) -> None:
        """Its first token is here."""

    def ended(self, generation: Generation) -> None:
        """It is finished, failed or cancelled."""

    def planned(self, seconds: float) -> None:
        """The router spent this long on planning a step."""

    def step(self, plan: Plan, response: pb.StepResponse) -> None:
        """The result of a step is here."""

    def applied(self, seconds: float) -> None:
        """The router spent this long on a step's result."""
