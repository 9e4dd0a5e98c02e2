"""Images in someone else's data: what a column may hold, and what is read of it.

An image is a PIL image, the bytes of an image file, or a mapping with them under `bytes` (as `datasets` keeps images);
several are a list. They become RGB, upright as their EXIF data say, and stay in memory as pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Kinds of files that are read: pictures alone, none that PIL hands to another program."""

MAX_BYTES = 2**26
"""Largest file that is read; PIL's own limit on pixels holds, too."""

MARK = "<image>"
"""How prompts of many data sets mark the place of an image."""


def read_images(value: Any) -> list[Image]:
    """The images of one record's column; none where it is empty.

    Raises:
        ValueError: one of them is no image, cannot be read, or is too large.
    """
    if value is None:
        return []
    return [_read(one) for one in (value if isinstance(value, list | tuple) else [value])]


def _read(value: Any) -> Image:
    from PIL import Image, ImageOps

    content = value.get("bytes") if isinstance(value, Mapping) else value
    if isinstance(content, Image.Image):
        image = content
    elif isinstance(content, bytes):
        image = _opened(content)
    else:
        raise ValueError(f"the image is {value!r:.80}, neither an image nor the bytes of a file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"the image cannot be read ({error})") from None


def _opened(content: bytes) -> Image:
    from PIL import Image, UnidentifiedImageError

    if len(content) > MAX_BYTES:
        raise ValueError(f"the image's file has {len(content):,} bytes, and at most {MAX_BYTES:,} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(BytesIO(content), formats=FORMATS)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = "it is none of " + ", ".join(FORMATS) if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"the image cannot be read ({reason})") from None


def with_files(value: Any, folder: Path) -> Any:
    """What a column holds, with paths of files replaced by the files' bytes.

    A path is a text, or stands under `path` in a mapping without `bytes`; it is relative to `folder` and stays in it.

    Raises:
        ValueError: it leads out of the folder, there is no such file, or the file is too large.
    """
    if isinstance(value, list | tuple):
        return [with_files(one, folder) for one in value]
    if isinstance(value, Mapping) and value.get("bytes") is None and isinstance(value.get("path"), str):
        value = value["path"]
    if not isinstance(value, str):
        return value
    root = folder.resolve()
    try:
        file = (root / value).resolve()
        if not file.is_relative_to(root):
            raise ValueError(f"the image's path {value!r:.200} leads out of the folder of the data: keep images in it")
        if not file.is_file():
            raise ValueError(f"there is no image file {value!r:.200} in the folder of the data")
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"the image {value!r:.200} has {file.stat().st_size:,} bytes, above {MAX_BYTES:,}")
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"the image {value!r:.200} cannot be read ({error.strerror})") from None


def without_marks(messages: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The messages without marks of their `count` images where these are shown anyway: before the first question.

    Raises:
        ValueError: there are marks elsewhere, or another number of them.
    """
    found = sum(message["content"].count(MARK) for message in messages)
    if not found:
        return messages
    first = next((place for place, message in enumerate(messages) if message["role"] == "user"), None)
    content = "" if first is None else messages[first]["content"]
    rest = content
    for _ in range(count):
        rest = rest.lstrip().removeprefix(MARK)
    if not found == content.count(MARK) == count or MARK in rest:
        raise ValueError(
            f"the prompt has {found} marks {MARK} and {count} images, which are shown at the start of its first user "
            "message: put that many marks there, or none"
        )
    return [
        {**message, "content": rest.lstrip()} if place == first else message for place, message in enumerate(messages)
    ]
