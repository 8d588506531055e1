"""Forms of sentence in modern and in early modern English, side by side.

A `Writer` draws people, things and verbs of one topic from lists.toml; every function here makes
one pair of sentences of them. Knows nothing of files.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

DOUBLES = {"cut", "drop", "dig", "stir", "forget"}
Form = Callable[["Writer"], "Pair"]


@dataclass(frozen=True, slots=True)
class Pair:
    """One meaning in both tongues."""

    modern: str
    early: str


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb's forms; those with thou and with he are made by rule."""

    base: str
    past: str
    done: str

    @property
    def stem(self) -> str:
        if self.base in DOUBLES:
            return self.base + self.base[-1]
        if self.base.endswith("y") and self.base[-2] not in "aeo":
            return self.base[:-1] + "i"
        return self.base.removesuffix("e") if not self.base.endswith("ee") else self.base

    @property
    def thou(self) -> str:
        return self.stem + "est"

    @property
    def eth(self) -> str:
        return self.stem + "eth"

    @property
    def he(self) -> str:
        if self.base.endswith("y") and self.base[-2] not in "aeo":
            return self.base[:-1] + "ies"
        return self.base + ("es" if self.base.endswith(("s", "sh", "ch", "x")) else "s")


class Writer:
    """Draws the parts of one pair, all of one topic."""

    def __init__(self, rng: Random, lists: dict[str, Any]) -> None:
        self.rng = rng
        self._lists = lists
        self.topic = rng.choice(lists["topics"])
        self.person, self.other = rng.sample(self.topic["people"], 2)
        self.thing, self.second = rng.sample(self.topic["things"], 2)
        self.place = rng.choice(self.topic["places"])
        self.adjective, self.opposite = rng.sample(self.topic["adjectives"], 2)
        self.verb, self.verb2 = (
            Verb(*forms.split()) for forms in rng.sample(self.topic["verbs"], 2)
        )

    def both(self, kind: str) -> Pair:
        """Return a phrase of a kind in both tongues."""
        return Pair(*self.rng.choice(list(self._lists[kind].items())))

    def pick(self, *options: str) -> str:
        """Return one of several wordings."""
        return self.rng.choice(options)

    def one_of(self, *pairs: tuple[str, str]) -> Pair:
        """Return one of several pairs."""
        return Pair(*self.rng.choice(pairs))

    @property
    def noun(self) -> str:
        """The thing without its article."""
        return self.thing.removeprefix("the ")

    @property
    def a_noun(self) -> str:
        return ("an " if self.noun[0] in "aeiou" else "a ") + self.noun


def statement(w: Writer) -> Pair:
    v, s, o = w.verb, w.person, w.thing
    habit = w.both("habits")
    early = w.pick(f"{habit.early} doth {s} {v.base} {o}.", f"{s} {habit.early} {v.eth} {o}.")
    place = f"{s} {habit.modern} {v.he} {o}."
    if " " in habit.modern:
        place, early = f"{s} {v.he} {o} {habit.modern}.", f"{habit.early} {v.eth} {s} {o}."
    return Pair(place, early)


def denial(w: Writer) -> Pair:
    v, s, o = w.verb, w.person, w.thing
    return w.one_of(
        (f"{s} doesn't {v.base} {o}.", f"{s} {v.eth} not {o}."),
        (f"{s} did not {v.base} {o}.", f"{o} did {s} not {v.base}."),
        (f"I don't {v.base} {o}.", f"I {v.base} not {o}."),
        (f"we do not {v.base} {o} in {w.place}.", f"within {w.place} do we not {v.base} {o}."),
        (f"nobody {v.past} {o}.", f"none there was that did {v.base} {o}."),
        (f"I have never {v.done} {o}.", f"never have I {v.done} {o}."),
        (f"you never {v.base} {o}.", f"never dost thou {v.base} {o}."),
        (f"{s} hasn't {v.done} anything.", f"naught hath {s} {v.done}."),
        (f"I {v.past} nothing.", f"naught did I {v.base}."),
    )


