"""What a recipe of stages may say: steps that follow one another, each with the outputs of earlier ones. No torch.

    stages:
      distil: {method: {name: kdrl, args: {kd_only: true}}, teacher: {path: some/teacher}}
      rl: {method: {name: grpo}, model: distil}

A stage says what it does (`do`, one of `STEPS`; a stage with a method trains it) and names the stages whose outputs it
takes. `base` is always the recipe's `model`. With `rounds` the stages are repeated: `policy` is the policy that a round
starts from, `base` in the first. Whatever does not depend on `policy` is done once.

`StagedRecipe.nodes` is the graph that a run works through (`posttrain.launch.staged`): every stage, in round r called
`NAME-r`, and the evaluations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from posttrain.errors import did_you_mean
from posttrain.recipe import (
    Common,
    Demonstrated,
    Evaluation,
    Label,
    Method,
    NonNegativeInt,
    Pairs,
    PositiveInt,
    Presample,
    Recipe,
    Section,
    Task,
    Teacher,
    WarmStart,
    fields_at,
    merge,
)

BASE, POLICY = "base", "policy"
"""What every stage can start from: the recipe's model, and the policy of the round."""

_ROUNDING = 1e-9
"""Slack of a sum of weights: 0.1 + 0.2 + 0.7 is a little less than 1."""

StageName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
"""Without dots, which `--set` reads as the next key."""


@dataclass(frozen=True)
class Input:
    """What a stage takes from another one: by which name, under which key it says so, and what it must be."""

    stage: str
    key: str
    kind: str


class Stage(Section):
    """Base of all steps."""

    do: str
    gives: ClassVar[str]
    """What it makes: a policy, store, pairs or evaluation."""

    @property
    def inputs(self) -> dict[str, Input]:
        """What it takes, by the part that it plays."""
        return {}


class WarmStarted(WarmStart, Stage):
    """Another policy from nothing, as `model.warm_start`, on the recipe's task: a teacher of another size."""

    do: Literal["warm_start"]
    gives: ClassVar[str] = "policy"


class Presampled(Presample, Stage):
    """Verified answers of a policy to every training prompt; what it leaves open is as in the section `presample`."""

    do: Literal["presample"]
    gives: ClassVar[str] = "store"
    model: StageName = POLICY
    """Whose answers."""
    prompts: Literal["training", "validation"] = "training"
    """Training prompts, or those that `validation` sets aside, from which nothing is learned."""

    @property
    def inputs(self) -> dict[str, Input]:
        return {"model": Input(self.model, "model", "policy")}


class Paired(Pairs, Stage):
    """Preference pairs of pre-sampled answers; what it leaves open is as in the section `pairs`."""

    do: Literal["pairs"]
    gives: ClassVar[str] = "pairs"
    store: StageName
    """Of which answers."""

    @property
    def inputs(self) -> dict[str, Input]:
        return {"store": Input(self.store, "store", "store")}


class StageTeacher(Teacher):
    """A teacher of a stage, which an earlier stage may have made."""

    stage: StageName | None = None
    """Which one."""
    several: Mapping[Label, StageTeacher] = Field(default_factory=dict)
    """Teachers by name."""

    sources: ClassVar[tuple[str, ...]] = (*Teacher.sources, "stage")
    wanted: ClassVar[str] = (
        "path (a model that exists), stage (one that a stage makes), base or self (the student), or several"
    )

    @property
    def stages(self) -> dict[str, Input]:
        """The stages that make it, by the label of the teacher."""
        if self.stage is not None:
            return {"teacher": Input(self.stage, "teacher.stage", "policy")}
        return {
            f"teacher-{name}": Input(other.stage, f"teacher.several.{name}.stage", "policy")
            for name, other in self.several.items()
            if other.stage is not None
        }

    def made(self, sources: Mapping[str, Mapping[str, Any]]) -> Teacher:
        """The same teacher with the models that the stages have made, or are going to.

        Args:
            sources: by label, `path`, or `warm_start` of a model that is still to be made.
        """
        values = {name: getattr(self, name) for name in Teacher.model_fields}
        values["several"] = {
            name: Teacher.model_construct(
                **{**{key: getattr(other, key) for key in Teacher.model_fields}, **sources.get(f"teacher-{name}", {})}
            )
            for name, other in self.several.items()
        }
        # Not validated again: of several teachers none may be made by the run, which those of stages are.
        return Teacher.model_construct(**{**values, **sources.get("teacher", {})})

    @model_validator(mode="after")
    def _made_in_a_stage(self) -> StageTeacher:
        if self.warm_start is not None or self.method is not None:
            raise ValueError(
                f"{'method' if self.warm_start is None else 'warm_start'} makes a teacher here, and a recipe of stages "
                "makes it in a stage of its own: name that (stage)"
            )
        if self.stage is not None and self.revision is not None:
            raise ValueError("revision has no effect on a teacher that a stage makes: remove it")
        if self.stage is not None and self.server is not None and self.server.url is not None:
            raise ValueError("a server that runs already has no teacher that a stage makes: remove server.url")
        return self


