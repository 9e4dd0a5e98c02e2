"""SQL: the query returns on a SQLite database what the gold query returns there.

The answer is the last closed ```sql block after the last `</think>`, or all of that text where there is no such block.
The row names the database (`db`, a file) and the gold query (`answer`); the model never names a file. `db` may also be
a list of files with the same tables and other data: the results must be equal on all of them.

`semantics` says when two results are equal: `bird` compares sets of rows (BIRD's execution accuracy), `bag` counts
repeated rows, `ordered` compares lists. Columns count by position, not by name; 1 equals 1.0, and NULL equals NULL.
`spider` lets the columns stand in any order, compares lists where the gold query itself ends in an ORDER BY (one in a
subquery, a window or an aggregate orders nothing), and else bags. Source: the test-suite accuracy of Spider, arXiv
2010.02840. Differs: there any ORDER BY counts, and DISTINCT is removed from both queries first.
Equal results on one database do not make equal queries: `SELECT 5` is correct wherever the gold answer is 5, unless
the row names copies on which it is another.

`partial_credit: columns_0.8` is the reward of DPH-RL for a query that runs and is not correct: 0.8 · min(1, c²/(n_gold
n_pred)) for c matching columns. A gold column matches when the set of its values is the set of values of *some*
predicted column: order, repetition and which values share a row do not matter, two gold columns may match the same
predicted one, and an empty result has no columns. Only a correct query gets 1.0, so "reward = 1" stays the accuracy.
Source: arXiv 2509.07430 and its released code. Differs: a query needs no block, spaces inside `> =` are an error, no
MySQL function is rewritten, the caps are ours, and on several databases it is the least of theirs.

A query is model text, so it reads and does nothing else. The file is opened with `mode=ro&immutable=1`; an authoriser
allows SELECT, column reads, recursion and a list of functions, and so no virtual tables and table functions; one
statement, without parameters; caps on text, values, expressions, rows and bytes; 128 MiB for SQLite; no temporary
files. Left out of the functions is what writes, loads code, is random, or lets one call run for seconds and is of no
use for questions (`json_patch`). Nothing may write to the file during a run.

A query's deadline, `timeout`, holds for a row's databases together. It is looked at between SQLite's instructions
and rows. What lies within one of them cannot be interrupted: `printf('%.*c', 1000000000, 'x')` (12 s), one sort of what
is in memory (4 s), the preparation of a statement that SQLite expands, a read from a file system that hangs. So queries
run in a worker process, which is killed half a second after the deadline. For a gold query, that is `unparseable_gold`.

The memory limit is SQLite's own (`hard_heap_limit`), which holds for all connections of the worker.
"""

from __future__ import annotations

import re
import sqlite3
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import Annotated, Any, Literal

from pydantic import Field

from posttrain import rewards
from posttrain.errors import UserError
from posttrain.rewards import RewardOptions, Status, Verdict, Verifier, after_thinking

MAX_QUERY = 10_000
"""Characters of a query."""
MAX_BYTES = 64 * 2**20
"""Memory of a result, as Python counts it; as much again for all gold results that a worker keeps."""
MAX_GOLDS = 256
"""Gold results that a worker keeps."""
MAX_QUADRATIC_CALLS = 32
"""Calls in one statement of functions whose cost grows with the product of their arguments' lengths."""
MAX_TRIM = 100
"""Characters in the second argument of `trim`, `ltrim` and `rtrim`."""
HEAP_LIMIT = 128 * 2**20
"""Bytes of memory for SQLite, in a worker."""
CHECK_EVERY = 100
"""Instructions of SQLite's virtual machine between two looks at the clock."""

_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 100_000,  # bytes of one value or row
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 200,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 50,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 50_000,  # instructions of a compiled statement
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 200,
    sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER: 0,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}
