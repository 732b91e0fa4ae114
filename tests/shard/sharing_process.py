"""A rank that shares memory: `python -m tests.shard.sharing_process RANK DIRECTORY`.

Writes its results to DIRECTORY/RANK.json, including the errors when the last rank is late, leaves or dies.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from loraplex_shard.device.shared_memory import SHARED, SLOT_BYTES, LostRankError, SharedMemory
from loraplex_shard.kernels.library import Kernels
from loraplex_shard.ops.choose import load_kernels
from loraplex_shard.ops.cpu.program import Program
from tests.shard.operations import kernels_directory

SIZE = 3
LAST = SIZE - 1
# In elements: less than a slot, a full slot, and several slots, the last of which is not full.
COUNTS = 1, 15, 33, 4608, SLOT_BYTES // 4, SLOT_BYTES // 2 + 1, 3 * SLOT_BYTES + 77


def part_of(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def sums_that_differ(shared: SharedMemory, rank: int) -> list[str]:
    """The sums that are not bitwise equal to the sum of the ranks' parts in order in float32."""
    wrong = []
    for dtype in torch.float32, torch.bfloat16:
        for count in COUNTS:
            parts = [part_of(other, (count,), dtype) for other in range(SIZE)]
            shared.all_reduce_(parts[rank])
            first, second, third = (part_of(other, (count,), dtype).float() for other in range(SIZE))
            if not torch.equal(parts[rank], (first + second + third).to(dtype)):
                wrong.append(f"{count} of {dtype}")
    return wrong


def broadcast_arrives(shared: SharedMemory, rank: int) -> bool:
    tensors = [part_of(rank, (count,), torch.float32) for count in COUNTS]
    for tensor in tensors:
        shared.broadcast_(tensor)
    return all(
        torch.equal(each, part_of(0, (count,), torch.float32)) for each, count in zip(tensors, COUNTS, strict=True)
    )


def gathered_is_side_by_side(shared: SharedMemory, rank: int) -> bool:
    """Gathers rows shorter and longer than a slot, also if a rank has no columns."""
    for rows, widths in (5, (3, 2, 2)), (7, (1, 0, 4)), (3, (40_001, 40_001, 40_000)):
        gathered = shared.gather(part_of(rank, (rows, widths[rank]), torch.float32), widths)
        parts = [part_of(other, (rows, width), torch.float32) for other, width in enumerate(widths)]
        if not (gathered is None if rank else torch.equal(gathered, torch.cat(parts, dim=1))):
            return False
    return True


def two_sums(kernels: Kernels, shared: SharedMemory, tensor: torch.Tensor) -> Program:
    program = Program(kernels)
    for _ in range(2):
        program.add("all_reduce", shared.all_reduce_arguments(tensor), shared.check)
    program.finish(tensor)
    return program


def names_of_shared_memory() -> list[str]:
    """The paths of the shared memory that this process has mapped; the kernel marks deleted ones."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [line[line.index("/") :] for line in maps if f"{SHARED}/loraplex" in line]


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except LostRankError as error:
        return error.message
    return "none"


def main(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=SIZE)
    kernels = load_kernels(torch.device("cpu"), kernels_directory())
    assert kernels
    connections = [SharedMemory.connect(rank, SIZE, kernels, patience) for patience in (60, 2, 60, 60, 60)]
    shared, late, left, died, in_program = filter(None, connections)
    seen = {
        "names": names_of_shared_memory(),
        "wrong sums": sums_that_differ(shared, rank),
        "broadcast": broadcast_arrives(shared, rank),
        "gather": gathered_is_side_by_side(shared, rank),
    }
    with patch.object(socket, "gethostname", lambda: f"host-{rank // 2}"):
        seen["two hosts share"] = SharedMemory.connect(rank, SIZE, kernels) is not None
    seen["without kernels on rank 1"] = SharedMemory.connect(rank, SIZE, None if rank == 1 else kernels) is not None

    one, summed = torch.ones(1), torch.ones(1)
    program = two_sums(kernels, in_program, summed)
    seen["sum of a program"] = program.run(()).item()
    dist.barrier()
    if rank == 0:
        time.sleep(0.5)  # the others look whether it lives
    seen["first is late"] = error_of(lambda: shared.all_reduce_(torch.ones(1)))
    dist.barrier()
    if rank != LAST:
        seen["late"] = error_of(lambda: late.all_reduce_(one))
    dist.barrier()
    left.all_reduce_(one)  # it is complete, although the last rank leaves at once
    if rank == LAST:
        left.leave()
        (directory / f"{rank}.json").write_text(json.dumps(seen))
        os.kill(os.getpid(), signal.SIGKILL)
    seen["left"] = error_of(lambda: left.all_reduce_(one))
    seen["died"] = error_of(lambda: died.all_reduce_(one))
    seen["died in a program"] = error_of(lambda: program.run(()))
    (directory / f"{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
