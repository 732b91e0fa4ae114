"""A tiny random Llama with adapters, and an oracle: the answers of transformers and PEFT."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.warning import PeftWarning
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
)

TURN = "{% if add_generation_prompt %}<assistant>{% endif %}"
CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}" + TURN
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_model(folder: Path) -> Path:
    """A model with nine heads and three KV heads, like SmolLM2; one token per byte."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=72,
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_embedding_model(folder: Path) -> Path:
    """The same model without its head, as sentence-transformers saves it: pooled by its last token, not normalized."""
    LlamaModel.from_pretrained(save_model(folder)).save_pretrained(folder)
    modules = {"": "Transformer", "1_Pooling": "Pooling"}
    listed = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in modules.items()]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    return folder


def save_embedding_adapter(model: Path, folder: Path) -> Path:
    """An adapter as PEFT saves it for a model without a head."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=ALL_LINEAR, task_type="FEATURE_EXTRACTION")
    adapted = get_peft_model(LlamaModel.from_pretrained(model), config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    return folder


def save_classifier(folder: Path, of_tokens: bool = False, **config: object) -> Path:
    """The same with a classifier in place of its head, whose tokenizer's end token is padding, too."""
    save_model(folder)
    auto = AutoModelForTokenClassification if of_tokens else AutoModelForSequenceClassification
    loaded = auto.from_pretrained(folder, pad_token_id=byte_tokenizer().eos_token_id, **config)
    torch.nn.init.normal_(loaded.score.weight)
    loaded.save_pretrained(folder)
    return folder


def save_classifying_adapter(model: Path, folder: Path, labels: Sequence[str], of_tokens: bool = False) -> Path:
    """As PEFT saves one of a model that classifies. The names of its labels lie beside it, as Trainer leaves them."""
    auto = AutoModelForTokenClassification if of_tokens else AutoModelForSequenceClassification
    named = dict(enumerate(labels))
    loaded = auto.from_pretrained(model, id2label=named, label2id={}, ignore_mismatched_sizes=True)
    task_type = "TOKEN_CLS" if of_tokens else "SEQ_CLS"
    torch.manual_seed(len(labels))
    adapted = get_peft_model(loaded, LoraConfig(r=4, target_modules=ALL_LINEAR, task_type=task_type))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(folder)
    loaded.config.save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    plain = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_adapter(model: Path, folder: Path, r: int, seed: int, **options: object) -> Path:
    """A LoRA adapter with random weights, strong enough to change every answer."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model)
    options = {"target_modules": ALL_LINEAR, "lora_alpha": 2 * r, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)  # about biases of B
        adapted = get_peft_model(base, LoraConfig(r=r, task_type="CAUSAL_LM", **options))
        for name, parameter in adapted.named_parameters():
            if "magnitude" in name:
                parameter.data *= torch.rand_like(parameter) + 0.5
            elif "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.25 / r**0.5)
            elif "modules_to_save" in name:
                parameter.data += torch.randn_like(parameter) * 0.1
        adapted.save_pretrained(folder)
    return folder


CHATML = ["<|im_start|>", "<|im_end|>"]
CHATML_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + (
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chatml_tokenizer() -> PreTrainedTokenizerFast:
    """The model's with two more tokens, of which one ends answers."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": CHATML, "eos_token": CHATML[1]})
    tokenizer.chat_template = CHATML_TEMPLATE
    return tokenizer


def save_chatml_adapter(model: Path, folder: Path) -> Path:
    """A chat fine-tune with tokens of its own: the embedding and the head were resized, and are saved with it. It likes
    to say them."""
    torch.manual_seed(15)
    base, tokenizer = AutoModelForCausalLM.from_pretrained(model), chatml_tokenizer()
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for matrix in (base.get_input_embeddings().weight, base.lm_head.weight):
        torch.nn.init.normal_(matrix.data[-2:], std=0.6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(base, LoraConfig(r=8, target_modules=ALL_LINEAR, task_type="CAUSAL_LM"))
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        adapted.save_pretrained(folder, save_embedding_layers=True)
    tokenizer.save_pretrained(folder)
    return folder


def save_other_adapter(model: Path, folder: Path, config: PeftConfig) -> Path:
    """One of another kind, with random weights as well."""
    torch.manual_seed(7)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, mean=float("ia3" in name), std=0.3)
    adapted.save_pretrained(folder)
    return folder


class Oracle:
    """Greedy generation with transformers, and with PEFT for an adapter, one request at a time."""

    def __init__(self, model: Path, adapters: Path) -> None:
        self._model, self._adapters = model, adapters
        self._loaded: dict[str, torch.nn.Module] = {}

    def generate(self, prompt: list[int], adapter: str | None, tokens: int) -> tuple[list[int], list[float]]:
        """Token ids and their log probabilities. Generation continues past the model's end token."""
        model = self._load(adapter)
        ids, logprobs = torch.tensor([prompt]), []
        with torch.inference_mode():
            for _ in range(tokens):
                logits = model(input_ids=ids).logits[0, -1].float()
                token = int(logits.argmax())
                logprobs.append(float(logits.log_softmax(-1)[token]))
                ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        return ids[0, len(prompt) :].tolist(), logprobs

    def prompt_logprobs(self, prompt: list[int], adapter: str | None) -> list[float]:
        with torch.inference_mode():
            logits = self._load(adapter)(input_ids=torch.tensor([prompt])).logits[0].float()
        return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()

    def _load(self, adapter: str | None) -> torch.nn.Module:
        key = adapter or ""
        if key not in self._loaded:
            model = AutoModelForCausalLM.from_pretrained(self._model, dtype=torch.float32).eval()
            if adapter and (self._adapters / adapter / "tokenizer.json").exists():
                model.resize_token_embeddings(len(chatml_tokenizer()), mean_resizing=False)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PeftWarning)
                self._loaded[key] = PeftModel.from_pretrained(model, self._adapters / adapter) if adapter else model
        return self._loaded[key]


CHANT = "aé€😀z"


def save_chanting_model(folder: Path) -> Path:
    """A model that repeats CHANT: each byte determines the next, whatever came before."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=264,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    tokens = tokenizer.encode(CHANT)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(len(tokenizer), 264))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for token, following in zip(tokens, tokens[1:] + tokens[:1], strict=True):
            model.lm_head.weight[following, token] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
