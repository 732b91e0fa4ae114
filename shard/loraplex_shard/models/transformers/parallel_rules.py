"""Cuts the modules and parameters of a class for a rank, by transformers' tensor-parallel rules for that class."""

import re
from collections.abc import Mapping

import torch

from loraplex_shard.device.parallel import GroupSizeError, partition_panels

WHOLE = "replicate"
# The rules of linear layers and of other modules.
COLUMN = {"colwise", "colwise_gather_output", "colwise_rep"}
ROW = {"rowwise", "rowwise_split_input", "rowwise_rep"}
GATHERED = {"colwise_gather_output", "colwise_rep"}  # every rank continues with all outputs
SPLIT = {"rowwise_split_input", "rowwise_rep"}  # every rank gets all inputs
SUMMED = {"moe_tp_experts", "all_reduce"}  # the module's output is the sum over the ranks
SHARED = {"moe_identity_expert"}  # a module's input is divided by the ranks: its output is added to a sum
# Whole on every rank. Here, embeddings are whole as well.
UNCUT = {
    WHOLE,
    "replicated_with_grad_allreduce",
    "mla_kv_a_proj",
    "local_params",
    "embedding_rowwise",
    "embedding_colwise",
}
MODULES = COLUMN | ROW | SUMMED | SHARED | UNCUT
PARAMETERS = {"colwise", "rowwise", "packed_colwise", "packed_rowwise"} | UNCUT
_NUMBER = re.compile(r"\d+")


class ParallelRules:
    """The rules for one rank. There are none for a single rank. Raises GroupSizeError for a class that has no rules, or
    has unknown ones."""

    def __init__(self, rules: Mapping[str, str], architecture: str, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._rules = rules if size > 1 else {}
        unknown = set(self._rules.values()) - MODULES - PARAMETERS
        if size > 1 and (not set(rules.values()) - UNCUT or unknown):
            why = f"has rules that are not served ({', '.join(sorted(unknown))})" if unknown else "is empty"
            raise GroupSizeError(f"{architecture} cannot be cut into ranks: its tensor-parallel plan {why}: use tp 1")

    def style(self, name: str) -> str:
        """The rule for a module or parameter."""
        return self._rules.get(_NUMBER.sub("*", name), WHOLE)

    def parts(self, name: str, total: int) -> list[slice]:
        """Each rank's share of a layer's outputs or inputs."""
        if self.style(name) in GATHERED:
            return [partition_panels(total, rank, self.size) for rank in range(self.size)]
        if total % self.size:
            raise GroupSizeError(f"{name} has {total} features, which {self.size} ranks cannot share evenly")
        each = total // self.size
        return [slice(rank * each, (rank + 1) * each) for rank in range(self.size)]

    def cut(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of a parameter that does not belong to a linear layer."""
        style = self.style(name)
        by_row = style in ("rowwise", "packed_rowwise")
        if style in UNCUT or (by_row and tensor.dim() == 1):
            return tensor
        dim = tensor.dim() - 1 if by_row or tensor.dim() == 1 else tensor.dim() - 2
        halves = 2 if style.startswith("packed") and tensor.dim() > 1 else 1
        share = self.parts(name, tensor.shape[dim] // halves)[self.rank]
        return torch.cat([half[(slice(None),) * dim + (share,)] for half in tensor.chunk(halves, dim)], dim)
