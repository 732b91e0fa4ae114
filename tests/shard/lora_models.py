"""A tiny Llama, its linear layers partitioned over ranks, and adapters made with PEFT."""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from loraplex_shard.lora.peft.base import BaseModel
from loraplex_shard.lora.sources.files import CONFIG, TENSORS, AdapterFiles, assemble
from loraplex_shard.ops.reference import ReferenceWeight
from loraplex_shard.shapes.adapter import AdapterWeights
from loraplex_shard.shapes.layout import LinearLayout, LinearPart, VocabularyLayout

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 24, 40, 3, 6, 3, 4, 50
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_MODULES = [*ATTENTION, "gate_proj", "up_proj", "down_proj", "lm_head"]


def layouts(rank: int = 0, size: int = 1) -> tuple[LinearLayout, ...]:
    """One rank's layers. Partitions may be uneven: two ranks hold 2 and 1 of the KV heads."""
    kv = _share(KV_HEADS * HEAD_DIM, HEAD_DIM, rank, size)
    query = _share(HEADS * HEAD_DIM, HEAD_DIM * HEADS // KV_HEADS, rank, size)
    units, words = _share(INTERMEDIATE, 1, rank, size), _share(VOCAB, 1, rank, size)
    inputs, query_features, kv_features = slice(0, HIDDEN), HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    cut = []
    for layer in range(LAYERS):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        q = LinearPart(f"{attention}.q_proj", query_features, (query,))
        k = LinearPart(f"{attention}.k_proj", kv_features, (kv,))
        v = LinearPart(f"{attention}.v_proj", kv_features, (kv,))
        o = LinearPart(f"{attention}.o_proj", HIDDEN, (inputs,))
        gate = LinearPart(f"{mlp}.gate_proj", INTERMEDIATE, (units,))
        up = LinearPart(f"{mlp}.up_proj", INTERMEDIATE, (units,))
        down = LinearPart(f"{mlp}.down_proj", HIDDEN, (inputs,))
        cut += [
            LinearLayout(f"layers.{layer}.qkv", 4 * layer + 0, (q, k, v), HIDDEN, inputs),
            LinearLayout(f"layers.{layer}.o", 4 * layer + 1, (o,), query_features, query),
            LinearLayout(f"layers.{layer}.gate_up", 4 * layer + 2, (gate, up), HIDDEN, inputs),
            LinearLayout(f"layers.{layer}.down", 4 * layer + 3, (down,), INTERMEDIATE, units),
        ]
    return (*cut, LinearLayout("lm_head", 4 * LAYERS, (LinearPart("lm_head", VOCAB, (words,)),), HIDDEN, inputs))


class HeldTensors:
    """A model's tensors as a checkpoint."""

    def __init__(self, model: torch.nn.Module, rounded: bool = False) -> None:
        self.tensors = model.state_dict()
        self.rounded = rounded

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        return self.tensors[name][rows]

    def is_rounded(self, name: str) -> bool:
        return self.rounded


def make_base() -> LlamaForCausalLM:
    """The base model, which is always the same."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            vocab_size=VOCAB,
            tie_word_embeddings=False,
        )
    )


class HeldWeights:
    """A model's weights, unchanged."""

    tied, resizable, transposed = False, True, frozenset[str]()
    vocabulary = VocabularyLayout("model.embed_tokens", "lm_head", VOCAB, HIDDEN, 1.0, torch.float32, norms=2)
    norms: Mapping[str, tuple[int, ...]] = {"model.norm.weight": (HIDDEN,)}

    def __init__(self, model: torch.nn.Module) -> None:
        self.tensors = model.state_dict()

    def has(self, module: str) -> bool:
        return f"{module}.weight" in self.tensors

    def read(self, module: str, rows: slice) -> torch.Tensor:
        return self.tensors[f"{module}.weight"][rows]

    def pack(self, matrix: torch.Tensor) -> ReferenceWeight:
        return ReferenceWeight(matrix, None)

    def read_norms(self, own: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
        return own["model.norm.weight"].float(), None


BASE = BaseModel(
    "LlamaForCausalLM",
    ids=("org/base-7b",),
    tensors=HeldTensors(make_base()),
    vocab_size=VOCAB,
    served=HeldWeights(make_base()),
    matrices=HeldWeights(make_base()),
    hidden_size=HIDDEN,
    head_dim=HEAD_DIM,
)


def save_adapter(directory: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **config: object) -> PeftModel:
    """An adapter with random A and B, saved by PEFT. Returns the model with the adapter on it."""
    base = make_base()
    torch.manual_seed(seed)
    fields = {"r": 4, "target_modules": ATTENTION, "task_type": "CAUSAL_LM", "init_lora_weights": False, **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice about lm_head, and transformers' deprecations that PEFT uses
        model = get_peft_model(base, LoraConfig(**fields))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
        model.save_pretrained(directory)
    return model


def read(directory: Path) -> AdapterFiles:
    return assemble({name: memoryview(bytearray(data)) for name, data in contents(directory).items()})


def contents(directory: Path) -> dict[str, bytes]:
    """The adapter's files by name."""
    return {name: (directory / name).read_bytes() for name in (CONFIG, TENSORS)}


def edit_config(directory: Path, **fields: object) -> None:
    """`...` removes a field."""
    path = directory / CONFIG
    edited = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in edited.items() if value is not ...}))


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / TENSORS)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / TENSORS)


