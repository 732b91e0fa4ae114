"""How each linear layer of a decoder is cut for one rank: by attention head, by MLP unit, by vocabulary entry."""

from collections.abc import Sequence
from itertools import accumulate

from loraplex_shard.device.parallel import partition_heads, partition_panels, partition_units
from loraplex_shard.models.spec import DecoderSpec
from loraplex_shard.shapes.layout import LinearLayout, LinearPart

LINEARS = 4  # linear layers of one decoder layer


class DecoderPartition:
    """The layouts of one rank's linear layers. Raises GroupSizeError if the model cannot be cut into `size` ranks."""

    def __init__(self, spec: DecoderSpec, rank: int, size: int) -> None:
        self.head_partition = partition_heads(spec.heads, spec.kv_heads, rank, size)
        self.heads, self.kv_heads = _length(self.head_partition.query), _length(self.head_partition.kv)
        vocabulary = [partition_panels(spec.vocab_size, other, size) for other in range(size)]
        self.lm_head_widths = tuple(map(_length, vocabulary))
        self._spec = spec
        self._query = _scaled(self.head_partition.query, spec.head_dim)
        self._kv = _scaled(self.head_partition.kv, spec.head_dim)
        self._units = partition_units(spec.intermediate_size, rank, size)
        self._vocabulary = vocabulary[rank]

    def qkv(self, index: int) -> LinearLayout:
        spec = self._spec
        kv_features = spec.kv_heads * spec.head_dim
        features, runs = (spec.heads * spec.head_dim, kv_features, kv_features), (self._query, self._kv, self._kv)
        return self._column("qkv", index, 0, spec.names.qkv, features, runs)

    def o(self, index: int) -> LinearLayout:
        return self._row("o", index, 1, self._spec.names.o, self._spec.heads * self._spec.head_dim, self._query)

    def gate_up(self, index: int) -> LinearLayout:
        spec, projections = self._spec, 2 if self._spec.gated else 1
        features, runs = (spec.intermediate_size,) * projections, (self._units,) * projections
        return self._column("gate_up", index, 2, spec.names.gate_up, features, runs)

    def down(self, index: int) -> LinearLayout:
        return self._row("down", index, 3, self._spec.names.down, self._spec.intermediate_size, self._units)

    def lm_head(self) -> LinearLayout:
        head = LinearPart("lm_head", self._spec.vocab_size, (self._vocabulary,))
        return LinearLayout("lm_head", LINEARS * self._spec.layers, (head,), self._spec.hidden_size, self._hidden)

    @property
    def _hidden(self) -> slice:
        return slice(0, self._spec.hidden_size)

    def _column(
        self, name: str, layer: int, place: int, names: Sequence[str], features: Sequence[int], runs: Sequence[slice]
    ) -> LinearLayout:
        """A layer's projections, each with all of its features and the run of them that is this rank's."""
        modules = [f"model.layers.{layer}.{module}" for module in names]
        if len(modules) == len(features):
            parts = [LinearPart(name, size, (run,)) for name, size, run in zip(modules, features, runs, strict=True)]
        else:
            (module,) = modules
            starts = accumulate(features[:-1], initial=0)
            shifted = [slice(start + run.start, start + run.stop) for start, run in zip(starts, runs, strict=True)]
            parts = [LinearPart(module, sum(features), _joined(shifted))]
        index, size = LINEARS * layer + place, self._spec.hidden_size
        return LinearLayout(f"layers.{layer}.{name}", index, tuple(parts), size, self._hidden)

    def _row(self, name: str, layer: int, place: int, module: str, in_features: int, columns: slice) -> LinearLayout:
        part = LinearPart(f"model.layers.{layer}.{module}", self._spec.hidden_size, (self._hidden,))
        return LinearLayout(f"layers.{layer}.{name}", LINEARS * layer + place, (part,), in_features, columns)


def _joined(runs: Sequence[slice]) -> tuple[slice, ...]:
    """The same, with runs that follow each other as one."""
    joined = [runs[0]]
    for run in runs[1:]:
        if run.start == joined[-1].stop:
            joined[-1] = slice(joined[-1].start, run.stop)
        else:
            joined.append(run)
    return tuple(joined)


def _length(part: slice) -> int:
    length: int = part.stop - part.start
    return length


def _scaled(part: slice, factor: int) -> slice:
    return slice(part.start * factor, part.stop * factor)
