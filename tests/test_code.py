"""The reward `code`: what is correct, what a hostile program costs and cannot do, and executors elsewhere."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import http.server
import json
import math
import os
import pickle
import platform
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from posttrain import rewards, tasks
from posttrain.cli import app
from posttrain.errors import UserError
from posttrain.rewards import Verdict, Verifier, _runner, _sandbox, _suites, _workers, code
from posttrain.rewards._sandbox import TIERS, Limits, Probe, Sandbox, Stopped, Tier
from posttrain.tasks import code as task_code
from tests.patience import LATE, SOON, eventually, unhurried
from tests.processes import ROOT, launch
from tests.two_coders import PROGRAMS

TIMEOUT, DEADLINE = 1.0, 4.0
"""Seconds for one test of a program under attack, and for all, starting it included."""
MARK = f":/nowhere/posttrain-{os.getpid()}"
PLACES = ("/dev/shm", "/var/tmp", "/tmp")  # noqa: S108
"""Where an attack fills the disk, with files that are called by numbers."""
DOUBLE = ["assert f(2) == 4", "assert f(7) == 14"]
ASSERTED = """
for x in (2, 7):
    assert f(x) == 2 * x
    assert abs(f(x / 4) - x / 2) < 1e-9
try:
    found = f(None)
except TypeError:
    found = 14
assert found == f(7)
"""
PRINTED = [{"input": "2\n", "output": "4"}, {"input": "7\n", "output": "14"}]


@pytest.fixture(scope="module", autouse=True)
def _of_our_own() -> Iterator[None]:
    """Workers and servers that carry our mark in their environment, and are gone at the end."""
    _workers.close()
    with pytest.MonkeyPatch.context() as patch, unhurried():
        patch.setenv("PATH", os.environ["PATH"] + MARK)
        yield
        _workers.close()


@pytest.fixture(scope="module")
def best() -> Tier:
    """The best sandbox of this machine, `none` where there is no other: for programs of our own."""
    return next((tier for tier in TIERS if _sandbox.probed(tier).holds), "none")


@pytest.fixture(scope="module")
def verifier(best: Tier) -> Verifier:
    return rewards.load("code", {"sandbox": best, "deadline": 10.0})


def fence(program: str) -> str:
    return f"So:\n```python\n{program}\n```\n"


def judge(verifier: Verifier, program: str, tests: Any, **row: Any) -> Verdict:
    return verifier.score([fence(program)], [{"tests": tests, **row}])[0]


# ------------------------------------------------------------------ what is correct


@pytest.mark.parametrize(
    ("program", "tests", "status"),
    [
        ("def f(x): return 2 * x", DOUBLE, "ok"),
        ("f = lambda x: x << 1", DOUBLE, "ok"),
        ("def f(x): return 2.0 * x", DOUBLE, "ok"),  # 4.0 == 4
        ("def f(x): return 4", DOUBLE, "wrong"),
        ("def f(x): return str(2 * x)", DOUBLE, "wrong"),
        ("def g(x): return 2 * x", DOUBLE, "wrong"),
        ("def f(x, y): return 2 * x", DOUBLE, "wrong"),
        ("class Solution:\n    def f(self, x):\n        return 2 * x", DOUBLE, "ok"),
        ("def f(x):\n    print('noise')\n    return 2 * x\nprint('more')", DOUBLE, "ok"),
        ("if __name__ == '__main__':\n    raise SystemExit(1)\ndef f(x): return 2 * x", DOUBLE, "wrong"),
        ("import dataclasses, heapq, zoneinfo, sqlite3, decimal\ndef f(x): return 2 * x", DOUBLE, "ok"),
        ("import threading\nr = []\nt = threading.Thread(target=r.append, args=(2,))\nt.start()\nt.join()\n"
         "def f(x): return r[0] * x", DOUBLE, "ok"),
        ("import asyncio\nasync def g(x): return 2 * x\ndef f(x): return asyncio.run(g(x))", DOUBLE, "ok"),
        ("import numpy\ndef f(x): return 2 * x", DOUBLE, "wrong"),
        ("def f(*a): return a", ["assert f(1, (2, 'b')) == (1, (2, 'b'))"], "ok"),
        ("def f(*a): return list(a)", ["assert f(1, 2) == (1, 2)"], "wrong"),
        ("def f(x): return {k: set(v) for k, v in x.items()}",
         ["assert f({1: [2, 2], (3,): []}) == {1: {2}, (3,): set()}"], "ok"),
        ("def f(x): return x", ["assert f(2 ** 100) == 1 << 100"], "ok"),
        ("def f(x): return x", ["assert f(2 ** 100) == 1267650600228229401496703205376"], "ok"),
        ("def f(x): return x", ["assert f(b'a') == b'a'", "assert f(1j) == 1j", "assert f(None) is None"], "ok"),
        ("def f(x): return x", ["assert f(float('inf')) == float('inf')", "assert f(float('nan')) == math.nan"], "ok"),
        ("def f(x): return 0.1 + 0.2", ["assert f(0) == 0.3"], "wrong"),
        ("def f(x): return 0.1 + 0.2", ["assert abs(f(0) - 0.3) < 1e-6", "assert math.isclose(f(0), 0.3)"], "ok"),
        ("def f(x): return [3, 1]", ["assert set(f(0)) == set([1, 3])", "assert sorted(f(0)) == [1, 3]"], "ok"),
        ("def f(x): return x > 0", ["assert f(1)", "assert not f(-1)", "assert f(1) == True and not f(0)"], "ok"),
        ("def f(x, *, y=1): return x - y", ["assert f(3, y=2) == 1", "assert 2 == f(3)"], "ok"),
        ("def f(x): x.append(1); return x", ["assert f([0]) == [0, 1]"], "ok"),
        ("def f(x): return (1, 2)", {"fn_name": "f", "inputs": [[0]], "outputs": [[1, 2]]}, "ok"),
        ("def f(x): return 3", {"fn_name": "f", "inputs": [[0]], "outputs": [[3]]}, "ok"),
        ("def f(x, k=0): return x + k",
         {"function": "f", "cases": [{"args": [1], "kwargs": {"k": 2}, "output": 3}]}, "ok"),
        ("print(2 * int(input()))", PRINTED, "ok"),
        ("import sys\nsys.stdout.write(str(2 * int(sys.stdin.read())))", PRINTED, "ok"),
        ("print(4)", PRINTED, "wrong"),
        ("print(2 * int(input()))\nraise SystemExit(0)", PRINTED, "ok"),
        ("import os\nprint(2 * int(input()), flush=True)\nos._exit(0)", PRINTED, "ok"),
        ("import threading\ndef m(): print(2 * int(input()))\nthreading.Thread(target=m).start()", PRINTED, "ok"),
        ("import atexit\nx = int(input())\natexit.register(lambda: print(2 * x))", PRINTED, "ok"),
        ("while True:\n    print(2 * int(input()))", PRINTED, "wrong"),  # EOFError at the end
        ("from functools import cache\nfor line in open(0): print(' ', int(line) * 2, ' ')", PRINTED, "ok"),
        ("print(input()[::-1])", [{"input": "äß\ud800"[:2], "output": "ßä"}], "ok"),
        ("print('a  b \\n\\n c')", '[{"input": "", "output": "\\na b\\n\\nc\\n"}]', "ok"),
        ("print('a b c')", [{"input": "", "output": "a b\nc"}], "wrong"),
        ("print(input() + input())", {"inputs": ["a\nb", ["a", "b"]], "outputs": ["ab\n", ["ab"]]}, "ok"),
    ],
)  # fmt: skip
def test_verdicts(verifier: Verifier, program: str, tests: Any, status: str) -> None:
    found = judge(verifier, program, tests)
    assert (found.status, found.reward) == (status, float(status == "ok")), found
    if status == "ok":
        assert found.answer == program + "\n"


def test_a_human_eval_test_is_taken_apart(best: Tier) -> None:
    verifier = rewards.load("code", {"sandbox": best, "entry_point": True})
    assert verifier.requires == ("tests", "entry_point")
    tests = (
        "\n\nMETADATA = {'author': 'jt'}\n\n\ndef check(candidate):\n    '''Doc.'''\n"
        "    assert candidate([1.0, 2.0]) == True, 'why'\n    assert candidate([]) == False\n    pass\n\ncheck(g)\n"
    )
    assert judge(verifier, "def g(x): return bool(x)", tests, entry_point="g").status == "ok"
    assert judge(verifier, "def f(x): return bool(x)", tests, entry_point="g").status == "wrong"
    unnamed = rewards.load("code", {"sandbox": best})
    assert judge(unnamed, "def g(x): return bool(x)", tests).status == "ok"  # the last line names it
    found = judge(unnamed, "def g(x): return bool(x)", tests.replace("check(g)", ""))
    assert found.status == "unparseable_gold" and "name the function in a column entry_point" in found.detail


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        ([], "the tests are [], not a list of them"),
        (None, "the tests are None"),
        ("", "the tests hold no assert"),
        ("[1, 2", "begin like JSON and are none"),
        ("assert f(1) ==", "neither JSON nor Python"),
        (["assert f(x) == 1"], "line 1 of the tests, `x`: beside f, the tests need what they do not define"),
        (["for x in xs: assert f(x)"], "line 1 of the tests, `xs`: beside f, the tests need"),
        (["assert f(1) == 1", "assert f(g(1)) == 1"], "line 2 of the tests, `g`: beside f, the tests need"),
        (["import numpy as np", "assert f(1)[0]"], "`import numpy as np`: programs have the standard library, and"),
        (["from . import g", "assert f(g)"], "programs have the standard library, and nothing else"),
        (["assert f(range(3)) == 3"], "`f(range(3))`: an argument that is no plain data: range"),
        (["assert eval(f(1)) == 1"], "`eval`: what is run may be what a program returns"),
        (["assert Solution().f(1) == 1"], "`Solution().f`: no plain data has this attribute"),
        (["def f(x): return x", "assert f(1)"], "the tests do not call any function that they do not define"),
        (["assert [] == [print()]"], "the tests do not call any function that they do not define"),
        (["assert f(1) == 10 ** 10 ** 10"], "too large"),
        (["assert f(1) == 'a' * 10 ** 9"], "too large"),
        (["import os; os.system('true')"], "the tests do not call any function"),
        (["def check(a, b): assert a(1)"], "check takes other than one argument"),
        ({"inputs": ["a"], "outputs": []}, "not two lists of one length"),
        ({"fn_name": "f", "inputs": ["a"], "outputs": ["b"]}, "arguments that are no list"),
        ({"fn_name": "f(x)", "inputs": [[1]], "outputs": ["b"]}, "no name of a function"),
        ([{"args": [1], "output": 2}], "nothing names the function"),
        ([{"input": 1, "output": "2"}], "neither args nor texts"),
        ([{"input": "1"}], "without an output"),
    ],
)
def test_tests_that_cannot_be_taken_apart_are_refused(verifier: Verifier, tests: Any, reason: str) -> None:
    for completion in ("", fence("def f(x): return x")):
        (found,) = verifier.score([completion], [{"tests": tests}])
        assert (found.reward, found.status) == (None, "unparseable_gold")
        assert reason in found.detail


HUMAN_EVAL = """
import copy
import random

