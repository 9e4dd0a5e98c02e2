"""The job behind `posttrain run`: initial policy → pre-sampling → training → evaluation → report.

    <output>/recipe.yaml        the resolved recipe            <output>/provenance.json   versions, git, seeds, command
    <output>/store/             pre-sampled answers            <output>/<label>/evaluation/
    <output>/pairs/             preference pairs made of them  <output>/teacher/store/     the teacher's answers
    <output>/<label>/evaluation/further/<name>/     on further tasks
    <output>/<label>/model/     the trained policy             <output>/<label>/history.json   what training logged
    <output>/comparison.json    the numbers                    <output>/report.html

Labels are `base` (the initial policy) and the names of the methods. Every stage is reused when it is finished and
continued when it was interrupted, so the same command run again does only what is missing. All processes of a launch
run `run`; those other than the first share sampling and training and leave writing to it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from posttrain import atomic, rewards, tasks
from posttrain import recipe as recipes
from posttrain.errors import UserError
from posttrain.evaluation import divergence, further
from posttrain.evaluation.further import FurtherTask
from posttrain.launch import teaching
from posttrain.launch.engines import Engines, require_engine, require_images
from posttrain.launch.measuring import Measuring
from posttrain.launch.provenance import provenance
from posttrain.launch.resolve import Resolved, every_run, require_readable, resolve, trainer_config
from posttrain.launch.spawn import configuration
from posttrain.launch.workers import Workers, launched
from posttrain.recipe import Common, Lora, Recipe, Teacher, WarmStart
from posttrain.stages import Validation
from posttrain.versions import untested

BASE, TEACHER = "base", "teacher"

AnyRecipe = TypeVar("AnyRecipe", bound=Common)


@dataclass(frozen=True)
class Questions:
    """A task with its rows, and what decides whether an answer is correct."""

    task: tasks.BaseTask
    verifier: rewards.Verifier | None
    """None for preference data."""
    train_rows: list[tasks.Row]
    eval_rows: list[tasks.Row]
    """All that are held out."""


def questions(recipe: Common) -> Questions:
    """Load a recipe's task.

    Raises:
        UserError: it lacks rows, or columns that its verifier needs.
    """
    task = tasks.load(recipe.task.name, recipe.task.options)
    verifier = rewards.load(*task.verifier) if task.verifier is not None else None
    train_rows, eval_rows = task.rows("train"), task.rows("eval")
    if not train_rows or not eval_rows:
        raise UserError(
            f"The task '{task.name}' has {len(train_rows)} training and {len(eval_rows)} evaluation rows: both are "
            "needed; change its options."
        )
    return Questions(task, verifier, train_rows, eval_rows)


@dataclass(frozen=True)
class Job:
    """A checked recipe with everything that it names."""

    recipe: Recipe
    task: tasks.BaseTask
    verifier: rewards.Verifier | None
    """Decides what is correct; None for preference data."""
    train_rows: list[tasks.Row]
    eval_rows: list[tasks.Row]
    runs: dict[str, Resolved]
    """Every method to train, by label; baselines first, the main one last."""
    teacher: Resolved | None
    """How the teacher is trained, where the recipe makes and trains one."""
    further: dict[str, FurtherTask]
    """Other tasks that every policy is evaluated on, by name."""
    validation: Validation | None = None
    """How training rows were set aside, which the task does not give any more."""

    @property
    def makes_pairs(self) -> bool:
        """Whether preference pairs are made of pre-sampled answers: a method needs some, and the task brings none."""
        return not self.task.pairs and any(resolved.takes_pairs for resolved in self.runs.values())

    @property
    def presamples(self) -> bool:
        """Whether a store of pre-sampled answers is needed."""
        own = (resolved.takes_store or resolved.takes_answers == "policy" for resolved in self.runs.values())
        return self.makes_pairs or any(own)

    @property
    def presamples_teacher(self) -> bool:
        """Whether a store of the teacher's answers is needed."""
        return any(resolved.takes_answers == TEACHER for resolved in self.runs.values())

    def require_verifier(self) -> rewards.Verifier:
        """The verifier, where one is needed.

        Raises:
            UserError: the task has none.
        """
        if self.verifier is None:
            raise UserError(f"The task '{self.task.name}' has nothing that decides what is correct: take another task.")
        return self.verifier

    def engines(self, model: str, workers: Workers, log: Path) -> Engines:
        """The engines for a policy and those that are trained from it."""
        others = [(asked.rows, asked.max_tokens) for asked in self.further.values()]
        return Engines(self.recipe, model, [*self.train_rows, *self.eval_rows], workers, log, further=others)


