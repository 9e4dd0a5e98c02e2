"""Outputs that are found by what went into them and trusted by the hashes of what came out. No torch.

An output is a folder `<name>-<first 12 digits of its key>`. The key is the SHA-256 of everything that determines it:
the step, its settings and the keys of its inputs. `manifest.json` is written last, and its presence means that the
output is finished:

    format, step, key, settings, inputs {part: {stage, key, content}}, files {path: {bytes, sha256}}, content, seconds,
    finished (UTC), results (a few numbers), versions

Checkpoints and logs are no part of it. `content` hashes what other stages read: an input that was made again and came
out otherwise is told from one that came out the same. Until it is finished, an output has `unfinished.json`: the
contents of its inputs, and the seconds that were spent.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from posttrain import atomic
from posttrain.versions import versions

FORMAT = 1
"""Version of the keys and of the layout; part of every key."""

MANIFEST, UNFINISHED = "manifest.json", "unfinished.json"

_DIGITS = 12
"""Of the key in the name of a folder."""

_UNREAD = ("history.json", "training_args.bin")
"""Files with times and paths in them, which no other stage reads."""


def key_of(step: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The key of an output (64 hex digits).

    Args:
        step: what makes it.
        settings: with every default written out.
        inputs: keys by the part that they play.
    """
    content = {"format": FORMAT, "step": step, "settings": settings, "inputs": dict(inputs)}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode("utf-8")).hexdigest()


def place(root: Path, name: str, key: str) -> Path:
    """The folder of an output: one that is there, under whatever name, or where it is going to be."""
    own = root / f"{name}-{key[:_DIGITS]}"
    others = [folder for folder in sorted(root.glob(f"*-{key[:_DIGITS]}")) if (read(folder) or {}).get("key") == key]
    return own if own.is_dir() or not others else others[0]


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished output, or None."""
    return _read(folder / MANIFEST)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write(
    folder: Path,
    *,
    step: str,
    key: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, str]],
    seconds: float,
    results: Mapping[str, float],
) -> dict[str, Any]:
    """Hash what is in the folder, and write the manifest: from now on it is finished."""
    atomic.remove_leftovers(folder)
    files = {str(path.relative_to(folder)): _described(path) for path in _files(folder)}
    content: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "key": key,
        "settings": json.loads(json.dumps(settings, default=str)),
        "inputs": inputs,
        "files": files,
        "content": _content(files),
        "seconds": round(seconds, 3),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "results": dict(results),
        "versions": versions(),
    }
    atomic.write_json(folder / MANIFEST, content)
    (folder / UNFINISHED).unlink(missing_ok=True)
    return content


def fault(folder: Path, manifest: Mapping[str, Any], *, hashed: bool = True) -> str | None:
    """What is wrong with a finished output, as in `model/config.json is missing`; None where nothing is.

    Args:
        folder: of the output.
        manifest: of it.
        hashed: compare contents, and not sizes alone.
    """
    for name, wanted in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        found = path.stat().st_size
        if found != wanted["bytes"]:
            return f"{name} has {found:,} bytes and not {wanted['bytes']:,}"
        if hashed and _sha256(path) != wanted["sha256"]:
            return f"{name} was altered"
    return None


def move_aside(folder: Path, why: str) -> Path:
    """Rename an output that is not to be found any more; returns where it is now, `<folder>.<why>-N`."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{why}-{number}")).exists():
        number += 1
    os.rename(folder, aside)
    return aside


def begin(folder: Path, contents: Mapping[str, str], seconds: float) -> None:
    """Note what an unfinished output is made of, and how long that has taken until now."""
    atomic.write_json(folder / UNFINISHED, {"contents": dict(contents), "seconds": seconds})


def begun(folder: Path) -> tuple[Mapping[str, str], float] | None:
    """What `begin` noted; None where nothing is begun."""
    content = _read(folder / UNFINISHED)
    return None if content is None else (content["contents"], content["seconds"])


@dataclass(frozen=True)
class State:
    """How far an output is, for people.

    Attributes:
        name: done, corrupt, started, changed (finished with other settings) or to do.
        seconds: that it took, or has taken until now; None where nothing is there.
        finished: when (UTC).
        results: a few numbers.
        note: what there is to say beside.
    """

    name: str
    seconds: float | None = None
    finished: str = ""
    results: Mapping[str, float] | None = None
    note: str = ""


def state(root: Path, name: str, key: str, *, hashed: bool) -> State:
    """How far the output of a key is."""
    folder = place(root, name, key)
    manifest = read(folder)
    if manifest is not None and manifest.get("key") == key:
        wrong = fault(folder, manifest, hashed=hashed)
        found = "done" if wrong is None else "corrupt"
        return State(found, manifest["seconds"], manifest["finished"], manifest["results"], wrong or "")
    if folder.is_dir():
        steps = [int(path.parent.name.rpartition("-")[2]) for path in folder.glob("checkpoints/checkpoint-*/complete")]
        noted = begun(folder)
        return State("started", noted[1] if noted is not None else None, note=f"at step {max(steps)}" if steps else "")
    earlier = [one for one in root.glob(f"{name}-" + "[0-9a-f]" * _DIGITS) if read(one) is not None]
    return State("changed" if earlier else "to do")


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder)
        if path.is_file() and below.parts[0] not in ("checkpoints", MANIFEST, UNFINISHED) and path.suffix != ".log":
            yield path


def _described(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _content(files: Mapping[str, Mapping[str, Any]]) -> str:
    """A hash over the files that other stages read (16 hex digits)."""
    read_ = {name: file["sha256"] for name, file in files.items() if Path(name).name not in _UNREAD}
    return hashlib.sha256(json.dumps(read_, sort_keys=True).encode("utf-8")).hexdigest()[:16]