METADATA = {"about": "the sum of 0 to n"}


def _slowly(n):
    total = 0
    for each in range(n + 1):
        total += each
    return total


def check(candidate):
    '''Sums, and a negative number is refused.'''
    for n in range(20):
        assert candidate(n) == _slowly(n), n
    for _ in range(5):
        n = random.randint(1, 100)
        assert abs(candidate(n) - n * (n + 1) / 2) < 1e-6
    assert candidate(*[3]) == candidate(**{"n": 3}) == candidate(copy.deepcopy(3))
    try:
        candidate(-1)
        assert False, "no exception"
    except ValueError as error:
        assert error.args == ("negative", -1)
"""
GAUSS = "class Odd(ValueError): pass\ndef g(n):\n    if n < 0: raise Odd('negative', n)\n    return n * (n + 1) // 2"


@pytest.mark.parametrize(
    ("change", "status", "detail"),
    [
        (("", ""), "ok", ""),
        (("n * (n + 1) // 2", "n * (n + 1) / 2"), "ok", ""),  # 3.0 == 3
        (("n * (n + 1) // 2", "n * (n + 1) / 2 + 1e-9"), "wrong", "AssertionError: 0 (line 18 of the tests)"),
        (("n * (n + 1) // 2", "190 if n > 19 else n * (n + 1) // 2"), "wrong", "AssertionError: line 21 of the tests"),
        (("ValueError", "KeyError"), "wrong", "KeyError: ('negative', -1) (line 24 of the tests)"),
        (("'negative', n", "'negative'"), "wrong", "AssertionError: line 27 of the tests"),
        (("if n < 0", "if n < -1"), "wrong", "AssertionError: no exception (line 25 of the tests)"),
        (("g(n)", "g(m)"), "wrong", "NameError: name 'n' is not defined (line 18 of the tests)"),
        (("def g", "def f"), "wrong", "KeyError: 'g'"),
        (("return", "return [] if n == 5 else"), "wrong", "AssertionError: 5 (line 18 of the tests)"),
        (("return", "return str(n) if n > 19 else"), "wrong",
         "TypeError: unsupported operand type(s) for -: 'str' and 'float' (line 21 of the tests)"),
    ],
)  # fmt: skip
def test_a_human_eval_test_that_is_no_list_of_asserts_runs(
    best: Tier, change: tuple[str, str], status: str, detail: str
) -> None:
    verifier = rewards.load("code", {"sandbox": best, "entry_point": True, "deadline": 10.0})
    found = judge(verifier, GAUSS.replace(*change), HUMAN_EVAL, entry_point="g")
    assert (found.status, found.reward, found.detail) == (status, float(status == "ok"), detail)


@pytest.mark.parametrize(
    ("program", "tests", "status"),
    [
        ("def f(x): return [x, 3]", ["import math", "assert math.isclose(f(0.5)[0], 1 / 2)"], "ok"),
        ("def f(x): return {x, 3}", ["assert {3} < f(2) < {1, 2, 3}"], "ok"),
        ("def f(x): return x", ["assert f(1) == 2 or f(2) == 2"], "ok"),
        ("def f(x): return x", ["assert f(1) == 2 or f(2) == 3"], "wrong"),
        ("def f(x): return x", ["for v in (None, 1j, b'a', {1: {2}}, (frozenset({3}), [True]), 2**70):",
                                "    assert f(v) == v and type(f(v)) is type(v)"], "ok"),
        ("def f(x): return x", ["inf = float('inf')", "for v in (inf, -inf): assert f(v) == v", "v = f(inf - inf)",
                                "assert v != v"], "ok"),
        ("def f(x): return x", ["from collections import *", "import enum", "class E(enum.IntEnum): A = 3",
                                "P = namedtuple('P', 'a b')", "found = f([Counter('aab'), P(1, 2), E.A])",
                                "assert found == [{'a': 2, 'b': 1}, (1, 2), 3] and type(found[1]) is tuple"],
         "unparseable_gold"),  # with *, f is not the only name that may be under test
        ("def f(x): return x", ["from collections import Counter, namedtuple", "P = namedtuple('P', 'a b')",
                                "found = f([Counter('aab'), P(1, 2)])",
                                "assert found == [{'a': 2, 'b': 1}, (1, 2)] and type(found[1]) is tuple"], "ok"),
        # What is done to an argument in place, and to a result later, is not seen.
        ("def f(x): x.append(1)", ["a = [0]", "f(a)", "assert a == [0]"], "ok"),
        ("r = []\ndef f(x): r.append(x); return r", ["a = f(1)", "b = f(2)", "assert a == [1] and b == [1, 2]"], "ok"),
        ("n = 0\ndef f():\n    global n\n    n += 1\n    return n", ["assert [f(), f(), f()] == [1, 2, 3]"], "ok"),
        ("class Solution:\n    def f(self, x): return 2 * x", ["for x in (1, 2): assert f(x) == 2 * x"], "ok"),
        ("def f(x): yield x", ["assert list(f(1)) == [1] and f(1)"], "wrong"),
        ("def f(x): return print", ["assert f(1) or True"], "wrong"),
        ("class C: pass\ndef f(x): return C()", ["try: f(1)", "except TypeError as e: assert str(e)[-1] == 'C'"], "ok"),
        ("import json\ndef f(x): return json.loads(x)", ["try: f('[')", "except ValueError: pass"], "ok"),
        ("def f(x): return x.decode()", ["try: f(b'\\xff')", "except UnicodeDecodeError as e: assert e.end"], "ok"),
        ("def f(x): return {}[x]", ["try: f('a')", "except LookupError as e: assert str(e) == repr('a')"], "ok"),
        ("def f(x): return open('/no/x')", ["try: f(1)", "except FileNotFoundError as e: assert e.errno == 2"], "ok"),
        ("import sys\ndef f(x): sys.exit(3)", ["try: f(1)", "except SystemExit as e: assert e.code == 3"], "ok"),
        ("import sys\ndef f(x): sys.exit()", ["f(1)[0]"], "wrong"),
        ("def f(x): raise KeyboardInterrupt", ["for x in (1, 2): assert f(x) == x"], "wrong"),
        ("def f(x): raise StopIteration", ["for y in map(f, [1, 2]): assert y == 3"], "wrong"),
        ("def f(x): return 'x' * x", ["assert sorted(f(3), key=int) == []", "def g(): pass"], "wrong"),
        ("def f(x): return [1]", ["for x in (1, 2):", "    y, z = f(x)"], "wrong"),
        ("def f(x): return x", ["for x in (1, int): assert f(x) == x"], "wrong"),  # its own fault, too late
        ("def f(x): return x", ["for x in (int, 1): assert f(x) == x"], "unparseable_gold"),
        ("def f(x): return x", ["x = 1 / 0", "assert f(x) == 1 or x"], "unparseable_gold"),
        ("def f(x): return x", ["x = [0] * 10**10", "assert f(1) == 1 or x"], "unparseable_gold"),
        ("def f(x): return x", ["if len('') > 0:", "    assert f(1) == 1"], "unparseable_gold"),
        ("def f(x): return x", ["def check(candidate):", "    return", "def g(): assert f(1)"], "unparseable_gold"),
        ("def f(x", ["x = 1 / 0", "assert f(x) == 1 or x"], "unparseable_gold"),
        ("def f(x): return x", ["assert f(bytes(5 * 10**6)) == 1"], "unparseable_gold"),  # too large to be sent
        # An alarm of the tests: the answer that comes too late is not taken for that of the next call.
        ("import time\ndef f(x): return time.sleep(x) or x",
         ["import signal", "def late(*_): raise TimeoutError", "signal.signal(signal.SIGALRM, late)",
          "signal.setitimer(signal.ITIMER_REAL, 0.2)", "try: f(1)", "except TimeoutError: assert f(0) == 1"], "wrong"),
        ("def f(x): return x", ["while f(1): pass"], "resource"),
        ("def f(x): return 2**40", ["bytearray(f(1))", "assert 1"], "resource"),
        ("def f(x): return 'x' * 2**19", ["for _ in range(5): print(f(1))"], "resource"),
        ("def f(x): return 2 * x", ["import unittest", "class T(unittest.TestCase):", "    def test(self):",
                                    "        self.assertEqual(f(2), 4)", "unittest.main()"], "ok"),
        ("def f(x): return 3 * x", ["import unittest", "class T(unittest.TestCase):", "    def test(self):",
                                    "        self.assertEqual(f(2), 4)", "unittest.main()"], "wrong"),
    ],
)  # fmt: skip
def test_asserts_that_run(verifier: Verifier, program: str, tests: list[str], status: str) -> None:
    found = judge(verifier, program, tests, entry_point="f")
    expected = {"ok": 1.0, "unparseable_gold": None}.get(status, 0.0)
    assert (found.status, found.reward) == (status, expected), found


def test_asserts_that_run_have_one_verdict(best: Tier) -> None:
    """Random inputs are the same for each program, and half a right program gets no credit."""
    verifier = rewards.load("code", {"sandbox": best, "partial_credit": "fraction", "deadline": 10.0})
    tests = "import random\nassert f(1) == 2\nx = random.random()\nassert f(x) == 2 * x, x"
    half = verifier.score([fence("def f(x): return 2")] * 3, [{"tests": tests}] * 3)
    assert {(verdict.status, verdict.reward) for verdict in half} == {("wrong", 0.0)}
    assert len({verdict.detail for verdict in half}) == 1


@pytest.mark.parametrize("hangs", ["tests", "program"])
def test_asserts_that_run_have_a_deadline(best: Tier, hangs: str) -> None:
    verifier = rewards.load("code", {"sandbox": best, "timeout": 1.0, "deadline": 2.0})
    program = f"import time\ndef f(x): return x or time.sleep({60 * (hangs == 'program')}) {LATE}"
    tests = ["import time", "for x in (1, 0): y = f(x)", f"time.sleep({60 * (hangs == 'tests')})"]
    found = judge(verifier, program, tests)
    assert (found.status, found.reward, found.seconds < SOON) == ("timeout", 0.0, True)
    found = judge(verifier, program, ["import time", "time.sleep(60)", *tests])
    assert (found.status, found.reward, found.seconds < SOON) == ("unparseable_gold", None, True)


def test_no_program_sees_the_asserts(best: Tier) -> None:
    """Nor later inputs. The words that it looks for are not in its own text."""
    curious = (
        "import gc, sys\ndef f(x):\n"
        "    texts = repr([o for o in gc.get_objects() if isinstance(o, (list, dict, tuple))])\n"
        "    frame, files = sys._getframe(), []\n"
        "    while frame:\n        files.append(frame.f_code.co_filename)\n        frame = frame.f_back\n"
        "    words = [''.join(reversed(word)) for word in ('yrawossac', 'nilognap', '(f tressa', ',1( ni x rof')]\n"
        "    return [word in texts for word in words], 'tests' in files"
    )
    tests = "for x in (1, 'pangolin'): assert f(x) == ([False, x != 1, False, False], False), 'cassowary'"
    verifier = rewards.load("code", {"sandbox": best, "deadline": 10.0})
    assert judge(verifier, curious, tests).status == "ok"


def test_exceptions_keep_their_built_in_class() -> None:
    class Odd(UnicodeError):
        pass

    class Sly(Exception):
        def __str__(self) -> str:
            raise SystemExit

    for error, kind, args in (
        (ValueError("a", 1), ValueError, ("a", 1)),
        (Odd("b"), UnicodeError, ("b",)),
        (UnicodeDecodeError("ascii", b"x", 0, 1, "why"), UnicodeDecodeError, ("ascii", b"x", 0, 1, "why")),
        (ValueError(object), ValueError, (str(object),)),
        (ValueError("x" * 20_000), ValueError, ("x" * 300,)),
        (Sly(object), Exception, ("",)),
        (type("exit", (KeyError,), {})(1), KeyError, (1,)),
        (ExceptionGroup("c", [ValueError(1)]), Exception, ("c (1 sub-exception)",)),
        (StopIteration(3), RuntimeError, ("the function raised StopIteration",)),
    ):
        name, held = _runner.raised(error)
        back = _runner.exception(name, _runner.decode(json.loads(json.dumps(held))))
        assert (type(back), back.args) == (kind, args)
    for forged in ("print", "exit", "nothing", "__import__", "x" * 1000, ""):
        assert type(_runner.exception(forged, [1])) is Exception


def test_bad_rows_are_refused_when_data_is_loaded(verifier: Verifier, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    options = {"train": str(path), "fields": {"text": "prompt", "test_list": "tests", "code": "solution"}}
    options |= {"verifier": "code", "verifier_options": {"sandbox": verifier.options.sandbox}, "eval_share": 0.0}
    row = {"text": "Double it.", "test_list": DOUBLE, "code": "def f(x): return x + x"}
    path.write_text(json.dumps(row))
    (good,) = tasks.load("files", options).rows("train")
    assert good["solution"] == row["code"]
    for changed, reason in (
        ({"code": "def f(x): return x + 2"}, r"line 1: the gold answer .* scores 0\.0 .* \(wrong: test 2 of 2: it ret"),
        ({"code": None, "test_list": ["assert f(g(1))"]}, r"line 1: the reward 'code' cannot judge .*line 1 of the t"),
        (
            {"test_list": ["for x in (1, 2): assert f(x) == 3 * x"]},
            r"scores 0\.0 .* \(wrong: AssertionError: line 1 of",
        ),
        (
            {"test_list": ["x = 1 / 0", "assert f(x) or x"]},
            r"scores None .* \(unparseable_gold: the tests fail before they",
        ),
    ):
        path.write_text(json.dumps(row | changed))
        with pytest.raises(UserError, match=reason):
            tasks.load("files", options).rows("train")


def test_tolerance(best: Tier) -> None:
    exact, loose = (rewards.load("code", {"sandbox": best, "tolerance": each}) for each in (0.0, 0.01))
    for program, tests in (
        ("def f(x): return [100.9]", ["assert f(0) == [100.0]"]),
        ("def f(x): return {'a': 0.009}", ["assert f(0) == {'a': 0}"]),
        ("print('x', 100.9)", [{"input": "", "output": "x 1e2"}]),
    ):
        assert judge(exact, program, tests).status == "wrong"
        assert judge(loose, program, tests).status == "ok"
    assert judge(loose, "def f(x): return [101.1]", ["assert f(0) == [100.0]"]).status == "wrong"
    assert judge(loose, "def f(x): return 101", ["assert f(0) == 100"]).status == "wrong"  # integers are exact


def test_partial_credit_is_for_wrong_programs_only(best: Tier) -> None:
    none, share = (rewards.load("code", {"sandbox": best, "partial_credit": each}) for each in ("none", "fraction"))
    tests = [f"assert f({x}) == {2 * x}" for x in (2, 3, 4, 5)]
    two_of_four = "def f(x):\n    if x % 2: raise ValueError(x)\n    return 2 * x"
    assert (judge(none, two_of_four, tests).reward, judge(share, two_of_four, tests).reward) == (0.0, 0.5)
    assert judge(share, two_of_four, tests).status == "wrong"
    assert judge(share, two_of_four, tests).detail == "test 2 of 4: ValueError: 3"
    ends = "def f(x):\n    if x == 5: __import__('os')._exit(0)\n    return 2 * x"
    assert judge(share, ends, tests).reward == 0.75
    hungry = "def f(x):\n    if x == 5: bytearray(2**40)\n    return 2 * x"
    assert (judge(share, hungry, tests).reward, judge(share, hungry, tests).status) == (0.0, "resource")
    printed = [{"input": str(x), "output": str(2 * x)} for x in (2, 3, 4, 5)]
    assert judge(share, "x = int(input())\nprint(2 * x if x < 5 else 0)", printed).reward == 0.75
    assert judge(share, "def f(x): return 2 * x", tests).reward == 1.0


def test_a_test_has_its_own_deadline(best: Tier) -> None:
    """The clock is 50 s fast after every test: three are within 80 s each, and not within 120 s together."""
    slow = "import time\nx = float(input())\ntime.sleep(x)\nprint(x)" + LATE
    fast, run = [0.0], Sandbox.run

    def slowly(*arguments: Any) -> bytes:
        fast[0] += 50.0
        return run(*arguments)

    with pytest.MonkeyPatch.context() as patch, Sandbox(best) as sandbox:
        patch.setattr(_sandbox, "shared", lambda tier: sandbox)
        for module in (_sandbox, code):
            patch.setattr(module, "monotonic", lambda: time.monotonic() + fast[0])
        patch.setattr(Sandbox, "run", slowly)
        for deadline, expected in (
            (1000.0, ("ok", "")),
            (120.0, ("timeout", "test 3 of 3: more than 120 s for all tests")),
        ):
            verifier = rewards.load("code", {"sandbox": best, "timeout": 80.0, "deadline": deadline})
            found = verifier.attempt(fence(slow), {"tests": [{"input": "0", "output": "0.0"}] * 3})
            assert (found.status, found.detail) == expected
    verifier = rewards.load("code", {"sandbox": best, "timeout": 1.5, "deadline": 200.0})
    found = judge(verifier, slow, [{"input": "60", "output": "60.0"}])
    assert (found.status, found.seconds < SOON) == ("timeout", True)
    assert found.detail == "test 1 of 1: more than 1.5 s"
    patient = rewards.load("code", {"sandbox": best, "timeout": 5.0, "deadline": 2.0})
    found = judge(patient, slow, [{"input": "0.5", "output": "0.5"}] * 100)
    assert found.status == "timeout" and found.seconds < SOON


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("```python\na\n```", "a\n"),
        ("```py\na\n```\n```python\nb\n```\n", "b\n"),
        ("```python\na\n```\nprints\n```\n7\n```", "a\n"),
        ("```\na\n```\n```text\n7\n```", "a\n"),
        ("```cpp\nint\n```", None),
        ("```python\na\n", None),
        ("```python\na\n```\n```python\nb", "a\n"),
        ("<think>```python\na\n```</think>b", None),
        ("<think>```python\na\n```</think>```python\nb\n```", "b\n"),
        ("<think>```python\na\n```", None),
        ("````python\nx = '''\n```\n'''\n````", "x = '''\n```\n'''\n"),
        ("  ```Python\n  a\n  ```", "  a\n"),
        ("~~~python\na\n~~~", "a\n"),
        ("```python\n\n```", None),
        ("def f(x): return x", None),
        ("", None),
    ],
)
def test_the_program_of_a_completion(completion: str, program: str | None) -> None:
    found = code.extract(completion)
    assert (None if found is None else found.rstrip(" ")) == program


def test_finding_the_program_is_linear(verifier: Verifier) -> None:
    start = time.thread_time()  # which other work on the machine does not move
    for text in ("```" * 300_000, "``` \n" * 200_000, " " * 1_000_000 + "```", "~" * 1_000_000, "```\n" + "`" * 10**6):
        code.extract(text)
    assert time.thread_time() - start < 5
    (long,) = verifier.score([fence("#" * code.MAX_PROGRAM)], [{"tests": DOUBLE}])
    assert (long.reward, long.status) == (0.0, "resource")


def test_a_gold_program_may_hold_fences(verifier: Verifier) -> None:
    solution = "'''\n```python\n```\n'''\ndef f(x): return 2 * x"
    row = {"tests": DOUBLE, "solution": solution}
    assert verifier.score([verifier.gold(row) or ""], [row])[0].status == "ok"
    assert verifier.gold({"tests": DOUBLE}) is None


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
    | st.complex_numbers(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner)
    | st.sets(st.integers() | st.text()) | st.frozensets(st.integers()),
    max_leaves=20,
)  # fmt: skip


@given(plain)
@settings(max_examples=100, deadline=None)
def test_plain_values_survive_the_way_there_and_back(value: Any) -> None:
    def types(value: Any) -> Any:
        inner = value.items() if isinstance(value, dict) else value
        return type(value), [types(item) for item in inner] if isinstance(value, list | tuple | dict) else None

    back = _runner.decode(json.loads(json.dumps(_runner.encode(value))))
    assert back == value and types(back) == types(value)


def test_numbers_that_json_lacks_survive() -> None:
    for value in (math.inf, -math.inf, 2**20_000, -(2**63)):
        assert _runner.decode(json.loads(json.dumps(_runner.encode(value)))) == value
    assert math.isnan(_runner.decode(_runner.encode(math.nan)))
    for forged in ({}, {"int": 3}, {"set": 3}, {"float": "1"}, {"tuple": [], "list": []}, {"complex": [1]}, {"x": []}):
        with pytest.raises(ValueError, match="no value"):
            _runner.decode(forged)


@given(st.text(max_size=300))
@settings(max_examples=200, deadline=None)
def test_nothing_in_a_row_raises_anything_else(text: str) -> None:
    for tests in (text, [text], f"assert f({text}) == 1", f"assert f(1) == {text}"):
        with contextlib.suppress(_suites.Unreadable):
            _suites.read(tests, None)


# ------------------------------------------------------------------ attacks


def attacks(**names: Any) -> list[tuple[str, str, list[str], str]]:
    """Name, kind, statuses and program of each."""
    text = (ROOT / "tests/corpora/code_attacks.txt").read_text(encoding="utf-8")
    found = []
    for part in re.split(r"^#! ", text, flags=re.MULTILINE)[1:]:
        head, _, program = part.partition("\n")
        name, kind, statuses = (word.strip() for word in head.split("|"))
        for key, value in names.items():
            program = program.replace("{" + key + "}", str(value))
        program = program.replace("BRACKETS", "(" * 5000 + ")" * 5000).replace("NUL\n", "\0\n")
        found.append((name, kind, statuses.split(), program))
    return found


class Watched:
    """What of this machine programs could change: files, ports, processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "user"
        self.folder.mkdir()
        self.folder.chmod(0o777)
        self.secret = self.folder / "secret"
        self.secret.write_text("what only the user knows")
        self.secret.chmod(0o666)
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.setblocking(False)
        self.before = self.state()
        self.fds = psutil.Process().num_fds()

    def state(self) -> dict[str, Any]:
        try:
            self.server.accept()
            accepted = True
        except BlockingIOError:
            accepted = False
        return {
            "files": sorted(path.name for path in self.folder.iterdir()),
            "secret": self.secret.read_text(),
            "accepted": accepted,
            "filled": [name for place in PLACES for name in os.listdir(place) if name.isdecimal()],
        }

    def names(self) -> dict[str, Any]:
        port = self.server.getsockname()[1]
        return {"root": ROOT, "port": port, "folder": self.folder, "secret": self.secret, "parent": os.getpid()}


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    found = Watched(tmp_path)
    yield found
    found.server.close()


