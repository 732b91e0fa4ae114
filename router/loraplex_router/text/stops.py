"""Stop strings in a text that arrives in pieces."""

from collections.abc import Sequence


class StopMatcher:
    """Passes text on up to the first stop string, or with `include` to its end. Text that may be the beginning of one
    is held back."""

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        assert all(stops)
        self._stops = tuple(stops)
        self.include = include
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """The text that can be shown now, and whether a stop string ends it. Nothing is to be fed after that."""
        if not self._stops:
            return text, False
        text = self._held + text
        found = [(at, len(stop)) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            at, length = min(found)
            return text[: at + length * self.include], True
        shown = len(text) - self._longest_beginning(text)
        self._held = text[shown:]
        return text[:shown], False

    def flush(self) -> str:
        """What was held back, once no more text follows."""
        held, self._held = self._held, ""
        return held

    def _longest_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
