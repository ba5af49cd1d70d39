"""The model card: valid for the Hub, complete, and free of local paths and of markup from values."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from loralab.reports.model_card import escape_markdown, write_model_card
from loralab.reports.usage import name_repository
from loralab.run import RunFolder
from unit.reports import run_folders
from unit.reports.run_folders import HOSTILE, build_run, build_whole_run


def read_card(folder: RunFolder) -> tuple[dict[str, Any], str]:
    path = write_model_card(folder)
    assert path == folder.adapter / "README.md"
    match = re.fullmatch(r"---\n(.*?\n)---\n(.*)", path.read_text(encoding="utf-8"), re.DOTALL)
    assert match
    return yaml.safe_load(match[1]), match[2]


def table_rows(body: str) -> list[list[str]]:
    """Return the cells of every table row outside code blocks."""
    text = re.sub(r"^(`{3,}).*?^\1$", "", body, flags=re.DOTALL | re.MULTILINE)
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]


def test_front_matter_is_what_the_hub_wants(tmp_path: Path) -> None:
    front, _ = read_card(build_whole_run(tmp_path))
    assert front == {
        "base_model": "owner/base-model",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "loralab"],
    }


def test_the_card_tells_result_data_settings_use_limits_and_versions(tmp_path: Path) -> None:
    _, body = read_card(build_whole_run(tmp_path))
    text = body.replace("\u00a0", " ")
    for fact in (
        "# my-run",
        "lower by 1.32 nats per token (95 % interval 1.25 to 1.39, 99 rows)",
        "| Base model | 2.927 | 18.68 |",
        "| Adapter | 1.608 | 4.99 |",
        "| Dropped: empty answer | 10 (9.1 %) | 0 |",
        "| Train | 21 | 148 | 512 | 988 | 1,024 |",
        "| `lora.r` | `16` |",
        "| `model.precision` | `float32` |",
        "{{ '/keep/this/path' }}",
        "- `</s>` (id 2)",
        "- `<|end|>` (id 32007)",
        "loralab generate",
        "PeftModel.from_pretrained(base, adapter)",
        "safe",
        "languages",
        "loralab 0.1.0, python 3.11.2, torch 2.13.0.",
        "a" * 64,
    ):
        assert fact in text, fact


def test_every_table_is_a_table(tmp_path: Path) -> None:
    _, body = read_card(build_whole_run(tmp_path))
    for block in re.findall(r"(?:^\|.*\n)+", body, re.MULTILINE):
        rows = table_rows(block)
        assert len({len(row) for row in rows}) == 1, block
        assert all(set(cell) <= set("-:") for cell in rows[1]), block
    assert "\n\n\n" not in body


def find_program(body: str) -> str:
    (program,) = re.findall(r"```python\n(.*?)\n```", body, re.DOTALL)
    return str(program)


@pytest.mark.parametrize("folder", ["mod\u00e8le", 'quo"te', "back`tick", "a\nb"])
def test_the_program_holds_the_base_models_name_as_a_literal(tmp_path: Path, folder: str) -> None:
    record = run_folders.record()
    record["model"] |= {"name": f"/srv/{folder}", "sha256": "b" * 64}
    program = ast.parse(find_program(read_card(build_whole_run(tmp_path, record=record))[1]))
    literals = {node.value for node in ast.walk(program) if isinstance(node, ast.Constant)}
    assert f"path/to/{folder}" in literals
    assert "abc123" not in literals  # a folder has no revision


def test_the_programs_are_python_and_shell(tmp_path: Path) -> None:
    _, body = read_card(build_whole_run(tmp_path))
    ast.parse(find_program(body))
    assert "```sh\nloralab generate path/to/this/adapter --prompt 'Your question'\n```" in body


def test_on_the_hub_the_card_names_its_repository(tmp_path: Path) -> None:
    _, body = read_card(build_whole_run(tmp_path))
    named = name_repository(body, "ada/price")
    assert "\nhf download ada/price --local-dir price\nloralab generate price --prompt 'Your question'\n" in named
    assert 'adapter = "ada/price"' in find_program(named)
    assert "path/to/this/adapter" not in named


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/srv/secret/models/tiny-base", "tiny-base"),
        ("C:\\Users\\ann\\models\\tiny-base", "tiny-base"),
        ("C:/Users/ann/models/tiny-base", "tiny-base"),
    ],
)
def test_a_local_base_model_is_named_by_its_folder_only(tmp_path: Path, name: str, shown: str) -> None:
    record, config = run_folders.record(), run_folders.config_values()
    record["model"] |= {"name": name, "revision": None, "sha256": "b" * 64}
    config["model"]["name"] = name
    front, body = read_card(build_whole_run(tmp_path, record=record, config=config))
    assert "base_model" not in front
    assert f"`{shown}`" in body
    assert f'"path/to/{shown}"' in body
    assert f"loralab generate path/to/this/adapter --model path/to/{shown} --prompt 'Your question'" in body
    assert "ann" not in body
    assert "secret" not in body
    assert "b" * 64 in body


def test_a_relative_folder_is_no_hub_id_though_it_looks_like_one(tmp_path: Path) -> None:
    record, config = run_folders.record(), run_folders.config_values()
    record["model"] |= {"name": "models/tiny", "revision": None}
    config["model"]["name"] = "/srv/secret/models/tiny"  # as a run's config.yaml has it
    front, body = read_card(build_whole_run(tmp_path, record=record, config=config))
    assert "base_model" not in front
    assert "`tiny`" in body


def test_no_local_path_is_in_the_card_and_the_template_is_whole(tmp_path: Path) -> None:
    record, data = run_folders.record(), run_folders.data()
    data["template"]["reason"] = "read from '/srv/secret/chat.jinja', file:" + "///srv/secret/x and ~/secret/y"
    data["stop_tokens"]["reason"] = "named in C:\\secret\\config.yaml (nats/token, https://example.org/kept/too)"
    data["splits"]["train"]["dropped"] = {"/srv/secret/rows.jsonl: empty": 1}
    record["name"] = "/srv/secret/run"
    _, body = read_card(build_whole_run(tmp_path, record=record, data=data))
    assert "secret" not in body
    assert str(tmp_path) not in body
    assert "{{ '/keep/this/path' }}" in body
    assert "`train.jsonl`" in body
    assert "nats/token" in body
    assert "https://example.org/kept/too" in body


def test_hostile_values_break_neither_yaml_nor_tables(tmp_path: Path) -> None:
    record, data, config = run_folders.record(), run_folders.data(), run_folders.config_values()
    record |= {"name": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    record["model"] |= {"name": f"evil\n---\nlicense: mit\n{HOSTILE}", "revision": HOSTILE}
    config["lora"]["target_modules"] = [HOSTILE]
    data["splits"]["train"]["dropped"] = {HOSTILE: 2}
    data["stop_tokens"] |= {"texts": [HOSTILE, "`"], "reason": HOSTILE}
    data["template"] = {"name": HOSTILE, "reason": HOSTILE, "text": HOSTILE}
    front, body = read_card(build_whole_run(tmp_path, record=record, data=data, config=config))
    assert set(front) == {"library_name", "pipeline_tag", "tags"}
    outside_code = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", body, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<(?:script|img)", outside_code)
    assert "\nlicense:" not in body
    for block in re.findall(r"(?:^\|.*\n)+", body, re.MULTILINE):
        assert len({len(row) for row in table_rows(block)}) == 1, block
    assert f"````jinja\n{HOSTILE}\n````" in body  # a fence that the template's own cannot close


@pytest.mark.parametrize("part", ["evaluation", "data", "config", "samples", "metrics", "record"])
def test_a_missing_file_is_no_exception(tmp_path: Path, part: str) -> None:
    folder = build_whole_run(tmp_path)
    getattr(folder, part).unlink()
    front, body = read_card(folder)
    assert front["library_name"] == "peft"
    assert "\n\n\n" not in body


def test_an_unfinished_run_is_called_so(tmp_path: Path) -> None:
    _, body = read_card(build_run(tmp_path, record={"status": "interrupted"}))
    assert "did not complete" in body
    assert "Not measured" in body


def test_markdown_is_escaped_in_one_line() -> None:
    assert escape_markdown("a|b\n\n# c *d* <e> [f](g) & `h`") == (
        "a\\|b \\# c \\*d\\* \\<e\\> \\[f\\](g) &amp; \\`h\\`"
    )
