"""Fixed rollouts as training data, the log-probs of policies on them, and signals that are differences of those.

    rollouts_from_store      the answers of a store of which something can be learned, with advantages
    score                    one policy's log-probs of all of them, on disk, resumable
    with_base_logps          log π_0 beside the answers: what ratios are anchored to
    make_signal              δ, from the log-probs of two policies or more, on disk; no model is needed for it
    with_signals             δ beside the answers
    validate                 whether δ ranks right answers above wrong ones, on held-out prompts
    choose_signal            which δ, from what has been trained

A folder of log-probs or of a signal holds

    manifest.json            identity and counts; its presence means that all is there
    logps.parquet            per answer, in the order of the rollouts: float32 per token, or
    signals.parquet          float16 per token

Advantages: Â = (r − mean) / (std + 1e-4) over the answers to a prompt, std with n − 1, as GRPO in TRL; or r − mean.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedTokenizerBase

from posttrain import atomic
from posttrain.errors import UserError
from posttrain.objectives.signals import PAIRS, SIGNALS, auc, log_ratio_signal, mixed, rms, within_groups_auc
from posttrain.progress import Bar
from posttrain.rollouts.engine import Engine
from posttrain.rollouts.fingerprint import files_fingerprint, tokenizer_fingerprint
from posttrain.rollouts.store import Store, prompt_id
from posttrain.rollouts.tokens import encode
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.tasks import Row

FORMAT = 1
"""Version of the layout on disk."""

_INTS, _FLOATS, _HALVES = pa.list_(pa.int32()), pa.list_(pa.float32()), pa.list_(pa.float16())

_LARGEST_HALF = 65504.0


# ---------------------------------------------------------------- the answers


@dataclass(frozen=True)
class StaticSet:
    """Fixed rollouts.

    Attributes:
        table: one row per answer, prompts in the order of the rows and answers in that of the store: `prompt_id`,
            `prompt_ids` and `completion_ids` (tokens as they were read and drawn), `rewards`, `advantages` (float32),
            `correct` (whether the reward is 1); `old_logps` (float32 per token, log π_0) with their `temperature`, and
            `signals` (float16 per token, δ), once they were added.
        counts: answers = unjudged + empty + too_long + all_right + all_wrong + no_spread + taken, each answer under the
            first that holds; of the taken ones, `right`; `prompts`, and `with_answers`, those of which some were taken.
        temperature: of the log-probs that were added, None before.
    """

    table: pa.Table
    counts: Mapping[str, int]
    temperature: float | None = None

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __str__(self) -> str:
        """One line for the terminal."""
        counts = self.counts
        left = {
            "unjudged": "without a verdict",
            "empty": "empty",
            "too_long": "too long",
            "all_right": "to prompts that are always right",
            "all_wrong": "to prompts that are never right",
            "no_spread": "to prompts with a single answer or reward",
        }
        reasons = ", ".join(f"{counts[name]:,} {text}" for name, text in left.items() if counts[name])
        return (
            f"{counts['taken']:,} of {counts['answers']:,} answers to {counts['with_answers']:,} of "
            f"{counts['prompts']:,} prompts, {counts['right']:,} of them right"
            + (f" (left out: {reasons})" * bool(reasons))
        )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all prompts' and answers' tokens (16 hex digits)."""
        digest = hashlib.sha256()
        for name in ("prompt_ids", "completion_ids"):
            lists = self.table[name].combine_chunks()
            for values in (pa.compute.list_value_length(lists), lists.flatten()):
                digest.update(values.to_numpy(zero_copy_only=False).astype(np.int32).tobytes())
        return digest.hexdigest()[:16]

    def tokens(self) -> int:
        """Answer tokens of all answers."""
        return len(self.table["completion_ids"].combine_chunks().flatten())


