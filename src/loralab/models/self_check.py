"""Can this model take token trees? Asked of the loaded model, not of its name.

Owns the probe row and what it must show: that every attention layer ran here, that equal roots
give equal logits wherever they lie, that a branch does not move what is outside it, that each
path gives what it gives alone under the library's own attention, and that a backward sweep runs.
A deliberately wrong layout must fail the same comparison, or the answer is "unknown".
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loralab.models.attention import TREE_ATTENTION, TreeLayout, UnsupportedAttention, carry_layout, use_attention
from loralab.models.families import find_tree_obstacle
from loralab.models.picture_features import on_axes
from loralab.models.precision import Resolved
from loralab.models.supervised import SupervisedPeftModel
from loralab.models.visibility import TreeSegment

# What a model that cannot take a tree was seen to raise. The text goes into log and record: were it a
# fault of ours, it would be seen there.
_REFUSALS = (
    UnsupportedAttention,
    NotImplementedError,
    AttributeError,
    IndexError,
    RuntimeError,
    TypeError,
    ValueError,
)
# Largest differences seen on 30 families that can take trees: 1.1e-6; smallest on those that cannot: 3e-4.
_SAME_FLOAT32 = 2e-5
# In half precision, and for what must not move at all: shares of what a wrong layout does. Kernels of an
# accelerator add in another order elsewhere in a row: a last bit, which half precision magnifies.
_SAME_HALF, _STILL, _STILL_ACCELERATOR = 0.1, 1e-3, 3e-2
_WEAKEST_POWER = 1e-3


@dataclass(frozen=True, slots=True)
class _Span:
    start: int
    end: int
    branching: bool
    segments: Sequence[TreeSegment] = ()


@dataclass(frozen=True, slots=True)
class _Part:
    start: int
    end: int
    above: Sequence[tuple[int, int]]


@dataclass(slots=True)
class _Probe:
    """A row with two equal roots, a nested tree and a lone root."""

    ids: Tensor
    depth: Tensor
    subtree_end: Tensor
    roots: list[_Span]
    paths: list[list[int]]
    segments: dict[str, slice] = field(default_factory=dict)


# Name, parent, length: a depth-first walk. "twin" repeats "first".
_SEGMENTS = (
    ("first", None, 6),
    ("prefix", None, 7),
    ("a", "prefix", 5),
    ("b", "prefix", 4),
    ("c", "b", 3),
    ("d", "b", 4),
    ("twin", None, 6),
    ("lone", None, 9),
)


def resolve_tree_kernel(model: SupervisedPeftModel) -> Resolved[str | None]:
    """Choose how attention over trees is computed, or None where the model cannot take trees.

    Args:
        model: base with adapter, on its device.

    Returns:
        A name of `attention_kernels.KERNELS`, or None, with the reason.
    """
    if not type(model.language_model).__module__.startswith("transformers."):
        return Resolved(None, "its code is not part of transformers")
    obstacle = find_tree_obstacle(model.language_model.config)
    if obstacle is not None:
        return Resolved(None, obstacle)
    failures: list[str] = []
    for kernel in kernels_to_try(model.embedding.weight.device.type, model.embedding.weight.dtype):
        reason = find_tree_failure(model, kernel)
        if reason is None:
            because = (
                f"equal to each path alone on a probe row; tried before: {'; '.join(failures)}"
                if failures
                else ("equal to each path alone on a probe row")
            )
            return Resolved(kernel, because)
        failures.append(f"{kernel}: {reason}")
    return Resolved(None, "; ".join(failures))


def find_tree_failure(model: SupervisedPeftModel, kernel: str) -> str | None:
    """Return what the probe row shows to be wrong under `kernel`, or None.

    Args:
        model: base with adapter.
        kernel: name in `attention_kernels.KERNELS`.
    """
    before, was_training = model.tree_kernel, model.training
    model.tree_kernel = kernel
    model.eval()
    try:
        return _examine(model, kernel)
    except torch.OutOfMemoryError:  # a RuntimeError, and no fact about the architecture
        raise
    except _REFUSALS as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
        model.tree_kernel = before
        use_attention(model.language_model, model.stock_attention)


def find_training_noise(model: SupervisedPeftModel) -> str | None:
    """Return a sentence when the same row gives different losses twice while training, or None.

    Router noise, dropout and skipped layers in the base do that; LoRA dropout, which is keyed,
    does not. Layouts then agree in distribution only.
    """
    ids = torch.arange(1, 17, device=model.embedding.weight.device)[None] % model.embedding.weight.shape[0]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(16)[None].to(ids)}
    keys = {"token_prefixes": torch.zeros_like(ids), "dropout_key": (0, 0)}
    positions = torch.arange(15, device=ids.device)
    was_training = model.training
    model.train()
    with torch.no_grad(), torch.random.fork_rng(devices=[ids.device] if ids.device.type == "cuda" else []):
        first, second = (model(**inputs, **keys, label_positions=positions, labels=ids[0, 1:]).losses for _ in range(2))
    model.train(was_training)
    if _distance(first, second) == 0.0:
        return None
    return "the base draws random numbers while training: losses of different layouts agree on average only"


def _examine(model: SupervisedPeftModel, kernel: str) -> str | None:
    probe = _build_probe(model)
    with torch.no_grad():
        logits, calls = _tree_logits(model, probe, probe.ids, kernel)
        layers = int(model.language_model.config.get_text_config().num_hidden_layers)
        if calls != layers:
            return f"{calls} of {layers} layers attend through transformers' attention interface"
        wrong = _wrong_logits(model, probe, kernel)
        alone = {path[-1]: _path_logits(model, probe, path) for path in probe.paths}
        moved, _ = _tree_logits(model, probe, _changed(probe, "a"), kernel)
    spread = float(torch.cat(list(alone.values())).std().clamp_min(1e-12))
    error = max(_distance(logits[path], alone[path[-1]]) for path in probe.paths) / spread
    power = max(_distance(wrong[path], alone[path[-1]]) for path in probe.paths) / spread
    if power < _WEAKEST_POWER:
        return f"unknown: a wrong layout changes logits by no more than {power:.1e} of their spread"
    half = model.embedding.weight.dtype != torch.float32
    limit = _SAME_HALF * power if half else _SAME_FLOAT32 * max(power, 1.0)
    if not error <= limit:  # logits that are no numbers fail
        return f"logits differ from each path alone by {error:.1e} of their spread"
    still = _STILL_ACCELERATOR if half and model.embedding.weight.device.type != "cpu" else _STILL
    twins = _distance(logits[probe.segments["first"]], logits[probe.segments["twin"]]) / spread
    if not twins <= still * power:
        return f"equal roots give different logits ({twins:.1e} of their spread): place in the row matters"
    outside = torch.ones(len(probe.ids), dtype=torch.bool, device=logits.device)
    outside[probe.segments["a"]] = False
    inside_moved, outside_moved = (_distance(moved[part], logits[part]) for part in (~outside, outside))
    if not outside_moved <= still * inside_moved:
        return f"a branch moves logits outside it ({outside_moved / inside_moved:.1e} of its own change)"
    _run_backward(model, probe)
    return _examine_chains(model, probe, kernel, alone, limit=limit * spread)


def _examine_chains(
    model: SupervisedPeftModel, probe: _Probe, kernel: str, alone: dict[int, Tensor], *, limit: float
) -> str | None:
    """Examine the roots that do not branch as a row of their own: a kernel may go another way there."""
    chains = _without_branches(probe)
    with torch.no_grad():
        logits, _ = _tree_logits(model, chains, chains.ids, kernel)
    for name in ("first", "lone"):
        error = _distance(logits[chains.segments[name]], alone[probe.segments[name].stop - 1])
        if not error <= limit:
            return f"logits of a row of chains differ from each alone by {error:.1e}"
    _run_backward(model, chains)
    return None


def _without_branches(probe: _Probe) -> _Probe:
    names, segments, roots, start = ("first", "twin", "lone"), {}, [], 0
    for name in names:
        length = probe.segments[name].stop - probe.segments[name].start
        segments[name] = slice(start, start + length)
        roots.append(_Span(start, start + length, branching=False))
        start += length
    ids, depth = (torch.cat([each[probe.segments[name]] for name in names]) for each in (probe.ids, probe.depth))
    ends = torch.cat([torch.full_like(depth[part], part.stop) for part in segments.values()])
    return _Probe(ids, depth, ends, roots, paths=[], segments=segments)


def _build_probe(model: SupervisedPeftModel) -> _Probe:
    device = model.embedding.weight.device
    vocabulary = model.embedding.weight.shape[0]
    starts: dict[str, int] = {}
    ends: dict[str, int] = {}
    depth: list[int] = []
    paths: dict[str, list[int]] = {}
    position = 0
    for name, parent, length in _SEGMENTS:
        starts[name], ends[name] = position, position + length
        first = len(paths[parent]) if parent else 0
        depth += range(first, first + length)
        paths[name] = [*(paths[parent] if parent else []), *range(position, position + length)]
        position += length
    below = {name: max([ends[name], *(_last_below(name, ends))]) for name, _, _ in _SEGMENTS}
    subtree_end = [below[name] for name, _, length in _SEGMENTS for _ in range(length)]
    ids = torch.tensor([(37 * i + 11) % vocabulary for i in range(position)], device=device)
    segments = {name: slice(starts[name], ends[name]) for name in starts}
    ids[segments["twin"]] = ids[segments["first"]]
    parts = {name: _Part(starts[name], ends[name], _ranges_above(name, starts, ends)) for name, _, _ in _SEGMENTS}
    roots = [
        _Span(
            starts[name],
            below[name],
            branching=name == "prefix",
            segments=[part for part in parts.values() if starts[name] <= part.start < below[name]],
        )
        for name, parent, _ in _SEGMENTS
        if parent is None
    ]
    return _Probe(
        ids=ids,
        depth=torch.tensor(depth, device=device),
        subtree_end=torch.tensor(subtree_end, device=device),
        roots=roots,
        paths=[paths[name] for name in ("first", "a", "c", "d", "lone")],
        segments=segments,
    )


def _ranges_above(name: str, starts: dict[str, int], ends: dict[str, int]) -> list[tuple[int, int]]:
    parent = next(parent for own, parent, _ in _SEGMENTS if own == name)
    return [*_ranges_above(parent, starts, ends), (starts[parent], ends[parent])] if parent else []


def _last_below(name: str, ends: dict[str, int]) -> list[int]:
    children = [child for child, parent, _ in _SEGMENTS if parent == name]
    return [end for child in children for end in (ends[child], *_last_below(child, ends))]


def _tree_logits(model: SupervisedPeftModel, probe: _Probe, ids: Tensor, kernel: str) -> tuple[Tensor, int]:
    layout = TreeLayout(probe.depth, probe.subtree_end, probe.roots, kernel)
    use_attention(model.language_model, TREE_ATTENTION)
    base = model.language_model
    positions = on_axes(probe.depth[None], base.config)
    logits = base(
        input_ids=ids[None], attention_mask=carry_layout(layout), position_ids=positions, use_cache=False
    ).logits[0]
    return logits.float(), layout.calls


def _wrong_logits(model: SupervisedPeftModel, probe: _Probe, kernel: str) -> Tensor:
    """Return what the row gives when every token sees all before it."""
    length = len(probe.ids)
    layout = TreeLayout(probe.depth, torch.full_like(probe.depth, length), [_Span(0, length, True)], kernel)
    base = model.language_model
    positions = on_axes(probe.depth[None], base.config)
    logits: Tensor = base(
        input_ids=probe.ids[None], attention_mask=carry_layout(layout), position_ids=positions, use_cache=False
    ).logits[0]
    return logits.float()


def _path_logits(model: SupervisedPeftModel, probe: _Probe, path: Sequence[int]) -> Tensor:
    index = torch.tensor(path, device=probe.ids.device)
    ids = probe.ids[index][None]
    return model.logits(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=probe.depth[index][None])[
        0
    ].float()


def _changed(probe: _Probe, name: str) -> Tensor:
    ids = probe.ids.clone()
    ids[probe.segments[name]] = ids[probe.segments["lone"]][: probe.segments[name].stop - probe.segments[name].start]
    return ids


def _distance(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max())


def _run_backward(model: SupervisedPeftModel, probe: _Probe) -> None:
    """Run forward and backward as in training, attention dropout included: a kernel may have none."""
    if not any(weight.requires_grad for weight in model.parameters()):
        return
    device = probe.ids.device
    model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        result = model(
            input_ids=probe.ids[None],
            attention_mask=torch.ones_like(probe.ids)[None],
            position_ids=probe.depth[None],
            depth=probe.depth[None],
            subtree_end=probe.subtree_end[None],
            roots=probe.roots,
            token_prefixes=torch.zeros_like(probe.ids)[None],
            dropout_key=(0, 0),
            label_positions=torch.arange(len(probe.ids) - 1, device=device),
            labels=probe.ids[1:],
        )
        result.losses.sum().backward()
    model.eval()


def kernels_to_try(device_type: str, dtype: torch.dtype) -> Sequence[str]:
    """Return the names of kernels in order of preference; the first that passes is used.

    Args:
        device_type: kind of device that computes.
        dtype: compute type.
    """
    if device_type == "cuda":
        return ("varlen", "flex", "dense")
    # PyTorch's own attention is as fast in float32; in bfloat16 on a CPU it takes 1.5 to 4 times as long.
    return ("products", "per_tree") if (device_type, dtype) == ("cpu", torch.bfloat16) else ("per_tree",)
