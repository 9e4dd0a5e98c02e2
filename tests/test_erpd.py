"""ERPD: fixed rollouts, signals on disk, and both phases of training on tiny models.

Losses and transforms by themselves are in tests/test_extraction.py and tests/test_signals.py, exact policies in
tests/test_erpd_tabular.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from datasets.table import InMemoryTable
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import GRPOConfig
from trl import GRPOTrainer as TRLTrainer

from posttrain.errors import UserError
from posttrain.objectives.signals import auc
from posttrain.rollouts.engine import Score
from posttrain.rollouts.static import (
    Choice,
    Logps,
    Signals,
    StaticSet,
    Term,
    Validation,
    choose_signal,
    make_signal,
    require_valid,
    rollouts_from_store,
    score,
    score_model,
    validate,
    with_base_logps,
    with_signals,
)
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.seams.on_policy import Tokens
from posttrain.seams.static import EpochOrder
from posttrain.trainers.erpd import ERPDConfig, ERPDTrainer
from tests.oracle import PROMPTS, arguments, dataset, length_reward, make_store, value_and_gradient
from tests.processes import launch
from tests.test_pairs import Answer, rows_of, write_store
from tests.two_static import CASES, settings, train


@pytest.fixture(scope="module")
def tokenizer(tiny_model: str) -> PreTrainedTokenizerBase:
    """One token per character, so an answer of n characters that ended has n + 1 tokens."""
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_model)
    return loaded


@pytest.fixture(scope="module")
def moved_model(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another policy of the same kind: every weight a little off."""
    folder = tmp_path_factory.mktemp("moved")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def scored(
    tiny_model: str, moved_model: str, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> tuple[StaticSet, Logps, Logps]:
    """Answers that the tiny model drew, with their log-probs by it and by the moved one."""
    folder = tmp_path_factory.mktemp("static")
    answers = rollouts_from_store(make_store(tiny_model, folder / "store"), PROMPTS, tokenizer)
    base = score_model(tiny_model, answers, folder / "base", temperature=1.0, batch_size=8)
    other = score_model(moved_model, answers, folder / "moved", temperature=1.0, batch_size=8)
    return answers, base, other


@pytest.fixture(scope="module")
def rollouts(scored: tuple[StaticSet, Logps, Logps], tmp_path_factory: pytest.TempPathFactory) -> StaticSet:
    """Those answers with log π_0 and a signal."""
    answers, base, other = scored
    made = make_signal("teacher_base", [Term(other, base)], answers, tmp_path_factory.mktemp("signal"))
    return with_signals(with_base_logps(answers, base), made)


def rows(answers: StaticSet) -> Dataset:
    return Dataset(InMemoryTable(answers.table))


def replaced(answers: StaticSet, **columns: Sequence[Any]) -> Dataset:
    """The rows with other values in some columns."""
    table = answers.table
    for name, values in columns.items():
        place = table.column_names.index(name)
        table = table.set_column(place, name, pa.array(values, table[name].type))
    return Dataset(InMemoryTable(table))


def build(model: str, folder: Path, data: Dataset, **changes: Any) -> ERPDTrainer:
    own = {key: changes.pop(key) for key in ("peft_config",) if key in changes}
    return ERPDTrainer(model, args=ERPDConfig(**settings(folder, **changes)), train_dataset=data, **own)


def weights(trainer: Any) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1).clone() for parameter in trainer.model.parameters()])


@torch.no_grad()
def forwarded(trainer: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """log π_θ of a micro-batch's answer tokens."""
    logps: Tensor
    logps, _, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
        batch["completion_ids"].size(1),
    )
    return logps


