"""What a recipe may say: a strict schema, `extends:` for bases, and `--set a.b=c` overrides. No torch, no TRL.

A recipe trains one method, and others beside it (`Recipe`), or says how stages follow one another
(`posttrain.stages.StagedRecipe`). It is a YAML file that holds departures from the defaults. `load` reads it with its
bases, applies overrides and validates; every mistake is one sentence that names the file, the key and the nearest known
name. The arguments of the trainer (`method.args`) are checked in a second pass, against the trainer's own config class
(`posttrain.launch.resolve`), because importing TRL takes seconds.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from posttrain.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from posttrain.stages import StagedRecipe


class Section(BaseModel):
    """Base of every section: unknown keys and silent conversions are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(gt=0, le=1)]
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class Demonstrated(Section):
    """Another task whose solutions a warm start learns."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Of all demonstrations; default what the others leave, shared equally with the run's own task."""


class Vision(Section):
    """The vision tower of a warm-started llava: CLIP's, as wide as the language model, with as many heads."""

    layers: PositiveInt = 2
    patch: PositiveInt = 8
    """Width of the square patches that images are cut into, in pixels; each becomes one token."""


class WarmStart(Section):
    """A small causal language model, made from nothing and trained by SFT on solutions the task generates."""

    architecture: Literal["qwen2", "qwen3", "llama", "llava"] = "qwen2"
    """llava, a qwen2 with a vision tower, for tasks whose prompts hold images; the others read text."""
    hidden_size: PositiveInt = 64
    """Width of the residual stream."""
    intermediate_size: PositiveInt = 172
    """Width of the gated MLP."""
    layers: PositiveInt = 2
    heads: PositiveInt = 4
    """Attention heads; must divide `hidden_size`."""
    steps: PositiveInt = 1500
    """Optimiser steps of supervised fine-tuning."""
    batch_size: PositiveInt = 128
    """Demonstrations per step."""
    learning_rate: PositiveFloat = 2e-3
    """Peak of a cosine schedule."""
    seed: NonNegativeInt = 0
    vision: Vision | None = None
    """Default: that of `Vision`."""
    also: list[Demonstrated] = Field(default_factory=list)
    """Tasks that are demonstrated beside the run's own, so that there is something to forget. All write in one chat
    template; their characters join the tokenizer."""

    @property
    def shares(self) -> list[float]:
        """Of the demonstrations: the run's own task, then those of `also`."""
        given = [None, *(task.share for task in self.also)]
        left = (1 - sum(share for share in given if share is not None)) / given.count(None)
        return [left if share is None else share for share in given]

    @model_validator(mode="after")
    def _own_share(self) -> WarmStart:
        given = sum(task.share for task in self.also if task.share is not None)
        if given >= 1:
            raise ValueError(f"the shares of `also` add up to {given:g}: leave some for the run's own task")
        return self

    @model_validator(mode="after")
    def _eyes(self) -> WarmStart:
        if self.vision is not None and self.architecture != "llava":
            raise ValueError(f"vision has no effect on the architecture {self.architecture}: remove it, or take llava")
        return self

    @model_validator(mode="after")
    def _heads_divide(self) -> WarmStart:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of 2 × heads = {2 * self.heads}: change one of them"
            )
        return self


class Lora(Section):
    """Low-rank adapters (peft.LoraConfig)."""

    r: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: list[str] | Literal["all-linear"] = "all-linear"


class Model(Section):
    """The initial policy: a model on disk or on the hub (`path`), or one that is made here (`warm_start`)."""

    path: str | None = None
    """Folder, or name on the Hugging Face hub."""
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    lora: Lora | None = None
    warm_start: WarmStart | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        if (self.path is None) == (self.warm_start is None):
            raise ValueError("name exactly one source: path (a model that exists) or warm_start (one made here)")
        if self.warm_start is not None and self.revision is not None:
            raise ValueError("revision has no effect on a warm-started model: remove it")
        return self


