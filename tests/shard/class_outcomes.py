"""The outcome for each causal language model class: served with transformers' and PEFT's results, or refused by name.

`python -m tests.shard.class_outcomes` writes docs/models.md from it.
"""

import re
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from unittest.mock import patch

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loraplex_shard.checkpoint import open_checkpoint
from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.device.parallel import Group, GroupSizeError
from loraplex_shard.layers.parameters import ParameterForm
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.reading import read_adapter
from loraplex_shard.models import Model, check_architecture, load_model
from loraplex_shard.models.architectures import is_known, is_text_served_alone
from loraplex_shard.models.text_part import TextModel
from loraplex_shard.models.transformers.checking import check_model
from loraplex_shard.models.transformers.model import TransformersModel
from loraplex_shard.ops.reference import ReferenceOperations
from loraplex_shard.shapes.batch import Segment
from tests.shard.decoders import CPU, WHOLE, Sequences
from tests.shard.lora_models import read
from tests.shard.thread_ranks import run_on_ranks
from tests.shard.tiny_classes import POSITIONS, classes, tiny_config

PROMPT = [5, 80, 3, 3, 41, 7, 66, 11, 95, 30, 2]
GREEDY = 6
MOST_PARAMETERS = 20_000_000
TOLERANCE = 1e-2  # error of logits as a fraction of their deviation; some classes amplify rounding
REFUSED_BY_PEFT = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}  # their out_proj
CLASSES = [(model_type, each.__name__) for model_type, each in classes()]
PAGE = Path(__file__).parents[2] / "docs/models.md"

_loading = Lock()  # creating a model changes torch's settings for all threads


@dataclass(frozen=True, slots=True, order=True)
class Outcome:
    modeling_code: str = ""  # whose code; empty: it is refused
    ranks: bool = False  # it can run on several ranks
    reason: str = ""  # why it is refused


def find_outcome(model_type: str, name: str) -> Outcome:
    """Raises AssertionError if the class is served with other results than transformers'."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = tiny_config(model_type)
    try:
        told = SimpleNamespace(model_id="", architecture=name, config=config, names=(), classifies=False)
        check_architecture(told)
        if not is_known(name):
            check_model(TextModel(told) if is_text_served_alone(name) else told, POSITIONS)
        with tempfile.TemporaryDirectory() as folder:
            return _serve(_save_random(name, config, Path(folder, "model")), Path(folder, "adapter"))
    except CheckpointError as error:
        return Outcome(reason=error.message.partition(" is not served: ")[2])


def _save_random(architecture: str, config: transformers.PreTrainedConfig, directory: Path) -> Path:
    torch.manual_seed(0)
    made = _alone(config, architecture)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(made).parameters())
    assert size < MOST_PARAMETERS, f"{size} parameters: tiny_classes.py must make it smaller"
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name and "bias" not in name else 0.0, std=0.15)
    model.save_pretrained(directory)
    if made is not config:
        file = directory / "model.safetensors"
        tensors = {re.sub("^model", "model.language_model", name): tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    if type(model.config) is not type(config):  # the text part's; transformers lists the class under the whole one
        config.architectures = [type(model).__name__ if made is config else architecture]
        config.save_pretrained(directory)
    return directory


def _alone(config: transformers.PreTrainedConfig, architecture: str) -> transformers.PreTrainedConfig:
    """Of the text model, where that is what is served and the whole one needs what is not installed."""
    alone = is_text_served_alone(architecture) and not is_known(architecture)
    return config.get_text_config(decoder=True) if alone else config


def _serve(directory: Path, adapter: Path) -> Outcome:
    model = _load(directory, WHOLE)
    peft = save_adapter(directory, adapter, [part.module for layout in model.layouts for part in layout.parts])
    _compare(_answers(model, WHOLE, adapter), directory, peft)
    try:
        with patch.object(TransformersModel, "check_positions"):  # while ranks wait for each other
            cut = run_on_ranks(2, lambda group: _answers(_load(directory, group), group, adapter))[0]
    except GroupSizeError:
        return Outcome(model.modeling_code)
    _compare(cut, directory, peft)
    return Outcome(model.modeling_code, ranks=True)


def _load(directory: Path, group: Group) -> Model:
    checkpoint, form = open_checkpoint(str(directory)), ParameterForm(torch.float32, CPU, "none")
    with _loading:
        return load_model(checkpoint, group, ReferenceOperations(), form, POSITIONS)


def save_adapter(directory: Path, adapter: Path, modules: Sequence[str]) -> PreTrainedModel:
    """Saves an adapter on all of these modules, and returns PEFT's model with it."""
    torch.manual_seed(1)
    model = _reference(directory)
    # PEFT takes some names for experts' parameters, whatever modules have them.
    family = _MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type, "")
    meant_for_experts = set(_MOE_TARGET_MODULE_MAPPING.get(family, ()))
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}
    left_out = meant_for_experts | ({"out_proj"} if model.config.model_type in REFUSED_BY_PEFT else set())
    targets = [name for name in modules if name in linear and name.rpartition(".")[2] not in left_out]
    config = LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(model, config)
    model.save_pretrained(adapter)
    return model.eval()


