"""How the vision base is taught: fresh pictures and prose at every step, and a probe of what it knows."""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

from vision_base import END, IMAGE, IMAGE_TOKENS, MERGE, PATCH, VISION_END, VISION_START, new_processor
from vision_prose import CLAIMS, MARK, PROSE, Lesson, plain, say_all, sayings, sentence
from vision_sight import Sight, cell_labels, features
from vision_world import SIDE, Scene, draw, make_scene

BATCH, TEXT_LENGTH = 64, 48
FLOOR_RATE, WARMUP_STEPS, WEIGHT_DECAY, CLIP = 2e-5, 60, 0.02, 1.0
# The second stage keeps the first one's task, so that the tower goes on learning from it.
SIGHT_WEIGHT = 0.3
# Words that the picture does not settle teach only style.
PLAIN_WEIGHT = 0.25
LINES_SHARE, DIGEST_DOCUMENTS, REPORT_EVERY, SAVE_EVERY = 0.5, 2000, 50, 250


@dataclass(frozen=True)
class Stage:
    """A part of the teaching.

    Attributes:
        name: of its checkpoint, and in the log.
        steps: how many.
        decay_over: steps over which the learning rate would come down to its floor.
        peak: highest learning rate.
        lesson: which sentences; None for the stage that teaches the tower alone.
        lists: share of the documents that begin with the list of all shapes: at first, and later.
        lists_until: step at which "later" begins.
        salt: behind the plan's seed, so that no stage sees the pictures of another.
    """

    name: str
    steps: int
    decay_over: int
    peak: float
    lesson: Lesson | None = None
    lists: tuple[float, float] = (0.0, 0.0)
    lists_until: int = 0
    salt: str = ""

    def list_share(self, step: int) -> float:
        """How often a document of a step begins with the list of all shapes."""
        return self.lists[0] if step < self.lists_until else self.lists[1]

    def rate_at(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then a cosine down to the floor."""
        if step < WARMUP_STEPS:
            return self.peak * (step + 1) / WARMUP_STEPS
        part = (step - WARMUP_STEPS) / (self.decay_over - WARMUP_STEPS)
        return FLOOR_RATE + (self.peak - FLOOR_RATE) * 0.5 * (1 + math.cos(math.pi * part))


# All words of a list are settled, so the second stage begins with many of them.
STAGES = (
    Stage("look", 1500, 1500, 1.5e-3, salt=":sight"),
    Stage("read", 1000, 2800, 2e-3, PROSE, (0.6, 0.15), 336),
    Stage("claims", 1200, 1200, 1.5e-3, CLAIMS, (0.1, 0.1), salt=":claims"),
)


@dataclass(frozen=True)
class Plan:
    """What a pretraining run is told.

    Attributes:
        seed: of the pictures and the prose.
        probe_seed: of the held-out pictures.
        stages: in order.
    """

    seed: int
    probe_seed: int
    stages: tuple[Stage, ...] = STAGES


@dataclass(frozen=True)
class Batch:
    """Pictures and prose as tensors.

    Attributes:
        pixels: (B * patches, patch size).
        ids: (B, T) token ids, the picture's placeholders first.
        weights: (B, T) of each token in the loss; 0 for placeholders and padding.
        marks: for each settled token its row, its place and its mark.
    """

    pixels: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    marks: list[tuple[int, int, str]]


Pair = tuple[Scene, str]


def document(rng: random.Random, scene: Scene, list_share: float, lesson: Lesson) -> str:
    """Some true sentences on a scene, with marks: prose, or lines in lower case.

    Args:
        rng: The random source.
        scene: What they are about.
        list_share: How often the list of all shapes comes first.
        lesson: How often each kind of sentence comes.
    """
    lines = rng.random() < LINES_SHARE
    said = sayings(rng, scene, lesson)
    parts = [say_all(scene)] if rng.random() < list_share else []
    parts += [next(said) for _ in range(rng.choice((1, 4, 5, 6)) - len(parts))]
    return "\n".join(parts) if lines else " ".join(map(sentence, parts))


def unmark(text: str) -> tuple[str, list[tuple[int, int, str]]]:
    """Takes the marks out of a text and returns where the marked words begin and end."""
    words, spans, done = "", [], 0
    for match in MARK.finditer(text):
        words += text[done : match.start()]
        spans.append((len(words), len(words) + len(match[2]), match[1]))
        words, done = words + match[2], match.end()
    return words + text[done:], spans


class Encoder:
    """Turns scenes and documents into tensors, through the base's own processor."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Takes the tokenizer whose ids the model reads."""
        self.tokenizer = tokenizer
        self.pictures: Qwen2VLImageProcessor = new_processor(tokenizer).image_processor
        marks = [VISION_START, *[IMAGE] * IMAGE_TOKENS, VISION_END]
        self.prefix: list[int] = tokenizer.convert_tokens_to_ids(marks)
        self.end: int = tokenizer.convert_tokens_to_ids(END)

    def pixels(self, scenes: list[Scene]) -> torch.Tensor:
        """The drawn scenes as the vision tower reads them."""
        return self.pictures([draw(scene) for scene in scenes], return_tensors="pt")["pixel_values"]

    def batch(self, pairs: list[Pair]) -> Batch:
        """Scenes and documents as one batch; what is longer than a row is cut off."""
        texts, spans = zip(*(unmark(text) for _, text in pairs), strict=True)
        read = self.tokenizer(list(texts), return_offsets_mapping=True)
        start, rows = len(self.prefix), []
        weights = torch.zeros(len(pairs), start + TEXT_LENGTH)
        marks = []
        for row, ids in enumerate(read["input_ids"]):
            kept = [*ids, self.end][:TEXT_LENGTH]
            weights[row, start : start + len(kept)] = PLAIN_WEIGHT
            for place, (low, high) in enumerate(read["offset_mapping"][row][:TEXT_LENGTH]):
                for begin, stop, mark in spans[row]:
                    if low < stop and high > begin:
                        weights[row, start + place] = 1.0
                        marks.append((row, start + place, mark))
            rows.append([*self.prefix, *kept, *[self.end] * (TEXT_LENGTH - len(kept))])
        return Batch(self.pixels([scene for scene, _ in pairs]), torch.tensor(rows), weights, marks)


def positions(rows: int, length: int) -> torch.Tensor:
    """Position ids (3, B, T) of a picture in front of text, as the model itself would count them."""
    across = SIDE // (PATCH * MERGE)
    place = torch.arange(IMAGE_TOKENS)
    picture = 1 + torch.stack([torch.zeros_like(place), place // across, place % across])
    behind = torch.arange(length - IMAGE_TOKENS - 1) + 1 + across
    one = torch.cat([torch.zeros(3, 1, dtype=torch.long), picture, behind.expand(3, -1)], dim=1)
    return one[:, None].expand(3, rows, length)


def logits(model: Qwen2VLForConditionalGeneration, seen: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The model's logits (B, T, V) for image tokens and text, one picture a row."""
    words = model.get_input_embeddings()(ids)
    joined = torch.cat([words[:, :1], seen.to(words.dtype), words[:, 1 + IMAGE_TOKENS :]], dim=1)
    return model(inputs_embeds=joined, position_ids=positions(*ids.shape), use_cache=False).logits


def pairs_of(step: int, seed: str, stage: Stage, count: int) -> list[Pair]:
    """The scenes and documents of a step, the same at every run."""
    rng = random.Random(f"{seed}:{step}")
    scenes = [make_scene(rng) for _ in range(count)]
    return [(scene, document(rng, scene, stage.list_share(step), stage.lesson or ())) for scene in scenes]


def pretraining_digest(tokenizer: PreTrainedTokenizerFast, plan: Plan) -> str:
    """SHA-256 over the first documents of each stage, their token ids and their pictures' pixels."""
    digest = hashlib.sha256()
    for stage in plan.stages:
        for step in range(DIGEST_DOCUMENTS // BATCH if stage.lesson else 0):
            for scene, text in pairs_of(step, seed_of(stage, plan), stage, BATCH):
                words = plain(text)
                digest.update(words.encode() + repr(tokenizer(words)["input_ids"]).encode())
                digest.update(draw(scene).tobytes())
    return digest.hexdigest()


def seed_of(stage: Stage, plan: Plan) -> str:
    """The seed of a stage's pictures and prose."""
    return f"{plan.seed}{stage.salt}"


def word_loss(scores: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Weighted mean loss of the next tokens."""
    kept = batch.weights[:, 1:] > 0
    each = functional.cross_entropy(scores[:, :-1][kept].float(), batch.ids[:, 1:][kept], reduction="none")
    weights = batch.weights[:, 1:][kept]
    return (each * weights).sum() / weights.sum()


class Teacher:
    """Trains a model through both stages and keeps a checkpoint."""

    def __init__(self, model: Qwen2VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, plan: Plan) -> None:
        """Takes the model, which it changes in place, its tokenizer and the plan."""
        self.model, self.tokenizer, self.plan = model, tokenizer, plan
        self.encoder, self.sight = Encoder(tokenizer), Sight()
        # On CPUs the fused kernel's backward takes longer than plain matrix products at this size.
        model.set_attn_implementation("eager")

    def look(self, stage: Stage, step: int) -> tuple[torch.Tensor, list[float]]:
        """The first stage's loss at a step, and the shares of kinds, colours and sizes told right."""
        rng = random.Random(f"{seed_of(stage, self.plan)}:{step}")
        scenes = [make_scene(rng) for _ in range(BATCH)]
        labels = torch.tensor([cell_labels(scene) for scene in scenes])
        # bfloat16 halves the time on CPUs that have it; the weights stay float32.
        with torch.autocast("cpu", torch.bfloat16):
            seen = features(self.model, self.encoder.pixels(scenes))
            return self.sight.judge(seen, labels)

    def read(self, stage: Stage, step: int) -> tuple[torch.Tensor, list[float]]:
        """A later stage's loss at a step, and the shares of kinds, colours and sizes told right."""
        pairs = pairs_of(step, seed_of(stage, self.plan), stage, BATCH)
        labels = torch.tensor([cell_labels(scene) for scene, _ in pairs])
        batch = self.encoder.batch(pairs)
        with torch.autocast("cpu", torch.bfloat16):
            seen = features(self.model, batch.pixels)
            scores = logits(self.model, seen, batch.ids)
            sight, right = self.sight.judge(seen, labels)
        return word_loss(scores, batch) + SIGHT_WEIGHT * sight, right

    def run(self, stage: Stage, scratch: Path) -> None:
        """Runs one stage, from its checkpoint if there is one.

        Args:
            stage: Which.
            scratch: Folder of the checkpoint.
        """
        saved = scratch / f"{stage.name}.pt"
        both = nn.ModuleDict({"model": self.model, "sight": self.sight})
        optimizer = torch.optim.AdamW(both.parameters(), betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
        first = 0
        if saved.is_file():
            state = torch.load(saved, weights_only=True)
            both.load_state_dict(state["weights"])
            optimizer.load_state_dict(state["optimizer"])
            first = state["step"]
        begun, recent = time.monotonic(), []
        for step in range(first, stage.steps):
            both.train()
            for group in optimizer.param_groups:
                group["lr"] = stage.rate_at(step)
            loss, right = self.read(stage, step) if stage.lesson else self.look(stage, step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(both.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            recent = [*recent, [loss.item(), *right]][-REPORT_EVERY:]
            done = step + 1
            if done % REPORT_EVERY == 0 or done == stage.steps:
                shown = " ".join(f"{sum(column) / len(column):.3f}" for column in zip(*recent, strict=True))
                spent = f"{time.monotonic() - begun:.0f} s"
                print(f"{stage.name} {done}/{stage.steps} loss, kind, color, size {shown} {spent}", flush=True)
            if done % SAVE_EVERY == 0 or done == stage.steps:
                scratch.mkdir(parents=True, exist_ok=True)
                state = {"weights": both.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
                torch.save(state, saved)
                if stage.lesson:
                    found = probe(self.model, self.tokenizer, self.plan.probe_seed, 512)
                    print("probe", " ".join(f"{k} {r / n:.1%}" for k, (r, n) in sorted(found.items())), flush=True)


def pretrain(
    model: Qwen2VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, plan: Plan, scratch: Path
) -> None:
    """Trains the model in place; goes on from the scratch folder's checkpoints if there are any.

    Args:
        model: The model, changed in place.
        tokenizer: Its tokenizer.
        plan: Stages and seeds.
        scratch: Folder of the checkpoints.
    """
    teacher = Teacher(model, tokenizer, plan)
    for stage in plan.stages:
        teacher.run(stage, scratch)


@torch.no_grad()
def probe(
    model: Qwen2VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, seed: int, count: int
) -> dict[str, tuple[int, int]]:
    """Counts how many settled words the model predicts, one sentence a held-out picture.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        seed: Of the pictures and sentences; another one than that of training.
        count: How many sentences.

    Returns:
        Right ones and all of them, for each mark, and for the lists of all shapes under "list".
    """
    rng = random.Random(f"probe:{seed}")
    encoder, found = Encoder(tokenizer), defaultdict(lambda: (0, 0))
    model.eval()
    while count > 0:
        scenes = [make_scene(rng) for _ in range(BATCH)]
        batch = encoder.batch([(scene, _settled(rng, scene)) for scene in scenes])
        best = logits(model, features(model, batch.pixels), batch.ids).argmax(-1)
        for row, place, mark in batch.marks:
            right, asked = found[mark]
            found[mark] = right + int(best[row, place - 1] == batch.ids[row, place]), asked + 1
        count -= BATCH
    return dict(found)


def _settled(rng: random.Random, scene: Scene) -> str:
    """A sentence with just one marked word, so that no word before it gives the answer away."""
    said = sayings(rng, scene)
    return next(text for text in said if len(MARK.findall(text)) == 1)


@torch.no_grad()
def captions(
    model: Qwen2VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, seed: int, count: int
) -> list[tuple[str, str]]:
    """Lists of held-out pictures: the true one and the one that the model writes, greedily.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        seed: Of the pictures.
        count: How many pictures.
    """
    rng = random.Random(f"captions:{seed}")
    encoder, scenes = Encoder(tokenizer), [make_scene(rng) for _ in range(count)]
    model.eval()
    seen = features(model, encoder.pixels(scenes))
    ids = torch.tensor([encoder.prefix] * count)
    for _ in range(TEXT_LENGTH):
        ids = torch.cat([ids, logits(model, seen, ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    texts = tokenizer.batch_decode(ids[:, len(encoder.prefix) :])
    return [(plain(say_all(scene)), text.split(END)[0]) for scene, text in zip(scenes, texts, strict=True)]
