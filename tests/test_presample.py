"""Pre-sampling with a tiny real model: the split, the stored answers, and the same store after any interruption."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from posttrain import atomic
from posttrain.errors import UserError
from posttrain.recipe import Presample
from posttrain.rewards import RewardOptions, Verdict, Verifier
from posttrain.rollouts.engine import Prompt, Sample, SamplingParams, Score
from posttrain.rollouts.presample import presample
from posttrain.rollouts.store import Store, prompt_id
from posttrain.rollouts.tokens import encode
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.tasks import Row, load
from tests.patience import eventually

SETTINGS = Presample(samples_per_prompt=4, pef_threshold=3, top_p=0.9, seed=14)
BATCH = 16
"""Answers per part, so 4 prompts."""
TRAINING_TEMPERATURE = 0.7
"""Not the sampling temperature, so that a test sees which one the stored log-probs are at."""


class Easy(Verifier):
    """Accepts `ease` of 8 answers, by a property of their text; an ease of 9 breaks the verifier."""

    name = "easy"
    requires = ("ease",)

    def verify(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        if row["ease"] == 9:
            raise RuntimeError("the sandbox is gone")
        accepted = sum(map(ord, completion)) % 8 < row["ease"]
        return Verdict(1.0, "ok", completion) if accepted else Verdict(0.0, "wrong", completion)


class Shaping(Easy):
    """Judges style, not correctness."""

    name = "style"
    accuracy = False


class Merciful(Easy):
    """The same reward with an option."""

    class Options(RewardOptions):
        mercy: bool = True

    options = Options()


def countdown(ease: Sequence[int]) -> list[Row]:
    """Prompts of the countdown task, with how many of 8 answers `Easy` accepts."""
    rows = load("countdown", {"rows": len(ease)}).rows("train")
    return [{**row, "ease": level} for row, level in zip(rows, ease, strict=True)]


ROWS = countdown([8, 0, 6, 4, 7, 8, 6, 0, 5, 6, 9, 7, 8, 7, 6])
"""Fifteen prompts, so four parts, the last one short."""


class Killed(Exception):
    """The process dies."""


class Watched:
    """An engine that remembers what it was asked, and dies at the call number `dies_at`."""

    name = "transformers"

    def __init__(self, engine: TransformersEngine, dies_at: int | None = None) -> None:
        self.engine, self.dies_at = engine, dies_at
        self.tokenizer = engine.tokenizer
        self.asked: list[tuple[int, SamplingParams]] = []
        self.calls = 0

    @property
    def fingerprint(self) -> str:
        return self.engine.fingerprint

    @property
    def files(self) -> str | None:
        return self.engine.files

    def sample(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[list[Sample]]:
        self._live()
        self.asked.append((len(prompts), params))
        return self.engine.sample(prompts, params)

    def score(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], **options: Any) -> list[Score]:
        self._live()
        return self.engine.score(sequences, **options)

    def _live(self) -> None:
        if self.calls == self.dies_at:
            raise Killed
        self.calls += 1


class Stuck(Watched):
    """Waits to be killed when two parts of a store are there."""

    def __init__(self, engine: TransformersEngine, folder: Path) -> None:
        super().__init__(engine)
        self.folder = folder

    def _live(self) -> None:
        while len(finished_parts(self.folder)) >= 2:
            time.sleep(0.1)


def finished_parts(folder: Path) -> list[Path]:
    return list((folder / "parts").glob("0*.parquet"))


class Locked(Watched):
    """Shared by threads: sampling sets the global random state for a while."""

    def __init__(self, engine: TransformersEngine, lock: threading.Lock) -> None:
        super().__init__(engine)
        self.lock = lock

    def sample(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[list[Sample]]:
        with self.lock:
            return super().sample(prompts, params)


@pytest.fixture(scope="module")
def engine(tiny_model: str) -> TransformersEngine:
    return TransformersEngine.load(tiny_model, device="cpu")


def make(engine: Any, folder: Path, **changes: Any) -> Store:
    """A store of `ROWS` in `folder`; `changes` replace arguments of `presample`."""
    arguments = {
        "rows": ROWS,
        "verifier": Easy(),
        "settings": SETTINGS,
        "max_tokens": 6,
        "training_temperature": TRAINING_TEMPERATURE,
        "output_dir": folder,
        "batch_size": BATCH,
        **changes,
    }
    return presample(engine, **arguments)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / f"{name}.parquet").to_pylist()
    return rows


@pytest.fixture(scope="module")
def whole(engine: TransformersEngine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    make(engine, folder)
    return folder


# ---------------------------------------------------------------- the split


def test_every_kind_of_prompt_occurs(whole: Path) -> None:
    """The other tests would say less without."""
    prompts = table(whole, "prompts")
    assert {(p["set"], p["checked"]) for p in prompts} == {("pef", True), ("explore", True), ("explore", False)}
    assert 0 in {p["correct"] for p in prompts}
    assert 3 in {p["correct"] for p in prompts if p["set"] == "pef"}, "a threshold below k"


def test_a_prompt_is_near_perfect_when_enough_samples_and_the_fresh_answer_are_correct(whole: Path) -> None:
    prompts, samples, answers = (table(whole, name) for name in ("prompts", "samples", "answers"))
    assert [p["prompt_id"] for p in prompts] == [prompt_id(row["prompt"]) for row in ROWS]
    assert [p["key"] for p in prompts] == [row["key"] for row in ROWS]
    assert [s["prompt_id"] for s in samples] == [p["prompt_id"] for p in prompts for _ in range(4)]
    stored = {answer["prompt_id"] for answer in answers}
    for prompt in prompts:
        correct = sum(s["reward"] == 1.0 for s in samples if s["prompt_id"] == prompt["prompt_id"])
        assert prompt["correct"] == correct
        assert prompt["checked"] is (correct >= 3)
        assert (prompt["set"] == "pef") is (prompt["prompt_id"] in stored)
        assert prompt["checked"] or prompt["set"] == "explore"


def test_every_judgement_in_the_store_is_the_verifier_s(whole: Path) -> None:
    rows = {prompt_id(row["prompt"]): row for row in ROWS}
    for entry in [*table(whole, "samples"), *table(whole, "answers")]:
        (verdict,) = Easy().score([entry["text"]], [rows[entry["prompt_id"]]])
        assert (entry["reward"], entry["status"]) == (verdict.reward, verdict.status)
    assert {answer["reward"] for answer in table(whole, "answers")} == {1.0}
    assert {s["status"] for s in table(whole, "samples")} == {"ok", "wrong", "verifier_error"}


def test_the_fresh_answers_are_drawn_for_candidates_only_and_from_seeds_of_their_own(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    watched = Watched(engine)
    store = make(watched, tmp_path / "store", settings=SETTINGS.model_copy(update={"stored_per_prompt": 2}))
    first = [(count, params) for count, params in watched.asked if params.n == 4]
    fresh = [(count, params) for count, params in watched.asked if params.n == 2]
    assert [count for count, _ in first] == [4, 4, 4, 3]
    checked = sum(prompt["checked"] for prompt in table(store.path, "prompts"))
    assert sum(count for count, _ in fresh) == checked > 0
    seeds = [params.seed for _, params in watched.asked]
    assert len(set(seeds)) == len(seeds)
    assert {(p.temperature, p.top_p, p.top_k, p.max_tokens) for _, p in watched.asked} == {(1.0, 0.9, 0, 6)}


def test_several_stored_answers_must_all_be_correct(engine: TransformersEngine, tmp_path: Path) -> None:
    store = make(engine, tmp_path / "store", settings=SETTINGS.model_copy(update={"stored_per_prompt": 3}))
    owners = [answer["prompt_id"] for answer in table(store.path, "answers")]
    pef = [prompt["prompt_id"] for prompt in table(store.path, "prompts") if prompt["set"] == "pef"]
    assert owners == [owner for owner in pef for _ in range(3)]
    assert store.counts["failed_checks"] > 0
    assert {answer["reward"] for answer in table(store.path, "answers")} == {1.0}


def test_a_failed_check_sends_the_prompt_where_the_settings_say(
    engine: TransformersEngine, whole: Path, tmp_path: Path
) -> None:
    dropping = make(engine, tmp_path / "store", settings=SETTINGS.model_copy(update={"on_failed_check": "drop"}))
    moved = 0
    for before, after in zip(table(whole, "prompts"), table(dropping.path, "prompts"), strict=True):
        failed = before["checked"] and before["set"] == "explore"
        assert after == {**before, "set": "dropped" if failed else before["set"]}
        moved += failed
    assert moved > 0
    assert dropping.counts["dropped"] == dropping.counts["failed_checks"] == moved
    kept = dropping.exploration([row["prompt"] for row in ROWS])
    assert kept == [i for i, p in enumerate(table(dropping.path, "prompts")) if p["set"] == "explore"]


def test_by_default_all_samples_must_be_correct(engine: TransformersEngine, tmp_path: Path) -> None:
    strict = SETTINGS.model_copy(update={"pef_threshold": None})
    store = make(engine, tmp_path / "store", settings=strict)
    assert {p["correct"] for p in table(store.path, "prompts") if p["checked"]} == {4}
    spelt_out = SETTINGS.model_copy(update={"pef_threshold": 4})
    assert make(engine, tmp_path / "store", settings=spelt_out).identity == store.identity


def test_the_counts_are_those_of_the_tables(whole: Path) -> None:
    prompts, sets = table(whole, "prompts"), [prompt["set"] for prompt in table(whole, "prompts")]
    assert Store.open(whole).counts == {
        "prompts": 15,
        "explore": sets.count("explore"),
        "pef": sets.count("pef"),
        "dropped": 0,
        "failed_checks": sum(p["checked"] and p["set"] == "explore" for p in prompts),
        "stored_answers": len(table(whole, "answers")),
        "all_wrong": sum(p["correct"] == 0 for p in prompts),
    }


# ---------------------------------------------------------------- the stored answers


def test_stored_log_probs_are_those_of_the_whole_softmax_at_the_training_temperature(
    engine: TransformersEngine, whole: Path
) -> None:
    answers = Store.open(whole).answers
    assert len(answers) > 2
    for answer in answers:
        ids = torch.tensor([[*answer.prompt_ids, *answer.token_ids]])
        with torch.no_grad():
            logits = engine.model(input_ids=ids).logits[0, len(answer.prompt_ids) - 1 : -1]
        logps = (logits / TRAINING_TEMPERATURE).log_softmax(-1).gather(1, torch.tensor(answer.token_ids)[:, None])
        assert answer.logps == pytest.approx(logps[:, 0].tolist(), abs=1e-5)


def test_stored_answers_belong_to_their_prompts(engine: TransformersEngine, whole: Path) -> None:
    rows = {prompt_id(row["prompt"]): row for row in ROWS}
    for entry, answer in zip(table(whole, "answers"), Store.open(whole).answers, strict=True):
        assert list(answer.prompt_ids) == encode(engine.tokenizer, rows[entry["prompt_id"]]["prompt"])
        assert engine.tokenizer.decode(list(answer.token_ids), skip_special_tokens=True) == entry["text"]
        assert len(answer.token_ids) == len(answer.logps)


# ---------------------------------------------------------------- one store, however it was made


def test_one_seed_gives_one_store(engine: TransformersEngine, whole: Path, tmp_path: Path) -> None:
    make(engine, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(whole)
    make(engine, tmp_path / "other", settings=SETTINGS.model_copy(update={"seed": 15}))
    assert contents(tmp_path / "other")["samples.parquet"] != contents(whole)["samples.parquet"]


def test_the_store_holds_four_files_and_no_remains(whole: Path) -> None:
    assert sorted(contents(whole)) == ["answers.parquet", "manifest.json", "prompts.parquet", "samples.parquet"]
    assert not (whole / "parts").exists()


def test_a_finished_store_is_opened_and_not_made_again(engine: TransformersEngine, whole: Path) -> None:
    watched = Watched(engine)
    assert make(watched, whole).manifest == Store.open(whole).manifest
    assert watched.calls == 0


def test_interrupted_at_any_call_and_resumed_it_is_the_same_store(
    engine: TransformersEngine, whole: Path, tmp_path: Path
) -> None:
    watched = Watched(engine)
    make(watched, tmp_path / "store")
    assert watched.calls > 8
    for call in range(watched.calls):
        folder = tmp_path / f"killed at {call}"
        with pytest.raises(Killed):
            make(Watched(engine, dies_at=call), folder)
        with pytest.raises(UserError, match="is unfinished: run the same"):
            Store.open(folder)
        make(engine, folder)
        assert contents(folder) == contents(whole), f"killed at call {call}"


def test_interrupted_at_any_write_and_resumed_it_is_the_same_store(
    engine: TransformersEngine, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, remove = atomic.os.replace, atomic.shutil.rmtree
    writes = 0

    def failing(really: Any, at: int) -> Any:
        def write(*arguments: Any, **options: Any) -> None:
            nonlocal writes
            writes += 1
            if writes == at:
                raise Killed
            really(*arguments, **options)

        return write

    for at in range(1, 100):
        folder, writes = tmp_path / f"killed at {at}", 0
        with monkeypatch.context() as patch:
            patch.setattr(atomic.os, "replace", failing(replace, at))
            patch.setattr(atomic.shutil, "rmtree", failing(remove, at))
            try:
                make(engine, folder)
            except Killed:
                assert not [name for name in contents(folder) if name.endswith(".tmp")]
            else:
                break
        make(engine, folder)
        assert contents(folder) == contents(whole), f"killed at write {at}"
    assert at == 11, "identity, four parts, three tables, the manifest and the removal of the parts were interrupted"


def test_work_that_is_done_is_not_done_again(engine: TransformersEngine, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with pytest.raises(Killed):
        make(Watched(engine, dies_at=10), folder)
    finished = len(list((folder / "parts").glob("*.parquet")))
    assert 0 < finished < 4
    rest = Watched(engine)
    make(rest, folder)
    assert sum(params.n == 4 for _, params in rest.asked) == 4 - finished
    assert contents(folder) == contents(whole)


def run_half(model: str, folder: Path) -> None:
    """Make two parts of the store, in a process that is to be killed."""
    make(Stuck(TransformersEngine.load(model, device="cpu"), folder), folder)


def test_a_killed_process_leaves_what_the_next_one_finishes(
    tiny_model: str, engine: TransformersEngine, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "store"
    process = multiprocessing.get_context("spawn").Process(target=run_half, args=(tiny_model, folder))
    process.start()
    assert eventually(lambda: len(finished_parts(folder)) >= 2 or not process.is_alive(), 600)
    process.kill()
    process.join()
    assert len(finished_parts(folder)) == 2
    assert not (folder / "manifest.json").exists()
    # What a kill in the middle of publishing leaves.
    (folder / ".prompts.parquet.4194303.tmp").write_bytes(b"PAR1")
    make(engine, folder)
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize("workers", [2, 3])
def test_several_workers_make_the_same_store(
    engine: TransformersEngine, whole: Path, tmp_path: Path, workers: int
) -> None:
    lock, barrier = threading.Lock(), threading.Barrier(workers, timeout=600)
    engines = [Locked(engine, lock) for _ in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        futures = [
            pool.submit(make, engines[rank], tmp_path / "store", worker=(rank, workers), barrier=barrier.wait)
            for rank in range(workers)
        ]
        stores = [future.result() for future in futures]
    assert contents(tmp_path / "store") == contents(whole)
    assert all(store.manifest == Store.open(whole).manifest for store in stores)
    parts = [sum(params.n == 4 for _, params in one.asked) for one in engines]
    assert parts == [len(range(rank, 4, workers)) for rank in range(workers)], "every part once, in turn"


# ---------------------------------------------------------------- what is refused


OTHERS = {
    "sampling.seed": {"settings": SETTINGS.model_copy(update={"seed": 15})},
    "sampling.temperature": {"settings": SETTINGS.model_copy(update={"temperature": 0.9})},
    "sampling.top_p": {"settings": SETTINGS.model_copy(update={"top_p": 1.0})},
    "sampling.samples_per_prompt": {"settings": SETTINGS.model_copy(update={"samples_per_prompt": 8})},
    "sampling.pef_threshold": {"settings": SETTINGS.model_copy(update={"pef_threshold": None})},
    "sampling.stored_per_prompt": {"settings": SETTINGS.model_copy(update={"stored_per_prompt": 2})},
    "sampling.on_failed_check": {"settings": SETTINGS.model_copy(update={"on_failed_check": "drop"})},
    "sampling.max_tokens": {"max_tokens": 7},
    "training_temperature": {"training_temperature": 1.0},
    "batch_size": {"batch_size": 8},
    "rows": {"rows": ROWS[:-1]},
    "verifier.options.mercy": {"verifier": Merciful()},
}


@pytest.mark.parametrize("key", OTHERS)
def test_a_store_of_other_settings_is_refused_by_the_name_of_the_setting(
    engine: TransformersEngine, whole: Path, key: str
) -> None:
    before = contents(whole)
    with pytest.raises(UserError, match=rf"made with other settings \('{key}' is .* there and .* here\)"):
        make(engine, whole, **OTHERS[key])
    assert contents(whole) == before


@pytest.mark.parametrize("key", OTHERS)
def test_the_beginnings_of_other_settings_are_refused_too(engine: TransformersEngine, tmp_path: Path, key: str) -> None:
    folder = tmp_path / "store"
    with pytest.raises(Killed):
        make(Watched(engine, dies_at=0), folder)
    before = contents(folder)
    with pytest.raises(UserError, match=rf"beginnings of another run \('{key}' is"):
        make(engine, folder, **OTHERS[key])
    assert contents(folder) == before


def test_the_store_of_another_model_is_refused(tiny_model: str, whole: Path) -> None:
    trained = TransformersEngine.load(tiny_model, device="cpu")
    with torch.no_grad():
        next(trained.model.parameters()).add_(1e-3)
    with pytest.raises(UserError, match=r"other settings \('model' is"):
        make(trained, whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verifier": Shaping()}, "'style' shapes and cannot decide correctness"),
        ({"rows": []}, "no training rows"),
        ({"rows": [*ROWS, {**ROWS[3], "key": "another"}]}, "1 of 16 training rows repeat .* 'another'"),
    ],
    ids=["shaping", "empty", "repeated"],
)
def test_what_cannot_be_presampled_is_refused_before_anything_is_written(
    engine: TransformersEngine, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make(engine, tmp_path / "store", **changes)
    assert not (tmp_path / "store").exists()


def test_training_on_prompts_that_were_not_presampled_is_refused(whole: Path) -> None:
    strangers = [[{"role": "user", "content": "9+9="}], [{"role": "user", "content": "8+8="}]]
    with pytest.raises(UserError, match="2 of 3 training prompts are not in the store"):
        Store.open(whole).exploration([ROWS[0]["prompt"], *strangers])


def test_a_store_that_leaves_nothing_to_explore_is_refused(engine: TransformersEngine, tmp_path: Path) -> None:
    easy = countdown([8] * 5)
    store = make(engine, tmp_path / "store", rows=easy)
    assert store.counts["pef"] == 5
    with pytest.raises(UserError, match="no prompt to explore: all 5"):
        store.exploration([row["prompt"] for row in easy])


def test_a_store_without_near_perfect_prompts_opens(engine: TransformersEngine, tmp_path: Path) -> None:
    hard = countdown([0] * 5)
    store = make(engine, tmp_path / "store", rows=hard)
    assert store.answers == []
    assert store.exploration([row["prompt"] for row in hard]) == list(range(5))


def test_what_is_no_store_is_not_opened(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no store at"):
        Store.open(tmp_path)
    shutil.copytree(whole, tmp_path / "old")
    manifest = json.loads((whole / "manifest.json").read_text(encoding="utf-8"))
    (tmp_path / "old" / "manifest.json").write_text(json.dumps({**manifest, "format": 0}), encoding="utf-8")
    with pytest.raises(UserError, match="has format 0, this version reads 1: presample again"):
        Store.open(tmp_path / "old")


# ---------------------------------------------------------------- writing whole files


OLD, NEW = pa.table({"a": [1, 2]}), pa.table({"a": [3]})


def half_written(*arguments: Any, **options: Any) -> None:
    """Stands in for a writer whose disk is full."""
    Path(arguments[1]).write_bytes(b"PAR1")
    raise OSError("no space left on device")


def test_a_failed_write_keeps_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic.write_table(tmp_path / "t.parquet", OLD)
    monkeypatch.setattr(pq, "write_table", half_written)
    with pytest.raises(OSError, match="no space left"):
        atomic.write_table(tmp_path / "t.parquet", NEW)
    assert pq.read_table(tmp_path / "t.parquet").equals(OLD)
    assert sorted(contents(tmp_path)) == ["t.parquet"]


def test_a_failed_write_keeps_the_old_text(tmp_path: Path) -> None:
    path = tmp_path / "below" / "t.txt"
    atomic.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        atomic.write_text(path, "new \ud800")
    assert contents(tmp_path) == {"below/t.txt": b"old"}


def test_a_part_exists_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = atomic.Parts(tmp_path / "parts", {"seed": 1})
    parts.write(1, NEW)
    assert [parts.done(index) for index in range(2)] == [False, True]
    with pytest.raises(FileNotFoundError):
        parts.read(2)
    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", half_written)
        with pytest.raises(OSError, match="no space left"):
            parts.write(0, OLD)
    assert not parts.done(0)
    parts.write(0, OLD)
    assert parts.read(2)["a"].to_pylist() == [1, 2, 3], "in order"
    assert atomic.Parts(tmp_path / "parts", {"seed": 1}).done(0)
    with pytest.raises(UserError, match="'seed' is 1 there and 2 here"):
        atomic.Parts(tmp_path / "parts", {"seed": 2})
    parts.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("there", "here", "difference"),
    [
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 2}}, None),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, "'a.c' is 2 there and 3 here"),
        ({"a": 1}, {"a": 1, "b": 0}, "'b' is None there and 0 here"),
        ({"a": {"b": 1}}, {"a": "x"}, "'a' is {'b': 1} there and 'x' here"),
        ({"a": 1}, {"a": 1.0}, None),
        ({"a": 1}, {"a": 1, "b": None}, None),
    ],
)
def test_the_first_difference_is_named(there: Any, here: Any, difference: str | None) -> None:
    assert atomic.first_difference(there, here) == difference