def prepare(recipe: Recipe) -> Job:
    """Check everything that can be checked without weights.

    Raises:
        UserError: anything is wrong with the recipe, its task, its rewards, its teacher or its baselines.
    """
    runs = {label: resolve(other) for label, other in every_run(recipe).items()}
    static = next((label for label, resolved in runs.items() if resolved.takes_static), None)
    if static is not None:
        raise UserError(
            f"The run '{static}' learns from fixed rollouts, which stages make: write a recipe of stages, as "
            "`posttrain recipes show erpd/countdown` does."
        )
    return checked(recipe, runs)


def checked(recipe: Recipe, runs: dict[str, Resolved], loaded: Questions | None = None) -> Job:
    """The job of a recipe whose runs are resolved.

    Args:
        recipe: that is checked.
        runs: what is trained, by label; nothing where answers are drawn or judged alone.
        loaded: the task, where it is loaded already.

    Raises:
        UserError: as `prepare`.
    """
    teacher = teaching.resolve_teacher(recipe, runs)
    require_readable(recipe.model)
    loaded = loaded or questions(recipe)
    task, verifier, train_rows = loaded.task, loaded.verifier, loaded.train_rows
    eval_rows = tasks.choose(loaded.eval_rows, recipe.evaluation.prompts, seed=recipe.evaluation.seed)
    if verifier is not None:
        _require_columns(verifier, train_rows[0], task.name)
    if any(resolved.samples for resolved in runs.values()):
        functions = reward_functions(recipe, task)
        for reward in functions:
            if isinstance(reward, rewards.RewardFunction):
                _require_columns(reward.verifier, train_rows[0], task.name)
                _require_groups(reward.verifier, runs)
                _require_length(reward.verifier, runs)
        for resolved in runs.values():
            if hasattr(resolved.trainer_class, "require_rewards"):
                resolved.trainer_class.require_rewards(resolved.probe, functions)
    teaching.require_rows(recipe, train_rows, task)
    others = further.prepare(recipe)
    for asked in (task, *(other.task for other in others.values())):
        require_images(recipe, asked)
    require_engine(recipe)
    _require_text(recipe, task, runs)
    learned = _require_learnable(recipe, task, others)
    further.require_unseen(others, {"task": train_rows, **learned})
    job = Job(recipe, task, verifier, train_rows, eval_rows, runs, teacher, others)
    if job.presamples or job.presamples_teacher or (recipe.evaluation.calibration is not None and not task.pairs):
        job.require_verifier()
    _require_answers(job)
    if recipe.evaluation.divergence is not None:
        divergence.check(recipe.evaluation.divergence)
    return job


def _require_text(recipe: Recipe, task: tasks.BaseTask, runs: Mapping[str, Resolved]) -> None:
    """Refuse what learns from, or measures on, tokens alone where prompts hold images.

    Raises:
        UserError: a method or a measure that the recipe asks for does.
    """
    if not task.images:
        return
    for label, resolved in runs.items():
        if resolved.takes_pairs or resolved.takes_static:
            what = "pairs of tokens" if resolved.takes_pairs else "stored tokens"
            raise UserError(
                f"The run '{label}' learns from {what} alone, and prompts of the task '{task.name}' hold images: take "
                "another method."
            )
    for measure in ("divergence", "calibration"):
        if getattr(recipe.evaluation, measure) is not None:
            raise UserError(
                f"evaluation.{measure} reads tokens alone, and prompts of the task '{task.name}' hold images: leave it "
                "out."
            )


def _require_learnable(
    recipe: Recipe, task: tasks.BaseTask, others: dict[str, FurtherTask]
) -> dict[str, list[tasks.Row]]:
    """The rows of the tasks that warm starts learn beside the run's own, by the key that names them.

    Raises:
        UserError: a warm start cannot learn them, or its model could not read a further task.
    """
    learned = {}
    starts = {"model": recipe.model.warm_start, "teacher": recipe.teacher.warm_start if recipe.teacher else None}
    for section, settings in starts.items():
        if settings is None:
            continue
        from posttrain.launch.warm_start import alphabet_of, demonstrated

        several = demonstrated(settings, task)
        further.require_readable(others, alphabet_of(several), task)
        learned[f"{section}.warm_start.also"] = [row for other in several[1:] for row in other.rows("train")]
    return learned


def _require_answers(job: Job) -> None:
    """Refuse answers that cannot be drawn, or that no run could be fine-tuned on.

    Raises:
        UserError: the prompts hold images, or a vLLM engine would have to serve policy and teacher.
    """
    label = next((label for label, resolved in job.runs.items() if resolved.takes_answers), None)
    if label is not None and job.task.images:
        raise UserError(
            f"The run '{label}' is fine-tuned on tokens alone, and prompts of the task '{job.task.name}' hold images: "
            "take another method."
        )
    served = job.recipe.teacher is not None and job.recipe.teacher.server is not None
    if job.presamples_teacher and job.recipe.rollout.engine != "transformers" and not served:
        raise UserError(
            f"answers_of = teacher draws answers of the teacher, and {job.recipe.rollout.engine} serves the policy: "
            "give the teacher a server (teacher.server), or set rollout.engine=transformers."
        )