def rollouts_from_store(
    store: Store,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    keep_uniform: bool = False,
    scale_rewards: bool = True,
    max_length: int | None = None,
) -> StaticSet:
    """The answers of a store to learn from, or with `keep_uniform` those to validate a signal on.

    An answer that was cut off counts with the verdict that it got, as in on-policy training.

    Args:
        store: of the policy π_0 that training starts from.
        rows: the rows of these prompts, which may be a part of the store's.
        tokenizer: of that policy.
        keep_uniform: keep the answers to prompts that are always or never right, whose advantages are 0.
        scale_rewards: divide advantages by the standard deviation of their group.
        max_length: longest prompt and answer together, in tokens; None takes any.

    Raises:
        UserError: a prompt is not in the store or holds images, the tokenizer is another one than the store's, or no
            answer is left.
    """
    if any(row.get("images") for row in rows):
        raise UserError("Static rollouts are of text, and some rows hold images: take a task without them.")
    identifiers = [prompt_id(row["prompt"]) for row in rows]
    missing = sum(identifier not in store.sets for identifier in identifiers)
    if missing:
        raise UserError(
            f"{missing} of {len(rows)} prompts are not in the store {store.path}: presample the same data that you "
            "train on."
        )
    made_with = str(store.identity["model"]).split(".")[1:2]
    if made_with and made_with[0] != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"The store {store.path} was made with another tokenizer or chat template: presample again with this model."
        )
    columns = ["prompt_id", "token_ids", "reward"]
    samples = pq.read_table(store.path / "samples.parquet", columns=columns)
    token_ids, rewards = samples["token_ids"].combine_chunks(), samples["reward"].to_pylist()
    places: dict[str, list[int]] = {}
    for place, identifier in enumerate(samples["prompt_id"].to_pylist()):
        places.setdefault(identifier, []).append(place)
    reasons = ("unjudged", "empty", "too_long", "all_right", "all_wrong", "no_spread")
    counts = Counter({name: 0 for name in ("answers", "with_answers", *reasons, "taken", "right")})
    taken: list[dict[str, Any]] = []
    for row, identifier in zip(rows, identifiers, strict=True):
        prompt = np.asarray(encode(tokenizer, row["prompt"]), dtype=np.int32)
        group = []
        for place in places.get(identifier, []):
            answer = token_ids[place].values.to_numpy(zero_copy_only=False)
            counts["answers"] += 1
            if rewards[place] is None or not math.isfinite(rewards[place]):
                counts["unjudged"] += 1
            elif not len(answer):
                counts["empty"] += 1
            elif max_length is not None and len(prompt) + len(answer) > max_length:
                counts["too_long"] += 1
            else:
                group.append((answer, float(rewards[place])))
        values = np.array([reward for _, reward in group])
        uniform = len(values) < 2 or bool((values == values[0]).all())
        if uniform and not keep_uniform:
            kind = (
                "no_spread" if len(values) < 2 or 0.0 < values[0] < 1.0 else "all_right" if values[0] >= 1.0 else None
            )
            counts[kind or "all_wrong"] += len(group)
            continue
        advantages = _advantages(values, scale_rewards) if not uniform else np.zeros_like(values)
        counts["with_answers"] += bool(group)
        for (answer, reward), advantage in zip(group, advantages, strict=True):
            right = reward == 1.0
            counts["right"] += right
            taken.append(
                {
                    "prompt_id": identifier,
                    "prompt_ids": prompt,
                    "completion_ids": answer,
                    "rewards": reward,
                    "advantages": advantage,
                    "correct": right,
                }
            )
    counts["taken"] = len(taken)
    if not taken:
        why = ", ".join(f"{name.replace('_', ' ')}: {counts[name]}" for name in reasons if counts[name])
        raise UserError(
            f"The store {store.path} holds nothing to learn from among {counts['answers']} answers ({why}): take "
            "prompts that the policy answers sometimes right and sometimes wrong, or more answers per prompt "
            "(presample.samples_per_prompt)."
        )
    types = {
        "prompt_id": pa.string(),
        "prompt_ids": _INTS,
        "completion_ids": _INTS,
        "rewards": pa.float32(),
        "advantages": pa.float32(),
        "correct": pa.bool_(),
    }
    table = pa.table({name: pa.array([each[name] for each in taken], kind) for name, kind in types.items()})
    return StaticSet(table, {"prompts": len(rows), **counts})


