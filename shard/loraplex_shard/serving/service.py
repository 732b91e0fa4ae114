"""The shard's gRPC service: one method per call of shard.proto, and the order in which plans run.

All plans run on one thread (steps.py). Other calls run on gRPC's threads; they never wait for that thread, nor it for
them. Independent of how the model was loaded and of the plans' content.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial

import grpc

from loraplex_protos import shard_pb2 as pb
from loraplex_protos.errors import LoraplexError, to_status
from loraplex_protos.generation_pb2 import Classifier as ClassifierMessage
from loraplex_protos.generation_pb2 import Sampling
from loraplex_protos.shard_pb2_grpc import ShardServiceServicer
from loraplex_shard.lora.listing import LocalListing
from loraplex_shard.lora.merge import Recipe
from loraplex_shard.lora.once import Once
from loraplex_shard.lora.store import AdapterStore, StagedAdapter
from loraplex_shard.lora.weights.deltas import Invocation
from loraplex_shard.observation.telemetry import Telemetry
from loraplex_shard.sampling.grammars import GrammarCompiler
from loraplex_shard.serving.steps import StepThread
from loraplex_shard.shapes.classifier import Classes

logger = logging.getLogger(__name__)


def describe(classes: Classes | None) -> ClassifierMessage | None:
    if classes is None:
        return None
    return ClassifierMessage(
        of_tokens=classes.of_tokens,
        labels=classes.labels,
        activation=ClassifierMessage.Activation.ValueType(classes.activation.value),
        joins_pairs=classes.joins_pairs,
    )


class ShardService(ShardServiceServicer):
    """Answers for one rank.

    A stream that ends, cleanly or not, leaves nothing behind: plans that have arrived are run to their end, and since
    ranks wait for each other in every plan, idle ranks have run the same plans. A plan that reached only some ranks, or
    hangs, shows in `hangs`.
    """

    def __init__(
        self,
        steps: StepThread,
        adapters: AdapterStore,
        listing: LocalListing,
        grammars: GrammarCompiler,
        info: pb.GetInfoResponse,
        tokenizer: pb.GetTokenizerResponse,
        telemetry: Telemetry,
        on_failure: Callable[[], None],
    ) -> None:
        """on_failure: called after a call has raised an error that is nobody's fault but this process's."""
        self._steps = steps
        self._adapters = adapters
        self._listing = listing
        self._grammars, self._compiling = grammars, Once()
        self._info = info
        self._tokenizer = tokenizer
        self._telemetry = telemetry
        self._on_failure = on_failure
        self._steps_in_use = threading.Lock()
        self._user: object = None  # the current user of steps
        self._user_left: float | None = None  # when the user left, if steps are still in use, by time.monotonic
        self._driven = False  # a Step stream is open
        self._left = threading.Condition()  # notified when it has ended

    def GetInfo(self, request: pb.GetInfoRequest, context: grpc.ServicerContext) -> pb.GetInfoResponse:
        info = pb.GetInfoResponse()
        info.CopyFrom(self._info)
        info.driven = self._driven
        return info

    def GetTokenizer(self, request: pb.GetTokenizerRequest, context: grpc.ServicerContext) -> pb.GetTokenizerResponse:
        return self._tokenizer

    def Reset(self, request: pb.ResetRequest, context: grpc.ServicerContext) -> pb.ResetResponse:
        with self._only_user_of_steps(context), self._errors_answered(context):
            self._adapters.clear()
            return pb.ResetResponse()

    def RefuseAdapters(
        self, request: pb.RefuseAdaptersRequest, context: grpc.ServicerContext
    ) -> pb.RefuseAdaptersResponse:
        with self._errors_answered(context):
            reasons = [self._adapters.refusal(each.id, each.source) for each in request.adapters]
            return pb.RefuseAdaptersResponse(reasons=reasons)

    def FetchAdapter(self, request: pb.FetchAdapterRequest, context: grpc.ServicerContext) -> pb.FetchAdapterResponse:
        with self._errors_answered(context):
            origin = self._adapters.fetch(request.id, request.source, request.revision, context.add_callback)
            return pb.FetchAdapterResponse(size_bytes=origin.size if origin.source.remote else 0)

    def ListFetches(self, request: pb.ListFetchesRequest, context: grpc.ServicerContext) -> pb.ListFetchesResponse:
        with self._errors_answered(context):
            fetches = [
                pb.Fetch(
                    id=each.id,
                    source=each.source,
                    revision=each.revision,
                    fetched_bytes=each.done,
                    total_bytes=each.total,
                    trouble=each.trouble,
                )
                for each in self._adapters.fetches()
            ]
            return pb.ListFetchesResponse(fetches=fetches)

    def StageAdapter(self, request: pb.StageAdapterRequest, context: grpc.ServicerContext) -> pb.StageAdapterResponse:
        with self._errors_answered(context):
            wanted = request.id, request.source, request.revision, request.token
            staged = self._adapters.stage(*wanted, context.add_callback)
            return _write_staged(staged)

    def StageUpload(
        self, request_iterator: Iterator[pb.StageUploadRequest], context: grpc.ServicerContext
    ) -> pb.StageUploadResponse:
        with self._errors_answered(context):
            first = next(request_iterator)
            sizes = {file.name: file.size_bytes for file in first.files}
            data = (request.data for request in request_iterator)
            staged = self._adapters.stage_upload(sizes, data, context.add_callback)
            return pb.StageUploadResponse(adapter=_write_staged(staged))

    def MergeAdapters(
        self, request: pb.MergeAdaptersRequest, context: grpc.ServicerContext
    ) -> pb.MergeAdaptersResponse:
        with self._errors_answered(context):
            wanted = request.digest, request.digests, _read_recipe(request)
            merged = self._adapters.merge(*wanted, context.add_callback)
            return _write_merged(merged)

    def MergeUploads(
        self, request_iterator: Iterator[pb.MergeUploadsRequest], context: grpc.ServicerContext
    ) -> pb.MergeUploadsResponse:
        with self._errors_answered(context):
            first = next(request_iterator)
            sizes = {part.digest: {file.name: file.size_bytes for file in part.files} for part in first.sent}
            data = (request.data for request in request_iterator)
            wanted = first.merge.digest, first.merge.digests, _read_recipe(first.merge)
            merged = self._adapters.merge_uploads(*wanted, sizes, data, context.add_callback)
            return pb.MergeUploadsResponse(merged=_write_merged(merged))

    def LoadAdapter(self, request: pb.LoadAdapterRequest, context: grpc.ServicerContext) -> pb.LoadAdapterResponse:
        with self._errors_answered(context):
            self._adapters.load(request.digest, request.slot)
            return pb.LoadAdapterResponse()

    def UnloadAdapter(
        self, request: pb.UnloadAdapterRequest, context: grpc.ServicerContext
    ) -> pb.UnloadAdapterResponse:
        with self._errors_answered(context):
            self._adapters.unload(request.slot)
            return pb.UnloadAdapterResponse()

    def UnstageAdapter(
        self, request: pb.UnstageAdapterRequest, context: grpc.ServicerContext
    ) -> pb.UnstageAdapterResponse:
        with self._errors_answered(context):
            self._adapters.unstage(request.digest)
            return pb.UnstageAdapterResponse()

    def CompileGrammar(
        self, request: pb.CompileGrammarRequest, context: grpc.ServicerContext
    ) -> pb.CompileGrammarResponse:
        with self._errors_answered(context):
            compiler = self._grammars.of(request.grammar.adapter)
            key = request.grammar.SerializeToString(deterministic=True)
            unenforced = self._compiling.do(key, lambda: compiler.unenforced(request.grammar))
            return pb.CompileGrammarResponse(unenforced=unenforced)

    def ListLocalAdapters(
        self, request: pb.ListLocalAdaptersRequest, context: grpc.ServicerContext
    ) -> pb.ListLocalAdaptersResponse:
        with self._errors_answered(context):
            found = [
                pb.LocalAdapter(
                    id=adapter.id,
                    fault=adapter.fault,
                    warnings=adapter.warnings,
                    invocation=_write_invocation(adapter.invocation),
                )
                for adapter in self._listing.adapters()
            ]
            return pb.ListLocalAdaptersResponse(adapters=found)

    def Step(
        self, request_iterator: Iterator[pb.StepRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.StepResponse]:
        with (
            self._only_user_of_steps(context),
            self._errors_answered(context),
            self._being_driven(),
            closing(self._steps.run(request_iterator)) as steps,
        ):
            for step in steps:
                step.response.duration_us = round((step.ended - step.began) * 1e6)
                self._telemetry.step(step.plan, step.response, step.began, step.ended)
                yield step.response

    def wait_until_left(self, seconds: float) -> bool:
        """Waits until no Step stream is open, at most this long. Returns whether none is open."""
        with self._left:
            return self._left.wait_for(lambda: not self._driven, seconds)

    @property
    def hangs(self) -> bool:
        """Whether a step is still running for a router that left longer ago than it can take."""
        left = self._user_left
        return left is not None and time.monotonic() - left > self._steps.longest_rest

    def _leave(self, user: object) -> None:
        """A user's call has ended, before or after its work."""
        with self._left:
            if self._user is user:
                self._user_left = time.monotonic()

    @contextmanager
    def _only_user_of_steps(self, context: grpc.ServicerContext) -> Iterator[None]:
        if not self._steps_in_use.acquire(blocking=False):
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"rank {self._info.rank} has an open Step stream")
        user = self._user = object()
        try:
            if not context.add_callback(partial(self._leave, user)):
                self._leave(user)
            yield
        finally:
            with self._left:
                self._user = self._user_left = None
            self._steps_in_use.release()

    @contextmanager
    def _being_driven(self) -> Iterator[None]:
        with self._left:
            self._driven = True
        try:
            yield
        finally:
            with self._left:
                self._driven = False
                self._left.notify_all()

    @contextmanager
    def _errors_answered(self, context: grpc.ServicerContext) -> Iterator[None]:
        try:
            yield
        except LoraplexError as error:
            context.abort_with_status(to_status(error))
        except Exception as error:
            self._on_failure()
            if not context.is_active():  # the client is gone
                raise
            logger.exception("rank %d failed", self._info.rank)
            failure = LoraplexError(f"rank {self._info.rank} failed: {type(error).__name__}: {error}")
            context.abort_with_status(to_status(failure))