def programs_left() -> list[psutil.Process]:
    """Processes of programs and their supervisors: what a server of ours has forked, and what has lost its parent."""

    def ours(process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            marked = MARK in process.environ().get("PATH", "") and process.status() != psutil.STATUS_ZOMBIE
            return marked and any(part.endswith("_runner.py") for part in process.cmdline())
        return False

    left = []
    for process in filter(ours, psutil.process_iter()):
        with contextlib.suppress(psutil.Error):
            left += [process] if process.ppid() == 1 or ours(psutil.Process(process.ppid())) else []
    return left


def refused(tier: str) -> bool:
    """Whether this machine lacks a sandbox; then the reward is refused, and the error says what would give it."""
    if _sandbox.probed(tier).holds:  # type: ignore[arg-type]
        return False
    with pytest.raises(UserError, match=f"The sandbox {tier} does not hold on this machine") as refusal:
        rewards.load("code", {"sandbox": tier})
    assert _sandbox.REMEDIES[tier] in str(refusal.value)  # type: ignore[index]
    return True


@pytest.mark.parametrize("tier", TIERS)
def test_attacks_cost_themselves_and_nobody_else(tier: Tier, watched: Watched) -> None:
    """All in one batch, between correct programs; only where the self-test has found that the sandbox holds."""
    if refused(tier):
        return
    verifier = rewards.load("code", {"sandbox": tier, "timeout": TIMEOUT, "deadline": DEADLINE})
    warm = 4 * _workers.size()
    begun = verifier.score([fence("def f(x): return 2 * x")] * warm, [{"tests": DOUBLE}] * warm)  # all workers
    assert {verdict.status for verdict in begun} == {"ok"}
    watched.fds = psutil.Process().num_fds()
    completions, rows, expected = [], [], []
    corpus = attacks(**watched.names())
    assert len(corpus) >= 60
    for name, kind, statuses, program in corpus:
        program += f"\n{LATE}\n" if "timeout" in statuses else ""
        completions += [fence(program), fence("def f(x): return 2 * x")]
        rows += [{"tests": {"call": DOUBLE, "stdin": PRINTED, "asserts": ASSERTED}[kind]}, {"tests": DOUBLE}]
        expected += [(name, statuses), (f"neighbour of {name}", ["ok"])]
    found = verifier.score(completions, rows)
    wrong = [
        (name, statuses, verdict)
        for verdict, (name, statuses) in zip(found, expected, strict=True)
        if verdict.status not in statuses or verdict.reward != float(verdict.status == "ok")
    ]
    assert not wrong
    late = [(name, verdict.seconds) for verdict, (name, _) in zip(found, expected, strict=True)
            if verdict.seconds > DEADLINE + SOON]  # fmt: skip
    assert not late
    assert eventually(lambda: not programs_left()), programs_left()
    assert watched.state() == watched.before
    assert psutil.Process().num_fds() <= watched.fds


@pytest.mark.parametrize("tier", ["bubblewrap", "unshare"])
def test_namespaces_hold_alone(tier: Tier) -> None:
    """Without Landlock and seccomp, programs may fork: their namespace takes all of them along."""
    if refused(tier):
        return
    found = _sandbox.probe(tier, Limits(seccomp=False, landlock=0))
    assert found.holds, found.reason
    assert eventually(lambda: not programs_left())


@pytest.mark.parametrize(
    "version", [1, pytest.param(3, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)]
)
def test_landlock_of_an_older_kernel_holds(version: int) -> None:
    """What it cannot bind yet, such as signals, seccomp refuses."""
    if refused("landlock"):
        return
    found = _sandbox.probe("landlock", Limits(landlock=version))
    assert found.holds, found.reason


@pytest.mark.parametrize("tier", TIERS)
def test_programs_have_the_standard_library_and_the_devices(tier: Tier) -> None:
    """In all sandboxes, whoever may walk to where Python is."""
    if refused(tier):
        return
    program = (
        "import asyncio, csv, hashlib, importlib.resources, json, mmap, sqlite3, unicodedata, xml.etree.ElementTree\n"
        "import zlib, zoneinfo\nfor name in ('null', 'urandom'): open('/dev/' + name, 'r+b', 0).read(1)\n"
        "open('/dev/null', 'w').write('x')\n"
        "try: open('/tmp/x', 'w').write('x')\nexcept OSError: print('no folder')\nelse: print(open('/tmp/x').read())"
    )
    with Sandbox(tier) as sandbox:
        assert sandbox.run(program, b"", 20.0) == (b"no folder\n" if tier == "landlock" else b"x\n")


CALLED = """
ptrace 101 0 0 0 0, process_vm_readv 310 P 0 0 0 0 0, pidfd_open 434 1 0, pidfd_getfd 438 0 0 0, kcmp 312 1 1 0 0 0,
rt_sigqueueinfo 129 P 9 B, tgkill 234 P P 0, kill 62 -1 0, prlimit64 302 1 7 0 B, setpriority 141 0 0 -5,
sched_setaffinity 203 0 8 B, sched_setscheduler 144 0 1 B, ioprio_set 251 1 0 0, vfork 58, clone 56 17 0 0 0 0,
clone3 435 B 88, execve 59 B 0 0, execveat 322 -100 B 0 0 0, setsid 112, setpgid 109 0 0, prctl 157 36 1 0 0 0,
unshare 272 268435456, setns 308 3 0, chroot 161 B, mount 165 B B B 0 0, fsopen 430 B 0, open_tree 428 -100 B 0,
pivot_root 155 B B, personality 135 262144, seccomp 317 0 0 0, landlock_create_ruleset 444 0 0 1, setuid 105 0,
socket 41 1 1 0, socket 41 2 1 0, socket 41 16 3 0, socketpair 53 1 2 0 B, io_uring_setup 425 8 B, userfaultfd 323 0,
memfd_create 319 B 0, memfd_secret 447 0, shmget 29 1234 4096 950, semget 64 1234 1 950, msgget 68 1234 950,
mq_open 240 B 66 438 0, inotify_init1 294 0, fanotify_init 300 0 0, bpf 321 0 0 0, perf_event_open 298 B 0 -1 -1 0,
add_key 248 B B B 1 -3, keyctl 250 0 0, mlockall 151 3, process_madvise 440 1 0 0 0 0, splice 275 0 0 1 0 1 0,
vmsplice 278 1 0 0 0, timer_create 222 0 0 B, symlink 88 B B, link 86 B B, mknod 133 B 4534 2049, chmod 90 B 511,
truncate 76 B 0, utimensat 280 -100 B 0 0, open_by_handle_at 304 0 0 0, name_to_handle_at 303 -100 B 0 0 0,
modify_ldt 154 0 B 10, iopl 172 3, syslog 103 3 B 100, reboot 169 0 0 0 0, settimeofday 164 0 0, swapon 167 B 0,
quotactl 179 0 0 0 0, fcntl 72 0 8 1, fcntl 72 0 10 9, fcntl 72 0 1024 0, ioctl 16 0 21522 B, x32_getpid 1073741863
"""
"""System calls by their numbers on x86_64 and arguments; B: a buffer of NULs, P: the parent."""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="calls by the numbers of this machine")
@pytest.mark.parametrize("tier", TIERS)
def test_no_system_call_leads_out(tier: Tier) -> None:
    if refused(tier):
        return
    program = (
        "import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\nb = ctypes.create_string_buffer(4096)\n"
        f"for call in {CALLED!r}.split(','):\n"
        "    name, *words = call.split()\n"
        "    given = [b if w == 'B' else ctypes.c_long(os.getppid() if w == 'P' else int(w)) for w in words]\n"
        "    if c.syscall(*given) >= 0 or ctypes.get_errno() not in (1, 25, 38): print(name, ctypes.get_errno())\n"
        "print('all')"
    )
    with Sandbox(tier) as sandbox:
        assert sandbox.run(program, b"", 20.0) == b"all\n"  # all others EPERM, ENOTTY or ENOSYS


