"""Compare policies that answered the same problems: intervals, paired differences, what was kept and what was lost.

Every number about one k is about the same problems in all runs: those with at least k verdicts in each of them. The
problems left out are counted in `Comparison.dropped`. Evaluations that no verifier judged are compared by their further
measures alone.

The runs of a sweep that differ only in their seed are pooled (`pooling`). The intervals of a pool cover which problems
were asked, not which seeds were taken: for that the seeds' own values stand beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain import atomic
from posttrain.errors import UserError, did_you_mean
from posttrain.evaluation import metrics, pooling
from posttrain.evaluation.evaluate import EvaluationResult
from posttrain.evaluation.measures import KINDS, Measured
from posttrain.evaluation.metrics import Estimate, Floats
from posttrain.evaluation.pooling import Mask, Metric, Policy
from posttrain.evaluation.wording import in_words, temperature


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
        main: label of the last run, which outside a sweep is compared with every other.
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
        further: the same runs on further tasks, by name; empty in the comparisons that it holds.
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
    further: dict[str, Comparison]
    results: Mapping[str, EvaluationResult]
    values: Mapping[str, Mapping[str, Metric]]

    @property
    def rows(self) -> Mapping[str, Run | Pool]:
        """What is presented: the pools of a sweep, or every run."""
        return self.pools or self.runs

    @property
    def bootstrap(self) -> dict[str, Any]:
        """Resamples, confidence and seed of every interval."""
        return _bootstrap(self.results[self.base])

    def members(self, name: str) -> tuple[str, ...]:
        """The runs of a pool; a run itself."""
        return self.pools[name].runs if name in self.pools else (name,)

    def settings(self, name: str) -> dict[str, Any]:
        """What a sweep set for a pool; nothing for a run."""
        return self.pools[name].settings if name in self.pools else {}


def compare(
    results: Mapping[str, EvaluationResult],
    base: str,
    *,
    measures: Mapping[str, Mapping[str, Measured]] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    further: Mapping[str, Mapping[str, EvaluationResult]] | None = None,
) -> Comparison:
    """Compare evaluations of several policies on the same problems.

    Args:
        results: evaluations by label, in the order of presentation.
        base: label of the initial policy; its k, confidence, resamples and seed serve all.
        measures: further measures by label of the run and name (`measures.load`).
        settings: in a sweep, what it set for each of its runs, by label: `{"divergence": "js", "seed": 1}`.
        further: evaluations on further tasks by label of the run and name of the task; of every run the same tasks.

    Raises:
        UserError: a label is unknown, the evaluations differ in anything but the model, measures are of other
            problems, no problem has enough verdicts, or a run lacks a further task.
    """
    measures, settings = measures or {}, settings or {}
    for label in (base, *measures, *settings, *(further or {})):
        if label not in results:
            raise UserError(f"There is no evaluation '{label}' to compare{did_you_mean(label, results)}")
    results = {base: results[base]} | dict(results)
    start, labels = results[base], list(results)
    main = labels[-1]
    _refuse_others(results, base, measures)

    ks = start.k if start.identity["verifier"] is not None else ()
    curve = sorted({1, *ks, *(2**power for power in range(ks[-1].bit_length()))}) if ks else []
    fewest = np.min([result.n for result in results.values()], axis=0)
    enough = {k: fewest >= k for k in curve}
    if ks and not enough[ks[-1]].any():
        raise UserError(
            f"No problem has {ks[-1]} verdicts in every run, so pass@{ks[-1]} cannot be compared: look at the "
            "statuses in evaluation.json."
        )
    draws = int(fewest[enough[ks[-1]]].min()) if ks else 0
    bootstrap = _bootstrap(start)
    policies = {
        label: pooling.policy(result, ks, enough, draws, measures.get(label, {})) for label, result in results.items()
    }
    pools = {
        name: (runs, pooling.mean([policies[run] for run in runs]))
        for name, runs in _together(labels, settings).items()
    }
    shown = {name: mean for name, (_, mean) in pools.items()} or policies
    origin = policies[base]
    pairs = [(label, base) for label in labels[1:]]
    if not settings and main != base:
        pairs += [(main, label) for label in labels[1:-1]]
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
            label: Run(model=str(results[label].identity["model"]), **_numbers(policy, origin, ks, enough, bootstrap))
            for label, policy in policies.items()
        },
        pools={
            name: Pool(
                settings=_without_seed(settings.get(runs[0], {})),
                runs=tuple(runs),
                minus_base={} if mean is origin else mean.minus(origin, bootstrap),
                **_numbers(mean, origin, ks, enough, bootstrap),
            )
            for name, (runs, mean) in pools.items()
        },
        differences=[
            _minus(policies, run, against, k, enough[k], bootstrap)
            for run, against in pairs
            for k in pooling.extremes(ks)
        ],
        groups=_groups(start, shown, enough, base, ks, bootstrap),
        further={
            name: compare(found, base, settings=settings) for name, found in _by_task(results, further or {}).items()
        },
        results=results,
        values={label: policy.metrics for label, policy in policies.items()},
    )


def _by_task(
    labels: Mapping[str, EvaluationResult], further: Mapping[str, Mapping[str, EvaluationResult]]
) -> dict[str, dict[str, EvaluationResult]]:
    """Evaluations on further tasks by task and label, in the order of the labels.

    Raises:
        UserError: a run lacks a task that another has.
    """
    names = dict.fromkeys(name for found in further.values() for name in found)
    for label in labels:
        missing = next((name for name in names if name not in further.get(label, {})), None)
        if missing is not None:
            raise UserError(f"'{label}' was not evaluated on the further task '{missing}', as others were: do it now.")
    return {name: {label: further[label][name] for label in labels} for name in names}


def _refuse_others(
    results: Mapping[str, EvaluationResult], base: str, measures: Mapping[str, Mapping[str, Measured]]
) -> None:
    """Refuse evaluations that differ from the base's in more than the model, and measures of other problems."""
    start = results[base]
    for label, result in results.items():
        difference = atomic.first_difference(_shared(result), _shared(start))
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


