"""What prompts may take of one plan, so that first tokens come soon. Pure policy."""

import heapq
from functools import cached_property

from loraplex_router.engine.fairness import Shares
from loraplex_router.vocabulary.sequence import Payer, Sequence


class PromptBudget:
    """A plan that brings the first token of a tenant is not made longer by prompts of a tenant with much more. While
    nobody else waits, those of the tenant that dominates take a part of the plan at most, since a newcomer may have to
    wait for its step. Fast-forward tokens are no prompts: streams do not wait."""

    def __init__(self, shares: Shares, tokens: int, part: int) -> None:
        """`part`: of the tokens, for the dominant tenant."""
        self._shares = shares
        self.left = tokens
        self._part = part
        self._firsts: list[tuple[float, int, Sequence]] = []  # a heap, by what their tenants had

    @cached_property
    def _dominant(self) -> Payer | None:
        """Most plans have no prompts, and need not go through all tenants."""
        dominant = self._shares.dominant()
        return None if dominant is None or self._shares.others_wait(dominant) else dominant

    def of(self, sequence: Sequence) -> int:
        """The tokens that it may take. 0: it waits for the next plan."""
        if sequence.computed >= sequence.prompt_length:
            return self.left
        if self._makes_way(sequence):
            return 0
        return min(self.left, self._part) if sequence.payer == self._dominant else self.left

    def take(self, sequence: Sequence, tokens: int, of_prompt: bool) -> None:
        """So many of its tokens are in the plan."""
        self.left -= tokens
        if of_prompt and sequence.payer == self._dominant:
            self._part -= tokens
        if not sequence.output_length and sequence.computed == len(sequence.tokens):
            heapq.heappush(self._firsts, (self._shares.of(sequence).next_place, sequence.number, sequence))

    def _makes_way(self, sequence: Sequence) -> bool:
        """Whether the first tokens of others, who have much less, come sooner without it."""
        firsts = self._firsts
        while firsts and firsts[0][0] < (now := self._shares.of(firsts[0][-1]).next_place):  # more has started
            heapq.heapreplace(firsts, (now, *firsts[0][1:]))
        return bool(firsts) and self._shares.has_much_more(sequence, firsts[0][-1])
