"""The tables of report.py and the intervals in them."""
import numpy as np
import pytest

from medficient_mini.evaluation import published, report


def rows_of(scores, names="2D_CT_{:04}.npz"):
    return [{"case": names.format(i), "modality": "CT", "kind": "2D", "labels": 1, "dsc": score, "nsd": score}
            for i, score in enumerate(scores)]


def test_bootstrap_interval_covers_the_textbook_one():
    rng = np.random.default_rng(1)
    base = rng.random(200)
    change = rng.normal(0.05, 0.1, 200)
    n, ((mean, low, high),) = report.paired_differences(rows_of(base), rows_of(base + change)[::-1], ["dsc"])
    half = 1.96 * change.std(ddof=1) / np.sqrt(200)
    assert n == 200 and mean == pytest.approx(change.mean())
    assert [low, high] == pytest.approx([change.mean() - half, change.mean() + half], abs=0.1 * half)
    assert report.paired_differences(rows_of(base), rows_of(base + change), ["dsc"])[1].tolist() == [[mean, low, high]]


def test_fault_4_patients_are_drawn_not_slices():
    """Ten like slices of each of 20 patients say no more than one: the interval must not shrink by the root of ten."""
    change = np.random.default_rng(2).normal(0, 0.1, 20)
    one = report.paired_differences(rows_of(np.zeros(20)), rows_of(change), ["dsc"])[1][0]
    cases = [f"P{patient:03}_slice{z:02}.npz" for patient in range(20) for z in range(10)]
    a, b = rows_of(np.zeros(200)), rows_of(np.repeat(change, 10))
    for row_a, row_b, case in zip(a, b, cases):
        row_a["case"] = row_b["case"] = case
    n, (ten,) = report.paired_differences(a, b, ["dsc"])
    assert n == 200 and ten == pytest.approx(one)


@pytest.mark.parametrize("count, names", [(1, "2D_CT_{:04}.npz"), (3, "2D_CT_P001_slice{}.npz")])
def test_fault_4_a_single_patient_has_no_interval(count, names):
    a, b = rows_of([0.5] * count, names), rows_of([0.6] * count, names)
    assert f"| b − a | all cases | {count} | +10.00 [–] | +10.00 [–] |" in report.markdown({"a": a, "b": b})


def test_only_shared_cases_are_compared():
    a, b = rows_of([0.5, 0.6, None, 0.8]), rows_of([0.6, None, 0.7])
    assert report.paired_differences(a, b, ["dsc"]) == (1, pytest.approx(np.array([[0.1]])))
    assert "| b − a | all cases | 0 |" in report.markdown({"a": a, "b": []})
    assert "| CT | 3/2 |" in report.markdown({"a": a, "b": b}) and "| CT | 2/3 |" in report.markdown({"b": b, "a": a})


@pytest.mark.parametrize("rows", [[], rows_of([None, None])])
def test_tables_without_any_score(rows):
    text = report.markdown({"a": rows, "b": rows}, published=True)
    assert "| average over cases | 0 | – | – | – | – |" in text and "| b − a | all cases | 0 |" in text


def test_published_columns_agree_with_their_averages():
    columns = published.published_scores()
    assert len(columns) == 14
    for values in columns.values():
        average = values.pop("average over modalities")
        assert len(values) == 9 and np.mean(list(values.values())) == pytest.approx(average, abs=0.011)