def thou_question(w: Writer) -> Pair:
    v, o = w.verb, w.thing
    return w.one_of(
        (f"do you {v.base} {o}?", f"{v.thou} thou {o}?"),
        (f"why do you {v.base} {o}?", f"wherefore {v.thou} thou {o}?"),
        (f"why did you {v.base} {o}?", f"wherefore didst thou {v.base} {o}?"),
        (f"have you {v.done} {o}?", f"hast thou {v.done} {o}?"),
        (f"will you {v.base} {o}?", f"wilt thou {v.base} {o}?"),
        (f"how often do you {v.base} {o}?", f"how oft {v.thou} thou {o}?"),
        (f"when did you {v.base} {o}?", f"when didst thou {v.base} {o}?"),
        (f"can you {v.base} {o}?", f"canst thou {v.base} {o}?"),
        (f"would you {v.base} {o} for me?", f"wouldst thou {v.base} {o} for my sake?"),
        (f"did you really {v.base} {o}?", f"didst thou in very truth {v.base} {o}?"),
        (f"what did you do with {o}?", f"what hast thou done with {o}?"),
        (f"are you going to {v.base} {o}?", f"dost thou mean to {v.base} {o}?"),
    )


def other_question(w: Writer) -> Pair:
    v, s, o = w.verb, w.person, w.thing
    return w.one_of(
        (f"who {v.past} {o}?", f"who hath {v.done} {o}?"),
        (f"where is {o}?", f"where is {o}, I pray thee?"),
        (f"did {s} {v.base} {o}?", f"hath {s} {v.done} {o}?"),
        (f"why does {s} {v.base} {o}?", f"wherefore doth {s} {v.base} {o}?"),
        (f"when will {s} come to {w.place}?", f"when cometh {s} unto {w.place}?"),
        (f"is {o} still in {w.place}?", f"is {o} yet within {w.place}?"),
        (f"what is the matter with {s}?", f"what aileth {s}?"),
        (f"how {w.adjective} is {o}?", f"{w.adjective} is {o}, but in what measure?"),
        (f"does anyone {v.base} {o}?", f"doth any man {v.base} {o}?"),
    )


def command(w: Writer) -> Pair:
    v, o = w.verb, w.thing
    return w.one_of(
        (f"don't {v.base} {o}!", f"{v.base} not {o}!"),
        (f"please {v.base} {o}.", f"prithee, {v.base} {o}."),
        (f"never {v.base} {o} again.", f"never more {v.base} thou {o}."),
        (f"let's {v.base} {o}.", f"come, let us {v.base} {o}."),
        (f"bring {o} to {w.place}.", f"bear {o} unto {w.place}."),
        (f"come here and {v.base} {o}.", f"come hither and {v.base} {o}."),
        (f"give me {o}.", f"give {o} unto me."),
        (f"put {o} back in {w.place}.", f"into {w.place} put thou {o} again."),
        (f"keep away from {o}.", f"come not nigh {o}."),
        (f"hurry, or you will miss {o}.", f"make haste, or thou shalt miss {o}."),
    )


def condition(w: Writer) -> Pair:
    v, threat = w.verb, w.both("threats")
    return w.one_of(
        (f"if you {v.base} {w.thing}, {threat.modern}.",
         f"an thou {v.base} {w.thing}, {threat.early}."),
        (f"{v.base} {w.thing}, and {threat.modern}.",
         f"{v.base} thou {w.thing}, and {threat.early}."),
        (f"if you don't {v.base} {w.thing}, {threat.modern}.",
         f"if thou {v.base} not {w.thing}, {threat.early}."),
        (f"when you have {v.done} {w.thing}, {threat.modern}.",
         f"when thou hast {v.done} {w.thing}, {threat.early}."),
    )  # fmt: skip


def past(w: Writer) -> Pair:
    v, s, o, time = w.verb, w.person, w.thing, w.both("times")
    return w.one_of(
        (f"{s} {v.past} {o} {time.modern}.", f"{time.early} did {s} {v.base} {o}."),
        (f"I {v.past} {o} {time.modern}.", f"{time.early} did I {v.base} {o}."),
        (f"we {v.past} {o} in {w.place} {time.modern}.",
         f"{time.early} in {w.place} did we {v.base} {o}."),
        (f"{time.modern} you {v.past} {o}.", f"{time.early} didst thou {v.base} {o}."),
        (f"{s} has {v.done} {o}.", f"{o} hath {s} {v.done}."),
        (f"{s} came to {w.place} {time.modern}.", f"{time.early} unto {w.place} came {s}."),
        (f"someone {v.past} my {w.noun}.", f"some knave hath {v.done} my {w.noun}."),
        (f"{o} was {v.done} {time.modern}.", f"{time.early} was {o} {v.done}."),
        (f"you have {v.done} my {w.noun}!", f"thou hast {v.done} my {w.noun}!"),
    )  # fmt: skip


