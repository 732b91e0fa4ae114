"""What kernels need to know of the runs of tokens that share an adapter. It holds no adapter, whose memory another one
may take."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loraplex_shard.ops.cuda.lora import tile, widest
from loraplex_shard.shapes.batch import Segment
from loraplex_shard.shapes.layout import HEAD

Key = list[tuple[int, int, int]]  # of each run (start, stop, the adapter's serial)


@dataclass(frozen=True, slots=True)
class Runs:
    key: Key
    tiles: NDArray[np.int64]  # entries of LoraTiles
    widest: int
    int8: bool
    one_by_one: bool  # whether embeddings or norms are those of one adapter after the other
    own_heads: bool  # whether adapters have something to say about the lm head

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> "Runs":
        adapters = [segment.adapter for segment in segments]
        return cls(
            _key(segments),
            tile(segments),
            widest(segments),
            any(adapter.int8 for adapter in adapters),
            any(adapter.own.norms or adapter.own.embedding for adapter in adapters),
            any(adapter.own.head or HEAD in adapter.layers for adapter in adapters),
        )

    def after(self, segments: Sequence[Segment]) -> "Runs":
        """Those of a step after this one: the same if the segments are."""
        return self if self.key == _key(segments) else Runs.of(segments)


def _key(segments: Sequence[Segment]) -> Key:
    return [(start, stop, adapter.serial) for start, stop, adapter in segments]
