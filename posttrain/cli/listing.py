"""`posttrain methods`, `rewards`, `tasks` and `recipes`: what there is, read from the sources and never imported."""

from __future__ import annotations

import ast
import copy
import importlib.util
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

import posttrain
from posttrain import recipe as recipes
from posttrain import registry
from posttrain.cli.console import print_yaml


def listing(kind: str) -> typer.Typer:
    """The commands `posttrain <kind>s` and `posttrain <kind>s show NAME` of one registry."""
    app = typer.Typer(invoke_without_command=True)

    @app.callback()
    def _list(context: typer.Context) -> None:
        if context.invoked_subcommand is None:
            _print_columns({name: entry.summary for name, entry in registry.entries(kind).items()})

    @app.command("show", help=f"Explain one {kind} and the settings that it takes.")
    def _show(name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)]) -> None:
        entry = registry.entry(kind, name)
        typer.echo(entry.doc)
        for settings in settings_of(entry):
            typer.echo(f"\n{typer.style(settings.title, bold=True)}")
            for field in settings.fields:
                typer.echo(f"\n  {typer.style(field.name, fg='cyan')}: {field.type}{field.default}")
                if field.help:
                    typer.echo(textwrap.fill(field.help, _width(), initial_indent="      ", subsequent_indent="      "))

    return app


def recipe_listing() -> typer.Typer:
    """The commands `posttrain recipes` and `posttrain recipes show NAME`."""
    app = typer.Typer(invoke_without_command=True)

    @app.callback()
    def _list(context: typer.Context) -> None:
        if context.invoked_subcommand is None:
            _print_columns({name: _recipe_summary(path) for name, path in recipes.names().items()})

    @app.command("show", help="Print a recipe as it was written (posttrain check adds the defaults).")
    def _show(name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)]) -> None:
        print_yaml(recipes.find(name).read_text(encoding="utf-8"))

    return app


@dataclass(frozen=True)
class Setting:
    """One field of a config or options class, as the source writes it; `default` includes its ` = `.

    A name that a module of this package gives to a type or a value is replaced by what it stands for.
    """

    name: str
    type: str
    default: str
    help: str


@dataclass(frozen=True)
class Settings:
    """The fields that one class of a module adds or changes."""

    title: str
    fields: list[Setting]


def settings_of(entry: registry.Entry) -> Iterator[Settings]:
    """The config class of a method, what its own body says; or all options of a reward or task."""
    path = entry.path
    if path is None:
        spec = importlib.util.find_spec(entry.module)
        path = Path(spec.origin) if spec is not None and spec.origin else None
    if path is None:
        return
    module = ast.parse(path.read_text(encoding="utf-8"))
    named = _named(module)
    for node in module.body:
        if isinstance(node, ast.ClassDef) and entry.kind == "method" and node.name.endswith("Config"):
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            yield Settings(f"{node.name} adds or changes, over {bases}:", list(_fields(node, named)))
        elif isinstance(node, ast.ClassDef) and entry.kind != "method" and node.name == "Options":
            found = {field.name: field for field in _with_bases(node, module)}
            yield Settings("Options:", list(found.values()))
            for part in module.body:
                if isinstance(part, ast.ClassDef) and any(field.type == part.name for field in found.values()):
                    yield Settings(f"{part.name}:", list(_fields(part, named)))


def _with_bases(owner: ast.ClassDef, module: ast.Module) -> Iterator[Setting]:
    """The fields of a class of this package behind those of its bases' bodies; one that is changed has its new form."""
    for base in owner.bases:
        name = ast.unparse(base)
        there, where = module, _defined(name, module)
        if where is None:
            there = _imported(name, module)
            where = _defined(name, there)
        if where is not None:
            yield from _with_bases(where, there)
    yield from _fields(owner, _named(module))


def _defined(name: str, module: ast.Module) -> ast.ClassDef | None:
    return next((node for node in module.body if isinstance(node, ast.ClassDef) and node.name == name), None)


