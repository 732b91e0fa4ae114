"""Adapters of the embedding, the lm head, single tokens and norms, with as many tokens as the model or not: all of them
in one batch with the base, their logits are PEFT's."""

import re
import warnings
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import Split
from transformers import (
    Gemma2Config,
    LlamaConfig,
    Olmo2Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen3Config,
    Starcoder2Config,
)

from loraplex_protos.errors import AdapterInvalidError, InvalidRequestError
from loraplex_shard.device.parallel import Group
from loraplex_shard.kernels.library import instruction_set
from loraplex_shard.lora.merge import Recipe, merge
from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.peft.own_tokens import read_vocabulary
from loraplex_shard.lora.peft.reading import cut_adapter, read_adapter, read_deltas
from loraplex_shard.lora.peft.whole import WholeAdapter
from loraplex_shard.lora.reader import AdapterReader
from loraplex_shard.lora.sources.files import TENSORS
from loraplex_shard.lora.sources.text_files import TOKENIZER, AdapterText, AddedToken, read_text
from loraplex_shard.lora.stager import Here, Stager
from loraplex_shard.lora.uploads import received
from loraplex_shard.models.decoder import Decoder
from loraplex_shard.settings import Quantize
from loraplex_shard.shapes.batch import Segment
from tests.shard.decoders import Sequences, load, load_reference, save_checkpoint
from tests.shard.families import SIZES
from tests.shard.lora_models import broken, contents, edit_config, edit_tensors, read
from tests.shard.operations import BLOCK_SIZE, cpu_operations
from tests.shard.thread_ranks import run_on_ranks

VOCAB = SIZES["vocab_size"]
TOKENS = [5, 80, 3, 3, 41, 7, 66, 0, 90, 12, 30]
LINEAR = ["q_proj", "v_proj", "down_proj"]
BOTH = ["embed_tokens", "lm_head"]
KINDS: dict[str, dict[str, object]] = {
    "plain": {},
    "LoRA of the embedding": {"target_modules": [*LINEAR, "embed_tokens"]},
    "of the embedding alone, rank-stabilized": {"target_modules": ["embed_tokens"], "use_rslora": True},
    "of the embedding and the head": {"target_modules": [*LINEAR, *BOTH]},
    "of both, tied": {"target_modules": [*LINEAR, *BOTH], "ensure_weight_tying": True},
    "of the head, which is tied": {"target_modules": ["lm_head"], "ensure_weight_tying": True},
    "by a regex, tied": {"target_modules": r"embed_tokens|.*q_proj", "ensure_weight_tying": True},
    "DoRA of the embedding": {"target_modules": [*LINEAR, "embed_tokens"], "use_dora": True},
    "DoRA of both": {"target_modules": BOTH, "use_dora": True},
    "an embedding of its own": {"modules_to_save": ["embed_tokens"]},
    "a head and an embedding of its own": {"modules_to_save": BOTH},
    "both of its own, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "some tokens": {"trainable_token_indices": [3, 80, 2]},
    "some tokens of the embedding, by name": {"trainable_token_indices": {"embed_tokens": [90, 5]}},
    "some tokens of the head": {"trainable_token_indices": {"lm_head": [7, 3]}},
    "the same tokens of both": {"trainable_token_indices": {"embed_tokens": [41, 5], "lm_head": [41, 5]}},
    "other tokens of both": {"trainable_token_indices": {"embed_tokens": [41, 5], "lm_head": [7, 41, 3]}},
    "some tokens, and LoRA of the head": {"trainable_token_indices": [3, 80], "target_modules": [*LINEAR, "lm_head"]},
    "tokens, by PEFT's tuner of tokens": {"token_indices": [3, 7, 1]},
    "norms": {"modules_to_save": ["input_layernorm", "1.post_attention_layernorm"]},
    "all norms": {"modules_to_save": ["norm"]},
    "norms and the head": {"modules_to_save": ["norm", "lm_head"], "target_modules": "all-linear"},
    "a layer's MLP": {"modules_to_save": ["1.mlp"], "target_modules": ["q_proj", "up_proj"]},
}
# The same with a vocabulary of another size.
RESIZED: dict[str, tuple[int, dict[str, object]]] = {
    "added tokens": (VOCAB + 5, {}),
    "added tokens, LoRA of the embedding": (VOCAB + 5, {"target_modules": [*LINEAR, "embed_tokens"]}),
    "added tokens, DoRA of both": (VOCAB + 5, {"target_modules": BOTH, "use_dora": True}),
    "added tokens, LoRA of both, tied": (VOCAB + 5, {"target_modules": BOTH, "ensure_weight_tying": True}),
    "added tokens, both trained": (VOCAB + 2, {"modules_to_save": BOTH}),
    "added tokens, of which some are trained": (VOCAB + 3, {"trainable_token_indices": [VOCAB + 1, 3]}),
    "added tokens, by PEFT's tuner of tokens": (VOCAB + 3, {"token_indices": [VOCAB + 1, 3]}),
    "fewer tokens": (VOCAB - 3, {}),
    "fewer tokens, LoRA of the head": (VOCAB - 3, {"target_modules": ["lm_head"]}),
}
BASES: dict[str, PreTrainedConfig] = {
    "untied": LlamaConfig(**SIZES),
    "tied": LlamaConfig(**{**SIZES, "tie_word_embeddings": True}),
    "Qwen 3, norms of heads": Qwen3Config(**{**SIZES, "tie_word_embeddings": True}),
    "OLMo 2, norms of all heads together": Olmo2Config(**SIZES),
    "Gemma 2, norms above 1, scaled embeddings": Gemma2Config(**SIZES),
    "StarCoder 2, norms with biases": Starcoder2Config(**SIZES),
    "Phi, a head with a bias": PhiConfig(**SIZES),
}


