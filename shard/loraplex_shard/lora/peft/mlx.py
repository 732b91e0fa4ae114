"""Converts adapters of MLX-LM to PEFT's form. They have `lora_a` [in_features, lora_rank], `lora_b` [lora_rank,
out_features] and, for DoRA, `m`. For experts, they have a first dimension for these, and the other two are swapped.

Their adapter_config.json has the arguments of the training. Only the tensors show which modules are adapted.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from loraplex_protos.errors import AdapterInvalidError
from loraplex_shard.lora.peft.config import MAX_LORA_RANK, AdapterConfig
from loraplex_shard.lora.peft.targets import Target
from loraplex_shard.lora.peft.tensor_names import PREFIX
from loraplex_shard.lora.weights.deltas import name_of_a, name_of_b

_OWN = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
_NAME = re.compile(r"(?P<module>.+)\.(?P<leaf>lora_a|lora_b|m)")


class _Parameters(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    rank: Annotated[int, Field(ge=1, le=MAX_LORA_RANK)]
    scale: float
    alpha: None = None


class _Arguments(BaseModel):
    model_config = ConfigDict(strict=True)

    fine_tune_type: Literal["lora", "dora", "full"] = "lora"
    lora_parameters: _Parameters
    model: str | None = None


class MlxConfig(AdapterConfig):
    """The adapter's arguments in PEFT's terms."""

    peft_type: Literal["MLX-LM"]

    def scale(self, lora_rank: int, alpha: float) -> float:
        return alpha  # MLX-LM's scale is the whole factor


def is_mlx(fields: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is MLX-LM's."""
    return "peft_type" not in fields and not fields.keys().isdisjoint(("lora_parameters", "fine_tune_type"))


def mlx_config(fields: Mapping[str, Any]) -> MlxConfig:
    """Raises AdapterInvalidError if the adapter cannot be served, pydantic's ValidationError if fields are wrong."""
    if fields.get("fine_tune_type") == "full":
        raise AdapterInvalidError(
            "adapter_config.json: fine_tune_type 'full': this is a model, not an adapter: `mlx_lm.fuse` makes a"
            " checkpoint of it, which can be served as a base"
        )
    parameters = fields.get("lora_parameters")
    if isinstance(parameters, dict) and parameters.get("alpha") is not None:
        raise AdapterInvalidError(
            "adapter_config.json: lora_parameters.alpha: some versions of MLX-LM multiplied by alpha / rank, and others"
            " ignore it: set scale to the whole factor, and remove alpha"
        )
    given = _Arguments.model_validate(fields)
    return MlxConfig(
        peft_type="MLX-LM",
        r=given.lora_parameters.rank,
        lora_alpha=given.lora_parameters.scale,
        use_dora=given.fine_tune_type == "dora",
        base_model_name_or_path=given.model,
    )


def in_pefts_terms(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with PEFT's names and dimensions. Other tensors stay as they are."""
    found = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            found[name] = tensor
            continue
        module = match["module"].replace(".switch_mlp.", ".experts.")
        found[f"{PREFIX}{module}.{_OWN[match['leaf']]}"] = tensor.T if tensor.dim() == 2 else tensor
    return found


def targets_in_file(
    config: MlxConfig, tensors: Mapping[str, torch.Tensor], modules: Iterable[str]
) -> dict[str, Target]:
    """The modules that have an A or a B. Raises AdapterInvalidError if none has."""
    target = Target(config.r, config.scale(config.r, config.lora_alpha))
    found = {name: target for name in modules if name_of_a(name) in tensors or name_of_b(name) in tensors}
    if not found:
        raise AdapterInvalidError(
            "adapters.safetensors: none of its tensors adapts a linear layer of this model: the adapter was made for"
            " another base"
        )
    return found
