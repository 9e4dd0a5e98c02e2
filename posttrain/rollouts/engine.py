"""The engine interface: what trainers, pre-sampling and evaluation ask of whatever generates text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

Prompt = str | Sequence[dict[str, Any]]
"""Plain text, or a list of chat messages that the engine renders with the tokenizer's chat template."""


@dataclass(frozen=True)
class SamplingParams:
    """How to sample.

    Attributes:
        n: answers per prompt.
        temperature: 0 is greedy.
        top_p: nucleus mass in (0, 1]; 1 keeps the whole distribution.
        top_k: number of most likely tokens kept; 0 keeps all.
        max_tokens: longest answer, in tokens, the end-of-sequence token included.
        seed: the samples are a function of (model, prompts, params) alone.
    """

    max_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Sample:
    """One answer.

    Attributes:
        prompt_ids: token ids of the rendered prompt.
        token_ids: token ids of the answer, the end-of-sequence token included when there is one.
        logprobs: log-probability of each answer token under the distribution it was drawn from (nats), that is after
            temperature, top-k and top-p.
        text: the answer decoded without special tokens.
        finish_reason: `stop` after an end-of-sequence token, `length` when `max_tokens` cut it off.
        policy_version: version of the weights that made it.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: Literal["stop", "length"]
    policy_version: int


class Engine(Protocol):
    """Anything that samples from and scores with a policy."""

    @property
    def fingerprint(self) -> str:
        """Hash of weights, tokenizer and chat template (16 hex digits): two engines with one fingerprint agree."""

    @property
    def files(self) -> str | None:
        """`files_fingerprint` of the folder that the weights were read from; None for other sources."""

    def sample(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[list[Sample]]:
        """`params.n` samples for each prompt, in order."""

    def score(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], *, temperature: float = 1.0
    ) -> list[list[float]]:
        """Log-probability (nats) of each answer token of `(prompt_ids, answer_ids)`, full softmax at `temperature`."""

    def sync(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over new weights; samples made afterwards carry `version`."""

    def close(self) -> None:
        """Free what the engine holds."""
