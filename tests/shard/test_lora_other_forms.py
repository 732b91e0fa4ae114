"""Folders that hold something else than an adapter, or an adapter in another form: the message says what to do."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.sources.files import CONFIG, PICKLE, TENSORS, choose
from loraplex_shard.lora.sources.local import LocalSource
from tests.shard.lora_models import save_adapter
from tests.shard.test_lora_listing import listing_of


def locate(root: Path) -> None:
    LocalSource(root).locate("adapter", "", "")


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["readme.md"], "this is not an adapter of PEFT, MLX-LM or llama.cpp"),
        (["lora.nemo"], "target='hf-peft'"),
        (["weights/__0_0.distcp", "context/model.yaml"], "target='hf-peft'"),  # NeMo 2
        (["adapter.zip"], "it is packed: unpack it here"),
        (["run.tar.gz"], "it is packed: unpack it here"),
        (["config.json", "model-00001-of-00002.safetensors"], "this is a whole model, perhaps with an adapter merged"),
        (["config.json", "pytorch_model.bin"], "this is a whole model"),
        (["consolidated.00.pth", "params.json"], "this is a whole model"),
        (
            ["optimizer.pt", "scheduler.pt", "trainer_state.json"],
            "this is the state of a training, without the adapter",
        ),
        (["global_step9/mp_rank_00_model_states.pt"], "this is the state of a training"),  # DeepSpeed
        (["epoch_0/adapter_0.pt"], "is a pickle file, .*: save the adapter with PEFT's save_pretrained"),  # torchtune
        (["pytorch_lora_weights.safetensors"], "diffusers"),
        (["adapter_model.safetensors.incomplete"], "a download is not complete"),
        ([PICKLE], f"PEFT writes it beside {PICKLE}"),
        # transformers' Trainer, Axolotl and LLaMA-Factory; ms-swift; PEFT for adapters with other names
        (
            [
                *(f"checkpoint-{step}/{CONFIG}" for step in (5, 100, 20)),
                "checkpoint-100/optimizer.pt",
                "trainer_state.json",
            ],
            "adapters in folders below it: checkpoint-5, checkpoint-20, checkpoint-100; name one, or move it up$",
        ),
        ([f"v0-2025/checkpoint-1/{CONFIG}"], "below it: v0-2025/checkpoint-1; "),
        ([f"default/{CONFIG}"], "below it: default; "),
        ([f"{letter}/{CONFIG}" for letter in "abcdefg"], "below it: c, d, e, f, g and 2 others; "),
    ],
)
def test_what_is_not_an_adapter_is_called_what_it_is(tmp_path: Path, names: list[str], reason: str) -> None:
    for name in names:
        file = tmp_path / "adapter" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
    with pytest.raises(AdapterInvalidError, match=f"{CONFIG} is missing: .*{reason}"):
        locate(tmp_path)
    with pytest.raises(AdapterInvalidError, match=f"{CONFIG} is missing: .*{reason}"):
        choose(dict.fromkeys(names, 1))  # as other sources list them


def test_a_config_without_tensors_names_the_checkpoints_below_it(tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter" / "checkpoint-5")
    (tmp_path / "adapter" / CONFIG).write_text("{}")
    with pytest.raises(AdapterInvalidError, match=f"{TENSORS} is missing: .*below it: checkpoint-5; name one"):
        locate(tmp_path)


def test_tensors_in_parts_are_refused_with_a_command_that_joins_them(tmp_path: Path) -> None:
    directory = tmp_path / "adapter"
    save_adapter(directory)
    whole = load_file(directory / TENSORS)
    (directory / TENSORS).unlink()
    for part in (1, 2):
        chosen = sorted(whole)[part - 1 :: 2]
        save_file({name: whole[name] for name in chosen}, directory / f"adapter_model-0000{part}-of-00002.safetensors")
    with pytest.raises(AdapterInvalidError, match=f"{TENSORS} is missing: .*in parts") as refused:
        locate(tmp_path)
    assert [adapter.fault for adapter in listing_of(tmp_path).adapters()] == [refused.value.message]
    command = refused.value.message.partition("joins them: ")[2].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, cwd=directory, check=True)
    joined = load_file(directory / TENSORS)
    assert joined.keys() == whole.keys() and all(joined[name].equal(whole[name]) for name in whole)
