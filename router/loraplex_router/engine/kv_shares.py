"""How many blocks tenants hold that may hold a share of a replica's only. Pure policy.

Others go first: while they wait, a tenant starts no sequence that would exceed its share, and if they lack blocks, what
exceeds it is preempted. What nobody else wants, it may use. It may always run one sequence, however long.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from loraplex_router.vocabulary.sequence import Sequence


@dataclass(slots=True, eq=False)
class _Held:
    sequences: int = 0
    blocks: Counter[int] = field(default_factory=Counter)  # by how many of them each is held: it counts once


class KvShares:
    """`num_blocks`: of the replica."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._held: dict[str, _Held] = {}  # by tenant; of sequences without such a share, nothing is counted

    def __bool__(self) -> bool:
        """Whether any tenant with such a share holds blocks."""
        return bool(self._held)

    def start(self, sequence: Sequence) -> None:
        """The sequence runs, with the blocks that it has."""
        if sequence.kv_share < 1:
            self._held.setdefault(sequence.tenant, _Held()).sequences += 1
            self.hold(sequence, sequence.blocks)

    def hold(self, sequence: Sequence, blocks: Iterable[int]) -> None:
        """It gets these blocks."""
        if sequence.kv_share < 1:
            self._held[sequence.tenant].blocks.update(blocks)

    def stop(self, sequence: Sequence) -> None:
        """It gives up its blocks."""
        if sequence.kv_share < 1:
            held = self._held[sequence.tenant]
            held.sequences -= 1
            for block in sequence.blocks:
                held.blocks[block] -= 1
                if not held.blocks[block]:
                    del held.blocks[block]
            if not held.sequences:
                del self._held[sequence.tenant]

    def exceeded_by(self, sequence: Sequence, blocks: Iterable[int], new: int) -> bool:
        """Whether its tenant would hold more than its share if the sequence ran, with these blocks and new ones."""
        held = self._held.get(sequence.tenant) if sequence.kv_share < 1 else None
        return held is not None and self._exceeds(
            sequence, len(held.blocks) + sum(block not in held.blocks for block in blocks) + new
        )

    def exceeded(self, sequence: Sequence) -> bool:
        """Whether its tenant holds more than its share, with this running sequence and others."""
        held = self._held.get(sequence.tenant) if sequence.kv_share < 1 else None
        return held is not None and held.sequences > 1 and self._exceeds(sequence, len(held.blocks))

    def _exceeds(self, sequence: Sequence, blocks: int) -> bool:
        return blocks > sequence.kv_share * self._num_blocks
