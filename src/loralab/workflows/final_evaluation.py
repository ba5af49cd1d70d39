"""What comes after the last step: the best adapter, and how it does against its base on the final split."""

from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from loralab.config.metric_checks import watched_metric
from loralab.errors import RunFolderError
from loralab.evaluation.forwards import Interrupted
from loralab.models.adapters import WEIGHTS_FILE, adapter_sha256
from loralab.run import write_json
from loralab.training.callbacks import StopRequest
from loralab.training.checkpoint import read_checkpoint
from loralab.training.distributed import ALONE
from loralab.training.state import RunState
from loralab.workflows.memory_record import measured_memory
from loralab.workflows.memory_watch import MemoryWatch
from loralab.workflows.predictions import write_predictions
from loralab.workflows.record import now, peak_memory_bytes
from loralab.workflows.split_evaluation import answer_samples, evaluate_split, resolve_split, stop_shares
from loralab.workflows.steps import Run


def keep_best(run: Run, state: RunState) -> None:
    """Put the best checkpoint's adapter into the model, when that was asked for."""
    if not run.config.training.load_best_model_at_end:
        return
    if state.best_step is None:
        figure = watched_metric(run.config.training)
        run.reporter.say(f"no evaluation had a {figure}: the adapter of the last step is kept")
        return
    if state.best_step == run.record.content["steps"]:
        return
    best = run.folder.checkpoints / f"checkpoint-{state.best_step}"
    if read_checkpoint(best) is None:
        raise RunFolderError(
            f"the best checkpoint is gone: {best.name}", where=str(best.parent), fix="train again with --overwrite"
        )
    set_peft_model_state_dict(run.model, load_file(best / WEIGHTS_FILE))
    run.reporter.say(f"using the adapter of step {state.best_step}, the best of the run ({state.best_value:.4f})")


def evaluate_at_end(run: Run, request: StopRequest) -> None:
    """Compare base and adapter on the final split, and let both answer a few of its prompts."""
    name = resolve_split(run.config.evaluation.split, run.data.splits)
    if name is None:
        run.reporter.say("no final evaluation: there is no validation or test split")
        return
    split, evaluation = run.data.splits[name], run.config.evaluation
    try:
        result = evaluate_split(
            run.model,
            split,
            task=run.task,
            prompter=run.data.prompter,
            planner=run.planner,
            name=name,
            evaluation=evaluation,
            max_length=run.config.data.max_length,
            device=run.device,
            reporter=run.reporter,
            should_stop=lambda: request.agree(run.processes),
            processes=run.processes,
        )
        if run.processes.first:
            write_predictions(run.folder.predictions, result)
            write_json(run.folder.evaluation, result.content)
        elif not run.processes.lockstep:
            return
        if not evaluation.num_samples:
            return
        samples = answer_samples(
            run.model,
            split,
            prompter=run.data.prompter,
            evaluation=evaluation,
            reporter=run.reporter,
            should_stop=lambda: request.agree(run.processes) if run.processes.lockstep else bool(request),
            processes=run.processes if run.processes.lockstep else ALONE,
        )
    except Interrupted:
        return  # the caller asks why
    if not run.processes.first:
        return
    shares = stop_shares(samples)
    run.reporter.say(f"answers that end by a stop token: base {shares['base']:.0%}, adapter {shares['adapter']:.0%}")
    write_json(
        run.folder.samples,
        {"split": name, "max_new_tokens": evaluation.max_new_tokens, "stop_share": shares, "samples": samples},
    )


def finish_record(run: Run, state: RunState, watch: MemoryWatch) -> None:
    """Note in the record that the run is complete, and what it took."""
    seconds = max(state.train_seconds, 1e-9)
    run.record.update(
        status="completed",
        finished_at=now(),
        adapter_sha256=adapter_sha256(run.folder.adapter),
        stopped_because=state.stopped_because,
        train_seconds=round(state.train_seconds, 3),
        tokens_per_second=round(state.train_tokens / seconds, 1),
        examples_per_second=round(state.train_examples / seconds, 2),
        peak_memory_bytes=peak_memory_bytes(run.device),
        memory=measured_memory(run.memory, watch, run.device),
    )