def _require_groups(verifier: rewards.Verifier, runs: Mapping[str, Resolved]) -> None:
    """Refuse a reward that compares more or fewer answers than a run draws to a prompt.

    Raises:
        UserError: so it does.
    """
    for label, resolved in runs.items():
        drawn = getattr(resolved.probe, "num_generations", None)
        if verifier.group_size > 1 and drawn is not None and drawn != verifier.group_size:
            raise UserError(
                f"The reward '{verifier.column}' compares {verifier.group_size} answers to a prompt (group_size), and "
                f"the run '{label}' draws {drawn} (num_generations): make the two agree."
            )


def _require_length(verifier: rewards.Verifier, runs: Mapping[str, Resolved]) -> None:
    """Refuse a reward for lengths that no answer of a run reaches.

    Raises:
        UserError: so it is.
    """
    longest = verifier.options.max_tokens if verifier.name == "length" else None
    for label, resolved in runs.items():
        drawn = getattr(resolved.probe, "max_completion_length", None)
        if longest is not None and drawn is not None and longest > drawn:
            raise UserError(
                f"The reward '{verifier.column}' is for answers of up to {longest} tokens (max_tokens), and those of "
                f"the run '{label}' end at {drawn} (rollout.max_tokens): make the two agree."
            )


def _require_columns(verifier: rewards.Verifier, row: tasks.Row, task: str) -> None:
    missing = [column for column in verifier.requires if column not in row]
    if missing:
        raise UserError(
            f"The task '{task}' does not support the reward '{verifier.name}': its rows have no '{missing[0]}' (they "
            f"have {', '.join(sorted(row))})."
        )


def reward_functions(recipe: Recipe, task: tasks.BaseTask) -> list[Callable[..., list[float | None]]]:
    """The rewards of a recipe in TRL's form; the task's own verifier when the recipe names none.

    Raises:
        UserError: neither names one, or it cannot be loaded.
    """
    if not recipe.rewards:
        if task.verifier is None:
            raise UserError(
                f"The task '{task.name}' has nothing that decides what is correct, so a method that samples needs "
                "rewards: name them in the recipe."
            )
        return [rewards.RewardFunction(rewards.load(*task.verifier))]
    found: list[Callable[..., list[float | None]]] = []
    for reward in recipe.rewards:
        if reward.function is not None:
            found.append(rewards.load_function(reward.function))
        elif reward.name is not None:
            options = reward.options
            if not options and task.verifier is not None and reward.name == task.verifier[0]:
                options = task.verifier[1]
            verifier = rewards.load(reward.name, options)
            failures = rewards.MAX_FAILURES if reward.max_failures is None else reward.max_failures
            patience = rewards.PATIENCE if reward.patience is None else reward.patience
            found.append(rewards.RewardFunction(verifier, max_failures=failures, patience=patience))
    return found


def started(recipe: AnyRecipe, world: int) -> AnyRecipe:
    """The recipe with the number of processes that a launcher has started, where it leaves that open (1).

    Raises:
        UserError: it asks for another number.
    """
    if world != recipe.launch.processes != 1:
        raise UserError(
            f"The recipe asks for {recipe.launch.processes} processes (launch.processes), but {world} were started: "
            "make the two agree."
        )
    launch = recipe.launch.model_copy(update={"processes": world})
    return recipe.model_copy(update={"launch": launch})


def _begin(recipe: Recipe) -> Job:
    """What every verb does first."""
    begin(recipe)
    return prepare(recipe)


def begin(recipe: Common) -> None:
    """Quieten the libraries, warn of untested ones, choose the threads.

    One thread on a CPU for models that are made here: they are too small for two to help.
    """
    import torch

    quiet_libraries()
    if Workers().first:
        for sentence in untested():
            Console(stderr=True, highlight=False).print(f"[yellow]warning:[/] {sentence}", soft_wrap=True)
    if recipe.model.warm_start is not None and "OMP_NUM_THREADS" not in os.environ and not torch.cuda.is_available():
        torch.set_num_threads(1)


