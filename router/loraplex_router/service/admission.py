"""Which requests may wait: the limit of the queue, and deadlines that cannot be met."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from loraplex_protos.errors import DeadlineError, OverloadedError
from loraplex_router.access.tenant import Tenant
from loraplex_router.replicas.replicas import Replicas
from loraplex_router.vocabulary.request import Request


class Admission:
    """`max_queue`: how many sequences may wait."""

    def __init__(self, replicas: Replicas, max_queue: int) -> None:
        self.max_queue = max_queue
        self._replicas = replicas
        self._preparing = Counter[str]()  # sequences of requests that are not queued yet, by tenant

    @property
    def idle(self) -> bool:
        return not self._preparing.total()

    @contextmanager
    def preparing(self, sequences: int, tenant: Tenant, background: bool) -> Iterator[None]:
        """A context in which a request's sequences are prepared and then queued. Raises OverloadedError."""
        self._check(sequences, tenant, background)
        self._preparing[tenant.name] += sequences
        try:
            yield
        finally:
            self._preparing[tenant.name] -= sequences
            self._replicas.changes.notify()

    def _check(self, sequences: int, tenant: Tenant, background: bool) -> None:
        """Where the queue is full, a tenant that has less than its share of it may still wait. Background requests get
        half of the queue."""
        total = self._replicas.num_waiting + self._preparing.total() + sequences
        if total <= (self.max_queue // 2 if background else self.max_queue):
            return
        if background:
            raise OverloadedError(
                "half of the queue is full, which is what background requests may use: try again later"
            )
        waiting = self._replicas.waiting_by_tenant() + self._preparing
        share = self.max_queue // len({*waiting, tenant.name})
        if waiting[tenant.name] + sequences > share:
            raise OverloadedError(f"the queue is full ({waiting.total()} sequences are waiting): try again later")


def check_deadline(request: Request, waited: float) -> None:
    """Raises DeadlineError if the request would wait until its deadline, as those before it have, in seconds."""
    if request.deadline is not None and waited and waited > (left := request.deadline - time.monotonic()):
        raise DeadlineError(
            f"the requests before it have waited for {waited:.1f} s, but its deadline is in {left:.1f} s: allow more"
            " time, or try again later"
        )
