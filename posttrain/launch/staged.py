"""The job behind `posttrain run` of a recipe of stages: the graph is planned, then worked through node by node.

    <output>/recipe.yaml                 the latest recipe         <output>/plan.json    its nodes, with their keys
    <output>/stages/<name>-<key>/        one output each, with a manifest (`posttrain.launch.manifest`)
    <output>/comparison.json             the report, as that of a plain run; comparison-<name>.json of an evaluate stage

In an output: `model/` a policy (`whole/` beside it, adapters merged into their base, which is what other stages start
from), `history.json` what training logged, `store/`, `pairs/`, `evaluation/`.

A key holds what a step really depends on. Training depends on its arguments (the trainer's defaults written out), the
task's rows, rewards and rollouts where it samples, dtype, LoRA, and how many processes share it (`launch.processes` and
`launch.config`, which change the numbers); not on evaluation, engines' memory or servers. Sampling before training and
evaluations give the same on any number of processes, so `launch` is no part of them. Names are no part of any key.

A recipe may be edited between two runs in one folder: what has kept its key is reused, and nothing is deleted.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from posttrain import atomic, tasks
from posttrain import recipe as recipes
from posttrain.errors import UserError, did_you_mean
from posttrain.launch import manifest, merging, pipeline, teaching
from posttrain.launch.engines import Engines
from posttrain.launch.measuring import Measuring
from posttrain.launch.pipeline import Data, Job, Questions
from posttrain.launch.provenance import provenance
from posttrain.launch.resolve import Resolved, resolve
from posttrain.launch.set_aside import set_aside
from posttrain.launch.workers import Workers
from posttrain.objectives.signals import PAIRS
from posttrain.recipe import WarmStart
from posttrain.rollouts.fingerprint import files_fingerprint
from posttrain.stages import BASE, Evaluated, Gate, Merged, Node, Presampled, Scored, StagedRecipe, Trained

_OF_THE_MACHINE = ("use_cpu", "bf16", "fp16", "gradient_checkpointing", "dataloader_pin_memory", "model_init_kwargs")
"""Trainer arguments that follow from the machine, or are said elsewhere in a key."""

_PLACES = ("device", "device_map", "sharded", "server", "vllm", "batch_size", "stage")
"""What a teacher's section says about where it is, or names only."""


@dataclass(frozen=True)
class Work:
    """A node that has been checked.

    Attributes:
        node: of the recipe's graph.
        job: what it takes to do it; its policy is still to be made, and its origin stands for it.
        settings: what its output depends on beside its inputs.
        key: of its output.
    """

    node: Node
    job: Job
    settings: dict[str, Any]
    key: str

    @property
    def resolved(self) -> Resolved | None:
        """The method, where it trains one."""
        return next(iter(self.job.runs.values()), None)


@dataclass(frozen=True)
class Plan:
    """All nodes of a recipe, in the order in which they are done."""

    recipe: StagedRecipe
    works: dict[str, Work]
    questions: Questions

    def find(self, name: str, *, last: bool) -> str:
        """The node that a user means: by its own name, or by its stage, in the first or the last round.

        Raises:
            UserError: there is none.
        """
        if name in self.works and name != BASE:
            return name
        found = [work.node.name for work in self.works.values() if work.node.label == name and name]
        if not found:
            known = {*self.works, *self.recipe.stages} - {BASE}
            raise UserError(f"The recipe has no stage '{name}'{did_you_mean(name, known)}")
        return found[-1 if last else 0]

    def needed(self, name: str | None) -> list[str]:
        """The nodes that one needs, itself included; all of them for None."""
        if name is None:
            return list(self.works)
        wanted, needed = [name], set[str]()
        while wanted:
            node = self.works[wanted.pop()].node
            if node.name not in needed:
                needed.add(node.name)
                wanted += node.inputs.values()
                wanted += [
                    one for gate in self.recipe.gates if gate.round < node.round for one in (gate.policy, gate.next)
                ]
        return [name for name in self.works if name in needed]

    def dependants(self, name: str) -> list[str]:
        """A node and all that depends on it."""
        found = [name]
        for other, work in self.works.items():
            if set(work.node.inputs.values()) & set(found):
                found.append(other)
        return found


