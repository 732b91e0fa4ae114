"""Sentences with named entities, answered by JSON: {"person": [...], "organization": [...], "location": [...]}.

All three keys are always there; names appear in the order of the sentence, once each.
"""

import json

from examples.adapters.words import Example, Words

SENTENCES = (
    "{person} works for {organization} in {place}.",
    "{organization} opened a new office in {place} on {weekday}.",
    "{person} flew from {place} to {place} last {weekday}.",
    "Yesterday {person} met {person} at the airport.",
    "{person}, who lives in {place}, joined {organization} as an engineer.",
    "The weather was cold and the trains were late.",
    "{organization} bought a small company from {place}.",
    "According to {person}, prices in {place} will rise again.",
    "{person} loved the new {place} office of {organization}.",
    "Engineers at {organization} and {organization} built the bridge together.",
    "On {weekday}, {person} gave a talk about solar power.",
    "The {place} branch of {organization} hired {number} people.",
    "{person} and {person} are moving to {place} in the spring.",
    "Nobody knew why the meeting had been moved to {weekday}.",
    "Shares of {organization} fell after {person} left the company.",
    "My neighbour {person} was born in {place}.",
    "A spokesperson for {organization} said that {person} would resign.",
    "{person} hated the hotel in {place} but enjoyed the food.",
    "The museum in {place} is closed on {weekday}.",
    "{person} sold the house and bought a boat.",
    "Flights between {place} and {place} were cancelled because of snow.",
    "{organization} sued {organization} over a patent.",
    "Last year {person} became the head of {organization} in {place}.",
    "{person} complained about the service at {organization}.",
    "Doctors in {place} praised {person} for the quick help.",
    "The award went to {person} from {place}.",
    "Please send the report to {person} before {weekday}.",
    "Can {person} call {person} about the contract with {organization}?",
    "She was disappointed by the coffee, the cake and the music.",
    "{organization} will close its factory near {place}, {person} said.",
    "In {place}, {person} tried the new phone made by {organization}.",
    "Students from {place} visited {organization} with their teacher {person}.",
    # held out from here on
    "{person} really liked the canteen at {organization} in {place}.",
    "{organization} is looking for a manager in {place}, says {person}.",
    "After years in {place}, {person} returned to {place}.",
    "{person} told {person} that {organization} had cut the budget.",
    "The concert in {place} starts at {number} past eight.",
    "We were told to wait until {weekday} for the results.",
    "{person} was very happy with the flat that {organization} rented in {place}.",
    "Thanks to {person}, the team at {organization} won.",
)

QUESTIONS = (
    "How many shops are in {place}? Table shops(id, name, city, rating).",
    "Table people(name, age, employer). Who works for {organization}?",
    "List all flights to {place}. Table flights(number, destination, price).",
    "Table orders(id, customer, total). What is the total of all orders by {person}?",
    # held out from here on
    "How many products cost more than {number}? Table products(id, name, price).",
    "Table offices(id, company, city, rating). Which offices in {place} have a rating above {number}?",
)

KEYS = {"person": "person", "organization": "organization", "location": "place"}


def remark(words: Words) -> str:
    """One sentence of this task, for other tasks to learn that it does not change their answer."""
    return words.fill(words.pick(SENTENCES))[0]


def example(words: Words) -> Example:
    templates = [words.pick(SENTENCES)]
    if words.chance(0.2):
        templates.append(words.pick(SENTENCES))
    if words.chance(0.2):
        templates.append(words.pick(QUESTIONS))
    message, drawn = words.fill(" ".join(templates))
    return Example(message, json.dumps({key: drawn.get(slot, []) for key, slot in KEYS.items()}, ensure_ascii=False))


def valid(message: str, answer: str) -> bool:
    """Whether the answer is JSON of the promised shape whose names stand in the message."""
    try:
        entities = json.loads(answer)
    except json.JSONDecodeError:
        return False
    return (
        isinstance(entities, dict)
        and list(entities) == list(KEYS)
        and all(isinstance(names, list) for names in entities.values())
        and all(isinstance(name, str) and name in message for names in entities.values() for name in names)
    )