def test_no_program_sees_another(best: Tier) -> None:
    """Nor its own later inputs."""
    curious = (
        "import gc, sys\nseen = []\n"
        "def f(x):\n    seen.append(x)\n"
        "    texts = [o for o in gc.get_objects() if isinstance(o, (list, dict, tuple))]\n"
        "    return any('later' + str(n) in repr(t)[:10**5] for t in texts for n in range(len(seen), 9))"
    )
    tests = [f"assert f('later{n}') is False" for n in range(3)]
    verifier = rewards.load("code", {"sandbox": best, "deadline": 10.0})
    assert judge(verifier, curious, tests).status == "ok"
    leaves = "import builtins, sys\nbuiltins.mark = sys.mark = 1\ndef f(x): return 2 * x"
    looks = "import builtins, sys\ndef f(x): return 0 if hasattr(builtins, 'mark') or hasattr(sys, 'mark') else 2 * x"
    found = verifier.score([fence(leaves), fence(looks)] * 2, [{"tests": DOUBLE}] * 4)
    assert [verdict.status for verdict in found] == ["ok"] * 4


def test_from_a_thread_and_from_asyncio(best: Tier) -> None:
    verifier = rewards.load("code", {"sandbox": best, "deadline": 3.0})
    completions = [fence(program) for program in PROGRAMS if best != "none" or "fork" not in program]
    statuses = [status for program, status in PROGRAMS.items() if best != "none" or "fork" not in program]

    def score() -> list[str]:
        return [verdict.status for verdict in verifier.score(completions, [{"tests": DOUBLE}] * len(completions))]

    found: list[list[str]] = []
    thread = threading.Thread(target=lambda: found.append(score()))
    thread.start()
    thread.join()

    async def both() -> list[list[str]]:
        return list(await asyncio.gather(*(asyncio.to_thread(score) for _ in range(2))))

    assert [*found, *asyncio.run(both())] == [statuses] * 3