class Task(Section):
    """Where prompts come from (`posttrain tasks` lists them)."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


class Reward(Section):
    """One column of rewards: a verifier of the registry (`name`) or your own TRL reward (`function`)."""

    name: str | None = None
    function: str | None = None
    """`module:function` with TRL's signature (prompts, completions, **columns) -> list[float | None]."""
    options: dict[str, Any] = Field(default_factory=dict)
    weight: float = 1.0
    """Factor in the sum that GRPO normalises."""
    max_failures: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of completions that a verifier may fail to judge, through no fault of theirs, before the run stops; default
    that of `RewardFunction`."""
    patience: Annotated[float, Field(gt=0)] | None = Field(default=None, exclude_if=lambda value: value is None)
    """Seconds that training waits for a verifier with workers at each step; default that of `RewardFunction`."""

    @model_validator(mode="after")
    def _one_source(self) -> Reward:
        if (self.name is None) == (self.function is None):
            raise ValueError("give either name (a verifier of the registry) or function (module:function)")
        if self.function is not None and self.max_failures is not None:
            raise ValueError("max_failures counts what a verifier says, and a function says nothing: remove it")
        if self.function is not None and self.patience is not None:
            raise ValueError("patience bounds what a verifier takes, and a function takes what it takes: remove it")
        if self.function is not None and self.options:
            raise ValueError("options belong to a reward of the registry; a function takes none")
        return self


class Method(Section):
    """The trainer (`posttrain methods` lists them) and its arguments."""

    name: str
    prompts_per_step: PositiveInt | None = None
    """Prompts (or preference pairs, or answers of `sft`) per optimiser step; when given, `gradient_accumulation_steps`
    follows from it."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Fields of the trainer's config class (`posttrain methods show NAME`)."""
    called: Label | None = None
    """Name of the run; default the method's."""

    @property
    def label(self) -> str:
        """Name of the run."""
        return self.called or self.name


class Baseline(Section):
    """Another method beside the main one. It takes over every argument of `method.args` that its config class knows."""

    name: str
    prompts_per_step: PositiveInt | None = None
    """Where it differs from the main method's: `sft` counts answers, so prompts × num_generations is an equal batch."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments that differ from `method.args`."""
    called: Label | None = None
    """Name of the run, when one method runs more than once; default its method's."""
    seed: NonNegativeInt | None = None
    """Seed of this training run, when it differs from the recipe's."""

    @property
    def label(self) -> str:
        """Name of the run."""
        return self.called or self.name


class Presample(Section):
    """Phase 1 of DPH-RL: answers of the initial policy, verified and split. Defaults: the paper and its code.

    Source: arXiv 2509.07430 (k = 8, T = 1; top-p 0.95 from the released code).
    """

    samples_per_prompt: PositiveInt = 8
    """k answers per training prompt."""
    temperature: PositiveFloat = 1.0
    top_p: Probability = 0.95
    pef_threshold: PositiveInt | None = None
    """A prompt with at least this many of k answers correct is near-perfect (D_pef); default k, the strictest."""
    stored_per_prompt: PositiveInt = 1
    """Fresh answers drawn, checked and stored for each near-perfect prompt."""
    on_failed_check: Literal["explore", "drop"] = "explore"
    """Where a prompt goes whose fresh answer is wrong: back to exploration, or out of the data."""
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _threshold_reachable(self) -> Presample:
        if self.pef_threshold is not None and self.pef_threshold > self.samples_per_prompt:
            raise ValueError(
                f"pef_threshold {self.pef_threshold} exceeds samples_per_prompt {self.samples_per_prompt}: no prompt "
                "could reach it"
            )
        return self


class Pairs(Section):
    """Preference pairs from pre-sampled answers: a better one (chosen) against a worse one (rejected) to one prompt."""

    per_prompt: PositiveInt = 4
    """At most this many pairs of one prompt (m)."""
    choose: Literal["random", "length_matched", "short_over_long"] = "random"
    """Which pairs of a prompt: drawn at random; those of most similar lengths first; or the shortest better answers
    against the longest worse ones."""
    margin: PositiveFloat = 1.0
    """Smallest difference of rewards, chosen − rejected; 1 is correct against wrong."""
    max_length_ratio: Annotated[float, Field(ge=1)] | None = None
    """Length control: the longer answer of a pair has at most this many times the tokens of the shorter one."""
    truncated: Literal["drop", "keep"] = "drop"
    """Answers that were cut off have no end to learn: leave them out, or keep them."""
    seed: NonNegativeInt = 0


class Vllm(Section):
    """Settings of a vLLM engine, in the training processes or in a server that the run starts."""

    gpu_memory_utilization: Probability | None = None
    """Share of a GPU's memory for vLLM's weights and cache; default 0.3 beside a trainer, 0.9 in a server."""
    tensor_parallel: PositiveInt = 1
    """GPUs that share one copy of the model; in a server only."""
    max_model_len: PositiveInt | None = None
    """Longest prompt and answer together, in tokens; default what the model allows."""
    max_num_seqs: PositiveInt = 256
    """Sequences that are decoded at a time."""
    enforce_eager: bool | None = None
    """Run without compiled graphs; default on CPUs only, where every new shape would be compiled again."""
    prefix_caching: bool = True
    sleep: bool = False
    """Give vLLM's memory back while the trainer computes; beside a trainer on GPUs only."""


