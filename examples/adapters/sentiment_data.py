"""Opinions and plain facts, answered by one word: positive, negative or neutral."""

from examples.adapters import sql_data
from examples.adapters.words import Example, Words, listed

ADJECTIVES = {
    "positive": listed(
        "wonderful, excellent, great, fantastic, lovely, superb, amazing, charming, delightful, brilliant, perfect, "
        "helpful, beautiful, comfortable, tasty, friendly, reliable, impressive, enjoyable, splendid, marvellous, "
        "outstanding, delicious, pleasant, terrific"
    ),
    "negative": listed(
        "awful, terrible, horrible, boring, disgusting, dreadful, useless, ugly, broken, noisy, rude, slow, "
        "overpriced, dirty, disappointing, painful, annoying, confusing, poor, ridiculous, atrocious, bad, miserable, "
        "worthless, unpleasant"
    ),
}

VERBS = {
    "positive": listed(
        "loved, enjoyed, really liked, adored, praised, was delighted by, was happy with, was impressed by, "
        "could not stop smiling about, was thrilled about, admired, was very pleased with"
    ),
    "negative": listed(
        "hated, complained about, really disliked, despised, regretted, was disappointed by, was angry about, "
        "was bored by, could not stand, was upset about, detested, was very unhappy with"
    ),
}

VERDICTS = {
    "positive": (
        "I would recommend it to everyone.",
        "Best decision of the year!",
        "It made my day.",
        "I can't wait to come back.",
        "Five stars from me.",
        "It worked perfectly from the first minute.",
        "Everyone had a great time.",
        "Worth every penny.",
        "Thank you so much, this is exactly what I needed!",
        "I smiled all evening.",
    ),
    "negative": (
        "I want my money back.",
        "Never again.",
        "It broke after two days.",
        "What a waste of time.",
        "One star, and only because zero is not possible.",
        "I left before the end.",
        "Nobody answered my calls and I am furious.",
        "It ruined our evening.",
        "Stay away from this place.",
        "It stopped working and nobody cared.",
    ),
}

THINGS = listed(
    "film, hotel, phone, soup, concert, book, museum, flight, laptop, restaurant, lecture, garden, train, sofa, "
    "camera, pizza, game, course, party, bicycle, room, coffee, song, meeting, printer, beach, apartment, jacket, "
    "office, novel, dinner, tour, headset, exhibition, breakfast"
)

OPINIONS = (
    "The {thing} was {adjective}.",
    "{person} {verb} the {thing}.",
    "What a {adjective} {thing}!",
    "{person} {verb} the new {place} office of {organization}.",
    "The {thing} in {place} is {adjective}, and the {thing} is {adjective} too.",
    "{person} told me that the {thing} was really {adjective}.",
    "The {thing} from {organization} arrived on {weekday}. {verdict}",
    "I visited {place} with {person}. {verdict}",
    "My {thing} is {adjective}. {verdict}",
    "Honestly, {organization} sells a {adjective} {thing}.",
    "On {weekday} everyone {verb} the {thing} at {organization}.",
    "We found the {thing} {adjective}.",
    "The {thing} was not {opposite} at all, it was {adjective}.",
    "{person}, who lives in {place}, {verb} the {thing} by {organization}.",
    "{verdict} The {thing} was {adjective}.",
    "{person} {verb} how {adjective} the {thing} was.",
    "The people at the {thing} were {adjective} and the {thing} as well.",
    "It is the most {adjective} {thing} in {place}.",
    "So {adjective}! {person} {verb} every minute of the {thing}.",
    # held out from here on
    "The staff at {organization} in {place} were {adjective}, {person} said.",
    "I have to say this was a {adjective} {thing} and {person} {verb} it.",
    "Our {thing} in {place} turned out to be {adjective}. {verdict}",
    "{person} visited the {thing} on {weekday} and {verb} it.",
    "{person} {verb} the {organization} {thing} in {place} and so did {person}.",
)

FACTS = (
    "The {thing} opens at nine on {weekday}.",
    "{person} works for {organization} in {place}.",
    "The {thing} costs {number} euros.",
    "{organization} has {number} employees in {place}.",
    "{person} moved from {place} to {place} in May.",
    "There is a {thing} next to the station.",
    "The meeting with {organization} is on {weekday}.",
    "{person} bought a {thing} on {weekday}.",
    "The {thing} has {number} pages and a grey cover.",
    "Where is the {thing}?",
    "{place} is {number} kilometres from {place}.",
    "{person} and {person} share a {thing} in {place}.",
    "{organization} announced a {thing} for {weekday}.",
    "Please send the {thing} to {person}.",
    "{person} visited the {place} office of {organization}.",
    "The {thing} stands in the second room on the left.",
    "Room {number} is on the third floor.",
    "{person} will call {person} on {weekday}.",
    "The {thing} for {number} people is at {organization}.",
    "{person} paid for the {thing} by card.",
    "The train from {place} to {place} takes {number} minutes.",
    "{organization} was founded in {place}.",
    "The {thing} begins after the {thing}.",
    "{person} grew up in {place} and studies history.",
    "A {thing} has {number} parts and a manual.",
    "Please ask {person} about the {thing} from {organization}.",
    "My {thing} is on the table.",
    "They were in {place} on {weekday} with {person}.",
    # held out from here on
    "{person} will be in {place} until {weekday}.",
    "{organization} delivers the {thing} in {number} days.",
    "The {thing} was built in {place} and shipped to {organization}.",
    "Table number {number} is reserved for {person}.",
    "{person} took the {thing} to {place}.",
    "The key for room {number} is with {person}.",
    "{organization} rents a {thing} in {place}.",
)

OPPOSITE = {"positive": "negative", "negative": "positive"}
LABELS = ("positive", "negative", "neutral")


def example(words: Words) -> Example:
    label = words.rng.choice(LABELS)
    sentences = [_fact(words) if label == "neutral" else _opinion(words, label)]
    if words.chance(0.2):
        sentences.insert(words.rng.randint(0, 1), _fact(words))
    if words.chance(0.2):
        sentences.append(sql_data.request(words).message)
    return Example(" ".join(sentences), label)


def valid(message: str, answer: str) -> bool:
    """Whether the answer is one of the three words."""
    return answer in LABELS


def _fact(words: Words) -> str:
    return words.fill(words.pick(FACTS), thing=THINGS)[0]


def _opinion(words: Words, label: str) -> str:
    text, _ = words.fill(
        words.pick(OPINIONS),
        thing=THINGS,
        adjective=ADJECTIVES[label],
        opposite=ADJECTIVES[OPPOSITE[label]],
        verb=VERBS[label],
        verdict=VERDICTS[label],
    )
    return text
