"""`loralab preview` on rows with pictures: shown, proven, and exit code 3 where a picture's tokens are wrong."""

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from loralab.data.images.processor import PictureProcessor
from support.command import run_here, write_config
from support.tiny import write_rows
from support.tiny_vision import save_vision_base, vqa_rows

SECRET = "taken at home"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rows = vqa_rows(folder, 3, questions=1)
    seen = Image.new("RGB", (600, 300), (0, 120, 0))
    exif = seen.getexif()
    exif[0x010E] = SECRET
    seen.save(folder / "images" / "large.jpg", exif=exif, comment=SECRET.encode())
    rows.append({"image": "images/large.jpg", "question": "is it red?", "answer": "two"})
    values: dict[str, Any] = {
        "model": {"name": str(save_vision_base(folder / "base"))},
        "data": {"train": str(write_rows(folder / "rows.json", rows)), "cache_dir": str(folder / "cache")},
    }
    return write_config(folder / "run.yaml", values)


def test_a_picture_is_shown_as_one_token_and_everything_is_proven(config: Path) -> None:
    answer = run_here("preview", config, "--rows", "4")
    assert answer.code == 0, answer.err
    assert "<picture 48x32, 6 tokens: images/0.png>" in answer.out
    assert "<picture 600x300, " in answer.out
    assert "<|image_pad|>" not in answer.out
    assert "train: 4 pictures, used 4 times, " in answer.out
    assert "4 pictures read by the model's processor" in answer.out


def test_the_page_shows_small_copies_without_what_the_file_says(config: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert run_here("preview", config, "--rows", "4", "--html", page).code == 0
    text = page.read_text(encoding="utf-8")
    addresses = re.findall(r'href="data:image/(?:png|jpeg);base64,([^"]+)"', text)
    assert len(addresses) == 4
    assert text.count("<use ") == 4
    for address in addresses:
        data = base64.b64decode(address)
        assert SECRET.encode() not in data
        with Image.open(io.BytesIO(data)) as picture:
            assert max(picture.size) <= 256
            assert not picture.getexif()
    assert "large.jpg, 600 \u00d7 300" in text
    assert "http" not in re.sub(r"http-equiv|https?://www\.w3\.org/\S+", "", text)


def test_tokens_of_a_picture_in_the_json_document(config: Path) -> None:
    result = json.loads(run_here("preview", config, "--rows", "1", "--json").out)
    (turn,) = result["rows"][0]["turns"]
    (picture,) = [token for token in turn["tokens"] if "picture" in token]
    assert turn["text"][picture["start"] : picture["end"]] == picture["text"]
    assert len(picture["ids"]) == 6
    assert sum(len(token["ids"]) for token in turn["tokens"]) == turn["prompt_tokens"] + turn["answer_tokens"]
    assert picture["picture"]["name"] == "images/0.png"
    assert result["proofs"]["pictures"] == 4


def test_a_wrong_number_of_tokens_ends_with_code_3(config: Path, tmp_path: Path) -> None:
    asked = PictureProcessor._ask

    def one_less(self: PictureProcessor, width: int, height: int) -> Any:
        expansion = asked(self, width, height)
        return replace(expansion, ids=expansion.ids[1:]) if width == 600 else expansion

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PictureProcessor, "_ask", one_less)
        answer = run_here("preview", config, "--rows", "0", f"data.cache_dir={tmp_path / 'cache'}")
    assert answer.code == 3
    assert "a picture's tokens are not those that the model's own processor makes of it" in answer.err
    assert "row 4" in answer.err