def _imported(name: str, module: ast.Module) -> ast.Module:
    """The module of this package from which another imports a name; an empty one where it does not."""
    for node in module.body:
        if isinstance(node, ast.ImportFrom) and name in (alias.asname or alias.name for alias in node.names):
            source = _source(node.module or "")
            if (node.module or "").partition(".")[0] == "posttrain" and source is not None:
                return ast.parse(source.read_text(encoding="utf-8"))
    return ast.Module([], [])


def _named(module: ast.Module) -> dict[str, ast.expr]:
    """What names at the top of a module stand for, those imported by name from this package included.

    Only types that are not classes (`Annotated[...]`, `Literal[...]`, unions) and values that are written out: a class
    is best called by its name.
    """
    found: dict[str, ast.expr] = {}
    for node in module.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "posttrain":
            source = _source(node.module or "")
            there = {} if source is None else _assigned(ast.parse(source.read_text(encoding="utf-8")))
            found |= {alias.asname or alias.name: there[alias.name] for alias in node.names if alias.name in there}
    return found | _assigned(module)


def _assigned(module: ast.Module) -> dict[str, ast.expr]:
    found: dict[str, ast.expr] = {}
    for node in module.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if isinstance(target, ast.Name) and isinstance(value, ast.Subscript | ast.BinOp | ast.Constant | ast.UnaryOp):
            found[target.id] = value
    return found


def _source(module: str) -> Path | None:
    """The file of a module of this package, found without importing anything."""
    stem = Path(posttrain.__file__).parent.joinpath(*module.split(".")[1:])
    return next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()), None)


def _written_out(node: ast.expr, named: Mapping[str, ast.expr]) -> str:
    """The source of a type or a value, with what its names stand for."""

    class Replace(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return named.get(node.id, node)

    return ast.unparse(Replace().visit(copy.deepcopy(node)))


def _fields(owner: ast.ClassDef, named: Mapping[str, ast.expr]) -> Iterator[Setting]:
    for node, following in zip(owner.body, [*owner.body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        kind = _written_out(node.annotation, named)
        if node.target.id.startswith("_") or kind.startswith("ClassVar"):
            continue
        text = _constant(following.value) if isinstance(following, ast.Expr) else ""
        default = node.value
        if isinstance(default, ast.Call) and ast.unparse(default.func) in {"field", "Field", "dataclasses.field"}:
            given = {keyword.arg: keyword.value for keyword in default.keywords}
            text = text or _help(given.get("metadata"))
            made = given.get("default_factory")
            default = given.get("default", _made(made) if made else default.args[0] if default.args else None)
        yield Setting(node.target.id, kind, f" = {_written_out(default, named)}" if default is not None else "", text)


def _made(factory: ast.expr) -> ast.expr:
    """What a factory of defaults makes, as a user would write it."""
    match factory:
        case ast.Name(id="list"):
            return ast.List([])
        case ast.Name(id="dict"):
            return ast.Dict([], [])
        case ast.Lambda(body=body):
            return body
    return ast.Call(factory, [], [])


def _help(metadata: ast.expr | None) -> str:
    if isinstance(metadata, ast.Dict):
        for key, value in zip(metadata.keys, metadata.values, strict=True):
            if key is not None and _constant(key) == "help":
                return _constant(value)
    return ""


def _constant(node: ast.expr) -> str:
    """The text of a string literal on one line; empty for anything else."""
    return " ".join(node.value.split()) if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _recipe_summary(path: Path) -> str:
    """The second line of a recipe; its first is the command that runs it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[1].removeprefix("#").strip() if len(lines) > 1 and lines[1].startswith("#") else ""


def _print_columns(rows: Mapping[str, str]) -> None:
    width = max((len(name) for name in rows), default=0)
    for name, summary in rows.items():
        typer.echo(f"{typer.style(name.ljust(width), fg='cyan')}  {summary}".rstrip())


def _width() -> int:
    return min(shutil.get_terminal_size().columns, 120)
