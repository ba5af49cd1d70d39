"""Peak memory of a merge: writing shard by shard, and the proof.

    python benchmarks/merge_memory.py [--megabytes 400] [--shard 64MB]

A Llama with a small vocabulary and random weights is saved in several shards, a LoRA of rank 8 on all linear layers is
put beside it, and the two are merged in a process of its own. Printed are, above the level at the start of each phase,
the anonymous memory of that process (RssAnon) and, for the writing, its resident memory too, which counts the mapped
pages of the base's files; and the ratio to the largest shard of the base plus the shard made of it.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loralab.progress import Reporter
from loralab.workflows.merge import MergeRequest, merge

_HIDDEN = 1024
_LAYER = _HIDDEN * _HIDDEN * (4 + 3 * 3)  # numbers of a layer


def main() -> None:
    """Make a base and an adapter, merge them, and print the peaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--shard", default="64MB")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--merge-in", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.merge_in is not None:
        measure(arguments.merge_in)
        return
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), arguments.megabytes, arguments.shard, getattr(torch, arguments.dtype))
        subprocess.run([sys.executable, __file__, "--merge-in", folder], check=True)


class Resident(Reporter):
    """Samples the resident memory of this process until the shards are written."""

    def __init__(self) -> None:
        self.process, self.written = psutil.Process(), threading.Event()
        self.level = self.peak = self.process.memory_info().rss
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while not self.written.wait(0.005):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def finish(self, label: str) -> None:
        """Stop when the shards are written."""
        if label == "merge":
            self.written.set()


def measure(root: Path) -> None:
    """Merge what lies below `root`, and print the peaks."""
    shards = [file.stat().st_size for file in (root / "base").glob("*.safetensors")]
    watch = Resident()
    content = merge(root / "adapter", MergeRequest(root / "merged", device="cpu"), reporter=watch)
    show(content, max(shards), sum(shards))
    both = max(shards) + max(each["bytes"] for each in content["shards"])
    print(f"writing, resident: {(watch.peak - watch.level) / 1e6:.1f} MB, {(watch.peak - watch.level) / both:.2f} x")


def build(root: Path, megabytes: int, shard: str, dtype: torch.dtype) -> None:
    """Write base and adapter below `root`."""
    backend = Tokenizer(models.WordLevel({f"w{number}": number for number in range(512)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    layers = max(1, round(megabytes * 1e6 / dtype.itemsize / _LAYER))
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=_HIDDEN,
        intermediate_size=3 * _HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    base: Any = LlamaForCausalLM(config).to(dtype)
    base.save_pretrained(root / "base", max_shard_size=shard)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w0", unk_token="w0").save_pretrained(root / "base")
    base.name_or_path = base.config._name_or_path = str(root / "base")
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.normal_(std=0.02)
    model.save_pretrained(root / "adapter")


def show(content: dict[str, Any], largest: int, total: int) -> None:
    """Print sizes, peaks and ratios."""
    memory, made = content["peak_memory_bytes"], max(each["bytes"] for each in content["shards"])
    print(f"base {total / 1e6:.0f} MB in {len(content['shards'])} shards, {content['dtype']}")
    print(f"largest shard of the base {largest / 1e6:.1f} MB, largest shard made {made / 1e6:.1f} MB")
    writing = memory["writing"]
    print(f"writing: {writing / 1e6:.1f} MB above the start, {writing / (largest + made):.2f} x (shard + shard made)")
    print(f"proof:   {memory['proof'] / 1e6:.1f} MB above the start, {memory['proof'] / total:.2f} x the base")
    print(f"KL(adapter || merged) {content['proof']['kl_adapter_merged']:.2g} nats")


if __name__ == "__main__":
    main()