def logs(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# ---------------------------------------------------------------- the answers

DRAWN: list[list[Answer]] = [
    [("1", 1.0), ("22", 0.0), ("333", 0.0), ("4", 1.0, "length"), ("5", None)],
    [("6", 1.0), ("7", 1.0)],
    [("8", 0.0), ("9", 0.0)],
    [("1", 0.5), ("2", 0.5)],
    [("1", 1.0), ("2", 0.0), ("3", 0.5)],
]


def test_answers_to_learn_from_by_hand(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Rewards 1, 0, 0, 1: mean ½, deviation √(4 · ¼ / 3) = 0.577; rewards 1, 0, ½: ½ and ½."""
    found = rollouts_from_store(write_store(tmp_path, rows_of(5), DRAWN, tokenizer), rows_of(5), tokenizer)
    assert str(found) == (
        "7 of 14 answers to 2 of 5 prompts, 3 of them right (left out: 1 without a verdict, 2 to prompts that are "
        "always right, 2 to prompts that are never right, 2 to prompts with a single answer or reward)"
    )
    high, one = 0.5 / (math.sqrt(1 / 3) + 1e-4), 0.5 / (0.5 + 1e-4)
    wanted = [high, -high, -high, high, one, -one, 0.0]
    assert found.table["advantages"].to_pylist() == pytest.approx(wanted, abs=1e-6)
    assert found.table["correct"].to_pylist() == [True, False, False, True, True, False, False]
    assert found.table["rewards"].to_pylist() == [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.5]
    texts = [tokenizer.decode(ids) for ids in found.table["completion_ids"].to_pylist()]
    assert texts == ["1<eos>", "22<eos>", "333<eos>", "4", "1<eos>", "2<eos>", "3<eos>"]
    prompts = [tokenizer.decode(ids) for ids in found.table["prompt_ids"].to_pylist()]
    assert prompts == ["^0?"] * 4 + ["^4?"] * 3


def test_held_out_answers_keep_what_is_uniform(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    store = write_store(tmp_path, rows_of(5), DRAWN, tokenizer)
    found = rollouts_from_store(store, rows_of(5), tokenizer, keep_uniform=True, scale_rewards=False)
    assert (found.counts["taken"], found.counts["with_answers"], found.counts["right"]) == (13, 5, 5)
    assert found.table["advantages"].to_pylist() == [0.5, -0.5, -0.5, 0.5, *[0.0] * 6, 0.5, -0.5, 0.0]
    short = rollouts_from_store(store, rows_of(1), tokenizer, max_length=6)
    assert short.counts["too_long"] == 1, "of ^0? and 333<eos>, seven tokens"


@pytest.mark.parametrize(
    ("drawn", "count", "message"),
    [
        ([[("1", 1.0), ("2", 1.0)]], 1, r"nothing to learn from among 2 answers \(all right: 2\)"),
        ([[("1", 1.0)]], 2, "1 of 2 prompts are not in the store"),
    ],
)
def test_stores_without_use_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, drawn: list[list[Answer]], count: int, message: str
) -> None:
    store = write_store(tmp_path, rows_of(len(drawn)), drawn, tokenizer)
    with pytest.raises(UserError, match=message):
        rollouts_from_store(store, rows_of(count), tokenizer)


def test_another_tokenizer_and_images_are_refused(
    tmp_path: Path, tiny_model: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    store = write_store(tmp_path, rows_of(5), DRAWN, tokenizer)
    other = AutoTokenizer.from_pretrained(tiny_model)
    other.add_tokens(["more"])
    with pytest.raises(UserError, match="made with another tokenizer"):
        rollouts_from_store(store, rows_of(5), other)
    with pytest.raises(UserError, match="some rows hold images"):
        rollouts_from_store(store, [{**rows_of(1)[0], "images": ["a picture"]}], tokenizer)


# ---------------------------------------------------------------- log-probs and signals on disk


class Dying:
    """An engine that is killed at its n-th batch."""

    def __init__(self, engine: TransformersEngine, lives: int) -> None:
        self.engine, self.lives, self.asked = engine, lives, 0
        self.fingerprint, self.name, self.files = engine.fingerprint, engine.name, engine.files

    def score(self, sequences: Any, **options: Any) -> list[Score]:
        self.asked += 1
        if self.asked > self.lives:
            raise KeyboardInterrupt
        return self.engine.score(sequences, **options)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_those_of_training(
    tiny_model: str, tmp_path: Path, scored: tuple[StaticSet, Logps, Logps], temperature: float
) -> None:
    """What the engine stores is what the trainer's forward computes, at the temperature; at another one it refuses."""
    answers, base, other = scored
    logps = base
    if temperature != 1.0:
        logps = score_model(tiny_model, answers, tmp_path / "logps", temperature=temperature)
        with pytest.raises(UserError, match="log-probs of a signal are at temperatures"):
            make_signal("teacher_base", [Term(other, logps)], answers, tmp_path / "signal")
    rollouts = with_base_logps(answers, logps)
    trainer = build(tiny_model, tmp_path, rows(rollouts), temperature=temperature)
    batch = trainer._collate([trainer.train_dataset[place] for place in range(8)])
    logps = forwarded(trainer, batch)
    stored, mask = batch["old_per_token_logps"], batch["completion_mask"].bool()
    assert stored[mask].abs().min() > 0.1
    torch.testing.assert_close(logps[mask], stored[mask], rtol=0, atol=2e-5)
    with pytest.raises(UserError, match=f"data is at temperature {temperature:g} and training at 0.8"):
        build(tiny_model, tmp_path, rows(rollouts), temperature=0.8)


def test_a_killed_scoring_goes_on(tiny_model: str, tmp_path: Path, scored: tuple[StaticSet, Logps, Logps]) -> None:
    """Two parts, then death: the rest is scored and no more, and the file is that of a run without death."""
    answers, base, _ = scored
    engine = TransformersEngine.load(tiny_model)
    first = Dying(engine, 2)
    with pytest.raises(KeyboardInterrupt):
        score(first, answers, tmp_path / "logps", temperature=1.0, batch_size=8)
    with pytest.raises(UserError, match="are unfinished"):
        Logps.open(tmp_path / "logps")
    second = Dying(engine, 100)
    found = score(second, answers, tmp_path / "logps", temperature=1.0, batch_size=8)
    assert second.asked == math.ceil(len(answers) / 8) - 2 > 0
    assert found.of(answers).equals(base.of(answers))
    again = Dying(engine, 0)
    assert score(again, answers, tmp_path / "logps", temperature=1.0, batch_size=8).manifest == found.manifest
    with pytest.raises(UserError, match=r"'temperature' is 1.0 there and 0.5 here"):
        score(again, answers, tmp_path / "logps", temperature=0.5, batch_size=8)


def test_two_workers_write_what_one_writes(
    tiny_model: str, tmp_path: Path, scored: tuple[StaticSet, Logps, Logps]
) -> None:
    answers, base, _ = scored
    engine = TransformersEngine.load(tiny_model)
    with pytest.raises(FileNotFoundError):  # the second has not written its parts
        score(engine, answers, tmp_path, temperature=1.0, batch_size=8, worker=(0, 2))
    with pytest.raises(UserError, match="unfinished"):  # and leaves the end to the first
        score(engine, answers, tmp_path, temperature=1.0, batch_size=8, worker=(1, 2))
    found = score(Dying(engine, 0), answers, tmp_path, temperature=1.0, batch_size=8)
    assert found.of(answers).equals(base.of(answers))


def test_a_finished_scoring_loads_no_model(
    tiny_model: str, scored: tuple[StaticSet, Logps, Logps], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, base, _ = scored
    monkeypatch.setattr(TransformersEngine, "load", lambda *_, **__: pytest.fail("loaded"))
    assert score_model(tiny_model, answers, base.path, temperature=1.0, batch_size=8) == base


def test_log_probs_belong_to_their_answers(scored: tuple[StaticSet, Logps, Logps]) -> None:
    answers, base, _ = scored
    fewer = StaticSet(answers.table.slice(1), answers.counts)
    with pytest.raises(UserError, match="made of other answers than these"):
        with_base_logps(fewer, base)


def test_signals_survive_the_store(tmp_path: Path, scored: tuple[StaticSet, Logps, Logps]) -> None:
    """As long as the answers, in half precision: 11 bits of δ. Opened again they are the same."""
    answers, base, other = scored
    made = make_signal("teacher_base", [Term(other, base)], answers, tmp_path)
    exact = np.concatenate(other.of(answers).to_pylist()) - np.concatenate(base.of(answers).to_pylist())
    read = Signals.open(tmp_path).of(answers)
    assert read.type == pa.list_(pa.float16())
    assert [len(x) for x in read.to_pylist()] == [len(x) for x in answers.table["completion_ids"].to_pylist()]
    assert np.abs(exact).mean() > 0.05
    np.testing.assert_allclose(np.concatenate(read.to_pylist()).astype(float), exact, rtol=2**-11, atol=1e-7)
    assert made.manifest["rms"] == pytest.approx(math.sqrt((exact**2).mean()))
    identity = json.loads((tmp_path / "manifest.json").read_text())["identity"]
    assert identity["terms"]["0"] == {"plus": other.model, "minus": base.model, "weight": 1.0}
    assert identity["rollouts"] == answers.fingerprint
    before = (tmp_path / "signals.parquet").stat().st_mtime_ns
    make_signal("teacher_base", [Term(other, base)], answers, tmp_path)
    assert (tmp_path / "signals.parquet").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="was made with other settings"):
        make_signal("teacher_base", [Term(base, other)], answers, tmp_path)


def test_a_mix_on_disk(tmp_path: Path, scored: tuple[StaticSet, Logps, Logps]) -> None:
    """Two terms that are each other's negative, with weights 2 and ½: 1.5 times the first at rms 1."""
    answers, base, other = scored
    made = make_signal("mix", [Term(other, base, 2.0), Term(base, other, 0.5)], answers, tmp_path)
    assert made.manifest["rms"] == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("teacher", "unknown signal 'teacher'; known: teacher_base"),
        ("two", "made of exactly one, of weight 1 differences, and 2 were given"),
        ("self", "subtracts a policy from itself"),
        ("weight", "A weight of the signal 'mix' is 0.0"),
        ("none", "made of one or more differences, and 0 were given"),
    ],
)
def test_signals_that_are_none_are_refused(
    tmp_path: Path, scored: tuple[StaticSet, Logps, Logps], name: str, message: str
) -> None:
    answers, base, other = scored
    term = Term(other, base)
    signal, terms = {
        "teacher": ("teacher", [term]),
        "two": ("teacher_base", [term, term]),
        "self": ("teacher_base", [Term(base, base)]),
        "weight": ("mix", [term, Term(other, base, 0.0)]),
        "none": ("mix", []),
    }[name]
    with pytest.raises(UserError, match=message):
        make_signal(signal, terms, answers, tmp_path)


