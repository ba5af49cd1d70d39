"""What `eval` shows of the difference of the losses: the verdict that was given, not one of its own."""

from typing import Any

import pytest

from loralab.cli.evaluation_text import print_evaluations


@pytest.mark.parametrize(
    ("bounds", "verdict", "shown"),
    [
        ((-0.2, -0.1), "better", "eval_loss -0.1500 nats per token, 95% interval -0.2000 to -0.1000: better"),
        # Two rows: the interval leaves out 0 and proves nothing.
        ((-0.2, -0.1), "no difference seen at n = 2", "-0.1000: no difference seen at n = 2"),
        ((None, None), "no difference seen at n = 1", "eval_loss -0.1500 nats per token: no difference seen at n = 1"),
    ],
)
def test_the_loss_is_judged_as_the_record_has_it(
    capsys: pytest.CaptureFixture[str], bounds: tuple[float | None, float | None], verdict: str, shown: str
) -> None:
    side: dict[str, Any] = {"eval_loss": 1.0, "perplexity": 2.718}
    low, high = bounds
    difference = {"eval_loss": -0.15, "low": low, "high": high, "level": 0.95, "verdict": verdict}
    print_evaluations(["run"], [{**side, "base": side, "difference": difference}])
    assert shown in " ".join(capsys.readouterr().out.split())
