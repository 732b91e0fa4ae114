"""Reads Prometheus' text format: samples by name and labels, their sums, and the changes between two scrapes."""

import re
from collections import defaultdict
from dataclasses import dataclass

_LINE = re.compile(r"([A-Za-z_:][A-Za-z0-9_:]*)(?:\{(.*)\})? (\S+)(?: \d+)?")
_LABEL = re.compile(r'([A-Za-z_][A-Za-z0-9_]*)="((?:[^"\\]|\\.)*)"')
_ESCAPES = {r"\\": "\\", r"\n": "\n", r"\"": '"'}


@dataclass(frozen=True, slots=True)
class Sample:
    labels: dict[str, str]
    value: float


class Samples:
    """One scrape of one or several servers, at a time in seconds. Raises ValueError for a line that cannot be read."""

    def __init__(self, time: float, *texts: str) -> None:
        self.time = time
        self._by_name: dict[str, list[Sample]] = defaultdict(list)
        for line in "\n".join(texts).splitlines():
            if line and not line.startswith("#"):
                name, sample = _read(line)
                self._by_name[name].append(sample)

    def find(self, name: str, **labels: str) -> list[Sample]:
        """The samples that have these labels; they may have more."""
        return [sample for sample in self._by_name.get(name, ()) if labels.items() <= sample.labels.items()]

    def sum(self, name: str, **labels: str) -> float:
        return sum(sample.value for sample in self.find(name, **labels))

    def values(self, name: str, label: str) -> list[str]:
        """The values of a label, sorted."""
        return sorted({sample.labels[label] for sample in self.find(name) if label in sample.labels})


@dataclass(frozen=True, slots=True)
class Change:
    """What changed from one scrape to a later one."""

    before: Samples
    now: Samples

    def growth(self, name: str, **labels: str) -> float:
        """How much a counter grew; 0 if it was reset in between."""
        return max(0.0, self.now.sum(name, **labels) - self.before.sum(name, **labels))

    def rate(self, name: str, **labels: str) -> float:
        """Growth per second."""
        return self.growth(name, **labels) / max(1e-9, self.now.time - self.before.time)

    def mean(self, histogram: str, **labels: str) -> float | None:
        """The mean of the values observed in between; None if there are none."""
        count = self.growth(f"{histogram}_count", **labels)
        return self.growth(f"{histogram}_sum", **labels) / count if count else None


def _read(line: str) -> tuple[str, Sample]:
    found = _LINE.fullmatch(line)
    if found is None:
        raise ValueError(f"not Prometheus' text format: {line[:80]!r}")
    name, labels, value = found.groups()
    return name, Sample({label: _unescape(text) for label, text in _LABEL.findall(labels or "")}, float(value))


def _unescape(text: str) -> str:
    return re.sub(r"\\.", lambda found: _ESCAPES.get(found.group(), found.group()), text)
