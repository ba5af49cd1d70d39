"""What a push says: the command that takes it up again, and that files arrived."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loralab.errors import StoppedBySignal
from loralab.progress import Reporter
from loralab.workflows import push as workflow
from loralab.workflows.hub_pushes import push_command
from loralab.workflows.push import PushRequest, push
from support.hub_client import talking_to
from support.hub_server import USER, HubServer

USE = "loralab generate path/to/this/adapter --prompt 'Your question'"


class Listener(Reporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server, talking_to(server, tmp_path / "home"):
        yield server


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "my adapter"
    folder.mkdir()
    save_file({"layer.lora_A.weight": torch.ones(2, 3)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "meta/tiny"}))
    (folder / "README.md").write_text(f"# Card\n\n{USE}\n")
    return folder


@pytest.mark.parametrize(
    ("request_", "options"),
    [
        (PushRequest(), ""),
        (PushRequest(repo="mine"), " --repo mine"),
        (
            PushRequest("mine", private=False, revision="try out", create_pr=True, overwrite=True),
            " --repo mine --public --revision 'try out' --create-pr --overwrite",
        ),
        (PushRequest(private=True), " --private"),
    ],
)
def test_the_same_command_takes_it_up_again(request_: PushRequest, options: str) -> None:
    assert push_command(Path("my adapter"), request_.options) == f"loralab push 'my adapter'{options}"


def test_the_card_of_a_merged_model_names_its_repository(hub: HubServer, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    merged.mkdir()
    save_file({"weight": torch.ones(2, 3)}, merged / "model.safetensors")
    for name in ("config.json", "merge.json"):
        (merged / name).write_text("{}")
    (merged / "README.md").write_text('folder = "path/to/this/model"\n')
    push(merged, PushRequest("mine"), reporter=Reporter())
    assert hub.model(f"{USER}/mine").head.files["README.md"] == f'folder = "{USER}/mine"\n'.encode()
    assert (merged / "README.md").read_text() == 'folder = "path/to/this/model"\n'


@pytest.mark.usefixtures("hub")
def test_ctrl_c_names_the_command_with_its_options(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(workflow, "push_files", stopped)
    with pytest.raises(StoppedBySignal) as caught:
        push(adapter, PushRequest("mine", private=True), reporter=Reporter())
    assert f"loralab push '{adapter}' --repo mine --private;" in caught.value.problems[0].fix


def test_the_end_says_how_many_files_were_compared(
    hub: HubServer, adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    listener, again = Listener(), Listener()
    result = push(adapter, PushRequest("mine"), reporter=listener)
    assert result["repo"] == f"{USER}/mine"
    there = hub.model(f"{USER}/mine").head.files["README.md"].decode()
    assert f"hf download {USER}/mine --local-dir mine\nloralab generate mine --prompt 'Your question'\n" in there
    assert USE in (adapter / "README.md").read_text()  # linked to what was pushed, and not changed
    line = f"all {len(result['files'])} files are in the repository as they are here, compared by hash"
    assert listener.said[-1] == line
    with caplog.at_level(logging.WARNING):
        push(adapter, PushRequest("mine"), reporter=again)
    assert again.said[-1] == line
    assert "No files have been modified" not in caplog.text
