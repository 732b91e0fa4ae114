"""The engine in this process: the real runner on the embedded model, without a router, a server or gRPC."""

import statistics
import time
from collections.abc import Callable, Sequence
from random import Random

import torch

from loraplex_protos.shard_pb2 import Sampling, SequenceStart, StepRequest
from loraplex_shard.batch import Batch
from loraplex_shard.cache import KVCache
from loraplex_shard.checkpoint import open_checkpoint
from loraplex_shard.grammars import GrammarCompiler
from loraplex_shard.layers.layout import LinearLayout
from loraplex_shard.layers.linear import ColumnLinear, RowLinear
from loraplex_shard.layers.sources import Target
from loraplex_shard.lora.deltas import Delta, cut_adapter
from loraplex_shard.lora.weights import AdapterWeights
from loraplex_shard.machine import BLOCK_SIZE
from loraplex_shard.models import Decoder, load_decoder
from loraplex_shard.ops.base import Heads
from loraplex_shard.ops.choose import choose_operations, load_kernels
from loraplex_shard.parallel import Group
from loraplex_shard.runner import Runner
from loraplex_shard.settings import Quantize

CPU = torch.device("cpu")
MAX_MODEL_LEN = 2304
MAX_SEQUENCES = 32
CHUNK = 512  # tokens of a prefill step
GREEDY = Sampling(top_p=1, typical_p=1, repetition_penalty=1)


class Slots:
    """Adapters by slot, from 1: the part of an AdapterStore that a runner uses."""

    def __init__(self) -> None:
        self.adapters: Sequence[AdapterWeights] = ()

    def adapter_in(self, slot: int) -> AdapterWeights:
        return self.adapters[slot - 1]


def load_model(quantize: Quantize, dtype: torch.dtype = torch.bfloat16) -> Decoder:
    """The embedded model in one of its forms."""
    return load_decoder(
        open_checkpoint("", None, None),
        Group(0, 1),
        choose_operations(CPU, dtype, load_kernels(CPU, None)),
        Target(dtype, CPU, quantize),
        MAX_MODEL_LEN,
    )


