"""Which tokens would complete a text that a sequence's output must not contain."""

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


class BadWords:
    """Of one sequence. `words` [tokens each], of which there is one at least; `output`: the sequence's so far."""

    def __init__(self, words: Iterable[Sequence[int]], output: Sequence[int]) -> None:
        last: dict[tuple[int, ...], set[int]] = {}
        for *before, final in words:
            last.setdefault(tuple(before), set()).add(final)
        self._last = {before: np.fromiter(tokens, np.int64) for before, tokens in last.items()}
        self._lengths = sorted({len(before) for before in last})
        self._tail = deque(output, maxlen=self._lengths[-1])

    def accept(self, token: int) -> None:
        self._tail.append(token)

    def banned(self) -> list[NDArray[np.int64]]:
        """The tokens that must not come next."""
        tail = tuple(self._tail)
        endings = (tail[len(tail) - length :] for length in self._lengths if length <= len(tail))
        return [self._last[ending] for ending in endings if ending in self._last]
