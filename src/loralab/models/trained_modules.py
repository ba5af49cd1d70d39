"""Layers that are trained whole: which ones, and in which number format.

Owns `lora.modules_to_save`: the names, what ties them, and the float32 masters of a base that is
held in fewer bits. PEFT makes the copies and saves them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from loralab.config.schema import LoraConfig
from loralab.errors import ConfigError, excerpt
from loralab.lookup import nearest_name

# Variants whose PEFT configuration can neither tie trained copies nor train single tokens.
PLAIN_VARIANTS = frozenset({"vera", "loha", "lokr", "ia3"})
# Only where one of these is named does PEFT tie the copies again when it loads an adapter.
_TIED_NAMES = frozenset({"embed_tokens", "lm_head"})
_WHERE = "key lora.modules_to_save"
_PROBE_TOKENS = 4


def is_tied(base: PreTrainedModel) -> bool:
    """Return whether the output head is the embedding's matrix."""
    head = base.get_output_embeddings()
    return head is not None and getattr(head, "weight", None) is cast(Any, base.get_input_embeddings()).weight


def resolve_trained_modules(base: PreTrainedModel, lora: LoraConfig) -> dict[str, Any]:
    """Return what PEFT's configuration says of layers that are trained whole; nothing where there are none.

    Raises:
        ConfigError: a name that no layer has, or a layer that cannot be trained whole.
    """
    names = lora.modules_to_save
    if names is None:
        return {}
    modules = dict(base.named_modules())
    known = sorted({full.rpartition(".")[2] for full, module in modules.items() if _has_weights(module)})
    if not names:
        raise ConfigError("modules_to_save names no layer: []", where=_WHERE, fix=f"layers: {', '.join(known)}")
    chosen: list[str] = []
    for name in names:
        found = [full for full in modules if f".{full}".endswith(f".{name}")]
        if not found:
            near = nearest_name(name, known)
            hint = f"did you mean {near!r}? " if near else ""
            raise ConfigError(
                f"no layer is named {name!r}", where=_WHERE, fix=f"{hint}layers of this model: {', '.join(known)}"
            )
        _check_trainable(name, [modules[full] for full in found])
        # PEFT goes by the end of the text, where `norm` is also the end of `input_layernorm`.
        same = {full for full in modules if full.endswith(name)} == set(found)
        chosen += [name] if same else found
    return _tied(base, lora, chosen)


def trained_names(base: PreTrainedModel, chosen: Sequence[str]) -> set[str]:
    """Return the full names of the layers that are trained whole.

    Args:
        base: the base model.
        chosen: PEFT's `modules_to_save`.
    """
    return {full for full, _ in base.named_modules() if any(f".{full}".endswith(f".{name}") for name in chosen)}


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _check_trainable(name: str, modules: Sequence[nn.Module]) -> None:
    for module in modules:
        if not _has_weights(module) or any(next(child.parameters(), None) is not None for child in module.children()):
            inside = ", ".join(child for child, held in module.named_modules() if child and _has_weights(held))
            holds = f"holds other layers ({inside})" if inside else "has no weights"
            raise ConfigError(
                f"layer {name!r} {holds}", where=_WHERE, fix="name single layers, such as a norm or lm_head"
            )
        if not all(weight.is_floating_point() for weight in module.parameters()):
            raise ConfigError(
                f"layer {name!r} is quantized, and packed numbers cannot be trained",
                where=_WHERE,
                fix="leave it to an adapter (lora.target_modules), or set model.quantization: none",
            )


