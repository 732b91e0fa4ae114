"""One rank of a replica without a model, behind the real protocol, to measure a router without the cost of a model.

The next token is the last one plus the adapter's slot, plus one. The durations of steps, staging and loading are
settings.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import tokenizers
from grpc_health.v1 import health, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse

from loraplex_protos import shard_pb2 as pb
from loraplex_protos.protocol import PROTOCOL_VERSION
from loraplex_protos.shard_pb2_grpc import ShardServiceServicer, add_ShardServiceServicer_to_server

VOCABULARY = 1000
INFO = pb.GetInfoResponse(
    model_id="stand-in",
    architecture="StandIn",
    dtype="float32",
    vocab_size=VOCABULARY,
    max_model_len=4096,
    tensor_parallel_size=1,
    block_size=16,
    num_blocks=4096,
    max_sequences=32,
    max_batch_tokens=256,
    protocol_version=PROTOCOL_VERSION,
    adapter_host_bytes=1 << 40,
)

Context = grpc.aio.ServicerContext[object, object]


@dataclass(frozen=True, slots=True)
class Timing:
    """In seconds."""

    step: float = 0.0
    stage: float = 0.0
    load: float = 0.0


class StandInShard(ShardServiceServicer):
    """Answers for one rank. `stages` and `loads` count the calls."""

    def __init__(self, timing: Timing, info: pb.GetInfoResponse | None = None) -> None:
        self.stages = self.loads = 0
        self._timing = timing
        self._info = pb.GetInfoResponse()
        self._info.CopyFrom(info or INFO)
        self._last: dict[int, int] = {}  # by row

    async def GetInfo(self, request: pb.GetInfoRequest, context: Context) -> pb.GetInfoResponse:
        return self._info

    async def GetTokenizer(self, request: pb.GetTokenizerRequest, context: Context) -> pb.GetTokenizerResponse:
        vocabulary = {f"w{number}": number for number in range(VOCABULARY)}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
        return pb.GetTokenizerResponse(
            tokenizer_json=tokenizer.to_str().encode(), chat_template="{{ messages[-1]['content'] }}"
        )

    async def Reset(self, request: pb.ResetRequest, context: Context) -> pb.ResetResponse:
        return pb.ResetResponse()

    async def StageAdapter(self, request: pb.StageAdapterRequest, context: Context) -> pb.StageAdapterResponse:
        self.stages += 1
        await asyncio.sleep(self._timing.stage)
        digest = hashlib.sha256(request.id.encode()).hexdigest()
        return pb.StageAdapterResponse(digest=digest, source="local", lora_rank=8, size_bytes=1 << 20)

    async def LoadAdapter(self, request: pb.LoadAdapterRequest, context: Context) -> pb.LoadAdapterResponse:
        self.loads += 1
        await asyncio.sleep(self._timing.load)
        return pb.LoadAdapterResponse()

    async def UnloadAdapter(self, request: pb.UnloadAdapterRequest, context: Context) -> pb.UnloadAdapterResponse:
        return pb.UnloadAdapterResponse()

    async def UnstageAdapter(self, request: pb.UnstageAdapterRequest, context: Context) -> pb.UnstageAdapterResponse:
        return pb.UnstageAdapterResponse()

    async def ListLocalAdapters(
        self, request: pb.ListLocalAdaptersRequest, context: Context
    ) -> pb.ListLocalAdaptersResponse:
        return pb.ListLocalAdaptersResponse()

    async def Step(self, plans: AsyncIterator[pb.StepRequest], context: Context) -> AsyncIterator[pb.StepResponse]:
        self._info.driven = True
        try:
            async for plan in plans:
                await asyncio.sleep(self._timing.step)
                yield self._run(plan)
        finally:
            self._info.driven = False

    def _run(self, plan: pb.StepRequest) -> pb.StepResponse:
        response = pb.StepResponse(step=plan.step, duration_us=int(self._timing.step * 1e6))
        for start in plan.starts:
            self._last[start.row] = start.tokens[-1]
        for row, slot, samples in zip(plan.rows, plan.slots, plan.samples, strict=True):
            response.token_counts.append(int(samples))
            if samples:
                self._last[row] = (self._last[row] + slot + 1) % VOCABULARY
                response.tokens.append(self._last[row])
        return response


class StandInServer:
    """A server for a stand-in, with its health service. Without `credentials` it is not encrypted."""

    def __init__(self, shard: StandInShard, listen: str, credentials: grpc.ServerCredentials | None = None) -> None:
        self._server = grpc.aio.server()
        self._health = health.aio.HealthServicer()
        add_ShardServiceServicer_to_server(shard, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if credentials is None:
            self.port = self._server.add_insecure_port(listen)
        else:
            self.port = self._server.add_secure_port(listen, credentials)

    async def __aenter__(self) -> "StandInServer":
        await self._health.set("", HealthCheckResponse.SERVING)
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(None)
