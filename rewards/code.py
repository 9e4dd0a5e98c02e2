r"""Code: the program does what its tests want, run in a sandbox.

The program is the last closed ```python block after the last `</think>`, or the last block without a language where
there is none in Python. The row's `tests` say what it is fed and what must come; `_suites` lists the forms, those of
MBPP, HumanEval, APPS and TACO among them. There are two kinds: `stdin_stdout`, a fresh process per test, and
`function_call`, one process that is called once per test. Programs have Python's standard library, and nothing else.

The expected outputs never enter the program's sandbox. This side sends an input, what runs there answers with plain
data, and this side compares: exactly, or with `tolerance`; printed text line by line, without regard to white space at
ends and to its amount. So whatever a program does to `==`, to `assert`, to the process or to the runner, it can only
claim a value, and it does not know which one is right. Nor can it see the input of a later test before it has answered
an earlier one, except on an executor elsewhere, which is sent all calls at once. A row may have a `solution`, a whole
program: data with a wrong one is refused when it is loaded.

Asserts are taken apart into calls where they can be. Otherwise (loops, helpers, `try`, random inputs) they run as they
are, in a sandbox of their own where the function is a stub; this side carries the calls and the results between the two
sandboxes, as plain data, so that a program still sees one input after the other and no assert. The program passes when
the tests end without an exception. What ends them before their first call is their own fault (`unparseable_gold`, as
are tests that can be read in neither way); the program begins with that call and answers for all that follows: a text
in the place of a number makes the tests fail with a TypeError, and the program `wrong`. An exception of the program
comes out of the stub as the nearest built-in class, with its arguments. These tests count as one, without `tolerance`
and partial credit; `random` begins with the seed 0; they may make 10,000 calls; an executor elsewhere does not take
them. What differs from a single process: arguments and results are copies, so the tests see no change of an argument in
place, no identity, and no result that changes later; classes of the program's own, functions and generators are no
results, nor arguments (TypeError), and a named tuple is a tuple; a StopIteration is a RuntimeError, lest it end a loop
over calls; the stub has neither signature nor docstring. Tests that run what a function returns judge by what it says.

A test that fails makes the program `wrong`, as does an exception or an exit status. A program that is over a deadline
(`timeout` per test, `deadline` for all) or 4 s of CPU time is `timeout`; `resource` is one that asks for more than 512
MiB, 24 threads, files of 8 MiB, 64 open files or 1 MiB of output. These are 0.0. A sandbox that fails is
`verifier_error`. With `partial_credit: fraction` a `wrong` program gets the share of tests that it passes; only 1.0 is
correct, so the accuracy stays apart.

Isolation is bubblewrap, else namespaces of our own, else Landlock and seccomp, the first that holds against the attacks
of a self-test (`posttrain doctor sandbox` shows it); `sandbox: none` runs programs and asserts without and must be
named. Programs run as many at a time as there are workers (POSTTRAIN_REWARD_WORKERS). What a program needs to know of
the machine is not there: no environment, no network, no files but Python's, and no other process.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from posttrain.errors import UserError
from posttrain.rewards import Completion, RewardOptions, Verdict, Verifier, _sandbox, _suites, after_thinking
from posttrain.rewards._executors import Remote
from posttrain.rewards._sandbox import Program, Sandbox, Stopped, Tier, Unavailable

MAX_PROGRAM = 100_000
"""Characters of a program."""
MAX_CALLS = 10_000
"""Calls that asserts which are run may make of a function."""
MARGIN = 0.75
"""Seconds beyond its deadline after which a worker is killed, where it has not stopped the program by itself."""

_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+#-]*)[^\n`]*$", re.MULTILINE)
_PYTHON = frozenset({"python", "python3", "py"})

Seconds = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]


def _changed(options: RewardOptions, *names: str) -> list[str]:
    """Which of the fields depart from their defaults. A worker is given all of them, so which were set says nothing."""
    fields = type(options).model_fields
    return [name for name in names if getattr(options, name) != fields[name].get_default(call_default_factory=True)]


class Executor(RewardOptions):
    """Where programs run. All but `kind` is for a server elsewhere."""

    kind: Literal["local", "sandbox_fusion", "piston"] = "local"
    """In a sandbox of this machine, or by a server that speaks one of two formats."""
    url: str | None = None
    """Its address, without the path of the format."""
    version: str = "*"
    """Of Python, for Piston."""
    retries: Annotated[int, Field(ge=0, le=10)] = 2
    """How often it is asked again after it has failed."""
    deadline: Seconds = 30.0
    """Seconds for all tests of one completion, waiting for the server included."""
    on_error: Literal["none", "raise"] | Annotated[float, Field(allow_inf_nan=False)] = "none"
    """What a failure of the server gives: no reward, the end of the run, or this reward."""

    @model_validator(mode="after")
    def _matches_its_kind(self) -> Executor:
        others = _changed(self, "url", "version", "retries", "deadline", "on_error")
        if self.kind == "local" and others:
            raise ValueError(f"the executor's {others[0]} has no effect on this machine: remove it or name a kind")
        if self.kind != "local" and self.url is None:
            raise ValueError(f"the executor {self.kind} needs a url: write one like http://127.0.0.1:8080")
        if self.kind == "sandbox_fusion" and "version" in others:
            raise ValueError("the executor's version has no effect with sandbox_fusion: remove it")
        return self


class Options(RewardOptions):
    """Options of the reward `code`."""

    sandbox: Literal["auto", "bubblewrap", "unshare", "landlock", "none"] = "auto"
    """How programs are isolated: the best that holds on this machine, a certain one, or not at all."""
    timeout: Seconds = 5.0
    """Seconds for one test."""
    deadline: Seconds = 5.0
    """Seconds for all tests of one program; tests in processes of their own may need more of them."""
    tolerance: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Floats may differ from the expected value y by this times max(1, |y|), unless asserts are run as they are."""
    partial_credit: Literal["none", "fraction"] = "none"
    """Reward of a program that fails some test: 0, or the share of tests that it passes; of asserts that are run, 0."""
    entry_point: bool = False
    """Whether rows name their function in a column `entry_point`, as HumanEval's do."""
    executor: Executor = Field(default_factory=Executor)
    """Where programs run."""

    @model_validator(mode="after")
    def _one_place(self) -> Options:
        changed = _changed(self, "sandbox", "deadline")
        if self.executor.kind != "local" and changed:
            raise ValueError(f"{changed[0]} has no effect with the executor {self.executor.kind}: remove it")
        return self


