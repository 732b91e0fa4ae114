"""A replica of two ranks without a model, which keep adapters as real ones do."""

import asyncio
import random
from collections.abc import Awaitable, Callable

from loraplex_protos import shard_pb2 as pb
from loraplex_protos.errors import LoraplexError, OverloadedError, UnavailableError
from loraplex_router.vocabulary.adapter import StagedAdapter
from loraplex_router.vocabulary.references import AdapterReference, Upload
from loraplex_router.wire.calls import all_of, settled
from loraplex_router.wire.shards import PartlyStagedError
from tests.router.fake_shards import FakeShards

ROOM = 4  # adapters in a rank's host memory
RANKS = 2


class Ranks(FakeShards):
    """Each call takes a while, on each rank another one. What a router must never ask for is added to `faults`. Once
    `lost` is set, nothing is answered any more."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.host: list[dict[str, None]] = [{} for _ in range(RANKS)]
        self.slots: list[dict[int, str]] = [{} for _ in range(RANKS)]
        self.faults: list[str] = []
        self.lost = False
        self._chance = chance
        self._plans: dict[int, set[int]] = {}  # slots of plans without a result so far

    async def _pause(self) -> None:
        for _ in range(self._chance.choice((0, 0, 1, 3, 20))):
            await asyncio.sleep(0)
        if self.lost:
            raise UnavailableError("rank 1 is gone")

    async def _on_all(self, work: Callable[[int], Awaitable[None]]) -> None:
        await all_of(map(work, range(RANKS)))

    async def _hold(self, digest: str) -> StagedAdapter:
        async def hold(rank: int) -> None:
            await self._pause()
            if digest not in self.host[rank]:
                await self._pause()
                if len(self.host[rank]) >= ROOM and digest not in self.host[rank]:
                    raise OverloadedError("no room")
                self.host[rank][digest] = None
            await self._pause()

        answers, error = await settled(map(hold, range(RANKS)))
        if isinstance(error, LoraplexError):
            raise PartlyStagedError(error, {digest}) if answers else error
        return StagedAdapter(digest, "local", "", lora_rank=8, size_bytes=10, device_bytes=10)

    async def stage(self, reference: AdapterReference) -> StagedAdapter:
        return await self._hold(self.digests.get(reference.id, f"digest of {reference.id}"))

    async def upload(self, upload: Upload) -> StagedAdapter:
        return await self._hold(f"digest of {b''.join(upload.read().values()).decode()}")

    async def merge(self, digest: str, digests: list[str], *_: object) -> StagedAdapter:
        if any(part not in host for part in digests for host in self.host):
            self.faults.append("a part of a merge was not staged")
        return await self._hold(digest)

    async def unstage(self, digest: str) -> None:
        async def unstage(rank: int) -> None:
            await self._pause()
            if digest in self.slots[rank].values():
                self.faults.append("what was unstaged was in a slot")
            self.host[rank].pop(digest, None)
            await self._pause()

        await self._on_all(unstage)

    async def load(self, digest: str, slot: int) -> None:
        async def load(rank: int) -> None:
            await self._pause()
            if digest not in self.host[rank]:
                self.faults.append("what was loaded was not staged")
            if self.slots[rank].setdefault(slot, digest) != digest:
                self.faults.append("a slot held another adapter")
            await self._pause()

        await self._on_all(load)

    async def unload(self, slot: int) -> None:
        async def unload(rank: int) -> None:
            await self._pause()
            if any(slot in slots for slots in self._plans.values()):
                self.faults.append("a plan used a slot that was emptied")
            self.slots[rank].pop(slot, None)
            await self._pause()

        await self._on_all(unload)

    async def send(self, plan: pb.StepRequest) -> None:
        self._plans[plan.step] = slots = set(plan.slots) - {0}
        if any(slot not in there for slot in slots for there in self.slots):
            self.faults.append("a plan used an empty slot")
        await self._pause()
        await super().send(plan)

    async def receive(self) -> pb.StepResponse:
        await self._pause()
        response = await super().receive()
        del self._plans[response.step]
        return response
