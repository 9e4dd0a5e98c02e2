"""`posttrain serve-rewards`: the verdicts of the local verifiers, what is refused, and that nothing is left behind."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from posttrain import rewards
from posttrain.cli import app
from posttrain.cli.serve_rewards import _usage
from posttrain.errors import UserError
from posttrain.launch import reward_server
from posttrain.launch.reward_server import RewardServer, servable
from posttrain.recipe import parse_value
from posttrain.rewards import Verdict, Verifier, _workers
from tests.patience import SOON, eventually, gone, patient

ROOT = Path(__file__).parent.parent
TOKEN = "t0ken-of-the-test"

# With Ctrl-C as a terminal has it: a shell that starts tests in the background has it ignored.
MAIN = """import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from posttrain.cli import main
from tests.test_serve_rewards import be_patient
be_patient()
main()
"""


def be_patient() -> None:
    """Hold to its deadline what hangs, and nothing that a busy machine leaves waiting."""
    _workers._Judgement = patient(lambda text: r"\gcd(10^{99999}" in text)  # type: ignore[misc]


@pytest.fixture
def _patient() -> Iterator[None]:
    impatient = _workers._Judgement
    be_patient()
    yield
    _workers._Judgement = impatient  # type: ignore[misc]


class Scripted(Verifier):
    """Does what the completion says."""

    name = "scripted"
    requires = ("answer",)

    def verify(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        if completion.startswith("sleep"):
            time.sleep(float(completion.split()[1]))
        if completion == "raise":
            raise ValueError("as told")
        if completion == "long":
            return Verdict(1.0, "ok", "a" * 99_999, "d" * 99_999)
        return Verdict(float(completion == row["answer"]), "ok" if completion == row["answer"] else "wrong", completion)


class Held(Scripted):
    """Judges when it is let."""

    name = "held"

    def __init__(self) -> None:
        self.begun, self.released = threading.Event(), threading.Event()

    def verify(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        self.begun.set()
        assert self.released.wait(2 * SOON)
        return super().verify(completion, row)


class Explosive(Scripted):
    """Fails as a whole."""

    name = "explosive"

    def score(self, completions: Any, rows: Any) -> list[Verdict]:
        raise UserError("There is no way.")


@contextmanager
def serving(*verifiers: Verifier, **settings: Any) -> Iterator[RewardServer]:
    """A server in this process, on a free port."""
    with RewardServer({verifier.name: verifier for verifier in verifiers or (Scripted(),)}, **settings) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join()


def post(server: RewardServer, content: Any, path: str = "/score", **headers: str) -> tuple[int, Any]:
    """Status and decoded answer."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)) as connection:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("POST", path, data, {"Content-Type": "application/json", **named})
        response = connection.getresponse()
        return response.status, json.loads(response.read())


ASKED = {"completions": ["5", "6", "raise"], "rows": [{"answer": "5"}] * 3}


# ------------------------------------------------------------------ the command, as others meet it


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("databases")
    for number in range(2):
        with closing(sqlite3.connect(folder / f"{number}.sqlite")) as connection:
            connection.execute("CREATE TABLE city (id INTEGER PRIMARY KEY, name TEXT)")
            connection.executemany("INSERT INTO city (name) VALUES (?)", [("a",), ("b",), ("c",), ("d",)][: 3 + number])
            connection.commit()
    return folder


