"""Adapters that classify have PEFT's logits, beside each other, generation and embeddings, on bases with and without a
classifier."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from threading import Lock

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from loraplex_protos.errors import AdapterInvalidError, InvalidRequestError
from loraplex_shard.device.parallel import Group
from loraplex_shard.lora.merge import Recipe
from loraplex_shard.shapes.classifier import Activation, Classes
from tests.shard.classifying import classify, expected, open_runner, save_classifier
from tests.shard.families import SIZES
from tests.shard.lora_models import edit_config, edit_tensors
from tests.shard.planner import Planner, greedy, random_tokens
from tests.shard.thread_ranks import run_on_ranks

SMALL = SIZES | {"pad_token_id": 7, "initializer_range": 0.3}
PROMPTS = [random_tokens(30, 1), random_tokens(3, 2), [*random_tokens(12, 3), 7]]
PREFIX = "base_model.model."


def save_base(directory: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(directory)
    return directory


def save_adapter(base: Path, directory: Path, labels: int, task_type: str = "SEQ_CLS", **options: object) -> PeftModel:
    """Saves an adapter with random weights and a random classifier. Returns the model with the adapter on it."""
    auto = AutoModelForTokenClassification if task_type == "TOKEN_CLS" else AutoModelForSequenceClassification
    model = auto.from_pretrained(base, num_labels=labels, dtype=torch.float32, ignore_mismatched_sizes=True)
    torch.manual_seed(labels)
    config = LoraConfig(r=3, target_modules="all-linear", task_type=task_type, init_lora_weights=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, config).eval()
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(directory)
    return adapted


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def adapted(base: Path, folder: Path) -> dict[str, PeftModel]:
    return {
        "two": save_adapter(base, folder / "two", 2),
        "five": save_adapter(base, folder / "five", 5, modules_to_save=["score"]),
        "one": save_adapter(base, folder / "one", 1),
        "whole": save_adapter(base, folder / "whole", 4, modules_to_save=["score", "embed_tokens", "norm"]),
        "tokens": save_adapter(base, folder / "tokens", 3, "TOKEN_CLS", exclude_modules=["score"]),
    }


def stage(store: object, *names: str) -> None:
    """Loads the adapters into slots 1, 2, ..."""
    for slot, name in enumerate(names, start=1):
        store.load(store.stage(name, "local", "", "").digest, slot)


@pytest.mark.parametrize("size", [1, 2])
def test_classifiers_of_several_adapters_in_one_batch_equal_pefts(
    size: int, base: Path, folder: Path, adapted: dict[str, PeftModel]
) -> None:
    names, one_at_a_time = list(adapted), Lock()
    prompts = [prompt for _ in names for prompt in PROMPTS]
    slots = [slot for slot, _ in enumerate(names, start=1) for _ in PROMPTS]

    def run(group: Group) -> list[torch.Tensor]:
        with one_at_a_time:  # libraries patch torch while a model is made
            runner, store = open_runner(base, folder, group)
        stage(store, *names)
        return classify(runner, prompts, slots)

    found = run_on_ranks(size, run)[0]
    theirs = [logits for name in names for logits in expected(adapted[name], PROMPTS)]
    for ours, wanted in zip(found, theirs, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-3)


def test_texts_are_classified_beside_generation_and_embeddings(
    base: Path, folder: Path, adapted: dict[str, PeftModel]
) -> None:
    runner, store = open_runner(base, folder)
    stage(store, "two", "tokens")
    planner, prompt = Planner(), PROMPTS[0]
    planner.start(0, prompt, slot=1, pool=True, classify=True)
    planner.start(1, prompt)
    planner.start(2, prompt, slot=1, pool=True)
    planner.start(3, prompt, slot=2, pool=True, classify=True)
    plan = planner.plan(dict.fromkeys(range(4), len(prompt)))
    for place, row in enumerate(plan.rows):
        plan.samples[place] = row == 1
    response = runner.step(plan)
    planner.read(plan, response)
    assert planner.rows[1].outputs == greedy(LlamaForCausalLM.from_pretrained(base).eval(), prompt, 1)
    vectors = torch.tensor(response.pooled).split(list(response.pooled_lengths))
    found = {plan.rows[place]: vector for place, vector in zip(response.pooled_chunks, vectors, strict=True)}
    torch.testing.assert_close(found[0], expected(adapted["two"], [prompt])[0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found[3], expected(adapted["tokens"], [prompt])[0], atol=1e-4, rtol=1e-3)
    assert len(found[2]) == SMALL["hidden_size"]


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_the_classifier_on_a_quantized_base_is_not_quantized(
    quantize: str, base: Path, folder: Path, adapted: dict[str, PeftModel]
) -> None:
    runner, store = open_runner(base, folder, quantize=quantize)
    stage(store, "two", "tokens")
    (of_sequence, of_tokens) = classify(runner, [PROMPTS[0]] * 2, [1, 2])
    score = adapted["tokens"].base_model.model.score
    # The same hidden states, from a token classifier that does not change them.
    shutil.copytree(folder / "tokens", folder / quantize)
    hidden = SMALL["hidden_size"]
    weight, bias = torch.eye(hidden), torch.zeros(hidden)
    edit_tensors(folder / quantize, lambda t: t.update({f"{PREFIX}score.weight": weight, f"{PREFIX}score.bias": bias}))
    stage_again, store_again = open_runner(base, folder, quantize=quantize)
    stage(store_again, quantize)
    states = classify(stage_again, [PROMPTS[0]], [1])[0].view(-1, hidden)
    torch.testing.assert_close(of_tokens.view(-1, 3), score(states).detach(), atol=1e-5, rtol=1e-4)
    assert len(of_sequence) == 2


@pytest.mark.parametrize("of_tokens", [False, True])
def test_adapters_without_a_classifier_use_the_bases(of_tokens: bool, tmp_path: Path) -> None:
    labels = {"id2label": {0: "a", 1: "b", 2: "c"}}
    save_classifier(LlamaConfig(**SMALL, **labels), tmp_path / "base", of_tokens)
    task_type = "TOKEN_CLS" if of_tokens else "SEQ_CLS"
    own = save_adapter(tmp_path / "base", tmp_path / "adapters/own", 4, task_type, exclude_modules=["score"])
    auto = AutoModelForTokenClassification if of_tokens else AutoModelForSequenceClassification
    model = auto.from_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="FEATURE_EXTRACTION", init_lora_weights=False)
    plain = get_peft_model(model, config).eval()
    plain.save_pretrained(tmp_path / "adapters/plain")
    runner, store = open_runner(tmp_path / "base", tmp_path / "adapters")
    stage(store, "own", "plain")
    assert store.stage("own", "local", "", "").classes.labels == tuple(f"LABEL_{number}" for number in range(4))
    assert store.stage("plain", "local", "", "").classes is None
    base = auto.from_pretrained(tmp_path / "base").eval()
    found = classify(runner, [PROMPTS[0]] * 3, [1, 2, 0])
    for ours, oracle in zip(found, (own, plain, base), strict=True):
        torch.testing.assert_close(ours, expected(oracle, [PROMPTS[0]])[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("of_tokens", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_lora_on_the_models_classifier_equals_pefts(of_tokens: bool, size: int, tmp_path: Path) -> None:
    names = {"id2label": {number: f"label {number}" for number in range(5)}}
    save_classifier(LlamaConfig(**SMALL, **names), tmp_path / "base", of_tokens)
    auto = AutoModelForTokenClassification if of_tokens else AutoModelForSequenceClassification
    kinds: dict[str, dict[str, object]] = {
        "plain": {"target_modules": ["q_proj", "score"], "rank_pattern": {"score": 2}, "alpha_pattern": {"score": 5}},
        "alone": {"target_modules": ["score"], "task_type": "FEATURE_EXTRACTION"},
        "dora": {"target_modules": "all-linear", "use_dora": True},
        "bias": {"target_modules": ["v_proj", "score"], "lora_bias": True, "use_rslora": True},
    }
    models = {}
    for seed, (name, options) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        model = auto.from_pretrained(tmp_path / "base")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of lora_bias
            models[name] = get_peft_model(model, LoraConfig(r=3, init_lora_weights=False, **options)).eval()
            for of, parameter in models[name].named_parameters():
                if "magnitude" in of or of.endswith("lora_B.default.bias"):
                    torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
            models[name].save_pretrained(tmp_path / "adapters" / name)
    task_type = "TOKEN_CLS" if of_tokens else "SEQ_CLS"
    models["whole"] = save_adapter(
        tmp_path / "base", tmp_path / "adapters/whole", 4, task_type, exclude_modules=["score"]
    )
    one_at_a_time = Lock()

    def run(group: Group) -> tuple[list[torch.Tensor], list[object]]:
        with one_at_a_time:
            runner, store = open_runner(tmp_path / "base", tmp_path / "adapters", group)
        stage(store, *models)
        staged = [store.stage(name, "local", "", "") for name in kinds]
        slots = range(len(models) + 1)
        return classify(runner, [PROMPTS[0] for _ in slots], list(slots)), staged

    found, staged = run_on_ranks(size, run)[0]
    base = auto.from_pretrained(tmp_path / "base").eval()
    for ours, oracle in zip(found, (base, *models.values()), strict=True):
        torch.testing.assert_close(ours, expected(oracle, [PROMPTS[0]])[0], atol=1e-4, rtol=1e-3)
    assert all(each.classes.labels[4] == "label 4" and not each.warnings for each in staged)
    edit_tensors(tmp_path / "adapters/plain", lambda t: t.update({f"{PREFIX}score.weight": torch.zeros(5, 48)}))
    edit_config(tmp_path / "adapters/plain", auto_mapping={"base_model_class": "LlamaForSequenceClassification"})
    with pytest.raises(AdapterInvalidError, match="score: LoRA on one classifier beside another"):
        open_runner(tmp_path / "base", tmp_path / "adapters")[1].stage("plain", "local", "", "")


NAMED = {"id2label": {"0": "no", "1": "yes"}}
OTHERS = {"id2label": {"0": "bad", "1": "good"}}


@pytest.mark.parametrize(
    ("in_adapter", "beside", "labels"),
    [
        ({}, None, ("LABEL_0", "LABEL_1")),
        (NAMED, None, ("no", "yes")),
        ({}, NAMED, ("no", "yes")),
        (NAMED, OTHERS, ("no", "yes")),
        ({}, {"hidden_size": 5}, ("LABEL_0", "LABEL_1")),
    ],
)
def test_labels_have_the_names_in_the_files(
    in_adapter: dict[str, object],
    beside: dict[str, object] | None,
    labels: tuple[str, ...],
    base: Path,
    folder: Path,
    adapted: dict[str, PeftModel],
    tmp_path: Path,
) -> None:
    shutil.copytree(folder / "two", tmp_path / "a")
    edit_config(tmp_path / "a", **in_adapter)
    if beside is not None:
        (tmp_path / "a/config.json").write_text(json.dumps(beside))
    staged = open_runner(base, tmp_path)[1].stage("a", "local", "", "")
    assert staged.classes == Classes(False, labels, Activation.SOFTMAX, pad_token_id=7) and not staged.warnings


def test_a_config_beside_the_adapter_sets_the_padding_token_and_the_scores(
    base: Path, folder: Path, adapted: dict[str, PeftModel], tmp_path: Path
) -> None:
    shutil.copytree(folder / "two", tmp_path / "a")
    store = open_runner(base, tmp_path)[1]
    before = store.stage("a", "local", "", "").digest
    config = {"pad_token_id": 9, "problem_type": "multi_label_classification", "id2label": {"0": "one", "2": "two"}}
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    staged = store.stage("a", "local", "", "")
    assert staged.classes == Classes(False, ("LABEL_0", "LABEL_1"), Activation.SIGMOID, pad_token_id=9)
    assert staged.digest != before
    (tmp_path / "a/config.json").write_text(json.dumps({"id2label": {"0": "1", "1": "2", "2": "3"}}))
    (doubt,) = store.stage("a", "local", "", "").warnings
    assert doubt == "config.json: id2label has 3 labels, but the classifier 2: ignored"
    (tmp_path / "a/config.json").write_text("not JSON")
    assert store.stage("a", "local", "", "").digest == before


def change(name: str, tensor: torch.Tensor | None, **config: object) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        def edit(tensors: dict[str, torch.Tensor]) -> None:
            tensors.pop(PREFIX + name, None)
            if tensor is not None:
                tensors[PREFIX + name] = tensor

        edit_tensors(directory, edit)
        edit_config(directory, **config)

    return apply


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (change("score.weight", torch.zeros(2, 5)), r"score.weight is \[2, 5\], not \[labels, 48\]"),
        (change("score.weight", torch.zeros(48)), r"score.weight is \[48\], not \[labels, 48\]"),
        (change("score.weight", torch.full((2, 48), torch.inf)), "score.weight has values that are NaN or infinite"),
        (change("score.bias", torch.zeros(3)), r"score.bias is \[3\], not \[2\]"),
        (change("classifier.weight", torch.zeros(2, 48)), "a model has one classifier"),
        (change("score.bias", torch.zeros(2), task_type="CAUSAL_LM"), "set it to SEQ_CLS or TOKEN_CLS"),
        (change("score.lora_A.weight", torch.zeros(3, 48)), "score.lora_A.weight: a classifier is served that was tr"),
        (change("qa_outputs.weight", torch.zeros(2, 48)), "no head that answers questions"),
        (change("score.weight", torch.zeros(1025, 48), task_type="TOKEN_CLS"), "gives 1025 labels to each token"),
        (change("score.weight", torch.zeros(16385, 48)), "gives 16385 labels to a text: at most 16384"),
    ],
)
def test_classifiers_that_cannot_be_served_like_pefts_are_refused_by_name(
    spoil: Callable[[Path], None],
    reason: str,
    base: Path,
    folder: Path,
    adapted: dict[str, PeftModel],
    tmp_path: Path,
) -> None:
    spoil(shutil.copytree(folder / "two", tmp_path / "a"))
    with pytest.raises(AdapterInvalidError, match=reason):
        open_runner(base, tmp_path)[1].stage("a", "local", "", "")


def test_a_bias_without_a_weight_is_refused(base: Path, folder: Path, adapted: object, tmp_path: Path) -> None:
    shutil.copytree(folder / "tokens", tmp_path / "a")
    edit_tensors(tmp_path / "a", lambda tensors: tensors.pop(f"{PREFIX}score.weight"))
    with pytest.raises(AdapterInvalidError, match=r"score\.bias has no weight beside it"):
        open_runner(base, tmp_path)[1].stage("a", "local", "", "")


def test_adapters_that_classify_are_not_merged(base: Path, folder: Path, adapted: dict[str, PeftModel]) -> None:
    store = open_runner(base, folder)[1]
    digests = [store.stage(name, "local", "", "").digest for name in ("two", "five")]
    with pytest.raises(InvalidRequestError, match="adapters with a classifier cannot be merged"):
        store.merge("merged", digests, Recipe((1.0, 1.0), "linear", 1.0, "total"))


@pytest.mark.parametrize("task_type", [None, "FEATURE_EXTRACTION"])
def test_the_class_that_it_was_made_for_determines_what_it_classifies(
    task_type: str | None, base: Path, folder: Path, adapted: dict[str, PeftModel], tmp_path: Path
) -> None:
    shutil.copytree(folder / "tokens", tmp_path / "a")
    made_for = {"base_model_class": "LlamaForTokenClassification", "parent_library": "transformers"}
    edit_config(tmp_path / "a", task_type=task_type, auto_mapping=made_for)
    staged = open_runner(base, tmp_path)[1].stage("a", "local", "", "")
    assert staged.classes is not None and staged.classes.of_tokens and not staged.warnings


def test_an_activated_adapter_that_classifies_is_refused(
    base: Path, folder: Path, adapted: dict[str, PeftModel], tmp_path: Path
) -> None:
    shutil.copytree(folder / "two", tmp_path / "a")
    edit_config(tmp_path / "a", alora_invocation_tokens=[5, 6], modules_to_save=None)
    with pytest.raises(AdapterInvalidError, match=r"an activated adapter \(aLoRA\) with a classifier is not served"):
        open_runner(base, tmp_path)[1].stage("a", "local", "", "")
