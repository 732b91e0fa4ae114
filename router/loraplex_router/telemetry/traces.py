"""A request's spans: validate, queue, prefill and decode, under a span that continues the caller's trace.

Requests that are not sampled have no entry here. Imported only if tracing is on.
"""

from collections.abc import MutableMapping
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.util.types import AttributeValue

from loraplex_protos.tracing import W3C, nanoseconds
from loraplex_router.engine.generation import Generation
from loraplex_router.vocabulary.request import EmbedRequest, Request
from loraplex_router.vocabulary.sequence import Plan, Sequence

EVERY = 16  # tokens between two events of a decode span


@dataclass(slots=True)
class _Live:
    root: Span
    phase: Span


class Traces:
    """Told of each event of each request. The caller's trace context is the current one when a request is queued."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer: Tracer = provider.get_tracer("loraplex.router")
        self._live: dict[Generation, _Live] = {}
        self._sequences: dict[Sequence, _Live] = {}

    def queued(self, generation: Generation) -> None:
        sequence = generation.outputs[0].sequence
        root = self._begin(generation.arrived, generation.request_id, generation.adapter_name)
        if not root.is_recording():
            return
        self._span(root, "validate", generation.arrived).end(nanoseconds(generation.validated))
        live = self._live[generation] = _Live(root, self._span(root, "queue", generation.validated))
        if sequence.adapter.digest:
            live.phase.add_event("adapter staged", timestamp=nanoseconds(generation.queued))
        for output in generation.outputs:
            output.sequence.traceparent = _traceparent(root)
            self._sequences[output.sequence] = live

    def started(self, generation: Generation) -> None:
        if (live := self._live.get(generation)) and generation.started is not None:
            adapter = generation.outputs[0].sequence.adapter
            if adapter.loaded > generation.queued:
                live.phase.add_event("adapter on the device", timestamp=nanoseconds(adapter.loaded))
            self._next(live, "prefill", generation.started)

    def started_again(self, generation: Generation, sequence: Sequence) -> None:
        """A sequence restarted after preemption or the loss of its replica."""
        if live := self._live.get(generation):
            live.phase.add_event("started again", {"sequence": sequence.number, "tokens": sequence.output_length})

    def first_token(self, generation: Generation) -> None:
        if (live := self._live.get(generation)) and generation.first_token is not None:
            self._next(live, "decode", generation.first_token)

    def step(self, plan: Plan) -> None:
        """A step has ended. Costs nothing while no request is traced."""
        if not self._sequences:
            return
        for sequence in (chunk.sequence for chunk in plan.chunks):
            live = self._sequences.get(sequence)
            if live is not None and sequence.output_length and sequence.output_length % EVERY == 0:
                attributes = {"sequence": sequence.number, "tokens": sequence.output_length}
                live.phase.add_event("generated", attributes)

    def ended(self, generation: Generation, outcome: str, now: float) -> None:
        live = self._live.pop(generation, None)
        if live is None:
            return
        for output in generation.outputs:
            del self._sequences[output.sequence]
        attributes: dict[str, AttributeValue] = {
            "loraplex.outcome": outcome,
            "loraplex.digest": generation.adapter_digest,
            "gen_ai.usage.input_tokens": generation.outputs[0].sequence.prompt_length,
            "gen_ai.usage.output_tokens": sum(output.generated for output in generation.outputs),
            "loraplex.prefix_hit_tokens": sum(output.sequence.prefix_hit for output in generation.outputs),
        }
        live.root.set_attributes(attributes)
        if generation.error is not None:
            live.root.set_status(Status(StatusCode.ERROR, outcome))
        live.phase.end(nanoseconds(now))
        live.root.end(nanoseconds(now))

    def refused(self, request: Request | EmbedRequest, outcome: str, arrived: float) -> None:
        """A request that was not queued."""
        root = self._begin(arrived, request.request_id[:128], "")
        root.set_attribute("loraplex.outcome", outcome)
        root.set_status(Status(StatusCode.ERROR, outcome))
        self._span(root, "validate", arrived).end()
        root.end()

    def close(self) -> None:
        """Sends remaining spans."""
        self._provider.shutdown()

    def _begin(self, arrived: float, request_id: str, adapter: str) -> Span:
        attributes = {"loraplex.request_id": request_id, "loraplex.adapter": adapter}
        start = nanoseconds(arrived)
        return self._tracer.start_span("generate", kind=SpanKind.SERVER, attributes=attributes, start_time=start)

    def _next(self, live: _Live, name: str, at: float) -> None:
        live.phase.end(nanoseconds(at))
        live.phase = self._span(live.root, name, at)

    def _span(self, parent: Span, name: str, at: float) -> Span:
        return self._tracer.start_span(name, trace.set_span_in_context(parent), start_time=nanoseconds(at))


def _traceparent(span: Span) -> str:
    """The span's context, for the shards."""
    carrier: MutableMapping[str, str] = {}
    W3C.inject(carrier, trace.set_span_in_context(span))
    return carrier["traceparent"]
