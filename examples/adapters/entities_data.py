"""Sentences with named entities, answered by JSON: {"person": [...], "organization": [...], "location": [...]}.

All three keys are always there; names appear in the order of the sentence, once each.
"""

import json

from examples.adapters.words import Example, Words

PEOPLE_DO = (
    "works for {organization}",
    "met {person} at the airport",
    "moved to {place}",
    "bought a boat",
    "loved the new {place} office of {organization}",
    "left {organization} after an argument",
    "hated the hotel in {place}",
    "flew from {place} to {place}",
    "was born in {place}",
    "called {person} about the contract",
    "gave a talk about solar power",
    "studied history",
    "sold the house",
    "enjoyed the food",
    "signed a contract with {organization}",
    "became the head of {organization} in {place}",
    "complained about the service at {organization}",
    "won a prize for the new bridge",
    "visited {person} and {person}",
    "tried the new phone made by {organization}",
    "was disappointed by the coffee and the music",
    "learned to swim",
    "and {person} opened a shop in {place}",
    "asked {organization} for a refund",
    # held out from here on
    "really liked the canteen at {organization}",
    "told {person} the whole story",
    "returned to {place} after a long journey",
    "painted the kitchen",
    "rented a flat from {organization}",
    "and {person} argued about the budget",
)

ORGANIZATIONS_DO = (
    "opened a new office",
    "hired {person}",
    "bought a small company from {place}",
    "sued {organization} over a patent",
    "moved its factory to {place}",
    "announced a new phone",
    "closed its shop in {place}",
    "and {organization} built the bridge together",
    "thanked {person} for the quick help",
    "hired {number} people",
    "lost a lot of money",
    "will sponsor the race in {place}",
    # held out from here on
    "is looking for a manager",
    "chose {person} as its new director",
    "cut the budget of its team in {place}",
)

FACTS = (
    "the weather was cold and the trains were late",
    "nobody knew why the meeting had been moved",
    "the coffee was terrible but the cake was good",
    "the results will be published soon",
    "the museum in {place} is closed",
    "prices in {place} will rise again",
    "shares of {organization} fell",
    "flights between {place} and {place} were cancelled",
    "the award went to {person}",
    "the report was sent to {person}",
    "the price of bread went up",
    "all tickets were sold within an hour",
    # held out from here on
    "the concert in {place} was a success",
    "we were told to wait",
    "the letter from {organization} arrived late",
)

FRAMES = (
    "{clause}.",
    "{clause} on {weekday}.",
    "yesterday {clause}.",
    "we heard that {clause}.",
    "according to {person}, {clause}.",
    "{clause}, {person} said.",
    "on {weekday}, {clause}.",
    "did you know that {clause}?",
    "{clause} because of the rain.",
    "a friend told me that {clause}.",
    "last year {clause}.",
    "{clause} in {place}.",
    # held out from here on
    "it was in the news that {clause}.",
    "{clause} before {weekday}.",
    "this morning {clause}.",
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
    return words.fill(_sentence(words))[0]


def example(words: Words) -> Example:
    templates = [_sentence(words)]
    if words.chance(0.15):
        templates.append(_sentence(words))
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


def _sentence(words: Words) -> str:
    """A sentence that still has slots for its names."""
    clause = words.rng.choice(
        (
            "{person} " + words.pick(PEOPLE_DO),
            "{person} " + words.pick(PEOPLE_DO),
            "{organization} " + words.pick(ORGANIZATIONS_DO),
            words.pick(FACTS),
        )
    )
    sentence = words.pick(FRAMES).replace("{clause}", clause)
    return sentence[0].upper() + sentence[1:]
