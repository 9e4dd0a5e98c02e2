"""Tests of programs as data sets have them, read without running anything: what is called or fed, and what must come.

- `{"fn_name": "f", "inputs": [[1, 2], …], "outputs": [3, …]}`: calls, `inputs` their arguments (APPS, TACO; there, an
  output may be a list of one, the value itself). Without `fn_name`: texts for stdin, and what must be printed.
- `[{"input": "…", "output": "…"}, …]`: the same, one by one; with `"args": […]` and `"kwargs": {…}` calls, for which
  the suite is `{"function": "f", "cases": […]}`.
- `["assert f(1) == 2", …]` (MBPP), or a text of asserts, in a function `check(candidate)` or not (HumanEval).

The first two may be JSON text. JSON has no tuples and no keys but text, so a list there equals a tuple.

An assert is taken apart: one call of one function, with arguments that are written out, compared by `==`, `!=`, `is`,
`in`, `<` and the like with a value that is written out, by `math.isclose`, by `abs(f(x) - y) < t`, or taken as a truth
value; `set`, `sorted`, `list`, `tuple`, `len` and `round` may be applied to what it returns. Values may use these,
arithmetic, `range`, `float("inf")` and names that were given such a value before.

Where a text holds anything else (loops, helpers, `try`, random inputs), all of it is a *script*, which is to be run
where the function is a stub. It may import the standard library, has to define or import all other names, and may not
`eval` or `exec`, as what it would run may be the program's. What cannot be a script either is refused, by line.
"""

from __future__ import annotations

import ast
import builtins
import json
import math
import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from posttrain.rewards import _runner

Kind = Literal["stdin_stdout", "function_call"]

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.In: lambda found, wanted: found in wanted,
    ast.NotIn: lambda found, wanted: found not in wanted,
    ast.Is: lambda found, wanted: type(found) is type(wanted) and found == wanted,
    ast.IsNot: lambda found, wanted: not (type(found) is type(wanted) and found == wanted),
}  # fmt: skip
_MIRRORED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.Eq, ast.NotEq: ast.NotEq, ast.Is: ast.Is, ast.IsNot: ast.IsNot, ast.Lt: ast.Gt, ast.LtE: ast.GtE,
    ast.Gt: ast.Lt, ast.GtE: ast.LtE,
}  # fmt: skip
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip
_VIEWS: dict[str, Callable[..., Any]] = {
    "set": set, "frozenset": frozenset, "sorted": sorted, "list": list, "tuple": tuple, "len": len, "round": round,
}  # fmt: skip
_MAKERS: dict[str, Callable[..., Any]] = {
    **_VIEWS, "float": float, "int": int, "str": str, "dict": dict, "complex": complex, "range": range, "abs": abs,
}  # fmt: skip
_NUMBERS = {"inf": math.inf, "nan": math.nan, "pi": math.pi, "e": math.e, "tau": math.tau}
_MAX = 1_000_000
"""Digits, elements and characters that a written-out value may grow to by arithmetic."""
_PLAIN = (int, float, complex, str, bytes, list, tuple, set, frozenset, dict)


class Unreadable(ValueError):
    """A suite cannot be read, and why."""


class _NoCalls(Unreadable):
    """A suite cannot be taken apart into calls, and where."""


@dataclass(frozen=True)
class Case:
    """One test. `passes` says whether what was found is what was wanted."""

    stdin: str = ""
    stdout: str = ""
    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)
    passes: Callable[[Any, float], bool] = lambda found, tolerance: False
    """Of the value found and the tolerance; may raise what comparing raises."""


@dataclass(frozen=True)
class Suite:
    """All tests of one row: `function` is called, or None where programs read stdin."""

    function: str | None
    cases: list[Case]
    script: str = ""
    """Python that calls `function`, in the place of `cases`."""
    reason: str = ""
    """Why a script is not taken apart into calls."""


def read(tests: Any, entry_point: str | None) -> Suite:
    """The suite that a row holds; `entry_point` is its function where the tests do not say.

    Raises:
        Unreadable: it holds none, or one that can neither be taken apart nor run.
    """
    if isinstance(tests, str):
        return _read_text(tests, entry_point)
    if isinstance(tests, list | tuple) and tests and all(isinstance(test, str) for test in tests):
        return _read_text("\n".join(tests), entry_point)
    return _read_data(tests, entry_point)


