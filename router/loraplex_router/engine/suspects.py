"""Finds the request that crashes replicas. Pure policy: no clock, no transport.

The sequences in plans in flight when a replica was lost are suspects. Waiting sequences are not: they simply continue
elsewhere. How suspects continue depends on how the replica was lost.

If a replica just disappeared, most likely its machine failed. All suspects continue together, which is fastest:
recomputing hundreds of sequences one by one takes many times as long. Suspects that lose the next replica at the same
place are computed alone up to that place, one after the other, youngest first, in plans that alternate with everyone
else's. A suspect that loses three more replicas while alone is the cause: on unreliable machines a lone suspect may be
hit by chance, but not the same one three times. If a shard reported that it failed on a plan, one of the suspects is
certainly to blame: they are computed alone at once, and the second lost replica convicts.

The place is the positions that were in flight at every one of the losses. A sequence is no longer a suspect once it
gets past the place, loses a replica elsewhere, or another suspect is convicted.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from loraplex_router.vocabulary.sequence import Plan, Sequence

CONVICTING_LOSSES = 5  # all but two of them while alone
CONVICTING_FAILURES = 2  # the same, if the shard said that it failed on the plan


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss of a replica."""

    plans: tuple[Plan, ...]  # those in flight, in order
    failed: bool = False  # a shard reported a failure on one of them; otherwise the replica disappeared
    busy: bool = False  # it was also staging an adapter or compiling a grammar, a possible cause: allow one more loss

    def accuse(self) -> Sequence | None:
        """Counts the loss against the sequences in flight. Returns the convicted sequence, if any."""
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
    """Clears them of suspicion."""
    for sequence in sequences:
        sequence.losses = sequence.alone_until = 0
        sequence.lost_at = range(0)
