"""The scheduler's guarantees, checked step by step with a stand-in that executes plans as shards do."""

from collections import deque
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex_router.engine.blocks import BlockAllocator
from loraplex_router.engine.pool import AdapterPool
from loraplex_router.engine.scheduler import Limits, Scheduler
from loraplex_router.vocabulary.adapter import NEVER, Adapter
from loraplex_router.vocabulary.sequence import Chunk, Detail, Plan, Sequence

BLOCK = 4
FORCING = ("c", "d")
SIZES = {"b": 2, "c": 3}  # on the device; all others have 1


class World:
    """A scheduler with its blocks and adapters, and an executor that checks every plan as a shard would. Sequences of
    the adapters in FORCING sometimes get several tokens at once.

    The next token of a sequence is a function of all tokens before it and the adapters that computed them, so that a
    wrong prefix hit, a lost token or a mixed-up block shows in the output.
    """

    def __init__(
        self,
        blocks: int = 64,
        slots: int = 2,
        budget: int = 16,
        rows: int = 8,
        depth: int = 2,
        shared: bool = False,
        reuses: bool = True,
        device_bytes: int = 0,
    ) -> None:
        self.blocks = BlockAllocator(blocks)
        self.pool = AdapterPool(slots, host_bytes=1 << 40, device_bytes=device_bytes)
        self.scheduler = Scheduler(Limits(budget, rows, BLOCK, shared, reuses), self.blocks, self.pool)
        self.budget, self.depth = budget, depth
        self.cache: dict[int, list[tuple[str, int] | None]] = {b: [None] * BLOCK for b in range(blocks)}
        self.tables: dict[int, list[int]] = {}
        self.known: dict[int, list[int]] = {}
        self.slots: dict[int, str] = {0: ""}
        self.in_flight: deque[tuple[Plan, list[list[int]]]] = deque()
        self.sequences: list[Sequence] = []
        self.steps = 0

    def adapter(self, name: str) -> Adapter:
        return self.pool.add(name, 8, size_bytes=1, device_bytes=SIZES.get(name, 1)) if name else self.pool.base

    def submit(
        self,
        adapter: str,
        prompt: list[int],
        max_new_tokens: int,
        detail: Detail | None = None,
        alone_until: int = 0,
        tenant: str = "",
        weight: float = 1.0,
        kv_share: float = 1.0,
        background: bool = False,
        cache_salt: str = "",
        acts_from: int = 0,
    ) -> Sequence:
        sequence = Sequence(
            number=len(self.sequences),
            prompt_length=len(prompt),
            tokens=list(prompt),
            adapter=self.adapter(adapter),
            max_new_tokens=max_new_tokens,
            detail=detail or Detail(),
            alone_until=alone_until,
            tenant=tenant,
            weight=weight,
            kv_share=kv_share,
            background=background,
            cache_salt=cache_salt,
            acts_from=acts_from,
        )
        self.sequences.append(sequence)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> bool:
        """Runs one turn of the engine's loop; returns False if there was nothing to do."""
        while any(changes := self.scheduler.change_slots()):
            for adapter in changes.claimed:
                self.slots[adapter.slot] = adapter.digest
                adapter.ready = True
            assert self.pool.used_bytes <= self.pool.device_bytes
            for adapter in changes.evicted:
                assert adapter.slot not in {chunk.slot for plan, _ in self.in_flight for chunk in plan.chunks}
                del self.slots[adapter.slot]
                self.pool.release_slot(adapter)
        plan = self.scheduler.schedule() if len(self.in_flight) < self.depth else None
        if plan is not None:
            self.in_flight.append((plan, self.execute(plan)))
        if self.in_flight and (plan is None or len(self.in_flight) == self.depth):
            self.apply(*self.in_flight.popleft())
            return True
        return plan is not None

    def execute(self, plan: Plan) -> list[list[int]]:
        self.steps += 1
        self.last = plan
        assert sum(chunk.length for chunk in plan.chunks) <= self.budget
        slots = [chunk.slot for chunk in plan.chunks]
        assert slots == sorted(slots)
        assert len(plan.chunks) == 1 or not plan.alone
        assert plan.alone or not any(chunk.start < chunk.sequence.alone_until for chunk in plan.chunks)
        if not plan.alone and any(chunk.sequence.background for chunk in plan.chunks):
            assert all(chunk.sequence.background for chunk in plan.chunks)
            running = [s for s in self.sequences if s.row is not None and not (s.background or s.suspect)]
            assert not running
        for sequence in plan.starts:
            assert sequence.row is not None
            self.tables[sequence.row], self.known[sequence.row] = [], list(sequence.tokens)
        for chunk in plan.chunks:  # all chunks' keys and values are written before any are read
            self.write(chunk)
        return [self.sample(chunk) for chunk in plan.chunks]

    def sample(self, chunk: Chunk) -> list[int]:
        """A token and its fast-forward tokens; none if the chunk ends before the sequence's known tokens do."""
        sequence, known = chunk.sequence, self.known[chunk.sequence.row]
        end = chunk.start + chunk.length
        content = [self.cache[self.tables[sequence.row][p // BLOCK]][p % BLOCK] for p in range(end)]
        assert content == computed(sequence, known[:end])
        if not chunk.samples or end < len(known):
            return []
        tokens = [next_token(sequence, known)]
        while sequence.adapter.digest in FORCING and tokens[-1] % 2:
            tokens.append(next_token(sequence, known + tokens))
        known += tokens
        return tokens

    def write(self, chunk: Chunk) -> None:
        row, digest = chunk.sequence.row, self.slots[chunk.slot]
        self.tables[row] += chunk.new_blocks
        for position in range(chunk.start, chunk.start + chunk.length):
            block = self.tables[row][position // BLOCK]
            self.cache[block][position % BLOCK] = (digest, self.known[row][position])

    def apply(self, plan: Plan, results: list[list[int]]) -> None:
        self.scheduler.complete(plan)
        for chunk, tokens in zip(plan.chunks, results, strict=True):
            sequence = chunk.sequence
            for number, token in enumerate(tokens):
                if not sequence.finished:
                    (self.scheduler.fast_forward if number else self.scheduler.record)(sequence, token)
                    if sequence.output_length == sequence.max_new_tokens:
                        self.scheduler.finish(sequence)

    def run(self, limit: int = 2000) -> None:
        for _ in range(limit):
            if not self.step():
                return
        raise AssertionError("the scheduler does not finish")


def computed(sequence: Sequence, tokens: list[int]) -> list[tuple[str, int]]:
    """The tokens, each with the adapter that computes it."""
    return [("" if at < sequence.acts_from else sequence.adapter.digest, token) for at, token in enumerate(tokens)]


def next_token(sequence: Sequence, tokens: list[int]) -> int:
    return hash(tuple(computed(sequence, tokens))) % 50


def expected(sequence: Sequence) -> list[int]:
    tokens = sequence.tokens[: sequence.prompt_length]
    for _ in range(sequence.max_new_tokens):
        tokens = [*tokens, next_token(sequence, tokens)]
    return tokens


requests = st.lists(
    st.tuples(
        st.sampled_from(["", "a", "b", "c", "d"]),
        st.lists(st.integers(0, 2), min_size=1, max_size=30),  # few distinct tokens, so that prefixes repeat
        st.integers(1, 12),
        st.integers(0, 6),  # turns between the last arrival and this one
        st.one_of(st.none(), st.integers(0, 30)),  # turns until it is cancelled
        st.sampled_from([0, 0, 0, 1, 7, 40]),  # computed alone up to this position
        st.sampled_from(["", "x", "y"]),  # its tenant
        st.sampled_from([0, 0, 0, 1, 4, 5, 13, NEVER]),  # where its adapter begins to act
        st.booleans(),  # whether it is a background one
    ),
    max_size=20,
)


@settings(deadline=None, max_examples=150)
@given(
    requests=requests,
    blocks=st.integers(11, 40),
    slots=st.integers(1, 3),
    depth=st.integers(1, 2),
    device_bytes=st.integers(3, 7),
)
def test_every_sequence_ends_with_its_own_tokens_without_losing_blocks_rows_or_slots(
    requests, blocks, slots, depth, device_bytes
):
    world = World(blocks=blocks, slots=slots, depth=depth, device_bytes=device_bytes)
    cancellations = []
    for adapter, prompt, max_new_tokens, delay, cancel_after, alone_until, tenant, acts_from, background in requests:
        for _ in range(delay):
            world.step()
            for turn, sequence in cancellations:
                if world.steps >= turn:
                    world.scheduler.finish(sequence)
        begin = acts_from if acts_from == NEVER else min(acts_from, len(prompt) - 1)
        sequence = world.submit(
            adapter,
            prompt,
            max_new_tokens,
            alone_until=alone_until,
            tenant=tenant,
            acts_from=begin,
            background=background,
        )
        if cancel_after is not None:
            cancellations.append((world.steps + cancel_after, sequence))
    world.run()
    cancelled = {sequence.number for _, sequence in cancellations}
    for sequence in world.sequences:
        assert sequence.finished
        if sequence.number not in cancelled:
            assert sequence.tokens == expected(sequence)
    assert world.blocks.used == 0
    assert world.scheduler.num_running == world.scheduler.num_waiting == 0
    held = [adapter.slot for adapter in world.pool.on_device()]
    assert len(set(held)) == len(held) <= slots
    assert not any(adapter.in_use or adapter.waiting for adapter in world.pool)


def test_decoding_continues_while_a_long_prompt_is_computed_in_chunks():
    world = World(blocks=200, budget=16)
    short = world.submit("", [1], 50)
    world.step()
    world.submit("", [2] * 300, 1)
    lengths = [short.output_length + short.in_flight]
    for _ in range(10):
        world.step()
        lengths.append(short.output_length + short.in_flight)
    assert all(later > earlier for earlier, later in pairwise(lengths))


def test_suspects_are_computed_alone_youngest_first_in_turns_with_all_others():
    world = World(blocks=200)
    others = [world.submit("", [1], 50) for _ in range(3)]
    suspects = [world.submit("a", [number], 10, alone_until=3) for number in range(3)]
    for suspect in reversed(suspects):
        while suspect.computed < 3:
            before = [other.computed for other in others]
            assert not any(other.computed for other in suspects[: suspects.index(suspect)])
            world.step()
            world.step()
            assert all(other.computed > computed for other, computed in zip(others, before, strict=True))
    world.run()
    assert all(sequence.tokens == expected(sequence) for sequence in world.sequences)


def test_sequences_that_start_in_one_plan_fit_into_its_message(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("loraplex_router.engine.scheduler.MAX_STARTED", 30)
    world = World(blocks=200)
    world.submit("", [1] * 20, 1)
    world.run()
    for _ in range(6):  # its prefix is cached
        world.submit("", [1] * 20, 5)
    plan = world.scheduler.schedule()
    assert plan and len(plan.starts) == 2
    world.in_flight.append((plan, world.execute(plan)))
    world.run()
    assert all(sequence.tokens == expected(sequence) for sequence in world.sequences)


def test_an_adapter_that_is_not_loaded_yet_does_not_block_later_ones():
    world = World(slots=2)
    cold = world.submit("cold", [1, 2, 3], 4)
    warm = world.submit("warm", [1, 2, 3], 4)
    base = world.submit("", [1, 2, 3], 4)
    for adapter in world.scheduler.change_slots().claimed:
        adapter.ready = adapter.digest == "warm"  # the other adapter's load never ends
        world.slots[adapter.slot] = adapter.digest
    world.run()
    assert warm.finished and base.finished and not cold.finished


def test_an_adapter_in_constant_use_yields_its_slot_to_a_waiting_one():
    world = World(slots=1, rows=4, budget=16)
    newest = world.submit("popular", [1, 2], 6)
    world.step()
    lonely = world.submit("lonely", [3, 4], 2)
    for _ in range(200):
        world.step()
        if lonely.finished:
            break
        if newest.computed:  # one popular sequence always runs, and one waits
            newest = world.submit("popular", [1, 2, len(world.sequences)], 6)
    assert lonely.finished


def test_small_adapters_in_constant_use_yield_their_memory_to_a_large_one():
    world = World(slots=4, rows=8, blocks=200, device_bytes=4)
    for number in range(8):
        world.submit(f"small {number}", [number], 6)
    world.step()
    large = world.submit("c", [3, 4], 2)
    for turn in range(400):
        world.step()
        if large.finished:
            break
        world.submit(f"small {turn % 8}", [1, 2, turn], 6)  # always more than there is memory for
    assert large.finished


def test_an_adapter_that_does_not_fit_for_now_does_not_block_others():
    world = World(slots=4, device_bytes=4)
    world.step()
    large = world.submit("c", [1], 2)
    world.pool.lower_room(large.adapter)
    small = world.submit("a", [1], 2)
    world.run()
    assert small.finished and not large.finished
    world.pool.restore_room()
    world.run()
    assert large.finished


def test_adapters_that_compete_for_a_slot_take_turns_instead_of_swapping_for_every_sequence():
    world = World(slots=1, rows=4, blocks=200)
    for index in range(64):
        world.submit("ab"[index % 2], [index], 2)
    loads = []
    change_slots = world.scheduler.change_slots

    def count_claims():
        changes = change_slots()
        loads.extend(adapter.digest for adapter in changes.claimed)
        return changes

    world.scheduler.change_slots = count_claims
    world.run()
    assert 2 <= len(loads) <= 8
    assert all(sequence.finished for sequence in world.sequences)


def test_an_adapter_with_many_requests_does_not_take_all_rows_from_one_with_few():
    world = World(slots=2, rows=4, blocks=200)
    many = [world.submit("many", [index], 8) for index in range(40)]
    few = world.submit("few", [1], 8)
    while not few.finished:
        assert world.step()
    assert sum(sequence.finished for sequence in many) <= 8


def test_when_blocks_run_out_the_youngest_is_preempted_without_losing_tokens():
    world = World(blocks=10, rows=4)
    old = world.submit("", [1] * 8, 20)
    young = world.submit("", [2] * 8, 20)
    world.run()
    assert world.scheduler.num_preemptions > 0
    assert old.tokens == expected(old) and young.tokens == expected(young)


def test_a_cached_prefix_is_not_recomputed():
    world = World()
    prompt = list(range(17))
    world.submit("a", prompt, 1)
    world.run()
    again, other = world.submit("a", prompt, 1), world.submit("b", prompt, 1)
    world.run()
    assert again.prefix_hit == 16
    assert other.prefix_hit == 0


@pytest.mark.parametrize(
    ("shared", "other", "hit"),
    [
        (False, {"tenant": "a"}, 16),
        (False, {"tenant": "b"}, 0),
        (True, {"tenant": "b"}, 16),
        (True, {"tenant": "a", "cache_salt": "s"}, 0),
    ],
)
def test_a_prefix_is_only_shared_within_its_tenant_and_salt(shared: bool, other: dict[str, str], hit: int):
    world, prompt = World(shared=shared), list(range(17))
    world.submit("a", prompt, 1, tenant="a")
    world.run()
    again = world.submit("a", prompt, 1, **other)
    world.run()
    assert again.prefix_hit == hit


def test_a_model_that_keeps_states_computes_every_sequence_from_its_first_token_on():
    world, prompt = World(blocks=10, rows=4, reuses=False), list(range(8))
    first, second = world.submit("", prompt, 20), world.submit("", prompt, 20)
    begun: list[int] = []
    execute = world.execute

    def note(plan: Plan) -> list[list[int]]:
        begun.extend(chunk.start for chunk in plan.chunks if chunk.sequence in plan.starts)
        return execute(plan)

    world.execute = note
    world.run()
    assert world.scheduler.num_preemptions > 0 and len(begun) > 2
    assert not any(begun) and world.blocks.cached == 0
    assert first.tokens == expected(first) and second.tokens == expected(second)


def test_sequences_of_one_prompt_share_its_blocks_within_a_single_step():
    world = World(budget=64)
    first, second = world.submit("", list(range(17)), 1), world.submit("", list(range(17)), 1)
    world.step()
    assert second.blocks[:4] == first.blocks[:4] and second.blocks[4:] != first.blocks[4:]


def test_activated_adapters_share_the_base_models_blocks_before_they_act():
    world, document = World(budget=64), list(range(42))
    base = world.submit("", document, 1)
    world.run()
    first, second = (world.submit(name, [*document, 50, 51], 3, acts_from=42) for name in "ab")
    again, elsewhere = (world.submit("a", [*document, 50, 51] * 2, 3, acts_from=acts_from) for acts_from in (42, 86))
    world.run()
    assert base.prefix_hit == 0 and first.prefix_hit == second.prefix_hit == 40  # whole blocks
    assert again.prefix_hit == elsewhere.prefix_hit == 40  # computed at once with the first, by another adapter
    assert all(sequence.tokens == expected(sequence) for sequence in world.sequences)


def test_an_activated_adapters_blocks_are_only_shared_if_it_begins_to_act_at_the_same_position():
    world, prompt = World(budget=64), list(range(40))
    world.submit("a", prompt, 1, acts_from=18)
    world.run()
    hits = [world.submit("a", prompt, 1, acts_from=acts_from) for acts_from in (18, 17, 38, 0)]
    other = world.submit("b", prompt, 1, acts_from=18)
    world.run()
    assert [sequence.prefix_hit for sequence in hits] == [36, 16, 16, 0]
    assert other.prefix_hit == 16
    assert all(sequence.tokens == expected(sequence) for sequence in world.sequences)


def test_a_document_is_computed_once_by_activated_adapters_that_arrive_together():
    world, document = World(blocks=200, budget=32, slots=5), list(range(100))
    answers = [world.submit(name, [*document, 50], 2, acts_from=100) for name in ("", *"abcde")]
    world.run()
    assert [sequence.prefix_hit for sequence in answers] == [0, 100, 100, 100, 100, 100]
    assert all(sequence.tokens == expected(sequence) for sequence in answers)


def test_a_prompt_that_does_not_activate_its_adapter_is_the_base_models():
    world, prompt = World(), list(range(20))
    world.submit("", prompt, 4)
    never = world.submit("a", prompt, 4, acts_from=NEVER)
    world.run()
    assert never.tokens == expected(never)
    again = world.submit("b", never.tokens, 1, acts_from=NEVER)
    world.run()
    assert again.prefix_hit == 20


def test_prompt_logprobs_require_the_whole_prompt():
    world = World()
    world.submit("", list(range(17)), 1)
    world.run()
    sequence = world.submit("", list(range(17)), 1, Detail(prompt_logprobs=True))
    world.run()
    assert sequence.prefix_hit == 0


def test_prompt_tokens_whose_logprobs_are_wanted_take_half_as_much_again_of_a_plan():
    world = World(budget=15)
    scored = world.submit("", [1] * 24, 2, Detail(prompt_logprobs=True))
    plain = world.submit("", [2] * 30, 2)
    planned = []
    while plan := world.scheduler.schedule():
        planned.append({chunk.sequence: chunk.length for chunk in plan.chunks})
    # The end of its prompt takes 6, a decode 1.
    assert planned[:4] == [{scored: 10}, {scored: 10}, {scored: 4, plain: 9}, {scored: 1, plain: 14}]


def test_a_prompt_whose_logprobs_are_wanted_goes_on_where_only_one_place_is_left():
    world = World(budget=1, rows=1)
    scored = world.submit("", [1, 2, 3], 2, Detail(prompt_logprobs=True))
    world.run()
    assert scored.tokens == expected(scored)


def test_a_failed_sequence_leaves_nothing_in_the_prefix_cache():
    world = World()
    sequence = world.submit("", list(range(17)), 5)
    world.step()
    world.scheduler.fail(sequence)
    world.run()
    retry = world.submit("", list(range(17)), 1)
    world.run()
    assert retry.prefix_hit == 0 and world.blocks.used == 0


def test_sequences_with_fast_forward_tokens_preempt_each_other_and_keep_their_tokens():
    for first in range(30):
        world = World(blocks=12, rows=4)
        sequences = [world.submit("c", [first, number] * 4, 20) for number in range(4)]
        world.run()
        assert world.scheduler.num_preemptions > 0 and world.blocks.used == 0
        assert [sequence.tokens for sequence in sequences] == [expected(sequence) for sequence in sequences]