def _advantages(rewards: np.ndarray, scale: bool) -> np.ndarray:
    centred: np.ndarray = rewards - rewards.mean()
    return centred / (rewards.std(ddof=1) + 1e-4) if scale else centred


def accuracies(answers: StaticSet) -> dict[str, float]:
    """The share of right answers to each prompt, by `prompt_id`; take a set that keeps the answers of all prompts."""
    found: dict[str, list[bool]] = {}
    names, correct = (answers.table[name].to_pylist() for name in ("prompt_id", "correct"))
    for name, right in zip(names, correct, strict=True):
        found.setdefault(name, []).append(right)
    return {name: sum(verdicts) / len(verdicts) for name, verdicts in found.items()}


# ---------------------------------------------------------------- log-probs of one policy


@dataclass(frozen=True)
class Logps:
    """One policy's log-probs of static rollouts, finished and on disk."""

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Logps:
        """Open a folder of log-probs.

        Raises:
            UserError: there is none, or it is unfinished or of another version.
        """
        return cls(Path(path), _manifest(Path(path), "log-probs"))

    @property
    def model(self) -> str:
        """Fingerprint of the policy."""
        return str(self.manifest["identity"]["model"])

    @property
    def temperature(self) -> float:
        """That the logits were divided by."""
        return float(self.manifest["identity"]["temperature"])

    def of(self, answers: StaticSet) -> pa.ListArray:
        """Float32 per token of every answer.

        Raises:
            UserError: they are of other answers.
        """
        _require_rollouts(self.path, self.manifest, answers)
        column: pa.ListArray = pq.read_table(self.path / "logps.parquet")["logps"].combine_chunks()
        return column


def score(
    engine: Engine,
    answers: StaticSet,
    output_dir: Path,
    *,
    temperature: float,
    batch_size: int = 256,
    worker: tuple[int, int] = (0, 1),
    barrier: Callable[[], None] = lambda: None,
) -> Logps:
    """log π of every answer token, full softmax; or what is missing of it, or what is there already.

    The work is cut into parts of `batch_size` answers, each written whole or not at all, so that a killed scoring goes
    on and the result does not depend on how often it was interrupted or how many workers there were.

    Args:
        engine: the policy. For log π_0 it has to compute as training does: the transformers engine, in the same dtype.
        answers: what is scored.
        output_dir: folder of the log-probs.
        temperature: divides the logits; that of the rollouts and of training.
        batch_size: answers per part; part of the identity.
        worker: (rank, number of processes).
        barrier: waits for all processes.

    Raises:
        UserError: the folder belongs to other settings, or a log-prob is not finite.
    """
    identity = {
        "rollouts": answers.fingerprint,
        "model": engine.fingerprint,
        "engine": engine.name,
        "temperature": temperature,
        "batch_size": batch_size,
    }
    if _is_finished(output_dir, identity):
        return Logps.open(output_dir)
    rank, world = worker
    if rank == 0:
        atomic.Parts(output_dir / "parts", identity)
    barrier()
    parts = atomic.Parts(output_dir / "parts", identity)
    starts = range(0, len(answers), batch_size)
    with Bar("score", len(answers), "answers", shown=rank == 0) as bar:
        for index, start in enumerate(starts):
            chunk = answers.table.slice(start, batch_size)
            if index % world == rank and not parts.done(index):
                sequences = list(zip(chunk["prompt_ids"].to_pylist(), chunk["completion_ids"].to_pylist(), strict=True))
                found = [scored.logprobs for scored in engine.score(sequences, temperature=temperature)]
                column = pa.array(found, _FLOATS)
                if not np.isfinite(column.flatten().to_numpy(zero_copy_only=False)).all():
                    raise UserError(
                        "A log-prob of the policy that is scored is not finite: look at its weights and its dtype."
                    )
                parts.write(index, pa.table({"logps": column}))
            bar.advance(chunk.num_rows)
    barrier()
    if rank == 0:
        table = parts.read(len(starts))
        _require_lengths(table["logps"].combine_chunks(), answers)
        atomic.remove_leftovers(output_dir)
        atomic.write_table(output_dir / "logps.parquet", table)
        counts = {"answers": len(answers), "tokens": answers.tokens()}
        manifest = {"format": FORMAT, "identity": identity, "files": engine.files, "counts": counts}
        atomic.write_json(output_dir / "manifest.json", manifest)
        parts.remove()
    barrier()
    return Logps.open(output_dir)


