"""Comparisons with further measures, and sweeps, on values that are written here."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from rich.table import Table

from posttrain.errors import UserError
from posttrain.evaluation.compare import Comparison, compare, difference, headlines
from posttrain.evaluation.evaluate import EvaluationResult
from posttrain.evaluation.measures import Measured
from posttrain.evaluation.metrics import Estimate, paired_difference
from posttrain.evaluation.summary import further_tables, table, to_json, verdict
from posttrain.evaluation.sweep import ordering, orderings
from posttrain.evaluation.wording import in_words, numbers

N = 8
SETTINGS: dict[str, Any] = {"resamples": 200, "confidence": 0.95, "seed": 3}


def evaluation(label: str, c: Sequence[int], verifier: str | None = "exact") -> EvaluationResult:
    """c correct of 8 answers to each problem, each of them a text of its own; without a verifier no verdicts."""
    right = list(c) if verifier is not None else [0] * len(c)
    texts: list[list[str | None]] = [[f"{i}" for i in range(count)] for count in right]
    ones = np.ones(len(c), dtype=np.int64)
    judged = N if verifier is not None else 0
    return EvaluationResult(
        label=label,
        identity={
            "task": "sums", "data": "d", "verifier": verifier, "n": N, "temperature": 1.0, "top_p": 0.9,
            "max_tokens": 16, "model": label, "seed": 3,
        },
        k=(1, 4),
        resamples=200,
        confidence=0.95,
        statuses={},
        metrics={},
        versions={},
        keys=[str(i) for i in range(len(c))],
        prompts=["2+2"] * len(c),
        solutions=None,
        answers=[correct + ["no"] * (judged - len(correct)) for correct in texts],
        correct=[[True] * count + [False] * (judged - count) for count in right],
        tokens=ones * 5 * N,
        tokens_correct=np.array(right) * 4,
        tokens_wrong=(judged - np.array(right)) * 6,
        samples=ones * N,
        truncated=ones,
    )  # fmt: skip


def measured(name: str, top: Any, bottom: Any, kind: str = "divergence", unit: str = "nats per token") -> Measured:
    return Measured(name, kind, unit, f"What {name} is.", np.array(top, dtype=float), np.array(bottom, dtype=float))


# 40 problems; two settings with two seeds each, and a baseline
COUNTS = {
    "base": [2, 3] * 20,
    "js-seed0": [4, 4] * 20,
    "js-seed1": [4, 6] * 20,
    "reverse_kl-seed0": [6, 6] * 20,
    "reverse_kl-seed1": [6, 8] * 20,
    "grpo": [8, 1] * 20,
}
SWEEP = {label: {"divergence": label.partition("-")[0], "seed": int(label[-1])} for label in COUNTS if "seed" in label}


def swept(measures: Mapping[str, Mapping[str, Measured]] | None = None) -> Comparison:
    results = {label: evaluation(label, c) for label, c in COUNTS.items()}
    return compare(results, "base", measures=measures, settings=SWEEP)


def test_runs_that_differ_only_in_their_seed_are_pooled() -> None:
    comparison = swept()
    assert list(comparison.pools) == ["base", "js", "reverse_kl", "grpo"]
    js = comparison.pools["js"]
    assert (js.settings, js.runs) == ({"divergence": "js"}, ("js-seed0", "js-seed1"))
    # pass@1: (4 + 4 + 4 + 6) / 4 of 8; every correct answer is a text of its own
    assert js.pass_at_k[1].value == 4.5 / 8
    assert js.distinct_correct is not None
    assert js.distinct_correct.value == 4.5
    # pass@4: 1 − C(n−c, 4)/70 with C(4, 4) = 1 and C(2, 4) = 0: 69/70 thrice, 1 once
    assert js.pass_at_k[4].value == pytest.approx((3 * 69 + 70) / 280, rel=1e-12)
    # retention@4 with the base's 55/70 and 65/70: (55·69/70 + 65·(69/70 + 1)/2) / 120
    assert js.retention[4] is not None
    assert js.retention[4].value == pytest.approx((55 * 69 / 70 + 65 * (69 / 70 + 1) / 2) / 120, rel=1e-12)
    assert js.tokens_correct is not None
    assert js.tokens_correct.value == pytest.approx(4.0, rel=1e-12)
    # a pool of one run is that run, and main − others is no part of a sweep
    assert comparison.pools["grpo"].pass_at_k == comparison.runs["grpo"].pass_at_k
    assert comparison.pools["base"].retention == comparison.runs["base"].retention
    assert {d.against for d in comparison.differences} == {"base"}


def test_differences_of_pools_are_of_their_means_problem_by_problem() -> None:
    comparison = swept()
    js, reverse_kl = np.array([4, 5] * 20) / 8, np.array([6, 7] * 20) / 8
    # 2 of 8 more on every problem, whatever the seeds do: the interval is a point
    assert difference(comparison, "pass@1", "reverse_kl", "js") == (0.25, 0.25, 0.25)
    assert paired_difference(reverse_kl, js, **SETTINGS) == (0.25, 0.25, 0.25)
    against_base = comparison.pools["js"].minus_base["pass@1"]
    assert against_base == paired_difference(js, np.array([2, 3] * 20) / 8, **SETTINGS)
    against_grpo = difference(comparison, "pass@1", "js", "grpo")
    assert against_grpo == paired_difference(js, np.array([8, 1] * 20) / 8, **SETTINGS)
    assert against_grpo.value == 0.0


def test_a_measure_of_a_pool_is_the_mean_of_its_seeds() -> None:
    half = [1, 0] * 20  # the second seed measured every other problem only
    ece = np.zeros((2, 40, 2))
    ece[0, :, 0], ece[1, :, 0] = 0.1, -0.3  # one is underconfident in the first bin, the other overconfident
    measures = {
        "base": {"reverse_kl": measured("reverse_kl", [0] * 40, [1] * 40)},
        "js-seed0": {
            "reverse_kl": measured("reverse_kl", [3, 5] * 20, [2] * 40),
            "ece_likelihood": measured("ece_likelihood", ece[0], [1] * 40, "calibration", "share"),
        },
        "js-seed1": {
            "reverse_kl": measured("reverse_kl", [6, 0] * 20, half),
            "ece_likelihood": measured("ece_likelihood", ece[1], [1] * 40, "calibration", "share"),
        },
        "grpo": {"reverse_kl": measured("reverse_kl", [1] * 40, [1] * 40)},
        "reverse_kl-seed0": {"reverse_kl": measured("reverse_kl", [1] * 40, [1] * 40)},
    }
    comparison = swept(measures)
    found = comparison.pools["js"].measures
    # (8/4 + 6/1) / 2, where all answers together would give (8·20 + 6·20) / (80 + 20) = 2.8
    assert found["reverse_kl"] is not None
    assert found["reverse_kl"].value == pytest.approx(4.0, rel=1e-12)
    # (0.1 + 0.3) / 2: the two do not cancel
    assert found["ece_likelihood"] is not None
    assert found["ece_likelihood"].value == pytest.approx(0.2, rel=1e-12)
    assert comparison.pools["js"].minus_base["reverse_kl"].value == pytest.approx(4.0, rel=1e-12)
    assert "ece_likelihood" not in comparison.pools["js"].minus_base
    apart = difference(comparison, "reverse_kl", "js", "grpo")
    assert apart is not None
    assert apart.value == pytest.approx(3.0, rel=1e-12)
    assert apart.low > 0
    # a seed that lacks a measure leaves its pool without
    assert comparison.pools["reverse_kl"].measures == {}
    assert difference(comparison, "reverse_kl", "reverse_kl", "grpo") is None


def test_the_order_says_what_is_significant() -> None:
    counts = {"reverse_kl": [6, 6] * 20, "js": [4, 4] * 20, "alpha": [3, 5] * 20, "forward_kl": [5, 4, 3, 3] * 10}
    results = {"base": evaluation("base", [2, 3] * 20)}
    settings: dict[str, dict[str, Any]] = {}
    for name, c in counts.items():
        for beta in (0.1, 0.3):
            label = f"{name}-{beta}"
            results[label] = evaluation(label, c if beta == 0.1 else [1] * 40)
            settings[label] = {"divergence": name, "beta": beta} | ({"alpha": 0.5} if name == "alpha" else {})
    comparison = compare(results, "base", settings=settings)
    first, second = ordering(comparison, "pass@1")
    assert (first.at, second.at) == ({"beta": 0.1}, {"beta": 0.3})
    # 6/8 against 4/8 everywhere; js and alpha are equal on average; 4/8 against 3.75/8 within the noise
    assert first.words == "reverse_kl (75.0) > js (50.0) ≈ alpha 0.5 (50.0) ≈ forward_kl (46.9)"
    assert first.values == [0.75, 0.5, 0.5, 0.46875]
    assert first.steps[0] == (0.25, 0.25, 0.25)
    assert second.words.count("≈") == 3
    # along the other setting, the α stays with its divergence
    along = ordering(comparison, "pass@1", by="beta")
    assert {one.at["divergence"]: one.words for one in along} == {
        "reverse_kl": "beta 0.1 (75.0) > beta 0.3 (12.5)",
        "js": "beta 0.1 (50.0) > beta 0.3 (12.5)",
        "alpha": "beta 0.1, alpha 0.5 (50.0) > beta 0.3, alpha 0.5 (12.5)",
        "forward_kl": "beta 0.1 (46.9) > beta 0.3 (12.5)",
    }
    assert [one.metric for one in orderings(comparison)] == [
        *("pass@1", "pass@1"), *("pass@4", "pass@4"), *("distinct_correct", "distinct_correct"),
    ]  # fmt: skip
    with pytest.raises(UserError, match="did not vary 'divergenc'; did you mean 'divergence'"):
        ordering(comparison, "pass@1", by="divergenc")
    with pytest.raises(UserError, match="No run of the sweep has the metric 'pass@3'"):
        ordering(comparison, "pass@3")


def test_a_verdict_of_many_is_short_and_true() -> None:
    sentences = verdict(swept())
    # pass@1: base 2.5/8, reverse KL 6.5/8, js and grpo 4.5/8
    assert sentences[0] == f"base has pass@1 31.2 % and pass@4 {100 * 60 / 70:.1f} %."
    assert sentences[1].startswith(
        "reverse_kl has the highest pass@1 of the trained (81.2 %), significantly above base"
    )
    assert sentences[1].endswith("; 2 of the 2 others are significantly lower.")
    assert len(sentences) == 3

    many = {"base": evaluation("base", [6] * 40)} | {
        f"run {i}": evaluation(f"run {i}", [5 - i % 2] * 40) for i in range(7)
    }
    best = verdict(compare(many, "base"))[1]
    # 4 runs tie at 5/8 and 3 lie at 4/8; all are below the base
    assert best == (
        "run 0 has the highest pass@1 of the trained (62.5 %), significantly below base (−12.5 points [−12.5, −12.5]); "
        "3 of the 6 others are significantly lower."
    )
    same = {label: evaluation(label, [5] * 40) for label in many}
    assert (
        "not significantly different from base (0.0 points [0.0, 0.0]); 0 of the 6 others"
        in verdict(compare(same, "base"))[1]
    )


def rendered(shown: Table, width: int) -> str:
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO())
    console.print(shown)
    return console.export_text()


def lines(comparison: Comparison, width: int = 100) -> list[str]:
    return rendered(table(comparison), width).splitlines()


def test_the_table_of_a_sweep_is_its_pools() -> None:
    found = lines(swept())
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in found if line.startswith("│")]
    # pass@1 with the range of the seeds (4 and 5 of 8), pass@4, distinct correct, retention
    assert [cells[1][:2], cells[2][:2]] == [["js", "56.2"], ["", "50.0–62.5"]]
    assert [row[0] for row in cells] == ["base", "js", "", "reverse_kl", "", "grpo"]
    assert cells[1][3] == "4.50"
    assert "Means over 2 training seeds" in " ".join(found)


def every_measure(value: float) -> dict[str, Measured]:
    """Of 40 problems, all with the same value, in the order of `measures.load`."""
    names = [
        *((f"{stem}@T{t}", "diversity", "BLEU") for t in ("0.6", "1.0", "1.4") for stem in ("self_bleu", "entropy")),
        ("reverse_kl", "divergence", "nats per token"),
        ("kl_per_answer", "divergence", "nats per answer"),
        ("preference_accuracy", "calibration", "share"),
        ("ece_bradley_terry", "calibration", "share"),
    ]
    return {name: measured(name, [value] * 40, [1] * 40, kind, unit) for name, kind, unit in names}


def test_a_wide_table_fits_a_hundred_characters() -> None:
    labels = [f"{divergence}-beta{beta}" for divergence in ("reverse_kl", "js", "forward_kl") for beta in (0.1, 0.3, 1)]
    results = {label: evaluation(label, [4] * 40) for label in ("base", *labels)}
    settings = {label: {"divergence": label.partition("-")[0], "beta": float(label[-1])} for label in labels}
    measures = {label: every_measure(0.5) for label in labels}
    for comparison in (compare(results, "base", measures=measures), compare(results, "base", settings=settings)):
        found = lines(comparison)
        assert "…" not in "".join(found)
        assert max(len(line.rstrip()) for line in found) <= 100
    row = next(line for line in lines(compare(results, "base", measures=measures)) if "js-beta0.1" in line)
    # pass@1, pass@4, distinct, pairs right, KL, self-BLEU, ECE
    assert re.findall(r"[\d.]+", row.partition("0.1 ")[2]) == ["50.0", "98.6", "4.00", "50.0", "0.500", "0.500", "50.0"]


def test_measures_are_rows_of_a_small_table_and_stand_in_the_json() -> None:
    results = {"base": evaluation("base", [4] * 40), "js": evaluation("js", [5] * 40)}
    base = {"reverse_kl": measured("reverse_kl", [0] * 40, [1] * 40)}
    comparison = compare(results, "base", measures={"base": base, "js": every_measure(0.25)})
    assert headlines(comparison) == ["preference_accuracy", "kl_per_answer", "self_bleu@T1.0", "ece_bradley_terry"]
    text = "\n".join(lines(comparison, 90))
    assert re.search(r"│ KL, nats +│ +– │ +0.250 \[0.250, 0.250\] │", text)
    assert re.search(r"│ ECE, % +│ +– │ +25.0 \[25.0, 25.0\] │", text)
    assert "KL: What kl_per_answer is." in " ".join(text.split())
    content = json.loads(to_json(comparison))
    assert content["runs"]["js"]["measures"]["reverse_kl"]["value"] == 0.25
    assert content["runs"]["base"]["measures"] == {"reverse_kl": {"value": 0.0, "low": 0.0, "high": 0.0}}
    assert content["measures"]["reverse_kl"] == {
        "kind": "divergence", "unit": "nats per token", "description": "What reverse_kl is.",
    }  # fmt: skip
    # kind by kind, whichever run has them
    assert [one.kind for one in comparison.measures.values()] == ["diversity"] * 6 + ["divergence"] * 2 + [
        "calibration"
    ] * 2
    assert (content["pools"], content["orderings"]) == ({}, [])


def test_the_json_of_a_sweep_has_pools_and_orders() -> None:
    content = json.loads(to_json(swept()))
    assert content["pools"]["js"]["settings"] == {"divergence": "js"}
    assert content["pools"]["js"]["minus_base"]["pass@1"]["value"] == 0.25
    assert content["orderings"][0]["words"] == "reverse_kl (81.2) > js (56.2)"
    assert "values" not in content


def test_answers_without_a_verifier_are_compared_by_their_measures() -> None:
    labels = ("base", "js", "reverse_kl")
    results = {label: evaluation(label, [0] * 40, verifier=None) for label in labels}
    better = np.array([1, 1, 1, 0] * 10)
    measures = {
        "base": {"reverse_kl": measured("reverse_kl", [0] * 40, [1] * 40)},
        "js": {"preference_accuracy": measured("preference_accuracy", better, [1] * 40, "calibration", "share")},
        "reverse_kl": {
            "preference_accuracy": measured("preference_accuracy", 1 - better, [1] * 40, "calibration", "share")
        },
    }
    comparison = compare(results, "base", measures=measures)
    assert (comparison.k, comparison.dropped, comparison.groups, comparison.differences) == ((), {}, [], [])
    run = comparison.runs["js"]
    assert (run.pass_at_k, run.distinct_correct, run.retention, run.tokens_correct) == ({}, None, {}, None)
    assert run.tokens is not None
    assert run.tokens.value == 5.0
    assert verdict(comparison) == [
        "js has the highest preference accuracy of the trained (75.0 %); the other is significantly lower."
    ]
    text = "\n".join(lines(comparison))
    assert re.search(r"│ pairs right, % +│ +– │ +75.0 \[", text)
    assert re.search(r"│ answer, tokens +│ +5.0 \[5.0, 5.0\] ", text)
    assert "Distinct" not in text
    json.loads(to_json(comparison))


# the same runs on a further task: js forgets in both seeds, the others only scatter
ELSEWHERE = {
    "base": [6] * 40,
    "js-seed0": [4] * 40,
    "js-seed1": [2] * 40,
    "reverse_kl-seed0": [6] * 40,
    "reverse_kl-seed1": [6] * 40,
    "grpo": [7, 5] * 20,
}


def with_further(labels: Sequence[str], settings: Mapping[str, Mapping[str, Any]]) -> Comparison:
    return compare(
        {label: evaluation(label, COUNTS[label]) for label in labels},
        "base",
        settings=settings,
        further={label: {"products": evaluation(label, ELSEWHERE[label])} for label in labels},
    )


def test_further_tasks_are_compared_and_pooled_like_the_main_one() -> None:
    comparison = with_further(list(COUNTS), SWEEP)
    products = comparison.further["products"]
    js = products.pools["js"]
    assert list(products.pools) == list(comparison.pools)
    assert js.runs == ("js-seed0", "js-seed1")
    # (4 + 2) / 2 of 8, against 6 of 8 everywhere
    assert js.pass_at_k[1].value == 3 / 8
    assert js.minus_base["pass@1"] == (-3 / 8, -3 / 8, -3 / 8)
    # the base finds all with four answers (C(2, 4) = 0); js 1 − C(4, 4)/70 and 1 − C(6, 4)/70
    assert js.retention[4] is not None
    assert js.retention[4].value == pytest.approx((69 + 55) / 140, rel=1e-12)
    assert js.gain[4] is None
    # the main numbers are what they are without it
    assert comparison.pools == swept().pools
    assert comparison.differences == swept().differences
    assert verdict(comparison) == [
        *verdict(swept()),
        "On products, 1 of the 3 trained is significantly below base in pass@1, furthest js (−37.5 points [−37.5, "
        "−37.5]); 1 of the 3 trained is significantly below base in pass@4, furthest js (−11.4 points [−11.4, −11.4]).",
    ]


def test_a_verdict_tells_what_each_of_few_runs_forgot() -> None:
    comparison = with_further(["base", "js-seed0", "grpo", "reverse_kl-seed0"], {})
    # 4 of 8 and 69/70 against 6 of 8 and 1
    assert verdict(comparison)[-1] == (
        "On products, against base: js-seed0 lowered pass@1 (−25.0 points [−25.0, −25.0]) and lowered pass@4 "
        "(−1.4 points [−1.4, −1.4]); grpo, reverse_kl-seed0 show no significant change."
    )
    again = compare(
        {label: evaluation(label, [4] * 40) for label in ("base", "js")},
        "base",
        further={"base": {"products": evaluation("base", [2] * 40)}, "js": {"products": evaluation("js", [4] * 40)}},
    )
    assert verdict(again)[-1].startswith("On products, against base: js raised pass@1 (+25.0 points [25.0, 25.0]) and")
    one = with_further(["base", "reverse_kl-seed0"], {})
    assert verdict(one)[-1] == "On products, against base: reverse_kl-seed0 shows no significant change."
    assert len(verdict(with_further(["base"], {}))) == 0


def test_a_sweep_that_forgets_nothing_says_so() -> None:
    labels = ["base", "reverse_kl-seed0", "reverse_kl-seed1"]
    settings = {label: SWEEP[label] for label in labels[1:]}
    assert verdict(with_further(labels, settings))[-1] == "On products, none of the 1 trained differs significantly."


def test_further_tasks_have_a_table_each_and_stand_in_the_json() -> None:
    comparison = with_further(["base", "js-seed0", "grpo"], {})
    (found,) = further_tables(comparison)
    text = rendered(found, 80)
    assert "On products" in text
    assert re.search(r"│ pass@1, % +│ 75.0 \[75.0, 75.0\] │ 50.0 \[50.0, 50.0\] │ 75.0 \[", text)
    assert re.search(r"│ retention@4, % │ +100 \[100, 100\] │ 98.6 \[98.6, 98.6\] │", text)
    assert "distinct" not in text
    assert "40 problems, 8 answers each." in text
    assert max(map(len, text.splitlines())) <= 80
    pooled = rendered(further_tables(with_further(list(COUNTS), SWEEP))[0], 100)
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in pooled.splitlines() if line.startswith("│")]
    # the mean of 4 and 2 of 8 with its range; 62/70 with that of 55/70 and 69/70
    assert [row[:3] for row in cells[1:3]] == [["js", "37.5", "88.6"], ["", "25.0–50.0", "78.6–98.6"]]
    assert further_tables(swept()) == []

    content, without = json.loads(to_json(comparison)), json.loads(to_json(swept()))
    assert without["further"] == {}
    products = content["further"]["products"]
    assert set(products) == set(content) == set(without)
    assert products["runs"]["js-seed0"]["pass_at_k"]["1"]["value"] == 0.5
    assert products["differences"][0] == {
        "run": "js-seed0", "against": "base", "k": 1, "estimate": {"value": -0.25, "low": -0.25, "high": -0.25},
    }  # fmt: skip
    assert not {"results", "values"} & set(products)


def test_a_run_without_a_further_task_is_refused() -> None:
    results = {label: evaluation(label, [4] * 40) for label in ("base", "js")}
    there = {label: {"products": evaluation(label, [4] * 40)} for label in results}
    with pytest.raises(UserError, match="'js' was not evaluated on the further task 'products', as others were"):
        compare(results, "base", further={"base": there["base"]})
    with pytest.raises(UserError, match="no evaluation 'jss' to compare; did you mean 'js'"):
        compare(results, "base", further=there | {"jss": there["js"]})


def test_what_does_not_belong_together_is_refused() -> None:
    results = {"base": evaluation("base", [4] * 40)}
    short = {"reverse_kl": measured("reverse_kl", [1] * 39, [1] * 39)}
    with pytest.raises(UserError, match="'reverse_kl' of 'base' was measured on 39 problems, but 40 were evaluated"):
        compare(results, "base", measures={"base": short})
    with pytest.raises(UserError, match="no evaluation 'bas' to compare; did you mean 'base'"):
        compare(results, "base", measures={"bas": {}})
    with pytest.raises(UserError, match="no evaluation 'js' to compare"):
        compare(results, "base", settings={"js": {"seed": 1}})


def test_only_seeds_can_be_swept_and_names_stay_apart() -> None:
    results = {label: evaluation(label, [4] * 40) for label in ("base", "seed0", "seed1")}
    comparison = compare(results, "base", settings={"seed0": {"seed": 0}, "seed1": {"seed": 1}})
    assert {name: pool.runs for name, pool in comparison.pools.items()} == {
        "base": ("base",),
        "trained": ("seed0", "seed1"),
    }
    assert orderings(comparison) == []
    results = {label: evaluation(label, [4] * 40) for label in ("base", "js", "js-seed0")}
    comparison = compare(results, "base", settings={"js-seed0": {"divergence": "js", "seed": 0}})
    assert list(comparison.pools) == ["base", "js", "js (sweep)"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"divergence": "js", "beta": 0.1}, "js, beta 0.1"),
        ({"divergence": "alpha", "beta": 0.1, "alpha": 0.5}, "alpha 0.5, beta 0.1"),
        ({"beta": 1e-6, "match_slope": True, "average": False}, "beta 1e-06, match_slope, no average"),
    ],
)
def test_settings_in_words(settings: dict[str, Any], words: str) -> None:
    assert in_words(settings) == words


@pytest.mark.parametrize(
    ("estimate", "unit", "text"),
    [
        ((0.3412, 0.3, 0.4), "%", ["34.1", "30.0", "40.0"]),
        ((0.9996, 0.99, 1.0), "%", ["100.0", "99.0", "100"]),
        ((0.01234, -0.001, 0.02), "nats per token", ["0.0123", "−0.0010", "0.0200"]),
        ((12.34, 11, 13), "nats per answer", ["12.3", "11.0", "13.0"]),
        ((0.0, 0.0, 0.0), "nats per answer", ["0", "0", "0"]),
        ((1234.56, 1200, 1300), "tokens", ["1,234.6", "1,200.0", "1,300.0"]),
    ],
)
def test_numbers_are_printed_in_their_unit(estimate: tuple[float, float, float], unit: str, text: list[str]) -> None:
    assert numbers(Estimate(*estimate), unit) == text
