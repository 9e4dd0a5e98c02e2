"""Whether a policy prefers the better answer of held-out pairs, and as often as it is sure of it.

`measure` scores pairs with an engine, `finish` joins the scores into `measures/pairs.*` and, with those of the initial
policy, writes `measures/calibration.*`. With d = log π_θ − log π_ref of a whole answer, w the better one, l the other:

    preference_accuracy   share of pairs with d_w > d_l; a tie counts ½
    preference_margin     nats: mean of d_w − d_l
    ece_bradley_terry     calibration error of σ(β s(d_w) − β s(d_l)), the probability that the policy's implicit reward
                          gives to w: what f-DPO's loss fits
    ece_likelihood        calibration error of the choice in proportion to exp(mean log π_θ per token)

The second is "the paper's": f-DPO measures calibration by length-normalised likelihoods. Its normalisation over the two
answers of a pair is a reconstruction, for the source gives no formula. It alone is defined for the initial policy; the
first needs a method with a β and a divergence.

Confidence is the probability of the answer that is chosen, so at least ½; its bins cover [½, 1].
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from posttrain.errors import UserError
from posttrain.evaluation import measures
from posttrain.evaluation.metrics import Floats
from posttrain.recipe import Calibration

if TYPE_CHECKING:
    from posttrain.rollouts.engine import Engine
    from posttrain.rollouts.pairs import TokenPair

PAIRS = "pairs"

SCHEMA = pa.schema(
    [
        ("problem", pa.int32()),
        ("chosen_logp", pa.float64()),  # nats, summed over the answer
        ("rejected_logp", pa.float64()),
        ("chosen_tokens", pa.int32()),
        ("rejected_tokens", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Implied:
    """How implicit rewards follow from log-ratios: β s(d).

    Attributes:
        divergence: one of `posttrain.objectives.preference.NAMES`.
        beta: what multiplies the score.
        alpha: for "alpha" only.
        edge: where scores continue linearly.
    """

    divergence: str
    beta: float
    alpha: float | None = None
    edge: float = 8.0


def expected_calibration_error(confidence: Floats, right: Floats, bins: int) -> float:
    """ECE = Σ_b n_b/n · |accuracy_b − confidence_b| over `bins` equal bins of [½, 1]; a share.

    A bin contains its lower edge, the last one both. The estimate is biased upwards: noise within a bin adds to it.

    Args:
        confidence: [n] probability of the chosen one of two answers.
        right: [n] 1 when it is the better one, ½ for a tie, else 0.
        bins: their number.

    Raises:
        ValueError: a confidence lies outside [½, 1], or there is none.

    Source: Guo et al., arXiv 1706.04599, Eq. 3. Differs: the bins cover [½, 1], for the lower half of theirs stays
    empty in a choice between two: `bins` here are 2 · `bins` there.
    """
    gaps = np.bincount(_bins(confidence, bins), weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def _bins(confidence: Floats, bins: int) -> npt.NDArray[np.intp]:
    if not len(confidence) or confidence.min() < 0.5 or confidence.max() > 1 or np.isnan(confidence).any():
        raise ValueError("A confidence for every choice between two is wanted, within [0.5, 1].")
    return np.searchsorted(_edges(bins)[1:-1], confidence, side="right")


def _edges(bins: int) -> Floats:
    return np.linspace(0.5, 1.0, bins + 1)


def measure(
    engine: Engine,
    pairs: Sequence[TokenPair],
    *,
    problems: int,
    batch_size: int,
    folder: Path,
    label: str,
    worker: tuple[int, int] = (0, 1),
) -> None:
    """Score both answers of every pair and write the parts; then rank 0 calls `finish`.

    Args:
        engine: with the policy.
        pairs: held-out; their `problem` counts the rows of the evaluation.
        problems: of the evaluation.
        batch_size: answers scored at a time.
        folder: of the evaluation.
        label: of the policy.
        worker: (rank, world); the parts are shared.

    Raises:
        UserError: there are no pairs, an answer is empty, or `folder` holds a measurement of something else.
    """
    if not pairs:
        raise UserError(
            "There are no held-out pairs to measure calibration on: no problem has a better and a worse answer; leave "
            "evaluation.calibration out."
        )
    if not all(len(pair.chosen_ids) and len(pair.rejected_ids) for pair in pairs):
        raise UserError("A held-out pair has an answer without tokens, which has no likelihood: leave that pair out.")
    content = [[pair.problem, *map(list, (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))] for pair in pairs]
    size = max(1, batch_size // 2)
    identity = {
        "problems": problems,
        "pairs": hashlib.sha256(json.dumps(content).encode("utf-8")).hexdigest()[:16],
        "model": engine.fingerprint,
        "engine": engine.name,
        "pairs_per_part": size,
        "parts": math.ceil(len(pairs) / size),
    }

    def make(index: int) -> pa.Table:
        mine = pairs[index * size : (index + 1) * size]
        scores = engine.score(
            [(pair.prompt_ids, answer) for pair in mine for answer in (pair.chosen_ids, pair.rejected_ids)]
        )
        sums = [math.fsum(score.logprobs) for score in scores]
        columns = (
            [pair.problem for pair in mine],
            sums[::2],
            sums[1::2],
            [len(pair.chosen_ids) for pair in mine],
            [len(pair.rejected_ids) for pair in mine],
        )
        return pa.Table.from_arrays(
            [pa.array(one, field.type) for one, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA
        )

    measures.produce(folder, PAIRS, identity, make, label=f"calibration {label}", worker=worker)


def finish(folder: Path, initial_folder: Path, settings: Calibration, implied: Implied | None) -> None:
    """Join the scores and write the measures; those are computed again every time, for they cost nothing.

    Args:
        folder: of the policy's evaluation.
        initial_folder: of the initial policy's, finished before; `folder` for the initial policy itself.
        settings: the bins.
        implied: of the policy's method; None without implicit rewards.

    Raises:
        UserError: parts are missing, or the initial policy was scored on other pairs.
    """
    measures.join(folder, PAIRS, lambda _: {})
    document = folder / "measures" / f"{PAIRS}.json"
    reference = initial_folder / "measures" / f"{PAIRS}.json"
    if not reference.exists():
        raise UserError(
            f"{initial_folder} holds no scores of the initial policy on the held-out pairs: measure it first."
        )
    identity, initial = measures.read(document)["identity"], measures.read(reference)["identity"]
    if identity["pairs"] != initial["pairs"]:
        raise UserError(
            f"{document} and {reference} are of different pairs: delete {document.parent} and measure again."
        )
    own, before = (_columns(path.with_suffix(".parquet")) for path in (document, reference))
    problem, tables, entries = own["problem"], [], {}

    def add(name: str, top: Floats, unit: str, description: str) -> None:
        tables.append(_rows(name, problem, top, None))
        entries[name] = measures.described(unit, description)

    def add_error(name: str, log_odds: Floats, description: str) -> None:
        confidence, right = _choice(log_odds)
        where = _bins(confidence, settings.bins)
        tables.append(_rows(name, problem, right - confidence, where))
        bins = _reliability(confidence, right, where, settings.bins)
        entries[name] = measures.described("share", description, bins)

    if folder != initial_folder:
        chosen, rejected = (own[f"{one}_logp"] - before[f"{one}_logp"] for one in ("chosen", "rejected"))
        add(
            "preference_accuracy",
            (np.sign(chosen - rejected) + 1) / 2,
            "share",
            "Held-out pairs whose better answer has gained more likelihood over the initial policy than the other.",
        )
        add(
            "preference_margin",
            chosen - rejected,
            "nats",
            "Log-ratio to the initial policy of the better answer minus that of the other.",
        )
        if implied is not None:
            add_error(
                "ece_bradley_terry",
                implied.beta * (_scores(implied, chosen) - _scores(implied, rejected)),
                f"Expected calibration error, {settings.bins} bins, of the Bradley–Terry probability that the implicit "
                "reward gives to the better answer.",
            )
    likelihood = own["chosen_logp"] / own["chosen_tokens"] - own["rejected_logp"] / own["rejected_tokens"]
    add_error(
        "ece_likelihood",
        likelihood,
        f"Expected calibration error, {settings.bins} bins, of the choice by length-normalised likelihood.",
    )
    content = {
        "problems": identity["problems"],
        "pairs": identity["pairs"],
        "model": identity["model"],
        "initial": initial["model"],
        "bins": settings.bins,
        "implied": asdict(implied) if implied is not None else None,
    }
    measures.write(folder, "calibration", pa.concat_tables(tables), content, entries)


def _columns(path: Path) -> dict[str, npt.NDArray[Any]]:
    table = measures.read_table(path)
    return {name: table[name].to_numpy() for name in table.column_names}


def _scores(implied: Implied, log_ratio: Floats) -> Floats:
    import torch

    from posttrain.objectives.preference import score

    scores: Floats = score(
        implied.divergence, torch.from_numpy(log_ratio), alpha=implied.alpha, edge=implied.edge
    ).numpy()
    return scores


def _choice(log_odds: Floats) -> tuple[Floats, Floats]:
    """Confidence in the answer that is chosen, and whether that is the better one, from the log-odds of the latter."""
    return 1 / (1 + np.exp(-np.abs(log_odds))), (np.sign(log_odds) + 1) / 2


def _rows(name: str, problem: npt.NDArray[Any], top: Floats, where: npt.NDArray[np.intp] | None) -> pa.Table:
    """One row per pair."""
    bins = pa.nulls(len(top), pa.int32()) if where is None else pa.array(where, pa.int32())
    columns = [pa.array(problem, pa.int32()), [name] * len(top), top, np.ones(len(top)), bins]
    return pa.Table.from_arrays([pa.array(one) for one in columns], schema=measures.BINNED)


def _reliability(confidence: Floats, right: Floats, where: npt.NDArray[np.intp], bins: int) -> tuple[measures.Bin, ...]:
    counts, sums, hits = (
        np.bincount(where, weights=weights, minlength=bins) for weights in (np.ones_like(right), confidence, right)
    )
    edges = _edges(bins).tolist()
    return tuple(
        measures.Bin(low, high, count, total / count if count else math.nan, hit / count if count else math.nan)
        for low, high, count, total, hit in zip(
            edges[:-1], edges[1:], counts.tolist(), sums.tolist(), hits.tolist(), strict=True
        )
    )