def score_model(
    path: str,
    answers: StaticSet,
    output_dir: Path,
    *,
    temperature: float,
    dtype: str = "float32",
    revision: str | None = None,
    batch_size: int = 256,
    worker: tuple[int, int] = (0, 1),
    barrier: Callable[[], None] = lambda: None,
) -> Logps:
    """`score` by the model at `path`, which is in memory meanwhile and gone afterwards.

    It is not loaded at all when the folder is finished and was made of a model folder with the same files.

    Raises:
        UserError: as `score`.
    """
    if (output_dir / "manifest.json").is_file():
        known = Logps.open(output_dir)
        files, identity = files_fingerprint(path), known.manifest["identity"]
        asked = {"rollouts": answers.fingerprint, "temperature": temperature, "batch_size": batch_size}
        same = asked == {name: identity[name] for name in asked}
        if same and files is not None and files == known.manifest["files"]:
            return known
    engine = TransformersEngine.load(path, dtype=dtype, revision=revision, images=False)
    try:
        return score(
            engine,
            answers,
            output_dir,
            temperature=temperature,
            batch_size=batch_size,
            worker=worker,
            barrier=barrier,
        )
    finally:
        engine.close()


def with_base_logps(answers: StaticSet, logps: Logps) -> StaticSet:
    """The same answers with columns `old_logps`, log π_0 per token (float32), and `temperature`, that of all of them.

    Raises:
        UserError: the log-probs are of other answers.
    """
    table = answers.table.append_column("old_logps", logps.of(answers))
    table = table.append_column("temperature", pa.array([logps.temperature] * len(answers), pa.float64()))
    return StaticSet(table, answers.counts, logps.temperature)


# ---------------------------------------------------------------- signals


@dataclass(frozen=True)
class Term:
    """One difference of a signal: weight · (log π_plus − log π_minus), nats per token."""

    plus: Logps
    minus: Logps
    weight: float = 1.0


@dataclass(frozen=True)
class Signals:
    """δ of static rollouts, finished and on disk."""

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Signals:
        """Open a folder of signals.

        Raises:
            UserError: there is none, or it is unfinished or of another version.
        """
        return cls(Path(path), _manifest(Path(path), "signals"))

    @property
    def name(self) -> str:
        """Which signal it is."""
        return str(self.manifest["identity"]["signal"])

    def of(self, answers: StaticSet) -> pa.ListArray:
        """Float16 per token of every answer.

        Raises:
            UserError: they are of other answers.
        """
        _require_rollouts(self.path, self.manifest, answers)
        column: pa.ListArray = pq.read_table(self.path / "signals.parquet")["signals"].combine_chunks()
        return column


