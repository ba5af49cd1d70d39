"""TRL's SFTTrainer on rows with pictures, in a process of its own: `python vision_trl.py job.json result.json`.

Its own collator makes pixels and tokens of every batch. bfloat16 weights under its default autocast, no gradient
checkpointing, no packing (TRL refuses it where there are pictures). Rows are picture, prompt and completion as text, so
that the labels are the completion's tokens, stop token included; in chat form TRL would add the template's line break
behind the stop token to them.
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from peft import LoraConfig
from transformers import AutoProcessor, TrainerCallback
from trl import SFTConfig, SFTTrainer

from peers.job import count_supervised


class StepTimes(TrainerCallback):
    """Notes when steps end."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self.times = [time.perf_counter()]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note a step's end."""
        self.times.append(time.perf_counter())


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train an epoch and return times, losses and counts."""
    lines = Path(job["rows"]).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    features = Features({"images": List(ImageFeature()), "prompt": Value("string"), "completion": Value("string")})
    data = Dataset.from_list(
        [{"images": [row["image"]], "prompt": row["prompt"], "completion": row["completion"]} for row in rows],
        features=features,
    )
    trainer = SFTTrainer(
        model=job["model"],
        args=SFTConfig(
            output_dir=job["work"],
            per_device_train_batch_size=job["batch"],
            num_train_epochs=1,
            learning_rate=job["learning_rate"],
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": "bfloat16"},
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=data,
        processing_class=AutoProcessor.from_pretrained(job["model"]),
        peft_config=LoraConfig(
            r=job["r"], lora_alpha=job["alpha"], lora_dropout=0.0, target_modules=job["targets"], task_type="CAUSAL_LM"
        ),
    )
    times, collate = StepTimes(), trainer.data_collator
    counts: list[int] = []
    sizes: list[int] = []

    def count(batch: Any) -> Any:
        made = collate(batch)
        counts.append(count_supervised(made["labels"].tolist()))
        sizes.append(made["input_ids"].numel())
        return made

    trainer.data_collator = count
    trainer.add_callback(times)
    trainer.train()
    trained = {name: p.numel() for name, p in trainer.model.named_parameters() if p.requires_grad}
    names = ("trl", "transformers", "peft", "torch")
    return {
        "step_seconds": [b - a for a, b in zip(times.times, times.times[1:], strict=False)],
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "labels": sum(counts),
        "laid_out": sum(sizes),
        "trained_parameters": sum(trained.values()),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "notes": [
            f"bfloat16 weights, autocast {trainer.args.bf16}, gradient checkpointing "
            f"{trainer.args.gradient_checkpointing}, {type(collate).__name__}"
        ],
    }


if __name__ == "__main__":
    found = train(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(found, indent=1), encoding="utf-8")
