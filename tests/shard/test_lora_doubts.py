"""Published adapters are served as PEFT loads them, with warnings about doubtful parts."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS

from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.base_names import differs
from loraplex_shard.lora.peft.config import DEFAULT_TARGETS, TO_MODEL, UNSUPPORTED_FIELDS
from loraplex_shard.lora.peft.kinds import KINDS, TO_LORA, way_out
from loraplex_shard.lora.peft.reading import read_adapter
from tests.shard.lora_models import BASE, edit_config, layouts, loaded_by_peft, read, save_adapter, whole_deltas

COMMIT, OTHER_COMMIT = "49e3418fbbbca6ecbdf9608b4d22e5a407081db4", "0" * 40
REGEX = (
    r"(?:.*?(?:language|text).*?(?:mlp|feed_forward|ffn|dense).*?(?:gate_proj|up_proj|down_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp|feed_forward|ffn|dense)\.(?:(?:gate_proj|up_proj|down_proj)))"
)
PATHS = [f"model.layers.2.{name}" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")]

# Options of the training, changes to the configuration, and warnings.
PUBLISHED: dict[str, tuple[dict[str, object], dict[str, object], list[str]]] = {
    "the most common kind": ({}, {"base_model_name_or_path": "org/base-7b", "peft_version": "0.18.1"}, []),
    "targets twice": ({}, {"target_modules": ["q_proj", "v_proj", "k_proj", "o_proj", "q_proj", "v_proj"]}, []),
    "a target that is not in the model": (
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj", "v_proj", "query_key_value"], "enable_lora": None, "merge_weights": False},
        ["target_modules: this model has no query_key_value"],
    ),
    "full paths": ({"target_modules": PATHS}, {}, []),
    "a regex over one kind of module": ({"target_modules": REGEX}, {}, []),
    "lm_head": ({"target_modules": ["q_proj", "lm_head"]}, {}, []),
    "no targets": ({"target_modules": ["q_proj", "v_proj"]}, {"target_modules": None}, []),
    "unsloth's auto_mapping": (
        {},
        {
            "auto_mapping": {
                "base_model_class": "LlamaForCausalLM",
                "parent_library": "transformers.models.llama.modeling_llama",
                "unsloth_fixed": True,
            },
            "base_model_name_or_path": "unsloth/base-7b-unsloth-bnb-4bit",
        },
        [],
    ),
    "another class": (
        {},
        {"auto_mapping": {"base_model_class": "MistralForCausalLM", "parent_library": "x"}, "task_type": None},
        ["it was made for a MistralForCausalLM (auto_mapping), but this is a LlamaForCausalLM"],
    ),
    "another base": (
        {},
        {"base_model_name_or_path": "org/other-model"},
        ["it was made for the base model 'org/other-model', but this is 'org/base-7b'"],
    ),
    "a commit of the base": ({}, {"base_model_name_or_path": "org/base-7b", "revision": COMMIT}, []),
    "another commit of the base": (
        {},
        {"base_model_name_or_path": "org/base-7b", "revision": OTHER_COMMIT},
        [f"it was made for revision {OTHER_COMMIT} of the base model, but this is {COMMIT}"],
    ),
    "an embedding model's": (
        {},
        {"task_type": "FEATURE_EXTRACTION", "auto_mapping": {"base_model_class": "LlamaModel", "parent_library": "x"}},
        [],
    ),
    "a wrong task_type": (
        {},
        {"task_type": "SEQ_2_SEQ_LM"},
        ["task_type is 'SEQ_2_SEQ_LM', but this model is a causal decoder: ignored"],
    ),
    "a classifier's task_type without its head": (
        {},
        {"task_type": "TOKEN_CLS"},
        ["task_type is 'TOKEN_CLS', but neither the file nor this model has a classifier: ignored"],
    ),
    "biases that the model does not have": ({}, {"bias": "all"}, []),
    "VeLoRA, which only affects training": ({}, {"velora_config": {"num_groups": 4}}, []),
    "tied weights that it does not adapt": ({}, {"ensure_weight_tying": True}, []),
    "a field of a later PEFT": (
        {},
        {"invented_by_a_later_peft": {"a": 1}, "another": None},
        ["adapter_config.json: invented_by_a_later_peft: ignored, as PEFT ignores what it does not know"],
    ),
    "MiCA": ({}, {"init_lora_weights": "mica"}, []),
    "an initialization that subtracts, next to what it was not": (
        {},
        {"eva_config": {"rho": 2.0}, "corda_config": {"corda_method": "kpm"}, "loftq_config": {"loftq_bits": 4}},
        [],
    ),
    "nulls": ({}, {"use_rslora": None, "use_dora": None, "qalora_group_size": None}, []),
    "no lora_alpha": ({"lora_alpha": 8}, {"lora_alpha": ...}, []),
    "what each adapter of a later PEFT has": (
        {},
        {"peft_version": "0.29.0", "some_group_size": 16, "some_core": "x", "other": False, "use_other": False},
        ["adapter_config.json: some_core, some_group_size: ignored, as PEFT ignores what it does not know"],
    ),
    "Gaussian, in capitals": ({}, {"init_lora_weights": "Gaussian"}, []),
    "fan_in_fan_out": ({}, {"fan_in_fan_out": True}, []),
    "alpha below the rank": ({"r": 16, "lora_alpha": 2}, {}, []),
    "modules_to_save of nothing": ({}, {"modules_to_save": []}, []),
    "in training": ({}, {"inference_mode": False, "lora_dropout": 0.1, "qalora_group_size": 16}, []),
}


@pytest.mark.parametrize(("trained", "saved", "warnings"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_a_published_adapter_is_served_as_peft_loads_it(
    trained: dict[str, object], saved: dict[str, object], warnings: list[str], tmp_path: Path
) -> None:
    save_adapter(tmp_path, **trained)
    edit_config(tmp_path, **{"base_model_name_or_path": None, **saved})
    base = dataclasses.replace(BASE, revision=COMMIT)
    adapter = read_adapter(read(tmp_path), layouts(), base, torch.float32)
    actual, expected = whole_deltas([adapter.weights]), loaded_by_peft(tmp_path)
    assert actual.keys() == expected.keys()
    for module, delta in expected.items():
        torch.testing.assert_close(actual[module], delta)
    assert list(adapter.warnings) == warnings


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_peft_is_handled(kind: str) -> None:
    ours = KINDS[kind]
    read = {each.validation_alias or name for name, each in ours.model_fields.items()}
    theirs = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])}
    assert theirs <= read | ours.NEUTRAL | UNSUPPORTED_FIELDS


@pytest.mark.parametrize("kind", sorted(PEFT_TYPE_TO_TUNER_MAPPING.keys() - KINDS.keys()))
def test_the_way_out_that_a_refusal_names_is_one_of_pefts(kind: str) -> None:
    layer = getattr(PEFT_TYPE_TO_TUNER_MAPPING[kind], "tuner_layer_cls", None)
    sources = "".join(map(inspect.getsource, {layer, *layer.__subclasses__()})) if layer else ""
    merges = "def merge" in sources and "NotImplementedError" not in sources.partition("def merge")[2][:1000]
    converts = re.search(r"def supports_lora_conversion.*\n( *#.*\n)* *return (True|not isinstance)", sources)
    assert way_out(kind) == (TO_LORA if converts else TO_MODEL if merges else way_out("PREFIX_TUNING"))


def test_the_default_targets_are_pefts() -> None:
    for model_type in ("llama", "mistral", "qwen2", "qwen3"):
        assert sorted(PEFT_TARGETS[model_type]) == sorted(DEFAULT_TARGETS)


@pytest.mark.parametrize(
    ("name", "served"),
    [
        ("unsloth/llama-3-8b-Instruct-bnb-4bit", "meta-llama/Meta-Llama-3-8B-Instruct"),
        ("unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit", "meta-llama/Llama-3.2-1B-Instruct"),
        ("NousResearch/Llama-2-7b-chat-hf", "TheBloke/Llama-2-7B-Chat-GPTQ"),
        ("org/Mistral-7B-v0.1-sharded", "mistralai/Mistral-7B-v0.1"),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4"),
        ("meta-llama/Llama-3.1-8B-Instruct", "org/Meta-Llama-3.1-8B-Instruct-quantized.w4a16"),
        ("Qwen/Qwen3-8B", "/models/qwen3_8b-Q4_K_M.gguf"),
        ("Qwen/Qwen3-8B", "/models/Qwen3-8B/"),
        ("/root/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/abc", "Qwen/Qwen3-8B"),
        ("/home/somebody/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("/home/somebody/my-model", "Qwen/Qwen3-8B"),
        ("./outputs/checkpoint-500", "Qwen/Qwen3-8B"),
        ("output/merged", "Qwen/Qwen3-8B"),
        ("", "Qwen/Qwen3-8B"),
    ],
)
def test_copies_of_a_model_count_as_the_model_and_folders_as_unknown(name: str, served: str) -> None:
    assert not differs(name, (served,))


@pytest.mark.parametrize(
    ("name", "served"),
    [
        ("meta-llama/Llama-2-7b-hf", "mistralai/Mistral-7B-v0.1"),
        ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B"),
        ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-Instruct-v0.1"),
        ("unsloth/gemma-2-9b-bnb-4bit", "google/gemma-2-9b-it"),
        ("/data/models/Llama-2-7b-hf", "mistralai/Mistral-7B-v0.1"),
        ("org/tuned", "/models/base"),
    ],
)
def test_other_models_are_recognized(name: str, served: str) -> None:
    assert differs(name, (served,))


def test_any_of_the_bases_names_is_accepted() -> None:
    assert not differs("org/base-7b", ("/models/production", "org/base-7b"))
    assert not differs("org/base-7b", BaseModel("LlamaForCausalLM").ids)
