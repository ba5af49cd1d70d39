"""The small invented world behind ``loralab demo``: its words, facts, prose and instructions.

Everything here is generated from the word lists below with a seeded ``random.Random``; nothing is
downloaded or copied.  Two products come out of it:

* *prose*: declarative documents (no question, no instruction template) that pretrain the base
  model.  Facts about freshly combined people are stated once and restated later in other words,
  which is what teaches a small model to find and copy a fact from its context;
* the parts of the *instructions* (questions, answers, passages) that ``build_demo.py`` puts
  together into Alpaca-style rows.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

TOP_SUM = 12


def words(text: str) -> list[str]:
    """Splits a word list written as one string."""
    return text.split()


NAMES = words(
    "Mia Tom Anna Ben Lucy Omar Nina Paul Rosa Ivan Ella Hugo Sara Leo Maya Finn Clara Noah Vera "
    "Jack Ruth Adam Lena Carl Dora Eric Gina Hans Iris Joel Kate Liam Nora Otto Pia Ryan Theo"
)
COLOURS = words("red blue green black white brown grey yellow pink purple golden silver")
ANIMALS = words("cat dog rabbit horse parrot goat duck hamster mouse sheep pony turtle")
PLACES = words(
    "Oslo Paris Rome Lima Cairo Delhi Dublin Berlin Madrid Tokyo Lisbon Vienna Athens Boston "
    "Havana Quito Nairobi Prague Warsaw Zurich"
)
JOBS = words(
    "baker teacher doctor farmer painter singer driver nurse pilot lawyer sailor writer tailor dancer gardener builder"
)
FOODS = words("bread soup rice cheese honey cake fish pasta salad yoghurt chocolate porridge pizza jam toast butter")
ITEMS = words("apples pears plums books coins hats cups balls stamps shells pens boxes keys stones")
OBJECTS = words("key ring letter lamp spoon map watch coin book hat torch ticket")
CONTAINERS = words("box drawer bag kitchen garden cupboard basket garage hall shed tent car")
HOBBIES = words("swims sings runs paints dances cooks reads skates")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
NUMBERS = words(
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
)
OPPOSITES = [
    pair.split("/")
    for pair in words(
        "hot/cold big/small long/short old/new fast/slow wet/dry light/heavy full/empty hard/soft "
        "happy/sad early/late loud/quiet rich/poor clean/dirty strong/weak near/far high/low "
        "deep/shallow wide/narrow thick/thin sweet/sour true/false dark/bright smooth/rough "
        "cheap/costly brave/afraid sharp/blunt safe/risky tidy/messy kind/cruel"
    )
]
PLURALS = [
    pair.split("/")
    for pair in words(
        "cat/cats dog/dogs box/boxes baby/babies mouse/mice child/children foot/feet tooth/teeth "
        "leaf/leaves wolf/wolves glass/glasses bus/buses city/cities story/stories lady/ladies "
        "fox/foxes man/men woman/women goose/geese knife/knives shelf/shelves potato/potatoes "
        "tomato/tomatoes book/books key/keys chair/chairs house/houses bird/birds tree/trees "
        "river/rivers brush/brushes peach/peaches berry/berries party/parties scarf/scarves "
        "thief/thieves hero/heroes watch/watches sheep/sheep road/roads"
    )
]
KINDS = {
    "animal": words("cat dog rabbit horse goat duck lion tiger bear whale"),
    "fruit": words("pear plum peach lemon banana mango cherry melon grape lime"),
    "tool": words("hammer saw drill spade rake chisel wrench file plane shovel"),
    "colour": COLOURS[:10],
    "metal": words("iron copper tin lead zinc gold nickel steel bronze brass"),
}


@dataclass(frozen=True)
class Relation:
    """One kind of fact and every wording of it; ``{n}``, ``{k}``, ``{v}`` are its slots.

    Attributes:
        pools: The word list of each slot.
        statements: How a passage states the fact.
        answer: The wording asked for when the value is wanted.
        topics: Noun phrases (for prose headings) that ask for the value.
        questions: Instructions that ask for the value.
        who_answer: The wording asked for when the holder of the value is wanted.
        who_topics: Noun phrases that ask for the holder.
        who_questions: Instructions that ask for the holder.
    """

    pools: dict[str, list[str]]
    statements: tuple[str, ...]
    answer: str
    topics: tuple[str, ...]
    questions: tuple[str, ...]
    who_answer: str
    who_topics: tuple[str, ...]
    who_questions: tuple[str, ...]


RELATIONS: dict[str, Relation] = {
    "colour": Relation(
        {"n": NAMES, "k": ANIMALS, "v": COLOURS},
        ("{n} has a {v} {k}.", "{n} owns a {v} {k}.", "{n} keeps a {v} {k}."),
        "The {k} of {n} is {v}.",
        ("the colour of {n}'s {k}", "what colour {n}'s {k} is"),
        ("What colour is {n}'s {k}?", "Name the colour of {n}'s {k}.", "Tell me what colour {n}'s {k} is."),
        "The owner of the {v} {k} is {n}.",
        ("who has a {v} {k}", "the owner of a {v} {k}"),
        ("Who has a {v} {k}?", "Name the owner of a {v} {k}."),
    ),
    "home": Relation(
        {"n": NAMES, "v": PLACES},
        ("{n} lives in {v}.", "{n} comes from {v}.", "{n} moved to {v}."),
        "The home of {n} is in {v}.",
        ("the home of {n}", "where {n} lives", "the city of {n}"),
        ("Where does {n} live?", "Name the city of {n}.", "In which city is the home of {n}?"),
        "The person from {v} is {n}.",
        ("who lives in {v}", "the person from {v}"),
        ("Who lives in {v}?", "Name the person from {v}."),
    ),
    "job": Relation(
        {"n": NAMES, "v": JOBS},
        ("{n} is a {v}.", "{n} became a {v}.", "{n} is the {v}."),
        "The work of {n} is that of a {v}.",
        ("the job of {n}", "what job {n} has", "the work of {n}"),
        ("What is the job of {n}?", "What work does {n} do?", "Tell me what job {n} has."),
        "The {v} is {n}.",
        ("who works as a {v}", "the person who is a {v}"),
        ("Who works as a {v}?", "Find the person who is a {v}."),
    ),
    "food": Relation(
        {"n": NAMES, "v": FOODS},
        ("{n} likes {v}.", "{n} eats {v}.", "{n} wants {v}."),
        "The food of {n} is {v}.",
        ("the food of {n}", "what {n} likes", "what {n} eats"),
        ("What does {n} like?", "Which food does {n} like?", "Tell me what {n} eats."),
        "The person who likes {v} is {n}.",
        ("who likes {v}", "the person who eats {v}"),
        ("Who likes {v}?", "Find the person who eats {v}."),
    ),
    "count": Relation(
        {"n": NAMES, "k": ITEMS, "v": NUMBERS[1:]},
        ("{n} has {v} {k}.", "{n} holds {v} {k}.", "{n} bought {v} {k}.", "{n} found {v} {k}."),
        "The number of {k} {n} has is {v}.",
        ("the number of {k} {n} has", "how many {k} {n} has"),
        ("How many {k} does {n} have?", "Give the number of {k} {n} has.", "Count the {k} of {n}."),
        "The person with {v} {k} is {n}.",
        ("who has {v} {k}", "the person with {v} {k}"),
        ("Who has {v} {k}?", "Find the person with {v} {k}."),
    ),
    "pet": Relation(
        {"n": NAMES, "v": ANIMALS},
        ("{n} has a {v}.", "{n} owns a {v}.", "{n} keeps a {v}."),
        "The pet of {n} is a {v}.",
        ("the pet of {n}", "what pet {n} has"),
        ("What pet does {n} have?", "Name the pet of {n}.", "Which animal does {n} have?"),
        "The owner of the {v} is {n}.",
        ("who has a {v}", "the owner of a {v}"),
        ("Who has a {v}?", "Name the owner of a {v}."),
    ),
    "day": Relation(
        {"n": NAMES, "k": HOBBIES, "v": DAYS},
        ("{n} {k} on {v}.", "{n} {k} every {v}."),
        "The day when {n} {k} is {v}.",
        ("the day when {n} {k}", "when {n} {k}"),
        ("Name the day when {n} {k}.", "Tell me when {n} {k}."),
        "The person who {k} on {v} is {n}.",
        ("who {k} on {v}", "the person who {k} on {v}"),
        ("Who {k} on {v}?", "Find the person who {k} on {v}."),
    ),
    "where": Relation(
        {"n": OBJECTS, "v": CONTAINERS},
        ("The {n} is in the {v}.", "The {n} lies in the {v}.", "The {n} stays in the {v}."),
        "The {n} is in the {v}.",
        ("the place of the {n}", "where the {n} is"),
        ("Where is the {n}?", "In what place is the {n}?", "Tell me where the {n} is."),
        "The thing in the {v} is the {n}.",
        ("what is in the {v}", "the thing in the {v}"),
        ("What is in the {v}?", "Name the thing in the {v}."),
    ),
}
ABOUT_PEOPLE = [name for name in RELATIONS if name != "where"]
# A name that "has a cat" and "has a red dog" would leave "what pet" open, so these never meet.
CLASHES = {("colour", "pet"), ("pet", "colour")}
HEADINGS = ("This page tells {}.", "A note on {}.", "These lines show {}.", "About {}.")
DRILL_WORDS = NAMES + COLOURS + ANIMALS + PLACES + JOBS + FOODS + ITEMS + NUMBERS
# Shares of passages on one person, of those with a thing as well, and of phrases that ask for a value.
PROFILE_SHARE, THING_SHARE, WHAT_SHARE = 0.85, 0.45, 0.55
MOST_NOTES, HEADED_SHARE = 5, 0.7
KNOWLEDGE_TOPICS = {
    "opposite": "the opposite of {}",
    "plural": "the plural of {}",
    "kind": "what kind of thing {} is",
    "sum": "what {} is",
    "after": "what comes after {}",
}
# A passage never starts with a name: at the start of a line it would be another token than elsewhere,
# and a small model would have to learn that the two are one name.  Answers start with "The" likewise.
LEADS = ("Some facts.", "This is known.", "Here is the news.", "This was said.")


# The name of a relation and what fills its slots.
Fact = tuple[str, dict[str, str]]


@dataclass(frozen=True)
class Passage:
    """A few sentences and the facts they state, in order of appearance."""

    text: str
    facts: tuple[Fact, ...]


def upper_first(text: str) -> str:
    """Returns the text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def listing(parts: list[str]) -> str:
    """Joins words as English does: ``a, b and c``."""
    return ", ".join(parts[:-1]) + " and " + parts[-1]


