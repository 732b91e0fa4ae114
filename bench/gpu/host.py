"""What a step on a GPU costs the host, measured without one: `python -m bench.gpu.host`.

The CUDA operations run on tiny CPU tensors, and Triton's kernels are prepared but not launched. So this is the time of
Python, torch's dispatcher and Triton's launches, but for the driver's part of a launch, some 3 us each. It is CPU time
of the step's thread, which another process on the machine does not lengthen.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.engine.stepping import CPU, MAX_MODEL_LEN, Stepper, random_adapter
from bench.gpu.check import Row
from bench.gpu.stub_driver import StubDriver
from loraplex_shard.checkpoint import open_checkpoint
from loraplex_shard.device.parallel import Group
from loraplex_shard.layers.parameters import ParameterForm
from loraplex_shard.models.loading import load_decoder
from loraplex_shard.ops.base import Outputs
from loraplex_shard.ops.cuda.graphs import Record
from loraplex_shard.ops.cuda.operations import CudaOperations
from loraplex_shard.shapes.adapter import AdapterWeights

LAYERS = 2, 10  # of two models, whose difference is what a layer costs
BATCHES = 1, 32, 256
ADAPTERS = 0, 1, 32, 256
CONTEXT = 1024
CAPABILITY = 90
ROUNDS = 15


def host_table(batches: Sequence[int], adapters: Sequence[int], rounds: int) -> Table:
    """Microseconds of a decode step: of a layer, and of all that is in no layer; launches of Triton's kernels; and
    microseconds of a step that is one graph."""
    stub = StubDriver(CAPABILITY)
    stub.install()
    models = [_stepper(layers, max(batches)) for layers in LAYERS]
    recorded = _stepper(LAYERS[0], max(batches), _record)
    columns = "us per layer", "us per step besides", "launches per layer", "besides", "us per step with a graph"
    table = Table("batch", "adapters", *columns)
    for batch in batches:
        for count in (count for count in adapters if count <= batch):
            few, many = (_decode(model, _adapters(model, count), batch, rounds, stub) for model in models)
            layer, launches = ((b - a) / (LAYERS[1] - LAYERS[0]) for a, b in zip(few, many, strict=True))
            rest = few[0] - LAYERS[0] * layer, few[1] - LAYERS[0] * launches
            graph = _decode(recorded, _adapters(recorded, count), batch, rounds, stub)[0]
            figures = f"{layer:.0f}", f"{rest[0]:.0f}", f"{launches:.0f}", f"{rest[1]:.0f}", f"{graph:.0f}"
            table.add_row(str(batch), str(count), *figures)
    return table


def _record(compute: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
    outputs = compute()
    for tensor in outputs.tensors:
        tensor.fill_(1)  # what no kernel has written is finite, too
    return outputs, lambda: None


def _stepper(layers: int, sequences: int, record: Record | None = None) -> Stepper:
    # Only its form matters, which is that of Llama 3 and many others.
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=MAX_MODEL_LEN,
    )
    with TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        checkpoint = open_checkpoint(str(Path(folder)))
        form = ParameterForm(torch.bfloat16, CPU, "none")
        decoder = load_decoder(checkpoint, Group(0, 1), CudaOperations(CPU, record), form, MAX_MODEL_LEN)
    return Stepper("none", decoder=decoder, sequences=sequences)


def _adapters(stepper: Stepper, count: int) -> list[AdapterWeights]:
    return [random_adapter(stepper.decoder.layouts, 16, seed) for seed in range(count)]


def _decode(
    stepper: Stepper, adapters: Sequence[AdapterWeights], batch: int, rounds: int, stub: StubDriver
) -> tuple[float, float]:
    """Microseconds and launches of a decode step."""
    stepper.start(batch, CONTEXT, adapters)
    stepper.decode()
    stepper.decode()
    before = stub.launches
    spent = [_thread_seconds(stepper.decode) for _ in range(rounds)]
    return statistics.median(spent) * 1e6, (stub.launches - before) / rounds


def _thread_seconds(work: Callable[[], object]) -> float:
    began = time.thread_time()
    work()
    return time.thread_time() - began


def host_rows() -> list[Row]:
    """The table for bench.gpu's report."""
    torch.set_num_threads(1)
    table = host_table(BATCHES, ADAPTERS, ROUNDS)
    columns = {str(column.header): [str(cell) for cell in column.cells] for column in table.columns}
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def host() -> None:
    torch.set_num_threads(1)
    Console().print(host_table(BATCHES, ADAPTERS, ROUNDS))


if __name__ == "__main__":
    typer.run(host)
