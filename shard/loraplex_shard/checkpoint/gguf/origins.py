"""Where a model's tensors come from in a GGUF file, and what is to be done to them."""

from collections.abc import Iterator
from dataclasses import dataclass

# llama.cpp's tensors of all experts' gates, ups and downs: [experts, rows, columns].
ALL = GATE, UP, DOWN = "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"
SHARED = "ffn_gate_shexp", "ffn_up_shexp"  # of one that all tokens have
MIXTRALS_NAMES = "block_sparse_moe", "w1", "w3", "w2"
NAMES = "mlp", "gate_proj", "up_proj", "down_proj"


@dataclass(frozen=True, slots=True)
class Origin:
    tensor: str
    expert: int | None = None  # whose part of the tensor it is
    interleaved: bool = False
    minus_one: bool = False
    lacks_dimension: bool = False  # a matrix of one row was stored as a vector
    fusion: "Fusion | None" = None


@dataclass(frozen=True, slots=True)
class Fusion:
    """How a tensor of transformers' is made of one or two of llama.cpp's."""

    second: str = ""  # whose rows are joined to the first one's
    in_turns: bool = False  # one row of each, else one after the other
    experts: bool = True  # there is a dimension for them before the rows
    transposed: bool = False  # each expert's matrix is


def of_experts(model_type: str, layer: str, experts: int) -> Iterator[tuple[str, Origin]]:
    """By the names that a layer's experts have in a checkpoint of transformers'. `layer` is its number."""
    block, prefix = f"blk.{layer}", f"model.layers.{layer}"
    match model_type:
        case "gpt_oss":  # gates and ups in turns, and matrices as they are multiplied with
            for ending, suffix in (("", "weight"), ("_bias", "bias")):
                gate, up, down = (f"{block}.{each}.{suffix}" for each in (GATE, UP, DOWN))
                turned, experts_of = suffix == "weight", f"{prefix}.mlp.experts"
                yield f"{experts_of}.gate_up_proj{ending}", Origin(gate, fusion=Fusion(up, True, transposed=turned))
                yield f"{experts_of}.down_proj{ending}", Origin(down, fusion=Fusion(transposed=turned))
        case "granitemoe" | "granitemoeshared":
            gate, up, down, shared_gate, shared_up = (f"{block}.{each}.weight" for each in (*ALL, *SHARED))
            moe, shared = f"{prefix}.block_sparse_moe", f"{prefix}.shared_mlp"
            yield f"{moe}.input_linear.weight", Origin(gate, fusion=Fusion(up))
            yield f"{moe}.output_linear.weight", Origin(down, fusion=Fusion())
            yield f"{shared}.input_linear.weight", Origin(shared_gate, fusion=Fusion(shared_up, experts=False))
        case _:
            moe, *matrices = MIXTRALS_NAMES if model_type == "mixtral" else NAMES
            for matrix, tensor in zip(matrices, ALL, strict=True):
                for each in range(experts):
                    yield f"{prefix}.{moe}.experts.{each}.{matrix}.weight", Origin(f"{block}.{tensor}.weight", each)
