"""Ready-made preference data in TRL's formats, from the Hugging Face hub, a folder, or a JSONL or Parquet file.

    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}                          text
    {"prompt": [user], "chosen": [assistant], "rejected": [assistant]}                           messages
    {"chosen": "The sky is blue.", "rejected": "The sky is green."}                              prompt implied, as text
    {"chosen": [user, assistant], "rejected": [user, assistant]}                                 … and as messages

An implied prompt is what both answers begin with, exactly as TRL's `extract_prompt` cuts it: messages whole; text by
characters, a final space left to the answers, and so is the last character where one answer continues the other. A
prompt given as text beside answers given as messages is implied too. Other columns are left out, but data that need
them (images, tools) are refused.

Nothing decides what is correct here, so the task names no verifier. Rows are told apart by prompt and answers; one
prompt may have many rows, and all of them are in one split.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from posttrain.errors import UserError, did_you_mean
from posttrain.tasks import BaseTask, Row, Split, TaskOptions, split_of
from posttrain.tasks._rows import Record, digest
from posttrain.tasks.files import read_jsonl, read_parquet
from posttrain.tasks.hub import load_split

_FILES = (".jsonl", ".parquet")

_BEYOND = ("images", "image", "tools", "chat_template_kwargs")
"""Columns of TRL's formats that change what a model sees, and that a row of text cannot hold."""

Messages = list[dict[str, str]]


