"""Preference pairs from verified answers: to one prompt, a better answer (chosen) against a worse one (rejected).

    manifest.json      identity (the store's, and the settings) and counts; its presence means that all is there
    pairs.parquet      per pair: prompt id, key; prompt, chosen and rejected in TRL's preference format; their token ids
                       as they were sampled; their rewards

An answer needs a verdict. Equal texts to one prompt are one answer, and a text whose copies got different rewards is
none: so a pair and its reverse never both occur. Among the pairs (a, b) with

    reward_a − reward_b ≥ margin   and   max(|a|, |b|) / min(|a|, |b|) ≤ max_length_ratio      (|·| in tokens)

at most `per_prompt` of each prompt are taken:

    random            every subset of that size is equally likely
    length_matched    one after another, the pair whose two answers were taken least often so far; among those, the
                      smallest difference of lengths; ties at random
    short_over_long   first those whose chosen answer is the shorter one; then again least often taken, and now the
                      largest lead in length of rejected over chosen; ties at random

The draw of a prompt is seeded by (seed, prompt id), so it depends neither on the order nor on the number of the others.
The content is a function of the identity.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from posttrain import atomic
from posttrain.errors import UserError
from posttrain.recipe import Pairs
from posttrain.rollouts.engine import Prompt
from posttrain.rollouts.fingerprint import tokenizer_fingerprint
from posttrain.rollouts.store import Store, prompt_id
from posttrain.rollouts.tokens import chat_ids, encode
from posttrain.tasks import Row

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = 1
"""Version of the layout on disk."""

_ROUNDING = 1e-9
"""Slack of the margin: 0.7 − 0.2 is a little less than 0.5."""

_LEFTOVERS = {
    "no_answer": (
        "no answer left",
        "raise rollout.max_tokens where answers were cut off, and look at the verifier where they got no verdict",
    ),
    "all_right": (
        "all answers right",
        "take a harder task or draw more answers per prompt (presample.samples_per_prompt)",
    ),
    "all_wrong": (
        "all answers wrong",
        "take an easier task or draw more answers per prompt (presample.samples_per_prompt)",
    ),
    "no_margin": ("no two rewards a margin apart", "lower pairs.margin"),
    "no_length": ("no pair within the length control", "raise pairs.max_length_ratio"),
}
"""Why a prompt has no pair, in the order in which it is asked: for people, and what to do about it."""


@dataclass(frozen=True)
class PairSet:
    """Finished pairs, opened for reading."""

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> PairSet:
        """Open a folder of pairs.

        Raises:
            UserError: it holds none, or its layout is of another version.
        """
        folder = Path(path)
        manifest = folder / "manifest.json"
        if not manifest.is_file():
            raise UserError(f"There are no preference pairs at {folder}: make them with `posttrain pairs`.")
        content = json.loads(manifest.read_text(encoding="utf-8"))
        if content.get("format") != FORMAT:
            raise UserError(
                f"The pairs {folder} have format {content.get('format')}, this version reads {FORMAT}: make them again."
            )
        return cls(folder, content)

    @property
    def file(self) -> Path:
        """The Parquet file, for `datasets.load_dataset("parquet", data_files=…)`."""
        return self.path / "pairs.parquet"

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything that determined the content."""
        identity: Mapping[str, Any] = self.manifest["identity"]
        return identity

    @property
    def counts(self) -> Mapping[str, float]:
        """What became of every prompt, answer and pair.

        prompts = with_pairs + no_answer + all_right + all_wrong + no_margin + no_length;
        answers = truncated + no_verdict + merged + contradicting + distinct;
        found = pairs + cut. Tokens are means over pairs, the end of the sequence included.
        """
        counts: Mapping[str, float] = self.manifest["counts"]
        return counts


@dataclass(frozen=True)
class TokenPair:
    """One pair as token ids.

    Attributes:
        problem: index of its prompt among the rows.
        prompt_ids: the rendered prompt.
        chosen_ids: the better answer, with what ends it.
        rejected_ids: the worse answer, with what ends it.
    """

    problem: int
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]


class _Answer(NamedTuple):
    """One sampled answer; `place` is its row in the table of samples."""

    place: int
    text: str
    reward: float | None
    tokens: int
    truncated: bool


_Pair = tuple[_Answer, _Answer]


