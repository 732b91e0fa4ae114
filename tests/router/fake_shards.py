"""A replica without a model: the next token is the last one plus the adapter slot, plus one."""

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING

from loraplex_protos import shard_pb2 as pb
from loraplex_protos.errors import (
    AdapterInvalidError,
    AdapterNotFoundError,
    LoraplexError,
    OverloadedError,
    UnavailableError,
)
from loraplex_router.vocabulary.adapter import Adapter, Fetch, Invocation, LocalAdapter, StagedAdapter
from loraplex_router.vocabulary.grammar import Grammar
from loraplex_router.vocabulary.references import AdapterReference, MergedReference, Upload
from loraplex_router.wire.shards import Shards

VOCABULARY = 1000


class FakeShards:
    """Keeps rows like real shards. A sequence whose next input is `failing_token` fails with `failure`; a plan with a
    sequence that has the `deadly_token` is answered with `death`; the next load raises `load_error`, and the next
    result `step_error`. A step takes `step_seconds`. What is pooled is the prompt's last token."""

    def __init__(self) -> None:
        self.known: dict[int, list[int]] = {}
        self.scored: set[int] = set()  # rows whose sequences want logprobs
        self.pooled: set[int] = set()  # rows whose sequences are pooled
        self.computed: dict[int, int] = {}  # positions
        self.returned: dict[int, int] = {}  # tokens that were returned, or are of the prompt
        self.results: deque[pb.StepResponse | LoraplexError] = deque()
        self.log: list[str] = []
        self.failing_token: int | None = None
        self.failure: pb.FailureReason.ValueType = pb.FAILURE_REASON_NOT_FINITE
        self.deadly_token: int | None = None
        self.death: LoraplexError = UnavailableError("rank 1 is gone")
        self.gone = asyncio.Event()  # set when the process has ended
        self.load_error: LoraplexError | None = None
        self.room = 100  # adapters that the device has memory for
        self.loaded: set[int] = set()
        self.device_bytes: dict[str, int] = {}  # of ids; 10 of all others
        self.step_error: Exception | None = None
        self.step_seconds = 0.0
        self.digests: dict[str, str] = {}  # of ids whose content is another one here
        self.absent = {"absent"}
        self.refused: dict[str, str] = {}  # ids that no source can have, and why
        self.local = [LocalAdapter("a"), LocalAdapter("b"), LocalAdapter("broken", "cut short", ())]
        self.warnings: tuple[str, ...] = ()
        self.invocation: Invocation | None = None
        self.loads_held = asyncio.Event()
        self.loads_held.set()
        self.unloads_held = asyncio.Event()
        self.unloads_held.set()
        self.stages_held = asyncio.Event()
        self.stages_held.set()
        self.fetching: list[Fetch] = []
        self.fetch_error: LoraplexError | None = None
        self.fetches_held = asyncio.Event()
        self.fetches_held.set()

    async def send(self, plan: pb.StepRequest) -> None:
        self.log.append(f"plan {plan.step}")
        response = pb.StepResponse(step=plan.step, duration_us=round(self.step_seconds * 1e6))
        for start in plan.starts:
            self.known[start.row] = list(start.tokens)
            (self.scored.add if start.logprobs else self.scored.discard)(start.row)
            (self.pooled.add if start.pool else self.pooled.discard)(start.row)
            self.computed[start.row] = start.computed
            self.returned[start.row] = len(start.tokens) - start.unscored
        if any(self.deadly_token in self.known[row] for row in plan.rows):
            self.results.append(self.death)
            return
        chunks = zip(plan.rows, plan.slots, plan.samples, plan.lengths, strict=True)
        for place, (row, slot, samples, length) in enumerate(chunks):
            failed = self.known[row][-1] == self.failing_token
            self.computed[row] += length
            unscored = self.known[row][self.returned[row] : self.computed[row] + 1]
            self.returned[row] += len(unscored)
            if failed:
                response.failed_chunks.append(place)
                response.failure_reasons.append(self.failure)
            response.token_counts.append(len(unscored) + int(samples and not failed))
            response.tokens.extend(unscored)
            if row in self.pooled and self.computed[row] == len(self.known[row]):
                response.pooled_chunks.append(place)
                response.pooled_lengths.append(1)
                response.pooled.append(self.known[row][-1])
            if samples:
                self.returned[row] += 1
                self.known[row].append((self.known[row][-1] + slot + 1) % VOCABULARY)
                response.tokens.extend([] if failed else self.known[row][-1:])
        if self.scored.intersection(plan.rows):
            response.logprobs.extend([-1.0] * len(response.tokens))
        self.results.append(response)

    async def receive(self) -> pb.StepResponse:
        await asyncio.sleep(self.step_seconds)
        if self.step_error is not None:
            raise self.step_error
        response = self.results.popleft()
        if isinstance(response, LoraplexError):
            raise response
        self.log.append(f"result {response.step}")
        return response

    async def stage(self, reference: AdapterReference) -> StagedAdapter:
        if reference.id in self.absent:
            raise AdapterNotFoundError(f"no {reference.id}")
        await self.stages_held.wait()
        self.log.append(f"stage {reference.id}")
        digest = self.digests.get(reference.id, f"digest of {reference.id}")
        return StagedAdapter(
            digest,
            reference.source or "local",
            "",
            lora_rank=8,
            size_bytes=10,
            device_bytes=self.device_bytes.get(reference.id, 10),
            warnings=self.warnings,
            invocation=self.invocation,
        )

    async def fetch(self, reference: AdapterReference) -> int:
        self.log.append(f"fetch {reference.id}")
        self.fetching.append(Fetch(reference.id, reference.source, reference.revision, 30, 120))
        await self.fetches_held.wait()
        self.fetching.pop()
        if reference.id in self.absent:
            raise AdapterNotFoundError(f"no {reference.id}")
        if self.fetch_error is not None:
            raise self.fetch_error
        return 10

    async def refusals(self, references: Sequence[AdapterReference]) -> list[str]:
        self.log.append(f"refusals {len(references)}")
        return [self.refused.get(each.id, "") for each in references]

    async def fetches(self) -> list[Fetch]:
        return list(self.fetching)

    async def upload(self, upload: Upload) -> StagedAdapter:
        await self.stages_held.wait()
        files = upload.read()
        if b"broken" in files.values():
            raise AdapterInvalidError("adapter_config.json is not valid")
        self.log.append("upload")
        digest = sha256(b"".join(files.values())).hexdigest()
        return StagedAdapter(digest, "upload", "", lora_rank=8, size_bytes=10)

    async def merge(
        self, digest: str, digests: Sequence[str], merged: MergedReference, uploads: Mapping[str, Upload]
    ) -> StagedAdapter:
        self.log.append(f"merge {','.join(digests)}")
        self.log += [f"sent {name} of {part}" for part, upload in uploads.items() for name in upload.read()]
        return StagedAdapter(digest, "merged", "", lora_rank=8, size_bytes=10)

    async def load(self, digest: str, slot: int) -> None:
        await self.loads_held.wait()
        if self.load_error is not None:
            raise self.load_error
        if len(self.loaded) >= self.room:
            raise OverloadedError("no memory")
        self.loaded.add(slot)
        self.log.append(f"load {digest} into {slot}")

    async def unload(self, slot: int) -> None:
        await self.unloads_held.wait()
        self.loaded.discard(slot)
        self.log.append(f"unload {slot}")

    async def unstage(self, digest: str) -> None:
        self.log.append(f"unstage {digest}")

    async def compile_grammar(self, grammar: Grammar, adapter: Adapter) -> tuple[str, ...]:
        await asyncio.sleep(0)
        if grammar.text == "deadly":
            self.gone.set()
            raise self.death
        return ()

    async def local_adapters(self) -> list[LocalAdapter]:
        return self.local


if TYPE_CHECKING:
    _complete: Shards = FakeShards()
