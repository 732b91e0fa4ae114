"""The operations behind all faces: checks a request, tokenizes it, resolves its adapter and submits it to the
engine."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import date
from itertools import zip_longest
from typing import Literal

from loraplex_protos import generation_pb2 as pb
from loraplex_protos.errors import FieldViolation, InvalidRequestError, UnauthenticatedError, UnavailableError
from loraplex_router.access.audit import audited
from loraplex_router.access.keys import Keys
from loraplex_router.access.shared_limits import SharedLimits
from loraplex_router.access.tenant import Tenant
from loraplex_router.adapters.suggestions import Suggestions
from loraplex_router.batches.batches import Batches
from loraplex_router.engine.generation import Generation
from loraplex_router.journal.journal import Journal
from loraplex_router.journal.stream import Stream
from loraplex_router.replicas.administration import Administration
from loraplex_router.replicas.declarations import Declarations
from loraplex_router.replicas.replicas import Lease, Replicas
from loraplex_router.replicas.uploads import Uploads
from loraplex_router.service.abilities import check_generates
from loraplex_router.service.adapters import Adapters
from loraplex_router.service.admission import Room, count_sequences
from loraplex_router.service.pooling import Pooling
from loraplex_router.service.preparation import Preparation
from loraplex_router.service.requests import Requests, new_session
from loraplex_router.service.response_store import ResponseStore
from loraplex_router.telemetry.telemetry import Telemetry
from loraplex_router.text.model import Model
from loraplex_router.text.tokenizer import Spans, Tokenizer
from loraplex_router.usage.event import Used
from loraplex_router.vocabulary.adapter import Adapter
from loraplex_router.vocabulary.chat import Chat, ChatTemplates
from loraplex_router.vocabulary.checks import check_adapter, check_request
from loraplex_router.vocabulary.references import AdapterReference
from loraplex_router.vocabulary.request import Request
from loraplex_router.vocabulary.sampling import Sampling
from loraplex_router.vocabulary.violations import Violations
from loraplex_router.vocabulary.volume import Volume

FEW_REQUESTS = 32  # of one call, to start before other tasks get a turn


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
        batches: Batches | None = None,
    ) -> None:
        self.keys = keys
        self._metrics_auth = metrics_auth
        self.telemetry = telemetry
        self.responses = ResponseStore(stored_responses_bytes)
        self.batches = batches
        self._replicas = replicas
        suggestions = Suggestions(administration.listing.names, administration.registry.bare)
        self.adapters = Adapters(keys, administration, uploads, declarations, suggestions, lambda: self._known_model)
        self._preparation = Preparation(replicas, suggestions, lambda: self._known_model)
        self.requests = Requests(
            replicas, administration.registry, declarations, self._preparation, max_queue, telemetry, journal, limits
        )
        self.pooling = Pooling(keys, self.requests, telemetry, lambda: self._known_model)
        self._model: Model | None = None

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
        return self._replicas.ready.is_set() and not self.requests.draining

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
        visit, started, kept = None, list[Generation](), ExitStack()
        room: Room | None = None
        try:
            for number, request in enumerate(requests):
                if number and number % FEW_REQUESTS == 0:
                    await asyncio.sleep(0)
                with self.telemetry.admission(request, arrived):
                    tenant = self.keys.tenant(key)
                with self.telemetry.admission(request, arrived, tenant.name):
                    check_generates(self.info)
                    check_request(request, self.info.vocab_size, self.info.adapter_sources)
                    saved = await stream.find(request, self.info.model_id, tenant) if stream else []
                    session = request.session or request.request_id or new_session()
                    for each in saved:
                        kept.enter_context(self.requests.keeping(each))
                    await self.requests.end_former(saved, tenant)
                    parts = list[Request]()
                    for place, (part, each) in enumerate(zip_longest(request.parts(), saved)):
                        with request.named(place):
                            parts.append(
                                await self.requests.resumed(part, tenant, each)
                                if each
                                else replace(part, adapter=await self.requests.resolve(part.adapter, tenant, session))
                            )
                    visit = visit or await self.requests.visit(tenant, arrived, parts)
                    if room is None:
                        most = self.requests.most_waiting(request.background)
                        sequences = count_sequences(requests, most)
                        room = kept.enter_context(self.requests.room(sequences, tenant, request.background))
                    generations = await self.requests.start(parts, visit, room, arrived, volume, saved)
                    started += generations
                    if stream:
                        stream.keep(request, self.info.model_id, tenant, generations)
            return started
        except BaseException:
            for generation in started:
                self.requests.close(generation)
            raise
        finally:
            kept.close()
            if visit is not None:
                self.requests.end_visit(visit)

    def cancel_request(self, request_id: str, key: str | None = None) -> None:
        """Ends a request; its reader sees it finish as cancelled.

        Raises RequestNotFoundError if the caller (for an administrator: anyone) has no such running request.
        """
        with audited("cancel", self.keys, key, request_id=request_id):
            self.requests.cancel_request(request_id, self.keys.tenant(key))

    def is_running(self, request_id: str, key: str | None = None) -> bool:
        """Whether the caller has a request with this id, or the first of several, that runs."""
        with suppress(UnauthenticatedError):
            return self.requests.is_running(request_id, self.keys.tenant(key))
        return False

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
        session = session or new_session()  # one version of the adapter renders and tokenizes
        tenant = self.keys.tenant(key)
        with self.requests.preparing(tenant):
            if isinstance(prompt, Chat):
                with await self._place(adapter, tenant, session) as lease:
                    prompt = (await self._preparation.render(prompt, lease.adapter, tenant)).text
            tokenizer, _ = await self._tokenizer_for(adapter, tenant, session)
            return await tokenizer.spans(prompt, add_special_tokens, tenant=tenant.name)

    async def detokenize(
        self, tokens: list[int], adapter: AdapterReference | None, key: str | None = None, session: str = ""
    ) -> str:
        """The text of token ids, with special tokens. An adapter may have tokens of its own."""
        tenant = self.keys.tenant(key)
        with self.requests.preparing(tenant):
            tokenizer, vocab_size = await self._tokenizer_for(adapter, tenant, session)
            if max(tokens, default=0) >= vocab_size:
                raise InvalidRequestError(FieldViolation("tokens", f"every id must be below {vocab_size}"))
            return await tokenizer.decode_verbatim(tokens, tenant=tenant.name)

    async def classifier(
        self, adapter: AdapterReference | None, key: str | None = None, session: str = ""
    ) -> pb.Classifier | None:
        """What classifies for the adapter: its own classifier, or else the model's, if there is one."""
        tenant = self.keys.tenant(key)
        with self.requests.preparing(tenant), await self._place(adapter, tenant, session) as lease:
            return lease.adapter.classifier or self._known_model.classifier

    async def tokenizer_for(
        self, adapter: AdapterReference | None, key: str | None = None, session: str = ""
    ) -> Tokenizer:
        """The tokenizer for the adapter's prompts and answers."""
        tenant = self.keys.tenant(key)
        with self.requests.preparing(tenant):
            tokenizer, _ = await self._tokenizer_for(adapter, tenant, session)
            return tokenizer

    async def _tokenizer_for(
        self, adapter: AdapterReference | None, tenant: Tenant, session: str
    ) -> tuple[Tokenizer, int]:
        """And how many tokens there are."""
        if adapter is None:
            return self.tokenizer, self.info.vocab_size
        with await self._place(adapter, tenant, session) as lease:
            model = self._known_model
            return await model.read_tokenizer(lease.adapter), model.vocab_size(lease.adapter)

    async def _place(self, adapter: AdapterReference | None, tenant: Tenant, session: str) -> Lease:
        """A placement for work that only needs the adapter's files."""
        found = Violations()
        check_adapter(adapter, self.info.adapter_sources, found)
        found.raise_any()
        return await self._preparation.place(await self.requests.resolve(adapter, tenant, session), tenant)
