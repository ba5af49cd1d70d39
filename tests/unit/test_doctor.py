"""The doctor's topics on made-up machines: every finding has one that shows it and one that does not."""

import json
import math
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from loralab.doctor import steps
from loralab.doctor.findings import Finding, Section, by_severity, render_bytes
from loralab.doctor.folders import Place, examine_folders, look_at
from loralab.doctor.gpus import Driver, examine_gpus, find_kernels, read_driver
from loralab.doctor.kernels import examine_attention, examine_bitsandbytes
from loralab.doctor.libraries import examine_libraries, examine_python, read_requirements
from loralab.doctor.machine import Memory, examine_memory, examine_processor
from loralab.doctor.programs import Output, run_part
from loralab.doctor.variables import VARIABLES, examine_accelerate, examine_hub, examine_variables
from loralab.doctor.verdict import examine_steps, exit_code
from loralab.models.limits import Limits, read_limits, usable_cpus
from loralab.progress import Reporter
from loralab.workflows.doctor import QUANTIZATION, STEPS, TORCH, examine

SECRET = "hf_doNotShowThis"
GIB = 2**30


def said(section: Section) -> list[tuple[str, str]]:
    """Return severity and first words of each finding, after checking that each has its why and fix."""
    assert all(finding.why and finding.fix for finding in section.findings)
    return [(finding.severity, finding.what) for finding in section.findings]


def only(section: Section) -> Finding:
    (finding,) = section.findings
    assert finding.why
    assert finding.fix
    return finding


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# --- Python and libraries ----------------------------------------------------------------------------------------

REQUIREMENTS = read_requirements(
    [
        "torch<3,>=2.11",
        "peft (<0.23,>=0.21)",
        "bitsandbytes<1,>=0.49; sys_platform == 'linux'",
        "pytest>=9; extra == 'dev'",
    ]
)
INSTALLED = {"loralab": "0.1.0", "torch": "2.15.0+cu132", "peft": "0.21.2", "bitsandbytes": "0.50.2"}


def libraries(system: str = "linux", **changed: str | None) -> Section:
    return examine_libraries(REQUIREMENTS, {**INSTALLED, **changed}.get, system=system)


def test_tested_libraries_give_no_finding() -> None:
    section = libraries()
    assert said(section) == []
    assert section.facts["torch"] == "2.15.0+cu132"
    assert [each.name for each in REQUIREMENTS] == ["torch", "peft", "bitsandbytes"]


@pytest.mark.parametrize(
    ("name", "version"), [("torch", "2.10.1"), ("torch", "3.0"), ("peft", "0.23.0"), ("bitsandbytes", "1.0.0")]
)
def test_untested_version(name: str, version: str) -> None:
    finding = only(libraries(**{name: version}))
    assert finding.severity == "warning"
    assert finding.what.startswith(f"{name} {version} is outside the tested >=")
    assert finding.fix.startswith(f"pip install '{name}>=")


@pytest.mark.parametrize("version", ["2.11", "2.11.0", "2.99", "2.12.0.dev20260101+cpu"])
def test_edges_of_a_range_are_tested(version: str) -> None:
    assert said(libraries(torch=version)) == []


def test_missing_library() -> None:
    assert only(libraries(torch=None)) == Finding(
        "problem",
        "torch is not installed",
        "loralab imports it; commands that need it end with an import error",
        "pip install 'torch>=2.11,<3'",
    )
    assert said(libraries(system="darwin", bitsandbytes=None)) == []
    assert said(libraries(bitsandbytes=None)) == [("problem", "bitsandbytes is not installed")]


def python(version: tuple[int, int, int] = (3, 12, 1), **changed: Any) -> Section:
    given: dict[str, Any] = {"required": ">=3.11", "system": "Linux", "in_environment": True, "environ": {}, **changed}
    return examine_python(version, **given)


def test_python() -> None:
    assert said(python()) == said(python((3, 11, 0))) == said(python(system="Darwin")) == []
    assert said(python((3, 10, 9))) == [("problem", "Python 3.10.9, needed is >=3.11")]
    assert said(python(in_environment=False)) == [("note", "Python does not run in an environment of its own")]
    assert said(python(in_environment=False, environ={"CONDA_PREFIX": "/opt/env"})) == []
    assert said(python(system="Windows")) == [("note", "the operating system is Windows")]


