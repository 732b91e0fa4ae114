"""The whole server: `loraplex serve` on a model and adapters with random weights, under load."""

import asyncio
import json
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

from bench.engine.stepping import random_deltas
from bench.gpu.check import Check, DeviceName, Row
from bench.gpu.checkpoints import RandomCheckpoint, load, tiny
from bench.load import Workload, measure, percentile
from bench.processes import Loraplex
from bench.targets import OVER_GRPC, open_target
from loraplex_shard.lora.weights.deltas import name_of_a, name_of_b

# The shape of Llama 3.2 1B: small enough to be written and read in seconds.
SHAPE: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
# Streams and adapters.
LOADS: dict[DeviceName, tuple[tuple[int, int], ...]] = {
    "cuda": ((1, 0), (32, 0), (32, 32), (128, 32), (256, 0)),
    "cpu": ((2, 2),),
}
ADAPTERS: dict[DeviceName, int] = {"cuda": 32, "cpu": 2}
TOKENS: dict[DeviceName, tuple[int, int]] = {"cuda": (256, 128), "cpu": (5, 3)}  # of prompts and of answers
START_SECONDS = 120  # kernels are compiled, and passes recorded


def checks(device: DeviceName) -> Iterator[Check]:
    """One server for all loads, so they are one check."""
    yield Check("loraplex serve", partial(_serve, device), 200)


def _serve(device: DeviceName) -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        model, adapters = Path(name, "model"), Path(name, "adapters")
        config = LlamaConfig(**SHAPE) if device == "cuda" else tiny("Llama 3 8B")
        save_model(config, device, model)
        names = save_adapters(config, device, adapters, ADAPTERS[device])
        flags = str(model), "--adapters", str(adapters), "--device", device
        few = ("--kv-blocks", "64") if device == "cpu" else ()
        began = time.monotonic()
        with Loraplex("serve", *flags, *few) as server:
            while not (addresses := server.addresses()):
                assert time.monotonic() < began + START_SECONDS, f"not ready after {START_SECONDS} s: {server.log()}"
                time.sleep(0.1)
            ready = time.monotonic() - began
            rows = [_measure(device, addresses, names[:count], streams) for streams, count in LOADS[device]]
    return [row | {"ready, s": ready} for row in rows]


def _measure(device: DeviceName, addresses: dict[str, str], adapters: tuple[str, ...], streams: int) -> Row:
    prompt, answer = TOKENS[device]

    async def run() -> Row:
        target = open_target(OVER_GRPC.format(**addresses), None)
        try:
            workload = Workload(streams, 2 * streams, prompt, answer, adapters, 90, time.monotonic_ns())
            measured = await measure(target, workload, 0)
        finally:
            await target.close()
        return {
            "streams": streams,
            "adapters": len(adapters),
            "tokens/s": measured.tokens_per_second,
            "first token p50, ms": percentile(measured.first_tokens, 50) * 1e3,
            "p99": percentile(measured.first_tokens, 99) * 1e3,
            "between tokens p50, ms": percentile(measured.gaps, 50) * 1e3,
            "between p99": percentile(measured.gaps, 99) * 1e3,
        }

    return asyncio.run(run())


def save_model(config: PreTrainedConfig, device: DeviceName, directory: Path) -> None:
    """A checkpoint as transformers saves it, with a tokenizer of a word per token."""
    directory.mkdir()
    checkpoint = RandomCheckpoint(config, torch.device(device))
    tensors = {name: checkpoint.read(name).bfloat16().cpu().contiguous() for name in checkpoint.names}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config.architectures, config.dtype = [checkpoint.architecture], "bfloat16"
    config.eos_token_id = 2
    config.save_pretrained(directory)
    words = models.WordLevel({f"w{token}": token for token in range(config.vocab_size)}, unk_token="w0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="w2")  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(directory)


def save_adapters(config: PreTrainedConfig, device: DeviceName, directory: Path, count: int) -> tuple[str, ...]:
    """Adapters as PEFT saves them, of different content. Returns their names."""
    layouts = load(config, device, torch.bfloat16).layouts
    deltas = random_deltas(layouts, 16, 0)
    modules = sorted({module.rpartition(".")[2] for module in deltas})
    settings = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": modules, "task_type": "CAUSAL_LM"}
    tensors = {name_of_a(module): delta.a.bfloat16() for module, delta in deltas.items()}
    tensors |= {name_of_b(module): delta.b.bfloat16() for module, delta in deltas.items()}
    first = next(iter(tensors))
    for number in range(count):
        own = directory / f"adapter-{number}"
        own.mkdir(parents=True)
        changed = tensors | {first: tensors[first] * (1 + number / count)}
        save_file(changed, own / "adapter_model.safetensors")
        (own / "adapter_config.json").write_text(json.dumps(settings))
    return tuple(f"adapter-{number}" for number in range(count))
