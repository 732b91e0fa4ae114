"""The operations behind all faces: checks a request, tokenizes it, resolves its adapter and submits it to the
engine."""

import asyncio
import secrets
import time
from collections import Counter
from contextlib import ExitStack

from loraplex_protos import generation_pb2 as pb
from loraplex_protos.errors import (
    FieldViolation,
    InvalidRequestError,
    OverloadedError,
    RequestCancelledError,
    RequestNotFoundError,
    UnavailableError,
    quote,
)
from loraplex_router.access.audit import audited
from loraplex_router.access.keys import Keys, Tenant
from loraplex_router.adapters.suggestions import Suggestions
from loraplex_router.engine.output import Embedding, Generation
from loraplex_router.replicas.administration import Administration
from loraplex_router.replicas.replicas import Lease, Replicas
from loraplex_router.service.adapters import Adapters
from loraplex_router.service.prompts import Text, encode, make_sequence
from loraplex_router.telemetry.telemetry import Telemetry
from loraplex_router.text.model import Model
from loraplex_router.text.stops import StopMatcher
from loraplex_router.text.tokenizer import Spans, Tokenizer
from loraplex_router.vocabulary.adapter import NEVER, Adapter
from loraplex_router.vocabulary.chat import Chat, RenderedChat
from loraplex_router.vocabulary.checks import check_adapter, check_embed_request, check_request
from loraplex_router.vocabulary.context_length import check_tokens, room_for
from loraplex_router.vocabulary.grammar import Grammar
from loraplex_router.vocabulary.references import AdapterReference, Reference
from loraplex_router.vocabulary.request import EmbedRequest, Request
from loraplex_router.vocabulary.sampling import Sampling
from loraplex_router.vocabulary.sequence import FinishReason
from loraplex_router.vocabulary.violations import Violations
from loraplex_router.vocabulary.volume import Volume

FEW_INPUTS = 32  # to embed before other tasks get a turn
LONG_PROMPT = 1000  # tokens: between two such prompts of a call, other tasks get a turn