def run(recipe: Recipe, output_dir: Path, *, resume: bool, command: str) -> None:
    """Run a recipe to its report.

    Args:
        output_dir: of the run; made when it does not exist.
        resume: continue an unfinished run in `output_dir`.
        command: what the user typed, for the report.

    Raises:
        UserError: the recipe is wrong, or the folder holds another or an unfinished run.
        KeyboardInterrupt: the user stopped training; a checkpoint is there.
    """
    workers = Workers()
    recipe = started(recipe, workers.world)
    job = _begin(recipe)
    if workers.first:
        _claim(output_dir, recipe, resume)
        atomic.write_json(output_dir / "provenance.json", provenance(recipe, command, workers.world))
    say = Console(stderr=True, quiet=not workers.first, highlight=False)
    further_stages = (job.presamples, job.makes_pairs, recipe.teacher is not None, job.presamples_teacher)
    stages = Headings(say, 3 + 2 * len(job.runs) + sum(further_stages))

    stages.begin("initial policy")
    model = initial_policy(job, workers)
    say.print(f"  {model}", soft_wrap=True)
    engines = job.engines(model, workers, log=output_dir / "server.log")
    teachers = teaching.Teachers(job, engines, workers, output_dir)
    try:
        _train_and_measure(job, model, engines, teachers, stages, say, output_dir, workers)
    finally:
        teachers.close()
        engines.close()
    stages.begin("report")
    if workers.first:
        report(job, output_dir, command)
    workers.barrier()


def _train_and_measure(
    job: Job,
    model: str,
    engines: Engines,
    teachers: teaching.Teachers,
    stages: Headings,
    say: Console,
    output_dir: Path,
    workers: Workers,
) -> None:
    """Everything between the initial policy and the report."""
    measuring = Measuring(job, model, engines, output_dir / BASE / "evaluation", workers)
    teachers.require_fit()  # before anything slow
    stages.begin(f"evaluate {BASE}")
    measuring.measure(BASE, model, output_dir / BASE / "evaluation")
    store, pairs = None, None
    if job.presamples:
        stages.begin("presample")
        store = presample_policy(job, model, engines, output_dir / "store", workers)
        if any(resolved.takes_store for resolved in job.runs.values()):
            counts = store.counts
            say.print(
                f"  {counts['prompts']} prompts: {counts['explore']} to explore, {counts['pef']} near-perfect, "
                f"{counts['dropped']} dropped; {counts['failed_checks']} failed the fresh check; "
                f"{counts['stored_answers']} answers stored",
                soft_wrap=True,
            )
        for label, resolved in job.runs.items():
            require_store(resolved, store, output_dir / label)  # now, and not when this run's turn comes
    if store is not None and job.makes_pairs:
        stages.begin("pairs")
        pairs = build_pairs(job, model, store, output_dir / "pairs", workers)
    if job.recipe.teacher is not None:
        stages.begin(TEACHER)
        if job.recipe.teacher.warm_start is not None:
            made = _make_teacher(job, job.recipe.teacher, engines, output_dir / TEACHER, workers)
            teachers.take(TEACHER, made)
        teachers.measure(measuring, say)
    taught = None
    if job.presamples_teacher:
        stages.begin(f"presample {TEACHER}")
        taught = presample_teacher(job, teachers, output_dir / TEACHER, workers)
    answers = choose_answers(job, model, {"policy": store, TEACHER: taught})
    for label, chosen in answers.items():
        say.print(f"  {label}: {chosen}", soft_wrap=True)
    data = Data(store, pairs, teachers, answers)
    for label, resolved in job.runs.items():
        stages.begin(f"train {label}")
        trained = train(job, resolved, model, engines, data, output_dir / label, workers)
        stages.begin(f"evaluate {label}")
        measuring.measure(label, str(trained), output_dir / label / "evaluation", implied=implied(resolved.probe))


def require_store(resolved: Resolved, store: Any, folder: Path) -> None:
    """Refuse a store that a method cannot rehearse from, where it wants to.

    Raises:
        UserError: so it is.
    """
    if resolved.takes_store:
        resolved.trainer_class.require_store(trainer_config(resolved, folder / "checkpoints"), store)


def run_presample(recipe: Recipe, output_dir: Path) -> Path:
    """Phase 1 alone: the store of a recipe's initial policy, in `output_dir`.

    Raises:
        UserError: the recipe is wrong, or the folder holds another store.
    """
    workers = Workers()
    job = _begin(recipe)
    model = initial_policy(job, workers)
    engines = job.engines(model, workers, log=output_dir.parent / "server.log")
    try:
        store = presample_policy(job, model, engines, output_dir, workers)
    finally:
        engines.close()
    return Path(store.path)


def run_pairs(recipe: Recipe, store_dir: Path, output_dir: Path) -> Path:
    """Preference pairs of a recipe's initial policy: its store, made when it is not there, and the pairs.

    Raises:
        UserError: the recipe is wrong, no pair can be made, or a folder holds something else.
    """
    workers = Workers()
    job = _begin(recipe)
    model = initial_policy(job, workers)
    engines = job.engines(model, workers, log=store_dir.parent / "server.log")
    try:
        store = presample_policy(job, model, engines, store_dir, workers)
    finally:
        engines.close()
    return Path(build_pairs(job, model, store, output_dir, workers).path)


