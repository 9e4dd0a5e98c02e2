"""Sample a policy on held-out problems, judge every answer, and keep both on disk.

`evaluate` cuts the problems into chunks that depend on the settings alone, seeds each chunk by (seed, chunk, model)
and writes it as one Parquet part, so a killed evaluation goes on where it stopped and any number of workers gives the
same samples. `finish` joins the parts. An evaluation is a folder:

    evaluation.json    metrics with intervals, what was evaluated (`identity`), counts of statuses, versions
    samples.parquet    one row per sample
    images.parquet     small pictures of what a problem shows; only where the rows hold images
    parts/             only while it runs

The model is part of the seed because retention and gain need answers of two policies that were drawn independently.

Metrics in evaluation.json, all averaged over problems: `pass@k` and `pass^k` (problems with fewer than k verdicts are
dropped from that k and counted), `maj@n`, `distinct_correct` (answers, among all verdicts of a problem),
`answer_entropy` (nats), `tokens`, `tokens_correct`, `tokens_wrong` (tokens per sample, per correct, per wrong sample),
`truncated` (share of samples).
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from posttrain import atomic, tasks
from posttrain.errors import UserError
from posttrain.evaluation import metrics
from posttrain.evaluation.metrics import Estimate, Floats
from posttrain.progress import Bar
from posttrain.recipe import Evaluation
from posttrain.rewards import Verdict, Verifier
from posttrain.versions import versions

if TYPE_CHECKING:
    from posttrain.rollouts.engine import Engine, Prompt, Sample

Ints = npt.NDArray[np.int64]

_THUMBNAIL = 240
"""Largest width and height of the pictures that are kept for people, in pixels."""

SCHEMA = pa.schema(
    [
        ("problem", pa.int32()),  # index into the rows
        ("key", pa.string()),
        ("prompt", pa.string()),
        ("solutions", pa.int32()),  # null when the task does not count them
        ("sample", pa.int32()),
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),  # as they were sampled, the end of the sequence included
        ("answer", pa.string()),  # what the verifier extracted, or the whole text where it extracts nothing
        ("correct", pa.bool_()),  # null without a verdict
        ("status", pa.string()),
        ("tokens", pa.int32()),
        ("truncated", pa.bool_()),
        ("mean_logprob", pa.float64()),  # nats per token, under the distribution it was drawn from; null without tokens
    ]
)


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """One finished evaluation: what was asked, the metrics, and the counts per problem that comparisons pair.

    Attributes:
        label: name for people.
        identity: everything that determines the samples.
        k: the k of pass@k, increasing.
        resamples: bootstrap resamples behind the intervals.
        confidence: level of the intervals.
        statuses: samples by status of their verdict.
        metrics: contents of `metrics` in evaluation.json.
        versions: packages that sampled.
        keys: canonical key of each problem.
        prompts: text of each problem's last message.
        solutions: number of solutions of each problem, where the task knows it.
        answers: answers of each problem that have a verdict, in the order of sampling; None where there was none.
        correct: whether they are correct.
        tokens: tokens of all samples of each problem.
        tokens_correct: tokens of its correct samples.
        tokens_wrong: tokens of its wrong samples.
        samples: samples of each problem, with and without a verdict.
        truncated: samples of each problem that were cut off.
        images: what each problem shows, as small PNG files; [] where no problem shows anything.
    """

    label: str
    identity: dict[str, Any]
    k: tuple[int, ...]
    resamples: int
    confidence: float
    statuses: dict[str, int]
    metrics: dict[str, Any]
    versions: dict[str, str]
    keys: list[str]
    prompts: list[str]
    solutions: Ints | None
    answers: list[list[str | None]]
    correct: list[list[bool]]
    tokens: Ints
    tokens_correct: Ints
    tokens_wrong: Ints
    samples: Ints
    truncated: Ints
    images: list[list[bytes]] = field(default_factory=list)

    @property
    def n(self) -> Ints:
        """Judged samples of each problem."""
        return np.array([len(flags) for flags in self.correct], dtype=np.int64)

    @property
    def c(self) -> Ints:
        """Correct samples of each problem."""
        return np.array([sum(flags) for flags in self.correct], dtype=np.int64)

    @property
    def seed(self) -> int:
        """Seed of the samples, and of the bootstrap."""
        return int(self.identity["seed"])


def evaluate(
    engine: Engine,
    task_name: str,
    rows: Sequence[tasks.Row],
    verifier: Verifier | None,
    settings: Evaluation,
    *,
    max_tokens: int,
    batch_size: int,
    output_dir: Path,
    label: str,
    worker: tuple[int, int] = (0, 1),
) -> EvaluationResult | None:
    """Sample `settings.n` answers to every row, judge them, and write them under `output_dir`.

    Without a verifier the answers are kept for what else is measured on them, and no problem has a verdict.

    Worker `rank` of `world` takes every `world`-th chunk of max(1, batch_size // n) rows. A lone worker finishes and
    returns the result; several return None, and rank 0 calls `finish` after a barrier. A finished evaluation with the
    same identity is returned to every worker without sampling; its metrics follow a new `k`, `resamples` and
    `confidence`. Rank 0 shows the progress of its own share.

    Raises:
        UserError: nothing to evaluate, a verifier that does not say "correct", a column missing that it needs, or an
            evaluation of something else in `output_dir`.
    """
    rank, world = worker
    check(task_name, rows, verifier)
    if rank == 0 and verifier is not None and settings.n < 2 * max(settings.k):
        warnings.warn(
            f"pass@{max(settings.k)} from n = {settings.n} answers is noisy: n ≥ {2 * max(settings.k)} is advised.",
            stacklevel=2,
        )
    identity = {
        "task": task_name,
        "data": tasks.fingerprint(rows),
        "problems": len(rows),
        "model": engine.fingerprint,
        "engine": engine.name,
        "verifier": verifier.identity if verifier is not None else None,
        "n": settings.n,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_tokens": max_tokens,
        "seed": settings.seed,
        "prompts_per_chunk": max(1, batch_size // settings.n),
    }
    document = output_dir / "evaluation.json"
    if document.exists():
        finished = _read_document(document)
        difference = atomic.first_difference(finished["identity"], identity)
        if difference is not None:
            raise UserError(
                f"{output_dir} holds another evaluation ({difference}): choose another folder or delete that one."
            )
        if rank == 0:
            shutil.rmtree(output_dir / "parts", ignore_errors=True)
            if finished["summary"] != _summary(settings):
                _write_document(output_dir, finished | {"summary": _summary(settings)})
        return load(output_dir)

    parts = atomic.Parts(output_dir / "parts", identity)
    if rank == 0 and any(row.get("images") for row in rows):
        _write_images(output_dir, rows)
    mine = _chunks(identity)[rank::world]
    name = f"evaluate {label}" if world == 1 else f"evaluate {label} (worker 1 of {world})"
    total = settings.n * sum(len(places) for _, places in mine)
    tokens, started = 0, monotonic()
    with Bar(name, total, "samples", shown=rank == 0) as bar:
        for index, places in mine:
            if not parts.done(index):
                chunk = [(place, rows[place]) for place in places]
                table = _sample_chunk(engine, verifier, settings, chunk, _seed(identity, index), max_tokens)
                parts.write(index, table)
                tokens += sum(table["tokens"].to_pylist())
            bar.advance(settings.n * len(places), f"{tokens / (monotonic() - started):,.0f} tokens/s")
    return finish(output_dir, settings, label=label) if world == 1 else None


def finish(output_dir: Path, settings: Evaluation, *, label: str) -> EvaluationResult:
    """Join the parts that all workers wrote into samples.parquet and evaluation.json; then the parts are deleted.

    Raises:
        UserError: parts are missing.
    """
    if (output_dir / "evaluation.json").exists():
        return load(output_dir)
    marker = output_dir / "parts" / "identity.json"
    if not marker.exists():
        raise UserError(f"{output_dir} holds no evaluation to finish: evaluate first.")
    identity = json.loads(marker.read_text(encoding="utf-8"))
    parts = atomic.Parts(output_dir / "parts", identity)
    count = len(_chunks(identity))
    missing = [index for index in range(count) if not parts.done(index)]
    if missing:
        raise UserError(
            f"{len(missing)} of {count} parts of the evaluation in {output_dir} are missing, the first is number "
            f"{missing[0]}: evaluate again with the same settings to fill them in."
        )
    atomic.write_table(output_dir / "samples.parquet", parts.read(count))
    _write_document(
        output_dir,
        {"label": label, "identity": identity, "summary": _summary(settings), "versions": versions()},
    )
    parts.remove()
    return load(output_dir)


def load(output_dir: Path) -> EvaluationResult:
    """Read a finished evaluation.

    Raises:
        UserError: it is not finished, or one of its two files is missing or damaged.
    """
    for name in ("evaluation.json", "samples.parquet"):
        if not (output_dir / name).exists():
            raise UserError(f"{output_dir} holds no finished evaluation: {name} is missing, so evaluate first.")
    return _result(output_dir, _read_document(output_dir / "evaluation.json"))


def _summary(settings: Evaluation) -> dict[str, Any]:
    """What the metrics depend on beyond the samples."""
    return {"k": settings.k, "resamples": settings.resamples, "confidence": settings.confidence}


def _chunks(identity: Mapping[str, Any]) -> list[tuple[int, range]]:
    """Numbered chunks of row indices: a function of the identity alone, never of the number of workers."""
    problems, size = identity["problems"], identity["prompts_per_chunk"]
    starts = range(0, problems, size)
    return [(index, range(start, min(start + size, problems))) for index, start in enumerate(starts)]


def _seed(identity: Mapping[str, Any], index: int) -> int:
    entropy = [identity["seed"], index, int.from_bytes(identity["model"].encode("utf-8"), "big")]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def check(task_name: str, rows: Sequence[tasks.Row], verifier: Verifier | None) -> None:
    """Refuse rows that cannot be judged.

    Raises:
        UserError: there are none, the verifier does not say "correct", or a column is missing that it needs.
    """
    if not rows:
        raise UserError(f"The task '{task_name}' gave no rows to evaluate: raise its evaluation share or its size.")
    if verifier is None:
        return
    if not verifier.accuracy:
        raise UserError(
            f"The reward '{verifier.name}' does not say whether an answer is correct, which pass@k is about: evaluate "
            "with the task's own verifier."
        )
    for column in ("prompt", "key", *verifier.requires):
        bad = next((index for index, row in enumerate(rows) if column not in row), None)
        if bad is not None:
            raise UserError(
                f"Row {bad} of the task '{task_name}' lacks the column '{column}', which evaluation with the reward "
                f"'{verifier.name}' needs: it has {', '.join(sorted(rows[bad]))}."
            )


def _sample_chunk(
    engine: Engine,
    verifier: Verifier | None,
    settings: Evaluation,
    chunk: Sequence[tuple[int, tasks.Row]],
    seed: int,
    max_tokens: int,
) -> pa.Table:
    from posttrain.rollouts.engine import SamplingParams  # imports torch
    from posttrain.rollouts.tokens import opens_thought

    params = SamplingParams(
        max_tokens=max_tokens, n=settings.n, temperature=settings.temperature, top_p=settings.top_p, seed=seed
    )
    groups = engine.sample([tasks.shown(row) for _, row in chunk], params)
    # late in training most answers repeat: each distinct one of a problem is judged once
    distinct = {
        (problem, sample.text): row for (problem, row), group in zip(chunk, groups, strict=True) for sample in group
    }
    if verifier is None:
        judged = [Verdict(None, "not_judged")] * len(distinct)
    else:
        in_thought = {
            problem: opens_thought(engine.tokenizer, group[0].prompt_ids)
            for (problem, _), group in zip(chunk, groups, strict=True)
        }
        texts = [verifier.whole(text, in_thought[problem]) for problem, text in distinct]
        judged = verifier.score(texts, list(distinct.values()))
    verdicts = dict(zip(distinct, judged, strict=True))
    records = [
        _record(row, problem, number, sample, verdicts[problem, sample.text])
        for (problem, row), group in zip(chunk, groups, strict=True)
        for number, sample in enumerate(group)
    ]
    return pa.Table.from_pylist(records, schema=SCHEMA)


def _record(row: tasks.Row, problem: int, number: int, sample: Sample, verdict: Verdict) -> dict[str, Any]:
    solutions = row.get("solutions")
    answer = verdict.answer
    if answer is None and verdict.status in ("ok", "wrong"):
        answer = sample.text.strip()
    return {
        "problem": problem,
        "key": row["key"],
        "prompt": _last_words(row["prompt"]),
        "solutions": solutions if isinstance(solutions, int) else None,
        "sample": number,
        "text": sample.text,
        "token_ids": sample.token_ids,
        "answer": answer,
        "correct": None if verdict.reward is None else verdict.reward == 1.0,
        "status": verdict.status,
        "tokens": len(sample.token_ids),
        "truncated": sample.finish_reason == "length",
        "mean_logprob": float(np.mean(sample.logprobs)) if sample.logprobs else None,
    }


def _last_words(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content") or "")


def _write_images(output_dir: Path, rows: Sequence[tasks.Row]) -> None:
    """Keep what the problems show, for people: one row per problem, in their order."""
    pictures = [[_small_png(image) for image in row.get("images") or []] for row in rows]
    atomic.write_table(output_dir / "images.parquet", pa.table({"images": pa.array(pictures, pa.list_(pa.binary()))}))


def _small_png(image: Any) -> bytes:
    """A PIL image as a PNG file at most `_THUMBNAIL` pixels wide and high."""
    small = image.convert("RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    written = BytesIO()
    small.save(written, format="PNG", optimize=True)
    return written.getvalue()


def _read_images(output_dir: Path) -> list[list[bytes]]:
    if not (output_dir / "images.parquet").exists():
        return []
    images: list[list[bytes]] = pq.read_table(output_dir / "images.parquet")["images"].to_pylist()
    return images


def _read_document(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete it and evaluate again.") from None
    return content


def _write_document(output_dir: Path, document: Mapping[str, Any]) -> None:
    """Compute the metrics from the samples on disk and write evaluation.json."""
    result = _result(output_dir, document)
    content = {
        "label": result.label,
        "identity": result.identity,
        "summary": document["summary"],
        "problems": len(result.keys),
        "samples": int(result.samples.sum()),
        "statuses": result.statuses,
        "metrics": _metrics(result),
        "versions": result.versions,
    }
    atomic.write_json(output_dir / "evaluation.json", content)


def _result(output_dir: Path, document: Mapping[str, Any]) -> EvaluationResult:
    try:
        # texts and tokens are the bulk of the file and nothing here reads them
        wanted = [field.name for field in SCHEMA if field.name not in ("text", "token_ids")]
        table = pq.read_table(output_dir / "samples.parquet", columns=wanted)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"samples.parquet in {output_dir} is damaged ({error}): delete it and evaluate again."
        ) from None
    columns = {name: table[name].to_pylist() for name in ("key", "prompt", "solutions", "answer", "correct", "status")}
    problem = table["problem"].to_numpy()
    tokens = table["tokens"].to_numpy()
    truncated = table["truncated"].to_numpy()
    judged_correct = np.array([flag is True for flag in columns["correct"]])
    judged_wrong = np.array([flag is False for flag in columns["correct"]])
    firsts = np.unique(problem, return_index=True)[1]
    answers: list[list[str | None]] = [[] for _ in firsts]
    correct: list[list[bool]] = [[] for _ in firsts]
    for place, answer, flag in zip(problem.tolist(), columns["answer"], columns["correct"], strict=True):
        if flag is not None:
            answers[place].append(answer)
            correct[place].append(flag)
    solutions = [columns["solutions"][first] for first in firsts]

    def per_problem(weights: npt.NDArray[Any]) -> Ints:
        return np.bincount(problem, weights=weights, minlength=len(firsts)).astype(np.int64)

    return EvaluationResult(
        label=document["label"],
        identity=dict(document["identity"]),
        k=tuple(document["summary"]["k"]),
        resamples=document["summary"]["resamples"],
        confidence=document["summary"]["confidence"],
        statuses=dict(sorted(Counter(columns["status"]).items())),
        metrics=document.get("metrics", {}),
        versions=dict(document["versions"]),
        keys=[columns["key"][first] for first in firsts],
        prompts=[columns["prompt"][first] for first in firsts],
        solutions=None if None in solutions else np.array(solutions, dtype=np.int64),
        answers=answers,
        correct=correct,
        tokens=per_problem(tokens),
        tokens_correct=per_problem(tokens * judged_correct),
        tokens_wrong=per_problem(tokens * judged_wrong),
        samples=per_problem(np.ones_like(tokens)),
        truncated=per_problem(truncated),
        images=_read_images(output_dir),
    )


def _metrics(result: EvaluationResult) -> dict[str, Any]:
    n, c = result.n, result.c

    def ratio(top: npt.ArrayLike, bottom: npt.ArrayLike) -> Estimate | None:
        return metrics.ratio_interval(
            top, bottom, resamples=result.resamples, confidence=result.confidence, seed=result.seed
        )

    def mean(values: Floats) -> Estimate | None:
        return ratio(values, np.ones_like(values))

    found: dict[str, Any] = {}
    for k in result.k:
        enough = n >= k
        dropped = int((~enough).sum())
        for name, estimator in ((f"pass@{k}", metrics.pass_at_k), (f"pass^{k}", metrics.pass_pow_k)):
            found[name] = _entry(mean(estimator(n[enough], c[enough], k))) | {"dropped_problems": dropped}
    found[f"maj@{result.identity['n']}"] = _entry(mean(metrics.majority(result.answers, result.correct)))
    found["distinct_correct"] = _entry(mean(metrics.distinct_correct(result.answers, result.correct)))
    found["answer_entropy"] = _entry(mean(metrics.answer_entropy(result.answers)))
    found["tokens"] = _entry(ratio(result.tokens, result.samples))
    found["tokens_correct"] = _entry(ratio(result.tokens_correct, c))
    found["tokens_wrong"] = _entry(ratio(result.tokens_wrong, n - c))
    found["truncated"] = _entry(ratio(result.truncated, result.samples))
    return found


def _entry(estimate: Estimate | None) -> dict[str, float | None]:
    """An estimate as JSON; nulls where there was nothing to average."""
    return {"value": None, "low": None, "high": None} if estimate is None else dict(estimate._asdict())
