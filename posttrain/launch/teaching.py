"""The teachers that a recipe names: how they are made, whether they fit the student, and where they live.

`check` needs the recipe alone, `resolve_teacher` the teachers' configurations, `require_rows` the task's rows.
`Teachers` lends them to a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import UserError
from posttrain.launch.engines import Engines, require_engine
from posttrain.launch.measuring import Measuring
from posttrain.launch.resolve import Resolved, require_readable, resolve
from posttrain.launch.spawn import configuration
from posttrain.launch.workers import Workers
from posttrain.recipe import Model, Recipe, Rollout, Teacher
from posttrain.seams.sharding import requested
from posttrain.tasks import BaseTask

if TYPE_CHECKING:
    from rich.console import Console

    from posttrain.launch.pipeline import Job
    from posttrain.rollouts.engine import Prompt
    from posttrain.rollouts.teacher import Row
    from posttrain.rollouts.teacher import Teacher as Scorer

BATCH_SIZE = 64
"""Sequences per forward of a teacher in the training processes."""


def check(recipe: Recipe, runs: Mapping[str, Resolved]) -> None:
    """Refuse what recipe and methods show to be impossible; no model and no row is read.

    Raises:
        UserError: a method needs a teacher that the recipe lacks, none needs the one that it has, or it cannot give
            what a method asks for.
    """
    pupils = {label: resolved for label, resolved in runs.items() if resolved.takes_teacher}
    if recipe.teacher is None:
        if pupils:
            raise UserError(
                f"The run '{next(iter(pupils))}' distils and needs a teacher: add the section teacher, with path or "
                "warm_start."
            )
        return
    if not pupils:
        raise UserError(f"No run learns from the teacher: remove it, or take another method than {', '.join(runs)}.")
    for label, resolved in pupils.items():
        if resolved.takes_answers:
            _require_answers(label, recipe.teacher)
        else:
            _require_distributions(label, resolved.probe, recipe.teacher)
    if recipe.launch.config is not None:
        chosen = configuration(recipe)
        _require_split(recipe, None if chosen is None else chosen.kind)


def _require_answers(label: str, teacher: Teacher) -> None:
    """Refuse a teacher whose answers cannot be drawn, or not those that it is asked for.

    Raises:
        UserError: so it is.
    """
    if teacher.several or teacher.is_student or teacher.sharded:
        raise UserError(
            f"The run '{label}' is fine-tuned on the answers of its teacher, so that takes one whole model of its own: "
            "name its path, or draw answers of the policy (answers_of: policy)."
        )
    if teacher.hint is not None:
        raise UserError(
            f"The run '{label}' is fine-tuned on the answers of its teacher, which are drawn without teacher.hint: "
            "remove the hint, or the run."
        )


def _require_distributions(label: str, config: Any, teacher: Teacher) -> None:
    """Refuse a method that compares whole distributions where the teacher gives none.

    Raises:
        UserError: so it is.
    """
    estimator = getattr(config, "kd_estimator", None)
    behind = any(one.server is not None for one in (teacher, *teacher.several.values()))
    if not (teacher.several or behind):
        return
    if estimator == "full" or (estimator == "topk" and not config.kd_topk_tail):
        what = "several teachers give" if teacher.several else "a teacher behind a server gives"
        raise UserError(
            f"The run '{label}' compares whole distributions (kd_estimator = {estimator}), and {what} only the "
            "log-probs of their most probable words: take kd_estimator = topk with its tail, one of sampled tokens, or "
            "one teacher without server."
        )


def _require_split(recipe: Recipe, kind: str | None) -> None:
    """Refuse teachers that a launch cannot split, or whose processes would wait for one another.

    Args:
        recipe: with teachers.
        kind: how the launch splits the policy, as `posttrain.seams.sharding.requested` says it.

    Raises:
        UserError: so it is.
    """
    for teacher in recipe.teachers.values():
        if teacher.sharded and kind not in ("zero3", "deepspeed"):
            raise UserError(
                "teacher.sharded splits the teacher by ZeRO-3, and this is a launch with "
                f"{kind or 'whole models'}: set launch.config to zero3, or remove sharded."
            )
        if teacher.is_student and kind == "fsdp1":
            raise UserError(
                "FSDP 1 keeps the student's weights in parts that no teacher can be made of: launch with ddp, fsdp2 or "
                "DeepSpeed, or name a teacher with weights of its own."
            )
        if teacher.is_student and len(recipe.teachers) > 1 and kind not in (None, "ddp", "zero0", "zero1", "zero2"):
            raise UserError(
                f"Processes that share the student's weights ({kind}) must score equally many rows with them, and each "
                "has its own mixture of rows for several teachers: give each teacher a path."
            )


def resolve_teacher(recipe: Recipe, runs: Mapping[str, Resolved]) -> Resolved | None:
    """How the teacher is trained; None where it is taken as it is, or there is none.

    Raises:
        UserError: as `check`; a teacher cannot be read, or cannot be where the recipe wants it.
    """
    check(recipe, runs)
    if recipe.teacher is None:
        return None
    _require_split(recipe, requested())
    for teacher in recipe.teachers.values():
        if teacher.path is not None:
            require_readable(Model(path=teacher.path, revision=teacher.revision))
        if teacher.device is not None:
            _require_device(teacher.device)
        if teacher.server is not None:
            require_engine(_recipe_of_server(recipe, teacher, teacher.path))
    if recipe.teacher.method is None:
        return None
    if recipe.rollout.engine != "transformers":
        raise UserError(
            "A teacher that the run trains has another shape than the policy, so one vLLM cannot serve both: set "
            "rollout.engine=transformers, or train the teacher in a run of its own and name its folder (teacher.path)."
        )
    resolved = resolve(recipe_of_teacher(recipe, recipe.teacher))
    if resolved.takes_store or resolved.takes_teacher or not resolved.samples:
        raise UserError(
            f"teacher.method '{recipe.teacher.method.name}' needs more than prompts: take grpo, for instance."
        )
    return resolved


def _require_device(name: str) -> None:
    """Refuse a device that is not there.

    Raises:
        UserError: so it is.
    """
    import torch

    try:
        device = torch.device(name)
        if device.type != "cuda":
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"teacher.device '{name}' is not there ({reason}): name another one, as in cuda:1.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"teacher.device is {name}, but this machine has {torch.cuda.device_count()} GPUs: name another device."
        )


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


def _recipe_of_server(recipe: Recipe, teacher: Teacher, path: str | None) -> Recipe:
    """`recipe_of_teacher`, with the teacher's server in the place of the run's engine; `path` once it is made."""
    own = recipe_of_teacher(recipe, teacher)
    rollout = Rollout(
        engine="vllm_server",
        max_tokens=recipe.rollout.max_tokens,
        batch_size=recipe.rollout.batch_size,
        vllm=teacher.vllm,
        server=teacher.server or Rollout().server,
    )
    update: dict[str, Any] = {"rollout": rollout}
    if path is not None:
        update["model"] = Model(path=path, revision=own.model.revision, dtype=own.model.dtype)
    return own.model_copy(update=update)


# ---------------------------------------------------------------- the rows


def rows_by_teacher(recipe: Recipe, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows that each teacher reads, by its label."""
    section = recipe.teacher
    if section is None or section.by is None:
        return {label: list(rows) for label in recipe.teachers}
    names = dict(zip(section.several, recipe.teachers, strict=True))
    return {label: [row for row in rows if row[section.by] == name] for name, label in names.items()}