def future(w: Writer) -> Pair:
    v, s, o, time = w.verb, w.person, w.thing, w.both("future_times")
    return w.one_of(
        (f"{s} will {v.base} {o} {time.modern}.", f"{time.early} shall {s} {v.base} {o}."),
        (f"I will {v.base} {o} {time.modern}.", f"{time.early} will I {v.base} {o}."),
        (f"you will {v.base} {o} {time.modern}.", f"{time.early} shalt thou {v.base} {o}."),
        (f"I'm going to {w.place} {time.modern}.", f"{time.early} go I unto {w.place}."),
        (f"I will never {v.base} {o} again.", f"never more shall I {v.base} {o}."),
        (f"maybe {s} will {v.base} {o}.", f"perchance {s} shall {v.base} {o}."),
        (f"meet me at {w.place} {time.modern}.", f"{time.early} meet me by {w.place}."),
    )


def quality(w: Writer) -> Pair:
    s, o, a, b = w.person, w.thing, w.adjective, w.opposite
    return w.one_of(
        (f"{o} is {a}.", f"{a} is {o}."),
        (f"{o} is very {a}.", f"passing {a} is {o}."),
        (f"{o} is too {a}.", f"too {a} is {o}."),
        (f"your {w.noun} is {a}.", f"{a} is thy {w.noun}."),
        (f"{o} was {a}, but {w.second} was {b}.", f"{a} was {o}, yet {b} was {w.second}."),
        (f"what a {a} {w.noun}!" if a[0] not in "aeiou" else f"what an {a} {w.noun}!",
         f"O, what a most {a} {w.noun} is this!"),
        (f"I have never seen such a {a} {w.noun}."
         if a[0] not in "aeiou" else f"I have never seen such an {a} {w.noun}.",
         f"so {a} a {w.noun} saw I never."),
        (f"{o} isn't as {a} as {s} says.", f"not so {a} is {o} as {s} saith."),
        (f"{o} is neither {a} nor {b}.", f"nor {a} nor {b} is {o}."),
        (f"{o} is {a} and {b}.", f"{a} is {o}, and {b} withal."),
        (f"this {w.noun} seems {a} to me.", f"{a} doth this {w.noun} seem unto me."),
    )  # fmt: skip


def opinion(w: Writer) -> Pair:
    v, s, o = w.verb, w.person, w.thing
    return w.one_of(
        (f"I think {s} {v.past} {o}.", f"methinks {s} did {v.base} {o}."),
        (f"I think that {o} is {w.adjective}.", f"methinks {o} is {w.adjective}."),
        (f"you should {v.base} {o}.", f"thou shouldst {v.base} {o}."),
        (f"you must not {v.base} {o}.", f"thou must not {v.base} {o}."),
        (f"I would rather {v.base} {o} than {w.verb2.base} {w.second}.",
         f"liefer would I {v.base} {o} than {w.verb2.base} {w.second}."),
        (f"I want to {v.base} {o}.", f"fain would I {v.base} {o}."),
        (f"I hope {s} will {v.base} {o}.", f"God grant that {s} {v.base} {o}."),
        (f"I know that you {v.past} {o}.", f"well know I that thou didst {v.base} {o}."),
        (f"I doubt that {s} {v.past} {o}.", f"that {s} did {v.base} {o}, I much doubt."),
        (f"it's wrong to {v.base} {o}.", f"'tis ill done to {v.base} {o}."),
        (f"I had to {v.base} {o}.", f"I must needs {v.base} {o}."),
    )  # fmt: skip


def report(w: Writer) -> Pair:
    v, s, t, o = w.verb, w.person, w.other, w.thing
    return w.one_of(
        (f"{s} told me that you {v.past} {o}.", f"{s} hath told me that thou didst {v.base} {o}."),
        (f"{s} says that {t} {v.past} {o}.", f"{s} saith that {t} hath {v.done} {o}."),
        (f"they say {o} is {w.adjective}.", f"{w.adjective}, they say, is {o}."),
        (f"ask {s} about {o}.", f"of {o} ask thou {s}."),
        (f"I heard that {s} is in {w.place}.", f"I hear that in {w.place} bideth {s}."),
        (f"{s} promised to {v.base} {o}.", f"to {v.base} {o} did {s} promise."),
        (f"{s} swears that {o} is {w.adjective}.", f"{s} sweareth that {o} is {w.adjective}."),
    )


