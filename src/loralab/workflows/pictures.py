"""Pictures of a run: the model's processor, what reads pictures for a planner, and the check that it is right.

Owns the way from a configuration to both. The check asks the loaded model, not its name: features that are put
in before the decoder must give the model's own logits.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from loralab.config.paths import local_path
from loralab.config.schema import Config
from loralab.data.example import TokenizedExample
from loralab.data.images.processor import PictureProbe, PictureProcessor
from loralab.data.images.reader import PictureReader
from loralab.data.prompts.prompter import Prompter
from loralab.errors import ConfigError, ModelError
from loralab.layout.planner import Planner
from loralab.models.attention import use_attention
from loralab.models.load import load_model_config, model_source
from loralab.models.precision import Resolved
from loralab.models.supervised import SupervisedPeftModel
from loralab.models.vision import load_processor, position_axes, vision_family
from loralab.training.loss import model_inputs

_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
# In float32, largest difference of logits in shares of their spread, as for token trees; in half precision, a
# share of what other pictures change.
_SAME_FLOAT32, _SAME_HALF = 2e-5, 0.1


def open_pictures(config: Config, *, folder: Path | None = None) -> PictureProcessor | None:
    """Load what a model's processor makes of pictures, or return None where the model reads none.

    Args:
        config: the configuration.
        folder: an adapter's, whose own processor goes before the base's.

    Raises:
        ConfigError: `data.image` is set for a model that reads no pictures, or has a bound that its processor does
            not know.
        ModelError: the configuration or the processor cannot be loaded.
    """
    image, base = config.data.image, load_model_config(config.model)
    if vision_family(base) is None:
        chosen = [name for name in type(image).model_fields if image.chosen(name)]
        if chosen:
            raise ConfigError(
                f"data.image.{chosen[0]} has no effect: a model of type {base.model_type!r} reads no pictures here",
                where=f"key data.image.{chosen[0]}",
                fix="remove it, or take a vision-language model",
            )
        return None
    if folder is not None and any((folder / name).is_file() for name in _PROCESSOR_FILES):
        processor = load_processor(str(folder), revision=None, trust_remote_code=False)
    else:
        processor = load_processor(
            model_source(config.model.name),
            revision=config.model.revision,
            trust_remote_code=config.model.trust_remote_code,
        )
    return PictureProcessor(processor, image.min_pixels, image.max_pixels)


def open_tokenizers_pictures(config: Config) -> PictureProcessor | None:
    """Load what a model's processor makes of pictures, for work that needs no model.

    A local folder may hold a tokenizer alone, and then reads no pictures.

    Args:
        config: the configuration.

    Raises:
        ConfigError: as in `open_pictures`.
        ModelError: likewise.
    """
    folder = local_path(config.model.name)
    if folder is not None and folder.is_dir() and not (folder / "config.json").is_file():
        return None
    return open_pictures(config)


def reading_pictures(planner: Planner, prompter: Prompter, model: SupervisedPeftModel) -> Planner:
    """Return a planner that reads pictures where its model does.

    Args:
        planner: as chosen.
        prompter: knows the model's processor.
        model: base with adapter.
    """
    if prompter.pictures is None:
        return planner
    axes = position_axes(model.language_model.config)
    return replace(planner, pictures=PictureReader(prompter.pictures, axes))


class _ProbeReader:
    """Gives the probe's pictures, whatever is asked for: there are only these."""

    def __init__(self, probe: PictureProbe, token: int, axes: int) -> None:
        self._probe, self.token, self.axes = probe, token, axes

    def read(self, files: object) -> dict[str, Tensor]:
        return dict(self._probe.tensors)


def check_pictures(model: SupervisedPeftModel, pictures: PictureProcessor) -> Resolved[str]:
    """Hold what a model makes of pictures by this program's way against its own forward.

    Args:
        model: base with adapter, on its device.
        pictures: its processor.

    Returns:
        What was found.

    Raises:
        ModelError: they differ.
    """
    probe, other = pictures.probe(0), pictures.probe(1)
    base, axes = model.language_model, position_axes(model.language_model.config)
    device = model.embedding.weight.device
    was_training = model.training
    model.eval()
    with torch.no_grad():
        use_attention(base, model.stock_attention)
        own = base(**{name: value.to(device) for name, value in probe.own.items()}, use_cache=False).logits[0].float()
        ours, others = (_logits(model, each, pictures.token, axes, device) for each in (probe, other))
    model.train(was_training)
    spread = float(own.std().clamp_min(1e-12))
    error, power = (float((each - own[: len(each)]).abs().max()) / spread for each in (ours, others))
    half = model.embedding.weight.dtype != torch.float32
    limit = _SAME_HALF * power if half else _SAME_FLOAT32 * max(power, 1.0)
    if not error <= limit:
        raise ModelError(
            f"{type(base).__name__} reads pictures in another way than is known here: logits of a probe differ by "
            f"{error:.1e} of their spread (other pictures change them by {power:.1e})",
            where="key model.name",
            fix="please report it with the versions of `loralab doctor`; text alone can be trained",
        )
    return Resolved(
        "features first", f"equal to the model's own forward on two probe pictures ({error:.0e} of the spread)"
    )


def _logits(model: SupervisedPeftModel, probe: PictureProbe, token: int, axes: int, device: torch.device) -> Tensor:
    """Return the logits of the probe's prompt (L, V)."""
    reader = _ProbeReader(probe, token, axes)
    example = TokenizedExample(1, 0, (probe.branch,))
    (batch,) = Planner(len(probe.branch.prompt_ids) + 1, layout="padded", pictures=reader)([example]).micro_batches
    inputs = model_inputs(batch.to(device))
    names = ("input_ids", "attention_mask", "position_ids", "pictures")
    return model.logits(**{name: inputs[name] for name in names})[0].float()
