"""`posttrain score`: lines in, verdicts out in order, all or nothing, and one sentence for every mistake."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from posttrain import rewards
from posttrain.cli import app, score
from posttrain.cli.listing import settings_of
from posttrain.registry import Entry, entry
from tests.patience import eventually
from tests.test_cli import HEAVY, plain

LINES: list[dict[str, Any]] = [
    {"completion": "The answer is 5.", "answer": "5", "id": 1},
    {"completion": "x = 5", "answer": "5"},
    {"completion": [{"role": "assistant", "content": "6"}], "answer": "6"},
    {"completion": "", "answer": "5"},
    {"completion": "5", "answer": ""},
    {"completion": "\ud800\x00", "answer": "5"},
]
STATUSES = ["wrong", "ok", "ok", "no_answer", "unparseable_gold", "wrong"]


def call(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, ["score", *arguments], input=stdin)


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
    return path


def verdicts(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


class TestVerdicts:
    def test_one_per_line_in_order(self, answers: Path) -> None:
        result = call("--reward", "exact", "--option", "after='='", "--input", str(answers))
        assert result.exit_code == 0, result.stderr
        found = verdicts(result.stdout)
        assert [each["status"] for each in found] == STATUSES
        assert [each["reward"] for each in found] == [0.0, 1.0, 1.0, 0.0, None, 0.0]
        assert found[1]["answer"] == "5" and found[4]["detail"] == "the answer is empty"
        assert all(list(each) == ["reward", "status", "answer", "detail", "seconds"] for each in found)
        verifier = rewards.load("exact", {"after": "="})
        direct = verifier.score([line["completion"] for line in LINES], LINES)
        assert [(each["reward"], each["answer"]) for each in found] == [(v.reward, v.answer) for v in direct]

    def test_a_summary_goes_to_standard_error(self, answers: Path) -> None:
        result = call("--reward", "exact", "--option", "after='='", "--input", str(answers))
        table = {line.split()[0]: line.split()[1:] for line in result.stderr.splitlines()}
        assert table["wrong"] == ["2", "33.3%"] and table["unparseable_gold"] == ["1", "16.7%"]
        assert table["completions"] == ["6", "1", "without", "a", "reward"]
        assert table["mean"] == ["reward", "0.4000"]  # 2 of the 5 that have one
        assert float(table["p50"][0]) <= float(table["p99"][0])

    def test_a_file_is_written_whole(self, answers: Path, tmp_path: Path) -> None:
        out = tmp_path / "new" / "verdicts.jsonl"
        result = call("--reward", "exact", "--input", str(answers), "--output", str(out))
        assert (result.exit_code, result.stdout) == (0, "")
        assert len(verdicts(out.read_text())) == 6
        assert list(out.parent.iterdir()) == [out]

    def test_standard_input(self, answers: Path) -> None:
        result = call("--reward", "exact", "--option", "after='='", "--input", "-", stdin=answers.read_text())
        assert [each["status"] for each in verdicts(result.stdout)] == STATUSES

    def test_another_column_and_a_worker(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(json.dumps({"text": rf"\boxed{{{x}}}", "answer": "x+1"}) for x in ("1+x", "x")))
        result = call(
            "--reward", "math", "--option", "deadline=60.0", "--jobs", "1", "--completion", "text", "--input", str(path)
        )
        assert [each["reward"] for each in verdicts(result.stdout)] == [1.0, 0.0]

    def test_chunks_hold_whole_groups(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Chunks of 4 would cut groups of 3: λ = ½ − (n − 1)/2 for 1, 2 and 3 tokens, in every group."""
        monkeypatch.setattr(score, "CHUNK", 4)
        lines = [
            {"completion": "5", "answer": "5", "key": f"row {i // 3}", "completion_ids": [0] * (1 + i % 3)}
            for i in range(30)
        ]
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
        options = ["--option", "shape=group_relative", "--option", "verifier=exact", "--option", "group_size=3"]
        result = call("--reward", "length", *options, "--input", str(path))
        assert [each["reward"] for each in verdicts(result.stdout)] == [0.5, 0.0, -0.5] * 10
        path.write_text("\n".join(map(json.dumps, lines[:29])))
        result = call("--reward", "length", *options, "--input", str(path))
        assert (result.exit_code, result.stdout) == (2, "") and "but was given 2 together" in result.stderr

    def test_thousands_of_lines(self, tmp_path: Path) -> None:
        path, out = tmp_path / "a.jsonl", tmp_path / "v.jsonl"
        path.write_text(
            "".join(json.dumps({"completion": str(i), "answer": str(i // 2 * 2)}) + "\n" for i in range(3000))
        )
        assert call("--reward", "exact", "--input", str(path), "--output", str(out)).exit_code == 0
        assert [each["answer"] for each in verdicts(out.read_text())] == [str(i) for i in range(3000)]


class TestRefusals:
    @pytest.mark.parametrize(
        ("line", "sentence"),
        [
            ("{", "line 3, is no JSON (it goes on over several lines, which jq -c puts into one"),
            ('{"completion" "5"}', "is no JSON (Expecting ':' delimiter at character 15)"),
            ("[1]", "line 3, is a list: every line must be one JSON object"),
            ("", "line 3, is blank"),
            ("[" * 100_000, "line 3, is no JSON ("),
            (
                '{"completion": "5"}',
                "line 3, lacks the column 'answer', which the reward 'exact' needs; known: completion",
            ),
            (
                '{"completions": "5", "answer": "5"}',
                "lacks the column 'completion', which holds the completions (--completion)",
            ),
            (
                '{"completion": 5, "answer": "5"}',
                "line 3, has 5 as its completion: give a text or a list of chat messages",
            ),
            ('{"completion": [{"content": "5"}], "answer": "5"}', "line 3, has [{'content': '5'}] as its completion"),
        ],
        ids=range(9),
    )
    def test_a_bad_line_is_named_before_anything_is_judged(self, answers: Path, line: str, sentence: str) -> None:
        lines = answers.read_text().splitlines()
        answers.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
        out = answers.with_name("verdicts.jsonl")
        out.write_text("old\n")
        result = call("--reward", "exact", "--input", str(answers), "--output", str(out))
        assert result.exit_code == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        assert sentence in result.stderr
        assert out.read_text() == "old\n" and len(list(out.parent.iterdir())) == 2

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--reward", "exakt"], "There is no reward 'exakt'; did you mean 'exact'?"),
            (["--reward", "exact", "--option", "aftr=x"], "has no option 'aftr'; did you mean 'after'?"),
            (["--reward", "exact", "--option", "after"], "--option takes key=value, not 'after'"),
            (["--reward", "exact", "--option", "after=a", "--option", "after=b"], "--option after is given twice"),
            (
                ["--reward", "exact", "--option", "ignore_case=1"],
                "The option 'ignore_case' of the reward 'exact' is wrong",
            ),
            (
                ["--reward", "exact", "--jobs", "2"],
                "--jobs has no effect: the reward 'exact' needs no worker processes",
            ),
            (["--reward", "exact", "--output", "/proc/no/file"], "/proc/no/file cannot be written ("),
            (["--reward", "repetition", "--option", "unit=tokens"], "line 1, lacks the column 'completion_ids'"),
        ],
    )
    def test_mistakes_are_one_sentence(self, answers: Path, arguments: list[str], sentence: str) -> None:
        result = call(*arguments, "--input", str(answers))
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert result.stderr.startswith("error: ") and sentence in result.stderr

    def test_files(self, answers: Path, tmp_path: Path) -> None:
        empty = tmp_path / "empty.jsonl"
        empty.write_text("")
        for source, target, sentence in [
            (str(empty), "-", "empty.jsonl holds no completion: give one JSON object per line"),
            (
                str(tmp_path / "none.jsonl"),
                "-",
                "none.jsonl cannot be read (No such file or directory): correct --input",
            ),
            (str(tmp_path), "-", "cannot be read (Is a directory)"),
            (str(answers), str(answers), "--input and --output are both"),
        ]:
            result = call("--reward", "exact", "--input", source, "--output", target)
            assert result.exit_code == 2 and sentence in result.stderr
        assert len(answers.read_text().splitlines()) == 6

    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            (
                gzip.compress(b'{"completion": "5", "answer": "5"}\n'),
                "no JSON (it is compressed, which gzip -dc undoes)",
            ),
            (b"PAR1\x15\x04", "no JSON (it is Parquet)"),
            ('{"completion": "é", "answer": "é"}'.encode("latin-1"), "it is not written in UTF-8: "),
            ('{"completion": "5", "answer": "5"}'.encode("utf-16"), "it is not written in UTF-8: "),
            (
                b'[\n{"completion": "5", "answer": "5"}\n]',
                "several lines, which jq -c puts into one, and jq -c '.[]' an",
            ),
            (b"completion,answer\n5,5\n", "no JSON (Expecting value at character 1)"),
            (b"\n\n", "holds no completion"),
        ],
        ids=range(7),
    )
    def test_what_people_have_instead_of_lines(self, tmp_path: Path, content: bytes, sentence: str) -> None:
        path = tmp_path / "a.jsonl"
        path.write_bytes(content)
        result = call("--reward", "exact", "--input", str(path))
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert sentence in result.stderr

    def test_blank_lines_at_the_end_are_none(self, answers: Path) -> None:
        lines = answers.read_text()
        answers.write_text(lines + "\n \n\n")
        assert len(verdicts(call("--reward", "exact", "--input", str(answers)).stdout)) == len(LINES)
        answers.write_text(lines + "\n\n" + lines)
        assert "line 7, is blank" in call("--reward", "exact", "--input", str(answers)).stderr

    def test_where_nothing_can_be_written_is_said_before_anything_is_judged(
        self, answers: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(score, "_score", lambda *_, **__: pytest.fail("it judged"))
        for target, said in ((str(answers.parent), "is the folder "), (".", "is the folder ."), ("", "is empty")):
            result = call("--reward", "exact", "--input", str(answers), "--output", target)
            assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
            assert f"--output {said}" in result.stderr and "name a file, or - for standard output" in result.stderr
        assert "--input is empty: name a file" in call("--reward", "exact", "--input", "").stderr

    def test_pipes_devices_and_links_stay_what_they_are(self, answers: Path, tmp_path: Path) -> None:
        pipe, link, file = (tmp_path / name for name in ("pipe", "link", "verdicts.jsonl"))
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDWR)
        assert call("--reward", "exact", "--input", str(answers), "--output", str(pipe)).exit_code == 0
        assert len(verdicts(os.read(reader, 2**16).decode())) == len(LINES) and pipe.is_fifo()
        os.close(reader)
        file.write_text("old\n")
        link.symlink_to(file)
        assert call("--reward", "exact", "--input", str(answers), "--output", str(link)).exit_code == 0
        assert link.is_symlink() and len(verdicts(file.read_text())) == len(LINES)
        assert call("--reward", "exact", "--input", str(answers), "--output", "/dev/null").exit_code == 0
        assert Path("/dev/null").is_char_device()

    def test_groups_need_a_name(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"completion": "5", "answer": "5", "completion_ids": [1]}\n')
        options = ["--option", "shape=group_relative", "--option", "verifier=exact", "--option", "group_size=2"]
        result = call("--reward", "length", *options, "--input", str(path))
        assert result.exit_code == 2 and "line 1, has neither key nor prompt" in result.stderr