@lru_cache(maxsize=512)
def _read_text(text: str, entry_point: str | None) -> Suite:
    if text.lstrip()[:1] in ("{", "["):
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise Unreadable(f"the tests begin like JSON and are none ({error})") from None
        return _read_data(data, entry_point)
    try:
        module = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Unreadable(f"the tests are neither JSON nor Python ({error})") from None
    try:
        return _Asserts(entry_point).read(module)
    except _NoCalls as reason:
        return _Script(module).read(text, entry_point, str(reason))


def _read_data(data: Any, entry_point: str | None) -> Suite:
    if isinstance(data, Mapping) and "inputs" in data and "outputs" in data:
        inputs, outputs, function = data["inputs"], data["outputs"], data.get("fn_name") or entry_point
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
            raise Unreadable("inputs and outputs are not two lists of one length")
        if function is None:
            pairs = zip(inputs, outputs, strict=True)
            cases = [{"input": _lines(given), "output": _lines(wanted)} for given, wanted in pairs]
        else:
            cases = [{"args": given, "output": wanted} for given, wanted in zip(inputs, outputs, strict=True)]
        return _suite(function, cases, wrapped=True)
    if isinstance(data, Mapping) and "cases" in data:
        return _suite(data.get("function") or entry_point, data["cases"], wrapped=False)
    return _suite(entry_point, data, wrapped=False)


def _suite(function: Any, cases: Any, *, wrapped: bool) -> Suite:
    if not isinstance(cases, list) or not cases:
        raise Unreadable(f"the tests are {cases!r:.80}, not a list of them")
    if function is not None and (not isinstance(function, str) or not function.isidentifier()):
        raise Unreadable(f"{function!r:.80} is no name of a function")
    read = []
    for number, case in enumerate(cases, start=1):
        if not isinstance(case, Mapping) or "output" not in case:
            raise Unreadable(f"test {number} is {case!r:.80}, without an output")
        if "args" in case or "kwargs" in case:
            args, kwargs = case.get("args", []), case.get("kwargs", {})
            if function is None:
                raise Unreadable(f"test {number} is a call, and nothing names the function")
            if not isinstance(args, list) or not isinstance(kwargs, dict):
                raise Unreadable(f"test {number} has arguments that are no list")
            read.append(Case(args=args, kwargs=kwargs, passes=_alike(case["output"], wrapped)))
        elif isinstance(case.get("input"), str) and isinstance(case["output"], str):
            if function is not None:
                raise Unreadable(f"test {number} has a text as its input, and the function {function} takes arguments")
            read.append(Case(stdin=case["input"], stdout=case["output"]))
        else:
            raise Unreadable(f"test {number} has neither args nor texts as input and output")
    return Suite(function, read)


def _lines(value: Any) -> Any:
    """What APPS writes as a list of lines."""
    return "\n".join(value) if isinstance(value, list) and all(isinstance(line, str) for line in value) else value


def _alike(wanted: Any, wrapped: bool) -> Callable[[Any, float], bool]:
    def passes(found: Any, tolerance: float) -> bool:
        if equal(found, wanted, tolerance, sequences_alike=True):
            return True
        return (
            wrapped
            and isinstance(wanted, list)
            and len(wanted) == 1
            and equal(found, wanted[0], tolerance, sequences_alike=True)
        )

    return passes


def equal(found: Any, wanted: Any, tolerance: float = 0.0, *, sequences_alike: bool = False) -> bool:
    """Whether two values are equal as Python says, but for NaN, which equals itself.

    Numbers of which one is a float may differ by `tolerance` · max(1, |wanted|). With `sequences_alike`, a tuple equals
    a list of equal items.
    """
    if isinstance(found, float | int) and isinstance(wanted, float | int):
        if found == wanted:
            return True
        if not isinstance(found, float) and not isinstance(wanted, float):
            return False
        try:
            first, second = float(found), float(wanted)
        except OverflowError:
            return False
        if math.isnan(first) and math.isnan(second):
            return True
        return abs(first - second) <= tolerance * max(1.0, abs(second)) and math.isfinite(second)
    if isinstance(found, list | tuple) and isinstance(wanted, list | tuple):
        if len(found) != len(wanted) or not (sequences_alike or type(found) is type(wanted)):
            return False
        pairs = zip(found, wanted, strict=True)
        return all(equal(one, other, tolerance, sequences_alike=sequences_alike) for one, other in pairs)
    if isinstance(found, dict) and isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(
            equal(found[key], wanted[key], tolerance, sequences_alike=sequences_alike) for key in wanted
        )
    return bool(found == wanted)