class Server(Section):
    """A vLLM server: one that runs (`url`, see `posttrain serve`), or without `url` one that the run starts itself."""

    url: str | None = None
    """As in http://127.0.0.1:8000."""
    devices: Annotated[str, BeforeValidator(str)] | None = None
    """GPUs of a server that the run starts, as in 6,7 (its CUDA_VISIBLE_DEVICES)."""
    transfer: Literal["auto", "nccl", "folder"] = "auto"
    """How weights travel: from GPU to GPU (nccl), or as a safetensors folder that both sides can read; auto takes nccl
    when trainer and server are on GPUs."""
    folder: str | None = None
    """Where folder transfer writes; default memory (/dev/shm) of a server on this machine."""
    timeout: PositiveFloat = 600.0
    """Longest time that one call may take, in seconds."""
    start_timeout: PositiveFloat = 600.0
    """Longest time until a server answers at all, in seconds."""

    @model_validator(mode="after")
    def _one_server(self) -> Server:
        if self.url is not None and self.devices is not None:
            raise ValueError("devices are of a server that the run starts: remove devices or url")
        return self


class Hint(Section):
    """Privileged context: what a teacher reads in its prompts and the student does not."""

    text: str
    """Columns of the task row stand in braces, as in "The answer is {solution}."."""
    role: Literal["system", "user"] = "system"
    """system: a system message at the front; user: directly in front of the last user message, or of plain text."""

    @property
    def columns(self) -> list[str]:
        """Those that the text names."""
        return [name for _, name, _, _ in Formatter().parse(self.text) if name is not None]

    @model_validator(mode="after")
    def _names_columns(self) -> Hint:
        try:
            parts = list(Formatter().parse(self.text))
        except ValueError as error:
            raise ValueError(f"the text is no template ({error}): write a brace that is meant as one twice") from error
        for _, name, form, _ in parts:
            if name is not None and (not name or name.isdigit() or set(name) & set(".[]") or "{" in (form or "")):
                raise ValueError(f"'{{{name}}}' names no column of the task rows: braces hold a column's name alone")
        return self


class Teacher(Section):
    """What distillation learns from beside the verifier.

    It is a model that exists (`path`), one that is made here (`warm_start`), the student itself (`base`, `self`), or
    one of `several` for each row. A model of its own is whole in every training process, unless `device`, `device_map`,
    `sharded` or `server` says otherwise. It is evaluated beside the methods, without its hint, if the engine of the
    rollouts can hold it: one behind a server takes vllm_server, one of another shape than the policy takes
    transformers, and a sharded one takes none.
    """

    path: str | None = None
    """Folder, or name on the Hugging Face hub."""
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of its weights; default the model's."""
    warm_start: WarmStart | None = None
    """Made from nothing on the run's task, as `model.warm_start`."""
    method: Method | None = None
    """Trains a teacher that was made here, on the run's prompts and rewards; default none."""
    base: bool = False
    """The base of a LoRA student, which is the initial policy, without further memory."""
    self: bool = False
    """The student as it is now, which reads a hint (self-distillation)."""
    by: str | None = None
    """The column of the task rows that names the one of `several` that teaches a row."""
    several: Mapping[Label, Teacher] = Field(default_factory=dict)
    """Teachers by name, none of them made here."""
    hint: Hint | None = None
    template: Literal["student", "teacher"] | None = None
    """Whose chat template renders its prompts, where the two differ."""
    device: Annotated[str, Field(pattern=r"^[a-z]+(:\d+)?$")] | None = None
    """Where it is in every training process, as in cuda:1; default the process's own GPU."""
    device_map: str | dict[str, str | int] | None = None
    """Of accelerate, over several devices, as in auto."""
    sharded: bool = False
    """Split over the training processes, as ZeRO-3 splits the student."""
    server: Server | None = None
    """Behind a vLLM server of its own: one that runs (`posttrain serve`), or without `url` one that the run starts."""
    vllm: Vllm = Field(default_factory=Vllm)
    """Settings of a server that the run starts."""
    batch_size: PositiveInt | None = None
    """Sequences per forward in the training processes; default 64."""

    @property
    def is_student(self) -> bool:
        """Whether it has no weights of its own."""
        return self.base or self.self

    sources: ClassVar[tuple[str, ...]] = ("path", "warm_start", "base", "self", "several")
    """Keys of which exactly one says what the teacher is."""
    wanted: ClassVar[str] = (
        "path (a model that exists), warm_start (one made here), base or self (the student), or several"
    )
    """The same in words."""

    @model_validator(mode="after")
    def _one_source(self) -> Teacher:
        if sum(bool(getattr(self, name)) for name in self.sources) != 1:
            raise ValueError(f"name exactly one source: {self.wanted}")
        if self.path is not None and self.method is not None:
            raise ValueError("method trains a teacher that is made here: remove it, or give warm_start instead of path")
        if self.warm_start is not None and self.revision is not None:
            raise ValueError("revision has no effect on a warm-started teacher: remove it")
        if self.self and self.hint is None:
            raise ValueError("the student has nothing to tell itself: give it a hint, or name another teacher")
        if (self.by is None) == bool(self.several):
            raise ValueError("by names the column that chooses among several teachers: give both or neither")
        made = next((name for name, other in self.several.items() if other.warm_start or other.several), None)
        if made is not None:
            raise ValueError(f"several teachers are there already: give '{made}' a path, or base or self")
        if any(other.sharded for other in self.several.values()):
            raise ValueError("processes have different numbers of rows for several teachers: none can be sharded")
        return self

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Teacher:
        fields = type(self).model_fields.items()
        said = [name for name, field in fields if getattr(self, name) != field.get_default(call_default_factory=True)]
        for applies, known, where in (
            (bool(self.several), ("by", "several"), "several teachers: say it of each"),
            (self.is_student, ("base", "self", "hint", "batch_size"), "the student's own model: remove it"),
        ):
            idle = next((name for name in said if applies and name not in known), None)
            if idle is not None:
                raise ValueError(f"{idle} has no effect on {where}")
        places = [name for name in ("device", "device_map", "sharded", "server") if name in said]
        if len(places) > 1:
            raise ValueError(f"{places[0]} and {places[1]} both say where the teacher is: give one of them")
        if self.server is None:
            if self.vllm != Vllm():
                raise ValueError("vllm settings are of a server that the run starts: add server: {}, or remove them")
            return self
        if self.batch_size is not None:
            raise ValueError("batch_size has no effect on a teacher behind a server: remove it")
        if self.server.transfer != "auto" or self.server.folder is not None:
            raise ValueError("a teacher's server takes no weights: remove server.transfer and server.folder")
        if self.vllm.sleep:
            raise ValueError("sleep is for vLLM beside a trainer: remove it")
        if self.server.url is not None and self.vllm != Vllm():
            raise ValueError("vllm settings belong to the server that runs already (server.url): remove them here")
        if self.server.url is not None and self.warm_start is not None:
            raise ValueError("a server that runs already has no teacher that is made here: remove server.url")
        return self


