"""Whether a replica's ranks are alive, judged by their answers. Pure policy: the caller has the clock.

Two kinds of answers are awaited. Pings are answered at once, whatever a rank computes. A step may take several times as
long as recent steps of at least its size: a step that hangs, on a GPU for example, shows in no other way. A wait of
more than half its limit is suspicious; beyond its limit, the replica is given up.
"""

from collections import deque
from dataclasses import dataclass

from loraplex_protos.errors import UnavailableError

GRACE_SECONDS = 2.0  # added to every limit
FACTOR = 5.0  # a step's limit, as a multiple of the longest recent one
FORGET = 0.98  # decay of the longest duration, per answer
FIRST_STEPS = 50  # these may take as long as the longest one of the warm-up
FIRST_SECONDS = 60.0  # the limit for a ping before the first step
COMPILE_SECONDS = 60.0  # for compiling a GPU kernel on first use
IDLE_SECONDS = 60.0  # idle time after which a step may take as long as the first ping: memory may be swapped out
TICK_SECONDS = 0.1
LONGEST_TICK = 0.2  # a longer one means that the router itself was suspended


class SilentError(UnavailableError):
    """A replica no longer answers."""


@dataclass(frozen=True, slots=True)
class Silence:
    """The worst of the current waits."""

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
    """The longest of some durations, with old ones forgotten."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        self.seconds = max(seconds, self.seconds * FORGET)


class Pulse:
    """Is told what is sent and received. Its time stops while the router is suspended, so that answers which nobody
    could read do not count as missing. `compiles`: kernels are compiled on first use. `longest_step`: seconds that one
    of the largest steps took when the ranks warmed up."""

    def __init__(self, ranks: int, compiles: bool, longest_step: float) -> None:
        self._now = 0.0
        self._pings: list[float | None] = [None] * ranks  # since when each rank owes an answer, if it does
        self._longest_ping = Longest()
        self._plans: deque[tuple[float, int]] = deque()  # unanswered ones: time sent, number of tokens
        self._answered = 0.0  # when all ranks last answered a plan
        self._steps = 0
        self._longest_steps: dict[int, Longest] = {}  # by the tokens' number of bits
        self._longest_step = longest_step
        self._begun = False  # plans may be sent
        self._step_grace = COMPILE_SECONDS if compiles else GRACE_SECONDS

    def tick(self, seconds: float) -> None:
        """Advances the time by `seconds`, since the last tick."""
        self._now += min(seconds, LONGEST_TICK)

    def pinged(self, rank: int) -> None:
        self._pings[rank] = self._now

    def answered(self, rank: int) -> None:
        """A rank has answered its ping."""
        since = self._pings[rank]
        assert since is not None
        self._longest_ping.add(self._now - since)
        self._pings[rank] = None

    def begin(self) -> None:
        """The ranks are ready for plans."""
        self._begun = True
        self._answered = self._now

    def sent(self, tokens: int) -> None:
        """A plan was sent to all ranks."""
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
        """Whether all plans are answered."""
        return not self._plans

    def silence(self) -> Silence:
        """The worst current wait, relative to its limit."""
        waits = [Silence("no answer has been due", 0.0, GRACE_SECONDS)]
        for rank, since in enumerate(self._pings):
            if since is not None:  # an answer to a plan counts as one to a ping
                waits.append(Silence(f"rank {rank} has not answered", self._since(since), self._ping_limit()))
        if self._plans:
            sent, tokens = self._plans[0]
            limit = self._step_limit(tokens, self._after_idle(sent))
            waits.append(Silence(f"a step of {tokens} tokens has not completed", self._since(sent), limit))
        return max(waits, key=lambda wait: wait.seconds / wait.limit)

    def _since(self, time: float) -> float:
        return self._now - max(time, self._answered)

    def _after_idle(self, sent: float) -> bool:
        """Whether the replica had been idle for long when a plan was sent."""
        return sent - self._answered > IDLE_SECONDS

    def _ping_limit(self) -> float:
        return GRACE_SECONDS + FACTOR * self._longest_ping.seconds if self._begun else FIRST_SECONDS

    def _step_limit(self, tokens: int, after_idle: bool) -> float:
        """The limit for a step of this size. Larger steps take longer, so their durations count, too."""
        bits = tokens.bit_length()
        seen = [longest.seconds for more, longest in self._longest_steps.items() if more >= bits]
        if self._steps < FIRST_STEPS or not seen:
            seen.append(self._longest_step)
        grace = max(self._step_grace, FIRST_SECONDS) if after_idle else self._step_grace
        return grace + FACTOR * max(seen)