def pick_relations(rng: random.Random, first: str | None = None) -> list[str]:
    """Picks one or two relations that may share a passage, led by ``first`` if given."""
    first = first or rng.choice(list(RELATIONS))
    others = [r for r in ABOUT_PEOPLE if r != first and (first, r) not in CLASHES]
    if first == "where" or rng.random() < 0.5:
        return [first]
    return [first, rng.choice(others)]


def make_passage(rng: random.Random, size: int, first: str | None = None) -> Passage:
    """States one or two relations of ``size`` freshly combined people (or objects).

    Args:
        rng: The source of all choices.
        size: How many people the passage is about.
        first: A relation that must be stated, or None for any.

    Returns:
        The passage; names and values are distinct within each relation, so both "what" and "who"
        have one answer.
    """
    relations = pick_relations(rng, first)
    holders = rng.sample(RELATIONS[relations[0]].pools["n"], size)
    columns = {
        (r, slot): rng.sample(pool, size) for r in relations for slot, pool in RELATIONS[r].pools.items() if slot != "n"
    }
    people = []
    for row, holder in enumerate(holders):
        facts = [(r, {"n": holder} | {s: c[row] for (owner, s), c in columns.items() if owner == r}) for r in relations]
        rng.shuffle(facts)
        people.append(facts)
    stated = [fact for facts in people for fact in facts]
    sentences = [rng.choice(RELATIONS[r].statements).format(**slots) for r, slots in stated]
    return Passage(" ".join([rng.choice(LEADS), *sentences]), tuple(stated))


