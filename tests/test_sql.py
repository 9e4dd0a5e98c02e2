"""The reward `sql`: when two results are equal, what partial credit is, and what an adversarial query cannot do."""

# ruff: noqa: S608 - the queries are the test's own

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import recipe as recipes
from posttrain import registry, rewards, tasks
from posttrain.errors import UserError
from posttrain.rewards import RewardFunction, Verdict, Verifier, _workers, sql
from tests.patience import SOON, patient, worked

TIMEOUT = 0.7
"""Seconds for a query under attack."""

SCRIPT = """
CREATE TABLE city (id INTEGER PRIMARY KEY, name TEXT UNIQUE, country TEXT, people REAL, founded TEXT);
INSERT INTO city VALUES
    (1, 'Bern', 'CH', 0.1, '1191-01-01'), (2, 'Basel', 'CH', 0.2, '0374-01-01'), (3, 'Bonn', 'DE', 0.3, NULL),
    (4, 'Ulm', 'DE', 0.1, '0854-07-22');
CREATE VIEW swiss AS SELECT id, name FROM city WHERE country = 'CH';
CREATE TABLE n (i INTEGER);
WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c LIMIT 1000) INSERT INTO n SELECT i FROM c;
"""

ENDLESS = "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c) "
LONG = "WITH RECURSIVE d(s) AS (SELECT 'aaaaaaaa' UNION ALL SELECT s || s FROM d WHERE length(s) < 60000), "
LONG += "x(s) AS (SELECT s FROM d WHERE length(s) > 60000), c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c) "
SEARCH = "instr(s, substr(s, 1, 30000) || 'b')"
# Each table expression reads the one before twice, and each column is the sum of the one before with itself.
COPIES = ", ".join(f"c{i + 1} AS (SELECT x.a FROM c{i} x, c{i} y)" for i in range(30))
SUMS = ", ".join(f"c{i + 1} AS (SELECT a + a AS a FROM c{i})" for i in range(40))

