"""Every shipped recipe parses as it is, and trains a few steps on a tiny stand-in."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

import loralab
from loralab.config.checks import UNPAGED, source_names
from loralab.config.schema import Config
from loralab.data.reading.hub import parse_hub_id
from loralab.errors import ConfigError
from loralab.workflows.configure import load_run_config
from loralab.workflows.recipes import list_recipes, write_recipe
from support import tiny
from support.tiny_vision import VISION_FAMILIES, VisionFamily, save_vision_base, vqa_rows

ROWS = 30
WORDS = ("red", "blue", "green", "cat", "dog", "runs", "sleeps", "one", "two", "house", "river", "the", "of", "is")
Rows = list[dict[str, Any]]


def sentence(number: int, words: int) -> str:
    draw = random.Random(number)
    return " ".join(draw.choice(WORDS) for _ in range(words))


def text_rows() -> Rows:
    """Lines as WikiText has them: headings, long ones, and every third empty."""
    return [{"text": "" if i % 3 == 0 else sentence(i, 8 if i % 3 == 1 else 200)} for i in range(ROWS)]


def price_rows() -> Rows:
    return [{"prompt": f"{sentence(i, 12)}\n\nPrice is $", "completion": f"{i + 3}.99"} for i in range(ROWS)]


def question_rows() -> Rows:
    return [
        {"question": f"is {sentence(i, 4)}", "passage": sentence(i + 99, 12), "answer": i % 2 == 0} for i in range(ROWS)
    ]


def chat_rows() -> Rows:
    return [
        {
            "messages": [
                {"role": "user", "content": sentence(i, 5)},
                {"role": "assistant", "content": sentence(i + 99, 6)},
                {"role": "user", "content": sentence(i + 199, 3)},
                {"role": "assistant", "content": sentence(i + 299, 4)},
            ]
        }
        for i in range(ROWS)
    ]


def alpaca_rows() -> Rows:
    return list(tiny.alpaca_rows(ROWS))


def picture_rows(folder: Path) -> Rows:
    return list(vqa_rows(folder, ROWS // 3))


@dataclass(frozen=True)
class StandIn:
    """What takes the place of a recipe's model and data.

    Attributes:
        family: shape in which the recipe's target layers exist.
        rows: rows of the recipe's format; pictures are drawn into the folder that it is given.
        adapted: adapted layers of the two blocks together.
        lora: what the recipe says of layers that the stand-in does not have.
        steps: optimizer steps; 24 rows are left to train on.
    """

    family: tiny.Family | VisionFamily
    rows: Callable[[], Rows] | Callable[[Path], Rows]
    adapted: int
    lora: dict[str, Any] = field(default_factory=dict)
    steps: int = 3

    def save_base(self, folder: Path) -> Path:
        """Write the stand-in's model."""
        if self.family in VISION_FAMILIES:
            return save_vision_base(folder, self.family)
        return tiny.save_base(folder, self.family)

    def write_rows(self, folder: Path) -> Path:
        """Write the rows, and the pictures that they name."""
        rows = self.rows(folder) if self.family in VISION_FAMILIES else self.rows()
        return tiny.write_rows(folder / "rows.json", rows)


STAND_INS: dict[str, StandIn] = {
    "gpt2-alpaca": StandIn("gpt2", alpaca_rows, adapted=6),
    "gpt2-alpaca-10k": StandIn("gpt2", alpaca_rows, adapted=6),
    "llama3.1-8b-chat-qlora-24gb": StandIn("llama", chat_rows, adapted=14),
    "llama3.2-3b-price-qlora-full": StandIn("llama", price_rows, adapted=14),
    "llama3.2-3b-price-qlora-lite": StandIn("llama", price_rows, adapted=8),
    "qwen2.5-0.5b-chat-cpu": StandIn("qwen2", chat_rows, adapted=7, lora={"layers_to_transform": [-1]}, steps=6),
    "qwen2.5-14b-chat-fsdp2": StandIn("qwen2", chat_rows, adapted=14),
    "qwen2.5-3b-wikitext2-qlora": StandIn("qwen2", text_rows, adapted=14),
    "qwen2-vl-vqa": StandIn("qwen2_vl", picture_rows, adapted=14, steps=2),
    "qwen2-vl-vqa-qlora": StandIn("qwen2_vl", picture_rows, adapted=14, steps=2),
    "yes-no-qlora": StandIn("qwen2", question_rows, adapted=14),
}


