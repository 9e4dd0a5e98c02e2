"""Time of one training step with a teacher: KDRL and RLAD against GRPO on the same rollouts.

    python -m benchmarks.teacher [--rounds 15] [--output benchmarks/results/teacher.json]

The teacher is a model of the student's size, or one of four times as many parameters. All trainers live in one process
and take turns, in an order that rotates; every turn of a round starts from the same weights and the same random state,
so it generates the same answers, which is asserted. Rewards cost nothing, or keep the step waiting as a verifier on
other cores would; meanwhile the teacher scores, or, for comparison, it has scored before. Reported are medians over
rounds, the median of the per-round ratios with its quartiles, for the time of a step and for what it computes on all
cores, and what is no matter of load at all: forward passes of policy and teacher per step, and bytes of parameters.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time, sleep
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table

from benchmarks.step import Stopwatch, length_reward, wait_for_device
from benchmarks.turns import quartiles, rotated, spread
from posttrain import atomic, tasks
from posttrain.launch.pipeline import quiet_libraries
from posttrain.launch.provenance import machine
from posttrain.launch.warm_start import character_tokenizer, small_model
from posttrain.progress import Bar
from posttrain.recipe import WarmStart
from posttrain.rollouts.teacher import ModelTeacher
from posttrain.seams.on_policy import GRPOConfig
from posttrain.trainers.grpo import GRPOTrainer
from posttrain.trainers.kdrl import KDRLConfig, KDRLTrainer
from posttrain.trainers.rlad import RLADConfig, RLADTrainer
from posttrain.versions import versions

STUDENT = WarmStart(hidden_size=256, intermediate_size=688, layers=4, heads=4)

SIZES = {
    "1x": STUDENT.model_copy(update={"seed": 1}),
    "4x": WarmStart(hidden_size=512, intermediate_size=1376, layers=4, heads=8, seed=1),
}
"""Of the teachers, by their parameters."""

WAITS = (0.0, 0.2)
"""Seconds that the rewards of a step take, on nobody's core."""

ANSWERS = 32


class Waiting:
    """The rewards of `length_reward`, after a while."""

    __name__ = "waiting"

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, completions: list[Any], **_: Any) -> list[float]:
        sleep(self.seconds)
        return length_reward(completions)


class TaughtStopwatch(Stopwatch):
    """Counts the forward passes of the teacher, too, and knows the answers of the last turn."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self.teacher_forwards = 0
        if getattr(trainer, "teacher", None) is not None:
            trainer.teacher.model.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.teacher_forwards += 1

    def turn(self, seed: int) -> dict[str, float]:
        """Seconds of a whole step, by the clock and of all cores together, and the forward passes in it."""
        trainer = self.trainer
        trainer.model.train()
        trainer.model.zero_grad()
        torch.manual_seed(seed)
        self.forwards = self.teacher_forwards = 0
        start, computed = perf_counter(), process_time()
        trainer.training_step(trainer.model_wrapped, self.rows, None)
        wait_for_device()
        step, cpu = perf_counter() - start, process_time() - computed
        for values in trainer._metrics.values():
            values.clear()
        counted = {"policy_forwards": self.forwards, "teacher_forwards": self.teacher_forwards}
        return {"step": step, "cpu": cpu, **counted}

    @property
    def answers(self) -> torch.Tensor:
        """Token ids of the last turn's answers."""
        ids: torch.Tensor = self.trainer._buffered_inputs[0]["completion_ids"]
        return ids

    def parameter_bytes(self) -> int:
        """Bytes of the policy's and the teacher's parameters."""
        teacher = getattr(self.trainer, "teacher", None)
        models = [self.trainer.model, *([teacher.model] if teacher is not None else [])]
        return sum(p.numel() * p.element_size() for model in models for p in model.parameters())


