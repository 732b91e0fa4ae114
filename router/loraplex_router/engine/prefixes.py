"""The full blocks of sequences in the prefix cache, and those that a sequence can start with."""

from loraplex_router.engine.blocks import BlockAllocator, branch_key, next_key, root_key
from loraplex_router.vocabulary.sequence import Sequence


class Prefixes:
    """`shared`: among tenants. `reused`: else every sequence is computed from its first token on."""

    def __init__(self, blocks: BlockAllocator, block_size: int, shared: bool, reused: bool) -> None:
        self._blocks = blocks
        self._block_size = block_size
        self._shared = shared
        self._reused = reused

    def find(self, sequence: Sequence) -> list[int]:
        """The cached blocks that the sequence can start with. At least one position is left to compute, for sampling;
        all are left if every position's result is needed."""
        if sequence.detail.prompt_logprobs or sequence.detail.pool or not self._reused:
            return []
        full = (len(sequence.tokens) - 1 - sequence.unscored) // self._block_size
        return self._blocks.find(self._keys(sequence, full))

    def cache(self, sequence: Sequence) -> None:
        """Makes the sequence's full blocks known that are not yet."""
        full = min(sequence.computed, len(sequence.tokens)) // self._block_size
        if full > sequence.cached_blocks and self._reused:
            keys = self._keys(sequence, full)
            for index in range(sequence.cached_blocks, full):
                self._blocks.cache(sequence.blocks[index], keys[index])
            sequence.cached_blocks = full

    def _keys(self, sequence: Sequence, count: int) -> list[bytes]:
        """The keys of the sequence's first `count` blocks, computed once each."""
        keys, size = sequence.block_keys, self._block_size
        while len(keys) < count:
            start = len(keys) * size
            parent = keys[-1] if keys else root_key("" if self._shared else sequence.tenant, sequence.cache_salt)
            if start <= sequence.acts_from < start + size:
                parent = branch_key(parent, sequence.adapter.digest, sequence.acts_from)
            keys.append(next_key(parent, sequence.tokens[start : start + size]))
        return keys[:count]
