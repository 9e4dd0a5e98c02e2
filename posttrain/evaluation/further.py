"""Further tasks: held-out rows of other tasks that every policy answers, to see what training on one made it forget.

Each is an evaluation of its own in `further/<name>` below a policy's evaluation, judged by the verifier of its task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain import rewards, tasks
from posttrain.errors import UserError
from posttrain.evaluation import evaluate
from posttrain.evaluation.evaluate import EvaluationResult
from posttrain.recipe import Evaluation as Settings
from posttrain.recipe import Recipe


@dataclass(frozen=True)
class FurtherTask:
    """What is asked on a further task."""

    task: tasks.BaseTask
    verifier: rewards.Verifier
    rows: list[tasks.Row]
    """Its held-out rows."""
    settings: Settings
    """Those of the evaluation, with this task's prompts, n and k."""
    max_tokens: int
    """Longest answer, in tokens."""


def folder_of(evaluation: Path, name: str) -> Path:
    """Where a policy's evaluation on a further task is kept, by the folder of its main one."""
    return evaluation / "further" / name


def load(evaluation: Path, names: Sequence[str]) -> dict[str, EvaluationResult]:
    """A policy's finished evaluations on further tasks, by name.

    Raises:
        UserError: one is not finished, or damaged.
    """
    return {name: evaluate.load(folder_of(evaluation, name)) for name in names}


def prepare(recipe: Recipe) -> dict[str, FurtherTask]:
    """The further tasks of a recipe, by name.

    Raises:
        UserError: a task does not exist, has no held-out rows or fewer than asked for, or nothing that judges them.
    """
    found = {}
    for name, asked in recipe.evaluation.further.items():
        task = tasks.load(asked.task.name, asked.task.options)
        if task.verifier is None:
            raise UserError(
                f"The further task '{name}' ('{task.name}') has nothing that decides what is correct, so nothing "
                "forgotten would show: take another task."
            )
        verifier = rewards.load(*task.verifier)
        rows = task.rows("eval")
        if asked.prompts is not None and asked.prompts > len(rows):
            raise UserError(
                f"The further task '{name}' ('{task.name}') holds out {len(rows):,} prompts, but {asked.prompts:,} "
                "were asked for: ask for fewer."
            )
        rows = tasks.choose(rows, asked.prompts, seed=recipe.evaluation.seed)
        evaluate.check(task.name, rows, verifier)
        own = {"prompts": asked.prompts, "n": asked.n, "k": asked.k}
        unasked: dict[str, Any] = {"diversity": None, "divergence": None, "calibration": None, "further": {}}
        found[name] = FurtherTask(
            task=task,
            verifier=verifier,
            rows=rows,
            settings=recipe.evaluation.model_copy(update={**own, **unasked}),
            max_tokens=asked.max_tokens or recipe.rollout.max_tokens,
        )
    return found


def require_unseen(further: Mapping[str, FurtherTask], learned: Mapping[str, Sequence[tasks.Row]]) -> None:
    """Refuse held-out rows that are learned from: what is asked there would not be another task.

    Args:
        further: by name.
        learned: rows that policies learn from, by the key of the recipe that says so.

    Raises:
        UserError: a prompt is among them.
    """
    seen = {source: {_question(row) for row in rows} for source, rows in learned.items()} if further else {}
    for name, asked in further.items():
        for source, questions in seen.items():
            found = [row for row in asked.rows if _question(row) in questions]
            if found:
                raise UserError(
                    f"The further task '{name}' holds out {len(asked.rows):,} prompts, but {len(found):,} of them are "
                    f"learned from ({source}; the first is {found[0]['key']}): give both the same options, eval_share "
                    "and seed among them, or take another task."
                )


def _question(row: tasks.Row) -> str:
    """What a policy reads, as a hash."""
    return tasks.fingerprint([{name: row[name] for name in ("prompt", "images") if name in row}])


def require_readable(further: Mapping[str, FurtherTask], alphabet: str, own: tasks.BaseTask) -> None:
    """Refuse a further task that a model made for the run's own task cannot read or write.

    Args:
        further: by name.
        alphabet: the characters that the model's tokenizer knows.
        own: the task that the model is made for, whose chat template it has.

    Raises:
        UserError: a task has images that the model's own has not, other characters, or a chat template of its own.
    """
    for name, asked in further.items():
        if asked.task.images and not own.images:
            raise UserError(
                f"The further task '{name}' ('{asked.task.name}') has images, but the model that is made here for "
                f"'{own.name}' reads text alone: take another task."
            )
        if asked.task.chat_template not in (None, own.chat_template):
            raise UserError(
                f"The further task '{name}' ('{asked.task.name}') has another chat template than the model that is "
                "made here, which could not read it: take another task."
            )
        needed = asked.task.alphabet
        if needed is None:  # unbounded, but these prompts may do
            needed = "".join(str(message["content"]) for row in asked.rows for message in row["prompt"])
        missing = "".join(dict.fromkeys(character for character in needed if character not in alphabet))
        if missing:
            raise UserError(
                f"The further task '{name}' ('{asked.task.name}') has characters that the model made here has no "
                f"tokens for ({missing[:20]!r}): demonstrate it, too (model.warm_start.also), or take another task."
            )
