"""A family whose forward never uses one of its linear layers, as some published models have them."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from support import tiny


class IdleConfig(LlamaConfig):
    """Llama's, under a name of its own."""

    model_type = "idle_llama"


class IdleForCausalLM(LlamaForCausalLM):
    """A Llama whose first layer has a projection that nothing calls."""

    config_class = IdleConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers[0].mlp.idle_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)


AutoConfig.register("idle_llama", IdleConfig)
AutoModelForCausalLM.register(IdleConfig, IdleForCausalLM)


def save_base(folder: Path) -> Path:
    """Write such a base with its tokenizer to `folder` and return it."""
    tokenizer = tiny.build_tokenizer()
    plain: Any = tiny.build_model("llama", vocabulary=len(tokenizer))
    settings = plain.config.to_dict() | {"model_type": "idle_llama", "architectures": ["IdleForCausalLM"]}
    IdleForCausalLM(IdleConfig(**settings)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