class Options(TaskOptions):
    """Options of the task `preferences`."""

    name: str
    """Name on the hub, such as `trl-lib/ultrafeedback_binarized`, a folder, or a file that ends in .jsonl or
    .parquet."""
    config: str | None = None
    """Configuration (subset) of the data set."""
    train_split: str = "train"
    eval_split: str | None = None
    """By default, `eval_share` of the prompts of `train_split` is held out."""
    revision: str | None = None
    """Branch, tag or commit; a commit makes the run repeatable."""
    eval_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the prompts that is held out with all their rows, by the hash of the prompt."""
    on_bad_row: Literal["raise", "skip"] = "raise"
    """Stop at a bad row (no chosen or rejected answer, both equal, messages that do not alternate), or leave it out and
    warn with their number."""

    @model_validator(mode="after")
    def _no_option_without_effect(self) -> Options:
        if self.eval_split is not None and "eval_share" in self.model_fields_set:
            raise ValueError("eval_share has no effect beside a split for evaluation: remove one of them")
        if Path(self.name).suffix in _FILES:
            for option in ("config", "train_split", "eval_split", "revision"):
                if option in self.model_fields_set:
                    raise ValueError(f"{option} has no effect on a single file: remove it, or name the file's folder")
        return self


class Task(BaseTask):
    """Preference pairs, as they are.

    Raises:
        UserError: the file does not exist.
    """

    name = "preferences"
    pairs = True

    def __init__(self, options: Options) -> None:
        self.options = options
        path = Path(options.name)
        self._file = path if path.suffix in _FILES else None
        if self._file is not None and not self._file.is_file():
            raise UserError(f"The task 'preferences' finds no file '{path}': correct the path.")

    @property
    def verifier(self) -> None:
        """None: nothing decides what is correct."""
        return None

    def rows(self, split: Split) -> list[Row]:
        """The good rows of a split, in the order of the data: prompt, chosen, rejected and key.

        Raises:
            UserError: the data cannot be loaded, a row is bad (and `on_bad_row` is `raise`), or a split has no rows.
        """
        return list(self._splits[split])

    def _records(self) -> Iterator[tuple[Split | None, str, Record]]:
        """Every record with its split (`None`: by the hash of its prompt) and its place; evaluation first."""
        options = self.options
        if self._file is not None:
            for place, record in (read_jsonl if self._file.suffix == ".jsonl" else read_parquet)(self._file):
                yield None, place, record
            return
        splits: list[tuple[Split | None, str]] = [(None, options.train_split)]
        if options.eval_split is not None:
            splits = [("eval", options.eval_split), ("train", options.train_split)]
        for split, source in splits:
            for number, record in enumerate(
                load_split(options.name, options.config, source, options.revision), start=1
            ):
                yield split, f"{options.name} [{source}], row {number}", record

    @cached_property
    def _splits(self) -> dict[Split, list[Row]]:
        splits: dict[Split, list[Row]] = {"train": [], "eval": []}
        keys: set[str] = set()
        held_out: set[str] = set()
        repeated = leaked = 0
        skipped: list[str] = []
        form: str | None = None
        for given, place, record in self._records():
            try:
                row = _row(record)
                found = "text" if isinstance(row["prompt"], str) else "messages"
                if form not in (None, found):
                    raise ValueError(f"the row is made of {found}, the rows before of {form}")
            except ValueError as error:
                message = f"{place}: {error}"
                if self.options.on_bad_row == "raise":
                    raise UserError(f"{message}; correct the row or set on_bad_row to skip.") from None
                skipped.append(message)
                continue
            form = found
            prompt = digest([{"role": "user", "content": row["prompt"]}] if form == "text" else row["prompt"])
            split = given or split_of(prompt, self.options.eval_share)
            if row["key"] in keys:
                repeated += 1
            elif given == "train" and prompt in held_out:
                leaked += 1
            else:
                keys.add(row["key"])
                splits[split].append(row)
                if split == "eval":
                    held_out.add(prompt)
        bad = f"bad rows skipped: {len(skipped)}" + (f", the first at {skipped[0]}" if skipped else "")
        if not splits["train"]:
            raise UserError(f"The task 'preferences' has no training rows ({bad}): check the data.")
        if not splits["eval"] and (self.options.eval_split is not None or self.options.eval_share):
            raise UserError(
                f"The task 'preferences' has no evaluation rows beside {len(splits['train'])} training rows ({bad}): "
                "check the data for evaluation or raise eval_share."
            )
        for count, what in (
            (len(skipped), bad),
            (repeated, f"rows dropped because an equal one had occurred before: {repeated}"),
            (leaked, f"training rows dropped because their prompt is held out for evaluation: {leaked}"),
        ):
            if count:
                warnings.warn(f"The task 'preferences': {what}.", stacklevel=3)
        return splits


def _row(record: Record) -> Row:
    """The row of a record.

    Raises:
        ValueError: the record is bad, and why.
    """
    if isinstance(record, ValueError):
        raise record
    for column in ("chosen", "rejected"):
        if column not in record:
            raise ValueError(f"there is no column '{column}'{did_you_mean(column, record)}".rstrip("?"))
    beyond = next((column for column in _BEYOND if record.get(column)), None)
    if beyond is not None:
        raise ValueError(f"it has {beyond}, which this task cannot carry")
    chosen, rejected = (_content(record, column) for column in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("one of chosen and rejected is text, the other a list of messages")
    if chosen == rejected:
        raise ValueError("chosen and rejected are equal")
    prompt = _content(record, "prompt") if record.get("prompt") is not None else None
    if isinstance(prompt, list) and isinstance(chosen, str):
        raise ValueError("the prompt is a list of messages, the answers are text")
    if prompt is None or isinstance(prompt, str) != isinstance(chosen, str):
        length = _implied(chosen, rejected)
        prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
    if not (prompt.strip() if isinstance(prompt, str) else prompt):
        raise ValueError("there is no prompt: the column is empty, or chosen and rejected begin differently")
    if isinstance(prompt, list):
        for name, answer in (("chosen", chosen), ("rejected", rejected)):
            _require_turns(name, prompt, answer)  # type: ignore[arg-type]
    row: Row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    digest = hashlib.sha256(json.dumps(row, sort_keys=True, ensure_ascii=False).encode("utf-8"))
    return {**row, "key": digest.hexdigest()[:16]}  # a lone surrogate has been a ValueError


def _content(record: Mapping[str, Any], column: str) -> str | Messages:
    """Text, or messages with a role and a text."""
    value = record[column]
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(f"{column} is {value!r:.80}, neither text nor a list of messages")
    messages = []
    for message in value:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (0, 0)
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f"{column} holds {message!r:.80}, which is no message with a role and a text")
        messages.append({"role": role, "content": content})
    return messages


def _implied(chosen: str | Messages, rejected: str | Messages) -> int:
    """How many characters or messages of both answers are their prompt."""
    shorter = min(len(chosen), len(rejected))
    length = next((i for i in range(shorter) if chosen[i] != rejected[i]), None)
    if length is None:
        return max(0, shorter - 1)  # one continues the other; something must be left of both
    return length - 1 if length and chosen[length - 1] == " " else length


def _require_turns(name: str, prompt: Messages, answer: Messages) -> None:
    """Refuse a conversation that TRL would render without complaint and that means something else."""
    roles = [message["role"] for message in answer]
    if not roles or roles[0] != "assistant" or roles[-1] != "assistant":
        raise ValueError(f"{name} does not begin and end with the assistant but reads {', '.join(roles) or 'nothing'}")
    turns = [message["role"] for message in (*prompt, *answer)]
    twice = next((a for a, b in itertools.pairwise(turns) if a == b and a in ("user", "assistant")), None)
    if twice is not None:
        raise ValueError(f"two messages of the role {twice} follow each other in prompt and {name}")
