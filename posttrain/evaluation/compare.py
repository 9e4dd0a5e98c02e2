"""Compare policies that answered the same problems: intervals, paired differences, what was kept and what was lost.

Every number about one k is about the same problems in all runs: those with at least k verdicts in each of them. The
problems left out are counted in `Comparison.dropped`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from posttrain import atomic
from posttrain.errors import UserError, did_you_mean
from posttrain.evaluation import metrics
from posttrain.evaluation.evaluate import EvaluationResult
from posttrain.evaluation.metrics import Estimate, Floats

if TYPE_CHECKING:
    from rich.table import Table

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Run:
    """One policy in a comparison.

    Attributes:
        model: fingerprint of the policy.
        pass_at_k: pass@k by k, at every headline k and every power of two up to the largest (share of problems).
        distinct_correct: distinct correct answers per problem in `Comparison.draws` answers.
        retention: P(solved@k now | solved@k by the base) by headline k; of the base itself in a second, disjoint
            draw, where n ≥ 2k. None where the base solves nothing.
        gain: P(solved@k now | unsolved@k by the base) by headline k; None for the base, and where it solves all.
        tokens: per sample.
        tokens_correct: tokens per correct sample; None without any.
        tokens_wrong: tokens per wrong sample; None without any.
        truncated: share of samples that were cut off.
        without_verdict: number of samples that could not be judged.
    """

    model: str
    pass_at_k: dict[int, Estimate]
    distinct_correct: Estimate
    retention: dict[int, Estimate | None]
    gain: dict[int, Estimate | None]
    tokens: Estimate | None
    tokens_correct: Estimate | None
    tokens_wrong: Estimate | None
    truncated: Estimate | None
    without_verdict: int


@dataclass(frozen=True)
class Difference:
    """Paired difference of pass@k, `run` − `against` (share of problems)."""

    run: str
    against: str
    k: int
    estimate: Estimate


@dataclass(frozen=True)
class Group:
    """Problems with few or with many solutions: pass@max k of every run, and differences to the base."""

    name: str
    problems: int
    pass_at_k: dict[str, Estimate]
    differences: list[Difference]


@dataclass(frozen=True)
class Comparison:
    """Runs on the same problems.

    Attributes:
        base: label of the initial policy.
        main: label of the run that the others are compared with.
        task: name of the task.
        sampling: what all runs share of the settings that determine samples.
        problems: number of problems.
        k: headline k, increasing.
        n: answers per problem.
        draws: answers that `distinct_correct` is rarefied to.
        confidence: level of the intervals.
        resamples: bootstrap resamples behind them.
        dropped: problems left out, by k, because a run has fewer than k verdicts for them.
        runs: by label, the base first.
        differences: each run − base, then main − every other run, at k = 1 and the largest k.
        groups: few against many solutions; empty where the task does not count solutions.
        results: the evaluations behind it; not part of the JSON.
    """

    base: str
    main: str
    task: str
    sampling: dict[str, Any]
    problems: int
    k: tuple[int, ...]
    n: int
    draws: int
    confidence: float
    resamples: int
    dropped: dict[int, int]
    runs: dict[str, Run]
    differences: list[Difference]
    groups: list[Group]
    results: Mapping[str, EvaluationResult]

    def to_json(self) -> str:
        """Everything but the evaluations, and the verdict in words."""
        content = {field.name: _plain(getattr(self, field.name)) for field in fields(self) if field.name != "results"}
        return json.dumps({"verdict": verdict(self)} | content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def compare(results: Mapping[str, EvaluationResult], base: str, *, main: str | None = None) -> Comparison:
    """Compare evaluations of several policies on the same problems.

    Args:
        results: evaluations by label, in the order of presentation.
        base: label of the initial policy; its k, confidence, resamples and seed serve all.
        main: label of the run that is compared with every other; default the last one.

    Raises:
        UserError: a label is unknown, the evaluations differ in anything but the model, or no problem has enough
            verdicts.
    """
    labels = [base, *(label for label in results if label != base)]
    main = main or labels[-1]
    for label in (base, main):
        if label not in results:
            raise UserError(f"There is no evaluation '{label}' to compare{did_you_mean(label, results)}")
    start = results[base]
    for label in labels[1:]:
        difference = atomic.first_difference(_shared(results[label]), _shared(start))
        if difference is not None:
            raise UserError(
                f"The evaluations of '{label}' and '{base}' cannot be compared ({difference}): evaluate both with the "
                "same settings."
            )

    largest = start.k[-1]
    curve = sorted({*start.k, *(2**power for power in range(largest.bit_length())), 1})
    fewest = np.min([result.n for result in results.values()], axis=0)
    enough = {k: fewest >= k for k in curve}
    if not enough[largest].any():
        raise UserError(
            f"No problem has {largest} verdicts in every run, so pass@{largest} cannot be compared: look at the "
            "statuses in evaluation.json."
        )
    # problems × k, by run; rows of problems without enough verdicts are NaN and masked wherever they are used
    solved = {label: {k: _solved(results[label], k, enough[k]) for k in curve} for label in labels}
    draws = int(fewest[enough[largest]].min())
    at = _Bootstrap(start)
    comparison_ks = sorted({1, largest})
    pairs = [(label, base) for label in labels[1:]]
    pairs += [(main, label) for label in labels[1:] if label != main and main != base]
    return Comparison(
        base=base,
        main=main,
        task=str(start.identity["task"]),
        sampling=_shared(start),
        problems=len(start.keys),
        k=start.k,
        n=int(start.identity["n"]),
        draws=draws,
        confidence=start.confidence,
        resamples=start.resamples,
        dropped={k: int((~enough[k]).sum()) for k in start.k},
        runs={label: _run(results[label], start, solved[label], solved[base], enough, draws, at) for label in labels},
        differences=[
            Difference(run, against, k, at.difference(solved[run][k], solved[against][k], enough[k]))
            for run, against in pairs
            for k in comparison_ks
        ],
        groups=_groups(start, {label: solved[label][largest] for label in labels}, enough[largest], base, largest, at),
        results={label: results[label] for label in labels},
    )


class _Bootstrap:
    """The estimators with one seed, level and number of resamples, on the problems of a mask."""

    def __init__(self, result: EvaluationResult) -> None:
        self.settings: dict[str, Any] = {
            "resamples": result.resamples,
            "confidence": result.confidence,
            "seed": result.seed,
        }

    def mean(self, values: Floats, mask: Mask) -> Estimate:
        return metrics.bootstrap_interval(values[mask], **self.settings)

    def difference(self, a: Floats, b: Floats, mask: Mask) -> Estimate:
        return metrics.paired_difference(a[mask], b[mask], **self.settings)

    def ratio(self, top: npt.ArrayLike, bottom: npt.ArrayLike) -> Estimate | None:
        return metrics.ratio_interval(top, bottom, **self.settings)


def _shared(result: EvaluationResult) -> dict[str, Any]:
    """What must agree: all that determines the samples, without the model and the stream of random numbers."""
    return {
        name: value for name, value in result.identity.items() if name not in ("model", "seed", "prompts_per_chunk")
    }


def _solved(result: EvaluationResult, k: int, mask: Mask) -> Floats:
    values = np.full(len(mask), np.nan)
    values[mask] = metrics.pass_at_k(result.n[mask], result.c[mask], k)
    return values


def _run(
    result: EvaluationResult,
    start: EvaluationResult,
    solved: dict[int, Floats],
    solved_by_base: dict[int, Floats],
    enough: dict[int, Mask],
    draws: int,
    at: _Bootstrap,
) -> Run:
    n, c = result.n, result.c
    retention: dict[int, Estimate | None] = {}
    gain: dict[int, Estimate | None] = {}
    for k in start.k:
        mask = enough[k]
        if result is start:
            twice = mask & (n >= 2 * k)
            retention[k] = metrics.self_retention(n[twice], c[twice], k, **at.settings) if twice.any() else None
            gain[k] = None
        else:
            retention[k] = metrics.retention(solved_by_base[k][mask], solved[k][mask], **at.settings)
            gain[k] = metrics.gain(solved_by_base[k][mask], solved[k][mask], **at.settings)
    kept = np.flatnonzero(enough[start.k[-1]])
    distinct = metrics.distinct_correct([result.answers[i] for i in kept], [result.correct[i] for i in kept], draws)
    return Run(
        model=str(result.identity["model"]),
        pass_at_k={k: at.mean(values, enough[k]) for k, values in solved.items()},
        distinct_correct=at.mean(distinct, np.ones(len(distinct), dtype=np.bool_)),
        retention=retention,
        gain=gain,
        tokens=at.ratio(result.tokens, result.samples),
        tokens_correct=at.ratio(result.tokens_correct, c),
        tokens_wrong=at.ratio(result.tokens_wrong, n - c),
        truncated=at.ratio(result.truncated, result.samples),
        without_verdict=int((result.samples - n).sum()),
    )


def _groups(
    start: EvaluationResult, solved: dict[str, Floats], mask: Mask, base: str, k: int, at: _Bootstrap
) -> list[Group]:
    if start.solutions is None:
        return []
    median = int(np.median(start.solutions[mask]))
    few = start.solutions <= median
    halves = [(f"≤ {median} solutions", mask & few), (f"> {median} solutions", mask & ~few)]
    if not all(half.any() for _, half in halves):
        return []
    return [
        Group(
            name=name,
            problems=int(half.sum()),
            pass_at_k={label: at.mean(values, half) for label, values in solved.items()},
            differences=[
                Difference(label, base, k, at.difference(values, solved[base], half))
                for label, values in solved.items()
                if label != base
            ],
        )
        for name, half in halves
    ]


def _plain(value: Any) -> Any:
    """JSON-ready: estimates become objects."""
    if isinstance(value, Estimate):
        return value._asdict()
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def signed(value: float) -> str:
    """A share in points, with its sign: `+6.1`, `−15.9`."""
    text = f"{100 * value:+.1f}"
    return ("0.0" if text in ("+0.0", "-0.0") else text).replace("-", "−")


def points(estimate: Estimate) -> str:
    """A difference of shares in points, with its interval: `+6.1 [4.0, 8.2]`."""
    low, high = (f"{100 * end:.1f}".replace("-", "−") for end in (estimate.low, estimate.high))
    return f"{signed(estimate.value)} [{low}, {high}]"


def verdict(comparison: Comparison) -> list[str]:
    """The paired differences in sentences; a change is significant when its interval excludes 0."""
    by_pair: dict[tuple[str, str], list[Difference]] = {}
    for difference in comparison.differences:
        by_pair.setdefault((difference.run, difference.against), []).append(difference)
    return [
        f"Against {against}, {run} {' and '.join(_change(d, against == comparison.base) for d in changes)}."
        for (run, against), changes in by_pair.items()
    ]


def _change(difference: Difference, from_base: bool) -> str:
    name, estimate = f"pass@{difference.k}", difference.estimate
    numbers = points(estimate).replace(" [", " points [")
    if not estimate.excludes_zero:
        return f"shows no significant {'change' if from_base else 'difference'} in {name} ({numbers})"
    up = estimate.value > 0
    if from_base:
        return f"{'raised' if up else 'lowered'} {name} ({numbers})"
    return f"is {'higher' if up else 'lower'} in {name} ({numbers})"


def table(comparison: Comparison) -> Table:
    """The headline numbers, a metric a line and a run a column: three runs fit into 80 characters."""
    from rich.table import Table

    largest = comparison.k[-1]
    shown = Table(
        title=f"{comparison.task}: what each policy solves",
        caption=caption(comparison),
        caption_justify="left",
        title_justify="left",
    )
    shown.add_column("", no_wrap=True)
    for label in comparison.runs:
        shown.add_column(label, justify="right", no_wrap=True)
    runs = comparison.runs.values()
    for k in comparison.k:
        shown.add_row(f"pass@{k}, %", *(cell(run.pass_at_k[k], 100) for run in runs))
    shown.add_row("distinct correct", *(cell(run.distinct_correct, 1) for run in runs))
    shown.add_row(f"retention@{largest}, %", *(cell(run.retention[largest], 100) for run in runs))
    return shown


def cell(estimate: Estimate | None, scale: float) -> str:
    """An estimate and its interval; a dash where there is none."""
    if estimate is None:
        return "–"
    value, low, high = (scale * number for number in estimate)
    digits = 1 if scale == 100 else 2
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def caption(comparison: Comparison) -> str:
    """What the numbers are: problems, answers, interval, and what was left out."""
    left_out = "".join(
        f" Problems left out of pass@{k} for want of verdicts: {count}."
        for k, count in comparison.dropped.items()
        if count
    )
    return (
        f"{comparison.problems:,} problems, {comparison.n:,} answers each at temperature "
        f"{comparison.sampling['temperature']:g}, top-p {comparison.sampling['top_p']:g}. Brackets: "
        f"{100 * comparison.confidence:g} % bootstrap intervals over problems. Distinct correct answers among "
        f"{comparison.draws:,}. Retention of {comparison.base}: a second draw of its own answers.{left_out}"
    )
