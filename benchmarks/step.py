"""Time of one training step: ours against TRL's trainer, and DPH-RL against GRPO with a reference model.

    python -m benchmarks.step [--rounds 15] [--output benchmarks/results/step.json]

All trainers live in one process and take turns, in an order that rotates; every turn of a round starts from the same
weights and the same random state, so it generates the same answers. Two things are timed: `step`, generation and
update, and `update`, the loss with its backward pass on a batch that is there already. Reported are medians over
rounds, the median of the per-round ratios with its quartiles, forward passes per step, and bytes of parameters held.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from trl import GRPOConfig
from trl import GRPOTrainer as TRLTrainer

from benchmarks.turns import quartiles, rotated, spread
from posttrain import atomic, tasks
from posttrain.launch.pipeline import quiet_libraries
from posttrain.launch.provenance import machine
from posttrain.launch.warm_start import character_tokenizer, small_model
from posttrain.progress import Bar
from posttrain.recipe import Presample, WarmStart
from posttrain.rewards import Verdict, Verifier
from posttrain.rollouts.presample import presample
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.trainers.dph_rl import DPHConfig, DPHTrainer
from posttrain.trainers.grpo import GRPOTrainer
from posttrain.versions import versions

PAIRS = {"grpo / trl": ("grpo", "trl"), "dph_rl / grpo with reference": ("dph_rl", "grpo_reference")}


class OddTargets(Verifier):
    """Calls answers to odd targets right, so that the store rehearses those prompts and leaves the others."""

    name = "odd_targets"

    def verify(self, completion: str, row: Any) -> Verdict:
        return Verdict(float(row["target"] % 2), "ok", completion)


def length_reward(completions: list[Any], **_: Any) -> list[float]:
    """Cheap, and different between answers."""
    return [float(len(completion[0]["content"])) for completion in completions]


def build(folder: Path) -> dict[str, Any]:
    """The four trainers, on one model of 3.2 M parameters with random weights."""
    task = tasks.load("countdown", {})
    tokenizer = character_tokenizer(task.alphabet or "", task.chat_template or "")
    settings = WarmStart(hidden_size=256, intermediate_size=688, layers=4, heads=4)
    model = folder / "model"
    small_model(settings, tokenizer, "float32").save_pretrained(model)
    tokenizer.save_pretrained(model)
    rows = task.rows("train")[:64]
    store = presample(
        TransformersEngine.load(str(model)),
        rows,
        OddTargets(),
        Presample(samples_per_prompt=1),
        max_tokens=32,
        training_temperature=1.0,
        output_dir=folder / "store",
    )
    explored = Dataset.from_list([row for row in rows if row["target"] % 2 == 0])

    def arguments(name: str, **changes: Any) -> dict[str, Any]:
        return {
            "output_dir": str(folder / name),
            "per_device_train_batch_size": 32,
            "num_generations": 8,
            "max_completion_length": 32,
            "learning_rate": 1e-6,
            "max_steps": 1,
            "report_to": [],
            "save_strategy": "no",
            "logging_steps": 1000,
            "use_cpu": not torch.cuda.is_available(),
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **changes,
        }

    def trainer(kind: Callable[..., Any], args: Any, **options: Any) -> Any:
        made = kind(model=str(model), reward_funcs=length_reward, args=args, train_dataset=explored, **options)
        made.train()  # one step: prepares model and optimiser, and warms up
        return made

    return {
        "trl": trainer(TRLTrainer, GRPOConfig(**arguments("trl"))),
        "grpo": trainer(GRPOTrainer, GRPOConfig(**arguments("grpo"))),
        "grpo_reference": trainer(GRPOTrainer, GRPOConfig(**arguments("grpo_reference", beta=0.04))),
        "dph_rl": trainer(DPHTrainer, DPHConfig(**arguments("dph_rl")), store=store),
    }


class Stopwatch:
    """Times one trainer, and counts its forward passes."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.forwards = 0
        self.rows = next(iter(trainer.get_train_dataloader()))
        original = trainer._get_per_token_logps_and_entropies

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.forwards += 1
            return original(*args, **kwargs)

        trainer._get_per_token_logps_and_entropies = counted

    def turn(self, seed: int) -> dict[str, float]:
        """Seconds of a whole step and of an update alone, and forward passes of the step."""
        trainer = self.trainer
        trainer.model.train()
        trainer.model.zero_grad()
        torch.manual_seed(seed)
        self.forwards = 0
        trainer.state.global_step += 1  # a new step rehearses new rows
        start = perf_counter()
        trainer.training_step(trainer.model_wrapped, self.rows, None)
        wait_for_device()
        step, forwards = perf_counter() - start, self.forwards
        inputs = trainer._buffered_inputs[0]
        trainer.model.zero_grad()
        trainer.state.global_step += 1
        start = perf_counter()
        trainer._compute_loss(trainer.model_wrapped, inputs).backward()
        wait_for_device()
        update = perf_counter() - start
        for values in trainer._metrics.values():
            values.clear()
        return {"step": step, "update": update, "forwards": forwards}

    def parameter_bytes(self) -> int:
        """Bytes of the policy's and the reference's parameters."""
        models = [self.trainer.model, *([self.trainer.ref_model] if self.trainer.ref_model is not None else [])]
        return sum(p.numel() * p.element_size() for model in models for p in model.parameters())


def wait_for_device() -> None:
    """Until a GPU has done what it was given; at once on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Run the benchmark, print a table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="turns of every trainer (default 15)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/step.json"))
    options = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        watches = {name: Stopwatch(trainer) for name, trainer in build(Path(folder)).items()}
        names = list(watches)
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        with Bar("step", options.rounds, "rounds") as bar:
            for number in range(options.rounds + 1):
                for name in rotated(names, number):
                    measured = watches[name].turn(number)
                    if number:  # round 0 warms up
                        turns[name].append(measured)
                bar.to(number)
        result = {
            "benchmark": "step",
            "rounds": options.rounds,
            "model": "qwen2, 4 layers, d 256, 32 sequences of at most 32 tokens, float32",
            "threads": torch.get_num_threads(),
            "machine": machine(1),
            "versions": versions(),
            "trainers": {
                name: {
                    "step_seconds": statistics.median(turn["step"] for turn in turns[name]),
                    "update_seconds": statistics.median(turn["update"] for turn in turns[name]),
                    "forwards_per_step": turns[name][-1]["forwards"],
                    "parameter_bytes": watches[name].parameter_bytes(),
                }
                for name in names
            },
            "ratios": {
                label: {
                    what: quartiles((turn[what] for turn in turns[one]), (turn[what] for turn in turns[other]))
                    for what in ("step", "update")
                }
                for label, (one, other) in PAIRS.items()
            },
        }
    atomic.write_json(options.output, result)
    _show(result)
    print(f"written to {options.output}")


def _show(result: dict[str, Any]) -> None:
    table = Table("trainer", "step, ms", "update, ms", "forwards", "parameters, MB", title="medians")
    for name, numbers in result["trainers"].items():
        table.add_row(
            name,
            f"{1e3 * numbers['step_seconds']:.1f}",
            f"{1e3 * numbers['update_seconds']:.1f}",
            str(numbers["forwards_per_step"]),
            f"{numbers['parameter_bytes'] / 1e6:.1f}",
        )
    ratios = Table("ratio", "of", "median", "quartiles", title="ratios, round by round")
    for label, both in result["ratios"].items():
        for what, numbers in both.items():
            ratios.add_row(label, what, *spread(numbers))
    console = Console()
    console.print(table)
    console.print(ratios)


if __name__ == "__main__":
    main()