# --- processor and memory ----------------------------------------------------------------------------------------


def test_second_version_of_control_groups(tmp_path: Path) -> None:
    root, member = tmp_path / "groups", tmp_path / "member"
    write(root / "cgroup.controllers", "cpu memory")
    write(member, "0::/user/job\n")
    assert read_limits(root, member) == Limits(2)
    write(root / "user/job/cpu.max", "max 100000\n")
    write(root / "user/job/memory.max", "max\n")
    assert read_limits(root, member) == Limits(2)
    write(root / "user/cpu.max", "150000 100000\n")
    write(root / "user/memory.max", f"{8 * GIB}\n")
    write(root / "user/memory.current", f"{GIB}\n")
    assert read_limits(root, member) == Limits(2, 1.5, 8 * GIB, GIB)
    write(root / "user/job/memory.max", f"{4 * GIB}\n")  # the tightest counts
    write(root / "user/job/cpu.max", "400000 100000\n")
    assert read_limits(root, member) == Limits(2, 1.5, 4 * GIB, None)


def test_first_version_of_control_groups(tmp_path: Path) -> None:
    root, member = tmp_path / "groups", tmp_path / "member"
    write(member, "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n")
    write(root / "memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(root / "cpu/cpu.cfs_quota_us", "-1\n")
    write(root / "cpu/cpu.cfs_period_us", "100000\n")
    assert read_limits(root, member) == Limits(1)
    write(root / "memory/docker/abc/memory.limit_in_bytes", f"{2 * GIB}\n")
    write(root / "memory/docker/abc/memory.usage_in_bytes", "7\n")
    write(root / "cpu/docker/abc/cpu.cfs_quota_us", "50000\n")
    write(root / "cpu/docker/abc/cpu.cfs_period_us", "100000\n")
    assert read_limits(root, member) == Limits(1, 0.5, 2 * GIB, 7)


def test_no_control_groups(tmp_path: Path) -> None:
    assert read_limits(tmp_path / "none", tmp_path / "none") == Limits(None)
    write(tmp_path / "member", "nonsense")
    write(tmp_path / "groups/cgroup.controllers", "")
    write(tmp_path / "groups/memory.max", "a lot")
    assert read_limits(tmp_path / "groups", tmp_path / "member") == Limits(2)


def test_memory() -> None:
    roomy = Memory(32 * GIB, 20 * GIB)
    assert said(examine_memory(roomy, Limits(None))) == []
    assert said(examine_memory(roomy, Limits(2, None, 64 * GIB, 0))) == []
    section = examine_memory(roomy, Limits(2, None, 16 * GIB, 2 * GIB))
    assert said(section) == [("note", "the container may use 16.0 GiB of 32.0 GiB")]
    assert section.facts["container_available_bytes"] == 14 * GIB
    assert said(examine_memory(Memory(32 * GIB, GIB), Limits(None))) == [("warning", "1.0 GiB of memory can be had")]
    tight = examine_memory(roomy, Limits(1, None, 6 * GIB, 5 * GIB))
    assert [severity for severity, _ in said(tight)] == ["note", "warning"]


X86 = {"architecture": "x86_64", "cpu_name": "CPU", "avx2": True}


def processor(
    threads: int = 8,
    *,
    usable: float = 8,
    setting: str | None = None,
    load: float | None = None,
    **capabilities: object,
) -> Section:
    environ = {} if setting is None else {"OMP_NUM_THREADS": setting}
    facts = {"threads": threads, "capabilities": {**X86, **capabilities}}
    return examine_processor(16, usable=usable, limits=Limits(None), load=load, torch=facts, environ=environ)


def test_threads_match_processors() -> None:
    assert (
        said(processor())
        == said(processor(4))
        == said(processor(2, usable=1.5))
        == said(processor(1, usable=0.5))
        == []
    )
    finding = only(processor(16, usable=2.5, setting="16"))
    assert (finding.severity, finding.fix) == ("warning", "export OMP_NUM_THREADS=2")
    assert finding.what == "PyTorch uses 16 threads on 2.5 processors (OMP_NUM_THREADS=16)"
    finding = only(processor(1, setting="1"))
    assert (finding.what, finding.fix) == (
        "PyTorch uses 1 of 8 processors (OMP_NUM_THREADS=1)",
        "export OMP_NUM_THREADS=8",
    )


def test_a_busy_machine() -> None:
    assert said(processor(load=23.9)) == said(processor(1, usable=1, load=99.0)) == []
    finding = only(processor(load=24.0))
    assert (finding.severity, finding.what) == ("note", "the machine is busy: 24.0 tasks want its 16 processors")


def test_usable_processors() -> None:
    assert usable_cpus(8, Limits(None)) == usable_cpus(8, Limits(2, 16.0)) == 8
    assert usable_cpus(8, Limits(2, 1.5)) == 1.5


def test_processor_instructions() -> None:
    section = processor(avx512_bf16=True)
    assert section.facts["bfloat16"] is True
    assert section.facts["instructions"] == ["avx2", "avx512_bf16"]
    assert said(processor(avx2=False)) == [("warning", "the processor has no AVX2")]
    assert said(processor(avx2=False, architecture="aarch64")) == []
    assert said(examine_processor(4, usable=4, limits=Limits(None), load=None, torch={}, environ={})) == []


# --- GPUs --------------------------------------------------------------------------------------------------------

BUILD = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
DRIVER = Driver("580.1", ("NVIDIA X",))


def gpu(capability: tuple[int, int] = (9, 0), *, free: int = 78) -> dict[str, Any]:
    return {"name": "NVIDIA X", "capability": list(capability), "free_bytes": free * GIB, "total_bytes": 80 * GIB}


def gpus(*found: dict[str, Any], driver: Driver | None = DRIVER, **changed: Any) -> Section:
    facts = {"build": "2.15", "cuda": "13.2", "hip": None, "architectures": BUILD, "gpus": list(found), **changed}
    return examine_gpus(driver, facts)


def test_usable_gpu() -> None:
    section = gpus(gpu())
    assert said(section) == []
    assert section.facts["gpus"] == ["NVIDIA X, compute capability 9.0, 78.0 GiB of 80.0 GiB free"]
    assert said(gpus(driver=None)) == []
    assert said(examine_gpus(None, {})) == []


def test_gpu_that_the_build_does_not_know() -> None:
    finding = only(gpus(gpu((12, 0)), architectures=["sm_80", "sm_90"]))
    assert finding.severity == "problem"
    assert finding.what == "NVIDIA X (sm_120) is not compatible with the current PyTorch installation (sm_80 sm_90)"
    assert "a newer PyTorch is needed" in finding.fix
    old = gpus(gpu((6, 1)))
    assert [severity for severity, _ in said(old)] == ["problem", "note"]
    assert "an older PyTorch" in old.findings[0].fix
    source = only(gpus(gpu((12, 0)), architectures=["sm_90", "compute_90"]))
    assert (source.severity, source.what) == (
        "note",
        "PyTorch holds no kernels for NVIDIA X, only their source form",
    )


@pytest.mark.parametrize(
    ("capability", "architectures", "way"),
    [
        ((9, 0), ["sm_90"], "binary"),
        ((8, 9), ["sm_86"], "binary"),
        ((8, 0), ["sm_86"], None),
        ((12, 0), ["sm_90", "compute_90"], "ptx"),
        ((7, 0), ["compute_75"], None),
        ((10, 3), ["sm_100f"], "binary"),
        ((10, 3), ["sm_100a"], None),
        ((10, 0), ["sm_100a"], "binary"),
        ((10, 0), ["gfx942"], None),
        ((10, 0), [], None),
    ],
)
def test_kernels_of_a_build(capability: tuple[int, int], architectures: list[str], way: str | None) -> None:
    assert find_kernels(capability, architectures) == way


def test_gpu_that_pytorch_does_not_see() -> None:
    assert said(gpus(cuda=None)) == [("problem", "NVIDIA X is there, but this PyTorch is a build for CPUs")]
    finding = only(gpus(cuda_error="The NVIDIA driver on your system is too old (found version 11040)"))
    assert (finding.severity, "too old (found version 11040)" in finding.what) == ("problem", True)
    assert "update the driver (580.1)" in finding.fix
    assert said(gpus(hidden=True)) == [("warning", "NVIDIA X is hidden by CUDA_VISIBLE_DEVICES")]


def test_notes_on_gpus() -> None:
    assert said(gpus(gpu(), gpu())) == [("note", "2 GPUs are visible")]
    assert said(gpus(gpu((7, 5)))) == [("note", "NVIDIA X has compute capability 7.5")]
    assert said(gpus(gpu(free=10))) == [("warning", "10.0 GiB of NVIDIA X's 80.0 GiB are free")]
    assert said(gpus(gpu(), hip="7.0", cuda=None, architectures=["gfx942"])) == [
        ("note", "PyTorch is built for AMD GPUs")
    ]
    assert said(gpus(mps=True, driver=None)) == [("note", "there is an Apple GPU")]


def test_driver_is_read_from_its_own_program() -> None:
    assert read_driver(["printf", "NVIDIA A, B, 580.1\nNVIDIA C, 580.1\n"]) == Driver(
        "580.1", ("NVIDIA A, B", "NVIDIA C")
    )
    assert read_driver(["printf", ""]) is None
    assert read_driver(["false"]) is None
    assert read_driver(["no-such-program-anywhere"]) is None


# --- attention and bitsandbytes ----------------------------------------------------------------------------------


def attention(*, with_gpu: bool = True, triton: bool = True, compiler: bool = True) -> Section:
    flex = {"triton": triton, "compiler": compiler}
    return examine_attention({"gpus": [gpu()] if with_gpu else [], "flex": flex, "sdpa": {"cpu": ["math"]}})


def test_attention() -> None:
    assert said(attention()) == said(attention(with_gpu=False, triton=False, compiler=False)) == []
    assert said(attention(triton=False)) == [("warning", "Triton cannot be imported")]
    assert said(attention(compiler=False)) == [("warning", "there is no C compiler")]
    assert said(examine_attention({})) == []


def test_bitsandbytes() -> None:
    fine = {"version": "0.50.2", "error": None, "packs_on_cpu": False}
    assert said(examine_bitsandbytes(fine, system="linux")) == said(examine_bitsandbytes({}, system="darwin")) == []
    finding = only(examine_bitsandbytes({**fine, "packs_on_cpu": True}, system="linux"))
    assert (finding.severity, "AVX512-BF16" in finding.what) == ("note", True)
    assert "support_avx512bf16_for_cpu = False" in finding.fix
    finding = only(examine_bitsandbytes({**fine, "error": "OSError: no libcudart"}, system="linux"))
    assert (finding.severity, finding.what) == (
        "warning",
        "bitsandbytes 0.50.2 cannot be imported: OSError: no libcudart",
    )


# --- folders -----------------------------------------------------------------------------------------------------


def folders(error: str | None = None, free: int | None = 100 * GIB) -> Section:
    return examine_folders({"current": Path("runs")}, lambda path: Place(path, error, free))


def test_folders() -> None:
    assert said(folders()) == said(folders(free=None)) == []
    assert said(folders("Read-only file system")) == [("problem", "cannot write to 'runs': Read-only file system")]
    assert said(folders(free=10 * 2**20)) == [("problem", "the disk of 'runs' is full (10.0 MiB left)")]
    assert said(folders(free=GIB)) == [("warning", "1.0 GiB left on the disk of 'runs'")]


def test_look_at_a_folder(tmp_path: Path) -> None:
    place = look_at(tmp_path / "not" / "yet")
    assert place.error is None
    assert place.free_bytes
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "file", "")
    assert look_at(tmp_path / "file" / "below").error is not None


