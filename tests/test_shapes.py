"""Pictures of shapes: answers read back from the pixels, splits, options, and the verifier of exact answers."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import jinja2
import pytest
from PIL import Image

from posttrain import rewards, tasks
from posttrain.errors import UserError
from posttrain.tasks import Row, Split
from posttrain.tasks.shapes import CHAT_TEMPLATE, RGB, Options, Scene, Shape, picture, scenes, solve

SPLITS: tuple[Split, ...] = ("train", "eval")
ALL: dict[str, Any] = {"questions": ["kind", "colour", "both", "compare"], "rows": 150, "eval_share": 0.3}


def load(**options: Any) -> tasks.BaseTask:
    return tasks.load("shapes", options)


def seen(image: Image.Image) -> list[tuple[str, str]]:
    """Kind and colour of every shape, from the pixels alone, in the order of their middles."""
    names = {rgb: name for name, rgb in RGB.items()}
    left = {
        (x, y): names[p]
        for y in range(image.height)
        for x in range(image.width)
        if (p := image.getpixel((x, y))) in names
    }
    found = []
    while left:
        start = next(iter(left))
        colour, patch, waiting = left.pop(start), {start}, [start]
        while waiting:
            x, y = waiting.pop()
            for near in ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1), (x + 1, y + 1), (x - 1, y + 1)):
                if left.get(near) == colour:
                    del left[near]
                    patch.add(near)
                    waiting.append(near)
        across, down = [x for x, _ in patch], [y for _, y in patch]
        top, bottom = (sum(y == row for _, y in patch) for row in (min(down), max(down)))
        # Every row of a square is as long as its last; a circle's first and last are equal, a triangle's are not.
        width = max(across) - min(across) + 1
        kind = "triangle" if top < bottom else "square" if top == width else "circle"
        found.append((sum(down) / len(patch), sum(across) / len(patch), kind, colour))
    return [(kind, colour) for _, _, kind, colour in sorted(found)]


def answered(row: Row) -> str:
    """The answer to a row's question, from its words and its pixels."""
    shapes = seen(row["images"][0])
    words = row["prompt"][0]["content"].removesuffix("?").split()
    if words[0] == "more":
        first, second = (sum(colour == name for _, colour in shapes) for name in (words[1], words[3]))
        return "same" if first == second else words[1] if first > second else words[3]
    asked = {word.removesuffix("s") for word in words[2:]}
    return str(sum(asked <= {kind, colour} for kind, colour in shapes))


def test_answers_are_what_one_sees() -> None:
    task = load(**ALL, colours=["red", "green", "blue", "yellow"], size=40)
    rows = [row for split in SPLITS for row in task.rows(split)]
    assert [answered(row) for row in rows] == [row["answer"] for row in rows]
    assert {row["prompt"][0]["content"].split()[0] for row in rows} == {"how", "more"}


def test_a_scene_by_hand() -> None:
    shapes = (
        Shape(5, 20, 3, "circle", "red"), Shape(6, 6, 4, "square", "blue"), Shape(20, 10, 3, "circle", "blue"),
        Shape(25, 25, 3, "triangle", "red"), Shape(26, 5, 3, "circle", "red"),
    )  # fmt: skip
    asked = {("kind", ("circle",)): ("3", "rbr"), ("colour", ("blue",)): ("2", "sc"),
             ("both", ("red", "circle")): ("2", "rr"), ("both", ("blue", "triangle")): ("0", ""),
             ("compare", ("red", "blue")): ("red", "rbbrr"), ("compare", ("green", "blue")): ("blue", "bb"),
             ("compare", ("green", "yellow")): ("same", "")}  # fmt: skip
    assert {key: solve(Scene(shapes, *key)) for key in asked} == asked  # type: ignore[arg-type]
    image = picture(shapes, 32)
    assert (image.mode, image.size) == ("RGB", (32, 32))
    assert [image.getpixel(at) for at in ((0, 0), (20, 5), (6, 6))] == [(0, 0, 0), RGB["red"], RGB["blue"]]


@pytest.mark.parametrize("listed", [False, True])
def test_demonstrations_are_correct_and_can_be_written(listed: bool) -> None:
    task = load(**ALL, listed=listed)
    name, options = task.verifier or ("", {})
    verifier = rewards.load(name, options)
    rows = task.rows("train")
    pairs = task.demonstrations(rows, 200, seed=3)
    assert pairs == task.demonstrations(rows, 200, seed=3)
    assert {v.reward for v in verifier.score([answer for _, answer in pairs], [row for row, _ in pairs])} == {1.0}
    assert {v.reward for v in verifier.score([verifier.gold(row) or "" for row in rows], rows)} == {1.0}
    assert all(("=" in answer) == listed for _, answer in pairs)
    written = "".join(row["prompt"][0]["content"] + answer for row, answer in pairs)
    assert set(written) <= set(task.alphabet or "")


