"""Ready-made preference data: every format of TRL's, the prompt that TRL would cut, splits, and what happens to bad
rows."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from posttrain import registry, tasks
from posttrain.errors import UserError
from posttrain.tasks import Row, Split, split_of
from posttrain.tasks._rows import digest
from posttrain.tasks.preferences import _row

Record = dict[str, Any]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}

STANDARD: Record = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
HH: Record = {
    "chosen": "\n\nHuman: Colour of the sky?\n\nAssistant: It is blue.",
    "rejected": "\n\nHuman: Colour of the sky?\n\nAssistant: Green.",
}
CHAT: Record = {
    "prompt": [user("Colour of the sky?")],
    "chosen": [assistant("Blue.")],
    "rejected": [assistant("Green.")],
}
WHOLE_CHAT: Record = {name: CHAT["prompt"] + CHAT[name] for name in ("chosen", "rejected")}


def write(path: Path, records: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


def load(name: str, **options: Any) -> tasks.BaseTask:
    return tasks.load("preferences", {"name": name, **options})


def content(row: Row) -> Record:
    return {name: row[name] for name in ("prompt", "chosen", "rejected")}


def sums(count: int, start: int = 0) -> list[Record]:
    return [
        {"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i + 2), "source": "us"}
        for i in range(start, start + count)
    ]


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (STANDARD, STANDARD),
        (CHAT, CHAT),
        (WHOLE_CHAT, CHAT),
        (
            HH,  # as in HH the prompt ends with the colon, and the answers keep their space
            {
                "prompt": "\n\nHuman: Colour of the sky?\n\nAssistant:",
                "chosen": " It is blue.",
                "rejected": " Green.",
            },
        ),
        # A prompt as text beside whole conversations, as in UltraFeedback: implied once more.
        ({"prompt": "Colour of the sky?", **WHOLE_CHAT, "score_chosen": 8.0}, CHAT),
        ({"prompt": None, **WHOLE_CHAT}, CHAT),
        # The conversations part at the second turn of the assistant, or one ends before.
        (
            {"chosen": [SYSTEM, user("1"), assistant("a"), user("2"), assistant("b")],
             "rejected": [SYSTEM, user("1"), assistant("a"), user("2"), assistant("c")]},
            {"prompt": [SYSTEM, user("1"), assistant("a"), user("2")],
             "chosen": [assistant("b")], "rejected": [assistant("c")]},
        ),
        (
            {"chosen": [user("1"), assistant("a"), user("2"), assistant("b")], "rejected": [user("1"), assistant("a")]},
            {"prompt": [user("1")], "chosen": [assistant("a"), user("2"), assistant("b")],
             "rejected": [assistant("a")]},
        ),
        # Messages keep role and text; an answer may be empty.
        (
            {"prompt": [{**user("1"), "name": None}], "chosen": [assistant("a")], "rejected": [assistant("")]},
            {"prompt": [user("1")], "chosen": [assistant("a")], "rejected": [assistant("")]},
        ),
    ],
    ids=["text", "chat", "whole chat", "hh", "ultrafeedback", "null prompt", "two turns", "continued", "names"],
)  # fmt: skip
def test_every_format(tmp_path: Path, record: Record, expected: Record) -> None:
    (row,) = load(write(tmp_path / "a.jsonl", [record]), eval_share=0.0).rows("train")
    assert content(row) == expected
    assert set(row) == {"prompt", "chosen", "rejected", "key"}


LETTERS = st.text("ab \n", max_size=8)
TURNS = st.lists(st.sampled_from(["a", "b"]), max_size=3)


class TestAgainstTRL:
    @settings(max_examples=500, deadline=None)
    @given(LETTERS, LETTERS, LETTERS)
    @example("a ", "b", "a")  # the space belongs to the answers
    @example("a ", "", "b")  # one continues the other: its last character is left to both
    @example("a", "ab", "aa")  # a shared beginning of the answers goes to the prompt
    def test_implied_text(self, prompt: str, chosen: str, rejected: str) -> None:
        from trl import extract_prompt

        record = {"chosen": prompt + chosen, "rejected": prompt + rejected}
        try:
            row = _row(record)
        except ValueError as error:
            shorter = min(record.values(), key=len)
            blank = not extract_prompt(record)["prompt"].strip() if shorter else True
            # TRL, when the first characters differ, looks for a space before them, at the end of the text.
            assert record["chosen"] == record["rejected"] or record["chosen"][:1] != record["rejected"][:1] or blank
            assert "equal" in str(error) or "no prompt" in str(error)
            return
        assert content(row) == extract_prompt(record)

    @settings(max_examples=300, deadline=None)
    @given(TURNS, TURNS, TURNS)
    def test_implied_turns(self, prompt: list[str], chosen: list[str], rejected: list[str]) -> None:
        from trl import extract_prompt

        record = {
            name: [(user, assistant)[i % 2](text) for i, text in enumerate(prompt + answer)]
            for name, answer in (("chosen", chosen), ("rejected", rejected))
        }
        try:
            row = _row(record)
        except ValueError:
            if record["chosen"] and record["rejected"] and record["chosen"] != record["rejected"]:
                cut = extract_prompt(record)
                answers = (cut["chosen"], cut["rejected"])
                assert not cut["prompt"] or any(a[0]["role"] == "user" or a[-1]["role"] == "user" for a in answers)
            return
        assert content(row) == extract_prompt(record)

    def test_the_trainer_takes_the_rows(self, tmp_path: Path, tiny_model: str) -> None:
        """Text with an implied prompt, through this task and through TRL alone: the same tokens."""
        import datasets
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import DPOConfig, DPOTrainer

        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        records = [{"chosen": f"^{i}7={i}?{i}+7", "rejected": f"^{i}7={i}?{i}-7"} for i in range(5)]
        rows = load(write(tmp_path / "a.jsonl", records), eval_share=0.0).rows("train")

        def tokenized(data: list[Record]) -> list[tuple[Any, ...]]:
            trainer = DPOTrainer(
                model=AutoModelForCausalLM.from_pretrained(tiny_model),
                args=DPOConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, report_to=[]),
                train_dataset=datasets.Dataset.from_list(data),
                processing_class=tokenizer,
            )
            return [(r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]) for r in trainer.train_dataset]

        first = tokenized(rows)
        assert first == tokenized(records)
        assert ["".join(tokenizer.convert_ids_to_tokens(ids)) for ids in first[3]] == ["^37=3?3", "+7<eos>", "-7<eos>"]


# ---------------------------------------------------------------- bad rows


BAD: list[tuple[Any, str]] = [
    ("{'chosen': 1}\n", "not valid JSON"),
    ({"prompt": "1+1=", "chosen": "2", "reject": "3"}, "there is no column 'rejected'; did you mean 'reject'"),
    ({"prompt": "1+1=", "chosen": None, "rejected": "3"}, "chosen is None, neither text nor a list of messages"),
    ({"prompt": "1+1=", "chosen": "2", "rejected": 3}, "rejected is 3, neither text"),
    ({"prompt": "1+1=", "chosen": "2", "rejected": "2"}, "chosen and rejected are equal"),
    ({"prompt": " ", "chosen": "2", "rejected": "3"}, "there is no prompt: the column is empty"),
    ({"chosen": "2", "rejected": "3"}, "there is no prompt: the column is empty, or chosen and rejected begin"),
    ({"chosen": "", "rejected": "3"}, "there is no prompt"),
    ({"prompt": "1+1=", "chosen": "2", "rejected": "\ud800"}, "'utf-8' codec"),
    ({"prompt": "1+1=", "chosen": "2", "rejected": [assistant("3")]}, "one of chosen and rejected is text"),
    ({"prompt": [user("1")], "chosen": "2", "rejected": "3"}, "the prompt is a list of messages, the answers are text"),
    ({**STANDARD, "tools": "[{}]"}, "it has tools, which this task cannot carry"),
    ({**STANDARD, "images": [{}]}, "it has images, which this task cannot carry"),
]
BAD_CHAT: list[tuple[Any, str]] = [
    ({**CHAT, "chosen": [{"role": "assistant"}]}, "chosen holds {'role': 'assistant'}, which is no message"),
    ({**CHAT, "chosen": ["2"]}, "chosen holds '2', which is no message"),
    ({**CHAT, "chosen": []}, "chosen is [], neither text nor a list of messages"),
    ({**CHAT, "prompt": []}, "prompt is [], neither text nor a list of messages"),
    ({**CHAT, "chosen": [user("Blue.")]}, "chosen does not begin and end with the assistant but reads user"),
    ({**CHAT, **WHOLE_CHAT}, "chosen does not begin and end with the assistant but reads user, assistant"),
    (
        {**CHAT, "rejected": [assistant("a"), user("b")]},
        "rejected does not begin and end with the assistant but reads assistant, user",
    ),
    (
        {**CHAT, "rejected": [assistant("a"), assistant("b")]},
        "two messages of the role assistant follow each other in prompt and rejected",
    ),
    (
        {**CHAT, "prompt": [user("1"), user("2")]},
        "two messages of the role user follow each other in prompt and chosen",
    ),
    (
        {**CHAT, "prompt": [user("1"), assistant("2")]},
        "two messages of the role assistant follow each other in prompt and chosen",
    ),
    ({"prompt": "Colour?", "chosen": [assistant("Blue.")], "rejected": [assistant("Green.")]}, "there is no prompt"),
    (STANDARD, "the row is made of text, the rows before of messages"),
]


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [(sums(2), *case) for case in BAD]
    + [([CHAT, {**CHAT, "prompt": [user("Why?")]}], *case) for case in BAD_CHAT]
    + [(sums(2), CHAT, "the row is made of messages, the rows before of text")],
    ids=lambda value: ascii(value)[:40] if isinstance(value, str) else "",
)
def test_bad_rows_are_located_or_skipped(tmp_path: Path, good: list[Record], bad: Any, message: str) -> None:
    data = write(tmp_path / "train.jsonl", [good[0], bad, good[1]])
    with pytest.raises(UserError) as error:
        load(data, eval_share=0.0).rows("train")
    assert str(error.value).startswith(f"{data}, line 2: {message}")
    assert str(error.value).endswith("correct the row or set on_bad_row to skip.")
    with pytest.warns(UserWarning, match="bad rows skipped: 1, the first at .*line 2"):
        rows = load(data, eval_share=0.0, on_bad_row="skip").rows("train")
    assert [row["prompt"] for row in rows] == [record["prompt"] for record in good]


def test_no_rows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no training rows \(bad rows skipped: 0\)"):
        load(write(tmp_path / "empty.jsonl", ["\n"])).rows("train")
    with pytest.raises(UserError, match="has no evaluation rows beside 2 training rows"):
        load(write(tmp_path / "some.jsonl", sums(2)), eval_share=0.001).rows("train")


# ---------------------------------------------------------------- splits and keys


def test_all_rows_of_a_prompt_fall_into_one_split(tmp_path: Path) -> None:
    records = [{**record, "chosen": record["chosen"] + "!" * n} for n in range(3) for record in sums(200)]
    task = load(write(tmp_path / "a.jsonl", records), eval_share=0.3)
    train, evaluation = task.rows("train"), task.rows("eval")
    assert len(train) + len(evaluation) == 600 == len({row["key"] for row in train + evaluation})
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in evaluation}
    share = len(evaluation) / 600
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 200) ** 0.5, "four standard deviations of a share of 200 prompts"
    assert [content(row) for row in train] == [
        {name: r[name] for name in ("prompt", "chosen", "rejected")}
        for r in records
        if split_of(digest([user(r["prompt"])]), 0.3) == "train"
    ], "in the order of the data"


def test_the_split_follows_the_normalised_prompt(tmp_path: Path) -> None:
    """A prompt as text and as one message of the user, in another case and with other spaces, is one prompt."""
    splits = []
    for name, prompt in (("a", "What  is 1+1?"), ("b", " what is\u00a01+1? "), ("c", [user("WHAT IS 1+1?")])):
        text = isinstance(prompt, str)
        records = [{"prompt": prompt, "chosen": "2", "rejected": "3"} if text else {**CHAT, "prompt": prompt}]
        records += sums(40) if text else [{**CHAT, "prompt": [user(f"{i}+1=")]} for i in range(40)]
        task = load(write(tmp_path / f"{name}.jsonl", records), eval_share=0.5)
        splits.append("eval" if task.rows("eval")[0]["prompt"] == prompt else "train")
    assert len(set(splits)) == 1


def test_equal_rows_are_dropped_and_counted_and_reversed_ones_are_not(tmp_path: Path) -> None:
    reversed_rows = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in sums(1)]
    task = load(write(tmp_path / "a.jsonl", [*sums(3), *sums(2), *reversed_rows]), eval_share=0.0)
    with pytest.warns(UserWarning, match="dropped because an equal one had occurred before: 2"):
        rows = task.rows("train")
    assert [row["chosen"] for row in rows] == ["1", "2", "3", "2"]


def test_it_says_what_it_is(tmp_path: Path) -> None:
    task = load(write(tmp_path / "a.jsonl", sums(40)))
    assert task.verifier is None
    assert type(task).pairs is True
    assert len(registry.entry("task", "preferences").summary) > 20
    assert pickle.loads(pickle.dumps(task)).rows("eval") == task.rows("eval")  # noqa: S301 - our own bytes


# ---------------------------------------------------------------- sources


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    for name, records in (("text", sums(40)), ("chat", [{**CHAT, "prompt": [user(f"{i}?")]} for i in range(40)])):
        path = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
        jsonl = write(tmp_path / f"{name}.jsonl", records)
        splits: tuple[Split, ...] = ("train", "eval")
        for split in splits:
            assert load(str(path)).rows(split) == load(jsonl).rows(split) != []
    bad = tmp_path / "bad.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*sums(3), {"prompt": "?"}]), bad)
    with pytest.raises(UserError, match=r"bad\.parquet, row 4: chosen is None"):
        load(str(bad)).rows("train")


def test_mistakes_in_options(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", sums(3))
    with pytest.raises(UserError, match=r"finds no file 'nowhere\.jsonl': correct the path"):
        load("nowhere.jsonl")
    with pytest.raises(UserError, match="eval_share has no effect beside a split for evaluation"):
        load("some/data", eval_split="test", eval_share=0.2)
    for option in ("config", "train_split", "eval_split", "revision"):
        with pytest.raises(UserError, match=f"{option} has no effect on a single file: remove it, or name the file's"):
            load(data, **{option: "x"})


class TestHub:
    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
        import datasets

        calls: list[tuple[Any, ...]] = []

        def load_dataset(name: str, config: str | None, *, split: str, revision: str | None) -> datasets.Dataset:
            calls.append((name, config, split, revision))
            if split == "nowhere":
                raise ValueError("Unknown split 'nowhere'.\nMore.")
            return datasets.Dataset.from_list(sums(20) if split == "train" else sums(10, start=15))

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    def test_one_split(self, asked: list[tuple[Any, ...]]) -> None:
        task = load("some/data", eval_share=0.3, config="main", revision="abc")
        assert asked == [], "nothing is loaded before rows are asked for"
        assert len(task.rows("train")) + len(task.rows("eval")) == 20
        assert asked == [("some/data", "main", "train", "abc")]

    def test_a_prompt_in_both_splits_stays_in_evaluation(self, asked: list[tuple[Any, ...]]) -> None:
        task = load("some/data", eval_split="test")
        with pytest.warns(UserWarning, match="an equal one had occurred before: 5"):
            assert [row["prompt"] for row in task.rows("train")] == [f"{i}+1=" for i in range(15)]
        assert [row["prompt"] for row in task.rows("eval")] == [f"{i}+1=" for i in range(15, 25)]
        assert [call[2] for call in asked] == ["test", "train"]

    def test_mistakes(self, asked: list[tuple[Any, ...]]) -> None:
        with pytest.raises(UserError, match=r"\[nowhere\] cannot be loaded .ValueError: Unknown split 'nowhere'\): "):
            load("some/data", train_split="nowhere").rows("train")

    def test_a_folder_is_loaded_for_real(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        folder = tmp_path / "data"
        other_answers = [{**record, "chosen": record["chosen"] + "."} for record in sums(10, start=25)]
        write(folder / "train.jsonl", sums(30))
        write(folder / "test.jsonl", other_answers)
        task = load(str(folder), eval_split="test")
        with pytest.warns(UserWarning, match="training rows dropped because their prompt is held out .*: 5"):
            assert [row["prompt"] for row in task.rows("train")] == [f"{i}+1=" for i in range(25)]
        assert [row["chosen"] for row in task.rows("eval")] == [f"{i + 1}." for i in range(25, 35)]


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", sums(40))
    script = (
        "import sys; from posttrain import tasks; "
        f"tasks.load('preferences', {{'name': {data!r}}}).rows('train'); "
        "print(sorted({'torch', 'transformers', 'trl', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_good_data_gives_no_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load(write(tmp_path / "a.jsonl", sums(40)), eval_share=0.0).rows("train")) == 40
