"""What else is measured on a policy: values per problem beside an evaluation, with intervals and paired differences.

A kind of measure (diversity, divergence, calibration) is two files in the folder of an evaluation:

    measures/<kind>.parquet    problem, measure, top, bottom, and bin for calibration errors
    measures/<kind>.json       what was measured on what (`identity`), unit and description of every measure
    measures/<kind>/           parts, only while it runs

Work is cut into parts that depend on the identity alone (`produce`), so a killed measurement goes on where it stopped
and any number of workers writes the same files; the first of them joins the parts (`join`) once all have written.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from posttrain import atomic
from posttrain.errors import UserError
from posttrain.evaluation.metrics import Estimate, Floats
from posttrain.progress import Bar
from posttrain.versions import versions

KINDS = ("diversity", "divergence", "calibration")
"""The kinds there are, in the order of a report."""

SCHEMA = pa.schema(
    [
        ("problem", pa.int32()),  # index into the rows of the evaluation
        ("measure", pa.string()),
        ("top", pa.float64()),
        ("bottom", pa.float64()),
    ]
)

BINNED = SCHEMA.append(pa.field("bin", pa.int32()))
"""For kinds with calibration errors: the bin of confidence, null for other measures."""

_BLOCK = 2_000_000
"""Weights of resampled problems held in memory at once."""


@dataclass(frozen=True)
class Bin:
    """One bin of a reliability plot.

    Attributes:
        low: lower edge of confidence.
        high: upper edge.
        count: pairs in it.
        confidence: their mean confidence; nan without any.
        accuracy: share of right choices; nan without any.
    """

    low: float
    high: float
    count: float
    confidence: float
    accuracy: float


@dataclass(frozen=True, eq=False)
class Measured:
    """One measure on one policy: Σ top / Σ bottom over problems.

    A calibration error is no mean over problems, but its sums are: with one column of `top` per bin it is
    Σ_bins |Σ_problems top| / Σ bottom. Resampling problems therefore recomputes the bins.

    Attributes:
        name: of the measure.
        kind: one of `KINDS`.
        unit: of the value.
        description: one sentence, for a caption.
        top: [P], or [P, bins] for a calibration error.
        bottom: [P]; 0 where a problem was not measured.
        bins: the reliability plot of a calibration error; empty otherwise.
    """

    name: str
    kind: str
    unit: str
    description: str
    top: Floats
    bottom: Floats
    bins: tuple[Bin, ...] = ()

    def estimate(self, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0) -> Estimate | None:
        """The value with its percentile bootstrap interval over the problems that were measured; None without any.

        The interval of a calibration error lies high when pairs are few, as the error itself does: noise in a bin only
        ever adds to it.
        """
        return _bootstrap([self], lambda values: values[0], resamples, confidence, seed)

    def difference(
        self, base: Measured, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
    ) -> Estimate | None:
        """This value − the one of `base`, in resamples of the same problems; None if either measured nothing.

        Raises:
            ValueError: the two are of different numbers of problems.
        """
        if len(self.bottom) != len(base.bottom):
            raise ValueError(
                f"'{self.name}' was measured on {len(self.bottom)} problems here and {len(base.bottom)} there: a "
                "paired difference needs the same ones."
            )
        return _bootstrap([self, base], lambda values: values[0] - values[1], resamples, confidence, seed)


def _bootstrap(
    measured: list[Measured], combine: Callable[[list[Floats]], Floats], resamples: int, confidence: float, seed: int
) -> Estimate | None:
    """`combine` of the values of measures of the same problems, with its percentile interval.

    Resamples in which a denominator vanishes say nothing and are left out of the percentiles.
    """
    if any(one.bottom.sum() <= 0 for one in measured):
        return None
    asked = np.any([one.bottom > 0 for one in measured], axis=0)
    problems = int(asked.sum())

    def combined(weights: Floats) -> Floats:
        values = []
        for one in measured:
            top, bottom = weights @ one.top[asked], weights @ one.bottom[asked]
            if top.ndim == 2:
                top = np.abs(top).sum(axis=1)
            values.append(np.divide(top, bottom, out=np.full_like(bottom, np.nan), where=bottom > 0))
        return combine(values)

    drawn = [combined(weights) for weights in _weights(problems, resamples, seed)]
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(np.concatenate(drawn), [tail, 1 - tail])
    return Estimate(float(combined(np.ones((1, problems)))[0]), float(low), float(high))


@lru_cache(maxsize=2)
def _weights(problems: int, resamples: int, seed: int) -> tuple[Floats, ...]:
    """How often each problem is drawn, [rows, problems] a block: drawn once for all measures of as many problems."""
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK // problems)
    sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    uniform = np.full(problems, 1 / problems)
    return tuple(generator.multinomial(problems, uniform, size=size).astype(np.float64) for size in sizes)


def load(folder: Path) -> dict[str, Measured]:
    """Everything that was measured beside the evaluation in `folder`, by name; nothing is an empty dict.

    Raises:
        UserError: a file is damaged, or the table of a document is missing.
    """
    found: dict[str, Measured] = {}
    for kind in KINDS:
        path = folder / "measures" / f"{kind}.json"
        if path.exists():
            document = read(path)
            table = read_table(path.with_suffix(".parquet"))
            for name, entry in document["measures"].items():
                found[name] = _measured(name, kind, entry, document["identity"]["problems"], table)
    return found


def _measured(name: str, kind: str, entry: Mapping[str, Any], problems: int, table: pa.Table) -> Measured:
    rows = table.filter(pc.equal(table["measure"], name))
    problem, bins = rows["problem"].to_numpy(), _plot(entry.get("bins", ()))
    columns = max(1, len(bins))
    top, bottom = np.zeros((problems, columns)), np.zeros(problems)
    np.add.at(top, (problem, rows["bin"].to_numpy() if bins else 0), rows["top"].to_numpy())
    np.add.at(bottom, problem, rows["bottom"].to_numpy())
    top = top if bins else top[:, 0]
    return Measured(name, kind, entry["unit"], entry["description"], top, bottom, bins)


def produce(
    folder: Path,
    kind: str,
    identity: Mapping[str, Any],
    make: Callable[[int], pa.Table],
    *,
    label: str,
    worker: tuple[int, int],
) -> None:
    """Write the parts 0 … identity["parts"] − 1 of a kind that are missing; worker `rank` of `world` takes its share.

    Nothing is done where a finished measurement has the same identity.

    Args:
        folder: of the evaluation.
        kind: name of the files.
        identity: everything that determines the result; `parts` is their number.
        make: the table of a part, from its number.
        label: of the progress bar.
        worker: (rank, world).

    Raises:
        UserError: a finished or an unfinished measurement of something else is there.
    """
    rank, world = worker
    document = folder / "measures" / f"{kind}.json"
    if document.exists():
        difference = atomic.first_difference(read(document)["identity"], identity)
        if difference is not None:
            raise UserError(
                f"{document} is of another measurement ({difference}): delete {document.parent} to measure again."
            )
        if rank == 0:
            shutil.rmtree(document.with_suffix(""), ignore_errors=True)
        return
    parts = atomic.Parts(document.with_suffix(""), identity)
    mine = range(identity["parts"])[rank::world]
    with Bar(label if world == 1 else f"{label} (worker 1 of {world})", len(mine), "parts", shown=rank == 0) as bar:
        for index in mine:
            if not parts.done(index):
                parts.write(index, make(index))
            bar.advance(1)


def join(folder: Path, kind: str, entries: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
    """Join the parts that all workers wrote into the two files of a kind; a finished one stays as it is.

    Args:
        folder: of the evaluation.
        kind: name of the files.
        entries: makes `measures` of the document, entries by name, from the identity.

    Raises:
        UserError: parts are missing.
    """
    document = folder / "measures" / f"{kind}.json"
    if document.exists():
        return
    marker = document.with_suffix("") / "identity.json"
    if not marker.exists():
        raise UserError(f"{folder} holds no {kind} to finish: measure first.")
    identity = read(marker)
    parts = atomic.Parts(document.with_suffix(""), identity)
    missing = [index for index in range(identity["parts"]) if not parts.done(index)]
    if missing:
        raise UserError(
            f"{len(missing)} of {identity['parts']} parts of {document.with_suffix('')} are missing, the first is "
            f"number {missing[0]}: measure again with the same settings to fill them in."
        )
    write(folder, kind, parts.read(identity["parts"]), identity, entries(identity))
    parts.remove()


def write(folder: Path, kind: str, table: pa.Table, identity: Mapping[str, Any], entries: Mapping[str, Any]) -> None:
    """Write the two files of a kind, the document last."""
    document = folder / "measures" / f"{kind}.json"
    atomic.write_table(document.with_suffix(".parquet"), table)
    atomic.write_json(document, {"identity": dict(identity), "measures": dict(entries), "versions": versions()})


def described(unit: str, description: str, bins: tuple[Bin, ...] = ()) -> dict[str, Any]:
    """The entry of a measure in its document."""
    entry: dict[str, Any] = {"unit": unit, "description": description}
    if bins:
        entry["bins"] = [
            {key: None if math.isnan(value) else value for key, value in asdict(one).items()} for one in bins
        ]
    return entry


def _plot(entries: Iterable[Mapping[str, float | None]]) -> tuple[Bin, ...]:
    return tuple(Bin(**{key: math.nan if value is None else value for key, value in one.items()}) for one in entries)


def seed(identity: Mapping[str, Any], kind: str, index: int) -> int:
    """Seed of part `index`: other than those of the evaluation, of other kinds and of other models."""
    words = [int.from_bytes(text.encode("utf-8"), "big") for text in (kind, identity["model"])]
    return int(np.random.SeedSequence([identity["seed"], index, *words]).generate_state(1)[0])


def read(path: Path) -> dict[str, Any]:
    """A JSON document.

    Raises:
        UserError: it is damaged.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete it and measure again.") from None
    return content


def read_table(path: Path) -> pa.Table:
    """A Parquet table.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} is missing or damaged ({error}): delete {path.with_suffix('.json').name} beside it and measure "
            "again."
        ) from None
