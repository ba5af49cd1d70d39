"""A trained adapter, ready to be asked: base, adapter, tokenizer and prompt contract.

Owns how a run folder or an adapter folder becomes a model; every command that prompts or
measures an adapter opens it here.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loralab.config.load import LoadedConfig
from loralab.config.schema import Config
from loralab.data.prompts.contract import CONTRACT_FILE, check_pictures, load_contracted
from loralab.data.prompts.prompter import Prompter, apply_stop_setting, choose_bos_prefix, own_template, render_with
from loralab.data.prompts.templates import prepare_template, resolve_template
from loralab.errors import ConfigError, ModelError, Problem
from loralab.models.adapters import CONFIG_FILE, load_adapter, read_adapter_config
from loralab.models.device_map import put_whole, select_gpus
from loralab.models.load import check_local_model, load_base_model, load_tokenizer, model_sha256
from loralab.models.new_tokens import NewToken, find_new_tokens, grow_vocabulary
from loralab.models.precision import Resolved, resolve_device, resolve_precision
from loralab.models.supervised import SupervisedPeftModel
from loralab.models.threads import resolve_threads
from loralab.models.trainable_tokens import trained_tokens
from loralab.progress import Reporter
from loralab.run import RunFolder, read_json
from loralab.training.checkpoint import find_checkpoint
from loralab.workflows.adapter_folder import FACTS_FILE
from loralab.workflows.configure import load_run_config
from loralab.workflows.first_look import check_run
from loralab.workflows.output import writer_of
from loralab.workflows.pictures import open_pictures
from loralab.workflows.pinning import fetch_base

# No dropout runs where nothing trains.
_NEVER_READ = ("model.base_dropout",)
# An adapter's contract fixes its template and stop tokens.
_IN_CONTRACT = (
    *("data.template", "data.template_kwargs", "data.stop_tokens", "data.system"),
    *("data.image.min_pixels", "data.image.max_pixels"),
)
# What overrides can change for a command that prompts; a contract takes the second part back.
PROMPT_SETTINGS = ("model", *_IN_CONTRACT)

# What training watched need not be what is measured now.
_UNWATCHED = (
    "training.early_stopping=null",
    "training.metric_for_best_model=null",
    "training.load_best_model_at_end=false",
)


@dataclass(frozen=True, slots=True)
class Target:
    """What RUN names.

    Attributes:
        adapter: the adapter folder.
        folder: the run folder that it belongs to, or None for an adapter alone.
    """

    adapter: Path
    folder: RunFolder | None


@dataclass(frozen=True, slots=True)
class Session:
    """An open adapter.

    Attributes:
        model: base and adapter, in evaluation mode.
        prompter: tokenizer, template and stop tokens under the adapter's contract.
        config: the run's configuration with overrides, or one made for the adapter.
        target: where it came from.
        device: where the model is.
        template: the template that its contract fixes, or None where it has no contract.
    """

    model: SupervisedPeftModel
    prompter: Prompter
    config: Config
    target: Target
    device: torch.device
    template: str | None

    @property
    def system_prompt(self) -> str | None:
        """The system message that the adapter was trained under, or None where there was none or it varied."""
        return self.prompter.system_prompt


def find_target(path: Path) -> Target:
    """Return the adapter that a run folder or an adapter folder holds.

    Raises:
        ModelError: there is no adapter.
    """
    check_run(path)
    if RunFolder(path).exists():
        folder = RunFolder(path)
        if not (folder.adapter / CONFIG_FILE).is_file():
            raise _no_adapter(folder)
        read_adapter_config(folder.adapter)
        return Target(folder.adapter, folder)
    read_adapter_config(path)
    parent = RunFolder(path.parent)
    inside = parent.exists() and path.resolve() == parent.adapter.resolve()
    return Target(path, parent if inside else None)


def _no_adapter(folder: RunFolder) -> ModelError:
    """Return what to do about a run that has no adapter, by how far it came."""
    command = f"loralab train {shlex.quote(str(folder.config))}"
    checkpoint = find_checkpoint(folder.checkpoints)
    writer = writer_of(folder)
    if writer is not None:
        state, fix = f"process {writer} is at work there", "wait until it has ended"
    elif checkpoint is not None:
        state = f"it was left at step {checkpoint.step}"
        fix = f"finish it: {command} --resume"
    else:
        state, fix = "it has no checkpoint either", f"train it again: {command} --overwrite"
    status = read_json(folder.record).get("status", "unknown")
    return ModelError(f"the run {str(folder.path)!r} ({status}) has no adapter: {state}", where="argument RUN", fix=fix)


def load_target_config(target: Target, overrides: Sequence[str], base_model: str | None) -> LoadedConfig:
    """Return the run's configuration, or a minimal one for an adapter alone, with overrides."""
    measured = any(text.partition("=")[0].strip() in ("evaluation", "evaluation.metrics") for text in overrides)
    # A run folder may come from someone else: its word is not enough to run code.
    chosen = [
        "model.trust_remote_code=false",
        *(_UNWATCHED if measured else ()),
        *overrides,
        *([f"model.name={base_model}"] if base_model is not None else []),
    ]
    if target.folder is not None and target.folder.config.is_file():
        return load_run_config(target.folder.config, chosen)
    adapter = read_adapter_config(target.adapter)
    base = base_model if base_model is not None else str(adapter.base_model_name_or_path or "")
    known = known_base(target)
    # A base from the Hub is the one that was trained on, not what its branch holds by now.
    commit = None if base_model is not None or known.sha256 else adapter.revision or known.revision
    values: dict[str, Any] = {"model": {"name": base, "revision": commit}, "data": {"train": "none"}}
    return load_run_config(values, overrides, name=target.adapter.name)


