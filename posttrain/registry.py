"""A folder is a registry: a file's name is the entry's name, and listing a folder imports nothing from it.

Other packages join through entry points of the same group name (`posttrain.trainers`, `posttrain.rewards`,
`posttrain.tasks`). A name that is taken twice is an error, never a silent overwrite.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import pkgutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from posttrain.errors import UserError, did_you_mean

KINDS = {"method": "posttrain.trainers", "reward": "posttrain.rewards", "task": "posttrain.tasks"}


@dataclass(frozen=True)
class Entry:
    """One registered module: its short name, where to import it from, and where its text lies (for listings)."""

    kind: str
    name: str
    module: str
    path: Path | None

    @property
    def doc(self) -> str:
        """The module's docstring, read from the source without importing it; empty when there is none."""
        path = self.path
        if path is None:
            spec = importlib.util.find_spec(self.module)
            path = Path(spec.origin) if spec is not None and spec.origin else None
        if path is None:
            return ""
        return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return self.doc.partition("\n")[0]


@cache
def entries(kind: str) -> dict[str, Entry]:
    """All entries of a kind (`method`, `reward` or `task`), by name, without importing any of them.

    Raises:
        UserError: an installed package registers a name that is taken.
    """
    package = KINDS[kind]
    folder = Path(__file__).parent / package.rpartition(".")[2]
    if not folder.is_dir():
        spec = importlib.util.find_spec(package)
        locations = list(spec.submodule_search_locations or []) if spec is not None else []
        folder = Path(locations[0])
    found = {
        info.name: Entry(kind, info.name, f"{package}.{info.name}", folder / f"{info.name}.py")
        for info in pkgutil.iter_modules([str(folder)])
        if not info.name.startswith("_") and not info.ispkg
    }
    for point in importlib.metadata.entry_points(group=package):
        if point.name in found:
            owner = point.dist.name if point.dist is not None else point.value
            raise UserError(
                f"The package '{owner}' registers the {kind} '{point.name}', which exists already: "
                "rename its entry point."
            )
        found[point.name] = Entry(kind, point.name, point.value.partition(":")[0], None)
    return dict(sorted(found.items()))


def entry(kind: str, name: str) -> Entry:
    """The entry of that name.

    Raises:
        UserError: there is none; the message names the nearest one.
    """
    known = entries(kind)
    if name not in known:
        raise UserError(f"There is no {kind} '{name}'{did_you_mean(name, known)}")
    return known[name]


def load(kind: str, name: str) -> ModuleType:
    """Import the module behind a name.

    Raises:
        UserError: there is no such entry.
    """
    return importlib.import_module(entry(kind, name).module)
