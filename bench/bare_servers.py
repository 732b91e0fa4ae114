"""`python -m bench.bare_servers SECONDS`: servers whose cost is the least that the router's can be.

A bare grpc.aio server and a bare uvicorn application. Instead of tokens, they send messages of the same size at a
fixed interval, and do nothing else.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from loraplex_protos import generation_pb2 as pb
from loraplex_protos.generation_pb2_grpc import GenerationServiceServicer, add_GenerationServiceServicer_to_server

PIECE = pb.GenerateStreamResponse(request_id="0123456789abcdef", text=" w123", tokens=[pb.Token(id=123, text="w123")])
HEAD = '{"id":"cmpl-0123456789abcdef","object":"text_completion","created":1790000000,"model":"stand-in",'
CHUNK = (
    HEAD + '"system_fingerprint":"loraplex-0.1.0","choices":[{"index":0,"text":" w123","logprobs":null,"finish_reason":'
)
EVENT, LAST = (f"data: {CHUNK}{reason}}}]}}\n\n".encode() for reason in ("null", '"length"'))


class BareGrpc(GenerationServiceServicer):
    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        for left in reversed(range(request.stopping.max_new_tokens)):
            await asyncio.sleep(self._seconds)
            piece = pb.GenerateStreamResponse()
            piece.CopyFrom(PIECE)
            if not left:
                piece.finish_reason = pb.FINISH_REASON_LENGTH
            yield piece


def bare_app(seconds: float) -> FastAPI:
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> dict[str, list[dict[str, str]]]:
        return {"data": [{"id": "stand-in"}]}

    @app.post("/v1/completions")
    async def complete(http: Request) -> StreamingResponse:
        return StreamingResponse(events((await http.json())["max_tokens"]), media_type="text/event-stream")

    async def events(count: int) -> AsyncIterator[bytes]:
        for left in reversed(range(count)):
            await asyncio.sleep(seconds)
            yield EVENT if left else LAST + b"data: [DONE]\n\n"

    return app


async def main() -> None:
    seconds = float(sys.argv[1])
    server = grpc.aio.server()
    add_GenerationServiceServicer_to_server(BareGrpc(seconds), server)  # type: ignore[abstract]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    web = uvicorn.Server(uvicorn.Config(bare_app(seconds), port=0, log_level="error"))
    listening = web.config.bind_socket()
    print(f"gRPC 127.0.0.1:{port}\nHTTP 127.0.0.1:{listening.getsockname()[1]}", flush=True)
    await web.serve([listening])


if __name__ == "__main__":
    asyncio.run(main())