def require_rows(recipe: Recipe, rows: Sequence[Row], task: BaseTask) -> None:
    """Require that every row has its teacher, every teacher its rows, and every hint its columns.

    Args:
        recipe: of the run.
        rows: that are trained on.
        task: whose rows they are.

    Raises:
        UserError: so it is not.
    """
    section = recipe.teacher
    if section is None:
        return
    from posttrain.rollouts.teacher import hint, require_teachers

    if task.images:
        for teacher in recipe.teachers.values():
            found = [("hint", teacher.hint), ("server", teacher.server), ("template", teacher.template == "teacher")]
            name = next((name for name, value in found if value), None)
            if name is not None:
                raise UserError(
                    f"Prompts of the task '{task.name}' hold images, which a teacher with {name} does not read: remove "
                    f"teacher.{name}."
                )
    if section.by is not None:
        require_teachers(rows, section.by, section.several)
    for label, mine in rows_by_teacher(recipe, rows).items():
        if not mine:
            name = label.removeprefix("teacher-")
            raise UserError(f"No row of the task '{task.name}' is for the teacher '{name}' ({section.by}): remove it.")
        told = recipe.teachers[label].hint
        if told is None:
            continue
        tell = hint(told.text, role=told.role)
        for place, row in enumerate(mine):
            tell(row)
            empty = next((column for column in told.columns if row[column] is None), None)
            if empty is not None:
                raise UserError(
                    f"The teacher's hint names the column '{empty}', which is empty in row {place} of the task "
                    f"'{task.name}': fill it, or leave such rows out."
                )