# --- the Hub and environment variables ---------------------------------------------------------------------------


def hub(tmp_path: Path, **environ: str) -> Section:
    section = examine_hub({"HF_HOME": str(tmp_path), **environ})
    shown = json.dumps(section.as_dict())
    assert SECRET not in shown
    assert str(len(SECRET)) not in shown
    return section


def test_hub_token(tmp_path: Path) -> None:
    assert said(hub(tmp_path)) == said(hub(tmp_path, HF_TOKEN=" ")) == [("note", "there is no Hub token")]
    assert said(hub(tmp_path, HF_TOKEN=SECRET)) == said(hub(tmp_path, HUGGING_FACE_HUB_TOKEN=SECRET)) == []
    assert hub(tmp_path, HF_TOKEN=SECRET).facts["token"] == "in HF_TOKEN"
    write(tmp_path / "token", SECRET)
    assert said(hub(tmp_path)) == []
    assert hub(tmp_path).facts["token"] == "in the file of `hf auth login`"
    assert said(hub(tmp_path, HF_HUB_DISABLE_IMPLICIT_TOKEN="1")) == [
        ("warning", "HF_HUB_DISABLE_IMPLICIT_TOKEN is set")
    ]
    assert said(hub(tmp_path, HF_TOKEN_PATH=str(tmp_path / "other"))) == [("note", "there is no Hub token")]


