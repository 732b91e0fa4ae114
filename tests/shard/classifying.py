"""Tiny classifiers, transformers' and PEFT's logits, and ours, which are computed in chunks beside other sequences."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from loraplex_shard.checkpoint import open_checkpoint
from loraplex_shard.device.parallel import Group
from loraplex_shard.layers.parameters import ParameterForm
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.sources.local import LocalSource
from loraplex_shard.lora.store import AdapterStore
from loraplex_shard.models import load_model
from loraplex_shard.ops.reference import ReferenceOperations
from loraplex_shard.sampling.grammars import GrammarCompiler
from loraplex_shard.settings import Quantize
from loraplex_shard.stepping.runner import Runner
from tests.shard.decoders import CPU, WHOLE
from tests.shard.planner import BLOCK_SIZE, NUM_BLOCKS, Planner

MODEL_LEN = 64
CHUNK = 7
ROWS = 16


def save_classifier(config: PreTrainedConfig, directory: Path, of_tokens: bool = False) -> PreTrainedModel:
    """Saves a random classifier there. No bias is zero and no norm is one, so that ignoring one would be noticed."""
    torch.manual_seed(0)
    auto = AutoModelForTokenClassification if of_tokens else AutoModelForSequenceClassification
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
    model.save_pretrained(directory)
    return model


def open_runner(
    directory: Path, adapters: Path | None = None, group: Group = WHOLE, quantize: Quantize = "none"
) -> tuple[Runner, AdapterStore]:
    """One rank of the model in this directory, with slots for adapters."""
    checkpoint = open_checkpoint(str(directory))
    form = ParameterForm(torch.float32, CPU, quantize)
    model = load_model(checkpoint, group, ReferenceOperations(), form, MODEL_LEN)
    classifier, config = checkpoint.classifier(), checkpoint.config.get_text_config(decoder=True)
    base = BaseModel(
        checkpoint.architecture,
        tensors=model.tensors,
        vocab_size=model.vocab_size,
        embedding=model.embedding_name,
        head=model.head_name,
        served=model.served,
        matrices=model.matrices,
        hidden_size=config.hidden_size,
        pad_token_id=config.pad_token_id,
        classifier=classifier,
    )
    store = AdapterStore(model.layouts, torch.float32, CPU, base, [LocalSource(adapters)] if adapters else [])
    cache = model.new_cache(NUM_BLOCKS, BLOCK_SIZE, sequences=ROWS)
    grammars = GrammarCompiler(b"{}", model.vocab_size, (2,))
    return Runner(model, cache, store, group, ROWS, MODEL_LEN, CPU, grammars, classifier=classifier), store


def classify(runner: Runner, prompts: list[list[int]], slots: list[int] | None = None) -> list[torch.Tensor]:
    """Each prompt's logits. All prompts are computed in the same steps, some positions at a time."""
    planner, found = Planner(), [list[float]() for _ in prompts]
    for row, (prompt, slot) in enumerate(zip(prompts, slots or [0] * len(prompts), strict=True)):
        planner.start(row, prompt, slot=slot, pool=True, classify=True)
    while left := {row: len(p) - planner.rows[row].computed for row, p in enumerate(prompts)}:
        lengths = {row: min(CHUNK + row, count) for row, count in left.items() if count}
        if not lengths:
            break
        plan = planner.plan(lengths)
        plan.samples[:] = [False] * len(plan.samples)
        response, start = runner.step(plan), 0
        for place, length in zip(response.pooled_chunks, response.pooled_lengths, strict=True):
            found[plan.rows[place]] += response.pooled[start : start + length]
            start += length
    return [torch.tensor(logits) for logits in found]


@torch.inference_mode()
def expected(model: torch.nn.Module, prompts: list[list[int]]) -> list[torch.Tensor]:
    return [model(input_ids=torch.tensor([prompt])).logits[0].flatten() for prompt in prompts]
