"""The `export` command: a model in the form that another program reads, proved as far as it can be without it.

Owns the order of an export and its folder; what each program wants is in `loralab.export`.
"""

import os
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from loralab import __version__
from loralab.errors import ModelError, TemplateError, UserError
from loralab.export.gguf_architectures import choose_architecture
from loralab.export.gguf_file import GgufContent, write_gguf
from loralab.export.gguf_library import load_gguf
from loralab.export.gguf_proof import Prompt, choose_blank, prove_gguf
from loralab.export.gguf_vocabulary import build_vocabulary
from loralab.export.ollama import IMPORTED, Modelfile, adds_bos_itself, check_form, choose_weights, render_modelfile
from loralab.export.ollama_prompt import OllamaPrompt, derive_prompt, describe_prompt
from loralab.export.vllm import (
    Served,
    allowed_rank,
    curl_command,
    largest_rank,
    quantization_note,
    request_body,
    serve_command,
    why_merged,
    write_adapter,
    write_extras,
)
from loralab.models.adapters import CONFIG_FILE, WEIGHTS_FILE
from loralab.models.load import load_model_config, max_positions
from loralab.models.merge_source import open_checkpoint
from loralab.models.vision import VISION_FAMILIES
from loralab.progress import Reporter
from loralab.run import file_sha256, read_json, write_json
from loralab.workflows.export_source import ExportSource, open_source
from loralab.workflows.first_look import LONGEST_NAME, check_export
from loralab.workflows.inspect_modules import rank_and_scale
from loralab.workflows.merge_checks import MERGE_FILE
from loralab.workflows.new_folder import check_free, new_folder

EXPORT_FILE = "export.json"
_SHORTEST_CONTEXT = 2048


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """What is asked of an export, besides the adapter.

    Attributes:
        to: ollama, vllm or gguf.
        output: folder to write, not there yet or empty; None puts it beside the run.
        name: of the model in the other program; None takes the run's.
        dtype: f16 or f32, for gguf alone; None is f16.
        base_model: base to use instead of the recorded one.
    """

    to: str
    output: Path | None = None
    name: str | None = None
    dtype: str | None = None
    base_model: str | None = None


@dataclass(frozen=True, slots=True)
class _Job:
    """One export under way.

    Attributes:
        source: what is exported.
        name: of the model.
        staging: folder that becomes the output.
        scratch: folder for what is not kept.
        output: where it will lie.
        dtype: of a GGUF file.
        reporter: told of choices.
    """

    source: ExportSource
    name: str
    staging: Path
    scratch: Path
    output: Path
    dtype: str
    reporter: Reporter


