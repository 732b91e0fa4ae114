"""The engine in this process: the real runner on the embedded model, without a router, a server or gRPC."""

import operator
from collections.abc import Callable, Sequence
from random import Random

import numpy as np
import torch

from bench.engine.timing import seconds
from loraplex_protos.generation_pb2 import Sampling
from loraplex_protos.shard_pb2 import SequenceStart, StepRequest
from loraplex_shard.checkpoint import open_checkpoint
from loraplex_shard.device.memory import keep_freed
from loraplex_shard.device.parallel import Group
from loraplex_shard.layers.linear import ColumnLinear, RowLinear
from loraplex_shard.layers.parameters import ParameterForm
from loraplex_shard.lora.weights.deltas import Delta, partition_adapter
from loraplex_shard.models.decoder import Decoder
from loraplex_shard.models.loading import load_decoder
from loraplex_shard.ops.choose import choose_operations, load_kernels
from loraplex_shard.sampling.grammars import GrammarCompiler
from loraplex_shard.serving.memory import BLOCK_SIZE
from loraplex_shard.settings import Quantize
from loraplex_shard.shapes.adapter import AdapterWeights
from loraplex_shard.shapes.batch import Batch
from loraplex_shard.shapes.cache import KVCache
from loraplex_shard.shapes.heads import Heads
from loraplex_shard.shapes.layout import LinearLayout
from loraplex_shard.stepping.runner import Runner

CPU = torch.device("cpu")
MAX_MODEL_LEN = 2304
MAX_SEQUENCES = 32
GREEDY = Sampling()
CHUNK = 512  # tokens of a prefill step


class Slots:
    """Adapters by slot, starting at 1: the part of an AdapterStore that a runner uses."""

    def __init__(self) -> None:
        self.adapters: Sequence[AdapterWeights] = ()

    def adapter_in(self, slot: int) -> AdapterWeights:
        return self.adapters[slot - 1]


def load_model(quantize: Quantize, dtype: torch.dtype = torch.bfloat16, model: str = "") -> Decoder:
    """The embedded model, or the one in a directory, quantized or not."""
    return load_decoder(
        open_checkpoint(model, None, None),
        Group(0, 1),
        choose_operations(CPU, dtype, load_kernels(CPU, None)),
        ParameterForm(dtype, CPU, quantize),
        MAX_MODEL_LEN,
    )


