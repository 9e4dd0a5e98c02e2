"""Length (shaping): a reward for how many tokens a completion has. Three shapes.

n is the number of tokens of the completion, its end-of-sequence token included, as TRL counts them (`completion_ids`).

`overlong`, DAPO's soft punishment: 0 up to `max_tokens` − `cache`, then linearly down to −1 at `max_tokens`.

    R = 0                                   if n ≤ max_tokens − cache
        (max_tokens − cache − n) / cache    if n ≤ max_tokens
        −1                                  beyond

`cosine`: right answers are worth more when they are short and wrong ones when they are long, so that thinking longer
pays where the answer is not known. At `max_tokens` and beyond, where generation was cut off, it is `exceeding`.

    R = r_L + ½ (r_0 − r_L) (1 + cos(π n / max_tokens))         r_0 at n = 0, r_L towards max_tokens

with `correct_short` and `correct_long` for r_0 and r_L of right answers, `wrong_short` and `wrong_long` of wrong ones.

`group_relative`: among the answers to one prompt, all of which count, the shortest is worth 0.5 and the longest −0.5;
a wrong answer never gains by being short. 0 for all where they are equally long.

    λ = 0.5 − (n − min n) / (max n − min n)         R = λ if right, min(0, λ) if wrong

The last two ask a `verifier` which answers are right (it judges once more beside a column of its own), and take over
its status; where it has no verdict there is no reward, but the answer's length counts in its group. `group_relative`
sees whole groups of `group_size` (TRL's num_generations) or refuses: a process never sees the answers of another.

Status of `overlong`: `ok` where nothing is taken off, else `wrong`. `Verdict.answer` is n.

`max_tokens` is rollout.max_tokens, or less: a recipe whose answers are cut off before is refused, because what is said
of the longest would never come about.

Source: `overlong` DAPO, arXiv 2503.14476, Eq. 13; `cosine` Demystifying Long Chain-of-Thought Reasoning, arXiv
2502.03373, with the values of its authors' scripts for section 4.2 as defaults (github.com/eddycmu/demystify-long-cot);
`group_relative` Kimi k1.5, arXiv 2501.12599, section on length penalty.
Differs: `cosine` takes every n ≥ `max_tokens` as exceeding, where the paper has n = `max_tokens` and its code all from
16 tokens before; the code's penalty on repetition in wrong answers is the reward `repetition`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import cos, pi  # `math` itself is a verifier of this package
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from posttrain.errors import UserError
from posttrain.rewards import Completion, RewardOptions, Verdict, Verifier, load

Shape = Literal["overlong", "cosine", "group_relative"]
Finite = Annotated[float, Field(allow_inf_nan=False)]

_OF_SHAPE: dict[Shape, frozenset[str]] = {
    "overlong": frozenset({"max_tokens", "cache"}),
    "cosine": frozenset({
        "max_tokens", "verifier", "verifier_options", "correct_short", "correct_long", "wrong_short", "wrong_long",
        "exceeding",
    }),
    "group_relative": frozenset({"verifier", "verifier_options", "group_size"}),
}  # fmt: skip
_NEEDED: dict[Shape, tuple[str, ...]] = {
    "overlong": ("max_tokens", "cache"),
    "cosine": ("max_tokens", "verifier"),
    "group_relative": ("verifier", "group_size"),
}


class Options(RewardOptions):
    """Options of the reward `length`."""

    shape: Shape = "overlong"
    max_tokens: Annotated[int, Field(gt=0)] | None = None
    """Of `overlong` and `cosine`: the longest completion, at most rollout.max_tokens. DAPO: 20480."""
    cache: Annotated[int, Field(gt=0)] | None = None
    """Of `overlong`: the last tokens, over which the reward falls to −1. DAPO: 4096."""
    verifier: str | None = None
    """Of `cosine` and `group_relative`: the reward that says which answers are right, in most cases the task's."""
    verifier_options: dict[str, Any] = Field(default_factory=dict)
    correct_short: Finite = 2.0
    """Of `cosine`: a right answer without any token."""
    correct_long: Finite = 1.0
    """Of `cosine`: a right answer of almost `max_tokens`."""
    wrong_short: Finite = -10.0
    """Of `cosine`: a wrong answer without any token."""
    wrong_long: Finite = 0.0
    """Of `cosine`: a wrong answer of almost `max_tokens`."""
    exceeding: Finite = -10.0
    """Of `cosine`: any answer of `max_tokens`."""
    group_size: Annotated[int, Field(ge=2)] | None = None
    """Of `group_relative`: answers to a prompt, method.args.num_generations."""

    @model_validator(mode="after")
    def _of_the_shape(self) -> Options:
        missing = [name for name in _NEEDED[self.shape] if getattr(self, name) is None]
        if missing:
            raise ValueError(f"the shape {self.shape} needs {missing[0]}: add it")
        idle = sorted(self.model_fields_set - _OF_SHAPE[self.shape] - {"shape"})
        if idle:
            raise ValueError(f"{idle[0]} has no effect on the shape {self.shape}: remove it")
        if self.cache is not None and self.max_tokens is not None and self.cache > self.max_tokens:
            raise ValueError(f"cache {self.cache} exceeds max_tokens {self.max_tokens}: make it smaller")
        return self


