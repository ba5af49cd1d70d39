"""What an export starts from: a run, an adapter or a merged folder, with its prompts.

Owns finding it, merging where a whole model is needed, and the prompts of its contract.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.config.schema import Config
from loralab.data.example import Message
from loralab.data.prompts.contract import CONTRACT_FILE
from loralab.data.prompts.prompter import Prompter
from loralab.errors import DataError
from loralab.export.gguf_proof import Prompt
from loralab.models.load import load_model_config
from loralab.progress import Reporter
from loralab.run import read_json
from loralab.workflows.configure import load_run_config
from loralab.workflows.merge import MergeRequest, merge
from loralab.workflows.merge_checks import MERGE_FILE
from loralab.workflows.session import Target, check_base_named, find_target, load_target_config, open_prompter

_QUESTIONS = ("What is the capital of France?", "Sort these: 3, 1, 2.")


@dataclass(frozen=True, slots=True)
class ExportSource:
    """What is exported.

    Attributes:
        path: as the user gave it.
        target: the adapter; for a merged folder, that folder.
        merged: whether it is a merged folder.
        config: of the run, or made for it.
        prompter: under the prompt contract.
        base_model: base to use instead of the recorded one, as the user gave it.
    """

    path: Path
    target: Target
    merged: bool
    config: Config
    prompter: Prompter
    base_model: str | None

    @property
    def template(self) -> str:
        """The Jinja template."""
        return str(self.prompter.tokenizer.chat_template)

    def base_config(self) -> Any:
        """Return the configuration of the base (or of the merged model), without its weights."""
        return load_model_config(self.config.model)

    def reads(self) -> list[Path]:
        """Return the folders that an export reads."""
        base = Path(self.config.model.name).expanduser()
        return [self.target.adapter, *([base] if base.is_dir() else [])]

    def model_folder(self, place: Path, reporter: Reporter) -> Path:
        """Return a folder with the merged model: the one given, or one that is made in `place`."""
        if self.merged:
            return self.path
        merge(self.path, MergeRequest(output=place, base_model=self.base_model), reporter=reporter)
        return place

    @property
    def promised(self) -> bool:
        """Whether a contract says what prompts the adapter was trained on."""
        return (self.target.adapter / CONTRACT_FILE).is_file()

    def conversations(self) -> list[list[Message]]:
        """Return the golden prompts of the contract as messages, those that the template takes."""
        contract = self.target.adapter / CONTRACT_FILE
        golden = read_json(contract).get("golden", []) if contract.is_file() else []
        texts = [str(each["prompt"]) for each in golden] or list(_QUESTIONS)
        system = [] if self.prompter.system_prompt is None else [Message("system", self.prompter.system_prompt)]
        return [[*system, Message("user", text)] for text in texts]

    def prompts(self) -> list[Prompt]:
        """Return text and ids of the golden prompts."""
        found = []
        for messages in self.conversations():
            text = self.prompter.render(messages, add_generation_prompt=True)
            found.append(Prompt(text, tuple(self.prompter.encode([text])[0])))
        return found


def open_source(path: Path, base_model: str | None, reporter: Reporter) -> ExportSource:
    """Return what RUN names, with its prompter checked against the prompt contract.

    Raises:
        UserError: there is no adapter and no merged model.
        PromptContractError: the tokenizer would prompt differently than in training.
    """
    if (path / MERGE_FILE).is_file() and (path / "config.json").is_file():
        if base_model is not None:
            raise DataError(
                "a merged folder needs no base", where="option --model", fix="remove the option, or give the run"
            )
        target = Target(path, None)
        values: dict[str, Any] = {"model": {"name": str(path)}, "data": {"train": "none"}}
        config = load_run_config(values, [], name=path.name).config
    else:
        target = find_target(path)
        config = load_target_config(target, [], base_model).config
        check_base_named(target, config, base_model)
    prompter = open_prompter(target, config, reporter)
    return ExportSource(path, target, target.adapter == path and not _is_adapter(path), config, prompter, base_model)


def _is_adapter(path: Path) -> bool:
    return (path / "adapter_config.json").is_file()
