"""Everything that a request needs before it is queued: its text, its tokens, its adapter's place, its sequences."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

from loraplex_protos.errors import AdapterConflictError, AdapterError, FieldViolation, InvalidRequestError, quote
from loraplex_router.access.tenant import Tenant
from loraplex_router.adapters.suggestions import Suggestions
from loraplex_router.engine.generation import Generation
from loraplex_router.journal.records import Saved
from loraplex_router.replicas.replicas import Lease, Replicas
from loraplex_router.service.abilities import check_adapter_fits
from loraplex_router.service.prompts import Text, encode, make_sequences
from loraplex_router.text.detokenizer import Decoder
from loraplex_router.text.model import Model
from loraplex_router.text.stops import StopMatcher
from loraplex_router.text.tokenizer import Tokenizer
from loraplex_router.vocabulary.adapter import NEVER, Adapter
from loraplex_router.vocabulary.chat import Chat, RenderedChat, TextPair
from loraplex_router.vocabulary.checks import check_vocabulary
from loraplex_router.vocabulary.context_length import check_tokens, room_for
from loraplex_router.vocabulary.grammar import Grammar
from loraplex_router.vocabulary.references import Reference, asked_of
from loraplex_router.vocabulary.request import Request
from loraplex_router.vocabulary.thoughts import Thoughts
from loraplex_router.vocabulary.violations import naming
from loraplex_router.vocabulary.volume import Volume

LONG_PROMPT = 1000  # tokens: between two such prompts of a call, other tasks get a turn


@dataclass(slots=True)
class Arrival:
    """What the parts of a request share. Their leases are closed with `held`."""

    request_id: str
    tenant: Tenant
    arrived: float
    volume: Volume
    held: ExitStack
    names_adapters: bool = False  # there are several, so errors name the adapter
    first: Lease | None = None  # the others go to the same replica, if possible
    prompts: dict[tuple[Text, Tokenizer], list[int]] = field(default_factory=dict)


class Preparation:
    """`model` returns the served model, or raises UnavailableError until it is known."""

    def __init__(self, replicas: Replicas, suggestions: Suggestions, model: Callable[[], Model]) -> None:
        self._replicas = replicas
        self._suggestions = suggestions
        self._model = model
        self._arrivals = 0

    async def prepare(
        self, request: Request, arrival: Arrival, place: int = 0, saved: Saved | None = None
    ) -> tuple[Generation, Lease]:
        """A request with one adapter, ready to be submitted with its lease. `place`: which of several it is. It
        continues what was saved."""
        with _naming(place, request.adapter) if arrival.names_adapters else nullcontext():
            return await self._prepare(request, arrival, saved)

    async def place(self, reference: Reference | None, tenant: Tenant) -> Lease:
        """A placement for work that only needs the adapter's files."""
        return await self._place(reference, None, tenant, None)

    async def render(self, chat: Chat, adapter: Adapter, tenant: Tenant) -> RenderedChat:
        """Renders with the adapter's own templates and special tokens, if any."""
        model = self._model()
        return await model.renderer.render(adapter.tokenizer.over(model.chat_templates), chat, tenant.name)

    async def _prepare(self, request: Request, arrival: Arrival, saved: Saved | None) -> tuple[Generation, Lease]:
        model, tenant, text, thoughts = self._model(), arrival.tenant, request.prompt, None
        tokenizer, vocab_size = model.tokenizer, model.info.vocab_size
        waited, lease = 0.0, None
        if request.adapter is not None or isinstance(text, Chat | TextPair):  # tokens and template may be the adapter's
            began = time.monotonic()
            after_thoughts = request.grammar is not None and request.separates_thoughts
            lease = await self._lease(replace(request, grammar=None) if after_thoughts else request, arrival, saved)
            waited = time.monotonic() - began
            tokenizer, vocab_size = await model.read_tokenizer(lease.adapter), model.vocab_size(lease.adapter)
            check_vocabulary(request, vocab_size)
            if isinstance(text, Chat | TextPair):
                text = await self._as_text(text, lease.adapter, tenant)
            if isinstance(text, RenderedChat) and request.separates_thoughts:
                thoughts = model.thoughts(text, lease.adapter)
            if request.grammar is not None and after_thoughts:
                request = replace(request, grammar=replace(request.grammar, thoughts=thoughts))
                lease = await self._lease(request, arrival, saved)
        assert not isinstance(text, Chat)
        key = text, tokenizer
        # Rendered again, it might differ: templates may write the time.
        prompt = arrival.prompts.get(key) if saved is None else list(saved.record.prompt)
        if prompt is None:
            prompt = arrival.prompts[key] = await encode(request, text, model, tokenizer, tenant)
        room = room_for(request, len(prompt), model.info.max_model_len)
        room = arrival.volume.add(request, len(prompt), room)
        check_tokens(request, prompt, vocab_size, tokenizer.token_text)
        if len(prompt) > LONG_PROMPT:
            await asyncio.sleep(0)
        validated = time.monotonic() - waited
        if lease is None:
            lease = await self._lease(request, arrival, saved)
        adapter = lease.adapter
        if saved is not None and adapter.digest != saved.record.digest:
            raise AdapterConflictError(replaced(saved.record.adapter))
        classifier = check_adapter_fits(request, adapter, model.info)
        if classifier is not None:
            arrival.volume.add_scores(len(classifier.labels) * (len(prompt) if classifier.of_tokens else 1))
        nonce = saved.record.nonce if saved else ""
        generation = Generation(
            arrival.request_id, request.adapter, adapter, arrival.arrived, validated, tenant.name, nonce
        )
        generation.warnings = request.warnings + lease.warnings
        bad_words = await tokenizer.spellings(request.bad_words, tenant=tenant.name)
        sequences = make_sequences(request, self._arrivals, prompt, room, text, adapter, tenant, model, bad_words)
        self._arrivals += len(sequences)
        if sequences[0].acts_from == NEVER:
            generation.warnings += (_not_invoked(adapter, generation.adapter_name, model),)
        decoder = _decoder(request, tokenizer, thoughts)
        for sequence in sequences:
            stops = StopMatcher(request.stop, request.include_stop)
            generation.add(sequence, decoder, stops, request.stop_token_ids, thoughts)
        if saved is not None:
            generation.resume(saved.tokens, saved.reached)
        return generation, lease

    async def _as_text(self, prompt: Chat | TextPair, adapter: Adapter, tenant: Tenant) -> Text:
        """A pair is left as it is, unless the template is made for pairs. That text gets the special tokens that the
        tokenizer adds."""
        if isinstance(prompt, Chat):
            return await self.render(prompt, adapter, tenant)
        if not adapter.tokenizer.over(self._model().chat_templates).takes_pairs:
            return prompt
        return (await self.render(prompt.as_chat(), adapter, tenant)).text

    async def _lease(self, request: Request, arrival: Arrival, saved: Saved | None) -> Lease:
        digest = saved.record.digest if saved else ""
        lease = await self._place(request.adapter, request.grammar, arrival.tenant, arrival.first, digest)
        arrival.first = arrival.first or lease
        return arrival.held.enter_context(lease)

    async def _place(
        self,
        reference: Reference | None,
        grammar: Grammar | None,
        tenant: Tenant,
        beside: Lease | None,
        digest: str = "",
    ) -> Lease:
        async with self._suggestions.for_missing(reference, tenant):
            return await self._replicas.place(reference, grammar, beside, tenant.name, digest)


