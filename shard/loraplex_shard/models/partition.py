"""How each linear layer of a decoder is cut for a rank: by attention head, by MLP unit, by vocabulary entry."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from loraplex_shard.device.parallel import partition_heads, partition_panels, partition_units
from loraplex_shard.models.spec import DecoderSpec, ExpertsSpec
from loraplex_shard.shapes.layout import HEAD, LinearLayout, LinearPart

LINEARS = 4  # linear layers of a decoder layer
OF_ROUTING = 2  # additional linear layers of a decoder layer with experts, without the experts' own


class DecoderPartition:
    """The layouts of a rank's linear layers. Raises GroupSizeError if the model cannot be cut for `size` ranks."""

    def __init__(self, spec: DecoderSpec, rank: int, size: int) -> None:
        self.head_partition = partition_heads(spec.heads, spec.kv_heads, rank, size)
        self.heads, self.kv_heads = _length(self.head_partition.query), _length(self.head_partition.kv)
        vocabulary = [partition_panels(spec.vocab_size, other, size) for other in range(size)]
        self.lm_head_widths = tuple(map(_length, vocabulary))
        self._spec = spec
        self._linears = LINEARS + (OF_ROUTING if spec.experts else 0)
        self._rank, self._size = rank, size
        self._query = _scaled(self.head_partition.query, spec.head_dim)
        self._kv = _scaled(self.head_partition.kv, spec.head_dim)
        self._vocabulary = vocabulary[rank]

    def qkv(self, index: int) -> LinearLayout:
        spec = self._spec
        if spec.qkv_by_group:
            return self._qkv_by_group(index)
        kv_features = spec.kv_heads * spec.head_dim
        features, runs = (spec.heads * spec.head_dim, kv_features, kv_features), (self._query, self._kv, self._kv)
        return self._column("qkv", index, 0, spec.names.qkv, features, runs)

    def _qkv_by_group(self, index: int) -> LinearLayout:
        """The layout for a module in which each KV head's key and value follow the query heads that read it."""
        spec, (module,) = self._spec, self._spec.names.qkv
        readers = spec.heads // spec.kv_heads
        query, kv = self.head_partition.query, range(self.head_partition.kv.start, self.head_partition.kv.stop)
        places = [each + 2 * (each // readers) for each in range(query.start, query.stop)]
        places += [each * (readers + 2) + readers for each in kv]
        places += [each * (readers + 2) + readers + 1 for each in kv]
        runs = _joined([_scaled(slice(place, place + 1), spec.head_dim) for place in places])
        part = LinearPart(f"{spec.names.layer(index)}.{module}", spec.kv_heads * (readers + 2) * spec.head_dim, runs)
        return LinearLayout(f"layers.{index}.qkv", self._linears * index, (part,), spec.hidden_size, self._hidden)

    def o(self, index: int) -> LinearLayout:
        return self._row("o", index, 1, self._spec.names.o, self._spec.heads * self._spec.head_dim, self._query)

    def gate_up(self, index: int) -> LinearLayout:
        spec, projections = self._spec, 2 if self._spec.gated else 1
        names, size = self._mlp(index, spec.names.gate_up), self._mlp_size(index)
        return self._column("gate_up", index, 2, names, (size,) * projections, (self._units(size),) * projections)

    def down(self, index: int) -> LinearLayout:
        (name,), size = self._mlp(index, (self._spec.names.down,)), self._mlp_size(index)
        return self._row("down", index, 3, name, size, self._units(size))

    def router(self, index: int) -> LinearLayout:
        return self._whole("router", index, 4, self._experts.router, self._experts.count)

    def shared_gate(self, index: int) -> LinearLayout:
        assert self._experts.shared_gate is not None
        return self._whole("shared_gate", index, 5, self._experts.shared_gate, 1)

    def experts_gate_up(self, index: int) -> list[LinearLayout]:
        experts, size, units = (
            self._experts,
            self._experts.intermediate_size,
            self._units(self._experts.intermediate_size),
        )
        layouts = []
        for each in range(experts.count):
            names = self._expert(each, *experts.gate_up)
            layout = self._column("experts.gate_up", index, 0, names, (size,) * 2, (units,) * 2)
            if experts.interleaved:
                runs = [slice(2 * units.start + which, 2 * units.stop, 2) for which in range(2)]
                layout = replace(layout, parts=(replace(layout.parts[0], rows=tuple(runs)),))
            layouts.append(layout)
        return self._of_experts(index, 0, layouts)

    def experts_down(self, index: int) -> list[LinearLayout]:
        size = self._experts.intermediate_size
        layouts = [
            self._row("experts.down", index, 0, self._expert(each, self._experts.down)[0], size, self._units(size))
            for each in range(self._experts.count)
        ]
        return self._of_experts(index, 1, layouts)

    def lm_head(self) -> LinearLayout:
        head = LinearPart(HEAD, self._spec.vocab_size, (self._vocabulary,))
        index = self._linears * self._spec.layers
        return LinearLayout(HEAD, index, (head,), self._spec.hidden_size, self._hidden)

    @property
    def _experts(self) -> ExpertsSpec:
        assert self._spec.experts is not None
        return self._spec.experts

    def _mlp_size(self, layer: int) -> int:
        return self._experts.shared_size if self._spec.has_experts(layer) else self._spec.intermediate_size

    def _mlp(self, layer: int, names: Sequence[str]) -> tuple[str, ...]:
        """The names of the modules of the layer's MLP, which may be its shared expert."""
        if not self._spec.has_experts(layer):
            return tuple(names)
        return tuple(f"{self._experts.shared}.{name.rpartition('.')[2]}" for name in names)

    def _expert(self, number: int, *names: str) -> tuple[str, ...]:
        return tuple(f"{self._experts.experts}.{number}.{name}" for name in names)

    def _of_experts(self, layer: int, place: int, layouts: Sequence[LinearLayout]) -> list[LinearLayout]:
        """The same layouts with names and indices of experts' layers. Their indices follow those of all other
        layers."""
        first = self._linears * self._spec.layers + 1 + (2 * layer + place) * len(layouts)
        return [
            replace(each, name=f"{each.name}.{number}", index=first + number, of_expert=True)
            for number, each in enumerate(layouts)
        ]

    def _units(self, size: int) -> slice:
        return partition_units(size, self._rank, self._size)

    @property
    def _hidden(self) -> slice:
        return slice(0, self._spec.hidden_size)

    def _column(
        self, name: str, layer: int, place: int, names: Sequence[str], features: Sequence[int], runs: Sequence[slice]
    ) -> LinearLayout:
        """The layout of fused projections. Each has its number of features, and the run of them that is this rank's."""
        modules = [f"{self._spec.names.layer(layer)}.{module}" for module in names]
        if len(modules) == len(features):
            parts = [LinearPart(name, size, (run,)) for name, size, run in zip(modules, features, runs, strict=True)]
        else:
            (module,) = modules
            starts = accumulate(features[:-1], initial=0)
            shifted = [slice(start + run.start, start + run.stop) for start, run in zip(starts, runs, strict=True)]
            parts = [LinearPart(module, sum(features), _joined(shifted))]
        index, size = self._linears * layer + place, self._spec.hidden_size
        return LinearLayout(f"layers.{layer}.{name}", index, tuple(parts), size, self._hidden)

    def _row(self, name: str, layer: int, place: int, module: str, in_features: int, columns: slice) -> LinearLayout:
        part = LinearPart(f"{self._spec.names.layer(layer)}.{module}", self._spec.hidden_size, (self._hidden,))
        return LinearLayout(f"layers.{layer}.{name}", self._linears * layer + place, (part,), in_features, columns)

    def _whole(self, name: str, layer: int, place: int, module: str, out_features: int) -> LinearLayout:
        """The layout of a layer that is whole on every rank."""
        return self._column(name, layer, place, (module,), (out_features,), (slice(0, out_features),))


def _joined(runs: Sequence[slice]) -> tuple[slice, ...]:
    """Joins runs that follow each other."""
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