def make_signal(name: str, terms: Sequence[Term], answers: StaticSet, output_dir: Path) -> Signals:
    """δ of every answer token in half precision, on disk, from log-probs alone; or what is there already.

    One term is taken as it is, in nats; those of a `mix` are each divided by their rms over all tokens.

    Args:
        name: one of `posttrain.objectives.signals.SIGNALS`.
        terms: whose log-probs minus whose; for all but `mix` exactly one, of weight 1.
        answers: what the log-probs are of.
        output_dir: folder of the signal.

    Raises:
        UserError: the terms do not make this signal, are of other answers, of one and the same policy, or of different
            temperatures; or the folder belongs to another signal.
    """
    if name not in SIGNALS:
        raise UserError(f"unknown signal '{name}'; known: {', '.join(SIGNALS)}.")
    if not terms or (name != "mix" and (len(terms) != 1 or terms[0].weight != 1.0)):
        wanted = "one or more" if name == "mix" else "exactly one, of weight 1"
        raise UserError(f"The signal '{name}' is made of {wanted} differences, and {len(terms)} were given.")
    temperatures = {logps.temperature for term in terms for logps in (term.plus, term.minus)}
    if len(temperatures) > 1:
        raise UserError(f"The log-probs of a signal are at temperatures {sorted(temperatures)}: score all at one.")
    for term in terms:
        if term.plus.model == term.minus.model:
            raise UserError(
                f"The signal '{name}' subtracts a policy from itself ({term.plus.path} and {term.minus.path}), which "
                "is zero everywhere: give two policies."
            )
        if not math.isfinite(term.weight) or term.weight == 0.0:
            raise UserError(f"A weight of the signal '{name}' is {term.weight}: give a finite one other than 0.")
    identity = {
        "rollouts": answers.fingerprint,
        "signal": name,
        "temperature": temperatures.pop(),
        "terms": {
            str(number): {"plus": term.plus.model, "minus": term.minus.model, "weight": term.weight}
            for number, term in enumerate(terms)
        },
    }
    if _is_finished(output_dir, identity):
        return Signals.open(output_dir)
    lengths = pa.compute.list_value_length(answers.table["completion_ids"].combine_chunks())
    everywhere = torch.ones(1, answers.tokens())
    differences = [
        log_ratio_signal(_flat(term.plus.of(answers)), _flat(term.minus.of(answers)), everywhere) for term in terms
    ]
    if name == "mix":
        scales = [float(rms(difference, everywhere)) for difference in differences]
        total = mixed(differences, [term.weight for term in terms], scales)
    else:
        total = differences[0]
    halves = total[0].clamp(-_LARGEST_HALF, _LARGEST_HALF).numpy().astype(np.float16)
    offsets = np.concatenate([[0], np.cumsum(lengths.to_numpy(zero_copy_only=False))]).astype(np.int32)
    column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(halves, pa.float16()), type=_HALVES)
    atomic.write_table(output_dir / "signals.parquet", pa.table({"signals": column}))
    counts = {"answers": len(answers), "tokens": len(halves)}
    measured = {"rms": float(rms(total, everywhere)), "mean": float(total.mean())}
    manifest = {"format": FORMAT, "identity": identity, "counts": counts, **measured}
    atomic.write_json(output_dir / "manifest.json", manifest)
    return Signals.open(output_dir)


def with_signals(answers: StaticSet, signals: Signals) -> StaticSet:
    """The same answers with a column `signals`: δ per token (float16).

    Raises:
        UserError: the signal is of other answers, or of another temperature than the log-probs beside them.
    """
    found = float(signals.manifest["identity"]["temperature"])
    if answers.temperature is not None and not math.isclose(found, answers.temperature):
        raise UserError(
            f"The signal {signals.path} is at temperature {found:g} and log π_0 at {answers.temperature:g}: score all "
            "policies at one."
        )
    return StaticSet(answers.table.append_column("signals", signals.of(answers)), answers.counts, found)


# ---------------------------------------------------------------- which signal, and whether it is one


@dataclass(frozen=True)
class Validation:
    """How well Σδ / |y| ranks right answers above wrong ones, over held-out prompts.

    Attributes:
        auc: over all pairs of a right and a wrong answer.
        low, high: its 95 % interval, from resampling prompts.
        within: over pairs of answers to one prompt; NaN where there is no such pair.
        right, wrong, prompts: how many answers and prompts that is of.
    """

    auc: float
    low: float
    high: float
    within: float
    right: int
    wrong: int
    prompts: int

    def __str__(self) -> str:
        """One line for the terminal."""
        return (
            f"AUC {self.auc:.3f} [{self.low:.3f}, {self.high:.3f}], within prompts {self.within:.3f}, of "
            f"{self.right:,} right and {self.wrong:,} wrong held-out answers to {self.prompts:,} prompts"
        )