class Command:
    """`posttrain serve-rewards` in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAIN, "serve-rewards", *arguments],
            cwd=ROOT,
            env={**os.environ, "SERVE_TOKEN": TOKEN, "OMP_NUM_THREADS": "1", "POSTTRAIN_REWARD_WORKERS": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.usage = ""
        while "Ctrl-C stops it." not in self.usage:
            line = self.process.stdout.readline()
            assert line, self.process.stderr.read() if self.process.stderr else ""
            self.usage += line
        found = re.search(r"served at (http://127\.0\.0\.1:(\d+))\.", self.usage)
        assert found is not None
        self.url, self.port = found[1], int(found[2])

    def end(self) -> tuple[int, str]:
        """As Ctrl-C does; the exit status and what was said on standard error."""
        os.killpg(self.process.pid, signal.SIGINT)
        with self.process:
            _, said = self.process.communicate(timeout=300)
        return self.process.returncode, said


@pytest.fixture(scope="module")
def command(databases: Path) -> Iterator[Command]:
    options = ["--option", f"sql.db_root={databases}", "--option", "sql.timeout=60.0", "--option", "math.deadline=3.0"]
    settings = ["--port", "0", "--token-env", "SERVE_TOKEN", "--deadline", "300"]
    started = Command("math", "sql", "countdown", *settings, *options)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.end()


@pytest.fixture
def remote(command: Command, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Verifier]:
    """The reward `remote` with the options that the command printed for a reward."""
    monkeypatch.setenv("SERVE_TOKEN", TOKEN)

    def build(name: str, **options: Any) -> Verifier:
        recipe = command.usage.partition("In a recipe:\n")[2].partition("Try it:")[0]
        printed = parse_value(recipe)["rewards"]
        chosen = next(reward["options"] for reward in printed if reward["options"]["label"] == name)
        return rewards.load("remote", {**chosen, "deadline": 300.0, **options})

    return build


def corpus() -> dict[str, list[tuple[str, dict[str, Any]]]]:
    corpora = ROOT / "tests" / "corpora"
    pairs = [json.loads(line) for line in (corpora / "math_pairs.jsonl").read_text("utf-8").splitlines()]
    lines = (corpora / "math_attacks.jsonl").read_text("utf-8").splitlines()
    attacks = [
        "".join(text * times for text, times in json.loads(line)["parts"])
        for line in lines[:17] + lines[60:88:3]  # one of which takes a worker's life
    ]
    math = [(rf"\boxed{{{pair['answer']}}}", {"answer": pair["gold"]}) for pair in pairs[::16]]
    math += [(rf"\boxed{{{attack}}}", {"answer": "5"}) for attack in attacks]
    math += [("\ud800 \x00 \\boxed{5}", {"answer": "5"}), ("5", {"answer": ""})]
    gold = "SELECT count(*) FROM city"
    both = {"db": ["0.sqlite", "1.sqlite"], "answer": gold}
    sql = [
        (f"```sql\n{query}\n```", both) for query in (gold, "SELECT 3", "SELECT max(id) FROM city", "DROP TABLE city")
    ]
    sql += [(gold, {"db": "../x.sqlite", "answer": gold}), (gold, {"db": [], "answer": gold})]
    sql += [("SELECT 3", {"db": "0.sqlite", "answer": gold}), (gold, {"db": "0.sqlite", "answer": "SELEC"})]
    rows = {"numbers": [3, 5, 7], "target": 38}
    texts = ("3+5*7", "7*5+3", "3+5+7", "", "9**9**9", "<think>3+5*7", "(" * 2000, "3+5*7 \u200b")
    return {"math": math, "sql": sql, "countdown": [(text, rows) for text in texts]}


def said(verdicts: list[Verdict]) -> list[tuple[Any, ...]]:
    return [(v.reward, v.status, v.answer, v.detail) for v in verdicts]


@pytest.mark.usefixtures("_patient")
def test_remote_verdicts_are_those_of_the_local_verifiers_from_several_threads(
    remote: Callable[..., Verifier], databases: Path
) -> None:
    options = {"math": {"deadline": 3.0}, "sql": {"db_root": str(databases), "timeout": 60.0}, "countdown": {}}
    found: dict[tuple[str, int], list[Verdict]] = {}
    cases = corpus()

    def judge(name: str, size: int) -> None:
        completions, rows = zip(*cases[name], strict=True)
        found[name, size] = remote(name, batch_size=size).score(completions, rows)

    asked = [("math", 16), ("sql", 3), ("sql", 64), ("countdown", 3), ("countdown", 64)]
    threads = [threading.Thread(target=judge, args=each) for each in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, size in asked:
        completions, rows = zip(*cases[name], strict=True)
        local = rewards.load(name, options[name]).score(completions, rows)
        assert {v.status for v in local} >= {"ok", "wrong", *({"timeout", "resource"} if name == "math" else ())}
        assert said(found[name, size]) == said(local)


def test_the_curl_that_is_printed_works(command: Command) -> None:
    line = re.search(r"^curl .*$", command.usage, re.MULTILINE)
    assert line is not None
    done = subprocess.run(
        ["/bin/bash", "-c", f"{line[0]} --silent"],
        env={**os.environ, "SERVE_TOKEN": TOKEN},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    (verdict,) = json.loads(done.stdout)["verdicts"]
    assert (verdict["reward"], verdict["status"]) == (1.0, "ok")


def test_without_the_token_nothing_is_judged_and_nothing_is_told(
    command: Command, remote: Callable[..., Verifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTHER", "wrong")
    (found,) = remote("countdown", api_key_env="OTHER").score(["3"], [{"numbers": [3], "target": 3}])
    assert found.reward is None and "answered 401" in found.detail
    with closing(http.client.HTTPConnection("127.0.0.1", command.port)) as connection:
        connection.request("GET", "/health")
        assert json.loads(connection.getresponse().read()) == {"status": "ok"}
        connection.request("GET", "/health", headers={"Authorization": f"Bearer {TOKEN}"})
        rewards_there = json.loads(connection.getresponse().read())["rewards"]
    assert rewards_there["sql"] == {"columns": ["db", "answer"], "accuracy": True}
    assert TOKEN not in command.usage


def test_ctrl_c_leaves_nothing_behind(databases: Path) -> None:
    started = Command("sql", "--port", "0", "--option", f"db_root={databases}")
    verifier = rewards.load("remote", {"url": f"{started.url}/score", "columns": ["db", "answer"]})
    assert verifier.score(["SELECT 3"], [{"db": "0.sqlite", "answer": "SELECT 3"}])[0].reward == 1.0
    processes = [psutil.Process(started.process.pid), *psutil.Process(started.process.pid).children(recursive=True)]
    assert len(processes) >= 3  # the server, what workers are forked from, and a worker
    with socket.create_connection(("127.0.0.1", started.port)):  # somebody who says nothing
        start = time.perf_counter()
        status, error = started.end()
        assert time.perf_counter() - start < SOON  # and not the minute that a connection may be silent
    assert (status, error.strip()) == (130, "stopped")
    assert eventually(lambda: all(gone(process.pid) for process in processes))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", started.port))


def test_ctrl_c_lets_what_is_being_judged_be_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_server, "PATIENCE", 2 * SOON)
    held = Held()
    with RewardServer({"held": held}) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        found: list[tuple[int, Any]] = []
        asked = {"completions": ["5"], "rows": [{"answer": "5"}]}
        client = threading.Thread(target=lambda: found.append(post(server, asked)))
        client.start()
        assert held.begun.wait(2 * SOON)
        server.stop()
        thread.join()
        release = threading.Timer(0.3, held.released.set)  # while what is under way is waited for
        release.start()
    client.join()
    assert found[0][0] == 200


# ------------------------------------------------------------------ requests


def test_a_request_and_its_verdicts() -> None:
    with serving() as server:
        status, found = post(server, ASKED)
        assert post(server, ASKED, "/score/scripted")[0] == 200
    assert status == 200
    assert [{**verdict, "seconds": 0} for verdict in found["verdicts"]] == [
        {"reward": 1.0, "status": "ok", "answer": "5", "detail": "", "seconds": 0},
        {"reward": 0.0, "status": "wrong", "answer": "6", "detail": "", "seconds": 0},
        {"reward": None, "status": "verifier_error", "answer": None, "detail": "ValueError: as told", "seconds": 0},
    ]


def test_openrlhf_is_understood() -> None:
    countdown = rewards.load("countdown")
    with serving(Scripted(), countdown, strip="<|im_end|>") as server:
        request = {"query": ["Q: 5?5<|im_end|>", "Q: 6?5"], "prompts": ["Q: 5?", "Q: 6?"], "labels": ["5", "6"]}
        assert post(server, request, "/get_reward/scripted") == (200, {"rewards": [1.0, 0.0], "scores": [1.0, 0.0]})
        row = {"numbers": [3], "target": 3}
        request = {"query": ["p3", "p3"], "prompts": ["p", "p"], "labels": [row, json.dumps(row)]}
        assert post(server, request, "/get_reward/countdown")[1]["rewards"] == [1.0, 1.0]
        request = {"query": ["raise"], "prompts": [""], "labels": ["5"]}
        status, found = post(server, request, "/get_reward/scripted")
        assert (status, found["error"]) == (500, "there is no reward for query 0 (verifier_error: ValueError: as told)")
        verifier = rewards.load(
            "remote", {"url": f"{server.url}/get_reward/scripted", "protocol": "openrlhf", "columns": ["answer"]}
        )
        assert verifier.score(["5", "6"], [{"prompt": "Q", "answer": "5"}] * 2)[0].reward == 1.0


BAD: list[tuple[str, Any, int, str]] = [
    ("/", ASKED, 404, "POST to /score or /get_reward"),
    ("/scores", ASKED, 404, "POST to /score or /get_reward"),
    ("/score/scriptd", ASKED, 404, "did you mean 'scripted'"),
    ("/score/../../x", ASKED, 404, "there is no reward '../../x'"),
    ("/score", b"", 400, "no JSON"),
    ("/score", b"{", 400, "no JSON"),
    ("/score", b"[" * 200_000, 400, "no JSON"),
    ("/score", b"\xff\xfe", 400, "no JSON"),
    ("/score", [ASKED], 400, "a list, not an object"),
    ("/score", {}, 400, "'completions' must be a list of texts"),
    ("/score", {**ASKED, "completions": ["5", 6, "7"]}, 400, "'completions' must be a list of texts"),
    ("/score", {**ASKED, "rows": [{"answer": "5"}]}, 400, "'rows' must be a list of 3"),
    ("/score", {**ASKED, "rows": [{"answer": "5"}, {}, {}]}, 400, "row 1 lacks the column 'answer'"),
    ("/score", {**ASKED, "rows": [{"answer": "5"}, None, {}]}, 400, "row 1 lacks the column 'answer'"),
    ("/score", {**ASKED, "rewards": []}, 400, "there is no 'rewards' in a request; known: completions, rows"),
    ("/score", {"completions": ["5"] * 4097, "rows": [{"answer": "5"}] * 4097}, 413, "4097 texts and may have 4096"),
    ("/get_reward", {"query": ["a5"], "prompts": ["b"], "labels": ["5"]}, 400, "does not begin with its prompt"),
    ("/get_reward", {"query": ["a5"], "prompts": [["a"]], "labels": ["5"]}, 400, "does not begin with its prompt"),
    ("/get_reward", {"query": ["5"], "prompts": [""], "labels": ["5"], "metas": []}, 400, "there is no 'metas'"),
    ("/get_reward", {"query": ["5"], "labels": []}, 400, "'labels' must be a list of 1"),
]  # fmt: skip


@pytest.fixture(scope="module")
def one() -> Iterator[RewardServer]:
    """A server that many tests ask."""
    with serving(max_bytes=300_000, deadline=300.0) as server:
        yield server


@pytest.mark.parametrize(("path", "content", "status", "reason"), BAD)
def test_what_cannot_be_judged_is_refused(one: RewardServer, path: str, content: Any, status: int, reason: str) -> None:
    found = post(one, content, path)
    assert found[0] == status and reason in found[1]["error"], found


def test_labels_that_are_no_columns_are_refused() -> None:
    with serving(rewards.load("countdown")) as server:
        for label in ("5", "[", "[" * 50_000, 5, None, ""):
            found = post(server, {"query": ["5"], "prompts": [""], "labels": [label]}, "/get_reward")
            assert found[0] == 400 and "label 0 is no object with numbers, target" in found[1]["error"]


def test_several_rewards_are_named_in_the_path() -> None:
    with serving(Scripted(), Explosive()) as server:
        assert post(server, ASKED)[1]["error"] == (
            "several rewards are served: POST to /score/NAME, with one of scripted, explosive"
        )
        status, found = post(server, ASKED, "/score/explosive")
        assert (status, found["error"]) == (500, "UserError: There is no way.")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": "application/json; charset=utf-8"}, 200),
        ({"Content_Length": "-1"}, 411),
        ({"Content_Length": "1e3"}, 411),
        ({"Content_Length": "300001"}, 413),
        ({"Content_Length": "9" * 5000}, 411),
        ({"Transfer_Encoding": "chunked"}, 411),
        ({"Host": "evil.example"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": "localhost:80"}, 200),
    ],
)
def test_headers(one: RewardServer, headers: dict[str, str], status: int) -> None:
    if "Content_Length" not in headers:
        assert post(one, ASKED, **headers)[0] == status
        return
    with socket.create_connection(("127.0.0.1", one.port), 2 * SOON) as connection:
        length = headers["Content_Length"]
        head = f"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}"
        connection.sendall(head.encode() + b"\r\n\r\n")
        assert connection.recv(2**16).startswith(f"HTTP/1.1 {status} ".encode())
        while connection.recv(2**16):  # it hangs up, because what follows would be taken for a request
            pass


@pytest.mark.parametrize(
    ("more", "status"),
    [("Content-Length: 1", 411), ("Content-Length: 2", 411), ("Host: evil.example", 403), ("X: y\r\n z", 400)],
)
def test_a_header_that_is_there_twice_is_none(one: RewardServer, more: str, status: int) -> None:
    """Two readers may take different ones."""
    with socket.create_connection(("127.0.0.1", one.port), 2 * SOON) as connection:
        head = "POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 2\r\n"
        connection.sendall(f"{head}{more}\r\n\r\n{{}}".encode())
        assert connection.recv(2**16).startswith(f"HTTP/1.1 {status} ".encode())


def test_a_connection_is_kept_for_further_requests(one: RewardServer) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", one.port)) as connection:
        for content in (ASKED, {}, ASKED):
            connection.request("POST", "/score", json.dumps(content), {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
            sock = connection.sock
            assert response.status == (200 if content else 400)
        assert connection.sock is sock is not None


def test_other_methods_and_nonsense_are_refused(one: RewardServer) -> None:
    for method, path, status in (
        ("PUT", "/score", 501),
        ("OPTIONS", "/score", 501),  # what a browser asks first for a page of elsewhere
        ("GET", "/score", 404),
        ("GET", "/score/" + "a" * 70_000, 414),
        ("HEAD", "/health", 501),
    ):
        with closing(http.client.HTTPConnection("127.0.0.1", one.port)) as connection:
            connection.request(method, path)
            response = connection.getresponse()
            said = response.read()
            assert response.status == status and response.getheader("Content-Type") == "application/json"
            assert list(json.loads(said)) == ["error"] if method != "HEAD" else said == b""
    with socket.create_connection(("127.0.0.1", one.port), 2 * SOON) as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
        assert b"400" in connection.recv(2**16)
    assert post(one, ASKED)[0] == 200


def test_who_sends_slowly_is_hung_up_on() -> None:
    with serving(deadline=0.4) as server, socket.create_connection(("127.0.0.1", server.port), SOON) as connection:
        head = (
            "POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n"
        )
        start = time.perf_counter()
        connection.sendall(head.encode())
        connection.settimeout(0.02)
        while time.perf_counter() - start < 2 * SOON:  # a byte every 20 ms, which would take 200 s
            try:
                connection.sendall(b" ")
                if not connection.recv(1):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        assert 0.4 <= time.perf_counter() - start < SOON


def test_a_request_beyond_the_deadline_and_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is given up after 0.2 s and keeps its place until it has been judged; the second finds none."""
    held, judge = Held(), RewardServer._judge

    def hurried(self: RewardServer, *arguments: Any) -> list[Verdict]:
        self.deadline = 300.0 if held.released.is_set() else 0.2  # to judge, and not to read the request
        return judge(self, *arguments)

    monkeypatch.setattr(RewardServer, "_judge", hurried)
    with serving(held, deadline=300.0, max_requests=1) as server:
        assert post(server, ASKED) == (504, {"error": "judging took more than 0.2 s"})
        server.deadline = 300.0
        assert post(server, ASKED) == (503, {"error": "1 requests are being judged already: come again"})
        server.deadline = 300.0
        held.released.set()
        assert eventually(lambda: post(server, ASKED)[0] == 200)


