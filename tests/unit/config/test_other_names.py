"""Names that other programs have for our settings: each leads to a key, and none is a key itself where it is met."""

import pytest

from loralab.config.load import field_by_key, load_config
from loralab.config.other_names import OTHER_NAMES
from loralab.config.training_schema import TrainingConfig
from loralab.errors import ConfigError

WHOLE = {"model": {"name": "base"}, "data": {"train": "rows.jsonl"}}


def test_every_name_leads_to_a_key() -> None:
    assert [key for key in OTHER_NAMES.values() if field_by_key(key) is None] == []


def test_no_name_leads_to_itself() -> None:
    assert [name for name, key in OTHER_NAMES.items() if key.rpartition(".")[2] == name] == []
    assert not set(OTHER_NAMES) & set(TrainingConfig.model_fields)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("lora.rank=8", "lora.r"),
        ("lora_r=8", "lora.r"),
        ("training.lr=1e-4", "training.learning_rate"),
        ("training.batch_size=4", "training.per_device_train_batch_size"),
        ("training.epochs=3", "training.num_train_epochs"),
        ("load_in_4bit=true", "model.quantization"),
        ("training.bf16=true", "model.precision"),
        ("sequence_len=512", "data.max_length"),
        ("advanced.trainer_args.bf16=true", "model.precision"),
    ],
)
def test_the_key_here_is_named(override: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(WHOLE, overrides=[override])
    (problem,) = caught.value.problems
    assert key in problem.fix
    assert "did you mean" not in problem.fix


def test_a_name_that_is_a_key_elsewhere_is_taken_there() -> None:
    assert load_config(WHOLE, overrides=["evaluation.batch_size=2"]).config.evaluation.batch_size == 2
