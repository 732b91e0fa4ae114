"""The generated examples are repeatable and valid, and the held-out ones differ from the rest."""

import json

import pytest

from examples.adapters import entities_data, sentiment_data, sql_data, words
from examples.adapters.train import TASKS, examples

EVERY_TASK = pytest.mark.parametrize("name", TASKS)
EITHER_PART = pytest.mark.parametrize("held_out", [False, True], ids=["trained-on", "held-out"])


@EVERY_TASK
@EITHER_PART
def test_the_same_seed_gives_the_same_examples_and_another_seed_does_not(name: str, held_out: bool) -> None:
    first = examples(TASKS[name], 100, seed=5, held_out=held_out)
    assert first == examples(TASKS[name], 100, seed=5, held_out=held_out)
    assert first != examples(TASKS[name], 100, seed=6, held_out=held_out)


@EVERY_TASK
@EITHER_PART
def test_every_generated_answer_is_valid(name: str, held_out: bool) -> None:
    for example in examples(TASKS[name], 500, seed=7, held_out=held_out):
        assert TASKS[name].valid(example.message, example.answer), example


@EVERY_TASK
def test_hardly_any_example_occurs_twice(name: str) -> None:
    assert len(set(examples(TASKS[name], 500, seed=8, held_out=False))) > 450


def test_held_out_sentences_use_other_names_than_the_training_data() -> None:
    def people(held_out: bool) -> set[str]:
        drawn = examples(TASKS["entities"], 500, seed=9, held_out=held_out)
        return {word for example in drawn for name in json.loads(example.answer)["person"] for word in name.split()}

    assert people(held_out=False)
    assert people(held_out=True)
    assert not people(held_out=False) & people(held_out=True)


def test_held_out_questions_use_other_tables_than_the_training_data() -> None:
    def tables(held_out: bool) -> set[str]:
        drawn = examples(TASKS["sql"], 500, seed=9, held_out=held_out)
        return {example.answer.split(" FROM ")[1].split()[0] for example in drawn}

    assert tables(held_out=False) == {f"{noun}s" for noun in words.part(sql_data.NOUNS, held_out=False)}
    assert not tables(held_out=False) & tables(held_out=True)


def test_all_sentiments_are_equally_likely() -> None:
    drawn = [example.answer for example in examples(TASKS["sentiment"], 900, seed=10, held_out=False)]
    assert all(240 < drawn.count(label) < 360 for label in sentiment_data.LABELS)


@pytest.mark.parametrize(
    "query", ["SELECT salary FROM dogs", "SELECT name FROM cats", "SELECT name dogs WHERE", "How many dogs are there?"]
)
def test_a_query_that_the_described_table_cannot_answer_is_invalid(query: str) -> None:
    assert not sql_data.valid("How many dogs are there? Table dogs(id, name).", query)


@pytest.mark.parametrize(
    "answer",
    [
        "Anna lives in Berlin.",
        '["Anna"]',
        '{"person": ["Anna"], "location": ["Berlin"]}',
        '{"person": "Anna", "organization": [], "location": ["Berlin"]}',
        '{"person": ["Anna Schmidt"], "organization": [], "location": ["Berlin"]}',
    ],
    ids=["prose", "a list", "a key missing", "no list", "a name that nobody said"],
)
def test_other_json_or_an_invented_name_is_invalid(answer: str) -> None:
    assert not entities_data.valid("Anna lives in Berlin.", answer)


def test_all_other_words_are_invalid() -> None:
    assert not sentiment_data.valid("I loved it.", "Positive!")