def replaced(name: str) -> str:
    """Why a stream cannot be resumed."""
    return (
        f"the content of {quote(name)} was replaced or removed since the stream began, and no replica has it in memory"
        " any more, so the rest would not fit: send the request again without the stream's id, for a new answer"
    )


def _decoder(request: Request, tokenizer: Tokenizer, thoughts: Thoughts | None) -> Decoder:
    if request.show_special_tokens:
        return tokenizer.verbatim
    return tokenizer.showing("".join(thoughts.tags)) if thoughts else tokenizer


def _not_invoked(adapter: Adapter, name: str, model: Model) -> str:
    assert adapter.invocation is not None
    wanted = model.tokenizer_of(adapter).verbatim.decode(list(adapter.invocation.token_ids))
    return f"the prompt does not contain {quote(wanted)}, which activates {quote(name)}: the base model answers alone"


@contextmanager
def _naming(place: int, reference: Reference | None) -> Iterator[None]:
    """A context whose errors about the adapter, one of several, name it and its field."""
    name = quote(",".join(asked_of(reference)))
    try:
        with naming(f"adapters[{place}]"):
            yield
    except InvalidRequestError as error:
        found = error.violations
        of_adapter = {each: f"names {name}, which {each.description}" for each in found if each.field.endswith("].id")}
        raise type(error)(
            *(FieldViolation(each.field, of_adapter.get(each, each.description)) for each in found)
        ) from error
    except AdapterError as error:
        if name in error.message:
            raise
        named = type(error)(f"adapter {name}: {error.message}")
        named.field = error.field
        raise named from error
