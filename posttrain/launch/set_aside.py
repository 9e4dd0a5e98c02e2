"""Training rows that are set aside, so that nothing is trained on what later decides."""

from __future__ import annotations

from copy import copy

from posttrain import tasks
from posttrain.errors import UserError
from posttrain.rollouts.store import prompt_id
from posttrain.stages import Validation


def set_aside(task: tasks.BaseTask, settings: Validation) -> tuple[tasks.BaseTask, list[tasks.Row]]:
    """A task without its validation rows, and these rows, chosen among those that it trains on.

    Whatever asks for training rows, a warm start too, gets none of them, nor another row with the same prompt; none is
    asked in the evaluation.

    Raises:
        UserError: too few rows would be left to train on.
    """
    rows = task.rows("train")
    held_out = {prompt_id(tasks.shown(row)) for row in task.rows("eval")}
    identifiers = [prompt_id(tasks.shown(row)) for row in rows]
    distinct = {
        identifier: row for identifier, row in zip(identifiers, rows, strict=True) if identifier not in held_out
    }
    if settings.prompts >= len(distinct):
        raise UserError(
            f"validation.prompts sets {settings.prompts} of {len(distinct)} training prompts aside, which leaves none "
            "to train on: ask for fewer."
        )
    chosen = tasks.choose(list(distinct.values()), settings.prompts, seed=settings.seed)
    decided = {prompt_id(tasks.shown(row)) for row in chosen}
    left = [row for identifier, row in zip(identifiers, rows, strict=True) if identifier not in decided]
    remaining = copy(task)
    vars(remaining)["rows"] = lambda split: list(left) if split == "train" else task.rows(split)
    return remaining, chosen