def export(path: Path, request: ExportRequest, *, reporter: Reporter) -> dict[str, Any]:
    """Export a run, an adapter or a merged folder.

    Args:
        path: run folder, adapter folder, or a folder that `loralab merge` wrote.
        request: where to and how.
        reporter: told of choices.

    Returns:
        The content of `export.json`, and `output`.

    Raises:
        UserError: it cannot be exported this way.
        ProofError: what was written is not what the model does; nothing is left.
    """
    output = check_export(path, request.output, to=request.to, dtype=request.dtype, name=request.name)
    work, dtype = EXPORTS[request.to], request.dtype or "f16"
    name = _own_name(path) if request.name is None else request.name
    if request.to == "gguf":
        load_gguf()
    source = open_source(path, request.base_model, reporter)
    check_free(output, source.reads())
    with new_folder(output, work="exporting") as (staging, scratch):
        job = _Job(source, name, staging, scratch, output.absolute(), dtype, reporter)
        result = {"to": request.to, "name": name, "source": str(path), "loralab": __version__, **work(job)}
        result["files"] = {
            str(file.relative_to(staging)): {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
            for file in sorted(staging.rglob("*"))
            if file.is_file()
        }
        write_json(staging / EXPORT_FILE, result)
    return {**result, "output": str(output)}


def _own_name(path: Path) -> str:
    """Return a name for the model: the one that a merged folder's record knows, or the folder's."""
    merged = read_json(path / MERGE_FILE) if (path / MERGE_FILE).is_file() else {}
    known = Path(str(merged.get("name") or "")).name or path.absolute().name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", known).strip("-._")[:LONGEST_NAME] or "model"


def _to_gguf(job: _Job) -> dict[str, Any]:
    _check_text(job)
    choose_architecture(job.source.base_config())  # before anything is merged
    folder = job.source.model_folder(job.scratch / "model", job.reporter)
    file, facts, content = _write_gguf(job, folder, job.dtype)
    found: dict[str, Any] = {"file": file.name, **facts}
    line = shlex.join(["llama-cli", "-m", str(job.output / file.name)])
    try:
        prompt = _ollama_prompt(job, drops_bos=content.add_bos)
    except TemplateError as error:
        return {**found, "modelfile": None, "notes": [*facts["notes"], f"no Modelfile: {error}"], "commands": [line]}
    _write_modelfile(job, f"./{file.name}", prompt, folder)
    create = _create_command(job)
    return {**found, "modelfile": describe_prompt(prompt, promised=job.source.promised), "commands": [line, *create]}


def _write_gguf(job: _Job, folder: Path, dtype: str) -> tuple[Path, dict[str, Any], GgufContent]:
    """Write and prove a GGUF file; it is alone in a folder meanwhile, so that nothing else can be read for it."""
    config, prompter = load_model_config(_model_at(job, folder)), job.source.prompter
    prompts = job.source.prompts()
    vocabulary = build_vocabulary(prompter.tokenizer, rows=int(getattr(config, "vocab_size", 0)))
    content = GgufContent(
        job.name,
        config,
        choose_architecture(config),
        vocabulary,
        _begins_with_bos(job, prompts),
        False,
        job.source.template,
    )
    content = replace(content, add_blank=choose_blank(content, prompts))
    alone = job.scratch / "alone"
    alone.mkdir()
    path = alone / f"{job.name}-{dtype}.gguf"
    job.reporter.say(f"writing {path.name}")
    size = write_gguf(path, open_checkpoint(_model_at(job, folder)), content, dtype=dtype)
    job.reporter.say("reading it back through transformers")
    proof = prove_gguf(path, folder, content, tokenizer=prompter.tokenizer, prompts=prompts)
    notes = [*vocabulary.notes, "not run in llama.cpp here: the proof is transformers' own reading of the file"]
    facts = {
        "dtype": dtype,
        **size,
        "tokenizer": {"model": vocabulary.model, "pre": vocabulary.pre, "add_bos": content.add_bos},
        "proof": proof,
        "notes": notes,
    }
    kept = job.staging / path.name
    path.rename(kept)
    return kept, facts, content


def _begins_with_bos(job: _Job, prompts: list[Prompt]) -> bool:
    bos = job.source.prompter.tokenizer.bos_token_id
    text = job.source.prompter.tokenizer.bos_token
    return bos is not None and all(each.ids[:1] == (bos,) and each.text.startswith(str(text)) for each in prompts)


def _model_at(job: _Job, folder: Path) -> Any:
    """Return the model section for a folder with a merged model."""
    return job.source.config.model.model_copy(update={"name": str(folder), "revision": None})


def _ollama_prompt(job: _Job, *, drops_bos: bool) -> OllamaPrompt:
    prompter = job.source.prompter

    def render(messages: Any) -> str:
        return prompter.render(messages, add_generation_prompt=True)

    drop = str(prompter.tokenizer.bos_token) if drops_bos else ""
    return derive_prompt(render, drop=drop, golden=job.source.conversations())


def _write_modelfile(job: _Job, weights: str, prompt: OllamaPrompt, folder: Path) -> None:
    prompter = job.source.prompter
    context = max(_SHORTEST_CONTEXT, int(job.source.config.data.max_length))
    positions = max_positions(load_model_config(_model_at(job, folder)))
    content = Modelfile(
        weights,
        prompt,
        prompter.system_prompt,
        prompter.stop.texts,
        context if positions is None else min(context, positions),
    )
    (job.staging / "Modelfile").write_text(render_modelfile(content), encoding="utf-8")


def _create_command(job: _Job) -> list[str]:
    file = str(job.output / "Modelfile")
    return [shlex.join(["ollama", "create", job.name, "-f", file]), f"ollama run {job.name}"]


def _to_ollama(job: _Job) -> dict[str, Any]:
    _check_text(job)
    _ollama_prompt(job, drops_bos=False)  # before anything is merged
    base = job.source.base_config()
    if _architecture(base) not in IMPORTED:
        check_form(_architecture(base), lambda: choose_architecture(base))
    folder = job.source.model_folder(job.scratch / "model", job.reporter)
    config: Any = load_model_config(_model_at(job, folder))
    tokenizer = job.source.prompter.tokenizer
    rows = int(getattr(config, "vocab_size", 0))
    weights = choose_weights(
        folder, _architecture(config), tokenizer, rows=rows, gguf=_gguf_objection(config, tokenizer, rows)
    )
    job.reporter.say(f"weights as {weights.value} ({weights.reason})")
    if weights.value == "gguf":
        file, facts, content = _write_gguf(job, folder, "f16")
        drops, names = content.add_bos, f"./{file.name}"
    else:
        shutil.copytree(folder, job.staging, dirs_exist_ok=True, copy_function=_link)
        facts, names, drops = {}, ".", adds_bos_itself(folder)
    prompt = _ollama_prompt(job, drops_bos=drops and _begins_with_bos(job, job.source.prompts()))
    _write_modelfile(job, names, prompt, folder)
    notes = [*facts.pop("notes", []), "not run in Ollama here; what it imports is told from its own sources"]
    return {
        **facts,
        "weights": {"form": weights.value, "reason": weights.reason},
        "modelfile": describe_prompt(prompt, promised=job.source.promised),
        "commands": _create_command(job),
        "notes": notes,
    }


def _gguf_objection(config: Any, tokenizer: Any, rows: int) -> UserError | None:
    try:
        load_gguf()
        choose_architecture(config)
        build_vocabulary(tokenizer, rows=rows)
    except UserError as error:
        return error
    return None


def _link(source: str, target: str) -> str:
    """Put a file of weights at a second place without its bytes where the disk can; copy it elsewhere."""
    try:
        os.link(source, target)
    except OSError:
        return str(shutil.copy2(source, target))
    return target


def _to_vllm(job: _Job) -> dict[str, Any]:
    source = job.source
    config: Any = source.base_config()
    reason = _why_merged(source, config)
    dtype = _served_dtype(source, config)
    facts: dict[str, Any]
    if reason is None:
        adapter = read_json(source.target.adapter / CONFIG_FILE)
        job.staging.rmdir()
        done = write_adapter(source.target.adapter, job.staging, scale_of=lambda layer: _scale(adapter, layer))
        model = source.config.model
        rank = allowed_rank(largest_rank(adapter))
        served = Served(str(model.name), model.revision, dtype, model.quantization, rank)
        facts = {"served": "adapter", "reason": "vLLM takes it as LoRA", "adapter": done, "max_lora_rank": rank}
    else:
        job.reporter.say(f"a merged model is served ({reason})")
        folder = source.model_folder(job.scratch / "model", job.reporter)
        shutil.copytree(folder, job.staging, dirs_exist_ok=True, copy_function=_link)
        served = Served(str(job.output), None, dtype)
        facts = {"served": "merged model", "reason": reason}
    prompter = source.prompter
    tokens = source.config.evaluation.max_new_tokens
    body = request_body(job.name, prompter.stop.ids, prompter.system_prompt, max_tokens=tokens)
    write_extras(job.staging, source.template, body)
    note = quantization_note(served)
    return {
        **facts,
        "commands": [serve_command(served, job.name, job.output), curl_command(job.output)],
        "notes": [*([note] if note else []), "not run in vLLM here; what it takes is told from its own sources"],
    }


def _why_merged(source: ExportSource, config: Any) -> str | None:
    if source.merged:
        return "the folder is a merged model"
    if config.model_type in VISION_FAMILIES:
        return "the base reads pictures, and which of its layers vLLM adapts depends on the model"
    with safe_open(str(source.target.adapter / WEIGHTS_FILE), framework="pt") as tensors:
        names = list(tensors.keys())
    return why_merged(read_json(source.target.adapter / CONFIG_FILE), names, _architecture(config))


def _scale(adapter: Mapping[str, Any], layer: str) -> float:
    scale = rank_and_scale(dict(adapter), layer.removeprefix("base_model.model."))[1]
    if scale is None:
        raise ModelError(f"no scale for {layer}", where=CONFIG_FILE, fix="restore the file")
    return scale


def _served_dtype(source: ExportSource, config: Any) -> str:
    precision = source.config.model.precision
    stored = str(getattr(config, "dtype", None) or "auto").removeprefix("torch.")
    return precision if precision != "auto" else stored


def _architecture(config: Any) -> str:
    return str((getattr(config, "architectures", None) or [config.model_type])[0])


def _check_text(job: _Job) -> None:
    kind = job.source.base_config().model_type
    if kind in VISION_FAMILIES:
        raise ModelError(
            f"models that read pictures ({kind}) are not exported to Ollama or GGUF here",
            where="option --to",
            fix="export --to vllm, or `loralab merge` and the other program's own converter",
        )


EXPORTS: dict[str, Callable[[_Job], dict[str, Any]]] = {"ollama": _to_ollama, "vllm": _to_vllm, "gguf": _to_gguf}