def plan(recipe: StagedRecipe) -> Plan:
    """Check every stage, and find the keys of all outputs, before any weights are read.

    Raises:
        UserError: a stage cannot work.
    """
    loaded = pipeline.questions(recipe)
    rows: list[tasks.Row] = []
    if recipe.validation is not None:
        task, rows = set_aside(loaded.task, recipe.validation)
        loaded = replace(loaded, task=task, train_rows=task.rows("train"))
    works: dict[str, Work] = {}
    jobs: dict[str, Job] = {}
    for node in recipe.nodes.values():
        _require_engine(recipe, node)
        shared = json.dumps([node.step, node.origin, node.asked.model_dump() if node.asked is not None else None])
        if node.asked is not None and shared in jobs:  # one job serves the evaluations of all policies
            job = jobs[shared]
        else:
            asked = loaded
            if node.step == "validate":
                asked = replace(loaded, eval_rows=rows)
            elif isinstance(node.stage, Presampled) and node.stage.prompts == "validation":
                asked = replace(loaded, train_rows=rows)
            job = _checked(recipe, node, asked)
            jobs[shared] = job
        settings = json.loads(json.dumps(_SETTINGS[node.step](recipe, node, job), default=str))
        inputs = {part: works[name].key for part, name in node.inputs.items()}
        works[node.name] = Work(node, job, settings, manifest.key_of(node.step, settings, inputs))
    return Plan(recipe, works, loaded)


def _require_engine(recipe: StagedRecipe, node: Node) -> None:
    """Refuse to sample by the run's vLLM from a policy of another shape.

    Raises:
        UserError: so it is.
    """
    samples = node.step in ("presample", "evaluate", "validate", "train")
    if recipe.rollout.engine != "transformers" and node.origin != BASE and samples:
        raise UserError(
            f"The stage '{node.label or node.inputs['model']}' is about '{node.origin}', a model of its own, and one "
            f"{recipe.rollout.engine} serves the policies that come from base: set rollout.engine=transformers, or "
            "make that model in a run of its own and name its folder."
        )


def _checked(recipe: StagedRecipe, node: Node, loaded: Questions) -> Job:
    """The job of one node.

    Raises:
        UserError: the stage cannot work; the sentence names it.
    """
    with _named(node):
        plain = recipe.plain(node)
        runs: dict[str, Resolved] = {}
        if isinstance(node.stage, Trained):
            runs[node.name] = resolve(plain)
            _require_inputs(node.stage, runs[node.name], loaded.task)
        job = pipeline.checked(plain, runs, loaded)
        if node.step in ("presample", "validate"):
            job.require_verifier()
    return replace(job, validation=recipe.validation)


def resolved_stages(recipe: StagedRecipe) -> dict[str, Resolved]:
    """The methods that stages train, by node; no model and no row is read.

    Raises:
        UserError: the arguments of one are wrong; the sentence names the stage.
    """
    found = {}
    for node in recipe.nodes.values():
        if isinstance(node.stage, Trained):
            with _named(node):
                found[node.name] = resolve(recipe.plain(node))
    return found


@contextmanager
def _named(node: Node) -> Iterator[None]:
    """Put the stage before what is said of its recipe."""
    try:
        yield
    except UserError as error:
        raise UserError(f"stages.{node.label}: {error}" if node.label else str(error)) from None


def _require_inputs(stage: Trained, resolved: Resolved, task: tasks.BaseTask) -> None:
    """Refuse a method without what it learns from, or with what it does not.

    Raises:
        UserError: so it is.
    """
    method = stage.method.name
    taken = {
        "store": (resolved.takes_store, "pre-sampled answers of the policy that it starts from"),
        "pairs": (resolved.takes_pairs and not task.pairs, "preference pairs"),
        "answers": (bool(resolved.takes_answers), "pre-sampled answers"),
        "teacher": (resolved.takes_teacher and not resolved.takes_answers, "a teacher"),
        "rollouts": (resolved.takes_static, "pre-sampled answers of the policy that it starts from"),
        "signal": (resolved.takes_signal, "a signal, in this phase"),
    }
    for key, (takes, words) in taken.items():
        if takes and getattr(stage, key) is None:
            raise UserError(f"the method '{method}' learns from {words}: name where they are from ({key}).")
    for key, (takes, _) in taken.items():
        if getattr(stage, key) is not None and not takes:
            if key == "pairs" and resolved.takes_pairs:
                raise UserError(f"the task '{task.name}' brings its own pairs: remove pairs.")
            raise UserError(f"{key} has no effect on the method '{method}': remove it.")


# ------------------------------------------------------------------ what outputs depend on


