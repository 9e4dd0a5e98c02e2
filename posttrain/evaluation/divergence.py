"""How far a policy is from the initial one: divergences over the whole vocabulary, on answers of the policy itself.

`measure` reads the samples of a finished evaluation, `finish` writes `measures/divergence.*`:

    <name>           D_f(π_θ‖π_ref) of next-token distributions, mean over the tokens of the answers
    kl_per_answer    nats per answer: the sum of `reverse_kl` over an answer, mean over answers

By the chain rule, `kl_per_answer` is an unbiased estimate of KL(π_θ‖π_ref) between whole answers, up to the length
limit, where they were sampled at temperature 1 without top-p. The other divergences have no chain rule: they are means
under prefixes that the policy writes. Both distributions are the models' own softmax, whatever the answers were
sampled at. The initial policy is at distance 0 by definition.

The tokens are those that were sampled, after the prompt as the engine rendered it, the end-of-sequence token included
where there is one. What a chat template adds after an answer is nothing the policy wrote and is not measured.

Source: the divergence efficiency of f-DPO, arXiv 2309.16240. Differs: the sum over the vocabulary replaces the
log-ratio of the sampled token; for `reverse_kl` it has the same mean and less noise.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from posttrain import tasks
from posttrain.errors import UserError
from posttrain.evaluation import measures
from posttrain.evaluation.metrics import Floats
from posttrain.recipe import Divergence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


KIND = "divergence"

_ANSWERS = 64
"""Answers of one part."""

_TOKENS = 2**14
"""Tokens that pass through the models at a time."""

_WITHOUT_UNIT = ("chi2", "hellinger", "chi2_kl", "total_variation")


def measure(
    model: str,
    initial: str,
    rows: Sequence[tasks.Row],
    settings: Divergence,
    *,
    dtype: str,
    initial_folder: Path,
    folder: Path,
    label: str,
    revision: str | None = None,
    worker: tuple[int, int] = (0, 1),
) -> None:
    """Measure on the first `settings.answers` samples of every problem and write the parts; then rank 0 calls `finish`.

    Both models are loaded into this process, onto its GPU when there is one; for the initial policy none is.

    Args:
        model: folder of the policy (a model, or LoRA adapters of one).
        initial: path or hub name of the initial policy.
        rows: of the evaluation.
        dtype: the models' (`float32`, `bfloat16`).
        initial_folder: of the initial policy's finished evaluation.
        folder: of the policy's finished evaluation.
        label: of the policy.
        revision: of `initial` on the hub.
        worker: (rank, world); the parts are shared.

    Raises:
        UserError: a name is unknown, an evaluation is not finished, or `folder` holds a measurement of something else.
    """
    check(settings)
    evaluation, reference = _identity(folder), _identity(initial_folder)
    answers = min(settings.answers, evaluation["n"])
    size = max(1, _ANSWERS // answers)
    identity = {
        "problems": len(rows),
        "model": evaluation["model"],
        "initial": reference["model"],
        "evaluation": evaluation,
        "names": settings.names,
        "answers": answers,
        "dtype": dtype,
        "problems_per_part": size,
        "parts": math.ceil(len(rows) / size),
    }
    itself = identity["model"] == identity["initial"]

    @cache
    def samples() -> list[dict[str, Any]]:
        file = folder / "samples.parquet"
        if "token_ids" not in pq.read_schema(file).names:
            raise UserError(f"The evaluation in {folder} is of an older version and holds no tokens: evaluate again.")
        table = pq.read_table(file, columns=["problem", "sample", "token_ids"])
        chosen: list[dict[str, Any]] = table.filter(pc.less(table["sample"], answers)).to_pylist()
        return chosen

    from posttrain.rollouts.tokens import encode  # imports torch

    @cache
    def tokenizer() -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(initial, revision=revision)
        return loaded

    @cache
    def models() -> tuple[Any, Any]:
        return _load(model, dtype, None), _load(initial, dtype, revision)

    def make(index: int) -> pa.Table:
        places = range(index * size, min((index + 1) * size, len(rows)))
        mine = [one for one in samples() if one["problem"] in places]
        pairs = [(encode(tokenizer(), rows[one["problem"]]["prompt"]), one["token_ids"]) for one in mine]
        sums = {name: np.zeros(len(pairs)) for name in settings.names}
        if not itself:
            sums = sum_over_answers(*models(), pairs, settings.names)
        return _table([one["problem"] for one in mine], [len(answer) for _, answer in pairs], sums)

    try:
        measures.produce(folder, KIND, identity, make, label=f"divergence {label}", worker=worker)
    finally:
        models.cache_clear()
        _free()


def finish(folder: Path) -> None:
    """Join the parts that all workers wrote.

    Raises:
        UserError: parts are missing.
    """
    measures.join(folder, KIND, _entries)


def check(settings: Divergence) -> None:
    """Refuse names that cannot be measured.

    Raises:
        UserError: a name is unknown, or needs a parameter.
    """
    from posttrain.objectives.divergences import TABLE

    for name in settings.names:
        if name not in TABLE:
            why = "has a parameter that cannot be set there" if name == "alpha" else "is none that we know"
            raise UserError(
                f"The divergence '{name}' in evaluation.divergence.names {why}: choose from {', '.join(TABLE)}."
            )


def _identity(folder: Path) -> dict[str, Any]:
    path = folder / "evaluation.json"
    if not path.exists():
        raise UserError(
            f"{folder} holds no finished evaluation, whose answers divergences are measured on: evaluate first."
        )
    identity: dict[str, Any] = measures.read(path)["identity"]
    return identity


def _load(path: str, dtype: str, revision: str | None) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from posttrain.rollouts.weights import loaded_whole

    with loaded_whole():
        model: Any = AutoModelForCausalLM.from_pretrained(path, revision=revision, dtype=getattr(torch, dtype))
    return model.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu").eval()


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def sum_over_answers(
    model: Any, initial: Any, pairs: Sequence[tuple[list[int], list[int]]], names: Sequence[str]
) -> dict[str, Floats]:
    """Sum of every divergence over the tokens of every answer."""
    import torch

    from posttrain.objectives.vocabulary import model_divergences

    found: dict[str, list[float]] = {name: [] for name in names}
    rows = max(1, _TOKENS // max(len(prompt) + len(answer) for prompt, answer in pairs))
    for start in range(0, len(pairs), rows):
        batch = pairs[start : start + rows]
        width = max(len(prompt) + len(answer) for prompt, answer in batch)
        input_ids = torch.zeros(len(batch), width, dtype=torch.long)
        attention_mask, written = torch.zeros_like(input_ids), torch.zeros_like(input_ids, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(batch):
            whole = torch.tensor(prompt + answer)
            input_ids[row, : len(whole)] = whole
            attention_mask[row, : len(whole)] = 1
            written[row, len(prompt) : len(whole)] = True
        device = model.device
        values = model_divergences(model, initial, input_ids.to(device), attention_mask.to(device), names)
        for name in names:
            kept = values[name].cpu().double().masked_fill(~written[:, 1:], 0.0)
            found[name] += kept.sum(dim=1).tolist()
    return {name: np.array(sums) for name, sums in found.items()}


def _table(problems: Sequence[int], tokens: Sequence[int], sums: Mapping[str, Floats]) -> pa.Table:
    """One row per problem and measure."""
    places, where = np.unique(problems, return_inverse=True)

    def per_problem(values: Any) -> list[float]:
        totals: list[float] = np.bincount(where, weights=values).tolist()
        return totals

    columns = [(name, per_problem(values), per_problem(tokens)) for name, values in sums.items()]
    if "reverse_kl" in sums:
        columns.append(("kl_per_answer", per_problem(sums["reverse_kl"]), per_problem(np.ones(len(problems)))))
    records = [
        {"problem": problem, "measure": name, "top": top, "bottom": bottom}
        for name, tops, bottoms in columns
        for problem, top, bottom in zip(places.tolist(), tops, bottoms, strict=True)
    ]
    return pa.Table.from_pylist(records, schema=measures.SCHEMA)


def _entries(identity: Mapping[str, Any]) -> dict[str, Any]:
    from posttrain.objectives.divergences import TABLE

    entries = {
        name: measures.described(
            "per token" if name in _WITHOUT_UNIT else "nats per token",
            f"{TABLE[name].divergence} of next-token distributions, on answers of the policy, π_ref the initial one.",
        )
        for name in identity["names"]
    }
    if "reverse_kl" in entries:
        entries["kl_per_answer"] = measures.described(
            "nats per answer", "KL(π_θ‖π_ref) summed over the tokens of an answer of the policy, π_ref the initial one."
        )
    return entries
