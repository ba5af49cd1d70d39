"""LitGPT's `finetune lora`, by its own `setup`, on a checkpoint that its own converter made.

What differs from the command: rows keep their order (its JSON data module always shuffles), and nothing is written
or merged behind the last step. Its learning rate begins at 0 and falls as a cosine; it has no linear schedule.
"""

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from job import CannotRunError, Job, MemoryWatch, Result, count_supervised, run, seconds_since_launch, versions
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import JSON, get_sft_collate_fn
from litgpt.finetune import lora
from litgpt.prompts import Default
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from torch.utils.data import DataLoader

NAME = "Qwen2.5-0.5B"
COUNTED: dict[str, Any] = {"layout_tokens": 0, "step_tokens": []}


class OrderedJSON(JSON):
    """LitGPT's JSON data in the order of the file, in this process, counted."""

    def train_dataloader(self) -> DataLoader:
        """Return the loader of the training rows."""
        collate = get_sft_collate_fn(max_seq_length=self.max_seq_length, ignore_index=self.ignore_index)

        def counting(rows: Sequence[Any]) -> Any:
            batch = collate(rows)
            COUNTED["step_tokens"].append(count_supervised(batch["labels"].tolist()))
            COUNTED["layout_tokens"] += batch["input_ids"].numel()
            return batch

        return DataLoader(self.train_dataset, batch_size=self.batch_size, collate_fn=counting)


def convert(model: Path, folder: Path) -> Path:
    """Return a LitGPT checkpoint of the model.

    Raises:
        CannotRunError: LitGPT has no such architecture.
    """
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "qwen2" or config["hidden_size"] != 896:
        raise CannotRunError(f"LitGPT has no configuration for this shape of {config['model_type']}")
    checkpoint = folder / NAME  # the converter reads the architecture off the folder's name
    checkpoint.mkdir(parents=True)
    for path in model.iterdir():
        shutil.copy(path, checkpoint)
    convert_hf_checkpoint(checkpoint, model_name=NAME)
    # LitGPT's table has the published model's rotary base; the model here says its own.
    theta = float((config.get("rope_parameters") or config)["rope_theta"])
    settings = checkpoint / "model_config.yaml"
    lines = settings.read_text(encoding="utf-8").splitlines()
    settings.write_text(
        "\n".join(f"rope_base: {int(theta)}" if line.startswith("rope_base:") else line for line in lines) + "\n",
        encoding="utf-8",
    )
    return checkpoint


def write_data(job: Job, folder: Path) -> Path:
    """Write the rows in LitGPT's form; it appends the end token itself, and takes off one that is there."""
    folder.mkdir()
    rows = [
        {"instruction": row["prompt"], "output": row["completion"].removesuffix(job.end)} for row in job.read_rows()
    ]
    (folder / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "val.json").write_text(json.dumps([{"instruction": "a", "output": "b"}]), encoding="utf-8")
    return folder


def read_steps(folder: Path) -> list[dict[str, str]]:
    """Return LitGPT's own line of each step."""
    path = next(folder.rglob("metrics.csv"))
    with path.open(encoding="utf-8") as file:
        return [line for line in csv.DictReader(file) if line.get("iter_time")]


def train(job: Job) -> Result:
    """Train the job's epoch."""
    if job.quantization != "none":
        raise CannotRunError("not tried with quantized weights, for which LitGPT supports bitsandbytes 0.42.0 alone")
    torch.set_num_threads(job.threads)
    work, first = Path(job.work), []
    with MemoryWatch() as watch:
        checkpoint = convert(Path(job.model), work / "checkpoints")
        build_optimizer = lora.instantiate_torch_optimizer

        def clocked(*arguments: Any, **named: Any) -> torch.optim.Optimizer:
            optimizer = build_optimizer(*arguments, **named)
            optimizer.register_step_post_hook(lambda *_: first.append(seconds_since_launch(job)))
            return optimizer

        lora.instantiate_torch_optimizer = clocked
        lora.save_hyperparameters = lora.merge_lora = lambda *_, **__: None
        lora.setup(
            checkpoint,
            out_dir=work / "out",
            precision="bf16-true",
            lora_r=job.r,
            lora_alpha=job.alpha,
            lora_dropout=0.0,
            **dict.fromkeys(("lora_query", "lora_key", "lora_value", "lora_projection", "lora_mlp"), True),
            data=OrderedJSON(write_data(job, work / "data"), mask_prompt=True, prompt_style=Default(), num_workers=0),
            train=TrainArgs(
                save_interval=None,
                log_interval=1,
                global_batch_size=job.batch,
                micro_batch_size=job.batch,
                lr_warmup_steps=1,
                epochs=1,
                max_steps=job.steps,
                max_seq_length=job.max_length,
            ),
            eval=EvalArgs(
                interval=10**9, max_new_tokens=1, max_iters=1, initial_validation=False, final_validation=False
            ),
            optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": job.learning_rate, "weight_decay": 0.0}},
        )
    steps = read_steps(work / "out")
    return Result(
        train_seconds=sum(float(line["iter_time"]) for line in steps),
        start_seconds=first[0],
        losses=[float(line["loss"]) for line in steps],
        supervised_tokens=sum(COUNTED["step_tokens"]),
        peak_rss_bytes=watch.peak_rss_bytes,
        peak_anonymous_bytes=watch.peak_anonymous_bytes,
        versions=versions("litgpt", "lightning", "torch"),
        notes=[
            "train_seconds is the sum of LitGPT's own iter_time; adapter in bfloat16 too; learning rate 0 in the first "
            "step, then a cosine; its start includes converting the checkpoint"
        ],
        **COUNTED,
    )


if __name__ == "__main__":
    run(train, __doc__)
