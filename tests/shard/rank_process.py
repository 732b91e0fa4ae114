"""One rank of the tensor-parallel tests: `python -m tests.shard.rank_process RANK DIRECTORY`.

It is a rank in a group of each size from 2 to 4, for each checkpoint in DIRECTORY; rank 0 writes the logits. The
groups of the checkpoint "llama" only use gloo and plain torch; the others share memory and run recorded programs.
"""

import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from loraplex_shard.device.parallel import NCCL_SECONDS, Group
from loraplex_shard.models.decoder import Decoder
from loraplex_shard.ops.choose import choose_operations, load_kernels
from loraplex_shard.settings import SettingsError
from loraplex_shard.shapes.batch import Segment
from tests.shard.decoders import CPU, Sequences, adapter_for, load
from tests.shard.operations import kernels_directory

SIZES = 2, 3, 4


def run(decoder: Decoder) -> torch.Tensor | None:
    """Logits of a few steps that mix two sequences with an adapter and one on the base; None on ranks other than 0."""
    driver, adapter = Sequences(decoder, block_size=16), adapter_for(decoder.layouts)
    first = driver.step({"a": [5, 80, 3, 3, 41], "b": [7], "c": [1, 2, 3]}, (Segment(0, 6, adapter),))
    second = driver.step({"b": [9, 60, 2], "a": [17], "c": [4]}, (Segment(0, 4, adapter),))
    third = driver.step({"c": [8, 6, 1], "b": [30], "a": [2]}, (Segment(3, 5, adapter),))
    logits = [*first.values(), *second.values(), *third.values()]
    return torch.cat(logits) if logits else None


def check_collectives(group: Group) -> None:
    """Operations with kernels, except for float16, which has none."""
    for dtype in torch.float32, torch.bfloat16, torch.float16:
        summed = torch.full((3,), group.rank + 1, dtype=dtype)
        group.all_reduce_(summed)
        assert summed.tolist() == [sum(range(1, group.size + 1))] * 3
    chosen = torch.tensor([group.rank, 7])
    group.broadcast_(chosen)
    assert chosen.tolist() == [0, 7]
    gathered = group.gather(torch.full((2, group.rank + 1), group.rank), range(1, group.size + 1))
    expected = [rank for rank in range(group.size) for _ in range(rank + 1)]
    assert gathered is None if group.rank else gathered.tolist() == [expected] * 2


def check_gpus(rank: int, size: int, rendezvous: str) -> None:
    """Ranks that have GPUs of their own meet over NCCL, and those that share one do not; there is no GPU here."""
    with (
        patch.object(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"gpu-{device.index}")),
        patch.object(dist, "new_group", lambda **options: options),
    ):
        for index, url in (0, f"{rendezvous}-same"), (rank, f"{rendezvous}-own"):
            gpu = torch.device("cuda", index)
            try:
                group = Group.connect(rank, size, url, gpu, None)
            except SettingsError as error:
                assert url.endswith("same") and "tp: ranks 0 and 1 have the same GPU gpu-0 on " in error.message
                dist.destroy_process_group()
                continue
            assert url.endswith("own")
            options = {"backend": "nccl", "timeout": timedelta(seconds=NCCL_SECONDS), "device_id": gpu}
            assert group._nccl == options
            check_collectives(group)  # numbers on the host do not need NCCL
            group.close()


def main(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    results = {}
    for size in (size for size in SIZES if rank < size):
        for checkpoint in sorted(path for path in directory.iterdir() if path.is_dir()):
            rendezvous = f"file://{directory}/{checkpoint.name}-{size}.rendezvous"
            kernels = None if checkpoint.name == "llama" else load_kernels(CPU, kernels_directory())
            group = Group.connect(rank, size, rendezvous, CPU, kernels)
            logits = run(load(checkpoint, group=group, ops=choose_operations(CPU, torch.float32, kernels)))
            check_collectives(group)
            group.close()
            if logits is not None:
                results[f"{checkpoint.name} over {size}"] = logits
    if rank < 2:
        check_gpus(rank, 2, f"file://{directory}/gpus")
    if rank == 0:
        save_file(results, directory / "logits.safetensors")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
