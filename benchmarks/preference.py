"""Preference pairs: a step of f-DPO against TRL's DPO; divergences over a vocabulary against their plain form.

    python -m benchmarks.preference [--rounds 15] [--vocabulary-rounds 5] [--output benchmarks/results/preference.json]

One thread of a CPU. Contestants take turns in one process, in an order that rotates. Reported are medians over rounds,
the median of the per-round ratios with its quartiles, and peak bytes of tensors made and alive, gradients included,
models and inputs not, counted as in tests/test_vocabulary.py.

`step` is `training_step`: losses, forwards of policy and reference, and backward, without the optimiser. All trainers
hold the same weights, some way off the reference, and the same batch; a run stops where their losses differ.
`vocabulary` is forward and backward of Σ_v q f(p/q) for given hidden states, with gradients for them and the head; the
plain form takes log-softmax of all logits and leaves the rest to autograd.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.turns import quartiles, rotated, spread, timed
from posttrain import atomic, tasks
from posttrain.launch.pipeline import quiet_libraries
from posttrain.launch.provenance import machine
from posttrain.launch.warm_start import character_tokenizer, small_model
from posttrain.objectives.divergences import LOG_2
from posttrain.objectives.vocabulary import Head, vocabulary_divergence
from posttrain.progress import Bar
from posttrain.recipe import WarmStart
from posttrain.trainers.f_dpo import FDPOConfig, FDPOTrainer
from posttrain.versions import versions
from tests.test_vocabulary import Bytes, peak

PAIRS, ANSWER = 16, 32
DIVERGENCES = {"reverse_kl": "reverse_kl", "js": "js_divergence"}
"""TRL's name by ours."""

WORDS, WIDTH, TOKENS = 152_064, 64, (64, 256)

# ---------------------------------------------------------------- a training step


def build(folder: Path) -> dict[str, Any]:
    """Eight trainers on one model of 3.2 M parameters: ours and TRL's, by divergence, reference computed or read."""
    task = tasks.load("countdown", {})
    tokenizer = character_tokenizer(task.alphabet or "", task.chat_template or "")
    path = str(folder / "model")
    small_model(
        WarmStart(hidden_size=256, intermediate_size=688, layers=4, heads=4), tokenizer, "float32"
    ).save_pretrained(path)
    tokenizer.save_pretrained(path)
    draw = random.Random(0)

    def answer() -> list[dict[str, str]]:
        return [{"role": "assistant", "content": "".join(draw.choices("0123456789+-*", k=ANSWER))}]

    pairs = Dataset.from_list(
        [{"prompt": row["prompt"], "chosen": answer(), "rejected": answer()} for row in task.rows("train")[:PAIRS]]
    )

    def trainer(name: str, kind: Callable[..., Any], config: Callable[..., Any], **options: Any) -> Any:
        args = config(
            output_dir=str(folder / name.replace("/", "-")),
            per_device_train_batch_size=PAIRS,
            max_steps=1,
            report_to=[],
            save_strategy="no",
            logging_steps=1000,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **options,
        )
        made = kind(path, args=args, train_dataset=pairs, processing_class=tokenizer)
        made.remove_callback(PrinterCallback)
        made.train()  # one step: prepares model and optimiser
        return made

    made = {}
    for reference, precompute in {"computed": False, "precomputed": True}.items():
        for ours, theirs in DIVERGENCES.items():
            given = {"precompute_ref_log_probs": precompute}
            name = f"{ours}/{reference}"
            made[f"posttrain/{name}"] = trainer(f"posttrain/{name}", FDPOTrainer, FDPOConfig, divergence=ours, **given)
            made[f"trl/{name}"] = trainer(f"trl/{name}", DPOTrainer, DPOConfig, f_divergence_type=theirs, **given)
    policy = next(iter(made.values())).model.state_dict()
    source = torch.Generator().manual_seed(1)
    moved = {name: value + 0.01 * torch.randn(value.shape, generator=source) for name, value in policy.items()}
    for each in made.values():
        each.model.load_state_dict(moved)
    return made


class Step:
    """Times one trainer, counts its forward passes and its bytes."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.forwards = {"policy": 0, "reference": 0}
        self.batch = trainer.data_collator([trainer.train_dataset[row] for row in range(PAIRS)])
        for role, model in {"policy": trainer.model, "reference": trainer.ref_model}.items():
            if model is not None:
                model.register_forward_pre_hook(partial(self._count, role))

    def _count(self, role: str, *_: Any) -> None:
        self.forwards[role] += 1

    def turn(self) -> tuple[float, float]:
        """Seconds of a step, and its loss in nats per pair."""
        self.forwards.update(policy=0, reference=0)
        self.trainer.model.train()
        self.trainer.model.zero_grad()
        seconds, loss = timed(lambda: self.trainer.training_step(self.trainer.model_wrapped, self.batch))
        for values in self.trainer._metrics.values():
            values.clear()
        return seconds, float(loss)

    def peak_bytes(self) -> int:
        """Bytes at the worst moment of a step."""
        with Bytes() as counter:
            self.turn()
        held: int = counter.peak
        return held


def step(rounds: int, folder: Path) -> dict[str, Any]:
    """Our trainers and TRL's, in turns."""
    steps = {name: Step(trainer) for name, trainer in build(folder).items()}
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, float] = {}
    with Bar("step", rounds, "rounds") as bar:
        for number in range(rounds + 1):
            for name in rotated(names, number):
                taken, losses[name] = steps[name].turn()
                if number:  # round 0 warms up
                    seconds[name].append(taken)
            bar.to(number)
    cases = [f"{divergence}/{reference}" for reference in ("computed", "precomputed") for divergence in DIVERGENCES]
    for case in cases:
        ours, theirs = losses[f"posttrain/{case}"], losses[f"trl/{case}"]
        if not abs(ours - theirs) <= 1e-5:
            raise SystemExit(f"{case}: our loss is {ours} and TRL's {theirs}, so their times cannot be compared.")
    return {
        "workload": f"qwen2, 4 layers, d 256, {PAIRS} pairs of answers of {ANSWER} tokens, float32",
        "trainers": {
            name: {
                "seconds": statistics.median(seconds[name]),
                "forwards": dict(each.forwards),
                "peak_bytes": each.peak_bytes(),
                "loss": losses[name],
            }
            for name, each in steps.items()
        },
        "ratios": {case: quartiles(seconds[f"posttrain/{case}"], seconds[f"trl/{case}"]) for case in cases},
    }