def validate(signals: Signals, held_out: StaticSet, *, resamples: int = 500, seed: int = 0) -> Validation:
    """AUC of the length-normalised Σδ against correctness on held-out prompts.

    Raises:
        UserError: the signal is of other answers, or the answers are all right or all wrong.
    """
    column = signals.of(held_out)
    lengths = pa.compute.list_value_length(column).to_numpy(zero_copy_only=False)
    sums = np.add.reduceat(_flat(column)[0].numpy(), np.concatenate([[0], np.cumsum(lengths)[:-1]]))
    scores = torch.from_numpy(sums / lengths)
    correct = torch.tensor(held_out.table["correct"].to_pylist(), dtype=torch.bool)
    groups = torch.from_numpy(np.unique(held_out.table["prompt_id"].to_pylist(), return_inverse=True)[1])
    right, wrong = int(correct.sum()), int((~correct).sum())
    if not right or not wrong:
        raise UserError(
            f"The held-out answers are {'all wrong' if not right else 'all right'} ({len(correct)}), which ranks "
            "nothing: hold out more prompts."
        )
    members = [torch.nonzero(groups == number).squeeze(1) for number in range(int(groups.max()) + 1)]
    random = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        drawn = torch.cat([members[place] for place in random.integers(len(members), size=len(members))])
        found.append(auc(scores[drawn], correct[drawn]))
    low, high = np.nanquantile(found, [0.025, 0.975]) if not np.isnan(found).all() else (float("nan"),) * 2
    return Validation(
        auc(scores, correct),
        float(low),
        float(high),
        within_groups_auc(scores, correct, groups),
        right,
        wrong,
        len(members),
    )


def require_valid(name: str, found: Validation) -> None:
    """Refuse a signal that ranks right answers below wrong ones.

    Raises:
        UserError: the AUC is below ½; the message names the alternatives.
    """
    if not found.auc >= 0.5:
        others = ", ".join(other for other in PAIRS if other != name)
        raise UserError(
            f"The signal '{name}' ranks right answers below wrong ones on held-out prompts ({found}), so distilling it "
            f"would unlearn: choose another signal ({others}, or a mix), extract from more prompts or answers, stop "
            "the extraction earlier, or choose another extract_loss."
        )


@dataclass(frozen=True)
class Choice:
    """A signal that was chosen.

    Attributes:
        signal: one of `posttrain.objectives.signals.PAIRS`.
        plus, minus: the runs whose log-probs are subtracted: base, teacher or unlearned. Of `base_unlearned`, minus is
            the teacher where a teacher that went wrong stands for the unlearned policy.
        reason: why, for people.
    """

    signal: str
    plus: str
    minus: str
    reason: str


