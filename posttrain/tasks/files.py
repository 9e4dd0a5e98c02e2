"""Prompts from JSONL or Parquet files, with a map from columns to row fields.

Bad rows are reported with file and line (JSONL) or row (Parquet), both counted from 1. A column that is mapped to the
field `images` holds paths, relative to the file's folder and never out of it, or in Parquet images themselves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import model_validator

from posttrain.errors import UserError
from posttrain.tasks import Split
from posttrain.tasks._images import with_files
from posttrain.tasks._rows import Record, RowOptions, RowTask


class Options(RowOptions):
    """Options of the task `files`."""

    train: str
    """A file that ends in .jsonl or .parquet."""
    eval: str | None = None
    """Another one for evaluation; by default, `eval_share` of the rows of `train` is held out."""

    @model_validator(mode="after")
    def _one_source_of_evaluation(self) -> Options:
        if self.eval is not None and "eval_share" in self.model_fields_set:
            raise ValueError("eval_share has no effect beside a file for evaluation: remove one of them")
        return self


class Task(RowTask):
    """Rows of one or two files.

    Raises:
        UserError: a file does not exist or is of another kind; and what `RowTask` raises.
    """

    name = "files"
    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._paths: list[tuple[Split | None, Path]] = [(None, Path(options.train))]
        if options.eval is not None:
            self._paths = [("eval", Path(options.eval)), ("train", Path(options.train))]
        for _, path in self._paths:
            if path.suffix not in (".jsonl", ".parquet"):
                raise UserError(f"The task 'files' reads .jsonl and .parquet, not '{path}': convert the file.")
            if not path.is_file():
                raise UserError(f"The task 'files' finds no file '{path}': correct the path.")

    def records(self) -> Iterator[tuple[Split | None, str, Record]]:
        """The records of the file for evaluation, if there is one, and then those of the file for training."""
        for split, path in self._paths:
            for place, record in read_jsonl(path) if path.suffix == ".jsonl" else read_parquet(path):
                yield split, place, self._with_images(record, path.parent)

    def _with_images(self, record: Record, folder: Path) -> Record:
        """The record with image files instead of their paths, or why there is none."""
        columns = {column for column, field in self.options.fields.items() if field == "images"}
        if isinstance(record, ValueError) or not columns & record.keys():
            return record
        try:
            return {name: with_files(value, folder) if name in columns else value for name, value in record.items()}
        except ValueError as error:
            return error


def read_jsonl(path: Path) -> Iterator[tuple[str, Record]]:
    """Lines that are not blank, each a JSON object."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}, line {number}", _parse_line(line)


def _parse_line(line: bytes) -> Record:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        return ValueError(f"not valid JSON ({error})")
    except RecursionError:
        return ValueError("not valid JSON (nested too deeply)")
    return record if isinstance(record, dict) else ValueError(f"a {type(record).__name__}, not a JSON object")


def read_parquet(path: Path) -> Iterator[tuple[str, Record]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", record
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} cannot be read as Parquet ({error}): check the file.") from None