def test_hub_connections(tmp_path: Path) -> None:
    def with_token(**environ: str) -> Section:
        return hub(tmp_path, HF_TOKEN=SECRET, **environ)

    assert said(with_token(HF_HUB_OFFLINE="0", TRANSFORMERS_OFFLINE="no")) == []
    finding = only(with_token(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="true"))
    assert finding.fix == "unset HF_HUB_OFFLINE HF_DATASETS_OFFLINE"
    proxied = with_token(https_proxy=f"http://user:{SECRET}@proxy:3128", NO_PROXY="localhost")
    assert said(proxied) == []
    assert proxied.facts["proxies"] == ["HTTPS_PROXY", "NO_PROXY"]
    assert said(with_token(HF_ENDPOINT=f"https://{SECRET}@mirror")) == [("note", "HF_ENDPOINT is set")]
    write(tmp_path / "certificates.pem", "x")
    assert said(with_token(SSL_CERT_FILE=str(tmp_path / "certificates.pem"))) == []
    assert said(with_token(SSL_CERT_FILE=str(tmp_path / "gone.pem"))) == [
        ("warning", "SSL_CERT_FILE names a file that does not exist")
    ]


# A value of each variable that matters, and one that does not.
VALUES = {
    "CUDA_LAUNCH_BLOCKING": ("1", "0"),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": ("1", ""),
    "NVIDIA_TF32_OVERRIDE": ("1", "0"),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": ("1", "0"),
    "TORCHDYNAMO_DISABLE": ("1", "0"),
    "TORCH_COMPILE_DISABLE": ("1", "0"),
    "PYTORCH_ENABLE_MPS_FALLBACK": ("1", "0"),
    "ACCELERATE_MIXED_PRECISION": ("fp16", "no"),
    "ACCELERATE_USE_CPU": ("true", "false"),
    "WORLD_SIZE": ("4", "1"),
    "TOKENIZERS_PARALLELISM": ("false", "true"),
    "PYTHONOPTIMIZE": ("1", ""),
}