ATTACKS: list[tuple[str, str]] = [
    ("ATTACH 'evil.db' AS evil", "wrong"),
    ("DETACH main", "wrong"),
    ("VACUUM INTO 'evil.db'", "wrong"),
    ("PRAGMA writable_schema = ON", "wrong"),
    ("PRAGMA table_info(city)", "wrong"),
    ("PRAGMA journal_mode = DELETE", "wrong"),
    ("INSERT INTO city VALUES (9, 'x', 'x', 1, NULL)", "wrong"),
    ("INSERT INTO city SELECT 9, 'x', 'x', 1, NULL RETURNING id", "wrong"),
    ("UPDATE city SET people = 0", "wrong"),
    ("DELETE FROM city", "wrong"),
    ("WITH c AS (SELECT 1) DELETE FROM city RETURNING id", "wrong"),
    ("DROP TABLE city", "wrong"),
    ("CREATE TABLE evil (a)", "wrong"),
    ("CREATE TEMP TABLE evil AS SELECT 1", "wrong"),
    ("CREATE VIRTUAL TABLE evil USING fts5(a)", "wrong"),
    ("BEGIN EXCLUSIVE", "wrong"),
    ("REINDEX", "wrong"),
    ("SELECT load_extension('evil')", "wrong"),
    ("SELECT readfile('/etc/passwd')", "wrong"),
    ("SELECT writefile('evil', 'x')", "wrong"),
    ("SELECT edit('x')", "wrong"),
    ("SELECT fts3_tokenizer('simple')", "wrong"),
    ("SELECT count(*) FROM city UNION ALL SELECT load_extension('evil') WHERE 0", "wrong"),
    ("SELECT zeroblob(1000000000)", "wrong"),
    ("SELECT randomblob(1000000000)", "wrong"),
    ("SELECT printf('%.*c', 1000000000, 'x')", "timeout"),  # SQLite cannot be interrupted in it
    ("SELECT count(*) FROM city WHERE length(printf('%.*c', 999999999, name)) > 0", "timeout"),
    ("SELECT format('%1000000000d', 1)", "wrong"),
    ("SELECT 4 LIMIT random()", "wrong"),
    ("SELECT * FROM pragma_table_info('city')", "wrong"),
    ("SELECT 1 FROM pragma_database_list", "wrong"),
    ("SELECT * FROM dbstat", "wrong"),
    ("SELECT 4; DROP TABLE city", "wrong"),
    ("SELECT 4 /* ; */; -- \nDROP TABLE city", "wrong"),
    ("/* SELECT 4", "wrong"),
    ("-- SELECT 4", "wrong"),
    (";;", "wrong"),
    (".shell touch evil", "wrong"),
    (".open evil.db", "wrong"),
    ("SELECT 4 WHERE ?", "wrong"),
    ("SELECT :a, @b, $c", "wrong"),
    ("SELECT '\x00'", "wrong"),
    ("SELECT '\ud800'", "wrong"),
    ("SELECT " + "(" * 9000 + "1" + ")" * 9000, "resource"),
    ("SELECT " + "1+" * 4900 + "1", "resource"),
    ("SELECT " + "NOT " * 2000 + "1", "resource"),
    ("SELECT '" + "a" * 10_000_000 + "'", "resource"),
    (" UNION ".join(["SELECT 1"] * 51), "resource"),
    ("SELECT 1 FROM " + ", ".join(f"n n{i}" for i in range(65)), "resource"),
    (f"WITH c0 AS (SELECT 1 AS a), {COPIES} SELECT a FROM c30", "resource|timeout"),
    (f"WITH c0 AS (SELECT people AS a FROM city), {SUMS} SELECT a FROM c40", "resource|timeout"),
    (ENDLESS + "SELECT i FROM c", "resource|timeout"),  # whatever comes first
    (ENDLESS + "SELECT count(*) FROM c", "timeout"),
    (ENDLESS + "SELECT i FROM c ORDER BY i * 7919 % 1000003, i LIMIT 1 OFFSET 100000000", "timeout"),
    ("SELECT count(*) FROM n a, n b, n c, n d", "timeout"),
    (LONG + f"SELECT count({SEARCH}) FROM c, x", "timeout"),
    (LONG + "SELECT " + "+".join([SEARCH] * 33) + " FROM x", "resource"),
    (LONG + "SELECT count(s LIKE '%" + "a" * 190 + "b') FROM c, x", "timeout"),
    (LONG + "SELECT 1 FROM x WHERE s LIKE '%" + "a" * 1000 + "b'", "resource"),
    (LONG + "SELECT length(trim(s, s || 'b')) FROM x", "wrong"),
    ("WITH RECURSIVE c(x) AS (SELECT 'a' UNION ALL SELECT x || x FROM c) SELECT x FROM c", "resource"),
    ("WITH RECURSIVE a(x) AS (SELECT x FROM b), b(x) AS (SELECT x FROM a) SELECT * FROM a", "wrong"),
    (
        "SELECT sum(a.i) OVER (ORDER BY a.i ROWS BETWEEN 500 PRECEDING AND 500 FOLLOWING) FROM n a, n b",
        "resource|timeout",
    ),
    ("SELECT group_concat(a.i) OVER (ORDER BY a.i) FROM n a, n b", "resource|timeout"),
    ("SELECT group_concat(a.i, b.i) FROM n a, n b", "resource"),
    ("SELECT json_group_array(a.i) FROM n a, n b", "resource"),
    ("SELECT value FROM json_each('[1, 2, 3]')", "wrong"),
    ("SELECT * FROM json_tree('{}')", "wrong"),
    ("SELECT * FROM generate_series(1, 1000000000)", "wrong"),
    ("SELECT json('" + "[" * 4000 + "]" * 4000 + "')", "wrong"),
    ("SELECT json_patch('{}', '{}')", "wrong"),
    ("SELECT hex(zeroblob(100000000))", "wrong"),
    (LONG + "SELECT count(s GLOB '" + "*a" * 90 + "*b') FROM x, c", "timeout"),
    (LONG + "SELECT length(replace(s, 'a', s)) FROM x", "resource"),
    ("SELECT * FROM pragma_compile_options()", "wrong"),
    ("SELECT * FROM sqlite_dbpage", "wrong"),
    ("PRAGMA hard_heap_limit = 0", "wrong"),
    ("EXPLAIN SELECT 1", "wrong"),
    ("EXPLAIN QUERY PLAN SELECT 1", "wrong"),
    ("ATTACH ':memory:' AS m", "wrong"),
    ("CREATE TEMP TRIGGER evil AFTER INSERT ON city BEGIN SELECT 1; END", "wrong"),
    ("SAVEPOINT evil", "wrong"),
    ("DELETE FROM city WHERE 0 RETURNING 4", "wrong"),
    ("SELECT * FROM (INSERT INTO n VALUES (1) RETURNING i)", "wrong"),
    ("SELECT 4\x00; DROP TABLE city", "wrong"),
    ("SELECT 5 -- \rSELECT 4", "wrong"),
    ("SELECT 4;;;SELECT 4", "wrong"),
    ("SELECT " + "9" * 9000, "wrong"),
    ("SELECT printf('%.999999f', 1.5)", "resource|wrong"),
    ("SELECT abs(-9223372036854775807 - 1)", "wrong"),
    ("SELECT " + ",".join(["1"] * 2001), "resource"),
    ("SELECT " + "(SELECT " * 900 + "1" + ")" * 900, "resource"),
    ("SELECT i FROM n ORDER BY " + ",".join(["i"] * 2001), "resource"),
    ("SELECT a.i FROM n a, n b, n c ORDER BY a.i * b.i * c.i DESC", "resource|timeout"),
    ("SELECT DISTINCT a.i * b.i * c.i FROM n a, n b, n c", "resource|timeout"),
    ("SELECT [load_extension]('evil')", "wrong"),
    ("SELECT name REGEXP '(a+)+$' FROM city", "wrong"),
    ("COPY city TO PROGRAM 'touch evil'", "wrong"),
]


