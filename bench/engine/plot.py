"""Plots tokens per second over the number of sequences in a step, for the base model and for adapters, with their
rooflines."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from bench.engine.stepping import Stepper, random_adapter
from bench.engine.timing import in_turns, median_of, seconds_per_byte

CONTEXT = 128
BATCHES = 1, 2, 4, 8, 16, 32
ADAPTERS = 0, 1, 8, 32
ROUNDS = 5


def draw(path: Path) -> None:
    """Measures decode steps in bfloat16 and writes the plot. A roofline is the speed at which memory bandwidth allows
    the weights, the cache and the adapters to be read once per step."""
    stepper = Stepper("none")
    adapters = [random_adapter(stepper.decoder.layouts, 16, seed) for seed in range(max(ADAPTERS))]
    works: dict[tuple[int, int], Callable[[], float]] = {(0, 0): seconds_per_byte()}
    for count in ADAPTERS:
        for batch in BATCHES:
            works[count, batch] = partial(stepper.seconds_per_decode, batch, CONTEXT, adapters[:count][:batch])
    measured = in_turns(works, ROUNDS)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for count in ADAPTERS:
        speeds, most = [], []
        for batch in BATCHES:
            read = stepper.weight_bytes + stepper.kv_bytes(batch, CONTEXT)
            read += sum(adapter.size_bytes for adapter in adapters[:count][:batch])
            speeds.append(median_of(lambda spent, batch=batch: batch / spent, measured[count, batch]))
            most.append(median_of(lambda byte, batch=batch, read=read: batch / (read * byte), measured[0, 0]))
        name = f"{count} adapters (r=16)" if count > 1 else "one adapter (r=16)" if count else "base model"
        (line,) = axes.plot(BATCHES, speeds, marker="o", label=name)
        axes.plot(BATCHES, most, linestyle=":", color=line.get_color())
    axes.set(xlabel="sequences in a step", ylabel="tokens per second", xscale="log", yscale="log", xticks=BATCHES)
    axes.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
    axes.minorticks_off()
    axes.set_title("Decoding in bfloat16; dotted: what memory bandwidth allows")
    axes.legend()
    figure.savefig(path)
