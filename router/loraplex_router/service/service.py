"""The operations behind all faces: checks a request, tokenizes it, resolves its adapter and submits it to the
engine."""

import asyncio
import secrets
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import date
from itertools import zip_longest
from typing import Literal

from loraplex_protos import generation_pb2 as pb
from loraplex_protos.errors import (
    FieldViolation,
    InvalidRequestError,
    RequestCancelledError,
    RequestNotFoundError,
    UnavailableError,
    quote,
)
from loraplex_router.access.audit import audited
from loraplex_router.access.keys import Keys
from loraplex_router.access.shared_limits import SharedLimits
from loraplex_router.access.tenant import Tenant, Visit
from loraplex_router.adapters.suggestions import Suggestions
from loraplex_router.batches.folder import BatchFolder
from loraplex_router.engine.output import Classification, Embedding, Generation
from loraplex_router.journal.journal import Journal
from loraplex_router.journal.records import Saved
from loraplex_router.journal.stream import Stream
from loraplex_router.replicas.administration import Administration
from loraplex_router.replicas.declarations import Declarations
from loraplex_router.replicas.replicas import Lease, Replicas
from loraplex_router.replicas.uploads import Uploads
from loraplex_router.service.abilities import check_generates
from loraplex_router.service.adapters import Adapters
from loraplex_router.service.admission import Admission, check_deadline
from loraplex_router.service.preparation import Arrival, Preparation
from loraplex_router.service.response_store import ResponseStore
from loraplex_router.service.running import RunningRequests
from loraplex_router.telemetry.telemetry import Telemetry
from loraplex_router.text.model import Model
from loraplex_router.text.tokenizer import Spans, Tokenizer, TokenSpan
from loraplex_router.usage.event import Used
from loraplex_router.vocabulary.adapter import Adapter
from loraplex_router.vocabulary.chat import Chat, ChatTemplates
from loraplex_router.vocabulary.checks import check_adapter, check_embed_request, check_request
from loraplex_router.vocabulary.position import Position
from loraplex_router.vocabulary.references import AdapterReference, Reference, asked_as, ids_of, replace_ids
from loraplex_router.vocabulary.request import ClassifyRequest, EmbedRequest, Prompt, Request
from loraplex_router.vocabulary.sampling import Sampling
from loraplex_router.vocabulary.sequence import FinishReason
from loraplex_router.vocabulary.violations import Violations
from loraplex_router.vocabulary.volume import Volume

FEW_INPUTS = 32  # to embed before other tasks get a turn
FORMER_SECONDS = 5.0  # how long a request that is resumed may take to end
SPEND_SECONDS = 1.0
HANDED_OVER = "the server is shutting down: resume the stream, which another router continues"