def _reference(directory: Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(directory)
    options = {
        "dtype": torch.float32,
        "attn_implementation": "eager",
        "config": _alone(config, config.architectures[0]),
    }
    return AutoModelForCausalLM.from_pretrained(directory, **options).eval()


def _answers(model: Model, group: Group, adapter: Path) -> dict[str, tuple[list[int], torch.Tensor]]:
    """Greedy answers of the base and the adapter in one mixed batch, with prompts in chunks. Returns all tokens, and
    the logits after each except the last."""
    base = BaseModel("", tensors=model.tensors, embedding=model.embedding_name, head=model.head_name)
    weights = read_adapter(read(adapter), model.layouts, base, torch.float32).weights
    sequences, known = Sequences(model, block_size=4), {"base": list(PROMPT), "adapted": list(PROMPT)}
    logits: dict[str, list[torch.Tensor]] = {"base": [], "adapted": []}
    for chunk in (slice(0, 5), slice(5, 7), slice(7, len(PROMPT)), *(slice(-1, None),) * GREEDY):
        chunks = {name: tokens[chunk] for name, tokens in known.items()}
        first = len(chunks["base"])
        found = sequences.step(chunks, (Segment(first, 2 * first, weights),))
        for name, tokens in known.items():
            if found:
                logits[name].append(found[name])
            if chunk.stop in (len(PROMPT), None):
                token = torch.tensor([int(found[name][-1].argmax()) if found else 0])
                group.broadcast_(token)
                tokens.append(int(token))
    return {name: (known[name], torch.cat(logits[name])) for name in known if logits[name]}


def _compare(answers: Mapping[str, tuple[list[int], torch.Tensor]], directory: Path, peft: PeftModel) -> None:
    for name, model in (("base", _reference(directory)), ("adapted", peft)):
        tokens, logits = answers[name]
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor([tokens[:-1]]), use_cache=False).logits[0]
        error = float((logits - expected).abs().max() / expected.std())
        assert error < TOLERANCE, f"{name}: logits are off by {error:.2g} of their deviation"
        assert expected[len(PROMPT) - 1 :].argmax(-1).tolist() == tokens[len(PROMPT) :], name


def find_outcomes(wanted: Iterable[tuple[str, str]]) -> dict[str, Future[Outcome]]:
    """The outcomes by class. Two are computed at a time, each on one thread."""
    pool = ProcessPoolExecutor(2, mp_context=get_context("spawn"))
    found = {name: pool.submit(find_outcome, model_type, name) for model_type, name in wanted}
    pool.shutdown(wait=False)
    return found


def row(name: str, outcome: Outcome) -> str:
    """The class's row on the page."""
    if not outcome.modeling_code:
        return f"| {name} | {outcome.reason} |"
    return f"| {name} | {outcome.modeling_code} | {'1 and more' if outcome.ranks else '1'} |"


def write_page() -> None:
    """Replaces the tables on the page."""
    found = sorted((name, future.result()) for name, future in find_outcomes(CLASSES).items())
    served = [row(name, outcome) for name, outcome in found if outcome.modeling_code]
    refused = [row(name, outcome) for name, outcome in found if not outcome.modeling_code]
    lines = (
        *(PAGE.read_text().partition("| class |")[0].rstrip(), ""),
        *("| class | computed by | `--tp` |", "| --- | --- | --- |", *served, "", "Refused:", ""),
        *("| class | why |", "| --- | --- |", *refused),
    )
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write_page()
