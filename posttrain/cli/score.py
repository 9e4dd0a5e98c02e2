"""`posttrain score`: what a reward says of completions that lie in a file."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from math import ceil
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from posttrain import atomic
from posttrain.cli.console import reported
from posttrain.errors import UserError, did_you_mean
from posttrain.recipe import parse_value

CHUNK = 512
"""Completions that are judged at a time, or the next whole number of groups."""

EXAMPLES = """Examples

[cyan]posttrain score --reward math --input answers.jsonl --output verdicts.jsonl[/]
[cyan]posttrain score --reward math --option percent=value --option deadline=2.0 --input answers.jsonl[/]
[cyan]cat answers.jsonl | posttrain score --reward choice --input - | grep -c '"ok"'[/]
[cyan]posttrain rewards show math[/]     what it takes: options, and how answers are read

A line of answers.jsonl:    {"completion": "So it is \\\\boxed{5}.", "answer": "5"}
A line of verdicts.jsonl:   {"reward": 1.0, "status": "ok", "answer": "5", "detail": "", "seconds": 0.0001}
"""


def command(
    reward: Annotated[
        str, typer.Option("--reward", metavar="NAME", help="A reward of posttrain rewards.", show_default=False)
    ],
    source: Annotated[
        str,
        typer.Option(
            "--input",
            metavar="FILE",
            help="JSON lines: completion (text, or chat messages) and the columns of the reward. - is standard input.",
            show_default=False,
        ),
    ],
    target: Annotated[
        str, typer.Option("--output", metavar="FILE", help="Where the verdicts go. - is standard output.")
    ] = "-",
    assignments: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="An option of the reward, as in YAML; may be repeated."),
    ] = None,
    field: Annotated[
        str, typer.Option("--completion", metavar="COLUMN", help="The column that holds the completion.")
    ] = "completion",
    in_thought: Annotated[
        bool,
        typer.Option(
            "--in-thought",
            help="The prompts ended with <think>: completions begin inside their thought, and one without </think> was "
            "cut off there.",
        ),
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs", metavar="N", min=1, help="Worker processes of a reward that uses them.", show_default="CPUs"
        ),
    ] = None,
) -> None:
    """Judge completions with a verifiable reward: one verdict per line, in the order of the lines.

    Every line is read and checked before the first is judged. An output file appears whole, when all is done: one that
    was interrupted is as if it had never been begun. A pipe or device gets each verdict as it comes. A summary goes to
    standard error.
    """
    from posttrain import rewards

    with reported("interrupted; nothing was written to a file"):
        verifier = rewards.load(reward, _options(assignments))
        _set_jobs(verifier, jobs)
        if target != "-" and source != "-" and Path(target).resolve() == Path(source).resolve():
            raise UserError(f"--input and --output are both {source}: write the verdicts to another file.")
        with _opened(source) as lines, _written(target) as out:
            name = "standard input" if source == "-" else source
            _score(verifier, lines, out, name=name, field=field, in_thought=in_thought)


def _score(verifier: Any, lines: IO[bytes], out: IO[str], *, name: str, field: str, in_thought: bool) -> None:
    """Judge all lines, write their verdicts and print a summary."""
    from posttrain.progress import Bar
    from posttrain.rewards import require_whole_groups

    columns = (*verifier.requires, *verifier.sampled)
    prompts: list[Any] = []
    total = 0
    for total, row in enumerate(_rows(lines, name), start=1):
        _check(row, (field, *columns), verifier.name, field, f"{name}, line {total},")
        if verifier.group_size > 1:
            if "key" not in row and "prompt" not in row:
                raise UserError(
                    f"{name}, line {total}, has neither key nor prompt, by which the reward '{verifier.column}' tells "
                    "groups of answers apart: add one of them."
                )
            prompts.append(row.get("key", row.get("prompt")))
    if not total:
        raise UserError(f"{name} holds no completion: give one JSON object per line.")
    require_whole_groups(verifier, prompts)
    lines.seek(0)
    size = ceil(CHUNK / verifier.group_size) * verifier.group_size
    statuses: Counter[str] = Counter()
    received: list[float] = []
    seconds: list[float] = []
    with Bar(f"score {verifier.column}", total, "completions") as bar:
        for chunk in _chunks(_rows(lines, name), size):
            rows = [{column: row[column] for column in columns} for row in chunk]
            for verdict in verifier.score([verifier.whole(row[field], in_thought) for row in chunk], rows):
                statuses[verdict.status] += 1
                seconds.append(verdict.seconds)
                if verdict.reward is not None:
                    received.append(verdict.reward)
                line = {key: getattr(verdict, key) for key in ("reward", "status", "answer", "detail")}
                out.write(json.dumps({**line, "seconds": round(verdict.seconds, 6)}) + "\n")
            bar.advance(len(chunk))
    _summarise(statuses, received, seconds)


def _summarise(statuses: Counter[str], received: Sequence[float], seconds: list[float]) -> None:
    """The table at the end, on standard error."""
    seconds.sort()
    total = len(seconds)
    rows = [(status, f"{count:,}", f"{count / total:.1%}") for status, count in statuses.most_common()]
    mean = f"{sum(received) / len(received):.4f}" if received else "none"
    without = total - len(received)
    rows += [
        ("completions", f"{total:,}", f"{without:,} without a reward" if without else ""),
        ("mean reward", mean, ""),
        ("p50", f"{1000 * seconds[ceil(0.5 * total) - 1]:.2f} ms", ""),
        ("p99", f"{1000 * seconds[ceil(0.99 * total) - 1]:.2f} ms", ""),
    ]
    first, second = (max(len(row[i]) for row in rows) for i in range(2))
    for label, value, note in rows:
        typer.echo(f"{label.ljust(first)}  {value.rjust(second)}  {note}".rstrip(), err=True)


def _options(assignments: Sequence[str] | None) -> dict[str, Any]:
    """Options by their names.

    Raises:
        UserError: one is no `key=value`, or is given twice.
    """
    found: dict[str, Any] = {}
    for assignment in assignments or ():
        key, equals, value = assignment.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--option takes key=value, not '{assignment}': write for instance --option deadline=2.0.")
        if key in found:
            raise UserError(f"--option {key} is given twice: keep one.")
        found[key] = parse_value(value)
    return found


def _set_jobs(verifier: Any, jobs: int | None) -> None:
    """Have so many workers.

    Raises:
        UserError: the reward has none.
    """
    if jobs is None:
        return
    judge = getattr(verifier, "judge", None) or verifier
    if not judge.isolated:
        raise UserError(f"--jobs has no effect: the reward '{verifier.name}' needs no worker processes; remove it.")
    from posttrain.rewards import _workers

    os.environ[_workers.SIZE] = str(jobs)


@contextmanager
def _opened(source: str) -> Iterator[IO[bytes]]:
    """A file that can be read twice; of standard input, and of what cannot, a copy.

    Raises:
        UserError: it cannot be read.
    """
    if not source:
        raise UserError("--input is empty: name a file, or - for standard input.")
    if source == "-":
        with _copied(sys.stdin.buffer) as copy:
            yield copy
        return
    try:
        file = open(source, "rb")  # noqa: SIM115 - only opening it may fail with that message
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror}): correct --input.") from None
    with file, _copied(file) if not file.seekable() else nullcontext(file) as lines:
        yield lines


@contextmanager
def _copied(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """All that a file gives, in one that is gone with the block."""
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(file, copy)
        copy.seek(0)
        yield copy


@contextmanager
def _written(target: str) -> Iterator[IO[str]]:
    """Standard output, or a file that appears when the block ends and never does when it fails.

    What is there and no file, such as a pipe or /dev/null, is written to and stays what it is; where a link leads is
    replaced, and the link stays.

    Raises:
        UserError: it is a folder, or its folder cannot be written to.
    """
    if target == "-":
        yield sys.stdout
        sys.stdout.flush()
        return
    path = Path(target).resolve()
    if not target or path.is_dir():
        raise UserError(
            f"--output is {f'the folder {target}' if target else 'empty'}: name a file, or - for standard output."
        )
    if path.exists() and not path.is_file():
        with Path(target).open("w", encoding="utf-8") as other:
            yield other
        return
    with ExitStack() as opened:
        try:
            temporary = opened.enter_context(atomic.replacing(path))
            file = opened.enter_context(temporary.open("w", encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{target} cannot be written ({error.strerror}): correct --output.") from None
        yield file


def _rows(lines: IO[bytes], name: str) -> Iterator[dict[str, Any]]:
    """The JSON object of every line; blank lines at the end are none.

    Raises:
        UserError: a line holds something else.
    """
    blank = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            blank = blank or number
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip())
            problem = None if isinstance(row, dict) else f"a {type(row).__name__}"
        except (ValueError, RecursionError) as error:
            row, problem = {}, f"no JSON ({_reason(error, line)})"
        if blank:
            number, problem = blank, "blank"
        if problem is not None:
            raise UserError(f"{name}, line {number}, is {problem}: every line must be one JSON object.")
        yield row


def _reason(error: Exception, line: bytes) -> str:
    """Why a line is no JSON."""
    if line.startswith(b"\x1f\x8b"):
        return "it is compressed, which gzip -dc undoes"
    if line.startswith(b"PAR1"):
        return "it is Parquet"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not written in UTF-8: {error.reason} at byte {error.start + 1}"
    if line.strip() in (b"[", b"{"):
        return "it goes on over several lines, which jq -c puts into one, and jq -c '.[]' an object of a list"
    return f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)


def _check(row: Mapping[str, Any], columns: Sequence[str], reward: str, field: str, place: str) -> None:
    """Refuse a row that lacks something.

    Raises:
        UserError: it does, or its completion is neither text nor messages.
    """
    for column in columns:
        if column not in row:
            needed = "holds the completions (--completion)" if column == field else f"the reward '{reward}' needs"
            raise UserError(f"{place} lacks the column '{column}', which {needed}{did_you_mean(column, row)}")
    completion = row[field]
    if not isinstance(completion, str) and not (
        isinstance(completion, list)
        and completion
        and all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in completion)
    ):
        raise UserError(f"{place} has {completion!r:.60} as its completion: give a text or a list of chat messages.")


def _chunks(rows: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    chunk: list[dict[str, Any]] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
