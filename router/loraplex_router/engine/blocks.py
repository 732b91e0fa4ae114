"""The KV cache's blocks: who holds them, and which hold a known prefix. Numbers only; the tensors are the shards'.

A block whose positions are all computed can be cached under a key that stands for the adapter and every token up to
its end (a hash chain), so that equal keys mean equal keys and values. A cached block stays findable after its last
holder released it, until its place is needed: least recently used first.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b


def root_key(*scope: str) -> bytes:
    """Where chains begin. Chains of two scopes share no key: a scope is an adapter's digest and who may share."""
    return blake2b(repr(scope).encode(), digest_size=16).digest()


def next_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of the block that holds `tokens` and follows the block with the key `parent`."""
    return blake2b(array("I", tokens), digest_size=16, key=parent).digest()


class BlockAllocator:
    """Hands out block ids 0 ... num_blocks - 1 and counts references.

    Invariant: every block is in exactly one of three states: free, held (references > 0), or idle (cached, no
    references); only idle and held blocks have a key, and a key has one block.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def available(self) -> int:
        """How many blocks `allocate` can give: the free and the idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def cached(self) -> int:
        """Idle blocks: kept for their prefix, held by nobody."""
        return len(self._idle)

    @property
    def used(self) -> int:
        return self.num_blocks - self.available

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks of unknown content, held by the caller; None, and nothing changed, if there are fewer."""
        if count > self.available:
            return None
        blocks = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known prefix of a chain. Nobody holds them for the caller: see `hold`."""
        blocks = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def count_idle(self, blocks: Iterable[int]) -> int:
        """How many of these blocks would no longer be available if they were held."""
        return sum(self._references[block] == 0 for block in blocks)

    def hold(self, blocks: Iterable[int]) -> None:
        """One more holder for blocks that `find` gave."""
        for block in blocks:
            self._references[block] += 1
            self._idle.pop(block, None)

    def cache(self, block: int, key: bytes) -> None:
        """Makes a held, fully computed block findable. Content that is cached already stays with its first block."""
        assert self._references[block] > 0
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """Gives up one hold each. The blocks of a chain go from its end, so that its beginning is kept longest."""
        for block in reversed(blocks):
            assert self._references[block] > 0
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def forget(self, blocks: Iterable[int]) -> None:
        """Makes held blocks unfindable, because their content cannot be trusted."""
        for block in blocks:
            assert self._references[block] > 0
            key = self._key_of.pop(block, None)
            if key is not None:
                del self._block_of[key]

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block
