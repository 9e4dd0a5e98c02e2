"""Phase 1 of DPH-RL: sample the initial policy on every training prompt, verify, split, store.

Per prompt, k answers are drawn and verified. A prompt with at least `pef_threshold` correct ones is a candidate for
D_pef; then `stored_per_prompt` *fresh* answers are drawn, because a prompt chosen by the very samples that one trains
on would carry lucky samples. All fresh ones correct: they are stored with their log-probs (full softmax, at the
training temperature). One wrong: the prompt goes where `on_failed_check` says.

Source: DPH-RL, arXiv 2509.07430, Sec. 3.1. Differs: the paper draws one fresh answer; n are a generalisation.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import pyarrow as pa
import pyarrow.compute

from posttrain import atomic
from posttrain.errors import UserError
from posttrain.progress import Bar
from posttrain.recipe import Presample
from posttrain.rewards import Verdict, Verifier
from posttrain.rollouts.engine import Engine, Sample, SamplingParams
from posttrain.rollouts.store import FORMAT, Store, prompt_id
from posttrain.rollouts.tokens import opens_thought
from posttrain.tasks import Row, fingerprint, shown

_INTS = pa.list_(pa.int32())
_ANSWER = pa.struct(
    {
        "prompt_token_ids": _INTS,
        "token_ids": _INTS,
        "text": pa.string(),
        "reward": pa.float64(),
        "status": pa.string(),
        "finish_reason": pa.string(),
        "logps": pa.list_(pa.float32()),
    }
)
_PART = pa.schema(
    {
        "prompt_id": pa.string(),
        "key": pa.string(),
        "correct": pa.int32(),
        "set": pa.string(),
        "checked": pa.bool_(),
        "samples": pa.list_(_ANSWER),
        "stored": pa.list_(_ANSWER),
    }
)


def presample(
    engine: Engine,
    rows: Sequence[Row],
    verifier: Verifier,
    settings: Presample,
    *,
    max_tokens: int,
    training_temperature: float,
    output_dir: Path,
    batch_size: int = 256,
    worker: tuple[int, int] = (0, 1),
    barrier: Callable[[], None] = lambda: None,
) -> Store:
    """Make the store, or continue one that was interrupted, or open one that is finished.

    The work is cut into parts of a fixed size, each with its own seed, so the store does not depend on how often it
    was interrupted or how many workers made it.

    Args:
        engine: the initial policy.
        rows: training rows.
        verifier: decides correctness; must be an accuracy, never a shaping reward.
        settings: how many answers, how to split.
        max_tokens: longest answer (tokens).
        training_temperature: of the training rollouts; log-probs are stored at it.
        output_dir: folder of the store.
        batch_size: answers per part; part of the identity.
        worker: (rank, number of processes).
        barrier: waits for all processes.

    Raises:
        UserError: the folder belongs to other settings, the verifier is a shaping reward, there are no rows, or two
            rows have the same prompt.
    """
    if not verifier.accuracy:
        raise UserError(f"The reward '{verifier.name}' shapes and cannot decide correctness: name an accuracy reward.")
    if not rows:
        raise UserError("There are no training rows to presample: check the task's options.")
    _refuse_repeated_prompts(rows)
    threshold = settings.pef_threshold or settings.samples_per_prompt
    identity = {
        "model": engine.fingerprint,
        "engine": engine.name,
        "rows": fingerprint(rows),
        "verifier": verifier.identity,
        "sampling": {**settings.model_dump(), "pef_threshold": threshold, "max_tokens": max_tokens},
        "training_temperature": training_temperature,
        "batch_size": batch_size,
    }
    rank, world = worker
    if (output_dir / "manifest.json").is_file():
        store = Store.open(output_dir)
        difference = atomic.first_difference(store.identity, identity)
        if difference is not None:
            raise UserError(
                f"The store {output_dir} was made with other settings ({difference}): choose another folder or delete "
                "it."
            )
        if rank == 0:  # left by a process that was killed between publishing and clearing up
            shutil.rmtree(output_dir / "parts", ignore_errors=True)
        return store

    if rank == 0:
        atomic.Parts(output_dir / "parts", identity)
    barrier()
    parts = atomic.Parts(output_dir / "parts", identity)
    size = max(1, batch_size // settings.samples_per_prompt)
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    tokens, started = 0, monotonic()
    with Bar("presample", len(rows), "prompts", shown=rank == 0) as bar:
        for index, chunk in enumerate(chunks):
            if index % world == rank and not parts.done(index):
                seed = settings.seed * 1_000_003 + 2 * index
                part = _part(engine, chunk, verifier, settings, threshold, max_tokens, training_temperature, seed)
                parts.write(index, part)
                tokens += _tokens(part) * world  # the others have as much to do
            bar.advance(len(chunk), f"{tokens / (monotonic() - started):,.0f} tokens/s")
    barrier()
    if rank == 0:
        _publish(parts.read(len(chunks)), identity, engine.files, output_dir)
        parts.remove()
    barrier()
    return Store.open(output_dir)


def _tokens(part: pa.Table) -> int:
    """Tokens of all answers that were drawn for a part."""
    lists = [part[name].combine_chunks().flatten().field("token_ids") for name in ("samples", "stored")]
    return sum(pa.compute.sum(pa.compute.list_value_length(column)).as_py() or 0 for column in lists)


def _refuse_repeated_prompts(rows: Sequence[Row]) -> None:
    """A prompt that occurs twice could be rehearsed and explored at once, because sets are looked up by prompt."""
    seen: set[str] = set()
    repeated = []
    for row in rows:
        identifier = prompt_id(shown(row))
        if identifier in seen:
            repeated.append(row)
        seen.add(identifier)
    if repeated:
        raise UserError(
            f"{len(repeated)} of {len(rows)} training rows repeat the prompt of another one (the first has the key "
            f"{str(repeated[0]['key'])!r}): keep one row per prompt."
        )


def _part(
    engine: Engine,
    rows: Sequence[Row],
    verifier: Verifier,
    settings: Presample,
    threshold: int,
    max_tokens: int,
    training_temperature: float,
    seed: int,
) -> pa.Table:
    """One chunk of prompts: k answers each, then the fresh answers of the candidates and their log-probs."""
    params = SamplingParams(
        max_tokens=max_tokens,
        n=settings.samples_per_prompt,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=seed,
    )

    def judged(drawn: Sequence[Sample], row: Row) -> list[Verdict]:
        in_thought = opens_thought(engine.tokenizer, drawn[0].prompt_ids)
        return verifier.score([verifier.whole(s.text, in_thought) for s in drawn], [row] * len(drawn))

    samples = engine.sample([shown(row) for row in rows], params)
    verdicts = [judged(drawn, row) for row, drawn in zip(rows, samples, strict=True)]
    correct = [sum(verdict.reward == 1.0 for verdict in of_prompt) for of_prompt in verdicts]
    candidates = [i for i, count in enumerate(correct) if count >= threshold]
    stored: dict[int, list[dict[str, Any]]] = {}
    if candidates:
        fresh_params = SamplingParams(
            max_tokens=max_tokens,
            n=settings.stored_per_prompt,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=seed + 1,
        )
        fresh = engine.sample([shown(rows[i]) for i in candidates], fresh_params)
        for i, drawn in zip(candidates, fresh, strict=True):
            checks = judged(drawn, rows[i])
            if all(verdict.reward == 1.0 for verdict in checks):
                images = rows[i].get("images")
                scores = engine.score(
                    [(s.prompt_ids, s.token_ids) for s in drawn],
                    temperature=training_temperature,
                    images=[images] * len(drawn) if images else None,
                )
                stored[i] = [_answer(s, v, x.logprobs) for s, v, x in zip(drawn, checks, scores, strict=True)]
    failed: str = "explore" if settings.on_failed_check == "explore" else "dropped"
    return pa.Table.from_pylist(
        [
            {
                "prompt_id": prompt_id(shown(row)),
                "key": str(row["key"]),
                "correct": correct[i],
                "set": "pef" if i in stored else failed if i in candidates else "explore",
                "checked": i in candidates,
                "samples": [_answer(s, v, None) for s, v in zip(samples[i], verdicts[i], strict=True)],
                "stored": stored.get(i, []),
            }
            for i, row in enumerate(rows)
        ],
        schema=_PART,
    )


def _answer(sample: Sample, verdict: Verdict, logps: Sequence[float] | None) -> dict[str, Any]:
    return {
        "prompt_token_ids": sample.prompt_ids,
        "token_ids": sample.token_ids,
        "text": sample.text,
        "reward": verdict.reward,
        "status": verdict.status,
        "finish_reason": sample.finish_reason,
        "logps": logps,
    }


def _publish(parts: pa.Table, identity: Mapping[str, Any], files: str | None, output_dir: Path) -> None:
    """Write the store's tables, and the manifest last."""
    atomic.remove_leftovers(output_dir)
    sets = parts["set"].to_pylist()
    checked = parts["checked"].to_pylist()
    atomic.write_table(output_dir / "prompts.parquet", parts.select(["prompt_id", "key", "correct", "set", "checked"]))
    samples = _flatten(parts, "samples", drop=("prompt_token_ids", "logps"))
    stored = _flatten(parts, "stored", drop=())
    atomic.write_table(output_dir / "samples.parquet", samples)
    atomic.write_table(output_dir / "answers.parquet", stored)
    counts = {
        "prompts": len(sets),
        "explore": sets.count("explore"),
        "pef": sets.count("pef"),
        "dropped": sets.count("dropped"),
        "failed_checks": sum(c and s != "pef" for c, s in zip(checked, sets, strict=True)),
        "stored_answers": stored.num_rows,
        "all_wrong": parts["correct"].to_pylist().count(0),
    }
    manifest = {"format": FORMAT, "identity": identity, "files": files, "counts": counts}
    atomic.write_json(output_dir / "manifest.json", manifest)


def _flatten(parts: pa.Table, column: str, drop: Sequence[str]) -> pa.Table:
    """One row per answer instead of one per prompt."""
    lists = parts[column].combine_chunks()
    answers = lists.flatten()
    owners = parts["prompt_id"].combine_chunks().take(pa.compute.list_parent_indices(lists))
    names = [field.name for field in _ANSWER if field.name not in drop]
    return pa.table(
        {"prompt_id": owners, **{name: answers.field(name) for name in names}},
    )