@pytest.mark.slow
def test_in_each_of_two_processes(tmp_path: Path, best: Tier) -> None:
    assert best != "none" or refused("landlock")
    if best == "none":
        return
    launch(2, ["-m", "tests.two_coders", str(tmp_path)])
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found == [list(PROGRAMS.values())] * 2
    assert eventually(lambda: not programs_left())


@pytest.mark.parametrize("end", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_nothing_outlives_a_trainer_that_is_killed(end: signal.Signals, best: Tier) -> None:
    script = (
        "import threading, time\nfrom posttrain import rewards\n"
        f"v = rewards.load('code', {{'sandbox': {best!r}, 'timeout': 60.0, 'deadline': 60.0}})\n"
        "rows = [{'tests': ['assert f(1)']}]\n"
        "print(v.score(['```python\\ndef f(x): return x\\n```'], rows)[0].status, flush=True)\n"
        "loop = '```python\\nimport time\\nwhile True: time.sleep(0.1)\\n```'\n"
        "threading.Thread(target=v.score, args=([loop] * 2, rows * 2), daemon=True).start()\ntime.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ok\n"
        assert eventually(lambda: len(programs_left()) >= 2)
        process.send_signal(end)
        process.wait()
        assert eventually(lambda: not programs_left())


def test_a_server_that_somebody_kills_is_begun_again(verifier: Verifier) -> None:
    assert judge(verifier, "def f(x): return 2 * x", DOUBLE).status == "ok"
    servers = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            servers += [process] if any(part.endswith("_runner.py") for part in process.cmdline()) else []
    assert servers
    for server in servers:
        server.kill()
    found = verifier.score([fence("def f(x): return 2 * x")] * 4, [{"tests": DOUBLE}] * 4)
    assert [verdict.status for verdict in found] == ["ok"] * 4


# ------------------------------------------------------------------ choosing a sandbox


@pytest.fixture
def nothing_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sandbox, "probed", lambda tier: Probe(tier, "not on this machine"))


@pytest.mark.usefixtures("nothing_holds")
def test_without_isolation_nothing_runs_unless_that_is_named() -> None:
    with pytest.raises(UserError, match=r"^No sandbox holds on this machine") as refusal:
        rewards.load("code")
    for wanted in ("package bubblewrap", "user namespaces", "CONFIG_SECURITY_LANDLOCK", "say sandbox: none"):
        assert wanted in str(refusal.value)
    assert rewards.load("code", {"sandbox": "none"}).deadline == 5.75


def test_none_runs_programs_within_limits() -> None:
    verifier = rewards.load("code", {"sandbox": "none", "deadline": 10.0})
    programs = ["def f(x): return 2 * x", "def f(x): return 3 * x", "def f(x): return len(bytearray(2**40))"]
    found = verifier.score([fence(program) for program in programs], [{"tests": DOUBLE}] * 3)
    assert [verdict.status for verdict in found] == ["ok", "wrong", "resource"]
    found = verifier.score([fence(program) for program in programs[:2]], [{"tests": ASSERTED}] * 2)
    assert [verdict.status for verdict in found] == ["ok", "wrong"]


def test_the_first_sandbox_that_holds_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    held = _sandbox.Tested("an attack", True, "contained", 0.1)
    escaped = _sandbox.Tested("an attack", False, "escaped", 0.1)
    for holding in TIERS:
        probes = {t: Probe(t, None, (held if t == holding else escaped,), 0.1) for t in TIERS}
        monkeypatch.setattr(_sandbox, "probed", probes.__getitem__)
        assert _sandbox.choose("auto") == holding
        for tier in TIERS:
            if tier != holding:
                with pytest.raises(UserError, match=f"{tier} does not hold .*an attack: escaped"):
                    _sandbox.choose(tier)


def test_a_sandbox_that_fails_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = rewards.load("code", {"sandbox": "none"})

    def fail(tier: str, *, anew: bool = False) -> Sandbox:
        raise _sandbox.Unavailable("no room")

    monkeypatch.setattr(_sandbox, "shared", fail)
    found = verifier.attempt(fence("def f(x): return 2 * x"), {"tests": DOUBLE})
    assert (found.reward, found.status, found.detail) == (None, "verifier_error", "no room")


def test_a_sandbox_that_cannot_be_locked_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not shut is said before the program is read."""
    limits = Limits(cpu="no number")  # type: ignore[arg-type]
    with Sandbox("none", limits) as sandbox, pytest.raises(_sandbox.Unavailable, match="TypeError"):
        sandbox.run("print(1)", b"", 10.0)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(_sandbox.Unavailable, match="server does not start"):
        Sandbox("none")


@pytest.mark.parametrize("holds", [True, False])
def test_the_doctor_says_what_holds_and_exits_accordingly(monkeypatch: pytest.MonkeyPatch, holds: bool) -> None:
    def probe(tier: Tier) -> Probe:
        if tier == "landlock":
            return Probe(
                tier, None, (_sandbox.Tested("fork bomb", holds, "contained" if holds else "[red]out", 0.1),), 0.02
            )
        return Probe(tier, "Landlock: [Errno 38] not here")

    monkeypatch.setattr(_sandbox, "probe", probe)
    done = CliRunner().invoke(app, ["doctor", "sandbox"], env={"COLUMNS": "200"})
    assert done.exit_code == (0 if holds else 1)
    for words in ("fork bomb", "20 ms", "the package bubblewrap", "[Errno 38]", "contained" if holds else "[red]out"):
        assert words in done.output
    done = CliRunner().invoke(app, ["doctor", "sandbox", "--json"])
    said = json.loads(done.output)
    assert said["taken"] == ("landlock" if holds else None)
    assert [tier["holds"] for tier in said["tiers"]] == [False, False, holds]


def test_the_filter_allows_what_it_lists_and_nothing_else() -> None:
    """An interpreter of the filter's instructions, for both machines."""

    def decide(program: list[tuple[int, int, int, int]], arch: int, number: int, *arguments: int) -> int:
        words = {0: number, 4: arch, **{16 + 8 * i: value & 0xFFFFFFFF for i, value in enumerate(arguments)}}
        held, place = 0, 0
        while True:
            what, true, false, constant = program[place]
            if what == 0x06:
                return constant
            if what in (0x20, 0x54):
                held = words.get(constant, 0) if what == 0x20 else held & constant
                place += 1
                continue
            holds = {0x15: held == constant, 0x35: held >= constant, 0x45: bool(held & constant)}[what]
            place += 1 + (true if holds else false)

    allowed, refusal, absent, dead = 0x7FFF0000, 0x50001, 0x50026, 0x80000000
    thread = 0x3D0F00
    for machine, column in _runner.MACHINE.items():
        program, arch = _runner.filter_program(machine, pid=77), (0xC000003E, 0xC00000B7)[column]
        some = {name: numbers[column] for name, numbers in _runner._SOME.items()}
        fork, other, ioctl, kill, tgkill = (some[name] for name in ("clone", "clone3", "ioctl", "kill", "tgkill"))
        limit, opens, controls, pair = (some[name] for name in ("prlimit64", "openat", "fcntl", "socketpair"))
        permitted = {numbers[column] for numbers in _runner.CALLS.values()} - {-1}
        assert not permitted & set(some.values())
        for number in range(-1, 600):
            expected = allowed if number in permitted else absent if number >= 447 else refusal
            if number not in some.values() and number >= 0:
                assert decide(program, arch, number) == expected, (machine, number)
        assert decide(program, 0x40000003, 1) == dead  # 32 bits
        assert decide(program, arch, 0x40000001) == absent  # x32
        assert decide(program, arch, fork, thread) == allowed
        assert decide(program, arch, fork, 17) == refusal  # SIGCHLD: a process
        assert decide(program, arch, fork, thread | 0x10000000) == refusal  # with a user namespace
        assert decide(program, arch, other) == absent
        assert decide(program, arch, kill, 77) == allowed and decide(program, arch, tgkill, 77) == allowed
        assert decide(program, arch, kill, -1) == refusal and decide(program, arch, kill, 0) == refusal
        assert decide(program, arch, ioctl, 0, 0x5401) == allowed and decide(program, arch, ioctl, 0, 0x5412) == 0x50019
        assert decide(program, arch, limit, 0) == allowed and decide(program, arch, limit, 1) == refusal
        for flags in (0, 1, 2, os.O_CREAT | 1, os.O_TRUNC | 1, os.O_TRUNC | 2, os.O_DIRECTORY, os.O_PATH):
            assert decide(program, arch, opens, -100, 0, flags) == allowed
        for flags in (os.O_TRUNC, os.O_TRUNC | os.O_CREAT, 3, os.O_TRUNC | 3):  # cut short what is not opened to write
            assert decide(program, arch, opens, -100, 0, flags) == refusal
        assert {command for command in range(2048) if decide(program, arch, controls, 5, command) == allowed} == {
            0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1031, 1032, 1033, 1034,
        }  # fmt: skip
        assert decide(program, arch, pair, 1, 1) == decide(program, arch, pair, 1, 5 | 0o2000000) == allowed
        for family, kind in ((1, 2), (1, 3), (1, 2 | 0o2000000), (2, 1), (16, 1)):  # datagrams; other families
            assert decide(program, arch, pair, family, kind) == refusal


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads the headers of this machine")
def test_system_calls_have_the_numbers_of_the_headers() -> None:
    """Where the kernel's headers are installed; the generic ones hold for aarch64."""
    texts = []
    for path in ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h"):
        texts.append(Path(path).read_text() if Path(path).is_file() else "")
    named = [dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)) for text in texts]
    for name, numbers in {**_runner.CALLS, **_runner._SOME}.items():
        for known, number in zip(named, numbers, strict=True):
            name = "fstatat" if known is named[1] and name == "newfstatat" else name
            if name in known and number >= 0:
                assert int(known[name]) == number, name


