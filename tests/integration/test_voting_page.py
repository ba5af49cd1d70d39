"""The voting page in a browser: votes by keys and by mouse, lost connections, several tabs, the offline file.

Needs Playwright and a Chromium; skipped where one of them is missing.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from loralab.judging.page import render_offline
from loralab.judging.sitting import BlindPair, Sitting
from support.preference_tests import write_run
from support.voting import ITEMS, make_pairs, open_sitting, served, swapped

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
slow = pytest.mark.slow  # all but the first: they take a minute and a half together
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SETTLE_MS = 300  # the page takes quicker presses for one
HOSTILE = (
    "</script><script>document.title = 'broken'</script>", "<img src=x onerror=\"document.title='broken'\">",
    "{{ 7 * 7 }} &amp; <b>bold</b> \x00 \ud800 \u202e", "مرحبا بالعالم", "  two  blanks\n\n\tand a tab",
    "word " * 20_000,
)  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture
def context(browser: Any) -> Iterator[Any]:
    opened = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    opened.set_default_timeout(10_000)
    yield opened
    opened.close()


@pytest.fixture
def sitting(tmp_path: Path) -> Iterator[Sitting]:
    with open_sitting(tmp_path / "votes.jsonl", make_pairs(4)) as opened:
        yield opened


def open_page(context: Any, address: str) -> Any:
    """Open a tab; what its console says is in `page.said`, what it asks other hosts for in `page.foreign`."""
    page = context.new_page()
    page.said, page.foreign = [], []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    own = (address.split("/", 3)[0:3], "blob:", "data:")
    page.on(
        "request",
        lambda request: request.url.startswith(("/".join(own[0]), *own[1:])) or page.foreign.append(request.url),
    )
    page.goto(address)
    return page


def press(page: Any, *keys: str) -> None:
    for key in keys:
        page.wait_for_timeout(SETTLE_MS)
        page.keyboard.press(key)


def click(page: Any, words: str) -> None:
    page.wait_for_timeout(SETTLE_MS)
    page.get_by_role("button", name=words).click()


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait for something that a thread of this process brings about."""
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.02)


def place(page: Any) -> str:
    return str(page.text_content("#place"))


def chosen(page: Any) -> list[str]:
    return [
        str(name)
        for name in page.locator("[data-choice][aria-pressed=true]").evaluate_all(
            "all => all.map(e => e.dataset.choice)"
        )
    ]


@slow
def test_result_lists_prompts_by_what_is_their_own(context: Any, tmp_path: Path) -> None:
    head = "Below is an instruction.\n\n### Instruction:\n"
    pairs = tuple(
        replace(pair, prompt=f"{head}Name city {number}.\n\n### Response:\n")
        for number, pair in enumerate(make_pairs(3))
    )
    with open_sitting(tmp_path / "votes.jsonl", pairs) as sitting, served(sitting) as server:
        page = open_page(context, server.address)
        press(page, "1", "1", "1")
        click(page, "Finish and show the names")
        page.wait_for_selector("text=What you judged")
        shown = page.locator("summary span:nth-child(2)").all_text_contents()
        assert [text.split("\n")[0] for text in shown] == [f"… Name city {number}." for number in range(3)]
        assert page.said == []