def test_every_variable_has_values() -> None:
    assert set(VALUES) == set(VARIABLES)
    assert said(examine_variables({})) == []


@pytest.mark.parametrize("name", VALUES)
def test_variable(name: str) -> None:
    hit, harmless = VALUES[name]
    assert said(examine_variables({name: harmless})) == []
    finding = only(examine_variables({name: hit}))
    assert (finding.severity, finding.what) == (VARIABLES[name].severity, f"{name}={hit}")
    assert finding.fix.startswith(f"unset {name}")


def test_python_path_is_named_without_its_value() -> None:
    section = examine_variables({"PYTHONPATH": "/somewhere"})
    assert said(section) == [("note", "PYTHONPATH is set")]
    assert "/somewhere" not in json.dumps(section.as_dict())


def test_accelerate(tmp_path: Path) -> None:
    def look() -> Section:
        return examine_accelerate({"HF_HOME": str(tmp_path)})

    assert said(look()) == []
    assert look().facts["config"].startswith("none (")
    file = tmp_path / "accelerate" / "default_config.yaml"
    write(file, "distributed_type: MULTI_GPU\nnum_processes: 2\nmixed_precision: 'no'\n")
    assert said(look()) == []
    assert look().facts["num_processes"] == 2
    write(file, "mixed_precision: fp16\n")
    assert said(look()) == [("warning", "accelerate's mixed_precision is fp16")]
    for broken in ("a: [", "just text", "\0"):
        write(file, broken)
        assert said(look()) == [("warning", f"{str(file)!r} cannot be read")]