class Reward(Verifier):
    """1.0 when the program passes all tests, else 0.0 or the partial credit that the options give.

    Raises:
        UserError: no sandbox holds on this machine, or the executor's address is none.
    """

    name = "code"
    requires: tuple[str, ...] = ("tests",)
    isolated = True

    def __init__(self, options: Options) -> None:
        self.options = options
        if options.entry_point:
            self.requires = ("tests", "entry_point")
        remote = options.executor
        self._tier: Tier | None = None
        if remote.kind == "local":
            self._tier = _sandbox.choose(options.sandbox)
        else:
            self._remote = Remote(remote.kind, str(remote.url), version=remote.version, retries=remote.retries)

    def __reduce__(self) -> tuple[Any, ...]:
        """The options alone."""
        return type(self), (self.options,)

    @property
    def deadline(self) -> float:
        """Seconds that one completion may take, and some more, so that the program is stopped and not the worker."""
        remote = self.options.executor
        return MARGIN + float(self.options.deadline if remote.kind == "local" else remote.deadline)

    def prepare(self) -> None:
        """Start the process that programs are forked from; all workers use it."""
        if self._tier is not None:
            _sandbox.shared(self._tier)

    def decide(self, completion: str, row: Mapping[str, Any]) -> Verdict | None:
        """What needs no program to be run."""
        return self._read(completion, row)[2]

    def verify(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """Run the program; `Verdict.answer` is its text."""
        suite, program, verdict = self._read(completion, row)
        if verdict is not None or suite is None:
            return verdict or Verdict(None, "verifier_error")
        passed = 0
        failure: tuple[Literal["wrong", "timeout", "resource"], str] | None = None
        try:
            run = self._run_here if self._tier is not None else self._run_elsewhere
            for number, problem in enumerate(run(program, suite), start=1):
                if problem is None:
                    passed += 1
                    continue
                status, reason = problem
                if failure is None or status != "wrong":
                    failure = status, reason if suite.script else f"test {number} of {len(suite.cases)}: {reason}"
        except _suites.Unreadable as error:
            return Verdict(None, "unparseable_gold", program, str(error))
        except Unavailable as error:
            given = self.options.executor.on_error
            return Verdict(given if isinstance(given, float) else None, "verifier_error", program, str(error))
        if failure is None:
            return Verdict(1.0, "ok", program)
        credit = self.options.partial_credit == "fraction" and failure[0] == "wrong" and not suite.script
        return Verdict(passed / len(suite.cases) if credit else 0.0, failure[0], program, failure[1])

    def score(self, completions: Sequence[Completion], rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """Judge a batch.

        Raises:
            UserError: the executor failed, and `on_error` is `raise`.
        """
        verdicts = super().score(completions, rows)
        if self.options.executor.on_error == "raise":
            for verdict in verdicts:
                if verdict.status == "verifier_error":
                    raise UserError(
                        f"The executor {self.options.executor.url} failed ({verdict.detail}): mend it, or set on_error."
                    )
        return verdicts

    def gold(self, row: Mapping[str, Any]) -> str | None:
        """The row's `solution` in a block, if it has one."""
        solution = row.get("solution")
        if not isinstance(solution, str) or not solution.strip():
            return None
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", solution)), default=0))
        return f"{fence}python\n{solution}\n{fence}"

    def _read(self, completion: str, row: Mapping[str, Any]) -> tuple[_suites.Suite | None, str, Verdict | None]:
        """The row's suite and the program, or the verdict where one of them is missing."""
        try:
            suite = _suites.read(row["tests"], row.get("entry_point") if self.options.entry_point else None)
            if suite.script and self._tier is None:
                raise _suites.Unreadable(f"{suite.reason}, and asserts are run on this machine only")
        except _suites.Unreadable as error:
            return None, "", Verdict(None, "unparseable_gold", detail=str(error))
        program = extract(completion)
        if program is None:
            return suite, "", Verdict(0.0, "no_answer")
        if len(program) > MAX_PROGRAM:
            return suite, "", Verdict(0.0, "resource", detail=f"more than {MAX_PROGRAM} characters")
        return suite, program, None

    # ------------------------------------------------------------ here

    def _run_here(self, program: str, suite: _suites.Suite) -> list[_Problem]:
        """A problem or none per test, until one of them ends all."""
        assert self._tier is not None  # noqa: S101 - programs run here
        deadline = monotonic() + self.options.deadline
        run = self._prints if suite.function is None else self._asserts if suite.script else self._returns
        try:
            return run(_sandbox.shared(self._tier), program, suite, deadline)
        except Unavailable:  # somebody may have killed it
            if monotonic() >= deadline:
                raise
            return run(_sandbox.shared(self._tier, anew=True), program, suite, deadline)

    def _prints(self, sandbox: Sandbox, program: str, suite: _suites.Suite, deadline: float) -> list[_Problem]:
        problems: list[_Problem] = []
        for case in suite.cases:
            stdin = case.stdin.encode("utf-8", errors="surrogateescape")
            try:
                found = sandbox.run(program, stdin, self.options.timeout, deadline).decode("utf-8", errors="replace")
            except Unavailable:
                if not problems or monotonic() < deadline:
                    raise
                problems.append(("timeout", f"more than {self.options.deadline:g} s for all tests"))
            except Stopped as stopped:
                problems.append((stopped.status, str(stopped)))
            else:
                problems.append(self._printed(found, case))
            if self._is_over(problems):
                break
        return problems

    def _returns(self, sandbox: Sandbox, program: str, suite: _suites.Suite, deadline: float) -> list[_Problem]:
        problems: list[_Problem] = []
        with sandbox.start(program, suite.function, b"", self.options.timeout, deadline) as running:
            try:
                running.loaded()
            except Stopped as stopped:
                return [(stopped.status, str(stopped))]
            for case in suite.cases:
                try:
                    running.allow(self.options.timeout, deadline)
                    found = running.call(case.args, case.kwargs)
                except Stopped as stopped:
                    problems.append((stopped.status, str(stopped)))
                else:
                    problems.append(self._returned(found, case))
                if self._is_over(problems) or not running.alive:
                    break
        return problems

    def _asserts(self, sandbox: Sandbox, program: str, suite: _suites.Suite, deadline: float) -> list[_Problem]:
        """Run the tests in one sandbox and the program in another, and carry calls and results between the two.

        The program begins when the tests have made a call. How they end before that is their own doing; whatever
        happens later the program may have caused, and answers for it.

        Raises:
            Unreadable: the tests make no call.
        """
        function, options = suite.function, self.options
        with contextlib.ExitStack() as opened:
            started = sandbox.start(suite.script, function, b"", options.deadline, deadline, asks=True)
            tests = opened.enter_context(started)
            try:
                call = tests.asked()
            except Stopped as stopped:
                raise _suites.Unreadable(f"the tests fail before they call {function}: {stopped}") from None
            if call is None:
                raise _suites.Unreadable(f"the tests end without a call of {function}")
            running = opened.enter_context(sandbox.start(program, function, b"", options.timeout, deadline))
            try:
                running.loaded()
                for _ in range(MAX_CALLS):
                    running.allow(options.timeout, deadline)
                    tests.answer(self._found(running, *call))
                    call = tests.asked()
                    if call is None:
                        return [None]
            except Stopped as stopped:
                return [(stopped.status, str(stopped))]
        return [("resource", f"more than {MAX_CALLS} calls")]

    @staticmethod
    def _found(running: Program, args: list[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a function returns, or why it returns nothing while it may still answer other calls.

        Raises:
            Stopped: it may not.
        """
        try:
            return running.call(args, kwargs)
        except Stopped as stopped:
            if stopped.status != "wrong" or not running.alive:
                raise
            return stopped

    def _is_over(self, problems: list[_Problem]) -> bool:
        last = problems[-1]
        return last is not None and (last[0] != "wrong" or self.options.partial_credit == "none")

    def _printed(self, found: str, case: _suites.Case) -> _Problem:
        if _suites.printed_alike(found, case.stdout, self.options.tolerance):
            return None
        return "wrong", f"it printed {_shown(found)}"

    def _returned(self, found: Any, case: _suites.Case) -> _Problem:
        try:
            if case.passes(found, self.options.tolerance):
                return None
        except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
            return "wrong", f"it returned {_shown(found)}, which does not compare ({type(error).__name__})"
        return "wrong", f"it returned {_shown(found)}"

    # ------------------------------------------------------------ elsewhere

    def _run_elsewhere(self, program: str, suite: _suites.Suite) -> list[_Problem]:
        timeout, deadline = self.options.timeout, monotonic() + self.options.executor.deadline
        problems: list[_Problem] = []
        try:
            if suite.function is not None:
                calls = [(case.args, case.kwargs) for case in suite.cases]
                found = self._remote.call(program, suite.function, calls, timeout, deadline)
                for value, case in zip(found, suite.cases, strict=True):
                    stopped = isinstance(value, Stopped)
                    problems.append((value.status, str(value)) if stopped else self._returned(value, case))
                return problems
            for case in suite.cases:
                printed = self._remote.run(program, case.stdin, timeout, deadline)
                problems.append(self._printed(printed, case))
                if self._is_over(problems):
                    break
        except Stopped as stopped:
            problems.append((stopped.status, str(stopped)))
        return problems


_Problem = tuple[Literal["wrong", "timeout", "resource"], str] | None
"""Why a test was not passed."""


def _shown(value: Any) -> str:
    """The beginning of a value, for a verdict's detail."""
    try:
        return repr(value[:100] if isinstance(value, str | bytes | list | tuple) else value)[:100]
    except (ValueError, RecursionError):
        return "an integer of too many digits to print"


def extract(completion: str) -> str | None:
    """The program of a completion. Linear in the text."""
    text = after_thinking(completion)
    if text is None:
        return None
    found: dict[bool, str] = {}
    opened: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if opened is None:
            opened = fence
        elif fence[1].startswith(opened[1]) and not fence[2]:
            language = opened[2].lower()
            if language in _PYTHON or not language:
                found[bool(language)] = text[opened.end() + 1 : fence.start()]
            opened = None
    program = found.get(True, found.get(False))
    return program if program is not None and program.strip() else None