LATE = [query for query, status in ATTACKS if "timeout" in status]


class Unhurried(sql.Reward):
    """Counts the seconds of a query as those that a processor works for it, which other work does not move."""

    def prepare(self) -> None:
        """In the process that workers are forked from."""
        sql.monotonic = time.thread_time  # type: ignore[attr-defined]


@pytest.fixture(scope="module", autouse=True)
def _patient() -> Iterator[None]:
    """Hold to its deadline what hangs, and nothing that a busy machine leaves waiting, in a worker or here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_workers, "_Judgement", patient(lambda text: any(query in text for query in LATE)))
        patch.setattr(sql, "monotonic", time.thread_time)
        patch.setattr(sql, "Reward", Unhurried)
        _workers.close()
        yield
        _workers.close()


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small database under a name that needs quoting in a URI."""
    return create(tmp_path_factory.mktemp("sql data") / "a b?mode=rwc#%41.sqlite")


def create(path: Path, script: str = SCRIPT) -> Path:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)
    return path


def fence(query: str) -> str:
    return f"```sql\n{query}\n```"


def verdict(verifier: Verifier, query: str, gold: str, database: Path | str) -> Verdict:
    """In this process, which the tests may patch and trust their queries in."""
    return verifier.attempt(fence(query), {"db": str(database), "answer": gold})


def in_a_worker(verifier: Verifier, query: str, gold: str, database: Path | str) -> Verdict:
    return verifier.score([fence(query)], [{"db": str(database), "answer": gold}])[0]


def values(rows: list[tuple[Any, ...]], width: int) -> str:
    """A query that returns the rows."""
    select = [f"SELECT {', '.join('NULL' if v is None else repr(v) for v in row)}" for row in rows]
    return " UNION ALL ".join(select or [f"SELECT {', '.join('1' * width)} WHERE 0"])


# ------------------------------------------------------------------ what is equal


@pytest.mark.parametrize(
    ("gold", "answer", "bird", "bag", "ordered"),
    [
        ("SELECT name FROM city WHERE id < 3", "SELECT name FROM swiss", 1, 1, 1),
        ("SELECT id FROM city ORDER BY id", "SELECT id FROM city ORDER BY id DESC", 1, 1, 0),
        ("SELECT country FROM city", "SELECT DISTINCT country FROM city", 1, 0, 0),
        ("SELECT id, name FROM city", "SELECT name, id FROM city", 0, 0, 0),
        ("SELECT id AS a FROM city", "SELECT id AS b FROM city", 1, 1, 1),
        ("SELECT 1", "SELECT 1.0", 1, 1, 1),
        ("SELECT 1", "SELECT '1'", 0, 0, 0),
        ("SELECT 'a'", "SELECT x'61'", 0, 0, 0),
        ("SELECT founded FROM city WHERE id = 3", "SELECT NULL", 1, 1, 1),
        ("SELECT founded FROM city WHERE id = 3", "SELECT ''", 0, 0, 0),
        ("SELECT 0.3", "SELECT 0.1 + 0.2", 0, 0, 0),  # no rounding, as BIRD compares
        ("SELECT id FROM city WHERE id > 9", "SELECT id FROM swiss WHERE 0", 1, 1, 1),
        ("SELECT id FROM city WHERE id > 9", "SELECT 1, 2 WHERE 0", 1, 1, 1),
        ("SELECT count(*) FROM city", "SELECT 4", 1, 1, 1),  # on one database it passes
    ],
)
def test_semantics(database: Path, gold: str, answer: str, bird: int, bag: int, ordered: int) -> None:
    for semantics, expected in (("bird", bird), ("bag", bag), ("ordered", ordered)):
        found = verdict(rewards.load("sql", {"semantics": semantics}), answer, gold, database)
        assert (found.reward, found.status) == (float(expected), "ok" if expected else "wrong"), semantics


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("SELECT id, name FROM city", "SELECT name, id FROM city", 1),  # the columns exchanged
        ("SELECT id, name FROM city", "SELECT name, id FROM city ORDER BY id DESC", 1),  # an order is not asked for
        ("SELECT id, name FROM city ORDER BY id", "SELECT name, id FROM city ORDER BY id", 1),
        ("SELECT id, name FROM city ORDER BY id", "SELECT name, id FROM city ORDER BY id DESC", 0),
        ("SELECT id FROM (SELECT id FROM city ORDER BY id)", "SELECT id FROM city ORDER BY id DESC", 1),  # a subquery's
        ("SELECT max(id) OVER (ORDER BY id) FROM city", "SELECT id FROM city ORDER BY id DESC", 1),  # a window's
        ("SELECT id, 'order by' FROM city", "SELECT 'order by', id FROM city ORDER BY id DESC", 1),
        ("SELECT id FROM city -- ORDER BY id", "SELECT id FROM city ORDER BY id DESC", 1),
        ("SELECT id FROM city ORDER /* so */ BY id", "SELECT id FROM city ORDER BY id DESC", 0),
        ("SELECT id FROM n, city WHERE i < 3", "SELECT id FROM city", 0),  # every row twice
        ("SELECT id FROM city", "SELECT id, id FROM city", 0),
        ("SELECT id, id FROM city", "SELECT id, 5 - id FROM city", 0),  # the same columns as sets, in other rows
        ("SELECT id, 5 - id FROM city", "SELECT id, 5 - id FROM city ORDER BY id DESC", 1),
        ("SELECT id, 5 - id, name FROM city", "SELECT id, 5 - id, name FROM city ORDER BY 2", 1),
        ("SELECT id, 5 - id, name FROM city", "SELECT name, 5 - id, id FROM city", 1),
        ("SELECT id FROM city WHERE 0", "SELECT 1, 2 WHERE 0", 1),
        ("SELECT id FROM city WHERE 0", "SELECT id FROM city", 0),
    ],
)
def test_spider_lets_columns_exchange_and_asks_for_an_order_where_the_gold_query_does(
    database: Path, gold: str, answer: str, expected: int
) -> None:
    for options in ({}, {"partial_credit": "columns_0.8"}):
        found = verdict(rewards.load("sql", {"semantics": "spider", **options}), answer, gold, database)
        assert (found.reward == 1.0, found.status) == (bool(expected), "ok" if expected else "wrong")


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_spider_finds_the_order_of_columns_that_trying_all_of_them_finds(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 4))
    table = st.lists(st.tuples(*[st.integers(0, 1)] * width), min_size=1, max_size=5)
    gold, answer = data.draw(table), data.draw(table)
    if data.draw(st.booleans()):  # else they seldom are equal
        order = data.draw(st.permutations(range(width)))
        answer = data.draw(st.permutations([tuple(row[i] for i in order) for row in gold]))
    every = [[tuple(row[i] for i in order) for row in answer] for order in itertools.permutations(range(width))]
    for ordered, expected in ((True, gold in every), (False, Counter(gold) in map(Counter, every))):
        results = sql._Result(gold, 0), sql._Result(answer, 0)
        assert sql._equal_in_some_order_of_columns(*results, ordered=ordered, until=float("inf")) == expected


