"""Adapters that cannot be served exactly are refused, and the message says why."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.peft import patterns
from loraplex_shard.lora.peft.reading import read_adapter
from loraplex_shard.lora.sources.files import CONFIG, PICKLE, TENSORS
from loraplex_shard.lora.sources.local import LocalSource
from tests.shard.lora_models import BASE, edit_config, edit_tensors, layouts, read, save_adapter

PREFIX = "base_model.model."
ACTIVATED = {"alora_invocation_tokens": [5, 6]}
O_PROJ = "model.layers.1.self_attn.o_proj"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sound")
    save_adapter(directory)
    return directory


@pytest.fixture
def directory(sound: Path, tmp_path: Path) -> Path:
    """An adapter that the test may damage."""
    return shutil.copytree(sound, tmp_path / "adapter")


def refusal(directory: Path, dtype: torch.dtype = torch.float32) -> str:
    """The message with which all ranks refuse the adapter, whatever part of it each would hold."""
    messages = set()
    for rank in range(3):
        with pytest.raises(AdapterInvalidError) as caught:
            read_adapter(read(directory), layouts(rank, 3), BASE, dtype)
        messages.add(caught.value.message)
    [message] = messages
    return message


def test_the_unmodified_adapter_is_accepted(directory: Path) -> None:
    read_adapter(read(directory), layouts(), BASE, torch.float32)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bias", "some"),
        ("trainable_token_indices", [1, -2]),
        ("trainable_token_indices", {"embed_tokens": 3}),
        ("trainable_token_indices", {"q_proj": [3]}),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("alora_invocation_tokens", []),
        ("alora_invocation_tokens", [5, 50]),
        ("alora_invocation_tokens", [-1]),
        ("alora_invocation_tokens", [1.5]),
        ("alora_invocation_tokens", [True]),
        ("alora_invocation_tokens", ["5"]),
        ("alora_invocation_tokens", 5),
        ("alora_invocation_tokens", [1] * 1025),
        ("invocation_string", ""),
        ("invocation_string", ["<go>"]),
        ("invocation_string", "<go>"),  # this base has no tokenizer
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("use_bdlora", {"nblocks": 2, "target_modules_bd_a": ["proj"], "target_modules_bd_b": ["q_proj"]}),
        ("use_hidden_states", True),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 0.1}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("peft_type", "ALORA"),
        ("peft_type", None),
        ("task_type", "CLS"),
        ("r", 0),
        ("r", 513),
        ("r", "8"),
        ("r", 4.5),
        ("r", True),
        ("lora_alpha", "16"),
        ("lora_alpha", float("nan")),
        ("rank_pattern", {"q_proj": 1000}),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_proj(": 2}),
        ("rank_pattern", [1]),
        ("alpha_pattern", {"q_proj": "much"}),
        ("target_modules", 3),
        ("target_modules", []),
        ("target_modules", ["query_key_value"]),
        ("target_modules", "q_proj"),
        ("target_modules", r"(.*q_proj"),
        ("exclude_modules", r"*"),
        ("exclude_modules", r".*"),
        ("layers_to_transform", "1"),
        ("layers_to_transform", [7]),
        ("layers_pattern", "layers"),
    ],
)
def test_an_invalid_or_unsupported_config_field_is_named(directory: Path, field: str, value: object) -> None:
    edit_config(directory, **{field: value})
    message = refusal(directory)
    assert CONFIG in message
    assert field in message or (field in ("exclude_modules", "layers_to_transform") and "target_modules" in message)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"use_dora": True}, "missing base_model.model.model.layers.0.self_attn.k_proj.lora_magnitude_vector"),
        ({"lora_bias": True}, "missing base_model.model.model.layers.0.self_attn.k_proj.lora_B.bias"),
        ({"modules_to_save": ["lm_head"]}, "missing base_model.model.lm_head.weight"),
        ({"use_dora": True, "lora_bias": True}, "lora_bias has no meaning beside use_dora"),
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            f"missing {PREFIX}model.embed_tokens.lora_embedding_A",
        ),
        ({"modules_to_save": ["embed_tokens"]}, f"missing {PREFIX}model.embed_tokens.weight"),
        ({"modules_to_save": ["norm"]}, f"missing {PREFIX}model.norm.weight"),
        (
            {"trainable_token_indices": [3]},
            f"missing {PREFIX}model.embed_tokens.token_adapter.trainable",
        ),
        (
            {"trainable_token_indices": {"lm_head": [3]}, "modules_to_save": ["lm_head"]},
            "trainable_token_indices: lm_head is adapted as a whole, too",
        ),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        (
            {**ACTIVATED, "use_dora": True},
            "alora_invocation_tokens cannot be combined with use_dora: PEFT refuses both",
        ),
        ({**ACTIVATED, "init_lora_weights": "mica"}, "init_lora_weights mica: PEFT refuses both"),
        ({**ACTIVATED, "target_parameters": ["mlp.experts.down_proj"]}, "target_parameters: PEFT refuses both"),
        ({**ACTIVATED, "modules_to_save": ["lm_head"]}, "modules_to_save, which would act before the invocation"),
        ({**ACTIVATED, "bias": "all"}, "bias, which would act before the invocation"),
        ({**ACTIVATED, "target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({**ACTIVATED, "trainable_token_indices": [3]}, "trainable_token_indices"),
        ({**ACTIVATED, "layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"init_lora_weights": "olora"}, "merge_and_unload() in PEFT"),
        ({"init_lora_weights": "loftq"}, "PEFT has no conversion: serve the base that training saved"),
        ({"use_dora": True, "use_bdlora": {"nblocks": 2}}, "PEFT refuses these together"),
        ({"kasa_config": {"beta": 0.1}}, "KaSA takes a part of the base's matrices away: merge_and_unload()"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "copy.deepcopy() of each of PEFT's layers"),
        ({"peft_version": "0.22.0", "foo_config": {"a": 1}}, "foo_config: not known here, and may change"),
        ({"peft_type": "OFT"}, "merge_and_unload() in PEFT makes a model of base and adapter"),
        ({"peft_type": "RANDLORA"}, "convert it to LoRA with PEFT's save_as_lora"),
        ({"peft_type": "PREFIX_TUNING"}, "it changes more than weights"),
        ({"peft_type": "MISS", "init_weights": "bat"}, "its product depends on the base's matrix"),
        ({"peft_type": "LOHA", "alpha": 4}, "missing base_model.model.model.layers.0.self_attn.q_proj.hada_w1_a"),
        ({"peft_type": "VERA"}, "missing base_model.model.base_model.vera_A"),
        ({"peft_type": "LOKR", "alpha": "4"}, "alpha: "),
        ({"peft_type": "IA3"}, "feedforward_modules: Field required"),
    ],
)
def test_a_kind_without_its_tensors_is_named(directory: Path, fields: dict[str, object], reason: str) -> None:
    edit_config(directory, **fields)
    assert reason in refusal(directory)


def test_fields_without_effect_are_accepted(directory: Path) -> None:
    edit_config(
        directory, invented_by_a_later_peft=None, another={}, use_dora=False, modules_to_save=[], loftq_config={}
    )
    read_adapter(read(directory), layouts(), BASE, torch.float32)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"r": 4' + b"[" * 100_000])
def test_a_config_that_is_not_a_json_object_is_refused(directory: Path, data: bytes) -> None:
    (directory / CONFIG).write_bytes(data)
    assert CONFIG in refusal(directory)


def test_a_config_without_a_lora_rank_has_pefts_default(directory: Path) -> None:
    fields = json.loads((directory / CONFIG).read_text())
    del fields["r"]
    (directory / CONFIG).write_text(json.dumps(fields))
    assert "needs lora_rank 8: adapter_config.json says so" in refusal(directory)


def test_another_kind_of_adapter_is_named(directory: Path) -> None:
    (directory / CONFIG).write_text(json.dumps({"peft_type": "ALORA", "r": 8, "alora_invocation_tokens": [1]}))
    assert "peft_type 'ALORA' is not served" in refusal(directory)


def test_a_regular_expression_with_catastrophic_backtracking_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "_TIME_LIMIT_S", 0.5)
    edit_config(directory, target_modules=r"((([a-z.0-9_]+)+)+)+!")
    assert "target_modules takes more than" in refusal(directory)


def remove(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def add(name: str, tensor: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize("name", [f"{PREFIX}{O_PROJ}.lora_A.weight", f"{PREFIX}{O_PROJ}.lora_B.weight"])
def test_a_missing_tensor_is_named(directory: Path, name: str) -> None:
    edit_tensors(directory, remove(name))
    message = refusal(directory)
    assert name in message
    assert "missing" in message


@pytest.mark.parametrize(
    "name",
    [
        f"{PREFIX}{O_PROJ}.lora_magnitude_vector",
        f"{PREFIX}{O_PROJ}.lora_B.bias",
        f"{PREFIX}{O_PROJ}.base_layer.weight",
        f"{PREFIX}model.layers.1.mlp.up_proj.lora_A.weight",
        f"{PREFIX}model.layers.3.self_attn.o_proj.lora_A.weight",
        f"{PREFIX}model.embed_tokens.lora_embedding_A",
        f"{PREFIX}model.embed_tokens.weight",
        f"{PREFIX}lm_head.weight",
        f"{PREFIX}lm_head.base_layer.weight",
        "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight",
        "surprise",
    ],
)
def test_an_extra_tensor_is_named(directory: Path, name: str) -> None:
    edit_tensors(directory, add(name, torch.zeros(4, 24)))
    assert name in refusal(directory)


@pytest.mark.parametrize(
    ("part", "shape", "reason"),
    [
        ("lora_A", (4, 32), "in_features 24: the adapter was made for another base"),
        ("lora_B", (32, 4), "out_features 24: the adapter was made for another base"),
        ("lora_A", (8, 24), "lora_rank 4: adapter_config.json says so"),
        ("lora_B", (24, 8), "lora_rank 4: adapter_config.json says so"),
        ("lora_A", (96,), "not a matrix"),
        ("lora_A", (0, 24), "lora_rank 4"),
        ("lora_B", (24, 4, 1), "not a matrix"),
    ],
)
def test_a_wrong_shape_is_named_with_its_dimension(
    directory: Path, part: str, shape: tuple[int, ...], reason: str
) -> None:
    name = f"{PREFIX}{O_PROJ}.{part}.weight"
    edit_tensors(directory, add(name, torch.zeros(shape)))
    message = refusal(directory)
    assert name in message
    assert reason in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_a_tensor_with_infinite_or_nan_values_is_named(directory: Path, part: str, value: float) -> None:
    name = f"{PREFIX}{O_PROJ}.{part}.weight"

    def poison(tensors: Tensors) -> None:
        tensors[name][-1, -1] = value

    edit_tensors(directory, poison)
    assert name in refusal(directory)


def test_a_value_that_the_models_dtype_cannot_hold_is_refused(directory: Path) -> None:
    name = f"{PREFIX}{O_PROJ}.lora_B.weight"
    edit_tensors(directory, add(name, torch.full((24, 4), 60_000.0)))
    assert name in refusal(directory, torch.float16)


def test_a_tensor_of_integers_is_named(directory: Path) -> None:
    name = f"{PREFIX}{O_PROJ}.lora_A.weight"
    edit_tensors(directory, add(name, torch.zeros(4, 24, dtype=torch.int8)))
    assert f"{name} has dtype I8" in refusal(directory)


@pytest.mark.parametrize("kept", [0, 5, 8, 100, -1, -5000])
def test_a_truncated_adapter_file_is_refused(directory: Path, kept: int) -> None:
    data = (directory / TENSORS).read_bytes()
    (directory / TENSORS).write_bytes(data[:kept])
    assert f"{TENSORS} is cut short" in refusal(directory)


def test_a_git_lfs_pointer_of_an_adapter_is_recognized(directory: Path) -> None:
    (directory / TENSORS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n")
    assert "Git LFS pointer: run `git lfs pull`" in refusal(directory)


def header(**entries: object) -> bytes:
    data = json.dumps(entries).encode()
    return len(data).to_bytes(8, "little") + data


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 64,
        (2**62).to_bytes(8, "little"),
        (4).to_bytes(8, "little") + b"{{{{",
        header(a=1) + bytes(8),
        header(a={"dtype": "F32", "shape": [2], "data_offsets": [0]}) + bytes(8),
        header(a={"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}) + bytes(12),
        header(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}) + bytes(8),
        header(a={"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}) + bytes(8),
        header(a={"dtype": "F32", "shape": [2**40] * 9, "data_offsets": [0, 8]}) + bytes(8),
        header(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}) + bytes(9),
        header(a={"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}) + bytes(8),
        pickle.dumps({"a": 1}) * 20,
    ],
)
def test_a_file_that_is_not_well_formed_safetensors_is_refused(directory: Path, data: bytes) -> None:
    (directory / TENSORS).write_bytes(data)
    assert TENSORS in refusal(directory)


def locate(directory: Path) -> None:
    LocalSource(directory.parent).locate(directory.name, "", "").read()


def test_a_pickle_file_is_refused(directory: Path) -> None:
    (directory / TENSORS).rename(directory / PICKLE)
    with pytest.raises(AdapterInvalidError, match=rf"{PICKLE} is a pickle file.*safetensors"):
        locate(directory)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_missing_file_is_named(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(AdapterInvalidError, match=f"{name} is missing"):
        locate(directory)


def test_a_file_over_its_size_limit_is_refused_unread(directory: Path) -> None:
    with (directory / TENSORS).open("r+b") as file:
        file.truncate(4 * 2**30 + 1)  # a sparse file
    with pytest.raises(AdapterInvalidError, match=f"{TENSORS} has 4294967297 bytes; the limit is 4294967296"):
        locate(directory)


def test_a_config_of_more_than_a_mebibyte_is_refused(directory: Path) -> None:
    with (directory / CONFIG).open("ab") as file:
        file.write(b" " * 2**20)
    with pytest.raises(AdapterInvalidError, match=f"{CONFIG} has .* the limit is 1048576"):
        locate(directory)