_FUNCTIONS = frozenset({
    "abs", "avg", "ceil", "ceiling", "char", "coalesce", "concat", "concat_ws", "count", "cume_dist",
    "current_date", "current_time", "current_timestamp", "date", "datetime", "degrees", "dense_rank", "exp",
    "first_value", "floor", "format", "glob", "group_concat", "hex", "if", "ifnull", "iif", "instr", "julianday", "lag",
    "last_value", "lead", "length", "like", "likelihood", "likely", "ln", "log", "log10", "log2", "lower", "ltrim",
    "max", "median", "min", "mod", "nth_value", "ntile", "nullif", "octet_length", "percent_rank", "percentile",
    "pi", "pow", "power", "printf", "quote", "radians", "rank", "replace", "round", "row_number", "rtrim", "sign",
    "soundex", "sqrt", "strftime", "string_agg", "substr", "substring", "sum", "time", "timediff", "total", "trim",
    "trunc", "typeof", "unhex", "unicode", "unixepoch", "unlikely", "upper", "acos", "acosh", "asin", "asinh", "atan",
    "atan2", "atanh", "cos", "cosh", "sin", "sinh", "tan", "tanh", "json", "json_array", "json_array_length",
    "json_extract", "json_group_array", "json_group_object", "json_object", "json_quote", "json_type", "json_valid",
    "->", "->>",
})  # fmt: skip
_QUADRATIC = frozenset({"glob", "instr", "like", "replace"})
_FENCE = re.compile(r"```(sql(?:ite)?\b)?", re.IGNORECASE)
_CAPPED = re.compile(r"\btoo (?:big|complex|large|many (?:columns|references|terms))\b|\bat most\b|stack overflow")
_WORD = re.compile(r"--[^\n]*|/\*.*?(?:\*/|$)|'[^']*'|\"[^\"]*\"|`[^`]*`|\[[^\]]*\]|([()]|\w+|[^\w\s])", re.DOTALL)
"""A comment or something quoted, or else (group 1) a word or a sign."""
_CLOCK = re.compile(r"\bnow\b|\bcurrent_|(?:date|time|day|epoch)\s*\(\s*\)", re.IGNORECASE)
_ENVIRONMENT = frozenset({
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_PERM, sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_READONLY,
})  # fmt: skip
"""Error codes that speak of the file and not of the query."""


class Options(RewardOptions):
    """Options of the reward `sql`."""

    semantics: Literal["bird", "spider", "bag", "ordered"] = "bird"
    """When two results are equal: as sets of rows; as Spider does; with repeated rows counted; or row by row in order.
    """
    partial_credit: Literal["none", "columns_0.8"] = "none"
    """Reward of a query that runs and is not correct: 0, or up to 0.8 for columns that match (DPH-RL)."""
    timeout: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] = 5.0
    """Seconds for one query on all databases of its row; as many for the gold one."""
    max_rows: Annotated[int, Field(gt=0)] = 100_000
    """Rows that a query may return, repeated ones included."""
    db_root: str | None = None
    """Folder that every database must lie in; a relative `db` is a path in it (default: in the working directory)."""