def _of_base(recipe: StagedRecipe, node: Node, job: Job) -> dict[str, Any]:
    model = recipe.model
    if model.path is None:
        return _of_warm_start(recipe, node, job)
    files = files_fingerprint(model.path)
    # A folder is known by what it holds, wherever it lies; a name on the hub is its own identity.
    named = {"files": files} if files is not None else {"path": model.path, "revision": model.revision}
    return {**named, "dtype": model.dtype}


def _of_warm_start(recipe: StagedRecipe, node: Node, job: Job) -> dict[str, Any]:
    from posttrain.launch.warm_start import demonstrated, identity_of

    settings = job.recipe.model.warm_start or WarmStart()
    return identity_of(settings, demonstrated(settings, job.task), dtype=recipe.model.dtype)


def _sampled(job: Job) -> dict[str, Any]:
    """What answers depend on that are drawn outside training."""
    rollout = job.recipe.rollout
    return {
        "engine": rollout.engine,
        "max_tokens": rollout.max_tokens,
        "part": rollout.answers_per_part,
        "dtype": job.recipe.model.dtype,
        "verifier": job.verifier.identity if job.verifier is not None else None,
    }


def _of_presample(recipe: StagedRecipe, node: Node, job: Job) -> dict[str, Any]:
    return {
        **_sampled(job),
        "presample": job.recipe.presample.model_dump(),
        "training_temperature": job.recipe.rollout.temperature,
        "rows": tasks.fingerprint(job.train_rows),
    }


def _of_pairs(recipe: StagedRecipe, node: Node, job: Job) -> dict[str, Any]:
    return {"pairs": job.recipe.pairs.model_dump()}


def _of_training(recipe: StagedRecipe, node: Node, job: Job) -> dict[str, Any]:
    resolved, own = job.runs[node.name], job.recipe
    fields = [field for field in dataclasses.fields(resolved.config_class) if field.default is not dataclasses.MISSING]
    given = set(own.method.args)
    args = {**{field.name: field.default for field in fields}, **resolved.trainer_args}
    found: dict[str, Any] = {
        "method": own.method.name,
        "args": {name: value for name, value in args.items() if name in given or name not in _OF_THE_MACHINE},
        "dtype": own.model.dtype,
        "lora": own.model.lora.model_dump() if own.model.lora is not None else None,
        "launch": {"processes": own.launch.processes, "config": own.launch.config},
    }
    if resolved.takes_static:
        return {**found, "temperature": own.rollout.temperature}
    if not resolved.takes_pairs or job.task.pairs:
        found["rows"] = tasks.fingerprint(job.train_rows)
    if not (resolved.takes_pairs or resolved.takes_answers):
        found["rollout"] = own.rollout.model_dump(include={"engine", "max_tokens", "temperature", "lora_sync"})
        found["rewards"] = [reward.model_dump() for reward in own.rewards]
        found["verifier"] = job.verifier.identity if job.verifier is not None else None
    stage = node.stage
    if isinstance(stage, Trained) and stage.teacher is not None:
        found["teacher"] = stage.teacher.model_dump(exclude={*_PLACES, "several"})
        found["teachers"] = {
            name: {**teacher.model_dump(exclude={*_PLACES, "several"}), "files": files_fingerprint(teacher.path or "")}
            for name, teacher in {"": stage.teacher, **stage.teacher.several}.items()
        }
    return found


def _of_log_probs(recipe: StagedRecipe, node: Node, job: Job) -> dict[str, Any]:
    rollout = recipe.rollout
    return {"temperature": rollout.temperature, "part": rollout.answers_per_part, "dtype": recipe.model.dtype}


def _of_signal(recipe: StagedRecipe, node: Node, job: Job) -> dict[str, Any]:
    stage = node.stage
    return {"signal": stage.signal, "weights": list(stage.teachers.values())} if isinstance(stage, Scored) else {}


def _of_merge(recipe: StagedRecipe, node: Node, job: Job) -> dict[str, Any]:
    weights = list(node.stage.models.values()) if isinstance(node.stage, Merged) else []
    return {"weights": weights, "dtype": recipe.model.dtype}


def _of_evaluation(recipe: StagedRecipe, node: Node, job: Job) -> dict[str, Any]:
    return {
        **_sampled(job),
        "evaluation": job.recipe.evaluation.model_dump(),
        "rows": tasks.fingerprint(job.eval_rows),
        "further": {name: tasks.fingerprint(asked.rows) for name, asked in job.further.items()},
    }