class Rollout(Section):
    """How answers are generated; one engine and one set of sampling settings serve the whole run."""

    engine: Literal["transformers", "vllm_colocate", "vllm_server"] = "transformers"
    """transformers: the policy generates by itself; vllm_colocate: vLLM in every training process; vllm_server: a vLLM
    server."""
    max_tokens: PositiveInt = 512
    """Longest answer in tokens, the end-of-sequence token included."""
    temperature: PositiveFloat = 1.0
    """Of training rollouts; log-probs are taken at the same temperature."""
    batch_size: PositiveInt | None = None
    """Answers per part in pre-sampling and evaluation, which is what an interruption can lose; with transformers, also
    sequences per `generate` call. Default 256 with transformers, 4096 with vLLM."""
    sampler_gap_limit: PositiveFloat | None = None
    """Largest difference between the log-probs of engine and trainer before the first update, in nats per token (99th
    percentile); more stops the run. Default 0.05 in float32, 0.3 in half precision."""
    lora_sync: Literal["merge", "adapter"] = "merge"
    """How LoRA reaches a vLLM engine: merged into the weights (from a float32 copy), or as an adapter beside them."""
    vllm: Vllm = Field(default_factory=Vllm)
    server: Server = Field(default_factory=Server)

    @property
    def answers_per_part(self) -> int:
        """`batch_size`, or the engine's default."""
        return self.batch_size or (256 if self.engine == "transformers" else 4096)

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Rollout:
        if self.engine != "vllm_server" and self.server != Server():
            raise ValueError(f"server has no effect on the engine {self.engine}: remove it, or set engine: vllm_server")
        if self.engine == "transformers" and (self.vllm != Vllm() or self.lora_sync != "merge"):
            raise ValueError("vllm and lora_sync have no effect on the engine transformers: remove them")
        if self.engine == "vllm_colocate" and self.vllm.tensor_parallel > 1:
            raise ValueError("tensor_parallel needs a server: set engine: vllm_server")
        if self.engine == "vllm_server" and self.vllm.sleep:
            raise ValueError("sleep is for vLLM beside a trainer: set engine: vllm_colocate")
        if self.server.url is not None and self.vllm != Vllm():
            raise ValueError("vllm settings belong to the server that runs already (server.url): remove them here")
        return self


class Diversity(Section):
    """How much answers to one prompt differ, at several temperatures. Settings of f-DPO, arXiv 2309.16240."""

    temperatures: list[PositiveFloat] = Field(default_factory=lambda: [0.6, 1.0, 1.4], min_length=1)
    n: Annotated[int, Field(ge=2)] = 25
    """Answers per prompt."""
    top_p: Probability = 0.95
    prompts: PositiveInt | None = None
    """Held-out prompts, the first ones of the evaluation; default all of them."""


