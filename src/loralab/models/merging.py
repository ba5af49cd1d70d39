"""Adapters written into the weights of their base, one layer at a time.

Owns the skeleton of a merge: base and adapters on the meta device, of which one layer at a time gets numbers, so that
PEFT's own merge of that layer computes. Knows nothing of files of the base (`merge_source.py`) or of the result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loralab.config.schema import ModelConfig
from loralab.errors import AdapterIntegrityError, ConfigError, ModelError, excerpt
from loralab.models.adapters import WEIGHTS_FILE, read_adapter_config, wrap_blank
from loralab.models.load import load_model_config
from loralab.models.merge_source import Checkpoint, KeyMap, map_keys
from loralab.models.new_tokens import NewToken, grow_vocabulary
from loralab.models.quantization import BITSANDBYTES
from loralab.models.trained_modules import is_tied
from loralab.models.vision import auto_class

if BITSANDBYTES:
    from loralab.models.merge_quantized import quantized_names

_PEFT_PREFIX = "base_model.model."
# What PEFT appends to a layer's name in the file of an adapter that holds the layer's own weight too.
_HELD = ".base_layer."
MAIN = "default"


@dataclass(frozen=True, slots=True)
class Part:
    """One adapter of a merge.

    Attributes:
        folder: adapter folder.
        weight: what its update is multiplied with.
    """

    folder: Path
    weight: float = 1.0

    @property
    def config(self) -> PeftConfig:
        """PEFT's configuration."""
        return read_adapter_config(self.folder)


