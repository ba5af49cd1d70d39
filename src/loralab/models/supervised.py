"""A PEFT model whose forward can give the loss of every supervised token.

Owns the path from token ids to token losses: which attention runs, which keys dropout has, and
the head. It is the model's own forward, so that wrappers (DDP, FSDP) see it. Hidden states are
gathered before the head: no logit is computed that no label needs.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from peft import PeftModelForCausalLM
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from loralab.models.attention import TREE_ATTENTION, TreeLayout, attention_in_use, carry_layout, use_attention
from loralab.models.dropout import DropoutKeys, KeyedDropout, PictureKeys, token_keys
from loralab.models.families import LogitTail, find_logit_tail
from loralab.models.picture_features import (
    Pictures,
    blank_features,
    encode_pictures,
    nothing_of_vision,
    on_axes,
    put_in,
    trains_vision,
)
from loralab.models.token_loss import TokenLosses, logit_statistics, token_losses, token_statistics
from loralab.models.trunk import CachedTrunk
from loralab.models.visibility import TreeRoot
from loralab.models.vision import is_vision_layer, vision_family

# Rows of the probe that compares the gathered head with the model's own logits.
_PROBE_TOKENS = 8
_PROBE_TOLERANCE = 1e-3


class SupervisedPeftModel(PeftModelForCausalLM):
    """PEFT's causal model; with `label_positions` its forward returns token losses.

    Dropout is keyed for the adapter that it is built with; one that is added later has PEFT's own.

    Attributes:
        stock_attention: the attention that the base was loaded with.
        tree_kernel: name of the attention kernel for token trees, or None where there is none.
        full_logits_reason: why logits come from the model's own forward, or None.
        planned_device_type: of a model without numbers, the kind of device that the run computes on; else None.
        cached_trunk: what the frozen layers below the lowest adapter gave, or None.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # With checkpoints, transformers and PEFT both let the embedding's output have a gradient. Only reentrant
        # ones need that, and the backward sweep would go through all frozen layers.
        args[0].disable_input_require_grads()
        super().__init__(*args, **kwargs)
        self.language_model.disable_input_require_grads()
        self.stock_attention: str = attention_in_use(self.language_model)
        self.tree_kernel: str | None = None
        self.full_logits_reason: str | None = None
        self.planned_device_type: str | None = None
        self.cached_trunk: CachedTrunk | None = None
        self._tail: LogitTail = find_logit_tail(self.language_model.config)
        self._keys, self._picture_keys = DropoutKeys(), PictureKeys()
        # Once: where single tokens are trained, asking for the weight puts the whole matrix together.
        self._vocabulary = int(self.embedding.weight.shape[0])
        self._drops = key_dropout(self, self._keys, self._picture_keys) > 0

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """Save the adapter as PEFT does, without asking the Hub at each save how large the base's vocabulary is.

        What it asks for, whether matrices that grew must be saved whole, is known: new tokens are trained as single
        rows. The Hub would answer for the newest base, not for the one that was trained on.

        Args:
            save_directory: the adapter folder.
            args: as PEFT takes them.
            kwargs: as PEFT takes them.
        """
        adapted = any(
            isinstance(module, BaseTunerLayer) and name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES
            for name, module in self.named_modules()
        )
        tokens = any(getattr(each, "trainable_token_indices", None) is not None for each in self.peft_config.values())
        super().save_pretrained(save_directory, *args, **{"save_embedding_layers": adapted and not tokens, **kwargs})

    @property
    def language_model(self) -> PreTrainedModel:
        """The base model with the adapter's layers in place."""
        return cast(PreTrainedModel, self.get_base_model())

    @property
    def embedding(self) -> nn.Embedding:
        """The input embedding of the base model."""
        return cast(nn.Embedding, self.language_model.get_input_embeddings())

    @property
    def vocabulary(self) -> int:
        """V, the number of rows of the input embedding."""
        return self._vocabulary

    @property
    def head(self) -> nn.Module:
        """The module that turns hidden states into logits."""
        return cast(nn.Module, self.language_model.get_output_embeddings())

    @functools.cached_property
    def trains_vision(self) -> bool:
        """Whether an adapter's layer lies in the vision tower or its projector."""
        return trains_vision(self.language_model)

    @property
    def spares_logits(self) -> bool:
        """Whether logits are the head's own: then no gradient of it needs them, and no second copy is made."""
        return self._tail == LogitTail()

    def forward(self, *args: Any, label_positions: Tensor | None = None, **kwargs: Any) -> Any:
        """Run PEFT's forward, or return token losses where `label_positions` is given.

        Args:
            *args: for PEFT's forward.
            label_positions: positions in the flattened R x L rows that predict a label (N).
            **kwargs: with `label_positions`, the arguments of `token_losses`. Without: for
                PEFT's forward.

        Returns:
            `TokenLosses`, or PEFT's output.
        """
        if label_positions is None:
            use_attention(self.language_model, self.stock_attention)
            return super().forward(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self._token_losses(label_positions, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate under the library's own attention, which knows caches; arguments as PEFT's."""
        use_attention(self.language_model, self.stock_attention)
        return super().generate(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _token_losses(
        self,
        label_positions: Tensor,
        *,
        labels: Tensor,
        token_prefixes: Tensor | None = None,
        dropout_key: tuple[int, int] | None = None,
        statistics: bool = False,
        **inputs: Any,
    ) -> TokenLosses:
        """Return the losses of labels.

        Args:
            label_positions: positions in the flattened R x L rows (N).
            labels: token ids to predict (N).
            token_prefixes: a hash of all token ids up to each token (R, L); dropout is keyed by it.
            dropout_key: seed and step; None where no LoRA dropout is active.
            statistics: also return entropies, correctness and the most likely tokens; no gradients then.
            **inputs: for `hidden_states`.
        """
        self._set_keys(dropout_key, token_prefixes, inputs.get("pictures"))
        trunk = self._skipping_trunk(token_prefixes, inputs["attention_mask"])
        if self.full_logits_reason is not None:
            with trunk:
                return self._model_losses(label_positions, labels, inputs, statistics=statistics)
        with trunk:
            hidden = _at(label_positions, self.hidden_states(**inputs))
        head_module, place = self.head, label_positions.device
        trained = any(weight.requires_grad for weight in head_module.parameters())
        hidden, labels = self._beside_head(hidden), self._beside_head(labels)

        def head(states: Tensor, chunk: slice) -> Tensor:
            with self._keys.narrowed(label_positions[chunk]):
                return self._tail(head_module(states))

        size = self._vocabulary
        if statistics:
            found = token_statistics(head, hidden, labels, vocabulary=size, device_type=self.planned_device_type)
        else:
            found = token_losses(
                head,
                hidden,
                labels,
                vocabulary=size,
                trained_head=trained,
                spare=self.spares_logits,
                device_type=self.planned_device_type,
            )
        further = [None if column is None else column.to(place) for column in found[1:]]
        return TokenLosses(found.losses.to(place), *further)

    def _beside_head(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the head's device, which is another one than the input's where a base is spread."""
        weight = next(self.head.parameters(), None)
        return tensor if weight is None else tensor.to(weight.device)

    def _set_keys(self, key: tuple[int, int] | None, prefixes: Tensor | None, pictures: Pictures | None) -> None:
        """Set what the LoRA dropout of the coming forward is keyed by; nothing where there is none."""
        self._keys.tokens = self._picture_keys.pictures = None
        self._keys.device_type = self._picture_keys.device_type = self.planned_device_type
        if not self._drops or key is None or prefixes is None:
            return
        self._keys.tokens = token_keys(*key, prefixes)
        if pictures is not None:
            drawn = torch.tensor(list(pictures.keys), device=pictures.positions.device)
            self._picture_keys.pictures = token_keys(*key, drawn)
            self._picture_keys.counts = tuple(pictures.counts)

    def _skipping_trunk(self, prefixes: Tensor | None, mask: Tensor) -> AbstractContextManager[None]:
        """Return what a forward runs in that starts behind the frozen layers, where their output is known."""
        if self.cached_trunk is None or prefixes is None:
            return contextlib.nullcontext()
        return self.cached_trunk.serving(prefixes, mask)

    @property
    def body(self) -> nn.Module:
        """The base model without its head."""
        model = self.language_model
        # Llama 4 names its decoder otherwise than it holds it: `base_model` and `get_decoder()` are the model itself.
        return cast(nn.Module, model.base_model if model.base_model is not model else model.model)

    def hidden_states(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        depth: Tensor | None = None,
        subtree_end: Tensor | None = None,
        roots: Sequence[TreeRoot] | None = None,
        pictures: Pictures | None = None,
    ) -> Tensor:
        """Return the last hidden states (R, L, D).

        Args:
            input_ids: token ids (R, L).
            attention_mask: one where there is a token (R, L).
            position_ids: positions (R, L) or (A, R, L).
            depth: tokens from the root (R, L); with `roots`.
            subtree_end: end of each token's subtree (R, L); with `roots`.
            roots: the trees of the only row, or None where rows are plain chains.
            pictures: pictures in the rows, or None.
        """
        mask = self._attending(attention_mask, depth, subtree_end, roots)
        shown = self._shown(input_ids, position_ids, pictures)
        hidden: Tensor = self.body(**shown, attention_mask=mask, use_cache=False).last_hidden_state
        return hidden

    def _shown(self, input_ids: Tensor, position_ids: Tensor, pictures: Pictures | None) -> dict[str, Tensor]:
        """Return tokens, or their embeddings with the features of pictures among them, and their positions."""
        positions = on_axes(position_ids, self.language_model.config)
        if pictures is None and self.trains_vision and torch.is_grad_enabled():
            # Every trained tensor takes part in every sweep, or processes would wait for gradients that never come.
            return {"inputs_embeds": self.embedding(input_ids) + nothing_of_vision(self), "position_ids": positions}
        if pictures is None:
            return {"input_ids": input_ids, "position_ids": positions}
        if self.planned_device_type is not None:
            features = blank_features(self.language_model, pictures)
        else:
            features = encode_pictures(self.language_model, pictures.tensors)
        return {"inputs_embeds": put_in(self.embedding(input_ids), features, pictures), "position_ids": positions}

    def logits(self, *, input_ids: Tensor, position_ids: Tensor, **inputs: Any) -> Tensor:
        """Return the model's own logits (R, L, V); arguments as in `hidden_states`."""
        mask = self._attending(
            inputs["attention_mask"], inputs.get("depth"), inputs.get("subtree_end"), inputs.get("roots")
        )
        shown = self._shown(input_ids, position_ids, inputs.get("pictures"))
        found: Tensor = self.language_model(**shown, attention_mask=mask, use_cache=False).logits
        return found

    def label_logits(self, label_positions: Tensor, **inputs: Any) -> Callable[[slice], Tensor]:
        """Run the model up to its head and return what gives the logits at a slice of the positions (n, V).

        Whatever is switched off now, as in `disable_adapter()`, must be off when the logits are asked for: the
        head may have an adapter too. No dropout acts.

        Args:
            label_positions: positions in the flattened R x L rows that predict a label (N).
            **inputs: for `hidden_states`.
        """
        self._set_keys(None, None, None)
        if self.full_logits_reason is not None:
            logits = self.logits(**inputs).flatten(0, 1)[label_positions]
            return lambda chunk: logits[chunk]
        hidden = self._beside_head(_at(label_positions, self.hidden_states(**inputs)))
        return lambda chunk: self._tail(self.head(hidden[chunk])).to(label_positions.device)

    def _attending(
        self, mask: Tensor, depth: Tensor | None, subtree_end: Tensor | None, roots: Sequence[TreeRoot] | None
    ) -> Tensor:
        """Choose the attention of the coming forward and return its mask."""
        if roots is None or depth is None or subtree_end is None:
            use_attention(self.language_model, self.stock_attention)
            return mask
        if self.tree_kernel is None:
            raise ValueError("a row of trees for a model that has no attention for trees")
        use_attention(self.language_model, TREE_ATTENTION)
        return carry_layout(TreeLayout(depth[0], subtree_end[0], roots, self.tree_kernel))

    def _model_losses(
        self, positions: Tensor, labels: Tensor, inputs: dict[str, Any], *, statistics: bool
    ) -> TokenLosses:
        """Return losses from the model's own logits, with what else `token_statistics` gives when asked."""
        logits = self.logits(**inputs).flatten(0, 1)[positions]
        if statistics:
            with torch.no_grad():
                return logit_statistics(logits, labels)
        return TokenLosses(functional.cross_entropy(logits.float(), labels, reduction="none"))

    def check_head(self) -> str | None:
        """Compare head(gathered hidden states) with the model's own logits, once.

        What models do behind their head is read from the configuration; where that does not
        give the model's own logits, these are computed in full.

        Returns:
            None where the gathered head is right, else the reason for full logits.
        """
        weight = self.embedding.weight
        positions = torch.arange(_PROBE_TOKENS, device=weight.device)
        ids = (positions * 7 % weight.shape[0])[None]
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": positions[None],
        }
        was_training = self.training
        self.eval()
        with torch.no_grad():
            own = self.logits(**inputs)[0].float()
            hidden = self._beside_head(self.hidden_states(**inputs)[0])
            gathered = self._tail(self.head(hidden)).to(own.device).float()
        self.train(was_training)
        if own.shape != gathered.shape:
            self.full_logits_reason = f"the model gives {own.shape[-1]} logits, its head {gathered.shape[-1]}"
            return self.full_logits_reason
        difference = float((own - gathered).abs().max() / own.std().clamp_min(1e-6))
        if difference > _PROBE_TOLERANCE:
            self.full_logits_reason = f"the model changes logits behind its head (by {difference:.1e} of their spread)"
        return self.full_logits_reason


def _at(positions: Tensor, hidden: Tensor) -> Tensor:
    """Return hidden states (R, L, D) at positions in the flattened rows (N, D)."""
    return hidden.flatten(0, 1)[positions.to(hidden.device)]


def key_dropout(model: SupervisedPeftModel, keys: DropoutKeys, picture_keys: PictureKeys) -> int:
    """Let every adapted layer drop by key instead of by torch's generator.

    Only PEFT's containers of dropout are touched, which hold one module per adapter.

    Args:
        model: base with adapter.
        keys: of the tokens.
        picture_keys: of the rows inside a vision tower.

    Returns:
        How many layers drop.
    """
    family = vision_family(model.language_model.config)
    containers: list[tuple[str, nn.ModuleDict]] = [
        (place, found)
        for place, module in model.named_modules()
        for name in ("lora_dropout", "vera_dropout")
        if isinstance(found := getattr(module, name, None), nn.ModuleDict)
    ]
    changed = 0
    for number, (place, container) in enumerate(containers):
        inside = family is not None and is_vision_layer(place, family)
        for name, dropout in container.items():
            if isinstance(dropout, nn.Dropout):
                container[name] = KeyedDropout(dropout.p, layer=number, keys=picture_keys if inside else keys)
                changed += 1
    return changed