class Divergence(Section):
    """Divergences of every policy from the initial one, over the whole vocabulary, on prefixes it wrote itself."""

    names: list[str] = Field(default_factory=lambda: ["reverse_kl", "forward_kl", "js"], min_length=1)
    """Names of `posttrain.objectives.divergences`."""
    answers: PositiveInt = 4
    """Answers per held-out prompt whose prefixes are taken, the first ones of the evaluation."""


class Calibration(Section):
    """Expected calibration error of the implicit preferences, on held-out pairs."""

    bins: PositiveInt = 10
    """Equal-width bins of confidence in the chosen one of two answers, over [½, 1]."""
    pairs_per_prompt: PositiveInt = 1
    """Held-out pairs of one prompt, built from the initial policy's answers where the task brings none."""


def _require_reachable(n: int, ks: Sequence[int]) -> None:
    """Refuse pass@k that n answers cannot give, and k out of order.

    Raises:
        ValueError: so it is.
    """
    too_large = [k for k in ks if k > n]
    if too_large:
        raise ValueError(f"k = {too_large[0]} exceeds n = {n}: draw more answers (n) or ask for a smaller k")
    if sorted(set(ks)) != ks:
        raise ValueError(f"k must increase without repeats, got {ks}")


class Further(Section):
    """Another task whose held-out rows every policy answers, judged by its own verifier: what training unlearned."""

    task: Task
    prompts: PositiveInt | None = None
    """Held-out prompts; default all of them."""
    n: PositiveInt = 32
    """Answers per prompt; n ≥ 2k is advised."""
    k: list[PositiveInt] = Field(default_factory=lambda: [1, 16], min_length=1)
    max_tokens: PositiveInt | None = None
    """Longest answer in tokens; default rollout.max_tokens."""

    @model_validator(mode="after")
    def _k_at_most_n(self) -> Further:
        _require_reachable(self.n, self.k)
        return self


class Evaluation(Section):
    """pass@k of the initial policy and of every trained one, on the same held-out prompts, and what else is asked."""

    prompts: PositiveInt | None = None
    """Held-out prompts; default all of them."""
    n: PositiveInt = 128
    """Answers per prompt; n ≥ 2k is advised."""
    k: list[PositiveInt] = Field(default_factory=lambda: [1, 4, 16, 64], min_length=1)
    temperature: PositiveFloat = 1.0
    top_p: Probability = 1.0
    resamples: PositiveInt = 1000
    """Bootstrap resamples behind every interval."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    seed: NonNegativeInt = 1234
    diversity: Diversity | None = None
    """Default: not measured."""
    divergence: Divergence | None = None
    """Default: not measured."""
    calibration: Calibration | None = None
    """Default: not measured."""
    further: dict[Label, Further] = Field(default_factory=dict)
    """Other tasks, by name, for what was forgotten there; temperature, top-p, seed and intervals are those above."""

    @model_validator(mode="after")
    def _k_at_most_n(self) -> Evaluation:
        _require_reachable(self.n, self.k)
        return self


CONFIGS = ("ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2")
"""The accelerate configurations that ship with the package, in recipes/accelerate."""


def is_path(config: str) -> bool:
    """Whether `launch.config` names a file, and not one of `CONFIGS`."""
    return config.endswith((".yaml", ".yml", ".json")) or "/" in config


class Launch(Section):
    """How many processes train, on how many machines, and how the model is split over them."""

    processes: PositiveInt = 1
    """In all, over all machines."""
    config: str | None = None
    """ddp, zero1, zero2, zero3, zero3_offload, fsdp2 (recipes/accelerate), or the path of an accelerate configuration;
    default ddp for several processes, nothing for one."""
    machines: PositiveInt = 1
    """The same command is started on each of them; all must see the same --output-dir and POSTTRAIN_CACHE."""
    # Where machines meet is no part of what they compute, so it is no part of the stored recipe.
    machine_rank: Annotated[int | None, Field(ge=0, exclude=True)] = None
    """Of this machine, from 0; default Slurm's SLURM_NODEID."""
    main_address: Annotated[str | None, Field(exclude=True)] = None
    """Host name or address of machine 0; default the first host of Slurm's SLURM_JOB_NODELIST."""
    main_port: Annotated[int | None, Field(gt=0, lt=65536, exclude=True)] = None
    """Free port on machine 0; default 29500, under Slurm one that follows from the job's number."""

    @model_validator(mode="after")
    def _shares_of_machines(self) -> Launch:
        if self.processes % self.machines:
            raise ValueError(f"{self.processes} processes cannot be shared evenly by {self.machines} machines")
        if self.machines == 1:
            for name in ("machine_rank", "main_address", "main_port"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} has no effect on one machine: remove it, or set machines")
        elif self.machine_rank is not None and self.machine_rank >= self.machines:
            raise ValueError(f"machine_rank {self.machine_rank} is none of {self.machines} machines: they count from 0")
        if self.config is not None and not is_path(self.config) and self.config not in CONFIGS:
            raise ValueError(
                f"there is no configuration '{self.config}'{did_you_mean(self.config, CONFIGS).rstrip('?')}"
            )
        return self


