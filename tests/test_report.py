"""Comparisons and the report, on evaluations whose counts are written here."""

from __future__ import annotations

import dataclasses
import html
import io
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from posttrain.errors import UserError
from posttrain.evaluation.compare import Comparison, compare
from posttrain.evaluation.evaluate import EvaluationResult
from posttrain.evaluation.figures import Style, _hidden, _logged_line, _overlap, _together
from posttrain.evaluation.measures import Bin, Measured
from posttrain.evaluation.metrics import pass_at_k
from posttrain.evaluation.report import write_report
from posttrain.evaluation.summary import table, to_json, verdict

N = 8


def evaluation(
    label: str,
    c: Sequence[int],
    *,
    distinct: int = 1,
    prompt: str = "2+2",
    wrong: str = "no",
    n: int = N,
    **identity: Any,
) -> EvaluationResult:
    """c correct of n answers to each problem, in `distinct` different texts; even problems have 1 solution, odd 5."""
    answers: list[list[str | None]] = [[f"{i % distinct}" for i in range(right)] + [wrong] * (n - right) for right in c]
    ones = np.ones(len(c), dtype=np.int64)
    return EvaluationResult(
        label=label,
        identity={
            "task": "sums", "data": "d", "verifier": "exact", "n": n, "temperature": 1.0, "top_p": 0.9,
            "max_tokens": 16, "model": label, "seed": 3,
        } | identity,
        k=(1, 4),
        resamples=500,
        confidence=0.95,
        statuses={},
        metrics={},
        versions={},
        keys=[str(i) for i in range(len(c))],
        prompts=[prompt] * len(c),
        solutions=np.arange(len(c), dtype=np.int64) % 2 * 4 + 1,
        answers=answers,
        correct=[[True] * right + [False] * (n - right) for right in c],
        tokens=ones * 5 * n,
        tokens_correct=np.array(c) * 4,
        tokens_wrong=(n - np.array(c)) * 6,
        samples=ones * n,
        truncated=ones,
    )  # fmt: skip


# 40 problems; the collapsed run solves the odd ones always and the even ones never
BASE, COLLAPSED, KEPT = [2, 3] * 20, [0, 8] * 20, [4, 5] * 20


@pytest.fixture
def comparison() -> Comparison:
    results = {
        "base": evaluation("base", BASE, distinct=3),
        "grpo": evaluation("grpo", COLLAPSED),
        "dph_rl": evaluation("dph_rl", KEPT, distinct=4),
    }
    return compare(results, "base")


def report(comparison: Comparison, folder: Path, **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "title": "A report", "recipe_yaml": "name: sums\n", "provenance": {"git": "0abc", "seeds": {"training": 5}},
        "histories": {}, "command": "posttrain run sums",
    } | changes  # fmt: skip
    write_report(comparison, folder / "report.html", **arguments)
    return (folder / "report.html").read_text(encoding="utf-8")


def test_numbers_by_hand(comparison: Comparison) -> None:
    base, grpo, dph_rl = comparison.runs.values()
    # pass@1: (2 + 3) / 16, (0 + 8) / 16, (4 + 5) / 16
    assert [run.pass_at_k[1].value for run in (base, grpo, dph_rl)] == [0.3125, 0.5, 0.5625]
    # pass@4: 1 − C(6, 4)/C(8, 4) = 55/70 and 1 − C(5, 4)/C(8, 4) = 65/70
    assert base.pass_at_k[4].value == pytest.approx(60 / 70, rel=1e-12)
    assert grpo.pass_at_k[4].value == 0.5
    assert list(base.pass_at_k) == [1, 2, 4]
    # distinct: min(c, 3), one on every other problem, all 4
    assert [run.distinct_correct and run.distinct_correct.value for run in (base, grpo, dph_rl)] == [2.5, 0.5, 4.0]
    # retention@4 of grpo: the odd problems, 65 / (55 + 65); gain: 5 / (15 + 5)
    assert grpo.retention[4] is not None
    assert grpo.retention[4].value == pytest.approx(65 / 120, rel=1e-12)
    assert grpo.gain[4] is not None
    assert grpo.gain[4].value == pytest.approx(5 / 20, rel=1e-12)
    # base against itself: 2 pass@4 − pass@8 = 2·55/70 − 1 and 2·65/70 − 1, over their pass@4
    assert base.retention[4] is not None
    assert base.retention[4].value == pytest.approx((40 + 60) / 120, rel=1e-12)
    assert base.gain[4] is None
    assert base.tokens is not None
    assert (base.tokens.value, base.truncated and base.truncated.value) == (5.0, 1 / N)


