"""Metrics of the user's own: a function that is named as `package.module:function`.

Owns the check of what such a function gives. It is called as `function(answers, references)`, two lists of
texts, and gives one score per answer; their mean is the figure, named as the function.
"""

import importlib
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path

import numpy as np

from loralab.errors import ConfigError, DataError, excerpt
from loralab.evaluation.answers import Evidence
from loralab.evaluation.metrics.metric import Better, Metric
from loralab.evaluation.metrics.sums import OncePerEvidence, add_rows, quotient, texts_of
from loralab.evaluation.perplexity import FloatArray

KEY = "key evaluation.metrics"
# Answers that a function is tried on before training.
_TRIED = 4
ScoreFunction = Callable[[list[str], list[str]], Sequence[float]]


class ScoresOfAnswers:
    """One score per answer by a user's function, which is called once for each evidence.

    Args:
        name: `package.module:function`.
        function: gives one score per answer.
    """

    def __init__(self, name: str, function: ScoreFunction) -> None:
        self._name, self._function = name, function
        # It may be slow, or give other scores when called again.
        self._once = OncePerEvidence(self._call)

    def __call__(self, evidence: Evidence) -> FloatArray:
        """Return the scores (answers).

        Raises:
            DataError: the function fails, or gives something else than one finite number per answer.
        """
        return self._once(evidence)

    def _call(self, evidence: Evidence) -> FloatArray:
        answers, references = texts_of(evidence)
        try:
            given = self._function(answers, references)
            scores = given.tolist() if isinstance(given, np.ndarray) else list(given)
        except Exception as error:
            raise self._error(f"failed{_place(error)}: {type(error).__name__}: {excerpt(error)}") from error
        if len(scores) != len(evidence.answers):
            raise self._error(f"gave {len(scores)} scores for {len(evidence.answers)} answers")
        for index, score in enumerate(scores):
            if not isinstance(score, Real) or not math.isfinite(score):
                raise self._error(f"gave {score!r} for answer {index + 1}, which is no finite number")
        return np.array(scores, dtype=np.float64)

    def _error(self, what: str) -> DataError:
        return DataError(
            f"metric {self._name!r} {what}",
            where=KEY,
            fix="the function takes two lists of texts, answers and references, and returns one number per answer",
        )

    def try_out(self, evidence: Evidence) -> None:
        """Try the function on a few answers, so that what is wrong with it is told before hours of training.

        Raises:
            DataError: as when it is called.
        """
        self._call(replace(evidence, answers=evidence.answers[:_TRIED]))

    def rows(self, evidence: Evidence) -> FloatArray:
        """Return sum and number of the scores of each row (units, 2)."""
        scores = self(evidence)
        return add_rows(evidence, np.stack([scores, np.ones_like(scores)], axis=1))


def _place(error: Exception) -> str:
    """Return the line of the user's code that an error came from, or nothing where it came from no line of it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return "" if frame.filename == __file__ else f" in {Path(frame.filename).name} line {frame.lineno}"


def load_metric(name: str) -> Metric:
    """Import a user's function and make a metric of it.

    Args:
        name: `package.module:function`.

    Raises:
        ConfigError: the name is malformed, the module cannot be imported, or there is no such function in it.
    """
    module_name, _, attribute = name.partition(":")
    if not attribute.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise ConfigError(
            f"metric {name!r} is no function's name", where=KEY, fix="write package.module:function, as it is imported"
        )
    function = _find_function(name, module_name, attribute)
    direction = getattr(function, "better", "higher")
    if direction not in ("higher", "lower"):
        raise ConfigError(
            f"metric {name!r}: its attribute better is {direction!r}",
            where=KEY,
            fix='set it to "higher" or "lower"',
        )
    better: Better = "lower" if direction == "lower" else "higher"
    scores = ScoresOfAnswers(name, function)
    sign = 1.0 if better == "higher" else -1.0
    return Metric(
        summary=f"Mean score of the function {name}.",
        source=f"the user's function {name}",
        needs="answers",
        better={attribute: better},
        statistics=scores.rows,
        figures=lambda totals: {attribute: quotient(totals[..., 0], totals[..., 1])},
        count=lambda totals: totals[..., 1],
        per_answer=lambda evidence: sign * scores(evidence),
        try_out=scores.try_out,
    )


def _find_function(name: str, module_name: str, attribute: str) -> ScoreFunction:
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(
            f"metric {name!r}: module {module_name} cannot be imported: {type(error).__name__}: {excerpt(error)}",
            where=KEY,
            fix="install its package, or name its folder in PYTHONPATH (the current folder is not searched by itself)",
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        has = "is no function" if hasattr(module, attribute) else "does not exist"
        raise ConfigError(
            f"metric {name!r}: {attribute} {has} in module {module_name}",
            where=KEY,
            fix="name a function of the module",
        )
    checked: ScoreFunction = function
    return checked