def make_profile(rng: random.Random) -> Passage:
    """States three to five different facts of one person, and sometimes where a thing is."""
    left_out = rng.choice(("pet", "colour"))  # see CLASHES
    names = rng.sample([r for r in ABOUT_PEOPLE if r != left_out], rng.randint(3, 5))
    if rng.random() < THING_SHARE:
        names[-1] = "where"
    rng.shuffle(names)
    person = rng.choice(NAMES)
    facts = []
    for name in names:
        slots = {slot: rng.choice(pool) for slot, pool in RELATIONS[name].pools.items()}
        facts.append((name, slots if name == "where" else slots | {"n": person}))
    sentences = [rng.choice(RELATIONS[r].statements).format(**slots) for r, slots in facts]
    return Passage(" ".join([rng.choice(LEADS), *sentences]), tuple(facts))


def any_passage(rng: random.Random) -> Passage:
    """Makes a passage on one person (mostly) or on a few people."""
    return make_profile(rng) if rng.random() < PROFILE_SHARE else make_passage(rng, rng.randint(2, 3))


def topic_and_answer(rng: random.Random, fact: Fact) -> tuple[str, str]:
    """Returns a noun phrase for a fact, from its holder or from its value, and the fact in plain words."""
    name, slots = fact
    relation = RELATIONS[name]
    if rng.random() < WHAT_SHARE:
        topic, answer = rng.choice(relation.topics), relation.answer
    else:
        topic, answer = rng.choice(relation.who_topics), relation.who_answer
    return topic.format(**slots), answer.format(**slots)


def topic_document(rng: random.Random) -> str:
    """A heading that names one fact, a passage, and that fact restated."""
    passage = any_passage(rng)
    topic, answer = topic_and_answer(rng, rng.choice(passage.facts))
    return f"{rng.choice(HEADINGS).format(topic)}\n\n{passage.text}\n\n{answer}"


