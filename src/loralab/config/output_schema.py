"""The section `output` of the configuration: the run folder, and who else is told of the run."""

from typing import Literal

from pydantic import Field

from loralab.config.section import PositiveInt, Section

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class HubConfig(Section):
    """Where on the Hub the adapter goes, and when."""

    repo: str | None = Field(
        None,
        description="Repository on the Hub that the adapter is pushed to, OWNER/NAME; {user} is the name behind the "
        "token, {run} the run folder's and {timestamp} the time of the start; null pushes nothing.",
        min_length=1,
    )
    private: bool = Field(True, description="Make the repository private where it is created.")
    strategy: Literal["end", "every_save", "steps"] = Field(
        "end",
        description="When to push, besides at the end: at no other time (end), with every checkpoint (every_save), or "
        "every so many steps (steps), with a checkpoint that is written for it.",
    )
    steps: PositiveInt = Field(500, description="Steps between two pushes when strategy is steps.")


class OutputConfig(Section):
    """Where the run folder goes, and who else is told."""

    dir: str | None = Field(None, description="Run folder; null makes runs/<name of the config file>.")
    hub: HubConfig = Field(default_factory=HubConfig, description="Where on the Hub the adapter goes, and when.")
    trackers: list[Tracker] = Field(
        default_factory=list,
        description="Programs that get the figures of metrics.jsonl as they come: tensorboard, wandb, mlflow, trackio.",
    )
