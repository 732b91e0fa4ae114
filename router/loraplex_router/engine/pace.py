"""When the next plan leaves: late in the running one's time, so that a request that arrives meanwhile is in it, but
early enough that the shards never wait for the router. Pure: no clock.
"""

# The next plan leaves when this share of the running one's time is over, and at least this many seconds before its end.
LEAVES_AT = 0.9
LEAST_LEAD = 0.005


class Pace:
    """Expects of a plan that it takes as long as the last one of about as many tokens took, or less, if it has fewer.
    The times given to it are those of one clock, in seconds."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[int, float]] = {}  # tokens and seconds, by the tokens' first binary digits
        self._began = 0.0

    def begin(self, now: float) -> None:
        """The shards begin a plan."""
        self._began = now

    def end(self, tokens: int, seconds: float, now: float) -> None:
        """A plan has taken so long, and the shards begin the next one that they have."""
        self._last[_about(tokens)] = tokens, seconds
        self._began = now

    def until_next(self, tokens: int, now: float) -> float:
        """The seconds until the next plan is to leave, while one of so many tokens runs. At once, which is 0 or less,
        if nothing is known of such plans."""
        last, seconds = self._last.get(_about(tokens), (tokens, 0.0))
        expected = seconds * min(1, tokens / last)
        return min(LEAVES_AT * expected, expected - LEAST_LEAD) - (now - self._began)


def _about(tokens: int) -> int:
    """Its first three binary digits. Numbers for which these are the same differ by less than a quarter."""
    rest = max(0, tokens.bit_length() - 3)
    return tokens >> rest << rest
