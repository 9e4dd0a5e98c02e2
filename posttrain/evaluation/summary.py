"""A comparison for those who read it: in sentences, as a table on a terminal, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from posttrain.evaluation.compare import (
    Comparison,
    Difference,
    Numbers,
    difference,
    ends,
    headlines,
    unit_of,
    value_of,
)
from posttrain.evaluation.metrics import Estimate
from posttrain.evaluation.sweep import orderings
from posttrain.evaluation.wording import name_of, numbers, points, temperature, with_interval, with_unit

if TYPE_CHECKING:
    from rich.table import Table


def to_json(comparison: Comparison) -> str:
    """Everything but the evaluations, with the verdict in words and the orderings of a sweep."""
    return json.dumps(_content(comparison), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _content(comparison: Comparison) -> dict[str, Any]:
    shown = {
        field.name: _plain(getattr(comparison, field.name))
        for field in fields(comparison)
        if field.name not in ("results", "values", "further")
    }
    return {
        "verdict": verdict(comparison),
        "orderings": _plain(orderings(comparison)),
        **shown,
        "further": {name: _content(other) for name, other in comparison.further.items()},
    }


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


_SENTENCES = 6
"""Runs beside the base up to which each of them gets its own sentence."""


def verdict(comparison: Comparison) -> list[str]:
    """The paired differences in sentences; a change is significant when its interval excludes 0.

    A sweep, and a comparison of many runs, is told by its base and by the best at each of the two ends of pass@k. A
    sentence for each further task follows.
    """
    many = comparison.pools or len(comparison.runs) > 1 + _SENTENCES
    elsewhere = [
        _elsewhere_of_many(name, other) if many else _elsewhere(name, other)
        for name, other in comparison.further.items()
        if len(other.rows) > 1
    ]
    if many or not comparison.k:
        return _of_many(comparison) + elsewhere
    by_pair: dict[tuple[str, str], list[Difference]] = {}
    for change in comparison.differences:
        by_pair.setdefault((change.run, change.against), []).append(change)
    return [
        f"Against {against}, {run} {' and '.join(_told(one, against == comparison.base) for one in changes)}."
        for (run, against), changes in by_pair.items()
    ] + elsewhere


def _elsewhere(name: str, further: Comparison) -> str:
    """What every run gained and lost on a further task."""
    told, unchanged = [], []
    for run, changes in _against_base(further).items():
        words = [
            f"{'raised' if change.value > 0 else 'lowered'} {metric} ({points(change)})"
            for metric, change in changes.items()
            if change.excludes_zero
        ]
        if words:
            told.append(f"{run} {' and '.join(words)}")
        else:
            unchanged.append(run)
    if unchanged:
        told.append(f"{', '.join(unchanged)} {'shows' if len(unchanged) == 1 else 'show'} no significant change")
    return f"On {name}, against {further.base}: {'; '.join(told)}."


def _elsewhere_of_many(name: str, further: Comparison) -> str:
    """How many gained and lost on a further task, and who lost most."""
    changes = _against_base(further)
    told = []
    for metric in ends(further):
        found = {run: of_run[metric] for run, of_run in changes.items() if of_run[metric].excludes_zero}
        lost = {run: change for run, change in found.items() if change.value < 0}
        if lost:
            worst = min(lost, key=lambda run: lost[run].value)
            told.append(
                f"{len(lost)} of the {len(changes)} trained {'is' if len(lost) == 1 else 'are'} significantly below "
                f"{further.base} in {metric}, furthest {worst} ({points(lost[worst])})"
            )
        if len(found) > len(lost):
            told.append(f"{len(found) - len(lost)} significantly above in {metric}")
    return f"On {name}, {'; '.join(told) or f'none of the {len(changes)} trained differs significantly'}."


def _against_base(comparison: Comparison) -> dict[str, dict[str, Estimate]]:
    """Paired differences of every run or pool to the base at both ends of pass@k."""
    return {
        name: {
            metric: change
            for metric in ends(comparison)
            if (change := difference(comparison, metric, name, comparison.base)) is not None
        }
        for name in comparison.rows
        if name != comparison.base
    }


def _told(change: Difference, from_base: bool) -> str:
    estimate = change.estimate
    if not estimate.excludes_zero:
        words = f"shows no significant {'change' if from_base else 'difference'} in"
    elif from_base:
        words = "raised" if estimate.value > 0 else "lowered"
    else:
        words = f"is {'higher' if estimate.value > 0 else 'lower'} in"
    return f"{words} pass@{change.k} ({points(estimate)})"


def _of_many(comparison: Comparison) -> list[str]:
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
        words = "not significantly different from"
        if against.excludes_zero:
            words = f"significantly {'above' if against.value > 0 else 'below'}"
        sentence += f", {words} {comparison.base} ({points(against)})"
    others = [difference(comparison, metric, best, name) for name in values if name != best]
    behind = sum(one is not None and one.low > 0 for one in others)
    if len(others) == 1:
        sentence += f"; the other is {'' if behind else 'not '}significantly lower"
    elif others:
        sentence += f"; {behind} of the {len(others)} others {'is' if behind == 1 else 'are'} significantly lower"
    return f"{sentence}."


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
    return " ".join([*sentences, *_left_out(comparison)])


def _left_out(comparison: Comparison) -> list[str]:
    return [
        f"Problems left out of pass@{k} for want of verdicts: {count}."
        for k, count in comparison.dropped.items()
        if count
    ]


def caption_of_further(further: Comparison) -> str:
    """What the numbers on a further task are, beyond what the caption of the main table says."""
    return " ".join([f"{further.problems:,} problems, {further.n:,} answers each.", *_left_out(further)])


class _Column(NamedTuple):
    """A number of a run: its name in one line, in two lines, its unit, and where it is found."""

    line: str
    head: str
    unit: str
    value: Callable[[Numbers], Estimate | None]


def _columns(comparison: Comparison) -> list[_Column]:
    found = []
    if comparison.k:
        everything = _narrow(comparison) or not comparison.measures
        shares = [f"pass@{k}" for k in comparison.k] if everything and not comparison.pools else ends(comparison)
        found += [_Column(f"{name}, %", f"{name}\n%", "%", partial(value_of, metric=name)) for name in shares]
        found.append(
            _Column("distinct correct", "distinct\ncorrect", "answers", partial(value_of, metric="distinct_correct"))
        )
        if everything:
            found.append(_retention(comparison.k[-1]))
    for metric in headlines(comparison):
        name, unit = _short(metric), unit_of(comparison, metric)
        short = unit.partition(" per ")[0]
        head = name.replace(" ", "\n", 1).replace("-", "-\n", 1)
        head = head if "\n" in head else f"{name}\n{short}"
        found.append(_Column(with_unit(name, short), head, unit, partial(value_of, metric=metric)))
    if not comparison.k:
        found.append(_Column("answer, tokens", "answer\ntokens", "tokens", lambda row: row.tokens))
        found.append(_Column("truncated, %", "cut\n%", "%", lambda row: row.truncated))
    return found


def _columns_of_further(comparison: Comparison) -> list[_Column]:
    shares = [_Column(f"{name}, %", f"{name}\n%", "%", partial(value_of, metric=name)) for name in ends(comparison)]
    return [*shares, _retention(comparison.k[-1])]


def _retention(k: int) -> _Column:
    return _Column(f"retention@{k}, %", f"retained\n@{k}, %", "%", lambda row: row.retention.get(k))


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
    return _table(
        comparison,
        _columns(comparison),
        title=f"{comparison.task}: what each policy {'solves' if comparison.k else 'does'}",
        caption=" ".join([caption(comparison, brackets=_narrow(comparison)), *_explained(comparison)]),
    )


def further_tables(comparison: Comparison) -> list[Table]:
    """The numbers on further tasks on a terminal, in the form of `table`."""
    return [
        _table(other, _columns_of_further(other), title=f"On {name}", caption=caption_of_further(other))
        for name, other in comparison.further.items()
    ]


def _table(comparison: Comparison, columns: Sequence[_Column], *, title: str, caption: str) -> Table:
    from rich.table import Table

    shown = Table(title=title, caption=caption, caption_justify="left", title_justify="left")
    if _narrow(comparison):
        shown.add_column("", no_wrap=not comparison.measures)
        for label in comparison.runs:
            shown.add_column(label, justify="right", no_wrap=True)
        for column in columns:
            shown.add_row(column.line, *(_cell(column, run) for run in comparison.runs.values()))
        return shown
    shown.add_column("", overflow="fold", min_width=min(24, max(len(name) for name in comparison.rows)))
    for column in columns:
        shown.add_column(column.head, justify="right", no_wrap=True)
    for name in comparison.rows:
        shown.add_row(name, *(_mean_and_range(column, comparison, name) for column in columns))
    return shown


def _cell(column: _Column, row: Numbers) -> str:
    """A value and its interval; a dash where there is none."""
    estimate = column.value(row)
    return "–" if estimate is None else " ".join(with_interval(estimate, column.unit))


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


def _mean_and_range(column: _Column, comparison: Comparison, name: str) -> str:
    """A value, and below a share of a pool the range of its seeds; a dash where there is none."""
    mean = column.value(comparison.rows[name])
    if mean is None:
        return "–"
    runs = [column.value(comparison.runs[run]) for run in comparison.members(name)]
    seeds = [estimate.value for estimate in runs if estimate is not None]
    if len(seeds) < 2 or not column.line.startswith(("pass@", "pairs")):
        return numbers(mean, column.unit)[0]
    value, low, high = numbers(Estimate(mean.value, min(seeds), max(seeds)), column.unit)
    return f"{value}\n{low}–{high}"
