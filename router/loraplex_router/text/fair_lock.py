"""A lock that goes to those who have held it least: who holds it for long delays others by one turn, not by many."""

import asyncio
import time
from asyncio import Future
from bisect import bisect_left, insort


class _Name:
    """A tenant or one of its matters, while somebody waits for the lock or holds it in its name."""

    def __init__(self, key: str, held: float, number: int) -> None:
        self.key = key
        self.held = held  # seconds
        self.number = number  # of its oldest turn
        self._names: dict[str, _Name] = {}  # a tenant's matters
        self._below: list[tuple[float, int, _Name]] = []  # these, or a matter's turns: least held, then oldest first

    def __len__(self) -> int:
        return len(self._below)

    @property
    def first(self) -> "_Name":
        return self._below[0][-1]

    def get(self, key: str) -> "_Name | None":
        return self._names.get(key)

    def find(self, key: str, number: int) -> "_Name":
        """A name below, maybe a new one."""
        if (found := self._names.get(key)) is None:
            found = self._names[key] = _Name(key, self.first.held if self._below else 0.0, number)
            self.add(found)
        return found

    def add(self, below: "_Name") -> None:
        insort(self._below, (below.held, below.number, below))

    def leave(self, below: "_Name", seconds: float) -> None:
        """A turn of the name below has ended, after which it may have others."""
        del self._below[bisect_left(self._below, (below.held, below.number))]
        if below._below:
            below.held, below.number = below.held + seconds, below.first.number
            self.add(below)
        else:
            self._names.pop(below.key, None)


class Turn(_Name):
    """Somebody who waits for the lock, and then holds it."""

    def __init__(self, number: int, names: tuple[_Name, ...]) -> None:
        super().__init__("", 0.0, number)
        self.names = names  # in which it waits, the smallest first
        self.came: Future[None] = asyncio.get_running_loop().create_future()
        self.began = 0.0


class FairLock:
    """Fair by time among tenants and, within a tenant, among its matters. A newcomer counts as having held the lock as
    long as the least of those who wait, so that nobody saves up time. However many wait, a turn costs about the
    same."""

    def __init__(self) -> None:
        self._holder: Turn | None = None
        self._tenants = _Name("", 0.0, 0)
        self._turns = 0

    def count_waiting(self, tenant: str, matter: str) -> int:
        found = self._tenants.get(tenant)
        found = found and found.get(matter)
        return len(found) - (self._holder is not None and found in self._holder.names) if found else 0

    async def acquire(self, tenant: str, matter: str) -> Turn:
        """Waits for a turn, which must be given to `release`. One that is cancelled while it waits costs nothing."""
        self._turns += 1
        its_tenant = self._tenants.find(tenant, self._turns)
        its_matter = its_tenant.find(matter, self._turns)
        turn = Turn(self._turns, (its_matter, its_tenant, self._tenants))
        its_matter.add(turn)
        self._pass_on()
        try:
            await turn.came
        except BaseException:
            if turn is self._holder:
                self.release(turn)
            else:
                _leave(turn, 0.0)
            raise
        return turn

    def release(self, turn: Turn) -> None:
        _leave(turn, time.monotonic() - turn.began)
        self._holder = None
        self._pass_on()

    def _pass_on(self) -> None:
        if self._holder is None and len(self._tenants):
            turn = self._tenants.first.first.first
            assert isinstance(turn, Turn)
            self._holder, turn.began = turn, time.monotonic()
            if not turn.came.done():  # else it has been cancelled, and is about to give the lock back
                turn.came.set_result(None)


def _leave(turn: Turn, seconds: float) -> None:
    below: _Name = turn
    for name in turn.names:
        name.leave(below, seconds)
        below = name
