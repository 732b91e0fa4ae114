"""Texts that are embedded or classified: requests whose sequences are pooled."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

from loraplex_protos.errors import RequestCancelledError
from loraplex_router.access.keys import Keys
from loraplex_router.access.tenant import Visit
from loraplex_router.engine.generation import Generation
from loraplex_router.service.requests import Requests
from loraplex_router.telemetry.telemetry import Telemetry
from loraplex_router.text.model import Model
from loraplex_router.text.tokenizer import TokenSpan
from loraplex_router.vocabulary.checks import check_embed_request
from loraplex_router.vocabulary.pooled import Classification, Embedding
from loraplex_router.vocabulary.request import ClassifyRequest, EmbedRequest, Prompt
from loraplex_router.vocabulary.sequence import FinishReason
from loraplex_router.vocabulary.volume import Volume

FEW_INPUTS = 32  # to start, or to end, before other tasks get a turn


class Pooling:
    """All methods raise LoraplexError. `model` returns the served model, or raises UnavailableError."""

    def __init__(self, keys: Keys, requests: Requests, telemetry: Telemetry, model: Callable[[], Model]) -> None:
        self._keys = keys
        self._requests = requests
        self._telemetry = telemetry
        self._model = model

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
            classifier = output.sequence.adapter.classifier or self._model().classifier
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

    async def places(self, prompt: Prompt, found: Classification, key: str | None = None) -> list[TokenSpan]:
        """The input's tokens. If it is a text, each with its place in it; of others, nothing but their ids is known."""
        if found.classifier.of_tokens and isinstance(prompt, str):
            spans = await self._model().tokenizer.spans(prompt, tenant=self._keys.tenant(key).name)
            return list(spans)[-len(found.tokens) :]
        return [TokenSpan(token, "", 0, 0) for token in found.tokens]

    async def _pool(self, request: EmbedRequest, key: str | None) -> list[Generation]:
        """Generations whose only sequence is pooled. At most half of those that may wait are started at first, and each
        of the others once an earlier one has ended, so that any number fits."""
        arrived = time.monotonic()
        with self._telemetry.admission(request, arrived):
            tenant = self._keys.tenant(key)
        with self._telemetry.admission(request, arrived, tenant.name):
            info = self._model().info
            check_embed_request(request, info.vocab_size, info.adapter_sources)
            adapter = await self._requests.resolve(request.adapter, tenant, request.session)
            request = replace(request, adapter=adapter)
            visit = await self._requests.visit(tenant, arrived, [request])
        started, volume = list[Generation](), Volume()
        most = max(1, self._requests.most_waiting(request.background) // 2)
        try:
            with ExitStack() as held:
                with self._telemetry.admission(request, arrived, tenant.name):
                    first = self._requests.room(min(most, len(request.inputs)), tenant, request.background)
                    room = held.enter_context(first)
                for number, part in enumerate(request.parts()):
                    if number >= most:
                        await _finish_pooling(started[number - most])
                        await self._requests.extend(room)
                    with self._telemetry.admission(part, arrived, tenant.name):
                        started += await self._requests.start([part], visit, room, arrived, volume)
                    if len(started) % FEW_INPUTS == 0:
                        await asyncio.sleep(0)
            for generation in started[-most:]:
                await _finish_pooling(generation)
            return started
        finally:  # a second cancellation does not stop it
            await asyncio.shield(self._close(started, visit))

    async def _close(self, generations: Sequence[Generation], visit: Visit) -> None:
        for number, generation in enumerate(generations, 1):
            self._requests.close(generation)
            if number % FEW_INPUTS == 0:
                await asyncio.sleep(0)
        self._requests.end_visit(visit)


async def _finish_pooling(generation: Generation) -> None:
    await generation.collect()
    (output,) = generation.outputs
    if output.finish_reason is FinishReason.CANCELLED:
        raise RequestCancelledError("the request was cancelled")
