"""The prose that the vision base learns: true sentences about a scene, none of them a question.

In a sentence ``{c:red}`` marks a word that the picture settles once the words before it are read
(c colour, k kind, s size, n number, v verdict, r relation).  Such words weigh more in training and
are what the probe counts; the marks themselves never reach the model.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vision_world import COLORS, KINDS, SIZES, Scene, Shape

NUMBERS = ("no", "one", "two", "three", "four")
MARK = re.compile(r"\{([a-z]):([^}]*)\}")
PRESENT = (
    "there is {a}",
    "there is {a} in the image",
    "the image contains {a}",
    "the picture contains {a}",
    "{a} is present",
    "{a} is in the picture",
)
ABSENT = (
    "there is no {}",
    "there is not a {}",
    "there is not a {} in the image",
    "the image does not contain a {}",
    "the picture does not contain a {}",
    "no {} is present",
    "no {} is in the picture",
)
# A claim, and behind it whether the picture bears it out.
VERDICTS = (
    ("{}, and that is {{v:{}}}", ("true", "false")),
    ("{}: {{v:{}}}", ("right", "wrong")),
    ("the note says that {}, which is {{v:{}}}", ("true", "false")),
    ("someone thinks {} and is {{v:{}}}", ("right", "wrong")),
)


@dataclass(frozen=True)
class Look:
    """What is asked of a shape; an empty field lets all pass."""

    size: str = ""
    color: str = ""
    kind: str = ""

    def fits(self, shape: Shape) -> bool:
        """Whether a shape looks so."""
        return all(
            not asked or asked == had
            for asked, had in ((self.size, shape.size), (self.color, shape.color), (self.kind, shape.kind))
        )

    def count(self, scene: Scene) -> int:
        """How many shapes of a scene look so."""
        return sum(map(self.fits, scene.shapes))

    def words(self, many: bool = False) -> str:
        """The look in words: "small red circle", "red shapes"."""
        noun = (self.kind or "shape") + ("es" if many and self.kind == "cross" else "s" if many else "")
        return " ".join(word for word in (self.size, self.color, noun) if word)


def _a(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def plain(text: str) -> str:
    """The text without its marks."""
    return MARK.sub(r"\2", text)


def seen_look(rng: random.Random, scene: Scene) -> Look:
    """A look that at least one shape has: some of its properties."""
    shape = rng.choice(scene.shapes)
    size = shape.size if rng.random() < 0.25 else ""
    which = rng.choice(("color", "kind", "both"))
    return Look(size, shape.color if which != "kind" else "", shape.kind if which != "color" else "")


def unseen_look(rng: random.Random, scene: Scene) -> Look:
    """A look that no shape has: often a look that one has, with one property changed."""
    while True:
        look = seen_look(rng, scene)
        size, color, kind = look.size, look.color, look.kind
        change = rng.choice([name for name in ("size", "color", "kind") if getattr(look, name)])
        if change == "size":
            size = rng.choice(SIZES)
        elif change == "color":
            color = rng.choice(list(COLORS))
        else:
            kind = rng.choice(KINDS)
        changed = Look(size, color, kind)
        # A shape that is neither small nor big settles nothing about sizes.
        told = not size or all(shape.size for shape in scene.shapes)
        if told and not changed.count(scene):
            return changed


def claim(rng: random.Random, scene: Scene, denials: float) -> tuple[str, bool]:
    """A sentence that says of a look that it is there or not, and whether that is so.

    Args:
        rng: The random source.
        scene: What it is about.
        denials: Share of the sentences that say "not there".
    """
    there = rng.random() < 0.5
    look = seen_look(rng, scene) if there else unseen_look(rng, scene)
    says_there = rng.random() < 1 - denials
    words = look.words()
    text = rng.choice(PRESENT).format(a=_a(words)) if says_there else rng.choice(ABSENT).format(words)
    return text, there == says_there


def say_there(rng: random.Random, scene: Scene) -> str:
    """A look that is there, with its number."""
    look = seen_look(rng, scene)
    count = look.count(scene)
    if count == 1 or rng.random() < 0.3:
        return rng.choice(("", "yes, ")) + rng.choice(PRESENT).format(a=_a(look.words()))
    many = f"{NUMBERS[count]} {look.words(many=True)}"
    return rng.choice(("there are {}", "the image contains {}", "{}")).format(many)


def say_absent(rng: random.Random, scene: Scene) -> str:
    """A look that is not there."""
    return rng.choice(("", "no, ")) + rng.choice(ABSENT).format(unseen_look(rng, scene).words())


def say_verdict(rng: random.Random, scene: Scene, denials: float = 0.5) -> str:
    """A claim and whether it is true."""
    text, true = claim(rng, scene, denials)
    frame, words = rng.choice(VERDICTS)
    return frame.format(text, words[0 if true else 1])


def say_number(rng: random.Random, scene: Scene) -> str:
    """How many shapes have a look, or how many there are in all."""
    look = Look() if rng.random() < 0.5 else seen_look(rng, scene)
    if rng.random() < 0.1:
        look = unseen_look(rng, scene)
    frames = (
        "the number of {} is {{n:{}}}",
        "we see how many {} there are: {{n:{}}}",
        "as for {}, the picture has {{n:{}}}",
        "if you count the {} you get {{n:{}}}",
    )
    return rng.choice(frames).format(look.words(many=True), NUMBERS[look.count(scene)])


def naming(rng: random.Random, scene: Scene, without: str) -> tuple[Shape, Look] | None:
    """A shape and a look without one property that only this shape has; None if there is none."""
    shapes = list(scene.shapes)
    rng.shuffle(shapes)
    for shape in shapes:
        looks = [
            Look(size, color, kind)
            for size in {"", shape.size if without != "size" else ""}
            for color in ("", shape.color if without != "color" else "")
            for kind in ("", shape.kind if without != "kind" else "")
        ]
        alone = [look for look in looks if look.count(scene) == 1 and not (look.size and rng.random() < 0.7)]
        if alone:
            return shape, rng.choice(sorted(alone, key=lambda look: look.words()))
    return None


def say_color(rng: random.Random, scene: Scene) -> str | None:
    """What colour one shape has."""
    found = naming(rng, scene, "color")
    if found is None:
        return None
    frames = (
        "the {} is {{c:{}}}",
        "the color of the {} is {{c:{}}}",
        "we see what color the {} is: {{c:{}}}",
        "the {} has the color {{c:{}}}",
    )
    return rng.choice(frames).format(found[1].words(), found[0].color)


def say_kind(rng: random.Random, scene: Scene) -> str | None:
    """What kind of shape one is."""
    found = naming(rng, scene, "kind")
    if found is None:
        return None
    frames = (
        "the {} is a {{k:{}}}",
        "what the image contains as its {} is a {{k:{}}}",
        "we see what the {} is: a {{k:{}}}",
        "the kind of the {} is {{k:{}}}",
    )
    return rng.choice(frames).format(found[1].words(), found[0].kind)


def say_size(rng: random.Random, scene: Scene) -> str | None:
    """What size one shape has."""
    found = naming(rng, scene, "size")
    if found is None or not found[0].size:
        return None
    frames = ("the size of the {} is {{s:{}}}", "the {} is of {{s:{}}} size", "in size the {} is {{s:{}}}")
    return rng.choice(frames).format(found[1].words(), found[0].size)


def say_relation(rng: random.Random, scene: Scene) -> str | None:
    """How two shapes lie to each other."""
    named = [s for s in scene.shapes if Look("", s.color, s.kind).count(scene) == 1]
    if len(named) < 2:
        return None
    one, other = rng.sample(named, 2)
    across, down = other.x - one.x, other.y - one.y
    if abs(across) > abs(down):
        where = "left" if across > 0 else "right"
    else:
        where = "above" if down > 0 else "below"
    first, second = (Look("", s.color, s.kind).words() for s in (one, other))
    # "to the left of" would hide the word that counts behind others.
    return f"the {first} and the {second}: the first lies {{r:{where}}}"


def say_all(scene: Scene) -> str:
    """All shapes from left to right; the picture settles every word of the list."""
    parts = []
    for shape in scene.shapes:
        size = f"{{s:{shape.size}}} " if shape.size else ""
        parts.append(f"{size}{{c:{shape.color}}} {{k:{shape.kind}}}")
    return ", ".join(parts)


def say_note(rng: random.Random, scene: Scene) -> str:
    """A note without a subject, so that lines may begin with "is", "are", "does", "how" or "what"."""
    seen, unseen = seen_look(rng, scene), unseen_look(rng, scene)
    shape = rng.choice(scene.shapes)
    some, none = seen.words(), unseen.words()
    count = NUMBERS[seen.count(scene)]
    notes = (
        f"is present: {_a(some)}",
        f"is not present: {_a(none)}",
        f"is there: {some}, not there: {none}",
        f"does not contain a {none}",
        f"does contain a {some}",
        f"are there: {count} {seen.words(many=True)}",
        f"how many {seen.words(many=True)}: {{n:{count}}}",
        f"what is there: {_a(some)}",
        f"what color: {shape.color}, what shape: {shape.kind}",
        f"of what size: {shape.size or 'none'}, of what color: {shape.color}",
    )
    return rng.choice(notes)


def _tag(rng: random.Random, scene: Scene) -> str:
    """One property of the picture and nothing else."""
    shape = rng.choice(scene.shapes)
    return rng.choice((shape.color, shape.kind, shape.size or shape.color, NUMBERS[len(scene.shapes)]))


SayMaker = Callable[[random.Random, Scene], "str | None"]
Lesson = tuple[tuple[float, SayMaker], ...]
# Of all a little: how things are said.
PROSE: Lesson = (
    (0.08, say_there),
    (0.07, say_absent),
    (0.22, say_verdict),
    (0.12, say_number),
    (0.13, say_color),
    (0.13, say_kind),
    (0.07, say_size),
    (0.04, say_relation),
    (0.07, lambda rng, scene: say_all(scene)),
    (0.05, say_note),
    (0.03, _tag),
)
# More of what is slow to learn.  With as many denials as not, neither what is there nor the "not"
# tells anything of the verdict alone, and nothing is learnt for long; so most claims are plain ones.
CLAIMS: Lesson = (
    (0.05, say_there),
    (0.06, say_absent),
    (0.38, lambda rng, scene: say_verdict(rng, scene, 0.3)),
    (0.18, say_number),
    (0.09, say_color),
    (0.09, say_kind),
    (0.06, say_size),
    (0.01, say_relation),
    (0.03, lambda rng, scene: say_all(scene)),
    (0.03, say_note),
    (0.02, _tag),
)


def sayings(rng: random.Random, scene: Scene, lesson: Lesson = PROSE) -> Iterator[str]:
    """Yields true sentences on a scene, with marks, without end.

    Args:
        rng: The random source.
        scene: What they are about.
        lesson: How often each kind of sentence comes.
    """
    weights = [weight for weight, _ in lesson]
    while True:
        said = rng.choices(lesson, weights)[0][1](rng, scene)
        if said is not None:
            yield said


def sentence(said: str) -> str:
    """A saying with a capital letter and a full stop; a mark at its start keeps its place."""
    match = MARK.match(said)
    if match is None:
        return said[0].upper() + said[1:] + "."
    return f"{{{match[1]}:{match[2][0].upper()}{match[2][1:]}}}{said[match.end() :]}."