def open_session(
    path: Path,
    *,
    overrides: Sequence[str],
    base_model: str | None,
    reporter: Reporter,
    reads: Sequence[str] = ("",),
    ignores: Sequence[str] = (),
    precision_reason: str | None = None,
) -> Session:
    """Load base, adapter and tokenizer, and check the prompt contract.

    Args:
        path: run folder or adapter folder.
        overrides: `section.key=value` on top of the run's configuration.
        base_model: base to use instead of the recorded one.
        reporter: told of choices.
        reads: sections and keys that the command reads; an override of another is refused.
        ignores: keys below `reads` that it does not read.
        precision_reason: why overrides set the precision, where the user did not, or None.

    Raises:
        ConfigError: an override would have no effect.
        ModelError: something does not load or fit.
        PromptContractError: the tokenizer would prompt differently than in training.
    """
    target = find_target(path)
    config = load_target_config(target, overrides, base_model).config
    contracted = (target.adapter / CONTRACT_FILE).is_file()
    _check_effect(overrides, reads, [*ignores, *_NEVER_READ, *(_IN_CONTRACT if contracted else ())])
    if base_model is not None:
        _check_effect(overrides, ("",), ("model.name",))
    check_base_named(target, config, base_model)
    check_local_model(config.model.name)
    fetch_base(config.model, reporter)
    _check_base(target, config)
    note = select_gpus(config.model)
    device = resolve_device("cuda:0" if note else config.model.device)
    precision = resolve_precision(config.model, device.value)
    why = precision_reason or precision.reason
    threads = resolve_threads(device.value)
    for line in (note, f"device {device.value} ({device.reason})", f"{precision.value} ({why})"):
        if line:
            reporter.say(line.replace("torch.", ""))
    for name, number in threads.items():
        reporter.say(f"{name} {number.value} ({number.reason})")
    prompter = open_prompter(target, config, reporter)
    prompter.pictures = open_pictures(config, folder=target.adapter)
    if prompter.pictures is not None and contracted:
        where = target.adapter / CONTRACT_FILE
        check_pictures(prompter, read_json(where), where=str(where))
    base, choices = load_base_model(config.model, dtype=precision.value, device=device.value)
    if choices["quantization"].value != "none":
        reporter.say(f"quantization {choices['quantization'].value} ({choices['quantization'].reason})")
    for name, grown in _add_new_tokens(base, target, config, prompter.tokenizer).items():
        reporter.say(f"{name}: {grown.value} ({grown.reason})")
    model = load_adapter(base, target.adapter)
    put_whole(model, device.value)
    template = str(prompter.tokenizer.chat_template) if contracted else None
    return Session(model, prompter, config, target, device.value, template)


@dataclass(frozen=True, slots=True)
class KnownBase:
    """What is recorded of an adapter and its base; None where it is not.

    Attributes:
        adapter_sha256: of the adapter's tensors.
        sha256: of a local base.
        revision: of a base from the Hub.
        quantization: how the base was held.
        double_quantization: whether scales were quantized too.
        precision: type that the base was held in.
    """

    adapter_sha256: str | None
    sha256: str | None
    revision: str | None
    quantization: str | None
    double_quantization: bool | None
    precision: str | None

    @property
    def told(self) -> bool:
        """Whether anything is recorded of what the adapter was trained on."""
        return any((self.sha256, self.revision, self.quantization, self.precision))


def known_base(target: Target) -> KnownBase:
    """Return what the run's record says of an adapter, or the facts in the adapter's own folder.

    Args:
        target: run or adapter alone.
    """
    file = target.adapter / FACTS_FILE
    facts = read_json(file) if file.is_file() else {}
    record = read_json(target.folder.record) if target.folder is not None else {}
    base, run = ({} if not isinstance(each, dict) else each for each in (facts.get("base"), record.get("model")))
    return KnownBase(
        record.get("adapter_sha256") or facts.get("adapter_sha256"),
        run.get("sha256") or base.get("sha256"),
        run.get("revision") or base.get("revision"),
        facts.get("quantization"),
        facts.get("double_quantization"),
        (record.get("resolved") or {}).get("precision", {}).get("value") or facts.get("precision"),
    )