# ---------------------------------------------------------------- whether a signal is one


def as_signal(answers: StaticSet, values: Sequence[Sequence[float]], folder: Path) -> Signals:
    """A finished signal of these values."""
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"signals": pa.array(values, pa.list_(pa.float16()))}), folder / "signals.parquet")
    identity = {"rollouts": answers.fingerprint, "signal": "teacher_base", "temperature": 1.0}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "identity": identity}))
    return Signals.open(folder)


def test_validation_is_the_auc_of_means(tmp_path: Path, scored: tuple[StaticSet, Logps, Logps]) -> None:
    """Σδ / |y| and not Σδ; the signal turned round has the rest of 1, and is refused with what else there is."""
    answers, base, other = scored
    made = make_signal("teacher_base", [Term(other, base)], answers, tmp_path / "one")
    found = validate(made, answers, resamples=200)
    means = torch.tensor([np.asarray(x, dtype=float).mean() for x in made.of(answers).to_pylist()])
    correct = torch.tensor(answers.table["correct"].to_pylist())
    assert found.auc == pytest.approx(auc(means, correct), abs=1e-12)
    assert found.low < found.auc < found.high
    assert (found.right + found.wrong, found.prompts) == (len(answers), answers.counts["with_answers"])
    turned = validate(make_signal("teacher_base", [Term(base, other)], answers, tmp_path / "two"), answers)
    assert turned.auc == pytest.approx(1 - found.auc, abs=0.02)  # ties of half precision apart
    good, bad = (found, turned) if found.auc > turned.auc else (turned, found)
    require_valid("teacher_base", good)
    with pytest.raises(UserError, match=r"below wrong ones .*another signal \(teacher_unlearned, base_unlearned"):
        require_valid("teacher_base", bad)


