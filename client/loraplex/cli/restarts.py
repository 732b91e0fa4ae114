"""When the ranks of a replica are restarted after one of them has ended, and when they are given up. Pure policy: the
caller has the processes and the clock."""

MAX_FAILED_STARTS = 5  # in a row
STEADY_SECONDS = 60.0  # after this much service, earlier ends no longer count
FIRST_DELAY, MAX_DELAY = 0.25, 5.0  # seconds


class Restarts:
    """Is told each time the replica ends. A replica that never served is not restarted: something is wrong with its
    settings. A replica that has served may die any number of times, as long as it becomes ready again in between."""

    def __init__(self) -> None:
        self._has_served = False
        self._ends = 0  # in a row, without steady service in between
        self._failed_starts = 0  # in a row

    def delay(self, served: float | None) -> float | None:
        """Seconds until the next start; None: do not restart. `served` is the number of seconds for which the replica
        was ready; None if it never was."""
        if served is None:
            self._failed_starts += 1
        else:
            self._has_served, self._failed_starts = True, 0
            if served >= STEADY_SECONDS:
                self._ends = 0
        if not self._has_served or self._failed_starts == MAX_FAILED_STARTS:
            return None
        self._ends += 1
        if self._ends == 1:
            return 0.0
        return min(MAX_DELAY, FIRST_DELAY * 2.0 ** (self._ends - 2))

    @property
    def reason(self) -> str:
        """Why the replica is not restarted."""
        if not self._has_served:
            return "before the replica was ready"
        return f"and {self._failed_starts} restarts have failed"
