"""One HTML file that shows a comparison: no script, no network, readable in light and dark."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from posttrain import atomic
from posttrain.evaluation.compare import (
    Comparison,
    Numbers,
    caption,
    change,
    difference,
    distinct,
    ends,
    headlines,
    in_words,
    leading,
    name_of,
    numbers,
    orderings,
    seeds_of,
    shared_settings,
    swept,
    temperature,
    unit_of,
    value_of,
    varied,
    verdict,
    with_unit,
)
from posttrain.evaluation.measures import Measured
from posttrain.evaluation.metrics import Estimate, Floats, pass_at_k
from posttrain.evaluation.template import COLOURS, TEMPLATE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = {
    "reward": "mean reward",
    "rewards/accuracies": "implicit reward accuracy, share",
    "rewards/margins": "implicit reward margin",
    "rewards/chosen": "implicit reward of chosen answers",
    "rewards/rejected": "implicit reward of rejected answers",
    "logps/chosen": "log-prob of chosen answers, nats",
    "completions/mean_length": "answer length, tokens",
    "completions/clipped_ratio": "truncated answers, share",
    "entropy": "token entropy, nats",
    "kl": "KL to the reference, nats per token",
    "loss": "loss",
    "grad_norm": "gradient norm",
}
"""Logged metrics that are drawn where a run has them, in this order."""

_EXAMPLES = 5
_SMOOTHING = 0.05
"""Width of the running mean, as a share of a run's logged values."""

# matplotlib wants colours, the page wants variables that change with the theme: these are replaced in the SVG.
_INK, _MUTED, _LINE = "#fd0001", "#fd0002", "#fd0003"
_MARKERS = "osD^vP*"
_DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 2)),
    (0, (1.2, 1.5)),
    (0, (6, 2, 1.2, 2)),
    (0, (2.4, 1.2)),
    (0, (6, 1.5, 1.2, 1.5, 1.2, 1.5)),
)
"""Of matplotlib; the template's `.key-0` to `.key-5` look like them."""

_COLUMNS = 4
"""Runs up to which a table has a column for each; more are lines."""
_CROWD = 8
"""Runs up to which curves have bands, and bars are drawn."""
_FEW = 0.01
"""Bins with a smaller share of the pairs are no points of a reliability plot."""
_LOGARITHMIC = 30
"""Divergences that span more than this factor are drawn on a logarithmic axis."""


class Shown(NamedTuple):
    """A number as it is printed: with its interval, the values of its seeds, and whether it stands out."""

    value: str
    interval: str = ""
    seeds: str = ""
    strong: bool = False


class Style(NamedTuple):
    """How a run or pool is drawn: an index of `COLOURS` (grey is the base's alone), and one of `_DASHES`."""

    slot: int
    dash: int = 0

    @property
    def colour(self) -> str:
        """The placeholder that becomes a colour of the page."""
        return f"#fe00{self.slot:02x}"


