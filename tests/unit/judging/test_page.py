"""The voting page: whole, safe with any text, and silent about which side is which."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from loralab.judging.items import Origin, build_items
from loralab.judging.page import picture_type, render_live, render_offline
from loralab.judging.sitting import BlindPair
from support.voting import ITEMS, make_pairs, swapped

PNG = b"\x89PNG\r\n\x1a\n" + b"pixels"
HOSTILE = [
    "</script><script>alert(1)</script>", "<!-- <script>", "]]> --> '\"`${7*7} {{ 7 * 7 }} {% raise %}",
    "null \x00 bell \x07", "half \ud800 of a pair \udfff", "\u202eright to left\u202c مرحبا",
    "line\u2028and\u2029ends\r\n\ttabs", "😀",
    "&lt;b&gt; <b>",
]  # fmt: skip


class Elements(HTMLParser):
    """Elements with their attributes and the text in them."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))

    def handle_data(self, data: str) -> None:
        if self.found:
            self.found[-1][2].append(data)

    def of(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attributes, "".join(text)) for name, attributes, text in self.found if name == tag]


def live(pairs: tuple[BlindPair, ...], **changed: Any) -> str:
    given = {"rater": "anna", "title": "A test", "answers": {}, "closed": False} | changed
    return render_live(pairs, **given).text


def offline(pairs: tuple[BlindPair, ...], rater: str = "anna") -> str:
    return render_offline(pairs, items_sha256=ITEMS, rater=rater, title="A test")


def given(page: str) -> dict[str, Any]:
    """Return the data of a page."""
    (data,) = [text for attributes, text in Elements(page).of("script") if attributes.get("type") == "application/json"]
    return json.loads(data)


def test_a_live_page_is_given_what_the_rater_may_see() -> None:
    pairs = make_pairs(2)
    page = live(pairs, answers={pairs[0].item: "tie"})
    assert given(page) == {
        "mode": "live",
        "title": "A test",
        "rater": "anna",
        "longest_seconds": 86400.0,
        "answers": {pairs[0].item: "tie"},
        "closed": False,
        "pictures": [],
        "pairs": [
            {"item": pair.item, "prompt": pair.prompt, "left": pair.left, "right": pair.right, "pictures": []}
            for pair in pairs
        ],
    }


def test_an_offline_page_is_given_what_the_votes_belong_to() -> None:
    data = given(offline(make_pairs(1)))
    assert (data["mode"], data["items_sha256"], data["version"], data["rater"]) == ("offline", ITEMS, 1, "anna")


