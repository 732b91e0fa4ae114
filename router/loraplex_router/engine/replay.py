"""What the client of a resumed stream has of a sequence: it comes again, since what follows depends on it. Pure: no
text, no transport."""

import sys
from collections import deque
from collections.abc import Sequence

from loraplex_protos.errors import GenerationError
from loraplex_router.vocabulary.position import Reached, checksum

ALL_EVENTS = sys.maxsize
DIVERGED = "other tokens are generated here than the client has: the stream cannot be resumed. Send a new request"


class Replay:
    """The ends of the deltas that come again. It is true until the last of them has come."""

    def __init__(self, reached: Reached) -> None:
        self._checksum = reached.checksum
        whole = reached.events is None
        ends = (reached.before, ALL_EVENTS), (reached.tokens, ALL_EVENTS if whole else reached.events)
        self._ends = deque((tokens, events) for tokens, events in ends if tokens)

    def __bool__(self) -> bool:
        return bool(self._ends)

    def stop(self) -> None:
        """Nothing more comes again."""
        self._ends.clear()

    def pass_end(self, answer: Sequence[int], finished: bool) -> int | None:
        """If a delta ends with the last of these tokens, how many of its events the client has. `finished`: there will
        be no more tokens. Raises GenerationError if they are not those that the client has."""
        tokens, events = self._ends[0]
        if len(answer) < tokens:
            if finished:
                raise GenerationError(DIVERGED)
            return None
        self._ends.popleft()
        if not self._ends and checksum(answer[:tokens]) != self._checksum:
            raise GenerationError(DIVERGED)
        return events