def run_evaluate(recipe: Recipe, model: str | None, output_dir: Path) -> None:
    """Evaluate a policy on a recipe's task: the initial one, or the model at `model` beside it when given.

    Raises:
        UserError: the recipe is wrong, or the folder holds an evaluation of something else.
    """
    from posttrain.evaluation import evaluate, measures
    from posttrain.evaluation.compare import compare
    from posttrain.evaluation.summary import further_tables, table

    workers = Workers()
    job = _begin(recipe)
    label = BASE if model is None else Path(model).name
    if model is not None and label == "model":  # as `run` lays them out: <label>/model
        label = Path(model).resolve().parent.name
    # Divergence and calibration compare with the initial policy's own evaluation, which only a run has at hand.
    asked = recipe.evaluation.model_copy(update={"divergence": None, "calibration": None})
    job = replace(job, recipe=recipe.model_copy(update={"evaluation": asked}))
    policy = model or initial_policy(job, workers)
    engines = job.engines(policy, workers, log=output_dir / "server.log")
    try:
        Measuring(job, policy, engines, output_dir, workers).measure(label, policy, output_dir)
    finally:
        engines.close()
    if workers.first:
        result = evaluate.load(output_dir)
        console = Console(highlight=False)
        comparison = compare(
            {label: result},
            base=label,
            measures={label: measures.load(output_dir)},
            further={label: further.load(output_dir, list(job.further))},
        )
        for shown in (table(comparison), *further_tables(comparison)):
            console.print(shown)
            console.print()
        console.print(f"evaluation: {output_dir}", soft_wrap=True)


def initial_policy(job: Job, workers: Workers) -> str:
    """Path or hub name of the initial policy; a warm-started one is made by the first process."""
    model = job.recipe.model
    if model.path is not None:
        return model.path
    return warm_started(job, model.warm_start or WarmStart(), workers)


def warm_started(job: Job, settings: WarmStart, workers: Workers) -> str:
    """Folder of a model that is made from nothing on a job's task, by the first process."""
    from posttrain.launch.warm_start import warm_start

    recipe = job.recipe
    if workers.world > 1 and workers.first:
        content = {"warm_start": settings, "task": recipe.task, "validation": job.validation}
        shown = {name: section.model_dump(mode="json") for name, section in content.items() if section is not None}
        _alone(["warm-start", json.dumps({**shown, "dtype": recipe.model.dtype})])
    workers.barrier()
    return str(warm_start(settings, job.task, dtype=recipe.model.dtype))


def _alone(arguments: Sequence[str]) -> None:
    """Make the warm start in a process of its own: a trainer that saw this launch would wait for the others."""
    import subprocess

    environment = {name: value for name, value in os.environ.items() if not launched(name)}
    subprocess.run(  # noqa: S603 - this very module, no shell
        [sys.executable, "-m", "posttrain.launch.alone", *arguments], check=True, env=environment
    )


def presample_policy(job: Job, model: str, engines: Engines, folder: Path, workers: Workers) -> Any:
    """The store of the initial policy (`posttrain.rollouts.store.Store`)."""
    from posttrain.rollouts.presample import presample
    from posttrain.rollouts.store import Store

    recipe = job.recipe
    finished = (folder / "manifest.json").is_file()
    if finished:
        Store.open(folder).require_files(model)
    with engines.on(model, finished=finished) as engine:
        return presample(
            engine,
            job.train_rows,
            job.require_verifier(),
            recipe.presample,
            max_tokens=recipe.rollout.max_tokens,
            training_temperature=recipe.rollout.temperature,
            output_dir=folder,
            batch_size=recipe.rollout.answers_per_part,
            worker=(workers.rank, workers.world),
            barrier=workers.barrier,
        )


def implied(config: Any) -> Any:
    """How a method's implicit rewards follow from log-ratios; None where its config has no `score_beta`."""
    from posttrain.evaluation.calibration import Implied

    beta = getattr(config, "score_beta", None)
    return None if beta is None else Implied(config.divergence, beta, config.alpha, config.edge)


@dataclass(frozen=True)
class Data:
    """What some methods learn from beside prompts: pre-sampled answers, pairs made of them, a teacher."""

    store: Any = None
    """A `posttrain.rollouts.store.Store`."""
    pairs: Any = None
    """A `posttrain.rollouts.pairs.PairSet`."""
    teachers: teaching.Teachers | None = None
    answers: Mapping[str, Any] = field(default_factory=dict)
    """Verified answers by the label of the run that learns them (`posttrain.rollouts.answers.AnswerSet`)."""
    rollouts: Any = None
    """A `posttrain.rollouts.static.StaticSet`."""