@dataclass(slots=True)
class Skeleton:
    """Base and adapters, all of whose base is without numbers.

    Attributes:
        base: the base as it was built, inside PEFT's layers now.
        layers: what PEFT put in the place of a layer, by the layer's name in the base.
        plain: names of the weights of the base.
        held: weights of the base that an adapter brings along, by name.
        tied: whether the head of the base is its embedding.
        embedding: name of the embedding's weight.
        head: name of the head's weight.
        rows: rows of the embedding.
        turned: layers that hold their weight the other way round (Conv1D).
        keys: which weight each stored tensor is.
        quantizable: layers that loading quantizes where it is asked to.
    """

    base: PreTrainedModel
    layers: dict[str, nn.Module]
    plain: dict[str, torch.Size]
    held: dict[str, Tensor]
    tied: bool
    embedding: str
    head: str
    rows: int
    turned: frozenset[str]
    keys: KeyMap
    quantizable: frozenset[str]

    def merged(self, name: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a layer's weights with all adapters in them, float32.

        Args:
            name: of the layer in the base.
            weights: of the base's layer, float32, by their names in it.

        Raises:
            AdapterIntegrityError: a number of the result is none.
        """
        layer = self.layers[name]
        if isinstance(layer, ModulesToSaveWrapper):
            copy = layer.modules_to_save[layer.active_adapters[0]]
            found = {key: value.detach().float() for key, value in copy.state_dict().items()}
        else:
            found = _merge_layer(layer, weights, name)
        broken = [key for key, value in found.items() if not torch.isfinite(value).all()]
        if broken:
            raise _not_finite(name)
        return found

    def parameters_of(self, name: str) -> list[str]:
        """Return the names of a layer's weights in it."""
        return [key[len(name) + 1 :] for key in self.plain if key.rpartition(".")[0] == name]


def _merge_layer(layer: nn.Module, weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    tuner: Any = layer.token_adapter if isinstance(layer, TrainableTokensWrapper) else layer
    inner: nn.Module = tuner.get_base_layer()
    blank: dict[str, Any] = {key: inner._parameters[key] for key in weights}
    for key, weight in weights.items():
        # A copy: a merge may work in place, and the tensor may be shared with another layer's.
        setattr(inner, key, nn.Parameter(weight.float().clone(), requires_grad=False))
    try:
        tuner.merge(safe_merge=True)
        return {key: cast(Tensor, inner._parameters[key]).detach() for key in weights}
    except ValueError as error:
        raise _not_finite(name) from error
    finally:
        tuner.merged_adapters.clear()
        for key, value in blank.items():
            setattr(inner, key, value)


def narrow(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return a weight in the type that it is written in.

    Raises:
        ConfigError: a number of it is too large for that type.
    """
    found = value.to(dtype)
    if found.dtype != value.dtype and not torch.isfinite(found).all() and torch.isfinite(value).all():
        raise ConfigError(
            f"{name} has weights up to {float(value.abs().max()):.3g}, and {str(dtype).removeprefix('torch.')} ends at "
            f"{torch.finfo(dtype).max:.3g}",
            where="option --dtype",
            fix="give --dtype bfloat16 or float32",
        )
    return found


def _not_finite(name: str) -> AdapterIntegrityError:
    return AdapterIntegrityError(
        f"the merged weights of layer {name} are not all finite numbers",
        where="the adapter's tensors of that layer",
        fix="train again, or restore the adapter folder from a copy",
    )


def draw_skeleton(
    model: ModelConfig, parts: Sequence[Part], stored: Checkpoint, tokens: Sequence[NewToken] = ()
) -> Skeleton:
    """Build base and adapters without the base's numbers, and read the adapters' own.

    Args:
        model: the model section.
        parts: the adapters; the first is called `default`, the others `other1` and so on.
        stored: the base's weights.
        tokens: what the adapters' tokenizer has beyond the base's.

    Raises:
        ModelError: base or adapters cannot be built, or an adapter does not fit.
    """
    config = load_model_config(model)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # from_config would ask for weights that are packed so
    with torch.device("meta"):
        base: PreTrainedModel = auto_class(config).from_config(
            config, dtype=torch.float32, trust_remote_code=model.trust_remote_code
        )
    plain = {key: value.shape for key, value in base.state_dict().items()}
    turned = frozenset(name for name, module in base.named_modules() if isinstance(module, Conv1D))
    keys = map_keys(stored, base)
    quantizable = frozenset(quantized_names(base) if BITSANDBYTES else ())
    embedding, head, tied = _name_of(base.get_input_embeddings(), base), _head_of(base), is_tied(base)
    grow_vocabulary(base, tokens)
    rows = int(cast(Any, base.get_input_embeddings()).weight.shape[0])
    grown = {key: value.shape for key, value in base.state_dict().items()}
    own = {id(value) for value in (*base.parameters(), *base.buffers())}
    configs = {name: _fitting(part.config, turned) for name, part in named(parts).items()}
    try:
        wrapped = wrap_blank(base, configs)
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"the adapters do not go onto this base together: {excerpt(error)}",
            where=", ".join(str(part.folder) for part in parts),
            fix="merge them one by one, or name the base that they were trained on",
        ) from error
    _give_numbers(wrapped, own)
    layers = _find_layers(wrapped)
    held = _fill(wrapped, parts, {key: shape for key, shape in grown.items() if key.rpartition(".")[0] not in layers})
    cast(Any, wrapped.base_model).set_adapter(list(configs))
    for name, part in named(parts).items():
        scale_adapter(wrapped, name, part.weight)
    return Skeleton(base, layers, plain, held, tied, embedding, head, rows, turned, keys, quantizable)


def named(parts: Sequence[Part]) -> dict[str, Part]:
    """Return adapters by the names that they have in PEFT's model."""
    return {MAIN if number == 0 else f"other{number}": part for number, part in enumerate(parts)}


def _fitting(config: PeftConfig, turned: frozenset[str]) -> PeftConfig:
    """Return a configuration for the unquantized base: a quantized layer holds its weight as nn.Linear does."""
    config.inference_mode = True
    if hasattr(config, "fan_in_fan_out") and turned:
        config.fan_in_fan_out = True
    return config


def _name_of(wanted: nn.Module | None, base: PreTrainedModel) -> str:
    return next((f"{name}.weight" for name, module in base.named_modules() if module is wanted), "")


def _head_of(base: PreTrainedModel) -> str:
    head = base.get_output_embeddings()
    return "" if head is None else _name_of(cast(nn.Module, head), base)


def _give_numbers(model: nn.Module, own: set[int]) -> None:
    """Let everything that is not the base's hold numbers; what was one tensor stays one."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, value in store.items():
                if value is None or id(value) in own or not value.is_meta:
                    continue
                if id(value) not in made:
                    empty = torch.zeros(value.shape, dtype=value.dtype)
                    made[id(value)] = (
                        nn.Parameter(empty, requires_grad=False) if isinstance(value, nn.Parameter) else empty
                    )
                store[name] = made[id(value)]


def _fill(model: PeftModel, parts: Sequence[Part], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Read the adapters' tensors; return the weights of the base that they bring along.

    Args:
        model: base and adapters.
        parts: the adapters.
        shapes: of the weights of layers that have no adapter.
    """
    held: dict[str, Tensor] = {}
    for name, part in named(parts).items():
        try:
            tensors = load_file(str(part.folder / WEIGHTS_FILE))
            broken = sorted(key for key, value in tensors.items() if not torch.isfinite(value).all())
            if broken:
                raise AdapterIntegrityError(
                    f"tensor {broken[0]} of the adapter holds numbers that are not finite",
                    where=str(part.folder / WEIGHTS_FILE),
                    fix="train again, or restore the adapter folder from a copy",
                )
            held |= _take_held(tensors, shapes, part.folder)
            result = set_peft_model_state_dict(model, dict(tensors), adapter_name=name)
        except (ValueError, RuntimeError, KeyError, OSError, SafetensorError) as error:
            raise _does_not_fit(part.folder, excerpt(error)) from error
        unexpected = list(getattr(result, "unexpected_keys", []))
        if unexpected:
            raise _does_not_fit(part.folder, f"{unexpected[0]} matches nothing")
    return held


def _take_held(tensors: dict[str, Tensor], shapes: Mapping[str, torch.Size], folder: Path) -> dict[str, Tensor]:
    """Take the weights of the base out of an adapter's tensors, as PEFT writes them where it was told to."""
    found = {}
    for key in list(tensors):
        name = key.removeprefix(_PEFT_PREFIX).replace(_HELD, ".")
        if name not in shapes and _HELD not in key:
            continue  # the adapter's own
        value = found[name] = tensors.pop(key)
        if name in shapes and value.shape != shapes[name]:
            raise _does_not_fit(folder, f"it holds a {name} of shape {tuple(value.shape)}, not {tuple(shapes[name])}")
    return found


def _does_not_fit(folder: Path, why: str) -> ModelError:
    return ModelError(
        f"the adapter does not fit this base: {why}", where=str(folder), fix="name the base that it was trained on"
    )


def scale_adapter(model: PeftModel, name: str, weight: float) -> None:
    """Multiply what an adapter adds to its layers.

    Args:
        model: base with adapters.
        name: of the adapter.
        weight: the factor; 1 changes nothing.
    """
    if weight == 1:
        return
    for module in model.modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        scaling, vector = getattr(module, "scaling", None), getattr(module, "vera_lambda_b", None)
        if isinstance(scaling, dict) and name in scaling:
            scaling[name] *= weight
        elif vector is not None and name in vector:
            vector[name].data *= weight


def _find_layers(model: PeftModel) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for full, module in model.named_modules():
        if not isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper, TrainableTokensWrapper)):
            continue
        name = full.removeprefix(_PEFT_PREFIX)
        if any(name.startswith(f"{outer}.") for outer in found):
            continue  # inside a layer that is found already
        if isinstance(module, BaseTunerLayer) and not callable(getattr(module, "merge", None)):
            raise ModelError(
                f"PEFT cannot merge {type(module).__name__} of layer {name}",
                where="the adapter's kind",
                fix="use the adapter as it is: it needs no merge to answer",
            )
        found[name] = cast(nn.Module, module)
    return found