def base_misfit(known: KnownBase, sha256: str | None) -> str | None:
    """Return how a base differs from the one that a run was trained on, or None where it does not, as far as is known.

    Args:
        known: what is recorded of the run's.
        sha256: of the base, as `model_sha256` has it.
    """
    theirs = known.sha256
    if not theirs or not sha256 or theirs == sha256:
        return None
    return f"its base model was sha256 {theirs[:12]}.., this one is {sha256[:12]}.."


def check_base_named(target: Target, config: Config, base_model: str | None) -> None:
    """Check that a base that was a local folder is named where that is not here: the Hub would be asked for it.

    Args:
        target: the adapter.
        config: names the base.
        base_model: base to use instead of the recorded one.

    Raises:
        ModelError: it is not.
    """
    place = Path(config.model.name).expanduser()
    if base_model is None and known_base(target).sha256 and not place.exists():
        raise ModelError(
            f"the base of this adapter is not here: it was a local folder called {place.name!r}",
            where=str(target.adapter),
            fix="say where it is with --model FOLDER",
        )


def _check_base(target: Target, config: Config) -> None:
    """Check that a run is asked on the base that it was trained on: another one of the same shape would answer too.

    Raises:
        ModelError: it is another one.
    """
    known = known_base(target)
    misfit = base_misfit(known, model_sha256(config.model.name) if known.sha256 else None)
    if misfit is not None:
        raise ModelError(
            f"not the base of this adapter: {config.model.name!r}; {misfit}",
            where=str(target.adapter),
            fix="give the base that it was trained on with --model, or restore its files",
        )


def _add_new_tokens(
    base: PreTrainedModel, target: Target, config: Config, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Resolved[str]]:
    """Give a base the rows of the tokens that its adapter's tokenizer has and its own has not, as training did."""
    return grow_vocabulary(base, new_tokens_in(target, config, tokenizer))


def new_tokens_in(target: Target, config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[NewToken, ...]:
    """Return the tokens that an adapter's tokenizer has and its base's has not.

    Args:
        target: the adapter.
        config: names the base.
        tokenizer: the adapter's.

    Raises:
        ModelError: the adapter trained a token that no tokenizer has.
    """
    trained = trained_tokens(read_adapter_config(target.adapter))
    unknown = sorted(trained - set(tokenizer.get_vocab().values()))
    if unknown and not _has_tokenizer(target):
        raise ModelError(
            f"the adapter trained token {unknown[0]}, which the base's tokenizer does not have",
            where=str(target.adapter),
            fix="give the run, or its adapter folder, which holds the tokenizer with the new tokens",
        )
    if not trained & set(tokenizer.get_added_vocab().values()):
        return ()  # without a look at the base's tokenizer, which a base may lack
    return find_new_tokens(trained, own=tokenizer, base=load_tokenizer(config.model))


def _check_effect(overrides: Sequence[str], reads: Sequence[str], ignores: Sequence[str]) -> None:
    problems = []
    for text in overrides:
        key = text.partition("=")[0].strip()
        if any(_covers(each, key) for each in reads) and not any(_covers(each, key) for each in ignores):
            continue
        read = [each for each in reads if each and each not in ignores]
        listed = ", ".join(f"{each}.*" if "." not in each else each for each in read)
        fix = "remove it" + (f"; this command reads {listed}" if listed else ", or the option that replaces it")
        problems.append(Problem(f"{key} has no effect on this command", f"command line: {text}", fix))
    if problems:
        raise ConfigError.from_problems(problems)


def _covers(section: str, key: str) -> bool:
    return not section or key == section or key.startswith(f"{section}.")


def load_adapter_tokenizer(target: Target, config: Config) -> PreTrainedTokenizerBase:
    """Return the tokenizer saved with an adapter, or its base model's where there is none."""
    return load_tokenizer(config.model, folder=target.adapter if _has_tokenizer(target) else None)


def _has_tokenizer(target: Target) -> bool:
    return any((target.adapter / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def open_prompter(target: Target, config: Config, reporter: Reporter) -> Prompter:
    """Return the adapter's prompter: under its contract, or by best knowledge where it has none."""
    tokenizer = load_adapter_tokenizer(target, config)
    contract_file = target.adapter / CONTRACT_FILE
    if contract_file.is_file():
        return load_contracted(tokenizer, read_json(contract_file), where=str(contract_file))
    apply_stop_setting(tokenizer, config.data.stop_tokens)
    template = resolve_template(
        config.data.template,
        own=own_template(tokenizer),
        fallback="none",
        own_first=True,
        bos_prefix=choose_bos_prefix(tokenizer),
    )
    template = prepare_template(
        template,
        vocabulary=tokenizer.get_vocab(),
        kwargs=config.data.template_kwargs,
        render=render_with(tokenizer),
    )
    tokenizer.chat_template = template.text
    used = "prompts are sent as they stand" if template.name == "none" else f"template {template.name}"
    reporter.say(f"no prompt contract in {target.adapter}: {used}")
    return Prompter(tokenizer, config.data.stop_tokens, system_prompt=config.data.system)
