"""Environment variables: the Hub's, proxies, and those that change results or speed.

Owns the table of variables. Values that may hold a secret (tokens, proxies, mirrors) are never kept,
only whether they are there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from loralab.doctor.findings import Finding, Section, Severity

_TRUE = frozenset({"1", "ON", "YES", "TRUE"})
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
_CERTIFICATES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


def is_true(value: str | None) -> bool:
    """Return whether a variable's value means yes, as the Hub's libraries read it."""
    return (value or "").upper() in _TRUE


def is_false(value: str | None) -> bool:
    """Return whether a variable is set and its value means no."""
    return value is not None and value.lower() in {"0", "off", "no", "false"}


def hub_home(environ: Mapping[str, str]) -> Path:
    """Return the folder in which the Hub's libraries keep models, data and the token."""
    base = environ.get("XDG_CACHE_HOME") or _home(environ, ".cache")
    return Path(environ.get("HF_HOME") or f"{base}/huggingface").expanduser()


def loralab_cache(environ: Mapping[str, str]) -> Path:
    """Return the folder of tokenized data where `data.cache_dir` names no other."""
    return Path(environ.get("XDG_CACHE_HOME") or _home(environ, ".cache")).expanduser() / "loralab"


def _home(environ: Mapping[str, str], name: str) -> str:
    return f"{environ.get('HOME') or '~'}/{name}"


def examine_hub(environ: Mapping[str, str]) -> Section:
    """Say how the Hub can be reached: token, offline mode, proxies, certificates; no values."""
    token = _find_token(environ)
    offline = [name for name in _OFFLINE if is_true(environ.get(name))]
    proxies = [name for name in _PROXIES if environ.get(name) or environ.get(name.lower())]
    endpoint = bool(environ.get("HF_ENDPOINT"))
    facts = {"token": token or "none", "offline": offline, "proxies": proxies, "own_endpoint": endpoint}
    section = Section("hub", facts)
    if token is None:
        why = "gated models (Llama, Gemma and others) and private ones cannot be fetched, and nothing can be pushed"
        section.findings.append(Finding("note", "there is no Hub token", why, "hf auth login"))
    elif is_true(environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN")):
        why = "the token is there but not sent: gated models are refused"
        fix = "unset HF_HUB_DISABLE_IMPLICIT_TOKEN"
        section.findings.append(Finding("warning", "HF_HUB_DISABLE_IMPLICIT_TOKEN is set", why, fix))
    if offline:
        why = "nothing is fetched: models and data must be local folders, or in the cache already"
        fix = f"unset {' '.join(offline)}"
        section.findings.append(Finding("note", f"{', '.join(offline)}: offline", why, fix))
    if endpoint:
        why = "models and data come from another server than the Hub's own"
        section.findings.append(Finding("note", "HF_ENDPOINT is set", why, "unset HF_ENDPOINT"))
    section.findings += _certificates(environ)
    return section


def _find_token(environ: Mapping[str, str]) -> str | None:
    for name in _TOKENS:
        if environ.get(name, "").strip():
            return f"in {name}"
    file = Path(environ.get("HF_TOKEN_PATH") or hub_home(environ) / "token").expanduser()
    try:
        return "in the file of `hf auth login`" if file.stat().st_size > 0 else None
    except OSError:
        return None


def _certificates(environ: Mapping[str, str]) -> list[Finding]:
    return [
        Finding(
            "warning",
            f"{name} names a file that does not exist",
            "every download over HTTPS fails, with an error about certificates",
            f"unset {name}, or name the file of your network's certificates",
        )
        for name in _CERTIFICATES
        if environ.get(name) and not Path(environ[name]).expanduser().exists()
    ]


@dataclass(frozen=True, slots=True)
class Rule:
    """When a variable matters.

    Attributes:
        hits: whether its value does.
        severity: how much.
        why: what it does to a run.
        fix: how to be rid of it, where unsetting it is not enough.
    """

    hits: Callable[[str], bool]
    severity: Severity
    why: str
    fix: str = ""


def examine_variables(environ: Mapping[str, str]) -> Section:
    """Name the variables that change what a run computes, or how fast."""
    section = Section("variables")
    for name, rule in VARIABLES.items():
        value = environ.get(name)
        if value is None or not rule.hits(value):
            continue
        section.facts[name] = value
        section.findings.append(Finding(rule.severity, f"{name}={value}", rule.why, rule.fix or f"unset {name}"))
    if environ.get("PYTHONPATH"):  # a path, which may be long: not shown
        why = "packages found there come before the installed ones, of whatever version"
        section.findings.append(Finding("note", "PYTHONPATH is set", why, "unset PYTHONPATH"))
    return section


def examine_accelerate(environ: Mapping[str, str]) -> Section:
    """Look for the configuration file of `accelerate launch`, and for what in it would change a run."""
    path = hub_home(environ) / "accelerate" / "default_config.yaml"
    section = Section("accelerate", {"config": str(path)})
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        section.facts["config"] = "none (only `accelerate launch` reads one; `accelerate config` writes it)"
        return section
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        why = "`accelerate launch` ends with an error before a run begins"
        fix = "accelerate config"
        section.findings.append(Finding("warning", f"{str(path)!r} cannot be read", why, fix))
        return section
    section.facts |= {key: content.get(key) for key in ("distributed_type", "num_processes", "mixed_precision")}
    mixed = content.get("mixed_precision")
    if mixed not in (None, False, "no"):
        why = "loralab computes in model.precision, without autocast; `accelerate launch` would ask for another way"
        fix = "set mixed_precision: 'no' in that file, and model.precision in the run's configuration"
        section.findings.append(Finding("warning", f"accelerate's mixed_precision is {mixed}", why, fix))
    return section


def _always(value: str) -> bool:
    return bool(value)


VARIABLES: dict[str, Rule] = {
    "CUDA_LAUNCH_BLOCKING": Rule(is_true, "warning", "every kernel is waited for: training is several times slower"),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": Rule(_always, "warning", "every tensor asks the driver for memory: very slow"),
    "NVIDIA_TF32_OVERRIDE": Rule(
        lambda value: value == "1", "warning", "float32 products keep 10 bits: losses differ from other machines'"
    ),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": Rule(
        is_true, "warning", "float32 products keep 10 bits: losses differ from other machines'"
    ),
    "TORCHDYNAMO_DISABLE": Rule(
        is_true, "warning", "FlexAttention is not compiled: attention over token trees is slow and takes much memory"
    ),
    "TORCH_COMPILE_DISABLE": Rule(
        is_true, "warning", "FlexAttention is not compiled: attention over token trees is slow and takes much memory"
    ),
    "PYTORCH_ENABLE_MPS_FALLBACK": Rule(
        is_true, "note", "what an Apple GPU lacks runs on the CPU, slowly and without a word"
    ),
    "ACCELERATE_MIXED_PRECISION": Rule(
        lambda value: value.lower() != "no", "warning", "asks for autocast; loralab computes in model.precision alone"
    ),
    "ACCELERATE_USE_CPU": Rule(is_true, "warning", "training stays on the CPU, whatever GPU there is"),
    "WORLD_SIZE": Rule(
        lambda value: value.strip() not in ("", "1"),
        "warning",
        "loralab takes itself for one of several processes and waits for the others",
        "unset WORLD_SIZE RANK LOCAL_RANK, unless torchrun sets them",
    ),
    "TOKENIZERS_PARALLELISM": Rule(is_false, "note", "tokenizing uses one thread: large data sets take longer"),
    "PYTHONOPTIMIZE": Rule(_always, "note", "checks inside of libraries are left out"),
}