def write_report(
    comparison: Comparison,
    path: Path,
    *,
    title: str,
    recipe_yaml: str,
    provenance: Mapping[str, Any],
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    command: str,
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
    """
    import jinja2

    styles = _styles(comparison)
    names = list(styles)
    many = len(names) > _COLUMNS
    lost_summary, shown_runs, examples = _losses(comparison) if comparison.k and len(names) > 1 else ("", [], [])
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE).render(
        title=title,
        subtitle=f"Task {comparison.task} · {comparison.problems:,} problems · {comparison.n:,} answers each · "
        f"temperature {comparison.sampling['temperature']:g} · top-p {comparison.sampling['top_p']:g}",
        sentences=verdict(comparison),
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
        sections=_sections(comparison, comparison.rows),
        columns=_flat(_sections(comparison, comparison.rows)),
        every_run=_flat(_sections(comparison, comparison.runs)) if comparison.pools else [],
        every_run_names=list(comparison.runs),
        leading=leading(comparison),
        curve=_markup(_curve(comparison, styles), "pass@k by k, one line per run", "curve") if comparison.k else "",
        banded=len(names) <= _CROWD,
        differences=[] if many else _differences(comparison),
        against_base=_against_base(comparison) if many else None,
        orderings=_orderings(comparison),
        groups=_groups(comparison),
        bars=_markup(_bars(comparison, styles), "pass@k by number of solutions", "bars")
        if comparison.groups and len(names) <= _CROWD
        else "",
        frontier=_frontier(comparison, styles),
        diversity=_diversity(comparison, styles),
        calibration=_calibration(comparison, styles),
        logged=[name for name in names if any(histories.get(run) for run in _members(comparison, name))],
        panels=_panels(histories, comparison, styles),
        smoothing=f"{100 * _SMOOTHING:g} %",
        few=f"{100 * _FEW:g} %",
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


def _styles(comparison: Comparison) -> dict[str, Style]:
    """Colours and dashes by run or pool. In a sweep the colour says the leading setting and the dashes the others."""
    by, colours = leading(comparison), len(COLOURS) - 1
    rest = [key for key in shared_settings(comparison) if key != by]
    tails = {name: {key: pool.settings[key] for key in rest} for name, pool in swept(comparison).items()}
    heads = {
        name: {key: value for key, value in pool.settings.items() if key not in rest}
        for name, pool in swept(comparison).items()
    }
    different_heads, different_tails = distinct(heads.values()), distinct(tails.values())
    styles, others = {}, len(different_heads)
    for name in comparison.rows:
        if name == comparison.base:
            styles[name] = Style(0)
            continue
        if name in heads:
            place, dash = different_heads.index(heads[name]), different_tails.index(tails[name])
        else:
            place, dash = others, 0
            others += 1
        styles[name] = Style(1 + place % colours, (dash + place // colours) % len(_DASHES))
    return styles


def _members(comparison: Comparison, name: str) -> tuple[str, ...]:
    """The runs of a pool; a run outside a sweep itself."""
    return comparison.pools[name].runs if name in comparison.pools else (name,)


def _shown(estimate: Estimate | None, unit: str, seeds: Sequence[Estimate] = ()) -> Shown:
    if estimate is None:
        return Shown("–")
    value, low, high = numbers(estimate, unit)
    own = [numbers(Estimate(seed.value, estimate.low, estimate.high), unit)[0] for seed in seeds]
    return Shown(value, f"[{low}, {high}]", " ".join(own) if len(own) > 1 else "")


def _change(estimate: Estimate | None, unit: str) -> Shown:
    if estimate is None:
        return Shown("–")
    text = change(estimate, unit)
    return Shown(text.split(" ", 1)[0], text[text.index("[") :], strong=estimate.excludes_zero)


Column = tuple[str, list[Shown]]


def _column(comparison: Comparison, rows: Mapping[str, Numbers], metric: str, title: str) -> Column:
    """One metric of every row, with the values of its seeds."""
    unit = unit_of(comparison, metric)
    cells = [
        _shown(
            value_of(row, metric), unit, seeds_of(comparison, name, metric) if comparison.rows.get(name) is row else ()
        )
        for name, row in rows.items()
    ]
    return title, cells


def _sections(comparison: Comparison, rows: Mapping[str, Numbers]) -> list[tuple[str, list[Column]]]:
    """The table of metrics: sections of metrics, each with a cell per row."""
    sections: list[tuple[str, list[Column]]] = []
    runs = list(rows.values())
    if comparison.k:
        largest = comparison.k[-1]
        sections += [
            (
                "Solved, % of problems",
                [_column(comparison, rows, f"pass@{k}", f"pass@{k}") for k in comparison.k],
            ),
            (
                "Diversity and forgetting",
                [
                    _column(comparison, rows, "distinct_correct", f"distinct correct among {comparison.draws:,}"),
                    (f"retention@{largest}, %", [_shown(run.retention[largest], "%") for run in runs]),
                    (f"gain@{largest}, %", [_shown(run.gain[largest], "%") for run in runs]),
                ],
            ),
        ]
    answers = [("length, tokens", [_shown(run.tokens, "tokens") for run in runs])]
    if comparison.k:
        answers += [
            ("length of correct answers, tokens", [_shown(run.tokens_correct, "tokens") for run in runs]),
            ("length of wrong answers, tokens", [_shown(run.tokens_wrong, "tokens") for run in runs]),
        ]
    answers.append(("truncated, %", [_shown(run.truncated, "%") for run in runs]))
    if comparison.k:
        answers.append(("answers without a verdict", [Shown(f"{run.without_verdict:,}") for run in runs]))
    return [*sections, ("Answers", answers)]


def _flat(sections: Sequence[tuple[str, list[Column]]]) -> list[Column]:
    """The same metrics as the columns of one table."""
    return [
        (f"{title}, %" if "%" in section else title, cells) for section, columns in sections for title, cells in columns
    ]


def _differences(comparison: Comparison) -> list[dict[str, Any]]:
    return [
        {
            "run": difference.run,
            "against": difference.against,
            "metric": f"pass@{difference.k}",
            "shown": _change(difference.estimate, "%")._replace(strong=False),
            "significant": difference.estimate.excludes_zero,
        }
        for difference in comparison.differences
    ]


def _against_base(comparison: Comparison) -> list[Column]:
    """Paired differences of every row to the base, by metric; [] where the base measured nothing that the rows did."""
    distinct_correct = ["distinct_correct"] if comparison.k else []
    columns = []
    for metric in dict.fromkeys([*ends(comparison), *distinct_correct, *headlines(comparison)]):
        unit = unit_of(comparison, metric)
        cells = [
            _change(difference(comparison, metric, name, comparison.base), unit)
            for name in comparison.rows
            if name != comparison.base
        ]
        if any(shown.interval for shown in cells):
            columns.append((with_unit(_title(metric), "points" if unit == "%" else unit), cells))
    return columns


def _orderings(comparison: Comparison) -> list[tuple[str, list[tuple[str, str]]]]:
    """Per metric, where the other settings stand and the order in words."""
    rows: dict[str, list[tuple[str, str]]] = {}
    for one in orderings(comparison):
        rows.setdefault(_with_unit(comparison, one.metric), []).append((in_words(one.at), one.words))
    return list(rows.items())


def _title(metric: str) -> str:
    """A metric with its temperature."""
    name, _, at = metric.partition("@T")
    return f"{name_of(metric)} at\u00a0T\u00a0{float(at):g}" if at else name_of(name)


def _groups(comparison: Comparison) -> list[tuple[str, list[dict[str, Any]]]]:
    """Rows of the table by number of solutions: per group, a row per run or pool."""
    groups = []
    for group in comparison.groups:
        differences = {difference.run: _change(difference.estimate, "%") for difference in group.differences}
        rows = [
            {"run": label, "shown": _shown(estimate, "%"), "difference": differences.get(label, Shown("–"))}
            for label, estimate in group.pass_at_k.items()
        ]
        groups.append((f"{group.name} ({group.problems:,})", rows))
    return groups


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
    return {"prompt": _shortened(comparison.results[comparison.base].prompts[problem], 300), "runs": runs}


def _shortened(text: str, most: int = 80) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _of_kind(comparison: Comparison, kind: str) -> list[str]:
    return [name for name, measure in comparison.measures.items() if measure.kind == kind]


def _described(comparison: Comparison, metrics: Sequence[str]) -> list[tuple[str, str]]:
    """Names and descriptions of measures; those at several temperatures once."""
    texts = {
        name_of(metric): re.sub(r", temperature [\d.]+(?=[,.])", "", comparison.measures[metric].description)
        for metric in metrics
    }
    return list(texts.items())


def _with_unit(comparison: Comparison, metric: str) -> str:
    return with_unit(_title(metric), unit_of(comparison, metric))


def _frontier(comparison: Comparison, styles: Mapping[str, Style]) -> dict[str, Any] | None:
    """Divergence from the base against what the policies achieve: drawings and a table; None without divergences."""
    metrics = _of_kind(comparison, "divergence")
    if not metrics:
        return None
    x = next(metric for metric in headlines(comparison) if metric in metrics)
    trained = [row for name, row in comparison.rows.items() if name != comparison.base]
    heights = [y for y in ends(comparison) if any(_point(row, x, y) for row in trained)]
    along = _along(comparison)
    return {
        "drawings": [
            _markup(
                _frontier_curve(comparison, styles, x, y, along), f"{name_of(y)} by {name_of(x)}", f"frontier-{place}"
            )
            for place, y in enumerate(heights)
        ],
        "x": name_of(x),
        "crowd": len(trained) > _CROWD,
        "along": along,
        "columns": [
            _column(comparison, comparison.rows, metric, _with_unit(comparison, metric))
            for metric in [*metrics, *heights]
        ],
        "described": _described(comparison, metrics),
    }


def _point(row: Numbers, x: str, y: str) -> tuple[float, Estimate] | None:
    """A divergence, and what was achieved at it; None where either was not measured."""
    across, up = value_of(row, x), value_of(row, y)
    return None if across is None or up is None else (across.value, up)


def _along(comparison: Comparison) -> str | None:
    """The numeric setting of a sweep that curves of the frontier follow: β, or the first one."""
    values = {key: [pool.settings[key] for pool in swept(comparison).values()] for key in varied(comparison)}
    numeric = [key for key, found in values.items() if all(type(value) in (int, float) for value in found)]
    return "beta" if "beta" in numeric else next(iter(numeric), None)


def _lines(comparison: Comparison, names: Sequence[str], along: str | None) -> list[list[str]]:
    """Names that a curve of the frontier connects: all settings but one are equal, and that one increases."""
    lines: list[tuple[dict[str, Any], list[str]]] = []
    for name in names:
        settings = comparison.pools[name].settings if name in comparison.pools else {}
        fixed = {key: value for key, value in settings.items() if key != along} if along in settings else {"": name}
        line = next((line for same, line in lines if same == fixed), None)
        if line is None:
            lines.append((fixed, [name]))
        else:
            line.append(name)
    return [sorted(line, key=lambda name: _setting(comparison, name, along)) for _, line in lines]


def _setting(comparison: Comparison, name: str, key: str | None) -> float:
    """A numeric setting of a pool; 0 where it has none."""
    settings = comparison.pools[name].settings if name in comparison.pools else {}
    return next((value for other, value in settings.items() if other == key), 0.0)


def _point_name(comparison: Comparison, name: str, along: str | None, *, in_full: bool) -> str:
    """What stands beside a point: the setting that its curve follows, and for one point of a curve the others too."""
    settings = comparison.pools[name].settings if name in comparison.pools else {}
    if along not in settings:
        return name
    others = {key: value for key, value in settings.items() if key != along and value is not False}
    value = f"{_setting(comparison, name, along):g}"
    return f"{in_words(others)} {value}".strip() if in_full else value


Box = tuple[float, float, float, float]
"""Left, low, right and high edge, in pixels."""


class _Label(NamedTuple):
    text: str
    at: tuple[float, float]
    colour: str


def _frontier_curve(comparison: Comparison, styles: Mapping[str, Style], x: str, y: str, along: str | None) -> str:
    points = {name: at for name, row in comparison.rows.items() if (at := _point(row, x, y)) is not None}
    base = points.pop(comparison.base, None)
    labels: list[_Label] = []
    paths: list[Floats] = []
    crowd = len(points) > _CROWD
    with _figure(*(8.0, 4.4) if crowd else (4.6, 3.9)) as (figure, axes):
        if base is not None:
            axes.axhline(
                100 * base[1].value, color=styles[comparison.base].colour, linewidth=1.2, linestyle=(0, (4, 3))
            )
        drawn: Counter[int] = Counter()
        for line in _lines(comparison, list(points), along):
            across = np.array([points[name][0] for name in line])
            value, low, high = 100 * np.array([points[name][1] for name in line]).T
            slots = {styles[name].slot for name in line}
            colour = styles[line[0]].colour if len(slots) == 1 else _MUTED
            dash = _DASHES[drawn[min(slots)] % len(_DASHES)]
            drawn.update(slots)
            if not crowd:
                axes.vlines(across, low, high, color=colour, linewidth=1, alpha=0.35)
            axes.plot(across, value, color=colour, linewidth=1.6, linestyle=dash)
            paths.append(np.column_stack([across, value]))
            last = line[int(np.argmax(across))]
            for name, left, up in zip(line, across, value, strict=True):
                own = styles[name].colour
                axes.plot(left, up, "o", color=own, markersize=5)
                seeds = [_point(comparison.runs[run], x, y) for run in _members(comparison, name)]
                faint = [seed for seed in seeds if seed is not None]
                if len(faint) > 1:
                    heights = [100 * seed[1].value for seed in faint]
                    axes.plot([seed[0] for seed in faint], heights, "o", color=own, markersize=2.4, alpha=0.45)
                labels.append(_Label(_point_name(comparison, name, along, in_full=name == last), (left, up), own))
        positive = [left for left, _ in points.values() if left > 0]
        if len(positive) == len(points) and max(positive) > _LOGARITHMIC * min(positive):
            axes.set_xscale("log")
        axes.margins(x=0.16, y=0.12)
        if axes.get_xscale() == "linear":
            axes.set_xlim(left=0)
        axes.set_title(f"{name_of(y)}, %", loc="left", color=_INK)
        axes.set_xlabel(_with_unit(comparison, x))
        if base is not None:
            left, right = axes.get_xlim()
            level = 100 * base[1].value
            labels.append(_Label(comparison.base, (left, level), styles[comparison.base].colour))
            paths.append(np.array([[left, level], [right, level]]))
        _place(figure, axes, labels, paths)
        return _svg(figure)


def _place(figure: Figure, axes: Axes, labels: Sequence[_Label], paths: Sequence[Floats]) -> None:
    """Write labels beside their points: each at that of some places where it hides least of points, of paths ([points,
    2]) and of other labels."""
    figure.draw_without_rendering()  # lays the axes out
    scale, size = figure.dpi / 72, 8.5
    spots = axes.transData.transform([label.at for label in labels])
    taken = [(left - 5, low - 5, left + 5, low + 5) for left, low in spots]
    for path in paths:
        corners = axes.transData.transform(path)
        for start, end in itertools.pairwise(corners):
            for left, low in np.linspace(start, end, 40):
                taken.append((left - 2, low - 2, left + 2, low + 2))
    edges = axes.get_window_extent()
    frame = (edges.x0, edges.y0, edges.x1, edges.y1)
    for label, (left, low) in sorted(zip(labels, spots, strict=True), key=lambda pair: -len(pair[0].text)):
        width, height = 0.56 * size * scale * len(label.text), 1.15 * size * scale
        places = []
        for distance in (7, 14, 24):
            for side, rise in ((1, 0), (0, 1), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)):
                x0 = left + side * distance * scale * 0.9 - (0.5 - side / 2) * width
                y0 = low + rise * distance * scale * 0.9 - height / 2
                places.append((x0, y0, x0 + width, y0 + height))

        best = min(places, key=lambda box: _hidden(box, taken, frame))  # the first of equals
        taken.append(best)
        axes.annotate(
            label.text,
            label.at,
            ((best[0] - left) / scale, (best[1] - low) / scale),
            textcoords="offset points",
            color=label.colour,
            fontsize=size,
            annotation_clip=False,
        )


def _hidden(box: Box, taken: Sequence[Box], frame: Box) -> float:
    """Area of a box that others share; what lies outside the frame counts three times."""
    outside = (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, frame)
    return sum(_overlap(box, other) for other in taken) + 3 * outside


def _overlap(a: Box, b: Box) -> float:
    """Area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _diversity(comparison: Comparison, styles: Mapping[str, Style]) -> dict[str, Any] | None:
    """Measures of diversity by temperature: tables and small plots; None without any."""
    metrics = _of_kind(comparison, "diversity")
    if not metrics:
        return None
    stems: dict[str, list[str]] = {}
    for metric in sorted(metrics, key=temperature):
        stems.setdefault(metric.partition("@T")[0], []).append(metric)
    ordered = [stems[stem] for stem in dict.fromkeys(metric.partition("@T")[0] for metric in metrics)]
    panels: list[Any] = []
    for found in ordered:
        if len(found) < 2:
            continue
        scale = 100 if unit_of(comparison, found[0]) == "%" else 1
        with _figure(3.6, 2.4) as (figure, axes):
            for name, row in comparison.rows.items():
                at = [(temperature(m), scale * e.value) for m in found if (e := value_of(row, m)) is not None]
                if at:
                    axes.plot(
                        *np.array(at).T,
                        color=styles[name].colour,
                        linestyle=_DASHES[styles[name].dash],
                        linewidth=1.6,
                        marker="o",
                        markersize=3,
                    )
            axes.set_title(with_unit(name_of(found[0]), unit_of(comparison, found[0])), loc="left", color=_INK)
            axes.set_xticks([temperature(metric) for metric in found])
            panels.append(_markup(_svg(figure), f"{name_of(found[0])} by temperature", f"diversity-{len(panels)}"))
    return {
        "panels": panels,
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
    metrics = _of_kind(comparison, "calibration")
    if not metrics:
        return None
    panels: list[Any] = []
    for metric in metrics if len(comparison.rows) <= _CROWD else ():
        lines = {name: line for name in comparison.rows if len(line := _reliability(comparison, name, metric)) > 0}
        if not lines:
            continue
        with _figure(4.2, 3.2) as (figure, axes):
            top = max(line[:, 0].max() for line in lines.values())
            axes.plot([50, 100 * top], [50, 100 * top], color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
            for name, line in lines.items():
                confidence, accuracy, share = line.T
                colour = styles[name].colour
                axes.plot(
                    100 * confidence, 100 * accuracy, color=colour, linestyle=_DASHES[styles[name].dash], linewidth=1.4
                )
                axes.scatter(100 * confidence, 100 * accuracy, 6 + 60 * share, color=colour)
            axes.set_title(name_of(metric), loc="left", color=_INK)
            axes.set_xlabel("confidence, %")
            axes.set_ylabel("right, %")
            panels.append(_markup(_svg(figure), f"reliability: {name_of(metric)}", f"calibration-{len(panels)}"))
    return {
        "panels": panels,
        "columns": [_column(comparison, comparison.rows, metric, _with_unit(comparison, metric)) for metric in metrics],
        "described": _described(comparison, metrics),
    }


def _reliability(comparison: Comparison, name: str, metric: str) -> Floats:
    """[bins, 3]: confidence, accuracy and share of the pairs, over all seeds of a pool; bins with few are left out."""
    found = [comparison.values[run].get(metric) for run in _members(comparison, name)]
    sums: dict[float, Floats] = {}
    for one in (one for measured in found if isinstance(measured, Measured) for one in measured.bins if one.count > 0):
        weighted = one.count * np.array([one.confidence, one.accuracy, 1.0])
        sums[one.low] = sums.get(one.low, np.zeros(3)) + weighted
    total = sum(float(weighted[2]) for weighted in sums.values())
    rows = [sums[low] for low in sorted(sums) if sums[low][2] >= _FEW * total]
    return np.array([[*row[:2] / row[2], row[2] / total] for row in rows]).reshape(-1, 3)


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure of that many inches, in placeholder colours, without a frame."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "posttrain",
            "font.size": 10,
            "text.color": _INK,
            "axes.labelcolor": _MUTED,
            "axes.edgecolor": _MUTED,
            "axes.titlesize": 10.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "axes.axisbelow": True,
            "grid.color": _LINE,
            "grid.linewidth": 0.8,
            "xtick.color": _MUTED,
            "ytick.color": _MUTED,
        }
    ):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        yield figure, axes


def _curve(comparison: Comparison, styles: Mapping[str, Style]) -> str:
    with _figure(7, 3.9) as (figure, axes):
        for name, row in comparison.rows.items():
            ks = sorted(row.pass_at_k)
            value, low, high = (100 * np.array([row.pass_at_k[k][end] for k in ks]) for end in range(3))
            style = styles[name]
            if len(comparison.rows) <= _CROWD:
                axes.fill_between(ks, low, high, color=style.colour, alpha=0.18, linewidth=0)
            axes.plot(
                ks,
                value,
                color=style.colour,
                linestyle=_DASHES[style.dash],
                marker=_MARKERS[style.slot],
                markersize=4.5,
                linewidth=2,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.minorticks_off()
        axes.set_xlabel("k, answers")
        axes.set_ylabel("problems solved, %")
        return _svg(figure)


def _bars(comparison: Comparison, styles: Mapping[str, Style]) -> str:
    with _figure(7, 3.2) as (figure, axes):
        count = len(comparison.rows)
        width = 0.8 / count
        places = np.arange(len(comparison.groups))
        for index, name in enumerate(comparison.rows):
            estimates = np.array([group.pass_at_k[name] for group in comparison.groups]) * 100
            value, low, high = estimates.T
            at = places + (index - (count - 1) / 2) * width
            # a percentile interval need not hold its estimate, and a bar's whisker cannot be negative
            reach = np.maximum([value - low, high - value], 0)
            axes.bar(at, value, width * 0.88, color=styles[name].colour)
            axes.errorbar(at, value, yerr=reach, fmt="none", ecolor=_INK, elinewidth=1.2, capsize=3)
        axes.set_xticks(places, [f"{group.name}\n{group.problems:,} problems" for group in comparison.groups])
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel(f"pass@{comparison.k[-1]}, %")
        return _svg(figure)


def _panels(
    histories: Mapping[str, Sequence[Mapping[str, Any]]], comparison: Comparison, styles: Mapping[str, Style]
) -> list[Any]:
    """One small plot per logged metric that some run has at two steps or more; a pool is the mean over its seeds."""
    panels: list[Any] = []
    for key, title in CURVES.items():
        lines = {}
        for name in styles:
            steps, values = _together([_logged(histories.get(run, ()), key) for run in _members(comparison, name)])
            if len(steps) > 1:
                lines[name] = (steps, values)
        if not lines:
            continue
        with _figure(3.6, 2.4) as (figure, axes):
            for name, (steps, values) in lines.items():
                colour, dash = styles[name].colour, _DASHES[styles[name].dash]
                if len(styles) <= _CROWD:
                    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
                axes.plot(steps, _smooth(values), color=colour, linestyle=dash, linewidth=1.8)
            axes.set_title(title, loc="left", color=_INK)
            axes.locator_params(nbins=5)
            panels.append(_markup(_svg(figure), f"{title} by step, one line per run", f"log-{len(panels)}"))
    return panels


def _together(logged: Sequence[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    """The mean over the runs that logged anything, at the steps that all of these logged."""
    by_step = [dict(zip(steps.tolist(), values.tolist(), strict=True)) for steps, values in logged if len(steps)]
    common = sorted(set[float]().union(*by_step).intersection(*by_step))
    return np.array(common), np.array([np.mean([one[step] for one in by_step]) for step in common])


def _logged(history: Sequence[Mapping[str, Any]], key: str) -> tuple[Floats, Floats]:
    """Steps and finite values of one metric."""
    pairs = [
        (entry["step"], entry[key])
        for entry in history
        if isinstance(entry.get(key), int | float) and math.isfinite(entry[key]) and "step" in entry
    ]
    steps, values = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def _smooth(values: Floats) -> Floats:
    """Centred running mean; windows shrink at both ends so that nothing is invented there."""
    half = int(_SMOOTHING * len(values) / 2)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _markup(svg: str, description: str, prefix: str) -> Any:
    """An SVG file as inline markup: theme colours, ids of its own, no namespaces (they are addresses)."""
    import markupsafe

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = svg.replace('href="#', f'href="#{prefix}-').replace("url(#", f"url(#{prefix}-")
    for placeholder, name in ((_INK, "--ink"), (_MUTED, "--muted"), (_LINE, "--line")):
        svg = svg.replace(placeholder, f"var({name})")
    for slot in range(len(COLOURS)):
        svg = svg.replace(f"#fe00{slot:02x}", f"var(--run-{slot})")
    label = markupsafe.escape(description)
    return markupsafe.Markup(svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))  # noqa: S704 - our own SVG
