"""What lies in the cache by its commit: nothing is asked of the Hub for it, and no other commit takes its place."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import ModelCard, constants, hf_hub_download, snapshot_download

import loralab
from integration.test_hub import price_rows, run_program
from loralab.errors import DataError, StoppedBySignal
from loralab.hub.cache import is_whole
from loralab.progress import Reporter
from loralab.run import read_json
from loralab.workflows.sweep import Search, sweep
from support import tiny
from support.command import Answer, read_problems, run_here, write_config
from support.hub_client import talking_to
from support.hub_server import HubServer
from support.reporters import StopAt

BASE, DATA = "meta/tiny", "ed/prices"
CARD = b"---\nlicense: other\nlicense_name: tiny-licence\nlicense_link: LICENSE\nlanguage: en\n---\n"
_CONFIGS = "configs:\n- config_name: prices\n  data_files:\n  - split: train\n    path: train.jsonl\n"
DATA_CARD = f"---\nlicense: mit\nlanguage:\n- en\n- fr\n{_CONFIGS}---\n".encode()
_PROGRAM = "import sys\nfrom loralab.cli import main\nsys.argv[0] = 'loralab'\nmain()\n"


@dataclass(frozen=True)
class Place:
    """A Hub with a base and a data set, and a folder to work in."""

    hub: HubServer
    folder: Path
    settings: dict[str, dict[str, Any]]

    @property
    def config(self) -> Path:
        return write_config(self.folder / "run.yaml", self.settings)

    @property
    def base(self) -> str:
        return self.hub.model(BASE).head.sha

    def train(self, name: str, *more: object) -> Answer:
        return run_here("train", self.config, f"output.dir={self.folder / name}", *more)

    def asked(self) -> list[str]:
        """Return what was asked since the last call."""
        found = list(self.hub.requests)
        self.hub.requests.clear()
        return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("hub-cache")
    with HubServer() as hub, talking_to(hub, folder / "home"):
        hub.add_folder("models", BASE, tiny.save_base(folder / "base"))
        # Weights in another cut, and code, are nothing that loading asks for.
        more = {"README.md": CARD, "LICENSE": b"take it", "consolidated.safetensors": b"x", "run.py": b"raise"}
        hub.model(BASE).commit("card", more)
        hub.add("datasets", DATA, {"README.md": DATA_CARD, "train.jsonl": price_rows(24, 0)})
        settings = tiny.run_config(
            Path(BASE),
            Path(DATA),
            folder / "run",
            data={"format": "prompt_completion", "template": "none"},
            training={"max_steps": 4, "save_strategy": "steps", "save_steps": 2},
        )
        yield Place(hub, folder, settings)


@pytest.fixture(scope="module")
def run(place: Place) -> Path:
    """A run on what the branches were."""
    answer = place.train("first")
    assert answer.code == 0, answer.err
    return place.folder / "first"


def pinned(place: Place) -> tuple[str, str]:
    return f"model.revision={place.base}", f"data.train={DATA}@{place.hub.repos['datasets', DATA].head.sha}"


def test_what_was_fetched_by_commit_asks_the_hub_nothing(place: Place, run: Path) -> None:
    assert is_whole(BASE, place.base)
    place.asked()
    answer = place.train("again", *pinned(place))
    assert answer.code == 0, answer.err
    assert place.asked() == []
    pin = read_json(place.folder / "again" / "run.json")["revisions"]["model"][0]
    assert (pin["commit"], "the Hub is not asked" in pin["reason"]) == (place.base, True)
    assert answer.err.count("the Hub is not asked") == 1
    same = read_json(run / "run.json")["adapter_sha256"]
    assert read_json(place.folder / "again" / "run.json")["adapter_sha256"] == same


@pytest.mark.parametrize(
    "command",
    [
        ("eval", "RUN", "--split", "train"),
        ("generate", "RUN", "--prompt", "red cat", "--max-new-tokens", "2"),
        ("merge", "RUN", "--output", "OUT/merged"),
        ("inspect", "RUN"),
        ("train", "RUN/config.yaml", "--resume"),
    ],
    ids=lambda command: command[0],
)
def test_a_run_asks_the_hub_nothing_for_its_base(
    place: Place, run: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    place.asked()
    answer = run_here(*(each.replace("RUN", str(run)).replace("OUT", str(tmp_path)) for each in command))
    assert answer.code == 0, answer.err
    assert place.asked() == []
    if command[0] == "merge":
        assert (tmp_path / "merged" / "LICENSE").read_bytes() == b"take it"


def test_a_dead_hub_does_not_matter_to_what_is_cached(place: Place, run: Path) -> None:
    place.hub.stop()
    try:
        answer = place.train("dead", *pinned(place))
        assert answer.code == 0, answer.err
        assert run_here("eval", run, "--split", "train").code == 0
    finally:
        place.hub.start()


def test_a_whole_snapshot_of_another_program_asks_nothing(place: Place, tmp_path: Path) -> None:
    with talking_to(place.hub, tmp_path / "home"):
        snapshot_download(BASE, revision=place.base)
        rows = tiny.write_rows(tmp_path / "rows.json", tiny.alpaca_rows(12))
        place.asked()
        answer = place.train("snapshot", pinned(place)[0], f"data.train={rows}", "data.format=alpaca")
        assert answer.code == 0, answer.err
        assert place.asked() == []


def test_a_cache_without_its_list_of_files_is_completed(place: Place, tmp_path: Path) -> None:
    with talking_to(place.hub, tmp_path / "home"):
        for file in ("config.json", "model.safetensors"):
            hf_hub_download(BASE, file, revision=place.base)
        assert not is_whole(BASE, place.base)
        for status, said in ((0, "the connection to"), (404, "not there"), (503, "the Hub has a problem")):
            place.hub.arm(f"/api/models/{BASE}", status=status, times=99)
            problem = read_problems(place.train("lacking", pinned(place)[0]))[0]
            place.hub.faults.clear()
            assert said in problem.what
            assert problem.fix.endswith("or set HF_HUB_OFFLINE=1 to use what the cache has of it")
        answer = place.train("listed", *pinned(place))
        assert answer.code == 0, answer.err
        assert is_whole(BASE, place.base)


def test_a_branch_without_a_hub_is_refused_and_offline_takes_what_it_was(place: Place, run: Path) -> None:
    place.hub.stop()
    try:
        problem = read_problems(place.train("lost"))[0]
        assert "the connection to" in problem.what
        assert f"HF_HUB_OFFLINE=1 to take what it was when last asked, commit {place.base}" in problem.fix
        home, out = place.folder / "home", place.folder / "offline"
        answer = run_program(
            place.hub, home, f"import os\nos.environ['HF_HUB_OFFLINE'] = '1'\n{_PROGRAM}", "train", place.config,
            f"output.dir={out}",
        )  # fmt: skip
    finally:
        place.hub.start()
    assert answer.code == 0, answer.err
    record = read_json(out / "run.json")
    assert record["model"]["revision"] == place.base
    assert record["adapter_sha256"] == read_json(run / "run.json")["adapter_sha256"]
    pins = [*record["revisions"]["model"], *record["revisions"]["data"]]
    assert all("when last asked; HF_HUB_OFFLINE is set" in pin["reason"] for pin in pins)


def test_a_branch_is_looked_up_at_every_start(place: Place, run: Path) -> None:
    assert f"GET /api/models/{BASE}" in [each.partition("/revision")[0] for each in _asked_by_branch(place)]
    before = place.base
    try:
        moved = place.hub.model(BASE).commit("moved", {"notes.txt": b"x"}).sha
        answer = place.train("moved")
        assert answer.code == 0, answer.err
        assert read_json(place.folder / "moved" / "run.json")["model"]["revision"] == moved
    finally:
        place.hub.model(BASE).branches["main"] = before


def _asked_by_branch(place: Place) -> list[str]:
    place.asked()
    answer = place.train("branch")
    assert answer.code == 0, answer.err
    return place.asked()


@pytest.mark.parametrize(
    "command", [("plan", "--no-probe"), ("preview",), ("prepare", "--output", "OUT/prepared")], ids=lambda each: each[0]
)
def test_what_needs_no_weights_asks_for_commits_alone(
    place: Place, run: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    name, *options = (each.replace("OUT", str(tmp_path)) for each in command)
    place.asked()
    answer = run_here(name, place.config, *options)
    assert answer.code == 0, answer.err
    asked = {each.removesuffix("/revision/main") for each in place.asked()}
    assert asked == {f"GET /api/models/{BASE}", f"GET /api/datasets/{DATA}"}
    place.hub.stop()
    try:
        problem = read_problems(run_here(name, place.config, *options, *(["--overwrite"] if name == "prepare" else [])))
        assert "the connection to" in problem[0].what
    finally:
        place.hub.start()


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "fetched"])
def test_a_resume_takes_the_rows_that_the_run_began_with(place: Place, run: Path, tmp_path: Path, cached: bool) -> None:
    settings = place.settings | {"output": {"dir": str(tmp_path / "run")}}
    settings["data"] = settings["data"] | {"cache_dir": str(tmp_path / "cache")}  # no tokenized rows of other runs
    repo = place.hub.repos["datasets", DATA]
    before = repo.head.sha
    with talking_to(place.hub, tmp_path / "home"):
        with pytest.raises(StoppedBySignal):
            loralab.train(settings, reporter=StopAt(2))
        try:
            repo.commit("other rows", {"train.jsonl": price_rows(24, 7)})
            with talking_to(place.hub, tmp_path / ("home" if cached else "fresh")):
                resumed = loralab.train(settings, resume=True)
            other = loralab.train(settings | {"output": {"dir": str(tmp_path / "other")}})
        finally:
            repo.branches["main"] = before
    whole = read_json(run / "run.json")
    assert resumed.record["adapter_sha256"] == whole["adapter_sha256"]
    assert resumed.record["revisions"]["data"][0]["commit"] == before
    assert other.record["adapter_sha256"] != whole["adapter_sha256"]


def test_no_other_commit_of_the_data_takes_the_place_of_one_that_cannot_be_had(
    place: Place, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = place.hub.repos["datasets", DATA]
    before = repo.head.sha
    moved = repo.commit("more rows", {"train.jsonl": price_rows(30, 3)}).sha
    repo.branches["main"] = before
    settings = place.settings | {"output": {"dir": str(place.folder / "wrong")}}
    settings["data"] = settings["data"] | {"train": f"{DATA}@{moved}"}
    settings["model"] = settings["model"] | {"revision": place.base}
    for name in (constants, datasets.config):
        monkeypatch.setattr(name, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=f"the cache has another commit of it, {before}"):
        loralab.train(settings)


class MovesOn(Reporter):
    """Moves base and data on when the second run of a sweep is about to begin."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def say(self, text: str) -> None:
        if text.startswith("run 002"):
            self.place.hub.model(BASE).commit("moved on", {"config.json": b"{}"})
            self.place.hub.repos["datasets", DATA].commit("moved on", {"train.jsonl": price_rows(30, 5)})