def test_keys_and_mouse_vote_and_the_names_come_at_the_end(context: Any, sitting: Sitting, tmp_path: Path) -> None:
    items = [pair.item for pair in sitting.pairs]
    with served(sitting) as server:
        page = open_page(context, server.address)
        assert place(page) == "Pair 1 of 4"
        assert page.text_content("#prompt") == "Question 1?"
        assert (page.text_content("#left"), page.text_content("#right")) == ("A red fox 1.", "A green frog 1.")
        assert chosen(page) == []
        press(page, "1")
        wait_for(lambda: sitting.answers == {items[0]: "left"})
        assert place(page) == "Pair 2 of 4"
        press(page, "s")  # the second pair comes again at the end
        assert (place(page), page.text_content("#prompt")) == ("Pair 2 of 4", "Question 3?")
        click(page, "B is better")
        press(page, "ArrowDown")
        wait_for(lambda: sitting.answers == {items[0]: "left", items[2]: "right", items[3]: "tie"})
        assert (place(page), page.text_content("#prompt")) == ("Pair 4 of 4", "Question 2?")

        press(page, "Backspace", "Backspace")
        assert (place(page), chosen(page)) == ("Pair 2 of 4", ["right"])
        page.reload()
        assert (place(page), chosen(page), page.text_content("#prompt")) == ("Pair 2 of 4", ["right"], "Question 3?")
        press(page, "4")  # the choice is changed, and the next open pair comes
        assert page.text_content("#prompt") == "Question 2?"
        press(page, "ArrowUp")
        assert (page.text_content("#prompt"), chosen(page)) == ("Question 4?", ["tie"])
        click(page, "Take my vote back")
        wait_for(lambda: items[3] not in sitting.answers)
        assert chosen(page) == []
        press(page, "ArrowRight", "ArrowLeft")
        page.wait_for_selector("text=All 4 pairs are judged")
        wait_for(
            lambda: sitting.answers == {items[0]: "left", items[1]: "left", items[2]: "both_bad", items[3]: "right"}
        )
        assert "the adapter" not in page.content()

        click(page, "Look at them again")
        assert place(page) == "Pair 4 of 4"
        click(page, "Finish …")
        click(page, "Finish and show the names")
        page.wait_for_selector("text=You preferred the base model in 1 pair and the adapter in 2")
        assert page.get_by_role("img").get_attribute("aria-label") == (
            "Preferred: the base model: 1, About the same: 0, Both bad: 1, Preferred: the adapter: 2"
        )
        rows = page.locator("#end details summary").all_text_contents()
        assert rows == [
            "1Question 1?the adapter", "2Question 2?the adapter", "3Question 3?both bad", "4Question 4?the base model",
        ]  # fmt: skip
        server.thread.join(10)
        assert not server.thread.is_alive()
        assert page.said == page.foreign == []
    lines = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()[1:-1]]
    assert all(line["choice"] is None or 0 < line["seconds"] < 60 for line in lines)


@slow
def test_a_lost_connection_is_told_and_votes_are_sent_later(context: Any, sitting: Sitting) -> None:
    items = [pair.item for pair in sitting.pairs]
    with served(sitting) as server:
        page = open_page(context, server.address)
        press(page, "1")
        wait_for(lambda: len(sitting.answers) == 1)
        context.set_offline(True)
        press(page, "2", "3")
        page.wait_for_selector("text=No connection to loralab. 2 votes are kept here")
        assert page.text_content("#saved") == "2 votes not saved yet"
        assert len(sitting.answers) == 1
        click(page, "Finish …")
        click(page, "Finish all the same")
        assert not sitting.closed
        context.set_offline(False)
        page.wait_for_selector("#notice", state="hidden")
        assert page.text_content("#saved") == "Saved"
        assert sitting.answers == {items[0]: "left", items[1]: "right", items[2]: "tie"}
    page.close(run_before_unload=False)


@slow
def test_a_reload_while_the_server_is_away_keeps_the_votes(context: Any, sitting: Sitting) -> None:
    """Votes that wait outlive a reload: here the server refuses them at first, as with a full disk."""
    items = [pair.item for pair in sitting.pairs]
    with served(sitting) as server:
        page = open_page(context, server.address)
        page.on("dialog", lambda dialog: dialog.accept())
        page.route("**/votes", lambda route: route.fulfill(status=507, body="No room. To mend it: make some."))
        press(page, "1")
        page.wait_for_selector("text=loralab answered: No room. To mend it: make some. 1 vote is kept here")
        page.unroute("**/votes")
        page.reload()
        wait_for(lambda: sitting.answers == {items[0]: "left"})
        page.wait_for_selector("#notice", state="hidden")
        assert place(page) == "Pair 2 of 4"


