"""The progress bar where there is no terminal: a line now and then, and one at the end."""

from __future__ import annotations

import pytest

from posttrain import progress
from posttrain.progress import Bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, to be moved by hand, on a machine without a terminal."""
    now = [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return now


def test_a_line_every_ten_seconds_and_one_at_the_end(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("presample", 12_000, "prompts") as bar:
        for second in range(1, 24):
            clock[0] = float(second)
            bar.advance(100, detail=f"{second} found")
        bar.to(12_000)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "presample  1,100/12,000 prompts  11 s  11 found",
        "presample  2,200/12,000 prompts  22 s  22 found",
        "presample  12,000/12,000 prompts  23 s  23 found",
    ]


def test_no_detail_leaves_no_blanks_at_the_end(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("train", 2, "steps") as bar:
        bar.advance(2)
    assert capsys.readouterr().err == "train  2/2 steps  0 s\n"


def test_the_other_processes_are_silent(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("presample", 2, "prompts", shown=False) as bar:
        clock[0] = 60.0
        bar.advance(2)
    assert capsys.readouterr().err == ""


def test_failed_work_claims_no_end(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), Bar("presample", 2, "prompts") as bar:
        bar.advance(1)
        raise KeyError
    assert capsys.readouterr().err == ""