def build(
    store: Store,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    settings: Pairs,
    *,
    output_dir: Path,
) -> PairSet:
    """Make the pairs of a store, or open them if they are there.

    The pairs follow the order of the store's prompts. Answers that were cut off (`truncated: keep`) have no end token
    in the id columns; whoever tokenizes the text columns, as TRL does, adds one.

    Args:
        store: the pre-sampled answers.
        rows: the training rows that the store was made of, in any order.
        tokenizer: the one that they were sampled with.
        settings: which pairs.
        output_dir: folder of the pairs.

    Raises:
        UserError: the folder holds something else; rows or tokenizer are not the store's; prompts are text in some rows
            and messages in others, or hold images; or there is no pair at all.
    """
    _refuse_images(rows)
    identity = {"store": dict(store.identity), "settings": settings.model_dump()}
    if (output_dir / "manifest.json").is_file():
        found = PairSet.open(output_dir)
        difference = atomic.first_difference(found.manifest.get("identity", {}), identity)
        if difference is not None:
            raise UserError(
                f"The pairs {output_dir} were made with other settings ({difference}): choose another folder or delete "
                "it."
            )
        return found
    if store.identity["model"].rpartition(".")[2] != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"The store {store.path} was sampled with another tokenizer or chat template: give the tokenizer of the "
            "model that made it."
        )
    prompts = _prompts(store, rows)
    keys = pq.read_table(store.path / "prompts.parquet", columns=["prompt_id", "key"]).to_pydict()
    samples = pq.read_table(
        store.path / "samples.parquet", columns=["prompt_id", "token_ids", "text", "reward", "finish_reason"]
    )
    answers = _by_prompt(samples)
    counts: Counter[str] = Counter()
    records: list[dict[str, Any]] = []
    pairs: list[_Pair] = []
    for identifier, key in zip(keys["prompt_id"], keys["key"], strict=True):
        of_prompt, counted = _pairs(answers.get(identifier, []), settings, identifier)
        counts.update(counted)
        if of_prompt:
            prompt = prompts[identifier]
            shared = {"prompt_id": identifier, "key": key, "prompt": prompt, "prompt_ids": encode(tokenizer, prompt)}
            records.extend({**shared, **_answers(prompt, a.text, b.text)} for a, b in of_prompt)
            pairs.extend(of_prompt)
    if not pairs:
        _refuse_none(store, counts)
    atomic.remove_leftovers(output_dir)
    atomic.write_table(output_dir / "pairs.parquet", _table(records, pairs, samples))
    atomic.write_json(
        output_dir / "manifest.json", {"format": FORMAT, "identity": identity, "counts": _summary(counts, pairs)}
    )
    return PairSet.open(output_dir)


def from_samples(
    samples: pa.Table, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, per_prompt: int, seed: int
) -> list[TokenPair]:
    """Pairs of an evaluation's samples by the rules of `build`: correct against wrong, none cut off, drawn at random.

    Args:
        samples: one row per answer with the columns problem (index into `rows`), text, correct (None without a
            verdict), truncated and tokens.
        rows: the prompts that were evaluated.
        tokenizer: renders prompt and answer as one conversation.
        per_prompt: at most so many pairs of one prompt.
        seed: of the draw.

    Raises:
        UserError: the prompts hold images.
    """
    _refuse_images(rows)
    settings = Pairs(per_prompt=per_prompt, seed=seed)
    columns = [samples[name].to_pylist() for name in ("problem", "text", "correct", "tokens", "truncated")]
    answers: dict[int, list[_Answer]] = {}
    for place, (problem, text, correct, tokens, truncated) in enumerate(zip(*columns, strict=True)):
        reward = None if correct is None else float(correct)
        answers.setdefault(problem, []).append(_Answer(place, text, reward, tokens, truncated))
    found = []
    for problem in sorted(answers):
        prompt = rows[problem]["prompt"]
        for chosen, rejected in _pairs(answers[problem], settings, prompt_id(prompt))[0]:
            row = {"prompt": prompt, **_answers(prompt, chosen.text, rejected.text)}
            found.append(tokenize(row, tokenizer, problem=problem))
    return found


def _refuse_images(rows: Sequence[Row]) -> None:
    count = sum(bool(row.get("images")) for row in rows)
    if count:
        raise UserError(
            f"Preference pairs are made of tokens alone, and {count} of {len(rows)} prompts hold images: take prompts "
            "of text, or a task that brings pairs."
        )


def tokenize(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, problem: int) -> TokenPair:
    """Token ids of one row in TRL's preference format, equal to those of TRL's DPOTrainer.

    Prompt and answer are rendered as one conversation, or joined as text and closed by the end-of-sequence token. The
    answers begin where the prompt, rendered for generation, stops being a prefix of both.
    """
    prompt = row["prompt"]
    prompt_ids = encode(tokenizer, prompt)
    chosen_ids, rejected_ids = (_whole(tokenizer, prompt, row[name]) for name in ("chosen", "rejected"))
    start = min(_common(prompt_ids, chosen_ids), _common(prompt_ids, rejected_ids))
    return TokenPair(problem, tuple(prompt_ids[:start]), tuple(chosen_ids[start:]), tuple(rejected_ids[start:]))


