"""The engine that needs nothing but transformers: batched `generate`, on a CPU or a GPU."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    ProcessorMixin,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from posttrain.errors import UserError
from posttrain.rollouts.engine import EngineError, Images, Prompt, Sample, SamplingParams, Score, TokenIds
from posttrain.rollouts.fingerprint import files_fingerprint, fingerprint
from posttrain.rollouts.tokens import (
    PER_TOKEN,
    ProcessingClass,
    Rendered,
    batched,
    end_ids,
    image_fields,
    load_processing_class,
    model_class,
    placeholder_of,
    render,
    tokenizer_of,
)
from posttrain.rollouts.weights import checked, loaded_weights, loaded_whole, saved_weights

_SCORE_BYTES = 2**28
"""Upper bound of the float32 logits that `score` holds at a time; a few times as much is in use around them."""


class _Recorder(LogitsProcessor):
    """Remembers the log-probability of every sampled token; last in the chain, so it sees what is drawn from.

    `generate` can return all logits, [tokens, B, V], which for a real vocabulary is gigabytes: this keeps one step.
    """

    def __init__(self) -> None:
        self.previous: Tensor | None = None
        self.logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._take(input_ids)
        self.previous = torch.log_softmax(scores.float(), dim=-1)
        return scores

    def _take(self, input_ids: Tensor) -> None:
        if self.previous is not None:
            self.logps.append(self.previous.gather(1, input_ids[:, -1:]))

    def finish(self, sequences: Tensor) -> Tensor:
        """Log-probs [B, tokens] of everything that was generated."""
        self._take(sequences)
        self.previous = None
        return torch.cat(self.logps, dim=1)


class TransformersEngine:
    """Sampling and scoring with a transformers model in this process.

    Samples depend on (weights, prompts, params, batch_size) alone: the global random state is left as it was.

    Answers hold no placeholder of images, which no sequence could be scored with: that token is never drawn.

    Args:
        model: a causal language model, or one that reads images, too.
        processing_class: its tokenizer, or its processor where it reads images; needs an end-of-sequence token.
        batch_size: sequences per `generate` call.
    """

    name = "transformers"
    shared = False

    def __init__(self, model: PreTrainedModel, processing_class: ProcessingClass, *, batch_size: int = 256) -> None:
        declared = model.generation_config.eos_token_id if model.generation_config is not None else None
        self.processing_class = processing_class
        self.tokenizer = tokenizer = tokenizer_of(processing_class)
        self._eos_ids = end_ids(tokenizer, declared)
        self.model: Any = model.eval()
        self.batch_size = batch_size
        self.policy_version: int | None = 0
        self.files: str | None = None
        self._pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    @classmethod
    def load(
        cls,
        path: str,
        *,
        dtype: str = "float32",
        revision: str | None = None,
        batch_size: int = 256,
        device: str | None = None,
        images: bool = True,
    ) -> TransformersEngine:
        """The engine of a model on disk or on the hub; on this process's GPU when there is one.

        Args:
            images: whether prompts may hold some. Otherwise a model that reads images, too, is loaded for its text
                alone, where that is possible, and without its processor.
        """
        processing_class = load_processing_class(path, revision=revision, images=images)
        auto_class = model_class(path, revision=revision, images=images)
        with loaded_whole():
            model: Any = auto_class.from_pretrained(path, revision=revision, dtype=getattr(torch, dtype))
        own_gpu = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        target = device or (own_gpu if torch.cuda.is_available() else "cpu")
        engine = cls(model.to(target), processing_class, batch_size=batch_size)
        engine.files = files_fingerprint(path)
        return engine

    @cached_property
    def fingerprint(self) -> str:
        """Hash of weights, tokenizer, chat template and image settings."""
        return fingerprint(self.model, self.processing_class)

    @torch.no_grad()
    def sample(self, prompts: Sequence[Prompt | TokenIds], params: SamplingParams) -> list[list[Sample]]:
        """`params.n` samples for each prompt, in order. A prompt of token ids is taken as it is."""
        version = self._usable("sample")
        rendered = [render(self.processing_class, prompt) for prompt in prompts]
        repeated = [prompt for prompt in rendered for _ in range(params.n)]
        samples: list[Sample] = []
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            if params.seed is None:
                torch.seed()
            else:
                torch.manual_seed(params.seed)
            for start in range(0, len(repeated), self.batch_size):
                samples += self._generate(repeated[start : start + self.batch_size], params, version)
        return [samples[i * params.n : (i + 1) * params.n] for i in range(len(prompts))]

    def _generate(self, prompts: Sequence[Rendered], params: SamplingParams, version: int) -> list[Sample]:
        input_ids, attention_mask = self._pad_left([prompt.ids for prompt in prompts])
        recorder = _Recorder()
        # `generate` fills what it is not told from the model's own config (min_p, no_repeat_ngram_size, …), which would
        # warp once more what the chain here has warped and recorded.
        habits, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            sequences = self.model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                **self._fields([prompt.fields for prompt in prompts], input_ids.size(1)),
                logits_processor=LogitsProcessorList([*self._never(), *_warpers(params), recorder]),
                do_sample=params.temperature > 0,
                top_k=0,  # 50 otherwise
                max_new_tokens=params.max_tokens,
                eos_token_id=self._eos_ids,
                pad_token_id=self._pad_id,
                disable_compile=True,
                synced_gpus=False,  # by default, processes wait for one another wherever a ZeRO-3 config is alive
            )
        finally:
            self.model.generation_config = habits
        answers = sequences[:, input_ids.size(1) :]
        logps = recorder.finish(sequences)
        ended = torch.isin(answers, torch.tensor(self._eos_ids, device=answers.device))
        has_end = ended.any(dim=1)
        lengths = torch.where(has_end, ended.int().argmax(dim=1) + 1, answers.size(1))
        texts = self.tokenizer.batch_decode(
            [row[:length] for row, length in zip(answers.tolist(), lengths.tolist(), strict=True)],
            skip_special_tokens=True,
        )
        return [
            Sample(
                prompt_ids=list(prompt.ids),
                token_ids=row[:length],
                logprobs=row_logps[:length],
                text=text,
                finish_reason="stop" if stopped else "length",
                policy_version=version,
            )
            for prompt, row, row_logps, length, stopped, text in zip(
                prompts, answers.tolist(), logps.tolist(), lengths.tolist(), has_end.tolist(), texts, strict=True
            )
        ]

    def _fields(self, rendered: Sequence[Mapping[str, Tensor]], width: int) -> dict[str, Tensor]:
        """The model's further inputs for a batch of prompts, padded to `width` tokens."""
        fields = batched(rendered, width).items()
        floating = self.model.dtype  # pixels come in float32
        return {
            name: value.to(self.model.device, floating if value.is_floating_point() else None) for name, value in fields
        }

    def _never(self) -> list[LogitsProcessor]:
        """Keeps the placeholder of images from being drawn."""
        processor = self.processing_class
        placeholder = placeholder_of(processor) if isinstance(processor, ProcessorMixin) else None
        return [] if placeholder is None else [SuppressTokensLogitsProcessor([placeholder], device=self.model.device)]

    @torch.no_grad()
    def score(
        self,
        sequences: Sequence[tuple[TokenIds, TokenIds]],
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        images: Sequence[Images] | None = None,
    ) -> list[Score]:
        """Log-probabilities of the answers of `(prompt_ids, answer_ids)`, full softmax at `temperature`.

        Sequences of any length: they pass through the model in pieces of time, over its key-value cache, so that no
        more logits exist at a time than memory has room for. With images they pass whole, because models count the
        positions of images from the start of a sequence.
        """
        self._usable("score")
        fields = self._rendered_images(sequences, images) if images is not None else None
        scores: list[Score] = []
        vocabulary = self.model.get_output_embeddings().weight.size(0)
        fits = max(1, _SCORE_BYTES // (4 * vocabulary))  # positions whose logits are held at a time
        longest = max((len(prompt) + len(answer) for prompt, answer in sequences), default=1)
        rows = max(1, min(self.batch_size, fits // longest))
        step = max(1, fits // rows)
        if fields is not None:  # of a padded batch
            step = max((len(p) for p, _ in sequences), default=1) + max((len(a) for _, a in sequences), default=0)
        for start in range(0, len(sequences), rows):
            chunk = sequences[start : start + rows]
            own = fields[start : start + rows] if fields is not None else [{}] * len(chunk)
            scores += self._score(chunk, own, temperature, top_k, step)
        return scores

    def _rendered_images(
        self, sequences: Sequence[tuple[TokenIds, TokenIds]], images: Sequence[Images]
    ) -> list[Mapping[str, Tensor]]:
        """The fields of every sequence; what answers to one prompt share is made once.

        Raises:
            UserError: the model reads text alone, or images and token ids do not belong together.
        """
        processor = self.processing_class
        if not isinstance(processor, ProcessorMixin):
            raise UserError("There are images to score answers with, but the model reads text alone: leave them out.")
        made: dict[tuple[Any, ...], Mapping[str, Tensor]] = {}
        found = []
        for (prompt, _), shown in zip(sequences, images, strict=True):
            same = (*map(id, shown), tuple(prompt))
            if same not in made:
                made[same] = image_fields(processor, shown, prompt) if shown else {}
            found.append(made[same])
        return found

    def _score(
        self,
        chunk: Sequence[tuple[TokenIds, TokenIds]],
        fields: Sequence[Mapping[str, Tensor]],
        temperature: float,
        top_k: int,
        step: int,
    ) -> list[Score]:
        """The scores of one batch, `step` positions at a time."""
        prompt_ids, prompt_mask = self._pad_left([prompt for prompt, _ in chunk])
        device, depth = prompt_ids.device, prompt_ids.size(1)
        lengths = torch.tensor([len(answer) for _, answer in chunk], device=device)
        width = int(lengths.max())
        answer_ids = torch.full((len(chunk), width), self._pad_id, device=device)
        for row, (_, answer) in enumerate(chunk):
            answer_ids[row, : len(answer)] = torch.tensor(list(answer), device=device)
        answer_mask = (torch.arange(width, device=device) < lengths[:, None]).long()
        ids = torch.cat([prompt_ids, answer_ids], dim=1)
        mask = torch.cat([prompt_mask, answer_mask], dim=1)
        further = self._fields(fields, depth)
        for name in PER_TOKEN & further.keys():
            further[name] = torch.nn.functional.pad(further[name], (0, width))
        logps, top_logps, top_ids = [], [], []
        cache = None
        last = ids.size(1) - 1  # what follows the last token is nobody's question
        for begin in range(0, last, step):
            end = min(begin + step, last)
            keep = end - max(begin, depth - 1)
            output = self.model(
                # The last token comes along, so that one piece is one forward of whole sequences, bit for bit.
                input_ids=ids[:, begin : end if end < last else end + 1],
                attention_mask=mask[:, : end if end < last else end + 1],
                past_key_values=cache,
                use_cache=end < last,
                **further,
                logits_to_keep=max(1, keep) if end < last else keep + 1,
            )
            cache = output.past_key_values
            if keep <= 0:
                continue
            logits = output.logits if end < last else output.logits[:, :-1]
            logp = torch.log_softmax(logits.float() / temperature, dim=-1)
            logps.append(logp.gather(2, ids[:, end - keep + 1 : end + 1, None])[:, :, 0])
            if top_k:
                values, indices = logp.topk(min(top_k, logp.size(-1)), dim=-1)
                top_logps.append(values)
                top_ids.append(indices)
        if not logps:  # only empty answers
            return [Score([]) for _ in chunk]
        own = torch.cat(logps, dim=1).tolist()
        found = torch.cat(top_ids, dim=1).tolist() if top_k else [[]] * len(chunk)
        found_logps = torch.cat(top_logps, dim=1).tolist() if top_k else [[]] * len(chunk)
        return [
            Score(own[row][:length], found[row][:length], found_logps[row][:length])
            for row, length in enumerate(lengths.tolist())
        ]

    def sync(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy weights into this engine's model.

        Raises:
            KeyError: a name that the model does not have, or one of its own that did not come.
            ValueError: a tensor of another shape. After either, the engine has no usable weights.
        """
        own = dict(self.model.named_parameters())
        tied = {name for name, _ in self.model.named_parameters(remove_duplicate=False)} - set(own)
        shapes = {name: tuple(parameter.shape) for name, parameter in own.items()}
        self.policy_version = None
        self.files = None
        self.__dict__.pop("fingerprint", None)
        with torch.no_grad():
            incoming = (pair for pair in named_parameters if pair[0] not in tied)
            for name, value in checked(incoming, shapes):  # copy_ alone would broadcast a wrong shape in silence
                own[name].copy_(value)
        self.policy_version = version

    def switch(self, path: str) -> None:
        """Take over the policy saved in a folder, of the same architecture."""
        renamed = isinstance(self.processing_class, ProcessorMixin)  # as models of images and text are on loading
        self.sync(loaded_weights(path) if renamed else saved_weights(path), 0)
        self.files = files_fingerprint(path)

    def sync_adapter(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], version: int) -> None:
        """Refused: adapters beside weights are for vLLM."""
        raise UserError("The transformers engine takes whole weights only: set lora_sync = merge.")

    def token(self) -> str:
        """Nothing: every process has its own engine."""
        return ""

    def expect(self, token: str, version: int) -> None:
        """Nothing: every process has its own engine."""

    def sleep(self) -> None:
        """Nothing: this engine holds no more than its model."""

    def wake(self) -> None:
        """Nothing."""

    def _usable(self, call: str) -> int:
        if self.model is None:
            raise EngineError(f"The transformers engine cannot {call}: it was closed.")
        if self.policy_version is None:
            raise EngineError(f"The transformers engine cannot {call}: a sync failed half-way, so sync again first.")
        return self.policy_version

    def close(self) -> None:
        """Free the model."""
        self.model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _pad_left(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        width = max(len(ids) for ids in prompts)
        input_ids = torch.full((len(prompts), width), self._pad_id, device=self.model.device)
        attention_mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(prompts):
            input_ids[row, width - len(ids) :] = torch.tensor(list(ids), device=self.model.device)
            attention_mask[row, width - len(ids) :] = 1
        return input_ids, attention_mask


def _warpers(params: SamplingParams) -> list[LogitsProcessor]:
    chain: list[LogitsProcessor] = []
    if params.temperature not in (0.0, 1.0):
        chain.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k > 0:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        chain.append(TopPLogitsWarper(params.top_p))
    return chain
