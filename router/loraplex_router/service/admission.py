"""Which requests may wait: the limit of the queue, and deadlines that cannot be met."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from loraplex_protos.errors import DeadlineError, FieldViolation, InvalidRequestError, OverloadedError
from loraplex_router.access.tenant import Tenant
from loraplex_router.replicas.replicas import Replicas
from loraplex_router.vocabulary.request import Request


@dataclass(slots=True)
class Room:
    """A call's room in the queue: for those of its sequences that are admitted and not queued yet."""

    tenant: Tenant
    background: bool
    sequences: int = 0


class Admission:
    """`max_queue`: how many sequences may wait."""

    def __init__(self, replicas: Replicas, max_queue: int) -> None:
        self.max_queue = max_queue
        self._replicas = replicas
        self._num_rooms = 0
        self._preparing = Counter[str]()  # the sequences of all rooms, by tenant

    @property
    def idle(self) -> bool:
        return not self._num_rooms

    def most(self, background: bool) -> int:
        """How many sequences may wait if there are no others: those of background requests get half of the queue."""
        return max(1, self.max_queue // 2) if background else self.max_queue

    @contextmanager
    def room(self, sequences: int, tenant: Tenant, background: bool) -> Iterator[Room]:
        """A context in which a call's sequences are prepared and then queued. Raises OverloadedError if not all of them
        may wait now."""
        if reason := self._refusal(sequences, tenant, background):
            raise OverloadedError(reason)
        room = Room(tenant, background)
        self._num_rooms += 1
        self._resize(room, sequences)
        try:
            yield room
        finally:
            self._num_rooms -= 1
            self._resize(room, -room.sequences)
            self._replicas.changes.notify()

    def queued(self, room: Room, sequences: int) -> None:
        """So many of its sequences wait in the queue now."""
        self._resize(room, -sequences)

    async def extend(self, room: Room) -> None:
        """Makes room for one more sequence, once it may wait."""
        await self._replicas.changes.until(lambda: not self._refusal(1, room.tenant, room.background))
        self._resize(room, 1)

    def _resize(self, room: Room, sequences: int) -> None:
        room.sequences += sequences
        self._preparing[room.tenant.name] += sequences

    def _refusal(self, sequences: int, tenant: Tenant, background: bool) -> str:
        """Why so many more may not wait; empty if they may. Where the queue is full, a tenant that has less than its
        share of it may still wait."""
        total = self._replicas.num_waiting + self._preparing.total() + sequences
        if total <= self.most(background):
            return ""
        if background:
            return "half of the queue is full, which is what background requests may use: try again later"
        waiting = self._replicas.waiting_by_tenant() + self._preparing
        share = self.max_queue // len({*waiting, tenant.name})
        if waiting[tenant.name] + sequences <= share:
            return ""
        return f"the queue is full ({waiting.total()} sequences are waiting): try again later"


def count_sequences(requests: Sequence[Request], most: int) -> int:
    """Those of all requests of a call. Raises InvalidRequestError if there are more than may ever wait."""
    count = sum(request.n * max(1, len(request.adapters)) for request in requests)
    if count > most:
        one = requests[0]
        field = "prompt" if len(requests) > 1 else "adapters" if one.adapters else "n"
        what = "of background requests " if one.background else ""
        many = f"asks for {count} answers in all, but at most {most} {what}fit into the queue"
        fix = "ask for fewer at a time, or start the server with a larger --max-queue"
        raise InvalidRequestError(FieldViolation(field, f"{many}: {fix}"))
    return count


def check_deadline(request: Request, waited: float) -> None:
    """Raises DeadlineError if the request would wait until its deadline, as those before it have, in seconds."""
    if request.deadline is not None and waited and waited > (left := request.deadline - time.monotonic()):
        raise DeadlineError(
            f"the requests before it have waited for {waited:.1f} s, but its deadline is in {left:.1f} s: allow more"
            " time, or try again later"
        )