def build(folder: Path, reward: Waiting) -> dict[str, Any]:
    """The trainers: GRPO, KDRL and RLAD with either teacher, and KDRL whose teacher scores before the rewards."""
    task = tasks.load("countdown", {})
    tokenizer = character_tokenizer(task.alphabet or "", task.chat_template or "")
    for name, size in {"student": STUDENT, **SIZES}.items():
        small_model(size, tokenizer, "float32").save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = Dataset.from_list(task.rows("train")[:64])

    def trainer(kind: Callable[..., Any], config: Callable[..., Any], name: str, **options: Any) -> Any:
        args = config(
            output_dir=str(folder / f"run {name}"),
            per_device_train_batch_size=ANSWERS,
            num_generations=8,
            max_completion_length=32,
            learning_rate=1e-6,
            max_steps=1,
            report_to=[],
            save_strategy="no",
            logging_steps=1000,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        made = kind(model=str(folder / "student"), reward_funcs=reward, args=args, train_dataset=rows, **options)
        made.train()  # one step: prepares model and optimiser, and warms up
        return made

    made = {"grpo": trainer(GRPOTrainer, GRPOConfig, "grpo")}
    for size in SIZES:
        for name, kind, config, beside in (
            (f"kdrl {size}", KDRLTrainer, KDRLConfig, True),
            (f"rlad {size}", RLADTrainer, RLADConfig, True),
            (f"kdrl {size} in turn", KDRLTrainer, KDRLConfig, False),
        ):
            teacher = ModelTeacher.load(str(folder / size), batch_size=ANSWERS)
            teacher.concurrent = beside
            made[name] = trainer(kind, config, name, teacher=teacher)
    weights = made["grpo"].model.state_dict()
    for other in made.values():
        other.model.load_state_dict(weights)
    return made


def main() -> None:
    """Run the benchmark, print a table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="turns of every trainer (default 15)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/teacher.json"))
    options = parser.parse_args()
    quiet_libraries()
    reward = Waiting()
    with tempfile.TemporaryDirectory() as folder:
        watches = {name: TaughtStopwatch(trainer) for name, trainer in build(Path(folder), reward).items()}
    contests = [(name, wait) for wait in WAITS for name in watches]
    turns: dict[tuple[str, float], list[dict[str, float]]] = {contest: [] for contest in contests}
    with Bar("teacher", options.rounds, "rounds") as bar:
        for number in range(options.rounds + 1):
            answers: list[torch.Tensor] = []
            for name, reward.seconds in rotated(contests, number):
                measured = watches[name].turn(number)
                answers.append(watches[name].answers)
                if number:  # round 0 warms up
                    turns[name, reward.seconds].append(measured)
            if any(not torch.equal(each, answers[0]) for each in answers):
                raise AssertionError("the trainers did not generate the same answers")
            bar.to(number)
    result = {
        "benchmark": "teacher",
        "rounds": options.rounds,
        "model": f"qwen2, 4 layers, d 256, {ANSWERS} sequences of at most 32 tokens, float32; teacher d 256 or d 512",
        "threads": torch.get_num_threads(),
        "machine": machine(1),
        "versions": versions(),
        "trainers": {
            name: {
                **{
                    f"{what}_seconds": {_named(wait): _median(turns[name, wait], what) for wait in WAITS}
                    for what in ("step", "cpu")
                },
                **{
                    f"{what}_per_step": _same(turn[what] for wait in WAITS for turn in turns[name, wait])
                    for what in ("policy_forwards", "teacher_forwards")
                },
                "parameter_bytes": watch.parameter_bytes(),
            }
            for name, watch in watches.items()
        },
        "ratios": {
            f"{one} / {other}": {
                what: {_named(wait): _ratio(turns[one, wait], turns[other, wait], what) for wait in WAITS}
                for what in ("step", "cpu")
            }
            for one, other in _pairs(list(watches))
        },
    }
    atomic.write_json(options.output, result)
    _show(result)
    print(f"written to {options.output}")


def _pairs(names: list[str]) -> list[tuple[str, str]]:
    """Everything against GRPO, and a teacher beside the rewards against one before them."""
    in_turn = [name for name in names if name.endswith(" in turn")]
    return [
        *((name, "grpo") for name in names if name != "grpo"),
        *((name.removesuffix(" in turn"), name) for name in in_turn),
    ]


def _named(wait: float) -> str:
    return f"rewards {wait:g} s"


def _median(turns: list[dict[str, float]], what: str) -> float:
    return statistics.median(turn[what] for turn in turns)


def _ratio(one: list[dict[str, float]], other: list[dict[str, float]], what: str) -> dict[str, float]:
    return quartiles((turn[what] for turn in one), (turn[what] for turn in other))


def _same(counts: Any) -> float:
    """The one number that all turns gave."""
    (count,) = set(counts)
    return float(count)


def _show(result: dict[str, Any]) -> None:
    counted = ("policy forwards", "teacher forwards", "parameters, MB")
    table = Table("trainer", *(f"step, ms, {_named(wait)}" for wait in WAITS), *counted, title="medians")
    for name, numbers in result["trainers"].items():
        table.add_row(
            name,
            *(f"{1e3 * numbers['step_seconds'][_named(wait)]:.1f}" for wait in WAITS),
            f"{numbers['policy_forwards_per_step']:g}",
            f"{numbers['teacher_forwards_per_step']:g}",
            f"{numbers['parameter_bytes'] / 1e6:.1f}",
        )
    ratios = Table("ratio", "of", "with", "median", "quartiles", title="ratios, round by round")
    for label, both in result["ratios"].items():
        for what, by_wait in both.items():
            for wait, numbers in by_wait.items():
                ratios.add_row(label, {"step": "step", "cpu": "step on all cores"}[what], wait, *spread(numbers))
    console = Console()
    console.print(table)
    console.print(ratios)


if __name__ == "__main__":
    main()