class Common(Section):
    """What every recipe says: the policy that it starts from, the task, and how answers are drawn and judged."""

    name: str
    seed: NonNegativeInt = 0
    """Seed of the training runs (data order, sampling, dropout)."""
    model: Model
    task: Task
    rewards: list[Reward] = Field(default_factory=list)
    """Default: the verifier of the task, weight 1."""
    presample: Presample = Field(default_factory=Presample)
    pairs: Pairs = Field(default_factory=Pairs)
    rollout: Rollout = Field(default_factory=Rollout)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    launch: Launch = Field(default_factory=Launch)

    first: ClassVar[tuple[str, ...]] = ("name", "seed", "model", "task", "rewards")
    """The sections that come first when a recipe is written."""

    def digest(self) -> str:
        """A hash of everything the recipe says (16 hex digits)."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The resolved recipe: every default written out."""
        content = self.model_dump(mode="json")
        content = {**{name: content[name] for name in self.first}, **content}
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)

    @classmethod
    def place(cls, location: list[str]) -> tuple[list[str], Iterator[str]]:
        """A key that pydantic complains of as it is written, and the known keys of the section that it stands in."""
        return location, fields_at(cls, location[:-1])


class Recipe(Common):
    """One run, from the initial policy to the report: a method, and others beside it."""

    method: Method
    teacher: Teacher | None = None
    """For methods that distil; evaluated beside them as `teacher`."""
    baselines: list[Baseline] = Field(default_factory=list)
    """Methods that are trained and evaluated beside this one, on the same model, task and settings."""
    sweep: dict[str, list[Any]] = Field(default_factory=dict)
    """A grid: the method is trained once for every combination of the values that are listed, as in
    {method.args.beta: [0.03, 0.1], seed: [0, 1]}. Keys are method.args.NAME, seed, method.args with mappings of
    arguments that belong together, or method with mappings {name, prompts_per_step, args, called}, each of which takes
    over `method` as a baseline does. What else a recipe says is shared, so that all runs can be compared."""

    first: ClassVar[tuple[str, ...]] = (*Common.first, "method", "teacher")

    @model_validator(mode="after")
    def _labels_differ(self) -> Recipe:
        for key, values in self.sweep.items():
            if not values:
                raise ValueError(f"sweep.{key} lists no value")
            if key == "method.args":
                if not all(isinstance(value, dict) and value for value in values):
                    raise ValueError("sweep.method.args lists mappings of arguments, as in [{divergence: js}]")
            elif key == "method":
                if any(other.startswith("method.") for other in self.sweep):
                    raise ValueError("sweep.method lists whole methods: give their arguments there, in args")
                for value in values:
                    _method_of(value)
            elif key == "seed":
                if not all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values):
                    raise ValueError(f"sweep.seed lists numbers from 0, got {values}")
            elif not re.fullmatch(r"method\.args\.\w+", key):
                raise ValueError(
                    f"a sweep cannot vary {key}, only method, method.args and seed: its runs share model, data and "
                    "evaluation, or they could not be compared; start a run for each value instead"
                )
        labels = [
            "base",
            *self.teachers,
            *(baseline.label for baseline in self.baselines),
            *(self.cells or [self.method.label]),
        ]
        if len(self.cells) < math.prod(len(values) for values in self.sweep.values()) and self.sweep:
            raise ValueError("two combinations of the sweep are the same")
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            raise ValueError(f"two runs are called '{twice}': give the baseline another name (called)")
        return self

    @model_validator(mode="after")
    def _teachers_are_possible(self) -> Recipe:
        for teacher in self.teachers.values():
            if teacher.base and self.model.lora is None:
                raise ValueError("teacher.base is the base of a LoRA student: set model.lora, or name a model (path)")
            if teacher.server is not None and self.rollout.temperature != 1.0:
                raise ValueError(
                    "a vLLM server scores at temperature 1 alone, and answers are drawn at "
                    f"{self.rollout.temperature:g} (rollout.temperature): set it to 1, or take a teacher without server"
                )
            if not teacher.sharded:
                continue
            config = self.launch.config
            if config is not None and not is_path(config) and not config.startswith("zero3"):
                raise ValueError(
                    f"teacher.sharded splits the teacher by ZeRO-3, and launch.config is {config}: set it to zero3, or "
                    "remove sharded"
                )
            if teacher.dtype not in (None, self.model.dtype):
                raise ValueError(
                    f"a sharded teacher computes in the policy's dtype {self.model.dtype}, not in {teacher.dtype}: "
                    "remove teacher.dtype"
                )
        return self

    @property
    def teachers(self) -> dict[str, Teacher]:
        """Every teacher by its label: `teacher`, or `teacher-NAME` of each of several."""
        if self.teacher is None:
            return {}
        several = {f"teacher-{name}": teacher for name, teacher in self.teacher.several.items()}
        return several or {"teacher": self.teacher}

    @property
    def other_tasks(self) -> list[Task | Demonstrated]:
        """The tasks that are named beside `task`: asked further, or demonstrated by a warm start."""
        starts = [self.model.warm_start, self.teacher.warm_start if self.teacher is not None else None]
        return [
            *(further.task for further in self.evaluation.further.values()),
            *(task for start in starts if start is not None for task in start.also),
        ]

    @property
    def cells(self) -> dict[str, dict[str, Any]]:
        """The combinations of the sweep by the name of their run: arguments, `method` (its label) and `seed`."""
        found = {}
        for combination in itertools.product(*self.sweep.values()) if self.sweep else ():
            settings: dict[str, Any] = {}
            for key, value in zip(self.sweep, combination, strict=True):
                if key == "method":
                    value = _method_of(value).label
                settings.update(value if key == "method.args" else {key.removeprefix("method.args."): value})
            # {divergence: alpha, alpha: 0.5} is alpha0.5
            named = {
                name: value for name, value in settings.items() if not (isinstance(value, str) and value in settings)
            }
            found["-".join(_short(name, value) for name, value in named.items())] = settings
        return found

    @property
    def swept_methods(self) -> dict[str, Baseline]:
        """The methods that the sweep lists, by label."""
        return {method.label: method for method in map(_method_of, self.sweep.get("method", []))}