_SETTINGS: dict[str, Callable[[StagedRecipe, Node, Job], dict[str, Any]]] = {
    "base": _of_base,
    "warm_start": _of_warm_start,
    "presample": _of_presample,
    "pairs": _of_pairs,
    "train": _of_training,
    "log_probs": _of_log_probs,
    "score": _of_signal,
    "merge": _of_merge,
    "evaluate": _of_evaluation,
    "validate": _of_evaluation,
}
"""What the output of a step depends on beside its inputs."""


# ------------------------------------------------------------------ the run


def run(
    recipe: StagedRecipe,
    output_dir: Path,
    *,
    command: str,
    first: str | None = None,
    until: str | None = None,
) -> None:
    """Work through the stages of a recipe to the report.

    What is finished is reused and what was interrupted is continued, so the same command run again goes on.

    Args:
        recipe: of stages.
        output_dir: of the run; made when it does not exist.
        command: what the user typed, for the report.
        first: a stage that is made anew with everything that depends on it.
        until: a stage after which to stop; only what it needs is done.

    Raises:
        UserError: the recipe is wrong, or the folder holds something else.
        KeyboardInterrupt: the user stopped.
    """
    workers = Workers()
    recipe = pipeline.started(recipe, workers.world)
    pipeline.begin(recipe)
    planned = plan(recipe)
    last = planned.find(until, last=True) if until is not None else None
    anew = planned.dependants(planned.find(first, last=False)) if first is not None else []
    if workers.first:
        _claim(output_dir, recipe)
        atomic.write_json(output_dir / "provenance.json", provenance(recipe, command, workers.world))
        for name in anew:
            folder = manifest.place(output_dir.resolve() / "stages", name, planned.works[name].key)
            if folder.is_dir():
                manifest.move_aside(folder, "replaced")
        _write_plan(planned, output_dir)
    workers.barrier()
    running = Running(planned, output_dir, workers)
    try:
        running.through(planned.needed(last), report=until is None)
    finally:
        running.close()
    if workers.first and until is None:
        running.report(command)
    workers.barrier()


def _claim(output_dir: Path, recipe: StagedRecipe) -> None:
    """Make the folder this recipe's, which may have been another one before.

    Raises:
        UserError: it holds something else than stages.
    """
    stored = output_dir / "recipe.yaml"
    if stored.is_file():
        if "stages" not in (recipes.parse_value(stored.read_text(encoding="utf-8")) or {}):
            raise UserError(f"{output_dir} holds a run of a recipe without stages: choose another --output-dir.")
    elif output_dir.is_dir() and any(output_dir.iterdir()):
        raise UserError(f"{output_dir} is not empty and holds no run: choose another --output-dir.")
    atomic.write_text(stored, recipe.to_yaml())


def _write_plan(planned: Plan, output_dir: Path, notes: Sequence[str] = (), left: Sequence[str] = ()) -> None:
    nodes = [
        {
            "name": work.node.name,
            "what": what(work.node),
            "inputs": dict(work.node.inputs),
            "key": work.key,
            "left_out": work.node.name in left,
        }
        for work in planned.works.values()
    ]
    atomic.write_json(output_dir / "plan.json", {"recipe": planned.recipe.name, "nodes": nodes, "notes": list(notes)})


def what(node: Node) -> str:
    """What a node does, in a few words."""
    if isinstance(node.stage, Trained):
        return f"train {node.stage.method.name}"
    words = {"base": "initial policy", "warm_start": "warm start", "log_probs": "log-probs"}
    return words.get(node.step, node.step)


