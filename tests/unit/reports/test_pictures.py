"""Pictures on pages: bounded, held once, and nothing of what records say of them reaches the page as markup."""

from pathlib import Path
from typing import Any

import pytest

from loralab.reports.comparison_page import render_comparison
from loralab.reports.facts import load_facts
from loralab.reports.html import write_report
from loralab.reports.pictures import (
    MOST_PICTURES,
    PictureBook,
    find_thumbnail,
    images_in,
    pictures_folder,
    shown_images,
    thumbnails_in,
)
from loralab.reports.sections import report_images
from unit.reports import run_folders
from unit.reports.test_comparison_page import record, result


def image(number: int, path: str = "/srv/secret/a.png", width: int = 60, height: int = 40) -> dict[str, Any]:
    return {"path": path, "sha256": f"{number:064x}", "width": width, "height": height}


def test_a_page_shows_at_most_so_many_pictures_each_held_once() -> None:
    records = [{"images": [image(number), image(number)]} for number in range(MOST_PICTURES + 5)]
    shown = shown_images([*records, *records])
    assert [each["sha256"] for each in shown] == [image(number)["sha256"] for number in range(MOST_PICTURES)]
    book = PictureBook(lambda sha256: f"data:{sha256}", shown)
    assert len(book.held) == MOST_PICTURES
    first, last = book.show([image(0), image(MOST_PICTURES)])
    assert first["id"] == book.held[0]["id"]
    assert last["id"] is None
    assert last["words"] == "a.png, 60 \u00d7 40"


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"images": None},
        {"images": "a.png"},
        {"images": [None, "a.png", {"path": "a.png"}]},
        {"images": [image(1) | {"sha256": "../../etc/passwd"}, image(1) | {"width": "9"}, image(1) | {"height": 0}]},
    ],
)
def test_what_is_no_picture_is_left_out(record: dict[str, Any]) -> None:
    assert images_in(record) == []


def test_only_hashes_lead_to_files(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "a.png").write_bytes(b"secret")
    (tmp_path / "kept" / f"{1:064x}.png").write_bytes(b"picture")
    assert find_thumbnail(tmp_path / "kept", "../a") is None
    assert find_thumbnail(tmp_path / "kept", f"{2:064x}") is None
    assert thumbnails_in(tmp_path / "kept")(f"{1:064x}") == "data:image/png;base64,cGljdHVyZQ=="


def test_large_and_small_pictures_fit_the_page() -> None:
    book = PictureBook(lambda sha256: "data:", [image(1, width=4000, height=1000), image(2, width=10, height=8)])
    assert [(each["width"], each["height"]) for each in book.held] == [(256, 64), (120, 96)]


def test_the_page_of_a_comparison_shows_pictures_and_names_as_text() -> None:
    hostile = '"><script>alert(1)</script>.png'
    records = [record(row, images=[image(1), image(2, path=hostile)]) for row in (1, 2)]
    page = render_comparison(result(prompts=records), lambda sha256: "data:image/png;base64,AA==")
    assert "<script" not in page
    assert page.count('href="data:image/png;base64,AA=="') == 2
    assert page.count("<use ") == 4
    assert page.count('aria-label="a.png, 60 \u00d7 40"') == 2
    without = render_comparison(result(prompts=records))
    assert "<use " not in without
    assert without.count("a.png, 60 \u00d7 40; not shown here") == 2


def test_samples_and_examples_of_a_run_show_kept_pictures(tmp_path: Path) -> None:
    samples = run_folders.samples()
    samples["samples"][0]["images"] = [image(1), image(2)]
    folder = run_folders.build_whole_run(tmp_path, samples=samples)
    kept = pictures_folder(folder)
    kept.mkdir()
    (kept / f"{1:064x}.jpeg").write_bytes(b"picture")
    assert report_images(load_facts(folder)) == [image(1), image(2)]
    page = write_report(folder).read_text(encoding="utf-8")
    assert page.count('href="data:image/jpeg;base64,cGljdHVyZQ=="') == 1
    assert page.count("a.png, 60 \u00d7 40; not shown here") == 1
    assert "/srv/secret/a.png" not in page
