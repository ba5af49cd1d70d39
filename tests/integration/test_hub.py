"""Document 5 from end to end, against a Hub on the loopback: fetch, train, push, lose the Hub, push again, load."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from support import tiny
from support.command import Answer, read_problems, run_here, write_config
from support.hub_client import talking_to
from support.hub_server import READER, USER, WRITER, HubServer

BASE, DATA = "meta/tiny", "ed/prices"
_README = "---\nconfigs:\n- config_name: default\n  data_files:\n" + "".join(
    f"  - split: {split}\n    path: {split}.jsonl\n" for split in ("train", "val", "test")
)
# Waits are the client's own business; the story is the same without them.
_PROGRAM = (
    "import sys\nfrom loralab.hub import upload\nupload.FIRST_WAIT_SECONDS = 0.01\n"
    "from loralab.cli import main\nsys.argv[0] = 'loralab'\nmain()\n"
)
_LOADS = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, commit, repo, local = sys.argv[1:]
rows = torch.arange(1, 40).reshape(3, 13)
def logits(adapter):
    model = AutoModelForCausalLM.from_pretrained(base, revision=commit, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).eval()(input_ids=rows).logits
bare = AutoModelForCausalLM.from_pretrained(base, revision=commit, dtype=torch.float32)(input_ids=rows).logits
there, here = logits(repo), logits(local)
print(json.dumps({"equal": torch.equal(there, here), "moved": not torch.equal(there, bare)}))
"""


def price_rows(count: int, seed: int) -> bytes:
    draw = random.Random(seed)
    rows = [{"prompt": f"red cat {draw.randint(1, 999)}\n\nPrice is $", "completion": f"{i}.99"} for i in range(count)]
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def run_program(hub: HubServer, home: Path, program: str, *arguments: object, token: str | None = WRITER) -> Answer:
    environment = {k: v for k, v in os.environ.items() if k != "HF_TOKEN"} | hub.environment(home, token)
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        cwd=home.parent,
    )
    return Answer(done.returncode, done.stdout, done.stderr)


