"""Questions about one described table, answered by one SQL query (SQLite's dialect, no semicolon).

A message holds a question and "Table name(column, ...).", in either order, sometimes after a remark to ignore. Tables
are put together at random (dogs with a salary), so that columns are learned from the description and not by heart. A
query selects a column only where the question names it.
"""

import re
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from examples.adapters import entities_data
from examples.adapters.words import FAMOUS_ORGANIZATIONS, LAST_NAMES, PLACES, Example, Words, listed, part

NOUNS = listed(
    "employee, student, product, hotel, book, film, flight, car, patient, order, school, shop, house, team, song, "
    "museum, bridge, phone, lake, doctor, camera, recipe, village, ticket, painting, boat, player, farm, game, truck, "
    "course, invoice, "
    "office, machine, festival, dog, river, hospital, laptop, concert"
)
TITLES = listed("name, title, code, model, label, number, brand, serial, nickname, id_card")
TEXTS = (  # a column, how a question says "= value", the values
    ("city", "in {}", PLACES),
    ("country", "from {}", PLACES),
    ("owner", "owned by {}", LAST_NAMES),
    ("maker", "made by {}", FAMOUS_ORGANIZATIONS),
    ("color", "with the color {}", listed("red, blue, green, black, white")),
    ("status", "with status {}", listed("open, closed, new, late, done")),
    ("region", "in the region {}", listed("North, South, East, West, Center")),
    ("sponsor", "paid by {}", FAMOUS_ORGANIZATIONS),
    ("location", "located in {}", PLACES),
    ("category", "in the category {}", listed("food, sport, music, travel, science")),
    ("origin", "coming from {}", PLACES),
    ("type", "of type {}", listed("small, big, old, modern, cheap")),
    # held out from here on
    ("town", "in {}", PLACES),
    ("supplier", "supplied by {}", FAMOUS_ORGANIZATIONS),
    ("manager", "managed by {}", LAST_NAMES),
)
NUMBERS = listed(
    "price, age, salary, weight, year, stock, stars, pages, length, distance, speed, points, rooms, visitors, cost, "
    "height, budget, score, area, profit, "
    "rating, rent, power, guests, fee"
)

COUNTS = (
    "How many {rows} are there?",
    "Count the {rows}.",
    "What is the number of {rows}?",
    "How many {rows} do we have?",
    "Number of {rows}?",
    "Count all {rows}, please.",
    "How many {rows} exist?",
    "I want to know how many {rows} there are.",
    "How many {rows} can you find?",
    "Tell me how many {rows} we have.",
)
COUNTS_WHERE = ("How many {table} are {where}?", "How many of the {table} are {where}?")
LISTS = (
    "List the {column} of all {rows}.",
    "Show the {column} of {rows}.",
    "Give me the {column} of the {rows}.",
    "What is the {column} of the {rows}?",
    "Show me the {column} of every one of the {rows}.",
    "Find the {column} of {rows}.",
    "I need the {column} of all {rows}.",
    "Which {column} do the {rows} have?",
    "Print the {column} of all {rows}.",
    "Tell me the {column} of the {rows}.",
)
ROWS = (
    "Show all {rows}.",
    "Which {rows} are there?",
    "Find all {rows}.",
    "List the {rows}.",
    "Show me the {rows}.",
    "What are the {rows}?",
    "Display all {rows}.",
    "I want to see all {rows}.",
    "Give me all {rows}.",
    "Get the {rows}.",
)
TOTALS = (
    "What is the {word} {number} of {rows}?",
    "Show the {word} {number} of all {rows}.",
    "Compute the {word} {number} of the {rows}.",
    "Give me the {word} {number} of {rows}.",
    "{word} {number} of the {rows}?",
    "Calculate the {word} {number} for all {rows}.",
    "I need the {word} {number} of the {rows}.",
    "How much is the {word} {number} of the {rows}?",
    "Find the {word} {number} of {rows}.",
    "Tell me the {word} {number} of all {rows}.",
)
GROUPS = (
    "How many {table} are there per {text}?",
    "Count the {table} for each {text}.",
    "Number of {table} by {text}?",
    "For each {text}, how many {table} are there?",
    "Count {table} per {text}.",
    "Show the number of {table} in each {text}.",
    "How many {table} are in every {text}?",
    "For every {text}, count the {table}.",
    "How many {table} does each {text} have?",
    "Tell me the number of {table} for each {text}.",
)
TOPS = (
    "Which {row} has the {word} {number}?",
    "Find the {row} with the {word} {number}.",
    "Show the {row} with the {word} {number}.",
    "What {row} has the {word} {number}?",
    "I am looking for the {row} with the {word} {number}.",
    "Get the {row} of the {word} {number}.",
    "Which of the {table} has the {word} {number}?",
    "Display the {row} that has the {word} {number}.",
    "Give me the {row} that has the {word} {number}.",
    "Which {row} is the one with the {word} {number}?",
)