# ---------------------------------------------------------------- divergences over a vocabulary


def plain(name: str, hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    """The divergence per token, from all log-probs [N, V] of policy and reference."""
    logps, ref_logps = (hidden @ weight.T).log_softmax(-1), (ref_hidden @ ref_weight.T).log_softmax(-1)
    if name == "reverse_kl":
        return (logps.exp() * (logps - ref_logps)).sum(-1)
    if name == "forward_kl":
        return (ref_logps.exp() * (ref_logps - logps)).sum(-1)
    if name == "js":
        middle = torch.logaddexp(logps, ref_logps) - LOG_2
        return 0.5 * (logps.exp() * (logps - middle) + ref_logps.exp() * (ref_logps - middle)).sum(-1)
    return 4.0 * (1.0 - (0.5 * (logps + ref_logps)).exp().sum(-1))  # alpha = 0.5


def vocabulary(rounds: int) -> dict[str, Any]:
    """Ours and the plain form of four divergences, in turns."""
    names: dict[str, float | None] = {"reverse_kl": None, "forward_kl": None, "js": None, "alpha": 0.5}
    found: dict[str, Any] = {}
    with Bar("vocabulary", len(TOKENS) * len(names), "cases") as bar:
        for tokens in TOKENS:
            source = torch.Generator().manual_seed(tokens)
            hidden, ref_hidden = torch.randn(2, tokens, WIDTH, generator=source)
            weight, ref_weight = 0.1 * torch.randn(2, WORDS, WIDTH, generator=source)
            inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            for name, alpha in names.items():
                heads = Head(inputs[1]), Head(ref_weight)
                forms: dict[str, Callable[[], Tensor]] = {
                    "tiled": partial(
                        vocabulary_divergence, inputs[0], heads[0], ref_hidden, heads[1], name, alpha=alpha
                    ),
                    "plain": partial(plain, name, *inputs, ref_hidden, ref_weight),
                }
                found[f"{name}/{tokens}"] = _compare(forms, inputs, rounds)
                bar.advance(1)
    return {"workload": f"{WORDS} words, width {WIDTH}, float32; cases are divergence/tokens", "cases": found}


def _compare(
    forms: dict[str, Callable[[], Tensor]], inputs: tuple[Tensor, Tensor], rounds: int
) -> dict[str, dict[str, float]]:
    torch.testing.assert_close(forms["tiled"](), forms["plain"](), rtol=1e-5, atol=1e-5)

    def both_passes(name: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forms[name]().sum(), inputs)

    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds + 1):
        for name in rotated(list(forms), number):
            taken, _ = timed(partial(both_passes, name))
            if number:  # round 0 warms up
                seconds[name].append(taken)
    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "time_ratio": quartiles(seconds["tiled"], seconds["plain"]),
        "peak_bytes": {name: peak(form, *inputs) for name, form in forms.items()},
    }


# ---------------------------------------------------------------- the whole


def main() -> None:
    """Run the benchmark, print tables, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="turns of every trainer (default 15)")
    parser.add_argument("--vocabulary-rounds", type=int, default=5, help="turns of every divergence (default 5)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/preference.json"))
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        steps = step(options.rounds, Path(folder))
    result = {
        "benchmark": "preference",
        "rounds": {"step": options.rounds, "vocabulary": options.vocabulary_rounds},
        "threads": torch.get_num_threads(),
        "machine": machine(1),
        "versions": versions(),
        "step": steps,
        "vocabulary": vocabulary(options.vocabulary_rounds),
    }
    atomic.write_json(options.output, result)
    _show(result)
    print(f"written to {options.output}")


def _show(result: dict[str, Any]) -> None:
    steps = Table("trainer", "step, ms", "policy", "reference", "peak, MB", title="medians; forwards per step")
    for name, numbers in result["step"]["trainers"].items():
        steps.add_row(
            name,
            f"{1e3 * numbers['seconds']:.1f}",
            *map(str, numbers["forwards"].values()),
            f"{numbers['peak_bytes'] / 1e6:.1f}",
        )
    ratios = Table("step", "posttrain / trl", "quartiles", title="time, round by round")
    for case, numbers in result["step"]["ratios"].items():
        ratios.add_row(case, *spread(numbers))
    whole = Table("case", "tiled, MB", "plain, MB", "ratio", "time ratio", "quartiles", title="vocabulary")
    for case, numbers in result["vocabulary"]["cases"].items():
        ours, theirs = numbers["peak_bytes"]["tiled"], numbers["peak_bytes"]["plain"]
        sizes = f"{ours / 1e6:.1f}", f"{theirs / 1e6:.1f}", f"{ours / theirs:.3f}"
        whole.add_row(case, *sizes, *spread(numbers["time_ratio"]))
    console = Console()
    for table in (steps, ratios, whole):
        console.print(table)


if __name__ == "__main__":
    main()
