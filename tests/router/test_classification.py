"""Scores and entities from classifiers' logits; an end-to-end test compares them with transformers' pipeline."""

from dataclasses import replace
from math import exp

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_protos.errors import UnavailableError
from loraplex_protos.generation_pb2 import Classifier, GetModelInfoResponse
from loraplex_router.vocabulary.classification import LabelledToken, best, by_token, group_entities, scores
from tests.router.test_engine import MODEL

LOGITS = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=8)


def classifier(activation: Classifier.Activation.ValueType, labels: int = 2) -> Classifier:
    return Classifier(labels=map(str, range(labels)), activation=activation)


@given(LOGITS)
def test_softmax_adds_up_to_one_and_keeps_the_order(logits: list[float]) -> None:
    found = scores(classifier(Classifier.ACTIVATION_SOFTMAX), logits)
    assert sum(found) == pytest.approx(1) and found[best(logits)] == max(found)


@given(LOGITS)
def test_each_sigmoid_is_between_zero_and_one_by_itself(logits: list[float]) -> None:
    found = scores(classifier(Classifier.ACTIVATION_SIGMOID), logits)
    assert found == pytest.approx([1 / (1 + exp(min(-logit, 700))) for logit in logits])


def test_regression_returns_the_logits() -> None:
    assert scores(classifier(Classifier.ACTIVATION_NONE), [3.5, -2.0]) == [3.5, -2.0]


def test_logits_are_split_by_token() -> None:
    assert list(by_token(classifier(Classifier.ACTIVATION_SOFTMAX, labels=3), range(6))) == [range(3), range(3, 6)]


@pytest.mark.parametrize(
    ("labels", "groups"),
    [
        ("O B-PER I-PER O", [("PER", 1, 2)]),
        ("B-PER B-PER I-PER", [("PER", 0, 0), ("PER", 1, 2)]),
        ("I-PER I-LOC I-LOC", [("PER", 0, 0), ("LOC", 1, 2)]),
        ("PER PER O PER", [("PER", 0, 1), ("PER", 3, 3)]),
        ("B-PER PER", [("PER", 0, 1)]),
        ("O O", []),
        ("E-PER S-PER", [("PER", 0, 0), ("PER", 1, 1)]),
        ("", []),
    ],
)
def test_entities_are_tokens_of_one_group(labels: str, groups: list[tuple[str, int, int]]) -> None:
    tokens = [LabelledToken(label, 0.5, at, at, at + 1) for at, label in enumerate(labels.split())]
    assert [(each.group, each.start, each.stop - 1) for each in group_entities(tokens)] == groups


def test_replicas_with_other_classifiers_do_not_serve_the_same_model() -> None:
    infos = MODEL.info, classifies("a"), classifies("b")
    plain, one, other = (replace(MODEL, info=info) for info in infos)
    for earlier, later in ((plain, one), (one, plain), (one, other)):
        earlier.check_fits(earlier)
        with pytest.raises(UnavailableError, match="its classifier differs"):
            earlier.check_fits(later)


def classifies(label: str) -> GetModelInfoResponse:
    info = GetModelInfoResponse(classifier=Classifier(labels=[label]))
    info.MergeFrom(MODEL.info)
    return info