def _bootstrap(result: EvaluationResult) -> dict[str, Any]:
    return {"resamples": result.resamples, "confidence": result.confidence, "seed": result.seed}


def _shared(result: EvaluationResult) -> dict[str, Any]:
    """What must agree: all that determines the samples, without the model and the stream of random numbers."""
    return {
        name: value for name, value in result.identity.items() if name not in ("model", "seed", "prompts_per_chunk")
    }


def _minus(
    policies: Mapping[str, Policy], run: str, against: str, k: int, mask: Mask, bootstrap: Mapping[str, Any]
) -> Difference:
    """pass@k of `run` − `against` on the problems of a mask."""
    a, b = policies[run].solved[k][mask], policies[against].solved[k][mask]
    return Difference(run, against, k, metrics.paired_difference(a, b, **bootstrap))


def _numbers(
    policy: Policy, base: Policy, ks: Sequence[int], enough: Mapping[int, Mask], bootstrap: Mapping[str, Any]
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
                metrics.self_retention(start.n[twice], start.c[twice], k, **bootstrap) if twice.any() else None
            )
            gain[k] = None
        else:
            before, now = base.solved[k][mask], policy.solved[k][mask]
            retention[k] = metrics.retention(before, now, **bootstrap)
            gain[k] = metrics.gain(before, now, **bootstrap)
    distinct = policy.metrics.get("distinct_correct")

    def per(sums: str, counts: Floats) -> Estimate | None:
        return metrics.ratio_interval(policy.sum(sums), counts, **bootstrap)

    return {
        "pass_at_k": {
            k: metrics.bootstrap_interval(values[enough[k]], **bootstrap) for k, values in policy.solved.items()
        },
        "distinct_correct": distinct.estimate(**bootstrap) if distinct is not None else None,
        "retention": retention,
        "gain": gain,
        "tokens": per("tokens", samples),
        "tokens_correct": per("tokens_correct", c),
        "tokens_wrong": per("tokens_wrong", n - c),
        "truncated": per("truncated", samples),
        "without_verdict": int((samples - n).sum()),
        "measures": {
            name: metric.estimate(**bootstrap)
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


def _groups(
    start: EvaluationResult,
    policies: Mapping[str, Policy],
    enough: Mapping[int, Mask],
    base: str,
    ks: Sequence[int],
    bootstrap: Mapping[str, Any],
) -> list[Group]:
    if start.solutions is None or not ks:
        return []
    k = ks[-1]
    median = int(np.median(start.solutions[enough[k]]))
    few = start.solutions <= median
    halves = [(f"≤ {median} solutions", enough[k] & few), (f"> {median} solutions", enough[k] & ~few)]
    if not all(half.any() for _, half in halves):
        return []
    return [
        Group(
            name=name,
            problems=int(half.sum()),
            pass_at_k={
                label: metrics.bootstrap_interval(policy.solved[k][half], **bootstrap)
                for label, policy in policies.items()
            },
            differences=[_minus(policies, label, base, k, half, bootstrap) for label in policies if label != base],
        )
        for name, half in halves
    ]


def ends(comparison: Comparison) -> list[str]:
    """The metrics that a verdict is about: pass@1 and pass@(largest k), or the accuracy of preferences."""
    if comparison.k:
        return [f"pass@{k}" for k in pooling.extremes(comparison.k)]
    return [name for name in comparison.measures if name == "preference_accuracy"]


def of_kind(comparison: Comparison, kind: str) -> list[str]:
    """The measures of a kind, by name."""
    return [name for name, measure in comparison.measures.items() if measure.kind == kind]


def headlines(comparison: Comparison) -> list[str]:
    """Measures worth a column of their own: a divergence, a diversity (nearest to temperature 1), and calibration."""
    accuracy = ["preference_accuracy"]
    divergences = ["kl_per_answer", "reverse_kl", *of_kind(comparison, "divergence")]
    diversities = sorted(
        of_kind(comparison, "diversity"),
        key=lambda name: (not name.startswith("self_bleu"), abs(temperature(name) - 1)),
    )
    errors = ["ece_bradley_terry", "ece_likelihood"]
    found = [
        next((name for name in candidates if name in comparison.measures), None)
        for candidates in (accuracy, divergences, diversities, errors)
    ]
    return [name for name in found if name is not None]


def compared(comparison: Comparison) -> list[str]:
    """The metrics whose paired differences are shown, by name."""
    distinct = ["distinct_correct"] if comparison.k else []
    return list(dict.fromkeys([*ends(comparison), *distinct, *headlines(comparison)]))


def unit_of(comparison: Comparison, metric: str) -> str:
    """Unit of a metric as it is printed; shares are printed in percent."""
    if metric in comparison.measures:
        unit = comparison.measures[metric].unit
        return "%" if unit == "share" else unit
    return "answers" if metric == "distinct_correct" else "%"


def value_of(row: Numbers, metric: str) -> Estimate | None:
    """A metric of a run or pool, by its name."""
    if metric == "distinct_correct":
        return row.distinct_correct
    if metric.startswith("pass@"):
        return row.pass_at_k.get(int(metric.removeprefix("pass@")))
    return row.measures.get(metric)


def difference(comparison: Comparison, metric: str, a: str, b: str) -> Estimate | None:
    """The paired difference of a metric, a − b, between two runs or pools; None where either did not measure it."""
    first, second = _metric(comparison, metric, a), _metric(comparison, metric, b)
    return None if first is None or second is None else pooling.paired(first, second, comparison.bootstrap)


def _metric(comparison: Comparison, metric: str, name: str) -> Metric | None:
    """A metric of a run or pool per problem; None where one of its runs lacks it."""
    runs = comparison.members(name)
    found = [one for run in runs if (one := comparison.values[run].get(metric)) is not None]
    return pooling.pooled(found) if len(found) == len(runs) else None
