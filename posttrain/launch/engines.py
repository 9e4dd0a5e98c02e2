"""The engine of a run: which one, started when it is first needed, and on whose weights it stands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from posttrain import tasks
from posttrain.errors import UserError
from posttrain.launch.workers import Workers
from posttrain.recipe import Recipe
from posttrain.rollouts.fingerprint import files_fingerprint
from posttrain.rollouts.tokens import load_processing_class, model_class, prompt_lengths
from posttrain.rollouts.vllm_common import (
    check_head_size,
    check_model,
    local_folder,
    require_vllm,
    saved_fingerprint,
)


def require_engine(recipe: Recipe) -> None:
    """Refuse an engine that cannot run here, or not with this model; before anything is made.

    Raises:
        UserError: vLLM is not installed, or has no kernel for the model's attention heads.
    """
    rollout, model = recipe.rollout, recipe.model
    if rollout.engine == "transformers" or rollout.server.url is not None:  # a server may be another machine
        return
    on_cpu = not torch.cuda.is_available()
    require_vllm(on_cpu=on_cpu)
    if model.path is not None:
        check_model(model.path, on_cpu=on_cpu, revision=model.revision)
    elif model.warm_start is not None and on_cpu:
        check_head_size(model.warm_start.hidden_size // model.warm_start.heads, "the model that is made here")


def require_images(recipe: Recipe, task: tasks.BaseTask) -> None:
    """Refuse what cannot read a task's images; before anything is made. What is made here is refused by the warm start.

    Raises:
        UserError: the engine, the model or the teacher reads text alone.
    """
    if not task.images:
        return
    engine = recipe.rollout.engine
    if engine != "transformers":
        raise UserError(
            f"The prompts of the task '{task.name}' hold images, which the engine {engine} is not given here: set "
            "rollout.engine: transformers."
        )
    for section, named in (("model", recipe.model), ("teacher", recipe.teacher)):
        if named is None or named.path is None:
            continue
        if model_class(named.path, revision=named.revision) is AutoModelForCausalLM:
            raise UserError(
                f"The prompts of the task '{task.name}' hold images, and the {section} '{named.path}' reads none: name "
                f"a vision-language model ({section}.path)."
            )
        load_processing_class(named.path, revision=named.revision)


class Engines:
    """Lends the engine that a recipe names, with the weights that are asked for.

    With `transformers`, a model is loaded for each stage and freed after it. A vLLM engine takes long to start: one
    serves the whole run and changes its weights between stages.

    Args:
        recipe: of the run.
        initial: path or hub name of the initial policy, whose architecture and tokenizer all others share.
        rows: all prompts; the longest decides how long vLLM's sequences may be.
        workers: the processes of the launch; all make the same calls in the same order.
        log: where a server that is started here writes what it has to say.
        further: prompts of further tasks, each with the tokens of its longest answer.
    """

    def __init__(
        self,
        recipe: Recipe,
        initial: str,
        rows: Sequence[tasks.Row],
        workers: Workers,
        log: Path | None = None,
        *,
        further: Sequence[tuple[Sequence[tasks.Row], int]] = (),
    ) -> None:
        self.recipe, self.initial, self.workers, self.log = recipe, initial, workers, log
        self.asked = [(rows, recipe.rollout.max_tokens), *further]
        self._engine: Any = None
        self._server: Any = None
        self._holds: str | None = None

    @contextmanager
    def on(self, path: str, *, finished: bool = False) -> Iterator[Any]:
        """The engine (`posttrain.rollouts.engine.Engine`) with the weights at `path`. Collective.

        Args:
            finished: nothing will be sampled, so that no engine has to be started: what is lent knows only its
                fingerprint.
        """
        if self.recipe.rollout.engine == "transformers":
            engine = self._transformers(path)
            try:
                yield engine
            finally:
                engine.close()
        elif finished and path != self._holds:
            yield Described(self.recipe, self.initial, path, self._tokenizer)
        else:
            self._start()
            if path != self._holds:
                self._switch(path)
            yield self._engine

    def for_training(self, start: str) -> Any:
        """The engine for a trainer, which sends its own weights; None when the policy generates by itself.

        Args:
            start: path or hub name of the policy that it trains.
        """
        if self.recipe.rollout.engine == "transformers":
            return None
        self._start()
        if self.recipe.rollout.lora_sync == "adapter" and self._holds != start:
            self._switch(start)  # what the adapters are trained beside
        self._holds = None
        return self._engine

    def close(self) -> None:
        """Stop what was started."""
        if self._engine is not None:
            self._engine.close()
        if self._server is not None:
            self._server.stop()
        self._engine = self._server = self._holds = None

    # ------------------------------------------------------------------ parts of the above

    def _transformers(self, path: str) -> Any:
        from posttrain.rollouts.transformers_engine import TransformersEngine

        return TransformersEngine.load(
            path,
            dtype=self.recipe.model.dtype,
            revision=_revision(self.recipe, path),
            batch_size=self.recipe.rollout.answers_per_part,
            images=self._images,
        )

    @cached_property
    def _images(self) -> bool:
        """Whether any prompt holds images."""
        return any(row.get("images") for rows, _ in self.asked for row in rows)

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            self.initial, revision=_revision(self.recipe, self.initial)
        )
        return tokenizer

    @cached_property
    def needed_length(self) -> int:
        """Longest prompt and answer together, and the one position that scoring needs (tokens)."""
        revision = _revision(self.recipe, self.initial)
        reader = load_processing_class(self.initial, revision=revision) if self._images else self._tokenizer
        return 1 + max(
            max(prompt_lengths(reader, map(tasks.shown, rows))) + max_tokens for rows, max_tokens in self.asked
        )

    def _start(self) -> None:
        if self._engine is not None:
            return
        rollout = self.recipe.rollout
        shared: dict[str, Any] = {
            "dtype": self.recipe.model.dtype,
            "revision": _revision(self.recipe, self.initial),
            "lora": self.recipe.model.lora if rollout.lora_sync == "adapter" else None,
        }
        settings = rollout.vllm
        if settings.max_model_len is None:
            settings = settings.model_copy(update={"max_model_len": self.needed_length})
        elif settings.max_model_len < self.needed_length:
            raise UserError(
                f"The longest prompt and answer need {self.needed_length} tokens, but rollout.vllm.max_model_len is "
                f"{settings.max_model_len}: raise it, or lower rollout.max_tokens."
            )
        if rollout.engine == "vllm_colocate":
            from posttrain.rollouts.vllm_colocate import VLLMColocateEngine

            self.workers.barrier()  # makes the process group, with our deadline, before vLLM would with its own
            self._engine = VLLMColocateEngine.load(self.initial, settings=settings, **shared)
        else:
            from posttrain.rollouts.vllm_server import VLLMServerEngine

            url = rollout.server.url or self.workers.share(lambda: self._serve(settings, shared))
            self._engine = VLLMServerEngine.connect(
                url,
                path=self.initial,
                settings=rollout.server,
                needed_length=self.needed_length,
                process=self._server,  # stops with the engine, and says why when it dies
                **shared,
            )
            self._tell(self.workers.share(self._engine.token))
        self._holds = self.initial

    def _serve(self, settings: Any, shared: dict[str, Any]) -> str:
        from posttrain.launch.serve import ServerProcess

        server = self.recipe.rollout.server
        self._server = ServerProcess.start(
            self.initial, vllm=settings, devices=server.devices, timeout=server.start_timeout, log=self.log, **shared
        )
        return str(self._server.url)

    def _switch(self, path: str) -> None:
        self._holds = None
        self._engine.wake()
        if not self._engine.shared:
            self._engine.switch(path)
        else:

            def switch() -> str:
                self._engine.switch(path)
                return str(self._engine.token())

            self._tell(self.workers.share(switch))
        self._holds = path

    def _tell(self, token: str) -> None:
        if not self.workers.first:
            self._engine.expect(token, 0)


class Described:
    """What is known of an engine without starting it: enough to recognise finished work."""

    def __init__(self, recipe: Recipe, initial: str, path: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self._recipe, self._initial, self._path, self.tokenizer = recipe, initial, path, tokenizer
        self.name: str = recipe.rollout.engine
        self.files = files_fingerprint(path)

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights on disk."""
        config = AutoConfig.from_pretrained(self._initial, revision=_revision(self._recipe, self._initial))
        folder = local_folder(self._path, _revision(self._recipe, self._path))
        return saved_fingerprint(folder, self.tokenizer, getattr(torch, self._recipe.model.dtype), config)


def _revision(recipe: Recipe, path: str) -> str | None:
    return recipe.model.revision if path == recipe.model.path else None