def choose_signal(
    base: Sequence[float],
    teacher: Sequence[float] | None,
    *,
    unlearned: bool,
    teacher_auc: Validation | None = None,
) -> Choice:
    """`signal: auto`. The first of these that holds:

    1. The teacher is better than the base beyond noise ⇒ `teacher_base`.
    2. There is a teacher and an unlearned policy ⇒ `teacher_unlearned`: the drift that both share cancels.
    3. There is an unlearned policy alone ⇒ `base_unlearned`.
    4. There is a teacher alone that is no better. Whether its log-ratio ranks answers decides, not how well it writes:
       with the interval of its AUC above ½ ⇒ `teacher_base`; below ½ ⇒ `base_unlearned`, where the teacher itself is
       the policy that went wrong: what it moved towards is bad.

    "Beyond noise": the mean of the paired differences is larger than 1.96 standard errors.

    Args:
        base, teacher: accuracy on each held-out prompt, in one order; None where no teacher was trained.
        unlearned: whether a policy was trained with `unlearn`.
        teacher_auc: `validate` of `teacher_base`; read in the last case only.

    Raises:
        UserError: nothing was trained, or none of these holds; the message says what to do.
        ValueError: the accuracies are not of the same prompts.
    Source: 1–3 are of our specification, reconstructed; 4 is ours.
    """
    if teacher is None:
        if not unlearned:
            raise UserError("There is neither a teacher nor an unlearned policy to make a signal of: extract one.")
        return Choice("base_unlearned", "base", "unlearned", "there is an unlearned policy and no teacher")
    if len(base) != len(teacher) or not len(base):
        raise ValueError(f"{len(base)} accuracies of the base and {len(teacher)} of the teacher are not paired.")
    differences = np.asarray(teacher, dtype=float) - np.asarray(base, dtype=float)
    mean = float(differences.mean())
    error = float(differences.std(ddof=1) / math.sqrt(len(differences))) if len(differences) > 1 else math.inf
    measured = f"teacher minus base is {mean:+.3f} ± {1.96 * error:.3f} on {len(differences)} held-out prompts"
    if mean > 0.0 and mean > 1.96 * error:
        return Choice("teacher_base", "teacher", "base", measured)
    if unlearned:
        return Choice("teacher_unlearned", "teacher", "unlearned", f"{measured}, and there is an unlearned policy")
    if teacher_auc is not None and teacher_auc.low > 0.5:
        return Choice("teacher_base", "teacher", "base", f"{measured}, but its log-ratio ranks answers: {teacher_auc}")
    if teacher_auc is not None and teacher_auc.high < 0.5:
        return Choice("base_unlearned", "base", "teacher", f"{measured}, and it moved to what is wrong: {teacher_auc}")
    ranks = "" if teacher_auc is None else f" and its log-ratio ranks answers no better than chance ({teacher_auc})"
    raise UserError(
        f"No signal follows from what was trained ({measured}{ranks}): extract an unlearned policy too (unlearn: true)"
        ", extract from more prompts or answers, or name a signal."
    )


# ---------------------------------------------------------------- parts of the above


def _manifest(folder: Path, what: str) -> Mapping[str, Any]:
    """The manifest of a finished folder."""
    if not (folder / "manifest.json").is_file():
        unfinished = (folder / "parts").is_dir()
        state = "are unfinished: score again with the same settings" if unfinished else "do not exist"
        raise UserError(f"The {what} {folder} {state}.")
    content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if content.get("format") != FORMAT:
        raise UserError(
            f"The {what} {folder} have format {content.get('format')}, this version reads {FORMAT}: score again."
        )
    found: Mapping[str, Any] = content
    return found


def _is_finished(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Whether a folder holds what belongs to this identity, whole.

    Raises:
        UserError: it holds something else.
    """
    if not (folder / "manifest.json").is_file():
        return False
    difference = atomic.first_difference(_manifest(folder, "contents of")["identity"], identity)
    if difference is not None:
        raise UserError(f"{folder} was made with other settings ({difference}): choose another folder or delete it.")
    return True


def _require_rollouts(path: Path, manifest: Mapping[str, Any], answers: StaticSet) -> None:
    if manifest["identity"]["rollouts"] != answers.fingerprint:
        raise UserError(f"{path} was made of other answers than these: score these answers.")


def _require_lengths(column: pa.ListArray, answers: StaticSet) -> None:
    wanted = pa.compute.list_value_length(answers.table["completion_ids"].combine_chunks())
    if not pa.compute.list_value_length(column).equals(wanted):
        raise UserError("The engine gave another number of log-probs than an answer has tokens.")


def _flat(column: pa.ListArray) -> torch.Tensor:
    """All values of a list column, one after another [1, tokens], in float64."""
    return torch.from_numpy(column.flatten().to_numpy(zero_copy_only=False).astype(np.float64))[None]
