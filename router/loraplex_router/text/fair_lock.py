"""A lock that goes to those who have held it least: who holds it for long delays others by one turn, not by many."""

import asyncio
import time
from asyncio import Future
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Turn:
    """Somebody who waits for the lock, and then holds it."""

    tenant: str
    matter: str
    number: int
    came: Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    began: float = 0.0

    @property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """Those in whose name it waits, the largest first."""
        return (self.tenant,), (self.tenant, self.matter)


class FairLock:
    """Fair by time among tenants and, within a tenant, among its matters. A newcomer counts as having held the lock as
    long as the least of those who wait, so that nobody saves up time."""

    def __init__(self) -> None:
        self._holder: Turn | None = None
        self._waiting: list[Turn] = []
        self._held: dict[tuple[str, ...], float] = {}  # seconds, by the names of those who wait or hold it
        self._turns = 0

    def count_waiting(self, tenant: str, matter: str) -> int:
        return sum((turn.tenant, turn.matter) == (tenant, matter) for turn in self._waiting)

    async def acquire(self, tenant: str, matter: str) -> Turn:
        """Waits for a turn, which must be given to `release`. One that is cancelled while it waits costs nothing."""
        self._turns += 1
        turn = Turn(tenant, matter, self._turns)
        for name in turn.names:
            others = [held for other, held in self._held.items() if other[:-1] == name[:-1]]
            self._held.setdefault(name, min(others, default=0.0))
        self._waiting.append(turn)
        self._pass_on()
        try:
            await turn.came
        except BaseException:
            if turn is self._holder:
                self.release(turn)
            else:
                self._waiting.remove(turn)
                self._forget(turn)
            raise
        return turn

    def release(self, turn: Turn) -> None:
        for name in turn.names:
            self._held[name] += time.monotonic() - turn.began
        self._holder = None
        self._forget(turn)
        self._pass_on()

    def _pass_on(self) -> None:
        waiting = [turn for turn in self._waiting if not turn.came.cancelled()]
        if self._holder is None and waiting:
            turn = min(waiting, key=lambda turn: (*(self._held[name] for name in turn.names), turn.number))
            self._waiting.remove(turn)
            self._holder, turn.began = turn, time.monotonic()
            turn.came.set_result(None)

    def _forget(self, left: Turn) -> None:
        others = [*self._waiting, self._holder] if self._holder else self._waiting
        present = {name for turn in others for name in turn.names}
        for name in left.names:
            if name not in present:
                del self._held[name]