def test_the_help_teaches_by_example() -> None:
    text = plain(call("--help").stdout)
    assert "posttrain score --reward math --input answers.jsonl --output verdicts.jsonl" in text
    assert '{"completion": "So it is \\\\boxed{5}.", "answer": "5"}' in text
    for option in ("--reward", "--input", "--output", "--option", "--completion", "--jobs"):
        assert option in text


def test_nothing_heavy_is_imported_to_judge(answers: Path) -> None:
    code = (
        "import sys\n"
        "from posttrain.cli import main\n"
        f"sys.argv = ['posttrain', 'score', '--reward', 'exact', '--input', {str(answers)!r}]\n"
        "try:\n    main()\n"
        f"finally:\n    print('HEAVY', *sorted(set(sys.modules) & set({HEAVY!r})))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_is_stopped_leaves_no_verdicts(tmp_path: Path, how: signal.Signals) -> None:
    """Stopped while it judges: the old file stays as it was, and a new one never appears."""
    (tmp_path / "slow_reward.py").write_text(
        "import time\nfrom pathlib import Path\nfrom posttrain.rewards import Verifier, Verdict\n"
        "class Slow(Verifier):\n"
        "    name = 'slow'\n"
        "    def verify(self, completion, row):\n"
        f"        Path({str(tmp_path / 'begun')!r}).touch()\n"
        "        time.sleep(0.05)\n"
        "        return Verdict(1.0, 'ok')\n"
    )
    path, out = tmp_path / "a.jsonl", tmp_path / "v.jsonl"
    path.write_text('{"completion": "x"}\n' * 2000)
    out.write_text("old\n")
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from posttrain import rewards\n"
        "import slow_reward\n"
        "rewards.load = lambda *_: slow_reward.Slow()\n"
        "from posttrain.cli import main\n"
        f"sys.argv = ['posttrain', 'score', '--reward', 'slow', '--input', {str(path)!r}, '--output', {str(out)!r}]\n"
        "main()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    try:
        assert eventually((tmp_path / "begun").exists, 300)
        os.kill(process.pid, how)
        _, said = process.communicate(timeout=300)
    finally:
        process.kill()
    assert out.read_text() == "old\n"
    if how is signal.SIGINT:
        assert process.returncode == 130 and "interrupted; nothing was written to a file" in said
        assert not list(tmp_path.glob(".*.tmp"))
    else:
        assert process.returncode == -how


def test_settings_show_types_and_values_and_not_their_names(tmp_path: Path) -> None:
    (options,) = settings_of(entry("reward", "math"))
    (deadline,) = (field for field in options.fields if field.name == "deadline")
    assert deadline.type == "Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]"
    assert deadline.default == " = 5.0"
    shown = CliRunner().invoke(app, ["rewards", "show", "math"]).stdout
    assert "deadline: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] = 5.0" in shown
    path = tmp_path / "made_up.py"
    path.write_text(
        '"""Made up."""\n'
        "from posttrain.rewards import DEADLINE as LIMIT, Verdict\n"
        "from elsewhere import OTHER\n"
        "Size = Annotated[int, Field(gt=0)]\n"
        "MANY: int = 7\n"
        "made = list()\n"
        "class Options(RewardOptions):\n"
        "    limit: float = LIMIT\n"
        "    size: Size | None = Field(MANY, lt=9)\n"
        "    found: Verdict = OTHER\n"
        "    less: int = -MANY\n"
        "    kept: list[Size] = made\n"
    )
    (settings,) = settings_of(Entry("reward", "made_up", "made_up", path))
    assert [(field.name, field.type, field.default) for field in settings.fields] == [
        ("limit", "float", " = 5.0"),
        ("size", "Annotated[int, Field(gt=0)] | None", " = 7"),
        ("found", "Verdict", " = OTHER"),
        ("less", "int", " = -7"),
        ("kept", "list[Annotated[int, Field(gt=0)]]", " = made"),
    ]