def test_spider_stops_at_the_deadline_where_there_are_too_many_orders_to_try(database: Path) -> None:
    """Columns are points and rows are lines: of one ring of forty, and of two rings of twenty, alike at every point."""
    size = 40
    edges = [(i, (i + 1) % size) for i in range(size)]
    half = size // 2
    other = [(half * part + i, half * part + (i + 1) % half) for part in range(2) for i in range(half)]
    gold, answer = ([tuple(int(i in edge) for i in range(size)) for edge in graph] for graph in (edges, other))
    assert Counter(map(sum, zip(*gold, strict=True))) == Counter(map(sum, zip(*answer, strict=True))) == {2: size}
    verifier = rewards.load("sql", {"semantics": "spider", "timeout": TIMEOUT})
    start = time.perf_counter()
    found = in_a_worker(verifier, values(answer, size), values(gold, size), database)
    assert found.reward == 0.0 and found.status in ("wrong", "timeout")
    assert time.perf_counter() - start < SOON


@pytest.mark.parametrize(
    "query",
    [
        "SELECT country, avg(people), rank() OVER (ORDER BY count(*)) FROM city GROUP BY 1 HAVING count(*) > 1",
        "WITH old AS (SELECT * FROM city WHERE strftime('%Y', founded) < '1000') SELECT upper(name) FROM old",
        "SELECT name FROM city WHERE name LIKE 'B%' AND id IN (SELECT id FROM swiss) EXCEPT SELECT 'Bern'",
        "SELECT CASE WHEN people > 0.15 THEN 'big' ELSE 'small' END, group_concat(name, ', ') FROM city GROUP BY 1",
        "SELECT CAST(substr(founded, 1, 4) AS INTEGER), round(people * 3, 2), coalesce(founded, '?') FROM city",
        "SELECT a.name, b.name FROM city a LEFT JOIN city b ON a.country = b.country AND a.id < b.id",
        "SELECT replace(trim(name, 'B'), 'n', ''), instr(name, 'n'), json_extract('[7]', '$[0]') FROM city",
        "SELECT julianday(founded), iif(people, 1, 2), name || '-' || country FROM city ORDER BY 1 LIMIT 2 OFFSET 1",
        "SELECT name FROM sqlite_master",
        'SELECT "a text in double quotes" FROM city;',
        "VALUES (1), (2)",
        "SELECT 1 -- why\n;\n",
    ],
)
def test_what_text_to_sql_needs_is_allowed_and_a_gold_query_is_correct(database: Path, query: str) -> None:
    verifier = rewards.load("sql", {"semantics": "ordered"})
    row = {"db": str(database), "answer": query}
    found = verifier.score([verifier.gold(row) or ""], [row])[0]
    assert (found.reward, found.status) == (1.0, "ok"), found


