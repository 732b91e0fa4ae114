"""How each linear layer of a decoder is cut for one rank: by attention head, by MLP unit, by vocabulary entry."""

from loraplex_shard.device.parallel import partition_heads, partition_panels, partition_units
from loraplex_shard.models.spec import DecoderSpec
from loraplex_shard.shapes.layout import LinearLayout, LinearPart

LINEARS = 4  # linear layers of one decoder layer


class DecoderPartition:
    """The layouts of one rank's linear layers. Raises GroupSizeError if the model cannot be cut into `size` ranks."""

    def __init__(self, spec: DecoderSpec, rank: int, size: int) -> None:
        heads = partition_heads(spec.heads, spec.kv_heads, rank, size)
        self.heads = _length(heads.query)
        self.kv_heads = _length(heads.kv)
        vocabulary = [partition_panels(spec.vocab_size, other, size) for other in range(size)]
        self.lm_head_widths = tuple(map(_length, vocabulary))
        self._spec = spec
        self._query = _scaled(heads.query, spec.head_dim)
        self._kv = _scaled(heads.kv, spec.head_dim)
        self._units = partition_units(spec.intermediate_size, rank, size)
        self._vocabulary = vocabulary[rank]

    def qkv(self, index: int) -> LinearLayout:
        attention, spec = f"model.layers.{index}.self_attn", self._spec
        kv_features = spec.kv_heads * spec.head_dim
        return self._column(
            f"layers.{index}.qkv",
            LINEARS * index,
            LinearPart(f"{attention}.q_proj", spec.heads * spec.head_dim, self._query),
            LinearPart(f"{attention}.k_proj", kv_features, self._kv),
            LinearPart(f"{attention}.v_proj", kv_features, self._kv),
        )

    def o(self, index: int) -> LinearLayout:
        module, in_features = f"model.layers.{index}.self_attn.o_proj", self._spec.heads * self._spec.head_dim
        return self._row(f"layers.{index}.o", LINEARS * index + 1, module, in_features, self._query)

    def gate_up(self, index: int) -> LinearLayout:
        mlp, units = f"model.layers.{index}.mlp", self._spec.intermediate_size
        return self._column(
            f"layers.{index}.gate_up",
            LINEARS * index + 2,
            LinearPart(f"{mlp}.gate_proj", units, self._units),
            LinearPart(f"{mlp}.up_proj", units, self._units),
        )

    def down(self, index: int) -> LinearLayout:
        module = f"model.layers.{index}.mlp.down_proj"
        return self._row(f"layers.{index}.down", LINEARS * index + 3, module, self._spec.intermediate_size, self._units)

    def lm_head(self) -> LinearLayout:
        head = LinearPart("lm_head", self._spec.vocab_size, self._vocabulary)
        return self._column("lm_head", LINEARS * self._spec.layers, head)

    def _column(self, name: str, index: int, *parts: LinearPart) -> LinearLayout:
        return LinearLayout(name, index, parts, self._spec.hidden_size, slice(0, self._spec.hidden_size))

    def _row(self, name: str, index: int, module: str, in_features: int, columns: slice) -> LinearLayout:
        hidden = self._spec.hidden_size
        return LinearLayout(name, index, (LinearPart(module, hidden, slice(0, hidden)),), in_features, columns)


def _length(part: slice) -> int:
    length: int = part.stop - part.start
    return length


def _scaled(part: slice, factor: int) -> slice:
    return slice(part.start * factor, part.stop * factor)