def test_the_reward_remote_comes_again_when_the_server_is_full() -> None:
    with serving(max_requests=1) as server:
        verifier = rewards.load(
            "remote", {"url": f"{server.url}/score", "columns": ["answer"], "batch_size": 1, "concurrency": 3,
                       "retries": 100, "deadline": 300.0}
        )  # fmt: skip
        found = verifier.score(["sleep 0.2", "5", "6"], [{"answer": "5"}] * 3)
    assert [v.status for v in found] == ["wrong", "ok", "wrong"]


def test_only_so_many_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_server, "MAX_CONNECTIONS", 2)
    with serving() as server:
        first, second = (socket.create_connection(("127.0.0.1", server.port)) for _ in range(2))
        with first, second, socket.create_connection(("127.0.0.1", server.port), 2 * SOON) as third:
            assert third.recv(2**16).startswith(b"HTTP/1.1 503 ")
        assert eventually(lambda: not server._server._open)  # it has noticed that they are gone
        assert post(server, ASKED)[0] == 200


def test_what_is_sent_of_a_verdict_has_an_end() -> None:
    with serving() as server:
        (verdict,) = post(server, {"completions": ["long"], "rows": [{"answer": "5"}]})[1]["verdicts"]
    assert len(verdict["answer"]) == len(verdict["detail"]) == reward_server.MAX_TEXT