def _tied(base: PreTrainedModel, lora: LoraConfig, chosen: list[str]) -> dict[str, Any]:
    """Keep embedding and head one matrix where they are one; two copies would drift apart."""
    modules = dict(base.named_modules())
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    fulls = trained_names(base, chosen)
    touched = any(modules[full] in (embedding, head) for full in fulls)
    if not touched or not is_tied(base):
        return {"modules_to_save": chosen}
    own = next(full for full, module in modules.items() if module is embedding)
    heads = [full for full, module in modules.items() if module is head]
    rest = [name for name in chosen if not trained_names(base, [name]) & {own, *heads}]
    last = own.rpartition(".")[2]
    if lora.variant in PLAIN_VARIANTS or last not in _TIED_NAMES:
        why = f"variant {lora.variant!r}" if lora.variant in PLAIN_VARIANTS else f"an embedding named {last!r}"
        raise ConfigError(
            f"embedding and head of this model are one matrix, which PEFT cannot keep one with {why}",
            where=_WHERE,
            fix=f"leave out {last} and {heads[0].rpartition('.')[2]}; for a few tokens: lora.trainable_token_indices",
        )
    return {"modules_to_save": [*rest, own], "ensure_weight_tying": True}


class TrainedCopy(nn.Module):
    """A layer's weights in float32, with which the layer computes in the base's own type.

    Updates are far below a bfloat16 number's last digit, so the master must hold more digits than
    the product sees. What is saved are the masters; rounded on a load they give the same products.

    Args:
        layer: the frozen layer, whose forward runs with these weights.
        weights: float32 masters by the names that they have in `layer`.
    """

    def __init__(self, layer: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
        nn.Module.__init__(self)
        for name, weight in weights.items():  # first: later on, `layer` answers for names that are not here
            self.register_parameter(name, weight)
        self._types = {name: weight.dtype for name, weight in layer.named_parameters()}
        self._layer = (layer,)  # in a tuple: it is the wrapper's own module, not another one

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer; arguments and result are its own."""
        rounded = {name: weight.to(self._types[name]) for name, weight in self.named_parameters()}
        return functional_call(self._layer[0], rounded, args, kwargs)

    def extra_repr(self) -> str:
        """Return what a printed model says of the layer."""
        return self._layer[0].extra_repr()

    def __getattr__(self, name: str) -> Any:
        """Return what a model asks of the layer itself, such as `num_embeddings`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_layer":
                raise
            return getattr(self._layer[0], name)


class _TrainedNorm(TrainedCopy, nn.LayerNorm):
    """The same for what Trainer tells by its class: a LayerNorm has no weight decay."""


def hold_masters(model: nn.Module) -> int:
    """Give every layer that is trained whole float32 weights; those that have them stay as they are.

    Args:
        model: PEFT's model, on a base of any type.

    Returns:
        How many layers were given masters.

    Raises:
        ConfigError: a layer is not used through its forward, and the model does not run with masters.
    """
    masters: dict[int, nn.Parameter] = {}  # tied copies keep one master
    names = []
    for path, wrapper in list(model.named_modules()):
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        for adapter, copy in list(wrapper.modules_to_save.items()):
            if all(weight.dtype == torch.float32 for weight in copy.parameters()):
                continue
            held = {name: masters.setdefault(id(weight), _master(weight)) for name, weight in copy.named_parameters()}
            kind = _TrainedNorm if isinstance(copy, nn.LayerNorm) else TrainedCopy
            wrapper.modules_to_save[adapter] = kind(wrapper.original_module, held)
            names.append(path.removeprefix("base_model.model."))
    if names:
        _check_runs(model, names)
    return len(names)


def _master(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().float(), requires_grad=weight.requires_grad)


def _check_runs(model: Any, names: Sequence[str]) -> None:
    ids = torch.zeros((1, _PROBE_TOKENS), dtype=torch.long, device=next(model.parameters()).device)
    was_training = model.training
    model.eval()  # keyed dropout wants to know the tokens of a training forward
    try:
        with torch.no_grad():
            model.get_base_model()(input_ids=ids, use_cache=False)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"the model does not run with float32 masters of {', '.join(names)}: {excerpt(error)}",
            where=_WHERE,
            fix="set model.precision: float32, or leave these layers out",
        ) from error
    finally:
        model.train(was_training)
