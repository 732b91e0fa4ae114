"""Names that all three tasks draw from, and how vocabulary is kept apart for the held-out examples.

Lists are written by hand and cut by `part`: what is in the last fifth of one is seen in held-out examples only.
(Weekdays, numbers and the words that a query translates are shared.)
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar


def listed(text: str) -> tuple[str, ...]:
    """A list written as prose: items with a comma between them."""
    return tuple(text.split(", "))


FIRST_NAMES = listed(
    "James, Mary, Wei, Fatima, Carlos, Olga, John, Aisha, Pierre, Yuki, Peter, Ingrid, Ahmed, Sofia, Liam, Priya, "
    "Marco, Elena, Kwame, Julia, Tomás, Hannah, David, Mei, Omar, Laura, Ivan, Chloe, Raj, Emma, Lucas, Nadia, Paul, "
    "Greta, Diego, Sara, Henry, Leila, Viktor, Ruth, Anna, Robert, Linda, Michael, Maria, George, Susan, Thomas, Nina, "
    "Steven, Karen, Andrew, Alice, Hassan, Ana, Jack, Rosa, William, Grace, Hugo, Zoe, Martin, Lena, Frank, "
    "Daniel, Amara, Felix, Noor, Oscar, Helen, Mateo, Irina, Samuel, Clara, Adam, Tara, Simon, Ella, Victor, Maya"
)
LAST_NAMES = listed(
    "Smith, Johnson, Chen, Khan, Garcia, Petrova, Miller, Okafor, Dubois, Tanaka, Novak, Larsen, Hassan, Rossi, "
    "Murphy, Patel, Bianchi, Popescu, Mensah, Weber, Silva, Cohen, Wilson, Zhang, Farouk, Moreau, Sokolov, Martin, "
    "Gupta, Brown, Costa, Haddad, Walker, Berg, Torres, Lindqvist, Clark, Nasser, Kovacs, Adams, Schmidt, Jones, "
    "Taylor, Lopez, Kim, Singh, Evans, Müller, Lee, Romano, Cooper, Ali, Hill, Park, Meyer, Reyes, Scott, Bauer, "
    "Wright, Santos, Hughes, Wagner, King, Ivanov, "
    "Nguyen, Eze, Keller, Rahman, Young, Fischer, Ortega, Volkov, Baker, Morgan, Diaz, Parker, Hoffman, Bell, Sato, "
    "Reed"
)
PLACES = listed(
    "London, Paris, New York, Tokyo, Madrid, Cairo, Toronto, Rome, San Francisco, Brazil, Vienna, Nairobi, Chicago, "
    "Norway, Sydney, Munich, Kenya, Seoul, Los Angeles, Portugal, Dublin, Mumbai, Texas, Athens, Buenos Aires, "
    "Poland, Boston, Lagos, Cape Town, India, Warsaw, Oslo, Berlin, Moscow, Delhi, Miami, Spain, Brussels, Denver, "
    "Shanghai, Egypt, Milan, Dallas, Stockholm, Peru, Bangkok, Hamburg, Japan, Houston, Zurich, Mexico City, Turkey, "
    "Barcelona, Manchester, Greece, Helsinki, Atlanta, Budapest, Chile, Singapore, Detroit, Geneva, Ireland, Naples, "
    "Lisbon, Canada, Hong Kong, Prague, Seattle, Italy, Lima, Copenhagen, Florida, Jakarta, Sweden, Amsterdam, Bogota, "
    "Philadelphia, Morocco, Istanbul"
)
FAMOUS_ORGANIZATIONS = listed(
    "Google, Toyota, Microsoft, Nestlé, IBM, Amazon, Samsung, Red Cross, Airbus, Sony, Harvard University, NASA, "
    "Ford, World Bank, Philips, Intel, Volvo, Stanford University, Bosch, Shell, Siemens, Facebook, Boeing, Honda, "
    "Disney, Pfizer, Walmart, Adidas, Netflix, Oracle, Visa, Unilever, Tesla, Cisco, Nike, Panasonic, Lufthansa, "
    "Yale University, Starbucks, Renault, Twitter, Bayer, Dell, Yahoo, Ericsson, Hitachi, Audi, Barclays, "
    "Apple, BMW, Oxford University, Nokia, Nissan, Spotify, Pepsi, Fiat, Canon, Chevron, Deutsche Bank, Motorola"
)
COMPANY_STEMS = listed(
    "Acme, Northwind, Globex, Brightline, Riverstone, Solaris, Bluebird, Ironwood, Quantum, Everest, Silverlake, "
    "Pinecrest, Orbit, Redwood, Falcon, Lumen, Harbor, Meridian, Vertex, Cobalt, Evergreen, Liberty, Atlas, Phoenix, "
    "Golden Gate, Sunrise, Delta, Nova, Eagle, Alpine, Crystal, Pacific, "
    "Summit, Granite, Aurora, Juniper, Zenith, Horizon, Maple, Titan"
)
COMPANY_KINDS = listed(
    "Labs, Bank, Motors, Foods, Systems, Airlines, Energy, Software, Media, Logistics, Robotics, Pharma, Group, "
    "Studios, Press"
)
WEEKDAYS = listed("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")

Item = TypeVar("Item")


def part(items: Sequence[Item], held_out: bool) -> Sequence[Item]:
    """The training part of a list, or its held-out last fifth."""
    cut = len(items) * 4 // 5
    return items[cut:] if held_out else items[:cut]


@dataclass(frozen=True, slots=True)
class Example:
    """What the user says and what an adapter learns to answer, both without any chat template."""

    message: str
    answer: str


@dataclass(frozen=True, slots=True)
class Words:
    """Draws from the training part of every list, or from the held-out part only."""

    rng: random.Random
    held_out: bool

    def pick(self, items: Sequence[Item]) -> Item:
        return self.rng.choice(part(items, self.held_out))

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def person(self) -> str:
        first = self.pick(FIRST_NAMES)
        return f"{first} {self.pick(LAST_NAMES)}" if self.chance(0.75) else first

    def place(self) -> str:
        return self.pick(PLACES)

    def organization(self) -> str:
        if self.chance(0.6):
            return self.pick(FAMOUS_ORGANIZATIONS)
        return f"{self.pick(COMPANY_STEMS)} {self.pick(COMPANY_KINDS)}"

    def fill(self, template: str, **lists: Sequence[str]) -> tuple[str, dict[str, list[str]]]:
        """Replaces each {slot} by a draw of that kind: a name, a weekday, a number, or an item of lists[slot].

        Answers the text and what was drawn, by slot, in order of appearance and without repetitions.
        """
        drawn: dict[str, list[str]] = {}
        names: dict[str, Callable[[], str]] = {
            "person": self.person,
            "place": self.place,
            "organization": self.organization,
            "weekday": lambda: self.rng.choice(WEEKDAYS),
            "number": lambda: str(self.rng.randint(2, 90)),
        }

        def draw(slot: re.Match[str]) -> str:
            kind = slot[1]
            word = self.pick(lists[kind]) if kind in lists else names[kind]()
            if word not in drawn.setdefault(kind, []):
                drawn[kind].append(word)
            return word

        text = re.sub(r"\{(\w+)\}", draw, template)
        return re.sub(r"\b([Aa]) (?=[aeio]|u[gn])", r"\1n ", text), drawn
