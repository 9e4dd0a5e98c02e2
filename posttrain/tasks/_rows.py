"""Rows from someone else's data: columns become row fields, and every row is checked when it is loaded.

A row is bad when it cannot be read, lacks a column, has an unusable prompt, or when its gold answer does not score 1.0
with the task's own verifier. Rows are told apart by their key: the field `key` where one is mapped, otherwise a hash of
the prompt's text in NFKC, without regard to case, white space and the option `system`, and of its images.

A column that is mapped to the field `images` holds what `posttrain.tasks._images` reads; an image that cannot be read
makes a row bad, too. The images are shown before the text of the first user message, which may begin with as many marks
`<image>`.
"""

from __future__ import annotations

import hashlib
import string
import unicodedata
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field

from posttrain import rewards
from posttrain.errors import UserError, did_you_mean
from posttrain.tasks import BaseTask, Row, Split, TaskOptions, described, split_of
from posttrain.tasks._images import read_images, without_marks

Record = Mapping[str, Any] | ValueError
"""One record of the source, or why it cannot be read."""


class RowOptions(TaskOptions):
    """Options of every task that reads rows."""

    fields: dict[str, str]
    """Column of the data → field of the row. Must give `prompt` (unless `prompt_template` makes it) and what the
    verifier needs; may give `key` and, for a model that reads them, `images`. Other columns are left out."""
    verifier: str
    """The reward that decides correctness (`posttrain rewards` lists them)."""
    verifier_options: dict[str, Any] = Field(default_factory=dict)
    on_bad_row: Literal["raise", "skip"] = "raise"
    """Stop at a bad row, or leave it out and warn with their number."""
    system: str | None = None
    """System message before every prompt."""
    prompt_template: str | None = None
    """The user message, with row fields in braces: `Reach {target} with {numbers}.`; a literal brace is doubled."""
    eval_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the rows that is held out, by the hash of the key, where the data has no split for evaluation."""


class RowTask(BaseTask):
    """A task over records that a subclass reads.

    Raises:
        UserError: the fields lack something that the prompt or the verifier needs, or the template is malformed.
    """

    def __init__(self, options: RowOptions) -> None:
        self.options = options
        self._verifier = rewards.load(options.verifier, options.verifier_options)
        if not self._verifier.accuracy:
            raise UserError(
                f"The reward '{options.verifier}' shapes and does not decide what is correct: give the task "
                f"'{self.name}' another verifier and add this one to the rewards."
            )
        fields = list(options.fields.values())
        repeated = sorted({field for field in fields if fields.count(field) > 1})
        if repeated:
            raise UserError(f"The task '{self.name}' fills the field '{repeated[0]}' from two columns: keep one.")
        self.images = "images" in fields
        self._template = None if options.prompt_template is None else self._parse(options.prompt_template)
        needed = [*self._verifier.requires, *(["prompt"] if self._template is None else [])]
        for field in needed:
            if field not in fields:
                raise UserError(
                    f"The task '{self.name}' maps no column to the field '{field}', which the "
                    f"{'prompt' if field == 'prompt' else f'reward {options.verifier!r}'} needs: "
                    f"add it to fields (column: {field})."
                )

    @abstractmethod
    def records(self) -> Iterator[tuple[Split | None, str, Record]]:
        """Every record with its split (`None`: by the hash of its key) and its place, for messages.

        A source with its own split for evaluation gives that one first: a key that occurs in both stays there.
        """

    @property
    def verifier(self) -> tuple[str, dict[str, Any]]:
        """What the options name."""
        return self.options.verifier, dict(self.options.verifier_options)

    def rows(self, split: Split) -> list[Row]:
        """The good rows of a split, in the order of the data.

        Raises:
            UserError: a row is bad (and `on_bad_row` is `raise`), or the split has no rows.
        """
        return list(self._splits[split])

    @cached_property
    def _splits(self) -> dict[Split, list[Row]]:
        splits: dict[Split, list[Row]] = {"train": [], "eval": []}
        keys: set[str] = set()
        duplicates = 0
        skipped: list[str] = []
        own_split = False
        for split, place, record in self.records():
            own_split = own_split or split is not None
            try:
                row = self._row(record)
            except ValueError as error:
                message = f"{place}: {error}"
                if self.options.on_bad_row == "raise":
                    raise UserError(f"{message}; correct the row or set on_bad_row to skip.") from None
                skipped.append(message)
                continue
            if row["key"] in keys:
                duplicates += 1
                continue
            keys.add(row["key"])
            splits[split or split_of(row["key"], self.options.eval_share)].append(row)
        bad = f"bad rows skipped: {len(skipped)}" + (f", the first at {skipped[0]}" if skipped else "")
        if not splits["train"]:
            raise UserError(f"The task '{self.name}' has no training rows ({bad}): check the data and the fields.")
        if not splits["eval"] and (own_split or self.options.eval_share):
            raise UserError(
                f"The task '{self.name}' has no evaluation rows beside {len(splits['train'])} training rows ({bad}): "
                "check the data for evaluation or raise eval_share."
            )
        if skipped:
            warnings.warn(f"The task '{self.name}': {bad}.", stacklevel=3)
        if duplicates:
            warnings.warn(
                f"The task '{self.name}': rows dropped because their key had occurred before: {duplicates}.",
                stacklevel=3,
            )
        return splits

    def _row(self, record: Record) -> Row:
        """The row of a record.

        Raises:
            ValueError: the record is bad, and why.
        """
        if isinstance(record, ValueError):
            raise record
        row: Row = {}
        for column, field in self.options.fields.items():
            if column not in record:
                raise ValueError(f"there is no column '{column}'{did_you_mean(column, record)}".rstrip("?"))
            row[field] = record[column]
        for field in self._verifier.requires:
            if row[field] is None:
                raise ValueError(f"the field '{field}' is empty")
        prompt = self._prompt(row)
        if self.images:
            row["images"] = read_images(row["images"])
            prompt = without_marks(prompt, len(row["images"]))
            if row["images"] and all(message["role"] != "user" for message in prompt):
                raise ValueError("the prompt has images, but no user message that could show them")
        key = digest(prompt, row.get("images", [])) if row.get("key") is None else str(row["key"])
        key.encode("utf-8")  # a lone surrogate is a ValueError
        if self.options.system is not None:
            if any(message["role"] == "system" for message in prompt):
                raise ValueError("the prompt has a system message, and the option system gives another")
            prompt = [{"role": "system", "content": self.options.system}, *prompt]
        row.update(prompt=prompt, key=key)
        gold = self._verifier.gold(row)
        verdict = self._verifier.score([gold or ""], [row])[0]
        reason = f"{verdict.status}: {verdict.detail}" if verdict.detail else verdict.status
        if gold is not None and verdict.reward != 1.0:
            raise ValueError(
                f"the gold answer {gold!r:.200} scores {verdict.reward} with the reward '{self.options.verifier}' "
                f"instead of 1.0 ({reason})"
            )
        if verdict.reward is None:
            raise ValueError(f"the reward '{self.options.verifier}' cannot judge the row ({reason})")
        return row

    def _prompt(self, row: Row) -> list[dict[str, str]]:
        prompt = row.get("prompt")
        if self._template is not None:
            if isinstance(prompt, list):
                raise ValueError("the prompt is a list of messages, which prompt_template cannot hold")
            absent = next((field for _, field in self._template if field is not None and row[field] is None), None)
            if absent is not None:
                raise ValueError(f"the field '{absent}' is empty")
            prompt = "".join(text + ("" if field is None else str(row[field])) for text, field in self._template)
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if not isinstance(prompt, list) or not prompt:
            raise ValueError(f"the prompt is {prompt!r:.80}, neither text nor a list of messages")
        messages = []
        for message in prompt:
            role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (0, 0)
            if not isinstance(role, str) or not isinstance(content, str):
                raise ValueError(f"the prompt holds {message!r:.80}, which is no message with a role and a text")
            messages.append({"role": role, "content": content})
        if not messages[-1]["content"].strip():
            raise ValueError("the prompt is empty")
        return messages

    def _parse(self, template: str) -> list[tuple[str, str | None]]:
        """The template as pairs of text and the field that follows it.

        Plain names only: `str.format` itself would also follow attributes and indices.
        """
        known = [field for field in self.options.fields.values() if field != "images"]
        parts: list[tuple[str, str | None]] = []
        try:
            for text, field, conversion_spec, conversion in string.Formatter().parse(template):
                if field is not None and (conversion_spec or conversion or not field.isidentifier()):
                    raise ValueError(f"'{{{field}}}' is no plain field name")
                if field is not None and field not in known:
                    raise ValueError(f"there is no field '{field}'{did_you_mean(field, known)}".rstrip("?"))
                parts.append((text, field))
            if all(field is None for _, field in parts):
                raise ValueError("it holds no field, so all prompts would be the same")
        except ValueError as error:
            raise UserError(
                f"The prompt_template of the task '{self.name}' is wrong: {error}; write a field as {{name}} and a "
                "literal brace twice."
            ) from None
        return parts


def digest(prompt: list[dict[str, str]], images: Sequence[Any] = ()) -> str:
    """A hash (16 hex digits) of the normalised text of a prompt, and of the pixels of its images."""
    text = "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    normalised = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    seen = "".join(f"\n{described(image)}" for image in images)
    return hashlib.sha256(f"{normalised}{seen}".encode()).hexdigest()[:16]
