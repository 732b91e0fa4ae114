"""`python -m bench.quality [MODEL]`: what quantization costs in quality and saves in memory.

Every form of the model reads the same text and is compared with float32, token by token. The text is from this
project's documentation, and newer than the models, so they cannot have learnt it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from loraplex_protos.errors import LoraplexError
from loraplex_shard.checkpoint import Checkpoint, open_checkpoint
from loraplex_shard.device.parallel import Group
from loraplex_shard.layers.parameters import LoadableLayer, ParameterForm
from loraplex_shard.models.decoder import Decoder
from loraplex_shard.models.loading import load_decoder
from loraplex_shard.ops.choose import choose_operations, load_kernels
from loraplex_shard.serving.memory import BLOCK_SIZE
from loraplex_shard.settings import Quantize
from loraplex_shard.shapes.batch import Inputs

TEXT = Path(__file__).with_name("held_out.txt")
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Form:
    """How the model is loaded."""

    name: str
    dtype: torch.dtype
    quantize: Quantize = "none"
    kv_dtype: torch.dtype | None = None  # None: the dtype


FORMS = (
    Form("float32", torch.float32),
    Form("bfloat16", torch.bfloat16),
    Form("bfloat16, int8 KV", torch.bfloat16, kv_dtype=torch.int8),
    Form("int8", torch.bfloat16, "int8"),
    Form("int8, int8 KV", torch.bfloat16, "int8", torch.int8),
    Form("int4", torch.bfloat16, "int4"),
)


@dataclass(frozen=True, slots=True)
class Quality:
    perplexity: float
    divergence: float  # mean KL divergence of the next-token distribution from float32's, in nats
    agreement: float  # share of positions at which both have the same most likely token
    weight_bytes: int


def quality(
    model: Annotated[str, typer.Argument(help="A model, as for `loraplex serve`. Default: the embedded model.")] = "",
    text: Annotated[Path, typer.Option(help="The text to read.", exists=True, dir_okay=False)] = TEXT,
    tokens: Annotated[int, typer.Option(min=2, help="How many of its tokens to read.")] = 2048,
    window: Annotated[
        int, typer.Option(min=2, help="Tokens per window; each window is read without the text before it.")
    ] = 512,
) -> None:
    """Compare MODEL in bfloat16, int8, int4 and with an int8 KV cache with MODEL in float32."""
    try:
        checkpoint = open_checkpoint(model)
        tokenizer = Tokenizer.from_str(checkpoint.tokenizer().tokenizer_json.decode())
        ids = tokenizer.encode(text.read_text(), add_special_tokens=False).ids[:tokens]
        windows = torch.split(torch.tensor(ids), window)
        Console().print(table(measure(checkpoint, windows), len(ids)))
    except LoraplexError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


def measure(checkpoint: Checkpoint, windows: Sequence[torch.Tensor]) -> dict[str, Quality]:
    """The quality of each form, by name. Only one form and float32's distributions are in memory at a time."""
    exact: list[torch.Tensor] = []
    results = {}
    for form in FORMS:
        decoder = _load(checkpoint, form, max(map(len, windows)))
        losses, divergences, agreements = [], [], []
        for place, read in enumerate(_log_probabilities(decoder, form, windows)):
            if form is FORMS[0]:
                exact.append(read)
            losses.append(-read[:-1].gather(1, windows[place][1:, None]))
            divergences.append((exact[place].exp() * (exact[place] - read)).sum(1))
            agreements.append(exact[place].argmax(1) == read.argmax(1))
        results[form.name] = Quality(
            math.exp(float(torch.cat(losses).mean())),
            float(torch.cat(divergences).mean()),
            float(torch.cat(agreements).float().mean()),
            weight_bytes(decoder),
        )
        typer.echo(f"{form.name}: perplexity {results[form.name].perplexity:.3f}", err=True)
    return results


def weight_bytes(decoder: Decoder) -> int:
    """Bytes of the weights; a tied head does not count again."""
    layers = [module for module in decoder.modules() if isinstance(module, LoadableLayer) and module.matrix]
    matrices = [layer.weight.nbytes for layer in layers if not (decoder.spec.tied and layer is decoder.lm_head)]
    return sum([*matrices, *(parameter.nbytes for parameter in decoder.parameters())])


def table(results: dict[str, Quality], tokens: int) -> Table:
    exact, half = results["float32"], results["bfloat16"]
    table = Table("", title=f"{tokens} tokens", box=None, header_style="bold")
    for column in ("perplexity", "over bfloat16", "KL", "same argmax", "weights, MB", "of bfloat16"):
        table.add_column(column, justify="right")
    for name, result in results.items():
        table.add_row(
            name,
            f"{result.perplexity:.3f}",
            f"{result.perplexity / half.perplexity - 1:+.2%}",
            "" if result is exact else f"{result.divergence:.4f}",
            "" if result is exact else f"{result.agreement:.3f}",
            f"{result.weight_bytes / 1e6:.1f}",
            f"{result.weight_bytes / half.weight_bytes:.2f}",
        )
    return table


def _load(checkpoint: Checkpoint, form: Form, length: int) -> Decoder:
    ops = choose_operations(CPU, form.dtype, load_kernels(CPU, None))
    return load_decoder(checkpoint, Group(0, 1), ops, ParameterForm(form.dtype, CPU, form.quantize), length)


def _log_probabilities(decoder: Decoder, form: Form, windows: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """For each window, the log probabilities of the token after each of its tokens: [tokens, vocab_size] float32."""
    for window in windows:
        blocks = -(-len(window) // BLOCK_SIZE)
        places, row = np.arange(len(window)), np.zeros(1, np.int64)
        tables = torch.arange(blocks, dtype=torch.int32)[None]
        inputs = Inputs(
            token_rows=row.repeat(len(window)),
            positions=places,
            cache_indices=places,
            starts=np.array((0, len(window))),
            context_lengths=row + len(window),
            rows=row,
            tokens=window[None].int(),
            block_tables=tables,
            segments=(),
        )
        hidden = decoder(inputs, decoder.new_cache(blocks, BLOCK_SIZE, form.kv_dtype)).hidden
        logits = decoder.logits(hidden, ())
        assert logits is not None
        yield logits[0].log_softmax(1)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(quality)

if __name__ == "__main__":
    app()
