"""Finds stop strings in a text that arrives in pieces, some of which are not shown."""

from collections.abc import Iterator, Sequence
from itertools import compress
from typing import NamedTuple


class Passed(NamedTuple):
    """The part of a text that is certain now."""

    text: str  # newly certain text that is shown
    length: int  # characters, including those that are not shown
    stopped: bool  # a stop string ends it


class StopMatcher:
    """Passes text on up to the first stop string or, with `include`, to the end of it. Text that may be the beginning
    of a stop string is held back.

    Stop strings are matched against everything generated, where a piece that is not shown (a special token) matches
    only as a whole; and also against the shown text alone. The first one to be complete wins, however the text was
    split.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        assert all(stops)
        self.include = include
        self.found: str | None = None  # the stop string that ended the text
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self._shown: list[bool] = []  # for each held character, whether it is shown
        self._seams: list[bool] = []  # for each held character, whether a stop string may begin here, or end before it
        self._too_early = 0  # number of held characters in which no stop string may end

    def feed(self, text: str, *, shown: bool = True, too_early: bool = False) -> Passed:
        """Takes the next piece. A piece that is `too_early` can begin a stop string, but not end it. Must not be called
        after a stop."""
        if not self._stops:
            return Passed(text if shown else "", len(text), False)
        self._held += text
        self._shown += [shown] * len(text)
        self._seams += [shown or not at for at in range(len(text))]
        if too_early:
            self._too_early = len(self._held)
            return self._pass(self._certain(), False)
        end, start, self.found = min(self._matches(), default=(0, 0, None))
        if self.found is not None:
            return self._pass(end if self.include else start, True)
        return self._pass(self._certain(), False)

    def flush(self) -> Passed:
        """The held-back text, once no more text follows."""
        return self._pass(len(self._held), False)

    def _pass(self, length: int, stopped: bool) -> Passed:
        text = "".join(compress(self._held[:length], self._shown))
        self._held, self._shown, self._seams = self._held[length:], self._shown[length:], self._seams[length:]
        self._too_early = max(0, self._too_early - length)
        return Passed(text, length, stopped)

    def _views(self) -> list[tuple[str, Sequence[int]]]:
        """Texts to match stop strings against, each with the positions of its characters in the held text."""
        everything = range(len(self._held))
        if all(self._shown):
            return [(self._held, everything)]
        return [
            (self._held, everything),
            ("".join(compress(self._held, self._shown)), [*compress(everything, self._shown)]),
        ]

    def _matches(self) -> Iterator[tuple[int, int, str]]:
        """(end, start, stop string): the first match of each stop string that does not come too early."""
        for text, places in self._views():
            for stop in self._stops:
                at = text.find(stop)
                while at >= 0:
                    start, end = places[at], places[at + len(stop) - 1] + 1
                    if end > self._too_early and self._seams[start] and (end == len(self._held) or self._seams[end]):
                        yield end, start, stop
                        break
                    at = text.find(stop, at + 1)

    def _certain(self) -> int:
        """The length of the held text that cannot be part of a stop string."""
        certain = len(self._held)
        for text, places in self._views():
            if beginning := self._longest_beginning(text):
                certain = min(certain, places[len(text) - beginning])
        return certain

    def _longest_beginning(self, text: str) -> int:
        """Length of the longest suffix of `text` that is a prefix of a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
