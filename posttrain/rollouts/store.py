"""The store of pre-sampled answers: what the initial policy can do on every training prompt, on disk.

    manifest.json      identity (model, rows, verifier, sampling) and counts; its presence means that all is there
    prompts.parquet    per prompt: id, key, correct answers among k, its set (`explore`, `pef` or `dropped`)
    samples.parquet    per answer: prompt id, text, token ids, reward, status, finish reason
    answers.parquet    per stored answer: prompt id, prompt token ids, answer token ids, log π_ref per token

D_exp is the set `explore`, D_pef is `pef`. The content is a function of the identity: no times, no host names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq

from posttrain.errors import UserError
from posttrain.rollouts.engine import Prompt
from posttrain.rollouts.fingerprint import files_fingerprint
from posttrain.rollouts.replay import StoredAnswer
from posttrain.tasks import described

FORMAT = 1
"""Version of the layout on disk."""

SetName = Literal["explore", "pef", "dropped"]


def prompt_id(prompt: Prompt) -> str:
    """Hash of a prompt's text or messages (16 hex digits): how training rows find their entry in the store.

    Of a row with images, take the prompt as an engine reads it (`posttrain.tasks.shown`): its images count by pixels.
    """
    messages = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
    text = messages if isinstance(messages, str) else json.dumps(messages, sort_keys=True, default=described)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True)
class Store:
    """A finished store, opened for reading."""

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open a store.

        Raises:
            UserError: there is none, it is unfinished, or its layout is of another version.
        """
        folder = Path(path)
        manifest = folder / "manifest.json"
        if not manifest.is_file():
            unfinished = (folder / "parts").is_dir()
            state = "is unfinished: run the same `posttrain presample` again" if unfinished else "does not exist"
            raise UserError(f"The store {folder} {state}." if unfinished else f"There is no store at {folder}.")
        content = json.loads(manifest.read_text(encoding="utf-8"))
        if content.get("format") != FORMAT:
            raise UserError(
                f"The store {folder} has format {content.get('format')}, this version reads {FORMAT}: presample again."
            )
        return cls(folder, content)

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything that determined the content."""
        identity: Mapping[str, Any] = self.manifest["identity"]
        return identity

    @property
    def counts(self) -> Mapping[str, int]:
        """Prompts by set, answers stored, checks failed."""
        counts: Mapping[str, int] = self.manifest["counts"]
        return counts

    def require_files(self, model: str) -> None:
        """Refuse a model folder that is not the one that made the store, without loading it.

        A folder that cannot be compared passes: what it holds is compared once it is loaded.

        Raises:
            UserError: its files differ.
        """
        found, wanted = files_fingerprint(model), self.manifest["files"]
        if found is not None and wanted is not None and found != wanted:
            raise UserError(
                f"The store {self.path} was made by another model than {model}: the files differ; presample again with "
                "this model."
            )

    @cached_property
    def sets(self) -> dict[str, SetName]:
        """The set of every prompt, by `prompt_id`."""
        table = pq.read_table(self.path / "prompts.parquet", columns=["prompt_id", "set"])
        return dict(zip(table["prompt_id"].to_pylist(), table["set"].to_pylist(), strict=True))

    @cached_property
    def answers(self) -> list[StoredAnswer]:
        """The stored answers of the near-perfect prompts, in the order of the prompts."""
        table = pq.read_table(self.path / "answers.parquet")
        return [
            StoredAnswer(tuple(prompt), tuple(answer), tuple(logps), owner)
            for prompt, answer, logps, owner in zip(
                table["prompt_token_ids"].to_pylist(),
                table["token_ids"].to_pylist(),
                table["logps"].to_pylist(),
                table["prompt_id"].to_pylist(),
                strict=True,
            )
        ]

    def exploration(self, prompts: Iterable[Prompt]) -> list[int]:
        """Indices of the prompts that are explored online (D_exp).

        Raises:
            UserError: a prompt was never pre-sampled, or none is left to explore.
        """
        ids = [prompt_id(prompt) for prompt in prompts]
        missing = sum(i not in self.sets for i in ids)
        if missing:
            raise UserError(
                f"{missing} of {len(ids)} training prompts are not in the store {self.path}: presample the same data "
                "that you train on."
            )
        kept = [index for index, i in enumerate(ids) if self.sets[i] == "explore"]
        if not kept:
            raise UserError(
                f"The store {self.path} leaves no prompt to explore: all {len(ids)} are near-perfect or dropped; raise "
                "pef_threshold or take a harder task."
            )
        return kept
