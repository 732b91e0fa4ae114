"""How transformers' tensor-parallel plan of a class cuts its modules and parameters for one rank."""

import re
from collections.abc import Mapping

import torch

from loraplex_shard.device.parallel import GroupSizeError, partition_panels

WHOLE = "replicate"
# What a linear layer may be told, and other modules.
COLUMN = {"colwise", "colwise_gather_output", "colwise_rep"}
ROW = {"rowwise", "rowwise_split_input", "rowwise_rep"}
GATHERED = {"colwise_gather_output", "colwise_rep"}  # every rank goes on with the outputs of all
SPLIT = {"rowwise_split_input", "rowwise_rep"}  # every rank has the inputs of all
SUMMED = {"moe_tp_experts", "all_reduce"}  # a module's output is the sum of the ranks'
SHARED = {"moe_identity_expert"}  # a module's input is divided by the ranks, since it is summed with what they cut
# Whole on every rank: here, embeddings are as well.
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


class Plan:
    """Of one rank. Empty for a single one. Raises GroupSizeError for a class that has none, or with rules that are not
    known here."""

    def __init__(self, rules: Mapping[str, str], architecture: str, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._rules = rules if size > 1 else {}
        unknown = set(self._rules.values()) - MODULES - PARAMETERS
        if size > 1 and (not set(rules.values()) - UNCUT or unknown):
            why = f"knows rules that are not served ({', '.join(sorted(unknown))})" if unknown else "has none"
            raise GroupSizeError(f"{architecture} cannot be cut into ranks: its tensor-parallel plan {why}: use tp 1")

    def style(self, name: str) -> str:
        """The rule for a module or parameter."""
        return self._rules.get(_NUMBER.sub("*", name), WHOLE)

    def parts(self, name: str, total: int) -> list[slice]:
        """The ranks' shares of a layer's outputs or inputs."""
        if self.style(name) in GATHERED:
            return [partition_panels(total, rank, self.size) for rank in range(self.size)]
        if total % self.size:
            raise GroupSizeError(f"{name} has {total} features, which {self.size} ranks cannot share evenly")
        each = total // self.size
        return [slice(rank * each, (rank + 1) * each) for rank in range(self.size)]

    def cut(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of a parameter that no linear layer has."""
        style = self.style(name)
        by_row = style in ("rowwise", "packed_rowwise")
        if style in UNCUT or (by_row and tensor.dim() == 1):
            return tensor
        dim = tensor.dim() - 1 if by_row or tensor.dim() == 1 else tensor.dim() - 2
        halves = 2 if style.startswith("packed") and tensor.dim() > 1 else 1
        share = self.parts(name, tensor.shape[dim] // halves)[self.rank]
        return torch.cat([half[(slice(None),) * dim + (share,)] for half in tensor.chunk(halves, dim)], dim)
