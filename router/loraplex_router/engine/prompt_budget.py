"""What prompts may take of one plan, so that first tokens come soon. Pure policy."""

import heapq

from loraplex_router.engine.fairness import Shares
from loraplex_router.vocabulary.sequence import Payer, Sequence


class PromptBudget:
    """A plan that brings the first token of a tenant is not made longer by prompts of a tenant with much more. Those of
    the tenant that dominates take a part of the plan at most, since a newcomer may have to wait for its step."""

    def __init__(self, shares: Shares, tokens: int, dominant: Payer | None, part: int) -> None:
        """`part`: of the tokens, for the dominant tenant."""
        self._shares = shares
        self.left = tokens
        self._dominant = dominant
        self._part = part
        self._firsts: list[tuple[float, int, Sequence]] = []  # a heap, by what their tenants had

    def of(self, sequence: Sequence) -> int:
        """The tokens that its prompt may take. 0: it waits for the next plan."""
        if self._makes_way(sequence):
            return 0
        return min(self.left, self._part) if sequence.payer == self._dominant else self.left

    def take(self, sequence: Sequence, tokens: int) -> None:
        """So many tokens of its prompt are in the plan."""
        self.left -= tokens
        if sequence.payer == self._dominant:
            self._part -= tokens
        if not sequence.output_length and sequence.computed == len(sequence.tokens):
            heapq.heappush(self._firsts, (self._shares.of(sequence).next_place, sequence.number, sequence))

    def _makes_way(self, sequence: Sequence) -> bool:
        """Whether the first tokens of others, who have much less, come sooner without it."""
        firsts = self._firsts
        while firsts and firsts[0][0] < (now := self._shares.of(firsts[0][-1]).next_place):  # more has started
            heapq.heapreplace(firsts, (now, *firsts[0][1:]))
        return bool(firsts) and self._shares.has_much_more(sequence, firsts[0][-1])
