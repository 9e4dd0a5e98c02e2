"""Text-to-SQL: questions about small generated databases, answered by one query. For language models that know SQL.

A schema has two tables, of which one refers to the other (authors and books, teams and players), with columns drawn
from those of its subject; the prompt shows it as CREATE TABLE statements. A question is drawn from a template: a count,
a filter or two, an aggregate, a join, groups with or without a condition, the first few in an order, a comparison with
the average, what is missing on the other side, distinct values, values that are not recorded.

The reward `sql` runs the answer and the gold query on `copies` of the database, which have the same tables and other
data, and compares results as bags of rows. A question is taken only if its gold query has another result on every copy,
never none, so that no constant is right, and if typical mistakes (a condition left out, `>=` for `>`, `or` for `and`,
another aggregate) give something else on at least one copy. The prompt shows no data.

The databases are files in a folder of this user's cache, or in `folder`; they are written when rows are asked for, and
their names are hashes of their contents. Every process that judges must see that folder.

Questions of the same template about the same tables and columns fall in the same split, whatever numbers and values
they name and whatever other columns the tables have.
"""

# ruff: noqa: S608 - queries consist of names and values that are written below

from __future__ import annotations

import hashlib
import os
import random
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from posttrain.errors import UserError
from posttrain.tasks import BaseTask, Row, Split, TaskOptions
from posttrain.tasks._drawn import divide

DRY = 3000
"""Draws in a row that bring no new question, after which there are none."""

Result = list[tuple[Any, ...]]


class Options(TaskOptions):
    """Options of the task `text2sql`."""

    schemas: Annotated[int, Field(gt=0, le=1000)] = 40
    """Schemas that questions are asked about; the ten subjects take turns."""
    copies: Annotated[int, Field(ge=2, le=8)] = 3
    """Databases of a schema, on all of which an answer must be right."""
    rows: Annotated[int, Field(gt=0)] = 4000
    """Training prompts; evaluation prompts come on top, in proportion to `eval_share`."""
    eval_share: Annotated[float, Field(ge=0, lt=1)] = 0.16
    """Share of all kinds of questions that is held out."""
    folder: str | None = None
    """Where the databases lie; default `posttrain/text2sql` in $XDG_CACHE_HOME or ~/.cache."""
    seed: int = 0
    """Of the draw, which decides schemas, data and questions."""


@dataclass(frozen=True)
class Table:
    """A kind of thing: its table, one of it, and its columns beside `id` and `name`."""

    plural: str
    one: str
    categories: Mapping[str, Sequence[str]]
    numbers: Mapping[str, tuple[str, int, int]]
    """What a number is called in a question, its least and its largest value."""


def _table(plural: str, one: str, categories: dict[str, str], **numbers: tuple[str, int, int]) -> Table:
    return Table(plural, one, {name: values.split() for name, values in categories.items()}, numbers)


COUNTRIES = "France Japan Brazil Kenya Norway"

