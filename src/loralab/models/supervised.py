"""A PEFT model whose forward can give the loss of every supervised token.

Owns the path from hidden states to token losses. It is the model's own forward, so that
wrappers (DDP, FSDP) see it. Hidden states are gathered before the head: no logit is computed
that no label needs.
"""

from typing import Any, cast

import torch
from peft import PeftModelForCausalLM
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

# Rows of the probe that compares the gathered head with the model's own logits.
_PROBE_TOKENS = 8
_PROBE_TOLERANCE = 1e-3
# Settings of models that scale or cap logits; a cap shows only on large logits, so the probe is not enough.
_BEHIND_HEAD = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)


class SupervisedPeftModel(PeftModelForCausalLM):
    """PEFT's causal model; with `label_positions` its forward returns token losses."""

    full_logits_reason: str | None = None

    @property
    def language_model(self) -> PreTrainedModel:
        """The base model with the adapter's layers in place."""
        return cast(PreTrainedModel, self.get_base_model())

    @property
    def embedding(self) -> nn.Embedding:
        """The input embedding of the base model."""
        return cast(nn.Embedding, self.language_model.get_input_embeddings())

    def forward(self, *args: Any, label_positions: Tensor | None = None, **kwargs: Any) -> Any:
        """Run PEFT's forward, or return token losses where `label_positions` is given.

        Args:
            *args: for PEFT's forward.
            label_positions: positions in the flattened R x L rows that predict a label (N).
            **kwargs: with `label_positions`: `input_ids`, `attention_mask`, `position_ids` (R, L)
                and `labels`, token ids to predict (N). Without: for PEFT's forward.

        Returns:
            Token losses in nats, float32 (N), or PEFT's output.
        """
        if label_positions is None:
            return super().forward(*args, **kwargs)  # type: ignore[no-untyped-call]
        labels: Tensor = kwargs.pop("labels")
        logits = self.logits_at(label_positions, **kwargs)
        return functional.cross_entropy(logits.float(), labels, reduction="none")

    def logits_at(self, positions: Tensor, **inputs: Tensor) -> Tensor:
        """Return the logits at flattened positions.

        Args:
            positions: indices into R x L (N).
            **inputs: `input_ids`, `attention_mask`, `position_ids` (R, L).

        Returns:
            Logits in the compute type (N, V).
        """
        model = self.language_model
        if self.full_logits_reason is not None:
            logits: Tensor = model(**inputs, use_cache=False).logits
            return logits.flatten(0, 1)[positions]
        hidden: Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state
        head = cast(nn.Module, model.get_output_embeddings())
        return cast(Tensor, head(hidden.flatten(0, 1)[positions]))

    def check_head(self) -> str | None:
        """Compare head(gathered hidden states) with the model's own logits, once.

        Some models scale or cap logits behind the head; these keep the slower full logits.

        Returns:
            None where the gathered head is right, else the reason for full logits.
        """
        config = self.language_model.config
        behind = [name for name in _BEHIND_HEAD if getattr(config, name, None) not in (None, 1, 1.0)]
        if behind:
            self.full_logits_reason = f"the model changes logits behind its head ({behind[0]})"
            return self.full_logits_reason
        weight = self.embedding.weight
        positions = torch.arange(_PROBE_TOKENS, device=weight.device)
        ids = (positions * 7 % weight.shape[0])[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions[None]}
        was_training = self.training
        self.eval()
        with torch.no_grad():
            own = self.language_model(**inputs, use_cache=False).logits[0].float()
            gathered = self.logits_at(positions, **inputs).float()
        self.train(was_training)
        difference = float((own - gathered).abs().max() / own.std().clamp_min(1e-6))
        if difference > _PROBE_TOLERANCE:
            self.full_logits_reason = f"the model changes logits behind its head (by {difference:.1e} of their spread)"
        return self.full_logits_reason
