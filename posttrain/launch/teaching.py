"""The teacher that a recipe names: how it is trained, whether it fits the student, and where it lives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.errors import UserError
from posttrain.launch.resolve import Resolved, require_readable, resolve
from posttrain.recipe import Model, Recipe, Teacher


def resolve_teacher(recipe: Recipe, runs: Mapping[str, Resolved]) -> Resolved | None:
    """How the teacher is trained; None where it is taken as it is, or there is none.

    Raises:
        UserError: a method needs a teacher that the recipe lacks, or none needs the one that it has.
    """
    pupils = [label for label, resolved in runs.items() if resolved.takes_teacher]
    if recipe.teacher is None:
        if pupils:
            raise UserError(
                f"The run '{pupils[0]}' distils and needs a teacher: add the section teacher, with path or warm_start."
            )
        return None
    if not pupils:
        raise UserError(f"No run learns from the teacher: remove it, or take another method than {', '.join(runs)}.")
    if recipe.teacher.path is not None:
        require_readable(Model(path=recipe.teacher.path, revision=recipe.teacher.revision))
    if recipe.teacher.method is None:
        return None
    if recipe.rollout.engine != "transformers":
        raise UserError(
            "A teacher that the run trains has another shape than the policy, so one vLLM cannot serve both: set "
            "rollout.engine=transformers, or train the teacher in a run of its own and name its folder (teacher.path)."
        )
    resolved = resolve(recipe_of_teacher(recipe, recipe.teacher))
    if resolved.takes_store or resolved.takes_pairs or resolved.takes_teacher:
        raise UserError(
            f"teacher.method '{recipe.teacher.method.name}' needs more than prompts: take grpo, for instance."
        )
    return resolved


def recipe_of_teacher(recipe: Recipe, teacher: Teacher) -> Recipe:
    """The run's own recipe, with the teacher in the place of the policy."""
    model = Model(
        path=teacher.path,
        revision=teacher.revision,
        dtype=teacher.dtype or recipe.model.dtype,
        warm_start=teacher.warm_start,
    )
    method = teacher.method or recipe.method
    return recipe.model_copy(update={"model": model, "method": method, "teacher": None, "baselines": [], "sweep": {}})


def load_teacher(recipe: Recipe, path: str | None) -> Any:
    """The teacher beside the trainer (`posttrain.rollouts.teacher.Teacher`)."""
    from posttrain.rollouts.teacher import ModelTeacher

    section = recipe.teacher
    if section is None or path is None:
        raise ValueError("a method that distils was started without its teacher.")
    revision = section.revision if path == section.path else None
    return ModelTeacher.load(path, dtype=section.dtype or recipe.model.dtype, revision=revision, batch_size=64)


def require_fit(recipe: Recipe, runs: Mapping[str, Resolved], teacher: str, model: str, length: int) -> None:
    """Refuse a teacher of another tokenizer, end of sequence, chat template or too short a context.

    Args:
        runs: of the recipe.
        teacher: its path or hub name.
        model: path or hub name of the student.
        length: tokens of the longest prompt and answer together.

    Raises:
        UserError: it cannot teach this policy.
    """
    from transformers import AutoTokenizer

    from posttrain.rollouts.teacher import check_teacher

    section = recipe.teacher
    revision = recipe.model.revision if model == recipe.model.path else None
    pupils = [resolved.probe for resolved in runs.values() if resolved.takes_teacher]
    check_teacher(
        teacher,
        AutoTokenizer.from_pretrained(model, revision=revision),
        length=length,
        mask_eos=all(getattr(config, "kd_mask_eos", False) for config in pupils),
        temperature=recipe.rollout.temperature,
        revision=section.revision if section is not None and teacher == section.path else None,
    )
