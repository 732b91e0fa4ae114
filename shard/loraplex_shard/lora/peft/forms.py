"""Converts adapters that were trained on another form of the base. Phi 3 and 4 exist with one qkv_proj and with q_proj,
k_proj and v_proj, GLM 4 also exists with ChatGLM's names, and some trainers divide Qwen3.5's in_proj_qkv. The trained
weights are the same.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.sources.files import TENSORS
from loraplex_shard.lora.weights.deltas import Delta, name_of_a
from loraplex_shard.shapes.layout import LinearLayout, LinearPart

# By kind of layer: the possible names of its modules, below the module that holds them.
_FORMS = {
    "qkv": (("q_proj", "k_proj", "v_proj"), ("qkv_proj",)),
    "gate_up": (("gate_proj", "up_proj"), ("gate_up_proj",)),
    "in_proj_qkv": (("in_proj_q", "in_proj_k", "in_proj_v"), ("in_proj_qkv",)),
}
_CHATGLM = {
    "qkv": "self_attention.query_key_value",
    "o": "self_attention.dense",
    "gate_up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}


def forms(
    layouts: Sequence[LinearLayout], architecture: str
) -> Iterator[tuple[LinearLayout, tuple[LinearLayout, ...]]]:
    """Each layer, and the other forms in which a trainer may have had it. The other forms are not cut for a rank."""
    by_name = {layout.name: layout for layout in layouts}
    for layout in layouts:
        layer, _, kind = layout.name.rpartition(".")
        names = [] if layout.of_expert else _other_names(layout, kind)
        if architecture == "GlmForCausalLM" and kind in _CHATGLM:
            names.append((f"transformer.encoder.{layer}.{_CHATGLM[kind]}",))
        of_heads = by_name.get(f"{layer}.{'out_proj' if kind == 'in_proj_qkv' else 'o'}")
        width = 0 if of_heads is None else of_heads.in_features
        yield layout, tuple(_named(layout, own, kind, width) for own in names)


def modules_in_any_form(layouts: Sequence[LinearLayout], architecture: str) -> tuple[str, ...]:
    """The names of all modules that an adapter may target."""
    found = forms(layouts, architecture)
    return tuple(part.module for own, others in found for each in (own, *others) for part in each.parts)


def as_trained(layouts: Sequence[LinearLayout], architecture: str, tensors: Collection[str]) -> list[LinearLayout]:
    """For each layer, the form to which an adapter's tensors belong, by PEFT's names."""
    return [
        next((other for other in others if not _is_in(layout, tensors) and _is_in(other, tensors)), layout)
        for layout, others in forms(layouts, architecture)
    ]


def as_served(
    deltas: Mapping[str, Delta], trained: Sequence[LinearLayout], layouts: Sequence[LinearLayout]
) -> dict[str, Delta]:
    """Converts deltas from the layers' trained form to the base's. Raises AdapterInvalidError for deltas in another
    form that are more than A and B."""
    found: dict[str, Delta] = {}
    for own, layout in zip(trained, layouts, strict=True):
        of_layer = {part.module: deltas[part.module] for part in own.parts if part.module in deltas}
        found |= of_layer if own is layout else _converted(of_layer, own, layout)
    return found


def _other_names(layout: LinearLayout, kind: str) -> list[tuple[str, ...]]:
    holder = layout.parts[0].module.rpartition(".")[0]
    own = tuple(part.module for part in layout.parts)
    named = [tuple(f"{holder}.{leaf}" for leaf in leaves) for leaves in _FORMS.get(kind, ())]
    return [names for names in named if names != own] if own in named else []


def _named(layout: LinearLayout, names: tuple[str, ...], kind: str, width: int) -> LinearLayout:
    """`width` is the number of inputs of the layer after the attention: that of queries, or, in a gated delta net, of
    values."""
    total = sum(part.out_features for part in layout.parts)
    others = ((total - width) // 2,) * 2
    three = (*others, width) if kind == "in_proj_qkv" else (width, *others)
    sizes = {1: (total,), 2: (total // 2,) * 2, 3: three}[len(names)]
    parts = tuple(LinearPart(name, size, ()) for name, size in zip(names, sizes, strict=True))
    return replace(layout, parts=parts)


def _is_in(layout: LinearLayout, tensors: Collection[str]) -> bool:
    return any(name_of_a(part.module) in tensors for part in layout.parts)


def _converted(deltas: Mapping[str, Delta], own: LinearLayout, layout: LinearLayout) -> dict[str, Delta]:
    if not all(delta.is_plain for delta in deltas.values()):
        needed = ", ".join(part.module for part in layout.parts)
        raise AdapterInvalidError(
            f"{TENSORS}: {', '.join(deltas)}: this base has {needed} instead, for which only A and B can be converted"
        )
    a = torch.cat([delta.a.float() for delta in deltas.values()])
    b: torch.Tensor = torch.block_diag(*_expansions(deltas, own))  # type: ignore[no-untyped-call]
    sizes = [part.out_features for part in layout.parts]
    runs = pairwise(accumulate(sizes, initial=0))
    whole = {part.module: Delta(a, b[slice(*run)], 1.0) for part, run in zip(layout.parts, runs, strict=True)}
    return {module: delta for module, delta in whole.items() if delta.b.any()}


def _expansions(deltas: Mapping[str, Delta], own: LinearLayout) -> Iterator[torch.Tensor]:
    """B of each part, times its scale. For a part that is not adapted, it has rows but no columns."""
    for part in own.parts:
        delta = deltas.get(part.module)
        yield torch.zeros(part.out_features, 0) if delta is None else delta.b.float() * delta.scale