def notes_document(rng: random.Random) -> str:
    """A passage and then notes on it, each a noun phrase and the fact it stands for."""
    passage = any_passage(rng)
    noted = rng.sample(passage.facts, min(len(passage.facts), MOST_NOTES))
    pairs = [topic_and_answer(rng, fact) for fact in noted]
    return f"{passage.text}\n\n" + "\n".join(f"{upper_first(topic)}:\n{answer}" for topic, answer in pairs)


def retold_document(rng: random.Random) -> str:
    """A passage whose facts are told again several times, each time in another order and wording."""
    passage = any_passage(rng)
    told = [passage.text]
    for _ in range(rng.randint(2, 4)):
        for name, slots in rng.sample(passage.facts, len(passage.facts)):
            relation = RELATIONS[name]
            wordings = (*relation.statements, relation.answer, relation.who_answer)
            told.append(rng.choice(wordings).format(**slots))
    return " ".join(told)


def people_document(rng: random.Random) -> str:
    """A passage with a list of its people, or its first or last person."""
    passage = make_passage(rng, rng.randint(2, 4), rng.choice(ABOUT_PEOPLE))
    topic, answer = rng.choice(people_facts(passage))
    return f"{rng.choice(HEADINGS).format(topic)}\n\n{passage.text}\n\n{answer}"


def people_facts(passage: Passage) -> list[tuple[str, str]]:
    """Topic and answer of each fact about who is named in a passage."""
    names = list(dict.fromkeys(slots["n"] for _, slots in passage.facts))
    return [
        ("all the people", f"The people are {listing(names)}."),
        ("the first person", f"The first person is {names[0]}."),
        ("the last person", f"The last person is {names[-1]}."),
    ]


def knowledge_facts() -> dict[str, list[tuple[str, str]]]:
    """General knowledge as ``(subject, sentence)`` pairs, by task."""
    facts: dict[str, list[tuple[str, str]]] = {}
    facts["opposite"] = [(a, f"The opposite of {a} is {b}.") for x, y in OPPOSITES for a, b in ((x, y), (y, x))]
    facts["plural"] = [(one, f"The plural of {one} is {many}.") for one, many in PLURALS]
    facts["kind"] = [
        (word, f"{upper_first(word)} is {'an' if kind[0] in 'aeiou' else 'a'} {kind}.")
        for kind, members in KINDS.items()
        for word in members
    ]
    facts["sum"] = [
        (f"{a} plus {b}", f"{upper_first(a)} plus {b} is {NUMBERS[i + j + 1]}.")
        for i, a in enumerate(NUMBERS)
        for j, b in enumerate(NUMBERS)
        if i + j + 2 <= TOP_SUM
    ]
    facts["after"] = [(a, f"{b} comes after {a}.") for a, b in zip(DAYS, DAYS[1:] + DAYS[:1], strict=True)] + [
        (a, f"{upper_first(b)} comes after {a}.") for a, b in pairwise(NUMBERS)
    ]
    return facts


def knowledge_document(rng: random.Random, facts: dict[str, list[tuple[str, str]]]) -> str:
    """A heading and the piece of general knowledge it names, or a few sentences of one kind."""
    task = rng.choice(list(facts))
    if rng.random() < HEADED_SHARE:
        subject, sentence = rng.choice(facts[task])
        return f"{rng.choice(HEADINGS).format(KNOWLEDGE_TOPICS[task].format(subject))}\n\n{sentence}"
    return " ".join(sentence for _, sentence in rng.sample(facts[task], 6))


def number_document(rng: random.Random) -> str:
    """A heading with a few numbers and a sentence on their order."""
    topic, answer = number_fact(rng)
    return f"{rng.choice(HEADINGS).format(topic)}\n\n{answer}"


def number_fact(rng: random.Random) -> tuple[str, str]:
    """The larger of two numbers, or three numbers in order."""
    picks = rng.sample(range(len(NUMBERS)), 3)
    named = [NUMBERS[i] for i in picks]
    if rng.random() < 0.5:
        low, high = sorted(picks[:2])
        answer = f"{upper_first(NUMBERS[high])} is larger than {NUMBERS[low]}."
        return f"which is larger, {named[0]} or {named[1]}", answer
    answer = f"The order is {listing([NUMBERS[i] for i in sorted(picks)])}."
    return f"the order of {listing(named)}", answer


def drill_document(rng: random.Random) -> str:
    """A chant: the same few words said again and again."""
    line = " ".join(rng.sample(DRILL_WORDS, rng.randint(3, 9)))
    return ". ".join([line] * rng.randint(3, 6)) + "."