@pytest.mark.parametrize("side", ["", "l", "r"])
def test_trim_with_two_arguments_is_what_sqlite_computes(database: Path, side: str) -> None:
    for arguments in ("'xxaxbxx', 'x'", "'xyaxy', 'yx'", "'a', ''", "NULL, 'a'", "'a', NULL", "1212, '2'", "0.50, '0'"):
        with closing(sqlite3.connect(":memory:")) as plain:
            expected = plain.execute(f"SELECT {side}trim({arguments})").fetchone()[0]
        gold = "SELECT NULL" if expected is None else f"SELECT '{expected}'"
        assert verdict(rewards.load("sql"), f"SELECT {side}trim({arguments})", gold, database).reward == 1.0, arguments


def test_text_that_is_no_utf8_is_data(tmp_path: Path) -> None:
    script = "CREATE TABLE t (a); INSERT INTO t VALUES (CAST(x'E9' AS TEXT)), (CAST(x'E8' AS TEXT)), ('');"
    path = create(tmp_path / "latin.sqlite", script)
    for answer, expected in (("a FROM t WHERE rowid = 1", 1.0), ("a FROM t WHERE rowid = 2", 0.0), ("''", 0.0)):
        found = verdict(rewards.load("sql"), f"SELECT {answer}", "SELECT a FROM t WHERE rowid = 1", path)
        assert found.reward == expected


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("```sql\nSELECT 1\n```", "SELECT 1"),
        ("```SQL\r\nSELECT\t1\n  ;\n```\nThat is it.", "SELECT 1 ;"),
        ("```sqlite\nSELECT 1\n```", "SELECT 1"),
        ("```sql\nSELECT 2\n```\nno:\n```sql\nSELECT 1\n```", "SELECT 1"),
        ("```python\nprint(1)\n```\n```sql\nSELECT 1\n```", "SELECT 1"),
        ("```sql\nSELECT 1\n```\n```python\nprint(1)\n```", "SELECT 1"),
        ("```sql\nSELECT 1\n```\n```sql\nSELECT 2", "SELECT 1"),
        ("```sql\nSELECT 2\n```sql\nSELECT 1\n```", "SELECT 1"),
        ("<think>```sql\nSELECT 2\n```</think>\n```sql\nSELECT 1\n```", "SELECT 1"),
        ("<think>```sql\nSELECT 2\n```</think>\nSELECT 1", "SELECT 1"),
        ("\nSELECT\n 1\n", "SELECT 1"),
    ],
)
def test_where_the_answer_is_read(database: Path, completion: str, answer: str) -> None:
    row = {"db": str(database), "answer": "SELECT 1"}
    found = rewards.load("sql").score([completion], [row])[0]
    assert (found.reward, found.answer) == (1.0, answer)


@pytest.mark.parametrize("completion", ["", " \n", "```sql\n```", "<think>SELECT 1", "<think>a</think>\n"])
def test_no_answer(database: Path, completion: str) -> None:
    found = rewards.load("sql").score([completion], [{"db": str(database), "answer": "SELECT 1"}])[0]
    assert (found.reward, found.status) == (0.0, "no_answer")


def test_extraction_is_linear(database: Path) -> None:
    row = {"db": str(database), "answer": "SELECT 1"}
    for text in ("```sql\n" * 100_000, "```" * 100_000, "`" * 400_000, "</think>" * 50_000, "<think>" * 50_000):
        start = worked()
        assert rewards.load("sql").score([text], [row])[0].reward == 0.0
        assert worked() - start < 1.0


# ------------------------------------------------------------------ partial credit


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("SELECT id, name FROM city", "SELECT id, name FROM city", 1.0),
        ("SELECT id, name FROM city", "SELECT name, id FROM city", 0.8),  # c = 2: 0.8 · 4/(2·2)
        ("SELECT id, name FROM city", "SELECT name FROM city", 0.4),  # c = 1: 0.8 · 1/(2·1)
        ("SELECT id FROM city", "SELECT id, name, people FROM city", 0.8 / 3),  # 0.8 · 1/(1·3)
        ("SELECT id, name FROM city", "SELECT id, country FROM city", 0.2),  # 0.8 · 1/(2·2)
        ("SELECT id, name FROM city", "SELECT country FROM city", 0.0),
        ("SELECT id, id FROM city", "SELECT id FROM city", 0.8),  # c = 2: 0.8 · min(1, 4/(2·1))
        ("SELECT id FROM city", "SELECT id, id FROM city", 0.4),  # c = 1: 0.8 · 1/(1·2)
        ("SELECT id, country FROM city", "SELECT 5 - id, country FROM city", 0.8),  # values that do not share rows
        ("SELECT name FROM city", "SELECT name FROM swiss", 0.0),  # a part of the column is no match
        ("SELECT id FROM city", "SELECT id FROM city WHERE 0", 0.0),
        ("SELECT id FROM city WHERE 0", "SELECT id FROM city", 0.0),
        ("SELECT id FROM city WHERE 0", "SELECT 1, 2 WHERE 0", 1.0),
        ("SELECT id FROM city", "SELECT id FROM nowhere", 0.0),
    ],
)
def test_partial_credit_counts_columns(database: Path, gold: str, answer: str, expected: float) -> None:
    shaped = verdict(rewards.load("sql", {"partial_credit": "columns_0.8"}), answer, gold, database)
    assert shaped.reward == pytest.approx(expected, abs=1e-12)
    assert shaped.status == ("ok" if expected == 1.0 else "wrong")
    assert verdict(rewards.load("sql"), answer, gold, database).reward == float(expected == 1.0)


