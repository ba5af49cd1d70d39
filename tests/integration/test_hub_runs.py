"""Runs and the Hub when things go wrong: stops and kills in a push, what is owed, branches that move on, refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from loralab.hub import upload
from loralab.run import read_json
from loralab.workflows.session import find_target, known_base
from support import tiny
from support.command import Answer, read_problems, run_here, write_config
from support.hub_client import talking_to
from support.hub_server import HubServer
from support.processes import run_team

BASE = "meta/tiny"
STEPS = 6
# Every file goes up by itself, as large ones do.
_PROGRAM = (
    "import sys\nfrom loralab.hub import upload\nupload.FIRST_WAIT_SECONDS, upload._LARGE_BYTES = 0.01, 1\n"
    "from loralab.cli import main\nsys.argv[0] = 'loralab'\nmain()\n"
)


@dataclass(frozen=True)
class Place:
    """A Hub with a base, and a folder to work in."""

    hub: HubServer
    folder: Path
    config: Path

    def train(self, name: str, *more: object) -> Answer:
        return run_here("train", self.config, f"output.dir={self.folder / name}", *more)

    def record(self, name: str) -> dict:
        return read_json(self.folder / name / "run.json")

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *map(str, arguments)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
        )

    def titles(self, repo: str) -> list[str]:
        return [commit.title for commit in self.hub.model(repo).history("main")][::-1][1:]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("hub-runs")
    with HubServer() as hub, talking_to(hub, folder / "home"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(upload, "FIRST_WAIT_SECONDS", 0.01)
        hub.add_folder("models", BASE, tiny.save_base(folder / "base"))
        rows = tiny.write_rows(folder / "rows.json", tiny.alpaca_rows(40))
        settings = tiny.run_config(
            Path(BASE),
            rows,
            folder / "run",
            training={"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2},
        )
        settings["output"]["hub"] = {"repo": "{user}/{run}"}
        yield Place(hub, folder, write_config(folder / "run.yaml", settings))


@pytest.fixture(scope="module")
def run(place: Place) -> Path:
    answer = place.train("price")
    assert answer.code == 0, answer.err
    return place.folder / "price"


@pytest.fixture(autouse=True)
def _no_faults(place: Place) -> Iterator[None]:
    yield
    place.hub.faults.clear()


def test_nothing_of_this_machine_is_pushed(place: Place, run: Path) -> None:
    files = place.hub.model("ada/price").head.files
    assert {"README.md", "adapter_config.json", "adapter_facts.json", "prompt_contract.json"} <= set(files)
    for name, content in files.items():
        assert str(place.folder).encode() not in content, name
        assert str(Path.home()).encode() not in content or len(str(Path.home())) < 4, name
    assert not (run / "checkpoints" / ".pushing").exists()


def test_saving_does_not_ask_the_hub_for_the_base(place: Place, run: Path) -> None:
    assert run.exists()
    assert not [each for each in place.hub.requests if f"/{BASE}/resolve/main" in each]


def test_an_adapter_from_the_hub_knows_its_base_when_that_has_moved_on(place: Place, run: Path) -> None:
    used = place.hub.model(BASE).head.sha
    try:
        place.hub.model(BASE).commit("moved on", {"config.json": b"{}", "model.safetensors": b"nothing"})
        fetched = Path(snapshot_download("ada/price", local_dir=place.folder / "fetched"))
        known = known_base(find_target(fetched))
        assert (known.revision, known.sha256) == (used, None)
        assert known.adapter_sha256 == read_json(run / "run.json")["adapter_sha256"]
        outputs = []
        for source in (fetched, run, shutil.copytree(run / "adapter", place.folder / "copied")):
            with talking_to(place.hub, place.folder / f"home-{source.name}"):  # nothing cached
                answer = run_here("generate", source, "--prompt", "the red cat", "--max-new-tokens", 4)
            assert answer.code == 0, answer.err
            outputs.append(answer.out)
        assert len(set(outputs)) == 1
        answer = run_here("eval", run, "--split", "train")
        assert answer.code == 0, answer.err
    finally:
        place.hub.model(BASE).branches["main"] = used


def test_a_hub_id_is_no_run(place: Place) -> None:
    for command in (("generate", "ada/price", "--prompt", "a"), ("eval", "ada/price"), ("compare", "ada/price")):
        problem = read_problems(run_here(*command))[0]
        assert "no such folder" in problem.what
        assert "hf download ada/price --local-dir price" in problem.fix


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "HTTP 401"),
        (403, "no right"),
        (404, "not there"),
        (429, "too many requests"),
        (500, "the Hub has a problem"),
        (0, "the connection to"),
    ],
)
def test_what_measuring_cannot_fetch_is_three_lines(
    place: Place, run: Path, tmp_path: Path, status: int, said: str
) -> None:
    place.hub.arm(f" /{BASE}/resolve/|/api/models/{BASE}", status=status, times=999)
    with talking_to(place.hub, tmp_path / "home"):
        problem = read_problems(run_here("eval", run))[0]
    assert BASE in problem.what
    assert said in problem.what


def test_what_is_fetched_needs_no_hub(place: Place, run: Path) -> None:
    commit = read_json(run / "run.json")["model"]["revision"]
    place.hub.stop()
    try:
        answer = place.train("cached", "output.hub={}", f"model.revision={commit}")
        assert answer.code == 0, answer.err
        assert run_here("eval", run, "--split", "train").code == 0
    finally:
        place.hub.start()


def test_a_gated_base_is_told_before_anything_is_fetched(place: Place) -> None:
    place.hub.add_folder("models", "meta/gated", place.folder / "base").gated = True
    problem = read_problems(place.train("gated", "model.name=meta/gated"))[0]
    assert "is gated, and this token has no access" in problem.what
    assert "accept its terms" in problem.fix
    assert not any("/meta/gated/resolve/" in each for each in place.hub.requests)


def test_a_merged_folder_goes_up_in_parts(place: Place, run: Path) -> None:
    merged = place.folder / "merged"
    answer = run_here("merge", run, "--output", merged)
    assert answer.code == 0, answer.err
    place.hub.part_bytes = 40_000
    try:
        answer = run_here("push", merged, "--json")
    finally:
        place.hub.part_bytes = None
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["repo"] == "ada/merged"
    head = place.hub.model("ada/merged").head
    assert any(each.endswith("/complete") for each in place.hub.requests)
    assert head.files["model.safetensors"] == (merged / "model.safetensors").read_bytes()
    assert {"merge.json", "config.json", "README.md", "tokenizer.json"} <= set(head.files)
    assert all(str(place.folder).encode() not in content for content in head.files.values())
    assert f"merged from adapter {read_json(run / 'run.json')['adapter_sha256'][:12]}" in head.title
    (merged / "model.safetensors").write_bytes(b"damaged")
    answer = run_here("push", merged)
    assert "is not the file that the merge wrote" in read_problems(answer, code=3)[0].what
    assert place.hub.model("ada/merged").head is head


def test_another_run_is_not_replaced_unasked(place: Place, run: Path) -> None:
    answer = place.train("other", "training.seed=1", "output.hub={}")
    assert answer.code == 0, answer.err
    other, head = place.folder / "other", place.hub.model("ada/price").head
    problem = read_problems(run_here("push", other, "--repo", "price"))[0]
    assert "holds the weights of another run" in problem.what
    assert "--overwrite" in problem.fix
    problem = read_problems(place.train("third", "output.hub.repo={user}/price"))[0]
    assert "holds the weights of another run" in problem.what
    assert not (place.folder / "third" / "run.json").exists()
    assert place.hub.model("ada/price").head is head
    answer = run_here("push", other, "--repo", "price", "--overwrite")
    assert answer.code == 0, answer.err
    weights = (other / "adapter" / "adapter_model.safetensors").read_bytes()
    assert place.hub.model("ada/price").head.files["adapter_model.safetensors"] == weights
    place.hub.model("ada/price").branches["main"] = head.sha
    assert run_here("push", run).code == 0  # its own: nothing to ask


def test_a_damaged_adapter_is_not_pushed(place: Place, run: Path) -> None:
    damaged = shutil.copytree(run / "adapter", place.folder / "damaged")
    weights = bytearray((damaged / "adapter_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (damaged / "adapter_model.safetensors").write_bytes(weights)
    assert "have changed since" in read_problems(run_here("push", damaged), code=3)[0].what
    assert ("models", "ada/damaged") not in place.hub.repos


def test_what_looks_like_a_secret_is_not_pushed(place: Place, run: Path) -> None:
    leaky = shutil.copytree(run / "adapter", place.folder / "leaky")
    (leaky / ".env").write_text("HF_TOKEN=x", encoding="utf-8")
    (leaky / "optimizer.pt").write_bytes(b"x")
    assert run_here("push", leaky).code == 0
    assert not {".env", "optimizer.pt"} & set(place.hub.model("ada/leaky").head.files)
    (leaky / "README.md").write_text("my token: hf_" + "a" * 34, encoding="utf-8")
    problem = read_problems(run_here("push", leaky))[0]
    assert "README.md holds what looks like a secret key" in problem.what
    assert "hf_aaa" not in problem.what + problem.fix


def test_a_failed_last_push_is_owed_and_made_up_for(place: Place) -> None:
    place.hub.arm("POST /api/models/ada/owed/commit/", status=403, times=99)
    answer = place.train("owed")
    assert answer.code == 0, answer.err
    assert f"push later with: loralab push {place.folder / 'owed'}" in answer.err
    assert place.record("owed")["hub"]["owed"]
    again = place.train("owed", "--resume")  # still refused: said, and no failure of the run
    assert again.code == 0
    assert "warning: " in again.err
    assert place.record("owed")["hub"]["owed"]
    place.hub.faults.clear()
    again = place.train("owed", "--resume")
    assert again.code == 0, again.err
    assert "pushed to" in again.err
    assert not place.record("owed")["hub"]["owed"]
    assert [each["step"] for each in place.record("owed")["hub"]["pushes"]] == [STEPS]
    assert "nothing to do" in place.train("owed", "--resume").err


def test_pushes_by_steps_need_no_saves(place: Place) -> None:
    saving = "training={max_steps: 6, per_device_train_batch_size: 4, save_strategy: 'no'}"
    answer = place.train("by-steps", saving, "output.hub.strategy=steps", "output.hub.steps=4")
    assert answer.code == 0, answer.err
    pushed = [each["step"] for each in place.record("by-steps")["hub"]["pushes"]]
    assert pushed == [4, STEPS]
    assert [title.split(",")[0] for title in place.titles("ada/by-steps")] == ["loralab: step 4", "loralab: step 6"]


def test_a_run_killed_in_a_push_goes_on_and_pushes(place: Place) -> None:
    process: list[subprocess.Popen[str]] = []
    place.hub.arm("PUT /lfs/", seconds=0.2, then=lambda: process[0].send_signal(signal.SIGKILL))
    options = ("output.hub.strategy=steps", "output.hub.steps=2", "training.seed=2")
    process.append(place.start("train", place.config, f"output.dir={place.folder / 'killed'}", *options))
    process[0].communicate(timeout=120)
    assert process[0].returncode == -signal.SIGKILL
    assert place.record("killed")["status"] == "running"
    assert not place.titles("ada/killed")
    answer = place.train("killed", *options, "--resume")
    assert answer.code == 0, answer.err
    record = place.record("killed")
    assert not record["hub"]["owed"]
    assert f"step {STEPS}" in place.titles("ada/killed")[-1]
    weights = (place.folder / "killed/adapter/adapter_model.safetensors").read_bytes()
    assert place.hub.model("ada/killed").head.files["adapter_model.safetensors"] == weights
    assert not (place.folder / "killed/checkpoints/.pushing").exists()


@pytest.mark.slow  # two processes take half a minute to start on few cores
def test_of_two_processes_one_pushes(place: Place) -> None:
    answers = run_team(
        *("train", place.config, f"output.dir={place.folder / 'team'}", "output.hub.strategy=every_save"),
        folder=place.folder,
    )
    assert [answer.code for answer in answers] == [0, 0], [answer.err for answer in answers]
    titles = place.titles("ada/team")
    assert len(titles) == len(set(titles))
    assert f"step {STEPS}" in titles[-1]
    assert [each["step"] for each in place.record("team")["hub"]["pushes"]][-1] == STEPS
    assert not answers[1].err.count("push")


def test_ctrl_c_in_the_last_push_leaves_a_complete_run(place: Place) -> None:
    process: list[subprocess.Popen[str]] = []
    # The server never answers in the time of this test: what waits for it, hangs.
    place.hub.arm("PUT /lfs/", seconds=600, times=9, then=lambda: process[0].send_signal(signal.SIGINT))
    process.append(place.start("train", place.config, f"output.dir={place.folder / 'stopped'}", "training.seed=3"))
    try:
        out, err = process[0].communicate(timeout=120)
    finally:
        process[0].kill()
    problem = read_problems(Answer(process[0].returncode, out, err), code=130)[0]
    assert "SIGINT" in problem.what
    assert f"the run is complete; push later with: loralab push {place.folder / 'stopped'}" in problem.fix
    record = place.record("stopped")
    assert (record["status"], record["hub"]["owed"]) == ("completed", True)
    place.hub.faults.clear()
    assert run_here("push", place.folder / "stopped").code == 0
    assert not place.record("stopped")["hub"]["owed"]
