"""Questions about one described table, answered by one SQL query (SQLite's dialect, no semicolon).

A message holds a question and "Table name(column, ...).", in either order, sometimes after a remark to ignore.
"""

import re
import sqlite3
from dataclasses import dataclass

from examples.adapters import entities_data
from examples.adapters.words import FAMOUS_ORGANIZATIONS, PLACES, Example, Words


@dataclass(frozen=True, slots=True)
class Table:
    """A table: its rows' title column, its text columns (how to say "= value", and the values), its number columns."""

    name: str
    singular: str
    title: str
    texts: dict[str, tuple[str, tuple[str, ...]]]
    numbers: dict[str, int]  # the largest number that a question compares with


IN_PLACE = ("in {}", PLACES)
FROM_PLACE = ("from {}", PLACES)
MADE_BY = ("made by {}", FAMOUS_ORGANIZATIONS)
OF_COLOR = ("with the color {}", ("red", "blue", "green", "black", "white"))

TABLES = (
    Table("employees", "employee", "name", {"city": IN_PLACE}, {"salary": 9000, "age": 60}),
    Table("students", "student", "name", {"country": FROM_PLACE}, {"grade": 10, "age": 30}),
    Table("products", "product", "name", {"color": OF_COLOR}, {"price": 500, "stock": 90}),
    Table("hotels", "hotel", "name", {"city": IN_PLACE}, {"stars": 5, "price": 400}),
    Table("books", "book", "title", {"publisher": ("by {}", FAMOUS_ORGANIZATIONS)}, {"pages": 900, "year": 2020}),
    Table("films", "film", "title", {"country": FROM_PLACE}, {"length": 180, "rating": 10}),
    Table("flights", "flight", "number", {"destination": ("to {}", PLACES)}, {"price": 900, "distance": 9000}),
    Table("cars", "car", "model", {"maker": MADE_BY}, {"price": 90000, "speed": 250}),
    Table("patients", "patient", "name", {"city": FROM_PLACE}, {"age": 90, "weight": 120}),
    Table("orders", "order", "id", {"customer": ("of {}", FAMOUS_ORGANIZATIONS)}, {"total": 5000, "quantity": 50}),
    Table("schools", "school", "name", {"city": IN_PLACE}, {"teachers": 80, "founded": 2000}),
    Table("shops", "shop", "name", {"owner": ("owned by {}", FAMOUS_ORGANIZATIONS)}, {"rating": 10, "area": 800}),
    Table("houses", "house", "address", {"city": IN_PLACE}, {"rooms": 9, "price": 900000}),
    Table("teams", "team", "name", {"country": FROM_PLACE}, {"points": 90, "players": 30}),
    Table("songs", "song", "title", {"label": ("released by {}", FAMOUS_ORGANIZATIONS)}, {"plays": 9000, "year": 2020}),
    Table("museums", "museum", "name", {"city": IN_PLACE}, {"visitors": 80000, "rooms": 90}),
    # held out from here on
    Table("offices", "office", "company", {"city": IN_PLACE}, {"rating": 10, "rent": 9000}),
    Table("machines", "machine", "serial", {"vendor": MADE_BY}, {"power": 900, "hours": 5000}),
    Table("festivals", "festival", "name", {"country": IN_PLACE}, {"guests": 90000, "fee": 200}),
    Table("dogs", "dog", "name", {"color": OF_COLOR}, {"weight": 60, "age": 15}),
)

COUNTS = (
    "How many {rows} are there?",
    "Count the {rows}.",
    "What is the number of {rows}?",
    "How many {rows} do we have?",
    "How many {rows} can you find?",
)
COUNTS_WHERE = ("How many {table} are {where}?", "How many of the {table} are {where}?")
LISTS = (
    "List the {column} of all {rows}.",
    "Show the {column} of {rows}.",
    "Give me the {column} of the {rows}.",
    "What is the {column} of the {rows}?",
    "Print the {column} of all {rows}.",
)
ROWS = ("Show all {rows}.", "Which {rows} are there?", "Find all {rows}.", "List the {rows}.", "Give me all {rows}.")
TOTALS = (
    "What is the {word} {number} of {rows}?",
    "Show the {word} {number} of all {rows}.",
    "Compute the {word} {number} of the {rows}.",
    "Find the {word} {number} of {rows}.",
    "Tell me the {word} {number} of all {rows}.",
)
GROUPS = (
    "How many {table} are there per {text}?",
    "Count the {table} for each {text}.",
    "Number of {table} by {text}?",
    "For each {text}, how many {table} are there?",
    "How many {table} does each {text} have?",
)
TOPS = (
    "Which {row} has the {word} {number}?",
    "What is the {column} of the {row} with the {word} {number}?",
    "Find the {row} with the {word} {number}.",
    "Name the {row} with the {word} {number}.",
    "Give me the {row} that has the {word} {number}.",
)