def two_clauses(w: Writer) -> Pair:
    v, u, s, o = w.verb, w.verb2, w.person, w.thing
    reaction = w.both("reactions")
    return w.one_of(
        (f"when I {v.past} {o}, {reaction.modern}.", f"when I did {v.base} {o}, {reaction.early}."),
        (f"{s} {v.past} {o}, and {reaction.modern}.",
         f"{s} did {v.base} {o}, whereat {reaction.early}."),
        (f"{s} went to {w.place} and {v.past} {o}.",
         f"unto {w.place} went {s}, and there did {v.base} {o}."),
        (f"{s} {v.he} {o}, but I {u.base} {w.second}.",
         f"{s} {v.eth} {o}, yet {w.second} do I {u.base}."),
        (f"before {s} came, I {v.past} {o}.", f"ere {s} came, I did {v.base} {o}."),
        (f"because {s} {v.past} {o}, {reaction.modern}.",
         f"for that {s} did {v.base} {o}, {reaction.early}."),
        (f"{s} who {v.past} {o} is in {w.place}.", f"in {w.place} is {s} that did {v.base} {o}."),
        (f"after you {v.past} {o}, {reaction.modern}.",
         f"when thou hadst {v.done} {o}, {reaction.early}."),
        (f"although {o} was {w.adjective}, {s} {v.past} it.",
         f"{w.adjective} though {o} was, yet {s} did {v.base} it."),
        (f"{o} was so {w.adjective} that {reaction.modern}.",
         f"so {w.adjective} was {o} that {reaction.early}."),
    )  # fmt: skip


def possession(w: Writer) -> Pair:
    s, o, n = w.person, w.thing, w.noun
    return w.one_of(
        (f"I have no {n}.", f"{n} have I none."),
        (f"you have my {n}.", f"thou hast my {n}."),
        (f"there is no {n} in {w.place}.", f"in {w.place} is there no {n}."),
        (f"there is {w.a_noun} in {w.place}.", f"in {w.place} there lieth {w.a_noun}."),
        (f"{s} has two of them, and I have none.", f"two of them hath {s}, and I have none."),
        (f"{o} belongs to {s}.", f"unto {s} belongeth {o}."),
        (f"is this your {n}?", f"is this thy {n}?"),
        (f"where did you get that {n}?", f"whence hadst thou that {n}?"),
        (f"I lost my {n} in {w.place}.", f"within {w.place} lost I my {n}."),
        (f"without {o} we are lost.", f"we are undone without {o}."),
        (f"I need {w.a_noun}.", f"of {w.a_noun} stand I in need."),
    )


def about_you(w: Writer) -> Pair:
    a, s, o = w.adjective, w.person, w.thing
    return w.one_of(
        (f"you remind me of {s}.", f"thou puttest me in mind of {s}."),
        (f"you are worse than {s}.", f"worse art thou than {s}."),
        (f"you look like {s}.", f"thou hast the very look of {s}."),
        (f"I saw you with {s} in {w.place}.", f"in {w.place} saw I thee with {s}."),
        (f"you are as {a} as {o}.", f"as {a} as {o} art thou."),
        (f"I gave you {o}, and you lost it.", f"{o} I gave thee, and thou hast lost it."),
        (f"{s} was looking for you.", f"{s} did seek thee."),
        (f"you and {s} are friends.", f"thou and {s} be friends."),
        (f"you were in {w.place} with {o}.", f"thou wast in {w.place} with {o}."),
        (f"I'd like to show you {o}.", f"fain would I show thee {o}."),
        (f"did {s} see you in {w.place}?", f"did {s} see thee in {w.place}?"),
    )


FORMS: tuple[tuple[Form, int], ...] = (
    (statement, 7), (denial, 9), (thou_question, 12), (other_question, 8), (command, 9),
    (condition, 9), (past, 12), (future, 8), (quality, 11), (opinion, 11), (report, 8),
    (two_clauses, 14), (possession, 9), (about_you, 10),
)  # fmt: skip


def capitalised(text: str) -> str:
    """Return the text with its first letter in upper case, after a ' where there is one."""
    first = next(i for i, letter in enumerate(text) if letter.isalpha())
    return text[:first] + text[first].upper() + text[first + 1 :]


def decorated(w: Writer, pair: Pair) -> Pair:
    """Return a pair with a capital, now and then with an opener before it or a call after it."""
    chance = w.rng.random()
    modern, early = pair.modern, pair.early
    if chance < 0.2 and modern.endswith("."):
        opener = w.both("openers")
        modern, early = f"{opener.modern} {modern}", f"{opener.early} {early}"
    elif chance < 0.35 and modern.endswith("?"):
        call = w.both("calls")
        modern, early = f"{modern[:-1]}, {call.modern}?", f"{early[:-1]}, {call.early}?"
    return Pair(capitalised(modern), capitalised(early))
