"""`python -m bench.kinds`: what the kinds of adapters cost: tokens per second with adapters of one kind, or of all
kinds mixed, divided by those with plain LoRA of the same ranks. Nothing else should run at the same time."""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model

from bench.engine.stepping import Stepper
from bench.engine.timing import in_turns, ratio, seconds
from bench.peft_target import load_model
from loraplex_shard.checkpoint import open_checkpoint
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.reading import read_adapter
from loraplex_shard.lora.sources.files import CONFIG, TENSORS, assemble, read_file
from loraplex_shard.models.decoder import Decoder
from loraplex_shard.shapes.adapter import AdapterWeights

LORA_RANK, ADAPTERS = 16, 8
STREAMS, CONTEXT, PROMPT = 32, 128, 256
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = [1, 2, 3, 4]
SPREAD = 0.005  # of the random numbers that are added to what is trained
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "DoRA": {"use_dora": True},
    "biases": {"lora_bias": True},
    "norms": {"modules_to_save": ["input_layernorm", "post_attention_layernorm", "norm"]},
    "trained tokens": {"trainable_token_indices": {"embed_tokens": TOKENS}},
    "trained lm heads": {"modules_to_save": ["lm_head"]},
}
MIXED = "all of these (wanted: 0.9)"


def kinds(rounds: Annotated[int, typer.Option(help="Each figure is the median of this many ratios.")] = 7) -> None:
    """Print tokens per second of each kind over those of plain LoRA."""
    stepper = Stepper("none")
    adapters = dict(_adapters(stepper.decoder))
    others = [kind for kind in KINDS if kind != "plain"]
    adapters[MIXED] = [adapters[others[number % len(others)]][number] for number in range(ADAPTERS)]
    works: dict[tuple[str, str], Callable[[], float]] = {}
    for kind, own in adapters.items():
        works[kind, "decode"] = partial(stepper.seconds_per_decode, STREAMS, CONTEXT, own)
        works[kind, "prefill"] = partial(seconds, partial(stepper.prefill, ADAPTERS, PROMPT, own))
    measured = in_turns(works, rounds)
    print(f"| {ADAPTERS} adapters ÷ plain LoRA, tokens/s | decode, {STREAMS} streams | prefill of {PROMPT} tokens |")
    print("| --- | --- | --- |")
    for kind in (*others, MIXED):
        gains = (ratio(measured["plain", work], measured[kind, work]) for work in ("decode", "prefill"))
        print(f"| {kind} | {' | '.join(f'{gain:.2f}' for gain in gains)} |")


def _adapters(decoder: Decoder) -> Iterator[tuple[str, list[AdapterWeights]]]:
    """By kind, with random weights, as a server reads them from files. Those of a kind are copies of one."""
    checkpoint = open_checkpoint("", None, None)
    base = BaseModel(
        checkpoint.architecture,
        tensors=decoder.tensors,
        vocab_size=decoder.vocab_size,
        served=decoder.served,
        matrices=decoder.matrices,
        hidden_size=decoder.spec.hidden_size,
    )
    model = load_model("default")
    with tempfile.TemporaryDirectory() as directory:
        for kind, fields in KINDS.items():
            adapted = get_peft_model(model, LoraConfig(r=LORA_RANK, target_modules=LAYERS, **fields))
            for parameter in (each for each in adapted.parameters() if each.requires_grad):
                parameter.data += torch.randn_like(parameter) * SPREAD
            adapted.save_pretrained(directory)
            contents = {name: read_file(Path(directory, name), name) for name in (CONFIG, TENSORS)}
            weights = read_adapter(assemble(contents), decoder.layouts, base, decoder.dtype).weights
            yield kind, [weights.at(weights.memory.clone()) for _ in range(ADAPTERS)]
            model = adapted.unload()


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(kinds)

if __name__ == "__main__":
    app()