def train(
    job: Job,
    resolved: Resolved,
    model: str,
    engines: Engines,
    data: Data,
    folder: Path,
    workers: Workers,
    label: str | None = None,
) -> Path:
    """Train one method; returns the folder of the trained policy, at once when it is finished already.

    Args:
        job: of the run.
        resolved: the method.
        model: path or hub name of the policy that training starts from.
        engines: lends the engine that samples.
        data: what the method learns from beside prompts.
        folder: of the run; `model`, `history.json` and `checkpoints` are written below it.
        workers: the processes of the launch; all make the same calls.
        label: how the run is called on the terminal; default as its folder.

    Raises:
        EngineError: the engine failed; a checkpoint of what had been trained until then is there.
        KeyboardInterrupt: the user stopped; so it is then.
    """
    finished = folder / "model"
    if (folder / "history.json").is_file():
        return finished
    from posttrain.rollouts.engine import EngineError
    from posttrain.seams.callbacks import CompleteCheckpoints, StopOnInterrupt, quiet
    from posttrain.seams.sharding import RequireSharding, release

    stop = StopOnInterrupt()
    trainer = _trainer(
        job,
        resolved,
        engines,
        data,
        model=model,
        args=trainer_config(resolved, folder / "checkpoints"),
        callbacks=[RequireSharding(_asked(resolved.recipe)), stop, CompleteCheckpoints()],
    )
    shown: tuple[str, ...] = ("reward", "entropy", "completions/mean_length", "kl", "pef/divergence")
    if resolved.takes_static:
        shown = ("loss", "kl/forward", "entropy")
    elif resolved.takes_pairs:
        shown = ("loss", "rewards/accuracies", "rewards/margins", "entropy")
    elif resolved.takes_answers:
        shown = ("loss", "mean_token_accuracy", "entropy")
    quiet(trainer, f"train {label or folder.name}", show=shown)
    checkpoint = CompleteCheckpoints.latest(folder / "checkpoints")
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except EngineError as error:
        failure = EngineError(f"{error} {CompleteCheckpoints.save(trainer)} Continue with --resume.")
        failure.told = error.told
        raise failure from error
    if stop.interrupted:
        raise KeyboardInterrupt
    trainer.save_model(str(finished))
    if workers.first:
        atomic.write_json(folder / "history.json", trainer.state.log_history)
    release(trainer)  # the next one needs the memory
    workers.barrier()
    return finished


def _trainer(job: Job, resolved: Resolved, engines: Engines, data: Data, **options: Any) -> Any:
    """The trainer of one method, with what it learns from."""
    from datasets import Dataset
    from datasets.table import InMemoryTable

    recipe = resolved.recipe
    if job.task.images and "ddp_find_unused_parameters" not in recipe.method.args:
        options["args"].ddp_find_unused_parameters = None  # vision towers have some, which TRL then looks for
    if recipe.model.lora is not None:
        options["peft_config"] = _lora(recipe.model.lora)
    if resolved.takes_static:
        return resolved.trainer_class(train_dataset=Dataset(InMemoryTable(data.rollouts.table)), **options)
    if resolved.takes_pairs:
        pairs = _dataset(job.train_rows) if job.task.pairs else _token_ids(data.pairs.file)
        return resolved.trainer_class(train_dataset=pairs, **options)
    if resolved.takes_answers:
        learned = Dataset(InMemoryTable(data.answers[recipe.method.label].table))
        return resolved.trainer_class(train_dataset=learned, **options)
    if resolved.takes_store:
        options["store"] = data.store
    if resolved.takes_teacher and data.teachers is not None:
        options["teacher"] = data.teachers.lend()
    return resolved.trainer_class(
        reward_funcs=reward_functions(recipe, job.task),
        train_dataset=_dataset(job.train_rows),
        rollouts=engines.for_training(options["model"]),
        sampler_gap_limit=recipe.rollout.sampler_gap_limit,
        lora_sync=recipe.rollout.lora_sync,
        **options,
    )


def _dataset(rows: Sequence[tasks.Row]) -> Any:
    """Task rows as trainers take them: images as compressed pixels, decoded whenever a row is read."""
    from datasets import Dataset, Image, List

    if not any(row.get("images") for row in rows):
        return Dataset.from_list(list(rows))

    def stored(image: Any) -> dict[str, Any]:
        # A copy has no file behind it, so its pixels are kept: not compressed with a loss again, nor turned by EXIF.
        encoded: dict[str, Any] = Image().encode_example(image.copy())
        return encoded

    kept = [{**row, "images": [stored(image) for image in row.get("images") or ()]} for row in rows]
    return Dataset.from_list(kept).cast_column("images", List(Image()))