# --- steps -------------------------------------------------------------------------------------------------------


def step_line(**changed: Any) -> dict[str, Any]:
    line: dict[str, Any] = {"kind": "lora", "device": "cuda:0", "precision": "float32", "loss": 5.0, "loss_error": 1e-8}
    return {**line, "gradient_error": 1e-6, "tolerance": 1e-3, "seconds": 0.1, "passed": True, **changed}


def steps_output(*lines: dict[str, Any], failure: str | None = None) -> Output:
    written = []
    for line in lines:
        written += [
            {"begins": {key: line[key] for key in ("kind", "device", "precision")}},
            *([line] if "passed" in line else []),
        ]
    return Output(written, failure)


def test_right_steps_give_no_finding() -> None:
    section, found = examine_steps(steps_output(step_line(), step_line(precision="bfloat16")))
    assert said(section) == []
    assert [step["precision"] for step in found] == ["float32", "bfloat16"]
    assert exit_code([section]) == 0


def test_wrong_step() -> None:
    section, _ = examine_steps(steps_output(step_line(gradient_error=0.96, passed=False)))
    assert only(section).what.startswith("a step of lora on cuda:0 in float32 is wrong: gradient off by 9.6e-01")
    assert section.facts["lora on cuda:0 in float32"].startswith("WRONG")
    assert exit_code([section]) == 3
    section, _ = examine_steps(steps_output(step_line(gradient_error=None, passed=False)))
    assert "not a number" in only(section).what


def test_step_that_raises() -> None:
    failed = {"kind": "lora", "device": "cuda:0", "precision": "float32", "error": "RuntimeError: no kernel image"}
    section, _ = examine_steps(steps_output({**failed, "passed": False}))
    assert only(section).what == "a step of lora on cuda:0 in float32 ends with RuntimeError: no kernel image"
    assert "model.device: cpu" in only(section).fix
    assert exit_code([section]) == 3


def test_step_that_ends_its_process() -> None:
    begun = {"kind": "qlora", "device": "cpu", "precision": "bfloat16"}
    section, _ = examine_steps(steps_output(step_line(), begun, failure="ended by SIGILL"))
    assert only(section).what == "the process of the steps ended in qlora on cpu in bfloat16: ended by SIGILL"
    section, _ = examine_steps(Output([], "ImportError: no peft"))
    assert only(section).what == "the process of the steps ended before the first step: ImportError: no peft"


