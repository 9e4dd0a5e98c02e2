"""The drawings of a report: inline SVG whose colours follow the theme of the page."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from posttrain.evaluation.compare import Comparison, Numbers, unit_of, value_of
from posttrain.evaluation.measures import Measured
from posttrain.evaluation.metrics import Estimate, Floats
from posttrain.evaluation.sweep import distinct, leading, shared_settings, swept
from posttrain.evaluation.template import COLOURS
from posttrain.evaluation.wording import in_words, name_of, temperature, with_unit

if TYPE_CHECKING:
    from markupsafe import Markup
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
"""Logged metrics that are drawn where a run has them, in this order; those that a trainer names follow."""

CROWD = 8
"""Runs up to which curves have bands, and bars are drawn."""
FEW = 0.01
"""Bins with a smaller share of the pairs are no points of a reliability plot."""
SMOOTHING = 0.05
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

_DASHED: Any = (0, (4, 3))
"""Lines that are no run's."""
_LOGARITHMIC = 30
"""Divergences that span more than this factor are drawn on a logarithmic axis."""


class Style(NamedTuple):
    """How a run or pool is drawn: an index of `COLOURS` (grey is the base's alone), and one of `_DASHES`."""

    slot: int
    dash: int = 0

    @property
    def colour(self) -> str:
        """The placeholder that becomes a colour of the page."""
        return f"#fe00{self.slot:02x}"


