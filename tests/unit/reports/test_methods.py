"""The methods paragraph: the record's numbers and nothing else, and BibTeX of what was used."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from loralab.cli.measuring import report
from loralab.config.schema import LoraConfig
from loralab.config.training_schema import TrainingConfig
from loralab.reports.citations import ENTRIES
from loralab.reports.facts import load_facts
from loralab.reports.methods import METRIC_CITATIONS, OPTIMIZERS, VARIANT_CITATIONS, VARIANTS, Methods, describe_methods
from loralab.reports.sections import describe_status
from loralab.run import RunFolder
from unit.reports import run_folders
from unit.reports.run_folders import build_run, build_whole_run


def methods_of(path: Path, **changes: Any) -> Methods:
    path.mkdir(exist_ok=True)
    return describe_methods(build_whole_run(path, **({"evaluation": run_folders.task_evaluation()} | changes)))


def keys(bibtex: str) -> list[str]:
    return re.findall(r"^@\w+\{([^,]+),", bibtex, re.MULTILINE)


def test_the_paragraph_has_the_runs_numbers(tmp_path: Path) -> None:
    record = run_folders.record()
    record["resolved"]["target_modules"] = {"value": "q_proj, v_proj", "reason": "set"}
    record["versions"] |= {"transformers": "5.23.0", "peft": "0.21.2"}
    record["processes"] = 2
    config = run_folders.config_values()
    config["training"] |= {"gradient_accumulation_steps": 4, "load_best_model_at_end": True, "warmup_ratio": 0.03}
    config["training"]["early_stopping"]["metric"] = "yes_no_macro_f1"
    text = methods_of(tmp_path, record=record, config=config).text
    for fact in (
        "owner/base-model (revision abc123, LlamaForCausalLM, 129,630,528 parameters)",
        "with LoRA (rank 16, alpha 16, dropout 0, on q_proj, v_proj)",
        "4,884,480 parameters (3.6 % of all) were trained",
        "100 rows (8,000 tokens, 4,000 of them supervised) of train.jsonl, with 100 rows for validation",
        "the template chat.jinja",
        "at most 512 tokens",
        "300 optimizer steps of 64 rows (8 per device x 4 accumulation steps x 2 processes) (3 epochs)",
        "with AdamW, a peak learning rate of 2e-4, a linear schedule, warm-up over 3 % of the steps, weight decay 0, "
        "gradients clipped to norm 1, seed 42, in float32",
        "The adapter of the best evaluation by yes_no_macro_f1 was kept.",
        "It ran on cpu for 1 h 2 min, with at most 3.2 GiB of memory",
        "Software: loralab 0.1.0, torch 2.13.0, transformers 5.23.0, peft 0.21.2.",
        "On the test split (99 rows, 8,123 supervised tokens) the loss was 1.608 nats per token with the adapter and "
        "2.927 without it (difference -1.319, 95 % interval -1.390 to -1.251, paired bootstrap): better.",
        "scored and not generated (99 rows)",
        "yes_no_macro_f1 was 0.771 (95 % interval 0.680 to 0.853) with the adapter and 0.750 (95 % interval 0.662 to "
        "0.841) without it (difference +0.021, 95 % interval -0.030 to +0.071): no difference seen at n = 99.",
    ):
        assert fact in text, (fact, text)
    assert "secret" not in text
    assert "\u00a0" not in text


def test_what_the_record_lacks_is_not_said(tmp_path: Path) -> None:
    text = methods_of(tmp_path, record={"steps": 7}, config={}, data={}, evaluation={}, samples={}, metrics=[]).text
    assert text == "Training took 7 optimizer steps."
    (tmp_path / "none").mkdir()
    empty = describe_methods(build_run(tmp_path / "none", record={}))
    assert empty.text == ""
    assert keys(empty.bibtex) == ["loralab"]


def test_generation_says_its_limit_and_quantization_is_told(tmp_path: Path) -> None:
    config = run_folders.config_values()
    config["model"]["quantization"] = "nf4"
    evaluation = run_folders.task_evaluation() | {"answered_by": "generate"}
    found = methods_of(tmp_path, config=config, evaluation=evaluation)
    assert "held in nf4 with double quantization." in found.text
    assert "Answers were generated without sampling (99 rows, at most 128 tokens each)." in found.text
    assert "dettmers2023qlora" in keys(found.bibtex)


def test_an_early_end_is_told(tmp_path: Path) -> None:
    stopped = run_folders.record() | {"stopped_because": "early stopping: no better for 2 evaluations"}
    early = run_folders.config_values()
    early["training"]["num_train_epochs"] = 5.0
    assert "It ended before its last step (early stopping: no better for 2 evaluations)." in (
        methods_of(tmp_path / "early", record=stopped, config=early).text
    )
    killed = run_folders.record() | {"status": "interrupted", "stopped_because": "SIGTERM"}
    assert "The run did not complete: its status is interrupted (SIGTERM)." in (
        methods_of(tmp_path / "killed", record=killed).text
    )


def test_a_run_that_took_all_its_steps_did_not_end_early(tmp_path: Path) -> None:
    # As records of earlier versions have it, and only where the last step was not taken.
    stopped = run_folders.record() | {"stopped_because": "early stopping: no better for 2 evaluations"}
    config = run_folders.config_values()
    for name, plan, early in (
        ("all epochs", {"num_train_epochs": 3.0}, False),
        ("fewer epochs", {"num_train_epochs": 4.0}, True),
        ("all steps", {"max_steps": 300}, False),
        ("fewer steps", {"max_steps": 301}, True),
    ):
        config["training"] |= plan
        (tmp_path / name).mkdir()
        folder = build_whole_run(tmp_path / name, record=stopped, config=config)
        assert ("ended before its last step" in describe_methods(folder).text) == early, name
        assert (describe_status(load_facts(folder))["reason"] != "") == early, name


def test_the_bases_own_parameters_are_told(tmp_path: Path) -> None:
    record = run_folders.record()
    record["model"]["base_parameters"] = 129_000_000
    assert "LlamaForCausalLM, 129,000,000 parameters)" in methods_of(tmp_path, record=record).text


def test_each_split_is_told_with_its_own_files(tmp_path: Path) -> None:
    config, data = run_folders.config_values(), run_folders.data()
    config["data"] |= {
        "train": ["/srv/secret/a.jsonl", {"path": "/srv/secret/b.jsonl", "weight": 2.0}],
        "validation": 0.1,
        "test": "/srv/secret/test.jsonl",
    }
    data["sources"] = [{"name": name} for name in ("a.jsonl", "b.jsonl", "test.jsonl")]
    data["splits"]["test"] = data["splits"]["validation"]
    text = methods_of(tmp_path, config=config, data=data).text
    assert "of a.jsonl, b.jsonl, with 100 rows for validation and 100 rows of test.jsonl for test." in text


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_each_variant_cites_its_papers_and_tells_only_keys_that_act(tmp_path: Path, variant: str) -> None:
    config = run_folders.config_values()
    config["lora"]["variant"] = variant
    found = methods_of(tmp_path, config=config)
    papers = VARIANT_CITATIONS.get(variant, ("lora", variant))
    assert all(ENTRIES[paper] in found.bibtex for paper in papers)
    assert ("rank 16" in found.text) == (variant != "ia3")
    assert ("alpha" in found.text) == (variant not in ("ia3", "vera"))


def test_metrics_and_intervals_cite_their_sources(tmp_path: Path) -> None:
    evaluation = run_folders.task_evaluation()
    evaluation["metrics"] |= {name: run_folders.figure(0.5, 0.4, 0.6) for name in ("rougeL", "bleu", "calibration_ece")}
    cited = keys(methods_of(tmp_path, evaluation=evaluation).bibtex)
    for key in (
        "lin2004rouge", "papineni2002bleu", "post2018sacrebleu", "guo2017calibration", "brier1950verification",
        "efron1993bootstrap", "wilson1927inference", "mcnemar1947note", "loralab",
    ):  # fmt: skip
        assert cited.count(key) == 1, key
    assert "popovic2015chrf" not in cited
    assert "dettmers2023qlora" not in cited


def test_every_variant_and_optimizer_has_its_words_and_every_citation_its_entry() -> None:
    assert set(VARIANTS) == set(get_args(LoraConfig.model_fields["variant"].annotation))
    assert set(OPTIMIZERS) == set(get_args(TrainingConfig.model_fields["optim"].annotation))
    used = {name for names in [*VARIANT_CITATIONS.values(), *METRIC_CITATIONS.values()] for name in names}
    used |= {name for _, names in OPTIMIZERS.values() for name in names}
    used |= {variant for variant in VARIANTS if variant not in VARIANT_CITATIONS}
    assert used | {"qlora", "int8", "torch", "transformers", "peft", "bootstrap", "wilson", "mcnemar"} == set(ENTRIES)


def test_every_entry_is_whole_bibtex() -> None:
    assert len(keys("\n".join(ENTRIES.values()))) == len({*keys("\n".join(ENTRIES.values()))}) == len(ENTRIES)
    for entry in ENTRIES.values():
        assert entry.count("{") == entry.count("}")
        assert entry.isascii()
        fields = dict(re.findall(r"^  (\w+) += \{(.*)\},$", entry, re.MULTILINE))
        assert {"title", "author", "year"} <= fields.keys()
        assert re.fullmatch(r"(19|20)\d\d", fields["year"])
        assert re.fullmatch(r"\d{4}\.\d{5}", fields.get("eprint", "2000.00000"))
        # An arXiv number begins with year and month: no paper was printed before it was written.
        assert int(fields.get("eprint", "0000")[:2]) <= int(fields["year"]) % 100


def test_the_command_prints_text_or_json_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder: RunFolder = build_whole_run(tmp_path, evaluation=run_folders.task_evaluation())
    before = sorted(folder.path.rglob("*"))
    report(folder.path, methods=True)
    printed = capsys.readouterr().out
    report(folder.path, methods=True, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"methods", "bibtex"}
    assert printed == f"{found['methods']}\n\n{found['bibtex']}\n"
    assert sorted(folder.path.rglob("*")) == before
    report(folder.path, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"report": str(folder.report)}
    assert folder.report.is_file()
