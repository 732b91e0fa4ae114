"""Classification models have transformers' logits, with our decoder and with transformers' modeling code."""

import json
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from loraplex_shard.checkpoint import open_checkpoint
from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.checkpoint.classifier import read_activation
from loraplex_shard.device.parallel import Group
from loraplex_shard.models.transformers.model import TransformersModel
from loraplex_shard.shapes.classifier import Activation
from tests.shard.classifying import classify, expected, open_runner, save_classifier
from tests.shard.families import SIZES
from tests.shard.planner import random_tokens
from tests.shard.thread_ranks import run_on_ranks
from tests.shard.tiny_classes import tiny_config

LABELS = {"id2label": {0: "no", 1: "yes", 2: "perhaps"}, "label2id": {"no": 0, "yes": 1, "perhaps": 2}}
GPT2_SIZES = {"vocab_size": 96, "n_embd": 48, "n_head": 6, "n_layer": 2, "n_positions": 64, "bos_token_id": None}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, **LABELS),
    "llama, tied": LlamaConfig(**SIZES, **LABELS, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, **LABELS, sliding_window=9),
    "qwen2": Qwen2Config(**SIZES, **LABELS),
    "qwen3": Qwen3Config(**SIZES, **LABELS, head_dim=10),
    "qwen3 moe": Qwen3MoeConfig(**SIZES, **LABELS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
    "gemma2": Gemma2Config(**SIZES, **LABELS, head_dim=10, sliding_window=9),
    "phi3": Phi3Config(**SIZES, **LABELS),
    # with transformers' modeling code, under their own names
    "gpt2": GPT2Config(**GPT2_SIZES, **LABELS, eos_token_id=None),
    "gpt neox": GPTNeoXConfig(**SIZES, **LABELS),
}
OF_SEQUENCES_ALONE = {
    "gemma3": Gemma3TextConfig(**SIZES, **LABELS, head_dim=10, sliding_window=9),
    "opt": OPTConfig(**SIZES | {"pad_token_id": 1}, **LABELS, ffn_dim=72, word_embed_proj_dim=48, dropout=0.0),
    "jamba": tiny_config("jamba"),  # some of its layers keep states
}
CASES = [(name, config, of_tokens) for name, config in CONFIGS.items() for of_tokens in (False, True)]
CASES += [(name, config, False) for name, config in OF_SEQUENCES_ALONE.items()]
PROMPTS = [random_tokens(40, 1), random_tokens(3, 2), random_tokens(17, 3)]


@pytest.mark.parametrize(
    ("config", "of_tokens"),
    [(config, of_tokens) for _, config, of_tokens in CASES],
    ids=[f"{name}, {'tokens' if of_tokens else 'sequences'}" for name, _, of_tokens in CASES],
)
def test_logits_equal_transformers_however_the_texts_are_divided(
    config: PreTrainedConfig, of_tokens: bool, tmp_path: Path
) -> None:
    model = save_classifier(config, tmp_path, of_tokens)
    runner, _ = open_runner(tmp_path)
    for ours, theirs in zip(classify(runner, PROMPTS), expected(model, PROMPTS), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("name", "of_tokens"), [("llama", False), ("llama", True), ("gpt neox", False)])
