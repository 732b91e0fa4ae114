"""Why sequences of a step cannot go on. Each of them ends alone, whatever it was."""

import numpy as np
from numpy.typing import NDArray

from loraplex_protos.shard_pb2 import FailureReason, StepResponse
from loraplex_shard.stepping.rows import Ints


class Failures:
    """One reason per chunk of a plan, for those that have failed; the first that is found counts."""

    def __init__(self, chunks: int) -> None:
        self._reasons: Ints = np.zeros(chunks, np.int64)

    def add(self, places: Ints, reason: FailureReason.ValueType) -> None:
        self._reasons[places] = np.where(self._reasons[places], self._reasons[places], reason)

    def spare(self, places: Ints) -> NDArray[np.bool_]:
        """Which of these chunks have not failed."""
        spared: NDArray[np.bool_] = self._reasons[places] == 0
        return spared

    def write(self, response: StepResponse) -> None:
        failed = np.flatnonzero(self._reasons)
        response.failed_chunks.extend(failed.tolist())
        response.failure_reasons.extend(self._reasons[failed].tolist())
