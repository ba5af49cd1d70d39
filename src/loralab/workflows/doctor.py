"""The diagnosis of a machine: every topic in turn, then the steps.

Owns what is looked at and in which order. Compiled libraries are loaded by processes of their own,
so that none of them can end this one.
"""

import importlib.metadata
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from loralab.doctor.findings import Finding, Section, by_severity
from loralab.doctor.folders import examine_folders
from loralab.doctor.gpus import examine_gpus, read_driver
from loralab.doctor.kernels import examine_attention, examine_bitsandbytes
from loralab.doctor.libraries import examine_libraries, examine_python, read_requirements
from loralab.doctor.machine import Memory, examine_memory, examine_processor
from loralab.doctor.programs import Output, run_part
from loralab.doctor.variables import examine_accelerate, examine_hub, examine_variables, hub_home, loralab_cache
from loralab.doctor.verdict import examine_steps, exit_code
from loralab.models.limits import read_limits, runnable_cpus, usable_cpus
from loralab.progress import Reporter

TORCH, QUANTIZATION, STEPS = (f"loralab.doctor.{name}" for name in ("torch_facts", "quantization_facts", "steps"))


def examine(
    *, steps: bool, reporter: Reporter, environ: Mapping[str, str] = os.environ, run: Callable[[str], Output] = run_part
) -> dict[str, Any]:
    """Look at everything that a run depends on, and prove a LoRA step on every device.

    Args:
        steps: whether to run the steps.
        reporter: told what is under way.
        environ: environment variables.
        run: runs a part of the diagnosis as a program.

    Returns:
        `sections` with facts and findings, all `findings` by severity, the `steps`, and the `exit_code`.
    """
    reporter.say("looking at PyTorch and bitsandbytes" + (", and running a LoRA step on every device" if steps else ""))
    parts = [TORCH, QUANTIZATION, *([STEPS] if steps else [])]
    with ThreadPoolExecutor(len(parts)) as pool:  # each waits for a process of its own
        outputs = dict(zip(parts, pool.map(run, parts), strict=True))
    sections = [*_software(environ), *_hardware(environ, outputs), *_surroundings(environ)]
    proven: list[dict[str, Any]] = []
    if steps:
        section, proven = examine_steps(outputs[STEPS])
        sections.append(section)
    return {
        "sections": [section.as_dict() for section in sections],
        "findings": [{"section": name, **_as_dict(finding)} for finding, name in _ordered(sections)],
        "steps": proven,
        "exit_code": exit_code(sections),
    }


def _ordered(sections: list[Section]) -> list[tuple[Finding, str]]:
    names = {id(finding): section.name for section in sections for finding in section.findings}
    ordered = by_severity(finding for section in sections for finding in section.findings)
    return [(finding, names[id(finding)]) for finding in ordered]


def _as_dict(finding: Finding) -> dict[str, str]:
    return {name: getattr(finding, name) for name in ("severity", "what", "why", "fix")}


def _software(environ: Mapping[str, str]) -> list[Section]:
    metadata = importlib.metadata.metadata("loralab")
    python = examine_python(
        sys.version_info[:3],
        required=metadata["Requires-Python"] or "",
        system=platform.system(),
        in_environment=sys.prefix != sys.base_prefix,
        environ=environ,
    )
    requirements = read_requirements(importlib.metadata.requires("loralab") or [])
    return [python, examine_libraries(requirements, system=sys.platform)]


def _hardware(environ: Mapping[str, str], outputs: Mapping[str, Output]) -> list[Section]:
    torch = next(iter(outputs[TORCH].lines), {})
    limits, memory = read_limits(), psutil.virtual_memory()
    cores = os.cpu_count() or 1
    # The lower of two averages: the doctor's own steps raise that of the last minute.
    load = min(os.getloadavg()[:2]) if hasattr(os, "getloadavg") else None
    usable = usable_cpus(runnable_cpus(), limits)
    processor = examine_processor(cores, usable=usable, limits=limits, load=load, torch=torch, environ=environ)
    gpus = examine_gpus(read_driver(), torch)
    if not torch:
        gpus.findings.append(_broken_torch(outputs[TORCH]))
    quantization = next(iter(outputs[QUANTIZATION].lines), {})
    bitsandbytes = examine_bitsandbytes(quantization or {"error": outputs[QUANTIZATION].failure}, system=sys.platform)
    return [
        processor,
        examine_memory(Memory(memory.total, memory.available), limits),
        gpus,
        examine_attention(torch),
        bitsandbytes,
    ]


def _broken_torch(output: Output) -> Finding:
    why = "nothing that loads a model works without it"
    fix = "install torch again, the build that the selector on pytorch.org gives for this machine"
    return Finding("problem", f"PyTorch cannot be used: {output.failure or 'it says nothing'}", why, fix)


def _surroundings(environ: Mapping[str, str]) -> list[Section]:
    places = {
        "current": Path.cwd(),
        "hub_cache": hub_home(environ),
        "loralab_cache": loralab_cache(environ),
        "temporary": Path(tempfile.gettempdir()),
    }
    return [
        examine_folders(places),
        examine_hub(environ),
        examine_variables(environ),
        examine_accelerate(environ),
    ]