def test_a_perfect_signal(tmp_path: Path, scored: tuple[StaticSet, Logps, Logps]) -> None:
    """Long answers have large sums; the mean counts."""
    answers = scored[0]
    lengths = [len(ids) for ids in answers.table["completion_ids"].to_pylist()]
    right = answers.table["correct"].to_pylist()
    values = [[2.0 if r else 1.0] * n for r, n in zip(right, lengths, strict=True)]
    found = validate(as_signal(answers, values, tmp_path / "s"), answers, resamples=50)
    assert (found.auc, found.low, found.high, found.within) == (1.0, 1.0, 1.0, 1.0)
    assert str(found).startswith("AUC 1.000 [1.000, 1.000], within prompts 1.000, of ")
    alike = StaticSet(answers.table.filter(pa.array(right)), answers.counts)
    with pytest.raises(UserError, match="are all right"):
        validate(as_signal(alike, [v for v, r in zip(values, right, strict=True) if r], tmp_path / "t"), alike)


UP = Validation(0.8, 0.7, 0.9, 0.8, 10, 10, 5)
DOWN = Validation(0.2, 0.1, 0.3, 0.2, 10, 10, 5)
OPEN = Validation(0.52, 0.4, 0.6, 0.5, 10, 10, 5)
BASE, BETTER, WORSE = [0.2, 0.3, 0.2, 0.3], [0.5, 0.7, 0.5, 0.5], [0.0, 0.0, 0.0, 0.1]
NOISY = [0.9, 0.0, 0.4, 0.1]
"""0.1 better on average, with a standard error of 0.21."""


@pytest.mark.parametrize(
    ("teacher", "unlearned", "ranks", "wanted"),
    [
        (BETTER, False, None, ("teacher_base", "teacher", "base")),
        (BETTER, True, DOWN, ("teacher_base", "teacher", "base")),
        (NOISY, True, None, ("teacher_unlearned", "teacher", "unlearned")),
        (WORSE, True, UP, ("teacher_unlearned", "teacher", "unlearned")),
        (None, True, None, ("base_unlearned", "base", "unlearned")),
        (WORSE, False, UP, ("teacher_base", "teacher", "base")),
        (WORSE, False, DOWN, ("base_unlearned", "base", "teacher")),
    ],
)
def test_the_signal_is_chosen(
    teacher: list[float] | None, unlearned: bool, ranks: Validation | None, wanted: tuple[str, str, str]
) -> None:
    found = choose_signal(BASE, teacher, unlearned=unlearned, teacher_auc=ranks)
    assert found == Choice(*wanted, reason=found.reason)
    assert found.reason