def broken(tensors: Mapping[str, torch.Tensor], name: str) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of a file in which one of them is missing, not finite, of another shape, or of integers."""
    yield {other: tensor for other, tensor in tensors.items() if other != name}
    tensor = tensors[name]
    last = tensor.clone()
    last.view(-1)[-1] = torch.nan
    more, integers = torch.cat((tensor, tensor[-1:])), torch.zeros(tensor.shape, dtype=torch.int8)
    for each in torch.full_like(tensor, torch.inf), last, tensor[..., None].clone(), more, integers:
        yield {**tensors, name: each}


def loaded_by_peft(directory: Path) -> dict[str, torch.Tensor]:
    """What PEFT would add to each adapted module's weight if it loaded that directory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about fields that it ignores
        return peft_deltas(PeftModel.from_pretrained(make_base(), directory))


def peft_deltas(model: PeftModel) -> dict[str, torch.Tensor]:
    """What PEFT would add to each adapted module's weight."""
    modules = model.get_base_model().named_modules()
    return {name: m.get_delta_weight("default").detach() for name, m in modules if hasattr(m, "get_delta_weight")}


def whole_deltas(weights: Sequence[AdapterWeights]) -> dict[str, torch.Tensor]:
    """The same deltas, joined from all ranks' partitions, whatever their sizes."""
    deltas: dict[str, torch.Tensor] = {}
    for rank, adapter in enumerate(weights):
        for layout in layouts(rank, len(weights)):
            if layer := adapter.layers.get(layout.name):
                _place(deltas, layout, layer.shrink, {(e.start, e.stop): e for e in layer.expansions})
    return deltas


def _place(
    deltas: dict[str, torch.Tensor],
    layout: LinearLayout,
    shrink: torch.Tensor,
    expansions: Mapping[tuple[int, int], object],
) -> None:
    start = 0
    for part in layout.parts:
        (rows,), stop = part.rows, start + part.width
        if e := expansions.get((start, stop)):
            delta = deltas.setdefault(part.module, torch.zeros(part.out_features, layout.in_features))
            delta[rows, layout.columns] += (e.weight.T @ shrink[e.rank_start : e.rank_stop]).float()
        start = stop


def _share(features: int, unit: int, rank: int, size: int) -> slice:
    """One rank's share of this number of units of features. If it is uneven, the first ranks have one more."""
    each, more = divmod(features // unit, size)
    start = rank * each + min(rank, more)
    return slice(start * unit, (start + each + (rank < more)) * unit)
