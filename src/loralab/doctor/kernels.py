"""Attention backends and bitsandbytes: what is there, and the trap of 4-bit layers on some processors."""

from collections.abc import Mapping
from typing import Any

from loralab.doctor.findings import Finding, Section


def examine_attention(torch: Mapping[str, Any]) -> Section:
    """Judge what attention can be computed with.

    Args:
        torch: what PyTorch says (`probe.torch_facts`); empty where it cannot be imported.
    """
    section = Section("attention")
    if not torch:
        return section
    section.facts["sdpa"] = torch.get("sdpa", {})
    section.facts["flash_attn"] = torch.get("flash_attn") or "not installed (not needed)"
    section.facts["flex"] = torch.get("flex", {})
    if torch.get("gpus") and not torch.get("flex", {}).get("triton"):
        why = "FlexAttention cannot be compiled: rows that share prefixes take the dense kernel, slower and larger"
        section.findings.append(Finding("warning", "Triton cannot be imported", why, "pip install triton"))
    if torch.get("gpus") and not torch.get("flex", {}).get("compiler"):
        why = "Triton builds a small C program at the first kernel, and FlexAttention fails without a compiler"
        fix = "install gcc (apt install gcc), or name a compiler in CC"
        section.findings.append(Finding("warning", "there is no C compiler", why, fix))
    return section


def examine_bitsandbytes(bitsandbytes: Mapping[str, Any], *, system: str) -> Section:
    """Judge whether quantized bases can be had.

    Args:
        bitsandbytes: `version`, `error` (why it cannot be imported) and `packs_on_cpu`; empty where nobody looked.
        system: `sys.platform`.
    """
    version, error = bitsandbytes.get("version"), bitsandbytes.get("error")
    section = Section("bitsandbytes", {"version": version or "not installed"})
    if error:
        why = "quantized bases (QLoRA) and 8-bit optimizers need it"
        fix = "pip install --force-reinstall bitsandbytes"
        section.findings.append(
            Finding("warning", f"bitsandbytes{f' {version}' if version else ''} cannot be imported: {error}", why, fix)
        )
    if bitsandbytes.get("packs_on_cpu"):
        section.facts["packs_4bit_on_cpu"] = True
        what = "this processor has AVX512-BF16, for which bitsandbytes repacks Linear4bit layers on the CPU"
        why = (
            "after the first forward in evaluation mode, a script of your own trains on with wrong gradients and no "
            "error; loralab never calls that forward"
        )
        fix = "in your own scripts, set support_avx512bf16_for_cpu = False on every Linear4bit after loading"
        section.findings.append(Finding("note", what, why, fix))
    elif system == "linux" and version and not error:
        section.facts["packs_4bit_on_cpu"] = False
    return section