def printed_alike(found: str, wanted: str, tolerance: float) -> bool:
    """Whether two outputs are equal line by line, white space at the ends of lines and text, and its amount, aside.

    With a tolerance, words that are numbers may differ as in `equal`.
    """
    one, other = ([line.split() for line in text.strip().splitlines()] for text in (found, wanted))
    if one == other:
        return True
    if not tolerance or [len(line) for line in one] != [len(line) for line in other]:
        return False
    return all(
        a == b or _close(a, b, tolerance)
        for first, second in zip(one, other, strict=True)
        for a, b in zip(first, second, strict=True)
    )


def _close(found: str, wanted: str, tolerance: float) -> bool:
    try:
        return equal(float(found), float(wanted), tolerance)
    except ValueError:
        return False


def _where(node: ast.AST, reason: str) -> str:
    return f"line {getattr(node, 'lineno', 0)} of the tests, `{ast.unparse(node)[:80]}`: {reason}"


# ---------------------------------------------------------------- asserts


class _Asserts:
    """Takes a text of asserts apart."""

    def __init__(self, entry_point: str | None) -> None:
        self._function = entry_point
        self._candidate: str | None = None
        self._names: dict[str, Any] = {}
        self._cases: list[Case] = []

    def read(self, module: ast.Module) -> Suite:
        checks = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == "check"]
        body: list[ast.stmt] = []
        for node in module.body:
            match node:
                case ast.Expr(ast.Call(func=ast.Name(id="check"), args=[ast.Name(id=name)], keywords=[])) if checks:
                    self._function = self._function or name
                case _ if node not in checks:
                    body.append(node)
        for check in checks:
            if len(check.args.args) != 1:
                raise Unreadable(_where(check, "check takes other than one argument"))
            self._candidate = check.args.args[0].arg
            body += check.body
        if checks and self._function is None:
            raise Unreadable(
                "check(candidate) does not say which function it tests: call it at the end of the tests, or name the "
                "function in a column entry_point and set the option of that name"
            )
        for node in body:
            self._statement(node)
        if not self._cases or self._function is None:
            raise Unreadable("the tests hold no assert")
        return Suite(self._function, self._cases)

    def _refusal(self, node: ast.AST, reason: str) -> _NoCalls:
        return _NoCalls(_where(node, reason))

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Assert):
            self._assertion(node.test)
        elif isinstance(node, ast.Import | ast.ImportFrom | ast.Pass):
            return
        elif isinstance(node, ast.Expr):
            called = node.value.func if isinstance(node.value, ast.Call) else None
            runs_check = isinstance(called, ast.Name) and called.id == "check"
            if not isinstance(node.value, ast.Constant) and not runs_check:
                raise self._refusal(node, "only asserts can be turned into calls")
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            self._names[node.targets[0].id] = self._value(node.value)
        else:
            raise self._refusal(node, "only asserts can be turned into calls")

    def _assertion(self, test: ast.expr) -> None:
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
            for part in test.values:
                self._assertion(part)
            return
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            self._add(test.operand, lambda found, _: not found)
            return
        if isinstance(test, ast.Call) and self._name_of(test.func) in ("isclose", "math.isclose"):
            self._is_close(test)
            return
        if isinstance(test, ast.Compare):
            self._comparison(test)
            return
        self._add(test, lambda found, _: bool(found))

    def _is_close(self, test: ast.Call) -> None:
        if len(test.args) != 2:
            raise self._refusal(test, "isclose without two values")
        found, other = test.args if self._calls(test.args[0]) else reversed(test.args)
        wanted = self._value(other)
        options = {str(keyword.arg): self._value(keyword.value) for keyword in test.keywords}
        self._add(found, lambda value, _: math.isclose(value, wanted, **options))

    def _comparison(self, test: ast.Compare) -> None:
        if len(test.ops) != 1:
            raise self._refusal(test, "a chain of comparisons")
        kind, left, right = type(test.ops[0]), test.left, test.comparators[0]
        if not self._calls(left):
            if kind not in _MIRRORED:
                raise self._refusal(test, "no call of the function on the left")
            kind, left, right = _MIRRORED[kind], right, left
        wanted = self._value(right)
        compare = _COMPARE[kind]
        if isinstance(left, ast.Call) and self._name_of(left.func) == "abs" and len(left.args) == 1:
            difference = left.args[0]
            if isinstance(difference, ast.BinOp) and isinstance(difference.op, ast.Sub):
                mirrored = not self._calls(difference.left)
                call = difference.right if mirrored else difference.left
                other = self._value(difference.left if mirrored else difference.right)
                self._add(call, lambda found, _: bool(compare(abs(found - other), wanted)))
                return
        if kind is ast.Eq:
            self._add(left, lambda found, tolerance: equal(found, wanted, tolerance))
        else:
            self._add(left, lambda found, _: bool(compare(found, wanted)))

    def _add(self, node: ast.expr, passes: Callable[[Any, float], bool]) -> None:
        views: list[tuple[Callable[..., Any], list[Any]]] = []
        while isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and self._is_view(node):
            views.append((_VIEWS[node.func.id], [self._value(argument) for argument in node.args[1:]]))
            node = node.args[0]
        if not self._is_call(node):
            raise self._refusal(node, "no call of a function by its name")
        assert isinstance(node, ast.Call)  # noqa: S101 - as just asked
        args = [self._value(argument) for argument in node.args]
        kwargs = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise self._refusal(node, "arguments behind **")
            kwargs[keyword.arg] = self._value(keyword.value)
        try:
            _runner.encode([args, list(kwargs.values())])
        except (TypeError, ValueError) as error:
            raise Unreadable(_where(node, f"an argument that is no plain data: {error}")) from None

        def passes_view(found: Any, tolerance: float) -> bool:
            for view, arguments in reversed(views):
                found = view(found, *arguments)
            return passes(found, tolerance)

        self._cases.append(Case(args=args, kwargs=kwargs, passes=passes_view))

    def _is_view(self, node: ast.Call) -> bool:
        return self._name_of(node.func) in _VIEWS and bool(node.args) and not node.keywords and self._calls(node)

    def _calls(self, node: ast.AST) -> bool:
        """Whether the function under test is called somewhere in it."""
        return any(self._is_call(part) for part in ast.walk(node))

    def _is_call(self, node: ast.AST) -> bool:
        """Whether it is a call of the function under test, which the first call names where nothing else does."""
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            return False
        name = node.func.id
        if name == self._candidate or name == self._function:
            return True
        if self._function is None and name not in _MAKERS and name not in ("isclose", "bool", "all", "any"):
            self._function = name
            return True
        return False

    @staticmethod
    def _name_of(node: ast.expr) -> str:
        return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""

    def _value(self, node: ast.expr) -> Any:
        """The value that is written out.

        Raises:
            Unreadable: it is not.
        """
        try:
            return self._computed(node)
        except Unreadable:
            raise
        except Exception as error:
            raise self._refusal(node, f"{type(error).__name__}: {error}") from None

    def _computed(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant() if node.value is not ...:
                return node.value
            case ast.List() | ast.Tuple() | ast.Set():
                make = {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)]
                return make(self._value(item) for item in node.elts)
            case ast.Dict():
                if None in node.keys:
                    raise self._refusal(node, "** in a dict")
                keys = [self._value(key) for key in node.keys if key is not None]
                return dict(zip(keys, map(self._value, node.values), strict=True))
            case ast.UnaryOp():
                value = self._value(node.operand)
                if isinstance(node.op, ast.Not):
                    return not value
                return -value if isinstance(node.op, ast.USub) else +value
            case ast.BinOp() if type(node.op) in _ARITHMETIC:
                return self._arithmetic(node)
            case ast.Name() if node.id in self._names:
                return self._names[node.id]
            case ast.Attribute(value=ast.Name(id="math")) if node.attr in _NUMBERS:
                return _NUMBERS[node.attr]
            case ast.Call(func=ast.Name()) if self._name_of(node.func) in _MAKERS:
                values = [self._value(argument) for argument in node.args]
                if self._name_of(node.func) == "range" and len(range(*values)) > _MAX:
                    raise Unreadable(_where(node, "too large"))
                named = {str(keyword.arg): self._value(keyword.value) for keyword in node.keywords}
                return _MAKERS[self._name_of(node.func)](*values, **named)
        raise self._refusal(node, "not written out as a value")

    def _arithmetic(self, node: ast.BinOp) -> Any:
        left, right = self._value(node.left), self._value(node.right)
        if isinstance(node.op, ast.Pow) and isinstance(left, int) and isinstance(right, int):
            if abs(right) * max(1, left.bit_length()) > _MAX:
                raise Unreadable(_where(node, "too large"))
        elif isinstance(node.op, ast.Mult):
            sizes = [len(side) if hasattr(side, "__len__") else side for side in (left, right)]
            if any(hasattr(side, "__len__") for side in (left, right)) and sizes[0] * sizes[1] > _MAX:
                raise Unreadable(_where(node, "too large"))
        return _ARITHMETIC[type(node.op)](left, right)


