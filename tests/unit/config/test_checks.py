"""Rules that span fields: each broken once, with its key where the user looks."""

import inspect
import math
import typing
from typing import Any

import pytest
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from loralab.config.checks import ADAM_TERMS, RULES, SCHEDULE_TERMS, TRAINER_ARGS, check_config
from loralab.config.load import field_by_key, load_config
from loralab.config.other_names import OTHER_NAMES
from loralab.config.schema import Config
from loralab.errors import ConfigError

Values = dict[str, dict[str, Any]]

# (name of the rule, sections, keys that it must name in order, a part of what and fix)
BROKEN: list[tuple[str, Values, list[str], str]] = [
    ("_check_splits", {"data": {"validation": 1.5}}, ["data.validation"], "fraction: 1.5"),
    ("_check_splits", {"data": {"validation": 0.0}}, ["data.validation"], "fraction: 0.0"),
    ("_check_splits", {"data": {"test": 0}}, ["data.test"], "number of rows: 0"),
    ("_check_splits", {"data": {"validation": -3, "test": 1.0}}, ["data.validation", "data.test"], "rows: -3"),
    (
        "_check_weights",
        {"data": {"validation": [{"path": "v.json", "weight": 2}], "test": ["a", {"path": "t.json", "weight": 0.5}]}},
        ["data.validation", "data.test"],
        "weight 2.0 of 'v.json': only training rows are drawn by weight",
    ),
    ("_check_train_on", {"data": {"train_on": []}}, ["data.train_on"], "names no role"),
    ("_check_train_on", {"data": {"train_on": ["user", "tool", "user"]}}, ["data.train_on"], "names 'user' twice"),
    ("_check_precision", {"model": {"precision": "float16", "device": "cpu"}}, ["model.precision"], "bfloat16"),
    (
        "_check_quantization",
        {"model": {"quantization": "int8", "double_quantization": False}},
        ["model.double_quantization"],
        "int8, whose scales are never quantized",
    ),
    (
        "_check_quantization",
        {"model": {"quantization": "nf4", "device": "mps"}},
        ["model.quantization"],
        "nf4 on mps: it is offered on cuda and cpu",
    ),
    (
        "_check_quantized_parts",
        {"model": {"quantization": "nf4"}, "training": {"distributed": "fsdp2"}},
        ["training.distributed"],
        "packed weights and their scales belong together",
    ),
    (
        "_check_parts_on_devices",
        {"model": {"device_map": "auto"}, "training": {"distributed": "fsdp2"}},
        ["model.device_map"],
        "device_map auto with fsdp2",
    ),
    (
        "_check_moments_in_parts",
        {"training": {"distributed": "zero2", "optim": "adafactor"}},
        ["training.optim"],
        "set training.optim: adamw_torch",
    ),
    (
        "_check_optimizer",
        {"model": {"device": "cpu"}, "training": {"optim": "paged_adamw_8bit"}},
        ["training.optim"],
        "only the memory of a CUDA device is paged set training.optim: adamw_8bit",
    ),
    ("_check_warmup", {"training": {"warmup_ratio": 0.1, "warmup_steps": 5}}, ["training.warmup_steps"], "0.1"),
    (
        "_check_warmup",
        {"training": {"warmup_steps": 5, "max_steps": 5, "lr_scheduler_type": "polynomial"}},
        ["training.warmup_steps"],
        "warm-up of 5 steps in a run of 5",
    ),
    (
        "_check_validation_needs",
        {"training": {"load_best_model_at_end": True}},
        ["training.load_best_model_at_end"],
        "data.validation is null",
    ),
    (
        "_check_validation_needs",
        {
            "data": {"validation": 0.1},
            "evaluation": {"strategy": "no"},
            "training": {"early_stopping": {"metric": "perplexity"}},
        },
        ["training.early_stopping.metric"],
        "evaluation.strategy is no",
    ),
    (
        "_check_validation_needs",
        {"evaluation": {"strategy": "steps"}},
        ["evaluation.strategy"],
        "data.validation is null",
    ),
    (
        "check_watched",
        {"data": {"validation": 0.1}, "training": {"early_stopping": {"metric": "eval_los"}}},
        ["training.early_stopping.metric"],
        "did you mean 'eval_loss'?",
    ),
    (
        "check_watched",
        {
            "data": {"validation": 0.1},
            "training": {"load_best_model_at_end": True, "early_stopping": {"metric": "loss"}},
        },
        ["training.early_stopping.metric"],
        "set it to eval_loss",
    ),
    (
        "check_watched",
        {"data": {"validation": 0.1}, "training": {"metric_for_best_model": "eval_loss"}},
        ["training.metric_for_best_model"],
        "load_best_model_at_end: true",
    ),
    (
        "check_watched",
        {"data": {"validation": 0.1}, "training": {"load_best_model_at_end": True, "metric_for_best_model": "loss"}},
        ["training.metric_for_best_model"],
        "set it to eval_loss",
    ),
    (
        "check_watched",
        {
            "data": {"validation": 0.1},
            "training": {
                "load_best_model_at_end": True,
                "metric_for_best_model": "bleu",
                "early_stopping": {"metric": "chrf"},
            },
        },
        ["training.metric_for_best_model"],
        "watch one metric",
    ),
    (
        "check_watched",
        {"data": {"validation": 0.1}, "training": {"early_stopping": {"metric": "yes_no_macro_f2"}}},
        ["training.early_stopping.metric"],
        "did you mean 'yes_no_macro_f1'?",
    ),
    (
        "check_watched",
        {
            "data": {"validation": 0.1},
            "evaluation": {"metrics": ["bleu"]},
            "training": {"early_stopping": {"metric": "rouge1"}},
        },
        ["training.early_stopping.metric"],
        "add rouge to evaluation.metrics",
    ),
    (
        "check_watched",
        {"data": {"validation": 0.1}, "training": {"early_stopping": {"metric": "token_entropy"}}},
        ["training.early_stopping.metric"],
        "mode: min or max",
    ),
    (
        "check_watched",
        {"data": {"validation": 0.1}, "training": {"early_stopping": {"metric": "bleu", "mode": "min"}}},
        ["training.early_stopping.mode"],
        "a higher bleu is better",
    ),
    (
        "check_watched",
        {"data": {"validation": 0.1}, "training": {"early_stopping": {"mode": "max"}}},
        ["training.early_stopping.mode"],
        "a lower eval_loss is better",
    ),
    (
        "check_names",
        {"data": {"validation": 0.1}, "evaluation": {"metrics": ["rogue"]}},
        ["evaluation.metrics"],
        "did you mean 'rouge'?",
    ),
    (
        "check_names",
        {"data": {"validation": 0.1}, "evaluation": {"metrics": ["rougeL"]}},
        ["evaluation.metrics"],
        "did you mean 'rouge'?",
    ),
    (
        "check_names",
        {"data": {"validation": 0.1}, "evaluation": {"metrics": ["bleu", "bleu"]}},
        ["evaluation.metrics"],
        "named twice",
    ),
    (
        "check_names",
        {"data": {"validation": 0.1}, "evaluation": {"metrics": ["my-metrics:score"]}},
        ["evaluation.metrics"],
        "write package.module:function",
    ),
    (
        "check_names",
        {"data": {"validation": 0.1}, "evaluation": {"metrics": ["metrics:"]}},
        ["evaluation.metrics"],
        "write package.module:function",
    ),
    (
        "check_names",
        {"data": {"validation": 0.1}, "evaluation": {"metrics": ["mine:eval_loss"]}},
        ["evaluation.metrics"],
        "give the function another name",
    ),
    (
        "check_names",
        {"data": {"validation": 0.1}, "evaluation": {"metrics": ["mine:base"]}},
        ["evaluation.metrics"],
        "another one's name",
    ),
    (
        "check_ways",
        {"data": {"validation": 0.1}, "evaluation": {"metrics": ["calibration"], "answer_by": "generate"}},
        ["evaluation.metrics"],
        "leave calibration out",
    ),
    (
        "check_ways",
        {
            "data": {"validation": 0.1},
            "evaluation": {"metrics": ["perplexity"], "answer_by": "score", "metric_rows": 5},
        },
        ["evaluation.answer_by", "evaluation.metric_rows"],
        "no metric in evaluation.metrics needs answers",
    ),
    (
        "check_ways",
        {"data": {"validation": 0.1}, "evaluation": {"metrics": ["stop_rate"], "answer_by": "teacher_forced"}},
        ["evaluation.metrics"],
        "set evaluation.answer_by: generate",
    ),
    (
        "check_ways",
        {"data": {"validation": 0.1}, "evaluation": {"metrics": ["length"], "labels": ["a", "b"]}},
        ["evaluation.metrics"],
        "answers come by score",
    ),
    (
        "check_ways",
        {"data": {"validation": 0.1}, "evaluation": {"metrics": ["calibration", "stop_rate"]}},
        ["evaluation.metrics"],
        "set evaluation.answer_by: generate",
    ),
    (
        "check_ways",
        {
            "data": {"validation": 0.1},
            "evaluation": {"metrics": ["yes_no"], "answer_by": "generate", "labels": ["yes", "no"]},
        },
        ["evaluation.labels"],
        "no effect with answer_by generate",
    ),
    (
        "check_ways",
        {"data": {"validation": 0.1}, "evaluation": {"metrics": ["yes_no"], "labels": ["yes"]}},
        ["evaluation.labels"],
        "name two or more",
    ),
    (
        "check_ways",
        {"data": {"validation": 0.1}, "evaluation": {"metrics": ["yes_no"], "labels": ["yes", " "]}},
        ["evaluation.labels"],
        "without text",
    ),
    (
        "check_ways",
        {"data": {"validation": 0.1}, "evaluation": {"metrics": ["yes_no"], "labels": ["yes", "Yes "]}},
        ["evaluation.labels"],
        "stands twice",
    ),
    (
        "_check_trainer_args",
        {"advanced": {"trainer_args": {"bf16": True}}},
        ["advanced.trainer_args.bf16"],
        "use model.precision",
    ),
    (
        "_check_trainer_args",
        {"advanced": {"trainer_args": {"learning_rate": 1}}},
        ["advanced.trainer_args.learning_rate"],
        "use training.learning_rate",
    ),
    (
        "_check_trainer_args",
        {"advanced": {"trainer_args": {"adam_beta3": 1, "adam_beta1": 0.9}}},
        ["advanced.trainer_args.adam_beta3"],
        "did you mean 'adam_beta",
    ),
    ("_check_splits", {"data": {"validation": "0.1"}}, ["data.validation"], "'0.1' is text"),
    ("_check_splits", {"data": {"test": "10 %"}}, ["data.test"], "plain number"),
    (
        "_check_same_rows",
        {"data": {"validation": "rows.json"}},
        ["data.validation"],
        "'rows.json' is in data.train too",
    ),
    ("_check_same_rows", {"data": {"train": ["a", "b"], "test": ["c", "b"]}}, ["data.test"], "'b' is in data.train"),
    ("_check_same_rows", {"data": {"validation": "v", "test": "v"}}, ["data.test"], "'v' is in data.validation"),
    ("_check_repository", {"output": {"hub": {"repo": "{usr}/x"}}}, ["output.hub.repo"], "{usr}"),
    ("_check_repository", {"output": {"hub": {"repo": "price"}}}, ["output.hub.repo"], "OWNER/NAME"),
    ("_check_repository", {"output": {"hub": {"repo": "a/b--c"}}}, ["output.hub.repo"], "'a/b--c'"),
    ("_check_push_effect", {"output": {"hub": {"strategy": "steps"}}}, ["output.hub.strategy"], "nothing is pushed"),
    ("_check_push_effect", {"output": {"hub": {"repo": "a/b", "steps": 5}}}, ["output.hub.steps"], "strategy end"),
    (
        "_check_push_effect",
        {"output": {"hub": {"repo": "a/b", "strategy": "every_save"}}, "training": {"save_strategy": "no"}},
        ["output.hub.strategy"],
        "saves nothing to push",
    ),
    (
        "check_tracker_names",
        {"output": {"trackers": ["wandb", "mlflow", "wandb"]}},
        ["output.trackers"],
        "'wandb' twice",
    ),
    ("_check_effect", {"training": {"save_steps": 5}}, ["training.save_steps"], "save_strategy: steps"),
    ("_check_effect", {"training": {"save_steps": 5, "save_strategy": "no"}}, ["training.save_steps"], "strategy no"),
    ("_check_effect", {"evaluation": {"steps": 5}, "data": {"test": 3}}, ["evaluation.steps"], "strategy: steps"),
    (
        "_check_effect",
        {"data": {"split_method": "first", "split_seed": 1, "validation": 3}},
        ["data.split_seed"],
        "draws nothing",
    ),
    (
        "_check_effect",
        {"data": {"split_method": "first", "split_seed": 1, "validation": "v"}},
        ["data.split_seed", "data.split_method"],
        "no fraction or number",
    ),
    *(
        ("_check_trainer_args", {"advanced": {"trainer_args": {name: value}}}, [f"advanced.trainer_args.{name}"], part)
        for name, value, part in (
            ("adam_beta1", 1.0, "adam_beta1 got 1.0 give a number from 0 to below 1"),
            ("adam_beta2", -0.1, "from 0 to below 1"),
            ("adam_beta2", math.nan, "from 0 to below 1"),
            ("adam_beta2", True, "adam_beta2 got True"),
            ("adam_epsilon", 0, "a number above 0"),
            ("adam_epsilon", math.inf, "a number above 0"),
            ("adam_epsilon", "1e-8", "adam_epsilon got '1e-8'"),
            ("lr_scheduler_kwargs", 3, "give a mapping"),
        )
    ),
    *(
        (
            "_check_trainer_args",
            {"training": {"optim": optim}, "advanced": {"trainer_args": {"adam_beta1": 0.9}}},
            ["advanced.trainer_args.adam_beta1"],
            f"adam_beta1 with optim {optim}",
        )
        for optim in ("sgd", "adafactor")
    ),
    *(
        (
            "_check_trainer_args",
            {
                "training": {"lr_scheduler_type": schedule},
                "advanced": {"trainer_args": {"lr_scheduler_kwargs": {name: value}}},
            },
            [f"advanced.trainer_args.lr_scheduler_kwargs.{name}"],
            part,
        )
        for schedule, name, value, part in (
            ("linear", "num_cycles", 1, "linear takes no 'num_cycles'"),
            ("constant", "lr_end", 1, "another training.lr_scheduler_type"),
            ("cosine", "num_cycle", 1, "did you mean 'num_cycles'?"),
            ("cosine", "num_cycles", "two", "num_cycles got 'two'"),
            ("polynomial", "lr_end", -1e-9, "0 or more"),
            ("polynomial", "power", 0, "a number above 0"),
            ("inverse_sqrt", "timescale", 0, "above 0"),
        )
    ),
    (
        "_check_polynomial_end",
        {
            "training": {"lr_scheduler_type": "polynomial", "learning_rate": 1e-3},
            "advanced": {"trainer_args": {"lr_scheduler_kwargs": {"lr_end": 1e-3}}},
        },
        ["advanced.trainer_args.lr_scheduler_kwargs.lr_end"],
        "from learning_rate 0.001 to lr_end 0.001",
    ),
    (
        "_check_polynomial_end",
        {"training": {"lr_scheduler_type": "polynomial", "learning_rate": 1e-8}},
        ["advanced.trainer_args.lr_scheduler_kwargs.lr_end"],
        "to lr_end 1e-07",
    ),
    (
        "_check_layout",
        {"training": {"layout": "packed"}, "model": {"attn_implementation": "eager"}},
        ["training.layout"],
        "'packed' with attn_implementation 'eager'",
    ),
    ("_check_text", {"data": {"format": "alpaca", "long_text": "truncate"}}, ["data.long_text"], "'alpaca'"),
    ("_check_text", {"data": {"format": "text", "template": "alpaca"}}, ["data.template"], "not prompted"),
    ("_check_text", {"data": {"format": "text", "train_on": "last_response"}}, ["data.train_on"], "every token"),
    ("_check_text", {"data": {"format": "text", "truncation": "drop"}}, ["data.truncation"], "data.long_text"),
    (
        "check_variant_keys",
        {"lora": {"variant": "ia3", "r": 4, "dropout": 0.1}},
        ["lora.r", "lora.dropout"],
        "r 4 with variant ia3, which cannot use it",
    ),
    (
        "check_variant_quantization",
        {"lora": {"variant": "loftq"}},
        ["lora.variant"],
        "variant loftq with quantization none",
    ),
]
KEPT: list[Values] = [
    {},
    {"data": {"validation": 0.5, "test": 1}, "training": {"load_best_model_at_end": True}},
    {"data": {"validation": "held-out.json"}, "evaluation": {"strategy": "steps"}},
    {"model": {"precision": "float16", "device": "cuda"}},
    {"training": {"warmup_ratio": 0.1}},
    {"training": {"warmup_steps": 3}},
    {"training": {"early_stopping": {"metric": "loss"}}},
    {"data": {"validation": 0.1}, "training": {"early_stopping": {"metric": "eval_yes_no_macro_f1", "mode": "max"}}},
    {"data": {"validation": 0.1}, "training": {"early_stopping": {"metric": "token_entropy", "mode": "min"}}},
    {
        "data": {"validation": 0.1},
        "evaluation": {"metrics": ["bleu", "my.metrics:score"], "metric_rows": 10},
        "training": {"load_best_model_at_end": True, "metric_for_best_model": "score"},
    },
    {"evaluation": {"metrics": ["calibration", "label_accuracy"], "labels": ["a", "b"]}},
    {"evaluation": {"metrics": []}},
    {"evaluation": {"metrics": ["calibration", "yes_no"]}},
    {"advanced": {"trainer_args": {name: {} if name == "lr_scheduler_kwargs" else 0.5 for name in TRAINER_ARGS}}},
    {"data": {"format": "text", "long_text": "truncate", "train_on": "all"}},
    {"data": {"validation": "1st.jsonl", "test": "test"}},
    {"data": {"validation": 0.1, "split_seed": 7}},
    {"data": {"test": 3, "split_method": "first", "split_seed": 42}},
    {"training": {"save_steps": 5, "save_strategy": "steps"}},
    {"training": {"save_steps": 500}},
    {"evaluation": {"steps": 5, "strategy": "steps"}, "data": {"validation": 3}},
    {"training": {"optim": "adamw_torch_fused"}, "advanced": {"trainer_args": {"adam_beta1": 0, "adam_epsilon": 1e-9}}},
    *(
        {
            "training": {"lr_scheduler_type": schedule},
            "advanced": {"trainer_args": {"lr_scheduler_kwargs": dict.fromkeys(terms, 1e-06)}},
        }
        for schedule, terms in SCHEDULE_TERMS.items()
    ),
]


