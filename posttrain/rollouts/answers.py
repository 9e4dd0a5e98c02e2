"""Verified answers of a store as token ids: what a policy is fine-tuned on.

An answer is taken when its reward is 1, it ended by itself, and no earlier answer to the same prompt consists of the
same tokens, unless repeated ones are kept. Of these, at most `per_prompt` of each prompt are drawn, every subset of
that size equally likely, seeded by (seed, prompt id): the draw of a prompt depends neither on the order nor on the
number of the others.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from posttrain.errors import UserError
from posttrain.rollouts.store import Store, prompt_id
from posttrain.rollouts.tokens import encode
from posttrain.tasks import Row

_REFUSED = {
    "truncated": ("cut off", "raise rollout.max_tokens"),
    "wrong": (
        "wrong or without a verdict",
        "take an easier task, a better model, or more answers per prompt (presample.samples_per_prompt)",
    ),
    "too_long": ("longer than max_length with their prompt", "raise method.args.max_length"),
}
"""Why no answer may be left: for people, and what to do about it."""


@dataclass(frozen=True)
class AnswerSet:
    """The answers that were taken.

    Attributes:
        table: one row per answer, prompts in the order of the rows and answers in that of the store: `input_ids`, the
            prompt's tokens and the answer's as they were sampled; `completion_mask`, 1 on those of the answer.
        counts: answers = truncated + wrong + repeated + too_long + cut + taken, each answer under the first that holds;
            prompts, and `with_answers`, those of which at least one answer was taken.
    """

    table: pa.Table
    counts: Mapping[str, int]

    def __str__(self) -> str:
        """One line for the terminal."""
        counts = self.counts
        left = {
            "wrong": "wrong",
            "truncated": "cut off",
            "repeated": "repeated",
            "too_long": "too long",
            "cut": "beyond per_prompt",
        }
        reasons = ", ".join(f"{counts[name]:,} {text}" for name, text in left.items() if counts[name])
        return (
            f"{counts['with_answers']:,} of {counts['prompts']:,} prompts have a correct answer; "
            f"{counts['taken']:,} of {counts['answers']:,} answers kept" + (f" ({reasons})" if reasons else "")
        )


def from_store(
    store: Store,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    keep_repeated: bool = False,
    per_prompt: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
) -> AnswerSet:
    """The answers of a store to fine-tune on.

    Args:
        store: of the model whose answers are learned.
        rows: the training rows that it was made of.
        tokenizer: of the model that learns, which renders and splits prompts as the store's does.
        keep_repeated: take an answer as often as it was drawn, and not once.
        per_prompt: at most so many answers of one prompt; None takes all.
        max_length: longest prompt and answer together, in tokens; None takes any.
        seed: of the draw.

    Raises:
        UserError: a prompt is not in the store, or no answer is left.
    """
    missing = sum(prompt_id(row["prompt"]) not in store.sets for row in rows)
    if missing:
        raise UserError(
            f"{missing} of {len(rows)} training prompts are not in the store {store.path}: presample the same data "
            "that you train on."
        )
    columns = ["prompt_id", "token_ids", "reward", "finish_reason"]
    samples = pq.read_table(store.path / "samples.parquet", columns=columns)
    token_ids = samples["token_ids"].combine_chunks()
    rewards, finishes = samples["reward"].to_pylist(), samples["finish_reason"].to_pylist()
    places: dict[str, list[int]] = {}
    for place, identifier in enumerate(samples["prompt_id"].to_pylist()):
        places.setdefault(identifier, []).append(place)
    counts = Counter({name: 0 for name in ("answers", "with_answers", *_REFUSED, "repeated", "cut", "taken")})
    input_ids, masks = [], []
    for row in rows:
        identifier = prompt_id(row["prompt"])
        prompt = np.asarray(encode(tokenizer, row["prompt"]), dtype=np.int32)
        found: list[np.ndarray] = []
        seen: set[bytes] = set()
        for place in places.get(identifier, []):
            answer = token_ids[place].values.to_numpy(zero_copy_only=False)
            counts["answers"] += 1
            if finishes[place] == "length":
                counts["truncated"] += 1
            elif rewards[place] != 1.0:
                counts["wrong"] += 1
            elif not keep_repeated and answer.tobytes() in seen:
                counts["repeated"] += 1
            elif max_length is not None and len(prompt) + len(answer) > max_length:
                counts["too_long"] += 1
            else:
                seen.add(answer.tobytes())
                found.append(answer)
        taken = list(range(len(found)))
        if per_prompt is not None and len(found) > per_prompt:
            taken = sorted(random.Random(f"{seed}/{identifier}").sample(taken, per_prompt))
        counts["cut"] += len(found) - len(taken)
        counts["with_answers"] += bool(found)
        for index in taken:
            input_ids.append(np.concatenate([prompt, found[index]]))
            masks.append(np.repeat(np.array([0, 1], dtype=np.int8), [len(prompt), len(found[index])]))
    counts["taken"] = len(input_ids)
    if not input_ids:
        _refuse_none(store, counts)
    table = pa.table(
        {
            "input_ids": pa.array(input_ids, pa.list_(pa.int32())),
            "completion_mask": pa.array(masks, pa.list_(pa.int8())),
        }
    )
    return AnswerSet(table, {"prompts": len(rows), **counts})


def _refuse_none(store: Store, counts: Mapping[str, int]) -> None:
    largest = max(_REFUSED, key=lambda name: counts[name])
    reasons = ", ".join(f"{text}: {counts[name]}" for name, (text, _) in _REFUSED.items() if counts[name])
    raise UserError(
        f"The store {store.path} holds no correct answer to learn from among {counts['answers']} ({reasons}): "
        f"{_REFUSED[largest][1]}."
    )