class Reward(Verifier):
    """Shaping: by the number of tokens; where the shape asks for it, by whether the answer is right.

    Raises:
        UserError: the option `verifier` names none that decides what is correct.
    """

    name = "length"
    accuracy = False
    sampled = ("completion_ids",)

    def __init__(self, options: Options) -> None:
        self.options = options
        self.group_size = options.group_size or 1
        self.judge = None if options.verifier is None else load(options.verifier, options.verifier_options)
        if self.judge is None:
            return
        if not self.judge.accuracy or self.judge.sampled:
            raise UserError(
                f"The reward 'length' asks '{self.judge.column}' which answers are right, but that shapes: give the "
                "option verifier one that decides what is correct."
            )
        self.requires = self.judge.requires

    @property
    def column(self) -> str:
        """`length_` and its shape."""
        return f"{self.name}_{self.options.shape}"

    def verify(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """The reward of one completion, without any other to be compared with."""
        verdict = Verdict(1.0, "ok") if self.judge is None else self.judge.score([completion], [row])[0]
        count = _tokens(row)
        return self._shaped(verdict, count, [count])

    def score(self, completions: Sequence[Completion], rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """The reward of every completion, in order; every `group_size` completions are one group.

        Raises:
            UserError: the last group is not whole.
        """
        if self.judge is None:
            return super().score(completions, rows)
        size = self.group_size
        if len(rows) % size:
            raise UserError(
                f"The reward '{self.column}' compares {size} answers to a prompt (group_size), and {len(rows)} "
                "completions are no whole number of groups: give it all answers to every prompt."
            )
        counts = [_tokens(row) for row in rows]
        groups = [counts[start - start % size :][:size] for start in range(len(counts))]
        judged = self.judge.score(completions, rows)
        return [self._shaped(*each) for each in zip(judged, counts, groups, strict=True)]

    def _shaped(self, verdict: Verdict, count: int | None, group: Sequence[int | None]) -> Verdict:
        """The verdict with the reward of the shape instead of its own, for an answer of `count` tokens."""
        if count is None:
            return replace(
                verdict, reward=None, status="verifier_error", answer=None, detail="completion_ids are no list"
            )
        if verdict.reward is None:
            return verdict
        options = self.options
        right = verdict.reward == 1.0
        if options.shape == "overlong":
            reward = overlong(count, options.max_tokens or 0, options.cache or 0)
            verdict = replace(verdict, status="ok" if reward == 0.0 else "wrong")
        elif options.shape == "cosine":
            short, long = (
                (options.correct_short, options.correct_long) if right else (options.wrong_short, options.wrong_long)
            )
            limit = options.max_tokens or 0
            reward = options.exceeding if count >= limit else cosine(count, limit, short=short, long=long)
        else:
            reward = group_relative(count, [other for other in group if other is not None], right=right)
        return replace(verdict, reward=reward, answer=str(count))


def overlong(count: int, max_tokens: int, cache: int) -> float:
    """DAPO's soft punishment, in [−1, 0], of a completion of `count` tokens. Source: arXiv 2503.14476, Eq. 13."""
    return -min(1.0, max(0.0, (count - (max_tokens - cache)) / cache)) + 0.0  # no −0


def cosine(count: int, max_tokens: int, *, short: float, long: float) -> float:
    """From `short` at no tokens to `long` at `max_tokens`, along half a cosine. Source: arXiv 2502.03373."""
    return long + 0.5 * (short - long) * (1.0 + cos(pi * count / max_tokens))


def group_relative(count: int, group: Sequence[int], *, right: bool) -> float:
    """λ of an answer of `count` tokens among answers of `group` tokens, in [−0.5, 0.5]. Source: arXiv 2501.12599."""
    shortest, longest = min(group), max(group)
    if shortest == longest:
        return 0.0
    value = 0.5 - (count - shortest) / (longest - shortest)
    return value if right else min(0.0, value)


def _tokens(row: Mapping[str, Any]) -> int | None:
    """The number of tokens; None where they are not said."""
    ids: Any = row["completion_ids"]
    return len(ids) if isinstance(ids, Sequence) and not isinstance(ids, str) else None
