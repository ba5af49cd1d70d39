"""Processor and memory: what there is, what the container leaves, what PyTorch makes of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from loralab.doctor.findings import Finding, Section, render_bytes
from loralab.models.limits import Limits

# Below this, not even a model of half a billion parameters trains.
_LITTLE_MEMORY = 4 * 2**30
# Tasks for each processor from which on other programs are in the way.
_BUSY = 1.5
_VECTORS = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "neon", "sve", "bf16", "asimd")
_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")


@dataclass(frozen=True, slots=True)
class Memory:
    """The machine's memory, in bytes, as the system reports it.

    Attributes:
        total: physical memory.
        available: what can be had without swapping.
    """

    total: int
    available: int


def examine_memory(memory: Memory, limits: Limits) -> Section:
    """Judge how much memory a run can have."""
    facts = {"total_bytes": memory.total, "available_bytes": memory.available}
    available = memory.available
    section = Section("memory", facts)
    limit = limits.memory_bytes
    if limit is not None and limit < memory.total:
        facts["container_limit_bytes"] = limit
        available = min(available, max(limit - (limits.used_bytes or 0), 0))
        facts["container_available_bytes"] = available
        what = f"the container may use {render_bytes(limit)} of {render_bytes(memory.total)}"
        why = "`free` and `top` show the machine's memory; a process that goes over the limit is killed without a word"
        fix = "give the container more memory (docker run --memory, or its resource limits)"
        section.findings.append(Finding("note", what, why, fix))
    if available < _LITTLE_MEMORY:
        what = f"{render_bytes(available)} of memory can be had"
        why = "a model of 0.5 billion parameters takes 2 GB in float32 before it trains; a full machine kills the run"
        fix = "end other programs, or take a smaller model, training.token_budget or model.precision: bfloat16"
        section.findings.append(Finding("warning", what, why, fix))
    return section


def examine_processor(
    cores: int,
    *,
    usable: float,
    limits: Limits,
    load: float | None,
    torch: Mapping[str, object],
    environ: Mapping[str, str],
) -> Section:
    """Judge processors and threads.

    Args:
        cores: logical processors of the machine.
        usable: as `usable_cpus` returns it.
        limits: of the control groups.
        load: tasks that run or wait for a processor of the machine, averaged over minutes; None where not known.
        torch: what PyTorch says: `threads` and `capabilities`; empty where it cannot be imported.
        environ: environment variables.
    """
    section = Section("processor", {"cores": cores, "usable_cores": usable})
    if limits.cpus is not None:
        section.facts["container_cpus"] = limits.cpus
    capabilities = torch.get("capabilities")
    if isinstance(capabilities, Mapping):
        section.facts["name"] = capabilities.get("cpu_name") or capabilities.get("architecture")
        section.facts["instructions"] = [name for name in _VECTORS if capabilities.get(name)]
        section.facts["bfloat16"] = any(capabilities.get(name) for name in _BFLOAT16)
        if capabilities.get("architecture") == "x86_64" and not capabilities.get("avx2"):
            why = "PyTorch's fast kernels need it: training on this CPU takes several times as long"
            fix = "use another machine; in a virtual one, pass the host's processor through (cpu=host)"
            section.findings.append(Finding("warning", "the processor has no AVX2", why, fix))
    threads = torch.get("threads")
    if isinstance(threads, int):
        section.facts["threads"] = threads
        section.findings += _judge_threads(threads, usable, environ.get("OMP_NUM_THREADS"))
    if load is not None:
        section.facts["load"] = round(load, 1)
        if load >= _BUSY * cores and threads != 1:
            what = f"the machine is busy: {load:.1f} tasks want its {cores} processors"
            why = "PyTorch's threads wait for one another; a small model trained faster with one"
            section.findings.append(Finding("note", what, why, "end other programs, or export OMP_NUM_THREADS=1"))
    return section


def _judge_threads(threads: int, usable: float, setting: str | None) -> list[Finding]:
    wanted = max(math.floor(usable), 1)
    cause = f" (OMP_NUM_THREADS={setting})" if setting else ""
    fix = f"export OMP_NUM_THREADS={wanted}"
    if threads > math.ceil(usable):
        why = "more threads than processors wait for one another: every step takes longer"
        return [Finding("warning", f"PyTorch uses {threads} threads on {usable:g} processors{cause}", why, fix)]
    # PyTorch takes one thread for each physical core; half of the logical ones is therefore usual.
    if threads < wanted / 2:
        why = "training on the CPU leaves processors idle"
        return [Finding("warning", f"PyTorch uses {threads} of {usable:g} processors{cause}", why, fix)]
    return []