@pytest.mark.parametrize(
    ("teacher", "ranks", "message"),
    [
        (None, None, "neither a teacher nor an unlearned policy"),
        (WORSE, None, r"teacher minus base is -0.225 ± .*extract an unlearned policy too \(unlearn: true\)"),
        (NOISY, OPEN, "ranks answers no better than chance"),
    ],
)
def test_where_no_signal_follows_it_says_what_to_do(
    teacher: list[float] | None, ranks: Validation | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        choose_signal(BASE, teacher, unlearned=False, teacher_auc=ranks)


# ---------------------------------------------------------------- the order of the answers


def test_every_epoch_has_an_order_of_its_own() -> None:
    order = EpochOrder(11, 4, seed=3)
    assert (len(order), order.steps) == (8, 2)
    epochs = []
    for epoch in range(5):
        order.set_epoch(epoch)
        epochs.append(list(order))
        assert len(set(epochs[-1])) == 8
        assert [*order.of_step(2 * epoch).tolist(), *order.of_step(2 * epoch + 1).tolist()] == epochs[-1]
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert set().union(*epochs) == set(range(11)), "what one epoch leaves out another takes"
    assert list(EpochOrder(11, 4, seed=None)) == list(range(8))
    assert list(EpochOrder(11, 4, seed=4)) != list(EpochOrder(11, 4, seed=3))
    with pytest.raises(UserError, match="3 answers to train on and an optimiser step takes 4"):
        EpochOrder(3, 4, seed=0)


# ---------------------------------------------------------------- extraction


@pytest.fixture(scope="module")
def sapo(tiny_model: str, rollouts: StaticSet, tmp_path_factory: pytest.TempPathFactory) -> ERPDTrainer:
    return build(tiny_model, tmp_path_factory.mktemp("sapo"), rows(rollouts), loss_type="grpo")


def micro_batch(trainer: ERPDTrainer, places: Sequence[int]) -> dict[str, Any]:
    """A micro-batch of these answers, as the loss gets it, with all its tokens as the step's."""
    trainer.current_gradient_accumulation_steps = 2
    batch = trainer._prepare_inputs(trainer._collate([trainer.train_dataset[place] for place in places]))
    batch["num_items_in_batch"] = 2 * batch["completion_mask"].sum()
    return batch


def test_sapo_is_trls(sapo: ERPDTrainer, tiny_model: str, tmp_path: Path) -> None:
    """On log-probs that differ from π_0's by 0.3 nats, value and gradient are those of TRL's loss of that name."""
    theirs = TRLTrainer(
        model=tiny_model,
        reward_funcs=length_reward,
        args=GRPOConfig(**arguments(tmp_path, loss_type="sapo")),
        train_dataset=dataset(),
    )
    inputs = micro_batch(sapo, range(8))
    noise = torch.randn(inputs["old_per_token_logps"].shape, generator=torch.Generator().manual_seed(3))
    inputs["old_per_token_logps"] = inputs["old_per_token_logps"] + 0.3 * noise
    sapo.state.global_step = 1  # past the check of the first step
    theirs.current_gradient_accumulation_steps = 2
    found = [value_and_gradient(trainer, dict(inputs)) for trainer in (sapo, theirs)]
    sapo.state.global_step = 0
    assert found[1][1].abs().max() > 1e-3
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_the_ratio_stays_anchored_to_the_policy_that_drew(tiny_model: str, tmp_path: Path, rollouts: StaticSet) -> None:
    """Over eight epochs every answer comes with the log π_0 that was stored for it, though the policy has moved."""
    trainer = build(tiny_model, tmp_path, rows(rollouts), learning_rate=1e-2, max_steps=-1)
    stored = {
        tuple([*prompt, -1, *answer]): logps
        for prompt, answer, logps in zip(
            *(rollouts.table[name].to_pylist() for name in ("prompt_ids", "completion_ids", "old_logps")), strict=True
        )
    }
    seen: list[tuple[int, float]] = []
    original = trainer.objective

    def watched(tokens: Tokens) -> Any:
        drift = ((tokens.logps.detach() - tokens.old_logps).abs() * tokens.mask).sum() / tokens.mask.sum()
        seen.append((len(tokens.logps), drift.item()))
        return original(tokens)

    def compared(model: Any, inputs: dict[str, Any]) -> Tensor:
        prompts, completions = (inputs[name] for name in ("prompt_ids", "completion_ids"))
        for row in range(len(completions)):
            answer = completions[row][inputs["completion_mask"][row].bool()].tolist()
            key = (*prompts[row][inputs["prompt_mask"][row].bool()].tolist(), -1, *answer)
            found = inputs["old_per_token_logps"][row, : len(answer)]
            torch.testing.assert_close(found, torch.tensor(stored[key]), rtol=0, atol=0)
        loss: Tensor = computed(model, inputs)
        return loss

    computed = trainer._compute_loss
    trainer.objective, trainer._compute_loss = watched, compared  # type: ignore[method-assign]
    trainer.train()
    assert trainer.state.epoch == 8
    assert len(seen) == 2 * trainer.state.global_step == 2 * 8 * (len(rollouts) // 8)
    assert seen[0][1] < 1e-5
    assert seen[-1][1] > 0.1


def test_one_forward_per_micro_batch_and_one_model(tiny_model: str, tmp_path: Path, rollouts: StaticSet) -> None:
    for phase in ("extract", "distil"):
        trainer = build(tiny_model, tmp_path / phase, rows(rollouts), phase=phase)
        forwards: list[int] = []
        trainer.model.model.register_forward_hook(lambda *_, calls=forwards: calls.append(1))
        trainer.model.generate = lambda *_, **__: pytest.fail("sampled")
        trainer.train()
        assert len(forwards) == 2 * 3, "two micro-batches in each of three steps"
        assert trainer.ref_model is None
        assert trainer.teacher is None


def test_squared_error_ends_where_the_implicit_reward_is_the_advantage(
    tiny_model: str, tmp_path: Path, rollouts: StaticSet
) -> None:
    """Eight answers of different tokens, β = 1: from E Â² the loss goes to nearly 0, and S to Â."""
    data = rows(rollouts)
    kept: dict[tuple[int, ...], int] = {}
    for place, ids in enumerate(data["completion_ids"]):
        kept.setdefault(tuple(ids[:1]), place)
    places = list(kept.values())[:8]
    trainer = build(
        tiny_model,
        tmp_path,
        data.select(places),
        extract_loss="mse",
        implicit_beta=1.0,
        learning_rate=3e-3,
        max_steps=150,
        per_device_train_batch_size=len(places),
        gradient_accumulation_steps=1,
        shuffle_dataset=False,
    )
    trainer.train()
    losses = logs(trainer, "loss")
    advantages = torch.tensor(data.select(places)["advantages"])
    assert losses[0] == pytest.approx(advantages.square().mean().item(), rel=1e-4)
    assert losses[-1] < 0.02 * losses[0]
    batch = micro_batch(trainer, range(len(places)))
    total = ((forwarded(trainer, batch) - batch["old_per_token_logps"]) * batch["completion_mask"]).sum(1)
    torch.testing.assert_close(total, advantages, rtol=0, atol=0.3)


@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_a_loss_of_answers_is_averaged_over_the_answers_of_a_step(
    tiny_model: str, tmp_path: Path, rollouts: StaticSet, loss: str
) -> None:
    """At π_0: log 2 for ce, Â² for mse, whatever the lengths and the micro-batches."""
    trainer = build(tiny_model, tmp_path, rows(rollouts), extract_loss=loss, max_steps=1)
    trainer.train()
    places = trainer._order.of_step(0).tolist()
    squares = torch.tensor(rows(rollouts).select(places)["advantages"]).square().mean().item()
    assert logs(trainer, "loss") == pytest.approx([math.log(2) if loss == "ce" else squares], rel=1e-4)


def test_unlearning_by_sft_takes_the_wrong_answers(tiny_model: str, tmp_path: Path, rollouts: StaticSet) -> None:
    for unlearn in (False, True):
        trainer = build(tiny_model, tmp_path, rows(rollouts), extract_loss="sft", unlearn=unlearn, max_steps=1)
        assert set(trainer.train_dataset["correct"]) == {not unlearn}
        trainer.train()
        chosen = trainer.train_dataset.select(trainer._order.of_step(0).tolist())
        mean = np.concatenate(chosen["old_logps"]).mean()
        assert logs(trainer, "loss") == pytest.approx([-mean], rel=1e-4)


def test_unlearning_goes_the_other_way(tiny_model: str, tmp_path: Path, rollouts: StaticSet) -> None:
    apart = {}
    for unlearn in (False, True):
        trainer = build(
            tiny_model, tmp_path, rows(rollouts), unlearn=unlearn, learning_rate=3e-3, max_steps=8, extract_loss="is"
        )
        trainer.train()
        apart[unlearn] = logs(trainer, "log_ratio/right")[-1] - logs(trainer, "log_ratio/wrong")[-1]
    assert apart[False] > 0.05
    assert apart[True] < -0.05


# ---------------------------------------------------------------- distillation


@pytest.mark.parametrize("region", ["clip", "kl"])
def test_a_zero_signal_leaves_the_policy_bit_for_bit(
    tiny_model: str, tmp_path: Path, rollouts: StaticSet, region: str
) -> None:
    """With the penalty on, Adam, and log π_0 from another forward: nothing moves in ten steps."""
    lengths = [len(ids) for ids in rollouts.table["completion_ids"].to_pylist()]
    silent = replaced(rollouts, signals=[[0.0] * length for length in lengths])
    trainer = build(
        tiny_model, tmp_path, silent, phase="distil", trust_region=region, kl_coef=1.0, learning_rate=0.1, max_steps=10
    )
    before = weights(trainer)
    trainer.train()
    assert trainer.state.global_step == 10
    assert torch.equal(weights(trainer), before)


def test_a_signal_moves_the_policy_its_way(tiny_model: str, tmp_path: Path, rollouts: StaticSet) -> None:
    """Two steps of which the first is along δ̂: tokens with a positive signal gain, those with a negative one lose."""
    trainer = build(tiny_model, tmp_path, rows(rollouts), phase="distil", learning_rate=3e-3, max_steps=6)
    moved: list[tuple[float, float]] = []
    original = trainer.objective

    def watched(tokens: Tokens) -> Any:
        change, mask = tokens.logps.detach() - tokens.old_logps, tokens.mask.bool()
        moved.append(
            tuple(change[mask & side].mean().item() for side in (tokens.advantages > 0, tokens.advantages < 0))
        )
        return original(tokens)

    trainer.objective = watched  # type: ignore[method-assign]
    trainer.train()
    assert moved[-1][0] > 0.005
    assert moved[-1][1] < -0.005


def test_signals_are_divided_by_the_rms_of_a_whole_step(tiny_model: str, tmp_path: Path, rollouts: StaticSet) -> None:
    """Both micro-batches of a step have one scale, that of its eight answers; `data` has that of all, `none` 1."""
    signals = rollouts.table["signals"].to_pylist()

    def root(places: Sequence[int]) -> float:
        return math.sqrt(np.mean(np.concatenate([np.asarray(signals[place], dtype=float) for place in places]) ** 2))

    for scale in ("batch", "data", "none"):
        trainer = build(tiny_model, tmp_path, rows(rollouts), phase="distil", signal_scale=scale, signal_clip=None)
        seen = []
        for step in (0, 1):
            trainer.state.global_step = step
            places = trainer._order.of_step(step).tolist()
            wanted = {"batch": root(places), "data": root(range(len(signals))), "none": 1.0}[scale]
            seen.append(wanted)
            for half in (places[:4], places[4:]):
                batch = micro_batch(trainer, half)
                exact = torch.zeros_like(batch["advantages"])
                for row, place in enumerate(half):
                    exact[row, : len(signals[place])] = torch.tensor(np.asarray(signals[place], dtype=np.float32))
                torch.testing.assert_close(batch["advantages"], exact / wanted, rtol=1e-5, atol=1e-6)
        assert (seen[0] != seen[1]) == (scale == "batch")


def test_transforms_of_a_run(tiny_model: str, tmp_path: Path, rollouts: StaticSet) -> None:
    """Ends left out, answers centred, contradictions gated, cut at ½ of the step's rms."""
    trainer = build(
        tiny_model,
        tmp_path,
        rows(rollouts),
        phase="distil",
        mask_end=True,
        centre=True,
        verifier_gate=True,
        signal_clip=0.5,
    )
    batch = micro_batch(trainer, range(8))
    found = batch["advantages"]
    ends = batch["completion_ids"] == trainer.eos_token_ids[0]
    assert ends.any() and (found[ends] == 0).all()
    right = batch["correct"].expand_as(found)
    assert (found[right] >= 0).all() and (found[right] > 0).any()
    assert (found[~right] <= 0).all() and (found[~right] < 0).any()
    assert found.abs().max() == 0.5


def test_metrics_by_hand(tiny_model: str, tmp_path: Path, rollouts: StaticSet) -> None:
    """Ratios 2 and ½ in a right answer, 2 and 1 in a wrong one, signals +1, 0 | −1, +2: one of three is clipped."""
    trainer = build(tiny_model, tmp_path, rows(rollouts), phase="distil", kl_coef=0.0)
    two = math.log(2.0)
    moved = torch.tensor([[two, -two], [two, 0.0]])
    mask = torch.tensor([[1, 1], [1, 1]])
    tokens = Tokens(
        logps=moved - 1.0,
        old_logps=torch.full((2, 2), -1.0),
        advantages=torch.tensor([[1.0, 0.0], [-1.0, 2.0]]),
        mask=mask,
        entropy=torch.ones(2, 2),
        extra={"correct": torch.tensor([[True], [False]]), "rewards": torch.tensor([[1.0], [0.0]])},
    )
    per_token, metrics = trainer.objective(tokens)
    torch.testing.assert_close(per_token, torch.tensor([[-1.2, 0.0], [2.0, -2.0]]))
    halves = ({name: value[row : row + 1] for name, value in metrics.items()} for row in (0, 1))
    for row, half in enumerate(halves):  # two micro-batches
        trainer._measure([(name, value, mask[row : row + 1]) for name, value in half.items()], "train")
    trainer.callback_handler.on_step_end(trainer.args, trainer.state, trainer.control)
    found = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert found == pytest.approx(
        {
            "kl/forward": ((1 - two) + (-0.5 + two) + (1 - two)) / 4,
            "kl/forward_k1": -two / 4,
            "kl/reverse": ((2 * two - 1) + (-0.5 * two + 0.5) + (2 * two - 1)) / 4,
            "log_ratio/right": 0.0,
            "log_ratio/wrong": two / 2,
            "signal/mean": 0.5,
            "signal/size": 1.0,
            "signal/zero": 0.25,
            "clip_ratio/signal": 1 / 3,
        },
        abs=1e-6,
    )


# ---------------------------------------------------------------- stopping, resuming, processes, adapters


def test_a_target_stops_the_run_and_it_stays_stopped(tiny_model: str, tmp_path: Path, rollouts: StaticSet) -> None:
    changes = {"learning_rate": 1e-2, "max_steps": 30, "kl_target": 0.02, "loss_type": "grpo"}
    trainer = build(tiny_model, tmp_path, rows(rollouts), **changes)
    trainer.train()
    step = trainer.state.global_step
    divergences = logs(trainer, "kl/forward")
    assert 1 < step < 30
    assert len(divergences) == step
    assert max(divergences[:-1]) < 0.02 <= divergences[-1]
    assert logs(trainer, "stop/kl/forward") == pytest.approx([divergences[-1]], rel=1e-6)
    name, value = trainer.stopped() or ("", 0.0)
    assert (name, value) == ("kl/forward", pytest.approx(divergences[-1]))
    checkpoint = tmp_path / f"checkpoint-{step}"
    assert (checkpoint / "model.safetensors").is_file()
    again = build(tiny_model, tmp_path, rows(rollouts), **changes)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert again.state.global_step == step
    assert again.stopped() == trainer.stopped()
    assert torch.equal(weights(again), weights(trainer))


def test_the_clip_fraction_stops_the_run(tiny_model: str, tmp_path: Path, rollouts: StaticSet) -> None:
    """Half of the tokens with a signal are clipped soon; without a target the run goes on."""
    changes = {"phase": "distil", "learning_rate": 3e-2, "max_steps": 12, "epsilon": 0.05}
    stopped = build(tiny_model, tmp_path / "1", rows(rollouts), **changes, clip_fraction_stop=0.3)
    stopped.train()
    fractions = logs(stopped, "clip_ratio/signal")
    assert fractions[-1] >= 0.3 > max(fractions[:-1])
    assert (stopped.stopped() or ("", 0))[0] == "clip_ratio/signal"
    free = build(tiny_model, tmp_path / "2", rows(rollouts), **changes, clip_fraction_stop=None)
    free.train()
    assert free.state.global_step == 12
    assert free.stopped() is None
    assert logs(free, "clip_ratio/signal")[: len(fractions)] == pytest.approx(fractions)


@pytest.mark.parametrize("phase", ["extract", "distil"])
def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(
    tiny_model: str, tmp_path: Path, rollouts: StaticSet, phase: str
) -> None:
    """Killed in the middle of an epoch, and at the end of one: weights and logs are the same, bit for bit."""
    steps = len(rollouts) // 8
    changes = {"phase": phase, "learning_rate": 1e-2, "max_steps": steps + 2, "save_strategy": "steps"}
    whole = build(tiny_model, tmp_path, rows(rollouts), **changes, save_steps=1)
    whole.train()
    for kill in (steps + 1, steps):
        again = build(tiny_model, tmp_path / str(kill), rows(rollouts), **changes, save_steps=100)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{kill}"))
        assert again.state.global_step == steps + 2
        assert torch.equal(weights(again), weights(whole))
        assert logs(again, "loss") == logs(whole, "loss")


@pytest.mark.slow
def test_two_processes_train_as_one(tiny_model: str, tmp_path: Path, rollouts: StaticSet) -> None:
    pq.write_table(rollouts.table, tmp_path / "rollouts.parquet")
    output = tmp_path / "two.pt"
    launch(2, ["-m", "tests.two_static", tiny_model, str(tmp_path / "rollouts.parquet"), str(output)])
    table = pq.read_table(tmp_path / "rollouts.parquet")
    initial = torch.cat([p.reshape(-1) for p in AutoModelForCausalLM.from_pretrained(tiny_model).parameters()])
    for case, two in torch.load(output, weights_only=True).items():
        one = train(tiny_model, table, tmp_path / "one", case)
        assert (one["world"], two["world"]) == (1, 2)
        assert (one["weights"] - initial).abs().max() > 1e-3
        torch.testing.assert_close(two["weights"], one["weights"], rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(one["log"], two["log"], strict=True):
            assert set(ours) == set(theirs)
            assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-5)
    assert set(CASES) == {"sapo", "mse", "distil"}


def test_adapters_alone_are_trained(tiny_model: str, tmp_path: Path, rollouts: StaticSet) -> None:
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    trainer = build(tiny_model, tmp_path, rows(rollouts), phase="distil", peft_config=lora, learning_rate=1e-2)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = [name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])]
    assert moved
    assert all("lora_" in name for name in moved)
    assert logs(trainer, "kl/forward")[0] < 1e-6 < logs(trainer, "kl/forward")[-1]