class _Failure(Exception):
    """A query that gave no result: `status` and the reason."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason[:200])
        self.status = status


@dataclass(frozen=True)
class _Result:
    rows: list[tuple[Any, ...]]
    size: int
    """Bytes in memory, as Python counts them."""

    @cached_property
    def columns(self) -> list[frozenset[Any]]:
        return [frozenset(column) for column in zip(*self.rows, strict=True)]


class Reward(Verifier):
    """1.0 when the query's result equals the gold query's, else 0.0 or the partial credit that the options give.

    A query that SQLite refuses is `wrong`, one beyond a cap `resource`, one beyond the deadline `timeout`. A gold query
    that fails in any of these ways is `unparseable_gold`; a database that cannot be opened or read, that lies outside
    `db_root`, or that has an unfinished write-ahead log is a `verifier_error`.

    Raises:
        UserError: SQLite is older than 3.31 and has no memory limit.
    """

    name = "sql"
    requires = ("db", "answer")
    isolated = True
    row_first = True

    def __init__(self, options: Options) -> None:
        if sqlite3.sqlite_version_info < (3, 31):
            raise UserError(
                f"The reward 'sql' needs SQLite 3.31 or newer for its memory limit, found {sqlite3.sqlite_version}: "
                "use a Python that is built with a newer one."
            )
        self.options = options
        self._forget()

    def _forget(self) -> None:
        self._golds: OrderedDict[tuple[Path, str], _Result] = OrderedDict()
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        """The options alone: the cache starts empty in every process."""
        return {"options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def deadline(self) -> float:
        """Seconds for the gold query, and for the answer: some more, so that SQLite notices first if it can."""
        return float(self.options.timeout + 0.5)

    def verify(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """Judge the query; `Verdict.answer` is its text with white space normalised."""
        gold_query = row["answer"]
        if not isinstance(gold_query, str) or not gold_query.strip():
            return Verdict(None, "unparseable_gold", detail=f"the gold query {gold_query!r:.200}")
        try:
            databases = self._databases(row["db"])
            until = monotonic() + self.options.timeout
            golds = [self._gold(database, gold_query, until) for database in databases]
        except _Failure as failure:
            if failure.status == "verifier_error":
                return Verdict(None, "verifier_error", detail=str(failure))
            return Verdict(None, "unparseable_gold", detail=f"the gold query ({failure.status}): {failure}")
        rewards.completion_begins()
        query = _extract(completion)
        if not query:
            return Verdict(0.0, "no_answer")
        answer = " ".join(query[:MAX_QUERY].split())
        credit: float | None = None
        detail = ""
        until = monotonic() + self.options.timeout
        for database, gold in zip(databases, golds, strict=True):
            try:
                result = _run(database, query, self.options, until)
                equal = self._equal(gold, result, gold_query, until)
            except _Failure as failure:
                reward = None if failure.status == "verifier_error" else 0.0
                return Verdict(reward, failure.status, answer, str(failure))
            if equal:
                continue
            detail = detail or f"{len(result.rows)} rows, the gold query has {len(gold.rows)}"
            if self.options.partial_credit == "none":
                return Verdict(0.0, "wrong", answer, detail)
            credit = min(0.8 if credit is None else credit, _columns_credit(gold, result))
        return Verdict(1.0, "ok", answer) if credit is None else Verdict(credit, "wrong", answer, detail)

    def _equal(self, gold: _Result, answer: _Result, gold_query: str, until: float) -> bool:
        """Whether two results are equal.

        Raises:
            _Failure: it takes longer than `until` to say.
        """
        if self.options.semantics == "spider":
            return _equal_in_some_order_of_columns(gold, answer, ordered=_is_ordered(gold_query), until=until)
        if self.options.semantics == "ordered":
            return gold.rows == answer.rows
        if self.options.semantics == "bag":
            return Counter(gold.rows) == Counter(answer.rows)
        return set(gold.rows) == set(answer.rows)

    def gold(self, row: Mapping[str, Any]) -> str | None:
        """The row's `answer` in a ```sql block."""
        return f"```sql\n{row['answer']}\n```"

    def _databases(self, db: Any) -> list[Path]:
        """The files of a row.

        Raises:
            _Failure: as `_database`, or there are none.
        """
        if isinstance(db, list) and not db:
            raise _Failure("verifier_error", "db is an empty list, not the paths of files")
        return [self._database(each) for each in db] if isinstance(db, list) else [self._database(db)]

    def _database(self, db: Any) -> Path:
        """One file.

        Raises:
            _Failure: it does not exist, lies outside `db_root`, or misses what is still in its write-ahead log.
        """
        if not isinstance(db, str) or not db:
            raise _Failure("verifier_error", f"db is {db!r:.80}, not the path of a file")
        try:
            root = Path(self.options.db_root or ".").resolve()
            path = (root / db).resolve()
            if self.options.db_root is not None and not path.is_relative_to(root):
                raise _Failure("verifier_error", f"the database {db!r:.200} lies outside db_root")
            if not path.is_file():
                raise _Failure("verifier_error", f"there is no database {db!r:.200}")
            log = path.with_name(path.name + "-wal")
            if log.is_file() and log.stat().st_size:
                raise _Failure("verifier_error", f"the database {db!r:.200} has a write-ahead log: checkpoint it")
        except (OSError, RuntimeError, ValueError) as error:  # no permission, a loop of links, a NUL
            raise _Failure("verifier_error", f"the database {db!r:.200} ({error})") from None
        return path

    def _gold(self, database: Path, query: str, until: float) -> _Result:
        """The result of a gold query, kept for the next completion unless it depends on the clock."""
        key = database, query
        with self._lock:
            if key in self._golds:
                self._golds.move_to_end(key)
                return self._golds[key]
        result = _run(database, query, self.options, until)
        if not _CLOCK.search(query):
            with self._lock:
                self._golds[key] = result
                while len(self._golds) > MAX_GOLDS or sum(gold.size for gold in self._golds.values()) > MAX_BYTES:
                    self._golds.popitem(last=False)
        return result