@slow
def test_a_server_that_has_ended_is_told_without_a_vote(context: Any, sitting: Sitting) -> None:
    with served(sitting) as server:
        page = open_page(context, server.address)
        server.finish()
        page.wait_for_selector("text=No connection to loralab. Your votes so far are saved.")


@slow
def test_a_vote_that_is_refused_is_told_and_does_not_count(context: Any, sitting: Sitting) -> None:
    with served(sitting) as server:
        page = open_page(context, server.address)
        page.route("**/votes", lambda route: route.fulfill(status=409, body="The adapter has changed."))
        press(page, "1")
        page.wait_for_selector("text=Your last vote was not taken. The adapter has changed.")
        assert page.get_attribute("#progress", "aria-valuenow") == "0"
        assert not page.is_visible("#again")
        page.unroute("**/votes")
        press(page, "Backspace", "2")
        wait_for(lambda: dict(sitting.answers) == {sitting.pairs[0].item: "right"})
        page.wait_for_selector("#notice", state="hidden")


@slow
def test_two_tabs_see_the_same_votes_and_the_same_end(context: Any, sitting: Sitting) -> None:
    with served(sitting) as server:
        one, two = open_page(context, server.address), open_page(context, server.address)
        press(one, "1")
        two.wait_for_selector("#progress[aria-valuenow='1']", state="attached")
        assert chosen(two) == ["left"]
        press(two, "2")  # changes what the other tab chose
        one.wait_for_function("document.querySelector('#progress').getAttribute('aria-valuenow') === '1'")
        press(one, "Backspace")
        one.wait_for_selector("[data-choice=right][aria-pressed=true]")
        press(two, "1", "1", "1")
        click(two, "Finish and show the names")
        two.wait_for_selector("text=You preferred")
        one.wait_for_selector("text=This sitting is finished")
        assert sitting.answers[sitting.pairs[0].item] == "right"


@slow
def test_keys_that_are_held_or_meant_otherwise_do_not_vote(context: Any, tmp_path: Path) -> None:
    long = "line\n" * 400
    first, *others = make_pairs(3)
    pairs = (replace(first, left=long, right=long + "end"), *others)
    with open_sitting(tmp_path / "votes.jsonl", pairs) as sitting, served(sitting) as server:
        page = open_page(context, server.address)
        press(page, "Control+1", "Alt+2", "Meta+3", "Shift+Tab", "x", "5")
        page.click("#left")
        press(page, "ArrowDown", "ArrowDown")
        page.wait_for_function("document.querySelector('#left').scrollTop > 0")
        assert place(page) == "Pair 1 of 3"
        page.wait_for_timeout(SETTLE_MS)
        page.keyboard.down("1")  # held: the browser repeats it
        for _ in range(5):
            page.keyboard.down("1")
        page.keyboard.up("1")
        page.keyboard.press("1")  # too quick for a second vote
        page.wait_for_timeout(SETTLE_MS)
        assert place(page) == "Pair 2 of 3"
        press(page, "?")
        page.wait_for_selector("dialog[open]")
        press(page, "1", "Escape")
        assert place(page) == "Pair 2 of 3"
        wait_for(lambda: dict(sitting.answers) == {first.item: "left"})


@slow
def test_everything_can_be_done_with_tab_and_enter(context: Any, sitting: Sitting) -> None:
    with served(sitting) as server:
        page = open_page(context, server.address)
        page.wait_for_timeout(SETTLE_MS)
        reached = []
        for _ in range(14):
            page.keyboard.press("Tab")
            name = page.evaluate("document.activeElement.id || document.activeElement.dataset.choice || ''")
            reached.append(name)
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert name == "" or outline == "solid", name
        assert reached[:10] == ["mono", "marks", "keys", "prompt", "left", "right", "left", "tie", "both_bad", "right"]
        assert {"skip", "early"} <= set(reached)
        page.focus("[data-choice=both_bad]")
        page.keyboard.press("Enter")
        wait_for(lambda: dict(sitting.answers) == {sitting.pairs[0].item: "both_bad"})
        assert place(page) == "Pair 2 of 4"
        assert page.text_content("#status") == "Pair 1: both bad"


