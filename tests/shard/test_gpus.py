"""What ranks find out about their GPUs, and how a process ends whose GPU or group is lost; there is no GPU here."""

import os
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
import torch

from loraplex_shard.device import gpus, troubles
from loraplex_shard.device.parallel import Group
from loraplex_shard.device.troubles import GroupLostError
from loraplex_shard.ops.cuda import trial
from loraplex_shard.settings import SettingsError

CUDA = torch.device("cuda", 0)


def test_ranks_with_the_same_gpu_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="uuid-b"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    others: list[str] = []
    monkeypatch.setattr(gpus, "gather_texts", lambda text, size: [*others, text][:size])
    others[:] = "uuid-a 1 node-1", "uuid-c 1 node-1"
    gpus.check_own(CUDA, 3)
    others[:] = "uuid-a 1 node-1", "uuid-b 1 node-1"
    with pytest.raises(SettingsError, match=r"tp: ranks 1 and 2 have the same GPU uuid-b on .*, where torch finds 1: "):
        gpus.check_own(CUDA, 3)


def test_ranks_that_do_not_meet_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(GroupLostError, match=r"rendezvous: rank 1 of 2 does not reach the others at file://.*: "):
        Group.connect(1, 2, f"file://{tmp_path}/file/x", torch.device("cpu"), None)


def test_a_gpu_is_lost_once_nothing_can_be_asked_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def __init__(self, device: torch.device) -> None:
            assert device == CUDA

        def record_event(self) -> SimpleNamespace:
            if failed:
                raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700)
            return SimpleNamespace(synchronize=lambda: None)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    failed = False
    assert not gpus.is_lost(CUDA)
    failed = True
    assert gpus.is_lost(CUDA)
    assert not gpus.is_lost(torch.device("cpu"))


def test_a_kernel_that_cannot_be_compiled_is_named_with_what_triton_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    trial.try_kernel(torch.device("cpu"))  # in Triton's interpreter

    class Uncompiled:
        def __getitem__(self, grid: tuple[int]) -> None:
            raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(trial, "_write_one", Uncompiled())
    with pytest.raises(SettingsError, match=r"device: .*: Failed to find C compiler\.\)\. Triton needs a C compiler"):
        trial.try_kernel(torch.device("cpu"))


def test_a_process_that_hangs_ends_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = SimpleQueue[int]()
    monkeypatch.setattr(troubles, "END_SECONDS", 0)
    monkeypatch.setattr(os, "_exit", ends.put)
    noticed = troubles.Troubles()
    noticed.report("another rank has ended")
    assert (noticed.wait(30), ends.get(timeout=30)) == ("another rank has ended", 1)
    troubles.end_soon(0, "a step hangs")
    assert ends.get(timeout=30) == 0
