"""Writing that never leaves half a file, and work that is cut into parts and can be resumed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden file beside `path` that takes its place when the block ends, and is gone when it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what processes that were killed while writing left in `folder`; nobody may be writing there."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a file so that readers see the old content or the new one, never a part of it."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file whole or not at all."""
    import pyarrow.parquet as pq  # slow to import, and text needs none of it

    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def first_difference(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> str | None:
    """The first key on which two nested mappings disagree, with both values: `'a.b' is 1 there and 2 here`.

    None if they are equal, where a key that is missing counts as None.
    """
    for key in sorted({*found, *wanted}):
        ours, theirs = found.get(key), wanted.get(key)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            inner = first_difference(ours, theirs, f"{prefix}{key}.")
            if inner is not None:
                return inner
        elif ours != theirs:
            return f"'{prefix}{key}' is {ours!r} there and {theirs!r} here"
    return None


class Parts:
    """Numbered Parquet parts of a long job, in a folder that remembers which job it belongs to.

    A part exists whole or not at all, so a killed job continues with the parts that are missing, and several
    processes may write different parts.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        marker = folder / "identity.json"
        if marker.is_file():
            difference = first_difference(json.loads(marker.read_text(encoding="utf-8")), identity)
            if difference is not None:
                raise UserError(
                    f"{folder.parent} holds the beginnings of another run ({difference}): delete the folder or choose "
                    "another one."
                )
        else:
            write_json(marker, identity)

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.parquet"

    def done(self, index: int) -> bool:
        """Whether a part is finished."""
        return self._path(index).is_file()

    def write(self, index: int, table: pa.Table) -> None:
        """Finish a part."""
        write_table(self._path(index), table)

    def read(self, count: int) -> pa.Table:
        """All parts 0 … count − 1, in order.

        Raises:
            FileNotFoundError: one is missing.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        return pa.concat_tables([pq.read_table(self._path(index)) for index in range(count)])

    def remove(self) -> None:
        """Delete the folder, once its content lives elsewhere."""
        shutil.rmtree(self.folder)