# ---------------------------------------------------------------- scripts


class _Script:
    """Finds out what a text of tests needs that it does not define: the function under test, and nothing else."""

    def __init__(self, module: ast.Module) -> None:
        self._module = module
        self._bound = set(dir(builtins))
        self._read: dict[str, ast.AST] = {}
        self._called: set[str] = set()
        self._imports_all = False
        for node in ast.walk(module):
            self._note(node)

    def _note(self, node: ast.AST) -> None:
        match node:
            case ast.Name(ctx=ast.Load()):
                self._read.setdefault(node.id, node)
            case ast.Call(func=ast.Name(id=name)):
                self._called.add(name)
            case ast.Name():
                self._bound.add(node.id)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef() | ast.ExceptHandler() | ast.MatchAs():
                self._bound.add(node.name or "")
            case ast.MatchStar(name=str(name)) | ast.MatchMapping(rest=str(name)) | ast.arg(arg=name):
                self._bound.add(name)
            case ast.Import() | ast.ImportFrom():
                modules = [alias.name for alias in node.names]
                if isinstance(node, ast.ImportFrom):
                    modules = ["." * node.level + (node.module or "")]
                if not {name.partition(".")[0] for name in modules} <= sys.stdlib_module_names:
                    raise Unreadable(_where(node, "programs have the standard library, and nothing else"))
                self._bound |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
                self._imports_all |= any(alias.name == "*" for alias in node.names)

    def read(self, text: str, entry_point: str | None, reason: str) -> Suite:
        """The suite of one script, where it needs one function.

        Raises:
            Unreadable: it needs more or nothing, or would run what a program returns.
        """
        for name in ("eval", "exec"):
            if name in self._read:
                raise Unreadable(_where(self._read[name], "what is run may be what a program returns"))
        unknown = {name: node for name, node in self._read.items() if name not in self._bound}
        function = entry_point or min(unknown, key=lambda name: name not in self._called, default=None)
        functions = {node.name for node in self._module.body if isinstance(node, ast.FunctionDef)}
        if function is None or (function not in self._read and "check" not in functions):
            raise Unreadable(f"the tests do not call {function or 'any function that they do not define'}")
        others = [node for name, node in unknown.items() if name != function]
        if others and not (entry_point and self._imports_all):
            raise Unreadable(_where(others[0], f"beside {function}, the tests need what they do not define"))
        for node in ast.walk(self._module):
            match node:
                case ast.Attribute(value=ast.Call(func=ast.Name(id=name))) if name == function and not any(
                    hasattr(kind, node.attr) for kind in _PLAIN
                ):
                    raise Unreadable(_where(node, "no plain data has this attribute, and results are plain data"))
        if "check" in functions and not any(self._calls_check(node) for node in ast.walk(self._module)):
            text += f"\n\ncheck({function})\n"
        return Suite(function, [], text, reason)

    @staticmethod
    def _calls_check(node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "check"
