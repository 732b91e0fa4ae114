"""What classifiers' logits mean: scores, labels, and entities made of labelled tokens."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import exp

from loraplex_protos.generation_pb2 import Classifier

OUTSIDE = "O"  # the label of a token that belongs to no entity


def scores(classifier: Classifier, logits: Sequence[float]) -> list[float]:
    """One per label."""
    match classifier.activation:
        case Classifier.ACTIVATION_NONE:
            return list(logits)
        case Classifier.ACTIVATION_SIGMOID:
            return [_sigmoid(logit) for logit in logits]
        case _:
            largest = max(logits)
            powers = [exp(logit - largest) for logit in logits]
            total = sum(powers)
            return [power / total for power in powers]


def best(found: Sequence[float]) -> int:
    """The place of the highest score."""
    return max(range(len(found)), key=found.__getitem__)


def by_token(classifier: Classifier, logits: Sequence[float]) -> Iterator[Sequence[float]]:
    """The logits of each token, of those of all tokens."""
    count = len(classifier.labels)
    return (logits[start : start + count] for start in range(0, len(logits), count))


@dataclass(frozen=True, slots=True)
class LabelledToken:
    """A token, characters [start, stop) of its text, with its likeliest label."""

    label: str
    score: float
    index: int  # among all tokens of the input
    start: int
    stop: int


@dataclass(slots=True)
class Entity:
    """Tokens one after the other with labels alike: characters [start, stop) of the text."""

    tag: str  # their label, but for B- and I-
    scores: list[float]  # of each token
    index: int  # of the first
    start: int
    stop: int

    @property
    def group(self) -> str:
        return self.tag.partition("-")[2] or self.tag

    @property
    def score(self) -> float:
        return sum(self.scores) / len(self.scores)


def group_entities(tokens: Iterable[LabelledToken]) -> list[Entity]:
    """As transformers' pipeline groups them with the aggregation strategy "simple": B-PER begins an entity of the group
    PER, which I-PER, or PER alone, continue."""
    entities: list[Entity] = []
    for token in tokens:
        begins, tag = _read_label(token.label)
        last = entities[-1] if entities else None
        if last is not None and last.tag == tag and not begins:
            last.scores.append(token.score)
            last.stop = token.stop
        else:
            entities.append(Entity(tag, [token.score], token.index, token.start, token.stop))
    return [entity for entity in entities if entity.group != OUTSIDE]


def _read_label(label: str) -> tuple[bool, str]:
    """Whether it begins an entity, and its tag."""
    if label.startswith(("B-", "I-")):
        return label.startswith("B-"), label[2:]
    return False, label


def _sigmoid(logit: float) -> float:
    return 1 / (1 + exp(-logit)) if logit >= 0 else exp(logit) / (1 + exp(logit))
