"""A shard process: loads one rank of the model, then serves it. The port opens once the model is loaded."""

import gc
import logging
import signal
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import FrameType

import grpc
import torch
from grpc_health.v1 import health, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from tokenizers import Tokenizer
from transformers import PreTrainedConfig

from loraplex_protos.generation_pb2 import Sampling
from loraplex_protos.mtls import server_credentials
from loraplex_protos.protocol import PROTOCOL_VERSION
from loraplex_protos.shard_pb2 import DESCRIPTOR, GetInfoResponse, GetTokenizerResponse
from loraplex_protos.shard_pb2_grpc import add_ShardServiceServicer_to_server
from loraplex_shard.checkpoint import Checkpoint, open_checkpoint
from loraplex_shard.checkpoint.pooling import is_matryoshka, matryoshka_dimensions
from loraplex_shard.device import gpus
from loraplex_shard.device.memory import keep_freed
from loraplex_shard.device.parallel import Group
from loraplex_shard.device.troubles import GroupLostError, Troubles, end_soon
from loraplex_shard.kernels.library import Kernels
from loraplex_shard.layers.parameters import ParameterForm
from loraplex_shard.lora.listing import LocalListing
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.doubts import find_doubts
from loraplex_shard.lora.peft.forms import modules_in_any_form
from loraplex_shard.lora.peft.invocation import read_invocation
from loraplex_shard.lora.peft.reading import check_shapes
from loraplex_shard.lora.sources.hub import HubSource
from loraplex_shard.lora.sources.local import LocalSource
from loraplex_shard.lora.sources.object_store import ObjectStoreSource
from loraplex_shard.lora.sources.protocol import Source
from loraplex_shard.lora.store import AdapterStore
from loraplex_shard.models import check_architecture, load_model
from loraplex_shard.observation.telemetry import Telemetry, open_telemetry
from loraplex_shard.ops.choose import check_kernels, choose_operations, load_kernels
from loraplex_shard.sampling.grammars import GrammarCompiler
from loraplex_shard.sampling.vocabulary import compare, keep_known
from loraplex_shard.serving import machine, memory, sizing
from loraplex_shard.serving.service import ShardService, describe
from loraplex_shard.serving.steps import StepThread
from loraplex_shard.settings import ModelSettings, SettingsError, ShardSettings
from loraplex_shard.shapes.cache import KVCache
from loraplex_shard.stepping.runner import Runner, Slots

logger = logging.getLogger(__name__)

# One thread sends the results of steps; each slow adapter source, and each grammar that is compiled, occupies another.
# For requests, these are at most 48 and 8 (adapters/staging.py and replicas/replica.py in the router).
WORKERS = 64
# Seconds that calls may continue once no Step stream is open: the rest is not worth waiting for.
GRACE = 1.0
OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    # Connections are idle while there are no requests, so routers may ping as often as they like.
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.so_reuseport", 0),
)
# A router whose host is gone cannot close its connection: keepalive pings detect it, so that the next router can drive.
KEEPALIVE = (("grpc.keepalive_time_ms", 10_000), ("grpc.http2.ping_timeout_ms", 10_000))
POLL_SECONDS = 0.5
# How long a thread, such as one that reads an adapter, may hold the interpreter's lock while a step waits for it. A
# step takes the lock after each call of a kernel.
SWITCH_SECONDS = 1e-4

Progress = Callable[[int, int], None]


class Health(health.HealthServicer):
    """Answered on a separate thread, whatever the others do: silence means that the process hangs."""

    def Check(self, request: HealthCheckRequest, context: grpc.ServicerContext) -> HealthCheckResponse:
        return super().Check(request, context)

    Check.experimental_thread_pool = ThreadPoolExecutor(1, thread_name_prefix="health")  # type: ignore[attr-defined]


