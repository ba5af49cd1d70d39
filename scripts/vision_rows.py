"""The rows of the vision demo: small pictures and questions about them, of four kinds."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from vision_prose import NUMBERS, Look, naming, seen_look, unseen_look
from vision_world import COUNT_SHARES, Scene, draw, make_scene

# File name, and how many pictures its rows are about; no picture is in both.
PARTS = (("train", 120), ("held_out", 30))
PICTURES = "pictures"
QUESTIONS = {
    "yes_no": ("Is there {a}?", "Does the picture contain {a}?", "Is {a} present?", "Do you see {a}?"),
    "count": ("How many {many} are there?", "How many {many} does the picture contain?", "Count the {many}."),
    "color": ("What color is the {one}?", "What is the color of the {one}?", "Which color does the {one} have?"),
    "size": ("Is the {one} small or big?", "What size is the {one}?", "What is the size of the {one}?"),
}
# Questions of each kind on a picture; where a picture has no shape to name, "yes_no" takes the place.
KINDS_EACH = ("yes_no", "yes_no", "count", "color", "size")
# Most looks fit one shape alone; counting is more than that, so looks that fit several are preferred.
LOOKS_TRIED, SEVERAL_SHARE = 3, 0.85
Row = dict[str, str]


def _ask(rng: random.Random, kind: str, look: Look) -> str:
    one = look.words()
    return rng.choice(QUESTIONS[kind]).format(
        a=f"{'an' if one[0] in 'aeiou' else 'a'} {one}", one=one, many=look.words(True)
    )


def _question(rng: random.Random, scene: Scene, kind: str) -> tuple[str, str, str]:
    """A question, its answer and its kind."""
    if kind in ("color", "size"):
        found = naming(rng, scene, kind)
        if found is not None:
            shape, look = found
            return _ask(rng, kind, look), getattr(shape, kind), kind
    if kind == "count":
        looks = [Look(), *(seen_look(rng, scene) for _ in range(LOOKS_TRIED))]
        several = [look for look in looks if look.count(scene) > 1]
        look = rng.choice(several or looks) if rng.random() < SEVERAL_SHARE else rng.choice(looks)
        return _ask(rng, kind, look), NUMBERS[look.count(scene)], kind
    there = rng.random() < 0.5
    look = seen_look(rng, scene) if there else unseen_look(rng, scene)
    return _ask(rng, "yes_no", look), "yes" if there else "no", "yes_no"


def _rows(rng: random.Random, scene: Scene, image: str) -> Iterator[Row]:
    """The rows of one picture, no question twice."""
    asked: set[str] = set()
    for kind in KINDS_EACH:
        question, answer, got = _question(rng, scene, kind)
        while question in asked:
            question, answer, got = _question(rng, scene, kind)
        asked.add(question)
        yield {"image": image, "question": question, "answer": answer, "kind": got}


def _palette(picture: Image.Image) -> Image.Image:
    """The same picture with a palette: every pixel keeps its colour, the file gets smaller."""
    pixels = np.asarray(picture)
    colors, numbers = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    small = Image.fromarray(numbers.reshape(pixels.shape[:2]).astype(np.uint8), mode="L")
    small.putpalette(colors.tobytes())
    return small


def _told_scene(rng: random.Random, count: int) -> Scene:
    """A scene whose shapes are all either small or big and that a palette can hold."""
    while True:
        scene = make_scene(rng, count)
        few = draw(scene, noisy=False).getcolors(256) is not None
        if few and all(shape.size for shape in scene.shapes):
            return scene


def write_rows(folder: Path, seed: int) -> None:
    """Draws the demo's pictures and writes its rows.

    Args:
        folder: Gets ``train.jsonl``, ``held_out.jsonl`` and the folder of pictures.
        seed: Of pictures and questions; another one than that of the base's.
    """
    rng = random.Random(seed)
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    for part, pictures in PARTS:
        lines = []
        for number in range(pictures):
            scene = _told_scene(rng, 1 + number % len(COUNT_SHARES))
            image = f"{PICTURES}/{part}_{number:03}.png"
            _palette(draw(scene, noisy=False)).save(folder / image, optimize=True)
            lines += [json.dumps(row) + "\n" for row in _rows(rng, scene, image)]
        (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
