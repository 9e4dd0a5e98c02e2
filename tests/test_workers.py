"""Worker processes: what a hostile completion costs, from wherever one judges, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from posttrain import recipe as recipes
from posttrain import rewards, tasks
from posttrain.errors import UserError
from posttrain.launch.pipeline import reward_functions
from posttrain.rewards import RewardFunction, Verdict, Verifier, _workers, _zygote
from tests.hostile import Hostile, Local, Needs, Options, Plain, RowFirst, Strange, hangs
from tests.patience import SOON, eventually, gone, patient
from tests.processes import ROOT, launch
from tests.two_judges import WORDS

DEADLINE = 0.5
IMPATIENT = _workers._Judgement


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold to its deadline what hangs, and nothing that a busy machine leaves waiting."""
    monkeypatch.setattr(_workers, "_Judgement", patient(hangs))
    Hostile(Options()).score(["a"], [{}])  # which begins the processes


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the pool's clock is fast, to be moved by hand."""
    fast = [0.0]
    monkeypatch.setattr(_workers, "monotonic", lambda: time.monotonic() + fast[0])
    monkeypatch.setattr(_workers, "_Judgement", IMPATIENT)
    return fast


@pytest.fixture(scope="module")
def alone() -> Iterator[_workers.Pool]:
    """A pool of one worker, which is given up to sixteen items at a time however few there are."""
    pool = _workers.Pool(1)
    pool.chunk_of = lambda items: _workers.CHUNK  # type: ignore[method-assign]
    pool.judge(Hostile(Options()), ["a"], [{}])
    yield pool
    pool.close()


def score(words: Sequence[str], verifier: Verifier | None = None) -> list[Verdict]:
    return (verifier or Hostile(Options())).score(words, [{}] * len(words))


def of_this_process() -> list[psutil.Process]:
    """The zygote and its workers."""
    pool = _workers._pool
    if pool is None or pool._zygote is None:
        return []
    zygote = psutil.Process(pool._zygote.process.pid)
    return [zygote, *zygote.children(recursive=True)]


def at_work(zygote: int) -> bool:
    """Whether a worker is in the middle of something."""
    return any(worker.cpu_times().user > 0.1 for worker in psutil.Process(zygote).children())


# ------------------------------------------------------------------ what an item costs

HOSTILE = {
    "sleep 60": (0.0, "timeout"),
    "loop": (0.0, "timeout"),
    "power": (0.0, "timeout"),  # one operation in C, which no signal interrupts
    "deaf": (0.0, "timeout"),
    "stop": (0.0, "timeout"),
    "drip": (None, "verifier_error"),
    "kill SIGKILL": (None, "verifier_error"),  # as the kernel does when memory runs out, whoever has taken it
    "kill SIGTERM": (None, "verifier_error"),
    "segfault": (None, "verifier_error"),
    "exit 0": (None, "verifier_error"),
    "exit 1": (None, "verifier_error"),
    "close": (None, "verifier_error"),
    "linger": (None, "verifier_error"),  # the kill that follows is ours, and says nothing about memory
    "raise x": (None, "verifier_error"),
    "recurse": (None, "verifier_error"),
    "nonsense": (None, "verifier_error"),
    "long": (None, "verifier_error"),
    "bytes": (None, "verifier_error"),
}


@pytest.mark.parametrize("word", HOSTILE)
def test_an_item_costs_itself_and_no_neighbour(alone: _workers.Pool, word: str) -> None:
    start = time.perf_counter()
    before, found, *after = alone.judge(Hostile(Options()), ["a", word, "b", "c"], [{}] * 4)
    assert time.perf_counter() - start < SOON
    assert (found.reward, found.status) == HOSTILE[word], found
    assert [(verdict.answer, verdict.status) for verdict in (before, *after)] == [("a", "ok"), ("b", "ok"), ("c", "ok")]