@slow
@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:12]))
def test_texts_are_shown_as_they_are(context: Any, tmp_path: Path, text: str) -> None:
    (pair,) = make_pairs(1, prompt=text, left=text, right=f"{text} and more")
    shown = text.replace("\x00", "\u2400").replace("\ud800", "\ufffd")
    with open_sitting(tmp_path / "votes.jsonl", (pair,)) as sitting, served(sitting, title="t") as server:
        page = open_page(context, server.address)
        for _ in range(2):
            parts = [str(page.text_content(box)) for box in ("#prompt", "#left", "#right")]
            assert [part.encode("utf-8", "replace").decode().replace("?", "\ufffd") for part in parts] == [
                each.replace("?", "\ufffd") for each in (shown, shown, f"{shown} and more")
            ]
            press(page, "d")
        assert page.title() == "t"
        assert page.locator("#pair script, #pair img, #pair b").count() == 0
        assert page.said == page.foreign == []


@slow
def test_differences_are_marked_on_both_sides_alike(context: Any, tmp_path: Path) -> None:
    pairs = (
        BlindPair("1" * 16, "?", "The red fox runs home.", "The green fox runs far, far home.", ()),
        BlindPair("2" * 16, "?", "", "Something", ()),
        BlindPair("3" * 16, "?", "a " * 4000, "b " * 4000, ()),
    )
    with open_sitting(tmp_path / "votes.jsonl", pairs) as sitting, served(sitting) as server:
        page = open_page(context, server.address)
        assert page.locator("mark").count() == 0  # off until it is asked for
        press(page, "d")
        marked = [page.locator(f"{box} mark").all_text_contents() for box in ("#left", "#right")]
        assert marked == [["red "], ["green ", "far, far "]]
        colours = page.locator("mark").evaluate_all(
            "all => [...new Set(all.map(e => getComputedStyle(e).backgroundColor))]"
        )
        assert len(colours) == 1
        press(page, "1")
        assert page.text_content("#left") == "empty"
        assert page.locator("#right mark").all_text_contents() == ["Something"]
        press(page, "1")
        assert page.locator("mark").count() == 0
        assert page.text_content("#marks") == "Too long to compare"
        press(page, "m")
        fonts = [
            page.evaluate(f"getComputedStyle(document.querySelector('{box}')).fontFamily")
            for box in ("#left", "#right")
        ]
        assert "monospace" in fonts[0]
        assert fonts[0] == fonts[1]