# ---------------------------------------------------------------- the run


class Teachers:
    """The teachers of a run: checks, measures and lends them.

    A server that the run starts is started when it is first needed, and serves until `close`.

    Args:
        job: of the run.
        engines: of the policy that learns.
        workers: the processes of the launch; all make the same calls in the same order.
        output_dir: of the run; the log of a server is <label>.log there.
    """

    def __init__(self, job: Job, engines: Engines, workers: Workers, output_dir: Path) -> None:
        self.job, self.student, self.workers, self.output_dir = job, engines.initial, workers, output_dir
        self.sections = job.recipe.teachers
        self.paths = {label: each.path for label, each in self.sections.items() if each.path is not None}
        self.paths |= {label: self.student for label, each in self.sections.items() if each.is_student}
        self._rows = rows_by_teacher(job.recipe, job.train_rows)
        self._engines_of_policy, self._engines = engines, dict[str, Engines]()

    def require_fit(self) -> None:
        """Refuse teachers that do not fit the student: before anything slow those that exist, once made the others.

        Raises:
            UserError: another tokenizer, end of sequence or chat template, too short a context, or a server that serves
                something else.
        """
        for label, path in self.paths.items():
            self._require_one(label, path)
        pupils = [label for label, resolved in self.job.runs.items() if resolved.takes_teacher]
        if all((self.output_dir / label / "history.json").is_file() for label in pupils):
            return  # nothing is left to be taught
        for label, path in self.paths.items():
            server = self.sections[label].server
            if server is not None and server.url is not None:
                with self.engines(label).on(path):
                    pass

    def take(self, label: str, path: str) -> None:
        """From now on, the model at `path` is the teacher that the run has made.

        Raises:
            UserError: as `require_fit`.
        """
        self.paths[label] = path
        self._require_one(label, path)

    def measure(self, measuring: Measuring, say: Console) -> None:
        """Evaluate every teacher that can be, into <output>/<label>/evaluation, as `measuring` does the others."""
        for label, section in self.sections.items():
            reason = self._why_unmeasured(label)
            if reason is not None:
                say.print(f"  {label} is not evaluated: {reason}", soft_wrap=True)
                continue
            job = self.job
            if section.server or section.device or section.device_map or section.revision:
                # Divergences would load it into this process whole, and at its newest revision.
                asked = job.recipe.evaluation.model_copy(update={"divergence": None})
                job = replace(job, recipe=job.recipe.model_copy(update={"evaluation": asked}))
            engines = self._engines_of_policy if self._in_engine_of_policy(label) else self.engines(label)
            own = Measuring(job, self.student, engines, measuring.base, self.workers)
            own.measure(label, self.paths[label], self.output_dir / label / "evaluation")

    def engines(self, label: str) -> Engines:
        """What lends the engine of a teacher with weights of its own: its server, or transformers where it lives."""
        if label not in self._engines:
            self._engines[label] = self._make_engines(label)
        return self._engines[label]

    def lend(self) -> Callable[[Any], Scorer]:
        """What makes the teacher of a trainer."""

        def make(trainer: Any) -> Scorer:
            from posttrain.rollouts.teacher import Routed

            found = {label: self._scorer(label, trainer) for label in self.sections}
            section = self.job.recipe.teacher
            if section is None or section.by is None:
                return found["teacher"]
            return Routed(dict(zip(section.several, found.values(), strict=True)), section.by)

        return make

    def close(self) -> None:
        """Stop what was started."""
        for engines in self._engines.values():
            engines.close()
        self._engines.clear()

    # ------------------------------------------------------------------ parts of the above

    @cached_property
    def _processing_class(self) -> Any:
        """The student's."""
        from posttrain.rollouts.tokens import load_processing_class

        model = self.job.recipe.model
        return load_processing_class(self.student, revision=model.revision if self.student == model.path else None)

    def _own_tokenizer(self, label: str) -> Any:
        """The one that renders its prompts; None where that is the student's."""
        from transformers import AutoTokenizer

        if self.sections[label].template != "teacher":
            return None
        return AutoTokenizer.from_pretrained(self.paths[label], revision=self._revision(label))

    def _revision(self, label: str) -> str | None:
        section, model = self.sections[label], self.job.recipe.model
        if section.is_student:
            return model.revision if self.student == model.path else None
        return section.revision

    def _prompt(self, label: str) -> Callable[[Row], Prompt] | None:
        """What it reads of a row; None where that is the row's own prompt."""
        from posttrain.rollouts.teacher import hint

        told = self.sections[label].hint
        return None if told is None else hint(told.text, role=told.role)

    def _length(self, label: str) -> int:
        """Tokens of the longest prompt and answer together as it reads them, and one more where it has to generate.

        Raises:
            UserError: the hint does not reach its prompts.
        """
        from posttrain.rollouts.tokens import encode

        longest = self._engines_of_policy.needed_length - 1
        prompt, tokenizer = self._prompt(label), self._own_tokenizer(label)
        if prompt is not None or tokenizer is not None:
            tokenizer = tokenizer or self._processing_class
            rows = self._rows[label]
            read = [encode(tokenizer, row["prompt"] if prompt is None else prompt(row)) for row in rows]
            if prompt is not None and read[0] == encode(tokenizer, rows[0]["prompt"]):
                raise UserError(
                    "The chat template leaves the teacher's hint out of its prompts: set hint.role to user, or choose "
                    "a model whose template renders system messages."
                )
            longest = max(longest, max(map(len, read)) + self.job.recipe.rollout.max_tokens)
        return longest + (self.sections[label].server is not None)

    def _require_one(self, label: str, path: str) -> None:
        from posttrain.rollouts.teacher import check_teacher
        from posttrain.rollouts.tokens import tokenizer_of

        section, rollout = self.sections[label], self.job.recipe.rollout
        pupils = [resolved.probe for resolved in self.job.runs.values() if resolved.takes_teacher]
        length = self._length(label)
        student = tokenizer_of(self._processing_class)
        tokenizer = check_teacher(
            path,
            student,
            length=length,
            mask_eos=all(getattr(config, "kd_mask_eos", False) for config in pupils),
            template=section.template,
            served=section.server is not None,
            temperature=rollout.temperature,
            revision=self._revision(label),
        )
        if section.template is not None and tokenizer.chat_template == student.chat_template:
            raise UserError(
                f"teacher.template has no effect on the teacher {path}, which has the student's chat template: remove "
                "it."
            )
        limit = section.vllm.max_model_len
        if limit is not None and limit < length:
            raise UserError(
                f"The longest prompt and answer need {length} tokens as the teacher reads them, but "
                f"teacher.vllm.max_model_len is {limit}: raise it, or lower rollout.max_tokens."
            )

    def _why_unmeasured(self, label: str) -> str | None:
        section, engine = self.sections[label], self.job.recipe.rollout.engine
        if section.base:
            return "it is the initial policy, base"
        if section.self:
            return "it is whatever policy is trained"
        if section.sharded:
            return "it exists in parts only, beside a trainer"
        if section.server is not None and engine != "vllm_server":
            return f"it is behind a vLLM server, and the others answer by the engine {engine}"
        if section.server is None and engine != "transformers" and not self._in_engine_of_policy(label):
            return f"the engine {engine} holds the policy, and takes other weights of its shape from a folder alone"
        return None

    def _in_engine_of_policy(self, label: str) -> bool:
        """Whether the run's vLLM engine can change its weights for the teacher's, as it does for trained policies."""
        if self.job.recipe.rollout.engine == "transformers" or self.sections[label].server is not None:
            return False
        path, revision = self.paths[label], self.job.recipe.model.revision
        return Path(path).is_dir() and _shapes(path, None) == _shapes(self.student, revision)

    def _make_engines(self, label: str) -> Engines:
        section, path = self.sections[label], self.paths[label]
        recipe = recipe_of_teacher(self.job.recipe, section)
        if section.server is not None:
            recipe = _recipe_of_server(self.job.recipe, section, path)
        log = self.output_dir / f"{label}.log"
        return _Placed(recipe, path, self.workers, log, section=section, length=self._length(label))

    def _scorer(self, label: str, trainer: Any) -> Scorer:
        """A teacher where the recipe wants it, for one trainer."""
        from transformers import ProcessorMixin

        from posttrain.rollouts.teacher import ModelTeacher, Reprompted
        from posttrain.seams.sharding import partitioned_teacher

        section, path = self.sections[label], self.paths[label]
        shared: dict[str, Any] = {"batch_size": section.batch_size or BATCH_SIZE}
        loaded = {**shared, "dtype": section.dtype or self.job.recipe.model.dtype, "revision": section.revision}
        scorer: Scorer
        if section.is_student:
            processor = trainer.processing_class if isinstance(trainer.processing_class, ProcessorMixin) else None
            scorer = ModelTeacher(trainer.model, base=section.base, processor=processor, **shared)
        elif section.server is not None:
            scorer = self._served(label)
        elif section.sharded:
            scorer = partitioned_teacher(path, trainer.accelerator, **loaded)
        else:
            scorer = ModelTeacher.load(path, device=section.device, device_map=section.device_map, **loaded)
        prompt, tokenizer = self._prompt(label), self._own_tokenizer(label)
        if prompt is None and tokenizer is None:
            return scorer
        student, options = trainer.processing_class, trainer.args.chat_template_kwargs
        return Reprompted(scorer, student, prompt, tokenizer=tokenizer, template_kwargs=options)

    def _served(self, label: str) -> Scorer:
        from transformers import AutoConfig

        from posttrain.rollouts.teacher import EngineTeacher

        path = self.paths[label]
        config: Any = AutoConfig.from_pretrained(path, revision=self.sections[label].revision).get_text_config()
        with self.engines(label).on(path) as engine:  # stays open until `close`
            return EngineTeacher(engine, vocabulary=config.vocab_size)