def _write_invocation(invocation: Invocation | None) -> pb.Invocation | None:
    return None if invocation is None else pb.Invocation(token_ids=invocation.token_ids, lag=invocation.lag)


def _read_recipe(request: pb.MergeAdaptersRequest) -> Recipe:
    return Recipe(tuple(request.weights), request.strategy, request.density, request.majority_sign_method)


def _write_merged(merged: StagedAdapter) -> pb.MergeAdaptersResponse:
    return pb.MergeAdaptersResponse(
        lora_rank=merged.lora_rank, size_bytes=merged.size_bytes, device_bytes=merged.device_bytes
    )


def _write_staged(staged: StagedAdapter) -> pb.StageAdapterResponse:
    return pb.StageAdapterResponse(
        digest=staged.digest,
        source=staged.source,
        revision=staged.revision,
        lora_rank=staged.lora_rank,
        size_bytes=staged.size_bytes,
        device_bytes=staged.device_bytes,
        chat_template=staged.text.chat_templates.get("default", ""),
        named_chat_templates={n: t for n, t in staged.text.chat_templates.items() if n != "default"},
        special_tokens=staged.text.special_tokens,
        end_token_ids=staged.text.end_token_ids,
        chat_template_error=staged.text.error,
        warnings=staged.warnings,
        invocation=_write_invocation(staged.invocation),
        classifier=describe(staged.classes),
        tokenizer_json=staged.tokenizer_json,
        vocab_size=staged.vocab_size,
        sampling_defaults=Sampling(**staged.text.sampling_defaults),
    )
