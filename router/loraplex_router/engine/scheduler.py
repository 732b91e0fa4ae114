"""What runs in the next step. Pure policy: no clock, no text, no transport, no tensors.

Each step mixes decodes and prefill chunks of any adapters under one token budget: first the decodes, then prefills and
new sequences, starting with the tenant that received the least service; within a tenant, running prefills before new
sequences. Prompt tokens whose logprobs are wanted take more of the budget, since they take longer. Blocks are allocated
as sequences grow. When they run out, a sequence without a chunk in the step is preempted, the youngest of the tenant
that received most service: it gives up its blocks and is recomputed later.

Others' prompts delay a newcomer's first token no more than they must: see prompt_budget.py. While a tenant dominates
(see fairness.py), newcomers' short prompts are computed in a step of their own, before its decodes.

New sequences: fairness.py decides whose turn it is, among tenants and their adapters, and who yields places if all rows
or blocks are taken. An adapter may start sequences if it is on the device and entitled: see entitlement.py.
kv_shares.py says which tenants hold more blocks than they may while others want them.

An activated adapter acts from a position in the prompt on. Chunks are cut there: those before are the base model's, as
are the blocks before, which all of its adapters then share.

A tenant of which nothing runs does not wait for a slot until sequences of others end, if it is entitled to one.

Background sequences are computed while there is nothing else to compute, and their prompts, too, take only a part of a
step. In the meantime they wait with their rows and blocks, but give up rows, blocks and slots that others need.

Suspects (see suspects.py) are computed in plans of their own, which alternate with the other plans.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import islice
from math import ceil
from operator import attrgetter

from loraplex_router.engine.blocks import BlockAllocator
from loraplex_router.engine.fairness import Shares
from loraplex_router.engine.places import Places
from loraplex_router.engine.pool import AdapterPool
from loraplex_router.engine.prefixes import Prefixes
from loraplex_router.engine.prompt_budget import PromptBudget
from loraplex_router.engine.queues import Queues
from loraplex_router.engine.slots import SlotChanges, Slots
from loraplex_router.engine.turns import Turns
from loraplex_router.vocabulary.adapter import Adapter
from loraplex_router.vocabulary.sequence import Chunk, Payer, Plan, Sequence

# Numbers sent with the sequences that start in one plan: writing and reading more takes longer than a step.
MAX_STARTED = 2**16
# What a prompt token whose logprobs are wanted takes of the budget. It takes 1.3 to 1.4 times as long as a plain one
# with SmolLM2-135M on a CPU, whose lm head is a fifth of its weights, and less with larger models.
SCORED_COST = 1.5
SHORT = 1 / 4  # the part of a step's tokens for prompts that newcomers may have to wait for, or for newcomers alone


@dataclass(frozen=True, slots=True)
class Limits:
    max_batch_tokens: int  # per step; at least max_sequences, so that every decode fits
    max_sequences: int
    block_size: int
    shares_prefixes: bool = False  # among tenants
    reuses_prefixes: bool = True  # else every sequence is computed from its first token on


class Scheduler:
    """Owns the queues, the running sequences and their blocks. Called by the engine task alone."""

    def __init__(self, limits: Limits, blocks: BlockAllocator, adapters: AdapterPool) -> None:
        assert limits.max_batch_tokens >= limits.max_sequences
        self._limits = limits
        self._blocks = blocks
        self._adapters = adapters
        self._prefixes = Prefixes(blocks, limits.block_size, limits.shares_prefixes, limits.reuses_prefixes)
        self._queues = Queues()
        self._shares = Shares()
        self._places = Places(blocks, limits.block_size, limits.max_sequences, self._prefixes)
        self._slots = Slots(adapters, self._queues, self._shares, self._places, self._preempt, self._give_way)
        self._turns = Turns(self._queues, self._shares, self._places, self._slots)
        self._suspects: set[Sequence] = set()
        self._alone = True  # whether the last plan was a suspect's
        self._ahead = False  # whether the last plan of others was of newcomers alone
        self.num_preemptions = 0  # for lack of blocks
        self.num_yields = 0  # for fairness

    @property
    def block_size(self) -> int:
        return self._limits.block_size

    @property
    def background(self) -> bool:
        """Whether background sequences run or wait."""
        return self._shares.background

    @property
    def num_running(self) -> int:
        return len(self._places.running)

    @property
    def num_waiting(self) -> int:
        return len(self._queues)

    def waiting_by_tenant(self) -> dict[str, int]:
        """How many sequences wait, by their tenants' names."""
        return self._shares.waiting()

    def waiting(self, adapter: Adapter, tenant: str) -> Iterable[Sequence]:
        """A tenant's sequences that wait for the adapter, without background ones, oldest first."""
        return self._queues.of_payer(adapter, Payer(tenant))

    # ---- sequences come and go -------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence into its adapter's queue, by age."""
        self._enqueue(sequence)
        self._adapters.touch(sequence.adapter)
        if sequence.suspect:
            self._suspects.add(sequence)

    def record(self, sequence: Sequence, token: int) -> None:
        """A sample that was in flight has arrived."""
        sequence.tokens.append(token)
        sequence.in_flight -= 1
        self._prefixes.cache(sequence)

    def fast_forward(self, sequence: Sequence, token: int) -> None:
        """A fast-forward token has arrived after a sample. Plans in flight end before it, so they will not bring
        another sample."""
        sequence.tokens.append(token)
        sequence.in_flight = 0
        self._prefixes.cache(sequence)

    def add_unscored(self, sequence: Sequence, tokens: Iterable[int]) -> None:
        """Fast-forward tokens are known, but cannot be shown before their logprobs. Tokens beyond the sequence's limit
        are left out."""
        for token in islice(tokens, sequence.max_new_tokens - sequence.output_length):
            self.fast_forward(sequence, token)
            sequence.unscored += 1

    def finish(self, sequence: Sequence) -> None:
        """Ends a sequence, running or waiting. Its blocks are free for plans made from now on: every rank executes
        plans in order, so a chunk of it that is still in flight cannot touch their next holder's content."""
        if sequence.finished:
            return
        sequence.finished = True
        if sequence.row is None:
            self._queues.remove(sequence)
            self._shares.stop_waiting(sequence)
        else:
            self._leave(sequence)

    def fail(self, sequence: Sequence) -> None:
        """Ends a sequence whose computed content cannot be trusted."""
        self._blocks.forget(sequence.blocks)
        self.finish(sequence)

    def complete(self, plan: Plan) -> None:
        """The plan's result has arrived: it no longer needs its adapters' slots."""
        for adapter in plan.adapters:
            adapter.plans -= 1

    # ---- slots -----------------------------------------------------------------------------------------------

    def change_slots(self) -> SlotChanges:
        """The slots that change hands now. The caller loads the adapters that got one and then sets `ready`, or
        releases the slot; it unloads those that lost one, releases the slots, and then calls this again."""
        return self._slots.change()

    # ---- the next step ---------------------------------------------------------------------------------------

    def schedule(self, background: bool = True) -> Plan | None:
        """The next plan, or None if there is nothing to compute. It counts as executed from now on: later plans follow
        it on every rank. `background`: whether it may be for background sequences."""
        self._slots.begin_plan()
        self._shares.begin_plan()
        self._places.begin_plan()
        self._turns.begin_anew()
        for alone in (not self._alone, self._alone):
            if plan := self._plan_alone() if alone else self._plan_together(background):
                self._alone = alone
                return plan
        return None

    def _plan_together(self, background: bool) -> Plan | None:
        may_start, passed, taker = self._yield_places()
        if may_start and not self._ahead and (plan := self._plan_newcomers(passed, taker)):
            self._ahead = True
            return plan
        self._ahead = False
        chunks: dict[Sequence, Chunk] = {}
        starts: list[Sequence] = []
        budget, started = self._limits.max_batch_tokens, 0
        running = (
            [sequence for sequence in self._places.running if not sequence.suspect]
            if self._suspects
            else self._places.running
        )
        foreground = not self._shares.background or not background or self._has_foreground(may_start, passed)
        if foreground and self._shares.background:
            running = [sequence for sequence in running if not sequence.background]
        work = [(sequence, sequence.remaining) for sequence in running]
        decodes = [item for item in work if item[1] == 1]
        prefills = [item for item in work if item[1] > 1]
        if self._blocks.available < len(decodes):  # those that are preempted first get blocks last
            decodes.sort(key=lambda item: self._preempted_first(item[0]))
        for sequence, remaining in decodes:
            if budget and sequence.row is not None:  # still, or an older one has just taken its blocks
                budget -= self._extend(sequence, remaining, budget, chunks)
        tokens = budget if foreground else min(budget, self._part)
        prompts = PromptBudget(self._shares, tokens, self._part)
        prefills.sort(key=lambda item: (*self._shares.of(item[0]).order, item[0].number), reverse=True)
        while prompts.left:
            may_start = may_start and started < MAX_STARTED
            head = (taker or self._turns.next(passed)) if may_start else None
            if (
                head is None
                or (head.background and foreground)
                or not (room := prompts.of(head))
                or not self._find_room(head, chunks)
            ):
                head, may_start = None, False  # others must not overtake it, or it might wait forever
            if head and not (prefills and self._shares.of(prefills[-1][0]).order <= self._shares.of(head).order):
                self._start(head)
                taker = None
                starts.append(head)
                started += head.start_size
                sequence, remaining = head, head.remaining
            elif prefills:
                sequence, remaining = prefills.pop()
                if sequence.row is None or not (room := prompts.of(sequence)):
                    continue
            else:
                break
            of_prompt = sequence.computed < sequence.prompt_length
            prompts.take(sequence, self._extend(sequence, remaining, room, chunks), of_prompt)
        return self._plan(starts, chunks) if chunks else None

    @property
    def _part(self) -> int:
        return max(1, int(self._limits.max_batch_tokens * SHORT))

    def _plan_newcomers(self, passed: Payer | None, taker: Sequence | None) -> Plan | None:
        """While a tenant dominates, plans the short prompts of tenants of which nothing runs, if it is their turn, and
        decodes of all but the dominant tenant."""
        if (dominant := self._shares.dominant()) is None:
            return None
        chunks: dict[Sequence, Chunk] = {}
        starts: list[Sequence] = []
        part, started = self._part, 0
        while started < MAX_STARTED and (head := taker or self._turns.next(passed)):
            new = not (head.background or head.output_length or head.payer == dominant or self._shares.of(head).total)
            if not new or self._places.count_tokens(head) * _cost(head) > part or not self._find_room(head, chunks):
                break
            self._start(head)
            taker = None
            starts.append(head)
            started += head.start_size
            part -= self._extend(head, head.remaining, part, chunks)
        if not chunks:
            return None
        budget = self._limits.max_batch_tokens - self._part
        for sequence in [running for running in self._places.running if running.payer != dominant]:
            decodes = sequence.remaining == 1 and not (sequence.background or sequence.suspect)
            if budget and decodes and sequence.row is not None and sequence not in chunks:
                budget -= self._extend(sequence, 1, budget, chunks)
        return self._plan(starts, chunks)

    def _has_foreground(self, may_start: bool, passed: Payer | None) -> bool:
        """Whether the next plan is not for background sequences."""
        if any(not (sequence.background or sequence.suspect) for sequence in self._places.running):
            return True
        head = self._turns.next(passed) if may_start else None
        return head is not None and not head.background

    def _plan_alone(self) -> Plan | None:
        """Plans the next chunk of one suspect: a running one or else the youngest that can start."""
        self._suspects = {sequence for sequence in self._suspects if sequence.suspect and not sequence.finished}
        if not self._suspects:
            return None
        chunks: dict[Sequence, Chunk] = {}
        suspect = next((s for s in self._suspects if s.row is not None and s.remaining), None)
        starts = []
        if suspect is None and (suspect := self._turns.next_suspect(self._suspects)):
            self._start(suspect)
            starts.append(suspect)
        if suspect is not None:
            self._extend(suspect, suspect.remaining, self._limits.max_batch_tokens, chunks)
        return self._plan(starts, chunks, alone=True) if chunks else None

    def _plan(self, starts: list[Sequence], chunks: dict[Sequence, Chunk], alone: bool = False) -> Plan:
        ordered = sorted(chunks.values(), key=attrgetter("slot"))
        plan = Plan(tuple(starts), tuple(ordered), alone)
        for adapter in plan.adapters:
            adapter.plans += 1
            self._adapters.touch(adapter)
        return plan

    def _extend(self, sequence: Sequence, remaining: int, budget: int, chunks: dict[Sequence, Chunk]) -> int:
        """Adds the sequence's next chunk, of its `remaining` tokens as many as `budget` has room for. Returns what it
        takes of the budget: 0 if the sequence itself was preempted."""
        start, acts_from, cost = sequence.computed, sequence.acts_from, _cost(sequence)
        length, slot = min(remaining, max(1, int(budget / cost))), sequence.adapter.slot or 0
        if start < acts_from:  # a chunk is the base model's or the adapter's, never both's
            length, slot = min(length, acts_from - start), 0
        stop = start + length
        while not self._places.grow(sequence, stop):
            others = (running for running in self._places.running if running not in chunks)
            preempted = max(others, key=self._preempted_first)
            self.num_preemptions += 1
            self._preempt(preempted, sequence)
            if preempted is sequence:
                return 0
        unsent = tuple(sequence.blocks[sequence.sent_blocks :])
        samples = length == remaining and not sequence.detail.pool and not sequence.full
        chunks[sequence] = Chunk(sequence, start, length, samples, slot, unsent, sequence.attempts)
        sequence.sent_blocks = len(sequence.blocks)
        self._shares.charge(sequence, stop)
        sequence.computed = stop
        if not sequence.suspect:  # no longer
            sequence.alone_until = 0
        sequence.in_flight += samples
        self._prefixes.cache(sequence)  # for others with the same prompt, even in this step
        return min(ceil(length * cost), budget)

    def _preempted_first(self, running: Sequence) -> tuple[bool, bool, float, int]:
        """The sort key: higher is preempted first, if blocks run out."""
        served = self._shares.of(running).served
        return running.background, self._places.exceeds_share(running), served, running.number

    def _preempt(self, sequence: Sequence, taker: Sequence | None = None) -> None:
        """Takes a running sequence's row and blocks; it will be recomputed from its tokens, at the expense of the
        taker's tenant. It must have no chunk in the current plan: others may already build on the blocks that the chunk
        fills."""
        sequence.gave_way_to = taker.payer if taker else None
        self._enqueue(sequence)
        self._leave(sequence)
        sequence.computed = 0

    def _give_way(self, sequence: Sequence, newcomer: Sequence) -> None:
        self.num_yields += 1
        self._preempt(sequence, newcomer)

    # ---- starting --------------------------------------------------------------------------------------------

    def _find_room(self, head: Sequence, planned: Collection[Sequence] = ()) -> bool:
        """Background sequences give up their places, as far as another one needs them."""
        while not self._places.has_room(head, planned):
            youngest = next((s for s in reversed(self._places.running) if s.background), None)
            if head.background or youngest is None:
                return False
            self._preempt(youngest)
        return True

    def _yield_places(self) -> tuple[bool, Payer | None, Sequence | None]:
        """If the next sequence has no place, others yield as much as it needs. Returns whether a sequence can start
        now; whose turn is passed over, since a sequence that has yielded may have to wait before others yield to it;
        and the sequence to which others have yielded, which starts before they can."""
        yields = self.num_yields
        if self._places.full and self._shares.even(self._queues.adapters):
            return False, None, None
        head, passed = self._turns.next(), None
        if head and not self._make_room(head):
            passed = head.payer if head.attempts else None
            head = self._turns.next(passed) if passed else None
            if head and not self._make_room(head):
                head = None
        return head is not None, passed, head if self.num_yields > yields else None

    def _make_room(self, head: Sequence) -> bool:
        """Has others yield what it needs. Returns whether it can start now."""
        places = self._places
        while not self._find_room(head):
            if head.background or places.would_exceed_share(head):
                return False
            if not places.full and (exceeding := places.youngest_exceeding()):
                self._give_way(exceeding, exceeding)  # it had what was not its own
            elif yielding := self._shares.yielding(head, places.running, places.lacking(head), places.claim):
                for sequence in yielding:
                    self._give_way(sequence, head)
            else:
                return False
        return True

    def _start(self, sequence: Sequence) -> None:
        self._queues.remove(sequence)
        self._shares.run(sequence)
        self._places.take(sequence)
        sequence.attempts += 1
        if not sequence.output_length:
            sequence.prefix_hit = sequence.computed
        if self._slots.started(sequence.adapter):
            self._turns.begin_anew()

    def _leave(self, sequence: Sequence) -> None:
        self._places.leave(sequence)
        self._shares.stop_running(sequence)
        self._turns.begin_anew()

    def _enqueue(self, sequence: Sequence) -> None:
        self._shares.wait(sequence)
        self._queues.add(sequence)
        self._turns.begin_anew()


def _cost(sequence: Sequence) -> float:
    """What each of its next tokens takes of the budget."""
    scored = sequence.detail.prompt_logprobs and sequence.computed < sequence.prompt_length - 1
    return SCORED_COST if scored else 1
