"""What trackers hold after a run, and after one that was stopped: the figures of metrics.jsonl, each once."""

import importlib
import json
import shutil
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import loralab
from loralab.errors import ConfigError, StoppedBySignal
from support import tiny
from support.reporters import Notes, StopAt

SECRET = "hf_" + "s3cr3t" * 6
KEY = "0123456789abcdef" * 3
Read = dict[tuple[str, int], list[float]]


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "HOME": str(tmp_path / "home"),
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_API_KEY": KEY,
        "WANDB_CACHE_DIR": str(tmp_path / "home"),
        "MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "HF_TOKEN": SECRET,
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_DIR", "WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_PROJECT", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(name, raising=False)


def configure(folder: Path, *trackers: str, **training: Any) -> dict[str, Any]:
    base = folder / "base" if (folder / "base").exists() else tiny.save_base(folder / "base")
    rows = tiny.write_rows(folder / "rows.json", tiny.alpaca_rows(28))
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    config = tiny.run_config(
        base,
        rows,
        folder / "run",
        data={"validation": 8},
        training=steps | training,
        evaluation={"num_samples": 0, "bootstrap_samples": 50, "strategy": "steps", "steps": 2},
    )
    config["output"]["trackers"] = list(trackers)
    return config


def wanted(run: Path) -> Read:
    """Return the figures of metrics.jsonl by name and step."""
    found: Read = {}
    for text in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        for key, value in line.items():
            if key != "step" and value is not None:
                found.setdefault((key, line["step"]), []).append(value)
    return found


def check(read: Read, run: Path, *, places: float = 0.0) -> None:
    """Compare what a tracker holds with the run's own files; a speed of a step that ran twice may be of either."""
    expected = wanted(run)
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert read.pop(("final/eval_loss", 4)) == [pytest.approx(evaluation["eval_loss"], rel=places)]
    assert read.pop(("base/eval_loss", 4)) == [pytest.approx(evaluation["base"]["eval_loss"], rel=places)]
    read = {key: values for key, values in read.items() if not key[0].startswith(("final/", "base/"))}
    assert read.keys() == expected.keys()
    for (name, step), values in expected.items():
        got = read[name, step]
        if name == "epoch":  # lines of training and evaluation both have it
            assert all(value == pytest.approx(values[0], rel=places, abs=places) for value in got)
            continue
        assert len(got) == 1, f"{name} of step {step} is there {len(got)} times"
        if name != "tokens_per_second":
            assert got == [pytest.approx(values[0], rel=places, abs=places)], f"{name} of step {step}"


def read_tensorboard(folder: Path) -> Read:
    module = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(folder / "run/trackers/tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found: Read = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            found.setdefault((tag, event.step), []).append(event.value)
    text = next(tag for tag in events.Tags()["tensors"] if tag.startswith("config"))
    assert len(events.Tensors(text)) == 1
    assert b'"learning_rate": 0.01' in events.Tensors(text)[0].tensor_proto.string_val[0]
    return found


def read_mlflow(folder: Path) -> Read:
    client = importlib.import_module("mlflow.tracking").MlflowClient((folder / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("loralab")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["training.learning_rate"] == "0.01"
    found: Read = {}
    for key in run.data.metrics:
        for each in client.get_metric_history(run.info.run_id, key):
            found.setdefault((key, each.step), []).append(each.value)
    return found


def read_trackio(folder: Path) -> Read:
    found: Read = {}
    with sqlite3.connect(folder / "trackio/loralab.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    assert rows[0][0].startswith("run-")
    for _, step, text in rows:
        for key, value in json.loads(text).items():
            found.setdefault((key, step), []).append(value)
    return found


def read_wandb(folder: Path) -> Read:
    files = sorted((folder / "run/trackers/wandb").glob("offline-run-*/run-*.wandb"))
    assert len({path.name for path in files}) == 1  # one run, however often it was started
    found: Read = {}
    for record in (record for path in files for record in _wandb_records(path)):
        if record.WhichOneof("record_type") != "history":
            continue
        items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for key, value in items.items():
            if not key.startswith("_") and key != "step":
                found.setdefault((key, items["step"]), []).append(value)
    return found


def _wandb_records(path: Path) -> Iterator[Any]:
    """Yield what a file of wandb holds: a log of blocks, as LevelDB writes it, behind a header of 7 bytes."""
    kind = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, part = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if part in (1, 4):  # whole, or the last part
            record = kind()
            record.ParseFromString(parts)
            yield record
        if part in (0, 1, 4):
            parts = b""


READERS: dict[str, Callable[[Path], Read]] = {
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
}


def check_no_secret(folder: Path) -> None:
    for path in filter(Path.is_file, folder.rglob("*")):
        content = path.read_bytes()
        assert SECRET.encode() not in content, path
        assert KEY.encode() not in content, path


@pytest.mark.parametrize("name", READERS)
def test_a_stopped_run_goes_on_in_its_tracker(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name)
    config = configure(tmp_path, name)
    with pytest.raises(StoppedBySignal):
        loralab.train(config, reporter=StopAt(3))
    shutil.rmtree(tmp_path / "run/checkpoints/checkpoint-3")  # as if a kill had come before it was written
    loralab.train(config, resume=True)
    # TensorBoard holds 32-bit floats; the others keep every digit.
    check(READERS[name](tmp_path), tmp_path / "run", places=1e-6 if name == "tensorboard" else 0.0)
    check_no_secret(tmp_path)
    if name == "tensorboard":  # another run in the folder begins anew
        loralab.train(config, overwrite=True)
        check(READERS[name](tmp_path), tmp_path / "run", places=1e-6)


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{SECRET}@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    notes = Notes()
    loralab.train(configure(tmp_path, "mlflow"), reporter=notes)
    assert len([text for text in notes.said if "tracker mlflow failed" in text]) == 1
    record = json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))
    assert record["status"] == "completed"
    assert any("tracker mlflow failed" in event["what"] for event in record["events"])
    check_no_secret(tmp_path)


def test_nothing_is_tracked_unasked(tmp_path: Path) -> None:
    """A process of its own: what is imported there is imported by the run."""
    config = configure(tmp_path)
    program = "import json, sys, loralab; loralab.train(json.loads(sys.argv[1])); print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(config)], capture_output=True, text=True, check=True
    )
    assert not {"tensorboard", "wandb", "mlflow", "trackio"} & set(done.stdout.split())
    assert not (tmp_path / "run/trackers").exists()
    assert not (tmp_path / "trackio").exists()
    assert not (tmp_path / "mlruns").exists()


def test_a_package_that_is_missing_is_said_before_any_data_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "wandb" else object())
    config = configure(tmp_path, "wandb")
    config["data"]["train"] = str(tmp_path / "rows.json")
    (tmp_path / "rows.json").write_text("no rows")
    with pytest.raises(ConfigError, match="wandb is not installed") as caught:
        loralab.train(config)
    assert "pip install 'loralab[wandb]'" in caught.value.problems[0].fix
    assert not (tmp_path / "run").exists()