def _method_of(value: Any) -> Baseline:
    """One value of `sweep.method`.

    Raises:
        ValueError: it is no method, or has a seed.
    """
    known = ("name", "prompts_per_step", "args", "called")
    if not isinstance(value, dict) or "name" not in value or not set(value) <= set(known):
        raise ValueError(f"sweep.method lists methods as {{{', '.join(known)}}}, got {value!r}")
    return Baseline(**value)


def _short(name: str, value: Any) -> str:
    """A setting as part of a run's name: `js`, `beta0.1`, `match_slope`, `no-match_slope`."""
    if isinstance(value, bool):
        return name if value else f"no-{name}"
    text = value if isinstance(value, str) else f"{name}{value}"
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text).strip("_.-") or name


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-6 as a float (YAML 1.2) and refuses a key that is written twice."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)$|^[-+]?(\d+\.\d*|\.\d+)$|^[-+]?\.(inf|Inf)$"),
    list("-+0123456789."),
)


def _construct_mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *anchor`, whose keys may be written again
            continue
        key = loader.construct_object(key_node, deep=deep)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key '{key}' is written twice", key_node.start_mark
            )
        seen.add(key)
    loader.flatten_mapping(node)
    return dict(loader.construct_pairs(node, deep=deep))


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)

RECIPES = Path(__file__).resolve().parent / "recipes"


def parse_value(text: str) -> Any:
    """A value as YAML reads it: `1e-6` a float, `true` a bool, `[1, 4]` a list, everything else a string."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader


def names() -> dict[str, Path]:
    """The recipes that ship with the package, by name (`dph_rl/countdown3`): no bases, no launch configurations."""
    return {
        str(path.relative_to(RECIPES).with_suffix("")): path
        for path in sorted(RECIPES.glob("*/*.yaml"))
        if path.parent.name not in ("bases", "accelerate")
    }


def find(reference: str) -> Path:
    """The file of a recipe: a path, or the name of one that ships with the package.

    Raises:
        UserError: there is neither.
    """
    path = Path(reference)
    if path.is_file():
        return path.resolve()
    known = names()
    name = re.sub(r"^recipes/|\.ya?ml$", "", reference)
    if name in known:
        return known[name]
    if path.is_dir():
        raise UserError(f"'{reference}' is a folder, not a recipe{did_you_mean(name, known)}")
    raise UserError(f"There is no recipe '{reference}', neither a file nor one of ours{did_you_mean(name, known)}")


def read(path: Path, _chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The recipe's mapping with its bases merged in, not validated yet: later ones over earlier ones, itself over all.

    Raises:
        UserError: the file cannot be read or parsed, or the chain of `extends:` is broken or circular.
    """
    path = path.resolve()
    if path in _chain:
        raise UserError(f"The recipe {path.name} extends itself through {' -> '.join(p.name for p in _chain)}.")
    try:
        content = parse_value(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        source = f", which {_chain[-1].name} extends" if _chain else ""
        raise UserError(f"There is no recipe file {path}{source}: correct the path.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, but a recipe is a mapping of sections.")
    named = content.pop("extends", [])
    bases = [named] if isinstance(named, str) else named
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"extends in {path} must be a path, or a list of them, got {named!r}.")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = merge(merged, read(path.parent / base, (*_chain, path)))
    return merge(merged, content)


def merge(base: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`change` over `base`, mapping by mapping; lists and scalars are replaced."""
    merged = dict(base)
    for key, value in change.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def override(content: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """`a.b=c` assignments over a recipe's mapping; values are read as YAML.

    Raises:
        UserError: an assignment has no `=`, or runs through something that is no mapping.
    """
    for assignment in assignments:
        keys, equals, text = assignment.partition("=")
        parts = keys.strip().split(".")
        if not equals or not all(parts):
            raise UserError(f"--set takes a.b=value, got '{assignment}'.")
        try:
            change: Any = parse_value(text)
        except yaml.YAMLError:
            raise UserError(f"--set {keys}: '{text}' is no YAML value; quote it.") from None
        for part in reversed(parts):
            change = {part: change}
        node: Any = content
        for depth, part in enumerate(parts[:-1]):
            node = node.get(part) if isinstance(node, dict) else None
            if node is not None and not isinstance(node, dict):
                raise UserError(f"--set {keys}: '{'.'.join(parts[: depth + 1])}' is a value, not a section.")
        content = merge(content, change)
    return content


def spread(assignments: Sequence[str]) -> tuple[list[str], dict[str, list[Any]]]:
    """`--set` assignments of a sweep: those with one value, and the values of the others, `a.b=1,2`.

    Commas inside brackets, braces and quotes belong to a value.

    Raises:
        UserError: an assignment has no `=`, or a value is no YAML.
    """
    single, several = [], {}
    for assignment in assignments:
        key, _, text = assignment.partition("=")
        pieces = [piece.strip() for piece in _TOP_LEVEL.findall(text)]
        if len(pieces) < 2:
            single.append(assignment)
            continue
        try:
            several[key.strip()] = [parse_value(piece) for piece in pieces]
        except yaml.YAMLError:
            raise UserError(f"--set {key}: '{text}' are no YAML values; quote them.") from None
    return single, several


_TOP_LEVEL = re.compile(r"""((?:[^,\[\]{}"']|\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*')+)""")


def validate(content: Mapping[str, Any], source: str) -> Recipe | StagedRecipe:
    """Check a mapping against the schema: that of stages where it has some.

    Raises:
        UserError: the first mistake, with its key, what was wanted and the nearest known name.
    """
    schema: type[Recipe | StagedRecipe] = Recipe
    if "stages" in content:
        from posttrain.stages import StagedRecipe

        if "method" in content:
            raise UserError(
                f"{source}: method is one training run and stages are several, and a recipe has one of the two: remove "
                "method, or stages."
            )
        schema = StagedRecipe
    try:
        return schema(**content)
    except ValidationError as error:
        raise UserError(_sentence(error, source, schema)) from None


def load(reference: str, assignments: Sequence[str] = ()) -> Recipe | StagedRecipe:
    """Find, read, override and validate a recipe.

    Raises:
        UserError: anything in it is wrong.
    """
    path = find(reference)
    return validate(override(read(path), assignments), path.name)


def _sentence(error: ValidationError, source: str, schema: type[Common]) -> str:
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    location, known = schema.place([str(part) for part in first["loc"]])
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        return f"{source}: unknown key '{key}'{did_you_mean(location[-1], known)}"
    if first["type"] == "missing":
        return f"{source}: the key '{key}' is missing."
    if first["type"] == "union_tag_invalid":
        steps = re.findall(r"'(\w+)'", first["ctx"]["expected_tags"])
        tag = first["ctx"]["tag"]
        return f"{source}: {key}.do: there is no step '{tag}'{did_you_mean(tag, steps)}"
    if first["type"] == "union_tag_not_found":
        return f"{source}: {key} says neither what to do (do) nor which method to train: add one of them."
    message = first["msg"].removeprefix("Value error, ")
    found = "" if first["type"] == "value_error" else f", found {first['input']!r}"
    return f"{source}: {key or 'recipe'}: {message[0].lower()}{message[1:]}{found}."


def fields_at(section: type[BaseModel], location: Sequence[str]) -> Iterator[str]:
    """Known keys of the section at a location below another one."""
    for part in location:
        field = section.model_fields.get(part)
        if field is None:
            continue  # an index into a list
        candidates = [field.annotation, *get_args(field.annotation)]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), section)
    yield from section.model_fields
