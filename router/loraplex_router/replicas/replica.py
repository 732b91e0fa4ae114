"""The router's side of one replica: its queue, blocks, slots, adapters and engine."""

from collections.abc import Iterator
from contextlib import contextmanager

from loraplex_protos.errors import UnavailableError
from loraplex_router.adapters.resolutions import Resolutions
from loraplex_router.adapters.staging import AdapterStaging
from loraplex_router.engine.blocks import BlockAllocator
from loraplex_router.engine.changes import Changes
from loraplex_router.engine.engine import Engine
from loraplex_router.engine.observer import EngineObserver
from loraplex_router.engine.pool import AdapterPool
from loraplex_router.engine.scheduler import Limits, Scheduler
from loraplex_router.fair_slots import FairSlots
from loraplex_router.replicas.placement import Candidate
from loraplex_router.vocabulary.adapter import Nearness
from loraplex_router.vocabulary.references import Reference
from loraplex_router.wire.shards import Shards

# Grammars that are compiled at a time. Each occupies a thread of rank 0, as adapters do that are staged.
GRAMMARS_AT_A_TIME = 8


class Replica:
    """Lives as long as the connection to its shards."""

    def __init__(
        self,
        name: str,
        shards: Shards,
        limits: Limits,
        num_blocks: int,
        pool: AdapterPool,
        resolutions: Resolutions,
        observer: EngineObserver,
        changes: Changes,
    ) -> None:
        self.name = name
        self.shards = shards
        self.stopping = False  # or gone: it no longer accepts new sequences
        self.silent = False  # its shards have not answered for a while
        self.pool = pool
        self.blocks = BlockAllocator(num_blocks)
        self.scheduler = Scheduler(limits, self.blocks, pool)
        self.engine = Engine(self.scheduler, pool, shards, observer, changes)
        self.adapters = AdapterStaging(shards, pool, resolutions, changes, self.engine.wake)
        self.compiling = FairSlots(GRAMMARS_AT_A_TIME)
        self.leases = 0  # requests placed here but not submitted yet
        self._preparing = 0  # requests whose adapter is being staged or whose grammar is being compiled
        self._failed_preparing = False

    @property
    def accepting(self) -> bool:
        """Whether it accepts new sequences."""
        return not (self.stopping or self.silent)

    def candidate(self, reference: Reference | None) -> Candidate:
        """The replica as a candidate for a request."""
        if reference is None:
            return Candidate(self.name, self._load, has_spare_slot=True, nearness=Nearness.ABSENT)
        return Candidate(self.name, self._load, self.pool.has_spare_slot, self.adapters.nearness(reference))

    @property
    def _load(self) -> int:
        return self.scheduler.num_running + self.scheduler.num_waiting + self._preparing + self.leases

    @property
    def busy(self) -> bool:
        """Whether it is staging an adapter or compiling a grammar, or was lost while doing so."""
        return bool(self._preparing) or self._failed_preparing

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """A context in which the shards stage an adapter or compile a grammar for a request."""
        self._preparing += 1
        try:
            yield
        except UnavailableError:
            self._failed_preparing = True
            raise
        finally:
            self._preparing -= 1