HAVING = listed("with, with a, that have a, having")
COMPARISONS = {"above": ">", "over": ">", "greater than": ">", "below": "<", "under": "<", "less than": "<"}
AGGREGATES = {"average": "AVG", "total": "SUM", "maximum": "MAX", "minimum": "MIN"}
ORDERS = {"highest": "DESC", "largest": "DESC", "lowest": "ASC", "smallest": "ASC"}


@dataclass(frozen=True, slots=True)
class Table:
    """A table with one text column and one number column that questions are about, among others."""

    row: str  # what a row is called
    columns: list[str]
    text: str
    phrase: str  # how a question says that the text column equals a value
    values: Sequence[str]
    number: str

    @property
    def name(self) -> str:
        return f"{self.row}s"

    @property
    def description(self) -> str:
        return f"Table {self.name}({', '.join(self.columns)})."


def example(words: Words) -> Example:
    asked = request(words)
    if words.chance(0.25):
        return Example(f"{entities_data.remark(words)} {asked.message}", asked.answer)
    return asked


def request(words: Words) -> Example:
    """A question with its table's description, and the query that answers it."""
    table = _table(words)
    question, query = _question(words, table)
    parts = [question, table.description] if words.chance(0.5) else [table.description, question]
    return Example(" ".join(parts), query)


def valid(message: str, answer: str) -> bool:
    """Whether SQLite would run the answer on the table that the message describes."""
    described = re.search(r"Table (\w+)\(([\w, ]+)\)", message)
    assert described, f"no table is described in: {message}"
    with sqlite3.connect(":memory:") as database:
        database.execute(f"CREATE TABLE {described[1]} ({described[2]})")
        try:
            database.execute(f"EXPLAIN {answer}")
        except sqlite3.Error:
            return False
    return True


def _table(words: Words) -> Table:
    text, phrase, values = words.pick(TEXTS)
    number, *others = words.rng.sample(part(NUMBERS, words.held_out), words.rng.randint(1, 2))
    columns = [words.pick(TITLES), text, number, *others]
    words.rng.shuffle(columns)
    if words.chance(0.5):
        columns.insert(0, "id")
    return Table(words.pick(NOUNS), columns, text, phrase, values, number)


def _question(words: Words, table: Table) -> tuple[str, str]:
    where, condition = _where(words, table)
    rows = f"{table.name} {where}".strip()
    names = {"row": table.row, "table": table.name, "rows": rows, "text": table.text, "number": table.number}
    source = f"FROM {table.name}{condition}"
    match words.rng.choice(("count", "list", "rows", "total", "group", "top")):
        case "count" if table.phrase.startswith(("in ", "made ", "owned ")) and where and words.chance(0.4):
            return words.pick(COUNTS_WHERE).format(where=where, **names), f"SELECT COUNT(*) {source}"
        case "count":
            return words.pick(COUNTS).format(**names), f"SELECT COUNT(*) {source}"
        case "list":
            column = words.rng.choice(table.columns)
            return words.pick(LISTS).format(column=column, **names), f"SELECT {column} {source}"
        case "rows":
            return words.pick(ROWS).format(**names), f"SELECT * {source}"
        case "total":
            word, function = words.rng.choice(list(AGGREGATES.items()))
            return words.pick(TOTALS).format(word=word, **names), f"SELECT {function}({table.number}) {source}"
        case "group":
            query = f"SELECT {table.text}, COUNT(*) FROM {table.name} GROUP BY {table.text}"
            return words.pick(GROUPS).format(**names), query
        case _:
            word, order = words.rng.choice(list(ORDERS.items()))
            query = f"SELECT * FROM {table.name} ORDER BY {table.number} {order} LIMIT 1"
            return words.pick(TOPS).format(word=word, **names), query


def _where(words: Words, table: Table) -> tuple[str, str]:
    """A condition in English and in SQL; both empty for a question about all rows."""
    english, sql = [], []
    kind = words.rng.choice(("all", "text", "number", "both"))
    if kind in ("text", "both"):
        value = words.pick(table.values)
        english.append(table.phrase.format(value))
        sql.append(f"{table.text} = '{value}'")
    if kind in ("number", "both"):
        word, operator = words.rng.choice(list(COMPARISONS.items()))
        limit = words.rng.choice((words.rng.randint(2, 99), 50 * words.rng.randint(2, 99)))
        english.append(f"{words.rng.choice(HAVING)} {table.number} {word} {limit}")
        sql.append(f"{table.number} {operator} {limit}")
    return words.rng.choice((" ", " and ")).join(english), f" WHERE {' AND '.join(sql)}" if sql else ""
