"""Tiny random checkpoints and adapters, and a driver that feeds chunks of sequences to a decoder as the runner does."""

from pathlib import Path
from random import Random
from zlib import crc32

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from loraplex_shard.checkpoint import open_checkpoint
from loraplex_shard.device.parallel import Group
from loraplex_shard.layers.parameters import ParameterForm
from loraplex_shard.lora.weights.arena import in_one_piece
from loraplex_shard.models import Model, load_model
from loraplex_shard.ops.base import Operations
from loraplex_shard.settings import Quantize
from loraplex_shard.shapes.adapter import AdapterWeights, Expansion, LayerWeights
from loraplex_shard.shapes.batch import Inputs, Segment
from loraplex_shard.shapes.layout import LinearLayout, count_indices
from tests.shard.elsewhere import DEVICE, tested_operations
from tests.shard.families import MAX_MODEL_LEN

WHOLE = Group(0, 1)
CPU = torch.device("cpu")
ROWS = 40


class Sequences:
    """Sequences in their own paged cache. Blocks are allocated in shuffled order."""

    def __init__(self, decoder: Model, block_size: int = 4, num_blocks: int = 96) -> None:
        self.decoder = decoder
        self.cache = decoder.new_cache(num_blocks, block_size, sequences=ROWS)
        self.free_blocks = Random(0).sample(range(num_blocks), num_blocks)
        self.computed: dict[str, int] = {}
        self.blocks: dict[str, list[int]] = {}
        self.rows: dict[str, int] = {}
        self.free_rows = list(range(ROWS))

    def step(self, chunks: dict[str, list[int]], segments: tuple[Segment, ...] = ()) -> dict[str, torch.Tensor]:
        """Computes these tokens of each sequence. Returns their logits, [tokens, vocab]; empty on ranks other than
        0."""
        logits = self.decoder.logits(self.decoder(self.inputs(chunks, segments), self.cache).hidden, segments)
        if logits is None:
            return {}
        return dict(zip(chunks, logits[0].split([len(c) for c in chunks.values()]), strict=True))

    def inputs(self, chunks: dict[str, list[int]], segments: tuple[Segment, ...]) -> Inputs:
        block_size, positions, indices, starts = self.cache.block_size, [], [], [0]
        for name, tokens in chunks.items():
            first = self.computed.get(name, 0)
            if name not in self.rows:
                self.rows[name] = self.free_rows.pop()
            self.computed[name] = first + len(tokens)
            blocks = self.blocks.setdefault(name, [])
            while len(blocks) * block_size < self.computed[name]:
                blocks.append(self.free_blocks.pop())
            span = range(first, self.computed[name])
            positions += span
            indices += [blocks[p // block_size] * block_size + p % block_size for p in span]
            starts.append(len(positions))
        tables = torch.zeros((max(self.rows.values()) + 1, max(map(len, self.blocks.values()))), dtype=torch.int32)
        for name, row in self.rows.items():
            tables[row, : len(self.blocks[name])] = torch.tensor(self.blocks[name])
        rows = np.array([self.rows[name] for name in chunks])
        token_rows = np.repeat(rows, np.diff(starts))
        known = torch.zeros((len(tables), max(positions) + 1), dtype=torch.int32)
        known[token_rows, positions] = torch.tensor([t for tokens in chunks.values() for t in tokens]).int()
        return Inputs(
            token_rows=token_rows,
            positions=np.array(positions),
            cache_indices=np.array(indices),
            starts=np.array(starts),
            context_lengths=np.array([self.computed[name] for name in chunks]),
            rows=rows,
            tokens=known,
            block_tables=tables,
            segments=segments,
        )

    def end(self, name: str) -> None:
        """The next sequence takes over its row."""
        self.free_rows.append(self.rows.pop(name))

    def greedy(self, prompt: list[int], steps: int) -> list[int]:
        """The `steps` most likely tokens after the prompt, computed one by one."""
        tokens, chunk = [], prompt
        for _ in range(steps):
            chunk = [int(self.step({"greedy": chunk})["greedy"][-1].argmax())]
            tokens += chunk
        return tokens


def save_checkpoint(config: PreTrainedConfig, directory: Path, **options: object) -> Path:
    """Saves a random model there. No bias is zero and no norm is one, so that ignoring one would be noticed."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
    model.save_pretrained(directory, **options)
    return directory


def load_reference(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """transformers' model from a directory."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def load(
    directory: Path,
    dtype: torch.dtype = torch.float32,
    group: Group = WHOLE,
    ops: Operations | None = None,
    max_model_len: int = MAX_MODEL_LEN,
    quantize: Quantize = "none",
) -> Model:
    """A checkpoint's decoder, or one rank's part of it. Without `ops`, it uses the operations that are tested, on
    DEVICE."""
    checkpoint, form = open_checkpoint(str(directory)), ParameterForm(dtype, CPU if ops else DEVICE, quantize)
    return load_model(checkpoint, group, ops or tested_operations(), form, max_model_len)


def whole_delta(module: str, out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B for one module of a random adapter, which is always the same."""
    generator = torch.Generator().manual_seed(crc32(module.encode()))
    lora_rank = 3
    shrink = torch.randn(lora_rank, in_features, generator=generator) * 0.2
    return shrink, torch.randn(out_features, lora_rank, generator=generator) * 0.2


def adapter_for(
    layouts: tuple[LinearLayout, ...],
    dtype: torch.dtype = torch.float32,
    touched: tuple[LinearLayout, ...] | None = None,
) -> AdapterWeights:
    """That adapter on all linear layers, or on some, partitioned like them."""
    layers = {}
    for layout in layouts if touched is None else touched:
        shrinks, expansions, start, rank_start = [], [], 0, 0
        for part in layout.parts:
            shrink, expand = whole_delta(part.module, part.out_features, layout.in_features)
            weight = torch.cat([expand[run] for run in part.rows]).T.to(dtype).contiguous()
            stop, rank_stop = start + weight.shape[1], rank_start + len(shrink)
            expansions.append(Expansion(rank_start, rank_stop, start, stop, weight))
            shrinks.append(shrink[:, layout.columns])
            start, rank_start = stop, rank_stop
        layers[layout.name] = LayerWeights(layout.index, torch.cat(shrinks).to(dtype), tuple(expansions))
    return in_one_piece(layers, count_indices(layouts))
