"""The block allocator against a simple model of it: which blocks are held, by how many holders, and cached content."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loraplex_router.engine.blocks import BlockAllocator, branch_key, next_key, root_key

NUM_BLOCKS = 6


class Blocks(RuleBasedStateMachine):
    """Holders allocate, share, cache and release blocks in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(NUM_BLOCKS)
        self.holders: list[list[int]] = []
        self.content: dict[int, bytes | None] = dict.fromkeys(range(NUM_BLOCKS))  # what was last written

    @rule(count=st.integers(0, NUM_BLOCKS + 1))
    def allocate(self, count: int) -> None:
        available = self.allocator.available
        blocks = self.allocator.allocate(count)
        assert (blocks is None) == (count > available)
        if blocks is not None:
            assert len(set(blocks)) == count
            assert not any(block in held for held in self.holders for block in blocks)
            self.content.update(dict.fromkeys(blocks))
            self.holders.append(blocks)

    @precondition(lambda self: any(self.holders))
    @rule(data=st.data(), key=st.sampled_from([b"a", b"b", b"c"]))
    def write_and_cache(self, data: st.DataObject, key: bytes) -> None:
        held = data.draw(st.sampled_from([held for held in self.holders if held]))
        block = data.draw(st.sampled_from(held))
        if self.content[block] is None:
            self.content[block] = key
            self.allocator.cache(block, key)

    @rule(keys=st.lists(st.sampled_from([b"a", b"b", b"c"]), unique=True))
    def find_and_hold(self, keys: list[bytes]) -> None:
        blocks = self.allocator.find(keys)
        assert [self.content[block] for block in blocks] == keys[: len(blocks)]
        idle = self.allocator.count_idle(blocks)
        available = self.allocator.available
        self.allocator.hold(blocks)
        assert self.allocator.available == available - idle
        self.holders.append(blocks)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.holders))
        self.holders = [other for other in self.holders if other is not held]
        self.allocator.release(held)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.holders))
        self.allocator.forget(held)
        assert not set(held) & set(self.allocator.find([b"a"]) + self.allocator.find([b"b"]))

    @invariant()
    def every_block_is_held_or_available(self) -> None:
        held = {block for holder in self.holders for block in holder}
        assert self.allocator.used == len(held)
        assert self.allocator.available == NUM_BLOCKS - len(held)
        assert self.allocator.cached <= self.allocator.available


Blocks.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
test_no_block_is_leaked_or_owned_twice_and_a_found_block_holds_its_key = Blocks.TestCase


def test_the_least_recently_released_prefix_is_evicted_first_and_from_its_end():
    allocator = BlockAllocator(4)
    for name in ("old", "new"):
        chain = allocator.allocate(2)
        for place, block in enumerate(chain):
            allocator.cache(block, f"{name}{place}".encode())
        allocator.release(chain)
    allocator.allocate(1)
    assert len(allocator.find([b"old0", b"old1"])) == 1
    assert len(allocator.find([b"new0", b"new1"])) == 2


def test_keys_differ_by_adapter_tokens_and_preceding_blocks():
    root = root_key("")
    parents = [branch_key(root, "", 0), branch_key(root, "digest", 0), branch_key(root, "digest", 1), root_key("x")]
    keys = {next_key(parent, tokens) for parent in parents for tokens in ([1, 2], [2, 1])}
    keys |= {next_key(next_key(root, [1, 2]), [1, 2])}
    assert len(keys) == 9
    assert parents[0] == root