def _extract(completion: str) -> str:
    """The query, empty when there is none. Linear in the text."""
    text = after_thinking(completion) or ""
    start: int | None = None
    block: str | None = None
    for fence in _FENCE.finditer(text):
        if fence[1]:
            start = fence.end()
        elif start is not None:
            block, start = text[start : fence.start()], None
    return (text if block is None else block).strip()


_Step = tuple[frozenset[int], Sequence[int], Sequence[int]]


def _is_ordered(query: str) -> bool:
    """Whether ORDER BY stands outside of all parentheses, where it orders the result. Linear in the text."""
    depth = 0
    before = ""
    for match in _WORD.finditer(query):
        if match[1] is None:
            before = before if match[0].startswith(("--", "/*")) else ""
            continue
        word = match[1].casefold()
        if not depth and (before, word) == ("order", "by"):
            return True
        depth += (word == "(") - (word == ")")
        before = word
    return False


def _equal_in_some_order_of_columns(gold: _Result, answer: _Result, *, ordered: bool, until: float) -> bool:
    """Whether the answer's columns can be put in an order in which its rows are the gold rows, in order or as a bag.

    Raises:
        _Failure: it is `until` (monotonic seconds) before that is clear: for bags there may be many orders to try.
    """
    if not gold.rows or not answer.rows:
        return len(gold.rows) == len(answer.rows)
    ours: list[tuple[Any, ...]] = list(zip(*gold.rows, strict=True))
    theirs: list[tuple[Any, ...]] = list(zip(*answer.rows, strict=True))
    if len(gold.rows) != len(answer.rows) or len(ours) != len(theirs):
        return False
    if ordered:
        return Counter(ours) == Counter(theirs)
    ours.sort(key=lambda column: -len(set(column)))  # so that few rows look alike from the first column on
    values = [Counter(column) for column in theirs]

    def steps(taken: frozenset[int], our_rows: Sequence[int], their_rows: Sequence[int]) -> Iterator[_Step]:
        """The columns that may come next. Rows have a number each: the same where all columns so far are the same."""
        column = ours[len(taken)]
        wanted = Counter(column)
        tried: set[tuple[Any, ...]] = set()
        for index, other in enumerate(theirs):
            if index in taken or values[index] != wanted or other in tried:
                continue
            if monotonic() > until:
                raise _Failure("timeout", "the deadline passed while columns were matched")
            tried.add(other)
            numbers: dict[tuple[int, Any], int] = {}
            found = [numbers.setdefault(row, len(numbers)) for row in zip(our_rows, column, strict=True)]
            others = [numbers.setdefault(row, len(numbers)) for row in zip(their_rows, other, strict=True)]
            if Counter(found) == Counter(others):
                yield taken | {index}, found, others

    same = [0] * len(gold.rows)
    path = [steps(frozenset(), same, same)]
    while path:
        step = next(path[-1], None)
        if step is None:
            path.pop()
        elif len(step[0]) == len(ours):
            return True
        else:
            path.append(steps(*step))
    return False


def _columns_credit(gold: _Result, answer: _Result) -> float:
    """0.8 · min(1, c² / (n_gold · n_pred)); see the module."""
    if not gold.columns or not answer.columns:
        return 0.0
    found = set(answer.columns)
    matching = sum(column in found for column in gold.columns)
    return 0.8 * min(1.0, matching**2 / (len(gold.columns) * len(answer.columns)))