def test_splits_are_disjoint_and_a_function_of_the_options() -> None:
    train, held_out = (load(**ALL).rows(split) for split in SPLITS)
    assert len(train) == 150
    assert 35 < len(held_out) < 100, "0.3 / 0.7 of 150 is 64"
    assert not {row["key"] for row in train} & {row["key"] for row in held_out}
    assert len({row["key"] for row in [*train, *held_out]}) == len(train) + len(held_out)
    again = load(**{**ALL, "rows": 50})
    assert tasks.fingerprint(again.rows("train")) == tasks.fingerprint(train[:50])
    assert tasks.fingerprint(load(**ALL, seed=1).rows("train")) != tasks.fingerprint(train)


def test_answers_are_equally_frequent() -> None:
    draw = scenes(Options(questions=["kind", "colour", "both"]))
    counts = Counter(solve(next(draw))[0] for _ in range(3500))
    # 500 of each, give or take four standard deviations of 21
    assert set(counts) == set("0123456") and min(counts.values()) > 416 and max(counts.values()) < 584, counts


def test_shapes_keep_apart_and_inside() -> None:
    draw = scenes(Options(max_shapes=9, size=48))
    for scene in (next(draw) for _ in range(100)):
        assert scene.shapes == tuple(sorted(scene.shapes))
        for place, shape in enumerate(scene.shapes):
            assert shape.radius < min(shape.x, shape.y) and max(shape.x, shape.y) < 47 - shape.radius
            for other in scene.shapes[:place]:
                gap = max(abs(shape.x - other.x), abs(shape.y - other.y)) - shape.radius - other.radius
                assert gap >= 2, "a pixel of black lies between"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"questions": ["compare"], "colours": ["red"]}, "compare needs two colours"),
        ({"kinds": ["circle", "circle"]}, "names something twice"),
        ({"max_shapes": 9}, "9 shapes have no room in 32 × 32 pixels"),
        ({"colours": ["pink"]}, "'red', 'green', 'blue' or 'yellow'"),
        ({"question": ["kind"]}, "no option 'question'; did you mean 'questions'"),
    ],
)
def test_options_that_cannot_be_are_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        load(**options)
    assert sentence in str(error.value)


def test_the_template_reads_text_and_parts_alike() -> None:
    template = jinja2.Template(CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    (row,) = load(rows=1).rows("train")
    said = {"role": "assistant", "content": "3"}
    parts = {"role": "assistant", "content": [{"type": "text", "text": "3"}]}
    question = row["prompt"][0]["content"]
    for answer in (said, parts):
        rendered = template.render(messages=[*tasks.shown(row), answer], eos_token="$")
        assert rendered == f"^<image>{question}3$"
    assert template.render(messages=row["prompt"]) == f"^{question}"


# ---------------------------------------------------------------- the verifier `exact`


@pytest.mark.parametrize(
    ("completion", "reward", "status", "answer"),
    [
        ("Red", 1.0, "ok", "red"),
        ("  red .\n", 1.0, "ok", "red"),
        ("ｒｅｄ", 1.0, "ok", "red"),  # NFKC
        ("<think>blue?</think> red", 1.0, "ok", "red"),
        ("<think>red", 0.0, "no_answer", None),
        ("it is <answer>red</answer>, I think", 1.0, "ok", "red"),
        ("red or blue", 0.0, "wrong", "red or blue"),
        ("", 0.0, "no_answer", None),
        (" . ", 0.0, "no_answer", None),
    ],
)
def test_exact_answers(completion: str, reward: float, status: str, answer: str | None) -> None:
    verdict = rewards.load("exact").verify(completion, {"answer": "red"})
    assert (verdict.reward, verdict.status, verdict.answer) == (reward, status, answer)


def test_exact_options() -> None:
    after = rewards.load("exact", {"after": "="})
    texts = ["rrb=3", "3", "rr=2=3", "=3", "3=", "rrb=2"]
    assert [after.verify(text, {"answer": 3}).reward for text in texts] == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    assert after.gold({"answer": 3}) == "=3"
    strict = rewards.load("exact", {"ignore_case": False})
    assert [strict.verify(text, {"answer": "Red"}).reward for text in ("Red", "red")] == [1.0, 0.0]
    assert after.identity == {"name": "exact", "options": {"after": "=", "ignore_case": True}}
    with pytest.raises(UserError, match="'after'"):
        rewards.load("exact", {"after": ""})


@pytest.mark.parametrize("gold", [None, True, 1.5, "", " ", ["red"]])
def test_a_gold_answer_that_is_none_is_no_wrong_answer(gold: Any) -> None:
    assert rewards.load("exact").verify("red", {"answer": gold}).status == "unparseable_gold"


def test_exact_never_raises() -> None:
    verifier, draw = rewards.load("exact", {"after": "="}), random.Random(0)
    pieces = ["=", "<answer>", "</answer>", "</think>", "<think>", "3", "\x00", "\ud800", " ", "é" * 5000]
    for _ in range(500):
        text = "".join(draw.choices(pieces, k=6))
        verdict = verifier.verify(text, {"answer": "3"})
        assert verdict.reward in (0.0, 1.0)