@dataclass(frozen=True)
class Story:
    """What the run, whose Hub went away, and the push after it left behind."""

    hub: HubServer
    home: Path
    run: Path
    config: Path
    trained: Answer
    pushed: Answer
    before: dict[str, object]
    commits: int

    @property
    def record(self) -> dict[str, object]:
        return json.loads((self.run / "run.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("hub")
    with HubServer() as hub:
        hub.add_folder("models", BASE, tiny.save_base(folder / "base"))
        hub.model(BASE).commit("card", {"README.md": b"---\nlicense: llama3.2\n---\n"})
        rows = {"train.jsonl": price_rows(80, 0), "val.jsonl": price_rows(20, 1), "test.jsonl": price_rows(8, 2)}
        hub.add("datasets", DATA, {"README.md": f"{_README}---\n".encode(), **rows})
        settings = {
            "model": {"name": BASE, "precision": "float32", "device": "cpu", "quantization": "nf4"},
            "data": {
                "train": DATA,
                "validation": f"{DATA}#val[:5]",
                "test": "test",
                "format": "prompt_completion",
                "template": "none",
                "max_length": 64,
                "cache_dir": str(folder / "cache"),
            },
            "lora": {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
            "training": {
                "max_steps": 20,
                "per_device_train_batch_size": 4,
                "save_strategy": "steps",
                "save_steps": 5,
                "learning_rate": 1e-2,
            },
            "evaluation": {"num_samples": 0, "bootstrap_samples": 200, "metrics": ["number"], "max_new_tokens": 4},
            "output": {
                "dir": str(folder / "run"),
                "hub": {"repo": "{user}/price-{timestamp}", "strategy": "every_save"},
            },
        }
        config = write_config(folder / "price.yaml", settings)
        commits: list[str] = []

        def go_away() -> None:
            commits.append("second")
            if len(commits) == 2:
                hub.stop()

        hub.arm("POST /api/models/ada/.*/commit/", times=2, then=go_away)
        hub.arm("POST /api/models/ada/.*/commit/", status=0)
        trained = run_program(hub, folder / "home", _PROGRAM, "train", config)
        before = json.loads((folder / "run" / "run.json").read_text(encoding="utf-8"))
        hub.faults.clear()
        hub.start()
        hub.model(BASE).commit("moved on", {"config.json": b"{}"})
        with talking_to(hub, folder / "home"):
            pushed = run_here("push", folder / "run", "--json")
        yield Story(
            hub,
            folder / "home",
            folder / "run",
            config,
            trained,
            pushed,
            before,
            len(hub.model(before["hub"]["repo"]).commits),
        )


def test_a_hub_that_goes_away_does_not_stop_the_run(story: Story) -> None:
    assert story.trained.code == 0, story.trained.err
    assert story.before["status"] == "completed"
    assert story.before["hub"]["owed"]
    assert story.before["hub"]["pushes"]
    assert story.before["hub"]["failures"]
    assert f"push later with: loralab push {story.run}" in story.trained.err
    assert "Traceback" not in story.trained.err


def test_a_later_push_brings_up_what_is_owed(story: Story) -> None:
    assert story.pushed.code == 0, story.pushed.err
    result, repo = json.loads(story.pushed.out), story.record["hub"]["repo"]
    assert repo == story.before["hub"]["repo"]
    assert repo.startswith(f"{USER}/price-20")
    assert result["commit"] == story.hub.model(repo).head.sha
    assert not story.record["hub"]["owed"]
    files = story.hub.model(repo).head.files
    assert files["adapter_model.safetensors"] == (story.run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert story.record["adapter_sha256"][:12] in story.hub.model(repo).head.title
    assert "step 20" in story.hub.model(repo).head.title
    assert story.hub.model(repo).private


def test_commits_of_model_and_data_are_recorded_and_kept(story: Story) -> None:
    base = story.hub.model(BASE)
    used = base.history("main")[1].sha  # before it moved on
    assert story.record["model"]["revision"] == used
    data = story.hub.repos[("datasets", DATA)].head.sha
    assert [pin["commit"] for pin in story.record["revisions"]["data"]] == [data]
    config = yaml.safe_load((story.run / "config.yaml").read_text(encoding="utf-8"))
    assert config["model"]["revision"] == used
    assert config["data"]["train"] == f"{DATA}@{data}"
    assert config["data"]["validation"] == f"{DATA}@{data}#val[:5]"
    pushed = json.loads(story.hub.model(story.record["hub"]["repo"]).head.files["adapter_config.json"])
    assert (pushed["base_model_name_or_path"], pushed["revision"]) == (BASE, used)


def test_the_card_is_one_that_the_hub_takes(story: Story) -> None:
    text = story.hub.model(story.record["hub"]["repo"]).head.files["README.md"].decode()
    card = ModelCard(text)
    assert card.data.license == "llama3.2"
    assert card.data.datasets == [DATA]
    assert card.data.eval_results
    assert {each.metric_type for each in card.data.eval_results} >= {"loss", "number_mae"}
    assert "Not tested" in text
    assert str(story.run.parent) not in text


def test_the_token_is_nowhere(story: Story) -> None:
    assert WRITER not in story.trained.out + story.trained.err + story.pushed.out + story.pushed.err
    for path in (*story.run.rglob("*"), *story.run.parent.glob("cache/**/*")):
        assert path.is_dir() or WRITER.encode() not in path.read_bytes(), path
    for repo in story.hub.repos.values():
        assert all(WRITER.encode() not in data for commit in repo.commits.values() for data in commit.files.values())


def test_peft_loads_adapter_and_base_from_there(story: Story) -> None:
    record = story.record
    commit = record["model"]["revision"]
    answer = run_program(story.hub, story.home, _LOADS, BASE, commit, record["hub"]["repo"], story.run / "adapter")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out.splitlines()[-1]) == {"equal": True, "moved": True}


@pytest.mark.parametrize(
    ("request_", "status", "said"),
    [
        (f"GET /api/models/{BASE}", 404, "HTTP 404"),
        (f"GET /api/models/{BASE}", 403, "HTTP 403"),
        (f"GET /api/models/{BASE}", 429, "too many requests"),
        (f"GET /api/datasets/{DATA}", 500, "the Hub has a problem"),
        # The client itself tries a cut download again for 20 s.
        pytest.param(f"GET /{BASE}/resolve/", 0, f"the model {BASE!r}", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_fetched_is_three_lines(
    story: Story, tmp_path: Path, request_: str, status: int, said: str
) -> None:
    story.hub.arm(request_, status=status, times=999)
    try:
        with talking_to(story.hub, tmp_path / "home"):
            answer = run_here("train", story.config, f"output.dir={tmp_path / 'run'}", "output.hub={}")
    finally:
        story.hub.faults.clear()
    problem = read_problems(answer)[0]
    assert said in problem.what
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(
    ("token", "repo", "said"),
    [
        (None, "{user}/x", "there is no Hub token"),
        ("hf_wrongwrongwrongwrong", "{user}/x", "HTTP 401"),
        (READER, "{user}/x", "can only read"),
        (WRITER, "someone/x", "HTTP 403"),
    ],
)
def test_a_token_that_cannot_push_is_told_before_training(
    story: Story, tmp_path: Path, token: str | None, repo: str, said: str
) -> None:
    story.hub.requests.clear()
    with talking_to(story.hub, tmp_path / "home", token=token):
        answer = run_here("train", story.config, f"output.dir={tmp_path / 'run'}", f"output.hub.repo={repo}")
    problem = read_problems(answer)[0]
    assert said in problem.what
    assert not (tmp_path / "run" / "run.json").exists()
    assert not any(BASE in request for request in story.hub.requests)