# ---------------------------------------------------------------- refusals


def test_log_probs_of_another_model_are_refused(moved_model: str, tmp_path: Path, rollouts: StaticSet) -> None:
    trainer = build(moved_model, tmp_path, rows(rollouts))
    with pytest.raises(UserError, match=r"differs from log π_0 in the data by 0\.\d+ nats per token, more than"):
        trainer.train()


def test_data_without_a_column_are_refused(tiny_model: str, tmp_path: Path, rollouts: StaticSet) -> None:
    data = rows(rollouts)
    with pytest.raises(UserError, match="no column 'signals'"):
        build(tiny_model, tmp_path, data.remove_columns("signals"), phase="distil")
    with pytest.raises(UserError, match="no column 'old_logps'"):
        build(tiny_model, tmp_path, data.remove_columns("old_logps"))
    with pytest.raises(UserError, match="data set of known length"):
        build(tiny_model, tmp_path, [{}])
    with pytest.raises(UserError, match="answers to train on and an optimiser step takes 4000"):
        build(tiny_model, tmp_path, data, per_device_train_batch_size=2000)
    short = replaced(rollouts, old_logps=[values[1:] for values in rollouts.table["old_logps"].to_pylist()])
    with pytest.raises(UserError, match="'old_logps' is not as long as the answer"):
        build(tiny_model, tmp_path, short)


