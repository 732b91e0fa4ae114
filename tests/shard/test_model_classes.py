"""Every causal language model class of the installed transformers is served as transformers and PEFT compute it, on one
rank and on two, or refused by name; docs/models.md says which."""

from concurrent.futures import Future

import pytest

from tests.shard.class_outcomes import CLASSES, PAGE, Outcome, find_outcomes, row

pytestmark = pytest.mark.slow

_TABLES = PAGE.read_text().partition("## Every class")[2].splitlines()
ROWS = [line for line in _TABLES if line.startswith("| ") and " --- " not in line]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[str, Future[Outcome]]:
    """The outcomes of the selected classes, which are computed while the tests wait for them."""
    beside = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    asked = {item.callspec.params["name"] for item in beside}
    return find_outcomes((model_type, name) for model_type, name in CLASSES if name in asked)


@pytest.mark.parametrize("name", [name for _, name in CLASSES])
def test_a_class_is_served_or_refused_as_documented(name: str, outcomes: dict[str, Future[Outcome]]) -> None:
    assert row(name, outcomes[name].result()) in ROWS


def test_the_page_lists_every_class_once() -> None:
    named = [line.split(" | ")[0].removeprefix("| ") for line in ROWS]
    assert sorted(named) == sorted(["class", "class", *(name for _, name in CLASSES)])


def test_a_hundred_classes_are_served() -> None:
    assert len([line for line in ROWS if line.count(" | ") == 2]) > 100  # including the table's header