@pytest.mark.parametrize("render", [live, offline])
@pytest.mark.parametrize("text", [*HOSTILE, "long " * 20_000], ids=lambda text: ascii(text[:12]))
def test_any_text_comes_through_as_text(render: Any, text: str) -> None:
    page = render(make_pairs(1, prompt=text, left=text, right=f"{text}."))
    page.encode("utf-8")
    plain = Elements(render(make_pairs(1)))
    assert [(name, attributes) for name, attributes, _ in Elements(page).found] == [
        (name, attributes) for name, attributes, _ in plain.found
    ]
    (pair,) = given(page)["pairs"]
    controls = {chr(code): chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\r\n"}
    shown = "".join(controls.get(character, character) for character in text)
    assert (pair["prompt"], pair["left"], pair["right"]) == (shown, shown, f"{shown}.")


def test_title_and_rater_are_text_too() -> None:
    title = '<script>x</script> & "run" \ud800'
    page = render_live(make_pairs(1), rater="o'neil", title=title, answers={}, closed=False).text
    ((_, heading),) = Elements(page).of("title")
    assert heading.strip() == title.replace("\ud800", "?")
    assert given(page)["title"] == title
    assert len(Elements(page).of("script")) == 2


@pytest.mark.parametrize("mode", ["live", "offline"])
def test_only_the_own_program_and_style_may_run(mode: str) -> None:
    pairs = make_pairs(1)
    if mode == "live":
        page, policy = (made := render_live(pairs, rater="a", title="t", answers={}, closed=False)).text, made.policy
        assert "connect-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
    else:
        page = offline(pairs)
        (policy,) = [
            str(attributes["content"])
            for attributes, _ in Elements(page).of("meta")
            if attributes.get("http-equiv") == "Content-Security-Policy"
        ]
        assert "connect-src" not in policy
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for element, directive in (("script", "script-src"), ("style", "style-src")):
        (text,) = re.findall(rf"<{element}>(.*?)</{element}>", page, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert re.search(rf"{directive} '([^']*)';", policy)[1] == f"sha256-{digest}"  # type: ignore[index]


@pytest.mark.parametrize("render", [live, offline])
def test_nothing_is_loaded_from_elsewhere(render: Any) -> None:
    page = render(make_pairs(3))
    assert set(re.findall(r"[a-z]+://[^\s\"'<>]*", page)) == {"http://www.w3.org/2000/svg"}
    for _, attributes, _ in Elements(page).found:
        assert not {"src", "action", "style", "onclick", "onload", "srcset", "data"} & attributes.keys()
        assert not str(attributes.get("href", "data:")).strip() or str(attributes.get("href", "data:")).startswith(
            "data:"
        )


def test_pictures_are_named_by_their_place_and_held_once(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one.png", "two.jpeg", "gone.png", "words.png")]
    paths[0].write_bytes(PNG)
    paths[1].write_bytes(b"\xff\xd8\xff" + b"pixels")
    paths[3].write_bytes(b"<svg onload=alert(1)>")
    first, second = make_pairs(2)
    pairs = (replace(first, pictures=(paths[0], paths[1])), replace(second, pictures=(paths[1], paths[2], paths[3])))
    seen = given(live(pairs))
    assert seen["pictures"] == [f"pictures/{number}" for number in range(4)]
    assert [pair["pictures"] for pair in seen["pairs"]] == [[0, 1], [1, 2, 3]]
    assert str(tmp_path) not in live(pairs)
    held = given(offline(pairs))["pictures"]
    assert held[0] == "data:image/png;base64," + base64.b64encode(PNG).decode()
    assert held[1].startswith("data:image/jpeg;base64,")
    assert held[2:] == [None, None]


def test_only_bitmaps_count_as_pictures() -> None:
    assert picture_type(PNG) == "image/png"
    assert picture_type(b"\xff\xd8\xff\xe0") == "image/jpeg"
    for data in (b"", b"GIF89a", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"<html>", b"\x89PN"):
        assert picture_type(data) is None


# --- which side is which -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("render", [live, offline])
def test_pages_of_swapped_sides_differ_in_the_two_texts_alone(render: Any) -> None:
    pairs = make_pairs(6)
    turned = tuple(swapped(pair) if number % 2 else pair for number, pair in enumerate(pairs))
    page, other = render(pairs), render(turned)
    assert page != other
    for pair in pairs:
        page, other = (text.replace(pair.left, "TEXT").replace(pair.right, "TEXT") for text in (page, other))
    assert page == other


def items_of(count: int, seed: int, picture_folder: Path) -> Any:
    records = [
        {
            "source": "secret-adapter.jsonl", "row": row, "prompt": f"Question {row}?", "base_output": f"Fox {row}.",
            "adapter_output": f"Frog {row}.", "reference": "x", "kl_divergence": 0.5, "base_stopped": True,
            "adapter_stopped": False,
        }
        for row in range(count)
    ]  # fmt: skip
    comparison = {"split": "validation", "prompts": records, "model": "owner/base-model"}
    return build_items(comparison, Origin("d" * 64, "e" * 64, picture_folder), examples=count, seed=seed)


@pytest.mark.parametrize("render", [live, offline])
def test_no_word_of_a_page_names_a_model(render: Any, tmp_path: Path) -> None:
    items = items_of(20, 7, tmp_path)
    page = render(items.pairs_for("anna"))
    words = re.sub(r"base64|base-uri", "", page)
    names = r"\b(adapter|base|lora|qlora|fine-tuned|model|secret|reference|validation|d{64}|e{64})\b"
    assert [words[hit.start() - 60 : hit.end() + 60] for hit in re.finditer(names, words, flags=re.IGNORECASE)] == []


def test_order_and_names_of_items_say_nothing_about_sides(tmp_path: Path) -> None:
    """Over many raters, what stands where in the data is independent of the side of the second model."""
    first_half_left = low_names_left = total = 0
    items = items_of(20, 11, tmp_path)
    for rater in range(200):
        data = given(offline(items.pairs_for(f"rater{rater}"), f"rater{rater}"))
        left = [pair["left"].startswith("Frog") for pair in data["pairs"]]
        names = [pair["item"] for pair in data["pairs"]]
        assert sum(left) == 10
        first_half_left += sum(left[:10])
        middle = sorted(names)[10]
        low_names_left += sum(side for side, name in zip(left, names, strict=True) if name < middle)
        total += 10
    # The sum of 200 draws of 10 among 20, half of them marked: variance 200 * 10/4 * 10/19.
    bound = 4 * (200 * 2.5 * 10 / 19) ** 0.5
    assert abs(first_half_left - total / 2) < bound
    assert abs(low_names_left - total / 2) < bound


def test_a_page_is_the_same_whichever_model_wrote_which_text(tmp_path: Path) -> None:
    """With the texts of both models exchanged, the rater may at most see other sides: nothing else follows."""
    items = items_of(8, 3, tmp_path)
    exchanged = replace(
        items,
        items=tuple(
            replace(item, base_output=item.adapter_output, adapter_output=item.base_output) for item in items.items
        ),
    )
    one, other = (given(offline(which.pairs_for("anna"))) for which in (items, exchanged))
    assert [pair["item"] for pair in one["pairs"]] == [pair["item"] for pair in other["pairs"]]
    for pair, turned in zip(one["pairs"], other["pairs"], strict=True):
        assert (pair.pop("left"), pair.pop("right")) == (turned.pop("right"), turned.pop("left"))
    assert one == other
