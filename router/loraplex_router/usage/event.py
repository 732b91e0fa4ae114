"""What one request has used."""

import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from loraplex_router.engine.generation import Generation

LOST = "lost"  # with its router


@dataclass(frozen=True, slots=True)
class Used:
    """What ended requests took, those that were cancelled included. Those that never ran took nothing."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of these, found in the prefix cache
    generated_tokens: int = 0

    def __add__(self, other: "Used") -> "Used":
        return Used(*(own + its for own, its in zip(self.values, other.values, strict=True)))

    def beyond(self, counted: int | None) -> "Used":
        """What is new if so many generated tokens, and the rest, were counted before; None: nothing was."""
        return self if counted is None else Used(generated_tokens=max(0, self.generated_tokens - counted))

    @property
    def values(self) -> tuple[int, int, int, int]:
        return self.requests, self.prompt_tokens, self.cached_tokens, self.generated_tokens


class Counted(NamedTuple):
    """What an event adds to the totals. `id` is the event's: if its router dies while it tells of it, another router
    tells of it again."""

    id: str
    used: Used


@dataclass(frozen=True, slots=True)
class UsageEvent:
    """A request that has ended here, or one of its adapters. A stream that ended in several routers has an event of
    each, with what the others have not counted."""

    ended: float  # by time.time
    request_id: str
    tenant: str
    adapter: str
    digest: str
    version: str  # of the adapter registry
    outcome: str  # "finished", "cancelled", LOST, or the error's type
    finish: tuple[str, ...] = ()  # why each answer ended
    queue_seconds: float | None = None
    first_token_seconds: float | None = None  # since its arrival
    seconds: float | None = None  # since its arrival

    def describe(self, counted: Counted) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "id": counted.id,
            "time": datetime.fromtimestamp(self.ended, UTC).isoformat(timespec="milliseconds"),
            "request_id": self.request_id,
            "tenant": self.tenant or None,
            "adapter": self.adapter,
            "digest": self.digest or None,
            "version": self.version or None,
            "outcome": self.outcome,
            "finish": list(self.finish),
            **asdict(counted.used),
            "queue_ms": _milliseconds(self.queue_seconds),
            "first_token_ms": _milliseconds(self.first_token_seconds),
            "duration_ms": _milliseconds(self.seconds),
        }


def used_by(generation: Generation) -> Used:
    """What a generation has used so far, with all that others had generated of it."""
    generated = sum(output.generated for output in generation.outputs)
    return Used(1, generation.prompt_length, generation.outputs[0].sequence.prefix_hit, generated)


def event_of(generation: Generation, outcome: str, now: float) -> UsageEvent:
    """Of a generation that has ended now, by time.monotonic."""
    started, first = generation.started, generation.first_token
    return UsageEvent(
        time.time(),
        generation.request_id,
        generation.tenant,
        generation.adapter_name,
        generation.adapter_digest,
        generation.adapter_version,
        outcome,
        tuple(output.finish_reason.name.lower() for output in generation.outputs if output.finish_reason),
        (now if started is None else started) - generation.validated,
        None if first is None else first - generation.arrived,
        now - generation.arrived,
    )


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 1)
