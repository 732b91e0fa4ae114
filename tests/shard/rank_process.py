"""One rank of the tensor-parallel tests: `python -m tests.shard.rank_process RANK DIRECTORY`.

Takes part in a group of each size from 2 to 4, on each checkpoint in DIRECTORY; rank 0 writes the logits.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tests.shard.decoders import Sequences, adapter_for, load

from loraplex_shard.batch import Segment
from loraplex_shard.models import Decoder
from loraplex_shard.parallel import Group

SIZES = 2, 3, 4


def run(decoder: Decoder) -> torch.Tensor | None:
    """Logits of a few steps that mix two sequences on an adapter and one on the base; None on ranks other than 0."""
    driver, adapter = Sequences(decoder), adapter_for(decoder.layouts)
    first = driver.step({"a": [5, 80, 3, 3, 41], "b": [7], "c": [1, 2, 3]}, (Segment(0, 6, adapter),))
    second = driver.step({"b": [9, 60, 2], "a": [17], "c": [4]}, (Segment(0, 4, adapter),))
    logits = [*first.values(), *second.values()]
    return torch.cat(logits) if logits else None


def main(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    results = {}
    for size in (size for size in SIZES if rank < size):
        for checkpoint in sorted(path for path in directory.iterdir() if path.is_dir()):
            rendezvous = f"file://{directory}/{checkpoint.name}-{size}.rendezvous"
            group = Group.connect(rank, size, rendezvous, torch.device("cpu"))
            logits = run(load(checkpoint, group=group))
            flag = torch.tensor([rank])
            group.broadcast_(flag)
            assert flag.item() == 0
            group.close()
            if logits is not None:
                results[f"{checkpoint.name} over {size}"] = logits
    if rank == 0:
        save_file(results, directory / "logits.safetensors")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