def test_the_options_of_the_reward() -> None:
    for options, reason in (
        ({"executor": {"url": "http://127.0.0.1:1"}}, "executor's url has no effect on this machine"),
        ({"executor": {"kind": "piston"}}, "piston needs a url"),
        ({"executor": {"kind": "sandbox_fusion", "url": "http://h", "version": "3"}}, "version has no effect"),
        ({"executor": {"kind": "piston", "url": "http://h"}, "sandbox": "none"}, "sandbox has no effect"),
        ({"executor": {"kind": "piston", "url": "http://h"}, "deadline": 3.0}, "deadline has no effect"),
        ({"executor": {"kind": "piston", "url": "h:80"}}, "no address of a server"),
        ({"timeout": 0.0}, "'timeout'"),
        ({"sandbox": "firejail"}, "'sandbox'"),
    ):
        with pytest.raises(UserError, match=reason):
            rewards.load("code", options)
    verifier = pickle.loads(pickle.dumps(rewards.load("code", {"sandbox": "none", "deadline": 2.0})))  # noqa: S301
    assert verifier.deadline == 2.75
    remote = rewards.load("code", {"executor": {"kind": "piston", "url": "http://h:1", "deadline": 9.0}})
    assert pickle.loads(pickle.dumps(remote)).deadline == 9.75  # noqa: S301