def test_lora_step_is_right_and_one_with_a_wrong_forward_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    right = steps.run_step("lora", cpu, torch.float32)
    assert right.passed
    assert right.gradient_error < 1e-5

    original = torch.nn.functional.scaled_dot_product_attention

    def wrong(query: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        scale = 1.0 if query.dtype == torch.float64 else 1.05  # the reference is not touched
        return original(query * scale, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", wrong)
    assert not steps.run_step("lora", cpu, torch.float32).passed


@pytest.mark.parametrize("kind", sorted(steps.STEPS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_step_is_right_on_the_cpu(kind: str, dtype: torch.dtype) -> None:
    step = steps.run_step(kind, torch.device("cpu"), dtype)
    assert step.passed, step


@pytest.mark.skipif("qlora" not in steps.STEPS, reason="no bitsandbytes")
def test_qlora_step_shows_the_trap_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes.functional import has_avx512bf16

    from loralab.doctor import quantized_base
    from loralab.models.quantized import dequantize

    if not has_avx512bf16():
        pytest.skip("no AVX512-BF16: the library does not repack here")

    class Stock:
        @staticmethod
        def adopt(layer: Any) -> Any:
            layer.dequantized = lambda dtype: dequantize(layer.weight).to(dtype)
            return layer

    monkeypatch.setattr(quantized_base, "QuantizedLinear4bit", Stock)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = steps.run_step("qlora", torch.device("cpu"), torch.float32)
    assert step.gradient_error > 0.5
    assert not step.passed


def test_a_step_that_fails_is_told_and_the_next_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> dict[str, torch.Tensor]:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(steps, "STEPS", {"broken": steps.Kind(fail, ("cpu",)), "lora": steps.STEPS["lora"]})
    lines: list[dict[str, Any]] = []
    steps.run_steps(lines.append)
    section, found = examine_steps(Output(lines))
    assert {step["kind"]: step["passed"] for step in found} == {"broken": False, "lora": True}
    assert "no kernel image is available" in section.findings[0].what


# --- the parts that run as programs, and the whole -----------------------------------------------------------------


def test_part_that_does_not_exist() -> None:
    output = run_part("loralab.doctor.no_such_part")
    assert output.lines == []
    assert "no_such_part" in str(output.failure)


def test_torch_facts_as_a_program() -> None:
    output = run_part(TORCH)
    assert output.failure is None
    (facts,) = output.lines
    assert facts["build"] == torch.__version__
    assert "math" in facts["sdpa"]["cpu"]


HEALTHY: dict[str, Output] = {
    TORCH: Output([{"build": "2.15", "gpus": [], "flex": {}, "sdpa": {}, "architectures": []}]),
    QUANTIZATION: Output([{"version": "0.50.2", "error": None, "packs_on_cpu": False}]),
    STEPS: steps_output(step_line(device="cpu")),
}


def diagnose(environ: Mapping[str, str] | None = None, *, with_steps: bool = True, **outputs: Output) -> dict[str, Any]:
    home = {"HOME": tempfile.gettempdir()}
    named = {"torch": TORCH, "quantization": QUANTIZATION, "steps": STEPS}
    found = HEALTHY | {named[name]: output for name, output in outputs.items()}
    run: Callable[[str], Output] = found.__getitem__
    return examine(steps=with_steps, reporter=Reporter(), environ=home | dict(environ or {}), run=run)


def test_whole_diagnosis(tmp_path: Path) -> None:
    result = diagnose({"HF_HOME": str(tmp_path), "CUDA_LAUNCH_BLOCKING": "1"})
    names = [section["name"] for section in result["sections"]]
    assert names[0] == "python"
    assert names[-1] == "steps"
    severities = [finding["severity"] for finding in result["findings"]]
    assert severities == sorted(severities, key=["problem", "warning", "note"].index)
    assert any(finding["what"] == "CUDA_LAUNCH_BLOCKING=1" for finding in result["findings"])
    assert [step["passed"] for step in result["steps"]] == [True]
    assert json.dumps(result)


def test_exit_codes() -> None:
    assert diagnose()["exit_code"] == diagnose(with_steps=False)["exit_code"] == 0
    broken = diagnose(torch=Output([], "OSError: libcudart.so.13: cannot open shared object file"), with_steps=False)
    assert broken["exit_code"] == 2
    assert broken["findings"][0]["what"].startswith("PyTorch cannot be used: OSError: libcudart")
    wrong = diagnose(steps=steps_output(step_line(gradient_error=1.0, passed=False)))
    assert wrong["exit_code"] == 3


def test_bitsandbytes_that_ends_its_process() -> None:
    result = diagnose(quantization=Output([], "ended by SIGSEGV"), with_steps=False)
    assert "bitsandbytes cannot be imported: ended by SIGSEGV" in [finding["what"] for finding in result["findings"]]


def test_order_and_amounts() -> None:
    made = [Finding("note", "a", "b", "c"), Finding("problem", "d", "e", "f")]
    assert [finding.what for finding in by_severity(made)] == ["d", "a"]
    assert [render_bytes(n) for n in (5, 2048, 3 * 2**20, 1.5 * GIB)] == ["5 bytes", "2.0 KiB", "3.0 MiB", "1.5 GiB"]
    assert not steps.Step("lora", "cpu", "float32", math.nan, math.nan, math.nan, 1.0, 0.0).passed
