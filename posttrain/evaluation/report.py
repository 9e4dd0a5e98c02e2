"""One HTML file that shows a comparison: no script, no network, readable in light and dark."""

from __future__ import annotations

import io
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
from posttrain.evaluation.compare import Comparison, caption, points, signed, verdict
from posttrain.evaluation.metrics import Estimate, Floats, pass_at_k
from posttrain.evaluation.template import COLOURS, TEMPLATE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = {
    "reward": "mean reward",
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


class Shown(NamedTuple):
    """A number as it is printed."""

    value: str
    interval: str = ""


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

    labels = list(comparison.runs)
    slots = {label: _slot(index) for index, label in enumerate(labels)}
    lost_summary, examples = _losses(comparison)
    largest = comparison.k[-1]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE).render(
        title=title,
        subtitle=f"Task {comparison.task} · {comparison.problems:,} problems · {comparison.n:,} answers each · "
        f"temperature {comparison.sampling['temperature']:g} · top-p {comparison.sampling['top_p']:g}",
        sentences=verdict(comparison),
        labels=labels,
        slots=slots,
        base=comparison.base,
        largest=largest,
        level=f"{100 * comparison.confidence:g} %",
        resamples=f"{comparison.resamples:,}",
        draws=f"{comparison.draws:,}",
        max_tokens=f"{comparison.sampling['max_tokens']:,}",
        caption=caption(comparison),
        sections=_sections(comparison),
        curve=_markup(_curve(comparison), "pass@k by k, one line per run", "curve", slots),
        differences=[
            {
                "run": difference.run,
                "against": difference.against,
                "metric": f"pass@{difference.k}",
                "shown": _points(difference.estimate),
                "significant": difference.estimate.excludes_zero,
            }
            for difference in comparison.differences
        ],
        groups=_groups(comparison),
        bars=_markup(_bars(comparison), "pass@k by number of solutions", "bars", slots) if comparison.groups else "",
        logged=[label for label in labels if histories.get(label)],
        panels=_panels(histories, labels, slots),
        smoothing=f"{100 * _SMOOTHING:g} %",
        lost_summary=lost_summary,
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


def _slot(index: int) -> int:
    """The colour of a run: grey is the base's alone."""
    return index if index == 0 else 1 + (index - 1) % (len(COLOURS) - 1)


def _percent(estimate: Estimate | None) -> Shown:
    return _shown(estimate, 100, 1)


def _shown(estimate: Estimate | None, scale: float, digits: int) -> Shown:
    if estimate is None:
        return Shown("–")
    value, low, high = (f"{scale * number:,.{digits}f}" for number in estimate)
    return Shown(value, f"[{low}, {high}]")


def _points(estimate: Estimate) -> Shown:
    text = points(estimate)
    return Shown(signed(estimate.value), text[text.index("[") :])


def _sections(comparison: Comparison) -> list[tuple[str, list[tuple[str, list[Shown]]]]]:
    """Rows of the table of metrics, a cell per run."""
    runs = list(comparison.runs.values())
    largest = comparison.k[-1]
    return [
        (
            "Solved, % of problems",
            [(f"pass@{k}", [_percent(run.pass_at_k[k]) for run in runs]) for k in comparison.k],
        ),
        (
            "Diversity and forgetting",
            [
                (
                    f"distinct correct among {comparison.draws:,}",
                    [_shown(run.distinct_correct, 1, 2) for run in runs],
                ),
                (f"retention@{largest}, %", [_percent(run.retention[largest]) for run in runs]),
                (f"gain@{largest}, %", [_percent(run.gain[largest]) for run in runs]),
            ],
        ),
        (
            "Answers",
            [
                ("length, tokens", [_shown(run.tokens, 1, 1) for run in runs]),
                ("length of correct answers, tokens", [_shown(run.tokens_correct, 1, 1) for run in runs]),
                ("length of wrong answers, tokens", [_shown(run.tokens_wrong, 1, 1) for run in runs]),
                ("truncated, %", [_percent(run.truncated) for run in runs]),
                ("answers without a verdict", [Shown(f"{run.without_verdict:,}") for run in runs]),
            ],
        ),
    ]


def _groups(comparison: Comparison) -> list[tuple[str, list[dict[str, Any]]]]:
    """Rows of the table by number of solutions: per group, a row per run."""
    groups = []
    for group in comparison.groups:
        differences = {difference.run: _points(difference.estimate) for difference in group.differences}
        rows = [
            {"run": label, "shown": _percent(estimate), "difference": differences.get(label, Shown("–"))}
            for label, estimate in group.pass_at_k.items()
        ]
        groups.append((f"{group.name} ({group.problems:,})", rows))
    return groups


def _losses(comparison: Comparison) -> tuple[str, list[dict[str, Any]]]:
    """How many problems each run lost (pass@max k fell below ½ from above it), and the worst with their answers."""
    largest = comparison.k[-1]
    results = comparison.results
    enough = np.min([result.n for result in results.values()], axis=0) >= largest
    places = np.flatnonzero(enough)
    solved: dict[str, Floats] = {
        label: pass_at_k(result.n[enough], result.c[enough], largest) for label, result in results.items()
    }
    before = solved[comparison.base]
    known = before >= 0.5
    counts, worst = [], np.zeros(len(places))
    for label, now in solved.items():
        if label != comparison.base:
            lost = known & (now < 0.5)
            counts.append(f"{label} lost {int(lost.sum()):,}")
            worst = np.maximum(worst, np.where(lost, before - now, 0.0))
    summary = (
        f"Of {int(known.sum()):,} problems that {comparison.base} solves with a pass@{largest} of at least ½, "
        f"{', '.join(counts)} (their pass@{largest} is below ½)."
    )
    order = [int(place) for place in np.argsort(-worst, kind="stable")[:_EXAMPLES] if worst[place] > 0]
    return summary, [_example(comparison, int(places[place])) for place in order]


def _example(comparison: Comparison, problem: int) -> dict[str, Any]:
    runs = []
    for result in comparison.results.values():
        flags = result.correct[problem]
        counts = Counter(
            ("no answer" if answer is None else _shortened(answer), flag)
            for answer, flag in zip(result.answers[problem], flags, strict=True)
        )
        top = [(text, count, right) for (text, right), count in counts.most_common(3)]
        runs.append({"correct": sum(flags), "total": len(flags), "top": top})
    prompt = next(iter(comparison.results.values())).prompts[problem]
    return {"prompt": _shortened(prompt, 300), "runs": runs}


def _shortened(text: str, most: int = 80) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


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


def _run_colour(index: int) -> str:
    return f"#fe00{_slot(index):02x}"


def _curve(comparison: Comparison) -> str:
    with _figure(7, 3.9) as (figure, axes):
        for index, run in enumerate(comparison.runs.values()):
            ks = sorted(run.pass_at_k)
            value, low, high = (100 * np.array([run.pass_at_k[k][end] for k in ks]) for end in range(3))
            colour = _run_colour(index)
            axes.fill_between(ks, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(ks, value, color=colour, marker=_MARKERS[_slot(index)], markersize=4.5, linewidth=2)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.minorticks_off()
        axes.set_xlabel("k, answers")
        axes.set_ylabel("problems solved, %")
        return _svg(figure)


def _bars(comparison: Comparison) -> str:
    with _figure(7, 3.2) as (figure, axes):
        count = len(comparison.runs)
        width = 0.8 / count
        places = np.arange(len(comparison.groups))
        for index, label in enumerate(comparison.runs):
            estimates = np.array([group.pass_at_k[label] for group in comparison.groups]) * 100
            value, low, high = estimates.T
            at = places + (index - (count - 1) / 2) * width
            # a percentile interval need not hold its estimate, and a bar's whisker cannot be negative
            reach = np.maximum([value - low, high - value], 0)
            axes.bar(at, value, width * 0.88, color=_run_colour(index))
            axes.errorbar(at, value, yerr=reach, fmt="none", ecolor=_INK, elinewidth=1.2, capsize=3)
        axes.set_xticks(places, [f"{group.name}\n{group.problems:,} problems" for group in comparison.groups])
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel(f"pass@{comparison.k[-1]}, %")
        return _svg(figure)


def _panels(
    histories: Mapping[str, Sequence[Mapping[str, Any]]], labels: Sequence[str], slots: Mapping[str, int]
) -> list[Any]:
    """One small plot per logged metric that some run has at two steps or more."""
    panels: list[Any] = []
    for key, name in CURVES.items():
        lines = [
            (index, steps, values)
            for index, label in enumerate(labels)
            for steps, values in [_logged(histories.get(label, ()), key)]
            if len(steps) > 1
        ]
        if not lines:
            continue
        with _figure(3.6, 2.4) as (figure, axes):
            for index, steps, values in lines:
                axes.plot(steps, values, color=_run_colour(index), linewidth=0.8, alpha=0.35)
                axes.plot(steps, _smooth(values), color=_run_colour(index), linewidth=1.8)
            axes.set_title(name, loc="left", color=_INK)
            axes.locator_params(nbins=5)
            panels.append(_markup(_svg(figure), f"{name} by step, one line per run", f"log-{len(panels)}", slots))
    return panels


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


def _markup(svg: str, description: str, prefix: str, slots: Mapping[str, int]) -> Any:
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
    for slot in set(slots.values()):
        svg = svg.replace(f"#fe00{slot:02x}", f"var(--run-{slot})")
    label = markupsafe.escape(description)
    return markupsafe.Markup(svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))  # noqa: S704 - our own SVG