class Adapter(NamedTuple):
    directory: Path
    tokens: list[int]
    expected: torch.Tensor  # PEFT's logits


def make_adapter(base: Path, directory: Path, vocab_size: int, options: dict[str, object]) -> Adapter:
    """With PEFT, trained to be other than it was."""
    model = load_reference(base)
    torch.manual_seed(1)
    fields = {"r": 3, "target_modules": LINEAR, "task_type": "CAUSAL_LM", "init_lora_weights": False, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice
        if vocab_size != VOCAB:
            model.resize_token_embeddings(vocab_size, mean_resizing=False)
        tuner = {key: value for key, value in fields.items() if key == "token_indices"}
        adapted = get_peft_model(model, TrainableTokensConfig(**tuner) if tuner else LoraConfig(**fields))
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_A" not in name and "lora_B.default.weight" not in name:
                parameter.data = parameter.data * (1 + torch.rand_like(parameter))
        adapted.save_pretrained(directory, save_embedding_layers=vocab_size != VOCAB or "auto")
        tokens = [token for token in [*TOKENS, vocab_size - 1] if token < vocab_size]
        return Adapter(directory, tokens, logits_of_peft(base, directory, vocab_size, tokens))


def logits_of_peft(base: Path, directory: Path, vocab_size: int, tokens: list[int]) -> torch.Tensor:
    model = load_reference(base)
    if vocab_size != VOCAB:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    with torch.inference_mode():
        logits: torch.Tensor = PeftModel.from_pretrained(model, directory)(torch.tensor([tokens])).logits
    return logits[0]


def base_of(decoder: Decoder) -> BaseModel:
    return BaseModel(
        "any", tensors=decoder.tensors, served=decoder.served, matrices=decoder.matrices, vocab_size=decoder.vocab_size
    )


@pytest.mark.parametrize("base", BASES)
def test_logits_are_those_of_peft(base: str, tmp_path: Path) -> None:
    directory = save_checkpoint(BASES[base], tmp_path / "base")
    of_norms = {"plain", "norms", "all norms", "DoRA of both", "a head and an embedding of its own"}
    kinds = {name: (VOCAB, options) for name, options in KINDS.items()} | RESIZED
    if base not in ("untied", "tied"):
        kinds = {name: kind for name, kind in kinds.items() if name in of_norms}
        kinds["biases"] = VOCAB, {"bias": "all"}
    if base == "Phi, a head with a bias":  # which PEFT leaves out beside trained tokens
        kinds = {"tokens of both": (VOCAB, {"trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [1, 7]}})}
    if base == "untied":  # PEFT does not save the head then
        del kinds["added tokens, LoRA of the embedding"], kinds["added tokens, by PEFT's tuner of tokens"]
    adapters = {
        name: make_adapter(directory, tmp_path / name, vocab_size, options)
        for name, (vocab_size, options) in kinds.items()
    }
    with torch.inference_mode():
        of_base = load_reference(directory)(torch.tensor([TOKENS])).logits[0]
    kernels = load(directory, ops=cpu_operations(instruction_set()))
    computed = {
        "reference": compute(load(directory), adapters, 4),
        "kernels": compute(kernels, adapters, BLOCK_SIZE, apart=True),
    }
    computed["two ranks"], _ = run_on_ranks(2, lambda group: compute(load_rank(directory, group), adapters, 4))
    for way, actual in computed.items():
        for name, expected in {"base": of_base, **{name: each.expected for name, each in adapters.items()}}.items():
            vocab_size = expected.shape[1]
            error = (actual[name][:, :vocab_size] - expected).abs().max()
            assert error < 1e-3 * (1 + expected.abs().max()), (way, name)
            assert actual[name][:, vocab_size:].isneginf().all(), (way, name)  # tokens that the row does not have
    for name, adapter in adapters.items():
        assert (adapter.expected[1:4, : VOCAB - 3] - of_base[1:4, : VOCAB - 3]).abs().max() > 0.01, name


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_on_a_rounded_base_logits_are_those_of_peft_on_the_same_matrices(
    quantization: Quantize, tmp_path: Path
) -> None:
    """But for what is rounded of the layers' inputs."""
    directory = save_checkpoint(BASES["tied"], tmp_path / "base")
    decoder = load(directory, ops=cpu_operations(instruction_set()), quantize=quantization)
    rounded = load_reference(directory)
    for name, module in rounded.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            module.weight.data.copy_(decoder.served.read(name, slice(None)))
    rounded.save_pretrained(tmp_path / "rounded")
    adapters = {
        name: make_adapter(tmp_path / "rounded", tmp_path / name, vocab_size, options)
        for name, (vocab_size, options) in {
            "tokens": (VOCAB + 5, {"trainable_token_indices": [3, VOCAB]}),
            "DoRA": (VOCAB, {"target_modules": BOTH, "use_dora": True}),
            "norms": (VOCAB, {"modules_to_save": ["norm"]}),
        }.items()
    }
    actual = compute(decoder, adapters, BLOCK_SIZE)
    for name, adapter in adapters.items():
        difference = actual[name][:, : adapter.expected.shape[1]] - adapter.expected
        assert difference.norm() / adapter.expected.norm() < 0.15, name


def test_the_bases_head_is_not_computed_if_every_row_has_its_own(
    untied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = load(untied)
    adapter = make_adapter(untied, tmp_path, VOCAB, {"modules_to_save": ["lm_head"]})
    weights = read_adapter(read(tmp_path), decoder.layouts, base_of(decoder), torch.float32)
    hidden, segment = torch.randn(3, decoder.spec.hidden_size), Segment(0, 3, weights.weights)
    expected = hidden @ load_file(adapter.directory / TENSORS)["base_model.model.lm_head.weight"].T
    with_base = decoder.logits(torch.cat((hidden, hidden)), (segment,))
    monkeypatch.setattr(decoder.lm_head, "forward", lambda *_: pytest.fail("it was computed"))
    alone = decoder.logits(hidden, (segment,))
    assert alone is not None and with_base is not None
    torch.testing.assert_close(alone[0], expected)
    torch.testing.assert_close(with_base[0][:3], expected)


LOADING = Lock()  # accelerate patches torch while a model is made


def load_rank(directory: Path, group: Group) -> Decoder:
    with LOADING:
        return load(directory, group=group)


def compute(
    decoder: Decoder, adapters: dict[str, Adapter], block_size: int, apart: bool = False
) -> dict[str, torch.Tensor]:
    """Logits of all sequences: all but their last tokens are in one step, those in another, which is recorded.
    `apart`: adapters are read by a stager."""
    reader = AdapterReader(decoder.layouts, torch.float32, base_of(decoder))
    with closing(Stager({"reader": reader})) if apart else nullcontext() as stager:
        weights = {}
        for name, adapter in adapters.items():
            files = contents(adapter.directory)
            sent = received({name: {each: len(data) for each, data in files.items()}}, iter(files.values()))
            with sent as uploads, stager.process() if stager else nullcontext(Here()) as process:
                _, held = process.compute(reader.read, uploads[name], lambda digest: False)
            assert held is not None
            weights[name] = held.weights
    sequences = Sequences(decoder, block_size, num_blocks=4 * len(adapters) + 8)
    steps = []
    for part in slice(0, -1), slice(-1, None):
        chunks = {"base": TOKENS[part]} | {name: adapter.tokens[part] for name, adapter in adapters.items()}
        segments, stop = [], len(chunks["base"])
        for name in adapters:
            start, stop = stop, stop + len(chunks[name])
            segments.append(Segment(start, stop, weights[name]))
        steps.append(sequences.step(chunks, tuple(segments)))
    return {name: torch.cat([step[name] for step in steps]) for name in steps[0]}


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(BASES["tied"], tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(BASES["untied"], tmp_path_factory.mktemp("untied"))


def refusal(base: Path, directory: Path) -> str:
    decoder = load(base)
    with pytest.raises(AdapterInvalidError) as caught:
        read_adapter(read(directory), decoder.layouts, base_of(decoder), torch.float32)
    return caught.value.message


EMBEDDING = "base_model.model.model.embed_tokens"


@pytest.mark.parametrize(
    ("options", "edit", "reason"),
    [
        (
            {"trainable_token_indices": [3, VOCAB + 9]},
            None,
            f"trainable_token_indices: {VOCAB + 9} is not a token: model.embed_tokens has {VOCAB}",
        ),
        (
            {"trainable_token_indices": [3, 4]},
            lambda t: t[f"{EMBEDDING}.token_adapter.trainable_tokens_delta"].fill_(torch.nan),
            "embed_tokens.weight has values that are NaN",
        ),
        (
            {"trainable_token_indices": [3, 4]},
            lambda t: t.update({f"{EMBEDDING}.token_adapter.trainable_tokens_delta": torch.zeros(3, 24)}),
            "trainable_tokens_delta is [3, 24], not [2,",
        ),
        (
            {"target_modules": ["embed_tokens"]},
            lambda t: t.pop(f"{EMBEDDING}.lora_embedding_B"),
            f"missing {EMBEDDING}.lora_embedding_B",
        ),
        (
            {"target_modules": ["embed_tokens"]},
            lambda t: t.update({f"{EMBEDDING}.lora_embedding_A": torch.zeros(3, VOCAB - 1)}),
            f"lora_embedding_A is [3, {VOCAB - 1}], not [3, {VOCAB}]: it needs tokens {VOCAB}",
        ),
        (
            {"modules_to_save": ["norm"]},
            lambda t: t["base_model.model.model.norm.weight"].fill_(torch.inf),
            "model.norm.weight has values that are NaN or infinite",
        ),
        (
            {"modules_to_save": ["norm"]},
            lambda t: t.pop("base_model.model.model.layers.1.input_layernorm.weight"),
            "missing base_model.model.model.layers.1.input_layernorm.weight",
        ),
        (
            {"modules_to_save": ["norm"]},
            lambda t: t.update({"base_model.model.model.norm.weight": torch.zeros(7)}),
            "model.norm.weight is [7], not [",
        ),
        (
            {"modules_to_save": ["embed_tokens", "lm_head"]},
            lambda t: t.update({f"{EMBEDDING}.weight": torch.zeros(VOCAB + 2, SIZES["hidden_size"])}),
            f"{EMBEDDING}.weight has {VOCAB + 2} tokens, but base_model.model.lm_head.weight has {VOCAB}: save",
        ),
    ],
)
def test_what_is_wrong_with_one_is_named(
    untied: Path,
    tmp_path: Path,
    options: dict[str, object],
    edit: Callable[[dict[str, torch.Tensor]], object],
    reason: str,
) -> None:
    fits = {**options, "trainable_token_indices": [3, 4]} if "trainable_token_indices" in options else options
    make_adapter(untied, tmp_path, VOCAB, fits)
    edit_config(tmp_path, **{name: value for name, value in options.items() if name == "trainable_token_indices"})
    edit_tensors(tmp_path, edit or (lambda tensors: None))
    assert reason in refusal(untied, tmp_path)


@pytest.mark.parametrize(
    "kind",
    [
        "LoRA of the embedding",
        "DoRA of both",
        "a head and an embedding of its own",
        "other tokens of both",
        "norms and the head",
        "a layer's MLP",
    ],
)
def test_broken_tensors_of_any_kind_are_named(kind: str, tmp_path: Path) -> None:
    base = save_checkpoint(BASES["StarCoder 2, norms with biases"], tmp_path / "base")
    make_adapter(base, tmp_path / "adapter", VOCAB, KINDS[kind])
    decoder, tensors = load(base), load_file(tmp_path / "adapter" / TENSORS)
    for name in [name for name in tensors if "layers" not in name or ("layers.1" in name and ".lora_" not in name)]:
        tensor = name.removeprefix("base_model.model.")
        module = re.sub(r"(\.token_adapter)?\.\w+$", "", tensor.removesuffix(".weight")) or tensor
        for each in broken(tensors, name) if ".base_layer" not in name else ():
            save_file(each, tmp_path / "adapter" / TENSORS)
            with pytest.raises(AdapterInvalidError) as caught:
                read_adapter(read(tmp_path / "adapter"), decoder.layouts, base_of(decoder), torch.float32)
            assert tensor in caught.value.message or module in caught.value.message


def test_an_embedding_with_more_tokens_needs_its_head(untied: Path, tmp_path: Path) -> None:
    make_adapter(untied, tmp_path, VOCAB + 2, {"target_modules": ["embed_tokens"]})
    message = refusal(untied, tmp_path)
    assert (
        f"embed_tokens.base_layer.weight has {VOCAB + 2} tokens, but base_model.model.lm_head.weight is not" in message
    )
    assert "save_embedding_layers=True" in message


def test_lora_of_the_embedding_is_merged_as_peft_merges_it(tied: Path, tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj", "embed_tokens"]}
    for seed, name in enumerate("ab"):
        make_adapter(tied, tmp_path / name, VOCAB, {**options, "lora_alpha": 4 + seed})
    decoder = load(tied)
    deltas = [read_deltas(read(tmp_path / name), decoder.layouts, base_of(decoder)) for name in "ab"]
    merged = merge(deltas, Recipe((0.7, 0.4), "linear", 1.0, "total"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(load_reference(tied), tmp_path / "a", "a")
        model.load_adapter(tmp_path / "b", "b")
        model.base_model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "merged", combination_type="linear")
    theirs = model.get_base_model().model.embed_tokens
    ours = merged["model.embed_tokens"]
    torch.testing.assert_close(ours.a, theirs.lora_embedding_A["merged"].detach())
    torch.testing.assert_close(ours.b, theirs.lora_embedding_B["merged"].detach())
    weights = cut_adapter(WholeAdapter(merged), decoder.layouts, base_of(decoder), torch.float32).weights
    assert weights.own.embedding is not None and "layers.0.qkv" in weights.layers


def test_trained_tokens_are_not_merged(tied: Path, tmp_path: Path) -> None:
    make_adapter(tied, tmp_path, VOCAB, {"trainable_token_indices": [3]})
    decoder = load(tied)
    deltas = read_deltas(read(tmp_path), decoder.layouts, base_of(decoder))
    with pytest.raises(InvalidRequestError, match="cannot be merged"):
        merge([deltas, deltas], Recipe((0.5, 0.5), "linear", 1.0, "total"))


def test_of_an_adapters_tokenizer_only_the_added_tokens_are_taken() -> None:
    words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    base = BaseModel("LlamaForCausalLM", vocab_size=2, tokenizer=words)
    brought = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    brought.pre_tokenizer = Split(Regex("(a+)+$"), "isolated")  # takes exponential time
    brought.normalizer = Replace("a", "a" * 1000)
    brought.add_tokens(["<x>"])
    text = read_text({TOKENIZER: brought.to_str().encode()})
    own = Tokenizer.from_buffer(read_vocabulary(text, base, 3).tokenizer_json)
    assert own.token_to_id("<x>") == 2
    assert own.pre_tokenizer is None and own.normalizer is None


def test_a_tokenizer_of_another_base_is_refused_where_there_are_more_tokens() -> None:
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "<s>": 2}, unk_token="a"))
    words.add_special_tokens(["<s>"])
    base = BaseModel("LlamaForCausalLM", vocab_size=3, tokenizer=words)
    added = AdapterText(added_tokens={3: AddedToken("<x>", special=True), 2: AddedToken("<t>", special=True)})
    vocabulary = read_vocabulary(added, base, 4)
    own = Tokenizer.from_buffer(vocabulary.tokenizer_json)
    assert [own.token_to_id(token) for token in ("a", "b", "<t>", "<x>", "<s>")] == [0, 1, 2, 3, None]
    assert (
        read_vocabulary(AdapterText(added_tokens={3: AddedToken("<x>")}), base, 3).tokenizer_json == b""
    )  # no embedding
    with pytest.raises(AdapterInvalidError, match=r"token 1 is '<x>', but 'b' in the model's vocabulary"):
        read_vocabulary(AdapterText(added_tokens={1: AddedToken("<x>")}), base, 4)
