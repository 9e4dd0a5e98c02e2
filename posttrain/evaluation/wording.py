"""Names and numbers as people read them: settings and metrics in words, estimates in their unit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from posttrain.evaluation.metrics import Estimate

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


def stem(metric: str) -> str:
    """A metric without its temperature: `self_bleu` of `self_bleu@T0.6`."""
    return metric.partition("@T")[0]


def temperature(metric: str) -> float:
    """The temperature of a measure of diversity, as in `self_bleu@T0.6`."""
    return float(metric.partition("@T")[2])


def name_of(metric: str) -> str:
    """A metric as people call it, without its temperature."""
    return _NAMES.get(stem(metric), stem(metric).replace("_", " "))


def with_unit(name: str, unit: str) -> str:
    """`entropy, nats per token`; a unit that is in the name is not said again."""
    return name if unit in name else f"{name}, {unit}"


def numbers(estimate: Estimate, unit: str) -> list[str]:
    """Value and interval as they are printed: percent and tokens with one decimal (all is 100 %, not 100.0), counted
    answers with two, all others with three significant digits of the largest."""
    scale = 100 if unit == "%" else 1
    if unit in ("%", "tokens", "answers"):
        digits = 2 if unit == "answers" else 1
    else:
        largest = max(abs(end) for end in estimate)
        digits = min(5, max(0, 2 - math.floor(math.log10(largest)))) if largest > 0 else 0
    printed = [f"{scale * end:,.{digits}f}".replace("-", "−") for end in estimate]
    # as long as 99.9, so that three runs with their intervals fit in 80 characters
    return ["100" if unit == "%" and end == 1 else text for end, text in zip(estimate, printed, strict=True)]


def with_interval(estimate: Estimate, unit: str) -> tuple[str, str]:
    """An estimate and its interval: `34.1` and `[30.0, 40.0]`."""
    value, low, high = numbers(estimate, unit)
    return value, f"[{low}, {high}]"


def signed(difference: Estimate, unit: str) -> tuple[str, str]:
    """A difference, with its sign, and its interval: `+6.1` and `[4.0, 8.2]`; of shares in points."""
    value, interval = with_interval(difference, unit)
    if unit == "%" and value in ("0.0", "−0.0"):
        return "0.0", interval
    return f"{'+' if difference.value > 0 else ''}{value}", interval


def points(difference: Estimate) -> str:
    """A difference of shares: `+6.1 points [4.0, 8.2]`."""
    value, interval = signed(difference, "%")
    return f"{value} points {interval}"
