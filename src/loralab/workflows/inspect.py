"""What an adapter is, read from its folder alone: no torch, no base model.

Owns which questions are asked of a folder. Tensors are `inspect_tensors.py`'s, layers
`inspect_modules.py`'s; a base model is compared in `inspect_base.py`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loralab.doctor.findings import Finding, by_severity
from loralab.errors import ModelError, RunFolderError
from loralab.run import RunFolder, read_json
from loralab.workflows.first_look import check_no_merged
from loralab.workflows.inspect_modules import by_kind, misfit, names_in, rank_and_scale, variant_of
from loralab.workflows.inspect_tensors import StoredTensor, not_finite, read_tensors

CONFIG_FILE, WEIGHTS_FILE, CONTRACT_FILE = "adapter_config.json", "adapter_model.safetensors", "prompt_contract.json"
_TEMPLATE_FILE = "chat_template.jinja"
# Names that a finding lists; their number is always given.
_LISTED = 3


def inspect_adapter(path: Path) -> tuple[dict[str, Any], list[StoredTensor]]:
    """Return what an adapter is, and its tensors.

    Args:
        path: run folder or adapter folder.

    Raises:
        ModelError: there is no adapter, or it cannot be read.
    """
    folder, run = find_adapter(path)
    config = _read_config(folder)
    tensors, sha256 = read_tensors(folder / WEIGHTS_FILE)
    rank, scale = rank_and_scale(config, "")
    parts = [tensor for tensor in tensors if not tensor.whole]
    result: dict[str, Any] = {
        "path": str(folder),
        "base": {"name": config.get("base_model_name_or_path"), "revision": config.get("revision")},
        "variant": variant_of(config),
        "peft_type": config.get("peft_type"),
        "peft_version": config.get("peft_version"),
        "task_type": config.get("task_type"),
        "rank": rank,
        "alpha": config.get("lora_alpha", config.get("alpha")),
        "scale": scale,
        "dropout": config.get("lora_dropout"),
        "target_modules": config.get("target_modules"),
        "modules_to_save": config.get("modules_to_save"),
        "kinds": by_kind(config, parts),
        "saved_whole": [_describe_whole(tensor) for tensor in tensors if tensor.whole],
        "tensors": len(tensors),
        "parameters": sum(tensor.size for tensor in tensors),
        "file_bytes": (folder / WEIGHTS_FILE).stat().st_size,
        "adapter_sha256": sha256,
        "loading": _loading(config, folder, tensors),
        "contract": _read_contract(folder),
        "run": _read_run(run),
        "attached": None,
    }
    findings = [*_judge_tensors(config, tensors, result), *_judge_folder(folder, result)]
    result["findings"] = [describe(finding) for finding in by_severity(findings)]
    return result, tensors


def find_adapter(path: Path) -> tuple[Path, RunFolder | None]:
    """Return the adapter folder that RUN names, and the run folder that it belongs to.

    Raises:
        ModelError: there is no adapter in safetensors form.
        RunFolderError: the run has not written its adapter yet.
    """
    run = RunFolder(path)
    if run.exists():
        if not (run.adapter / CONFIG_FILE).is_file():
            status = read_json(run.record).get("status", "unknown")
            fix = "go on with `loralab train CONFIG --resume`, or give a folder of checkpoints/"
            raise RunFolderError(f"the run has no adapter (status: {status})", where=str(path), fix=fix)
        return run.adapter, run
    parent = RunFolder(path.parent)
    owner = parent if parent.exists() and path.resolve() == parent.adapter.resolve() else None
    if (path / CONFIG_FILE).is_file() and (path / WEIGHTS_FILE).is_file():
        return path, owner
    check_no_merged(path)
    if not path.is_dir():
        what = f"no such folder: {str(path)!r}" if not path.exists() else f"not a folder: {str(path)!r}"
        raise ModelError(what, where="argument RUN", fix="give a run folder, or the adapter folder inside it")
    missing = CONFIG_FILE if not (path / CONFIG_FILE).is_file() else WEIGHTS_FILE
    fix = "give a run folder, or the adapter folder inside it"
    if (path / "adapter_model.bin").is_file():
        fix = "adapter_model.bin may run code when it is read: save the adapter again as safetensors"
    elif (path / "config.json").is_file():
        fix = "this is a base model; give the folder of an adapter for it"
    raise ModelError(f"no {missing} in {str(path)!r}", where="argument RUN", fix=fix)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / CONFIG_FILE)
    except RunFolderError as error:
        raise ModelError(
            f"cannot read {CONFIG_FILE}: {error.problems[0].what}", where=str(folder), fix="restore the file"
        ) from None


def _describe_whole(tensor: StoredTensor) -> dict[str, Any]:
    return {"name": tensor.name, "shape": list(tensor.shape), "dtype": tensor.dtype, "norm": tensor.norm}


def _loading(config: Mapping[str, Any], folder: Path, tensors: Sequence[StoredTensor]) -> dict[str, Any]:
    """Return whether the adapter trains when PEFT loads it, and why."""
    can_train = sum(tensor.size for tensor in tensors if tensor.part not in ("vera_A", "vera_B"))
    said = config.get("inference_mode")
    return {
        "trainable_parameters": 0,
        "trainable_when_asked": can_train,
        "inference_mode": said,
        "why": (
            "PeftModel.from_pretrained freezes an adapter unless is_trainable=True is given; "
            f"inference_mode: {json.dumps(said)} in the file is what PEFT writes at every save, and does not decide. "
            "Frozen weights act in every forward all the same"
        ),
        "how": f"PeftModel.from_pretrained(base, {str(folder)!r}, is_trainable=True)",
    }


def _read_contract(folder: Path) -> dict[str, Any] | None:
    path = folder / CONTRACT_FILE
    if not path.is_file():
        return None
    contract = read_json(path)
    template, golden = str(contract.get("template") or ""), contract.get("golden")
    beside = folder / _TEMPLATE_FILE
    return {
        "template_sha256": contract.get("template_sha256"),
        "template_intact": hashlib.sha256(template.encode()).hexdigest() == contract.get("template_sha256"),
        "template_kept": beside.read_text(encoding="utf-8", errors="replace") == template if beside.is_file() else None,
        "stop_tokens": names_in(contract.get("stop_tokens")),
        "system_prompt": contract.get("system_prompt"),
        "special_tokens": contract.get("special_tokens"),
        "golden_prompts": len(golden) if isinstance(golden, list) else 0,
        "versions": contract.get("versions"),
    }


def _read_run(run: RunFolder | None) -> dict[str, Any] | None:
    if run is None:
        return None
    record = read_json(run.record)
    facts = {key: record.get(key) for key in ("name", "status", "started_at", "finished_at", "loralab_version")}
    model = record.get("model")
    template = read_json(run.data).get("template") if run.data.is_file() else None
    return {
        "path": str(run.path),
        **facts,
        "steps": record.get("steps"),
        "model": model if isinstance(model, dict) else None,
        "template": template,
        "adapter_sha256": record.get("adapter_sha256"),
    }


def _judge_tensors(
    config: Mapping[str, Any], tensors: Sequence[StoredTensor], result: Mapping[str, Any]
) -> list[Finding]:
    found = []
    wrong = [(tensor.name, reason) for tensor in tensors if (reason := misfit(config, tensor)) is not None]
    if wrong:
        what = f"{len(wrong)} of {len(tensors)} tensors match nothing in {CONFIG_FILE}: {_list(wrong)}"
        why = "PEFT leaves them out when it loads the adapter, or refuses it"
        found.append(Finding("problem", what, why, f"restore the {CONFIG_FILE} that was saved with these weights"))
    broken = list(not_finite(list(tensors)))
    if broken:
        what = f"{len(broken)} tensors hold NaN or infinity: {_names(broken)}"
        why = "every answer of the adapter is garbage"
        found.append(Finding("problem", what, why, "train again, with a lower training.learning_rate or in bfloat16"))
    layers = sum(kind["count"] for kind in result["kinds"])
    dead = [name for kind in result["kinds"] for name in kind["untrained"]]
    if dead:
        everything = len(dead) == layers
        what = "the adapter was never trained" if everything else f"{len(dead)} of {layers} layers were never trained"
        part = "B of every layer is zero" if everything else f"their B is zero: {_names(dead)}"
        if all("lora_B" not in kind["norms"] for kind in result["kinds"]):
            part = "all weights are as they were before the first step"
        why = "it answers as the base model does" if everything else "these layers work as the base model's"
        fix = "check that training made steps and that its optimizer was given the adapter's weights"
        found.append(Finding("problem" if everything else "warning", f"{what} ({part})", why, fix))
    absent = [
        name
        for name in names_in(config.get("target_modules"))
        if not any(t.module == name or t.module.endswith(f".{name}") for t in tensors)
    ]
    if absent:
        what = f"no tensors for {', '.join(map(repr, absent))}, which {CONFIG_FILE} names as targets"
        why = "PEFT fills those layers with fresh weights, and warns at most"
        found.append(Finding("warning", what, why, "take the weights and the configuration of one save"))
    return found


def _judge_folder(folder: Path, result: Mapping[str, Any]) -> list[Finding]:
    found = []
    contract, run = result["contract"], result["run"]
    if contract is None:
        why = "nobody can check that prompts are sent as in training"
        fix = "give data.template and data.stop_tokens with each command that prompts the adapter"
        found.append(Finding("note", f"the folder has no {CONTRACT_FILE}", why, fix))
    elif not contract["template_intact"] or contract["template_kept"] is False:
        what = (
            "the contract's template does not have its own hash"
            if not contract["template_intact"]
            else (f"{_TEMPLATE_FILE} is not the template of the prompt contract")
        )
        why = "prompts would differ from those of training; loralab's commands refuse the adapter"
        found.append(Finding("problem", what, why, f"restore {CONTRACT_FILE} and {_TEMPLATE_FILE} in {str(folder)!r}"))
    if run and run["adapter_sha256"] and run["adapter_sha256"] != result["adapter_sha256"]:
        what = f"the weights are not those that the run recorded ({str(run['adapter_sha256'])[:12]}...)"
        why = "the figures in the run folder belong to other weights"
        found.append(Finding("problem", what, why, "restore the adapter, or train again"))
    return found


def _list(wrong: Sequence[tuple[str, str]]) -> str:
    shown = "; ".join(f"{name} ({reason})" for name, reason in wrong[:_LISTED])
    return shown + ("; ..." if len(wrong) > _LISTED else "")


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")


def describe(finding: Finding) -> dict[str, str]:
    """Return a finding as JSON holds it."""
    return {name: getattr(finding, name) for name in ("severity", "what", "why", "fix")}
