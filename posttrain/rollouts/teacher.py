"""Teachers: who scores the student's own answers for distillation, wherever the model lives.

| teacher | what it is |
|---|---|
| `ModelTeacher.load` | a model of its own in this process, at its own dtype and on its own device or device map |
| `ModelTeacher(student, base=True)` | what a LoRA student was before training: its base, adapters disabled |
| `ModelTeacher(student)` | the student itself as it is now, for self-distillation |
| `EngineTeacher` | an engine that holds the teacher: a vLLM server, here or elsewhere |
| `Reprompted` | any of them with another prompt: privileged context, or the teacher's own chat template |
| `Routed` | several of them, chosen by a column of the task row |

Answers to prompts with images are scored by a model that reads images, or by an engine that does; the images are in the
task rows, and the teacher's own processor makes its inputs of them.

`check_teacher` refuses a teacher that does not fit from its tokenizer and configuration, before weights load.
`require_effect` refuses a loss that the teacher does not reach.

Letters: B sequences, T completion tokens (the longest of the B), K words per token, V words of the teacher, N tokens
that are scored. A row of task data is a `Row`; the B rows belong to the B sequences, in order.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from posttrain.errors import UserError, did_you_mean
from posttrain.objectives.divergences import at_least_float32
from posttrain.objectives.vocabulary import HeadLayer, head_factors
from posttrain.rollouts.engine import Engine, Images, Prompt, TokenIds
from posttrain.rollouts.tokens import (
    PER_TOKEN,
    batched,
    encode,
    image_fields,
    images_of,
    load_processing_class,
    model_class,
)
from posttrain.rollouts.weights import loaded_whole

Row = Mapping[str, Any]

_TILE_BYTES = 2**26
"""Logits that a model teacher holds at a time, in float32; a few times as much is in use around them."""


@dataclass(frozen=True)
class TeacherScores:
    """What a teacher says of B completions, full softmax; nats, 0 where `mask` is.

    Attributes:
        logps: log π_T of the completions' own tokens [B, T].
        mask: True where the teacher has scored [B, T]: on completion tokens, up to the first one that it has no
            embedding for (the student's embedding can be padded further than the teacher's).
        top_ids: the words that were asked for, or else the teacher's K most likely ones, [B, T, K]; K may be 0.
        top_logps: log π_T of those words [B, T, K]; −∞ for a word that the teacher does not have.
        hidden: what the teacher's output head makes their logits of [B, T, E], where it was asked for.
    """

    logps: Tensor
    mask: Tensor
    top_ids: Tensor
    top_logps: Tensor
    hidden: Tensor | None = None

    def fitted(self, like: Tensor) -> TeacherScores:
        """The same on the device of `like` [B, width], padded on the right to its width.

        Raises:
            ValueError: it is narrower than T.
        """
        missing = like.size(1) - self.logps.size(1)
        if missing < 0:
            raise ValueError(f"scores of {self.logps.size(1)} tokens do not fit into a batch of {like.size(1)}.")
        flat = (F.pad(value, (0, missing)) for value in (self.logps, self.mask))
        known = [self.top_ids, self.top_logps] + ([] if self.hidden is None else [self.hidden])
        deep = (F.pad(value, (0, 0, 0, missing)) for value in known)
        return TeacherScores(*(value.to(like.device) for value in (*flat, *deep)))


class Teacher(ABC):
    """Scores completions."""

    concurrent: bool
    """Whether it may score in another thread: it has its own weights and joins no collective."""

    @property
    def reads_images(self) -> bool:
        """Whether it scores answers to prompts with images, which are in the task rows."""
        return False

    @property
    def head(self) -> HeadLayer | None:
        """What makes logits of the hidden states that `score` gives; None of a teacher that gives none."""
        return None

    @abstractmethod
    def score(
        self,
        prompt_ids: Sequence[TokenIds],
        completion_ids: Sequence[TokenIds],
        rows: Sequence[Row] = (),
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        ids: Tensor | None = None,
        hidden: bool = False,
    ) -> TeacherScores:
        """log π_T of B completions after their prompts, without padding (`unpadded`); no gradient.

        Args:
            prompt_ids: B prompts as the student read them, placeholders of images expanded.
            completion_ids: B completions.
            rows: their task rows; for images, `Reprompted` and `Routed`.
            temperature: divides the logits.
            top_k: log-probs of the teacher's most likely words, too.
            ids: log-probs of these words [B, T, K], too; not together with `top_k`.
            hidden: the hidden states that its `head` is applied to, too; only of a teacher that has one.

        Raises:
            UserError: the teacher cannot score this.
            ValueError: `ids` with `top_k`, or in another shape.
        """

    def submit(self, *arguments: Any, **options: Any) -> Future[TeacherScores]:
        """`score`, to be waited for with `.result()`, so that verifiers can run meanwhile.

        Where the teacher is not `concurrent` it has scored before this returns. A model on the CPU that the verifiers
        need, too, gains nothing from it.
        """
        if self.concurrent:
            pool = ThreadPoolExecutor(1, thread_name_prefix="teacher")
            future = pool.submit(self.score, *arguments, **options)
            pool.shutdown(wait=False)
            return future
        done: Future[TeacherScores] = Future()
        done.set_result(self.score(*arguments, **options))
        return done


def unpadded(batch: Mapping[str, Tensor]) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and completions of a rollout batch (`prompt_ids`, `prompt_mask`, `completion_ids`, `completion_mask`)."""

    def rows(name: str) -> list[list[int]]:
        ids, mask = batch[f"{name}_ids"], batch[f"{name}_mask"].bool()
        return [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]

    return rows("prompt"), rows("completion")


