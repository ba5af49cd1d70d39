"""The model card of a merged model: `README.md` of its folder.

Owns what it says, from the content of `merge.json` alone. No local path leaves the machine.
"""

from pathlib import Path
from typing import Any

import yaml

from loralab.reports.model_card import HUB_ID, code, code_block, code_cell, escape_markdown, licence_name
from loralab.reports.paths import is_absolute, path_name
from loralab.reports.usage import MODEL_PLACE
from loralab.run import Json, write_text

_FIGURES = (
    ("kl_adapter_merged", "Mean KL(adapter \\|\\| merged), nats"),
    ("kl_adapter_base", "Mean KL(adapter \\|\\| base), nats"),
    ("greedy_agreement", "Share of greedy tokens that are the same, or tied within two steps of the type"),
    ("greedy_agreement_strict", "The same without ties"),
    ("max_logit_difference", "Largest difference of a logit"),
    ("logit_standard_deviation", "Standard deviation of the logits"),
)


_PROGRAM = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{MODEL_PLACE}"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()

messages = [{{"role": "user", "content": "Your question"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=128, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def write_merged_card(folder: Path, merged: Json) -> Path:
    """Write the model card of a merged model.

    Args:
        folder: of the merged model.
        merged: content of its `merge.json`.

    Returns:
        The file.
    """
    base: dict[str, Any] = merged["base"]
    name = str(base["name"])
    on_hub = bool(HUB_ID.fullmatch(name)) and not base.get("sha256") and not is_absolute(name)
    # What the Hub calls a merge is made of several; one adapter makes a fine-tuned base.
    relation = "merge" if len(merged["adapters"]) > 1 else "finetune"
    front: Json = {
        **({"base_model": name, "base_model_relation": relation} if on_hub else {}),
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if merged["reads_pictures"] else "text-generation",
        "tags": ["loralab", "merge"],
        **base.get("licence", {}),
        **merged.get("trained_on", {}),
    }
    path = folder / "README.md"
    write_text(path, f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n" + "\n".join(_lines(folder, merged)) + "\n")
    return path


def _lines(folder: Path, merged: Json) -> list[str]:
    base, proof = merged["base"], merged["proof"]
    shown = path_name(str(base["name"]))
    named = licence_name(base.get("licence", {}))
    licence = f"{code(named)}, as its card says" if named else "not known here: see the base model"
    lines = [
        f"# {escape_markdown(path_name(str(merged['name'] or folder.name)))}",
        "",
        f"{code(shown)} with {_adapters(merged)} merged into its weights by loralab. Merged onto "
        f"{escape_markdown(merged['onto'])} ({escape_markdown(merged['onto_reason'])}).",
        "",
    ]
    if base.get("revision"):
        lines += [f"Revision of the base model: {code(base['revision'])}.", ""]
    if base.get("sha256"):
        lines += [f"SHA-256 of the base model: {code(base['sha256'])}.", ""]
    lines += [*_use(merged), *_measured(merged.get("measured") or {})]
    lines += [
        "## Proof",
        "",
        f"Read from disk and compared with the live adapter on {proof['rows']} rows "
        f"({escape_markdown(merged['compared_on'])}), {proof['positions']} positions:",
        "",
        "| Figure | Value |",
        "|---|--:|",
        *(f"| {label} | {proof[key]:.4g} |" for key, label in _FIGURES),
        "",
        f"Weights are {code(merged['dtype'])} ({escape_markdown(merged['dtype_reason'])}).",
        "",
        "## Limits",
        "",
        "Nothing beyond these figures was measured here. Answers may be wrong, unsafe or unfair; languages, topics and "
        "prompts other than those of the training data were not tested. The licences of the base model "
        f"({licence}) and of the data apply.",
    ]
    return lines


def _use(merged: Json) -> list[str]:
    """Return how to ask the model; the program that reads pictures differs from family to family."""
    named = f" It is {code(merged['template'])}." if merged.get("template") else ""
    prompt = f"The prompt template and the stop tokens lie in this folder.{named}"
    if merged["reads_pictures"]:
        loaded = "`AutoModelForImageTextToText` and `AutoProcessor` of transformers load it."
        return ["## How to use it", "", f"{loaded} {prompt}", ""]
    return ["## How to use it", "", f"With transformers. {prompt}", "", code_block(_PROGRAM, "python"), ""]


def _measured(measured: Json) -> list[str]:
    """Return what the run measured of the adapter, before it was merged."""
    if not measured.get("figures"):
        return []
    rows = [
        f"| {code_cell(name)} | {_figure(each['base'])} | {_figure(each['adapter'])} |"
        for name, each in measured["figures"].items()
    ]
    return [
        "## Results",
        "",
        f"Measured by the run on {measured['rows']} rows of its {escape_markdown(measured['split'])} split, with the "
        "adapter beside the base, before the merge:",
        "",
        "| Figure | Base model | Adapter |",
        "|---|--:|--:|",
        *rows,
        "",
    ]


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "not measured"


def _adapters(merged: Json) -> str:
    shown = [f"adapter {code(each['sha256'][:12])} (weight {each['weight']:g})" for each in merged["adapters"]]
    return ", ".join(shown)
