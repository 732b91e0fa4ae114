"""Matrices as HQQ stores them. A matrix is cut into groups, which become the rows or the columns of another matrix. The
rows of that matrix are cut into parts of equal size, and corresponding rows of these parts share bytes."""

from dataclasses import dataclass

import torch

from loraplex_shard.checkpoint.base import CheckpointError
from loraplex_shard.checkpoint.quantized.integers import IntegerMatrix, groups
from loraplex_shard.checkpoint.quantized.stored import Expected, Floats, Part, StoredMatrix, as_slice, check, modules
from loraplex_shard.checkpoint.safetensors.files import SafetensorsFiles

BITS = {"8bit_u8": 8, "4bit_u8": 4, "3bit_32": 3, "2bit_u8": 2, "1bit_u8": 1}
MOST_SIGNIFICANT_FIRST = {bits: range(30 - bits if bits == 3 else 8 - bits, -1, -bits) for bits in BITS.values()}
# The suffixes of the tensors that say how a matrix was made and is used.
FIELDS = (
    *("nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "compute_dtype"),
    *("quant_scale", "quant_zero", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise"),
    *("optimize", "round_zero"),
)


@dataclass(frozen=True, slots=True)
class Hqq:
    def find(self, files: SafetensorsFiles) -> dict[str, StoredMatrix]:
        found = modules(files, "W_q", "U8", "I32", "F16", "BF16", "F32")
        return {f"{module}.weight": _stored(files, module) for module in found}


@dataclass(frozen=True, slots=True)
class _Matrix:
    files: SafetensorsFiles
    module: str
    bits: int
    shape: tuple[int, int]
    group: int
    by_row: bool  # a group is a row of the stored matrix; otherwise it is a column, which has `group` rows

    def read(self, rows: range, columns: range) -> Part:
        """Reads a part. All groups are read, since they are not in the file in the order of the matrix."""
        values, width = self._values(), self.shape[1]
        scales, zeros = (self.files.read(f"{self.module}.{each}").float() for each in ("scale", "zero"))
        if self.by_row and width % self.group == 0:
            of = groups(columns, self.group)
            scales, zeros = (each.view(self.shape[0], -1)[as_slice(rows), of] for each in (scales, zeros))
            values = values.view(self.shape)[as_slice(rows), as_slice(columns)]
            return IntegerMatrix(self.bits, self.group, columns.start % self.group, values, zeros, scales)
        weights = (values.float() - zeros).mul_(scales).reshape(self.shape)
        return Floats(weights[as_slice(rows), as_slice(columns)])

    def check_shapes(self) -> None:
        """Raises CheckpointError, naming the tensor, if one does not have the shape that the others say."""
        count = self.shape[0] * self.shape[1] // self.group
        of_groups = (count, 1) if self.by_row else (1, count)
        down, across = (count, self.group) if self.by_row else (self.group, count)
        packed = -(-down // len(MOST_SIGNIFICANT_FIRST[self.bits])), across
        for name, shape in {"W_q": packed, "scale": of_groups, "zero": of_groups}.items():
            if (found := self.files.shape(f"{self.module}.{name}")) != shape:
                raise CheckpointError(f"tensor {self.module}.{name} has shape {list(found)}, not {list(shape)}")

    def _values(self) -> torch.Tensor:
        packed = self.files.read(f"{self.module}.W_q").view(torch.int32 if self.bits == 3 else torch.uint8)
        most = (1 << self.bits) - 1
        values = torch.cat([packed >> shift & most for shift in MOST_SIGNIFICANT_FIRST[self.bits]]).to(torch.uint8)
        count = self.shape[0] * self.shape[1] // self.group
        return values[: count if self.by_row else self.group]  # with 3 bits there is padding


def _stored(files: SafetensorsFiles, module: str) -> StoredMatrix:
    named = {field: f"{module}.{field}" for field in ("W_q", "scale", "zero", "shape", "group_size", "axis", "packing")}
    if missing := sorted({*named.values()} - files.names):
        raise CheckpointError(f"missing tensor {missing[0]}: only HQQ as transformers saves it is served")
    packing = bytes(files.read(named["packing"]).numpy()).decode(errors="replace")
    check(files, (), {named["shape"]: Expected((2,), frozenset({"I64", "I32"}))})
    rows, columns = map(int, files.read(named["shape"]))
    group, by_row = int(files.read(named["group_size"])), int(files.read(named["axis"])) == 1
    if packing not in BITS or group < 1 or rows * columns % group:
        raise CheckpointError(f"tensor {named['packing']}: {packing!r} in groups of {group} is not served")
    matrix = _Matrix(files, module, BITS[packing], (rows, columns), group, by_row)
    matrix.check_shapes()
    tensors = frozenset(named.values()) | {f"{module}.{field}" for field in FIELDS}
    return StoredMatrix((rows, columns), tensors, in_integers=by_row, read_part=matrix.read, in_pieces=False)
