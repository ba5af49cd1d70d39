"""GPUs: what the driver sees, what PyTorch was built for, and whether the two meet."""

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loralab.doctor.findings import Finding, Section, render_bytes

_QUERY = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
_ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)([a-z]?)$")
_SELECTOR = "install the PyTorch build that the selector on pytorch.org gives for this machine"
# A GPU with less than this share of its memory free is used by somebody else.
_FREE_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Driver:
    """What the NVIDIA driver reports, without PyTorch.

    Attributes:
        version: of the driver.
        gpus: names of the GPUs.
    """

    version: str
    gpus: tuple[str, ...]


def read_driver(query: Sequence[str] = _QUERY) -> Driver | None:
    """Return what the driver's own program reports, or None where there is no driver."""
    try:
        done = subprocess.run(list(query), capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [line.rpartition(",") for line in done.stdout.splitlines() if "," in line]
    return Driver(rows[0][2].strip(), tuple(name.strip() for name, _, _ in rows)) if rows else None


def examine_gpus(driver: Driver | None, torch: Mapping[str, Any]) -> Section:
    """Judge whether PyTorch can use the GPUs that are there.

    Args:
        driver: what the driver reports, or None.
        torch: what PyTorch says (`probe.torch_facts`); empty where it cannot be imported.
    """
    gpus: list[dict[str, Any]] = torch.get("gpus", [])
    section = Section("gpu")
    section.facts["driver"] = driver.version if driver else None
    section.facts["visible_devices"] = torch.get("visible_devices") or "all"
    section.facts["torch_build"] = torch.get("build")
    section.facts["built_for"] = torch.get("architectures", [])
    section.facts["gpus"] = [_describe(gpu) for gpu in gpus] or list(driver.gpus if driver else ())
    if not torch:
        return section
    if driver is not None and not gpus:
        section.findings.append(_unused(driver, torch))
    for gpu in gpus:
        section.findings += _judge(gpu, torch.get("architectures", []), hip=bool(torch.get("hip")))
    if len(gpus) > 1:
        why = "one process uses one GPU; the others stay idle"
        fix = f"torchrun --nproc_per_node {len(gpus)} -m loralab.cli train CONFIG.yaml"
        section.findings.append(Finding("note", f"{len(gpus)} GPUs are visible", why, fix))
    if torch.get("hip"):
        why = "no test of loralab has seen one"
        section.findings.append(Finding("note", "PyTorch is built for AMD GPUs", why, "look at the steps below"))
    if torch.get("mps"):
        why = "no speed and no long run has been measured on one; bitsandbytes has no tested wheels for it"
        fix = "look at the steps below; model.device: cpu leaves it out"
        section.findings.append(Finding("note", "there is an Apple GPU", why, fix))
    return section


def _describe(gpu: Mapping[str, Any]) -> str:
    major, minor = gpu["capability"]
    memory = f"{render_bytes(gpu['free_bytes'])} of {render_bytes(gpu['total_bytes'])} free"
    return f"{gpu['name']}, compute capability {major}.{minor}, {memory}"


def _unused(driver: Driver, torch: Mapping[str, Any]) -> Finding:
    name = driver.gpus[0]
    why = "training falls back to the CPU, which takes tens of times as long"
    if torch.get("hidden"):
        what = f"{name} is hidden by CUDA_VISIBLE_DEVICES"
        return Finding("warning", what, why, "unset CUDA_VISIBLE_DEVICES")
    if not torch.get("cuda"):
        return Finding("problem", f"{name} is there, but this PyTorch is a build for CPUs", why, _SELECTOR)
    said = torch.get("cuda_error") or "it gives no reason"
    what = f"{name} is there, but PyTorch (CUDA {torch['cuda']}) cannot use it: {said}"
    fix = f"update the driver ({driver.version}), or {_SELECTOR}"
    return Finding("problem", what, why, fix)


def _judge(gpu: Mapping[str, Any], architectures: Sequence[str], *, hip: bool) -> list[Finding]:
    found = []
    major, minor = gpu["capability"]
    if architectures and not hip:
        found += _judge_build(gpu["name"], (major, minor), architectures)
    if (major, minor) < (8, 0) and not hip:
        half = (major, minor) >= (5, 3)
        taken = "float16 with loss scaling" if half else "float32, with twice the memory"
        why = f"it does not multiply bfloat16: precision auto takes {taken}"
        fix = "nothing to mend" if half else "a smaller model or batch size; nothing to mend"
        found.append(Finding("note", f"{gpu['name']} has compute capability {major}.{minor}", why, fix))
    if gpu["free_bytes"] < _FREE_SHARE * gpu["total_bytes"]:
        what = f"{render_bytes(gpu['free_bytes'])} of {gpu['name']}'s {render_bytes(gpu['total_bytes'])} are free"
        why = "another process holds the rest: a run may go out of memory"
        found.append(Finding("warning", what, why, "nvidia-smi names the process; end it, or choose another GPU"))
    return found


def _judge_build(name: str, capability: tuple[int, int], architectures: Sequence[str]) -> list[Finding]:
    way = find_kernels(capability, architectures)
    if way == "binary":
        return []
    if way == "ptx":
        why = "kernels are translated at the first start, which takes minutes; the fastest ones may be missing"
        return [Finding("note", f"PyTorch holds no kernels for {name}, only their source form", why, _SELECTOR)]
    number = "".join(map(str, capability))
    what = f"{name} (sm_{number}) is not compatible with the current PyTorch installation ({' '.join(architectures)})"
    why = "kernels end with 'no kernel image is available', or training falls back to the CPU"
    known = [found for text in architectures if (found := _ARCHITECTURE.match(text))]
    newest = max(((int(each[2]), int(each[3])) for each in known), default=(0, 0))
    age = "a newer PyTorch" if capability > newest else "an older PyTorch, whose builds still hold that GPU,"
    return [Finding("problem", what, why, f"{_SELECTOR}: {age} is needed; or set model.device: cpu")]


def find_kernels(capability: tuple[int, int], architectures: Sequence[str]) -> str | None:
    """Return how a build's kernels run on a GPU: "binary", "ptx" (translated at start), or None where they do not.

    Args:
        capability: the GPU's compute capability.
        architectures: as `torch.cuda.get_arch_list` returns them. sm_XY runs on XY and later of the same major
            version, compute_XY is translated for XY and everything later; a letter behind sm_XY ties it to
            that GPU ("a") or to its family ("f").
    """
    ways = set()
    for text in architectures:
        match = _ARCHITECTURE.match(text)
        if match is None:
            continue
        built = (int(match[2]), int(match[3]))
        if match[1] == "compute" and not match[4] and built <= capability:
            ways.add("ptx")
        same_major = built[0] == capability[0] and built[1] <= capability[1]
        if match[1] == "sm" and same_major and (match[4] != "a" or built == capability):
            ways.add("binary")
    return "binary" if "binary" in ways else "ptx" if ways else None