def test_what_the_losses_cannot_learn_from_is_refused(tiny_model: str, tmp_path: Path, rollouts: StaticSet) -> None:
    none = replaced(rollouts, correct=[False] * len(rollouts))
    with pytest.raises(UserError, match="no right answer to fine-tune on"):
        build(tiny_model, tmp_path, none, extract_loss="sft")
    large = replaced(rollouts, rewards=[2.0] * len(rollouts))
    with pytest.raises(UserError, match="rewards from 0 to 1, and one is 2"):
        build(tiny_model, tmp_path, large, extract_loss="ce")


@pytest.mark.parametrize("name", ["reward_funcs", "eval_dataset", "rollouts"])
def test_what_belongs_to_sampling_is_refused(tiny_model: str, tmp_path: Path, rollouts: StaticSet, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} has no effect on fixed rollouts"):
        ERPDTrainer(
            tiny_model, args=ERPDConfig(**settings(tmp_path)), train_dataset=rows(rollouts), **{name: length_reward}
        )


def test_the_defaults() -> None:
    args = ERPDConfig("x", use_cpu=True, bf16=False)
    assert (args.phase, args.extract_loss, args.sapo_temperature_pos, args.sapo_temperature_neg) == (
        "extract",
        "sapo",
        1.0,
        1.05,
    )
    assert (args.epsilon, args.kl_weight, args.clip_fraction_stop, args.signal_clip) == (0.2, 1e-3, 0.9, 3.0)
    assert (args.beta, args.weight_decay, args.num_generations) == (0.0, 0.0, 1)
    distil = ERPDConfig("x", use_cpu=True, bf16=False, phase="distil", trust_region="kl")
    assert distil.kl_weight == 1.0


