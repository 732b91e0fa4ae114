"""Which request a replica died of. Pure policy: no clock, no transport.

What plans in flight computed when a replica was lost is suspect, and nothing else is: what waited goes on elsewhere as
if nothing had happened. How suspects go on depends on how the replica was lost.

A replica that is gone was most likely ended by its machine. All suspects go on together, which is quickest: to compute
hundreds of sequences again one by one takes many times as long. Those that lose the next replica at the same place are
computed alone up to there, one after the other, the youngest first, in plans that take turns with everybody else's.
What loses three more replicas, alone, is what they died of: where machines kill again and again, some suspect is hit
alone now and then, but not the same one three times. Where a shard failed on a plan and said so, one of the suspects is
to blame for certain: they are alone at once, and the second replica convicts.

The place is the positions that were in flight at each of the losses. A sequence that gets past it is no suspect any
more, nor is one that is lost somewhere else the next time, and nobody is once one of them is convicted.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from loraplex_router.vocabulary.sequence import Plan, Sequence

CONVICTING_LOSSES = 5  # all but two of them alone
CONVICTING_FAILURES = 2  # the same, if the shard said that it failed on the plan


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss of a replica."""

    plans: tuple[Plan, ...]  # in flight, in order
    failed: bool = False  # a shard failed on one of them; else it is gone
    busy: bool = (
        False  # it staged an adapter or compiled a grammar as well, of which it may have died: once more is due
    )

    def accuse(self) -> Sequence | None:
        """Counts it against what was in flight, and answers which sequence is to be ended for it, if one is."""
        places = dict[Sequence, range]()
        for chunk in (chunk for plan in self.plans for chunk in plan.chunks):
            begin = places[chunk.sequence].start if chunk.sequence in places else chunk.start
            places[chunk.sequence] = range(begin, chunk.start + chunk.length)
        for sequence, place in places.items():
            again = range(max(place.start, sequence.lost_at.start), min(place.stop, sequence.lost_at.stop))
            sequence.losses = sequence.losses + 1 if again else 1
            sequence.lost_at = again or place
            sequence.alone_until = sequence.lost_at.stop if self.failed or sequence.losses > 1 else 0
        if len(places) != 1:
            return None
        (alone,) = places
        convicting = (CONVICTING_FAILURES if self.failed else CONVICTING_LOSSES) + self.busy
        return alone if alone.losses >= convicting else None


def acquit(sequences: Iterable[Sequence]) -> None:
    """They are suspects no more."""
    for sequence in sequences:
        sequence.losses = sequence.alone_until = 0
        sequence.lost_at = range(0)
