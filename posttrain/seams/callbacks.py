"""How a training run talks: one progress bar in place of TRL's printed dictionaries, and an orderly stop on Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from posttrain.progress import Bar

_SHORT = {
    "reward": "reward",
    "entropy": "entropy",
    "loss": "loss",
    "mean_token_accuracy": "token accuracy",
    "pef/divergence": "L_pef",
    "kl": "kl",
    "kl/forward": "kl",
    "completions/mean_length": "length",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
}


class ProgressBar(TrainerCallback):
    """A bar of optimiser steps with the latest of a few metrics."""

    def __init__(self, label: str, show: Sequence[str]) -> None:
        self.label, self.show = label, show
        self._bar: Bar | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = Bar(self.label, state.max_steps, "steps", shown=state.is_world_process_zero).__enter__()
        self._bar.to(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.to(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self._bar is not None and logs:
            parts = [f"{_SHORT[name]} {logs[name]:.3g}" for name in self.show if logs.get(name) is not None]
            if parts:
                self._bar.to(state.global_step, "  ".join(parts))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None


class StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C (or SIGTERM) finishes the step, saves a checkpoint and stops; the second one stops at once.

    Processes agree after every step, because the signal may reach one of them a step later than another.
    """

    def __init__(self) -> None:
        self.interrupted = False
        """Whether all processes have agreed to stop."""
        self._asked = False
        """Whether a signal has reached this one. Apart: it can come while they agree, and must outlast that."""
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        print("\nStopping after this step and saving a checkpoint (once more to stop at once).", flush=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread: leave signals alone
                return

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.interrupted = self._asked
        if torch.distributed.is_initialized():
            asked = torch.tensor(int(self._asked), device=args.device)
            torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
            self.interrupted = bool(asked.item())
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def quiet(trainer: Trainer, label: str, show: Sequence[str]) -> None:
    """Replace what a Trainer prints by one progress bar."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(ProgressBar(label, show))


class CompleteCheckpoints(TrainerCallback):
    """Marks every checkpoint that was written to its end, so that a resumed run never starts from half of one."""

    MARKER = "complete"

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # each process writes its own part: random state, ZeRO's optimiser state
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.MARKER).touch()

    @classmethod
    def save(cls, trainer: Any) -> str:
        """Save what a trainer has learned until now, if that has not been done; a sentence on what there is.

        To be called by all processes, after one optimiser step has ended and before the next one has begun.
        """
        step, folder = trainer.state.global_step, Path(trainer.args.output_dir)
        if step == 0:
            return "Nothing had been trained yet."
        if not (folder / f"checkpoint-{step}" / cls.MARKER).exists():
            trainer._save_checkpoint(trainer.model, trial=None)
            trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
        return f"What was trained until step {step} is saved."

    @classmethod
    def latest(cls, folder: Path) -> str | None:
        """The newest complete checkpoint below `folder`, or None."""
        complete = [marker.parent for marker in folder.glob(f"checkpoint-*/{cls.MARKER}")]
        return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None
