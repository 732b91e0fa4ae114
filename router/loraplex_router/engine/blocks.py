"""The KV cache's blocks: who holds them, and which contain a known prefix. Only block ids; the shards have the tensors.

A fully computed block can be cached under a key: a hash chain over every token up to the block's end and the adapter,
so that equal keys mean equal content. An adapter's chain branches off the base model's where the adapter begins to act:
at the first block, unless the adapter is activated later. A cached block can be found after its last holder has
released it, until it is evicted: least recently used first.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b


def root_key(*scope: str) -> bytes:
    """The key at the start of a chain. Chains of different scopes share no key: a scope is who may share."""
    return blake2b(repr(scope).encode(), digest_size=16).digest()


def branch_key(parent: bytes, digest: str, position: int) -> bytes:
    """The key before the block in which the adapter with this digest begins to act, at this position. The base model,
    whose digest is empty, stays on the chain."""
    return blake2b(f"{digest} {position}".encode(), digest_size=16, key=parent).digest() if digest else parent


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
        """Number of blocks that can be allocated: free and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def cached(self) -> int:
        """Number of idle blocks: kept for their prefix, held by nobody."""
        return len(self._idle)

    @property
    def used(self) -> int:
        return self.num_blocks - self.available

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks of undefined content, held by the caller. None, with nothing changed, if fewer are
        available."""
        if count > self.available:
            return None
        blocks = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of a chain's longest cached prefix. They are not held yet: see `hold`."""
        blocks = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def count_idle(self, blocks: Iterable[int]) -> int:
        """Number of these blocks that are idle, and so not available once held."""
        return sum(self._references[block] == 0 for block in blocks)

    def hold(self, blocks: Iterable[int]) -> None:
        """Adds a holder to blocks that `find` returned."""
        for block in blocks:
            self._references[block] += 1
            self._idle.pop(block, None)

    def cache(self, block: int, key: bytes) -> None:
        """Makes a held, fully computed block findable. If its content is already cached, the first block stays the
        cached one."""
        assert self._references[block] > 0
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """Gives up one hold on each block. A chain is evicted from its end, so that its beginning is kept longest."""
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