class _Placed(Engines):
    """Engines of a teacher: its server, or transformers on the devices that its section names."""

    def __init__(
        self, recipe: Recipe, path: str, workers: Workers, log: Path, *, section: Teacher, length: int
    ) -> None:
        super().__init__(recipe, path, [], workers, log)
        self.section = section
        self.needed_length = length

    def _transformers(self, path: str) -> Any:
        if self.section.device is None and self.section.device_map is None:
            return super()._transformers(path)
        from posttrain.rollouts.fingerprint import files_fingerprint
        from posttrain.rollouts.teacher import ModelTeacher
        from posttrain.rollouts.tokens import load_processing_class
        from posttrain.rollouts.transformers_engine import TransformersEngine

        model = self.recipe.model
        teacher = ModelTeacher.load(
            path,
            dtype=model.dtype,
            device=self.section.device,
            device_map=self.section.device_map,
            revision=model.revision,
        )
        processing_class = load_processing_class(path, revision=model.revision)
        engine = TransformersEngine(teacher.model, processing_class, batch_size=self.recipe.rollout.answers_per_part)
        engine.files = files_fingerprint(path)
        return engine


def _shapes(path: str, revision: str | None) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's weights by name, from its configuration."""
    import torch
    from transformers import AutoConfig

    from posttrain.rollouts.tokens import model_class

    config = AutoConfig.from_pretrained(path, revision=revision)
    with torch.device("meta"):
        model = model_class(path, revision=revision).from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
