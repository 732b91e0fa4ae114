"""What can be wrong with a rank's GPU: another rank has it, too, or nothing works on it any more."""

import socket

import torch

from loraplex_shard.device.hosts import gather_texts
from loraplex_shard.settings import SettingsError


def check_own(device: torch.device, size: int) -> None:
    """Raises SettingsError, on all ranks, if two of them have the same GPU: NCCL refuses that, without a name. To be
    called on all ranks of the default process group."""
    gpu = torch.cuda.get_device_properties(device).uuid
    texts = gather_texts(f"{gpu} {torch.cuda.device_count()} {socket.gethostname()}", size)
    for rank, text in enumerate(texts):
        gpu, count, host = text.split(" ")
        for other in range(rank):
            if texts[other].split(" ")[0] == gpu:
                raise SettingsError(
                    f"tp: ranks {other} and {rank} have the same GPU {gpu} on {host}, where torch finds {count}: each "
                    "rank needs a GPU of its own; set tp to at most the number of GPUs, or see CUDA_VISIBLE_DEVICES"
                )


def is_lost(device: torch.device) -> bool:
    """Whether nothing works on the GPU any more until the process ends, as after an illegal access, a failed assertion
    in a kernel or an error of the memory. Never true of a CPU."""
    if device.type != "cuda":
        return False
    try:
        # On a stream of its own: this neither waits for a step, which may hang, nor disturbs a graph that is recorded.
        torch.cuda.Stream(device).record_event().synchronize()  # type: ignore[no-untyped-call]
    except RuntimeError:  # torch.AcceleratorError is one
        return True
    return False
