"""A generation service with scripted answers, behind a real gRPC server."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count, cycle, islice

import grpc

from loraplex_protos import generation_pb2 as pb
from loraplex_protos.errors import BEGUN, LoraplexError, to_status
from loraplex_protos.generation_pb2_grpc import GenerationServiceServicer, add_GenerationServiceServicer_to_server

ENDLESS = "endless"


class ScriptedServicer(GenerationServiceServicer):
    """Repeats `words`, one token each, until max_new_tokens; for the prompt ENDLESS, until it is cancelled."""

    def __init__(self) -> None:
        self.words = [" one", " two", " three"]
        self.adapters = [
            pb.AdapterStatus(id="sql", source="local", tier=pb.ADAPTER_TIER_DISK),
            pb.AdapterStatus(
                id="org/poet",
                source="hub",
                revision="c0ffee",
                digest="d1" * 32,
                tier=pb.ADAPTER_TIER_DEVICE,
                lora_rank=8,
                size_bytes=3_000_000,
                running_sequences=2,
                waiting_sequences=1,
                requests=3,
                pinned=True,
                last_used=time.time() - 7300,
            ),
        ]
        self.answers: list[pb.GeneratedSequence] = []  # in place of words: one for each of the next requests
        self.warnings: list[str] = []  # with such answers
        self.requests: list[object] = []
        self.failures: list[LoraplexError] = []  # each is raised by one of the next calls
        self.failure_after_first_piece: LoraplexError | None = None
        self.resumable = False  # a resume_token is the number of words that have arrived
        self.left = threading.Event()  # set when an endless call ends

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> pb.GenerateResponse:
        self._begin(request, context)
        if request.text == ENDLESS:
            self._watch(context)
            self.left.wait(30)
            return pb.GenerateResponse()
        context.send_initial_metadata(((BEGUN, "1"),))
        if self.failure_after_first_piece:
            context.abort_with_status(to_status(self.failure_after_first_piece))
        if self.answers:
            return pb.GenerateResponse(request_id="r-1", sequences=[self.answers.pop(0)], warnings=self.warnings)
        words = list(self._words(request))
        return pb.GenerateResponse(
            request_id=request.request_id or "r-1",
            sequences=[
                pb.GeneratedSequence(
                    text="".join(words),
                    tokens=[_token(request, id, word) for id, word in enumerate(words)],
                    finish_reason=pb.FINISH_REASON_LENGTH,
                    usage=_usage(len(words)),
                    seed=request.sampling.seed + index if request.sampling.HasField("seed") else None,
                )
                for index in range(request.n or 1)
            ],
            prompt=_prompt(request),
            adapter_digest=_digest(request),
        )

    def GenerateStream(
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateStreamResponse]:
        self._begin(request, context)
        if request.text == ENDLESS:
            self._watch(context)
        if self.answers:
            yield from _pieces(self.answers.pop(0), self.warnings)
            return
        for index in range(request.n or 1):
            for position, word in enumerate(self._words(request)):
                if position < int(request.resume_token or 0):
                    continue
                if request.text == ENDLESS and self.left.wait(0.005):
                    return
                yield pb.GenerateStreamResponse(
                    request_id=request.request_id or "r-1",
                    index=index,
                    text=word,
                    tokens=[_token(request, position, word)],
                    prompt=_prompt(request) if not position and not index else [],
                    adapter_digest="" if position else _digest(request),
                    resume_token=str(position + 1) if self.resumable else "",
                )
                if self.failure_after_first_piece:
                    context.abort_with_status(to_status(self.failure_after_first_piece))
            yield pb.GenerateStreamResponse(
                request_id=request.request_id or "r-1",
                index=index,
                finish_reason=pb.FINISH_REASON_LENGTH,
                usage=_usage(position + 1),
                seed=request.sampling.seed + index if request.sampling.HasField("seed") else None,
            )

    def CancelGeneration(
        self, request: pb.CancelGenerationRequest, context: grpc.ServicerContext
    ) -> pb.CancelGenerationResponse:
        self._begin(request, context)
        return pb.CancelGenerationResponse()

    def Tokenize(self, request: pb.TokenizeRequest, context: grpc.ServicerContext) -> pb.TokenizeResponse:
        self._begin(request, context)
        text = request.text or "".join(message.content for message in request.chat.messages)
        spans = [pb.TokenSpan(id=ord(letter), text=letter, start=at, stop=at + 1) for at, letter in enumerate(text)]
        return pb.TokenizeResponse(tokens=spans)

    def ListAdapters(self, request: pb.ListAdaptersRequest, context: grpc.ServicerContext) -> pb.ListAdaptersResponse:
        self._begin(request, context)
        start = int(request.page_token or 0)
        end = start + (request.page_size or len(self.adapters))
        token = str(end) if end < len(self.adapters) else ""
        return pb.ListAdaptersResponse(adapters=self.adapters[start:end], next_page_token=token)

    def LoadAdapter(self, request: pb.LoadAdapterRequest, context: grpc.ServicerContext) -> pb.LoadAdapterResponse:
        self._begin(request, context)
        status = pb.AdapterStatus(
            id=request.adapter.id, source=request.adapter.source or "local", tier=pb.ADAPTER_TIER_HOST, lora_rank=4
        )
        return pb.LoadAdapterResponse(adapter=status)

    def UnloadAdapter(
        self, request: pb.UnloadAdapterRequest, context: grpc.ServicerContext
    ) -> pb.UnloadAdapterResponse:
        self._begin(request, context)
        return pb.UnloadAdapterResponse()

    def PinAdapter(self, request: pb.PinAdapterRequest, context: grpc.ServicerContext) -> pb.PinAdapterResponse:
        self._begin(request, context)
        return pb.PinAdapterResponse(adapter=self._status(request, pinned=True))

    def UnpinAdapter(self, request: pb.UnpinAdapterRequest, context: grpc.ServicerContext) -> pb.UnpinAdapterResponse:
        self._begin(request, context)
        return pb.UnpinAdapterResponse(adapter=self._status(request, pinned=False))

    def _status(self, request: pb.PinAdapterRequest | pb.UnpinAdapterRequest, pinned: bool) -> pb.AdapterStatus:
        tier, id = pb.ADAPTER_TIER_DEVICE, request.adapter.id or "a,b"
        residence = pb.AdapterResidence(replica="10.0.0.1:50060", tier=tier, pinned=pinned)
        return pb.AdapterStatus(
            id=id, digest=request.digest, tier=tier, pinned=pinned, residences=[residence], last_used=1.5
        )

    def GetModelInfo(self, request: pb.GetModelInfoRequest, context: grpc.ServicerContext) -> pb.GetModelInfoResponse:
        self._begin(request, context)
        return pb.GetModelInfoResponse(
            model_id="tiny", architecture="llama", dtype="float32", max_model_len=64, has_chat_template=True
        )

    def _begin(self, request: object, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        if self.failures:
            context.abort_with_status(to_status(self.failures.pop(0)))

    def _words(self, request: pb.GenerateRequest) -> Iterator[str]:
        if request.text == ENDLESS:
            return (f" {number}" for number in count())
        return islice(cycle(self.words), request.stopping.max_new_tokens or len(self.words))

    def _watch(self, context: grpc.ServicerContext) -> None:
        if not context.add_callback(self.left.set):  # it has already ended
            self.left.set()


@contextmanager
def serving(servicer: ScriptedServicer) -> Iterator[str]:
    """Runs a server with `servicer`, and gives its address."""
    server = grpc.server(ThreadPoolExecutor(8))
    add_GenerationServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def answer(text: str, *calls: pb.ToolCall, finish_reason: str = "END_TOKEN", **fields: str) -> pb.GeneratedSequence:
    reason = pb.FinishReason.Value(f"FINISH_REASON_{finish_reason}")
    return pb.GeneratedSequence(text=text, tool_calls=calls, finish_reason=reason, usage=_usage(7), **fields)


def _pieces(answer: pb.GeneratedSequence, warnings: list[str]) -> Iterator[pb.GenerateStreamResponse]:
    """Letter by letter; of a call, its name first."""
    yield pb.GenerateStreamResponse(warnings=warnings)
    yield from (pb.GenerateStreamResponse(reasoning=letter) for letter in answer.reasoning)
    yield from (pb.GenerateStreamResponse(text=letter) for letter in answer.text)
    for index, call in enumerate(answer.tool_calls):
        head = pb.ToolCall(id=call.id, name=call.name)
        for part in (head, *(pb.ToolCall(arguments=letter) for letter in call.arguments)):
            yield pb.GenerateStreamResponse(tool_calls=[pb.ToolCallPart(index=index, call=part)])
    yield pb.GenerateStreamResponse(finish_reason=answer.finish_reason, usage=answer.usage)


def _token(request: pb.GenerateRequest, id: int, text: str) -> pb.Token:
    alternatives = [pb.TokenLogprob(id=id, text=text, logprob=-0.5)] * request.detail.top_logprobs
    return pb.Token(id=id, text=text, logprob=-0.5 if request.detail.logprobs else None, alternatives=alternatives)


def _prompt(request: pb.GenerateRequest) -> list[pb.PromptToken]:
    if not request.detail.prompt_logprobs:
        return []
    likely = [
        pb.TokenLogprob(id=9, text=" c\ufffd", logprob=-0.125, partial=b" c\xc3")
    ] * request.detail.prompt_top_logprobs
    return [
        pb.PromptToken(id=7, text="The"),
        pb.PromptToken(id=8, text="\ufffd", logprob=-0.25, alternatives=likely, partial=b"\xa9"),
    ]


def _usage(generated_tokens: int) -> pb.Usage:
    return pb.Usage(prompt_tokens=5, cached_tokens=2, generated_tokens=generated_tokens)


def _digest(request: pb.GenerateRequest) -> str:
    return "d1" * 32 if request.HasField("adapter") else ""