def _run(database: Path, query: str, options: Options, until: float) -> _Result:
    """The result of one query, which must be there at `until` (monotonic seconds).

    Raises:
        _Failure: there is none, and why.
    """
    if len(query) > MAX_QUERY:
        raise _Failure("resource", f"more than {MAX_QUERY} characters")
    guard = _Guard(until)
    try:
        with closing(_open(database, guard)) as connection:
            return _fetch(connection.execute(query.rstrip("; \t\r\n")), guard, options.max_rows)
    except MemoryError:
        raise _Failure("resource", "more memory or instructions than a query may have") from None
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte of an extended code is the code
        if guard.refusal is not None:
            raise guard.refusal from None
        if code in _ENVIRONMENT:
            raise _Failure("verifier_error", str(error)) from None
        if code == sqlite3.SQLITE_INTERRUPT or guard.expired():
            raise _Failure("timeout", f"more than {options.timeout:g} s") from None
        raise _Failure("resource" if _CAPPED.search(str(error)) else "wrong", str(error)) from None


def _fetch(cursor: sqlite3.Cursor, guard: _Guard, max_rows: int) -> _Result:
    if cursor.description is None:  # an empty statement, or one that had nothing to do
        raise _Failure("wrong", "not a query")
    rows: list[tuple[Any, ...]] = []
    size = 0
    for row in cursor:
        size += sys.getsizeof(row) + sum(map(sys.getsizeof, row))
        if len(rows) == max_rows:
            raise _Failure("resource", f"more than {max_rows} rows")
        if size > MAX_BYTES:
            raise _Failure("resource", f"more than {MAX_BYTES} bytes")
        if guard.expired():
            raise _Failure("timeout", "the deadline passed while rows were read")
        rows.append(row)
    return _Result(rows, size)


def _open(database: Path, guard: _Guard) -> sqlite3.Connection:
    """A connection that can only read, under the guard."""
    connection = sqlite3.connect(f"{database.as_uri()}?mode=ro&immutable=1", uri=True, isolation_level=None)
    try:
        connection.execute(f"PRAGMA hard_heap_limit = {HEAP_LIMIT}")
        connection.execute("PRAGMA query_only = ON")
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall()  # the schema, which the limits do not bind
        for limit, value in _LIMITS.items():
            connection.setlimit(limit, value)
        for name, strip in (("trim", str.strip), ("ltrim", str.lstrip), ("rtrim", str.rstrip)):
            connection.create_function(name, 2, _trim(strip), deterministic=True)
        # Data of any encoding: what is no UTF-8 stays different from everything else.
        connection.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
        connection.set_progress_handler(guard.expired, CHECK_EVERY)
        connection.set_authorizer(guard.authorise)
    except BaseException:
        connection.close()
        raise
    return connection


def _trim(strip: Callable[[str, str], str]) -> Callable[[Any, Any], str | None]:
    """`trim` with two arguments, bounded: SQLite's own takes seconds for two long texts."""

    def trim(text: Any, characters: Any) -> str | None:
        if text is None or characters is None:
            return None
        if isinstance(text, bytes) or not isinstance(characters, str) or len(characters) > MAX_TRIM:
            raise ValueError(f"trim takes text and at most {MAX_TRIM} characters")
        return strip(str(text), characters)

    return trim


class _Guard:
    """What one query may do, and until when (monotonic seconds)."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.refusal: _Failure | None = None
        self._quadratic_calls = 0

    def expired(self) -> bool:
        """Whether the deadline has passed."""
        return monotonic() > self.deadline

    def authorise(self, action: int, first: str | None, second: str | None, *_: str | None) -> int:
        """SQLite's authoriser, asked for everything that a statement would do while it is prepared."""
        if self.expired():
            return sqlite3.SQLITE_DENY
        if action == sqlite3.SQLITE_FUNCTION:
            return self._authorise_function((second or "").lower())
        if action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE):
            return sqlite3.SQLITE_OK
        return self._refuse("wrong", "more than a SELECT from tables")

    def _authorise_function(self, name: str) -> int:
        if name not in _FUNCTIONS:
            return self._refuse("wrong", f"the function {name} is not allowed")
        self._quadratic_calls += name in _QUADRATIC
        if self._quadratic_calls > MAX_QUADRATIC_CALLS:
            return self._refuse("resource", f"more than {MAX_QUADRATIC_CALLS} calls of {', '.join(sorted(_QUADRATIC))}")
        return sqlite3.SQLITE_OK

    def _refuse(self, status: Status, reason: str) -> int:
        self.refusal = self.refusal or _Failure(status, reason)
        return sqlite3.SQLITE_DENY
