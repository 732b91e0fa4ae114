"""A rank's spans: prefill and decode of each sequence that the router has traced. Imported only where tracing is on.

Plans do not say when a sequence ends, so a span is ended when its row is taken over or was in no step for a while, with
the end of the last step that it was in.
"""

import threading
import time
from dataclasses import dataclass

from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span

from loraplex_protos.shard_pb2 import SequenceStart, StepRequest
from loraplex_protos.tracing import W3C, nanoseconds

IDLE_SECONDS = 5.0  # longer than most steps take


@dataclass(slots=True)
class _Track:
    """A traced sequence in its row."""

    context: Context  # of the router's span
    known: int  # tokens that the row was started with
    computed: int
    span: Span | None = None  # of the phase that it is in
    steps: int = 0  # of that span
    last: float = 0.0  # the end of its last step


class Traces:
    """Told of each step by the thread that runs them."""

    def __init__(self, provider: TracerProvider, rank: int) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("loraplex.shard")
        self._rank = rank
        self._lock = threading.Lock()  # guards the tracks; held for no longer than a step's bookkeeping
        self._tracks: dict[int, _Track] = {}  # by row
        self._closed = threading.Event()
        self._sweeper = threading.Thread(target=self._sweep, name="traces", daemon=True)
        self._sweeper.start()

    def step(self, plan: StepRequest, began: float, ended: float) -> None:
        """A step has run between two times of time.monotonic."""
        with self._lock:
            for start in plan.starts:
                self._start(start)
            if self._tracks:
                for row, length in zip(plan.rows, plan.lengths, strict=True):
                    if track := self._tracks.get(row):
                        self._advance(track, length, began, ended)

    def close(self) -> None:
        """Ends and sends what is left."""
        self._closed.set()
        self._sweeper.join()
        with self._lock:
            for track in self._tracks.values():
                self._end(track)
        self._provider.shutdown()

    def _start(self, start: SequenceStart) -> None:
        if former := self._tracks.pop(start.row, None):
            self._end(former)
        if start.traceparent:
            context = W3C.extract({"traceparent": start.traceparent})
            self._tracks[start.row] = _Track(context, len(start.tokens), start.computed)

    def _advance(self, track: _Track, length: int, began: float, ended: float) -> None:
        prefill = track.computed < track.known
        if track.span is None:
            name = "shard prefill" if prefill else "shard decode"
            attributes = {"loraplex.rank": self._rank}
            track.span = self._tracer.start_span(
                name, track.context, start_time=nanoseconds(began), attributes=attributes
            )
        if prefill:
            track.span.add_event("chunk", {"tokens": length}, nanoseconds(ended))
        track.computed += length
        track.steps += 1
        track.last = ended
        if prefill and track.computed >= track.known:
            self._end(track)

    def _end(self, track: _Track) -> None:
        if track.span is not None:
            track.span.set_attribute("loraplex.steps", track.steps)
            track.span.end(nanoseconds(track.last))
            track.span, track.steps = None, 0

    def _sweep(self) -> None:
        while not self._closed.wait(IDLE_SECONDS / 2):
            with self._lock:
                for track in self._tracks.values():
                    if time.monotonic() - track.last > IDLE_SECONDS:
                        self._end(track)