def recipe_config(name: str, folder: Path) -> Config:
    return load_run_config(write_recipe(name, folder / f"{name}.yaml")).config


@pytest.mark.parametrize("name", list_recipes())
def test_recipe_parses(name: str, tmp_path: Path) -> None:
    config = recipe_config(name, tmp_path)
    assert config.model.name
    for names in (config.data.train, config.data.validation, config.data.test):
        assert all(parse_hub_id(each) for each in source_names(names)), names


def test_recipes_are_told_apart_in_one_line() -> None:
    lines = list_recipes()
    assert len(set(lines.values())) == len(lines) == len(STAND_INS)
    for name, line in lines.items():
        assert 30 < len(line) < 120, name
        assert line.endswith("."), name


@pytest.mark.parametrize("name", list_recipes())
def test_recipe_explains_how_to_start(name: str, tmp_path: Path) -> None:
    text = write_recipe(name, tmp_path / "r.yaml").read_text(encoding="utf-8")
    several = recipe_config(name, tmp_path).training.distributed != "ddp"
    assert f"#   loralab init {name}\n#   loralab {'launch' if several else 'train'} {name}.yaml" in text
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize("name", list_recipes())
def test_recipe_trains(name: str, tmp_path: Path) -> None:
    """The recipe's own settings but model, data and length; a few steps, on the CPU.

    A paged optimizer is refused off CUDA: here its unpaged form stands in.
    """
    config, stand_in = recipe_config(name, tmp_path), STAND_INS[name]
    rows = stand_in.write_rows(tmp_path)
    optim = UNPAGED.get(config.training.optim, config.training.optim)
    run = loralab.train(
        tmp_path / f"{name}.yaml",
        model={"name": str(stand_in.save_base(tmp_path / "base")), "device": "cpu"},
        data={"train": str(rows), "validation": 6, "test": None, "max_length": 128, "cache_dir": str(tmp_path / "c")},
        lora=stand_in.lora,
        training={
            "max_steps": stand_in.steps,
            "logging_steps": 1,
            "optim": optim,
            "save_strategy": "no",
            "save_steps": 500,
        },
        evaluation={"max_new_tokens": 4, "strategy": "epoch", "steps": 100, "num_samples": 1, "bootstrap_samples": 200},
        output={"dir": str(tmp_path / "run")},
    )
    assert len([line for line in run.metrics if "loss" in line]) == stand_in.steps
    assert (run.adapter() / "adapter_model.safetensors").is_file()
    layers = {key.rpartition(".lora_")[0] for key in adapter_tensors(run.adapter())}
    assert len(layers) == stand_in.adapted
    held = run.record["resolved"].get("quantization", {"value": "none"})["value"]
    assert held == {"nf4": "nf4, double", "none": "none"}[config.model.quantization]
    used = load_run_config(run.folder.config).config
    assert used.lora == config.lora.model_copy(update=stand_in.lora)
    if config.lora.layers_to_transform is not None:
        assert run.record["resolved"]["cache_frozen_trunk"]["value"] == "on"
    assert used.training.gradient_checkpointing == config.training.gradient_checkpointing


def adapter_tensors(folder: Path) -> list[str]:
    with safe_open(str(folder / "adapter_model.safetensors"), framework="pt") as tensors:
        return list(tensors.keys())


def test_document_4_hyperparameters(tmp_path: Path) -> None:
    for name in ("qwen2-vl-vqa", "qwen2-vl-vqa-qlora"):
        config = recipe_config(name, tmp_path)
        training = config.training
        assert (training.learning_rate, training.lr_scheduler_type, training.weight_decay) == (5e-6, "linear", 0.01)
        assert (training.num_train_epochs, training.gradient_accumulation_steps) == (3, 16)
        assert (training.optim, training.sampling, config.data.train_on) == ("adamw_torch_fused", "grouped", "response")