def test_differences_are_paired_and_main_is_compared_with_the_others(comparison: Comparison) -> None:
    found = {(d.run, d.against, d.k): d.estimate for d in comparison.differences}
    assert list(found) == [
        (run, against, k) for run, against in (("grpo", "base"), ("dph_rl", "base"), ("dph_rl", "grpo")) for k in (1, 4)
    ]
    # 2 more of 8 on every problem: nothing varies, so the interval is a point; unpaired it would not be
    assert found["dph_rl", "base", 1] == (0.25, 0.25, 0.25)
    assert found["grpo", "base", 4].value == pytest.approx(0.5 - 60 / 70, rel=1e-12)
    assert found["grpo", "base", 4].high < 0


def test_the_loss_is_shown_where_it_sits(comparison: Comparison) -> None:
    few, many = comparison.groups
    assert (few.name, few.problems, many.name, many.problems) == ("≤ 3 solutions", 20, "> 3 solutions", 20)
    assert few.pass_at_k["grpo"].value == 0.0
    assert many.pass_at_k["grpo"].value == 1.0
    assert [d.estimate.value for d in many.differences] == pytest.approx([5 / 70, 5 / 70], rel=1e-12)


def test_problems_without_enough_verdicts_are_left_out_of_every_run() -> None:
    base, other = evaluation("base", BASE), evaluation("other", KEPT)
    broken = dataclasses.replace(
        other,
        answers=[other.answers[0][:3], *other.answers[1:]],
        correct=[other.correct[0][:3], *other.correct[1:]],
    )
    both = compare({"base": base, "other": broken}, "base")
    assert both.dropped == {1: 0, 4: 1}
    expected = np.mean([pass_at_k(N, c, 4) for c in BASE[1:]])
    assert both.runs["base"].pass_at_k[4].value == pytest.approx(expected, rel=1e-12)
    assert both.runs["other"].without_verdict == 5
    assert both.draws == N
    assert "Problems left out of pass@4 for want of verdicts: 1." in str(table(both).caption)


def test_the_verdict_follows_the_data(comparison: Comparison) -> None:
    sentences = verdict(comparison)
    assert sentences[0].startswith("Against base, grpo raised pass@1 (+18.8 points [")
    assert "and lowered pass@4 (−35.7 points [−" in sentences[0]
    assert re.search(r"dph_rl shows no significant difference in pass@1 .* and is higher in pass@4 \(\+", sentences[2])

    swapped = compare({"base": evaluation("base", KEPT), "grpo": evaluation("grpo", BASE)}, "base")
    assert verdict(swapped)[0].startswith("Against base, grpo lowered pass@1 (−25.0 points [−25.0, −25.0])")
    same = compare({"base": evaluation("base", BASE), "grpo": evaluation("grpo", BASE[::-1])}, "base")
    assert "no significant change in pass@1 (0.0 points [−" in verdict(same)[0]


def test_what_cannot_be_compared_is_refused(comparison: Comparison) -> None:
    base = comparison.results["base"]
    with pytest.raises(UserError, match=r"'other' and 'base' cannot be compared \('data' is 'e' there and 'd' here\)"):
        compare({"base": base, "other": evaluation("other", BASE, data="e")}, "base")
    with pytest.raises(UserError, match="no evaluation 'bse' to compare; did you mean 'base'"):
        compare({"base": base}, "bse")
    with pytest.raises(UserError, match="No problem has 4 verdicts"):
        compare({"base": evaluation("base", [1, 1], n=3)}, "base")