SUBJECTS: Sequence[tuple[Table, Table]] = (
    (
        _table("authors", "author", {"country": COUNTRIES}, born=("year of birth", 1850, 1995),
               prizes=("number of prizes", 0, 30)),
        _table("books", "book", {"genre": "crime poetry history fantasy", "language": "English German Spanish"},
               pages=("number of pages", 60, 900), published=("year of publication", 1900, 2024),
               price=("price", 5, 90), rating=("rating", 1, 100)),
    ),
    (
        _table("teams", "team", {"league": "north south east west"}, founded=("founding year", 1880, 2015),
               budget=("budget", 10, 900)),
        _table("players", "player", {"position": "keeper defender midfielder striker", "foot": "left right"},
               age=("age", 16, 42), goals=("number of goals", 0, 300), salary=("salary", 20, 900),
               height=("height", 150, 210)),
    ),
    (
        _table("teachers", "teacher", {"department": "physics music law biology"}, hired=("year of hiring", 1985, 2024),
               office=("office number", 100, 500)),
        _table("courses", "course", {"level": "beginner advanced expert", "term": "spring summer autumn"},
               credits=("number of credits", 1, 60), students=("number of students", 5, 400),
               hours=("number of hours", 10, 120), fee=("fee", 0, 900)),
    ),
    (
        _table("airlines", "airline", {"country": COUNTRIES}, founded=("founding year", 1920, 2015),
               staff=("number of staff", 100, 9000)),
        _table("planes", "plane", {"maker": "Airbus Boeing Embraer", "role": "passenger cargo training"},
               seats=("number of seats", 8, 500), reach=("range", 500, 15000),
               built=("year of construction", 1975, 2024), flights=("number of flights", 0, 9000)),
    ),
    (
        _table("museums", "museum", {"city": "Oslo Lyon Kyoto Lima"}, opened=("opening year", 1750, 2015),
               visitors=("number of visitors", 1000, 900000)),
        _table("paintings", "painting", {"style": "baroque cubist modern gothic", "technique": "oil ink tempera"},
               painted=("year of origin", 1400, 2020), width=("width", 10, 600), height=("height", 10, 600),
               worth=("value", 1, 9000)),
    ),
    (
        _table("companies", "company", {"sector": "energy retail health transport"},
               founded=("founding year", 1850, 2022), employees=("number of employees", 5, 90000)),
        _table("products", "product", {"category": "tool toy garment lamp", "colour": "red green black white"},
               price=("price", 1, 900), stock=("stock", 0, 5000), weight=("weight", 1, 400),
               sold=("number sold", 0, 9000)),
    ),
    (
        _table("farms", "farm", {"region": "coast valley hills"}, area=("area", 5, 900),
               workers=("number of workers", 1, 60)),
        _table("animals", "animal", {"species": "cow goat sheep horse", "sex": "female male"},
               weight=("weight", 20, 900), born=("year of birth", 2005, 2024), feed=("daily feed", 1, 80),
               milk=("daily milk", 1, 60)),
    ),
    (
        _table("cities", "city", {"country": COUNTRIES}, population=("population", 1000, 900000),
               elevation=("elevation", 1, 4000)),
        _table("hotels", "hotel", {"class": "budget standard luxury", "view": "sea park street"},
               rooms=("number of rooms", 5, 600), price=("price", 30, 900), floors=("number of floors", 1, 60),
               rating=("rating", 1, 100)),
    ),
    (
        _table("studios", "studio", {"country": COUNTRIES}, founded=("founding year", 1910, 2020),
               staff=("number of staff", 5, 3000)),
        _table("films", "film", {"genre": "drama comedy horror western", "language": "English Hindi Korean"},
               minutes=("length in minutes", 60, 240), released=("year of release", 1930, 2024),
               budget=("budget", 1, 400), gross=("gross", 1, 2000)),
    ),
    (
        _table("labs", "lab", {"field": "optics genetics robotics"}, rooms=("number of rooms", 1, 60),
               funding=("funding", 10, 9000)),
        _table("experiments", "experiment", {"status": "planned running finished failed", "risk": "low medium high"},
               samples=("number of samples", 1, 900), days=("duration in days", 1, 400), cost=("cost", 1, 5000),
               score=("score", 1, 100)),
    ),
)  # fmt: skip
"""What a schema may be about: the table that is referred to, and the one that refers to it."""

FIRST = [
    "Amber", "Birch", "Cedar", "Delta", "Ember", "Falcon", "Grove", "Harbor", "Iris", "Juniper", "Kestrel", "Lotus",
    "Maple", "Nova", "Onyx", "Pearl", "Quartz", "Raven", "Sierra", "Tulip",
]  # fmt: skip
SECOND = ["Arch", "Bay", "Crest", "Dawn", "Echo", "Field", "Gate", "Hill", "Isle", "Jade", "Lane", "Mill", "Oak"]


@dataclass(frozen=True)
class Draft:
    """A question as a template makes it, still unchecked."""

    columns: tuple[str, ...]
    question: str
    gold: str
    mistakes: tuple[str, ...] = ()
    """Queries whose results must differ from the gold one's on some copy."""
    same: tuple[str, ...] = ()
    """Queries whose results must not differ from it on any: two readings of a question agree."""