def test_two_ranks_classify_as_one(name: str, of_tokens: bool, tmp_path: Path) -> None:
    model, one_at_a_time = save_classifier(CONFIGS[name], tmp_path, of_tokens), Lock()

    def run(group: Group) -> list[torch.Tensor]:
        with one_at_a_time:  # libraries patch torch while a model is made
            runner, _ = open_runner(tmp_path, group=group)
        return classify(runner, PROMPTS)

    with patch.object(TransformersModel, "check_positions"):  # while ranks wait for each other
        first, _ = run_on_ranks(2, run)
    for ours, theirs in zip(first, expected(model, PROMPTS), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "ending", [[7], [7, 7, 7], [5, 7], [7, 5]], ids=["one", "more than one", "behind another", "before another"]
)
def test_a_sequence_is_classified_at_its_last_token_that_is_not_padding(ending: list[int], tmp_path: Path) -> None:
    model = save_classifier(LlamaConfig(**SIZES | {"pad_token_id": 7}, **LABELS), tmp_path)
    runner, _ = open_runner(tmp_path)
    prompts = [[*random_tokens(5, 1), *ending], [*random_tokens(13, 2), *ending], [7] * 9, ending * 5]
    for ours, theirs in zip(classify(runner, prompts), expected(model, prompts), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_the_classifier_of_a_quantized_model_is_not_quantized(quantize: str, tmp_path: Path) -> None:
    save_classifier(CONFIGS["llama"], tmp_path)
    runner, _ = open_runner(tmp_path, quantize=quantize)
    before = classify(runner, PROMPTS)
    tensors = load_file(tmp_path / "model.safetensors")
    changed = tensors["score.weight"] * (1 + 1e-4)  # less than any rounding
    save_file({**tensors, "score.weight": changed}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    after = classify(open_runner(tmp_path, quantize=quantize)[0], PROMPTS)
    for ours, theirs in zip(after, before, strict=True):
        torch.testing.assert_close(ours, theirs * (1 + 1e-4), atol=1e-6, rtol=2e-5)
        assert not torch.equal(ours, theirs)


def test_labels_and_the_padding_token_come_from_the_checkpoint(tmp_path: Path) -> None:
    save_classifier(LlamaConfig(**SIZES | {"pad_token_id": 3}, **LABELS), tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    classifier = checkpoint.classifier()
    assert checkpoint.architecture == "LlamaForCausalLM" and classifier is not None
    assert classifier.classes.labels == ("no", "yes", "perhaps") and classifier.classes.pad_token_id == 3
    assert classifier.classes.activation is Activation.SOFTMAX and not classifier.classes.of_tokens


@pytest.mark.parametrize(
    ("config", "labels", "activation"),
    [
        ({}, 3, Activation.SOFTMAX),
        ({}, 1, Activation.SIGMOID),
        ({"problem_type": "single_label_classification"}, 3, Activation.SOFTMAX),
        ({"problem_type": "multi_label_classification"}, 3, Activation.SIGMOID),
        ({"problem_type": "regression"}, 1, Activation.NONE),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, 1, Activation.NONE),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}, 1, Activation.SIGMOID),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, 1, Activation.NONE),
    ],
)
def test_scores_are_computed_from_logits_as_in_vllm(
    config: dict[str, object], labels: int, activation: Activation
) -> None:
    assert read_activation(config, labels) is activation


def drop(tensors: dict[str, torch.Tensor], config: dict[str, object]) -> None:
    del tensors["score.weight"]


def cut(tensors: dict[str, torch.Tensor], config: dict[str, object]) -> None:
    tensors["score.weight"] = tensors["score.weight"][:2].clone()


def add(tensors: dict[str, torch.Tensor], config: dict[str, object]) -> None:
    tensors["score.dense.weight"] = torch.zeros(2, 2)


def spoil(tensors: dict[str, torch.Tensor], config: dict[str, object]) -> None:
    tensors["score.weight"][0, 0] = torch.nan


def shift(tensors: dict[str, torch.Tensor], config: dict[str, object]) -> None:
    tensors["score.bias"] = torch.ones(3)


def unshift(tensors: dict[str, torch.Tensor], config: dict[str, object]) -> None:
    config["architectures"] = ["LlamaForTokenClassification"]