def test_json_holds_the_numbers(comparison: Comparison) -> None:
    content = json.loads(to_json(comparison))
    assert content["runs"]["grpo"]["pass_at_k"]["1"]["value"] == 0.5
    assert content["verdict"] == verdict(comparison)
    assert "results" not in content


def test_the_table_fits_a_terminal(comparison: Comparison) -> None:
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(comparison))
    text = console.export_text()
    assert "…" not in text
    lines = text.splitlines()
    labels = next(line for line in lines if "grpo" in line).split("┃")
    column = next(place for place, label in enumerate(labels) if label.strip() == "grpo")
    cells = [line.split("│")[column].split()[0] for line in lines if line.startswith("│")]
    assert cells == ["50.0", "50.0", "0.50", "54.2"]
    assert "40 problems, 8 answers each" in text


class _Page(HTMLParser):
    """Counts tags that a well-formed page closes, and collects what would be loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset")]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


HISTORY = [{"step": s, "reward": 0.1 * s, "entropy": 1.0 / (s + 1), "kl": float("nan")} for s in range(6)]


def test_the_page_is_whole_and_needs_no_network(comparison: Comparison, tmp_path: Path) -> None:
    text = report(comparison, tmp_path, histories={"grpo": [*HISTORY, {"step": 5, "train_runtime": 1.0}], "dph_rl": []})
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert "script" not in page.tags
    assert all(address.startswith("#") for address in page.addresses)
    assert "http" not in text
    assert "@import" not in text
    assert re.search(r"url\((?!#)", text) is None
    assert len(page.ids) == len(set(page.ids))
    # every reference inside a drawing points into the same page
    assert {a[1:] for a in page.addresses} | set(re.findall(r"url\(#([^)]+)\)", text)) <= set(page.ids)
    # pass@k, bars, reward, entropy: a metric of NaN alone and a summary line draw nothing
    assert text.count("<svg") == 4
    # no placeholder colour is left, so every line follows the theme
    assert re.search(r"#f[de]00", text) is None
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_the_page_shows_the_numbers(comparison: Comparison, tmp_path: Path) -> None:
    text = html.unescape(report(comparison, tmp_path))
    for sentence in verdict(comparison):
        assert sentence in text
    for run in comparison.runs.values():
        value, low, high = (f"{100 * x:.1f}" for x in run.pass_at_k[4])
        assert f'{value}<span class="interval">[{low}, {high}]</span>' in text
    # 20 problems that base solves with pass@4 = 55/70 are never solved by grpo
    assert "Of 40 problems that base solves with a pass@4 of at least ½, grpo lost 20, dph_rl lost 0" in text
    assert "0 of 8 correct" in text
    for words in ("posttrain run sums", "name: sums", "0abc", '{"training": 5}'):
        assert words in text


def test_model_text_is_escaped(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>"
    results = {
        "base": evaluation("base", BASE, wrong=attack, prompt=attack),
        "<b>run</b>": evaluation("run", COLLAPSED, wrong=attack),
    }
    text = report(compare(results, "base"), tmp_path, title=attack, histories={"<b>run</b>": HISTORY}, command=attack)
    assert "<script" not in text
    assert "<b>" not in text
    # title twice, command, five prompts, and their wrong answers in two runs
    assert text.count("&lt;script&gt;") == 2 + 1 + 5 + 10


def test_a_single_policy_can_be_reported(tmp_path: Path) -> None:
    alone = compare({"base": evaluation("base", [N] * 6)}, "base")
    text = report(alone, tmp_path)
    assert "Paired differences" not in text
    assert '100<span class="interval">[100, 100]</span>' in text.replace("\n", "")


BINS = (Bin(0.5, 0.75, 30, 0.6, 0.5), Bin(0.75, 1.0, 10, 0.9, 0.8))
KINDS = {
    "diversity": {f"self_bleu@T{t}": "BLEU" for t in ("0.6", "1.0")} | {"entropy@T1.0": "nats per token"},
    "divergence": {"reverse_kl": "nats per token", "kl_per_answer": "nats per answer"},
    "calibration": {"preference_accuracy": "share", "ece_likelihood": "share"},
}
SECTIONS = {"diversity": "Diversity", "divergence": "Divergence against accuracy", "calibration": "Calibration"}


def measures(value: float, *kinds: str, text: str = "What it is.") -> dict[str, Measured]:
    """Measures of 40 problems that all have this value."""
    return {
        name: Measured(name, kind, unit, text, np.full(40, value), np.ones(40), BINS if name.startswith("ece_") else ())
        for kind in kinds
        for name, unit in KINDS[kind].items()
    }


def headings(text: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", text)


@pytest.mark.parametrize("kinds", [(), ("divergence",), ("diversity",), ("calibration",), tuple(KINDS)])
def test_there_are_sections_exactly_for_what_was_measured(kinds: tuple[str, ...], tmp_path: Path) -> None:
    results = {"base": evaluation("base", BASE), "js": evaluation("js", KEPT)}
    found = {"base": measures(0.25, *kinds), "js": measures(0.5, *kinds)}
    text = html.unescape(report(compare(results, "base", measures=found), tmp_path))
    assert set(headings(text)) & set(SECTIONS.values()) == {SECTIONS[kind] for kind in kinds}
    # 0.5 with an interval of no width, in its unit and as a share
    text = text.replace("\n", "")
    in_unit, share = (f'{x}<span class="interval">[{x}, {x}]</span>' for x in ("0.500", "50.0"))
    assert (in_unit in text) == bool({"divergence", "diversity"} & set(kinds))
    assert (share in text) == ("calibration" in kinds)


def sweep(**changes: Any) -> Comparison:
    """4 divergences at 2 β with 2 seeds each, and a baseline."""
    results, settings = {"base": evaluation("base", BASE)}, {}
    found = {"base": measures(0.0, *KINDS)}
    for place, divergence in enumerate(("reverse_kl", "js", "alpha", "<i>kl</i>")):
        for beta in (0.1, 0.3):
            for seed in (0, 1):
                label = f"{divergence}-{beta}-{seed}"
                results[label] = evaluation(label, [5 - place + seed, 4] * 20, **changes)
                settings[label] = {"divergence": divergence, "beta": beta, "seed": seed}
                found[label] = measures(place + beta, *KINDS, text="<b>what</b>")
    results["grpo"] = evaluation("grpo", COLLAPSED, **changes)
    return compare(results, "base", measures=found, settings=settings)


def test_a_sweep_is_shown_by_its_pools(tmp_path: Path) -> None:
    comparison = sweep()
    histories = {label: [{"step": s, "rewards/margins": s + float(label[-1])} for s in range(4)] for label in
                 comparison.runs if label[-1] in "01"}  # fmt: skip
    text = report(comparison, tmp_path, histories=histories)
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert "script" not in page.tags
    assert not {"i", "b"} & page.tags
    assert all(address.startswith("#") for address in page.addresses)
    assert "http" not in text
    assert len(page.ids) == len(set(page.ids))
    assert re.search(r"#f[de]00", text) is None
    plain = html.unescape(text)
    assert headings(plain) == [
        "What each policy solves", "pass@k", "Paired differences to base", "Order of divergence",
        "Divergence against accuracy", "Diversity", "Calibration", "By number of solutions", "Training",
        "Problems that were lost", "How to read this", "Reproduce",
    ]  # fmt: skip
    # js at either β: pass@1 of (4 + 4) / 16 and (5 + 4) / 16, on average 53.1 %
    assert re.search(
        r'53\.1\n?<span class="interval">\[[\d.]+, [\d.]+\]</span>\n?<span class="seeds">50.0 56.2</span>', text
    )
    # one colour per divergence, one dash per β: pools have their own look each
    looks = {re.search(rf'<span class="run (key-\d)" style="([^"]+)">{name}</span>', plain).groups() for name in  # type: ignore[union-attr]
             comparison.pools}  # fmt: skip
    assert len(looks) == len(comparison.pools) == 10
    js = [re.search(rf'var\(--run-(\d)\)">js, beta {beta}</span>', plain) for beta in (0.1, 0.3)]
    assert len({match.group(1) for match in js if match is not None}) == 1
    # pass@k, two frontiers, self-BLEU by temperature, margins; ten pools are too many for bars and reliability
    assert text.count("<svg") == 5
    # pass@1: (5 + 4 + 6 + 4) / 32, then an eighth of an answer less on every other problem, at both β
    assert plain.count("reverse_kl (59.4) > js (53.1) > alpha (46.9) > <i>kl</i> (40.6)") == 2


def test_curves_of_a_pool_are_means_over_its_seeds() -> None:
    first, second = (np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0])), (np.array([2.0, 3.0]), np.array([7.0, 0.0]))
    steps, values = _together([first, (np.array([]), np.array([])), second])
    # steps 2 and 3 are common to the two that logged anything
    assert (steps.tolist(), values.tolist()) == ([2.0, 3.0], [[5.0, 6.0], [7.0, 0.0]])
    assert [len(values) for values in _together([])] == [0, 0]


def test_a_pool_is_drawn_as_the_mean_and_the_range_of_its_seeds() -> None:
    steps = np.arange(3.0)
    axes = Figure().add_subplot()
    _logged_line(axes, steps, np.array([[1.0, 2.0, 6.0], [3.0, 2.0, 4.0]]), Style(1), banded=True)
    (mean,), (band,) = axes.lines, axes.collections
    assert list(mean.get_ydata()) == [2.0, 2.0, 5.0]
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
    assert corners == {(0.0, 1.0), (0.0, 3.0), (1.0, 2.0), (2.0, 4.0), (2.0, 6.0)}
    # of one seed what it logged; in a crowd the mean alone
    axes = Figure().add_subplot()
    _logged_line(axes, steps, np.array([[1.0, 2.0, 6.0]]), Style(1), banded=True)
    assert [list(line.get_ydata()) for line in axes.lines] == [[1.0, 2.0, 6.0]] * 2
    assert len(axes.collections) == 0
    axes = Figure().add_subplot()
    _logged_line(axes, steps, np.ones((4, 3)), Style(1), banded=False)
    assert (len(axes.lines), len(axes.collections)) == (1, 0)


def test_metrics_that_a_trainer_names_are_drawn_after_the_usual_ones(comparison: Comparison, tmp_path: Path) -> None:
    history = [{"step": s, "reward": 0.1 * s, "apo/length": 7.0 + s, "apo/other": 1.0} for s in range(4)]
    histories = {"grpo": history, "dph_rl": history}
    text = report(comparison, tmp_path, histories=histories, curves={"apo/length": "length, tokens"})
    assert re.findall(r'aria-label="([^"]*) by step', text) == ["mean reward", "length, tokens"]
    without = report(comparison, tmp_path, histories=histories)
    assert re.findall(r'aria-label="([^"]*) by step', without) == ["mean reward"]


def test_labels_keep_off_one_another() -> None:
    left, right = (0.0, 0.0, 10.0, 4.0), (6.0, 2.0, 20.0, 9.0)
    assert _overlap(left, right) == 4 * 2
    assert _overlap(left, (10.0, 4.0, 12.0, 6.0)) == 0.0
    # a box of 40 of which 20 lie outside, and 8 under another
    assert _hidden(left, [right], (0.0, 2.0, 30.0, 30.0)) == 8 + 3 * 20


def further(results: dict[str, EvaluationResult], **changes: Any) -> dict[str, dict[str, EvaluationResult]]:
    """A further task that the base solves in 6 of 8 answers, a collapsed run in 2, and all others as the base."""
    return {label: {"products": evaluation(label, [2 if label == "grpo" else 6] * 40, **changes)} for label in results}


@pytest.mark.parametrize("labels", [["base", "grpo"], ["base", "grpo", "dph_rl"], [*"abcde", "base", "grpo"]])
def test_further_tasks_have_a_section_with_paired_differences(labels: list[str], tmp_path: Path) -> None:
    results = {label: evaluation(label, KEPT) for label in labels}
    comparison = compare(results, "base", further=further(results))
    text = report(comparison, tmp_path)
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    section = text[text.index("<h2>On other tasks</h2>") :]
    section = section[: section.index("<h2>By number of solutions</h2>")].replace("\n", "")
    assert "<h3>products</h3>" in section
    row = next(row for row in section.split("<tr>") if ">grpo</span>" in row)
    # 2 of 8 and 55/70, against 6 of 8 and 1: significant, so bold; and what was solved with four answers and is now
    assert re.findall(r'<td class="number">(?:<span class="strong">)?([^<]+)<', row) == [
        "25.0", "−50.0", "78.6", "−21.4", "78.6", "–",
    ]  # fmt: skip
    assert row.count("strong") == 2
    # two drawings, where there is more than one point to draw
    assert section.count("<svg") == (2 if len(labels) > 2 else 0)
    assert ("Drawings: what was learned" in section) == (len(labels) > 2)
    assert "On products, against base: grpo lowered pass@1 (−50.0 points" in html.unescape(text)
    assert "On other tasks" not in report(compare(results, "base"), tmp_path)


def test_further_tasks_of_a_sweep_are_shown_by_its_pools(tmp_path: Path) -> None:
    results = {"base": evaluation("base", BASE)}
    settings: dict[str, dict[str, Any]] = {}
    there = {"base": {"products": evaluation("base", [6] * 40)}}
    for place, divergence in enumerate(("reverse_kl", "js")):
        for beta in (0.1, 0.3):
            for seed in (0, 1):
                label = f"{divergence}-{beta}-{seed}"
                results[label] = evaluation(label, KEPT)
                settings[label] = {"divergence": divergence, "beta": beta, "seed": seed}
                there[label] = {"products": evaluation(label, [5 - 2 * place - seed] * 40)}
    text = html.unescape(report(compare(results, "base", settings=settings, further=there), tmp_path))
    section = text[text.index("<h2>On other tasks</h2>") :].replace("\n", "")
    # reverse KL: 5 and 4 of 8, below them the seeds
    row = next(row for row in section.split("<tr>") if ">reverse_kl, beta 0.1</span>" in row)
    assert re.search(r'56.2<span class="interval">\[56.2, 56.2\]</span><span class="seeds">62.5 50.0</span>', row)
    # (5 + 4) / 16 against (3 + 2) / 16, at both β
    assert text.count("reverse_kl (56.2) > js (31.2)") == 2
    assert "pass@1, % on products" in text


def test_a_page_without_pass_at_k_shows_what_there_is(tmp_path: Path) -> None:
    results = {label: evaluation(label, [0] * 40, n=0, verifier=None) for label in ("base", "js", "reverse_kl")}
    found = {"base": measures(0, "divergence")} | {label: measures(0.5, *KINDS) for label in ("js", "reverse_kl")}
    text = html.unescape(
        report(compare(results, "base", measures=found), tmp_path, histories={"js": [
            {"step": s, "rewards/accuracies": 0.5 + s / 10, "logps/chosen": -s} for s in range(4)]})
    )  # fmt: skip
    assert headings(text) == [
        "What each policy does", "Divergence against accuracy", "Diversity", "Calibration", "Training",
        "How to read this", "Reproduce",
    ]  # fmt: skip
    assert "pass@" not in text
    # frontier, self-BLEU, reliability, two training curves
    assert text.count("<svg") == 5
    assert "implicit reward accuracy, share by step" in text
