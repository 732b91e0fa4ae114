"""Tokens per second over the sequences in a step, for the base model and for adapters, below their rooflines."""

from pathlib import Path

from matplotlib.figure import Figure

from bench.engine.stepping import Stepper, random_adapter, read_bandwidth

CONTEXT = 128
BATCHES = 1, 2, 4, 8, 16, 32
ADAPTERS = 0, 1, 8, 32


def draw(path: Path) -> None:
    """Measures decode steps in bfloat16 and writes the plot. A roofline is what the memory's bandwidth allows if
    weights, cache and adapters are read once per step."""
    bandwidth, stepper = read_bandwidth(), Stepper("none")
    adapters = [random_adapter(stepper.decoder.layouts, 16, seed) for seed in range(max(ADAPTERS))]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for count in ADAPTERS:
        measured, most = [], []
        for batch in BATCHES:
            chosen = [adapters[row % count] for row in range(batch)] if count else []
            stepper.fill(batch, CONTEXT - 8, chosen)
            measured.append(batch / stepper.seconds_per_decode())
            read = stepper.weight_bytes + stepper.kv_bytes(batch, CONTEXT)
            read += sum(adapter.size_bytes for adapter in adapters[: min(count, batch)])
            most.append(batch * bandwidth / read)
        name = f"{count} adapters (r=16)" if count > 1 else "one adapter (r=16)" if count else "base model"
        (line,) = axes.plot(BATCHES, measured, marker="o", label=name)
        axes.plot(BATCHES, most, linestyle=":", color=line.get_color())
    axes.set(xlabel="sequences in a step", ylabel="tokens per second", xscale="log", yscale="log", xticks=BATCHES)
    axes.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
    axes.minorticks_off()
    axes.set_title("Decoding in bfloat16; dotted: what memory bandwidth allows")
    axes.legend()
    figure.savefig(path)
