"""`python -m bench.paths`: how much faster our own decoder computes a model than transformers' modeling code does with
the same operations. Prints the table of docs/models.md. Nothing else should run meanwhile."""

import os

os.environ["GOMP_SPINCOUNT"] = "3000"  # as `loraplex shard` has it; torch reads it when it is imported

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PhiConfig, PreTrainedConfig, Qwen3MoeConfig

from bench.engine.experts import CONFIG
from bench.engine.stepping import CPU, MAX_MODEL_LEN, Stepper, load_model
from bench.engine.timing import in_turns, ratio, seconds
from loraplex_shard.checkpoint import open_checkpoint
from loraplex_shard.device.parallel import Group
from loraplex_shard.layers.parameters import ParameterForm
from loraplex_shard.models.transformers.loading import load_transformers
from loraplex_shard.ops.choose import choose_operations, load_kernels

CONTEXT, PROMPT = 128, 1024
BATCHES = 1, 8, 32
VOCABULARY = CONFIG["vocab_size"]  # the size of the embedded model's, whose tokenizer is used
MODELS: dict[str, PreTrainedConfig | None] = {
    "SmolLM2 135M": None,
    "Gemma 3, in the shape of 270M": Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
    ),
    "Phi 2, in the shape of a tenth": PhiConfig(  # type: ignore[call-arg]
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=16,
        num_attention_heads=16,
        partial_rotary_factor=0.5,
    ),
    "Qwen 3 with 64 experts": Qwen3MoeConfig(**CONFIG),
}


def paths(rounds: Annotated[int, typer.Option(help="Each figure is the median of this many ratios.")] = 9) -> None:
    """Print tokens per second of the one over those of the other, by model."""
    heads = (*(f"decode, batch {batch}" for batch in BATCHES), f"prefill of {PROMPT:,} tokens")
    print(f"| model, bfloat16 | {' | '.join(heads)} |\n|{' --- |' * (len(heads) + 1)}")
    for name, config in MODELS.items():
        with _saved(config) as model:
            print(f"| {name} | {' | '.join(f'{gain:.2f}' for gain in _gains(model, rounds))} |", flush=True)


@contextmanager
def _saved(config: PreTrainedConfig | None) -> Iterator[str]:
    """Where a model with random weights is; the embedded one without a configuration."""
    if config is None:
        yield ""
        return
    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        make: Any = AutoModelForCausalLM.from_config
        make(config, dtype=torch.bfloat16).save_pretrained(directory)
        yield directory


def _gains(model: str, rounds: int) -> Iterator[float]:
    steppers = {
        "ours": Stepper("none", decoder=load_model("none", model=model)),
        "theirs": Stepper("none", decoder=_by_transformers(model)),
    }
    works: dict[tuple[str, int], Callable[[], float]] = {}
    for whose, stepper in steppers.items():
        for batch in BATCHES:
            works[whose, batch] = partial(stepper.seconds_per_decode, batch, CONTEXT)
        works[whose, PROMPT] = partial(seconds, partial(stepper.prefill, 1, PROMPT))
    measured = in_turns(works, rounds)
    return (ratio(measured["theirs", work], measured["ours", work]) for work in (*BATCHES, PROMPT))


def _by_transformers(model: str) -> Any:
    """The model as load_model builds it for a class that our decoder does not know."""
    operations = choose_operations(CPU, torch.bfloat16, load_kernels(CPU, None))
    form = ParameterForm(torch.bfloat16, CPU, "none")
    return load_transformers(open_checkpoint(model), Group(0, 1), operations, form, MAX_MODEL_LEN)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(paths)

if __name__ == "__main__":
    app()