def _make_teacher(job: Job, teacher: Teacher, engines: Engines, folder: Path, workers: Workers) -> str:
    """Folder of a teacher from nothing: warm-started, and trained by its method where it has one."""
    own = replace(job, recipe=teaching.recipe_of_teacher(job.recipe, teacher))
    initial = initial_policy(own, workers)
    if job.teacher is None:
        return initial
    return str(train(own, job.teacher, initial, engines, Data(), folder, workers))


def presample_teacher(job: Job, teachers: teaching.Teachers, folder: Path, workers: Workers) -> Any:
    """The store of the teacher's answers (`posttrain.rollouts.store.Store`), in its folder; no fresh ones are drawn.

    The teacher has an engine of its own, because neither its shape nor its dtype need be the policy's.
    """
    drawn = job.recipe.presample
    # More than can be correct: no prompt is near-perfect, so nothing is drawn again that nobody would read.
    drawn = drawn.model_copy(update={"pef_threshold": drawn.samples_per_prompt + 1})
    own = replace(job, recipe=job.recipe.model_copy(update={"presample": drawn}))
    return presample_policy(own, teachers.paths[TEACHER], teachers.engines(TEACHER), folder / "store", workers)


def choose_answers(job: Job, model: str, stores: Mapping[str, Any]) -> dict[str, Any]:
    """The verified answers of every run that is fine-tuned on some, by label.

    Args:
        model: path or hub name of the policy, whose tokenizer renders the prompts.
        stores: by whose answers they hold, teacher or policy.

    Raises:
        UserError: a store holds none for a run.
    """
    from transformers import AutoTokenizer

    from posttrain.rollouts import answers

    learners = {label: resolved for label, resolved in job.runs.items() if resolved.takes_answers}
    if not learners:
        return {}
    tokenizer = AutoTokenizer.from_pretrained(
        model, revision=job.recipe.model.revision if model == job.recipe.model.path else None
    )
    return {
        label: answers.from_store(
            stores[str(resolved.takes_answers)],
            job.train_rows,
            tokenizer,
            keep_repeated=resolved.probe.repeated == "keep",
            per_prompt=resolved.probe.per_prompt,
            max_length=resolved.probe.max_length,
            seed=resolved.recipe.seed,
        )
        for label, resolved in learners.items()
    }


def _token_ids(file: Path) -> Any:
    """The pairs of a Parquet file as the token ids that were sampled, in memory."""
    import pyarrow.parquet as pq
    from datasets import Dataset
    from datasets.table import InMemoryTable

    return Dataset(InMemoryTable(pq.read_table(file, columns=["prompt_ids", "chosen_ids", "rejected_ids"])))


def build_pairs(job: Job, model: str, store: Any, folder: Path, workers: Workers) -> Any:
    """Preference pairs of the store's answers (`posttrain.rollouts.pairs.PairSet`); made by the first process."""
    from transformers import AutoTokenizer

    from posttrain.rollouts import pairs

    tokenizer = AutoTokenizer.from_pretrained(
        model, revision=job.recipe.model.revision if model == job.recipe.model.path else None
    )

    def make() -> None:
        made = pairs.build(store, job.train_rows, tokenizer, job.recipe.pairs, output_dir=folder)
        Console(stderr=True, highlight=False).print(pairs.report(made.counts))

    workers.share(make)
    return pairs.build(store, job.train_rows, tokenizer, job.recipe.pairs, output_dir=folder)


def _asked(recipe: Recipe) -> str | None:
    """How the recipe wants the model split; None when it leaves that to whoever launches it."""
    chosen = configuration(recipe) if recipe.launch.config is not None else None
    return chosen.kind if chosen is not None else None


def _lora(lora: Lora) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )


def report(job: Job, output_dir: Path, command: str) -> None:
    """Compare what was evaluated: `comparison.json`, `report.html` and a table on the terminal."""
    measured = [label for label in job.recipe.teachers if (output_dir / label / "evaluation/evaluation.json").is_file()]
    folders = {label: output_dir / label / "evaluation" for label in (BASE, *measured, *job.runs)}
    present(
        job.recipe,
        folders,
        output_dir,
        command,
        title=f"{job.recipe.method.name} · {job.recipe.name}",
        histories={label: output_dir / label / "history.json" for label in job.runs},
        curves=curves_of(job.runs.values()),
        settings=job.recipe.cells,
    )


