"""What a run says of where its adapter sits.

Owns the words; the settings themselves are resolved in `targets.py` and what it imports.
"""

import torch
from transformers import PreTrainedModel

from loralab.config.schema import LoraConfig
from loralab.models.layer_stack import find_layer_stack
from loralab.models.precision import Resolved
from loralab.models.targets import adapted_layers, linear_layers, placement, resolve_target_modules
from loralab.models.trained_modules import is_tied


def describe_placement(setting: LoraConfig, lora: LoraConfig, base: PreTrainedModel) -> dict[str, Resolved[str]]:
    """Return what `lora` chose beyond target layers, with reasons; nothing for what is not set.

    Args:
        setting: the section as the user wrote it, tokens by text.
        lora: the same with tokens by id.
        base: the base model, without an adapter.

    Raises:
        ConfigError: a setting that does not fit this model.
    """
    targets = resolve_target_modules(base, lora).value
    arguments = placement(lora, base, targets)
    layers = adapted_layers(lora, base, targets)
    chosen: dict[str, Resolved[str]] = {}
    if lora.layers_to_transform is not None:
        stack = find_layer_stack(base, linear_layers(base))
        listed = ", ".join(map(str, arguments["layers_to_transform"]))
        count = stack.count if stack is not None else 0
        chosen["layers_to_transform"] = Resolved(
            listed, f"set in lora.layers_to_transform, of {count} layers: {len(layers)} linear layers get an adapter"
        )
    if lora.modules_to_save is not None:
        chosen["modules_to_save"] = Resolved(", ".join(arguments["modules_to_save"]), _trained_whole(arguments, base))
    if lora.trainable_token_indices is not None and setting.trainable_token_indices is not None:
        pairs = zip(setting.trainable_token_indices, lora.trainable_token_indices, strict=True)
        shown = ", ".join(str(found) if token == found else f"{token!r} = {found}" for token, found in pairs)
        also = " and of the head, which is the same matrix" if is_tied(base) else ""
        chosen["trainable_tokens"] = Resolved(shown, f"rows of the embedding{also}, trained in float32")
    return chosen


def _trained_whole(arguments: dict[str, object], base: PreTrainedModel) -> str:
    kinds = {str(weight.dtype).removeprefix("torch.") for weight in base.parameters() if weight.is_floating_point()}
    products = " or ".join(sorted(kinds - {str(torch.float32).removeprefix("torch.")}))
    reason = "trained whole in float32" + (f", rounded to {products} for products" if products else "")
    if "ensure_weight_tying" in arguments:
        reason += "; embedding and head are one matrix and stay one"
    return reason
