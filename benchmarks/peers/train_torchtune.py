"""torchtune's recipe `lora_finetune_single_device` on a CPU, for Qwen2.5's shape.

What differs from `tune run`: the recipe's class is loaded from its file, rows come tokenized (its own data classes
would render them in ChatML), and no checkpoint is written behind the last step.
"""

import importlib.util
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torchtune
from job import (
    CannotRunError,
    Job,
    MemoryWatch,
    Result,
    count_supervised,
    encode_row,
    run,
    seconds_since_launch,
    versions,
)
from omegaconf import OmegaConf
from tokenizers import Tokenizer

ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]


def build_tokenizer(pad_id: int) -> SimpleNamespace:
    """Return what the recipe asks of a tokenizer: the id of padding."""
    return SimpleNamespace(pad_id=pad_id)


class Rows(torch.utils.data.Dataset):
    """Rows as tokens and labels, in the order of the job.

    Args:
        tokenizer: not needed.
        job: file of the job.
    """

    def __init__(self, tokenizer: Any, job: str) -> None:
        settings = Job(**json.loads(Path(job).read_text(encoding="utf-8")))
        backend = Tokenizer.from_file(str(Path(settings.model) / "tokenizer.json"))

        def encode(text: str) -> list[int]:
            return list(backend.encode(text, add_special_tokens=False).ids)

        encoded = [encode_row(row, encode, max_length=settings.max_length) for row in settings.read_rows()]
        self.rows = [{"tokens": ids, "labels": labels} for ids, labels in encoded]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


def build_model_section(job: Job, model: dict[str, Any]) -> dict[str, Any]:
    """Return torchtune's builder and its arguments for what a model's config.json says."""
    return {
        "_component_": "torchtune.models.qwen2.lora_qwen2",
        "lora_attn_modules": ATTENTION,
        "apply_lora_to_mlp": True,
        "vocab_size": model["vocab_size"],
        "num_layers": model["num_hidden_layers"],
        "num_heads": model["num_attention_heads"],
        "num_kv_heads": model["num_key_value_heads"],
        "embed_dim": model["hidden_size"],
        "intermediate_dim": model["intermediate_size"],
        "max_seq_len": model["max_position_embeddings"],
        "norm_eps": model["rms_norm_eps"],
        "rope_base": float((model.get("rope_parameters") or model)["rope_theta"]),
        "tie_word_embeddings": True,
        "lora_rank": job.r,
        "lora_alpha": job.alpha,
        "lora_dropout": 0.0,
    }


def build_config(job: Job) -> Any:
    """Return the recipe's configuration: its own for 0.5B, with the job's numbers.

    Raises:
        CannotRunError: another architecture.
    """
    model = json.loads((Path(job.model) / "config.json").read_text(encoding="utf-8"))
    if model["model_type"] != "qwen2":
        raise CannotRunError(f"torchtune has no model for {model['model_type']}")
    if job.quantization != "none":
        raise CannotRunError("not tried with quantized weights")
    here = Path(__file__).stem
    return OmegaConf.create(
        {
            "output_dir": f"{job.work}/out",
            "model": build_model_section(job, model),
            "tokenizer": {"_component_": f"{here}.build_tokenizer", "pad_id": 0},
            "checkpointer": {
                "_component_": "torchtune.training.FullModelHFCheckpointer",
                "checkpoint_dir": job.model,
                "checkpoint_files": ["model.safetensors"],
                "recipe_checkpoint": None,
                "output_dir": f"{job.work}/out",
                "model_type": "QWEN2",
            },
            "resume_from_checkpoint": False,
            "dataset": {"_component_": f"{here}.Rows", "job": f"{job.work}/job.json"},
            "seed": 42,
            "shuffle": False,
            "epochs": 1,
            "max_steps_per_epoch": None,
            "batch_size": job.batch,
            "gradient_accumulation_steps": 1,
            "optimizer": {"_component_": "torch.optim.AdamW", "weight_decay": 0.0, "lr": job.learning_rate},
            "lr_scheduler": {
                "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
                "num_warmup_steps": 0,
            },
            "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
            "device": "cpu",
            "dtype": "bf16",
            "compile": False,
            "enable_activation_checkpointing": False,
            "clip_grad_norm": 1.0,
            "metric_logger": {
                "_component_": "torchtune.training.metric_logging.DiskLogger",
                "log_dir": f"{job.work}/out/logs",
            },
        }
    )


def load_recipe() -> Any:
    """Return the recipe's class; torchtune forbids to import it by name."""
    path = Path(torchtune.__file__).parents[1] / "recipes/lora_finetune_single_device.py"
    spec = importlib.util.spec_from_file_location("lora_finetune_single_device", path)
    if spec is None or spec.loader is None:
        raise CannotRunError(f"no recipe at {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LoRAFinetuneRecipeSingleDevice


def train(job: Job) -> Result:
    """Train the job's epoch."""
    torch.set_num_threads(job.threads)
    logged: list[float] = []
    first: list[float] = []
    with MemoryWatch() as watch:
        config = build_config(job)
        recipe = load_recipe()(config)
        recipe.setup(config)
        recipe.save_checkpoint = lambda **_: None

        def log(values: dict[str, Any], **_: Any) -> None:
            first.append(seconds_since_launch(job))
            logged.append(float(values["loss"]))

        recipe._metric_logger.log_dict = log
        started = time.perf_counter()
        recipe.train()
        seconds = time.perf_counter() - started
    rows = Rows(None, f"{job.work}/job.json").rows
    steps = [rows[start : start + job.batch] for start in range(0, len(rows), job.batch)]
    counts = [count_supervised([row["labels"] for row in step]) for step in steps]
    return Result(
        train_seconds=seconds,
        start_seconds=first[0],
        losses=logged,
        supervised_tokens=sum(counts),
        step_tokens=counts,
        layout_tokens=sum(len(step) * max(len(row["tokens"]) for row in step) for step in steps),
        peak_rss_bytes=watch.peak_rss_bytes,
        peak_anonymous_bytes=watch.peak_anonymous_bytes,
        versions=versions("torchtune", "torchao", "torch"),
        notes=["adapter in bfloat16 too; learning rate falls as a cosine"],
    )


if __name__ == "__main__":
    run(train, __doc__)