def report(counts: Mapping[str, float]) -> Table:
    """The counts of a `PairSet` as a table for the terminal."""
    from rich.table import Table

    table = Table(title="Preference pairs", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)

    def section(total: str, name: str, parts: Mapping[str, str]) -> None:
        table.add_row(name, f"{counts[total]:,}", style="bold")
        for index, (part, label) in enumerate(parts.items(), start=1):
            table.add_row(f"  {label}", f"{counts[part]:,}", end_section=index == len(parts))

    section(
        "prompts", "prompts", {"with_pairs": "with pairs", **{name: text for name, (text, _) in _LEFTOVERS.items()}}
    )
    section(
        "answers",
        "answers",
        {
            "distinct": "distinct, with a verdict",
            "merged": "repeated texts",
            "contradicting": "contradicting rewards",
            "truncated": "cut off",
            "no_verdict": "no verdict",
        },
    )
    section("found", "pairs", {"pairs": "taken", "cut": "beyond per_prompt"})
    table.add_row("tokens of chosen, mean", f"{counts['chosen_tokens']:.1f}")
    table.add_row("tokens of rejected, mean", f"{counts['rejected_tokens']:.1f}")
    return table


# ---------------------------------------------------------------- which pairs


def _pairs(answers: Sequence[_Answer], settings: Pairs, identifier: str) -> tuple[list[_Pair], Counter[str]]:
    """The pairs of one prompt, and its share of the counts."""
    complete = [a for a in answers if settings.truncated == "keep" or not a.truncated]
    judged = [a for a in complete if a.reward is not None]
    copies: dict[str, list[_Answer]] = {}
    for answer in judged:
        copies.setdefault(answer.text, []).append(answer)
    # Of equal texts, one that ended stands for all: the copy that was cut off lacks the end token.
    distinct = [min(same, key=lambda a: a.truncated) for same in copies.values() if len({a.reward for a in same}) == 1]
    apart = [(a, b) for a in distinct for b in distinct if _reward(a) - _reward(b) >= settings.margin - _ROUNDING]
    ratio = settings.max_length_ratio
    found = [(a, b) for a, b in apart if ratio is None or _length_ratio(a, b) <= ratio]
    taken = _take(found, settings, identifier)
    counts = Counter(
        prompts=1,
        answers=len(answers),
        truncated=len(answers) - len(complete),
        no_verdict=len(complete) - len(judged),
        merged=len(judged) - len(copies),
        contradicting=len(copies) - len(distinct),
        distinct=len(distinct),
        found=len(found),
        pairs=len(taken),
        cut=len(found) - len(taken),
    )
    counts[_outcome(distinct, apart, found)] += 1
    return taken, counts


def _outcome(distinct: Sequence[_Answer], apart: Sequence[_Pair], found: Sequence[_Pair]) -> str:
    """What became of a prompt: `with_pairs`, or a name of `_LEFTOVERS`."""
    if found:
        return "with_pairs"
    if not distinct:
        return "no_answer"
    if all(a.reward == 1.0 for a in distinct):
        return "all_right"
    if all(a.reward == 0.0 for a in distinct):
        return "all_wrong"
    return "no_length" if apart else "no_margin"


def _take(found: Sequence[_Pair], settings: Pairs, identifier: str) -> list[_Pair]:
    """At most `per_prompt` of the pairs that were found."""
    left = list(found)
    random.Random(f"{settings.seed}/{identifier}").shuffle(left)
    if settings.choose == "random" or len(left) <= settings.per_prompt:
        return left[: settings.per_prompt]
    uses: Counter[int] = Counter()

    def cost(pair: _Pair) -> tuple[bool, int, int]:
        chosen, rejected = pair
        used = uses[chosen.place] + uses[rejected.place]  # half of what Σ uses² would grow by, up to a constant
        lead = chosen.tokens - rejected.tokens
        if settings.choose == "length_matched":
            return False, used, abs(lead)
        return lead >= 0, used, lead

    taken: list[_Pair] = []
    while len(taken) < settings.per_prompt:
        best = min(left, key=cost)  # the first of equals, in shuffled order
        left.remove(best)
        taken.append(best)
        uses.update(answer.place for answer in best)
    return taken


