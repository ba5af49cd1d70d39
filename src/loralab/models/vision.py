"""Models that read pictures: which families do it in a way that layouts can take, and their parts.

Owns the table of families. What is common to all of them: the vision tower gives features, which take the
place of embeddings before the first decoder layer. A family where pictures enter in another way is refused
by name, with the reason.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.processing_utils import ProcessorMixin

from loralab.errors import ModelError, excerpt
from loralab.hub.cache import is_whole


@dataclass(frozen=True, slots=True)
class VisionFamily:
    """Where a family keeps what reads pictures.

    Attributes:
        tower: part of module names below which the vision tower lies.
        projector: part of module names below which lies what leads from the tower to the language model.
    """

    tower: str
    projector: str


def vision_family(config: PreTrainedConfig) -> VisionFamily | None:
    """Return the family of a model that reads pictures, or None where it reads none, or in a way of its own."""
    if getattr(getattr(config, "vision_config", None), "model_type", None) in _OTHER_TOWERS:
        return None
    return VISION_FAMILIES.get(str(config.model_type))


def check_reads_pictures(config: PreTrainedConfig) -> VisionFamily:
    """Return the family of a model.

    Raises:
        ModelError: it reads no pictures, or in a way that token trees cannot take; the reason is named.
    """
    family = vision_family(config)
    if family is None:
        reason = _OTHERS.get(str(config.model_type), "it reads text alone, as far as is known here")
        raise ModelError(
            f"rows with pictures, but not for a model of type {config.model_type!r}: {reason}",
            where="key model.name",
            fix=f"take one of {', '.join(VISION_FAMILIES)}, such as Qwen/Qwen2-VL-2B-Instruct",
        )
    return family


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the class of transformers that builds this model."""
    return AutoModelForCausalLM if vision_family(config) is None else AutoModelForImageTextToText


def position_axes(config: PreTrainedConfig) -> int:
    """Return A, the number of axes that the positions of a model's tokens have."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return 3 if isinstance(rope, dict) and rope.get("mrope_section") else 1


def load_processor(source: str, *, revision: str | None, trust_remote_code: bool) -> ProcessorMixin:
    """Load a model's processor.

    Args:
        source: folder or Hub id.
        revision: of a Hub model.
        trust_remote_code: whether code that comes with it may run.

    Raises:
        ModelError: there is none, or torchvision is missing.
    """
    if importlib.util.find_spec("torchvision") is None:
        raise ModelError(
            "reading pictures needs torchvision, which is not installed",
            where="this Python environment",
            fix='pip install "loralab[vision]"',
        )
    try:
        processor: Any = AutoProcessor.from_pretrained(
            source,
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_files_only=not trust_remote_code and is_whole(source, revision),
        )
    except Exception as error:  # libraries read these files as code of theirs: what fails there is any of its kinds
        raise ModelError(
            f"cannot load the processor of {source!r}: {excerpt(error)}",
            where="key model.name",
            fix="give a folder with preprocessor_config.json or processor_config.json beside the weights",
        ) from error
    if not isinstance(processor, ProcessorMixin):
        raise ModelError(
            f"{source!r} has no processor of pictures, only {type(processor).__name__}",
            where="key model.name",
            fix="put preprocessor_config.json or processor_config.json beside the weights",
        )
    return processor


def is_vision_layer(name: str, family: VisionFamily) -> bool:
    """Return whether a module lies in the vision tower, its projector included."""
    return _below(name, family.tower) or _below(name, family.projector)


def is_projector_layer(name: str, family: VisionFamily) -> bool:
    """Return whether a module lies between vision tower and language model."""
    return _below(name, family.projector)


def is_unread_layer(name: str, config: PreTrainedConfig, family: VisionFamily) -> bool:
    """Return whether a module lies in a layer of the tower behind the one whose output is taken as features.

    LLaVA takes the last layer but one: what was trained behind it would have no gradient.
    """
    taken = getattr(config, "vision_feature_layer", None)
    layers = getattr(getattr(config, "vision_config", None), "num_hidden_layers", None)
    if taken is None or layers is None or not _below(name, family.tower):
        return False
    # Of the outputs 0 (embeddings) to `layers`; a list names several, of which the last counts.
    last = max(number % (layers + 1) for number in ([taken] if isinstance(taken, int) else taken))
    number = next((int(part) for part in name.split(".") if part.isdigit()), None)
    return number is not None and number >= last


def vision_modules(model: PreTrainedModel, family: VisionFamily) -> list[nn.Module]:
    """Return tower and projector of a model."""
    parts = {family.tower, family.projector}
    found = [module for name, module in model.named_modules() if any(_ends(name, part) for part in parts)]
    return found


def _below(name: str, part: str) -> bool:
    return f".{part}." in f".{name}."


def _ends(name: str, part: str) -> bool:
    return f".{name}".endswith(f".{part}")


# By `model_type`. All were found equal, features first, to the model's own forward, alone and in trees.
VISION_FAMILIES: dict[str, VisionFamily] = {
    "qwen2_vl": VisionFamily("visual", "visual.merger"),
    "qwen2_5_vl": VisionFamily("visual", "visual.merger"),
    "llava": VisionFamily("vision_tower", "multi_modal_projector"),
    "idefics3": VisionFamily("vision_model", "connector"),
    "smolvlm": VisionFamily("vision_model", "connector"),
}
# Towers whose pictures keep their sizes, so that a batch of them is padded; they come under `llava` too.
_OTHER_TOWERS = frozenset({"pixtral"})
# Known to read pictures in a way that is not taken here.
_OTHERS = {
    "qwen3_vl": "its pictures enter inside the decoder too (deepstack)",
    "qwen3_vl_moe": "its pictures enter inside the decoder too (deepstack)",
    "gemma3": "the tokens of a picture see each other there, which token trees do not have",
    "gemma3n": "the tokens of a picture see each other there, which token trees do not have",
    "paligemma": "its prompts see each other's tokens both ways (prefix language model)",
    "mllama": "its pictures are read by cross-attention",
}