class Service:
    """The router's operations, shared by all faces. All raise LoraplexError.

    `key` is the caller's API key, if any; if the server has keys, it is checked first. Operations that need the model
    raise UnavailableError until it is known. `max_queue` is how many sequences may wait,
    `stored_responses_bytes` the memory for responses that later requests refer to, `batches` where files
    and batches are.
    """

    def __init__(
        self,
        replicas: Replicas,
        administration: Administration,
        uploads: Uploads,
        declarations: Declarations,
        keys: Keys,
        max_queue: int,
        telemetry: Telemetry,
        metrics_auth: Literal["names", "all", "none"] = "names",
        journal: Journal | None = None,
        limits: SharedLimits | None = None,
        stored_responses_bytes: int = 0,
        batches: BatchFolder | None = None,
    ) -> None:
        self.keys = keys
        self._metrics_auth = metrics_auth
        self.telemetry = telemetry
        self._admission = Admission(replicas, max_queue)
        self.responses = ResponseStore(stored_responses_bytes)
        self.batches = batches
        self.draining = False
        self._replicas = replicas
        self._registry = administration.registry
        self._journal = journal
        self._limits = limits
        suggestions = Suggestions(administration.names)
        self.adapters = Adapters(keys, administration, uploads, declarations, suggestions, lambda: self._known_model)
        self._preparation = Preparation(replicas, suggestions, lambda: self._known_model)
        self._model: Model | None = None
        self._running = RunningRequests()

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
    def chat_templates(self) -> ChatTemplates:
        return self._known_model.chat_templates

    @property
    def sampling_defaults(self) -> Sampling:
        """The default sampling parameters of OpenAI's routes."""
        return self._known_model.sampling_defaults

    @property
    def tokenizer(self) -> Tokenizer:
        return self._known_model.tokenizer

    def tokenizer_of(self, adapter: Adapter) -> Tokenizer:
        """The tokenizer of the adapter's answers."""
        return self._known_model.tokenizer_of(adapter)

    @property
    def _known_model(self) -> Model:
        if self._model is None:
            raise UnavailableError("no replica is ready yet: try again later")
        return self._model

    @property
    def max_queue(self) -> int:
        return self._admission.max_queue

    @property
    def idle(self) -> bool:
        return self._admission.idle and self._replicas.idle

    def stream(self, field: str, begun: str = "") -> Stream | None:
        """What a streamed answer is generated with, if streams can be resumed here. `begun`: the id of the last event
        that the client has of a stream that it wants the rest of, from the request's `field`.

        Raises InvalidRequestError if it is not one, or if no stream can be resumed here."""
        if self._journal is None:
            if begun:
                raise InvalidRequestError(FieldViolation(field, "this server does not keep streams: see --store"))
            return None
        try:
            return Stream(self._journal, field, Position.read(begun) if begun else None)
        except ValueError:
            raise InvalidRequestError(FieldViolation(field, "is not the id of one of this server's events")) from None

    async def generate(self, request: Request, key: str | None = None, stream: Stream | None = None) -> Generation:
        """Admits a request of one adapter and queues its sequences. The caller reads the generation and must then
        `close` it. `stream`: if the answer is streamed.

        All errors in the request are raised here, before anything is generated.
        """
        (generation,) = await self.generate_each(request, key, stream)
        return generation

    async def generate_each(
        self, request: Request, key: str | None = None, stream: Stream | None = None
    ) -> list[Generation]:
        """The same for a request that may name several adapters: one generation for each, all on one replica if
        possible. They count as one request for a key's limits, and as that many sequences for the queue."""
        return await self.generate_all([request], key, stream)

    async def generate_all(
        self, requests: Sequence[Request], key: str | None = None, stream: Stream | None = None
    ) -> list[Generation]:
        """The same for several requests that name the same adapters: all of them are admitted, or none. They, too,
        count as one request for a key's limits."""
        arrived, volume = time.monotonic(), Volume()
        visit, started = None, list[Generation]()
        try:
            for request in requests:
                with self.telemetry.admission(request, arrived):
                    tenant = self.keys.tenant(key)
                    check_generates(self.info)
                    check_request(request, self.info.vocab_size, self.info.adapter_sources)
                    saved = await stream.find(request, self.info.model_id, tenant) if stream else []
                    session = request.session or request.request_id or _new_session()
                    for each in saved[:1]:  # all have one id
                        await self._end_former(each.record.request_id, tenant)
                    parts = [
                        self._resumed(part, tenant, each)
                        if each
                        else replace(part, adapter=self._resolved(part.adapter, tenant, session))
                        for part, each in zip_longest(request.parts(), saved)
                    ]
                    visit = visit or await self._begin(tenant, arrived, parts)
                    generations = await self._start(parts, visit, arrived, volume, saved)
                    started += generations
                    if stream:
                        stream.keep(request, self.info.model_id, tenant, generations)
            return started
        except BaseException:
            for generation in started:
                self.close(generation)
            raise
        finally:
            if visit is not None:
                self._end_part(visit)

    async def embed(self, request: EmbedRequest, key: str | None = None) -> list[Embedding]:
        """One embedding per input. They count as one request for a key's limits."""
        found = []
        for generation in await self._pool(request, key):
            (output,) = generation.outputs
            found.append(
                Embedding(
                    output.pooled,
                    output.sequence.prompt_length,
                    generation.warnings,
                    generation.adapter_digest,
                    generation.adapter_version,
                )
            )
        return found

    async def classify(self, request: ClassifyRequest, key: str | None = None) -> list[Classification]:
        """What the adapter's classifier, or else the model's, makes of each input. Raises InvalidRequestError if there
        is none. They count as one request for a key's limits."""
        found = []
        for generation in await self._pool(request, key):
            (output,) = generation.outputs
            classifier = output.sequence.adapter.classifier or self._known_model.classifier
            assert classifier is not None
            found.append(
                Classification(
                    classifier,
                    output.pooled,
                    output.sequence.tokens,
                    generation.warnings,
                    generation.adapter_digest,
                    generation.adapter_version,
                )
            )
        return found

    async def classifier(
        self, adapter: AdapterReference | None, key: str | None = None, session: str = ""
    ) -> pb.Classifier | None:
        """What classifies for the adapter: its own classifier, or else the model's, if there is one."""
        with await self._place(adapter, key, session or _new_session()) as lease:
            return lease.adapter.classifier or self._known_model.classifier

    async def places(self, prompt: Prompt, found: Classification) -> list[TokenSpan]:
        """The input's tokens. If it is a text, each with its place in it; of others, nothing but their ids is known."""
        if found.classifier.of_tokens and isinstance(prompt, str):
            return list(await self.tokenizer.spans(prompt))[-len(found.tokens) :]
        return [TokenSpan(token, "", 0, 0) for token in found.tokens]

    async def _pool(self, request: EmbedRequest, key: str | None) -> list[Generation]:
        """Generations whose only sequence is pooled."""
        arrived = time.monotonic()
        with self.telemetry.admission(request, arrived):
            tenant = self.keys.tenant(key)
            check_embed_request(request, self.info.vocab_size, self.info.adapter_sources)
            session = request.session or _new_session()
            request = replace(request, adapter=self._resolved(request.adapter, tenant, session))
            visit = await self._begin(tenant, arrived, [request])
        started, volume = list[Generation](), Volume()
        try:
            for part in request.parts():
                with self.telemetry.admission(part, arrived):
                    started += await self._start([part], visit, arrived, volume)
                if len(started) % FEW_INPUTS == 0:
                    await asyncio.sleep(0)
            for generation in started:
                await _finish_pooling(generation)
            return started
        finally:
            for generation in started:
                self.close(generation)
            self._end_part(visit)

    async def _begin(self, tenant: Tenant, arrived: float, parts: Iterable[Request | EmbedRequest]) -> Visit:
        names = frozenset(id for part in parts for id in ids_of(part.adapter))
        if self._limits is None:
            return tenant.begin(arrived, names)
        return await self._limits.begin(tenant, arrived, names)

    def _end_part(self, visit: Visit) -> None:
        visit.end_part()
        if self._limits is not None:
            self._limits.wake()

    async def _start(
        self,
        parts: Sequence[Request],
        visit: Visit,
        arrived: float,
        volume: Volume,
        saved: Sequence[Saved] = (),
    ) -> list[Generation]:
        """Queues the parts of a request together, once all of them can be. They continue what was saved of each."""
        if self.draining:
            raise UnavailableError("the server is shutting down")
        tenant, total = visit.tenant, sum(part.n for part in parts)
        with self._admission.preparing(total, tenant, parts[0].background):
            request_id = self._running.reserve(parts[0].request_id)
            try:
                with ExitStack() as held:
                    arrival = Arrival(request_id, tenant, arrived, volume, held, names_adapters=len(parts) > 1)
                    placed = [
                        await self._preparation.prepare(part, arrival, each) for part, each in zip_longest(parts, saved)
                    ]
                    for part, (generation, lease) in zip(parts, placed, strict=True):
                        check_deadline(part, lease.replica.engine.waited(generation))
                    visit.spend(sum(generation.num_prompt for generation, _ in placed), time.monotonic())
                    for generation, lease in placed:
                        self.telemetry.queued(generation)
                        if generation.finished:  # it was resumed behind its end
                            self.telemetry.ended(generation)
                        else:
                            lease.submit(generation)
            except BaseException:
                self._running.forget(request_id)
                raise
        generations = [generation for generation, _ in placed]
        self._running.begin(request_id, visit, generations)
        return generations

    def close(self, generation: Generation) -> None:
        """The reader is done, or gone: ends unfinished sequences."""
        self.cancel(generation)
        self._running.end(generation)
        if self._limits is not None:
            self._limits.wake()
        self._replicas.changes.notify()
        if self._journal is not None:
            self._journal.end(generation)

    async def spend(self) -> None:
        """Counts the tokens of running answers for their keys' limits, from time to time. Runs until cancelled."""
        while True:
            await asyncio.sleep(SPEND_SECONDS)
            self._running.spend()

    @property
    def num_running(self) -> int:
        """The number of requests that have begun and not ended."""
        return len(self._running)

    def is_running(self, request_id: str) -> bool:
        """Whether a request with this id, or the first of several, has begun and not ended."""
        return request_id in self._running or f"{request_id}-0" in self._running

    def cancel_request(self, request_id: str, key: str | None = None) -> None:
        """Ends a request; its reader sees it finish as cancelled.

        Raises RequestNotFoundError if the caller (for an administrator: anyone) has no such running request.
        """
        with audited("cancel", self.keys, key, request_id=request_id):
            tenant = self.keys.tenant(key)
            running = self._running.get(request_id)
            if running is None or not (tenant.admin or running.tenant is tenant):
                raise RequestNotFoundError(f"no request {quote(request_id)} is running")
            for generation in running.generations:
                self.cancel(generation)

    def cancel(self, generation: Generation) -> None:
        """Ends the unfinished sequences of a generation whose client is gone. Its reader sees it finish as cancelled,
        and must still close it."""
        self._replicas.cancel(generation)

    async def hand_over(self) -> None:
        """Ends all generations: those that another router can continue with an error that says so, the others as
        cancelled."""
        if self._journal is not None and self._journal.shared:
            await self._journal.flush()
            for generation in self._running:
                if await self._journal.keep_up(generation):
                    self._replicas.fail(generation, UnavailableError(HANDED_OVER))
        for generation in self._running:
            self.cancel(generation)

    async def scrape(self, key: str | None = None) -> bytes:
        """The metrics, as far as `metrics_auth` shows them to the caller, in Prometheus' format."""
        if self._metrics_auth == "all":
            self.keys.administrator(key)
        tenant = self.keys.tenant(key) if key or not self.keys.required else None
        return await self.telemetry.scrape(self._metrics_auth == "none" or (tenant is not None and tenant.admin))

    async def usage(
        self, key: str | None = None, first: date | None = None, last: date | None = None
    ) -> tuple[float, list[tuple[str, str, Used]]]:
        """Since when (a time.time) usage is counted, and what each tenant used with each adapter in these days (UTC):
        the caller's tenant or, for an administrator, all."""
        tenant = self.keys.tenant(key)
        since, used = await self.telemetry.usage.between(first, last)
        return since, [each for each in used if tenant.admin or each[0] == tenant.name]

    async def tokenize(
        self,
        prompt: str | Chat,
        add_special_tokens: bool,
        adapter: AdapterReference | None,
        key: str | None = None,
        session: str = "",
    ) -> Spans:
        """The tokens of a text or a rendered conversation, each with its position. A conversation is rendered with the
        adapter's chat template, if it has one. An adapter may have tokens of its own."""
        session = session or _new_session()
        if isinstance(prompt, Chat):
            with await self._place(adapter, key, session) as lease:
                prompt = (await self._preparation.render(prompt, lease.adapter, self.keys.tenant(key))).text
        tokenizer, _ = await self.tokenizer_for(adapter, key, session)
        return await tokenizer.spans(prompt, add_special_tokens)

    async def tokenizer_for(
        self, adapter: AdapterReference | None, key: str | None = None, session: str = ""
    ) -> tuple[Tokenizer, int]:
        """The tokenizer for the adapter's prompts and answers, and how many tokens there are."""
        if adapter is None:
            self.keys.tenant(key)
            return self.tokenizer, self.info.vocab_size
        with await self._place(adapter, key, session or _new_session()) as lease:
            model = self._known_model
            return await model.read_tokenizer(lease.adapter), model.vocab_size(lease.adapter)

    async def _place(self, adapter: AdapterReference | None, key: str | None, session: str) -> Lease:
        """A placement for work that only needs the adapter's files."""
        tenant, found = self.keys.tenant(key), Violations()
        check_adapter(adapter, self.info.adapter_sources, found)
        found.raise_any()
        return await self._preparation.place(self._resolved(adapter, tenant, session), tenant)

    def _resumed(self, part: Request, tenant: Tenant, saved: Saved) -> Request:
        """The part with what its names and its seed stood for when it began."""
        tenant.check_adapter(self._registry.named(part.adapter))
        adapter = self._registry.resolve(replace_ids(part.adapter, saved.record.adapters), "")
        sampling = part.sampling.model_copy(update={"seed": saved.record.seed})
        request_id = saved.record.request_id
        if request_id in self._running:  # the former request cannot end: it waits for its client to read
            request_id = ""
        return replace(part, request_id=request_id, adapter=asked_as(adapter, part.adapter), sampling=sampling)

    async def _end_former(self, request_id: str, tenant: Tenant) -> None:
        """Ends the request that is resumed, if it runs here: its client has lost the connection."""
        former = self._running.get(request_id)
        if former is not None and former.tenant is tenant:
            for generation in former.generations:
                self.cancel(generation)
            with suppress(TimeoutError):
                async with asyncio.timeout(FORMER_SECONDS):
                    await self._replicas.changes.until(lambda: request_id not in self._running)

    def _resolved(self, adapter: Reference | None, tenant: Tenant, session: str) -> Reference | None:
        """What the registry says that the name stands for. Raises ForbiddenError if the tenant may not use the name."""
        tenant.check_adapter(self._registry.named(adapter))
        return self._registry.resolve(adapter, session)


def _new_session() -> str:
    return secrets.token_hex(8)


async def _finish_pooling(generation: Generation) -> None:
    await generation.collect()
    (output,) = generation.outputs
    if output.finish_reason is FinishReason.CANCELLED:
        raise RequestCancelledError("the request was cancelled")
