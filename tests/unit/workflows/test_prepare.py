"""`prepare`: the folder it writes gives training the same tokens, prompts and contract as the rows did."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer

from loralab.config.load import LoadedConfig
from loralab.config.schema import DataConfig
from loralab.data.dataset import PreparedData, prepare_data
from loralab.data.prompts.contract import CONTRACT_FILE, build_contract
from loralab.errors import ConfigError, DataError, PromptContractError, RunFolderError
from loralab.progress import Reporter
from loralab.workflows.configure import load_run_config
from loralab.workflows.prepare import prepare
from support import tiny
from unit.data.prompters import CHATML, build_tokenizer

ROWS = [
    {
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": f"one {i}"},
            {"role": "assistant", "content": "red"},
            {"role": "user", "content": "two"},
            {"role": "assistant", "content": "blue bird"},
        ]
    }
    for i in range(8)
]
REWRITING = CHATML.replace(
    "{{ message['content'] }}", "{{ message['content'] if loop.last or message.role != 'assistant' else '...' }}"
)


def save_base(folder: Path, template: str) -> Path:
    tokenizer = build_tokenizer(template)
    tiny.build_model("llama", vocabulary=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def configure(tmp_path: Path, *, template: str = CHATML, **data: Any) -> LoadedConfig:
    base = save_base(tmp_path / "base", template)
    rows = tiny.write_rows(tmp_path / "rows.json", ROWS)
    section = {"train": str(rows), "cache_dir": str(tmp_path / "cache"), "validation": 2, **data}
    return load_run_config({"model": {"name": str(base)}, "data": section}, name="chat")


def take_up(tmp_path: Path, folder: Path, **data: Any) -> PreparedData:
    section = DataConfig(train=str(folder), validation="validation", cache_dir=str(tmp_path / "cache"), **data)
    return prepare_data(section, AutoTokenizer.from_pretrained(tmp_path / "base"), reporter=Reporter())


def tokens(prepared: PreparedData, split: str) -> list[list[tuple[list[int], list[int]]]]:
    return [[(b.prompt_ids.tolist(), b.answer_ids.tolist()) for b in e.branches] for e in prepared.splits[split]]


def test_folder_gives_the_same_tokens_and_contract(tmp_path: Path) -> None:
    loaded, folder = configure(tmp_path), tmp_path / "made"
    facts = prepare(loaded, folder, overwrite=False, reporter=Reporter())
    assert facts["splits"]["train"]["rows"] == 6
    again = take_up(tmp_path, folder)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    before = prepare_data(loaded.config.data, tokenizer, reporter=Reporter())
    for split in ("train", "validation"):
        assert tokens(again, split) == tokens(before, split)
    assert build_contract(again.prompter) == build_contract(before.prompter)
    assert again.prompter.system_prompt == "be kind"


def test_folder_is_a_plain_data_set_without_padding(tmp_path: Path) -> None:
    prepare(configure(tmp_path), tmp_path / "made", overwrite=False, reporter=Reporter())
    row = datasets.load_from_disk(str(tmp_path / "made"))["train"][0]
    assert set(row) == {"input_ids", "attention_mask", "labels"}
    assert set(row["attention_mask"]) == {1}
    assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    tokenizer = build_tokenizer(CHATML)
    supervised = tokenizer.decode([label for label in row["labels"] if label != -100])
    assert supervised == "red<|stop|>blue bird<|stop|>"
    assert not [path for path in (tmp_path / "made").iterdir() if path.name.startswith(".")]


def test_turns_that_the_template_rewrites_become_rows_of_their_own(tmp_path: Path) -> None:
    loaded = configure(tmp_path, template=REWRITING)
    assert prepare(loaded, tmp_path / "made", overwrite=False, reporter=Reporter())["splits"]["train"]["rows"] == 12


def test_settings_that_the_folder_fixes_are_refused(tmp_path: Path) -> None:
    prepare(configure(tmp_path), tmp_path / "made", overwrite=False, reporter=Reporter())
    for chosen in ({"system": "other"}, {"stop_tokens": ["<|stop|>"]}, {"template_kwargs": {"a": 1}}):
        with pytest.raises(DataError):
            take_up(tmp_path, tmp_path / "made", **chosen)


@pytest.mark.parametrize("folder", ["made", "a#b"])
def test_contract_holds_for_the_folders_of_single_splits_too(tmp_path: Path, folder: str) -> None:
    made = tmp_path / folder
    prepare(configure(tmp_path), made, overwrite=False, reporter=Reporter())
    parts = {"train": str(made / "train"), "validation": str(made / "validation")}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.chat_template = None
    single = prepare_data(DataConfig(**parts, cache_dir=str(tmp_path / "cache")), tokenizer, reporter=Reporter())
    for prepared in (single, take_up(tmp_path, made)):
        assert prepared.template.name == "prepared"
        assert prepared.prompter.system_prompt == "be kind"


def test_a_contract_beside_a_file_of_tokens_is_not_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(configure(tmp_path), tmp_path / "made", overwrite=False, reporter=Reporter())
    monkeypatch.chdir(tmp_path / "made")
    tiny.write_rows(tmp_path / "made" / "rows.json", [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}])
    prepared = prepare_data(
        DataConfig(train="rows.json", cache_dir=str(tmp_path / "cache")), build_tokenizer(CHATML), reporter=Reporter()
    )
    assert prepared.template.name != "prepared"


def test_rows_of_another_template_do_not_measure_an_adapter(tmp_path: Path) -> None:
    prepare(configure(tmp_path), tmp_path / "made", overwrite=False, reporter=Reporter())
    section = DataConfig(train=str(tmp_path / "made"), cache_dir=str(tmp_path / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert prepare_data(section, tokenizer, template=CHATML, reporter=Reporter()).template.name == "adapter"
    with pytest.raises(PromptContractError, match="prepared under another template"):
        prepare_data(section, tokenizer, template=CHATML + " ", reporter=Reporter())


def test_weights_are_refused_where_they_would_be_lost(tmp_path: Path) -> None:
    rows = str(tiny.write_rows(tmp_path / "more.json", ROWS))
    loaded = configure(tmp_path, train=[{"path": rows, "weight": 2}])
    with pytest.raises(ConfigError, match="weight 2"):
        prepare(loaded, tmp_path / "made", overwrite=False, reporter=Reporter())
    assert not (tmp_path / "made").exists()


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    prepare(configure(tmp_path), tmp_path / "made", overwrite=False, reporter=Reporter())
    tokenizer = build_tokenizer(CHATML)
    tokenizer.add_tokens(["capital"])
    section = DataConfig(train=str(tmp_path / "made"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(PromptContractError) as caught:
        prepare_data(section, tokenizer, reporter=Reporter())
    assert "set model.name to the base that the rows were prepared for" in caught.value.problems[0].fix


def test_stop_setting_of_the_folder_holds_again(tmp_path: Path) -> None:
    loaded = configure(tmp_path, stop_tokens=["<|start|>", "<|stop|>"])
    prepare(loaded, tmp_path / "made", overwrite=False, reporter=Reporter())
    assert take_up(tmp_path, tmp_path / "made").prompter.stop.texts == ("<|start|>", "<|stop|>")


def test_folder_in_the_way(tmp_path: Path) -> None:
    loaded, folder = configure(tmp_path), tmp_path / "made"
    prepare(loaded, folder, overwrite=False, reporter=Reporter())
    with pytest.raises(RunFolderError, match="is not empty") as caught:
        prepare(loaded, folder, overwrite=False, reporter=Reporter())
    assert "--overwrite" in caught.value.problems[0].fix
    prepare(loaded, folder, overwrite=True, reporter=Reporter())
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(RunFolderError, match="is not empty"):
        prepare(loaded, foreign, overwrite=True, reporter=Reporter())
    assert (foreign / "notes.txt").is_file()
    assert json.loads((folder / CONTRACT_FILE).read_text(encoding="utf-8"))["system_prompt"] == "be kind"


def test_folder_of_this_process_is_not_replaced_under_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = configure(tmp_path)
    prepare(loaded, tmp_path / "tokens", overwrite=False, reporter=Reporter())
    before = sorted(path.name for path in (tmp_path / "tokens").iterdir())
    monkeypatch.chdir(tmp_path / "tokens")
    with pytest.raises(RunFolderError, match="the folder of this process"):
        prepare(loaded, Path(), overwrite=True, reporter=Reporter())
    assert sorted(path.name for path in (tmp_path / "tokens").iterdir()) == before


def test_link_to_a_prepared_folder_stays_and_leads_to_the_new_one(tmp_path: Path) -> None:
    loaded = configure(tmp_path)
    prepare(loaded, tmp_path / "tokens", overwrite=False, reporter=Reporter())
    (tmp_path / "link").symlink_to("tokens")
    (tmp_path / "tokens" / "old").touch()
    prepare(loaded, tmp_path / "link", overwrite=True, reporter=Reporter())
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "tokens" / CONTRACT_FILE).is_file()
    assert not (tmp_path / "tokens" / "old").exists()
