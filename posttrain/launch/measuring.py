"""What a run measures on every policy: pass@k where a verifier decides, and the further measures a recipe asks for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from posttrain.errors import UserError
from posttrain.evaluation import calibration, divergence, diversity, evaluate
from posttrain.evaluation.further import folder_of
from posttrain.launch.engines import Engines
from posttrain.launch.workers import Workers

if TYPE_CHECKING:
    from posttrain.launch.pipeline import Job


class Measuring:
    """Evaluates policies of one job, each into a folder of its own; reused where it is there already.

    Args:
        job: whose held-out rows, verifier and settings serve all policies.
        initial: path or hub name of the initial policy, from which divergences are taken.
        engines: lends the engine that samples and scores.
        base: folder of the initial policy's evaluation, whose answers become held-out pairs.
        workers: the processes of the launch; all make the same calls.
    """

    def __init__(self, job: Job, initial: str, engines: Engines, base: Path, workers: Workers) -> None:
        self.job, self.initial, self.engines, self.base, self.workers = job, initial, engines, base, workers

    def measure(self, label: str, model: str, folder: Path, *, implied: calibration.Implied | None = None) -> None:
        """Everything that the recipe asks for, on the policy at `model`. The initial policy comes first.

        Args:
            label: of the policy.
            model: its path or hub name.
            folder: of its evaluation.
            implied: how its implicit rewards follow from log-ratios; None where a method implies none.
        """
        recipe, asked = self.job.recipe, self.job.recipe.evaluation
        batch_size, max_tokens = recipe.rollout.answers_per_part, recipe.rollout.max_tokens
        shared: dict[str, Any] = {"label": label, "worker": (self.workers.rank, self.workers.world)}
        with self.engines.on(model, finished=self._sampled(folder)) as engine:
            evaluate.evaluate(
                engine,
                self.job.task.name,
                self.job.eval_rows,
                self.job.verifier,
                asked,
                max_tokens=max_tokens,
                batch_size=batch_size,
                output_dir=folder,
                **shared,
            )
            self._first(lambda: evaluate.finish(folder, asked, label=label))
            self._elsewhere(engine, label, folder)
            if asked.diversity is not None:
                diversity.measure(
                    engine,
                    self.job.eval_rows,
                    asked.diversity,
                    max_tokens=max_tokens,
                    seed=asked.seed,
                    batch_size=batch_size,
                    folder=folder,
                    **shared,
                )
                self._first(lambda: diversity.finish(folder))
            if asked.calibration is not None:
                calibration.measure(
                    engine,
                    self._held_out,
                    problems=len(self.job.eval_rows),
                    batch_size=batch_size,
                    folder=folder,
                    **shared,
                )
        settings = asked.calibration
        if settings is not None:
            self._first(lambda: calibration.finish(folder, self.base, settings, implied))
        if asked.divergence is not None:
            divergence.measure(
                model,
                self.initial,
                self.job.eval_rows,
                asked.divergence,
                dtype=recipe.model.dtype,
                initial_folder=self.base,
                folder=folder,
                revision=recipe.model.revision if self.initial == recipe.model.path else None,
                **shared,
            )
            self._first(lambda: divergence.finish(folder))

    def _elsewhere(self, engine: Any, label: str, folder: Path) -> None:
        """Evaluate on every further task."""
        for name, further in self.job.further.items():
            there, told = folder_of(folder, name), f"{label} on {name}"
            evaluate.evaluate(
                engine,
                further.task.name,
                further.rows,
                further.verifier,
                further.settings,
                max_tokens=further.max_tokens,
                batch_size=self.job.recipe.rollout.answers_per_part,
                output_dir=there,
                label=told,
                worker=(self.workers.rank, self.workers.world),
            )
            self._first(partial(evaluate.finish, there, further.settings, label=told))

    def _first(self, finish: Callable[[], Any]) -> None:
        """What the first process does once all have written their share, and all wait for."""
        self.workers.barrier()
        if self.workers.first:
            finish()
        self.workers.barrier()

    def _sampled(self, folder: Path) -> bool:
        """Whether nothing is left that an engine would have to sample or score."""
        asked = self.job.recipe.evaluation
        files = ["evaluation.json", *(f"{folder_of(Path(), name)}/evaluation.json" for name in self.job.further)]
        files += ["measures/diversity.json"] if asked.diversity is not None else []
        files += [f"measures/{calibration.PAIRS}.json"] if asked.calibration is not None else []
        return all((folder / name).is_file() for name in files)

    @cached_property
    def _held_out(self) -> list[Any]:
        """Held-out pairs: the task's own, or right against wrong answers of the initial policy to held-out prompts."""
        from transformers import AutoTokenizer

        from posttrain.rollouts import pairs

        recipe, settings = self.job.recipe, self.job.recipe.evaluation.calibration
        tokenizer = AutoTokenizer.from_pretrained(
            self.initial, revision=recipe.model.revision if self.initial == recipe.model.path else None
        )
        if self.job.task.pairs:
            return [pairs.tokenize(row, tokenizer, problem=place) for place, row in enumerate(self.job.eval_rows)]
        samples = pq.read_table(self.base / "samples.parquet")
        found = pairs.from_samples(
            samples,
            self.job.eval_rows,
            tokenizer,
            per_prompt=settings.pairs_per_prompt if settings is not None else 1,
            seed=recipe.evaluation.seed,
        )
        if not found:
            raise UserError(
                "No held-out problem has both a right and a wrong answer of the initial policy, so there are no pairs "
                "to measure calibration on: leave evaluation.calibration out."
            )
        return found