def test_document_2_hyperparameters(tmp_path: Path) -> None:
    for name, rank, alpha in (("gpt2-alpaca", 8, 16), ("gpt2-alpaca-10k", 16, 32)):
        config = recipe_config(name, tmp_path)
        assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (rank, alpha, 0.1)
        assert config.lora.target_modules == ["c_attn", "c_proj"]
        assert (config.training.num_train_epochs, config.training.per_device_train_batch_size) == (3, 4)
        assert (config.data.max_length, config.data.validation) == (512, 0.1)
        assert config.evaluation.batch_size == 8
        assert config.model.base_dropout == "as_configured"
        assert config.model.precision == "auto"  # not float16, which a CPU cannot train in


def test_document_2_wording(tmp_path: Path) -> None:
    """The recipe's second file is the wording of document 2, and trains; Stanford's is the default."""
    recipe = write_recipe("gpt2-alpaca-10k", tmp_path / "mine.yaml")
    config = tiny.run_config(
        tiny.save_base(tmp_path / "base", "gpt2"),
        tiny.write_rows(tmp_path / "rows.json", alpaca_rows()),
        tmp_path / "run",
        data={"template": str(recipe.with_suffix(".jinja"))},
        training={"max_steps": 1},
    )
    tokenizer = AutoTokenizer.from_pretrained(loralab.train(config).adapter())
    for content, ending in (
        ("Name it.\n\n### Input:\na cat", ", and an input that provides additional context"),
        ("Go.", ""),
    ):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        assert prompt == (
            f"Below is an instruction that describes a task{ending}.\n"
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{content}\n\n### Response:\n"
        )


def test_no_file_of_a_recipe_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("kept", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"file exists: .*mine\.jinja"):
        write_recipe("gpt2-alpaca-10k", tmp_path / "mine.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.jinja"]
    assert (tmp_path / "mine.jinja").read_text(encoding="utf-8") == "kept"
    assert write_recipe("gpt2-alpaca", tmp_path / "mine.yaml").is_file()  # has no second file
    with pytest.raises(ConfigError, match=r"file exists: .*mine\.yaml"):
        write_recipe("yes-no-qlora", tmp_path / "mine.yaml")


def test_document_1_settings(tmp_path: Path) -> None:
    config = recipe_config("yes-no-qlora", tmp_path)
    assert (config.model.quantization, config.data.format, config.data.train_on) == ("nf4", "yes_no", "response")
    assert config.training.early_stopping is not None
    # What early stopping looks at is no row of the final figures.
    assert isinstance(config.data.validation, int)
    assert config.data.test == "validation"


def test_document_3_settings(tmp_path: Path) -> None:
    config = recipe_config("qwen2.5-3b-wikitext2-qlora", tmp_path)
    assert (config.model.name, config.model.quantization) == ("Qwen/Qwen2.5-3B", "nf4")
    assert (config.data.format, config.data.long_text) == ("text", "split")
    assert config.training.lr_scheduler_type in ("linear", "cosine")
    assert config.training.warmup_ratio > 0
    assert config.training.weight_decay > 0
    assert config.training.max_grad_norm > 0
    assert set(config.advanced.trainer_args) == {"adam_beta1", "adam_beta2", "adam_epsilon"}


def test_document_5_settings(tmp_path: Path) -> None:
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    for size, targets in (("lite", attention), ("full", [*attention, "gate_proj", "up_proj", "down_proj"])):
        config = recipe_config(f"llama3.2-3b-price-qlora-{size}", tmp_path)
        assert (config.model.name, config.model.quantization) == ("meta-llama/Llama-3.2-3B", "nf4")
        assert config.data.train == f"ed-donner/items_prompts_{size}"
        assert str(config.data.validation).startswith(f"ed-donner/items_prompts_{size}#val[:")
        assert (config.data.test, config.data.template, config.data.truncation) == ("test", "none", "drop")
        assert config.lora.target_modules == targets
        assert config.training.optim.startswith("paged_")
        assert config.training.save_strategy == config.evaluation.strategy == "steps"