def test_partial_credit_for_the_right_rows_in_the_wrong_order(database: Path) -> None:
    verifier = rewards.load("sql", {"partial_credit": "columns_0.8", "semantics": "ordered"})
    assert verdict(verifier, "SELECT id FROM n, city", "SELECT id FROM city", database).reward == 0.8


CELLS = st.none() | st.integers(-1, 2) | st.sampled_from(["a", "b"])
TABLES = st.integers(1, 3).flatmap(
    lambda width: st.tuples(st.just(width), st.lists(st.tuples(*[CELLS] * width), max_size=4))
)


@settings(deadline=None, max_examples=60)
@given(TABLES, TABLES)
def test_only_equal_results_are_correct(
    database: Path, gold: tuple[int, list[Any]], answer: tuple[int, list[Any]]
) -> None:
    """What pre-sampling counts, a reward of exactly 1.0, never comes from partial credit."""
    equal = {
        "bird": set(gold[1]) == set(answer[1]),
        "bag": Counter(gold[1]) == Counter(answer[1]),
        "ordered": gold[1] == answer[1],
    }
    for semantics, expected in equal.items():
        verifier = rewards.load("sql", {"semantics": semantics, "partial_credit": "columns_0.8"})
        reward = verdict(verifier, values(answer[1], answer[0]), values(gold[1], gold[0]), database).reward
        assert reward is not None
        assert (reward == 1.0) == expected
        assert reward == 1.0 or 0.0 <= reward <= 0.8


# ------------------------------------------------------------------ attacks


