"""Whether the ranks of a replica are alive, as far as their answers show. Pure policy: the clock is the caller's.

Two things are waited for. A ping is answered by a rank's process at once, whatever it computes. A step may take as long
as steps of its size or more took lately, several times over: one that does not end, on a GPU for example, shows in
nothing else. A wait over half of what is plausible is suspicious, and one beyond it is the end of the replica.
"""

from collections import deque
from dataclasses import dataclass

from loraplex_protos.errors import UnavailableError

GRACE_SECONDS = 2.0  # that everything may take longer than is plausible
FACTOR = 5.0  # by which it may take longer than the longest of late
FORGET = 0.98  # what one more answer leaves of how long the longest took
FIRST_STEPS = 50  # that may take as long as the warm-up
WARMUP_SECONDS = 60.0  # without an answer to a ping: everything happens for the first time
COMPILE_SECONDS = 60.0  # in which a GPU's kernel is compiled, whenever one is first needed
IDLE_SECONDS = 60.0  # after which the first step may take as long as a ping in the warm-up: memory may be swapped out
TICK_SECONDS = 0.1
LONGEST_TICK = 0.2  # a longer one means that the router itself stood still


class SilentError(UnavailableError):
    """A replica does not answer any more."""


@dataclass(frozen=True, slots=True)
class Silence:
    """The worst of the waits that go on."""

    waiting_for: str
    seconds: float
    limit: float

    @property
    def suspicious(self) -> bool:
        return self.seconds > self.limit / 2

    @property
    def final(self) -> bool:
        return self.seconds > self.limit

    def __str__(self) -> str:
        return f"{self.waiting_for} for {self.seconds:.1f} s"


class Longest:
    """The longest of some durations, of which old ones are forgotten."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        self.seconds = max(seconds, self.seconds * FORGET)


class Pulse:
    """Is told what leaves and what arrives. Its time stands still while the router does, so that answers which nobody
    could read are not missed. `compiles`: kernels are compiled when they are first needed."""

    def __init__(self, ranks: int, compiles: bool) -> None:
        self._now = 0.0
        self._pings: list[float | None] = [None] * ranks  # since when each rank owes an answer
        self._longest_ping = Longest()
        self._plans: deque[tuple[float, int]] = deque()  # when each left that was not answered, and its tokens
        self._answered = 0.0  # when all ranks last answered a plan
        self._steps = 0
        self._longest_steps: dict[int, Longest] = {}  # by the tokens' number of bits
        self._warmup: float | None = None  # how long it took; None before its end
        self._step_grace = COMPILE_SECONDS if compiles else GRACE_SECONDS

    def tick(self, seconds: float) -> None:
        """So much time has passed since the last tick."""
        self._now += min(seconds, LONGEST_TICK)

    def pinged(self, rank: int) -> None:
        self._pings[rank] = self._now

    def answered(self, rank: int) -> None:
        """A rank has answered its ping."""
        since = self._pings[rank]
        assert since is not None
        self._longest_ping.add(self._now - since)
        self._pings[rank] = None

    def warmed_up(self) -> None:
        """The warm-up, which began with the first tick, has ended: it was a step of the largest size, and more."""
        self._warmup = self._answered = self._now

    def sent(self, tokens: int) -> None:
        """A plan has left for all ranks."""
        self._plans.append((self._now, tokens))

    def stepped(self) -> None:
        """All ranks have answered the next plan."""
        sent, tokens = self._plans.popleft()
        if not self._after_idle(sent):
            self._longest_steps.setdefault(tokens.bit_length(), Longest()).add(self._since(sent))
        self._answered = self._now
        self._steps += 1

    @property
    def idle(self) -> bool:
        """No plan is unanswered."""
        return not self._plans

    def silence(self) -> Silence:
        """The worst wait, by what is plausible for it."""
        waits = [Silence("nothing has been waited for", 0.0, GRACE_SECONDS)]
        for rank, since in enumerate(self._pings):
            if since is not None:  # an answer to a plan is as good as one to a ping
                waits.append(Silence(f"rank {rank} has not answered", self._since(since), self._ping_limit()))
        if self._plans:
            sent, tokens = self._plans[0]
            limit = self._step_limit(tokens, self._after_idle(sent))
            waits.append(Silence(f"a step of {tokens} tokens has not ended", self._since(sent), limit))
        return max(waits, key=lambda wait: wait.seconds / wait.limit)

    def _since(self, time: float) -> float:
        return self._now - max(time, self._answered)

    def _after_idle(self, sent: float) -> bool:
        """Whether no step had ended for long when a plan left."""
        return sent - self._answered > IDLE_SECONDS

    def _ping_limit(self) -> float:
        return WARMUP_SECONDS if self._warmup is None else GRACE_SECONDS + FACTOR * self._longest_ping.seconds

    def _step_limit(self, tokens: int, after_idle: bool) -> float:
        """The more tokens a step has, the longer it takes: those with more have a say, too."""
        bits = tokens.bit_length()
        seen = [longest.seconds for more, longest in self._longest_steps.items() if more >= bits]
        if self._steps < FIRST_STEPS or not seen:
            seen.append(self._warmup or 0.0)
        grace = max(self._step_grace, WARMUP_SECONDS) if after_idle else self._step_grace
        return grace + FACTOR * max(seen)