def test_items_are_done_in_order_around_several_that_are_killed(alone: _workers.Pool) -> None:
    words = ["loop", "a", "exit 1", "kill SIGKILL", "b", "raise x", "c", "sleep 60", "d"]
    found = alone.judge(Hostile(Options()), words, [{}] * len(words))
    statuses = ["timeout", "ok", "verifier_error", "verifier_error", "ok", "verifier_error", "ok", "timeout", "ok"]
    assert [verdict.status for verdict in found] == statuses
    assert [verdict.answer for verdict in found if verdict.status == "ok"] == ["a", "b", "c", "d"]
    assert found[0].seconds == DEADLINE and found[0].detail == "more than 0.5 s"
    assert found[2].detail == "two workers were lost: exit status 1"
    assert found[3].detail == "two workers were lost: SIGKILL, probably for want of memory"
    assert found[5].detail == "ValueError: x"


def test_memory_is_bounded() -> None:
    found = score(["a", "memory", "b", "hoard", "c"], Hostile(Options(deadline=30.0)))
    assert [verdict.status for verdict in found] == ["ok", "resource", "ok", "ok", "ok"]
    assert found[1] == Verdict(0.0, "resource", None, "more memory than a worker may take", found[1].seconds)
    # Whoever holds much of what it may take is replaced: its next item would be refused what it needs.
    assert all(child.memory_info().rss < _zygote.MEMORY // 2 for child in of_this_process())


def test_the_deadline_is_each_items_own(
    alone: _workers.Pool, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """150 s go by before whatever the worker says, of the 200 s that each item has, and each row before it."""
    hear, heard = _workers._Worker.hear, []

    def slowly(self: _workers._Worker) -> Iterator[Any]:
        for message in hear(self):
            clock[0] += 150.0
            heard.append(message)
            yield message

    monkeypatch.setattr(_workers._Worker, "hear", slowly)
    options = Options(deadline=200.0)
    found = alone.judge(Hostile(options), ["sleep 0.1"] * 5, [{}] * 5)  # in one worker and one message
    assert {verdict.status for verdict in found} == {"ok"} and len(heard) == 6  # with the word that it begins
    assert all(verdict.seconds >= 0.1 for verdict in found)
    found = alone.judge(RowFirst(options), ["sleep 0.1"] * 2, [{"row": "sleep 0.1"}] * 2)
    assert {verdict.status for verdict in found} == {"ok"} and len(heard) == 6 + 5  # and when it begins a completion


def test_a_trainer_that_sleeps_accuses_nobody(
    alone: _workers.Pool, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was said in time is heard, however late: here always 1000 s after it was said."""
    select = _workers.selectors.PollSelector.select

    def late(self: Any, timeout: float | None = None) -> Any:
        said = select(self, 2 * SOON)
        clock[0] += 1000.0
        return said

    monkeypatch.setattr(_workers.selectors.PollSelector, "select", late)
    words = ["a", "sleep 0.1", "b", "c"]
    found = alone.judge(Hostile(Options()), words, [{}] * 4)
    assert [(verdict.answer, verdict.status) for verdict in found] == [(word, "ok") for word in words]


def test_a_row_that_hangs_is_no_fault_of_the_completion() -> None:
    words = [
        ("a", "b"),
        ("loop", "b"),
        ("a", "loop"),
        ("kill SIGKILL", "b"),
        ("a", "kill SIGKILL"),
        ("sleep 0.1", "sleep 0.1"),
    ]
    found = RowFirst(Options()).score([word for _, word in words], [{"row": row} for row, _ in words])
    assert [(verdict.reward, verdict.status) for verdict in found] == [
        (1.0, "ok"), (None, "unparseable_gold"), (0.0, "timeout"), (None, "verifier_error"), (None, "verifier_error"),
        (1.0, "ok"),
    ]  # fmt: skip
    assert found[1].detail == "the row: more than 0.5 s"


def test_texts_rows_and_verdicts_survive_the_way() -> None:
    text = "a\x00b\ud800 \U0001f600\n\"'\\"
    row = {"column": {"x": [1, 2.5, None, True, "\udfff"]}, "other": object()}
    found, absent = Needs(Options()).score([text, [{"role": "assistant", "content": text}]], [row, {}])
    assert (found.answer, found.detail) == (text, repr({"column": row["column"]}))  # of the row, what is required
    assert (absent.answer, absent.detail) == (text, "{}")
    (large,) = score(["large 1000000"])
    assert (large.reward, large.status) == (0.5, "wrong")
    assert (len(large.answer or ""), len(large.detail)) == (_zygote.MAX_ANSWER, _zygote.MAX_DETAIL)
    (long,) = score(["x" * 3_000_000])
    assert long.answer == "x" * _zygote.MAX_ANSWER


def test_a_row_that_cannot_be_sent_has_no_reward_and_stops_nobody() -> None:
    found = Needs(Options()).score(["a", "b", "c"], [{"column": 1}, {"column": {1, 2}}, {"column": "z"}])
    assert [(verdict.reward, verdict.status) for verdict in found] == [
        (1.0, "ok"),
        (None, "verifier_error"),
        (1.0, "ok"),
    ]
    assert "the row holds what a worker cannot be sent" in found[1].detail


def test_what_can_be_decided_at_once_needs_no_worker() -> None:
    _workers.close()
    assert score(["at once"] * 3)[0].answer == str(os.getpid())
    assert _workers._pool is None
    assert [verdict.answer for verdict in score(["a", "at once", "b"])] == ["a", str(os.getpid()), "b"]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ([2.0, "ok", None, "", 0.1], "length"),
        ([float("nan"), "ok", None, "", 0.1, False], "reward"),
        (["1", "ok", None, "", 0.1, False], "reward"),
        ([1.0, "fine", None, "", 0.1, False], "status"),
        ([1.0, ["ok"], None, "", 0.1, False], "status"),
        ([1.0, "ok", 5, "", 0.1, False], "answer"),
        ([1.0, "ok", None, None, 0.1, False], "detail"),
        ([1.0, "ok", None, "", "0", False], "seconds"),
        ([1.0, "ok", None, "", 0.1, 0], "spent"),
        ({"reward": 1.0}, "no list"),
    ],
)
def test_what_a_worker_says_is_checked(message: Any, reason: str) -> None:
    with pytest.raises(ValueError):
        _workers._read_verdict(message)
    assert _workers._read_verdict([1, "ok", "5", "", 0.1, False]) == (Verdict(1.0, "ok", "5", "", 0.1), False)


# ------------------------------------------------------------------ what a worker is


def test_a_worker_holds_no_torch_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    _workers.close()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TZ", "UTC")
    environment, torch, main = score(["environment", "modules torch", "modules tests.test_workers"])
    names = set((environment.answer or "").split(","))
    assert {"PATH", "TZ", "PYTHONHASHSEED", "OMP_NUM_THREADS"} <= names
    assert not {"HF_TOKEN", "RANK"} & names
    assert (torch.answer, main.answer) == ("False", "False")
    _workers.close()


def test_a_worker_is_where_the_trainer_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert score(["folder"])[0].answer == os.getcwd()
    monkeypatch.chdir(tmp_path)
    assert score(["folder"])[0].answer == str(tmp_path)


def test_within_a_worker_a_verifier_judges_there() -> None:
    (found,) = score(["nested"])
    worker, zygote, group = map(int, (found.answer or "").split())
    assert {worker, zygote} <= {child.pid for child in of_this_process()}
    assert group == worker


def test_verifiers_share_the_workers_and_keep_their_options() -> None:
    plain, local, echo = score(["a"], Plain()), score(["a"], Local(Strange(several=(3, 4)))), score(["a"])
    assert local[0].answer == "(3, 4)"
    assert echo[0].answer == "a"
    assert int(plain[0].answer or 0) != os.getpid()
    assert {child.ppid() for child in of_this_process()[1:]} == {of_this_process()[0].pid}
    assert Plain().deadline == rewards.DEADLINE == 5.0
    copy = pickle.loads(pickle.dumps(Hostile(Options(deadline=0.25))))  # noqa: S301 - our own bytes
    assert score(["sleep 60"], copy)[0].detail == "more than 0.25 s"


def test_a_worker_is_replaced_after_so_many_items(alone: _workers.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    alone.judge(Hostile(Options()), ["exit 1"], [{}])
    monkeypatch.setattr(_workers, "RECYCLE", 3)
    found = [alone.judge(Hostile(Options()), ["who"] * 2, [{}] * 2)[0].answer for _ in range(3)]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("cpus", "beside", "given", "expected"),
    [(8, None, None, 8), (8, "4", None, 2), (2, "4", None, 1), (8, "4", "5", 5), (8, "nonsense", None, 8)],
)
def test_workers_are_as_many_as_cpus(
    monkeypatch: pytest.MonkeyPatch, cpus: int, beside: str | None, given: str | None, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)))
    for name, value in (("LOCAL_WORLD_SIZE", beside), (_workers.SIZE, given)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert _workers.size() == expected


@pytest.mark.parametrize("given", ["0", "-1", "two", ""])
def test_a_senseless_number_of_workers_is_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv(_workers.SIZE, given)
    with pytest.raises(UserError, match=f"POSTTRAIN_REWARD_WORKERS is '{given}': set it to"):
        _workers.size()


def test_a_verifier_that_another_process_cannot_import_is_refused() -> None:
    class Inner(Plain):
        pass

    with pytest.raises(UserError, match=r"Inner of the reward 'plain' is defined in a function.*top of a module"):
        score(["a"], Inner())


# ------------------------------------------------------------------ failures that are nobody's answer


@pytest.mark.parametrize(("start", "reason"), [("fail", "RuntimeError: not today"), ("die", "is gone")])
def test_a_verifier_that_cannot_be_prepared_has_no_reward(start: str, reason: str) -> None:
    found = score(["a", "b", "at once"], Hostile(Options(start=start)))
    assert [(verdict.reward, verdict.status) for verdict in found[:2]] == [(None, "verifier_error")] * 2
    assert "the reward 'hostile' cannot be built in a worker" in found[0].detail and reason in found[0].detail
    assert found[2].reward == 1.0
    assert score(["a"])[0].reward == 1.0  # others go on


def test_a_pool_that_does_not_start_has_no_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    _workers.close()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/nowhere/python")
        (found,) = score(["a"])
    assert (found.reward, found.status) == (None, "verifier_error")
    assert "does not start: [Errno 2]" in found.detail
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", ["/nowhere"])
        patch.setattr(sys, "executable", sys.base_prefix + "/bin/python3")  # without what the environment has
        (found,) = score(["a"])
    assert found.status == "verifier_error" and "No module named" in found.detail
    assert score(["a"])[0].reward == 1.0


def test_workers_come_back_when_somebody_else_has_killed_them() -> None:
    (found,) = score(["who"])
    worker, zygote, _ = map(int, (found.answer or "").split())
    os.kill(worker, signal.SIGKILL)
    assert score(["a", "b"])[1].answer == "b"
    os.kill(zygote, signal.SIGKILL)
    assert eventually(lambda: gone(zygote))  # until then, its workers go on
    assert [verdict.answer for verdict in score(["a", "b", "c"])] == ["a", "b", "c"]
    assert str(zygote) not in (score(["who"])[0].answer or "").split()


def test_items_under_way_are_judged_again_when_the_zygote_is_killed() -> None:
    (found,) = score(["who"])
    zygote = int((found.answer or "").split()[1])
    timer = threading.Timer(0.2, os.kill, (zygote, signal.SIGKILL))
    timer.start()
    found = score(["sleep 0.4", "a", "sleep 0.4", "b"], Hostile(Options(deadline=20)))
    timer.join()
    assert [verdict.status for verdict in found] == ["ok"] * 4


def test_items_under_way_are_judged_again_when_another_thread_is_interrupted(alone: _workers.Pool) -> None:
    timer = threading.Timer(0.2, alone.end_all)
    timer.start()
    found = alone.judge(Hostile(Options(deadline=20)), ["a", "sleep 0.4", "b"], [{}] * 3)
    timer.join()
    assert [verdict.status for verdict in found] == ["ok"] * 3


def test_a_closed_pool_begins_nothing_new() -> None:
    pool = _workers.Pool(1)
    timer = threading.Timer(0.2, pool.close)
    pool.judge(Plain(), ["a"], [{}])
    timer.start()
    found = pool.judge(Hostile(Options(deadline=60)), ["sleep 60"], [{}])
    timer.join()
    assert (found[0].status, found[0].detail) == ("verifier_error", "the workers have been closed")
    assert pool._zygote is None


def test_most_failures_stop_a_run() -> None:
    function = RewardFunction(Hostile(Options()), max_failures=0.5)
    good, bad = ["a", "b", "raise x"], ["raise x", "raise y", "a"]
    # Eight calls are counted: 1/3 fails on average at first, 2/3 at last; above a half stops.
    for words in [good] * 8 + [bad] * 4:
        assert function([None] * 3, words).count(None) == (1 if words is good else 2)
    with pytest.raises(
        UserError,
        match=r"'hostile' failed on 13 of the last 24 .* max_failures = 0\.5 .* verifier_error \(ValueError: y\)",
    ):
        function([None] * 3, bad)
    patient = RewardFunction(Hostile(Options()), max_failures=1.0)
    for _ in range(10):
        assert patient([None], ["raise x"]) == [None]


def test_too_few_calls_and_faults_of_completions_stop_nothing() -> None:
    function = RewardFunction(Hostile(Options()), max_failures=0.0)
    for _ in range(7):
        assert function([None], ["raise x"]) == [None]
    function = RewardFunction(Hostile(Options(deadline=0.01)), max_failures=0.0)
    for _ in range(9):
        assert function([None] * 2, ["loop", "loop"]) == [0.0, 0.0]


def test_metrics_of_a_call() -> None:
    metrics: dict[str, float] = {}
    found: list[Verdict] = []

    class Noted(Hostile):
        def score(self, completions: Sequence[Any], rows: Sequence[Any]) -> list[Verdict]:
            found.extend(score(completions))
            return found

    words = ["a", "sleep 0.2", "loop", "memory", "raise x", "at once", "b", "c"]
    RewardFunction(Noted(Options()))([None] * 8, words, log_metric=metrics.__setitem__)
    assert {name.removeprefix("rewards/hostile/"): value for name, value in list(metrics.items())[:3]} == {
        "failures": 0.125, "timeouts": 0.125, "resource": 0.125,
    }  # fmt: skip
    seconds = sorted(verdict.seconds for verdict in found)
    assert found[1].seconds >= 0.2 and found[2].seconds == DEADLINE
    assert metrics["rewards/hostile/seconds_p50"] == seconds[3]  # the fourth of eight
    assert metrics["rewards/hostile/seconds_p99"] == seconds[7]  # the eighth
    assert len(metrics) == 5


# ------------------------------------------------------------------ from everywhere


def test_from_several_threads_at_once() -> None:
    found: dict[int, list[Verdict]] = {}

    def judge(number: int) -> None:
        found[number] = score([f"{number} {i}" for i in range(40)] + ["loop"])

    threads = [threading.Thread(target=judge, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, verdicts in found.items():
        assert [verdict.answer for verdict in verdicts[:-1]] == [f"{number} {i}" for i in range(40)]
        assert verdicts[-1].status == "timeout"
    assert len(found) == 6
    assert len(of_this_process()) <= 1 + _workers.size()


def test_the_thread_that_began_the_workers_may_end() -> None:
    """Where the zygote would die with the thread that made it (PR_SET_PDEATHSIG), it would die here."""
    _workers.close()
    found: list[Verdict] = []
    thread = threading.Thread(target=lambda: found.extend(score(["who"])))
    thread.start()
    thread.join()
    time.sleep(0.2)
    assert score(["who"])[0].answer == found[0].answer


def test_from_asyncio() -> None:
    async def judge() -> list[list[Verdict]]:
        direct = score(["a", "b"])
        return [direct, *await asyncio.gather(*(asyncio.to_thread(score, [f"{i}", "raise x"]) for i in range(5)))]

    direct, *others = asyncio.run(judge())
    assert [verdict.answer for verdict in direct] == ["a", "b"]
    assert [verdicts[0].answer for verdicts in others] == [f"{i}" for i in range(5)]


def test_in_each_of_two_processes(tmp_path: Path) -> None:
    launch(2, ["-m", "tests.two_judges", str(tmp_path)])
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    statuses = [HOSTILE.get(word, (1.0, "ok"))[1] for word in WORDS]
    assert [each["statuses"] for each in found] == [[statuses] * 2] * 2
    assert all(len(each["parents"]) == 1 for each in found)
    assert found[0]["parents"] != found[1]["parents"]
    assert not any(psutil.pid_exists(int(each["parents"][0])) for each in found)


def start(what: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.two_judges", what],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_forked_child_has_workers_of_its_own() -> None:
    with start("fork") as process:
        assert process.communicate(timeout=300)[0].split() == ["True", "4"]


# ------------------------------------------------------------------ nothing is left behind


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_trainer_that_is_killed(end: signal.Signals) -> None:
    """Not even workers that are in the middle of something that does not end."""
    with start("wait") as process:
        assert process.stdout is not None
        me, _, zygote, _ = map(int, process.stdout.readline().split())
        assert me == process.pid
        assert eventually(lambda: at_work(zygote))
        of_zygote = psutil.Process(zygote).children()
        process.send_signal(end)
        process.wait()
        assert eventually(lambda: all(gone(pid) for pid in (zygote, *(worker.pid for worker in of_zygote))))


def test_an_interrupt_while_judging_leaves_workers_that_judge() -> None:
    with start("interrupt") as process:
        assert process.stdout is not None
        _, first, _ = process.stdout.readline().split()
        assert eventually(lambda: at_work(int(first)))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, second, _ = process.stdout.readline().split()
        assert process.wait(timeout=300) == 0
        assert eventually(lambda: gone(int(first)) and gone(int(second)))


@pytest.mark.parametrize(("ends", "expected"), [(True, signal.SIGKILL), (False, None)])
def test_a_worker_that_ends_slowly_can_still_say_how(
    monkeypatch: pytest.MonkeyPatch, ends: bool, expected: signal.Signals | None
) -> None:
    """It has hung up, and ends half a second later, five times what one has that only hangs up."""
    monkeypatch.setattr(_zygote, "ENDING", 2 * SOON)
    code = (
        "import ctypes, os, platform, signal, threading, time\n"
        f"def later():\n    time.sleep({0.5 if ends else 600})\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "threading.Thread(target=later).start()\n"
        "os.close(1)\n"
    )
    if ends:  # its first thread alone, so that it cannot be waited for
        code += "ctypes.CDLL(None).syscall(60 if platform.machine() == 'x86_64' else 93, 0)\n"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None and process.stdout.read() == b""
        assert not ends or eventually(lambda: _zygote._is_ending(process.pid))
        status = _zygote._end(process.pid, _workers.LAST_BREATH, set())
    assert (None if status is None else os.WTERMSIG(status)) == expected


def test_what_dies_late_is_not_left_behind() -> None:
    with subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]) as process:
        dying = {process.pid}
        _zygote._reap(dying)
        assert dying == {process.pid}
        process.kill()
        assert eventually(lambda: _zygote._reap(dying) is None and not dying)  # type: ignore[func-returns-value]


def test_closing_ends_every_process_and_they_come_back() -> None:
    score(["a"] * 20)
    processes = of_this_process()
    assert len(processes) >= 2
    _workers.close()
    assert eventually(lambda: all(gone(process.pid) for process in processes))
    _workers.close()
    assert score(["a"])[0].reward == 1.0


def test_a_hundred_kills_leave_no_file_and_no_process() -> None:
    score(["a"] * 20)
    me = psutil.Process()
    files, zygote = me.num_fds(), of_this_process()[0]
    of_zygote = zygote.num_fds()
    for _ in range(10):
        score(["kill SIGKILL", "exit 1", "a"] * 5)  # ten deaths by exit, five by a signal
    found = score(["loop"] * 10, Hostile(Options(deadline=0.05)))
    assert {verdict.status for verdict in found} == {"timeout"}
    assert me.num_fds() <= files
    assert zygote.num_fds() == of_zygote
    assert len(of_this_process()) <= 1 + _workers.size()
    assert not [child for child in zygote.children() if child.status() == psutil.STATUS_ZOMBIE]


# ------------------------------------------------------------------ the recipe


def test_what_nobody_waits_for_any_longer_has_no_verdict(alone: _workers.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    decide = _workers._Judgement._decide

    def enough(judgement: _workers._Judgement, index: int, verdict: Verdict) -> None:
        decide(judgement, index, verdict)
        if len(judgement.verdicts) == 3:  # as if it had taken so long
            judgement.begun -= 1000.0
            judgement.until = judgement.begun + 600.0

    monkeypatch.setattr(_workers._Judgement, "_decide", enough)
    words = ["a", "loop", "b", "sleep 60", "c", "d"]
    found = alone.judge(Hostile(Options()), words, [{}] * len(words))
    detail = "not judged within 600 s, in which 1 ran over the deadline"
    assert [(verdict.reward, verdict.status) for verdict in found[:3]] == [(1.0, "ok"), (0.0, "timeout"), (1.0, "ok")]
    assert found[3:] == [Verdict(None, "verifier_error", detail=detail)] * 3
    monkeypatch.setattr(_workers._Judgement, "_decide", decide)
    assert [verdict.answer for verdict in alone.judge(Hostile(Options()), ["e", "f"], [{}] * 2)] == ["e", "f"]


def test_training_waits_with_patience_and_nobody_else_does() -> None:
    waits: list[float] = []

    class Noted(Hostile):
        def score(self, completions: Sequence[Any], rows: Sequence[Any]) -> list[Verdict]:
            waits.append(rewards.until.get() - time.monotonic())
            return super().score(completions, rows)

    assert RewardFunction(Hostile(Options(deadline=600)), patience=0.01)([None] * 3, ["loop"] * 3) == [None] * 3
    RewardFunction(Noted(Options()))([None], ["at once"])
    assert 0 < waits[0] <= rewards.PATIENCE
    Noted(Options()).score(["at once"], [{}])
    assert waits[1] == math.inf


def test_a_recipe_says_how_many_failures_stop_the_run() -> None:
    task = tasks.load("countdown", {})
    recipe = recipes.load(
        "grpo/countdown3", ["rewards=[{name: format, max_failures: 0.25, patience: 7.0}, {name: countdown}]"]
    )
    first, second = reward_functions(recipe, task)
    assert isinstance(first, RewardFunction) and isinstance(second, RewardFunction)
    assert (first.max_failures, second.max_failures) == (0.25, rewards.MAX_FAILURES)
    assert (first.patience, second.patience) == (7.0, rewards.PATIENCE)
    assert "patience" not in recipe.rewards[1].model_dump(), "so that hashes of recipes stay what they were"
    for wrong, reason in (
        ("{name: format, max_failures: 2}", "max_failures"),
        ("{function: 'm:f', max_failures: 0.1}", "remove it"),
        ("{function: 'm:f', patience: 7.0}", "remove it"),
        ("{name: format, patience: 0}", "patience"),
    ):
        with pytest.raises(UserError, match=reason):
            recipes.load("grpo/countdown3", [f"rewards=[{wrong}]"])
