"""What the steps showed, as findings, and the exit code of the whole diagnosis."""

from collections.abc import Iterable
from typing import Any

from loralab.doctor.findings import Finding, Section
from loralab.doctor.programs import Output

# The same meaning as everywhere: the user's to mend, and a proof that failed.
PROBLEM_CODE, FAILED_PROOF_CODE = 2, 3


def examine_steps(output: Output) -> tuple[Section, list[dict[str, Any]]]:
    """Judge the steps, and how the process that ran them ended.

    Args:
        output: of `loralab.doctor.steps`.

    Returns:
        The section, and the steps that came to an end.
    """
    steps = [line for line in output.lines if "begins" not in line]
    begun = [line["begins"] for line in output.lines if "begins" in line]
    section = Section("steps")
    for step in steps:
        section.facts[_name(step)] = _describe(step)
        if step["passed"]:
            continue
        what = f"a step of {_name(step)} {_failure(step)}"
        why = "a run there would end in an error, or train on wrong gradients without one"
        section.findings.append(Finding("problem", what, why, _fix(step["device"])))
    if output.failure is not None:
        running = begun[-1] if len(begun) > len(steps) else None
        at = f"in {_name(running)}" if running else "before the first step" if not begun else "after the last step"
        what = f"the process of the steps ended {at}: {output.failure}"
        why = "a run would end the same way, and what was not reached is not proven"
        section.findings.append(Finding("problem", what, why, _fix(running["device"] if running else "cpu")))
    return section, steps


def _name(step: dict[str, Any]) -> str:
    return f"{step['kind']} on {step['device']} in {step['precision']}"


def _describe(step: dict[str, Any]) -> str:
    if "error" in step:
        return str(step["error"])
    verdict = "right" if step["passed"] else "WRONG"
    errors = ", ".join(f"{name} off by {_figure(step[f'{name}_error'])}" for name in ("loss", "gradient"))
    return f"{verdict}: {errors} (at most {step['tolerance']:g}), {step['seconds']:.2f} s"


def _failure(step: dict[str, Any]) -> str:
    if "error" in step:
        return f"ends with {step['error']}"
    return f"is wrong: gradient off by {_figure(step['gradient_error'])}, loss by {_figure(step['loss_error'])}"


def _figure(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.1e}"  # JSON has no NaN


def _fix(device: str) -> str:
    if device.startswith("cpu"):
        return "install loralab into a new environment; if it stays, the processor or its memory is at fault"
    return "install the PyTorch build for this GPU and driver (selector on pytorch.org), or set model.device: cpu"


def exit_code(sections: Iterable[Section]) -> int:
    """Return 0 where nothing stands in the way, 3 where a step failed, else 2 where there is a problem."""
    with_problems = {
        section.name for section in sections if any(finding.severity == "problem" for finding in section.findings)
    }
    return FAILED_PROOF_CODE if "steps" in with_problems else PROBLEM_CODE if with_problems else 0