class Stepper:
    """One model, its cache, and a batch of sequences in it."""

    def __init__(self, quantize: Quantize, dtype: torch.dtype = torch.bfloat16) -> None:
        checkpoint = open_checkpoint("", None, None)
        self.decoder = load_model(quantize, dtype)
        blocks = MAX_SEQUENCES * -(-MAX_MODEL_LEN // BLOCK_SIZE)
        self.cache: KVCache = self.decoder.new_cache(blocks, BLOCK_SIZE)
        self._slots = Slots()
        self.runner = Runner(
            self.decoder,
            self.cache,
            self._slots,  # type: ignore[arg-type]
            Group(0, 1),
            MAX_SEQUENCES,
            MAX_MODEL_LEN,
            CPU,
            GrammarCompiler(checkpoint.tokenizer().tokenizer_json, self.decoder.vocab_size, checkpoint.end_token_ids),
        )

    @property
    def weight_bytes(self) -> int:
        """What a decode step reads of the model: all matrices, the tied head once."""
        return sum(linear.weight.nbytes for linear in self._linears())

    @property
    def weights(self) -> int:
        """How many numbers those matrices have."""
        return sum(linear.weight.rows * linear.weight.columns for linear in self._linears())

    def _linears(self) -> list[ColumnLinear | RowLinear]:
        return [m for m in self.decoder.modules() if isinstance(m, ColumnLinear | RowLinear)]

    def kv_bytes(self, batch: int, context: int) -> int:
        return batch * context * self.decoder.cache_block_bytes(BLOCK_SIZE) // BLOCK_SIZE

    def fill(
        self, batch: int, context: int, adapters: Sequence[AdapterWeights] = (), adapted: int = MAX_SEQUENCES
    ) -> None:
        """Starts `batch` sequences of `context` tokens; of the first `adapted` ones, sequence i uses adapter i, or none
        if there are too few."""
        assert batch <= MAX_SEQUENCES and context < MAX_MODEL_LEN
        self.runner.clear()
        self._slots.adapters = adapters
        self._slot_column = [row + 1 if row < min(len(adapters), adapted) else 0 for row in range(batch)]
        self._rows, self._computed, self._blocks, self._used = list(range(batch)), [0] * batch, [0] * batch, 0
        ids = Random(0)
        starts = [
            SequenceStart(
                row=row,
                tokens=[ids.randrange(1000, 40000) for _ in range(context)],
                prompt_length=context,
                sampling=GREEDY,
            )
            for row in self._rows
        ]
        for row in self._rows:
            for begin in range(0, context, CHUNK):
                length = min(CHUNK, context - begin)
                self._run([row], length, begin + length == context, starts[row : row + 1] if begin == 0 else [])

    def decode(self) -> None:
        """One token for each sequence."""
        self._run(self._rows, 1, True, [])

    def seconds_per_decode(self, steps: int = 12) -> float:
        """The median, after two steps that are not counted."""
        return median_seconds(self.decode, steps, warm_up=2)

    def seconds_of_attention(self, batch: int, context: int) -> float:
        """Of one token of each sequence, in all layers, over whatever the cache holds."""
        spec, cut, blocks = self.decoder.spec, self.decoder.cut, -(-context // BLOCK_SIZE)
        tables = torch.randperm(batch * blocks).view(batch, blocks)
        last = torch.full((batch,), context - 1)
        indices = tables[:, -1] * BLOCK_SIZE + last % BLOCK_SIZE
        contexts, starts = (context,) * batch, tuple(range(batch + 1))
        step = self.decoder.ops.prepare(
            Batch(last, last, indices, starts, contexts, tables, ()), self.decoder.cos, self.decoder.sin
        )
        heads = Heads(cut.heads, cut.kv_heads, spec.head_dim)
        qkv = torch.randn(batch, (cut.heads + 2 * cut.kv_heads) * spec.head_dim).to(self.decoder.dtype)

        def attend() -> None:
            for layer in self.cache.layers:
                self.decoder.ops.attention(qkv, heads, step, layer)

        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        return median_seconds(attend, 5)

    def _run(self, rows: list[int], length: int, sample: bool, starts: list[SequenceStart]) -> None:
        counts = []
        for row in rows:
            self._computed[row] += length
            needed = -(-self._computed[row] // BLOCK_SIZE)
            counts.append(needed - self._blocks[row])
            self._blocks[row] = needed
        first, self._used = self._used, self._used + sum(counts)
        self.runner.step(
            StepRequest(
                starts=starts,
                rows=rows,
                lengths=[length] * len(rows),
                slots=[self._slot_column[row] for row in rows],
                samples=[sample] * len(rows),
                block_counts=counts,
                blocks=range(first, self._used),
            )
        )


def random_adapter(layouts: Sequence[LinearLayout], lora_rank: int, seed: int) -> AdapterWeights:
    """One on all linear layers but the head, small enough not to turn answers into noise."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {
        part.module: Delta(
            torch.randn(lora_rank, layout.in_features, generator=generator) * 0.01,
            torch.randn(part.out_features, lora_rank, generator=generator) * 0.01,
            1.0,
        )
        for layout in layouts
        if layout.name != "lm_head"
        for part in layout.parts
    }
    return cut_adapter(deltas, layouts, torch.bfloat16).weights


def median_seconds(work: Callable[[], object], times: int, warm_up: int = 1) -> float:
    for _ in range(warm_up):
        work()
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def multiply_rate() -> float:
    """Products per second, each with its sum, of all threads in a large matrix product of torch's: the better of
    bfloat16 and float32."""
    size = 1024

    def rate(dtype: torch.dtype) -> float:
        matrix = torch.ones(size, size, dtype=dtype)
        return size**3 / median_seconds(lambda: matrix @ matrix, 9)

    return max(rate(torch.bfloat16), rate(torch.float32))


def read_bandwidth() -> float:
    """Bytes per second that all threads together read from memory: the best of several sums over 512 MiB."""
    numbers = torch.ones(512 << 18)  # float32
    seconds = []
    for _ in range(9):
        began = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - began)
    return numbers.nbytes / min(seconds[1:])
