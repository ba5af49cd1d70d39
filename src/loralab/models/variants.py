"""Kinds of adapters: one builder of PEFT's configuration each.

Owns the table of variants.
"""

from collections.abc import Callable

from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig, TaskType
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loralab.config.schema import LoraConfig


def _build_lora(lora: LoraConfig, base: PreTrainedModel, targets: list[str]) -> PeftLoraConfig:
    endings = tuple(f".{target}" for target in targets)
    targeted = [module for name, module in base.named_modules() if f".{name}".endswith(endings)]
    # A quantized layer holds its weight as nn.Linear does; on the unquantized base the adapter meets the original.
    conv = any(isinstance(m, Conv1D) or getattr(m, "source_cls", None) is Conv1D for m in targeted)
    return PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=targets,
        fan_in_fan_out=conv,
        task_type=TaskType.CAUSAL_LM,
    )


VariantBuilder = Callable[[LoraConfig, PreTrainedModel, list[str]], PeftConfig]
VARIANTS: dict[str, VariantBuilder] = {"lora": _build_lora}