def tanh(tensors: dict[str, torch.Tensor], config: dict[str, object]) -> None:
    config["sbert_ce_default_activation_function"] = "torch.nn.modules.activation.Tanh"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop, "missing tensor score.weight, the classifier of LlamaForSequenceClassification"),
        (cut, r"tensor score.weight has shape \[2, 48\], but the configuration .* asks for \[3, 48\]"),
        (add, "LlamaForCausalLM has no tensor score.dense.weight"),
        (spoil, "score.weight"),
        (shift, "LlamaForSequenceClassification has no tensor score.bias"),
        (unshift, "missing tensor score.bias"),
        (tanh, "the activation function torch.nn.modules.activation.Tanh is not served"),
    ],
)
def test_a_classifier_that_does_not_fit_is_refused_by_name(
    change: Callable[[dict[str, torch.Tensor], dict[str, object]], None], reason: str, tmp_path: Path
) -> None:
    save_classifier(CONFIGS["llama"], tmp_path)
    tensors, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=reason):
        open_runner(tmp_path)


def test_an_lm_head_beside_the_classifier_is_ignored_as_transformers_ignores_it(tmp_path: Path) -> None:
    model = save_classifier(CONFIGS["llama"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors") | {"lm_head.weight": torch.ones(96, 48)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for ours, theirs in zip(classify(open_runner(tmp_path)[0], PROMPTS), expected(model, PROMPTS), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_an_encoder_that_classifies_is_refused_by_name(tmp_path: Path) -> None:
    config = AutoConfig.for_model("bert", **SIZES, type_vocab_size=2)
    save_classifier(config, tmp_path)
    with pytest.raises(CheckpointError, match="BertLMHeadModel is not served"):
        open_runner(tmp_path)


def save_reranker(directory: Path, tied: bool, **fields: object) -> PreTrainedModel:
    """A language model that answers with tokens, whose configuration has what makes a classifier of it in vLLM."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied, initializer_range=0.3)).eval()
    model.save_pretrained(directory)
    words = models.WordLevel({f"w{token}": token for token in range(96)}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "classifier_from_token": ["w5", "w9"], **fields}
    (directory / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fields", [{"method": "from_2_way_softmax"}, {"is_original_qwen3_reranker": True}])
def test_a_language_model_that_answers_no_or_yes_is_a_classifier_of_its_answers(
    fields: dict[str, object], tied: bool, tmp_path: Path
) -> None:
    model = save_reranker(tmp_path, tied, **fields)
    runner, _ = open_runner(tmp_path)
    for prompt, ours in zip(PROMPTS, classify(runner, PROMPTS), strict=True):
        answers = model(input_ids=torch.tensor([prompt])).logits[0, -1, [5, 9]]
        torch.testing.assert_close(ours.sigmoid(), answers.softmax(-1)[1:].detach(), atol=1e-5, rtol=1e-3)
    classifier = open_checkpoint(str(tmp_path)).classifier()
    assert classifier is not None and classifier.classes.joins_pairs and classifier.classes.labels == ("w9",)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"method": "from_2_way_softmax", "classifier_from_token": ["w5", "yes"]}, "the tokenizer has no token 'yes'"),
        ({"method": "from_2_way_softmax", "classifier_from_token": ["w5"]}, "takes two tokens, not 1"),
        ({"method": "another"}, "method 'another' is not served, only from_2_way_softmax and no_post_processing"),
        ({"method": "from_2_way_softmax", "classifier_from_token": "w5"}, "is not a list of tokens"),
    ],
)
def test_answers_that_make_no_classifier_are_refused_by_name(
    fields: dict[str, object], reason: str, tmp_path: Path
) -> None:
    save_reranker(tmp_path, False, **fields)
    with pytest.raises(CheckpointError, match=reason):
        open_runner(tmp_path)


def test_answers_may_be_labels_as_they_are(tmp_path: Path) -> None:
    model = save_reranker(tmp_path, False, method="no_post_processing", classifier_from_token=["w5", "w9", "w2"])
    (ours,) = classify(open_runner(tmp_path)[0], PROMPTS[:1])
    theirs = model(input_ids=torch.tensor(PROMPTS[:1])).logits[0, -1, [5, 9, 2]].detach()
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
