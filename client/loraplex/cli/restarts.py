"""When the ranks of a replica are started again after one of them ended, and when they are given up. Pure policy: the
caller has the processes and the clock."""

MOST_FAILED_STARTS = 5  # in a row
STEADY_SECONDS = 60.0  # of service, after which what happened before does not count any more
FIRST_DELAY, LONGEST_DELAY = 0.25, 5.0  # seconds


class Restarts:
    """Told of each end of the replica. A replica that never served is not started again: what is wrong with it is in
    what it was told. One that did may die any number of times, as long as it gets ready again in between."""

    def __init__(self) -> None:
        self._has_served = False
        self._ends = 0  # in a row, none of them after steady service
        self._failed_starts = 0  # in a row

    def delay(self, served: float | None) -> float | None:
        """The seconds until the next start, or None if there is to be none. `served`: for how many seconds the replica
        was ready; None if it ended before it was."""
        if served is None:
            self._failed_starts += 1
        else:
            self._has_served, self._failed_starts = True, 0
            if served >= STEADY_SECONDS:
                self._ends = 0
        if not self._has_served or self._failed_starts == MOST_FAILED_STARTS:
            return None
        self._ends += 1
        if self._ends == 1:
            return 0.0
        return min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** (self._ends - 2))

    @property
    def reason(self) -> str:
        """Why there is no next start."""
        if not self._has_served:
            return "before the replica was ready"
        return f"and the replica was not ready again in {self._failed_starts} starts"