class Trained(Stage):
    """A policy trained by a method (`posttrain methods`), with what the method learns from."""

    do: Literal["train"]
    gives: ClassVar[str] = "policy"
    method: Method
    model: StageName = POLICY
    """What training starts from."""
    store: StageName | None = None
    """Pre-sampled answers of that very policy, to rehearse."""
    pairs: StageName | None = None
    """Preference pairs."""
    answers: StageName | None = None
    """Pre-sampled answers of any policy; the verified ones are learned (`sft`)."""
    teacher: StageTeacher | None = None
    """For methods that distil."""
    rollouts: StageName | None = None
    """Pre-sampled answers of that very policy, the right and the wrong ones, which are all that is learned (`erpd`)."""
    signal: StageName | None = None
    """What a `score` stage says of these answers' tokens."""
    seed: NonNegativeInt | None = None
    """Of this training run; default the recipe's."""
    evaluate: bool = True
    """Whether the report has the policy."""

    @property
    def inputs(self) -> dict[str, Input]:
        found = {"model": Input(self.model, "model", "policy")}
        kinds = {"store": "store", "pairs": "pairs", "answers": "store", "rollouts": "store", "signal": "signal"}
        for key, kind in kinds.items():
            named = getattr(self, key)
            if named is not None:
                found[key] = Input(named, key, kind)
        return found | (self.teacher.stages if self.teacher is not None else {})

    @model_validator(mode="after")
    def _said_once(self) -> Trained:
        if self.method.called is not None:
            raise ValueError("method.called has no effect: a run is called as its stage, so rename that")
        if self.answers is not None and "answers_of" in self.method.args:
            raise ValueError(
                "method.args.answers_of has no effect beside answers, which says whose they are: remove it"
            )
        return self


class Scored(Stage):
    """A signal for the tokens of stored answers: how much likelier one policy finds them than another (`erpd`).

    Every policy that it takes scores the answers once, in a piece of work of its own. The signal is checked before it
    can be learned: on answers to validation prompts it must rank right ones above wrong ones.
    """

    do: Literal["score"]
    gives: ClassVar[str] = "signal"
    rollouts: StageName
    """Pre-sampled answers of the policy that is going to learn, π_0."""
    held_out: StageName
    """Its pre-sampled answers to the validation prompts."""
    signal: Literal["auto", "teacher_base", "teacher_unlearned", "base_unlearned", "mix"] = "auto"
    """Whose log-probs minus whose; auto decides by the accuracy of the teacher, and by what there is."""
    teacher: StageName | None = None
    """A policy that was extracted."""
    unlearned: StageName | None = None
    """One that was extracted the other way."""
    teacher_answers: StageName | None = None
    """The teacher's answers to the validation prompts, for auto."""
    teachers: dict[StageName, float] = Field(default_factory=dict)
    """Of a mix: the policies that were extracted, and the weight of each one's teacher_base."""

    @property
    def inputs(self) -> dict[str, Input]:
        found = {}
        for key in ("rollouts", "held_out", "teacher", "unlearned", "teacher_answers"):
            named = getattr(self, key)
            if named is not None:
                found[key] = Input(named, key, "policy" if key in ("teacher", "unlearned") else "store")
        return found | {f"teacher-{name}": Input(name, "teachers", "policy") for name in self.teachers}

    @property
    def scorers(self) -> list[str]:
        """The inputs that score the answers, beside the policy that gave them."""
        return [part for part, given in self.inputs.items() if given.kind == "policy"]

    @model_validator(mode="after")
    def _policies_make_the_signal(self) -> Scored:
        taken = {
            "teacher_base": {"teacher"},
            "teacher_unlearned": {"teacher", "unlearned"},
            "base_unlearned": {"unlearned"},
            "mix": {"teachers"},
        }
        given = {name for name in ("teacher", "unlearned", "teachers", "teacher_answers") if getattr(self, name)}
        if self.signal == "auto":
            wanted = given & {"unlearned"} | ({"teacher", "teacher_answers"} if "teacher" in given else set())
            if not wanted:
                raise ValueError(
                    "signal: auto chooses among what was extracted: name a teacher, or an unlearned policy"
                )
        else:
            wanted = taken[self.signal]
        for name in sorted(wanted - given):
            raise ValueError(f"the signal '{self.signal}' takes {name}: name it")
        for name in sorted(given - wanted):
            raise ValueError(f"{name} has no effect on the signal '{self.signal}': remove it")
        idle = next((name for name, weight in self.teachers.items() if weight == 0), None)
        if idle is not None:
            raise ValueError(f"the weight of '{idle}' is 0, so it has no effect: remove it")
        return self