COMPARISONS = {"above": ">", "over": ">", "greater than": ">", "below": "<", "under": "<", "less than": "<"}
AGGREGATES = {"average": "AVG", "total": "SUM", "maximum": "MAX", "minimum": "MIN"}
ORDERS = {"highest": "DESC", "largest": "DESC", "lowest": "ASC", "smallest": "ASC"}


def example(words: Words) -> Example:
    asked = request(words)
    if words.chance(0.25):
        return Example(f"{entities_data.remark(words)} {asked.message}", asked.answer)
    return asked


def request(words: Words) -> Example:
    """A question with its table's description, and the query that answers it."""
    table = words.pick(TABLES)
    text, number = next(iter(table.texts)), words.rng.choice(list(table.numbers))
    question, query = _question(words, table, text, number)

    columns = list(dict.fromkeys([table.title, text, *table.numbers]))
    words.rng.shuffle(columns)
    if words.chance(0.5) and table.title != "id":
        columns.insert(0, "id")
    description = f"Table {table.name}({', '.join(columns)})."
    parts = [question, description] if words.chance(0.5) else [description, question]
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


def _question(words: Words, table: Table, text: str, number: str) -> tuple[str, str]:
    where, condition = _where(words, table, text, number)
    rows = f"{table.name} {where}".strip()
    source = f"FROM {table.name}{condition}"
    match words.rng.choice(("count", "list", "rows", "total", "group", "top")):
        case "count" if where.startswith(("in ", "from ", "made ")) and words.chance(0.5):
            return words.pick(COUNTS_WHERE).format(table=table.name, where=where), f"SELECT COUNT(*) {source}"
        case "count":
            return words.pick(COUNTS).format(rows=rows), f"SELECT COUNT(*) {source}"
        case "list":
            return words.pick(LISTS).format(column=table.title, rows=rows), f"SELECT {table.title} {source}"
        case "rows":
            return words.pick(ROWS).format(rows=rows), f"SELECT * {source}"
        case "total":
            word, function = words.rng.choice(list(AGGREGATES.items()))
            question = words.pick(TOTALS).format(word=word, number=number, rows=rows)
            return question, f"SELECT {function}({number}) {source}"
        case "group":
            query = f"SELECT {text}, COUNT(*) FROM {table.name} GROUP BY {text}"
            return words.pick(GROUPS).format(table=table.name, text=text), query
        case _:
            word, order = words.rng.choice(list(ORDERS.items()))
            question = words.pick(TOPS).format(row=table.singular, column=table.title, word=word, number=number)
            return question, f"SELECT {table.title} FROM {table.name} ORDER BY {number} {order} LIMIT 1"


def _where(words: Words, table: Table, text: str, number: str) -> tuple[str, str]:
    """A condition in English and in SQL; both empty for a question about all rows."""
    english, sql = [], []
    kind = words.rng.choice(("all", "text", "number", "both"))
    if kind in ("text", "both"):
        phrase, values = table.texts[text]
        value = words.pick(values)
        english.append(phrase.format(value))
        sql.append(f"{text} = '{value}'")
    if kind in ("number", "both"):
        word, operator = words.rng.choice(list(COMPARISONS.items()))
        value = str(words.rng.randint(2, table.numbers[number]))
        english.append(f"with {number} {word} {value}")
        sql.append(f"{number} {operator} {value}")
    return " and ".join(english), f" WHERE {' AND '.join(sql)}" if sql else ""
