"""One HTML file that shows a comparison: no script, no network, readable in light and dark."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from posttrain import atomic
from posttrain.evaluation import figures
from posttrain.evaluation.compare import (
    Comparison,
    Numbers,
    Pool,
    compared,
    difference,
    ends,
    headlines,
    of_kind,
    unit_of,
    value_of,
)
from posttrain.evaluation.figures import Style
from posttrain.evaluation.metrics import Estimate, Floats, pass_at_k
from posttrain.evaluation.summary import caption, caption_of_further, verdict
from posttrain.evaluation.sweep import leading, orderings, swept, varied
from posttrain.evaluation.template import COLOURS, TEMPLATE
from posttrain.evaluation.wording import in_words, name_of, numbers, signed, stem, temperature, with_interval, with_unit

_EXAMPLES = 5
"""Problems whose answers are shown."""
_PICTURE = 128
"""Width up to which pictures are enlarged, in pixels."""
_COLUMNS = 4
"""Runs up to which a table has a column for each; more are lines."""


class Shown(NamedTuple):
    """A number as it is printed: with its interval, the values of its seeds, and whether it stands out."""

    value: str
    interval: str = ""
    seeds: str = ""
    strong: bool = False


def write_report(
    comparison: Comparison,
    path: Path,
    *,
    title: str,
    recipe_yaml: str,
    provenance: Mapping[str, Any],
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    command: str,
    curves: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Write the report, whole or not at all.

    Args:
        comparison: what is shown.
        path: the HTML file.
        title: heading of the page.
        recipe_yaml: the resolved recipe.
        provenance: versions, commit, seeds: anything that JSON can hold, by name.
        histories: `log_history` of each run's trainer, by label; runs without one are left out of the plots.
        command: what reproduces the run.
        curves: titles of logged metrics that are drawn beside `figures.CURVES`, by name.
        notes: sentences on the run itself, which stand before those on its numbers.
    """
    import jinja2

    styles = figures.styles_of(comparison)
    names = list(styles)
    many, crowd = len(names) > _COLUMNS, len(names) > figures.CROWD
    sections = _sections(comparison, comparison.rows)
    lost_summary, shown_runs, examples = _losses(comparison) if comparison.k and len(names) > 1 else ("", [], [])
    orders = _orderings(comparison)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE).render(
        title=title,
        subtitle=f"Task {comparison.task} · {comparison.problems:,} problems · {comparison.n:,} answers each · "
        f"temperature {comparison.sampling['temperature']:g} · top-p {comparison.sampling['top_p']:g}",
        sentences=[*notes, *verdict(comparison)],
        names=names,
        styles=styles | {run: styles[name] for name, pool in comparison.pools.items() for run in pool.runs},
        lined=any(style.dash for style in styles.values()),
        base=comparison.base,
        largest=comparison.k[-1] if comparison.k else None,
        level=f"{100 * comparison.confidence:g} %",
        resamples=f"{comparison.resamples:,}",
        draws=f"{comparison.draws:,}",
        max_tokens=f"{comparison.sampling['max_tokens']:,}",
        caption=caption(comparison),
        many=many,
        sections=sections,
        columns=_flat(sections),
        every_run=_flat(_sections(comparison, comparison.runs)) if comparison.pools else [],
        every_run_names=list(comparison.runs),
        leading=leading(comparison),
        curve=figures.curve(comparison, styles) if comparison.k else "",
        banded=not crowd,
        differences=[] if many else _differences(comparison),
        against_base=_against_base(comparison) if many else None,
        orderings=orders,
        ordered_at=any(at for _, rows in orders for at, _ in rows),
        groups=_groups(comparison),
        bars=figures.bars(comparison, styles) if comparison.groups and not crowd else "",
        frontier=_frontier(comparison, styles),
        diversity=_diversity(comparison, styles),
        calibration=_calibration(comparison, styles),
        logged=[name for name in names if any(histories.get(run) for run in comparison.members(name))],
        further=[_further(comparison, name, styles) for name in comparison.further],
        panels=figures.training(comparison, styles, histories, curves or {}),
        smoothing=f"{100 * figures.SMOOTHING:g} %",
        few=f"{100 * figures.FEW:g} %",
        lost_summary=lost_summary,
        shown_runs=shown_runs,
        examples=examples,
        command=command,
        recipe=recipe_yaml,
        provenance=[
            (name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
            for name, value in provenance.items()
        ],
        colours=COLOURS,
    )
    atomic.write_text(path, page)


def _shown(estimate: Estimate | None, unit: str, seeds: Sequence[Estimate] = ()) -> Shown:
    """A number; those of its seeds with its digits."""
    if estimate is None:
        return Shown("–")
    own = [numbers(estimate._replace(value=seed.value), unit)[0] for seed in seeds]
    return Shown(*with_interval(estimate, unit), seeds=" ".join(own) if len(own) > 1 else "")


def _change(estimate: Estimate | None, unit: str) -> Shown:
    """A difference, strong where it is significant."""
    return Shown("–") if estimate is None else Shown(*signed(estimate, unit), strong=estimate.excludes_zero)


Column = tuple[str, list[Shown]]


def _column(comparison: Comparison, rows: Mapping[str, Numbers], metric: str, title: str) -> Column:
    """One metric of every row, with the values of its seeds."""
    unit = unit_of(comparison, metric)
    cells = []
    for row in rows.values():
        runs = row.runs if isinstance(row, Pool) else ()
        seeds = [seed for run in runs if (seed := value_of(comparison.runs[run], metric)) is not None]
        cells.append(_shown(value_of(row, metric), unit, seeds))
    return title, cells


def _sections(comparison: Comparison, rows: Mapping[str, Numbers]) -> list[tuple[str, list[Column]]]:
    """The table of metrics: sections of metrics, each with a cell per row."""
    runs = list(rows.values())
    length = ("length, tokens", [_shown(run.tokens, "tokens") for run in runs])
    truncated = ("truncated, %", [_shown(run.truncated, "%") for run in runs])
    if not comparison.k:
        return [("Answers", [length, truncated])]
    largest = comparison.k[-1]
    return [
        ("Solved, % of problems", [_column(comparison, rows, f"pass@{k}", f"pass@{k}") for k in comparison.k]),
        (
            "Diversity and forgetting",
            [
                _column(comparison, rows, "distinct_correct", f"distinct correct among {comparison.draws:,}"),
                (f"retention@{largest}, %", [_shown(run.retention[largest], "%") for run in runs]),
                (f"gain@{largest}, %", [_shown(run.gain[largest], "%") for run in runs]),
            ],
        ),
        (
            "Answers",
            [
                length,
                ("length of correct answers, tokens", [_shown(run.tokens_correct, "tokens") for run in runs]),
                ("length of wrong answers, tokens", [_shown(run.tokens_wrong, "tokens") for run in runs]),
                truncated,
                ("answers without a verdict", [Shown(f"{run.without_verdict:,}") for run in runs]),
            ],
        ),
    ]


def _flat(sections: Sequence[tuple[str, list[Column]]]) -> list[Column]:
    """The same metrics as the columns of one table."""
    return [
        (f"{title}, %" if "%" in section else title, cells) for section, columns in sections for title, cells in columns
    ]


def _differences(comparison: Comparison) -> list[dict[str, Any]]:
    return [
        {
            "run": one.run,
            "against": one.against,
            "metric": f"pass@{one.k}",
            "shown": Shown(*signed(one.estimate, "%")),
            "significant": one.estimate.excludes_zero,
        }
        for one in comparison.differences
    ]


def _against_base(comparison: Comparison) -> list[Column]:
    """Paired differences of every row to the base, by metric; [] where the base measured nothing that the rows did."""
    columns = []
    for metric in compared(comparison):
        unit = unit_of(comparison, metric)
        cells = [
            _change(difference(comparison, metric, name, comparison.base), unit)
            for name in comparison.rows
            if name != comparison.base
        ]
        if any(shown.interval for shown in cells):
            columns.append((with_unit(_title(metric), "points" if unit == "%" else unit), cells))
    return columns


def _further(comparison: Comparison, name: str, styles: Mapping[str, Style]) -> dict[str, Any]:
    """Numbers on a further task with their differences to the base, and how they lie beside those of the main task."""
    other = comparison.further[name]
    largest = other.k[-1]
    columns = []
    for k in other.k:
        metric = f"pass@{k}"
        columns.append(_column(other, other.rows, metric, f"{metric}, %"))
        if metric in ends(other) and len(other.rows) > 1:
            changes = [
                Shown("–") if row == other.base else _change(difference(other, metric, row, other.base), "%")
                for row in other.rows
            ]
            columns.append((f"{metric} minus {other.base}, points", changes))
    columns.append((f"retention@{largest}, %", [_shown(row.retention[largest], "%") for row in other.rows.values()]))
    columns.append((f"gain@{largest}, %", [_shown(row.gain[largest], "%") for row in other.rows.values()]))
    here, there = ends(comparison), ends(other)
    drawn = comparison.k and len(other.rows) > 2
    pairs = dict.fromkeys([(here[0], there[0]), (here[-1], there[-1])]) if drawn else {}
    return {
        "name": name,
        "caption": caption_of_further(other),
        "columns": columns,
        "panels": [
            figures.elsewhere(comparison, name, styles, pair, _along(comparison), f"further-{name}-{place}")
            for place, pair in enumerate(pairs)
        ],
        "crowd": len(other.rows) - 1 > figures.CROWD,
    }


def _orderings(comparison: Comparison) -> list[tuple[str, list[tuple[str, str]]]]:
    """Per metric, where the other settings stand and the order in words; pass@k on further tasks last."""
    rows: dict[str, list[tuple[str, str]]] = {}
    for one in orderings(comparison):
        rows.setdefault(_with_unit(comparison, one.metric), []).append((in_words(one.at), one.words))
    for name, other in comparison.further.items():
        for one in (one for one in orderings(other) if one.metric in ends(other)):
            rows.setdefault(f"{_with_unit(other, one.metric)} on {name}", []).append((in_words(one.at), one.words))
    return list(rows.items())


def _title(metric: str) -> str:
    """A metric with its temperature."""
    name = name_of(metric)
    return name if metric == stem(metric) else f"{name} at\u00a0T\u00a0{temperature(metric):g}"


def _with_unit(comparison: Comparison, metric: str) -> str:
    return with_unit(_title(metric), unit_of(comparison, metric))


def _groups(comparison: Comparison) -> list[tuple[str, list[dict[str, Any]]]]:
    """Rows of the table by number of solutions: per group, a row per run or pool."""
    groups = []
    for group in comparison.groups:
        differences = {one.run: _change(one.estimate, "%") for one in group.differences}
        rows = [
            {"run": label, "shown": _shown(estimate, "%"), "difference": differences.get(label, Shown("–"))}
            for label, estimate in group.pass_at_k.items()
        ]
        groups.append((f"{group.name} ({group.problems:,})", rows))
    return groups


def _described(comparison: Comparison, metrics: Sequence[str]) -> list[tuple[str, str]]:
    """Names and descriptions of measures; those at several temperatures once."""
    texts = {
        name_of(metric): re.sub(r", temperature [\d.]+(?=[,.])", "", comparison.measures[metric].description)
        for metric in metrics
    }
    return list(texts.items())


def _frontier(comparison: Comparison, styles: Mapping[str, Style]) -> dict[str, Any] | None:
    """Divergence from the base against what the policies achieve: drawings and a table; None without divergences."""
    metrics = of_kind(comparison, "divergence")
    if not metrics:
        return None
    x = next(metric for metric in headlines(comparison) if metric in metrics)
    trained = [row for name, row in comparison.rows.items() if name != comparison.base]
    heights = [y for y in ends(comparison) if any(figures.point(row, x, y) for row in trained)]
    along = _along(comparison)
    return {
        "drawings": [
            figures.frontier(comparison, styles, x, y, along, f"frontier-{place}") for place, y in enumerate(heights)
        ],
        "x": name_of(x),
        "crowd": len(trained) > figures.CROWD,
        "along": along,
        "columns": [
            _column(comparison, comparison.rows, metric, _with_unit(comparison, metric))
            for metric in [*metrics, *heights]
        ],
        "described": _described(comparison, metrics),
    }


def _along(comparison: Comparison) -> str | None:
    """The numeric setting of a sweep that curves of the frontier follow: β, or the first one."""
    values = {key: [pool.settings[key] for pool in swept(comparison).values()] for key in varied(comparison)}
    numeric = [key for key, found in values.items() if all(type(value) in (int, float) for value in found)]
    return "beta" if "beta" in numeric else next(iter(numeric), None)


def _diversity(comparison: Comparison, styles: Mapping[str, Style]) -> dict[str, Any] | None:
    """Measures of diversity by temperature: tables and small plots; None without any."""
    metrics = of_kind(comparison, "diversity")
    if not metrics:
        return None
    stems: dict[str, list[str]] = {}
    for metric in metrics:
        stems.setdefault(stem(metric), []).append(metric)
    ordered = [sorted(found, key=temperature) for found in stems.values()]
    drawn = [found for found in ordered if len(found) > 1]
    return {
        "panels": [
            figures.by_temperature(comparison, styles, found, f"diversity-{place}") for place, found in enumerate(drawn)
        ],
        "tables": [
            (
                with_unit(name_of(found[0]), unit_of(comparison, found[0])),
                [_column(comparison, comparison.rows, metric, f"T = {temperature(metric):g}") for metric in found],
            )
            for found in ordered
        ],
        "described": _described(comparison, metrics),
    }


def _calibration(comparison: Comparison, styles: Mapping[str, Style]) -> dict[str, Any] | None:
    """Accuracy and calibration on preference pairs: a table and reliability plots; None without any."""
    metrics = of_kind(comparison, "calibration")
    if not metrics:
        return None
    crowd = len(comparison.rows) > figures.CROWD
    return {
        "panels": [] if crowd else figures.reliability(comparison, styles, metrics),
        "columns": [_column(comparison, comparison.rows, metric, _with_unit(comparison, metric)) for metric in metrics],
        "described": _described(comparison, metrics),
    }


def _losses(comparison: Comparison) -> tuple[str, list[str], list[dict[str, Any]]]:
    """How many problems the runs lost (pass@max k fell below ½ from above it), and the worst with the answers of some.

    Those are all runs, or of many the base and the run that lost most.
    """
    base, largest = comparison.base, comparison.k[-1]
    results = comparison.results
    enough = np.min([result.n for result in results.values()], axis=0) >= largest
    places = np.flatnonzero(enough)
    solved: dict[str, Floats] = {
        label: pass_at_k(result.n[enough], result.c[enough], largest) for label, result in results.items()
    }
    before = solved[base]
    known = before >= 0.5
    falls = {label: np.where(known & (now < 0.5), before - now, 0.0) for label, now in solved.items() if label != base}
    counts = {label: int((fall > 0).sum()) for label, fall in falls.items()}
    shown = list(results)
    if len(results) <= _COLUMNS:
        told = ", ".join(f"{label} lost {count:,}" for label, count in counts.items())
    else:
        least, most = min(counts, key=lambda label: counts[label]), max(counts, key=lambda label: counts[label])
        told = f"a run lost between {counts[least]:,} ({least}) and {counts[most]:,} ({most})"
        shown = [base, most]
    summary = (
        f"Of {int(known.sum()):,} problems that {base} solves with a pass@{largest} of at least ½, "
        f"{told} (their pass@{largest} is below ½)."
    )
    worst = np.max([np.zeros(len(places)), *(falls[label] for label in shown if label != base)], axis=0)
    order = [int(place) for place in np.argsort(-worst, kind="stable")[:_EXAMPLES] if worst[place] > 0]
    return summary, shown, [_example(comparison, shown, int(places[place])) for place in order]


def _example(comparison: Comparison, labels: Sequence[str], problem: int) -> dict[str, Any]:
    runs = []
    for result in (comparison.results[label] for label in labels):
        flags = result.correct[problem]
        counts = Counter(
            ("no answer" if answer is None else _shortened(answer), flag)
            for answer, flag in zip(result.answers[problem], flags, strict=True)
        )
        top = [(text, count, right) for (text, right), count in counts.most_common(3)]
        runs.append({"correct": sum(flags), "total": len(flags), "top": top})
    asked = comparison.results[comparison.base]
    images = asked.images[problem] if asked.images else []
    return {
        "prompt": _shortened(asked.prompts[problem], 300),
        "images": [_drawn(image) for image in images],
        "runs": runs,
    }


def _drawn(png: bytes) -> dict[str, Any]:
    """A picture as part of the page; tiny ones are enlarged by a whole factor, so that their pixels stay squares."""
    width = int.from_bytes(png[16:20])  # of the header, which comes first in every PNG file
    factor = max(1, _PICTURE // width)
    source = f"data:image/png;base64,{b64encode(png).decode('ascii')}"
    return {"source": source, "width": width * factor, "enlarged": factor > 1}


def _shortened(text: str, most: int = 80) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