@pytest.mark.slow
def test_all_runs_of_a_sweep_take_the_commits_of_the_first(place: Place, run: Path, tmp_path: Path) -> None:
    repos = (place.hub.model(BASE), place.hub.repos["datasets", DATA])
    heads = [repo.head.sha for repo in repos]
    settings = place.settings | {"output": {}}
    settings["data"] = settings["data"] | {"validation": f"{DATA}#train[:4]"}
    search = Search(
        write_config(tmp_path / "sweep.yaml", settings),
        ["lora.r=2,4"],
        ["training.max_steps=1"],
        output=tmp_path / "out",
    )
    try:
        result = sweep(search, reporter=MovesOn(place))
        assert [repo.head.sha for repo in repos] != heads
    finally:
        for repo, head in zip(repos, heads, strict=True):
            repo.branches["main"] = head
    assert [entry["status"] for entry in result["runs"]] == ["completed", "completed"], result["runs"]
    for entry in result["runs"]:
        record = read_json(tmp_path / "out" / entry["name"] / "run.json")
        assert record["model"]["revision"] == heads[0]
        assert {pin["commit"] for pin in record["revisions"]["data"]} == {heads[1]}


def test_the_cards_say_what_base_and_data_say_of_themselves(place: Place, run: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    assert run_here("merge", run, "--output", merged).code == 0
    for file, library, relation in (
        (run / "adapter" / "README.md", "peft", "adapter"),
        (merged / "README.md", "transformers", "finetune"),
    ):
        card = ModelCard.load(file)
        assert (card.data.base_model, card.data.library_name) == (BASE, library)
        assert (card.data.pipeline_tag, card.data.datasets) == ("text-generation", [DATA])
        assert (card.data.license, card.data.license_name, card.data.license_link) == (
            *("other", "tiny-licence", "LICENSE"),
        )
        assert card.data.language == ["en", "fr"]
        assert card.data.to_dict()["base_model_relation"] == relation
        assert "`tiny-licence`, as its card says" in card.text
        assert str(place.folder) not in card.content


@pytest.mark.parametrize("card", [b"---\nlicense: apache-2.0\n---\n", b"# no head", b"---\nlicense: [\n---\n", None])
def test_the_licence_of_a_local_base_is_what_its_card_says(tmp_path: Path, card: bytes | None) -> None:
    base = tiny.save_base(tmp_path / "base")
    if card is not None:
        (base / "README.md").write_bytes(card)
    rows = tiny.write_rows(tmp_path / "rows.json", tiny.alpaca_rows(12))
    run = loralab.train(tiny.run_config(base, rows, tmp_path / "run", training={"max_steps": 1}))
    assert run_here("merge", run.path, "--output", tmp_path / "merged").code == 0
    for file in (run.adapter() / "README.md", tmp_path / "merged" / "README.md"):
        found = ModelCard.load(file)
        assert found.data.license == ("apache-2.0" if card is not None and b"apache" in card else None)
        assert ("not known here" in found.text) == (found.data.license is None)
        assert found.data.datasets is None
        assert found.data.language is None
        assert "base_model" not in found.data.to_dict()
