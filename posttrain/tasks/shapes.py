"""Pictures of circles, squares and triangles, with a question about each: counting and comparing, for models that see.

A picture is RGB on black; its shapes have full colours, lie anywhere and do not touch. The questions and their answers:

    how many circles?         kind        3, or with `listed` rgb=3: their colours, and what they add up to
    how many red?             colour      2, or ct=2: their kinds
    how many red circles?     both        1, or r=1
    more red or blue?         compare     red, blue or same; with `listed` rbr=red

Shapes are listed line by line as one reads. Only what follows the last `=` counts, so listing is work that may be
short, long or wrong. Every answer to a question is drawn equally often. Rows fall in a split by the hash of their
scene (shapes, colours, places, question); scenes are drawn until there are enough, without end.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from posttrain.tasks import Row, TaskOptions
from posttrain.tasks._drawn import DrawnTask

if TYPE_CHECKING:
    from PIL.Image import Image

Kind = Literal["circle", "square", "triangle"]
Colour = Literal["red", "green", "blue", "yellow"]
Question = Literal["kind", "colour", "both", "compare"]

RGB = {"red": (255, 40, 40), "green": (40, 220, 40), "blue": (60, 90, 255), "yellow": (255, 230, 40)}

RADII = (3, 4)
"""Half widths of shapes, in pixels."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}^"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% elif message['role'] == 'assistant' %}"
    "{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ eos_token }}{% endgeneration %}"
    "{% endif %}{% endfor %}"
)


class Shape(NamedTuple):
    """One shape; `x` and `y` are its middle and `radius` half its width, in pixels."""

    y: int
    x: int
    radius: int
    kind: Kind
    colour: Colour


class Scene(NamedTuple):
    """A picture, as the shapes in it in reading order, and what is asked of it."""

    shapes: tuple[Shape, ...]
    question: Question
    asked: tuple[str, ...]
    """A kind, a colour, a colour and a kind, or two colours."""