def _reward(answer: _Answer) -> float:
    assert answer.reward is not None  # noqa: S101 - answers without a verdict were left out
    return answer.reward


def _length_ratio(one: _Answer, other: _Answer) -> float:
    return max(one.tokens, other.tokens) / max(1, min(one.tokens, other.tokens))


# ---------------------------------------------------------------- tables


def _prompts(store: Store, rows: Iterable[Row]) -> dict[str, Prompt]:
    """The prompts of the rows by id."""
    prompts: dict[str, Prompt] = {prompt_id(row["prompt"]): row["prompt"] for row in rows}
    missing, strange = len(store.sets.keys() - prompts.keys()), len(prompts.keys() - store.sets.keys())
    if missing or strange:
        raise UserError(
            f"The store {store.path} was made of other rows ({missing} of its {len(store.sets)} prompts are not among "
            f"the training rows, {strange} training prompts are not in it): presample the same data that you train on."
        )
    if len({isinstance(prompt, str) for prompt in prompts.values()}) == 2:
        raise UserError("Prompts are text in some training rows and messages in others: give all of them one form.")
    return prompts


def _by_prompt(samples: pa.Table) -> dict[str, list[_Answer]]:
    """The answers of every prompt, in the order of the store; token ids stay in the table."""
    lengths = pa.compute.list_value_length(samples["token_ids"]).to_pylist()
    columns = [samples[name].to_pylist() for name in ("prompt_id", "text", "reward", "finish_reason")]
    found: dict[str, list[_Answer]] = {}
    for place, (identifier, text, reward, finish, tokens) in enumerate(zip(*columns, lengths, strict=True)):
        found.setdefault(identifier, []).append(_Answer(place, text, reward, tokens, finish == "length"))
    return found


def _answers(prompt: Prompt, chosen: str, rejected: str) -> dict[str, Any]:
    """Two answers in the format that fits their prompt: messages to messages, text to text."""
    if isinstance(prompt, str):
        return {"chosen": chosen, "rejected": rejected}
    return {
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def _table(records: Sequence[Mapping[str, Any]], pairs: Sequence[_Pair], samples: pa.Table) -> pa.Table:
    """The table of the pairs: one record of texts each, and the answers' ids and rewards as the store has them."""
    columns: dict[str, Any] = {name: pa.array([r[name] for r in records]) for name in ("prompt_id", "key", "prompt")}
    columns |= {name: pa.array([r[name] for r in records]) for name in ("chosen", "rejected")}
    columns["prompt_ids"] = pa.array([r["prompt_ids"] for r in records], pa.list_(pa.int32()))
    for side, name in enumerate(("chosen", "rejected")):
        answers = samples.take(pa.array([pair[side].place for pair in pairs], pa.int64()))
        columns |= {f"{name}_ids": answers["token_ids"], f"{name}_reward": answers["reward"]}
    order = ["prompt_id", "key", "prompt", "chosen", "rejected", "prompt_ids", "chosen_ids", "rejected_ids"]
    return pa.table({name: columns[name] for name in [*order, "chosen_reward", "rejected_reward"]})


def _summary(counts: Counter[str], pairs: Sequence[_Pair]) -> dict[str, float]:
    prompts = ["prompts", "with_pairs", *_LEFTOVERS]
    answers = ["answers", "truncated", "no_verdict", "merged", "contradicting", "distinct"]
    return {
        **{name: counts[name] for name in [*prompts, *answers, "found", "pairs", "cut"]},
        "chosen_tokens": sum(chosen.tokens for chosen, _ in pairs) / len(pairs),
        "rejected_tokens": sum(rejected.tokens for _, rejected in pairs) / len(pairs),
    }


def _refuse_none(store: Store, counts: Counter[str]) -> None:
    largest = max(_LEFTOVERS, key=lambda name: counts[name])
    reasons = ", ".join(f"{text}: {counts[name]}" for name, (text, _) in _LEFTOVERS.items() if counts[name])
    raise UserError(
        f"The store {store.path} gives no preference pair for any of its {counts['prompts']} prompts ({reasons}): "
        f"{_LEFTOVERS[largest][1]}."
    )


# ---------------------------------------------------------------- tokens


def _whole(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answer: str | Sequence[dict[str, Any]]) -> list[int]:
    """Token ids of prompt and answer together."""
    if isinstance(answer, str):
        end = str(tokenizer.eos_token)
        return encode(tokenizer, f"{prompt}{answer}" + ("" if answer.endswith(end) else end))
    return chat_ids(tokenizer, [*prompt, *answer], add_generation_prompt=False)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
