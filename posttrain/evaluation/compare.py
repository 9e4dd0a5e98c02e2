"""Compare policies that answered the same problems: intervals, paired differences, what was kept and what was lost.

Every number about one k is about the same problems in all runs: those with at least k verdicts in each of them. The
problems left out are counted in `Comparison.dropped`. Evaluations that no verifier judged are compared by their further
measures alone.

The runs of a sweep that differ only in their seed are pooled: a number of a pool is the mean over its seeds, and its
intervals and paired differences resample problems after that mean was taken within each problem. They cover which
problems were asked, not which seeds were taken: for that the seeds' own values stand beside them.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from posttrain import atomic
from posttrain.errors import UserError, did_you_mean
from posttrain.evaluation import metrics
from posttrain.evaluation.evaluate import EvaluationResult
from posttrain.evaluation.measures import KINDS, Measured
from posttrain.evaluation.metrics import Estimate, Floats

if TYPE_CHECKING:
    from rich.table import Table

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Numbers:
    """What is known of one policy, or on average over the policies of a pool.

    Attributes:
        pass_at_k: pass@k by k, at every headline k and every power of two up to the largest (share of problems);
            empty without a verifier.
        distinct_correct: distinct correct answers per problem in `Comparison.draws` answers; None without a verifier.
        retention: P(solved@k now | solved@k by the base) by headline k; of the base itself in a second, disjoint
            draw, where n ≥ 2k. None where the base solves nothing.
        gain: P(solved@k now | unsolved@k by the base) by headline k; None for the base, and where it solves all.
        tokens: per sample.
        tokens_correct: tokens per correct sample; None without any.
        tokens_wrong: tokens per wrong sample; None without any.
        truncated: share of samples that were cut off.
        without_verdict: number of samples that could not be judged.
        measures: further measures by name, as in `Comparison.measures`; None where nothing was measured.
    """

    pass_at_k: dict[int, Estimate]
    distinct_correct: Estimate | None
    retention: dict[int, Estimate | None]
    gain: dict[int, Estimate | None]
    tokens: Estimate | None
    tokens_correct: Estimate | None
    tokens_wrong: Estimate | None
    truncated: Estimate | None
    without_verdict: int
    measures: dict[str, Estimate | None]


@dataclass(frozen=True)
class Run(Numbers):
    """One policy in a comparison.

    Attributes:
        model: fingerprint of the policy.
    """

    model: str


@dataclass(frozen=True)
class Pool(Numbers):
    """The runs of a sweep that differ only in their seed. Tokens per answer are over all their answers together.

    Attributes:
        settings: what the sweep set, without the seed; empty for a run that is no part of the sweep.
        runs: their labels.
        minus_base: paired differences to the base, by metric; without those that either did not measure.
    """

    settings: dict[str, Any]
    runs: tuple[str, ...]
    minus_base: dict[str, Estimate]


@dataclass(frozen=True)
class Measure:
    """What a further measure is: its kind, unit and description, as in `measures.Measured`."""

    kind: str
    unit: str
    description: str


@dataclass(frozen=True, eq=False)
class PerProblem:
    """A metric that is a mean over problems of these values; the same calls as `measures.Measured`."""

    values: Floats

    def estimate(self, **settings: Any) -> Estimate:
        """As `metrics.bootstrap_interval`."""
        return metrics.bootstrap_interval(self.values, **settings)

    def difference(self, base: PerProblem, **settings: Any) -> Estimate:
        """As `metrics.paired_difference`, self − base."""
        return metrics.paired_difference(self.values, base.values, **settings)


Metric = PerProblem | Measured


@dataclass(frozen=True)
class Difference:
    """Paired difference of pass@k, `run` − `against` (share of problems)."""

    run: str
    against: str
    k: int
    estimate: Estimate


@dataclass(frozen=True)
class Group:
    """Problems with few or with many solutions: pass@max k of every run (or pool), and differences to the base."""

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
        k: headline k, increasing; empty without a verifier.
        n: answers per problem.
        draws: answers that `distinct_correct` is rarefied to.
        confidence: level of the intervals.
        resamples: bootstrap resamples behind them.
        dropped: problems left out, by k, because a run has fewer than k verdicts for them.
        measures: the further measures that some run has, by name.
        runs: by label, the base first.
        pools: in a sweep, runs that differ only in their seed, by name; the base first. Empty otherwise.
        differences: each run − base, then, outside a sweep, main − every other run; at k = 1 and the largest k.
        groups: few against many solutions; empty where the task does not count solutions.
        results: the evaluations behind it; not part of the JSON.
        values: per run, what `difference` pairs: pass@1, pass@(largest k), distinct_correct and the further measures;
            not part of the JSON.
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
    measures: dict[str, Measure]
    runs: dict[str, Run]
    pools: dict[str, Pool]
    differences: list[Difference]
    groups: list[Group]
    results: Mapping[str, EvaluationResult]
    values: Mapping[str, Mapping[str, Metric]]

    @property
    def rows(self) -> Mapping[str, Run | Pool]:
        """What is presented: the pools of a sweep, or every run."""
        return self.pools or self.runs

    @property
    def bootstrap(self) -> dict[str, Any]:
        """Resamples, confidence and seed of every interval."""
        return _Bootstrap(self.results[self.base]).settings

    def to_json(self) -> str:
        """Everything but the evaluations, with the verdict in words and the orderings of a sweep."""
        behind = ("results", "values")
        content = {field.name: _plain(getattr(self, field.name)) for field in fields(self) if field.name not in behind}
        words = {"verdict": verdict(self), "orderings": _plain(orderings(self))}
        return json.dumps(words | content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def compare(
    results: Mapping[str, EvaluationResult],
    base: str,
    *,
    main: str | None = None,
    measures: Mapping[str, Mapping[str, Measured]] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> Comparison:
    """Compare evaluations of several policies on the same problems.

    Args:
        results: evaluations by label, in the order of presentation.
        base: label of the initial policy; its k, confidence, resamples and seed serve all.
        main: label of the run that is compared with every other; default the last one.
        measures: further measures by label of the run and name (`measures.load`).
        settings: in a sweep, what it set for each of its runs, by label: `{"divergence": "js", "seed": 1}`.

    Raises:
        UserError: a label is unknown, the evaluations differ in anything but the model, measures are of other
            problems, or no problem has enough verdicts.
    """
    measures, settings = measures or {}, settings or {}
    labels = [base, *(label for label in results if label != base)]
    main = main or labels[-1]
    for label in (base, main, *measures, *settings):
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

    for label, found in measures.items():
        for name, measured in found.items():
            if len(measured.bottom) != len(start.keys):
                raise UserError(
                    f"'{name}' of '{label}' was measured on {len(measured.bottom)} problems, but {len(start.keys)} "
                    "were evaluated: measure it again."
                )

    judged = start.identity["verifier"] is not None
    ks = start.k if judged else ()
    curve = sorted({1, *ks, *(2**power for power in range(ks[-1].bit_length()))}) if judged else []
    fewest = np.min([result.n for result in results.values()], axis=0)
    enough = {k: fewest >= k for k in curve}
    if judged and not enough[ks[-1]].any():
        raise UserError(
            f"No problem has {ks[-1]} verdicts in every run, so pass@{ks[-1]} cannot be compared: look at the "
            "statuses in evaluation.json."
        )
    draws = int(fewest[enough[ks[-1]]].min()) if judged else 0
    at = _Bootstrap(start)
    policies = {label: _policy(results[label], ks, enough, draws, measures.get(label, {})) for label in labels}
    pools = {name: (runs, _mean([policies[run] for run in runs])) for name, runs in _together(labels, settings).items()}
    shown = {name: mean for name, (_, mean) in pools.items()} or policies
    origin = policies[base]
    pairs = [(label, base) for label in labels[1:]]
    if not settings and main != base:
        pairs += [(main, label) for label in labels[1:] if label != main]
    return Comparison(
        base=base,
        main=main,
        task=str(start.identity["task"]),
        sampling=_shared(start),
        problems=len(start.keys),
        k=ks,
        n=int(start.identity["n"]),
        draws=draws,
        confidence=start.confidence,
        resamples=start.resamples,
        dropped={k: int((~enough[k]).sum()) for k in ks},
        measures=_described(measures),
        runs={
            label: Run(model=str(results[label].identity["model"]), **_numbers(policy, origin, ks, enough, at))
            for label, policy in policies.items()
        },
        pools={
            name: Pool(
                settings=_without_seed(settings.get(runs[0], {})),
                runs=tuple(runs),
                minus_base={} if mean is origin else _minus(mean, origin, at),
                **_numbers(mean, origin, ks, enough, at),
            )
            for name, (runs, mean) in pools.items()
        },
        differences=[
            Difference(run, against, k, at.difference(policies[run].solved[k], policies[against].solved[k], enough[k]))
            for run, against in pairs
            for k in _ends(ks)
        ],
        groups=_groups(start, {name: policy.solved for name, policy in shown.items()}, enough, base, ks, at),
        results={label: results[label] for label in labels},
        values={label: policy.metrics for label, policy in policies.items()},
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


def _ends(ks: Sequence[int]) -> list[int]:
    """1 and the largest k: accuracy, and what the policy can still find."""
    return sorted({1, ks[-1]}) if ks else []


@dataclass(frozen=True, eq=False)
class _Policy:
    """What one evaluation says per problem, or the mean over the evaluations of a pool.

    Attributes:
        results: the evaluations.
        solved: pass@k of every problem by k, NaN where a run has too few verdicts.
        metrics: as `Comparison.values`.
    """

    results: list[EvaluationResult]
    solved: dict[int, Floats]
    metrics: dict[str, Metric]

    def sum(self, name: str) -> Floats:
        """A count per problem, summed over the evaluations."""
        total: Floats = np.sum([getattr(result, name) for result in self.results], axis=0, dtype=np.float64)
        return total


def _policy(
    result: EvaluationResult, ks: Sequence[int], enough: dict[int, Mask], draws: int, measures: Mapping[str, Measured]
) -> _Policy:
    solved = {k: _solved(result, k, mask) for k, mask in enough.items()}
    found: dict[str, Metric] = {f"pass@{k}": PerProblem(solved[k][enough[k]]) for k in _ends(ks)}
    if ks:
        kept = np.flatnonzero(enough[ks[-1]])
        found["distinct_correct"] = PerProblem(
            metrics.distinct_correct([result.answers[i] for i in kept], [result.correct[i] for i in kept], draws)
        )
    return _Policy([result], solved, found | dict(measures))


def _mean(policies: Sequence[_Policy]) -> _Policy:
    """The pool of some policies; metrics that only some of them have are left out."""
    first = policies[0]
    if len(policies) == 1:
        return first
    return _Policy(
        results=[result for policy in policies for result in policy.results],
        solved={k: np.mean([policy.solved[k] for policy in policies], axis=0) for k in first.solved},
        metrics={
            name: _pooled([policy.metrics[name] for policy in policies])
            for name in first.metrics
            if all(name in policy.metrics for policy in policies)
        },
    )


def _pooled(metric: Sequence[Metric]) -> Metric:
    """One metric of several seeds as one whose value is the mean of theirs, problem by problem.

    Σ top / Σ bottom of each seed is scaled to a denominator of 1 and summed; the bins of calibration errors stand side
    by side, so that errors of opposite sign do not cancel between seeds.
    """
    first = metric[0]
    if len(metric) == 1:
        return first
    if isinstance(first, PerProblem):
        return PerProblem(np.mean([one.values for one in metric if isinstance(one, PerProblem)], axis=0))
    seeds = [one for one in metric if isinstance(one, Measured)]
    totals = [one.bottom.sum() for one in seeds]
    if min(totals) <= 0:
        return replace(first, bottom=np.zeros_like(first.bottom), bins=())
    tops = [one.top / total for one, total in zip(seeds, totals, strict=True)]
    return replace(
        first,
        top=np.concatenate(tops, axis=1) if first.top.ndim == 2 else np.sum(tops, axis=0),
        bottom=np.sum([one.bottom / total for one, total in zip(seeds, totals, strict=True)], axis=0),
        bins=(),
    )


def _minus(policy: _Policy, base: _Policy, at: _Bootstrap) -> dict[str, Estimate]:
    differences = {
        name: _difference(metric, base.metrics[name], at.settings)
        for name, metric in policy.metrics.items()
        if name in base.metrics
    }
    return {name: estimate for name, estimate in differences.items() if estimate is not None}


def _difference(a: Metric, b: Metric, settings: Mapping[str, Any]) -> Estimate | None:
    """a − b, paired."""
    if isinstance(a, PerProblem) and isinstance(b, PerProblem):
        return a.difference(b, **settings)
    if isinstance(a, Measured) and isinstance(b, Measured):
        return a.difference(b, **settings)
    raise TypeError("Two metrics of one name are of one kind.")


def _solved(result: EvaluationResult, k: int, mask: Mask) -> Floats:
    values = np.full(len(mask), np.nan)
    values[mask] = metrics.pass_at_k(result.n[mask], result.c[mask], k)
    return values


def _numbers(
    policy: _Policy, base: _Policy, ks: Sequence[int], enough: dict[int, Mask], at: _Bootstrap
) -> dict[str, Any]:
    """The fields of `Numbers`."""
    n, c, samples = policy.sum("n"), policy.sum("c"), policy.sum("samples")
    retention: dict[int, Estimate | None] = {}
    gain: dict[int, Estimate | None] = {}
    for k in ks:
        mask = enough[k]
        if policy is base:
            start = base.results[0]
            twice = mask & (start.n >= 2 * k)
            retention[k] = (
                metrics.self_retention(start.n[twice], start.c[twice], k, **at.settings) if twice.any() else None
            )
            gain[k] = None
        else:
            before, now = base.solved[k][mask], policy.solved[k][mask]
            retention[k] = metrics.retention(before, now, **at.settings)
            gain[k] = metrics.gain(before, now, **at.settings)
    distinct = policy.metrics.get("distinct_correct")
    return {
        "pass_at_k": {k: at.mean(values, enough[k]) for k, values in policy.solved.items()},
        "distinct_correct": distinct.estimate(**at.settings) if distinct is not None else None,
        "retention": retention,
        "gain": gain,
        "tokens": at.ratio(policy.sum("tokens"), samples),
        "tokens_correct": at.ratio(policy.sum("tokens_correct"), c),
        "tokens_wrong": at.ratio(policy.sum("tokens_wrong"), n - c),
        "truncated": at.ratio(policy.sum("truncated"), samples),
        "without_verdict": int((samples - n).sum()),
        "measures": {
            name: metric.estimate(**at.settings)
            for name, metric in policy.metrics.items()
            if isinstance(metric, Measured)
        },
    }


def _described(measures: Mapping[str, Mapping[str, Measured]]) -> dict[str, Measure]:
    """The measures that some run has, kind by kind; each kind in the order of the run that has most of it."""
    found: dict[str, Measure] = {}
    for kind in KINDS:
        of_kind = [[one for one in run.values() if one.kind == kind] for run in measures.values()]
        for one in (one for run in sorted(of_kind, key=len, reverse=True) for one in run):
            found.setdefault(one.name, Measure(one.kind, one.unit, one.description))
    return found


def _without_seed(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "seed"}


def _together(labels: Sequence[str], settings: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Labels of the runs of every pool; runs that the sweep did not set are pools of their own. {} without a sweep."""
    pools: dict[str, list[str]] = {}
    for label in labels if settings else ():
        name = label
        if label in settings:
            name = in_words(_without_seed(settings[label])) or "trained"
            if name in labels and name not in settings:
                name = f"{name} (sweep)"
        pools.setdefault(name, []).append(label)
    return pools


