"""On real picture rows, what carries loss is exactly the answers, under the real processors of four families."""

import json
import os
import shutil
from pathlib import Path

import pytest

from loralab.config.schema import DataConfig, ImageConfig
from loralab.data.dataset import prepare_data
from loralab.data.images.files import decode
from loralab.data.images.processor import PictureProcessor
from loralab.progress import Reporter
from support.tiny_vision import VISION_FAMILIES, VisionFamily, build_vision_model

DATA = Path(os.environ.get("LORALAB_DATA", "/nowhere")) / "vqa"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not DATA.is_dir(), reason="LORALAB_DATA has no vqa folder")]


def read_rows(path: Path) -> list[dict]:
    text = path.read_text(encoding="utf-8")
    return (
        json.loads(text)
        if text.lstrip().startswith("[")
        else [json.loads(line) for line in text.split("\n") if line.strip()]
    )


def answers_of(row: dict) -> list[str]:
    """Return a row's answers, read from its columns and not by the program."""
    if "answer" in row:
        return [row["answer"]]
    turns = row.get("messages") or row["conversations"]
    said = [turn for turn in turns if turn.get("role", turn.get("from")) in ("assistant", "gpt")]
    contents = [turn.get("content", turn.get("value")) for turn in said]
    return [text if isinstance(text, str) else "".join(part["value"] for part in text) for text in contents]


def copy_of_v1(folder: Path) -> Path:
    """Write the structured rows about pictures where their paths, which begin with data/, lead somewhere."""
    shutil.copytree(DATA / "llamafactory_mllm/mllm_demo_data", folder / "data/mllm_demo_data")
    rows = read_rows(DATA / "llamafactory_mllm/v1_multimodal_demo.jsonl")
    kinds = [{part["type"] for turn in row["messages"] for part in turn["content"]} for row in rows]
    kept = [row for row, kind in zip(rows, kinds, strict=True) if kind <= {"text", "image_url"}]
    assert kept
    path = folder / "v1.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in kept), encoding="utf-8")
    return path


@pytest.mark.parametrize("family", VISION_FAMILIES)
@pytest.mark.parametrize("name", ["easy_train", "easy_test", "llamafactory", "v1", "qwen"])
def test_what_carries_loss_is_the_answers(name: str, family: VisionFamily, tmp_path: Path) -> None:
    paths = {
        "easy_train": DATA / "easy_vqa/train.jsonl",
        "easy_test": DATA / "easy_vqa/test.jsonl",
        "llamafactory": DATA / "llamafactory_mllm/mllm_demo.json",
        "qwen": DATA / "qwen_vl_demo/single_images.json",
    }
    path = copy_of_v1(tmp_path) if name == "v1" else paths[name]
    _, processor = build_vision_model(family)
    pictures = PictureProcessor(processor)
    # Of Qwen2-VL's demo, the paths start from the folder above the one of its rows.
    data = DataConfig(train=str(path), max_length=4096, cache_dir=str(tmp_path / "cache/tokens"), image=ImageConfig())
    made = prepare_data(data, processor.tokenizer, reporter=Reporter(), pictures=pictures)
    stored, rows = made.splits["train"], read_rows(path)
    assert len(stored) == len(rows)
    stop = made.prompter.stop.ids[0]
    for example in stored:
        expected = answers_of(rows[example.row - 1])
        found = [branch.answer_ids.tolist() for branch in example.branches]
        assert [ids[-1] for ids in found] == [stop] * len(expected)
        # A template may put one blank before an answer; nothing else is added.
        assert [processor.tokenizer.decode(ids[:-1]).removeprefix(" ") for ids in found] == expected
    check_prompts(stored, pictures)


def check_prompts(stored, pictures: PictureProcessor) -> None:
    """Hold some prompts against what the processor itself makes of text and real pictures."""
    for index in range(0, len(stored), max(1, len(stored) // 40)):
        for branch in stored[index].branches:
            ids = branch.prompt_ids.tolist()
            for image in reversed(branch.images):
                ids[image.start : image.end] = [pictures.token]
            shown = [decode(image.file) for image in branch.images]
            text = pictures.processor.tokenizer.decode(ids)
            made = pictures.processor(text=[text], images=[shown], add_special_tokens=False, return_tensors="pt")
            assert made["input_ids"][0].tolist() == branch.prompt_ids.tolist()
            assert shown
