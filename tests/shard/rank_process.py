"""One rank of the tensor-parallel tests: `python -m tests.shard.rank_process RANK DIRECTORY`.

Takes part in a group of each size from 2 to 4, on each checkpoint in DIRECTORY; rank 0 writes the logits.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from loraplex_shard.batch import Segment
from loraplex_shard.models import Decoder
from loraplex_shard.parallel import Group
from tests.shard.decoders import Sequences, adapter_for, load

SIZES = 2, 3, 4


def run(decoder: Decoder) -> torch.Tensor | None:
    """Logits of a few steps that mix two sequences on an adapter and one on the base; None on ranks other than 0."""
    driver, adapter = Sequences(decoder), adapter_for(decoder.layouts)
    first = driver.step({"a": [5, 80, 3, 3, 41], "b": [7], "c": [1, 2, 3]}, (Segment(0, 6, adapter),))
    second = driver.step({"b": [9, 60, 2], "a": [17], "c": [4]}, (Segment(0, 4, adapter),))
    logits = [*first.values(), *second.values()]
    return torch.cat(logits) if logits else None


def check_collectives(group: Group) -> None:
    for dtype in torch.float32, torch.bfloat16, torch.float16:
        summed = torch.full((3,), group.rank + 1, dtype=dtype)
        group.all_reduce_(summed)
        assert summed.tolist() == [sum(range(1, group.size + 1))] * 3
    chosen = torch.tensor([group.rank, 7])
    group.broadcast_(chosen)
    assert chosen.tolist() == [0, 7]


def main(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    results = {}
    for size in (size for size in SIZES if rank < size):
        for checkpoint in sorted(path for path in directory.iterdir() if path.is_dir()):
            rendezvous = f"file://{directory}/{checkpoint.name}-{size}.rendezvous"
            group = Group.connect(rank, size, rendezvous, torch.device("cpu"))
            logits = run(load(checkpoint, group=group))
            check_collectives(group)
            group.close()
            if logits is not None:
                results[f"{checkpoint.name} over {size}"] = logits
    if rank == 0:
        save_file(results, directory / "logits.safetensors")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
