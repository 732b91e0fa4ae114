"""Where a model's tensors come from in a GGUF file, and how they are changed."""

from collections.abc import Iterator
from dataclasses import dataclass

# llama.cpp's tensors for the gates, ups and downs of all experts: [experts, rows, columns].
ALL = GATE, UP, DOWN = "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"
SHARED = "ffn_gate_shexp", "ffn_up_shexp"  # of the shared expert
MIXTRALS_NAMES = "block_sparse_moe", "w1", "w3", "w2"
NAMES = "mlp", "gate_proj", "up_proj", "down_proj"


@dataclass(frozen=True, slots=True)
class Origin:
    tensor: str
    expert: int | None = None  # it is this expert's part of the tensor
    interleaved: bool = False
    minus_one: bool = False
    lacks_dimension: bool = False  # a matrix of one row was stored as a vector
    fusion: "Fusion | None" = None


@dataclass(frozen=True, slots=True)
class Fusion:
    """How a tensor of transformers is made of one or two tensors of llama.cpp."""

    second: str = ""  # the tensor whose rows are joined to the first one's
    in_turns: bool = False  # rows alternate; otherwise the second tensor's follow the first one's
    experts: bool = True  # there is a dimension for experts before the rows
    transposed: bool = False  # each expert's matrix is transposed


def of_experts(model_type: str, layer: str, experts: int) -> Iterator[tuple[str, Origin]]:
    """The origins of a layer's experts, by the names that they have in a checkpoint of transformers. `layer` is the
    layer's number."""
    block, prefix = f"blk.{layer}", f"model.layers.{layer}"
    match model_type:
        case "gpt_oss":  # gates and ups alternate, and matrices are [in_features, out_features]
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
