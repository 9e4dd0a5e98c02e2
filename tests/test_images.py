"""Images in someone else's data: what is read from files and data sets, what is a bad row, and what is never opened."""

from __future__ import annotations

import json
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from posttrain import tasks
from posttrain.errors import UserError
from posttrain.tasks import _images
from posttrain.tasks._images import read_images, with_files, without_marks

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
FIELDS = {"question": "prompt", "picture": "images", "label": "answer"}


def picture(name: str, size: tuple[int, int] = (6, 4)) -> Image.Image:
    return Image.new("RGB", size, COLOURS[name])


def png(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    written = BytesIO()
    image.save(written, format=kind, **options)
    return written.getvalue()


def load(path: Path, **options: Any) -> tasks.BaseTask:
    return tasks.load(
        "files", {"train": str(path), "fields": FIELDS, "verifier": "exact", "eval_share": 0.0, **options}
    )


def jsonl(folder: Path, records: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def colours(row: tasks.Row) -> list[Any]:
    return [(image.mode, image.size, image.getpixel((0, 0))) for image in row["images"]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures below a folder of data, and one beside it."""
    data = tmp_path / "data"
    (data / "deep").mkdir(parents=True)
    picture("red").save(data / "red.png")
    picture("green").save(data / "deep" / "green.png")
    picture("blue").save(data / "blue.bmp")
    picture("red").save(tmp_path / "outside.png")
    return data


def test_paths_in_jsonl(folder: Path) -> None:
    path = jsonl(folder, [
        {"question": "which?", "picture": "red.png", "label": "red"},
        {"question": "which?", "picture": ["deep/green.png", "blue.bmp"], "label": "green"},
        {"question": "none?", "picture": [], "label": "none"},
        {"question": "nothing?", "picture": None, "label": "none"},
    ])  # fmt: skip
    task = load(path)
    assert task.images
    rows = task.rows("train")
    assert [colours(row) for row in rows] == [
        [("RGB", (6, 4), (255, 0, 0))],
        [("RGB", (6, 4), (0, 255, 0)), ("RGB", (6, 4), (0, 0, 255))],
        [],
        [],
    ]
    assert len(tasks.shown(rows[1])[0]["content"]) == 3
    assert not tasks.load("files", {"train": str(path), "fields": {"question": "prompt", "label": "answer"},
                                    "verifier": "exact", "eval_share": 0.0}).images  # fmt: skip


def test_equal_words_with_other_images_are_other_rows(folder: Path) -> None:
    rows = [{"question": "which?", "picture": name, "label": "x"} for name in ("red.png", "blue.bmp", "red.png")]
    with pytest.warns(UserWarning, match="key had occurred before: 1"):
        found = load(jsonl(folder, rows)).rows("train")
    assert [colours(row)[0][2] for row in found] == [(255, 0, 0), (0, 0, 255)]


def test_images_in_parquet_and_on_the_hub(folder: Path) -> None:
    """The layout of `datasets`: a mapping with bytes or a path; and a list of them."""
    kept = [{"bytes": png(picture("red")), "path": None}, {"bytes": None, "path": "deep/green.png"}]
    table = pa.table({"question": ["a?", "b?"], "picture": [[kept[0]], kept], "label": ["red", "green"]})
    pq.write_table(table, folder / "rows.parquet")
    rows = load(folder / "rows.parquet").rows("train")
    assert [[colour for *_, colour in colours(row)] for row in rows] == [[(255, 0, 0)], [(255, 0, 0), (0, 255, 0)]]

    features = datasets.Features({"question": datasets.Value("string"), "picture": datasets.Image(),
                                  "label": datasets.Value("string")})  # fmt: skip
    records = [{"question": f"{name}?", "picture": picture(name), "label": name} for name in COLOURS]
    place = folder / "hub"
    place.mkdir()
    datasets.Dataset.from_list(records, features=features).to_parquet(str(place / "train.parquet"))
    task = tasks.load("hub", {"name": str(place), "fields": FIELDS, "verifier": "exact", "eval_share": 0.0})
    found = task.rows("train")
    assert task.images and [colours(row)[0][2] for row in found] == list(COLOURS.values())
    with_images = datasets.Dataset.from_list(found)
    assert np.array_equal(with_images[0]["images"][0], found[0]["images"][0]), "what TRL reads are the same pixels"


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("gone.png", "there is no image file 'gone.png'"),
        ("../outside.png", "leads out of the folder of the data"),
        ("LINK", "leads out of the folder of the data"),
        ("ABSOLUTE", "leads out of the folder of the data"),
        ("deep", "there is no image file 'deep'"),
        ("rows.jsonl", "none of PNG, JPEG"),
        ("torn.png", "the image cannot be read"),
        ("bomb.png", "the image cannot be read"),
        ("drawing.eps", "none of PNG, JPEG"),
        (["red.png", 3], "the image is 3, neither an image nor the bytes of a file"),
        ({"size": 3}, "neither an image nor the bytes"),
        ("a\x00b", "null byte"),
    ],
)
def test_an_image_that_cannot_be_read_is_a_bad_row(
    folder: Path, value: Any, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    (folder / "torn.png").write_bytes(png(Image.effect_noise((64, 64), 50))[:-400])
    picture("red", (300, 300)).save(folder / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80_000)  # 90,000 are a warning of PIL's, 160,000 its error
    picture("red").save(folder / "drawing.eps")
    value = {"LINK": "link.png", "ABSOLUTE": str(folder.parent / "outside.png")}.get(str(value), value)
    good = {"question": "which?", "picture": "red.png", "label": "red"}
    path = jsonl(folder, [good, {**good, "question": "and?", "picture": value}])
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: ") as error:
        load(path).rows("train")
    assert sentence in str(error.value)
    with pytest.warns(UserWarning, match="bad rows skipped: 1"):
        assert len(load(path, on_bad_row="skip").rows("train")) == 1


def test_a_bad_image_of_a_data_set_is_a_bad_row(tmp_path: Path) -> None:
    features = datasets.Features({"question": datasets.Value("string"), "picture": datasets.Image(),
                                  "label": datasets.Value("string")})  # fmt: skip
    torn = png(picture("red"))[:40]
    records = [{"question": "a?", "picture": {"bytes": png(picture("red")), "path": None}, "label": "red"},
               {"question": "b?", "picture": {"bytes": torn, "path": None}, "label": "red"}]  # fmt: skip
    datasets.Dataset.from_list(records, features=features).to_parquet(str(tmp_path / "train.parquet"))
    options = {"name": str(tmp_path), "fields": FIELDS, "verifier": "exact", "eval_share": 0.0}
    with pytest.raises(UserError, match="row 2: the row cannot be decoded"):
        tasks.load("hub", options).rows("train")
    with pytest.warns(UserWarning, match="bad rows skipped: 1"):
        assert len(tasks.load("hub", {**options, "on_bad_row": "skip"}).rows("train")) == 1


def test_images_need_a_user_message_and_are_no_text(folder: Path) -> None:
    system = [{"role": "system", "content": "which?"}]
    path = jsonl(folder, [{"question": system, "picture": "red.png", "label": "red"}])
    with pytest.raises(UserError, match="no user message that could show them"):
        load(path).rows("train")
    with pytest.raises(UserError, match="there is no field 'images'"):
        load(path, prompt_template="{images}: {prompt}")


def test_large_files_are_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_images, "MAX_BYTES", 50)
    with pytest.raises(ValueError, match="bytes, above 50"):
        with_files("red.png", folder)
    with pytest.raises(ValueError, match="at most 50 are read"):
        read_images(b"x" * 51)


def test_images_become_upright_rgb_without_a_format() -> None:
    sideways = picture("red", (8, 4))
    sideways.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by 90°: the first pixel of the file becomes the last of the first row
    (upright,) = read_images(png(sideways, exif=exif))
    assert (upright.size, upright.getpixel((3, 0)), upright.getpixel((0, 0))) == ((4, 8), (0, 0, 255), (255, 0, 0))
    (grey,) = read_images(Image.new("L", (2, 2), 7))
    assert (grey.mode, grey.getpixel((0, 0))) == ("RGB", (7, 7, 7))
    (photo,) = read_images(png(picture("green"), "JPEG"))
    assert photo.format is None, "or `datasets` would compress it once more"
    own = picture("red")
    assert read_images(own)[0] is not own


def test_marks_of_images_are_left_out_where_images_are_shown_anyway() -> None:
    def said(*contents: str) -> list[dict[str, str]]:
        return [
            {"role": role, "content": text}
            for role, text in zip(("system", "user", "assistant"), contents, strict=False)
        ]

    assert without_marks(said("s", "<image>\nwhich?"), 1) == said("s", "which?")
    assert without_marks(said("s", " <image> <image>which?"), 2) == said("s", "which?")
    plain = said("s", "which?")
    assert without_marks(plain, 1) is plain
    for text, count in (("which <image>?", 1), ("<image>which?", 2), ("<image><image>which?", 1), ("<image>?", 0)):
        with pytest.raises(ValueError, match="put that many marks there, or none"):
            without_marks(said("s", text), count)
    with pytest.raises(ValueError, match="put that many marks there"):
        without_marks(said("<image>", "which?"), 1)


def test_no_warning_filter_is_left_behind() -> None:
    before = list(warnings.filters)
    read_images(picture("red"))
    assert warnings.filters == before