class Stepper:
    """A model, its cache, and a batch of sequences."""

    def __init__(
        self,
        quantize: Quantize,
        dtype: torch.dtype = torch.bfloat16,
        decoder: Decoder | None = None,
        sequences: int = MAX_SEQUENCES,
        max_model_len: int = MAX_MODEL_LEN,
        num_blocks: int | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """`decoder` replaces the embedded model, on its own device; `sequences` is the largest batch. Without
        `num_blocks`, the cache has room for the most and longest sequences."""
        self.decoder = decoder or load_model(quantize, dtype)
        keep_freed()
        self._sequences, self._max_model_len = sequences, max_model_len
        blocks = num_blocks or sequences * -(-max_model_len // BLOCK_SIZE)
        self.cache: KVCache = self.decoder.new_cache(blocks, BLOCK_SIZE, kv_dtype)
        for layer in self.cache.layers:  # memory that was never written does not cost a read
            _fill(layer.keys)
            _fill(layer.values)
        self._slots = Slots()
        self.runner = Runner(
            self.decoder,
            self.cache,
            self._slots,
            Group(0, 1),
            sequences,
            max_model_len,
            self.cache.layers[0].keys.device,
            GrammarCompiler(b"{}", self.decoder.vocab_size, end_token_ids=()),
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of the model that a decode step reads: all matrices, a tied head once."""
        return sum(linear.weight.nbytes for linear in self._linears())

    @property
    def weights(self) -> int:
        """The number of elements in those matrices."""
        layouts = [linear.layout for linear in self._linears()]
        inputs = [len(range(*layout.columns.indices(layout.in_features))) for layout in layouts]
        outputs = [sum(part.width for part in layout.parts) for layout in layouts]
        return sum(map(operator.mul, inputs, outputs))

    def _linears(self) -> list[ColumnLinear | RowLinear]:
        return [m for m in self.decoder.modules() if isinstance(m, ColumnLinear | RowLinear)]

    def kv_bytes(self, batch: int, context: int) -> int:
        return batch * context * self.decoder.cache_block_bytes(BLOCK_SIZE) // BLOCK_SIZE

    def start(
        self,
        batch: int,
        context: int,
        adapters: Sequence[AdapterWeights] = (),
        used: int | None = None,
        sampling: Sampling = GREEDY,
    ) -> None:
        """Starts `batch` sequences as if all but the last of their `context` tokens were in the cache. The sequences
        are divided evenly between the first `used` adapters; None: all adapters."""
        assert batch <= self._sequences and context < self._max_model_len
        self.runner.clear()
        self._slots.adapters = adapters
        used = len(adapters) if used is None else used
        slots = [row * used // batch + 1 if used else 0 for row in range(batch)]
        self._lengths, self._blocks = [context - 1] * batch, 0
        self._plan = StepRequest(rows=range(batch), lengths=[1] * batch, slots=slots, samples=[True] * batch)
        self._starts = [self._start(row, context, context - 1, sampling) for row in range(batch)]

    def decode(self) -> None:
        """Computes one token for each sequence."""
        plan, counts = self._plan, []
        for row, length in enumerate(self._lengths):
            had = 0 if self._starts else -(-length // BLOCK_SIZE)
            self._lengths[row] = length + 1
            counts.append(-(-(length + 1) // BLOCK_SIZE) - had)
        del plan.starts[:], plan.block_counts[:], plan.blocks[:]
        plan.starts.extend(self._starts)
        plan.block_counts.extend(counts)
        plan.blocks.extend(range(self._blocks, self._blocks + sum(counts)))
        self._starts, self._blocks = [], self._blocks + sum(counts)
        self.runner.step(plan)

    def seconds_per_decode(
        self, batch: int, context: int, adapters: Sequence[AdapterWeights] = (), used: int | None = None
    ) -> float:
        """Seconds of one step with these sequences, after a step to warm up."""
        self.start(batch, context - 1, adapters, used)
        self.decode()
        return seconds(self.decode)

    def prefill(self, batch: int, tokens: int, adapters: Sequence[AdapterWeights] = (), chunk: int = CHUNK) -> None:
        """Computes prompts of `tokens` tokens one after the other, in chunks of at most `chunk`, with one adapter after
        the other. They share blocks, which nobody reads."""
        self.runner.clear()
        self._slots.adapters = adapters
        for row in range(batch):
            slot = row % len(adapters) + 1 if adapters else 0
            for begin in range(0, tokens, chunk):
                length = min(chunk, tokens - begin)
                used = range(begin // BLOCK_SIZE, -(-(begin + length) // BLOCK_SIZE))
                self.runner.step(
                    StepRequest(
                        starts=[] if begin else [self._start(row, tokens, 0)],
                        rows=[row],
                        lengths=[length],
                        slots=[slot],
                        samples=[begin + length == tokens],
                        block_counts=[len(used)],
                        blocks=used,
                    )
                )

    def _start(self, row: int, tokens: int, computed: int, sampling: Sampling = GREEDY) -> SequenceStart:
        ids = Random(row).choices(range(self.decoder.vocab_size), k=tokens)
        return SequenceStart(row=row, tokens=ids, prompt_length=tokens, computed=computed, sampling=sampling)

    def linears(self, batch: int) -> Callable[[], None]:
        """Only the products with matrices, of one token of each sequence: one layer after the other."""
        layers, ops = self._linears(), self.decoder.ops
        widths = [len(range(*layer.layout.columns.indices(layer.layout.in_features))) for layer in layers]
        inputs = {width: torch.randn(batch, width, device=self.decoder.device) for width in widths}
        inputs = {width: x.to(self.decoder.dtype) for width, x in inputs.items()}

        def multiply() -> None:
            for layer, width in zip(layers, widths, strict=True):
                ops.linear(inputs[width], layer.weight, layer.bias)

        return multiply

    def attention(self, batch: int, context: int) -> Callable[[], None]:
        """Only the attention of one token of each sequence, in one layer after the other: too much for the processor's
        cache."""
        spec, cut, blocks = self.decoder.spec, self.decoder.partition, -(-context // BLOCK_SIZE)
        heads = Heads(cut.heads, cut.kv_heads, spec.head_dim)
        with self.decoder.device:
            tables = torch.randperm(batch * blocks, dtype=torch.int32).view(batch, blocks)
            last = torch.full((batch,), context - 1)
            qkv = torch.randn(batch, heads.width).to(self.decoder.dtype)
        indices = tables[:, -1].long() * BLOCK_SIZE + last % BLOCK_SIZE
        contexts, starts, rows = np.full(batch, context), np.arange(batch + 1), np.arange(batch)
        step = self.decoder.ops.prepare(Batch(last, last, indices, starts, contexts, rows, tables, ()))

        def attend() -> None:
            for layer in self.cache.layers:
                self.decoder.ops.attention(qkv, heads, step, layer)

        return attend


def _fill(tensor: torch.Tensor) -> None:
    if tensor.dtype == torch.int8:
        tensor.random_(-99, 100)
    elif tensor.dtype.itemsize == 1:  # float8, which has no random numbers of its own
        tensor.copy_(torch.empty(tensor.shape, dtype=torch.bfloat16, device=tensor.device).uniform_(-0.5, 0.5))
    else:
        tensor.uniform_(-0.5, 0.5)


def random_deltas(layouts: Sequence[LinearLayout], lora_rank: int, seed: int) -> dict[str, Delta]:
    """Deltas of all linear layers except the head, by module, small enough not to turn answers into noise."""
    generator = torch.Generator().manual_seed(seed)
    return {
        part.module: Delta(
            torch.randn(lora_rank, layout.in_features, generator=generator) * 0.01,
            torch.randn(part.out_features, lora_rank, generator=generator) * 0.01,
            1.0,
        )
        for layout in layouts
        if layout.name != "lm_head"
        for part in layout.parts
    }


def random_adapter(
    layouts: Sequence[LinearLayout], lora_rank: int, seed: int, dtype: torch.dtype = torch.bfloat16
) -> AdapterWeights:
    """An adapter of such deltas."""
    return partition_adapter(random_deltas(layouts, lora_rank, seed), layouts, dtype).weights