def run(
    settings: ShardSettings,
    progress: Progress | None = None,
    stops: Iterable[signal.Signals] = (signal.SIGTERM, signal.SIGINT),
) -> None:
    """Loads and serves one rank until one of the signals `stops`, which raises SystemExit(0): at once while it loads,
    else as soon as no router has a Step stream open, for which it waits at most settings.drain_seconds, or for another
    SIGINT. Call it from the main thread.

    `progress` is called while loading: see load_model. Raises SettingsError, CheckpointError or GroupSizeError
    before the port opens. Raises GroupLostError once another rank has ended, a step has failed on one of several ranks
    or hangs while no router waits for it any more, or nothing works on the GPU any more; the process exits soon after,
    wherever it hangs. So do the other ranks; their supervisor must restart the group.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    torch.set_num_threads(settings.threads or max(1, torch.get_num_threads() // settings.local_ranks))
    # GPUs and the connections between them are tried before a model is fetched that they could not serve.
    device = machine.pick_device(settings.device, settings.rank)
    machine.use(device)
    check_kernels(device)
    kernels = load_kernels(device, settings.kernels)
    group = Group.connect(settings.rank, settings.tp, settings.rendezvous, device, kernels)

    stopped = serving = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if stopped and serving and number != signal.SIGINT:  # GNU timeout sends SIGTERM twice
            return
        stopped = True
        group.let_go()
        sys.exit(0)

    troubles = Troubles()
    group.watch(lambda: troubles.report("another rank has ended"))
    try:
        checkpoint = open_checkpoint(settings.model, settings.revision, None)
        check_architecture(checkpoint)
        # Only now, since a handler would not interrupt the wait for the other ranks.
        for number in stops:
            signal.signal(number, stop)
        with open_telemetry(settings) as telemetry:
            service = _load(settings, checkpoint, group, device, kernels, progress, troubles, telemetry)
            gc.freeze()  # leaves objects from loading out of later collections, which would delay steps
            server, states = start(service, settings.listen, server_credentials(settings), device)
            group.beat()
            serving = True
            logger.info("rank %d of %d is serving at %s", settings.rank, settings.tp, settings.listen)
            try:
                while (trouble := troubles.wait(POLL_SECONDS)) is None:
                    if stopped:  # while the model was loaded, at a place where exceptions are ignored, such as a fork
                        sys.exit(0)
                    if service.hangs:
                        troubles.report("a step hangs that no router waits for any more")
            except SystemExit:  # the router is told, finishes its sequences here, and leaves
                try:
                    states.enter_graceful_shutdown()
                    service.wait_until_left(settings.drain_seconds)
                finally:
                    end_soon(0, "a step hangs")
                raise
            finally:
                server.stop(GRACE).wait()
    except SystemExit:
        end_soon(0, "leaving the group hangs")
        raise
    finally:
        group.close()
    raise GroupLostError(f"rank {settings.rank}: {trouble}; restart all ranks of the group")


def start(
    service: ShardService,
    listen: str,
    credentials: grpc.ServerCredentials | None = None,
    device: torch.device = machine.CPU,
) -> tuple[grpc.Server, Health]:
    """Opens the port and serves there, including health checks; without credentials, unencrypted. The serving threads
    use `device`. Raises SettingsError if the port cannot be opened."""
    threads = ThreadPoolExecutor(WORKERS, thread_name_prefix="shard", initializer=machine.use, initargs=(device,))
    options = OPTIONS if listen.startswith("unix:") else OPTIONS + KEEPALIVE
    server = grpc.server(threads, options=options)
    add_ShardServiceServicer_to_server(service, server)
    states = Health()
    for name in "", DESCRIPTOR.services_by_name["ShardService"].full_name:
        states.set(name, HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(states, server)
    try:
        if credentials is None:
            server.add_insecure_port(listen)
        else:
            server.add_secure_port(listen, credentials)
    except RuntimeError as error:
        raise SettingsError(f"listen: cannot open {listen}; is another process there?") from error
    server.start()
    return server, states


def _head_dim(config: PreTrainedConfig) -> int:
    """0 for a model without attention, or whose layers differ."""
    heads = getattr(config, "num_attention_heads", 0)
    return getattr(config, "head_dim", None) or (config.hidden_size // heads if isinstance(heads, int) and heads else 0)


def _load(
    settings: ShardSettings,
    checkpoint: Checkpoint,
    group: Group,
    device: torch.device,
    kernels: Kernels | None,
    progress: Progress | None,
    troubles: Troubles,
    telemetry: Telemetry,
) -> ShardService:
    pooling, classifier = checkpoint.pooling, checkpoint.classifier()
    dtype = machine.pick_dtype(settings.dtype, checkpoint.config, device)
    max_model_len = machine.longest_context(settings, checkpoint.config)
    ops = choose_operations(device, dtype, kernels)
    quantize = machine.pick_quantize(settings.quantize, checkpoint, device)
    memory.check_room_for(checkpoint, dtype, quantize, settings.tp, device)
    form = ParameterForm(dtype, device, quantize, machine.multiplies_float8(device))
    model = load_model(checkpoint, group, ops, form, max_model_len, progress)
    kv_dtype = machine.pick_kv_dtype(settings.kv_dtype, dtype, device)
    keep_freed()  # memory freed by loading is given back to the system
    adapter_dtype = torch.int8 if settings.adapter_dtype == "int8" else dtype
    files = checkpoint.tokenizer()
    tokenizer = Tokenizer.from_buffer(files.tokenizer_json)
    compare(tokenizer.get_vocab(), model.vocab_size)
    end_token_ids = keep_known(checkpoint.end_token_ids, model.vocab_size)
    if classifier is not None:
        classifier = classifier.map(lambda tensor: tensor.to(device))
    grammars = GrammarCompiler(
        files.tokenizer_json, model.vocab_size, end_token_ids, lambda digest: adapters.vocabulary(digest)
    )

    def new_runner(cache: KVCache, slots: Slots, max_sequences: int, max_model_len: int) -> Runner:
        return Runner(model, cache, slots, group, max_sequences, max_model_len, device, grammars, pooling, classifier)

    sizes = sizing.fit(
        settings, model, group, device, kv_dtype, adapter_dtype, max_model_len, new_runner, ops.recorded_sizes
    )
    base = BaseModel(
        checkpoint.architecture,
        (checkpoint.model_id, *checkpoint.known_as),
        settings.revision or "",
        model.tensors,
        model.vocab_size,
        tokenizer,
        model.embedding_name,
        model.head_name,
        model.served,
        model.matrices,
        checkpoint.config.get_text_config(decoder=True).hidden_size,
        checkpoint.config.get_text_config(decoder=True).pad_token_id,
        classifier,
        checkpoint.config.get_text_config(decoder=True) is not checkpoint.config,
        model.uncalled,
        _head_dim(checkpoint.config.get_text_config(decoder=True)),
    )
    doubts = partial(find_doubts, base=base, modules=modules_in_any_form(model.layouts, base.architecture))
    check = partial(check_shapes, layouts=model.layouts, base=base)
    listing = LocalListing(settings.adapters, doubts, partial(read_invocation, base=base), check)
    sources = open_sources(settings)
    # The router evicts others once it knows an adapter's size.
    held, on_device = sizes.adapter_host_bytes * 5 // 4, sizes.adapter_device_bytes or sys.maxsize
    adapters = AdapterStore(model.layouts, adapter_dtype, device, base, sources, telemetry.metrics, held, on_device)
    telemetry.metrics.watch_adapters(lambda: {"disk": listing.count(), **adapters.count()}, adapters.count_bytes)
    info = GetInfoResponse(
        model_id=checkpoint.model_id,
        architecture=checkpoint.architecture,
        dtype=str(dtype).removeprefix("torch."),
        vocab_size=model.vocab_size,
        max_model_len=sizes.max_model_len,
        rank=settings.rank,
        tensor_parallel_size=settings.tp,
        block_size=memory.BLOCK_SIZE,
        num_blocks=sizes.num_blocks,
        max_sequences=sizes.max_sequences,
        max_batch_tokens=sizes.max_batch_tokens,
        longest_step_us=round(sizes.longest_step * 1e6),
        end_token_ids=end_token_ids,
        protocol_version=PROTOCOL_VERSION,
        adapter_host_bytes=sizes.adapter_host_bytes,
        adapter_device_bytes=sizes.adapter_device_bytes,
        memory=sizes.memory,
        sampling_defaults=Sampling(**checkpoint.sampling_defaults),
        adapter_sources=[source.name for source in sources],
        modeling_code=model.modeling_code,
        embeds_only=not model.generates,
        classifier=describe(base.classes),
        state_bytes=model.state_bytes,
        is_matryoshka=is_matryoshka(checkpoint.config),
        matryoshka_dimensions=matryoshka_dimensions(checkpoint.config),
    )
    telemetry.metrics.describe(info)
    adapters.read_apart(lambda: troubles.report("the process that reads adapters has ended"))
    sizes.runner.slots = adapters

    def on_failed_step() -> None:
        if group.size > 1:  # other ranks may have run the plan; a single one's next stream starts afresh
            troubles.report("a step failed")
        else:
            on_failure()

    def on_failure() -> None:
        if gpus.is_lost(device):
            troubles.report("nothing works on the GPU any more")

    return ShardService(
        steps=StepThread(sizes.runner, device, on_failed_step, sizes.longest_step),
        on_failure=on_failure,
        adapters=adapters,
        listing=listing,
        grammars=grammars,
        info=info,
        tokenizer=GetTokenizerResponse(
            tokenizer_json=files.tokenizer_json,
            chat_template=files.chat_templates.get("default", ""),
            named_chat_templates={n: t for n, t in files.chat_templates.items() if n != "default"},
            bos_token=files.special_tokens.get("bos_token", ""),
            eos_token=files.special_tokens.get("eos_token", ""),
            special_tokens={n: t for n, t in files.special_tokens.items() if n not in ("bos_token", "eos_token")},
        ),
        telemetry=telemetry,
    )


def open_sources(settings: ModelSettings) -> list[Source]:
    """The adapter sources, in the order in which they are searched."""
    sources: list[Source] = [LocalSource(settings.adapters)] if settings.adapters else []
    for name in "adapters_s3", "adapters_gcs", "adapters_azure":
        if url := getattr(settings, name):
            try:
                sources.append(ObjectStoreSource(url))
            except ValueError as error:
                raise SettingsError(f"{name}: {error}") from error
    return [*sources, HubSource()]