@pytest.fixture
def untouched(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After the test, the database has its bytes, nothing lies beside it, and the working directory is empty."""
    monkeypatch.chdir(tmp_path)
    before = hashlib.sha256(database.read_bytes()).digest(), database.stat().st_mtime_ns
    yield
    assert (hashlib.sha256(database.read_bytes()).digest(), database.stat().st_mtime_ns) == before
    assert [path.name for path in database.parent.iterdir()] == [database.name]
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(("attack", "status"), ATTACKS, ids=lambda value: ascii(value[:40]))
def test_an_attack_scores_zero_in_time_and_changes_nothing(database: Path, attack: str, status: str) -> None:
    verifier = rewards.load("sql", {"timeout": TIMEOUT, "partial_credit": "columns_0.8"})
    in_a_worker(verifier, "SELECT 4", "SELECT count(*) FROM city", database)  # where the gold result is kept then
    start = time.perf_counter()
    found = in_a_worker(verifier, attack, "SELECT count(*) FROM city", database)
    assert time.perf_counter() - start < SOON
    assert found.reward == 0.0
    assert found.status in status.split("|"), found
    assert len(found.detail) <= 200
    assert in_a_worker(verifier, "SELECT 4", "SELECT count(*) FROM city", database).reward == 1.0


@pytest.mark.usefixtures("untouched")
def test_an_attack_costs_nobody_else_the_verdict(database: Path) -> None:
    assert len(ATTACKS) >= 31
    verifier = rewards.load("sql", {"timeout": 0.2})
    answers = ["SELECT 4", *(query for query, status in ATTACKS if "timeout" not in status), ATTACKS[25][0]]
    answers = [each for attack in answers for each in (attack, "SELECT count(*) FROM city", "SELECT 5")]
    row = {"db": str(database), "answer": "SELECT count(*) FROM city"}
    found = verifier.score([fence(answer) for answer in answers], [row] * len(answers))
    assert [verdict.reward for verdict in found[::3]] == [1.0] + [0.0] * (len(answers) // 3 - 1)
    assert {verdict.reward for verdict in found[1::3]} == {1.0}
    assert {verdict.status for verdict in found[2::3]} == {"wrong"}
    assert found[-3].status == "timeout"


@pytest.mark.usefixtures("untouched")
def test_even_without_the_authoriser_the_file_cannot_be_written(database: Path) -> None:
    with closing(sql._open(database, sql._Guard(sql.monotonic() + TIMEOUT))) as connection:
        connection.set_authorizer(None)
        for statement in ("DELETE FROM city", "CREATE TABLE evil (a)", "PRAGMA user_version = 7", "VACUUM"):
            with pytest.raises(sqlite3.OperationalError):
                connection.execute(statement)
        with pytest.raises(sqlite3.OperationalError, match="too many attached"):
            connection.execute("ATTACH 'evil.db' AS evil")


def test_the_caps_are_where_they_are_said_to_be(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = rewards.load("sql", {"max_rows": 1000})
    assert verdict(verifier, "SELECT i FROM n", "SELECT i FROM n", database).reward == 1.0
    above = verdict(verifier, "SELECT i FROM n UNION ALL SELECT 1", "SELECT i FROM n", database)
    assert (above.status, above.detail) == ("resource", "more than 1000 rows")
    monkeypatch.setattr(sql, "MAX_BYTES", 10_000)
    wide = verdict(verifier, f"SELECT '{'a' * 9000}', '{'a' * 900}'", "SELECT 1", database)
    assert (wide.status, wide.detail) == ("resource", "more than 10000 bytes")
    long = verdict(verifier, "SELECT 1" + " " * sql.MAX_QUERY + "+ 1", "SELECT 1", database)
    assert (long.status, long.detail) == ("resource", "more than 10000 characters")


@settings(deadline=None, max_examples=150)
@given(st.lists(st.sampled_from([*"(),;*'\"`[]-./", "--", "/*", "SELECT", "FROM", "city", "WITH", "AS", "1", "\n"])))
def test_no_text_makes_it_fail(database: Path, pieces: list[str]) -> None:
    verifier = rewards.load("sql", {"timeout": TIMEOUT})
    assert verdict(verifier, " ".join(pieces), "SELECT 7", database).reward == 0.0


# ------------------------------------------------------------------ gold queries and databases


@pytest.mark.parametrize(
    "gold",
    ["", " ", None, 5, "SELECT", "SELECT nope FROM city", "DELETE FROM city", "SELECT 1; SELECT 2", "SELECT random()",
     "SELECT i FROM n", ENDLESS + "SELECT count(*) FROM c", "SELECT '\ud800'", "-- nothing"],
)  # fmt: skip
def test_a_gold_query_that_fails_has_no_reward(database: Path, gold: Any) -> None:
    verifier = rewards.load("sql", {"timeout": 0.1, "max_rows": 999})
    found = verdict(verifier, "SELECT 1", gold, database)
    assert (found.reward, found.status) == (None, "unparseable_gold")
    assert "the gold query" in found.detail


def test_a_database_that_cannot_be_read_has_no_reward(tmp_path: Path) -> None:
    (tmp_path / "text.sqlite").write_text("no database at all" * 100)
    broken = create(tmp_path / "broken.sqlite").read_bytes()
    (tmp_path / "broken.sqlite").write_bytes(broken[:4096] + b"\xff" * (len(broken) - 4096))
    with closing(sqlite3.connect(create(tmp_path / "log.sqlite"))) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute("INSERT INTO n VALUES (5)")
        writer.commit()
        for db in ("nowhere.sqlite", ".", "text.sqlite", "broken.sqlite", "log.sqlite", "a\0b", "", None, 5):
            found = rewards.load("sql", {"db_root": str(tmp_path)}).score(
                [fence("SELECT count(*) FROM n")], [{"db": db, "answer": "SELECT count(*) FROM n"}]
            )[0]
            assert (found.reward, found.status) == (None, "verifier_error"), db
            assert found.detail


def test_a_database_lies_in_its_root(tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    inside, _outside = create(root / "inner" / "a.sqlite"), create(tmp_path / "root.sqlite")
    (root / "link.sqlite").symlink_to(database)
    verifier = rewards.load("sql", {"db_root": str(root)})
    for db in ("inner/a.sqlite", "inner/../inner/a.sqlite", str(inside)):
        assert verdict(verifier, "SELECT 1", "SELECT 1", db).reward == 1.0
    for db in ("../root.sqlite", "inner/../../root.sqlite", str(database), "link.sqlite", "/etc/passwd"):
        found = verdict(verifier, "SELECT 1", "SELECT 1", db)
        assert (found.reward, found.status) == (None, "verifier_error")
        assert "lies outside db_root" in found.detail
    monkeypatch.chdir(root)
    assert verdict(rewards.load("sql"), "SELECT 1", "SELECT 1", "inner/a.sqlite").reward == 1.0


# ------------------------------------------------------------------ the gold cache, processes and threads


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every query that is run, in order."""
    queries: list[str] = []
    run = sql._run

    def record(database: Path, query: str, options: sql.Options, until: float) -> sql._Result:
        queries.append(query)
        return run(database, query, options, until)

    monkeypatch.setattr(sql, "_run", record)
    return queries


def test_a_gold_query_runs_once(database: Path, runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = rewards.load("sql")
    for answer in ("SELECT 1", "SELECT 2", "SELECT 3"):
        verdict(verifier, answer, "SELECT 4", database)
    assert runs == ["SELECT 4", "SELECT 1", "SELECT 2", "SELECT 3"]
    monkeypatch.setattr(sql, "MAX_GOLDS", 2)
    runs.clear()
    for gold in ("SELECT 5", "SELECT 4", "SELECT 6", "SELECT 4", "SELECT 5"):  # 5 was used least when 6 came
        verdict(verifier, "SELECT 0", gold, database)
    assert [query for query in runs if query != "SELECT 0"] == ["SELECT 5", "SELECT 6", "SELECT 5"]
    monkeypatch.setattr(sql, "MAX_BYTES", 300)
    verdict(verifier, "SELECT 0", "SELECT 7, 8, 9", database)
    assert sum(gold.size for gold in verifier._golds.values()) <= 300  # type: ignore[attr-defined]


@pytest.mark.parametrize("gold", ["SELECT date('now')", "SELECT CURRENT_DATE", "SELECT DATE()"])
def test_what_depends_on_the_clock_is_not_kept(database: Path, runs: list[str], gold: str) -> None:
    verifier = rewards.load("sql")
    assert [verdict(verifier, gold, gold, database).reward for _ in range(2)] == [1.0, 1.0]
    assert runs == [gold] * 4


def test_it_is_listed_with_a_summary_and_survives_pickling(database: Path) -> None:
    verifier = rewards.load("sql", {"semantics": "bag"})
    assert registry.entry("reward", "sql").summary.startswith("SQL: ")
    assert verdict(verifier, "SELECT 1", "SELECT 1", database).reward == 1.0
    copy = pickle.loads(pickle.dumps(RewardFunction(verifier))).verifier  # noqa: S301 - our own bytes
    assert copy.options == sql.Options(semantics="bag")
    assert not copy._golds
    assert verdict(copy, "SELECT 1", "SELECT 1 UNION ALL SELECT 1", database).reward == 0.0


def test_it_works_in_several_threads(database: Path) -> None:
    verifier = rewards.load("sql", {"timeout": TIMEOUT})
    found: list[tuple[str, str]] = []

    def judge() -> None:
        for answer in ("SELECT 4", "SELECT 5", ENDLESS + "SELECT count(*) FROM c", "SELECT count(i) FROM n"):
            found.append((answer[:8], in_a_worker(verifier, answer, "SELECT count(*) FROM city", database).status))

    threads = [threading.Thread(target=judge) for _ in range(3)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.perf_counter() - start < SOON
    assert Counter(found) == {("SELECT 4", "ok"): 3, ("SELECT 5", "wrong"): 3, ("WITH REC", "timeout"): 3,
                              ("SELECT c", "wrong"): 3}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"semantic": "bag"}, "did you mean 'semantics'"),
        ({"semantics": "multiset"}, "'semantics' of the reward 'sql' is wrong"),
        ({"partial_credit": 0.8}, "'partial_credit'"),
        ({"timeout": 0.0}, "'timeout'"),
        ({"timeout": float("inf")}, "'timeout'"),
        ({"max_rows": 0}, "'max_rows'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        rewards.load("sql", options)


def test_a_sqlite_without_a_memory_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 30, 1))
    with pytest.raises(UserError, match=r"needs SQLite 3\.31"):
        rewards.load("sql")