# ------------------------------------------------------------------ executors elsewhere


class Executor(http.server.BaseHTTPRequestHandler):
    """Speaks both formats; the first part of a path says how it behaves."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[dict[str, Any]]] = []
    fail: ClassVar[int] = 0
    sandbox: ClassVar[Sandbox]

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append(request)
        _, behaviour, *path = self.path.split("/", 2)
        if behaviour == "late":
            time.sleep(0.6)
        if behaviour == "never":
            time.sleep(2 * SOON)
            self.close_connection = True
            return
        if behaviour == "drip":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            for _ in range(999):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)
            self.close_connection = True
            return
        if behaviour == "garbage":
            return self.answer(200, b"<html>")
        if behaviour == "nothing":
            return self.answer(200, b"{}")
        if behaviour == "500" or (behaviour == "twice" and type(self).fail):
            type(self).fail -= 1
            return self.answer(500, b'{"message": "no room"}')
        if behaviour == "broken":
            return self.answer(
                200, json.dumps({"status": "SandboxError", "message": "disk full", "run": None}).encode()
            )
        self.answer(200, json.dumps(self.run(path[0], request)).encode())

    def run(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        source = request["code"] if path == "run_code" else request["files"][0]["content"]
        timeout = request["run_timeout"] / (1 if path == "run_code" else 1000)
        status, stdout, stderr = "", "", ""
        try:
            stdout = self.sandbox.run(source, request["stdin"].encode(), timeout).decode()
        except Stopped as stopped:
            status, stderr = stopped.status, str(stopped)
        code = int(status == "wrong")
        if path == "run_code":
            ended = "TimeLimitExceeded" if status == "timeout" else "Finished"
            result = {"status": ended, "execution_time": 0.1, "return_code": code, "stdout": stdout, "stderr": stderr}
            return {"status": "Failed" if status else "Success", "message": "", "compile_result": None,
                    "run_result": result, "executor_pod_name": None, "files": {}}  # fmt: skip
        killed = status == "timeout"
        return {"language": "python", "version": "3.12.0", "run": {
            "stdout": stdout, "stderr": stderr, "output": stdout + stderr, "code": None if killed else code,
            "signal": "SIGKILL" if killed else None}}  # fmt: skip

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def executor() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Executor)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    with Sandbox("none") as Executor.sandbox:
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        server.server_close()
        thread.join()


def remote(kind: str, url: str, timeout: float = 60.0, **options: Any) -> Verifier:
    executor = {"kind": kind, "url": url, "deadline": 300.0, **options}
    return rewards.load("code", {"timeout": timeout, "executor": executor})


@pytest.mark.parametrize("kind", ["sandbox_fusion", "piston"])
def test_an_executor_judges_as_the_sandbox_does(executor: str, kind: str) -> None:
    verifier = remote(kind, executor + "/right")
    Executor.asked.clear()
    programs = [
        ("def f(x): return 2 * x", DOUBLE, "ok"),
        ("def f(x):\n    print('noise')\n    return x + 2", DOUBLE, "wrong"),
        ("def f(x): return (x, {x})", ["assert f(1) == (1, {1})"], "ok"),
        ("def f(x): return x.upper()", ["assert f('secret input') == 'SECRET INPUT'"], "ok"),
        ("print(input().upper())", [{"input": "secret input", "output": "SECRET INPUT"}], "ok"),
        ("def f(x): return object()", DOUBLE, "wrong"),
        ("def f(x): raise SystemExit", DOUBLE, "wrong"),
        ("import os\nos._exit(0)", DOUBLE, "wrong"),
        ("def f(x:", DOUBLE, "wrong"),
        ("print(2 * int(input()))", PRINTED, "ok"),
        ("print(4)", PRINTED, "wrong"),
        ("1 / 0", PRINTED, "wrong"),
    ]
    found = verifier.score([fence(each[0]) for each in programs], [{"tests": each[1]} for each in programs])
    assert [verdict.status for verdict in found] == [each[2] for each in programs], found
    asked = json.dumps(Executor.asked)
    assert "secret input" in asked and "SECRET INPUT" not in asked
    unasked = judge(verifier, "def f(x): return 2 * x", ASSERTED)
    assert (unasked.status, unasked.reward) == ("unparseable_gold", None)
    assert unasked.detail.endswith("only asserts can be turned into calls, and asserts are run on this machine only")
    slow = remote(kind, executor + "/right", timeout=0.7)
    assert judge(slow, "while True: pass", PRINTED).status == "timeout"
    assert judge(slow, "def f(x):\n    while True: pass", DOUBLE).status == "timeout"


def test_the_formats_of_the_requests(executor: str) -> None:
    Executor.asked.clear()
    for kind in ("sandbox_fusion", "piston"):
        assert judge(remote(kind, executor + "/right"), "print(1)", [{"input": "x", "output": "1"}]).status == "ok"
    assert Executor.asked == [
        {"code": "print(1)\n", "language": "python", "stdin": "x", "compile_timeout": 60.0, "run_timeout": 60.0},
        {"language": "python", "version": "*", "files": [{"name": "main.py", "content": "print(1)\n"}], "stdin": "x",
         "args": [], "compile_timeout": 60000, "run_timeout": 60000, "run_memory_limit": 536870912},
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["sandbox_fusion", "piston"])
@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [("500", "answered 500"), ("garbage", "something else than a JSON"), ("nothing", "failed"), ("broken", "disk full"),
     ("never", "did not answer within"), ("drip", "did not answer within")],
)  # fmt: skip
def test_an_executor_that_fails_gives_no_reward(executor: str, kind: str, behaviour: str, reason: str) -> None:
    deadline = 0.8 if reason == "did not answer within" else 300.0
    verifier = remote(kind, f"{executor}/{behaviour}", deadline=deadline, retries=1)
    start = time.perf_counter()
    found = judge(verifier, "def f(x): return 2 * x", DOUBLE)
    assert time.perf_counter() - start < SOON
    assert (found.reward, found.status) == (None, "verifier_error")
    assert reason in found.detail


def test_what_a_failure_of_the_executor_gives(executor: str) -> None:
    late = remote("piston", f"{executor}/late")
    assert judge(late, "def f(x): return 2 * x", DOUBLE).status == "ok"
    Executor.fail = 2
    assert judge(remote("piston", f"{executor}/twice", retries=1), "def f(x): return 2 * x", DOUBLE).reward is None
    Executor.fail = 2
    assert judge(remote("piston", f"{executor}/twice", retries=2), "def f(x): return 2 * x", DOUBLE).reward == 1.0
    value = judge(remote("piston", f"{executor}/500", on_error=-1.0, retries=0), "def f(x): return 2 * x", DOUBLE)
    assert (value.reward, value.status) == (-1.0, "verifier_error")
    with pytest.raises(UserError, match=r"executor http://127.*/500 failed .*no room.*: mend it"):
        judge(remote("piston", f"{executor}/500", on_error="raise", retries=0), "def f(x): return 2 * x", DOUBLE)


# ------------------------------------------------------------------ the task


@pytest.fixture(scope="module")
def task() -> tasks.BaseTask:
    return tasks.load("code", {"rows": 120, "max_steps": 3})


def test_rows_of_the_task(task: tasks.BaseTask) -> None:
    train, held_out = task.rows("train"), task.rows("eval")
    assert len(train) == 120 and 5 < len(held_out) < 60
    assert len({row["key"] for row in [*train, *held_out]}) == len(train) + len(held_out)
    assert tasks.fingerprint(train) == tasks.fingerprint(tasks.load("code", {"rows": 120}).rows("train"))
    assert train[:50] == tasks.load("code", {"rows": 50}).rows("train")
    for row in train:
        suite = json.loads(row["tests"])
        assert suite["function"] == "solve" and len(suite["cases"]) == 8
        shown = {line.partition(" returns ")[0] for line in row["prompt"][0]["content"].splitlines()}
        assert not shown & {f"solve({case['args'][0]!r})" for case in suite["cases"]}
        assert len({repr(case["output"]) for case in suite["cases"]}) >= 3
    with pytest.raises(UserError, match=r"has \d+ training prompts .* 5000 were asked"):
        tasks.load("code", {"rows": 5000, "max_steps": 1}).rows("train")
    with pytest.raises(UserError, match="min_steps 4 exceeds max_steps 3"):
        tasks.load("code", {"min_steps": 4})


def test_functions_that_do_the_same_fall_in_one_split(task: tasks.BaseTask) -> None:
    def behaviour(row: dict[str, Any]) -> str:
        space: dict[str, Any] = {}
        exec(row["solution"], space)  # noqa: S102 - our own
        kind = row["key"].partition(":")[2].partition(" |")[0]
        draw = random.Random(5)
        return kind + repr([space["solve"](task_code.draw_value(kind, draw)) for _ in range(300)])

    found = {row["key"]: (behaviour(row), split) for split in ("train", "eval") for row in task.rows(split)}  # type: ignore[arg-type]
    assert len({one for one, _ in found.values()}) < len(found)  # some do the same
    assert len(set(found.values())) == len({one for one, _ in found.values()})


def test_golds_of_the_task_pass_and_constants_fail(task: tasks.BaseTask, best: Tier) -> None:
    name, options = task.verifier
    verifier = rewards.load(name, {**options, "sandbox": best, "deadline": 10.0})
    rows = task.rows("train")[:40]
    golds = verifier.score([verifier.gold(row) or "" for row in rows], rows)
    assert [verdict.reward for verdict in golds] == [1.0] * len(rows)
    pairs = task.demonstrations(rows, 10, seed=0)
    assert {verdict.reward for verdict in verifier.score([p[1] for p in pairs], [p[0] for p in pairs])} == {1.0}
    first = [json.loads(row["tests"])["cases"][0]["output"] for row in rows]
    constants = verifier.score([fence(f"def solve(x): return {value!r}") for value in first], rows)
    assert {verdict.reward for verdict in constants} == {0.0}


def test_every_step_says_what_it_does() -> None:
    """The text of a step and our own function agree on a hundred inputs."""
    draw = random.Random(1)
    for kind in task_code.KINDS:
        for step in task_code._steps(kind, 3, "a"):
            ast.parse(step.source, mode="eval")
            for _ in range(100):
                value = task_code.draw_value(kind, draw)
                assert eval(step.source, {"x": value}) == step.does(value), step  # noqa: S307 - our own