REFUSED: list[tuple[Mapping[str, Any], str]] = [
    ({"phase": "both"}, "unknown phase 'both'; known: extract, distil"),
    ({"extract_loss": "dpo"}, "unknown extract_loss 'dpo'; known: sapo"),
    ({"phase": "distil", "trust_region": "ball"}, "unknown trust_region 'ball'; known: clip, kl"),
    ({"implicit_beta": 0.0, "extract_loss": "ce"}, "must be positive and finite, got 0.0"),
    ({"implicit_beta": 0.2}, "implicit_beta = 0.2 has no effect with extract_loss sapo"),
    ({"extract_loss": "is", "sapo_temperature_pos": 2.0}, "has no effect with extract_loss is"),
    ({"epsilon": 0.1}, "epsilon = 0.1 has no effect with extract_loss sapo"),
    (
        {"extract_loss": "ce", "loss_type": "grpo"},
        "loss_type = 'grpo' has no effect with extract_loss ce, which is aver",
    ),
    ({"dead_zone": 0.1}, "dead_zone = 0.1 has no effect in phase extract"),
    ({"clip_fraction_stop": 0.5}, "clip_fraction_stop = 0.5 has no effect in phase extract"),
    ({"phase": "distil", "unlearn": True}, "unlearn = True has no effect in phase distil"),
    ({"phase": "distil", "trust_region": "kl", "epsilon": 0.1}, "epsilon = 0.1 has no effect with trust_region kl"),
    ({"phase": "distil", "trust_region": "kl", "kl_coef": 0.0}, r"trust_region kl without a KL"),
    ({"phase": "distil", "dead_zone": 4.0}, "dead_zone = 4.0 is larger than signal_clip = 3.0"),
    ({"phase": "distil", "clip_fraction_stop": 0.0}, "clip_fraction_stop is a fraction above 0"),
    ({"kl_target": 0.0}, "kl_target must be positive, got 0.0"),
    ({"log_ratio_clamp": 50.0}, "log_ratio_clamp must be positive and at most 40"),
    ({"beta": 0.1}, "beta = 0.1 would have no effect, because log π_0 is in the data"),
    ({"num_generations": 8}, "num_generations = 8 would have no effect, because a batch counts answers"),
    ({"num_iterations": 2}, "num_iterations = 2 would have no effect, because answers are not sampled here"),
    ({"top_p": 0.9}, "top_p = 0.9 would have no effect"),
    ({"use_vllm": True}, "use_vllm = True would have no effect"),
    ({"scale_rewards": "none"}, "scale_rewards = 'none' would have no effect"),
    ({"ignore_data_skip": True}, "ignore_data_skip = True .* a resumed run goes on where it was"),
    ({"steps_per_generation": 4}, "steps_per_generation = 4 would have no effect"),
    ({"eval_strategy": "steps"}, "eval_strategy = 'steps' has nothing to evaluate"),
    ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}, "a step takes at least two answers"),
    ({"reference_tolerance": 0.0}, "reference_tolerance must be positive"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_settings_without_effect_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ERPDConfig(**settings(tmp_path, **changes))