class Service:
    """The router's operations, shared by all faces. All raise LoraplexError.

    `key` is the caller's API key, if any; if the server has keys, it is checked first. Operations that need the model
    raise UnavailableError until it is known. `max_queue` is how many sequences may wait.
    """

    def __init__(
        self, replicas: Replicas, administration: Administration, keys: Keys, max_queue: int, telemetry: Telemetry
    ) -> None:
        self.keys = keys
        self.telemetry = telemetry
        self.max_queue = max_queue
        self.draining = False
        self._replicas = replicas
        self._suggestions = Suggestions(administration.names)
        self.adapters = Adapters(keys, administration, self._suggestions, lambda: self._known_model)
        self._model: Model | None = None
        self._running: dict[str, tuple[Generation, Tenant] | None] = {}  # by request id; None: not queued yet
        self._preparing = Counter[str]()  # sequences of requests that are not queued yet, by tenant
        self._arrivals = 0

    def serve(self, model: Model) -> None:
        """Sets the model that a new replica serves. Raises UnavailableError if another model is already served."""
        if self._model is None:
            self._model = model
            self._checking = asyncio.create_task(model.renderer.check())
            self.telemetry.metrics.describe_build(model.info.model_id)
        self._model.check_fits(model)

    async def aclose(self) -> None:
        if self._model is not None:
            self._checking.cancel()
            await self._model.renderer.aclose()

    @property
    def healthy(self) -> bool:
        """Whether a generation would succeed now."""
        return self._replicas.ready.is_set() and not self.draining

    @property
    def info(self) -> pb.GetModelInfoResponse:
        return self._known_model.info

    @property
    def model_names(self) -> tuple[str, ...]:
        return self._known_model.names

    @property
    def sampling_defaults(self) -> Sampling:
        """The default sampling parameters of OpenAI's routes."""
        return self._known_model.sampling_defaults

    @property
    def tokenizer(self) -> Tokenizer:
        return self._known_model.tokenizer

    @property
    def _known_model(self) -> Model:
        if self._model is None:
            raise UnavailableError("no replica is ready yet: try again later")
        return self._model

    @property
    def idle(self) -> bool:
        return not self._preparing.total() and self._replicas.idle

    async def generate(self, request: Request, key: str | None = None, volume: Volume | None = None) -> Generation:
        """Admits a request and queues its sequences. The caller reads the generation and must then `close` it. Callers
        that make several requests count them in one `volume`.

        All errors in the request are raised here, before anything is generated.
        """
        arrived = time.monotonic()
        with self.telemetry.admission(request, arrived):
            tenant = self.keys.tenant(key)
            if self.info.embeds_only:
                lacks = "is an embedding model, saved without an lm head: it cannot generate, ask for embeddings"
                raise InvalidRequestError(FieldViolation("model", lacks))
            check_request(request, self.info.vocab_size, self.info.adapter_sources)
            tenant.check_adapter(request.adapter)
            tenant.begin(arrived)
            try:
                return await self._start(request, tenant, arrived, volume or Volume())
            except BaseException:
                tenant.end(0, time.monotonic())
                raise

    async def embed(self, request: EmbedRequest, key: str | None = None) -> list[Embedding]:
        """One embedding per input. They count as one request for a key's limits."""
        arrived = time.monotonic()
        with self.telemetry.admission(request, arrived):
            tenant = self.keys.tenant(key)
            check_embed_request(request, self.info.vocab_size, self.info.adapter_sources)
            tenant.check_adapter(request.adapter)
            tenant.begin(arrived)
        started, volume = list[Generation](), Volume()
        try:
            for part in request.parts():
                with self.telemetry.admission(part, arrived):
                    started.append(await self._start(part, tenant, arrived, volume))
                if len(started) % FEW_INPUTS == 0:
                    await asyncio.sleep(0)
            return [await _read_embedding(generation) for generation in started]
        finally:
            for generation in started:
                self._end(generation)
            tenant.end(sum(generation.num_tokens for generation in started), time.monotonic())

    async def _start(self, request: Request, tenant: Tenant, arrived: float, volume: Volume) -> Generation:
        self._admit(request, tenant)
        request_id = self._name(request)
        self._running[request_id] = None
        self._preparing[tenant.name] += request.n
        try:
            with ExitStack() as held:
                text: Text | Chat = request.prompt
                if isinstance(text, Chat):  # its template may be the adapter's
                    lease = held.enter_context(await self._place(request.adapter, request.grammar, tenant))
                    text = await self._render(text, lease.adapter)
                prompt = await encode(request, text, self._known_model)
                room = volume.add(request, len(prompt), room_for(request, len(prompt), self.info.max_model_len))
                check_tokens(request, prompt, self.info.vocab_size, self.tokenizer.token_text)
                if len(prompt) > LONG_PROMPT:
                    await asyncio.sleep(0)
                validated = time.monotonic()
                if not isinstance(request.prompt, Chat):
                    lease = held.enter_context(await self._place(request.adapter, request.grammar, tenant))
                generation = Generation(request_id, request.adapter, lease.adapter, arrived, validated, tenant.name)
                acts_from = lease.adapter.acts_from(prompt)
                if acts_from == NEVER:
                    generation.warnings = (self._not_invoked(lease.adapter, generation.adapter_name),)
                decoder = self.tokenizer.verbatim if request.show_special_tokens else self.tokenizer
                for index in range(request.n):
                    number = self._next_number()
                    sequence = make_sequence(
                        request, index, number, prompt, room, text, lease.adapter, acts_from, tenant, self._known_model
                    )
                    stops = StopMatcher(request.stop, request.include_stop)
                    generation.add(sequence, decoder, stops, request.stop_token_ids)
                self.telemetry.queued(generation)
                lease.submit(generation)
        except BaseException:
            del self._running[request_id]
            raise
        finally:
            self._preparing[tenant.name] -= request.n
            self._replicas.changes.notify()
        self._running[request_id] = generation, tenant
        return generation

    def close(self, generation: Generation) -> None:
        """The reader is done, or gone: ends unfinished sequences."""
        tenant = self._end(generation)
        tenant.end(generation.num_tokens, time.monotonic())

    def cancel_request(self, request_id: str, key: str | None = None) -> None:
        """Ends a request; its reader sees it finish as cancelled.

        Raises RequestNotFoundError if the caller (for an administrator: anyone) has no such running request.
        """
        with audited("cancel", self.keys, key, request_id=request_id):
            tenant = self.keys.tenant(key)
            running = self._running.get(request_id)
            if running is None or not (tenant.admin or running[1] is tenant):
                raise RequestNotFoundError(f"no request {quote(request_id)} is running")
            self._replicas.cancel(running[0])

    def cancel(self, generation: Generation) -> None:
        """Ends the unfinished sequences of a generation whose client is gone. Its reader sees it finish as cancelled,
        and must still close it."""
        self._replicas.cancel(generation)

    def cancel_all(self) -> None:
        for running in list(self._running.values()):
            if running is not None:
                self._replicas.cancel(running[0])

    async def tokenize(
        self, prompt: str | Chat, add_special_tokens: bool, adapter: AdapterReference | None, key: str | None = None
    ) -> Spans:
        """The tokens of a text or a rendered conversation, each with its position. A conversation is rendered with the
        adapter's chat template, if it has one; a text ignores the adapter."""
        tenant = self.keys.tenant(key)
        if isinstance(prompt, Chat):
            found = Violations()
            check_adapter(adapter, self.info.adapter_sources, found)
            found.raise_any()
            tenant.check_adapter(adapter)
            with await self._place(adapter, None, tenant) as lease:
                prompt = (await self._render(prompt, lease.adapter)).text
        return await self.tokenizer.spans(prompt, add_special_tokens)

    async def _place(self, reference: Reference | None, grammar: Grammar | None, tenant: Tenant) -> Lease:
        async with self._suggestions.for_missing(reference, tenant.may_use):
            return await self._replicas.place(reference, grammar)

    async def _render(self, chat: Chat, adapter: Adapter) -> RenderedChat:
        """Renders with the adapter's own templates and special tokens, if any."""
        model = self._known_model
        return await model.renderer.render(adapter.tokenizer.over(model.chat_templates), chat)

    def _not_invoked(self, adapter: Adapter, name: str) -> str:
        assert adapter.invocation is not None
        wanted = self.tokenizer.verbatim.decode(list(adapter.invocation.token_ids))
        return (
            f"the prompt does not contain {quote(wanted)}, which activates {quote(name)}: the base model answers alone"
        )

    def _end(self, generation: Generation) -> Tenant:
        """Whose it was."""
        self._replicas.cancel(generation)
        running = self._running.pop(generation.request_id)
        assert running is not None
        return running[1]

    def _admit(self, request: Request, tenant: Tenant) -> None:
        """Where the queue is full, a tenant that has less than its share of it may still wait."""
        if self.draining:
            raise UnavailableError("the server is shutting down")
        if self._replicas.num_waiting + self._preparing.total() + request.n <= self.max_queue:
            return
        waiting = self._replicas.waiting_by_tenant() + self._preparing
        share = self.max_queue // len({*waiting, tenant.name})
        if waiting[tenant.name] + request.n > share:
            raise OverloadedError(f"the queue is full ({waiting.total()} sequences are waiting): try again later")

    def _name(self, request: Request) -> str:
        request_id = request.request_id or secrets.token_hex(8)
        if request_id in self._running:
            raise InvalidRequestError(FieldViolation("request_id", "a request with this id is already running"))
        return request_id

    def _next_number(self) -> int:
        self._arrivals += 1
        return self._arrivals


async def _read_embedding(generation: Generation) -> Embedding:
    await generation.collect()
    (output,) = generation.outputs
    if output.finish_reason is FinishReason.CANCELLED:
        raise RequestCancelledError("the request was cancelled")
    return Embedding(output.pooled, output.sequence.prompt_length)
