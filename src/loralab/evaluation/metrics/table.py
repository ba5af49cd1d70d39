"""The table of metrics, and how names become entries.

Owns which metrics there are; what each one is stands in its own file.
"""

from collections.abc import Sequence

from loralab.errors import ConfigError
from loralab.evaluation.metrics.calibration import CALIBRATION
from loralab.evaluation.metrics.classes import LABEL_ACCURACY, YES_NO_METRIC
from loralab.evaluation.metrics.losses import PERPLEXITY, TOKEN_ACCURACY, TOKEN_ENTROPY
from loralab.evaluation.metrics.metric import Metric
from loralab.evaluation.metrics.numbers import NUMBER
from loralab.evaluation.metrics.out_of_tree import KEY, load_metric
from loralab.evaluation.metrics.shapes import LENGTH, REPETITION, STOP_RATE
from loralab.evaluation.metrics.texts import BLEU_METRIC, CHRF, EXACT_MATCH, ROUGE
from loralab.lookup import look_up


def resolve_metrics(names: Sequence[str]) -> dict[str, Metric]:
    """Return the metrics of these names, in their order.

    Args:
        names: names of the table, or `package.module:function` for a function of the user's own.

    Raises:
        ConfigError: a name that is not known, that stands twice, or whose function cannot be imported.
    """
    chosen: dict[str, Metric] = {}
    owner = {figure: name for name, metric in METRICS.items() for figure in metric.better}
    for name in names:
        if name in chosen:
            raise ConfigError(f"metric {name!r} stands twice", where=KEY, fix="name each metric once")
        own = ":" in name
        metric = load_metric(name) if own else look_up(METRICS, name, kind="metric", where=KEY)
        for figure in metric.better if own else ():
            if figure in owner:
                raise ConfigError(
                    f"metric {name!r} gives a figure {figure!r}, and so does metric {owner[figure]!r}",
                    where=KEY,
                    fix="give the function another name",
                )
            owner[figure] = name
        chosen[name] = metric
    return chosen


METRICS: dict[str, Metric] = {
    "perplexity": PERPLEXITY,
    "token_accuracy": TOKEN_ACCURACY,
    "token_entropy": TOKEN_ENTROPY,
    "exact_match": EXACT_MATCH,
    "yes_no": YES_NO_METRIC,
    "label_accuracy": LABEL_ACCURACY,
    "calibration": CALIBRATION,
    "number": NUMBER,
    "rouge": ROUGE,
    "bleu": BLEU_METRIC,
    "chrf": CHRF,
    "stop_rate": STOP_RATE,
    "length": LENGTH,
    "repetition": REPETITION,
}