class _Asked:
    """What is scored of B completions, and how the flat answers become [B, T] again."""

    def __init__(
        self,
        prompt_ids: Sequence[TokenIds],
        completion_ids: Sequence[TokenIds],
        vocabulary: int,
        top_k: int,
        ids: Tensor | None,
    ) -> None:
        if any(not len(prompt) for prompt in prompt_ids):
            raise UserError("A sequence with an empty prompt cannot be scored: its first token follows nothing.")
        self.sequences = [
            (list(prompt), list(takewhile(lambda token: token < vocabulary, completion)))
            for prompt, completion in zip(prompt_ids, completion_ids, strict=True)
        ]
        lengths = torch.tensor([len(completion) for _, completion in self.sequences])
        width = max((len(completion) for completion in completion_ids), default=0)
        self.mask = torch.arange(width) < lengths[:, None]
        if ids is not None and (top_k or ids.shape[:2] != self.mask.shape):
            raise ValueError(f"ids {tuple(ids.shape)} come without top_k, and for {tuple(self.mask.shape)} tokens.")
        self.ids = None if ids is None else ids[self.mask.to(ids.device)]

    def given(self, first: int, count: int) -> Tensor | None:
        """The words [n, K] that are asked for at the n tokens of some sequences."""
        if self.ids is None:
            return None
        begin, end = int(self.mask[:first].sum()), int(self.mask[: first + count].sum())
        return self.ids[begin:end]

    def scores(self, logps: Tensor, top_ids: Tensor, top_logps: Tensor, hidden: Tensor | None = None) -> TeacherScores:
        """From values [N], [N, K] and [N, E]."""
        mask = self.mask.to(logps.device)

        def spread(flat: Tensor) -> Tensor:
            padded = flat.new_zeros(*mask.shape, *flat.shape[1:])
            padded[mask] = flat
            return padded

        states = None if hidden is None else spread(hidden)
        return TeacherScores(spread(logps), mask, spread(top_ids), spread(top_logps), states)


def _one_each(rows: Sequence[Row], completion_ids: Sequence[TokenIds]) -> None:
    if len(rows) != len(completion_ids):
        raise ValueError(f"{len(completion_ids)} completions came with {len(rows)} task rows: give each its row.")


def _images(rows: Sequence[Row], count: int) -> list[Images] | None:
    """The images of each of `count` prompts; None where no row has any."""
    shown: list[Images] = [row.get("images") or images_of(row.get("prompt") or "") for row in rows]
    if not any(shown):
        return None
    if len(shown) != count:
        raise ValueError(f"{count} completions came with {len(shown)} task rows: give each its row.")
    return shown


