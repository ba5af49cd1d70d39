"""Numbers: how they are read, hand-computed errors, and scikit-learn as the oracle."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

from loralab.errors import DataError
from loralab.evaluation.metrics.measure import measure
from loralab.evaluation.metrics.numbers import NUMBER, parse_number
from unit.evaluation.metrics.made import evidence_of, figures_of


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Price is $123.00", 123.0),
        ("1,299.99", 1299.99),
        ("$12,345,678.9 today", 12345678.9),
        ("$ 5k", 5.0),
        ("5 million", 5.0),
        ("about 7.", 7.0),
        (".5", 0.5),
        ("-5", -5.0),
        ("\u22125 degrees", -5.0),
        ("$-5", -5.0),
        ("-$5", -5.0),
        ("- 5", 5.0),
        ("10-20", 10.0),
        ("1e3", 1000.0),
        ("2.5E-1", 0.25),
        ("\uff15\uff10", 50.0),  # full-width digits
        ("١٢", 12.0),
        ("1,5", 1.0),
        ("1,2345", 1.0),
        ("1.5.2", 1.5),
        ("none", None),
        ("", None),
        ("$.", None),
        ("9" * 400, None),
        ("1e200", None),
    ],
)
def test_first_number_is_read(text: str, number: float | None) -> None:
    assert parse_number(text) == number


@given(st.text(max_size=40))
@settings(deadline=None)
def test_any_text_is_read_or_not(text: str) -> None:
    value = parse_number(text)
    assert value is None or math.isfinite(value)


@given(st.floats(min_value=0, max_value=1e9), st.integers(0, 2))
@settings(deadline=None)
def test_written_numbers_are_read_back(value: float, digits: int) -> None:
    assert parse_number(f"Price is ${value:,.{digits}f}.") == float(f"{value:.{digits}f}")


def test_by_hand() -> None:
    answers = ["Price is $110", "$120.00", "no idea", "79.99", "400"]
    references = ["Price is $100.00", "Price is $100.00", "Price is $50.00", "Price is $100.00", "Price is $200.00"]
    evidence = evidence_of(answers, references)
    figures = figures_of(NUMBER, evidence)
    errors = [10, 20, 20.01, 200]
    assert figures["number_mae"] == pytest.approx(sum(errors) / 4)
    assert figures["number_rmse"] == pytest.approx(math.sqrt(sum(e * e for e in errors) / 4))
    assert figures["number_within_20"] == pytest.approx(2 / 5)  # 120 is just within; unparsable is missed
    assert figures["number_unparsable"] == pytest.approx(1 / 5)
    assert figures["number_r2"] == pytest.approx(1 - sum(e * e for e in errors) / (3 * 25**2 + 75**2))
    found = measure({"number": NUMBER}, evidence, resamples=100)
    assert found.figures["number_mae"].count == 4
    assert found.figures["number_within_20"].count == 5
    assert found.figures["number_within_20"].method == "Wilson"
    np.testing.assert_allclose(found.per_answer["number"], [-10, -20, np.nan, -20.01, -200])


@pytest.mark.parametrize("offset", [0.0, 1e7])
def test_errors_are_what_scikit_learn_says(offset: float) -> None:
    rng = np.random.default_rng(7)
    true = np.round(rng.gamma(2, 30, size=80) + offset, 2)
    said = np.round(true * rng.normal(1, 0.3, size=80), 2)
    evidence = evidence_of([f"{value}" for value in said], [f"{value}" for value in true])
    figures = figures_of(NUMBER, evidence)
    assert figures["number_mae"] == pytest.approx(mean_absolute_error(true, said))
    assert figures["number_rmse"] == pytest.approx(math.sqrt(mean_squared_error(true, said)))
    assert figures["number_r2"] == pytest.approx(r2_score(true, said), rel=1e-6)


def test_r2_of_equal_references_is_not_defined() -> None:
    found = measure({"number": NUMBER}, evidence_of(["1", "2", "3"], ["0.1", "0.1", "0.1"]), resamples=50)
    assert "number_r2" not in found.values
    assert "number_mae" in found.values


def test_r2_of_one_row_drawn_again_and_again_is_not_defined() -> None:
    rows = NUMBER.statistics(evidence_of(["1", "2", "3"], ["0.1", "0.7", "1234.56"]))
    drawn = NUMBER.figures(np.stack([rows[0] * 3, rows[0] * 11, rows[2] * 3, rows[2] * 11]))["number_r2"]
    assert np.isnan(drawn).all()


def test_a_fifth_more_is_within_though_binary_rounding_says_otherwise() -> None:
    assert 0.108 - 0.09 > 0.2 * 0.09
    assert figures_of(NUMBER, evidence_of(["0.108"], ["0.09"]))["number_within_20"] == 1
    assert figures_of(NUMBER, evidence_of(["0.10801"], ["0.09"]))["number_within_20"] == 0


def test_no_answer_with_a_number() -> None:
    found = measure({"number": NUMBER}, evidence_of(["?", ""], ["1", "2"]), resamples=50)
    assert found.values == {"number_within_20": 0, "number_unparsable": 1}


def test_reference_without_a_number() -> None:
    with pytest.raises(DataError, match="row 1") as caught:
        measure({"number": NUMBER}, evidence_of(["1"], ["free"]), resamples=10)
    assert "'free' is not a text with a number" in str(caught.value)