@dataclass
class Schema:
    """Two tables with some of their subject's columns, and databases with different data."""

    parent: Table
    child: Table
    nullable: str
    """The child's number that is not recorded for some."""
    scripts: list[str]
    text: str
    """The CREATE TABLE statements."""
    files: list[str] = field(default_factory=list)
    databases: list[sqlite3.Connection] = field(default_factory=list)
    _results: dict[tuple[str, int], Result] = field(default_factory=dict)

    @property
    def link(self) -> str:
        """The child's column that refers to the parent."""
        return f"{self.parent.one}_id"

    @property
    def joined(self) -> str:
        """Both tables as one, the child as `c` and the parent as `p`."""
        return f"{self.child.plural} AS c JOIN {self.parent.plural} AS p ON c.{self.link} = p.id"

    def result(self, query: str, copy: int = 0) -> Result:
        """What a query of ours returns on a copy, in an order of its own."""
        place = query, copy
        if place not in self._results:
            if len(self._results) > 1000:
                self._results.clear()
            rows = self.databases[copy].execute(query).fetchall()
            self._results[place] = rows if len(rows) == 1 else sorted(rows, key=repr)
        return self._results[place]

    def differ(self, query: str, other: str) -> bool:
        """Whether two queries return other rows on some copy."""
        return any(self.result(query, copy) != self.result(other, copy) for copy in range(len(self.databases)))