def styles_of(comparison: Comparison) -> dict[str, Style]:
    """Colours and dashes by run or pool. In a sweep the colour says the leading setting and the dashes the others."""
    by, colours = leading(comparison), len(COLOURS) - 1
    rest = [key for key in shared_settings(comparison) if key != by]
    pools = swept(comparison)
    tails = {name: {key: pool.settings[key] for key in rest} for name, pool in pools.items()}
    heads = {
        name: {key: value for key, value in pool.settings.items() if key not in rest} for name, pool in pools.items()
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


def curve(comparison: Comparison, styles: Mapping[str, Style]) -> Markup:
    """pass@k by k."""
    with _figure(7, 3.9) as (figure, axes):
        for name, row in comparison.rows.items():
            ks = sorted(row.pass_at_k)
            value, low, high = (100 * np.array([row.pass_at_k[k][end] for k in ks]) for end in range(3))
            style = styles[name]
            if len(comparison.rows) <= CROWD:
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
        return _inline(figure, "pass@k by k, one line per run", "curve")


def bars(comparison: Comparison, styles: Mapping[str, Style]) -> Markup:
    """pass@(largest k) of problems with few and with many solutions."""
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
        return _inline(figure, "pass@k by number of solutions", "bars")


def training(
    comparison: Comparison,
    styles: Mapping[str, Style],
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    curves: Mapping[str, str],
) -> list[Markup]:
    """One small plot per logged metric that some run has at two steps or more; a pool is the mean of its seeds, and
    their range. `curves` are titles of metrics beside `CURVES`."""
    panels: list[Markup] = []
    for key, title in {**CURVES, **curves}.items():
        logged = {
            name: _together([_logged(histories.get(run, ()), key) for run in comparison.members(name)])
            for name in styles
        }
        lines = {name: (steps, values) for name, (steps, values) in logged.items() if len(steps) > 1}
        if not lines:
            continue
        with _figure(3.6, 2.4) as (figure, axes):
            for name, (steps, values) in lines.items():
                _logged_line(axes, steps, values, styles[name], banded=len(styles) <= CROWD)
            axes.set_title(title, loc="left", color=_INK)
            axes.locator_params(nbins=5)
            panels.append(_inline(figure, f"{title} by step, one line per run", f"log-{len(panels)}"))
    return panels


def _logged_line(axes: Axes, steps: Floats, values: Floats, style: Style, *, banded: bool) -> None:
    """One curve of [seeds, steps]: the smoothed mean, over the range of the seeds, or over what a single one logged."""
    smooth = np.array([_smooth(seed) for seed in values])
    if banded and len(values) > 1:
        low, high = smooth.min(axis=0), smooth.max(axis=0)
        axes.fill_between(steps, low, high, color=style.colour, alpha=0.18, linewidth=0)
    elif banded:
        axes.plot(steps, values[0], color=style.colour, linewidth=0.8, alpha=0.35)
    axes.plot(steps, smooth.mean(axis=0), color=style.colour, linestyle=_DASHES[style.dash], linewidth=1.8)


def _together(logged: Sequence[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    """[steps] and [seeds, steps]: the runs that logged anything, at the steps that all of these logged."""
    by_step = [dict(zip(steps.tolist(), values.tolist(), strict=True)) for steps, values in logged if len(steps)]
    common = sorted(set[float]().union(*by_step).intersection(*by_step))
    return np.array(common), np.array([[one[step] for step in common] for one in by_step])


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
    half = int(SMOOTHING * len(values) / 2)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def point(row: Numbers, x: str, y: str) -> tuple[float, Estimate] | None:
    """A divergence, and what was achieved at it; None where either was not measured."""
    across, up = value_of(row, x), value_of(row, y)
    return None if across is None or up is None else (across.value, up)


def frontier(
    comparison: Comparison, styles: Mapping[str, Style], x: str, y: str, along: str | None, prefix: str
) -> Markup:
    """A metric y (a share) by a divergence x, in curves that follow the setting `along`, against the base's y."""
    points = {name: at for name, row in comparison.rows.items() if (at := point(row, x, y)) is not None}
    seeds = {name: at for name, row in comparison.runs.items() if (at := point(row, x, y)) is not None}
    base = points.pop(comparison.base, None)
    with _figure(*_size(points)) as (figure, axes):
        if base is not None:
            level, grey = 100 * base[1].value, styles[comparison.base].colour
            axes.axhline(level, color=grey, linewidth=1.2, linestyle=_DASHED)
        labels, paths = _points(axes, comparison, styles, points, seeds, along)
        positive = [left for left, _ in points.values() if left > 0]
        if len(positive) == len(points) and max(positive) > _LOGARITHMIC * min(positive):
            axes.set_xscale("log")
        axes.margins(x=0.16, y=0.12)
        if axes.get_xscale() == "linear":
            axes.set_xlim(left=0)
        axes.set_title(f"{name_of(y)}, %", loc="left", color=_INK)
        axes.set_xlabel(with_unit(name_of(x), unit_of(comparison, x)))
        if base is not None:
            left, right = axes.get_xlim()
            labels.append(_Label(comparison.base, (left, level), grey))
            paths.append(np.array([[left, level], [right, level]]))
        _place(figure, axes, labels, paths)
        return _inline(figure, f"{name_of(y)} by {name_of(x)}", prefix)


def elsewhere(
    comparison: Comparison,
    name: str,
    styles: Mapping[str, Style],
    metrics: tuple[str, str],
    along: str | None,
    prefix: str,
) -> Markup:
    """A share on a further task by one on the main task, in curves that follow the setting `along`; the base is where
    the dashed lines cross.

    Args:
        name: of the further task.
        metrics: of the main and of the further task.
    """
    further = comparison.further[name]

    def at(here: Mapping[str, Numbers], there: Mapping[str, Numbers]) -> dict[str, tuple[float, Estimate]]:
        found = {name: (value_of(here[name], metrics[0]), value_of(there[name], metrics[1])) for name in here}
        return {
            name: (100 * across.value, up)
            for name, (across, up) in found.items()
            if across is not None and up is not None
        }

    points, seeds = at(comparison.rows, further.rows), at(comparison.runs, further.runs)
    base = points.pop(comparison.base)
    with _figure(*_size(points)) as (figure, axes):
        grey, spot = styles[comparison.base].colour, (base[0], 100 * base[1].value)
        axes.axhline(spot[1], color=grey, linewidth=1.2, linestyle=_DASHED)
        axes.axvline(spot[0], color=grey, linewidth=1.2, linestyle=_DASHED)
        labels, paths = _points(axes, comparison, styles, points, seeds, along)
        axes.plot(*spot, "o", color=grey, markersize=5)
        axes.margins(x=0.16, y=0.12)
        axes.set_title(f"{metrics[1]} on {name}, %", loc="left", color=_INK)
        axes.set_xlabel(f"{metrics[0]} on {comparison.task}, %")
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        paths += [np.array([[left, spot[1]], [right, spot[1]]]), np.array([[spot[0], low], [spot[0], high]])]
        _place(figure, axes, [*labels, _Label(comparison.base, spot, grey)], paths)
        return _inline(figure, f"{metrics[1]} on {name} by {metrics[0]} on {comparison.task}", prefix)


def _size(points: Mapping[str, Any]) -> tuple[float, float]:
    """Inches of a drawing with that many points."""
    return (8.0, 4.4) if len(points) > CROWD else (4.6, 3.9)


def _points(
    axes: Axes,
    comparison: Comparison,
    styles: Mapping[str, Style],
    points: Mapping[str, tuple[float, Estimate]],
    seeds: Mapping[str, tuple[float, Estimate]],
    along: str | None,
) -> tuple[list[_Label], list[Floats]]:
    """Draw points, the curves through them and the seeds of pools around them; their labels, and the paths.

    Args:
        points: left and height (a share) by run or pool.
        seeds: the same by run.
    """
    labels: list[_Label] = []
    paths: list[Floats] = []
    drawn: Counter[int] = Counter()
    for line in _lines(comparison, list(points), along):
        across = np.array([points[name][0] for name in line])
        value, low, high = 100 * np.array([points[name][1] for name in line]).T
        slots = {styles[name].slot for name in line}
        colour = styles[line[0]].colour if len(slots) == 1 else _MUTED
        dash = _DASHES[drawn[min(slots)] % len(_DASHES)]
        drawn.update(slots)
        if len(points) <= CROWD:
            axes.vlines(across, low, high, color=colour, linewidth=1, alpha=0.35)
        axes.plot(across, value, color=colour, linewidth=1.6, linestyle=dash)
        paths.append(np.column_stack([across, value]))
        last = line[int(np.argmax(across))]
        for name, left, up in zip(line, across, value, strict=True):
            own = styles[name].colour
            axes.plot(left, up, "o", color=own, markersize=5)
            runs = [seeds[run] for run in comparison.members(name) if run in seeds]
            around = np.array([(at, 100 * estimate.value) for at, estimate in runs])
            if len(around) > 1:
                axes.plot(*around.T, "o", color=own, markersize=2.4, alpha=0.45)
            labels.append(_Label(_point_name(comparison, name, along, in_full=name == last), (left, up), own))
    return labels, paths


def _lines(comparison: Comparison, names: Sequence[str], along: str | None) -> list[list[str]]:
    """Names that a curve of the frontier connects: all settings but one are equal, and that one increases."""
    lines: list[tuple[dict[str, Any], list[str]]] = []
    for name in names:
        settings = comparison.settings(name)
        fixed = {key: value for key, value in settings.items() if key != along} if along in settings else {"": name}
        line = next((line for same, line in lines if same == fixed), None)
        if line is None:
            lines.append((fixed, [name]))
        else:
            line.append(name)
    return [sorted(line, key=lambda name: comparison.settings(name).get(str(along), 0.0)) for _, line in lines]


def _point_name(comparison: Comparison, name: str, along: str | None, *, in_full: bool) -> str:
    """What stands beside a point: the setting that its curve follows, and for one point of a curve the others too."""
    settings = comparison.settings(name)
    if along is None or along not in settings:
        return name
    others = {key: value for key, value in settings.items() if key != along and value is not False}
    value = f"{settings[along]:g}"
    return f"{in_words(others)} {value}".strip() if in_full else value


Box = tuple[float, float, float, float]
"""Left, low, right and high edge, in pixels."""


class _Label(NamedTuple):
    text: str
    at: tuple[float, float]
    colour: str


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


def by_temperature(comparison: Comparison, styles: Mapping[str, Style], metrics: Sequence[str], prefix: str) -> Markup:
    """One measure of diversity at several temperatures."""
    name, unit = name_of(metrics[0]), unit_of(comparison, metrics[0])
    scale = 100 if unit == "%" else 1
    with _figure(3.6, 2.4) as (figure, axes):
        for label, row in comparison.rows.items():
            at = [(temperature(m), scale * e.value) for m in metrics if (e := value_of(row, m)) is not None]
            if at:
                axes.plot(
                    *np.array(at).T,
                    color=styles[label].colour,
                    linestyle=_DASHES[styles[label].dash],
                    linewidth=1.6,
                    marker="o",
                    markersize=3,
                )
        axes.set_title(with_unit(name, unit), loc="left", color=_INK)
        axes.set_xticks([temperature(metric) for metric in metrics])
        return _inline(figure, f"{name} by temperature", prefix)


def reliability(comparison: Comparison, styles: Mapping[str, Style], metrics: Sequence[str]) -> list[Markup]:
    """Accuracy by confidence, a small plot for each calibration error."""
    panels: list[Markup] = []
    for metric in metrics:
        lines = {name: line for name in comparison.rows if len(line := _bins(comparison, name, metric)) > 0}
        if not lines:
            continue
        with _figure(4.2, 3.2) as (figure, axes):
            top = max(line[:, 0].max() for line in lines.values())
            axes.plot([50, 100 * top], [50, 100 * top], color=_MUTED, linewidth=1, linestyle=_DASHED)
            for name, line in lines.items():
                confidence, accuracy, share = line.T
                colour, dash = styles[name].colour, _DASHES[styles[name].dash]
                axes.plot(100 * confidence, 100 * accuracy, color=colour, linestyle=dash, linewidth=1.4)
                axes.scatter(100 * confidence, 100 * accuracy, 6 + 60 * share, color=colour)
            axes.set_title(name_of(metric), loc="left", color=_INK)
            axes.set_xlabel("confidence, %")
            axes.set_ylabel("right, %")
            panels.append(_inline(figure, f"reliability: {name_of(metric)}", f"calibration-{len(panels)}"))
    return panels


def _bins(comparison: Comparison, name: str, metric: str) -> Floats:
    """[bins, 3]: confidence, accuracy and share of the pairs, over all seeds of a pool; bins with few are left out."""
    found = [comparison.values[run].get(metric) for run in comparison.members(name)]
    sums: dict[float, Floats] = {}
    for one in (one for measured in found if isinstance(measured, Measured) for one in measured.bins if one.count > 0):
        weighted = one.count * np.array([one.confidence, one.accuracy, 1.0])
        sums[one.low] = sums.get(one.low, np.zeros(3)) + weighted
    total = sum(float(weighted[2]) for weighted in sums.values())
    rows = [sums[low] for low in sorted(sums) if sums[low][2] >= FEW * total]
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


def _inline(figure: Figure, description: str, prefix: str) -> Markup:
    """A figure as inline markup: theme colours, ids of its own, no namespaces (they are addresses)."""
    import markupsafe

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
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
        svg = svg.replace(Style(slot).colour, f"var(--run-{slot})")
    label = markupsafe.escape(description)
    return markupsafe.Markup(svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))  # noqa: S704 - our own SVG
