"""Reading a configuration: order of sources, origins, and all problems at once."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralab.config.checks import Finding
from loralab.config.load import LoadedConfig, dump_config, field_by_key, load_config, schema_keys
from loralab.config.schema import Config
from loralab.config.training_schema import EarlyStopping
from loralab.errors import ConfigError, Problem

TEXT = """\
model:
  name: tiny
data:
  train: rows.json
"""
MAPPING: dict[str, Any] = {"model": {"name": "tiny"}, "data": {"train": "rows.json"}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "my-run.yaml"


def load(path: Path, text: str, *overrides: str) -> LoadedConfig:
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def problems_of(path: Path, text: str, *overrides: str) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as caught:
        load(path, text, *overrides)
    return caught.value.problems


def test_minimal_file_takes_defaults(path: Path) -> None:
    loaded = load(path, TEXT)
    assert loaded.config == Config.model_validate(MAPPING)
    assert loaded.name == "my-run"


def test_byte_order_mark_is_no_key(path: Path) -> None:
    assert load(path, "\ufeff" + TEXT).config.model.name == "tiny"


@pytest.mark.parametrize(
    ("text", "got"), [("", "nothing"), ("# only this\n", "nothing"), ("- a\n", "list"), ("abc", "str")]
)
def test_file_without_sections(path: Path, text: str, got: str) -> None:
    (problem,) = problems_of(path, text)
    assert problem.what == f"expected sections (model:, data:, ...), got {got}"
    assert problem.where == str(path)


def test_duplicate_key_and_invalid_yaml_stop_the_reading(path: Path) -> None:
    (problem,) = problems_of(path, TEXT + "data:\n  train: other.json\n")
    assert problem.what == "key given twice: 'data' (first on line 3)"
    assert problem.where == f"{path} line 5"
    (problem,) = problems_of(path, "model: [\n")
    assert problem.where.startswith(f"{path} line 2")


@pytest.mark.parametrize(
    ("section", "line", "key", "fix"),
    [
        ("lora:\n  alhpa: 3\n", 6, "lora.alhpa", "did you mean 'alpha'?"),
        ("lora:\n  learning_rate: 3\n", 6, "lora.learning_rate", "did you mean 'training.learning_rate'?"),
        ("output:\n  learning_rte: 3\n", 6, "output.learning_rte", "did you mean 'training.learning_rate'?"),
        ("output:\n  overwrite: true\n", 6, "output.overwrite", "known in output: dir"),
        ("\nlroa:\n  r: 3\n", 6, "lroa", "did you mean 'lora'?"),
        ("learning_rate: 3\n", 5, "learning_rate", "did you mean 'training.learning_rate'?"),
        ("output:\n  zzzzz: 3\n", 6, "output.zzzzz", "known in output: dir"),
        (
            "training:\n  early_stopping:\n    metric: loss\n    patiense: 3\n",
            8,
            "training.early_stopping.patiense",
            "did you mean 'patience'?",
        ),
        ("  image:\n    max_pixel: 3\n", 6, "data.image.max_pixel", "did you mean 'max_pixels'?"),
        ("  image:\n    zzzzz: 3\n", 6, "data.image.zzzzz", "known in data.image: folder, allow_outside"),
        ("  imagee:\n    max_pixels: 3\n", 5, "data.imagee", "did you mean 'image'?"),
        ("  max_pixels: 3\n", 5, "data.max_pixels", "did you mean 'data.image.max_pixels'?"),
        ("image:\n  max_pixels: 3\n", 5, "image", "did you mean 'data.image'?"),
        ("lora:\n  visoin: all\n", 6, "lora.visoin", "did you mean 'vision'?"),
    ],
)
def test_unknown_key_has_line_and_nearest_name(path: Path, section: str, line: int, key: str, fix: str) -> None:
    (problem,) = problems_of(path, TEXT + section)
    assert (problem.what, problem.where) == (f"unknown key: {key!r}", f"{path} line {line}, key {key}")
    assert problem.fix.startswith(fix)
    assert problem.fix == fix or problem.fix.startswith(f"{fix}, ")


def test_missing_keys_are_named(path: Path) -> None:
    found = problems_of(path, "model:\n  revision: main\n")
    assert [problem.what for problem in found] == ["missing key: 'model.name'", "missing key: 'data'"]
    assert found[0].fix == "add it: model: {name: ...}"


def test_wrong_value_tells_value_wish_and_meaning(path: Path) -> None:
    (problem,) = problems_of(path, TEXT + "training:\n  seed: many\n")
    assert problem.what.startswith("training.seed got 'many': input should be a valid integer")
    assert problem.where == f"{path} line 6, key training.seed"
    assert problem.fix == "training.seed: Seed of adapter weights, order of rows and dropout."


def test_weight_without_end_is_refused(path: Path) -> None:
    text = "model:\n  name: tiny\ndata:\n  train: [{path: a.json, weight: 1.0e+308}]\n"
    assert any("less than or equal to 1000" in problem.what for problem in problems_of(path, text))


def test_wrong_value_of_a_union_is_one_problem(path: Path) -> None:
    (problem,) = problems_of(path, TEXT + "  num_workers: -1\n")
    assert problem.what.startswith("data.num_workers got -1: ")
    assert " or " in problem.what


def test_all_problems_at_once(path: Path) -> None:
    text = "model:\n  nam: x\ndata:\n  train: a\nlora:\n  r: 0\n"
    found = problems_of(path, text, "nonsense", "training.seed=x")
    assert [problem.what.partition(":")[0] for problem in found] == [
        "not an override",
        "missing key",
        "unknown key",
        "lora.r got 0",
        "training.seed got 'x'",
    ]


def test_broken_rules_and_checks_of_other_layers_come_together(path: Path) -> None:
    path.write_text(TEXT + "  validation: 1.5\n")
    extra = Finding("model.name", "not here", "look elsewhere")
    with pytest.raises(ConfigError) as caught:
        load_config(path, checks=[lambda config: [extra] if config.model.name == "tiny" else []])
    assert [problem.where for problem in caught.value.problems] == [
        f"{path} line 5, key data.validation",
        f"{path} line 2, key model.name",
    ]


def test_overrides_win_and_the_last_one_most(path: Path) -> None:
    text = TEXT + "training:\n  seed: 1\n  learning_rate: 5e-3\n"
    loaded = load(path, text, "training.seed=2", "training.seed=3", "lora.target_modules=[q_proj, v_proj]")
    assert loaded.config.training.seed == 3
    assert loaded.config.training.learning_rate == 0.005
    assert loaded.config.lora.target_modules == ["q_proj", "v_proj"]
    assert loaded.origin["training.seed"] == loaded.origin["lora.target_modules"] == "command line"
    assert loaded.origin["training.learning_rate"] == f"{path}:7"
    assert loaded.origin["lora.r"] == "default"


def test_override_is_read_as_in_a_file(path: Path) -> None:
    loaded = load(
        path, TEXT, "model.base_dropout=off", "training.max_steps=010", "model.revision=null", "output.dir=a=b"
    )
    assert loaded.config.model.base_dropout == "off"
    assert loaded.config.training.max_steps == 10
    assert loaded.config.model.revision is None
    assert loaded.config.output.dir == "a=b"


@pytest.mark.parametrize("text", ["training.seed", "=5", " =5"])
def test_override_without_key_or_value(path: Path, text: str) -> None:
    (problem,) = problems_of(path, TEXT, text)
    assert problem == Problem(f"not an override: {text!r}", f"command line: {text}", "write section.key=value")


def test_override_below_a_value(path: Path) -> None:
    (problem,) = problems_of(path, TEXT, "model.name.first=x")
    assert problem.what == "'model.name.first' goes below a single value"


def test_override_with_unknown_key_or_bad_value_points_at_the_command_line(path: Path) -> None:
    unknown, bad = problems_of(path, TEXT, "lora.rr=5", "lora.r=-1")[::-1]
    assert unknown.where == "command line, key lora.rr"
    assert bad.where == "command line, key lora.r"


def test_override_of_a_section_replaces_its_origins(path: Path) -> None:
    text = TEXT + "training:\n  early_stopping:\n    metric: loss\n    patience: 2\n"
    loaded = load(path, text, "training.early_stopping={patience: 4, metric: loss}")
    assert loaded.config.training.early_stopping == EarlyStopping(metric="loss", patience=4)
    assert loaded.origin["training.early_stopping.patience"] == "command line"


def test_mapping_and_keyword_overrides_are_arguments() -> None:
    loaded = load_config(MAPPING, {"training.seed": 7, "lora": {"r": 2}}, name="n")
    assert (loaded.config.training.seed, loaded.config.lora.r, loaded.name) == (7, 2, "n")
    assert {key for key, place in loaded.origin.items() if place == "argument"} == {
        "model.name",
        "data.train",
        "training.seed",
        "lora.r",
    }
    assert MAPPING == {"model": {"name": "tiny"}, "data": {"train": "rows.json"}}


def test_overrides_alone_make_a_configuration() -> None:
    loaded = load_config(None, ["model.name=tiny", "data.train=rows.json"])
    assert loaded.config == Config.model_validate(MAPPING)
    assert loaded.name == "run"


def test_a_section_inside_a_section_has_origins_of_its_own(path: Path) -> None:
    text = TEXT + "  image:\n    folder: photos\n    min_pixels: 64\n"
    loaded = load(path, text, "data.image.max_pixels=4096", "data.image.folder=2024")
    image = loaded.config.data.image
    assert (image.folder, image.min_pixels, image.max_pixels) == ("2024", 64, 4096)
    origin = {key.rpartition(".")[2]: place for key, place in loaded.origin.items() if key.startswith("data.image.")}
    given = {"folder": "command line", "min_pixels": f"{path}:7", "max_pixels": "command line"}
    assert origin == given | dict.fromkeys(("allow_outside", "cache_features", "cache_gib"), "default")


@pytest.mark.parametrize("override", [{"data.image": {"min_pixels": 9}}, {"data": {"image": {"min_pixels": 9}}}])
def test_a_section_that_is_replaced_has_no_origins_of_before(path: Path, override: dict[str, Any]) -> None:
    path.write_text(TEXT + "  image:\n    folder: photos\n    min_pixels: 64\n")
    loaded = load_config(path, override)
    assert (loaded.config.data.image.folder, loaded.config.data.image.min_pixels) == (None, 9)
    assert loaded.origin["data.image.min_pixels"] == "argument"
    assert loaded.origin["data.image.folder"] == "default"


def test_only_what_a_mapping_gives_is_an_argument() -> None:
    values = {**MAPPING, "data": {"train": "rows.json", "image": {"max_pixels": 9}}}
    origin = load_config(values).origin
    assert {key for key, place in origin.items() if place == "argument"} == {
        "model.name",
        "data.train",
        "data.image.max_pixels",
    }


def test_wrong_value_inside_a_section_of_a_section_has_its_line(path: Path) -> None:
    (problem,) = problems_of(path, TEXT + "  image:\n    folder: photos\n    cache_features: maybe\n")
    assert problem.what.startswith("data.image.cache_features got 'maybe': ")
    assert problem.where == f"{path} line 7, key data.image.cache_features"
    (problem,) = problems_of(path, TEXT, "data.image=5")
    assert problem.where == "command line, key data.image"
    (problem,) = problems_of(path, TEXT, "data.image.min_pixels.x=5", "data.image.min_pixels=0")
    assert problem.where == "command line, key data.image.min_pixels"


def test_path_that_cannot_be_one_inside_a_section_of_a_section(path: Path) -> None:
    (problem,) = problems_of(path, TEXT, f"data.image.folder={'x' * 300}")
    assert problem.where == "command line, key data.image.folder"


@pytest.mark.parametrize(
    "stopping", ["", "training:\n  early_stopping:\n    patience: 2\n    metric: loss\n    min_delta: 0\n"]
)
def test_every_schema_key_has_an_origin(path: Path, stopping: str) -> None:
    origin = load(path, TEXT + stopping).origin
    wanted = schema_keys()
    if not stopping:  # the section is null: it has an origin, its fields have none
        null = "training.early_stopping"
        wanted = [*dict.fromkeys(null if k.startswith(f"{null}.") else k for k in wanted)]
    assert list(origin) == wanted
    assert {key for key, place in origin.items() if place != "default"} == {"model.name", "data.train"} | {
        f"training.early_stopping.{name}" for name in ("metric", "patience", "min_delta") if stopping
    }
    assert origin["data.train"] == f"{path}:4"


def test_missing_file_suggests_a_neighbour(path: Path) -> None:
    path.write_text(TEXT)
    with pytest.raises(ConfigError, match=r"no such file: .*my-rum.yaml") as caught:
        load_config(path.with_name("my-rum.yaml"))
    assert caught.value.problems[0].fix == f"did you mean {str(path)!r}?"


def test_file_that_is_no_text_or_a_folder(path: Path) -> None:
    path.write_bytes(b"model: \xff\n")
    with pytest.raises(ConfigError, match=r"not UTF-8 text \(byte 7\)"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"cannot read .*: Is a directory"):
        load_config(path.parent)


FULL: dict[str, Any] = {
    "model": {
        "name": "a: b #c",
        "revision": "null",
        "precision": "bfloat16",
        "device": "cuda:1",
        "base_dropout": "off",
    },
    "data": {
        "train": ["a.json", "off", "010"],
        "validation": 0.1,
        "test": 3,
        "columns": {"prompt": "Frage: ü"},
        "stop_tokens": ["<|end|>", "yes", "~"],
        "num_workers": 0,
        "image": {"folder": "~/a b", "max_pixels": 65536, "cache_features": False},
    },
    "lora": {"target_modules": ["q", "v"], "alpha": 1e-05},
    "training": {"learning_rate": 1e-20, "lr_scheduler_type": "cosine", "early_stopping": {"metric": "loss"}},
    "advanced": {"trainer_args": {"adam_beta1": 0.5, "lr_scheduler_kwargs": {"num_cycles": 2}}},
}


@pytest.mark.parametrize("values", [MAPPING, FULL])
def test_dumped_configuration_reads_back_equal(path: Path, values: dict[str, Any]) -> None:
    config = load_config(values).config
    again = load(path, dump_config(config))
    assert again.config == config
    assert all(place.startswith(str(path)) for place in again.origin.values())


@given(text=st.text(st.characters(exclude_categories=["Cs", "Nd"]), min_size=1))
def test_dumped_text_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    data = {"train": ["f"], "columns": {"prompt": text}, "stop_tokens": [text]}  # no paths: not all texts are one
    config = Config.model_validate({"model": {"name": "m", "revision": text}, "data": data})
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    assert load(path, dump_config(config)).config == config


def test_every_key_leads_to_its_field() -> None:
    assert [key for key in schema_keys() if field_by_key(key) is None] == []
    assert field_by_key("training.early_stopping.patience").default == 3
    assert field_by_key("training.nothing") is None


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("model.name=2024", "2024"),
        ("model.name=007", "007"),
        ("model.name='2024'", "2024"),
        ("model.name={a}", "{a}"),
        ("model.revision=1e10", "1e10"),
        ("model.revision=null", None),
        ("output.dir=true", "true"),
        ("data.train=2024", "2024"),
        ("data.train=[a, b]", ["a", "b"]),
        ("data.validation=7", 7),
        ("training.max_steps=7", 7),
    ],
)
def test_text_of_an_override_stays_text(override: str, value: Any) -> None:
    section, _, name = override.partition("=")[0].partition(".")
    config = load_config({"model": {"name": "m"}, "data": {"train": "f"}}, [override]).config
    assert getattr(getattr(config, section), name) == value


def test_brackets_without_end_on_the_command_line() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"model": {"name": "m"}, "data": {"train": "f"}}, ["data.train=" + "[" * 5000])
    assert "name of 5000 bytes in the path '[[[" in caught.value.problems[0].what


def test_number_of_too_many_digits_on_the_command_line() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"model": {"name": "m"}, "data": {"train": "f"}}, [f"training.seed={'1' * 5000}"])
    assert caught.value.problems[0].where.startswith("command line")


def test_a_value_near_one_of_the_choices_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"model": {"name": "m"}, "data": {"train": "f"}, "lora": {"variant": "doraa"}})
    assert caught.value.problems[0].fix == "did you mean 'dora'? lora.variant: Kind of adapter."
    with pytest.raises(ConfigError) as caught:
        load_config({"model": {"name": "m"}, "data": {"train": "f"}, "lora": {"variant": "xyzzy"}})
    assert caught.value.problems[0].fix == "lora.variant: Kind of adapter."