@slow
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (1920, 1080), (800, 600), (400, 800)])
def test_both_answers_have_equal_boxes_and_buttons_stay_in_sight(
    context: Any, tmp_path: Path, width: int, height: int
) -> None:
    pairs = make_pairs(200, prompt="Long. " * 500, left="short", right="much longer " * 800)
    with open_sitting(tmp_path / "votes.jsonl", pairs) as sitting, served(sitting) as server:
        page = open_page(context, server.address)
        page.set_viewport_size({"width": width, "height": height})
        left, right = (page.locator(box).locator("xpath=..").bounding_box() for box in ("#left", "#right"))
        assert left["width"] == pytest.approx(right["width"], abs=0.1)
        if width > 736:
            assert (left["y"], left["height"]) == pytest.approx((right["y"], right["height"]), abs=0.1)
        else:
            assert left["y"] + left["height"] < right["y"]
        for name in ("left", "right", "tie", "both_bad"):
            box = page.locator(f"[data-choice={name}]").bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
            assert box["y"] + box["height"] <= height
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@slow
def test_pictures_are_shown_and_outlive_the_server(context: Any, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.new("RGB", (30, 20), "red").save(path)
    first, second = make_pairs(2)
    pairs = (replace(first, pictures=(path, tmp_path / "gone.png")), second)
    with open_sitting(tmp_path / "votes.jsonl", pairs) as sitting, served(sitting) as server:
        page = open_page(context, server.address)
        page.wait_for_selector("text=Picture 2 of the prompt is not there")
        page.wait_for_function("document.querySelector('#pictures img').naturalWidth === 30")
        press(page, "1")
        assert page.is_hidden("#pictures")
        press(page, "2")
        click(page, "Finish and show the names")
        page.wait_for_selector("text=You preferred")
        server.thread.join(10)
        page.click("#end summary >> nth=0")
        page.wait_for_function("document.querySelector('#end details img').naturalWidth === 30")


@slow
def test_what_the_page_shows_is_the_same_for_swapped_sides(context: Any, tmp_path: Path) -> None:
    def shown(pairs: tuple[BlindPair, ...], name: str) -> str:
        with open_sitting(tmp_path / name, pairs) as sitting, served(sitting) as server:
            page = open_page(context, server.address)
            seen = []
            for _ in pairs:
                page.wait_for_timeout(SETTLE_MS)
                seen.append(page.evaluate("document.body.outerHTML"))
                page.keyboard.press("3")
            page.wait_for_selector("text=All 3 pairs are judged")
            wait_for(lambda: len(sitting.answers) == 3)
            seen.append(page.evaluate("document.querySelector('main').outerHTML"))
        return "\n".join(seen)

    pairs = make_pairs(3)
    one, other = shown(pairs, "1.jsonl"), shown(tuple(map(swapped, pairs)), "2.jsonl")
    assert one != other
    for pair in pairs:
        one, other = (each.replace(pair.left, "TEXT").replace(pair.right, "TEXT") for each in (one, other))
    assert one == other


# --- the offline file ---------------------------------------------------------------------------------------------


@pytest.fixture
def offline_page(tmp_path: Path) -> str:
    path = tmp_path / "page.html"
    path.write_text(render_offline(make_pairs(3), items_sha256=ITEMS, rater="anna", title="A test"), encoding="utf-8")
    return path.as_uri()


def save(page: Any, words: str) -> Any:
    with page.expect_download() as download:
        click(page, words)
    assert download.value.suggested_filename == "votes-anna.json"
    return json.loads(Path(download.value.path()).read_text(encoding="utf-8"))


@slow
def test_the_offline_file_keeps_votes_and_saves_them(context: Any, offline_page: str) -> None:
    items = [pair.item for pair in make_pairs(3)]
    page = open_page(context, offline_page)
    press(page, "1", "2")
    assert page.text_content("#saved") == "Kept in this browser"
    page.reload()
    assert place(page) == "Pair 3 of 3"
    click(page, "Finish …")
    page.wait_for_selector("text=1 pair is not judged yet")
    votes = save(page, "Save a copy and go on later")
    assert (votes["closed"], [act["choice"] for act in votes["acts"]]) == (False, ["left", "right"])
    click(page, "Judge the rest")
    press(page, "Backspace")
    assert chosen(page) == ["right"]
    click(page, "Take my vote back")
    press(page, "4", "3")
    votes = save(page, "Finish and save the votes")
    assert {key: votes[key] for key in ("loralab_votes", "items_sha256", "rater", "closed")} == {
        "loralab_votes": 1, "items_sha256": ITEMS, "rater": "anna", "closed": True,
    }  # fmt: skip
    assert [(act["item"], act["choice"]) for act in votes["acts"]] == [
        (items[0], "left"), (items[1], "right"), (items[1], None), (items[1], "both_bad"), (items[2], "tie"),
    ]  # fmt: skip
    assert all(set(act) == {"item", "choice", "seconds", "at"} for act in votes["acts"])
    page.reload()
    page.wait_for_selector("text=Thank you")
    assert save(page, "Save it again") == votes
    click(page, "Change my votes")
    press(page, "1")
    assert [act["choice"] for act in save(page, "Finish and save the votes")["acts"]][-1] == "left"
    assert page.said == page.foreign == []


@slow
def test_two_tabs_of_the_offline_file_lose_no_vote(context: Any, offline_page: str) -> None:
    one, two = open_page(context, offline_page), open_page(context, offline_page)
    press(one, "1")
    two.wait_for_selector("[data-choice=left][aria-pressed=true]")
    press(two, "Enter", "2")
    one.wait_for_selector("#progress[aria-valuenow='2']", state="attached")
    press(one, "Enter", "3")
    assert [act["choice"] for act in save(one, "Finish and save the votes")["acts"]] == ["left", "right", "tie"]


@slow
def test_without_storage_the_offline_file_says_so_and_saves_all_the_same(context: Any, offline_page: str) -> None:
    context.add_init_script("Storage.prototype.setItem = () => { throw new Error('off'); };")
    page = open_page(context, offline_page)
    page.wait_for_selector("text=This browser does not keep votes for this page")
    press(page, "1", "2", "3")
    assert [act["choice"] for act in save(page, "Finish and save the votes")["acts"]] == ["left", "right", "tie"]
    page.close(run_before_unload=False)


# --- the command --------------------------------------------------------------------------------------------------


@contextmanager
def judge(run: Path, *arguments: str) -> Iterator[Any]:
    program = [sys.executable, "-m", "loralab.cli", "judge", str(run), *arguments]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as command:
        try:
            yield command
        finally:
            command.kill()


def address_of(command: Any) -> str:
    line = next(line for line in command.stderr if "http://" in line)
    return re.findall(r"http://\S+", line)[0]


@slow
def test_the_command_from_the_first_vote_to_the_result(context: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 5).path
    with judge(run, "--no-browser", "--rater", "anna") as command:
        page = open_page(context, address_of(command))
        press(page, "1", "2")
        page.wait_for_selector("#progress[aria-valuenow='2']", state="attached")
        page.wait_for_function("document.querySelector('#saved').textContent === 'Saved'")
        command.send_signal(signal.SIGINT)
        out, err = command.communicate(timeout=30)
    assert (command.returncode, out) == (0, "")
    assert err.splitlines()[-1] == "2 of 5 pairs judged; the same command goes on"
    page.wait_for_selector("text=No connection to loralab")

    with judge(run, "--no-browser", "--rater", "anna", "--json") as command:
        page.goto(address_of(command))
        assert place(page) == "Pair 3 of 5"
        press(page, "3", "4", "1")
        click(page, "Finish and show the names")
        page.wait_for_selector("text=You preferred")
        shown = [int(number) for number in page.locator(".legend b").all_text_contents()]
        out, _ = command.communicate(timeout=30)
    assert command.returncode == 0
    assert json.loads((run / "preference.json").read_text(encoding="utf-8")) == json.loads(out)
    assert sum(shown) == 5
    assert shown[1:3] == [1, 1]


@slow
def test_votes_of_the_offline_page_are_taken(context: Any, tmp_path: Path) -> None:
    run, path = write_run(tmp_path / "run", 4).path, tmp_path / "for-ben.html"
    with judge(run, "--rater", "ben", "--html", str(path)) as command:
        assert command.communicate(timeout=60)[0].strip() == str(path)
    page = open_page(context, path.as_uri())
    press(page, "1", "2", "Backspace", "3", "4", "1")
    with page.expect_download() as download:
        click(page, "Finish and save the votes")
    saved = tmp_path / download.value.suggested_filename
    download.value.save_as(saved)
    with judge(run, "--import", str(saved)) as command:
        _, err = command.communicate(timeout=60)
    assert (command.returncode, err.strip()) == (0, "ben: 4 of 4 pairs judged, closed (5 new acts)")