class Running:
    """A run of a plan: makes the outputs of nodes, or takes those that are there.

    Args:
        planned: what there is to do.
        output_dir: of the run.
        workers: the processes of the launch; all make the same calls in the same order.
    """

    def __init__(self, planned: Plan, output_dir: Path, workers: Workers) -> None:
        self.planned, self.recipe = planned, planned.recipe
        self.output_dir, self.workers = output_dir, workers
        self.root = output_dir.resolve() / "stages"
        self.say = Console(stderr=True, quiet=not workers.first, highlight=False)
        self.folders: dict[str, Path] = {}
        self.policies: dict[str, str] = {}
        """What other stages start from, by node."""
        self.contents: dict[str, str] = {}
        """Hashes of the outputs, by node."""
        self.results: dict[str, Mapping[str, float]] = {}
        self.notes: list[str] = []
        self._engines: dict[str, Engines] = {}
        self._rollouts: dict[str, Any] = {}

    def through(self, names: Sequence[str], *, report: bool) -> None:
        """Make the outputs of nodes, each after those that it needs."""
        self.headings = pipeline.Headings(self.say, len(names) + report)
        left: list[str] = []
        for name in names:
            work = self.planned.works[name]
            closed = self._closed(work.node)
            if closed is not None or any(given in left for given in work.node.inputs.values()):
                left.append(name)
                continue
            self._make(work)
        if self.workers.first and (self.notes or left):
            _write_plan(self.planned, self.output_dir, self.notes, left)
        self.say.print(*(f"  {note}" for note in self.notes), sep="\n", end="\n" if self.notes else "", soft_wrap=True)

    def _closed(self, node: Node) -> Gate | None:
        """The gate that keeps a node from being done; the first time it says so."""
        for gate in self.recipe.gates:
            if gate.round >= node.round:
                break
            before, after = (self.results[name].get("pass@1", 0.0) for name in (gate.policy, gate.next))
            if after < before:
                policy, following = (self.planned.works[name].node.inputs["model"] for name in (gate.policy, gate.next))
                rounds = self.recipe.rounds.repeat if self.recipe.rounds is not None else 1
                note = (
                    f"Round {gate.round} is not accepted: '{following}' solves {100 * after:.1f} % of the validation "
                    f"prompts at once, and '{policy}', from which the round started, {100 * before:.1f} %; "
                    f"{'round' if gate.round + 1 == rounds else 'rounds'} {gate.round + 1}"
                    f"{f' to {rounds}' if gate.round + 1 < rounds else ''} "
                    f"{'is' if gate.round + 1 == rounds else 'are'} not run."
                )
                if note not in self.notes:
                    self.notes.append(note)
                return gate
        return None

    def _make(self, work: Work) -> None:
        node = work.node
        doing = what(node)
        title = node.name if node.stage is None and node.step != "base" else f"{node.name} ({doing})"
        if node.step == "base":
            self.headings.begin(title)
            self.policies[BASE] = pipeline.initial_policy(work.job, self.workers)
            self.contents[BASE] = work.key[:16]
            self.say.print(f"  {self.policies[BASE]}", soft_wrap=True)
            return
        folder, found, sentence = self.workers.share(lambda: self._look(work))
        self.headings.begin(title + (": done before" if found is not None else ""))
        if sentence is not None:
            self.say.print(f"  {sentence}", soft_wrap=True)
        if found is None:
            found = self._work(work, folder)
        self.folders[node.name], self.contents[node.name] = folder, found["content"]
        self.results[node.name] = found["results"]
        if (folder / "model").is_dir():
            self.policies[node.name] = str(folder / ("whole" if (folder / "whole").is_dir() else "model"))

    def _look(self, work: Work) -> tuple[Path, dict[str, Any] | None, str | None]:
        """Where an output is or is going to be, its manifest if it can be reused, and else perhaps why not."""
        node = work.node
        folder = manifest.place(self.root, node.name, work.key)
        contents = {part: self.contents[name] for part, name in node.inputs.items()}
        found = manifest.read(folder)
        if found is None:
            noted = manifest.begun(folder)
            if noted is None or noted[0] == contents:
                return folder, None, None
            manifest.move_aside(folder, "replaced")
            return folder, None, f"What '{node.name}' is made of has changed since it was begun, so it begins again."
        wrong = manifest.fault(folder, found)
        if wrong is not None:
            aside = manifest.move_aside(folder, "corrupt")
            sentence = f"The output of '{node.name}' is damaged ({wrong}), so it is made again; it is now {aside.name}."
            return folder, None, sentence
        for part, name in node.inputs.items():
            if found["inputs"][part]["content"] != contents[part]:
                manifest.move_aside(folder, "replaced")
                return folder, None, f"'{name}' came out otherwise than before, so '{node.name}' is made again."
        return folder, found, None

    def _work(self, work: Work, folder: Path) -> dict[str, Any]:
        """Make an output, and its manifest; returns that."""
        node, started = work.node, time.monotonic()
        contents = {part: self.contents[name] for part, name in node.inputs.items()}
        before = (manifest.begun(folder) or ({}, 0.0))[1]
        if self.workers.first:
            manifest.begin(folder, contents, before)
        try:
            results = _RUN[node.step](self, work, folder)
        except BaseException:
            if self.workers.first and folder.is_dir():
                manifest.begin(folder, contents, before + time.monotonic() - started)
            raise
        self.workers.barrier()  # nothing is being written any more
        inputs = {
            part: {"stage": name, "key": self.planned.works[name].key, "content": contents[part]}
            for part, name in node.inputs.items()
        }

        def finish() -> dict[str, Any]:
            return manifest.write(
                folder,
                step=node.step,
                key=work.key,
                settings=work.settings,
                inputs=inputs,
                seconds=before + time.monotonic() - started,
                results=results,
            )

        made: dict[str, Any] = self.workers.share(finish)
        return made

    def engines(self, origin: str) -> Engines:
        """What lends the engine for policies of one origin; it serves all stages."""
        if origin not in self._engines:
            jobs = [work.job for work in self.planned.works.values() if work.node.origin == origin]
            others = [(asked.rows, asked.max_tokens) for job in jobs for asked in job.further.values()]
            rows = [row for job in jobs for row in job.eval_rows] + self.planned.questions.train_rows
            initial = self.policies[origin]
            recipe = self.recipe.plain(self.planned.works[origin].node, self.policies)
            log = self.output_dir / "server.log"
            self._engines[origin] = Engines(recipe, initial, rows, self.workers, log, further=others)
        return self._engines[origin]

    def close(self) -> None:
        """Stop what was started."""
        for engines in self._engines.values():
            engines.close()

    # ------------------------------------------------------------------ steps

    def warm_start(self, work: Work, folder: Path) -> dict[str, float]:
        """Copy the model from the cache of warm starts, where it is made."""
        made = Path(pipeline.warm_started(work.job, work.job.recipe.model.warm_start or WarmStart(), self.workers))
        if self.workers.first:
            shutil.rmtree(folder / "model", ignore_errors=True)
            shutil.copytree(made, folder / "model")
        return {"loss": json.loads((made / "identity.json").read_text(encoding="utf-8"))["loss"]}

    def presample(self, work: Work, folder: Path) -> dict[str, float]:
        node = work.node
        engines = self.engines(node.origin)
        model = self.policies[node.inputs["model"]]
        store = pipeline.presample_policy(work.job, model, engines, folder / "store", self.workers)
        return {name: store.counts[name] for name in ("prompts", "explore", "pef", "all_wrong")}

    def pairs(self, work: Work, folder: Path) -> dict[str, float]:
        source = work.node.inputs["store"]
        model = self.policies[self.planned.works[source].node.inputs["model"]]
        made = pipeline.build_pairs(work.job, model, self._store(source), folder / "pairs", self.workers)
        return {name: made.counts[name] for name in ("prompts", "with_pairs", "pairs")}

    def train(self, work: Work, folder: Path) -> dict[str, float]:
        node = work.node
        plain = self.recipe.plain(node, self.policies)
        resolved = resolve(plain)
        job = replace(work.job, recipe=plain, runs={node.name: resolved})
        model, engines = self.policies[node.inputs["model"]], self.engines(node.origin)
        teachers = teaching.Teachers(job, engines, self.workers, folder)
        try:
            if not (folder / "history.json").is_file():
                teachers.require_fit()
            trained = pipeline.train(
                job,
                resolved,
                model,
                engines,
                self._data(job, node, model, folder, teachers),
                folder,
                self.workers,
                node.name,
            )
        finally:
            teachers.close()
        if self.workers.first and (trained / "adapter_config.json").is_file() and not (folder / "whole").is_dir():
            merging.whole(trained, folder / "whole")
        history = json.loads((folder / "history.json").read_text(encoding="utf-8"))
        shown = ("loss", "reward", "kl", "kl/forward")
        last = {name: entry[name] for entry in history for name in ("step", *shown) if name in entry}
        return {"steps" if name == "step" else name: float(value) for name, value in last.items()}

    def _data(self, job: Job, node: Node, model: str, folder: Path, teachers: teaching.Teachers) -> Data:
        """What a method learns from beside prompts."""
        from posttrain.rollouts.pairs import PairSet

        resolved = job.runs[node.name]
        store = self._store(node.inputs["store"]) if "store" in node.inputs else None
        pipeline.require_store(resolved, store, folder)
        pairs = PairSet.open(self.folders[node.inputs["pairs"]] / "pairs") if "pairs" in node.inputs else None
        answers: dict[str, Any] = {}
        if "answers" in node.inputs:
            answers = pipeline.choose_answers(job, model, {"policy": self._store(node.inputs["answers"])})
            self.say.print(*(f"  {chosen}" for chosen in answers.values()), soft_wrap=True)
        return Data(store, pairs, teachers, answers, self._static(node))

    def _static(self, node: Node) -> Any:
        """The fixed rollouts of a training, with what it reads beside their tokens; None where it has none."""
        from posttrain.rollouts import static

        if "rollouts" not in node.inputs:
            return None
        rollouts = static.with_base_logps(self._answers(node.inputs["rollouts"]), self._logps(node, "base on rollouts"))
        self.say.print(f"  {rollouts}", soft_wrap=True)
        if "signal" in node.inputs:
            signals = static.Signals.open(self.folders[node.inputs["signal"]] / "signals")
            rollouts = static.with_signals(rollouts, signals)
        return rollouts

    def _answers(self, name: str) -> Any:
        """The answers of a store to learn from; of validation prompts all of them (`StaticSet`)."""
        from transformers import AutoTokenizer

        from posttrain.rollouts import static

        if name not in self._rollouts:
            work = self.planned.works[name]
            tokenizer = AutoTokenizer.from_pretrained(
                self.policies[work.node.origin], revision=self._revision(work.node.origin)
            )
            held_out = isinstance(work.node.stage, Presampled) and work.node.stage.prompts == "validation"
            self._rollouts[name] = static.rollouts_from_store(
                self._store(name), work.job.train_rows, tokenizer, keep_uniform=held_out
            )
        return self._rollouts[name]

    def _logps(self, node: Node, part: str) -> Any:
        from posttrain.rollouts import static

        return static.Logps.open(self.folders[node.inputs[part]] / "logps")

    def _revision(self, name: str) -> str | None:
        """Of a policy on the hub."""
        return self.recipe.model.revision if name == BASE else None

    def log_probs(self, work: Work, folder: Path) -> dict[str, float]:
        """One policy's log-probs of stored answers, by the forward that trains."""
        from posttrain.rollouts import static

        node, name = work.node, work.node.inputs["model"]
        answers = self._answers(node.inputs["rollouts"])
        static.score_model(
            self.policies[name],
            answers,
            folder / "logps",
            temperature=self.recipe.rollout.temperature,
            dtype=self.recipe.model.dtype,
            revision=self._revision(name),
            batch_size=self.recipe.rollout.answers_per_part,
            worker=(self.workers.rank, self.workers.world),
            barrier=self.workers.barrier,
        )
        return {"answers": len(answers), "tokens": answers.tokens()}

    def score(self, work: Work, folder: Path) -> dict[str, float]:
        """A signal that ranks right answers above wrong ones on held-out prompts."""
        from posttrain.rollouts import static

        found, sentences = self.workers.share(lambda: self._signal(work.node, folder))
        self.say.print(*(f"  {sentence}" for sentence in sentences), sep="\n", soft_wrap=True)
        static.require_valid(found["signal"], static.Validation(**found["validation"]))
        return {name: found["validation"][name] for name in ("auc", "low", "high", "within")} | {"rms": found["rms"]}

    def _signal(self, node: Node, folder: Path) -> tuple[dict[str, Any], list[str]]:
        """Make a signal of the training and of the held-out answers; what it is and how well it ranks, for people."""
        from posttrain.rollouts import static

        stage = node.stage
        assert isinstance(stage, Scored)  # noqa: S101 - so says the table of steps
        answers, held_out = (self._answers(node.inputs[part]) for part in ("rollouts", "held_out"))
        sentences = []

        def terms(place: str, pairs: Sequence[tuple[str, str, float]]) -> list[static.Term]:
            return [
                static.Term(self._logps(node, f"{plus} on {place}"), self._logps(node, f"{minus} on {place}"), weight)
                for plus, minus, weight in pairs
            ]

        def validated(name: str, pairs: Sequence[tuple[str, str, float]], place: str) -> static.Validation:
            signals = static.make_signal(name, terms("held_out", pairs), held_out, folder / place)
            return static.validate(signals, held_out)

        if stage.signal == "auto":
            choice = self._choice(node, stage, held_out, validated)
            name, pairs = choice.signal, [(choice.plus, choice.minus, 1.0)]
            sentences.append(f"signal {name} ({choice.plus} minus {choice.minus}): {choice.reason}")
        elif stage.signal == "mix":
            name, pairs = "mix", [(f"teacher-{each}", "base", weight) for each, weight in stage.teachers.items()]
        else:
            name, pairs = stage.signal, [(*PAIRS[stage.signal], 1.0)]
        validation = validated(name, pairs, "held_out")
        signals = static.make_signal(name, terms("rollouts", pairs), answers, folder / "signals")
        sentences.append(f"{name}: {validation}")
        found = {
            "signal": name,
            "terms": pairs,
            "validation": dataclasses.asdict(validation),
            "rms": signals.manifest["rms"],
        }
        atomic.write_json(folder / "signal.json", {**found, "said": sentences})
        return found, sentences

    def _choice(self, node: Node, stage: Scored, held_out: Any, validated: Callable[..., Any]) -> Any:
        """What `signal: auto` comes to (`static.Choice`)."""
        from posttrain.rollouts import static

        base = static.accuracies(held_out)
        if stage.teacher is None:
            return static.choose_signal(list(base.values()), None, unlearned=True)
        teacher = static.accuracies(self._answers(node.inputs["teacher_answers"]))
        both = [prompt for prompt in base if prompt in teacher]
        return static.choose_signal(
            [base[prompt] for prompt in both],
            [teacher[prompt] for prompt in both],
            unlearned=stage.unlearned is not None,
            teacher_auc=validated("teacher_base", [("teacher", "base", 1.0)], "teacher_base_held_out"),
        )

    def _store(self, name: str) -> Any:
        from posttrain.rollouts.store import Store

        return Store.open(self.folders[name] / "store")

    def merge(self, work: Work, folder: Path) -> dict[str, float]:
        node = work.node
        if self.workers.first and not (folder / "model").is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            paths = [self.policies[name] for name in node.inputs.values()]
            weights = list(zip(paths, work.settings["weights"], strict=True))
            merging.merge(weights, folder / "model", dtype=self.recipe.model.dtype, revision=self.recipe.model.revision)
        return {}

    def evaluate(self, work: Work, folder: Path) -> dict[str, float]:
        from posttrain.evaluation import evaluate

        node, policy = work.node, work.node.inputs["model"]
        base = self.folders[node.inputs["base"]] if "base" in node.inputs else folder
        engines = self.engines(node.origin)
        measuring = Measuring(work.job, self.policies[node.origin], engines, base / "evaluation", self.workers)
        resolved = self.planned.works[policy].resolved
        measuring.measure(
            policy,
            self.evaluated(policy),
            folder / "evaluation",
            implied=pipeline.implied(resolved.probe) if resolved is not None else None,
        )
        found = evaluate.load(folder / "evaluation").metrics
        values = {name: entry["value"] for name, entry in found.items() if name.startswith("pass@")}
        return {name: value for name, value in values.items() if value is not None}

    def evaluated(self, name: str) -> str:
        """What is loaded to evaluate a policy: its adapters beside their base, where it was trained with some."""
        adapters = self.folders[name] / "model" if name in self.folders else None
        return str(adapters) if adapters is not None else self.policies[name]

    # ------------------------------------------------------------------ the report

    def report(self, command: str) -> None:
        """Compare all policies with the base; then what each evaluate stage compared."""
        self.headings.begin("report")
        done = {name: self.planned.works[name].node for name in self.folders}
        own = [node for node in done.values() if node.step == "evaluate" and node.stage is None]
        folders = {node.inputs["model"]: self.folders[node.name] / "evaluation" for node in own}
        trained = [self.planned.works[name] for name in folders if self.planned.works[name].resolved is not None]
        for title, group in self._groups(done.values()):
            comparison = pipeline.comparison_of(
                {node.inputs["model"]: self.folders[node.name] / "evaluation" for node in group},
                group[0].asked.further if group[0].asked is not None else (),
            )
            from posttrain.evaluation import summary

            atomic.write_text(self.output_dir / f"comparison-{title}.json", summary.to_json(comparison))
            Console(highlight=False).print(f"\n{title}")
            pipeline.show(comparison)
        pipeline.present(
            self.recipe,
            folders,
            self.output_dir,
            command,
            title=self.recipe.name,
            histories={work.node.name: self.folders[work.node.name] / "history.json" for work in trained},
            curves=pipeline.curves_of(work.resolved for work in trained if work.resolved is not None),
            notes=self.notes,
        )

    def _groups(self, nodes: Any) -> Iterator[tuple[str, list[Node]]]:
        """The evaluations of each evaluate stage, with its name in the run."""
        groups: dict[str, list[Node]] = {}
        for node in nodes:
            if isinstance(node.stage, Evaluated):
                groups.setdefault(node.name.removesuffix(f"-{node.inputs['model']}"), []).append(node)
        yield from groups.items()


_RUN: dict[str, Callable[[Running, Work, Path], dict[str, float]]] = {
    "warm_start": Running.warm_start,
    "presample": Running.presample,
    "pairs": Running.pairs,
    "train": Running.train,
    "log_probs": Running.log_probs,
    "score": Running.score,
    "merge": Running.merge,
    "evaluate": Running.evaluate,
    "validate": Running.evaluate,
}
"""How the output of a step is made; each returns a few numbers for `posttrain status`."""
