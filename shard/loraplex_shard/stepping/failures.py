"""Why sequences of a step cannot go on. Each of them ends alone, whatever it was."""

import numpy as np
from numpy.typing import NDArray

from loraplex_protos.shard_pb2 import FailureReason, StepResponse
from loraplex_shard.stepping.lineup import Ints


class Failures:
    """One reason per chunk of a plan, for those that have failed; the first that is found counts."""

    def __init__(self) -> None:
        self._reasons: dict[int, FailureReason.ValueType] = {}

    def add(self, places: Ints, reason: FailureReason.ValueType) -> None:
        for place in places.tolist():
            self._reasons.setdefault(place, reason)

    def __bool__(self) -> bool:
        """Whether any chunk has failed."""
        return bool(self._reasons)

    def spare(self, places: Ints) -> NDArray[np.bool_]:
        """Which of these chunks have not failed."""
        return ~np.isin(places, list(self._reasons))

    def write(self, response: StepResponse) -> None:
        for place, reason in sorted(self._reasons.items()):
            response.failed_chunks.append(place)
            response.failure_reasons.append(reason)