class Options(TaskOptions):
    """Options of the task `shapes`."""

    questions: list[Question] = Field(default=["kind", "colour", "both"], min_length=1)
    """What is asked: how many there are of a kind, of a colour, of both, or which of two colours there is more of."""
    kinds: list[Kind] = Field(default=["circle", "square", "triangle"], min_length=1)
    colours: list[Colour] = Field(default=["red", "green", "blue"], min_length=1)
    size: Annotated[int, Field(ge=16, le=128)] = 32
    """Width and height of a picture, in pixels."""
    max_shapes: Annotated[int, Field(ge=1, le=9)] = 6
    """Most shapes in a picture; counts are 0 to this."""
    listed: bool = False
    """Whether demonstrations list what they count."""
    rows: Annotated[int, Field(gt=0)] = 4000
    """Training prompts; evaluation prompts come on top, in proportion to `eval_share`."""
    eval_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of all prompts that is held out."""
    seed: int = 0
    """Of the draw."""

    @field_validator("questions", "kinds", "colours")
    @classmethod
    def _each_once(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise ValueError(f"{names} names something twice: name each once")
        return names

    @model_validator(mode="after")
    def _room(self) -> Options:
        if "compare" in self.questions and len(self.colours) < 2:
            raise ValueError("compare needs two colours: add one, or leave compare out of the questions")
        cells = (self.size // (2 * max(RADII) + 2)) ** 2
        if self.max_shapes > max(1, 2 * cells // 3):  # more would hardly ever find room
            raise ValueError(f"{self.max_shapes} shapes have no room in {self.size} × {self.size} pixels: enlarge size")
        return self


class Task(DrawnTask):
    """Questions about pictures of shapes."""

    name = "shapes"
    images = True
    options: Options

    @property
    def verifier(self) -> tuple[str, dict[str, Any]]:
        """The reward `exact`, of what follows the last `=`."""
        return "exact", {"after": "="}

    def demonstrations(self, rows: Sequence[Row], count: int, *, seed: int) -> list[tuple[Row, str]]:
        """Uniformly random rows, each with its answer."""
        return [(row, row["solution"]) for row in random.Random(seed).choices(rows, k=count)]

    @property
    def alphabet(self) -> str:
        """What the questions about these kinds and colours are written in, digits, and `^` that opens a prompt."""
        words = "how many more or same?=" + "".join(self.options.kinds) + "s" + "".join(self.options.colours)
        return "^0123456789" + "".join(sorted(set(words)))

    @property
    def chat_template(self) -> str:
        """`^<image>{question}{answer}{eos}`."""
        return CHAT_TEMPLATE

    def _drawn(self) -> Iterator[tuple[str, Row]]:
        for scene in scenes(self.options):
            row = _row(scene, self.options)
            yield row["key"], row


def scenes(options: Options) -> Iterator[Scene]:
    """Distinct scenes without end."""
    draw = random.Random(options.seed)
    seen: set[Scene] = set()
    while True:
        scene = _draw(draw, options)
        if scene not in seen:
            seen.add(scene)
            yield scene


def _draw(draw: random.Random, options: Options) -> Scene:
    """One scene, its answer uniformly random."""
    question = draw.choice(options.questions)
    looks = [(kind, colour) for kind in options.kinds for colour in options.colours]
    asked: tuple[str, ...]
    if question == "compare":
        first, second = draw.sample(options.colours, 2)
        asked = (first, second)
        most = draw.randint(1, options.max_shapes - options.max_shapes // 3)
        fewer = draw.randint(0, min(most - 1, options.max_shapes - most))
        same = draw.randint(0, options.max_shapes // 2)
        left, right = draw.choice([(most, fewer), (fewer, most), (same, same)])
        wanted = [(draw.choice(options.kinds), colour) for colour in [first] * left + [second] * right]
        others = [look for look in looks if look[1] not in asked]
    else:
        kind, colour = draw.choice(looks)
        asked = {"kind": (kind,), "colour": (colour,), "both": (colour, kind)}[question]
        matching = [look for look in looks if set(asked) <= set(look)]
        wanted = draw.choices(matching, k=draw.randint(0, options.max_shapes))
        others = [look for look in looks if look not in matching]
    rest = draw.randint(0 if wanted else 1, options.max_shapes - len(wanted)) if others else 0
    wanted += draw.choices(others, k=rest) if rest else []
    shapes = None
    while shapes is None:  # again and not another scene, or many shapes would be rare
        shapes = _placed(draw, wanted, options.size)
    return Scene(tuple(sorted(shapes)), question, asked)


def _placed(draw: random.Random, looks: Sequence[tuple[Kind, Colour]], size: int) -> list[Shape] | None:
    """Shapes at random places, a pixel's distance from one another and the edge; None where one found no room."""
    shapes: list[Shape] = []
    for kind, colour in looks:
        radius = draw.choice(RADII)
        for _ in range(50):
            x, y = (draw.randint(radius + 1, size - radius - 2) for _ in range(2))
            if all(max(abs(x - o.x), abs(y - o.y)) > radius + o.radius + 1 for o in shapes):
                shapes.append(Shape(y, x, radius, kind, colour))
                break
        else:
            return None
    return shapes


def picture(shapes: Sequence[Shape], size: int) -> Image:
    """The shapes on black."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (size, size))
    canvas = ImageDraw.Draw(image)
    for y, x, radius, kind, colour in shapes:
        box = (x - radius, y - radius, x + radius, y + radius)
        if kind == "circle":
            canvas.ellipse(box, fill=RGB[colour])
        elif kind == "square":
            canvas.rectangle(box, fill=RGB[colour])
        else:
            canvas.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=RGB[colour])
    return image


def solve(scene: Scene) -> tuple[str, str]:
    """The answer, and what it counts as a list of initials in reading order."""
    asked = set(scene.asked)
    if scene.question == "compare":
        found: list[str] = [shape.colour for shape in scene.shapes if shape.colour in asked]
        first, second = scene.asked
        lead = found.count(first) - found.count(second)
        return (first if lead > 0 else second if lead < 0 else "same"), "".join(colour[0] for colour in found)
    matching = [shape for shape in scene.shapes if asked <= {shape.kind, shape.colour}]
    initials = (shape.kind[0] if scene.question == "colour" else shape.colour[0] for shape in matching)
    return str(len(matching)), "".join(initials)


def _row(scene: Scene, options: Options) -> Row:
    answer, listing = solve(scene)
    places = ";".join(f"{s.colour} {s.kind} {s.x},{s.y},{s.radius}" for s in scene.shapes)
    asked = " or ".join(scene.asked) if scene.question == "compare" else " ".join(scene.asked)
    plural = "s" if scene.question in ("kind", "both") else ""
    question = f"more {asked}?" if scene.question == "compare" else f"how many {asked}{plural}?"
    return {
        "prompt": [{"role": "user", "content": question}],
        "images": [picture(scene.shapes, options.size)],
        "key": f"shapes:{options.size}:{question}:{places}",
        "answer": answer,
        "solution": f"{listing}={answer}" if options.listed else answer,
    }