# ------------------------------------------------------------------ the recipe


def test_the_recipe_reads_bird_as_its_header_describes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "bird"
    for name in ("rows", "train_databases"):
        (folder / name).mkdir(parents=True)
    create(folder / "train_databases" / "city.sqlite")
    row = {"db": "train_databases/city.sqlite", "schema": "CREATE TABLE city", "evidence": "", "difficulty": "simple"}
    train = [
        {**row, "question": "How many cities?", "SQL": "SELECT count(*) FROM city"},
        {**row, "question": "And rivers?", "SQL": "SELECT count(*) FROM river"},
    ]
    dev = [{**row, "question": "Which cities are Swiss?", "SQL": "SELECT name FROM swiss"}]
    for name, rows in (("train", train), ("dev", dev)):
        lines = "\n".join(json.dumps(each) for each in rows)
        (folder / "rows" / f"{name}.jsonl").write_text(lines, encoding="utf-8")

    recipe = recipes.load("dph_rl/llama31_8b_sql")
    task = tasks.load(recipe.task.name, recipe.task.options)
    with pytest.warns(UserWarning, match="bad rows skipped: 1, the first at .*no such table: river"):
        (trained,) = task.rows("train")
    (held_out,) = task.rows("eval")
    assert "How many cities?" in trained["prompt"][0]["content"]
    accuracy = rewards.load(*task.verifier)
    (shaped,) = [rewards.load(reward.name or "", reward.options) for reward in recipe.rewards]
    answer = fence("SELECT id, name FROM swiss")  # one of two columns matches: 0.8 · 1/(1·2)
    assert accuracy.score([answer], [held_out])[0].reward == 0.0
    assert shaped.score([answer], [held_out])[0].reward == 0.4
    assert shaped.score([fence("SELECT 4")], [trained])[0].reward == 1.0
