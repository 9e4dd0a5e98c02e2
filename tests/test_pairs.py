"""Preference pairs from stores that are written by hand: which pairs, in numbers, and what TRL makes of them."""

from __future__ import annotations

import io
import itertools
import random
import sys
import types
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from typer.testing import CliRunner

import posttrain.launch
from posttrain import atomic
from posttrain.errors import UserError
from posttrain.evaluation.evaluate import SCHEMA
from posttrain.recipe import Pairs, Presample
from posttrain.rewards import Verdict, Verifier
from posttrain.rollouts.fingerprint import tokenizer_fingerprint
from posttrain.rollouts.pairs import PairSet, TokenPair, build, from_samples, report, tokenize
from posttrain.rollouts.presample import presample
from posttrain.rollouts.store import FORMAT, Store, prompt_id
from posttrain.rollouts.tokens import encode
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.tasks import Row, load

Answer = tuple[str, float | None] | tuple[str, float | None, str]
"""Text, reward, and how it ended: by its end token (`stop`, if nothing is said) or cut off (`length`)."""


@pytest.fixture(scope="module")
def tokenizer(tiny_model: str) -> PreTrainedTokenizerBase:
    """One token per character, so an answer of n characters that ended has n + 1 tokens."""
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_model)
    return loaded


def rows_of(count: int) -> list[Row]:
    return [{"prompt": [{"role": "user", "content": str(i)}], "key": f"key {i}"} for i in range(count)]


def write_store(
    folder: Path,
    rows: Sequence[Row],
    answers: Sequence[Sequence[Answer]],
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
) -> Store:
    """A finished store with these answers, a list for each row."""
    prompts, samples = [], []
    for row, of_row in zip(rows, answers, strict=True):
        identifier = prompt_id(row["prompt"])
        prompts.append({"prompt_id": identifier, "key": row["key"], "correct": 0, "set": "explore", "checked": False})
        for text, reward, *finish in of_row:
            ended = finish != ["length"]
            ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * ended
            samples.append(
                {
                    "prompt_id": identifier,
                    "token_ids": ids,
                    "text": text,
                    "reward": reward,
                    "status": "ok",
                    "finish_reason": "stop" if ended else "length",
                }
            )
    atomic.write_table(folder / "prompts.parquet", pa.Table.from_pylist(prompts))
    types_of = {"prompt_id": pa.string(), "token_ids": pa.list_(pa.int32()), "text": pa.string()}
    types_of |= {"reward": pa.float64(), "status": pa.string(), "finish_reason": pa.string()}
    atomic.write_table(folder / "samples.parquet", pa.Table.from_pylist(samples, schema=pa.schema(types_of)))
    identity = {"model": f"0123456789abcdef.{tokenizer_fingerprint(tokenizer)}", "sampling": {"seed": seed}}
    atomic.write_json(folder / "manifest.json", {"format": FORMAT, "identity": identity, "files": None, "counts": {}})
    return Store.open(folder)


