r"""The reward `math` against TRL's accuracy_reward and plain math-verify: verdicts, attacks, throughput.

    python -m benchmarks.rewards [--rounds 5] [--attack-rounds 3] [--output benchmarks/results/rewards.json]

All contestants judge the same completions on the main thread, where alone TRL's and math-verify's deadlines work, and
take turns in an order that rotates; reported are medians over rounds and quartiles of the per-round ratios. Workers are
as many as CPUs, and begun before the clock. What else the machine does is in `load`, the average number of processes
that want a CPU.

- `verdicts`: the pairs of tests/corpora/math_pairs.jsonl, one by one. They were made for this project, so the reward
  knows them. Counted are false negatives (correct, and no 1.0), false positives, and where a contestant raised or
  skipped (None; of a correct answer, a false negative as well).
- `attacks`: 512 completions, 5 of which (1 %) are attacks, in one call; our deadline is 1 s, theirs their default.
- `throughput`: the other 507.
- `isolation`: seconds per item that going through a worker adds to a verdict that costs nothing.

math-verify is called as its documentation says, with its own deadlines; with `boxed`, the gold answer is in a box.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from math_verify import parse, verify
from rich.console import Console
from rich.table import Table
from trl.rewards import accuracy_reward

from benchmarks.turns import quartiles, rotated, spread, timed
from posttrain import atomic, rewards
from posttrain.launch.provenance import machine
from posttrain.progress import Bar
from posttrain.rewards import _workers
from posttrain.versions import versions
from tests.hostile import Hostile, Options

COMPLETIONS = 512
DEADLINE = 1.0
ATTACKS = (r"(x+y+z+1)^{99}", r"(1+x)^{99999}", r"(a+b+c+d+e+f)^{40}", r"9^{9^9}", r"(10^9)!")
"""Such as every contestant comes back from, and none raises on; two of them our guard knows."""
PAIRS = Path("tests/corpora/math_pairs.jsonl")
ITEMS = 2048

Judge = Callable[[Sequence[str], Sequence[str]], Sequence[float | None]]
"""Completions and gold answers → rewards."""

# ---------------------------------------------------------------- contestants


def ours(verifier: rewards.Verifier, completions: Sequence[str], golds: Sequence[str]) -> list[float | None]:
    """`math`, with workers."""
    return [verdict.reward for verdict in verifier.score(completions, [{"answer": gold} for gold in golds])]


def trl(completions: Sequence[str], golds: Sequence[str]) -> list[float | None]:
    """TRL's reward function, as it is."""
    messages = [[{"role": "assistant", "content": completion}] for completion in completions]
    found: list[float | None] = accuracy_reward(messages, solution=list(golds))
    return found


def math_verify(completions: Sequence[str], golds: Sequence[str], *, boxed: bool) -> list[float | None]:
    """math-verify, one after another."""
    form = r"\boxed{%s}" if boxed else "%s"
    return [float(verify(parse(form % gold), parse(text))) for gold, text in zip(golds, completions, strict=True)]


def contestants(deadline: float) -> dict[str, Judge]:
    """All of them, by name."""
    return {
        "posttrain": partial(ours, rewards.load("math", {"deadline": deadline})),
        "trl": trl,
        "math-verify": partial(math_verify, boxed=False),
        "math-verify, boxed": partial(math_verify, boxed=True),
    }


# ---------------------------------------------------------------- what is judged


def generated(draw: random.Random) -> tuple[str, str]:
    """A gold answer, and an answer that is the same in another form or, as often, another one."""
    a, b, c = draw.randint(2, 40), draw.randint(2, 40), draw.randint(2, 9)
    off = draw.choice([0, 1])
    kind = draw.choices(range(9), weights=[40, 15, 5, 10, 5, 10, 5, 5, 5])[0]
    return [
        (f"{a * b}", f"{a * b + off}"),
        (f"{a}/{b}", rf"\frac{{{c * a + off}}}{{{c * b}}}"),
        (f"{a / 8}", rf"\frac{{{a + off}}}{{8}}"),
        (rf"{a}\sqrt{{{c}}}", rf"\sqrt{{{a * a * c + off}}}"),
        (rf"{a}\pi", rf"{a + off}\pi"),
        (f"x^2+{a + b}x+{a * b}", f"(x+{a})(x+{b + off})"),
        (f"({a},{b})", rf"\left({a}, {b + off}\right)"),
        (rf"[{a},\infty)", rf"[{a + off}, \infty)"),
        (rf"\{{{a},{a + b}\}}", rf"\{{{a + b}, {a + off}\}}"),
    ][kind]


