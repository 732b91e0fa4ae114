"""The places of sequences that run: a row and blocks for each, and what a further one would lack."""

from bisect import insort
from collections.abc import Collection

from loraplex_router.engine.blocks import BlockAllocator
from loraplex_router.engine.kv_shares import KvShares
from loraplex_router.engine.prefixes import Prefixes
from loraplex_router.vocabulary.sequence import Sequence


class Places:
    """`rows`: how many sequences can run at a time."""

    def __init__(self, blocks: BlockAllocator, block_size: int, rows: int, prefixes: Prefixes) -> None:
        self._blocks = blocks
        self._block_size = block_size
        self._prefixes = prefixes
        self._shares = KvShares(blocks.num_blocks)
        self._free_rows = list(range(rows - 1, -1, -1))
        self.running: list[Sequence] = []  # oldest first
        # How many blocks those that run have yet to take, as far as it is not 0; None: nobody has asked in this plan.
        self._expected: dict[Sequence, int] | None = None
        self._expected_blocks = 0  # of all of them together

    def begin_plan(self) -> None:
        """Tokens have come since the last plan."""
        self._expected = None

    @property
    def full(self) -> bool:
        """Whether all rows are taken."""
        return not self._free_rows

    def take(self, sequence: Sequence) -> None:
        """The sequence runs from now on, from the end of the prefix that is cached."""
        sequence.row = self._free_rows.pop()
        sequence.blocks = self._prefixes.find(sequence)
        self._blocks.hold(sequence.blocks)
        self._shares.start(sequence)
        sequence.cached_blocks = len(sequence.blocks)
        sequence.computed = len(sequence.blocks) * self._block_size
        insort(self.running, sequence, key=lambda running: running.number)
        sequence.adapter.running += 1
        self._expect(sequence)

    def leave(self, sequence: Sequence) -> None:
        """The sequence gives up its row and its blocks."""
        assert sequence.row is not None
        self._forget(sequence)
        self.running.remove(sequence)
        self._free_rows.append(sequence.row)
        self._blocks.release(sequence.blocks)
        self._shares.stop(sequence)
        sequence.row, sequence.blocks = None, []
        sequence.cached_blocks = sequence.sent_blocks = 0
        sequence.adapter.running -= 1

    def grow(self, sequence: Sequence, stop: int) -> bool:
        """Gives a running sequence the blocks for its next chunk, which ends at `stop`. False: there are not enough."""
        missing = self._count_blocks(stop) - len(sequence.blocks)
        if missing > 0:
            new_blocks = self._blocks.allocate(missing)
            if new_blocks is None:
                return False
            sequence.blocks += new_blocks
            self._shares.hold(sequence, new_blocks)
        self._expect(sequence, planned=True)
        return True

    def has_room(self, head: Sequence, planned: Collection[Sequence] = ()) -> bool:
        """Whether it can start. `planned`: running ones with a chunk in the current plan."""
        return not self.full and self.lacking(head, planned) <= 0

    def lacking(self, head: Sequence, planned: Collection[Sequence] = ()) -> int:
        """How many blocks more it needs to start than running ones leave."""
        hit = self._prefixes.find(head)
        needed = self._count_blocks(len(head.tokens)) - len(hit) + self._blocks.count_idle(hit)
        if self._expected is None:
            self._expected, self._expected_blocks = {}, 0
            for running in self.running:
                self._expect(running, running in planned)
        return needed + self._expected_blocks - self._blocks.available

    def count_tokens(self, head: Sequence) -> int:
        """How many tokens of it would have to be computed if it started."""
        return len(head.tokens) - len(self._prefixes.find(head)) * self._block_size

    def claim(self, running: Sequence, planned: bool = False) -> int:
        """How many blocks the sequence has or needs: for its prompt, and if it is not planned yet, its next chunk."""
        stop = len(running.tokens) if planned else running.computed + running.remaining
        return max(len(running.blocks), self._count_blocks(stop))

    def would_exceed_share(self, head: Sequence) -> bool:
        """Whether its tenant would hold more blocks than its share if it ran."""
        if not self._shares or head.kv_share >= 1:
            return False
        hit = self._prefixes.find(head)
        return self._shares.exceeded_by(head, hit, self._count_blocks(len(head.tokens)) - len(hit))

    def exceeds_share(self, running: Sequence) -> bool:
        """Whether its tenant holds more blocks than its share."""
        return self._shares.exceeded(running)

    def youngest_exceeding(self) -> Sequence | None:
        """The youngest sequence of a tenant that holds more blocks than its share."""
        return next((s for s in reversed(self.running) if self._shares.exceeded(s)), None)

    def _expect(self, running: Sequence, planned: bool = False) -> None:
        if self._expected is not None:
            self._forget(running)
            if blocks := self.claim(running, planned) - len(running.blocks):
                self._expected[running] = blocks
                self._expected_blocks += blocks

    def _forget(self, running: Sequence) -> None:
        if self._expected:
            self._expected_blocks -= self._expected.pop(running, 0)

    def _count_blocks(self, positions: int) -> int:
        return -(-positions // self._block_size)