def texts(pairs: PairSet) -> list[tuple[str, str]]:
    """Chosen and rejected answers, in the order of the file."""
    return [(r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in pq.read_table(pairs.file).to_pylist()]


# One prompt. Tokens: 1 → 2, 22 → 3 (right); 333 → 4, 4 → 2 (wrong).
MIXED: list[Answer] = [
    ("1", 1.0),
    ("22", 1.0),
    ("333", 0.0),
    ("4", 0.0),
    ("1", 1.0),  # again
    ("55", 0.0, "length"),
    ("6", None),
    ("7", 1.0),  # contradicts the next
    ("7", 0.0),
]


class TestByHand:
    @pytest.fixture
    def store(self, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Store:
        return write_store(tmp_path / "store", rows_of(1), [MIXED], tokenizer)

    def made(self, store: Store, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> PairSet:
        return build(store, rows_of(1), tokenizer, Pairs(**settings), output_dir=store.path.parent / "pairs")

    def test_every_right_answer_against_every_wrong_one(self, store: Store, tokenizer: PreTrainedTokenizerBase) -> None:
        pairs = self.made(store, tokenizer)
        assert sorted(texts(pairs)) == [("1", "333"), ("1", "4"), ("22", "333"), ("22", "4")]
        assert pairs.counts == {
            "prompts": 1,
            "with_pairs": 1,
            "no_answer": 0,
            "all_right": 0,
            "all_wrong": 0,
            "no_margin": 0,
            "no_length": 0,
            "answers": 9,  # 4 distinct + 2 repeated (1, 7) + 1 contradicting (7) + 1 cut off + 1 without a verdict
            "truncated": 1,
            "no_verdict": 1,
            "merged": 2,
            "contradicting": 1,
            "distinct": 4,
            "found": 4,
            "pairs": 4,
            "cut": 0,
            "chosen_tokens": 2.5,  # (2 + 2 + 3 + 3) / 4
            "rejected_tokens": 3.0,  # (4 + 2 + 4 + 2) / 4
        }

    def test_a_row_of_the_file(self, store: Store, tokenizer: PreTrainedTokenizerBase) -> None:
        pairs = self.made(store, tokenizer, choose="length_matched", per_prompt=1)
        digits = dict(zip("0123456789", tokenizer.convert_tokens_to_ids(list("0123456789")), strict=True))
        opened, closed = tokenizer.convert_tokens_to_ids(["^", "?"])
        assert pq.read_table(pairs.file).to_pylist() == [
            {
                "prompt_id": prompt_id(rows_of(1)[0]["prompt"]),
                "key": "key 0",
                "prompt": [{"role": "user", "content": "0"}],
                "chosen": [{"role": "assistant", "content": "1"}],
                "rejected": [{"role": "assistant", "content": "4"}],
                "prompt_ids": [opened, digits["0"], closed],
                "chosen_ids": [digits["1"], tokenizer.eos_token_id],
                "rejected_ids": [digits["4"], tokenizer.eos_token_id],
                "chosen_reward": 1.0,
                "rejected_reward": 0.0,
            }
        ]

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            # Differences of length: (1, 4) 0, (22, 333) 1, (22, 4) 1, (1, 333) 2. After (1, 4), 22 and 333 are unused.
            ({"choose": "length_matched", "per_prompt": 1}, [("1", "4")]),
            ({"choose": "length_matched", "per_prompt": 2}, [("1", "4"), ("22", "333")]),
            # Then every answer was used once, and (22, 4) is closer than (1, 333).
            ({"choose": "length_matched", "per_prompt": 3}, [("1", "4"), ("22", "333"), ("22", "4")]),
            # Lead of chosen: (1, 333) −2, (22, 333) −1, (1, 4) 0, (22, 4) +1.
            ({"choose": "short_over_long", "per_prompt": 1}, [("1", "333")]),
            ({"choose": "short_over_long", "per_prompt": 3}, [("1", "333"), ("22", "333"), ("1", "4")]),
        ],
        ids=str,
    )
    def test_which_pairs_come_first(
        self,
        store: Store,
        tokenizer: PreTrainedTokenizerBase,
        settings: dict[str, Any],
        expected: list[tuple[str, str]],
    ) -> None:
        pairs = self.made(store, tokenizer, **settings)
        assert texts(pairs) == expected
        assert (pairs.counts["pairs"], pairs.counts["cut"]) == (len(expected), 4 - len(expected))

    @pytest.mark.parametrize(
        ("ratio", "expected"),
        [
            (1.0, [("1", "4")]),  # 2 : 2
            (1.34, [("1", "4"), ("22", "333")]),  # and 4 : 3
            (1.5, [("1", "4"), ("22", "333"), ("22", "4")]),  # and 3 : 2
            (2.0, [("1", "333"), ("1", "4"), ("22", "333"), ("22", "4")]),  # and 4 : 2
        ],
    )
    def test_length_control(
        self, store: Store, tokenizer: PreTrainedTokenizerBase, ratio: float, expected: list[tuple[str, str]]
    ) -> None:
        pairs = self.made(store, tokenizer, max_length_ratio=ratio)
        assert sorted(texts(pairs)) == expected
        assert pairs.counts["found"] == len(expected)

    def test_answers_that_were_cut_off_can_be_kept(self, store: Store, tokenizer: PreTrainedTokenizerBase) -> None:
        pairs = self.made(store, tokenizer, truncated="keep", per_prompt=9)
        assert (pairs.counts["truncated"], pairs.counts["distinct"], pairs.counts["pairs"]) == (0, 5, 6)
        cut_off = {
            tuple(r["rejected_ids"]) for r in pq.read_table(pairs.file).to_pylist() if "55" in str(r["rejected"])
        }
        five = tokenizer.convert_tokens_to_ids("5")
        assert cut_off == {(five, five)}, "as sampled: no end token"

    def test_each_answer_is_used_as_often_as_the_others(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        # Four right and four wrong answers of 2 to 5 tokens: 8 pairs use each of the eight twice.
        answers: list[Answer] = [(str(d) * n, float(d == 1)) for d in (1, 2) for n in (1, 2, 3, 4)]
        store = write_store(tmp_path / "store", rows_of(1), [answers], tokenizer)
        settings = Pairs(choose="length_matched", per_prompt=8)
        pairs = texts(build(store, rows_of(1), tokenizer, settings, output_dir=tmp_path / "pairs"))
        assert set(pairs[:4]) == {("1" * n, "2" * n) for n in (1, 2, 3, 4)}
        assert set(Counter(itertools.chain(*pairs)).values()) == {2}


class TestRewards:
    # Rewards 0, 0.2, 0.5, 0.7, 1.0; 0.7 − 0.2 is 0.49999999999999994 in floating point.
    GRADED: list[Answer] = [("0", 0.0), ("2", 0.2), ("5", 0.5), ("7", 0.7), ("9", 1.0)]  # noqa: RUF012

    @pytest.mark.parametrize(
        ("margin", "expected"),
        [
            (1.0, {"90"}),
            (0.7, {"90", "92", "70"}),
            (0.5, {"90", "92", "95", "70", "72", "50"}),
            (0.01, {a + b for a, b in itertools.combinations("97520", 2)}),
        ],
    )
    def test_the_margin(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, margin: float, expected: set[str]
    ) -> None:
        store = write_store(tmp_path / "store", rows_of(1), [self.GRADED], tokenizer)
        pairs = build(store, rows_of(1), tokenizer, Pairs(margin=margin, per_prompt=99), output_dir=tmp_path / "pairs")
        assert {a + b for a, b in texts(pairs)} == expected
        rewards = {text: reward for text, reward, *_ in self.GRADED}
        for record, (chosen, rejected) in zip(pq.read_table(pairs.file).to_pylist(), texts(pairs), strict=True):
            assert (record["chosen_reward"], record["rejected_reward"]) == (rewards[chosen], rewards[rejected])

    def test_every_leftover_has_its_reason(self, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        answers: list[list[Answer]] = [
            [("1", 1.0), ("2", 0.0)],  # a pair
            [("1", 1.0), ("2", 1.0)],  # all right
            [("1", 0.0), ("2", 0.0), ("3", 1.0, "length")],  # all wrong, once the right one is dropped
            [("1", 1.0, "length"), ("2", None)],  # nothing left
            [("1", 1.0), ("1", 0.0)],  # nothing left: a contradiction
            [],  # nothing at all
            [("1", 0.4), ("2", 0.8)],  # 0.4 apart
            [("1", 1.0), ("2222", 0.0)],  # 2 tokens and 5
        ]
        store = write_store(tmp_path / "store", rows_of(8), answers, tokenizer)
        settings = Pairs(max_length_ratio=2.0)
        counts = build(store, rows_of(8), tokenizer, settings, output_dir=tmp_path / "pairs").counts
        wanted = {"prompts": 8, "with_pairs": 1, "all_right": 1, "all_wrong": 1, "no_answer": 3}
        wanted |= {"no_margin": 1, "no_length": 1, "pairs": 1, "truncated": 2, "no_verdict": 1, "contradicting": 1}
        assert {name: counts[name] for name in wanted} == wanted

    @pytest.mark.parametrize(
        ("answers", "reasons", "advice"),
        [
            ([[("1", 1.0)], [("1", 0.0)], [("1", 0.0)]], "all answers right: 1, all answers wrong: 2", "easier task"),
            ([[("1", 1.0)], [("1", 1.0)], [("1", 0.0)]], "all answers right: 2, all answers wrong: 1", "harder task"),
            ([[("1", 1.0, "length")]] * 3, "no answer left: 3", "rollout.max_tokens"),
            ([[("1", 0.5), ("2", 0.0)]] * 3, "no two rewards a margin apart: 3", r"lower pairs\.margin"),
            (
                [[("1", 1.0), ("222", 0.0)]] * 3,
                "no pair within the length control: 3",
                r"raise pairs\.max_length_ratio",
            ),
        ],
        ids=["wrong", "right", "cut off", "margin", "length"],
    )
    def test_no_pair_at_all_is_an_error_that_names_the_largest_leftover(
        self,
        tmp_path: Path,
        tokenizer: PreTrainedTokenizerBase,
        answers: list[list[Answer]],
        reasons: str,
        advice: str,
    ) -> None:
        store = write_store(tmp_path / "store", rows_of(3), answers, tokenizer)
        with pytest.raises(UserError, match=rf"no preference pair for any of its 3 prompts \({reasons}\): .*{advice}"):
            build(store, rows_of(3), tokenizer, Pairs(max_length_ratio=1.5), output_dir=tmp_path / "pairs")
        assert not (tmp_path / "pairs").exists()


# ---------------------------------------------------------------- properties


def random_answers(seed: int, prompts: int = 20) -> list[list[Answer]]:
    """Up to 12 answers each: few texts, so they repeat and contradict; some without verdict, some cut off."""
    draw = random.Random(seed)
    return [
        [
            (
                str(draw.randrange(4)) * draw.randrange(1, 6),
                draw.choice([None, 0.0, 0.0, 0.5, 1.0, 1.0]),
                draw.choice(["stop", "stop", "stop", "length"]),
            )
            for _ in range(draw.randrange(13))
        ]
        for _ in range(prompts)
    ]


def admissible(answers: Sequence[Answer], settings: Pairs) -> set[tuple[str, str]]:
    """All pairs of texts that the rules allow, written down once more."""
    kept = [a for a in answers if a[1] is not None and (settings.truncated == "keep" or a[2:] != ("length",))]
    rewards = {text: {a[1] for a in kept if a[0] == text} for text in {a[0] for a in kept}}
    tokens = {
        text: len(text) + any(a[0] == text and a[2:] != ("length",) for a in kept) for text in rewards
    }  # an ended copy stands for all
    pairs = set()
    for a, b in itertools.permutations(rewards, 2):
        if len(rewards[a]) == len(rewards[b]) == 1:
            (high,), (low,) = rewards[a], rewards[b]
            longer, shorter = max(tokens[a], tokens[b]), min(tokens[a], tokens[b])
            limit = settings.max_length_ratio or float("inf")
            if high - low >= settings.margin and longer / shorter <= limit:  # type: ignore[operator]
                pairs.add((a, b))
    return pairs


SETTINGS = [
    Pairs(),
    Pairs(per_prompt=2, margin=0.5, truncated="keep", seed=3),
    Pairs(per_prompt=3, choose="length_matched", margin=0.5, max_length_ratio=2.0),
    Pairs(per_prompt=3, choose="short_over_long", margin=0.5, max_length_ratio=3.0, truncated="keep"),
    Pairs(per_prompt=100, choose="length_matched"),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=range(len(SETTINGS)))
@pytest.mark.parametrize("seed", range(4))
def test_the_rules_hold_on_random_stores(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, settings: Pairs, seed: int
) -> None:
    rows, answers = rows_of(20), random_answers(seed)
    pairs = build(
        write_store(tmp_path / "store", rows, answers, tokenizer), rows, tokenizer, settings, output_dir=tmp_path / "p"
    )
    by_key: dict[str, list[tuple[str, str]]] = {row["key"]: [] for row in rows}
    for record, (chosen, rejected) in zip(pq.read_table(pairs.file).to_pylist(), texts(pairs), strict=True):
        by_key[record["key"]].append((chosen, rejected))
    found = taken = 0
    for row, of_row in zip(rows, answers, strict=True):
        allowed, got = admissible(of_row, settings), by_key[row["key"]]
        assert len(set(got)) == len(got) == min(len(allowed), settings.per_prompt)
        assert set(got) <= allowed
        assert not {(b, a) for a, b in got} & set(got), "never both orders"
        found, taken = found + len(allowed), taken + len(got)
    counts = pairs.counts
    assert (counts["found"], counts["pairs"], counts["cut"]) == (found, taken, found - taken)
    leftovers = ("no_answer", "all_right", "all_wrong", "no_margin", "no_length")
    assert counts["prompts"] == 20 == counts["with_pairs"] + sum(counts[name] for name in leftovers)
    assert counts["with_pairs"] == sum(bool(got) for got in by_key.values())
    parts = ("truncated", "no_verdict", "merged", "contradicting", "distinct")
    assert counts["answers"] == sum(map(len, answers)) == sum(counts[name] for name in parts)


@pytest.mark.parametrize("settings", SETTINGS, ids=range(len(SETTINGS)))
def test_pairs_of_a_prompt_depend_on_no_other_prompt(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, settings: Pairs
) -> None:
    rows, answers = rows_of(20), random_answers(7)

    def of_prompts(name: str, order: Sequence[int], given: Sequence[Row]) -> dict[str, list[Any]]:
        chosen = [rows[i] for i in order]
        store = write_store(tmp_path / name, chosen, [answers[i] for i in order], tokenizer)
        table = pq.read_table(build(store, given, tokenizer, settings, output_dir=tmp_path / f"{name} pairs").file)
        found: dict[str, list[Any]] = {}
        for record in table.to_pylist():
            found.setdefault(record["key"], []).append(record)
        return found

    whole = of_prompts("whole", range(20), rows)
    assert of_prompts("other order of rows", range(20), rows[::-1]) == whole
    half = of_prompts("half, backwards", range(19, 9, -1), rows[10:])
    assert half == {key: pairs for key, pairs in whole.items() if key in {row["key"] for row in rows[10:]}}


def test_the_random_draw_is_uniform_and_follows_its_seed(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = rows_of(800)
    answers: list[list[Answer]] = [[("1", 1.0), ("2", 1.0), ("3", 0.0), ("4", 0.0)]] * 800
    store = write_store(tmp_path / "store", rows, answers, tokenizer)
    draws = [
        texts(build(store, rows, tokenizer, Pairs(per_prompt=1, seed=seed), output_dir=tmp_path / f"{seed}"))
        for seed in (0, 1)
    ]
    for drawn in draws:  # four pairs, so 200 each; standard deviation √(800 · ¼ · ¾) = 12.2
        assert all(abs(count - 200) < 4 * 12.2 for count in Counter(drawn).values()) and len(set(drawn)) == 4
    same = sum(a == b for a, b in zip(*draws, strict=True))
    assert abs(same - 200) < 4 * 12.2, "another seed draws anew"


# ---------------------------------------------------------------- one folder, however it was made


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class TestFolder:
    @pytest.fixture
    def store(self, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Store:
        return write_store(tmp_path / "store", rows_of(20), random_answers(1), tokenizer)

    def made(
        self, store: Store, tokenizer: PreTrainedTokenizerBase, name: str, settings: Pairs | None = None
    ) -> PairSet:
        folder = store.path.parent / name
        return build(store, rows_of(20), tokenizer, settings or Pairs(), output_dir=folder)

    def test_made_twice_it_is_the_same(self, store: Store, tokenizer: PreTrainedTokenizerBase) -> None:
        one, other = self.made(store, tokenizer, "one"), self.made(store, tokenizer, "other")
        assert contents(one.path) == contents(other.path)
        assert sorted(contents(one.path)) == ["manifest.json", "pairs.parquet"]
        assert self.made(store, tokenizer, "other", Pairs(seed=1).model_copy(update={"seed": 0})) == other

    def test_a_finished_folder_is_opened(
        self, store: Store, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = self.made(store, tokenizer, "pairs")
        monkeypatch.setattr(atomic.os, "replace", None)  # nothing can be written any more
        assert self.made(store, tokenizer, "pairs") == made == PairSet.open(made.path)
        assert made.identity == {"store": store.identity, "settings": Pairs().model_dump()}

    @pytest.mark.parametrize("write", [1, 2])
    def test_interrupted_at_any_write_and_made_again_it_is_the_same(
        self, store: Store, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, write: int
    ) -> None:
        whole = contents(self.made(store, tokenizer, "whole").path)
        replace, calls = atomic.os.replace, itertools.count(1)

        def dying(*arguments: Any) -> None:
            if next(calls) == write:
                raise KeyboardInterrupt
            replace(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(atomic.os, "replace", dying)
            with pytest.raises(KeyboardInterrupt):
                self.made(store, tokenizer, "killed")
        folder = store.path.parent / "killed"
        (folder / ".pairs.parquet.4194303.tmp").write_bytes(b"PAR1")  # what a kill while writing leaves
        with pytest.raises(UserError, match="There are no preference pairs at"):
            PairSet.open(folder)
        self.made(store, tokenizer, "killed")
        assert contents(folder) == whole

    @pytest.mark.parametrize(
        "change",
        [
            {"per_prompt": 3},
            {"choose": "length_matched"},
            {"margin": 0.5},
            {"max_length_ratio": 4.0},
            {"truncated": "keep"},
            {"seed": 1},
        ],
        ids=lambda change: next(iter(change)),
    )
    def test_pairs_of_other_settings_are_refused(
        self, store: Store, tokenizer: PreTrainedTokenizerBase, change: dict[str, Any]
    ) -> None:
        before = contents(self.made(store, tokenizer, "pairs").path)
        (name,) = change
        with pytest.raises(UserError, match=rf"made with other settings \('settings\.{name}' is .* there and .* here"):
            self.made(store, tokenizer, "pairs", Pairs(**change))
        assert contents(store.path.parent / "pairs") == before

    def test_pairs_of_another_store_are_refused(
        self, tmp_path: Path, store: Store, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.made(store, tokenizer, "pairs")
        other = write_store(tmp_path / "other store", rows_of(20), random_answers(2), tokenizer, seed=2)
        with pytest.raises(UserError, match=r"'store\.sampling\.seed' is 0 there and 2 here"):
            self.made(other, tokenizer, "pairs")

    def test_a_folder_of_something_else_is_refused(self, store: Store, tokenizer: PreTrainedTokenizerBase) -> None:
        with pytest.raises(UserError, match="made with other settings"):
            self.made(store, tokenizer, "store")
        manifest = store.path.parent / "old" / "manifest.json"
        atomic.write_json(manifest, {"format": 0})
        with pytest.raises(UserError, match="have format 0, this version reads 1"):
            self.made(store, tokenizer, "old")

    def test_another_tokenizer_is_refused(
        self, store: Store, tokenizer: PreTrainedTokenizerBase, tiny_model: str
    ) -> None:
        other = AutoTokenizer.from_pretrained(tiny_model)
        other.chat_template = "{{ messages[0]['content'] }}"
        with pytest.raises(UserError, match="sampled with another tokenizer or chat template"):
            self.made(store, other, "pairs")

    def test_other_rows_are_refused(self, store: Store, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
        rows = [*rows_of(23)[20:], *rows_of(18)]
        with pytest.raises(UserError, match=r"other rows \(2 of its 20 prompts are not .*, 3 training prompts are not"):
            build(store, rows, tokenizer, Pairs(), output_dir=tmp_path / "pairs")


# ---------------------------------------------------------------- TRL


def trainer_of(model: str, tokenizer: PreTrainedTokenizerBase, dataset: Any, folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        max_steps=1,
        per_device_train_batch_size=8,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        **options,
    )
    return DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model), args=args, train_dataset=dataset, processing_class=tokenizer
    )


@pytest.fixture
def load_parquet(tmp_path: Path) -> Any:
    import datasets

    def read(file: Path) -> Any:
        return datasets.load_dataset(
            "parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "datasets cache")
        )

    return read


def ids_of(dataset: Any) -> list[tuple[list[int], list[int], list[int]]]:
    return [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in dataset]


@pytest.mark.parametrize("form", ["messages", "text"])
def test_trl_trains_on_the_file_and_tokenizes_it_as_sampled(
    tmp_path: Path, tiny_model: str, tokenizer: PreTrainedTokenizerBase, load_parquet: Any, form: str
) -> None:
    rows: list[Row] = rows_of(20)
    if form == "text":
        rows = [{**row, "prompt": f"^{row['prompt'][0]['content']}?"} for row in rows]
    store = write_store(tmp_path / "store", rows, random_answers(5), tokenizer)
    pairs = build(store, rows, tokenizer, Pairs(), output_dir=tmp_path / "pairs")
    dataset = load_parquet(pairs.file)
    assert len(dataset) == pairs.counts["pairs"] > 20
    texts_only = dataset.select_columns(["prompt", "chosen", "rejected"])
    trainer = trainer_of(tiny_model, tokenizer, texts_only, tmp_path / "trained")
    assert ids_of(trainer.train_dataset) == ids_of(dataset), "every answer had ended"
    own = [tokenize(row, tokenizer, problem=i) for i, row in enumerate(texts_only)]
    assert own == [
        TokenPair(i, tuple(p), tuple(c), tuple(r)) for i, (p, c, r) in enumerate(ids_of(trainer.train_dataset))
    ]
    if form == "messages":
        trainer.train()
        (loss,) = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        assert loss == pytest.approx(0.693147, abs=1e-5), "−log σ(0): the policy is its own reference at the first step"
    whole = trainer_of(tiny_model, tokenizer, dataset, tmp_path / "whole")
    assert ids_of(whole.train_dataset) == ids_of(dataset), "further columns are in nobody's way"


def test_a_cut_off_answer_is_closed_by_whoever_reads_its_text(
    tmp_path: Path, tiny_model: str, tokenizer: PreTrainedTokenizerBase, load_parquet: Any
) -> None:
    store = write_store(tmp_path / "store", rows_of(1), [[("1", 1.0), ("22", 0.0, "length")]], tokenizer)
    pairs = build(store, rows_of(1), tokenizer, Pairs(truncated="keep"), output_dir=tmp_path / "pairs")
    dataset = load_parquet(pairs.file)
    trainer = trainer_of(tiny_model, tokenizer, dataset, tmp_path / "trained")
    ((_, chosen, rejected),), ((_, as_sampled, cut_off),) = ids_of(trainer.train_dataset), ids_of(dataset)
    assert (chosen, rejected) == (as_sampled, [*cut_off, tokenizer.eos_token_id])


def test_answers_begin_where_trl_says_under_a_template_that_takes_the_prompt_back(
    tmp_path: Path, tiny_model: str
) -> None:
    """The generation prompt `==` is not in the whole conversation, as with templates that open a thought."""
    import datasets

    other = AutoTokenizer.from_pretrained(tiny_model)
    other.chat_template += "{% if add_generation_prompt %}=={% endif %}"
    row = {
        "prompt": [{"role": "user", "content": "1"}],
        "chosen": [{"role": "assistant", "content": "=2"}],
        "rejected": [{"role": "assistant", "content": "==3"}],
    }
    trainer = trainer_of(tiny_model, other, datasets.Dataset.from_list([row]), tmp_path / "trained")
    ((prompt, chosen, rejected),) = ids_of(trainer.train_dataset)
    assert "".join(other.convert_ids_to_tokens(prompt)) == "^1?="
    assert tokenize(row, other, problem=4) == TokenPair(4, tuple(prompt), tuple(chosen), tuple(rejected))


class Even(Verifier):
    """Accepts answers whose characters have an even sum."""

    name = "even"

    def verify(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        return Verdict(1.0, "ok") if sum(map(ord, completion)) % 2 == 0 else Verdict(0.0, "wrong")


def test_a_store_that_was_really_sampled(
    tmp_path: Path, tiny_model: str, tokenizer: PreTrainedTokenizerBase, load_parquet: Any
) -> None:
    engine = TransformersEngine.load(tiny_model, device="cpu")
    rows, settings = load("countdown", {"rows": 10}).rows("train"), Presample(samples_per_prompt=8, top_p=1.0)
    store = presample(
        engine, rows, Even(), settings, max_tokens=6, training_temperature=1.0, output_dir=tmp_path / "store"
    )
    wanted = Pairs(per_prompt=6, truncated="keep", choose="length_matched")
    pairs = build(store, rows, tokenizer, wanted, output_dir=tmp_path / "pairs")
    assert pairs.counts["answers"] == 80
    prompts = {row["key"]: row["prompt"] for row in rows}
    dataset = load_parquet(pairs.file)
    assert len(dataset) > 20
    for record in dataset:
        assert record["prompt"] == prompts[record["key"]]
        assert record["prompt_ids"] == encode(tokenizer, record["prompt"])
        for name, reward in (("chosen", 1.0), ("rejected", 0.0)):
            text = tokenizer.decode(record[f"{name}_ids"], skip_special_tokens=True)
            assert record[name] == [{"role": "assistant", "content": text}]
            assert Even().score([text], [{}])[0].reward == record[f"{name}_reward"] == reward


# ---------------------------------------------------------------- pairs of an evaluation


def evaluated(answers: Sequence[Sequence[Answer]], tokenizer: PreTrainedTokenizerBase) -> pa.Table:
    records = [
        {
            "problem": problem,
            "key": f"key {problem}",
            "text": text,
            "correct": None if reward is None else reward == 1.0,
            "tokens": len(text) + (finish != ["length"]),
            "truncated": finish == ["length"],
        }
        for problem, of_problem in enumerate(answers)
        for text, reward, *finish in of_problem
    ]
    return pa.Table.from_pylist(records, schema=SCHEMA)


def test_pairs_of_an_evaluation(tokenizer: PreTrainedTokenizerBase) -> None:
    answers: list[list[Answer]] = [[("1", 1.0)], MIXED, [], [("5", 0.0), ("6", 1.0)]]
    rows = rows_of(4)
    found = from_samples(evaluated(answers, tokenizer), rows, tokenizer, per_prompt=9, seed=0)

    def read(ids: Sequence[int]) -> str:
        return "".join(tokenizer.convert_ids_to_tokens(list(ids)))

    assert sorted((p.problem, read(p.prompt_ids), read(p.chosen_ids), read(p.rejected_ids)) for p in found) == [
        (1, "^1?", "1<eos>", "333<eos>"),
        (1, "^1?", "1<eos>", "4<eos>"),
        (1, "^1?", "22<eos>", "333<eos>"),
        (1, "^1?", "22<eos>", "4<eos>"),
        (3, "^3?", "6<eos>", "5<eos>"),
    ]
    one_each = from_samples(evaluated(answers, tokenizer), rows, tokenizer, per_prompt=1, seed=0)
    assert [pair.problem for pair in one_each] == [1, 3]
    assert set(one_each) <= set(found)
    assert from_samples(evaluated(answers[:1], tokenizer), rows, tokenizer, per_prompt=1, seed=0) == []


def test_an_evaluation_and_a_store_of_the_same_answers_give_the_same_pairs(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows, answers = rows_of(20), random_answers(9)
    right_or_wrong = [[(t, None if r is None else float(r == 1.0), *f) for t, r, *f in of_row] for of_row in answers]
    store = write_store(tmp_path / "store", rows, right_or_wrong, tokenizer)  # type: ignore[arg-type]
    settings = Pairs(per_prompt=2, seed=6)
    of_store = pq.read_table(build(store, rows, tokenizer, settings, output_dir=tmp_path / "pairs").file).to_pylist()
    found = from_samples(evaluated(answers, tokenizer), rows, tokenizer, per_prompt=2, seed=6)
    assert [(f"key {p.problem}", [*p.prompt_ids], [*p.chosen_ids], [*p.rejected_ids]) for p in found] == [
        (r["key"], r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]) for r in of_store
    ]


# ---------------------------------------------------------------- what people see


def test_the_report_shows_every_count(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    from rich.console import Console

    store = write_store(tmp_path / "store", rows_of(2), [MIXED, [("1", 1.0)]], tokenizer)
    pairs = build(store, rows_of(2), tokenizer, Pairs(per_prompt=3), output_dir=tmp_path / "pairs")
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report(pairs.counts))
    lines = [" ".join(line.strip(" │").replace("│", " ").split()) for line in console.export_text().splitlines()]
    assert [line for line in lines if line and line[-1].isdigit()] == [
        "prompts 2",
        "with pairs 1",
        "no answer left 0",
        "all answers right 1",
        "all answers wrong 0",
        "no two rewards a margin apart 0",
        "no pair within the length control 0",
        "answers 10",
        "distinct, with a verdict 5",
        "repeated texts 2",
        "contradicting rewards 1",
        "cut off 1",
        "no verdict 1",
        "pairs 4",
        "taken 3",
        "beyond per_prompt 1",
        f"tokens of chosen, mean {pairs.counts['chosen_tokens']:.1f}",
        f"tokens of rejected, mean {pairs.counts['rejected_tokens']:.1f}",
    ]


class TestCommand:
    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path, Path]]:
        calls: list[tuple[str, Path, Path]] = []

        def run_pairs(recipe: Any, store: Path, output_dir: Path) -> Path:
            calls.append((recipe.name, store, output_dir))
            if output_dir.name == "slow":
                raise KeyboardInterrupt
            return output_dir

        stand_in = types.SimpleNamespace(run_pairs=run_pairs)
        monkeypatch.setitem(sys.modules, "posttrain.launch.pipeline", stand_in)
        monkeypatch.setattr(posttrain.launch, "pipeline", stand_in, raising=False)
        return calls

    def test_it_prints_the_folder(self, calls: list[tuple[str, Path, Path]]) -> None:
        from posttrain.cli import app

        result = CliRunner().invoke(app, ["pairs", "dph_rl/countdown3"])
        assert (result.exit_code, result.stdout) == (0, "runs/dph_rl-countdown3/pairs\n")
        result = CliRunner().invoke(
            app,
            ["pairs", "dph_rl/countdown3", "--store", "a/store", "--output-dir", "b", "--set", "pairs.per_prompt=2"],
        )
        assert (result.exit_code, result.stdout) == (0, "b\n")
        below = Path("runs/dph_rl-countdown3")
        assert calls == [
            ("countdown3", below / "store", below / "pairs"),
            ("countdown3", Path("a/store"), Path("b")),
        ]

    def test_interrupted_it_says_how_to_go_on(self, calls: list[tuple[str, Path, Path]]) -> None:
        from posttrain.cli import app

        given = ["pairs", "dph_rl/countdown3", "--set", "pairs.seed=1", "--output-dir", "slow", "--store", "my store"]
        result = CliRunner().invoke(app, given)
        assert result.exit_code == 130
        assert f"continue with: posttrain {' '.join(given[:-1])} 'my store'" in result.stderr