def _values(sections: Values) -> Values:
    base: Values = {"model": {"name": "m"}, "data": {"train": "rows.json"}}
    return {**base, **{name: {**base.get(name, {}), **values} for name, values in sections.items()}}


def test_every_rule_is_broken_here() -> None:
    assert {rule.__name__ for rule in RULES} == {name for name, *_ in BROKEN}


@pytest.mark.parametrize(("rule", "sections", "keys", "part"), BROKEN)
def test_broken_rule_names_its_key(rule: str, sections: Values, keys: list[str], part: str) -> None:
    config = Config.model_validate(_values(sections))
    (by_name,) = [each for each in RULES if each.__name__ == rule]
    findings = by_name(config)
    assert [finding.key for finding in findings] == keys
    assert part in f"{findings[0].what} {findings[0].fix}"
    assert set(findings) <= set(check_config(config))
    with pytest.raises(ConfigError) as caught:
        load_config(_values(sections))
    wheres = [problem.where for problem in caught.value.problems]
    assert all(any(where.endswith(f"key {key}") for where in wheres) for key in keys)


@pytest.mark.parametrize("sections", KEPT)
def test_kept_rules_find_nothing(sections: Values) -> None:
    assert check_config(Config.model_validate(_values(sections))) == []


def test_a_setting_without_effect_says_how_it_is_taken_back() -> None:
    values = _values({"evaluation": {"metrics": [], "metric_rows": 25}})
    (finding,) = check_config(Config.model_validate(values))
    assert finding.fix == "remove it; on the command line evaluation.metric_rows=200 takes it back"
    taken_back = load_config(values, overrides=["evaluation.metric_rows=200"])
    assert not taken_back.config.evaluation.chosen("metric_rows")


def test_passed_through_arguments_have_no_key_of_their_own() -> None:
    assert not set(TRAINER_ARGS) & set(OTHER_NAMES)


def test_terms_are_those_of_the_library() -> None:
    fixed = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    for schedule in typing.get_args(field_by_key("training.lr_scheduler_type").annotation):
        function = TYPE_TO_SCHEDULER_FUNCTION[schedule]
        terms = set(inspect.signature(function).parameters) - fixed if schedule != "constant" else set()
        assert set(SCHEDULE_TERMS.get(schedule, {})) == terms, schedule
    assert {*ADAM_TERMS, "lr_scheduler_kwargs"} == set(TRAINER_ARGS)