class Task(BaseTask):
    """Questions about generated SQLite databases."""

    name = "text2sql"

    def __init__(self, options: Options) -> None:
        self.options = options

    @property
    def folder(self) -> Path:
        """Where the databases lie."""
        if self.options.folder is not None:
            return Path(self.options.folder).absolute()
        cache = os.environ.get("XDG_CACHE_HOME")
        return (Path(cache) if cache else Path.home() / ".cache") / "posttrain" / "text2sql"

    @property
    def verifier(self) -> tuple[str, dict[str, Any]]:
        """The reward `sql`: results are bags of rows, and databases lie in the folder."""
        return "sql", {"semantics": "bag", "db_root": str(self.folder)}

    def rows(self, split: Split) -> list[Row]:
        """The questions of a split, in drawn order; their databases are written where they are missing.

        Raises:
            UserError: fewer questions exist than `rows` asks for, or the folder cannot be written to.
        """
        return list(self._splits[split])

    def demonstrations(self, rows: Sequence[Row], count: int, *, seed: int) -> list[tuple[Row, str]]:
        """Uniformly random rows, each with its gold query."""
        return [(row, f"```sql\n{row['answer']}\n```") for row in random.Random(seed).choices(rows, k=count)]

    @cached_property
    def _splits(self) -> dict[Split, list[Row]]:
        options = self.options
        schemas = [_schema(number, options.seed, options.copies) for number in range(options.schemas)]
        try:
            splits = divide(self.name, self._drawn(schemas), options.rows, options.eval_share)
            self._write(schemas)
        finally:
            for schema in schemas:
                for database in schema.databases:
                    database.close()
        return splits

    def _drawn(self, schemas: Sequence[Schema]) -> Iterator[tuple[str, Row]]:
        """Distinct questions, until none is new, each behind its kind."""
        draw = random.Random(f"text2sql {self.options.seed}")
        seen: set[str] = set()
        barren = 0
        while barren < DRY:
            schema, template = draw.choice(schemas), draw.choice(TEMPLATES)
            draft = template(schema, draw)
            key = "" if draft is None else f"text2sql:{schema.files[0].partition('.')[0]}:{draft.gold}"
            if draft is None or key in seen or not asks(schema, draft):
                barren += 1
                continue
            barren = 0
            seen.add(key)
            kind = f"text2sql:{template.__name__}:{schema.child.plural}:{','.join(draft.columns)}"
            yield kind, _row(schema, draft, key)

    def _write(self, schemas: Sequence[Schema]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for schema in schemas:
                for name, database in zip(schema.files, schema.databases, strict=True):
                    path = self.folder / name
                    if path.exists():  # its name is the hash of what it holds
                        continue
                    temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
                    temporary.write_bytes(database.serialize())
                    os.replace(temporary, path)
        except OSError as error:
            raise UserError(
                f"The task 'text2sql' cannot write its databases to {self.folder} ({error.strerror}): set the option "
                "folder to one that can be written to."
            ) from None


def asks(schema: Schema, draft: Draft) -> bool:
    """Whether a question can be asked: its answer is another one on every copy, and no mistake finds it on all."""
    gold: list[Result] = []
    for copy in range(len(schema.databases)):
        result = schema.result(draft.gold, copy)
        if not result or result in ([(0,)], [(None,)]) or result in gold:
            return False
        gold.append(result)
    return all(schema.differ(mistake, draft.gold) for mistake in draft.mistakes) and not any(
        schema.differ(other, draft.gold) for other in draft.same
    )


def _row(schema: Schema, draft: Draft, key: str) -> Row:
    content = (
        f"A SQLite database has these tables:\n\n{schema.text}\n\n{draft.question}\n\n"
        "Answer with one SQL query in a ```sql block. Return the columns that are asked for, in that order, and no "
        "others."
    )
    prompt = [{"role": "user", "content": content}]
    return {"prompt": prompt, "key": key, "db": list(schema.files), "answer": draft.gold}


def _schema(number: int, seed: int, copies: int) -> Schema:
    """The schema of that number, with its databases in memory."""
    draw = random.Random(f"schema {seed} {number}")
    parent, child = SUBJECTS[number % len(SUBJECTS)]
    parent = _some(parent, draw, categories=1, numbers=draw.randint(1, 2))
    child = _some(child, draw, categories=draw.randint(1, 2), numbers=draw.randint(2, 4))
    nullable = draw.choice(list(child.numbers))
    link = f"{parent.one}_id"
    columns = [*(f"{name} TEXT NOT NULL" for name in child.categories)]
    columns += [f"{name} INTEGER{'' if name == nullable else ' NOT NULL'}" for name in child.numbers]
    columns.append(f"{link} INTEGER NOT NULL REFERENCES {parent.plural} (id)")
    draw.shuffle(columns)
    above = [*(f"{name} TEXT NOT NULL" for name in parent.categories)]
    above += [f"{name} INTEGER NOT NULL" for name in parent.numbers]
    head = ["id INTEGER PRIMARY KEY", "name TEXT NOT NULL UNIQUE"]
    text = "\n".join(
        f"CREATE TABLE {table.plural} (\n    " + ",\n    ".join([*head, *body]) + "\n);"
        for table, body in ((parent, above), (child, columns))
    )
    schema = Schema(parent, child, nullable, [], text)
    for copy in range(copies):
        order = [column.partition(" ")[0] for column in columns]
        script = f"{text}\n{_data(schema, order, random.Random(f'data {seed} {number} {copy}'))}"
        digest = hashlib.sha256(script.encode()).hexdigest()[:16]
        schema.scripts.append(script)
        schema.files.append(f"{child.plural}-{digest}.sqlite")
        database = sqlite3.connect(":memory:")
        database.executescript(script)
        schema.databases.append(database)
    return schema


def _some(table: Table, draw: random.Random, *, categories: int, numbers: int) -> Table:
    """The table with so many of its columns."""
    kept = sorted(draw.sample(sorted(table.categories), categories))
    counted = sorted(draw.sample(sorted(table.numbers), numbers))
    return Table(
        table.plural, table.one, {n: table.categories[n] for n in kept}, {n: table.numbers[n] for n in counted}
    )


def _data(schema: Schema, order: Sequence[str], draw: random.Random) -> str:
    """INSERT statements: about 8 rows that are referred to, not all of them, and about 35 that refer to them."""
    names = draw.sample([f"{first} {second}" for first in FIRST for second in SECOND], 60)
    parents, children = draw.randint(7, 10), draw.randint(28, 42)
    above = _values(schema.parent, parents, draw)
    below = _values(schema.child, children, draw)
    gaps = set(draw.sample(range(children), max(2, children // 6)))
    below[schema.nullable] = [None if i in gaps else value for i, value in enumerate(below[schema.nullable])]
    referred = draw.sample(range(1, parents + 1), parents - draw.randint(1, 2))
    weights = [draw.randint(1, 6) for _ in referred]
    below[schema.link] = draw.choices(referred, weights, k=children)
    statements = []
    columns: Sequence[str]
    for table, values, columns, offset in (
        (schema.parent, above, [*schema.parent.categories, *schema.parent.numbers], 0),
        (schema.child, below, order, parents),
    ):
        count = len(next(iter(values.values())))
        rows = [[i + 1, names[offset + i], *(values[column][i] for column in columns)] for i in range(count)]
        listed = ",\n".join(f"({', '.join(_literal(value) for value in row)})" for row in rows)
        statements.append(f"INSERT INTO {table.plural} VALUES\n{listed};")
    return "\n".join(statements)


def _values(table: Table, count: int, draw: random.Random) -> dict[str, list[Any]]:
    """A value for every row and column; no number twice where there are enough of them."""
    values: dict[str, list[Any]] = {
        name: draw.choices(list(known), k=count) for name, known in table.categories.items()
    }
    for name, (_, low, high) in table.numbers.items():
        known = range(low, high + 1)
        values[name] = draw.sample(known, count) if len(known) >= count else draw.choices(known, k=count)
    return values


def _literal(value: Any) -> str:
    return "NULL" if value is None else f"'{value}'" if isinstance(value, str) else str(value)


# ------------------------------------------------------------------ templates

# Their names, and the columns of their drafts, are what splits go by.


def count_above(schema: Schema, draw: random.Random) -> Draft:
    """How many are above a number."""
    table, column = schema.child, _number(schema.child, draw)
    value = _value(schema, column, draw)
    sign, word, other = draw.choice([(">", "above", "<"), ("<", "below", ">")])
    base = f"SELECT count(*) FROM {table.plural}"
    return Draft(
        (column,),
        f"How many {table.plural} have a {table.numbers[column][0]} {word} {value}?",
        f"{base} WHERE {column} {sign} {value}",
        (base, f"{base} WHERE {column} {sign}= {value}", f"{base} WHERE {column} {other} {value}"),
    )


def list_of_category(schema: Schema, draw: random.Random) -> Draft:
    """Names of one category."""
    table, (column, value) = schema.child, _category(schema.child, draw)
    base = f"SELECT name FROM {table.plural}"
    return Draft(
        (column,),
        f"List the name of every {table.one} whose {column} is '{value}'.",
        f"{base} WHERE {column} = '{value}'",
        (base, f"{base} WHERE {column} <> '{value}'"),
    )


def list_both(schema: Schema, draw: random.Random) -> Draft:
    """Names that fulfil two conditions, or one of them."""
    table, (category, name) = schema.child, _category(schema.child, draw)
    number = _number(table, draw)
    value = _value(schema, number, draw)
    word, other = draw.choice([("AND", "OR"), ("OR", "AND")])
    base = f"SELECT name FROM {table.plural} WHERE"
    first, second = f"{category} = '{name}'", f"{number} > {value}"
    return Draft(
        (category, number, word),
        f"List the name of every {table.one} whose {category} is '{name}' {word.lower()} whose "
        f"{table.numbers[number][0]} is above {value}{' (or both)' if word == 'OR' else ''}.",
        f"{base} {first} {word} {second}",
        (
            f"{base} {first} {other} {second}",
            f"{base} {first}",
            f"{base} {second}",
            f"{base} {first} {word} {number} >= {value}",
        ),
    )


def aggregate(schema: Schema, draw: random.Random) -> Draft:
    """An aggregate over one category."""
    table, (category, name) = schema.child, _category(schema.child, draw)
    number = _number(table, draw)
    words = {"avg": "average", "max": "highest", "min": "lowest", "sum": "total"}
    function, other = draw.sample(sorted(words), 2)
    where = f"FROM {table.plural} WHERE {category} = '{name}'"
    return Draft(
        (function, category, number),
        f"What is the {words[function]} {table.numbers[number][0]} of the {table.plural} whose {category} is '{name}'?",
        f"SELECT {function}({number}) {where}",
        (f"SELECT {function}({number}) FROM {table.plural}", f"SELECT {other}({number}) {where}"),
    )


def join_list(schema: Schema, draw: random.Random) -> Draft:
    """Names by a category on the other side."""
    table, parent = schema.child, schema.parent
    column, value = _category(parent, draw)
    base = f"SELECT c.name FROM {schema.joined}"
    return Draft(
        (column,),
        f"List the name of every {table.one} whose {parent.one} has the {column} '{value}'.",
        f"{base} WHERE p.{column} = '{value}'",
        (base, f"SELECT name FROM {parent.plural} WHERE {column} = '{value}'"),
    )


def join_count(schema: Schema, draw: random.Random) -> Draft:
    """How many by a number on the other side."""
    table, parent = schema.child, schema.parent
    column = draw.choice(sorted(parent.numbers))
    value = draw.choice(sorted(row[0] for row in schema.result(f"SELECT {column} FROM {parent.plural}")))
    base = f"SELECT count(*) FROM {schema.joined}"
    return Draft(
        (column,),
        f"How many {table.plural} have {_a(parent.one)} whose {parent.numbers[column][0]} is below {value}?",
        f"{base} WHERE p.{column} < {value}",
        (
            base,
            f"{base} WHERE p.{column} <= {value}",
            f"SELECT count(*) FROM {parent.plural} WHERE {column} < {value}",
        ),
    )


def join_total(schema: Schema, draw: random.Random) -> Draft:
    """A total under a condition on each side."""
    table, parent = schema.child, schema.parent
    (ours, name), (theirs, value) = _category(table, draw), _category(parent, draw)
    number = _number(table, draw)
    base = f"SELECT sum(c.{number}) FROM {schema.joined}"
    first, second = f"c.{ours} = '{name}'", f"p.{theirs} = '{value}'"
    return Draft(
        (ours, theirs, number),
        f"What is the total {table.numbers[number][0]} of the {table.plural} whose {ours} is '{name}' and whose "
        f"{parent.one} has the {theirs} '{value}'?",
        f"{base} WHERE {first} AND {second}",
        (f"{base} WHERE {first}", f"{base} WHERE {second}", base),
    )


def group_count(schema: Schema, draw: random.Random) -> Draft:
    """A count for each category, of those above a number."""
    table, (category, _) = schema.child, _category(schema.child, draw)
    number = _number(table, draw)
    value = _value(schema, number, draw)
    base = f"SELECT {category}, count(*) FROM {table.plural}"
    return Draft(
        (category, number),
        f"For each {category} among the {table.plural} with a {table.numbers[number][0]} above {value}, give the "
        f"{category} and the number of such {table.plural}.",
        f"{base} WHERE {number} > {value} GROUP BY {category}",
        (f"{base} GROUP BY {category}", f"{base} WHERE {number} >= {value} GROUP BY {category}"),
    )


def group_join(schema: Schema, draw: random.Random) -> Draft:
    """An aggregate for each on the other side that has any."""
    table, parent = schema.child, schema.parent
    number = draw.choice([name for name in sorted(table.numbers) if name != schema.nullable])
    words = {"avg": "average", "max": "highest", "min": "lowest", "sum": "total"}
    function, other = draw.sample(sorted(words), 2)
    after = f"FROM {schema.joined} GROUP BY p.id, p.name"
    return Draft(
        (function, number),
        f"For every {parent.one} with at least one {table.one}, give the name of the {parent.one} and the "
        f"{words[function]} {table.numbers[number][0]} of that {parent.one}'s {table.plural}.",
        f"SELECT p.name, {function}(c.{number}) {after}",
        (f"SELECT p.name, {other}(c.{number}) {after}",),
    )


def having(schema: Schema, draw: random.Random) -> Draft:
    """The parents with more than so many children."""
    table, parent = schema.child, schema.parent
    counts = schema.result(f"SELECT count(*) FROM {table.plural} GROUP BY {schema.link}")
    least = draw.choice(sorted({row[0] for row in counts}))
    base = f"SELECT p.name FROM {schema.joined} GROUP BY p.id, p.name"
    return Draft(
        (),
        f"Which {parent.plural} have more than {least} {table.plural}? Give their names.",
        f"{base} HAVING count(*) > {least}",
        (base, f"{base} HAVING count(*) >= {least}"),
    )


def first_few(schema: Schema, draw: random.Random) -> Draft | None:
    """The first few in an order."""
    table = schema.child
    column = _unique(schema, draw)
    if column is None:
        return None
    count = draw.randint(1, 5)
    word, order, other = draw.choice([("highest", "DESC", "ASC"), ("lowest", "ASC", "DESC")])
    base = f"SELECT name, {column} FROM {table.plural} ORDER BY {column}"
    many = f"{count} {table.plural}" if count > 1 else table.one
    return Draft(
        (column, word),
        f"Give the name and the {table.numbers[column][0]} of the {many} with the {word} {table.numbers[column][0]}.",
        f"{base} {order} LIMIT {count}",
        (f"{base} {other} LIMIT {count}", f"{base} {order} LIMIT {count + 1}"),
    )


def above_average(schema: Schema, draw: random.Random) -> Draft:
    """Those above the average of all, or of their category."""
    table, (category, name) = schema.child, _category(schema.child, draw)
    number = _number(table, draw)
    base = f"SELECT name FROM {table.plural} WHERE {number} >"
    some = f"{category} = '{name}'"
    everything = f"{base} (SELECT avg({number}) FROM {table.plural})"
    return Draft(
        (category, number),
        f"Which {table.plural} have a {table.numbers[number][0]} above the average of the {table.plural} whose "
        f"{category} is '{name}'? Give their names, whatever their own {category} is.",
        f"{base} (SELECT avg({number}) FROM {table.plural} WHERE {some})",
        (everything, f"{base} (SELECT avg({number}) FROM {table.plural} WHERE {some}) AND {some}"),
    )


def without(schema: Schema, draw: random.Random) -> Draft:
    """What has nothing of a category on the other side."""
    table, parent = schema.child, schema.parent
    category, name = _category(table, draw)
    base = f"SELECT name FROM {parent.plural} WHERE id"
    inner = f"(SELECT {schema.link} FROM {table.plural} WHERE {category} = '{name}')"
    return Draft(
        (category,),
        f"Which {parent.plural} have no {table.one} whose {category} is '{name}'? Give their names.",
        f"{base} NOT IN {inner}",
        (f"{base} IN {inner}", f"{base} NOT IN (SELECT {schema.link} FROM {table.plural})"),
    )


def distinct(schema: Schema, draw: random.Random) -> Draft:
    """Values that occur, each once."""
    table, parent = schema.child, schema.parent
    number = _number(table, draw)
    value = _value(schema, number, draw)
    base = f"p.name FROM {schema.joined}"
    return Draft(
        (number,),
        f"List the name of every {parent.one} with at least one {table.one} whose {table.numbers[number][0]} is above "
        f"{value}, each once.",
        f"SELECT DISTINCT {base} WHERE c.{number} > {value}",
        (
            f"SELECT {base} WHERE c.{number} > {value}",
            f"SELECT DISTINCT {base}",
            f"SELECT DISTINCT {base} WHERE c.{number} >= {value}",
        ),
    )


def unrecorded(schema: Schema, draw: random.Random) -> Draft:
    """Values that are not recorded."""
    table, column = schema.child, schema.nullable
    category, name = _category(table, draw)
    base = f"FROM {table.plural} WHERE {column} IS NULL"
    return Draft(
        (column, category),
        f"List the name of every {table.one} whose {table.numbers[column][0]} is not recorded and whose {category} is "
        f"not '{name}'.",
        f"SELECT name {base} AND {category} <> '{name}'",
        (f"SELECT name {base}", f"SELECT name {base} AND {category} = '{name}'"),
    )


def most(schema: Schema, draw: random.Random) -> Draft:
    """Which has most on the other side, where only one does."""
    table, parent = schema.child, schema.parent
    category, name = _category(table, draw)
    where = f"WHERE c.{category} = '{name}'"
    base = f"SELECT p.name FROM {schema.joined}"
    order = "GROUP BY p.id, p.name ORDER BY count(*) DESC LIMIT 1"
    counts = f"SELECT count(*) AS n FROM {table.plural} WHERE {category} = '{name}' GROUP BY {schema.link}"
    return Draft(
        (category,),
        f"Which {parent.one} has the most {table.plural} whose {category} is '{name}'? Give its name.",
        f"{base} {where} {order}",
        (f"{base} {order}", f"{base} {where} {order.replace('DESC', 'ASC')}"),
        (f"{base} {where} GROUP BY p.id, p.name HAVING count(*) = (SELECT max(n) FROM ({counts}))",),
    )


TEMPLATES: Sequence[Callable[[Schema, random.Random], Draft | None]] = (
    count_above, list_of_category, list_both, aggregate, join_list, join_count, join_total, group_count, group_join,
    having, first_few, above_average, without, distinct, unrecorded, most,
)  # fmt: skip


def _number(table: Table, draw: random.Random) -> str:
    return draw.choice(sorted(table.numbers))


def _category(table: Table, draw: random.Random) -> tuple[str, str]:
    """A column and one of its values."""
    column = draw.choice(sorted(table.categories))
    return column, draw.choice(table.categories[column])


def _value(schema: Schema, column: str, draw: random.Random) -> int:
    """A value of the middle half of a column, as it occurs in the first copy: there `>` and `>=` differ."""
    query = f"SELECT {column} FROM {schema.child.plural} WHERE {column} IS NOT NULL"
    values = sorted(row[0] for row in schema.result(query))
    return int(draw.choice(values[len(values) // 4 : -(len(values) // 4)]))


def _unique(schema: Schema, draw: random.Random) -> str | None:
    """A number that is recorded for all, and for no two the same."""
    found = []
    for column in sorted(schema.child.numbers):
        query = f"SELECT {column} FROM {schema.child.plural}"
        values = [schema.result(query, copy) for copy in range(len(schema.databases))]
        if column != schema.nullable and all(len(set(each)) == len(each) for each in values):
            found.append(column)
    return draw.choice(found) if found else None


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
