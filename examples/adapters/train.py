"""Trains the example adapters on SmolLM2-135M-Instruct and measures them on held-out examples.

    python -m examples.adapters.train                # all three; half an hour on one CPU core
    python -m examples.adapters.train sql --steps 20

The user's message goes through the model's own chat template and nothing else says what to do: it is the adapter that
knows. The loss only counts the answer and its end-of-turn token, so that generation stops where the answer does.
"""

import argparse
import copy
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from examples.adapters import base, entities_data, sentiment_data, sql_data
from examples.adapters.words import Example, Words

FOLDER = Path(__file__).parent
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
IGNORED = -100  # a label without loss


@dataclass(frozen=True, slots=True)
class Task:
    """What one adapter learns, and its shape: three different ones, to exercise the server."""

    example: Callable[[Words], Example]
    valid: Callable[[str, str], bool]  # of a message and an answer
    lora: LoraConfig
    steps: int


TASKS = {
    "sql": Task(
        sql_data.example,
        sql_data.valid,
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]),
        steps=110,
    ),
    "entities": Task(
        entities_data.example,
        entities_data.valid,
        LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
        steps=110,
    ),
    "sentiment": Task(
        sentiment_data.example,
        sentiment_data.valid,
        LoraConfig(
            r=6, lora_alpha=3, use_rslora=True, target_modules=ATTENTION, layers_to_transform=list(range(15, 30))
        ),
        steps=70,
    ),
}


def examples(task: Task, count: int, seed: int, held_out: bool) -> list[Example]:
    """The same examples for the same arguments; held-out ones share no template and no name with the others."""
    words = Words(random.Random(seed), held_out)
    return [task.example(words) for _ in range(count)]


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    steps: int,
    batch_size: int = 8,
    learning_rate: float = 1.5e-3,
) -> PeftModel:
    """Fits a new adapter: AdamW, the learning rate warmed up to its peak and then brought to zero along a cosine."""
    torch.manual_seed(0)
    adapted = cast(PeftModel, get_peft_model(model, copy.deepcopy(task.lora)))
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    batches = _batches(examples(task, steps * batch_size, seed=1, held_out=False), batch_size)

    adapted.train()
    for step, batch in enumerate(batches):
        for settings in optimizer.param_groups:
            settings["lr"] = learning_rate * _schedule(step, steps)
        loss = answer_loss(adapted, *tensors(tokenizer, batch))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 10 == 9:
            print(f"  step {step + 1}/{steps}  loss {loss.item():.4f}", flush=True)
    return adapted


def tensors(
    tokenizer: PreTrainedTokenizerBase, batch: Sequence[Example]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and labels [batch, length], padded on the right; prompts have no labels."""
    rows = []
    for example in batch:
        asked = tokenizer(base.prompt(tokenizer, example.message), add_special_tokens=False)["input_ids"]
        answered = tokenizer(example.answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append((asked, answered))
    length = max(len(asked) + len(answered) for asked, answered in rows)
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, (asked, answered) in enumerate(rows):
        end = len(asked) + len(answered)
        ids[row, :end] = torch.tensor(asked + answered)
        mask[row, :end] = 1
        labels[row, len(asked) : end] = torch.tensor(answered)
    return ids, mask, labels


def answer_loss(model: PeftModel, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the answers [batch, length]. Only their positions meet the vocabulary: a quarter of the work."""
    causal = cast(LlamaForCausalLM, model.get_base_model())
    hidden = causal.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]  # [batch, length - 1, hidden]
    answered = labels[:, 1:] != IGNORED
    return functional.cross_entropy(causal.lm_head(hidden[answered]), labels[:, 1:][answered])


def save(model: PeftModel, directory: Path) -> None:
    """Writes PEFT's two files, the weights in bfloat16."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    rounded = {name: weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()}
    save_file(rounded, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.deepcopy(model.peft_config["default"])
    config.base_model_name_or_path = base.NAME
    config.task_type = "CAUSAL_LM"
    config.inference_mode = True
    config.save_pretrained(str(directory))


def evaluate(model: PeftModel, tokenizer: PreTrainedTokenizerBase, task: Task, count: int, batch_size: int = 8) -> str:
    """A line about held-out examples, and the first few wrong answers."""
    held_out = examples(task, count, seed=2, held_out=True)
    said: list[str] = []
    for start in range(0, count, batch_size):
        said += base.answer(model, tokenizer, [example.message for example in held_out[start : start + batch_size]])
    wrong = [(example, text) for example, text in zip(held_out, said, strict=True) if text != example.answer]
    valid = sum(task.valid(example.message, text) for example, text in zip(held_out, said, strict=True))
    shown = "".join(f"\n  {example.message}\n    want {example.answer}\n    got  {text}" for example, text in wrong[:5])
    return f"held out: {count - len(wrong)}/{count} exact, {valid}/{count} valid{shown}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the example adapters and measures them.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which of {', '.join(TASKS)} (default: all)")
    parser.add_argument("--output", type=Path, default=FOLDER, help="where NAME/adapter_model.safetensors goes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, help="instead of the task's own number")
    parser.add_argument("--held-out", type=int, default=48, help="how many examples to measure on")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(TASKS)
    if unknown:
        parser.error(f"no such adapter: {', '.join(sorted(unknown))} (choose from {', '.join(TASKS)})")

    torch.set_num_threads(arguments.threads)
    model, tokenizer = base.load()
    for name in arguments.names or TASKS:
        task, directory = TASKS[name], arguments.output / name
        print(f"{name}: training", flush=True)
        began = time.monotonic()
        adapted = train(model, tokenizer, task, arguments.steps or task.steps)
        save(adapted, directory)
        size = (directory / "adapter_model.safetensors").stat().st_size
        print(f"{name}: {size / 1e6:.2f} MB in {directory} after {time.monotonic() - began:.0f} s", flush=True)

        model = cast(LlamaForCausalLM, adapted.unload())
        saved = PeftModel.from_pretrained(model, directory)
        print(f"{name}: {evaluate(saved, tokenizer, task, arguments.held_out)}", flush=True)
        model = cast(LlamaForCausalLM, saved.unload())


def _batches(data: Sequence[Example], batch_size: int) -> list[Sequence[Example]]:
    """Examples of similar length together, since padding costs as much as text; the batches in random order."""
    by_length = sorted(data, key=lambda example: len(example.message) + len(example.answer))
    batches = [by_length[start : start + batch_size] for start in range(0, len(data), batch_size)]
    random.Random(0).shuffle(batches)
    return list(batches)


def _schedule(step: int, steps: int) -> float:
    """The learning rate, as a part of its peak."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


if __name__ == "__main__":
    main()