def test_on_another_address_any_name_may_ask() -> None:
    with serving(host="0.0.0.0") as server:  # noqa: S104 - for as long as this test runs
        assert server.url == f"http://127.0.0.1:{server.port}"
        assert post(server, ASKED, Host="the.cluster")[0] == 200


def test_a_port_that_is_taken_is_refused() -> None:
    with serving() as server, pytest.raises(UserError, match=f"port {server.port} of 127.0.0.1 .*choose another"):
        RewardServer({}, port=server.port)


# ------------------------------------------------------------------ the command line


def call(*arguments: str, **environment: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["serve-rewards", "--port", "0", *arguments], env=environment)
    return result.exit_code, " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["mth"], "There is no reward 'mth'; did you mean 'math'?"),
        (["math", "math"], "named twice"),
        (["remote"], "is judged elsewhere already"),
        (["sql"], "set the option db_root"),
        (["math", "--option", "deadline"], "takes reward.key=value, not 'deadline'"),
        (["math", "--option", "deadlin=2.0"], "has no option 'deadlin'; did you mean 'deadline'?"),
        (["math", "--option", "sql.db_root=x"], "names the reward 'sql', which is not served"),
        (["math", "countdown", "--option", "deadline=2.0"], "names no reward"),
        (["math", "--option", "deadline=2.0", "--option", "math.deadline=2.0"], "given twice"),
        (["math", "--token-env", "NO_SUCH_TOKEN"], "the variable NO_SUCH_TOKEN, which is not set"),
        (["math", "--token-env", "BAD_TOKEN"], "the variable BAD_TOKEN, which holds a space"),
        (["math", "--host", "256.0.0.1"], "cannot listen on port 0 of 256.0.0.1"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused(arguments: list[str], reason: str) -> None:
    status, error = call(*arguments, BAD_TOKEN=f"{TOKEN} x")
    assert status == 2 and reason in error, error
    assert TOKEN not in error


def test_a_reward_that_compares_answers_is_not_served() -> None:
    with pytest.raises(UserError, match="compares the answers to a prompt"):
        servable("length", {"shape": "group_relative", "verifier": "math", "group_size": 4})


def test_more_than_this_machine_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(server: RewardServer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RewardServer, "serve", interrupt)
    status, error = call("countdown", "--host", "0.0.0.0")  # noqa: S104 - it never serves
    assert status == 130 and "warning: 0.0.0.0 is more than this machine: whoever reaches it" in error
    _, error = call("countdown", "--host", "0.0.0.0", "--token-env", "SERVE_TOKEN", SERVE_TOKEN=TOKEN)  # noqa: S104
    assert "whoever knows the token can have completions judged" in error
    assert "warning" not in call("countdown")[1]


def test_the_usage_is_a_recipe() -> None:
    with RewardServer({"format": rewards.load("format"), "countdown": rewards.load("countdown")}) as server:
        printed = parse_value(_usage(server, None).partition("In a recipe:\n")[2].partition("Try it:")[0])["rewards"]
        names = [rewards.load("remote", reward["options"]) for reward in printed]
    assert [(v.column, v.accuracy, v.requires) for v in names] == [
        ("remote_format", False, ()), ("remote_countdown", True, ("numbers", "target")),
    ]  # fmt: skip