def batch(attacks: Sequence[str]) -> tuple[list[str], list[str]]:
    """Completions and golds; attacks are spread evenly."""
    draw = random.Random(0)
    pairs = [generated(draw) for _ in range(COMPLETIONS - len(ATTACKS))]
    for number, attack in enumerate(attacks):
        pairs.insert((number * COMPLETIONS + COMPLETIONS // 2) // len(attacks), ("5", attack))
    thought = "The rest follows from the first part. "
    return [rf"{thought * 20}So the answer is $\boxed{{{answer}}}$." for _, answer in pairs], [
        gold for gold, _ in pairs
    ]


# ---------------------------------------------------------------- the parts


def verdicts() -> dict[str, Any]:
    """Each contestant's mistakes on the pairs, by how hard they are."""
    pairs = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    found: dict[str, Any] = {}
    judges = contestants(deadline=5.0)
    with Bar("verdicts", len(judges) * len(pairs), "pairs") as bar:
        for name, judge in judges.items():
            counts = {part: {"false_negatives": 0, "false_positives": 0, "none": 0} for part in ("easy", "hard")}
            for pair in pairs:
                of_part = counts["hard" if pair["hard"] else "easy"]
                try:
                    (reward,) = judge([rf"\boxed{{{pair['answer']}}}"], [pair["gold"]])
                except Exception:  # counted as what it is for a run: no reward
                    reward = None
                of_part["none"] += reward is None
                of_part["false_negatives"] += pair["equal"] and reward != 1.0
                of_part["false_positives"] += not pair["equal"] and reward == 1.0
                bar.advance(1)
            found[name] = counts
    sizes = {part: sum(pair["hard"] == (part == "hard") for pair in pairs) for part in ("easy", "hard")}
    return {"pairs": sizes, "contestants": found}


def race(attacks: Sequence[str], rounds: int, title: str) -> dict[str, Any]:
    """All contestants on one batch, in turns."""
    completions, golds = batch(attacks)
    judges = contestants(DEADLINE)
    seconds: dict[str, list[float]] = {name: [] for name in judges}
    correct: dict[str, int] = {}
    with Bar(title, (rounds + 1) * len(judges), "turns") as bar:
        for number in range(rounds + 1):
            for name in rotated(list(judges), number):
                taken, found = timed(partial(judges[name], completions, golds))
                correct[name] = sum(reward == 1.0 for reward in found)
                if number or attacks:  # round 0 warms up, where there is time for it
                    seconds[name].append(taken)
                bar.advance(1)
    return {
        "completions": len(completions),
        "attacks": len(attacks),
        "workers": _workers.size(),
        "contestants": {
            name: {"seconds": statistics.median(values), "per_second": len(completions) / statistics.median(values),
                   "correct": correct[name]}
            for name, values in seconds.items()
        },
        "ratios": {name: quartiles(seconds[name], seconds["posttrain"]) for name in seconds if name != "posttrain"},
    }  # fmt: skip


def isolation(rounds: int) -> dict[str, float]:
    """Seconds per item, through workers and at once."""
    verifier = Hostile(Options())
    words = ["a"] * ITEMS, [{}] * ITEMS
    through, at_once = [], []
    for _ in range(rounds + 1):
        through.append(timed(partial(verifier.score, *words))[0] / ITEMS)
        at_once.append(timed(lambda: [verifier.attempt(word, {}) for word in words[0]])[0] / ITEMS)
    return {
        "worker_seconds": statistics.median(through[1:]),
        "direct_seconds": statistics.median(at_once[1:]),
        "added_seconds": statistics.median(a - b for a, b in zip(through[1:], at_once[1:], strict=True)),
    }


# ---------------------------------------------------------------- the whole


def main() -> None:
    """Run the benchmark, print tables, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns without attacks (default 5)")
    parser.add_argument("--attack-rounds", type=int, default=3, help="turns with attacks (default 3)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/rewards.json"))
    options = parser.parse_args()
    for module in ("parser", "grader"):
        logging.getLogger(f"math_verify.{module}").setLevel(logging.ERROR)
    rewards.load("math").score([r"\boxed{x+1}"], [{"answer": "5"}])
    before = os.getloadavg()[0]
    result = {
        "benchmark": "rewards",
        "rounds": {"throughput": options.rounds, "attacks": options.attack_rounds},
        "machine": machine(1),
        "versions": versions(),
        "verdicts": verdicts(),
        "throughput": race((), options.rounds, "throughput"),
        "attacks": race(ATTACKS, options.attack_rounds - 1, "attacks"),
        "isolation": isolation(options.rounds),
        "load": {"before": before, "after": os.getloadavg()[0]},
    }
    atomic.write_json(options.output, result)
    _show(result)
    print(f"written to {options.output}")


def _show(result: dict[str, Any]) -> None:
    console = Console()
    sizes = result["verdicts"]["pairs"]
    kinds = ("FN", "FP", "None")
    columns = (f"{part} ({size}): {kind}" for part, size in sizes.items() for kind in kinds)
    mistakes = Table("contestant", *columns, title="mistakes")
    for name, parts in result["verdicts"]["contestants"].items():
        mistakes.add_row(name, *(str(count) for part in parts.values() for count in part.values()))
    console.print(mistakes)
    for title in ("throughput", "attacks"):
        part = result[title]
        table = Table("contestant", "s", "per s", "correct", "time / posttrain", "quartiles",
                      title=f"{title}: {part['completions']} completions, {part['attacks']} attacks")  # fmt: skip
        for name, numbers in part["contestants"].items():
            ratio = spread(part["ratios"][name]) if name in part["ratios"] else ("1", "")
            cells = f"{numbers['seconds']:.2f}", f"{numbers['per_second']:.0f}", str(numbers["correct"])
            table.add_row(name, *cells, *ratio)
        console.print(table)
    print(f"isolation: {1e3 * result['isolation']['added_seconds']:.3f} ms per item")


if __name__ == "__main__":
    main()
