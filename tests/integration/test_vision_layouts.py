"""Pictures change no maths: one at a time = padded = packed = picture-shared = features kept = the model's own loss.

Real processors, tiny random models of three families; rows have several questions about one picture, one turn with two
pictures, two turns with a picture each, and no picture at all.
"""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loralab.config.schema import DataConfig, LoraConfig
from loralab.data.dataset import PreparedData, prepare_data
from loralab.data.example import ImageFile, TokenizedExample
from loralab.data.images.files import decode
from loralab.data.images.processor import PictureProcessor
from loralab.data.images.reader import PictureReader
from loralab.layout.planner import Planner
from loralab.models.adapters import build_adapter
from loralab.models.picture_features import encode_pictures
from loralab.models.supervised import SupervisedPeftModel
from loralab.models.vision import position_axes
from loralab.progress import Reporter
from support.layouts import ALWAYS_SHARE, draw_adapter, largest_difference, loss_and_gradients
from support.tiny import write_rows
from support.tiny_vision import VISION_FAMILIES, build_vision_model, draw_picture, vqa_rows

SAME = 1e-5
ALL = 1_000_000
PLANNERS = {
    "padded, one row at a time": Planner(1, layout="padded"),
    "padded, all in one": Planner(ALL, layout="padded"),
    "packed, all in one": Planner(ALL, layout="packed"),
    "packed, branches apart": Planner(ALL, layout="packed", cost=ALWAYS_SHARE),
    "shared wherever possible": Planner(ALL, cost=ALWAYS_SHARE),
    "shared, 100 tokens": Planner(100, cost=ALWAYS_SHARE),
    "shared, one path at a time": Planner(1, cost=ALWAYS_SHARE),
}


class Kept:
    """Features of all pictures, computed one by one before."""

    def __init__(self, model: SupervisedPeftModel, processor: PictureProcessor) -> None:
        self._model, self._processor = model, processor

    @functools.cache  # noqa: B019 - lives as long as its test
    def load(self, file: ImageFile) -> torch.Tensor:
        with torch.no_grad():
            return encode_pictures(self._model.language_model, self._processor.read([file]))


def build(family, *, seed: int, vision: str = "none", dropout: float = 0.0, checkpointing: bool = False):
    base, processor = build_vision_model(family, seed=seed)
    base.requires_grad_(False)
    if checkpointing:
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    model, _ = build_adapter(base, LoraConfig(r=4, dropout=dropout, vision=vision), seed=seed)
    draw_adapter(model, seed=seed + 1)
    model.tree_kernel = "per_tree"
    # Gradients of a tower's keys are small differences of large numbers: in float32 rounding alone passed the bar on
    # some processors.
    return model.double(), PictureProcessor(processor)


def prepared(folder: Path, pictures: PictureProcessor) -> PreparedData:
    rows = []
    for row in vqa_rows(folder, 3):
        asked = [{"type": "image", "image": row["image"]}, row["question"]]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["answer"]}]
        rows.append({"messages": turns})
    picture = [{"type": "image", "image": "images/0.png"}]
    other = [{"type": "image", "image": str(draw_picture(folder / "images/9.png", 9).relative_to(folder))}]
    rows += [
        {
            "messages": [
                {"role": "user", "content": [*picture, *other, "which cat sleeps?"]},
                {"role": "assistant", "content": "two"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": [*picture, "red?"]},
                {"role": "assistant", "content": "blue"},
                {"role": "user", "content": ["and the ", *other]},
                {"role": "assistant", "content": "green tree"},
            ]
        },
        {"messages": [{"role": "user", "content": "the bird sings"}, {"role": "assistant", "content": "one river"}]},
    ]
    data = DataConfig(
        train=str(write_rows(folder / "rows.json", rows)), max_length=512, cache_dir=str(folder / "cache")
    )
    return prepare_data(data, pictures.processor.tokenizer, reporter=Reporter(), pictures=pictures)


def reader_of(model: SupervisedPeftModel, pictures: PictureProcessor) -> PictureReader:
    return PictureReader(pictures, position_axes(model.language_model.config))


def own_loss_and_gradients(model: SupervisedPeftModel, pictures: PictureProcessor, examples: list[TokenizedExample]):
    """Return the same of the model's own forward: one branch at a time, processed by the processor itself."""
    model.zero_grad()
    model.train()
    model.language_model.set_attn_implementation("eager")
    tokenizer = pictures.processor.tokenizer
    total, count = torch.zeros(()), 0
    for example in examples:
        for branch in example.branches:
            ids = branch.prompt_ids.tolist()
            for image in reversed(branch.images):
                ids[image.start : image.end] = [pictures.token]
            shown = [decode(image.file) for image in branch.images]
            text = tokenizer.decode(ids)
            made = pictures.processor(
                text=[text], images=[shown] if shown else None, add_special_tokens=False, return_tensors="pt"
            )
            assert made["input_ids"][0].tolist() == branch.prompt_ids.tolist()
            answer = torch.tensor(branch.answer_ids.tolist())[None]
            made["input_ids"] = torch.cat([made["input_ids"], answer], dim=1)
            made["attention_mask"] = torch.ones_like(made["input_ids"])
            if "mm_token_type_ids" in made:
                made["mm_token_type_ids"] = torch.cat([made["mm_token_type_ids"], torch.zeros_like(answer)], dim=1)
            logits = model.language_model(**made, use_cache=False).logits[0, -answer.shape[1] - 1 : -1]
            total = total + torch.nn.functional.cross_entropy(logits, answer[0], reduction="sum")
            count += answer.shape[1]
    (total / count).backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return float(total.detach()) / count, gradients


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("vision", "seed"), [("none", 0), ("projector", 1), ("all", 2)])
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_every_layout_gives_the_models_own_loss_and_gradients(family, vision, seed, checkpointing, tmp_path) -> None:
    model, pictures = build(family, seed=seed, vision=vision, checkpointing=checkpointing)
    examples = list(prepared(tmp_path, pictures).splits["train"])
    reader = reader_of(model, pictures)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert any("merger" in n or "projector" in n or "connector" in n for n in trained) is (vision != "none")
    assert any("blocks" in n or "vision_tower" in n or "vision_model" in n for n in trained) is (vision == "all")
    own, own_gradients = own_loss_and_gradients(model, pictures, examples)
    assert own_gradients.keys() == trained
    model.language_model.set_attn_implementation("sdpa")
    readers = {name: replace(planner, pictures=reader) for name, planner in PLANNERS.items()}
    if vision == "none":
        readers["kept features"] = replace(
            PLANNERS["shared wherever possible"], pictures=reader.knowing(Kept(model, pictures))
        )
    for name, planner in readers.items():
        loss, gradients, _ = loss_and_gradients(model, planner, examples)
        assert loss == pytest.approx(own, rel=SAME), name
        assert largest_difference(gradients, own_gradients) <= SAME, name