class ModelTeacher(Teacher):
    """A causal language model in this process, or one that reads images, too.

    One forward per `batch_size` sequences, whatever their lengths, so that processes which share a partitioned model
    (ZeRO-3, FSDP2) stay in step. Logits [B, T, V] never exist: the output head is applied to a tile of completion
    tokens at a time, inside the model's own forward, where its weights are whole.

    Args:
        model: a transformers model, or a peft model around one; not wrapped in DDP. It scores in evaluation mode and
            gets its own mode back.
        base: disable the adapters of a peft model while it scores.
        batch_size: sequences per forward.
        device: where its inputs go; default where its embedding lies, which is not known of offloaded weights.
        processor: its `ProcessorMixin`, where it reads images; None leaves it text alone.

    Raises:
        UserError: `base` of a model without adapters.
    """

    concurrent = False

    def __init__(
        self,
        model: Any,
        *,
        base: bool = False,
        batch_size: int = 8,
        device: Any = None,
        processor: Any = None,
    ) -> None:
        if base and not hasattr(model, "disable_adapter"):
            raise UserError("The student has no adapters, so its base is not there to teach it: name a teacher.")
        config = model.config.get_text_config()
        self.model, self.base, self.batch_size, self.device = model, base, batch_size, device
        self.processor = processor
        self.vocabulary = int(config.vocab_size)
        self.max_length: int | None = getattr(config, "max_position_embeddings", None)
        self._scale, self._softcap = head_factors(config)

    @property
    def reads_images(self) -> bool:
        """See `Teacher.reads_images`; with a processor."""
        return self.processor is not None

    @property
    def head(self) -> HeadLayer:
        """See `Teacher.head`; without the adapters, where it is the base that scores."""
        layer = self.model.get_output_embeddings()
        if self.base:
            layer = getattr(layer, "original_module", getattr(layer, "base_layer", layer))
        return HeadLayer(layer, self._scale, self._softcap)

    @classmethod
    def load(
        cls,
        path: str,
        *,
        dtype: str = "float32",
        device: str | None = None,
        device_map: str | dict[str, Any] | None = None,
        revision: str | None = None,
        batch_size: int = 8,
    ) -> ModelTeacher:
        """The frozen teacher in a folder or on the hub, whole in every process, also inside a ZeRO-3 or FSDP launch.

        Args:
            path: a folder, or a name on the hub.
            dtype: of its weights.
            device: as in cuda:1; default this process's GPU, where there is one.
            device_map: of accelerate, over several devices; instead of `device`.
            revision: of a model on the hub.
            batch_size: sequences per forward.
        """
        if device is not None and device_map is not None:
            raise ValueError("device and device_map both say where the teacher lives: give one of them.")
        auto_class = model_class(path, revision=revision)
        processor = None
        if auto_class is AutoModelForImageTextToText:
            processor = load_processing_class(path, revision=revision)
        with loaded_whole():
            model: Any = auto_class.from_pretrained(
                path, revision=revision, dtype=getattr(torch, dtype), device_map=device_map
            )
        if device_map is None:
            own_gpu = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
            model = model.to(device or (own_gpu if torch.cuda.is_available() else "cpu"))
        teacher = cls(model.eval().requires_grad_(False), batch_size=batch_size, processor=processor)
        teacher.concurrent = True
        return teacher

    @torch.no_grad()
    def score(
        self,
        prompt_ids: Sequence[TokenIds],
        completion_ids: Sequence[TokenIds],
        rows: Sequence[Row] = (),
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        ids: Tensor | None = None,
        hidden: bool = False,
    ) -> TeacherScores:
        """See `Teacher.score`."""
        asked = _Asked(prompt_ids, completion_ids, self.vocabulary, top_k, ids)
        longest = max((len(prompt) + len(completion) for prompt, completion in asked.sequences), default=0)
        if self.max_length is not None and longest > self.max_length:
            raise UserError(
                f"The teacher reads {self.max_length} tokens, and a prompt with its completion has {longest}: shorten "
                "the prompts or completions, or choose a teacher with a longer context."
            )
        fields = self._fields(asked.sequences, _images(rows, len(asked.sequences)))
        parts = []
        with _turn(self.model):
            was_training = self.model.training
            self.model.eval()
            adapters: AbstractContextManager[Any] = self.model.disable_adapter() if self.base else nullcontext()
            try:
                with adapters:
                    for start in range(0, len(asked.sequences), self.batch_size):
                        chunk = asked.sequences[start : start + self.batch_size]
                        given = asked.given(start, self.batch_size)
                        own = fields[start : start + self.batch_size]
                        parts.append(self._forward(chunk, own, given, temperature, top_k, hidden))
            finally:
                self.model.train(was_training)
        return asked.scores(*(torch.cat(each) for each in zip(*parts, strict=True)))

    def _fields(
        self, sequences: Sequence[tuple[list[int], list[int]]], shown: Sequence[Images] | None
    ) -> list[Mapping[str, Tensor]]:
        """What the model reads of the images of each sequence's prompt; made once of what several answers share."""
        if shown is None:
            return [{}] * len(sequences)
        if self.processor is None:
            raise UserError(
                f"The prompts hold images, and the teacher {type(self.model).__name__} reads text alone: choose a "
                "vision-language teacher with its processor."
            )
        made: dict[tuple[Any, ...], Mapping[str, Tensor]] = {}
        found = []
        for (prompt, _), images in zip(sequences, shown, strict=True):
            same = (*map(id, images), tuple(prompt))
            if same not in made:
                made[same] = self._seen(images, prompt) if images else {}
            found.append(made[same])
        return found

    def _seen(self, images: Images, prompt: list[int]) -> Mapping[str, Tensor]:
        try:
            return image_fields(self.processor, images, prompt)
        except UserError as error:
            name = type(self.model).__name__
            raise UserError(f"The teacher {name} does not read images as the student does: {error}") from None

    def _forward(
        self,
        chunk: Sequence[tuple[list[int], list[int]]],
        fields: Sequence[Mapping[str, Tensor]],
        given: Tensor | None,
        temperature: float,
        top_k: int,
        hidden: bool,
    ) -> tuple[Tensor, ...]:
        """Log-probs [n] of the n completion tokens of some sequences; words [n, K], their log-probs; states [n, E]."""
        device = self.device or self.model.get_input_embeddings().weight.device
        input_ids = torch.zeros(len(chunk), max(len(p) + len(c) for p, c in chunk), dtype=torch.long)
        attention_mask, asked = torch.zeros_like(input_ids), torch.zeros_like(input_ids, dtype=torch.bool)
        for row, (prompt, completion) in enumerate(chunk):
            length = len(prompt) + len(completion)
            input_ids[row, :length] = torch.tensor([*prompt, *completion])
            attention_mask[row, :length] = 1
            asked[row, len(prompt) - 1 : length - 1] = True  # what a token is told of follows it
        targets = input_ids[:, 1:][asked[:, :-1]]
        head = self.model.get_output_embeddings()
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        first: list[Tensor] = []
        states: list[Tensor] = []

        def take(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            """Score the hidden states on their way into the head, and let one through."""
            entering = arguments[0]
            raw = module.forward(entering[:1, :1])
            first.append(raw)
            tile = max(1, _TILE_BYTES // (4 * raw.size(-1)))
            picked = entering[asked.to(entering.device)]
            if hidden:
                self._require_plain_head(entering[:1, 0], raw[:, 0])
                states.append(picked)
            for begin in range(0, max(1, len(picked)), tile):
                words = None if given is None else given[begin : begin + tile]
                logits = self._logits(module.forward(picked[begin : begin + tile])) / temperature
                found.append(_read(logits, targets[begin : begin + tile], words, top_k))
            return (entering[:1, :1], *arguments[1:])

        hook = head.register_forward_pre_hook(take)
        try:
            output = self.model(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                use_cache=False,
                **self._further(fields, input_ids.size(1), device),
            )
        finally:
            hook.remove()
        self._require_known_head(first, output.logits)
        return (*(torch.cat(each) for each in zip(*found, strict=True)), *states)

    def _further(self, fields: Sequence[Mapping[str, Tensor]], width: int, device: Any) -> dict[str, Tensor]:
        """The model's further inputs for some sequences, padded on the right to `width` tokens."""
        whole = []
        for own in fields:
            types = {name: F.pad(own[name], (0, width - own[name].size(1))) for name in PER_TOKEN & own.keys()}
            whole.append({**own, **types})
        floating = next(self.model.parameters()).dtype  # pixels come in float32
        made = batched(whole, width).items()
        return {name: value.to(device, floating if value.is_floating_point() else None) for name, value in made}

    def _logits(self, raw: Tensor) -> Tensor:
        logits = at_least_float32(raw) * self._scale
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)

    def _require_known_head(self, first: Sequence[Tensor], logits: Tensor) -> None:
        """Hold what we make of the head's output to the model's own logits of the one token that it was left."""
        if len(first) == 1 and logits.shape == first[0].shape and _same(self._logits(first[0]), logits, first[0].dtype):
            return
        raise UserError(
            f"{type(self.model).__name__} makes its logits in a way that is not known here: choose a teacher with a "
            "plain, scaled or capped output head, or serve it (an engine as teacher)."
        )

    def _require_plain_head(self, hidden: Tensor, raw: Tensor) -> None:
        """Hold what the weights of `head` make of one hidden state to what the layer makes of it."""
        head = self.head.head()
        if not _same(F.linear(hidden, head.weight, head.bias), raw, raw.dtype):
            raise UserError(
                f"The output head of {type(self.model).__name__} is more than its weights (an adapter on it?), so the "
                "hidden states alone say nothing: take log-probs of tokens, or another teacher."
            )


_TURNS: WeakKeyDictionary[Any, threading.Lock] = WeakKeyDictionary()
_MAKING_TURNS = threading.Lock()


def _turn(model: Any) -> threading.Lock:
    """One thread at a time: a forward is scored by hooks on the model, which would see another thread's, too."""
    with _MAKING_TURNS:
        return _TURNS.setdefault(model, threading.Lock())


def _same(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    """Up to a few roundings of the type that both were computed in; NaN, which is for `require_effect`, is the same."""
    found, wanted = at_least_float32(found), at_least_float32(wanted)
    tolerance = max(8 * torch.finfo(dtype).eps, 1e-4) * float(wanted.abs().max())
    return not float((found - wanted).abs().max()) > tolerance


def _read(logits: Tensor, targets: Tensor, words: Tensor | None, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of the targets [n], of logits [n, V]; the words [n, K] that are asked for, and their log-probs."""
    logps, size = torch.log_softmax(logits, dim=-1), logits.size(-1)
    own = logps.gather(1, targets.to(logits.device)[:, None])[:, 0]
    if words is None:
        values, words = logps.topk(min(top_k, size), dim=-1)
        return own, words, values
    words = words.to(logits.device)
    return own, words, logps.gather(1, words.clamp(max=size - 1)).masked_fill(words >= size, -torch.inf)


class EngineTeacher(Teacher):
    """An engine that holds the teacher's weights: a vLLM server, here or on another machine.

    It gives log-probs of its own most likely words, not of given ones, and vLLM servers at temperature 1 alone.

    Args:
        engine: holds the weights that it was started with; stays open.
        vocabulary: V, rows of the teacher's embedding: its configuration's `vocab_size`.

    Raises:
        UserError: a trainer has synced the engine.
    """

    concurrent = True

    def __init__(self, engine: Engine, vocabulary: int) -> None:
        if engine.policy_version != 0:
            raise UserError(
                f"The engine {engine.name} holds version {engine.policy_version} of a policy in training, not a "
                "teacher: start an engine for the teacher alone."
            )
        self.engine, self.vocabulary = engine, vocabulary

    @property
    def reads_images(self) -> bool:
        """See `Teacher.reads_images`; where the engine's model and the engine itself do."""
        return isinstance(getattr(self.engine, "processing_class", None), ProcessorMixin)

    def score(
        self,
        prompt_ids: Sequence[TokenIds],
        completion_ids: Sequence[TokenIds],
        rows: Sequence[Row] = (),
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        ids: Tensor | None = None,
        hidden: bool = False,
    ) -> TeacherScores:
        """See `Teacher.score`."""
        if hidden:
            raise UserError(
                f"The engine {self.engine.name} gives no hidden states: take the teacher's own top-k, or a teacher in "
                "this process."
            )
        if ids is not None:
            raise UserError(
                f"The engine {self.engine.name} does not score words of our choice: take the teacher's own top-k, or a "
                "teacher in this process."
            )
        asked = _Asked(prompt_ids, completion_ids, self.vocabulary, top_k, None)
        shown = _images(rows, len(asked.sequences))
        images = {} if shown is None else {"images": shown}
        scores = self.engine.score(asked.sequences, temperature=temperature, top_k=top_k, **images)
        deep = sum(len(completion) for _, completion in asked.sequences), min(top_k, self.vocabulary)
        logps = torch.tensor([value for score in scores for value in score.logprobs])
        top_ids = torch.tensor([words for score in scores for words in score.top_ids], dtype=torch.long)
        top_logps = torch.tensor([values for score in scores for values in score.top_logprobs])
        return asked.scores(logps, top_ids.view(deep), top_logps.view(deep))


class Reprompted(Teacher):
    """A teacher that reads another prompt than the student: one with privileged context, or in its own chat template.

    The completion's tokens are scored as they are, after that prompt.

    Args:
        teacher: who scores.
        student: the student's tokenizer.
        prompt: makes the teacher's prompt of a task row, as `hint` does; default the row's own.
        tokenizer: renders it; default the student's.
        template_kwargs: further arguments of the chat templates, as in the run.

    Raises:
        ValueError: neither `prompt` nor `tokenizer`, so that nothing would change.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: PreTrainedTokenizerBase,
        prompt: Callable[[Row], Prompt] | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if prompt is None and tokenizer is None:
            raise ValueError("Reprompted changes nothing without prompt or tokenizer: give one of them.")
        self.teacher, self.concurrent = teacher, teacher.concurrent
        self._student, self._tokenizer = student, tokenizer or student
        self._prompt = prompt or (lambda row: row["prompt"])
        self._kwargs = dict(template_kwargs or {})

    @property
    def head(self) -> HeadLayer | None:
        """See `Teacher.head`."""
        return self.teacher.head

    def score(
        self,
        prompt_ids: Sequence[TokenIds],
        completion_ids: Sequence[TokenIds],
        rows: Sequence[Row] = (),
        **options: Any,
    ) -> TeacherScores:
        """See `Teacher.score`.

        Raises:
            UserError: the student's own prompt would be rendered otherwise here than it was in the run.
        """
        _one_each(rows, completion_ids)
        if _images(rows, len(completion_ids)) is not None:
            raise UserError(
                "The prompts hold images, which a teacher with a prompt of its own does not read: let it read the "
                "student's prompts."
            )
        if self._render(self._student, rows[0]["prompt"]) != list(prompt_ids[0]):
            raise UserError(
                "The student's prompt is rendered otherwise for the teacher than for the student, so the teacher would "
                "read more than its context: give the teacher the run's chat_template_kwargs."
            )
        prompts = [self._render(self._tokenizer, self._prompt(row)) for row in rows]
        return self.teacher.score(prompts, completion_ids, rows, **options)

    def _render(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str) or not self._kwargs:
            return encode(tokenizer, prompt)
        rendered: Any = tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=True, tokenize=True, return_dict=True, **self._kwargs
        )
        return list(rendered["input_ids"])


def hint(text: str, *, role: Literal["system", "user"] = "system") -> Callable[[Row], Prompt]:
    """What a privileged teacher knows, put into a row's prompt: for `Reprompted`.

    Args:
        text: with the row's fields in braces, as in "The answer is {solution}."
        role: "system" puts it into a system message at the front (after an empty line, where there is one); "user" puts
            it directly in front of the last user message, or of a prompt that is plain text.
    """

    def prompt(row: Row) -> Prompt:
        try:
            told = text.format_map(row)
        except KeyError as error:
            missing = str(error.args[0])
            raise UserError(
                f"The teacher's hint names the field '{missing}', which the task's rows do not have"
                f"{did_you_mean(missing, row)}."
            ) from None
        messages = row["prompt"]
        if isinstance(messages, str):
            if role == "system":
                raise UserError("The prompts are plain text without a system message: give the hint role = user.")
            return told + messages
        messages = [dict(message) for message in messages]
        if role == "system":
            if messages[0]["role"] != "system":
                return [{"role": "system", "content": told}, *messages]
            messages[0]["content"] += f"\n\n{told}"
            return messages
        last = max(i for i, message in enumerate(messages) if message["role"] == "user")
        messages[last]["content"] = told + messages[last]["content"]
        return messages

    return prompt


class Routed(Teacher):
    """Several teachers, each for the rows that name it; they score side by side.

    Args:
        teachers: by name.
        column: of the task rows, which holds the name.
    """

    def __init__(self, teachers: Mapping[str, Teacher], column: str) -> None:
        self.teachers, self.column = dict(teachers), column
        self.concurrent = all(teacher.concurrent for teacher in self.teachers.values())

    @property
    def reads_images(self) -> bool:
        """See `Teacher.reads_images`; where all of them do."""
        return all(teacher.reads_images for teacher in self.teachers.values())

    def check(self, rows: Sequence[Row]) -> None:
        """Refuse rows without a teacher: for the whole data set, before training.

        Raises:
            UserError: there is one.
        """
        require_teachers(rows, self.column, self.teachers)

    def score(
        self,
        prompt_ids: Sequence[TokenIds],
        completion_ids: Sequence[TokenIds],
        rows: Sequence[Row] = (),
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        ids: Tensor | None = None,
        hidden: bool = False,
    ) -> TeacherScores:
        """See `Teacher.score`."""
        if hidden:
            raise UserError(
                f"Teachers chosen by row (column '{self.column}') have no common output head, so they give no hidden "
                "states: take a single teacher, or their own top-k."
            )
        _one_each(rows, completion_ids)
        self.check(rows)
        groups: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            groups.setdefault(row[self.column], []).append(index)
        width = max(len(completion) for completion in completion_ids)
        futures = []
        for name, group in groups.items():
            longest = max(len(completion_ids[i]) for i in group)
            future = self.teachers[name].submit(
                [prompt_ids[i] for i in group],
                [completion_ids[i] for i in group],
                [rows[i] for i in group],
                temperature=temperature,
                top_k=top_k,
                ids=None if ids is None else ids[group, :longest],
            )
            futures.append(future)
        like = torch.empty(0, width)
        parts = [future.result().fitted(like) for future in futures]
        order = torch.tensor([i for group in groups.values() for i in group]).argsort()

        def together(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in parts])[order]

        return TeacherScores(*(together(name) for name in ("logps", "mask", "top_ids", "top_logps")))


# ---------------------------------------------------------------- before training


def require_teachers(rows: Sequence[Row], column: str, names: Collection[str]) -> None:
    """Refuse rows whose `column` holds none of the teachers' names.

    Raises:
        UserError: there is one.
    """
    for row in rows:
        if column not in row:
            raise UserError(
                f"A task row does not say who teaches it, because it has no column '{column}'"
                f"{did_you_mean(column, row)}."
            )
        name = row[column]
        if name not in names:
            raise UserError(f"There is no teacher '{name}' (column '{column}'){did_you_mean(str(name), names)}.")


def check_teacher(
    path: str,
    student: PreTrainedTokenizerBase,
    *,
    length: int,
    mask_eos: bool = False,
    template: Literal["student", "teacher"] | None = None,
    served: bool = False,
    temperature: float = 1.0,
    revision: str | None = None,
) -> PreTrainedTokenizerBase:
    """Refuse a teacher that cannot teach this student, from its tokenizer and configuration, before weights load.

    Vocabularies are compared by their tokens: embeddings may be padded to different sizes.

    Args:
        path: the teacher, a folder or a name on the hub.
        student: the student's tokenizer.
        length: tokens of the longest prompt and completion together, as the teacher reads them.
        mask_eos: the loss leaves out the token that ends an answer.
        template: whose chat template renders the teacher's prompts, where the two differ; for the teacher's, wrap it in
            `Reprompted`.
        served: it lives in a vLLM server.
        temperature: of the rollouts.
        revision: of a model on the hub.

    Returns:
        The teacher's tokenizer.

    Raises:
        UserError: another tokenizer, too few rows, another end of sequence, another chat template, too short a context,
            or a temperature at which a server cannot score.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, revision=revision)
    config: Any = AutoConfig.from_pretrained(path, revision=revision).get_text_config()
    ours, theirs = ({token: word for word, token in each.get_vocab().items()} for each in (student, tokenizer))
    differing = [token for token, word in sorted(ours.items()) if theirs.get(token) != word]
    if differing:
        both = " and ".join(f"id {i} is {ours[i]!r} here and {_named(theirs.get(i))} there" for i in differing[:2])
        raise UserError(
            f"The teacher {path} has another tokenizer than the student ({both}; {len(differing)} differ in all): "
            "choose a teacher with the student's tokenizer."
        )
    if max(ours) >= config.vocab_size:
        raise UserError(
            f"The student's largest token id is {max(ours)}, but the teacher {path} has {config.vocab_size} rows in "
            "its embedding: choose a teacher whose vocabulary covers the student's."
        )
    if student.eos_token_id != tokenizer.eos_token_id and not mask_eos:
        raise UserError(
            f"The student ends its answers with {student.eos_token!r} and the teacher {path} with "
            f"{tokenizer.eos_token!r}, so it would be taught never to end: choose mask_eos, or a teacher that "
            "ends alike."
        )
    if student.chat_template != tokenizer.chat_template and template is None:
        raise UserError(
            f"The teacher {path} has another chat template than the student: choose the template that renders its "
            "prompts, student or teacher."
        )
    reads = getattr(config, "max_position_embeddings", None)
    if reads is not None and reads < length:
        raise UserError(
            f"The teacher {path} reads {reads} tokens, but the longest prompt and completion have {length} together: "
            "shorten them, or choose a teacher with a longer context."
        )
    if served and temperature != 1.0:
        raise UserError(
            f"A vLLM server scores at temperature 1 alone, and the answers are drawn at {temperature:g}: set "
            "temperature = 1, or load the teacher in the trainer's process."
        )
    return tokenizer


def _named(word: str | None) -> str:
    return "nothing" if word is None else repr(word)


def require_effect(loss: Callable[[Tensor], Tensor], teacher_logps: Tensor) -> None:
    """Require that a loss depends on the teacher: move the teacher's log-probs, and the loss must move.

    They are moved by noise of 0.1, 1 and 10 nats, up and down, so that a clamp on the ratio does not hide them. Give it
    a loss in which the teacher should count: no advantage of 0, no row masked out, no coefficient that the schedule
    holds at 0.

    Args:
        loss: a scalar of teacher log-probs, deterministic.
        teacher_logps: [B, T], as the teacher gave them.

    Raises:
        UserError: the loss stays where it is, is not finite, or is not the same twice; or the log-probs are not finite.
    """
    with torch.no_grad():
        if not bool(teacher_logps.isfinite().all()):
            raise UserError("The teacher's log-probs are not finite: look at its weights and its dtype.")
        still, again = loss(teacher_logps), loss(teacher_logps)
        if not bool(still.isfinite()) or not bool(still == again):
            raise UserError(
                f"The loss is {float(still):g} and then {float(again):g} of the same teacher log-probs: it must be "
                "finite and deterministic (dropout off) to see whether the teacher counts."
            )
        generator = torch.Generator().manual_seed(0)
        for size in (0.1, 1.0, 10.0):
            noise = size * torch.randn(teacher_logps.shape, generator=generator).to(teacher_logps)
            if any(bool(loss(teacher_logps + moved) != still) for moved in (noise, -noise)):
                return
    raise UserError(
        f"The teacher has no effect: its log-probs were moved by noise of up to 10 nats and the loss stayed "
        f"at {float(still):g}, so check the coefficient and the masks of the distillation term."
    )
