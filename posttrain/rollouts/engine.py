"""The engine interface: what trainers, pre-sampling and evaluation ask of whatever generates text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from posttrain.errors import UserError

Prompt = str | Sequence[dict[str, Any]]
"""Plain text, or a list of chat messages that the engine renders with the model's chat template. Contents are text, or
for a model that reads images lists of parts (`posttrain.tasks.shown`)."""

Images = Sequence[Any]
"""The PIL images of one prompt, in the order in which it shows them."""

TokenIds = Sequence[int]

NAMES = ("transformers", "vllm_colocate", "vllm_server")
"""The engines there are."""


class EngineError(UserError):
    """An engine cannot do what it was asked: it died, was too slow, or holds other weights than it should.

    The message names the engine (a server by its address), the call and the last policy version. Nothing is lost: a
    run can be resumed from its last checkpoint.
    """


@dataclass(frozen=True)
class SamplingParams:
    """How to sample.

    Attributes:
        n: answers per prompt.
        temperature: 0 is greedy.
        top_p: nucleus mass in (0, 1]; 1 keeps the whole distribution.
        top_k: number of most likely tokens kept; 0 keeps all.
        max_tokens: longest answer, in tokens, the end-of-sequence token included.
        seed: the samples are a function of (model, prompts, params) alone; None leaves them to chance, which a served
            engine draws faster.
    """

    max_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = 0


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


@dataclass(frozen=True)
class Score:
    """Log-probabilities of one given answer of T tokens, full softmax (nats).

    Attributes:
        logprobs: of the answer's own tokens, T values.
        top_ids: the k most likely tokens at each position, T lists of k, most likely first; empty unless asked for.
        top_logprobs: their log-probabilities, in the same shape.
    """

    logprobs: list[float]
    top_ids: list[list[int]] = field(default_factory=list)
    top_logprobs: list[list[float]] = field(default_factory=list)


class Engine(Protocol):
    """Anything that samples from and scores with a policy.

    An engine holds one version of one policy at a time. `policy_version` is 0 for weights read from files and the
    number given to `sync` afterwards; it is None while there are no weights to trust (a sync failed half-way), and
    then `sample` and `score` raise `EngineError`. Every sample carries the version that made it.
    """

    name: str
    """One of `NAMES`."""

    shared: bool
    """Whether all processes use one engine (a server): then only the first one calls `sync` and `switch`, and the
    others are told by `expect` what it serves now. Otherwise every process has its own."""

    tokenizer: PreTrainedTokenizerBase

    @property
    def policy_version(self) -> int | None:
        """Version of the weights it holds."""

    @property
    def fingerprint(self) -> str:
        """Hash of weights, tokenizer, chat template and image settings: those who share it hold one policy.

        Equal over engines (`posttrain.rollouts.fingerprint`). Not to be asked for after a `sync`.
        """

    @property
    def files(self) -> str | None:
        """`files_fingerprint` of the folder that the weights were read from; None for other sources."""

    def sample(self, prompts: Sequence[Prompt | TokenIds], params: SamplingParams) -> list[list[Sample]]:
        """`params.n` samples for each prompt, in order. A prompt of token ids is taken as it is.

        Raises:
            UserError: a prompt holds images, and the engine or its model reads text alone.
        """

    def score(
        self,
        sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        images: Sequence[Images] | None = None,
    ) -> list[Score]:
        """Log-probabilities of the answers of `(prompt_ids, answer_ids)`, full softmax at `temperature`.

        Prompts must not be empty: the first answer token needs something to follow.

        Args:
            images: of each sequence, those that its prompt was rendered with; None where no prompt has any.

        Raises:
            UserError: there are images, and the engine or its model reads text alone.
        """

    def sync(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over new weights; samples made afterwards carry `version`. An engine that sleeps is woken first.

        Args:
            named_parameters: every parameter under its checkpoint name, whole and without adapters, in the order of
                the model (`posttrain.rollouts.weights.full_weights`). Consumed one at a time: a tensor may be gone
                when the next one comes.
            version: non-negative.

        Raises:
            KeyError: a parameter that the model does not have, or one of the model's that did not come.
            ValueError: a tensor of another shape.
            EngineError: the engine failed. After any of these `policy_version` is None.
        """

    def switch(self, path: str) -> None:
        """Take over the policy saved in a folder (a model, or LoRA adapters of one) of the same architecture.

        The tokenizer stays. `policy_version` becomes 0.
        """

    def sync_adapter(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], version: int) -> None:
        """Take over LoRA adapters beside weights that stay, as in a peft folder: tensors and adapter_config.json.

        Raises:
            UserError: the engine was not started for adapters, or knows none.
        """

    def token(self) -> str:
        """What identifies the weights that a shared engine serves to this process; "" where each has its own."""

    def expect(self, token: str, version: int) -> None:
        """From now on, accept samples of the weights that `token` identifies only; they carry `version`."""

    def sleep(self) -> None:
        """Give memory back until `wake`, where the engine can; the weights may be gone afterwards (sync again)."""

    def wake(self) -> None:
        """Take the memory back."""

    def close(self) -> None:
        """Free everything the engine holds: memory, processes, ports, files. Can be called twice."""