def in_words(settings: Mapping[str, Any]) -> str:
    """Settings as a name: `js, beta 0.1, no match_slope`; `alpha 0.5` for a divergence alpha with its alpha."""
    parameters = {value for value in settings.values() if isinstance(value, str) and value in settings}
    words = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(name if value else f"no {name}")
        elif isinstance(value, str):
            words.append(f"{value} {settings[value]}" if value in parameters else value)
        elif name not in parameters:
            words.append(f"{name} {value}")
    return ", ".join(words)


def _groups(
    start: EvaluationResult,
    solved: Mapping[str, dict[int, Floats]],
    enough: dict[int, Mask],
    base: str,
    ks: Sequence[int],
    at: _Bootstrap,
) -> list[Group]:
    if start.solutions is None or not ks:
        return []
    k = ks[-1]
    mask, values_of = enough[k], {name: values[k] for name, values in solved.items()}
    median = int(np.median(start.solutions[mask]))
    few = start.solutions <= median
    halves = [(f"≤ {median} solutions", mask & few), (f"> {median} solutions", mask & ~few)]
    if not all(half.any() for _, half in halves):
        return []
    return [
        Group(
            name=name,
            problems=int(half.sum()),
            pass_at_k={label: at.mean(values, half) for label, values in values_of.items()},
            differences=[
                Difference(label, base, k, at.difference(values, values_of[base], half))
                for label, values in values_of.items()
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


def ends(comparison: Comparison) -> list[str]:
    """The metrics that a verdict is about: pass@1 and pass@(largest k), or the accuracy of preferences."""
    if comparison.k:
        return [f"pass@{k}" for k in _ends(comparison.k)]
    return [name for name in comparison.measures if name == "preference_accuracy"]


def headlines(comparison: Comparison) -> list[str]:
    """Measures worth a column of their own: a divergence, a diversity (nearest to temperature 1), and calibration."""
    by_kind = {kind: [n for n, one in comparison.measures.items() if one.kind == kind] for kind in KINDS}
    diversity = min(
        by_kind["diversity"],
        key=lambda name: (not name.startswith("self_bleu"), abs(temperature(name) - 1)),
        default=None,
    )
    divergence = next(
        (n for n in ("kl_per_answer", "reverse_kl", *by_kind["divergence"]) if n in comparison.measures), None
    )
    error = next((n for n in ("ece_bradley_terry", "ece_likelihood") if n in comparison.measures), None)
    accuracy = "preference_accuracy" if "preference_accuracy" in comparison.measures else None
    return [name for name in (accuracy, divergence, diversity, error) if name is not None]


def temperature(name: str) -> float:
    """The temperature of a measure of diversity, as in `self_bleu@T0.6`."""
    return float(name.partition("@T")[2])


_NAMES = {
    "distinct_correct": "distinct correct",
    "self_bleu": "self-BLEU",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "distinct_answers": "distinct answers",
    "kl_per_answer": "KL",
    "reverse_kl": "reverse KL",
    "forward_kl": "forward KL",
    "js": "JS",
    "ece_bradley_terry": "ECE, σ(βΔ)",
    "ece_likelihood": "ECE, likelihood",
}


def name_of(metric: str) -> str:
    """A metric as people call it, without its temperature."""
    stem = metric.partition("@T")[0]
    return _NAMES.get(stem, stem.replace("_", " "))


def unit_of(comparison: Comparison, metric: str) -> str:
    """Unit of a metric as it is printed; shares are printed in percent."""
    if metric in comparison.measures:
        unit = comparison.measures[metric].unit
        return "%" if unit == "share" else unit
    return "answers" if metric == "distinct_correct" else "%"


def numbers(estimate: Estimate, unit: str) -> list[str]:
    """Value and interval as they are printed: percent and tokens with one decimal, counted answers with two, all
    others with three significant digits of the largest."""
    scale = 100 if unit == "%" else 1
    if unit in ("%", "tokens", "answers"):
        digits = 2 if unit == "answers" else 1
    else:
        largest = max(abs(end) for end in estimate)
        digits = min(5, max(0, 2 - math.floor(math.log10(largest)))) if largest > 0 else 0
    return [f"{scale * end:,.{digits}f}".replace("-", "−") for end in estimate]


def difference(comparison: Comparison, metric: str, a: str, b: str) -> Estimate | None:
    """The paired difference of a metric, a − b, between two runs or pools; None where either did not measure it."""
    first, second = _metric(comparison, metric, a), _metric(comparison, metric, b)
    return None if first is None or second is None else _difference(first, second, comparison.bootstrap)


def _metric(comparison: Comparison, metric: str, name: str) -> Metric | None:
    """A metric of a run or pool per problem; None where one of its runs lacks it."""
    runs = comparison.pools[name].runs if name in comparison.pools else (name,)
    found = [one for run in runs if (one := comparison.values[run].get(metric)) is not None]
    return _pooled(found) if len(found) == len(runs) else None


@dataclass(frozen=True)
class Ordering:
    """Pools that differ in one setting of a sweep, in the order of a metric.

    Attributes:
        metric: its name.
        at: the settings that they share.
        pools: their names, from the highest to the lowest value.
        values: of the metric, means over seeds.
        steps: paired difference of each to the next; the order of the two is significant when it excludes 0.
        words: the same in one line, in the unit of the metric: `js (34.1) > alpha 0.5 (33.4) ≈ forward_kl (33.0)`,
            where > is a significant step and ≈ is none.
    """

    metric: str
    at: dict[str, Any]
    pools: list[str]
    values: list[float]
    steps: list[Estimate]
    words: str


def ordering(comparison: Comparison, metric: str, by: str = "divergence") -> list[Ordering]:
    """The order of a metric along one setting of a sweep, for every combination of the other settings.

    A setting that only some runs have, like the α of the α-divergence, belongs to the value of `by`.

    Raises:
        UserError: the sweep did not set `by`, or no pool has such a metric.
    """
    common = shared_settings(comparison)
    if by not in common:
        raise UserError(f"The sweep did not vary '{by}'{did_you_mean(by, common)}")
    values = {
        name: estimate for name, pool in swept(comparison).items() if (estimate := value_of(pool, metric)) is not None
    }
    if not values:
        known = {metric for run in comparison.values.values() for metric in run}
        raise UserError(f"No run of the sweep has the metric '{metric}'{did_you_mean(metric, known)}")
    unit = unit_of(comparison, metric)
    at = {name: {key: comparison.pools[name].settings[key] for key in common if key != by} for name in values}
    found = []
    for place in distinct(at.values()):
        names = sorted((name for name in values if at[name] == place), key=lambda name: -values[name].value)
        steps = [
            step for a, b in itertools.pairwise(names) if (step := difference(comparison, metric, a, b)) is not None
        ]
        words = ""
        for name, step in itertools.zip_longest(names, steps):
            own = {key: value for key, value in comparison.pools[name].settings.items() if key not in place}
            words += f"{in_words(own)} ({numbers(values[name], unit)[0]})"
            if step is not None:
                words += " > " if step.low > 0 else " ≈ "
        found.append(Ordering(metric, place, names, [values[name].value for name in names], steps, words))
    return found


def orderings(comparison: Comparison) -> list[Ordering]:
    """The orders along the setting that matters most, of the headline metrics; none outside a sweep over settings."""
    by = leading(comparison)
    if by is None:
        return []
    distinct = ["distinct_correct"] if comparison.k else []
    present = [
        metric
        for metric in [*ends(comparison), *distinct, *headlines(comparison)]
        if any(value_of(comparison.pools[name], metric) is not None for name in swept(comparison))
    ]
    return [one for metric in dict.fromkeys(present) for one in ordering(comparison, metric, by) if len(one.pools) > 1]


def swept(comparison: Comparison) -> dict[str, Pool]:
    """The pools that a sweep set: neither the base nor a baseline."""
    return {name: pool for name, pool in comparison.pools.items() if pool.settings}


def shared_settings(comparison: Comparison) -> list[str]:
    """The settings that every pool of the sweep has."""
    pools = list(swept(comparison).values())
    return [key for key in pools[0].settings if all(key in pool.settings for pool in pools)] if pools else []


def varied(comparison: Comparison) -> list[str]:
    """The settings that every pool of the sweep has, and that differ between some of them."""
    pools = swept(comparison).values()
    return [key for key in shared_settings(comparison) if len(distinct(pool.settings[key] for pool in pools)) > 1]


def leading(comparison: Comparison) -> str | None:
    """The setting whose values are ordered: the divergence, or the first one that the sweep varied."""
    found = varied(comparison)
    return "divergence" if "divergence" in found else next(iter(found), None)


def distinct(values: Iterable[Any]) -> list[Any]:
    """Distinct values, hashable or not, in the order of their first appearance."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def value_of(row: Numbers, metric: str) -> Estimate | None:
    """A metric of a run or pool, by its name."""
    if metric == "distinct_correct":
        return row.distinct_correct
    if metric.startswith("pass@"):
        return row.pass_at_k.get(int(metric.removeprefix("pass@")))
    return row.measures.get(metric)


def seeds_of(comparison: Comparison, name: str, metric: str) -> list[Estimate]:
    """A metric of every run of a pool, in the order of its runs; of a run outside a sweep, nothing."""
    runs = comparison.pools[name].runs if name in comparison.pools else ()
    found = [value_of(comparison.runs[run], metric) for run in runs]
    return [estimate for estimate in found if estimate is not None]


def signed(value: float) -> str:
    """A share in points, with its sign: `+6.1`, `−15.9`."""
    text = f"{100 * value:+.1f}"
    return ("0.0" if text in ("+0.0", "-0.0") else text).replace("-", "−")


def points(estimate: Estimate) -> str:
    """A difference of shares in points, with its interval: `+6.1 [4.0, 8.2]`."""
    low, high = (f"{100 * end:.1f}".replace("-", "−") for end in (estimate.low, estimate.high))
    return f"{signed(estimate.value)} [{low}, {high}]"


def change(estimate: Estimate, unit: str) -> str:
    """A difference of a metric with its interval, in points or in the unit of the metric."""
    if unit == "%":
        return points(estimate).replace(" [", " points [")
    value, low, high = numbers(estimate, unit)
    return f"{'+' if estimate.value > 0 else ''}{value} {unit} [{low}, {high}]"


_SENTENCES = 6
"""Runs beside the base up to which each of them gets its own sentence."""


def verdict(comparison: Comparison) -> list[str]:
    """The paired differences in sentences; a change is significant when its interval excludes 0.

    A sweep, and a comparison of many runs, is told by its base and by the best at each of the two ends of pass@k.
    """
    if not comparison.k or comparison.pools or len(comparison.runs) > 1 + _SENTENCES:
        return _summary(comparison)
    by_pair: dict[tuple[str, str], list[Difference]] = {}
    for difference in comparison.differences:
        by_pair.setdefault((difference.run, difference.against), []).append(difference)
    return [
        f"Against {against}, {run} {' and '.join(_change(d, against == comparison.base) for d in changes)}."
        for (run, against), changes in by_pair.items()
    ]


def _change(difference: Difference, from_base: bool) -> str:
    name, estimate = f"pass@{difference.k}", difference.estimate
    numbers = change(estimate, "%")
    if not estimate.excludes_zero:
        return f"shows no significant {'change' if from_base else 'difference'} in {name} ({numbers})"
    up = estimate.value > 0
    if from_base:
        return f"{'raised' if up else 'lowered'} {name} ({numbers})"
    return f"is {'higher' if up else 'lower'} in {name} ({numbers})"


def _summary(comparison: Comparison) -> list[str]:
    base = comparison.base
    of_base = {metric: value_of(comparison.rows[base], metric) for metric in ends(comparison)}
    told = [f"{metric} {numbers(estimate, '%')[0]} %" for metric, estimate in of_base.items() if estimate is not None]
    sentences = [f"{base} has {' and '.join(told)}."] if told else []
    for metric in of_base:
        found = {name: value_of(row, metric) for name, row in comparison.rows.items() if name != base}
        values = {name: estimate.value for name, estimate in found.items() if estimate is not None}
        if values:
            sentences.append(_best(comparison, metric, values))
    return sentences


def _best(comparison: Comparison, metric: str, values: Mapping[str, float]) -> str:
    """Who leads in a metric (a share), where the base stands, and how many of the others are surely behind."""
    best = max(values, key=lambda name: values[name])
    sentence = f"{best} has the highest {name_of(metric)} of the trained ({100 * values[best]:.1f} %)"
    against = difference(comparison, metric, best, comparison.base)
    if against is not None:
        numbers = change(against, "%")
        if against.excludes_zero:
            sentence += f", significantly {'above' if against.value > 0 else 'below'} {comparison.base} ({numbers})"
        else:
            sentence += f", not significantly different from {comparison.base} ({numbers})"
    others = [difference(comparison, metric, best, name) for name in values if name != best]
    behind = sum(one is not None and one.low > 0 for one in others)
    if len(others) == 1:
        sentence += f"; the other is {'' if behind else 'not '}significantly lower"
    elif others:
        sentence += f"; {behind} of the {len(others)} others {'is' if behind == 1 else 'are'} significantly lower"
    return f"{sentence}."


class _Column(NamedTuple):
    """A number of a run: its name in one line, in two lines, its unit, and where it is found."""

    line: str
    head: str
    unit: str
    value: Callable[[Numbers], Estimate | None]


def _columns(comparison: Comparison) -> list[_Column]:
    narrow = _narrow(comparison)
    found = []
    if comparison.k:
        largest, everything = comparison.k[-1], narrow or not comparison.measures
        for k in comparison.k if everything and not comparison.pools else _ends(comparison.k):
            found.append(_Column(f"pass@{k}, %", f"pass@{k}\n%", "%", partial(value_of, metric=f"pass@{k}")))
        found.append(
            _Column("distinct correct", "distinct\ncorrect", "answers", partial(value_of, metric="distinct_correct"))
        )
        if everything:
            found.append(
                _Column(
                    f"retention@{largest}, %", f"retained\n@{largest}, %", "%", lambda row: row.retention.get(largest)
                )
            )
    for metric in headlines(comparison):
        name, unit = _short(metric), unit_of(comparison, metric)
        head = name.replace(" ", "\n", 1).replace("-", "-\n", 1)
        short = unit.partition(" per ")[0]
        found.append(
            _Column(
                with_unit(name, short),
                head if "\n" in head else f"{name}\n{short}",
                unit,
                partial(value_of, metric=metric),
            )
        )
    if not comparison.k:
        found.append(_Column("answer, tokens", "answer\ntokens", "tokens", lambda row: row.tokens))
        found.append(_Column("truncated, %", "cut\n%", "%", lambda row: row.truncated))
    return found


def with_unit(name: str, unit: str) -> str:
    """`entropy, nats per token`; a unit that is in the name is not said again."""
    return name if unit in name else f"{name}, {unit}"


def _short(metric: str) -> str:
    """A headline measure as a column of the terminal; the caption says which one it is."""
    if metric == "preference_accuracy":
        return "pairs right"
    return "ECE" if metric.startswith("ece_") else name_of(metric)


_NARROW = 3
"""Runs up to which a table has a column for each."""


def _narrow(comparison: Comparison) -> bool:
    return not comparison.pools and len(comparison.runs) <= _NARROW


def table(comparison: Comparison) -> Table:
    """The headline numbers on a terminal.

    Up to three runs are columns with intervals, in 80 characters. More runs, and the pools of a sweep, are lines of
    values alone, in about 100; below pass@k of a pool stands the range of its seeds.
    """
    from rich.table import Table

    shown = Table(
        title=f"{comparison.task}: what each policy {'solves' if comparison.k else 'does'}",
        caption=" ".join([caption(comparison, brackets=_narrow(comparison)), *_explained(comparison)]),
        caption_justify="left",
        title_justify="left",
    )
    columns = _columns(comparison)
    if _narrow(comparison):
        shown.add_column("", no_wrap=not comparison.measures)
        for label in comparison.runs:
            shown.add_column(label, justify="right", no_wrap=True)
        for column in columns:
            shown.add_row(column.line, *(cell(column.value(run), column.unit) for run in comparison.runs.values()))
        return shown
    shown.add_column("", overflow="fold", min_width=min(24, max(len(name) for name in comparison.rows)))
    for column in columns:
        shown.add_column(column.head, justify="right", no_wrap=True)
    for name, row in comparison.rows.items():
        runs = [comparison.runs[run] for run in comparison.pools[name].runs] if comparison.pools else []
        shown.add_row(name, *(_mean_and_range(column, row, runs) for column in columns))
    return shown


def _explained(comparison: Comparison) -> list[str]:
    """What the caption of the terminal adds: what headline measures are, and what a second line is."""
    told = []
    for metric in headlines(comparison):
        measure = comparison.measures[metric]
        if measure.kind == "diversity":
            told.append(f"{_short(metric)}: at temperature {temperature(metric):g}.")
        elif measure.kind == "divergence" or metric.startswith("ece_"):
            told.append(f"{_short(metric)}: {measure.description}")
    if any(len(pool.runs) > 1 for pool in comparison.pools.values()):
        told.append("A second line is the range of the seeds.")
    return told


def _mean_and_range(column: _Column, row: Numbers, runs: Sequence[Numbers]) -> str:
    mean = column.value(row)
    if mean is None:
        return "–"
    seeds = [estimate.value for run in runs if (estimate := column.value(run)) is not None]
    if len(seeds) < 2 or not column.line.startswith(("pass@", "pairs")):
        return numbers(mean, column.unit)[0]
    value, low, high = numbers(Estimate(mean.value, min(seeds), max(seeds)), column.unit)
    return f"{value}\n{low}–{high}"


def cell(estimate: Estimate | None, unit: str) -> str:
    """An estimate and its interval; a dash where there is none."""
    if estimate is None:
        return "–"
    value, low, high = numbers(estimate, unit)
    return f"{value} [{low}, {high}]"


def caption(comparison: Comparison, *, brackets: bool = True) -> str:
    """What the numbers are: problems, answers, seeds, interval, and what was left out."""
    seeds = {len(pool.runs) for pool in comparison.pools.values()} - {1}
    sentences = [
        f"{comparison.problems:,} problems, {comparison.n:,} answers each at temperature "
        f"{comparison.sampling['temperature']:g}, top-p {comparison.sampling['top_p']:g}."
    ]
    if seeds:
        sentences.append(f"Means over {max(seeds)} training seeds{'' if len(seeds) == 1 else ' or fewer'}.")
    if brackets:
        sentences.append(f"Brackets: {100 * comparison.confidence:g} % bootstrap intervals over problems.")
    if comparison.k:
        sentences.append(
            f"Distinct correct answers among {comparison.draws:,}. Retention of {comparison.base}: a second draw of "
            "its own answers."
        )
    sentences += [
        f"Problems left out of pass@{k} for want of verdicts: {count}."
        for k, count in comparison.dropped.items()
        if count
    ]
    return " ".join(sentences)