def comparison_of(
    folders: Mapping[str, Path], others: Iterable[str], settings: Mapping[str, Mapping[str, Any]] | None = None
) -> Any:
    """The comparison (`posttrain.evaluation.compare.Comparison`) of evaluations by label, the base first.

    Args:
        folders: of the evaluations.
        others: names of further tasks.
        settings: what a sweep set, by label.
    """
    from posttrain.evaluation import evaluate, measures
    from posttrain.evaluation.compare import compare

    return compare(
        {label: evaluate.load(folder) for label, folder in folders.items()},
        base=next(iter(folders)),
        measures={label: measures.load(folder) for label, folder in folders.items()},
        settings=settings,
        further={label: further.load(folder, list(others)) for label, folder in folders.items()},
    )


def show(comparison: Any) -> None:
    """Print the tables of a comparison."""
    from posttrain.evaluation import summary

    console = _wide_console()
    for shown in (summary.table(comparison), *summary.further_tables(comparison)):
        console.print()
        console.print(shown)


def _wide_console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 100)  # what a table of many runs needs; a file has no edge
    return console


def present(
    recipe: Common,
    folders: Mapping[str, Path],
    output_dir: Path,
    command: str,
    *,
    title: str,
    histories: Mapping[str, Path],
    curves: Mapping[str, str],
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Write `comparison.json` and `report.html`, and print the comparison.

    Args:
        recipe: of the run.
        folders: evaluations by label, the base first.
        output_dir: of the run.
        command: what the user typed.
        title: heading of the page.
        histories: what training logged, by label.
        curves: titles of the metrics that trainers want drawn.
        settings: what a sweep set, by label.
        notes: sentences on the run itself.
    """
    from posttrain.evaluation import summary, wording
    from posttrain.evaluation.report import write_report
    from posttrain.evaluation.sweep import orderings

    comparison = comparison_of(folders, recipe.evaluation.further, settings)
    atomic.write_text(output_dir / "comparison.json", summary.to_json(comparison))
    write_report(
        comparison,
        output_dir / "report.html",
        title=title,
        recipe_yaml=recipe.to_yaml(),
        provenance=json.loads((output_dir / "provenance.json").read_text(encoding="utf-8")),
        histories={label: json.loads(file.read_text(encoding="utf-8")) for label, file in histories.items()},
        curves=curves,
        command=command,
        notes=notes,
    )
    show(comparison)
    console = _wide_console()
    for sentence in (*notes, *summary.verdict(comparison)):
        console.print(f"- {sentence}", markup=False, soft_wrap=True)
    for one in orderings(comparison):
        where = f" at {wording.in_words(one.at)}" if one.at else ""
        console.print(f"- {wording.name_of(one.metric)}{where}: {one.words}", markup=False, soft_wrap=True)
    console.print(f"report: {output_dir / 'report.html'}", soft_wrap=True)


def curves_of(runs: Iterable[Resolved]) -> dict[str, str]:
    """The logged metrics that trainers want drawn beside those of all methods, with their titles (`curves`)."""
    named = [getattr(resolved.trainer_class, "curves", {}) for resolved in runs]
    return {metric: title for curves in named for metric, title in curves.items()}


class Headings:
    """Headings `[2/8] presample`, so that one always knows where a run is."""

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total, self.done = console, total, 0

    def begin(self, name: str) -> None:
        self.done += 1
        self.console.print(f"[bold]\\[{self.done}/{self.total}] {name}[/bold]")


def _claim(output_dir: Path, recipe: Recipe, resume: bool) -> None:
    """Make the folder this recipe's, or refuse it.

    Raises:
        UserError: it holds a run of another recipe, or an unfinished run and `resume` was not asked for.
    """
    marker = output_dir / "recipe.yaml"
    if not marker.is_file():
        if output_dir.is_dir() and {entry.name for entry in output_dir.iterdir()} - {"store"}:
            raise UserError(f"{output_dir} is not empty and holds no run: choose another --output-dir.")
        atomic.write_text(marker, recipe.to_yaml())
        return
    found = recipes.validate(recipes.parse_value(marker.read_text(encoding="utf-8")), str(marker))
    if not isinstance(found, Recipe):
        raise UserError(f"{output_dir} holds a run of a recipe of stages: choose another --output-dir.")
    difference = atomic.first_difference(found.model_dump(mode="json"), recipe.model_dump(mode="json"))
    if difference is not None:
        raise UserError(f"{output_dir} holds a run of another recipe ({difference}): choose another --output-dir.")
    if not resume and not (output_dir / "report.html").is_file():
        raise UserError(f"{output_dir} holds an unfinished run: add --resume to continue it, or choose another folder.")


def quiet_libraries() -> None:
    """Our own progress replaces the libraries' bars and advice."""
    import logging
    import warnings

    import datasets
    import torch
    import transformers

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what DeepSpeed finds out too, and warns about

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="(transformers|trl|torch|accelerate)")
