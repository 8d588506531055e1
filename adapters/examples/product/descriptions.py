"""A product's facts as an attribute list, and as a description that tells all of them and no more.

The description's first line is the name; the second is a paragraph of two or three sentences.
Knows nothing of files.
"""

from dataclasses import dataclass
from random import Random
from typing import Any

NAME_BY_SYLLABLES = 0.4
CHANCES = {
    "material": 0.8, "colour": 0.55, "measure": 0.7, "features": 0.85, "for": 0.65,
    "guarantee": 0.2, "origin": 0.2, "price": 0.2,
}  # fmt: skip
KEYS = {
    "name": ("name", "product", "title"),
    "kind": ("type", "kind", "category", "what"),
    "material": ("material", "made of", "materials"),
    "colour": ("colour", "color"),
    "features": ("features", "feature", "special", "with"),
    "for": ("for", "audience", "good for", "target group"),
    "guarantee": ("guarantee", "warranty"),
    "origin": ("origin", "made in"),
    "price": ("price", "costs"),
}


@dataclass(frozen=True, slots=True)
class Product:
    """A name, a kind and some facts; `measure_key` says what the measure is of."""

    name: str
    kind: str
    measure_key: str
    facts: dict[str, str]
    features: list[str]


def with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def joined(parts: list[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def invented_name(rng: Random, names: dict[str, list[str]]) -> str:
    """Return a word of the list or of syllables, sometimes with a tail."""
    if rng.random() < NAME_BY_SYLLABLES:
        first = (rng.choice(names["starts"]) + rng.choice(names["ends"])).capitalize()
    else:
        first = rng.choice(names["words"])
    return f"{first} {rng.choice(names['tails'])}" if rng.random() < 0.5 else first


def invented_product(rng: Random, lists: dict[str, Any], split: str) -> Product:
    """Return a product of one of the split's kinds with at least three facts."""
    kind = rng.choice(lists[split])
    names = lists["names"]["train" if split == "train" else "test"]
    measure_key, _, values = kind["measure"].partition(": ")
    while True:
        chosen = [fact for fact, chance in CHANCES.items() if rng.random() < chance]
        if 3 <= len(chosen) <= 5:
            break
    pools = {
        "material": kind["materials"], "colour": lists["colours"], "measure": values.split(", "),
        "for": kind["for"], "guarantee": lists["guarantees"], "origin": lists["origins"],
        "price": lists["prices"],
    }  # fmt: skip
    facts = {fact: rng.choice(pools[fact]) for fact in chosen if fact in pools}
    features = rng.sample(kind["features"], rng.choice((1, 1, 2))) if "features" in chosen else []
    return Product(invented_name(rng, names), kind["kind"], measure_key, facts, features)


def attribute_list(rng: Random, product: Product) -> str:
    """Return the product's facts as a person may type them."""
    fields = {"name": product.name, "kind": product.kind} | product.facts
    if product.features:
        fields["features"] = ", ".join(feature.removeprefix("a ") for feature in product.features)
    order = list(fields)
    if rng.random() < 0.6:
        rest = order[2:]
        rng.shuffle(rest)
        order = order[:2] + rest
    elif rng.random() < 0.5:
        rng.shuffle(order)
    keys = {fact: product.measure_key if fact == "measure" else rng.choice(KEYS[fact])
            for fact in order}  # fmt: skip
    style = rng.random()
    if style < 0.5:
        return "; ".join(f"{keys[fact]}: {fields[fact]}" for fact in order)
    if style < 0.75:
        return "\n".join(f"{keys[fact].capitalize()}: {fields[fact]}" for fact in order)
    if style < 0.85:
        return " | ".join(f"{keys[fact]}={fields[fact]}" for fact in order)
    return ", ".join(
        f"for {fields[fact]}" if fact == "for" else fields[fact]
        for fact in sorted(order, key=lambda fact: fact != "name")
    )


class Describer:
    """Writes one product's description, using every fact once."""

    def __init__(self, rng: Random, lists: dict[str, Any], product: Product) -> None:
        self.rng = rng
        self.product = product
        self._measures = lists["measures"]
        self._left = dict(product.facts)

    def pick(self, *options: str) -> str:
        return self.rng.choice(options)

    def take(self, fact: str, chance: float = 1.0) -> str | None:
        """Return a fact that was not told yet and mark it told."""
        if fact in self._left and self.rng.random() < chance:
            return self._left.pop(fact)
        return None

    def noun_phrase(self) -> str:
        """Return the kind, perhaps with its colour, its material and whom it is for."""
        kind = self.product.kind
        phrase = with_article(kind)
        if colour := self.take("colour", 0.7):
            phrase = self.pick(f"{with_article(colour)} {kind}", f"{phrase} in {colour}")
        if material := self.take("material", 0.8):
            phrase += self.pick(" made from ", " made of ", " of ") + material
        if whom := self.take("for", 0.35):
            phrase += f" for {whom}"
        return phrase

    def opening(self) -> str:
        """Return the first sentence, which names the product."""
        name, phrase = self.product.name, self.noun_phrase()
        return self.pick(
            f"The {name} is {phrase}.",
            f"The {name} is {phrase}.",
            f"Meet the {name}, {phrase}.",
            f"{sentence(phrase)[:-1]}: that is the {name}.",
            f"With the {name} you get {phrase}.",
            f"Looking for {with_article(self.product.kind)}? The {name} is {phrase}."
            if phrase != with_article(self.product.kind) else f"Here comes the {name}, {phrase}.",
            f"Here is the {name}: {phrase}.",
            f"{name} is {phrase}.",
            f"Our {name} is {phrase}.",
            f"Say hello to the {name}, {phrase}.",
            f"This is the {name}, {phrase}.",
        )  # fmt: skip

    def clauses(self) -> list[str]:
        """Return what is left to tell, each as what "it" does."""
        told = []
        if features := self.product.features:
            told.append(self.pick("has", "comes with", "offers", "brings", "is fitted with")
                        + " " + joined(features))  # fmt: skip
        if measure := self.take("measure"):
            told.append(self.rng.choice(self._measures[self.product.measure_key])
                        .replace("{v}", measure))  # fmt: skip
        if material := self.take("material"):
            told.append(self.pick("is made from ", "is made of ") + material)
        if colour := self.take("colour"):
            told.append(self.pick("comes in ", "is available in ") + colour)
        if origin := self.take("origin"):
            told.append(self.pick("is made in ", "comes from ") + origin)
        self.rng.shuffle(told)
        if guarantee := self.take("guarantee"):
            told.append(self.pick("comes with a guarantee of ", "carries a guarantee of ")
                        + guarantee)  # fmt: skip
        return told

    def closing(self) -> str | None:
        """Return a last sentence on whom it is for and what it costs, if that is left."""
        whom, price = self.take("for"), self.take("price")
        if whom and price:
            return self.pick(f"Made for {whom}, it costs {price}.",
                             f"Just right for {whom}, and yours for {price}.",
                             f"For {price} it is a fine choice for {whom}.")  # fmt: skip
        if whom:
            return self.pick(f"Just the thing for {whom}.", f"A fine choice for {whom}.",
                             f"Made for {whom}.", f"Ideal for {whom}.",
                             f"It is made with {whom} in mind.")  # fmt: skip
        if price:
            return self.pick(f"It costs {price}.", f"Yours for {price}.",
                             f"All this for {price}.")  # fmt: skip
        return None

    def middle(self, clauses: list[str]) -> str:
        """Return the sentence in the middle."""
        subject = self.pick(
            "It", "It", "It", f"This {self.product.kind}", f"The {self.product.kind}"
        )
        return f"{subject} {joined(clauses)}."

    def text(self) -> str:
        """Return the whole description."""
        parts = [self.opening()]
        clauses, closing = self.clauses(), self.closing()
        if len(clauses) > 2 and not closing:
            parts += [self.middle(clauses[:2]), f"Besides, it {joined(clauses[2:])}."]
        elif clauses:
            parts.append(self.middle(clauses))
        if closing:
            parts.append(closing)
        if len(parts) == 1:
            parts.append(self.pick("Simple and good.", "Nothing more, nothing less.",
                                   "You will like it."))  # fmt: skip
        return f"{self.product.name}\n{' '.join(parts)}"