class Evaluated(Evaluation, Stage):
    """pass@k of policies at settings of its own; what it leaves open is as in the section `evaluation`."""

    do: Literal["evaluate"]
    gives: ClassVar[str] = "evaluation"
    models: list[StageName] = Field(min_length=1)

    @property
    def inputs(self) -> dict[str, Input]:
        return {f"model-{place}": Input(name, "models", "policy") for place, name in enumerate(self.models)}

    @model_validator(mode="after")
    def _compares_with_base(self) -> Evaluated:
        twice = next((name for name in self.models if self.models.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"models lists '{twice}' twice: remove one of them")
        measure = next((name for name in ("divergence", "calibration") if getattr(self, name) is not None), None)
        if measure is not None and BASE not in self.models:
            raise ValueError(f"{measure} is measured from base: add base to models, or leave {measure} out")
        return self

    @property
    def asked(self) -> Evaluation:
        """Its settings alone."""
        return Evaluation(**{name: getattr(self, name) for name in Evaluation.model_fields})


class Merged(Stage):
    """A policy whose weights are a linear combination of those of others, Σ w·θ, taken in float32."""

    do: Literal["merge"]
    gives: ClassVar[str] = "policy"
    models: dict[StageName, float] = Field(min_length=2)
    """Weights by policy; tokenizer and configuration are those of the first."""
    total: float = 1.0
    """What the weights add up to."""
    evaluate: bool = True
    """Whether the report has the policy."""

    @property
    def inputs(self) -> dict[str, Input]:
        return {f"model-{place}": Input(name, "models", "policy") for place, name in enumerate(self.models)}

    @model_validator(mode="after")
    def _weights_make_sense(self) -> Merged:
        idle = next((name for name, weight in self.models.items() if weight == 0), None)
        if idle is not None:
            raise ValueError(f"the weight of '{idle}' is 0, so it has no effect: remove it")
        found = sum(self.models.values())
        if abs(found - self.total) > _ROUNDING:
            raise ValueError(
                f"the weights add up to {found:g} and not to {self.total:g}, so the policy would not be an average: "
                f"change them, or say that it is meant (total: {found:g})"
            )
        return self


AnyStage = Annotated[
    WarmStarted | Presampled | Paired | Trained | Scored | Evaluated | Merged,
    Field(discriminator="do"),
]

STEPS: dict[str, type[Stage]] = {
    get_args(step.model_fields["do"].annotation)[0]: step for step in get_args(get_args(AnyStage)[0])
}
"""The steps by the name that `do` gives them. A new one is a class in `AnyStage` and two functions in
`posttrain.launch.staged`: what its output depends on, and how it is made."""

_KINDS = {
    "policy": "a policy",
    "store": "pre-sampled answers",
    "pairs": "preference pairs",
    "signal": "a signal",
    "evaluation": "an evaluation",
}
"""What stages give, in words."""

_INHERITED = {"presample": "presample", "pairs": "pairs", "evaluate": "evaluation"}
"""The section of the recipe that a step departs from."""


class Rounds(Section):
    """Repeats the stages, each time from the policy that the last time has made."""

    repeat: Annotated[int, Field(ge=2)]
    """How often the stages are done."""
    next: StageName
    """The stage whose policy the next round starts from."""
    accept: bool = False
    """Take it only if it solves no fewer validation prompts than the round's own policy, and stop otherwise."""


class Validation(Section):
    """Training prompts that are set aside, and nothing is trained on them: they decide what a round accepts, and
    whether a signal is worth learning."""

    prompts: PositiveInt
    n: PositiveInt = 16
    """Answers per prompt, at the temperature and top-p of the evaluation."""
    seed: NonNegativeInt = 0
    """Of the choice."""


def _is_held_out(stage: Stage | None) -> bool:
    """Whether it draws answers to validation prompts."""
    return isinstance(stage, Presampled) and stage.prompts == "validation"


@dataclass(frozen=True)
class Node:
    """One piece of work of a staged run, which leaves one output.

    Attributes:
        name: of the stage, with its round where it is repeated; evaluations have the name of the policy, too.
        step: `base`, one of `STEPS`, `validate`, or `log_probs` of stored answers.
        inputs: the nodes whose outputs it takes, by the part that they play.
        stage: as the recipe says it; None for the base, for log-probs and for the evaluations that every run makes.
        label: the key of that stage.
        asked: of an evaluation, what it measures.
        round: in which it is done, from 1.
        origin: the node that made the model from which its policy was trained: `base`, or a warm start.
    """

    name: str
    step: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    stage: Stage | None = None
    label: str = ""
    asked: Evaluation | None = None
    round: int = 1
    origin: str = BASE


class _Graph:
    """Nodes by name, each after those that it takes something from."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}

    def add(self, name: str, step: str, inputs: Mapping[str, str], **rest: Any) -> None:
        """Add a node, whose policy comes from where that of its first input does.

        Raises:
            ValueError: there is one of that name.
        """
        if name in self.nodes:
            raise ValueError(f"two stages of the run are called '{name}': rename one")
        origin = name
        if step not in ("base", "warm_start"):
            origin = self.nodes[next(iter(inputs.values()))].origin
        self.nodes[name] = Node(name, step, inputs, origin=origin, **rest)

    def scores(self, stage: Stage, inputs: Mapping[str, str], number: int) -> dict[str, str]:
        """What stages read of stored answers' log-probs, by part; every policy scores every store once."""
        if isinstance(stage, Scored):
            parts = ["base", *stage.scorers]
            stores: tuple[str, ...] = ("rollouts", "held_out")
        elif isinstance(stage, Trained) and stage.rollouts is not None:
            parts, stores = ["base"], ("rollouts",)
        else:
            return {}
        found = {}
        for part in parts:
            for place in stores:
                store = inputs[place]
                policy = self.nodes[inputs["rollouts"]].inputs["model"] if part == "base" else inputs[part]
                name = f"score-{policy}-on-{store}"
                if name not in self.nodes:
                    self.add(name, "log_probs", {"model": policy, "rollouts": store}, round=number)
                found[f"{part} on {place}"] = name
        return found

    def evaluate(self, name: str, policies: Iterable[str], asked: Evaluation, **rest: Any) -> None:
        """Add an evaluation for each policy, that of the base first, from which some measures are taken.

        Of a policy that does not come from the base, with a tokenizer of its own, these are left out.
        """
        from_base = asked.divergence is not None or asked.calibration is not None
        elsewhere = asked.model_copy(update={"divergence": None, "calibration": None})
        for policy in sorted(dict.fromkeys(policies), key=lambda policy: policy != BASE):
            related = self.nodes[policy].origin == BASE
            inputs = {"model": policy}
            if from_base and related and policy != BASE:
                inputs["base"] = f"{name}-{BASE}"
            self.add(f"{name}-{policy}", "evaluate", inputs, asked=asked if related else elsewhere, **rest)


@dataclass(frozen=True)
class Gate:
    """What decides whether there is a next round: the validations of the round's policy and of the one it has made."""

    round: int
    policy: str
    next: str


class StagedRecipe(Common):
    """One run of several stages, from the initial policy to the report."""

    stages: dict[StageName, AnyStage] = Field(min_length=1)
    """In this order; a stage names earlier ones alone."""
    rounds: Rounds | None = None
    """Default: the stages are done once."""
    validation: Validation | None = None
    """For `rounds.accept`, and for answers to prompts that are held out (`prompts: validation`)."""

    first: ClassVar[tuple[str, ...]] = (*Common.first, "stages", "rounds", "validation")

    @model_validator(mode="before")
    @classmethod
    def _written_out(cls, content: Any) -> Any:
        """What stages leave open, from the sections of the recipe; and a stage with a method trains it."""
        if not isinstance(content, dict) or not isinstance(content.get("stages"), dict):
            return content
        stages = {}
        for name, stage in content["stages"].items():
            if isinstance(stage, dict):
                if "method" in stage:
                    stage = {"do": "train", **stage}
                section = _INHERITED.get(stage["do"]) if isinstance(stage.get("do"), str) else None
                inherited = content.get(section) if section is not None else None
                if isinstance(inherited, dict):
                    stage = merge(inherited, stage)
            stages[name] = stage
        return {**content, "stages": stages}

    @classmethod
    def place(cls, location: list[str]) -> tuple[list[str], Iterator[str]]:
        if location[:1] != ["stages"] or len(location) < 3 or location[2] not in STEPS:
            return super().place(location)
        below = location[3:]  # pydantic puts the step in between
        return [*location[:2], *below], fields_at(STEPS[location[2]], below[:-1])

    @model_validator(mode="after")
    def _names_lead_back(self) -> StagedRecipe:
        known: dict[str, str] = {BASE: "policy", POLICY: "policy"}
        for name, stage in self.stages.items():
            if name in known:
                raise ValueError(f"a stage cannot be called '{name}', which is what stages start from: rename it")
            for given in stage.inputs.values():
                where = f"stages.{name}.{given.key}"
                if given.stage not in known:
                    late = given.stage in self.stages
                    raise ValueError(
                        f"{where} names '{given.stage}', which "
                        + (
                            "comes later: a stage takes what earlier ones make"
                            if late and given.stage != name
                            else f"is no earlier stage{did_you_mean(given.stage, known)}".rstrip("?")
                        )
                    )
                if known[given.stage] != given.kind:
                    fitting = [other for other, kind in known.items() if kind == given.kind]
                    raise ValueError(
                        f"{where} takes {_KINDS[given.kind]}, and '{given.stage}' gives {_KINDS[known[given.stage]]}: "
                        + (f"name one of {', '.join(fitting)}" if fitting else "add a stage before it that gives some")
                    )
            known[name] = stage.gives
        return self

    @model_validator(mode="after")
    def _rounds_differ(self) -> StagedRecipe:
        asked = [f"stages.{name}.prompts" for name, stage in self.stages.items() if _is_held_out(stage)]
        if self.rounds is not None and self.rounds.accept:
            asked.append("rounds.accept")
        if asked and self.validation is None:
            raise ValueError(f"{asked[0]} needs prompts that are set aside: add validation: {{prompts: …}}")
        if self.validation is not None and not asked:
            raise ValueError("validation decides nothing: set rounds.accept, or presample its prompts, or remove it")
        if self.rounds is None:
            return self
        following = self.rounds.next
        if following not in self.stages or self.stages[following].gives != "policy":
            policies = [name for name, stage in self.stages.items() if stage.gives == "policy"]
            raise ValueError(
                f"rounds.next names '{following}', which is no stage that gives a policy"
                + did_you_mean(following, policies).rstrip("?")
            )
        if following not in self.repeated:
            raise ValueError(
                f"rounds.next is '{following}', which does not depend on the round's `policy`, so every round would be "
                "the same: let a stage start from policy, or remove rounds"
            )
        return self

    @model_validator(mode="after")
    def _graph_is_possible(self) -> StagedRecipe:
        for node in self.nodes.values():
            if isinstance(node.stage, Merged):
                origins = {self.nodes[name].origin for name in node.inputs.values()}
                if len(origins) > 1:
                    raise ValueError(
                        f"stages.{node.label}.models come from {' and '.join(sorted(origins))}, models of their own "
                        "whose weights have nothing in common: merge policies of one origin"
                    )
            if isinstance(node.stage, Trained):
                self._require_owner(node, "store", "rehearses", node.inputs["model"])
                self._require_owner(node, "rollouts", "learns from", node.inputs["model"])
            if isinstance(node.stage, Scored):
                self._require_owner(
                    node, "held_out", "is checked on", self.nodes[node.inputs["rollouts"]].inputs["model"]
                )
                self._require_owner(node, "teacher_answers", "is chosen by", node.inputs.get("teacher"))
            if isinstance(node.stage, Trained) and node.stage.signal is not None:
                told = self.nodes[node.inputs["signal"]].inputs["rollouts"]
                if told != node.inputs.get("rollouts", told):
                    raise ValueError(
                        f"stages.{node.label}.signal is about the answers '{told}', and rollouts are "
                        f"'{node.inputs['rollouts']}': name the same"
                    )
            for part, given in (node.stage.inputs if node.stage is not None else {}).items():
                held_out = given.kind == "store" and _is_held_out(self.nodes[node.inputs[part]].stage)
                if given.kind == "store" and held_out != (part in ("held_out", "teacher_answers")):
                    raise ValueError(
                        f"stages.{node.label}.{part} takes answers to {'training' if held_out else 'validation'} "
                        f"prompts, and '{given.stage}' has those to the others: presample these (prompts)"
                    )
        return self

    def _require_owner(self, node: Node, part: str, what: str, wanted: str | None) -> None:
        """Refuse answers of another policy than those that a stage has to take.

        Raises:
            ValueError: so they are.
        """
        if part not in node.inputs or wanted is None:
            return
        owner = self.nodes[node.inputs[part]].inputs["model"]
        if owner != wanted:
            whose = "of the policy that it starts from" if isinstance(node.stage, Trained) else "of that policy"
            raise ValueError(
                f"stages.{node.label}.{part} holds answers of '{owner}', and a "
                f"{'method' if isinstance(node.stage, Trained) else 'signal'} {what} those {whose}, '{wanted}': "
                "presample that one"
            )

    @model_validator(mode="after")
    def _methods_are_possible(self) -> StagedRecipe:
        for node in self.nodes.values():
            if isinstance(node.stage, Trained):
                try:
                    self.plain(node)
                except ValidationError as error:
                    sentence = error.errors()[0]["msg"].removeprefix("Value error, ")
                    raise ValueError(f"stages.{node.label}: {sentence}") from None
        return self

    # ------------------------------------------------------------------ the graph

    @property
    def repeated(self) -> set[str]:
        """The stages that depend on the round's policy, and so are done in every round."""
        found: set[str] = set()
        for name, stage in self.stages.items():
            if any(given.stage == POLICY or given.stage in found for given in stage.inputs.values()):
                found.add(name)
        return found if self.rounds is not None else set()

    @cached_property
    def nodes(self) -> dict[str, Node]:
        """All the work by name, in the order in which it is done: base, the stages round by round, the evaluations.

        Raises:
            ValueError: two pieces of it have one name.
        """
        graph = _Graph()
        graph.add(BASE, "base", {})
        policy = BASE
        for number in range(1, (self.rounds.repeat if self.rounds is not None else 1) + 1):
            named = {BASE: BASE, POLICY: policy}
            for label, stage in self.stages.items():
                again = label in self.repeated
                named[label] = name = f"{label}-{number}" if again else label
                if number > 1 and not again:
                    continue
                shared: dict[str, Any] = {"stage": stage, "label": label, "round": number}
                if isinstance(stage, Evaluated):
                    graph.evaluate(name, [named[model] for model in stage.models], stage.asked, **shared)
                else:
                    inputs = {part: named[given.stage] for part, given in stage.inputs.items()}
                    inputs |= graph.scores(stage, inputs, number)
                    graph.add(name, stage.do, inputs, **shared)
            if self.rounds is not None:
                following = named[self.rounds.next]
                if self.rounds.accept and number < self.rounds.repeat:
                    for name in (policy, following):
                        if f"validate-{name}" not in graph.nodes:
                            asked = self._validated()
                            graph.add(f"validate-{name}", "validate", {"model": name}, asked=asked, round=number)
                policy = following
        shown = [name for name, node in graph.nodes.items() if getattr(node.stage, "evaluate", name == BASE)]
        graph.evaluate("evaluate", shown, self.evaluation)
        return graph.nodes

    @property
    def gates(self) -> list[Gate]:
        """What stands before the second and every later round; empty where all are taken."""
        if self.rounds is None or not self.rounds.accept:
            return []
        policies = [BASE, *(f"{self.rounds.next}-{number}" for number in range(1, self.rounds.repeat))]
        return [
            Gate(number, f"validate-{policy}", f"validate-{following}")
            for number, (policy, following) in enumerate(pairwise(policies), start=1)
        ]

    def _validated(self) -> Evaluation:
        """What decides on a policy."""
        if self.validation is None:
            raise ValueError("there are no validation prompts.")
        shared = {name: getattr(self.evaluation, name) for name in ("temperature", "top_p", "resamples", "confidence")}
        return Evaluation(n=self.validation.n, k=[1], seed=self.evaluation.seed, **shared)

    # ------------------------------------------------------------------ recipes of one stage

    def source(self, node: Node) -> dict[str, Any]:
        """Where the origin of a node's policy comes from, as a section `model` says it: path and revision, or
        warm_start."""
        if node.origin == BASE:
            return {name: getattr(self.model, name) for name in ("path", "revision", "warm_start")}
        made = self.nodes[node.origin].stage
        return {"warm_start": WarmStart(**{name: getattr(made, name) for name in WarmStart.model_fields})}

    def plain(self, node: Node, paths: Mapping[str, str] | None = None) -> Recipe:
        """The recipe of one node, as if it were a run of its own.

        Args:
            node: that is looked at.
            paths: of the policies that are there, by node; where a policy is still to be made, its origin stands for
                it, which has the same shape, tokenizer and chat template.

        Raises:
            ValidationError: a stage that cannot work.
        """
        paths = paths or {}

        def source(name: str) -> dict[str, Any]:
            if name in paths and name != BASE:
                return {"path": paths[name], "revision": None, "warm_start": None}
            return self.source(self.nodes[name])

        stage, values = node.stage, {name: getattr(self, name) for name in Common.model_fields}
        values["model"] = self.model.model_copy(update=source(node.inputs.get("model", node.origin)))
        values["evaluation"] = node.asked or Evaluation()
        values["method"] = Method(name="grpo")  # nothing is trained, unless the stage says so
        if isinstance(stage, Presampled):
            values["presample"] = Presample(**{name: getattr(stage, name) for name in Presample.model_fields})
        elif isinstance(stage, Paired):
            values["pairs"] = Pairs(**{name: getattr(stage, name) for name in Pairs.model_fields})
        elif isinstance(stage, Trained):
            args = stage.method.args if stage.answers is None else {**stage.method.args, "answers_of": "policy"}
            values["method"] = stage.method.model_copy(update={"args": args, "called": node.name})
            values["seed"] = self.seed if stage.seed is None else stage.seed
            if stage.teacher is not None:
                teachers = {label: source(node.inputs[label]) for label in stage.teacher.stages}
                values["teacher"] = stage.teacher.made(teachers)
        return Recipe(**values)

    @property
    def other_tasks(self) -> list[Task | Demonstrated]:
        """The tasks that are named beside `task`: asked further, or demonstrated by a warm start."""
        evaluations = [self.evaluation, *(stage for stage in self.stages.values() if isinstance(stage, Evaluated))]
        starts = [self.model.warm_start, *(stage for stage in self.stages.values() if isinstance(stage, WarmStarted))]
        return [
            *(further.task for asked in evaluations for further in asked.further.values()),
            *(task for start in starts if start is not None for task in start.also),
        ]
