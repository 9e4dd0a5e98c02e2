"""Further tasks of a run, and warm starts on several tasks: what is refused, what is kept, and what stays as it was."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain import recipe as recipes
from posttrain import registry, tasks
from posttrain.errors import UserError
from posttrain.evaluation import evaluate, further
from posttrain.launch import pipeline
from posttrain.launch.engines import Engines
from posttrain.launch.warm_start import _demonstrations, alphabet_of, demonstrated, identity_of, warm_start
from posttrain.launch.workers import Workers
from posttrain.recipe import WarmStart
from posttrain.rollouts.transformers_engine import TransformersEngine
from tests.small import BEGINNING, WARM_START

SUMS: dict[str, Any] = {"name": "arithmetic", "options": {"max_operand": 20, "rows": 60, "eval_share": 0.4}}
TASK = "evaluation.further.sums.task"
SMALL: dict[str, Any] = {
    **BEGINNING,
    "model": {"warm_start": {**WARM_START, "steps": 60, "also": [SUMS]}},
    "evaluation": {
        "prompts": 8, "n": 8, "k": [1, 4], "resamples": 100, "divergence": {},
        "further": {"sums": {"task": SUMS, "prompts": 6, "n": 4, "k": [1, 2], "max_tokens": 4}},
    },
    "method": {
        "name": "grpo",
        "prompts_per_step": 2,
        "args": {
            "num_generations": 4, "per_device_train_batch_size": 8, "max_steps": 2, "report_to": [],
            "logging_steps": 1, "learning_rate": 1e-2, "weight_decay": 1.0,  # moves weights where all rewards are equal
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def cache(own_cache: Path) -> Path:
    return own_cache


def recipe(*assignments: str, **changes: Any) -> recipes.Recipe:
    return recipes.validate(recipes.override({**SMALL, **changes}, assignments), "small.yaml")


def asking(name: str, **options: Any) -> recipes.Recipe:
    """The same with another further task, all of whose prompts are asked."""
    task = {"name": name, "options": options}
    return recipe(evaluation={**SMALL["evaluation"], "further": {"sums": {"task": task}}})


def start(*also: dict[str, Any], **changes: Any) -> WarmStart:
    return WarmStart(also=[recipes.Demonstrated(**task) for task in also], **changes)


# ---------------------------------------------------------------------- what a recipe says


def test_a_further_task_has_settings_of_its_own_and_shares_the_rest() -> None:
    asked = recipe(
        evaluation={"temperature": 0.7, "divergence": {}, "further": {"sums": {"task": {"name": "arithmetic"}}}}
    )
    (task,) = further.prepare(asked).values()
    settings, main = task.settings, asked.evaluation
    assert (settings.n, settings.k, settings.prompts) == (32, [1, 16], None)
    assert (settings.temperature, settings.seed, settings.confidence) == (0.7, main.seed, main.confidence)
    assert (settings.divergence, settings.further) == (None, {})
    assert task.max_tokens == asked.rollout.max_tokens == 8
    assert task.rows == tasks.load("arithmetic").rows("eval")
    (own,) = further.prepare(recipe()).values()
    assert (own.settings.n, own.settings.k, own.max_tokens, len(own.rows)) == (4, [1, 2], 4, 6)
    assert recipe().other_tasks == [recipes.Task(**SUMS), recipes.Demonstrated(**SUMS)]


def test_shares_of_demonstrations() -> None:
    assert start().shares == [1.0]
    assert start({"name": "a"}).shares == [0.5, 0.5]
    # what is left, 0.8, is halved
    assert start({"name": "a", "share": 0.2}, {"name": "b"}).shares == pytest.approx([0.4, 0.2, 0.4], rel=1e-12)
    assert start({"name": "a", "share": 0.2}).shares == [0.8, 0.2]


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("evaluation.further.sums.k=[1, 8]", "k = 8 exceeds n = 4: draw more answers (n) or ask for a smaller k"),
        ("evaluation.further.sums.k=[2, 1]", "k must increase without repeats, got [2, 1]"),
        ("evaluation.further.sums.promts=3", "unknown key 'evaluation.further.sums.promts'; did you mean 'prompts'"),
        ("evaluation.further={../sums: {task: {name: arithmetic}}}", "string should match pattern"),
        ("model.warm_start.also=[{name: a, share: 0.6}, {name: b, share: 0.4}]", "add up to 1: leave some"),
        ("model.warm_start.also=[{name: arithmetic, shares: 0.6}]", "did you mean 'share'"),
    ],
)
def test_mistakes_in_a_recipe(assignment: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        recipe(assignment)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("assignments", "sentence"),
    [
        ([f"{TASK}.name=sums"], "There is no task 'sums'"),
        ([f"{TASK}.options.row=3"], "no option 'row'; did you mean 'rows'"),
        (["evaluation.further.sums.prompts=500"], "'sums' ('arithmetic') holds out 33 prompts, but 500 were asked"),
        ([f"{TASK}.options.eval_share=0.0", "evaluation.further.sums.prompts=null"], "gave no rows"),
        (["model.warm_start.also=[{name: sum}]"], "There is no task 'sum'"),
        (
            ["model.warm_start.also=[{name: knights_knaves}]"],
            "'knights_knaves' cannot make a model from nothing, because its alphabet is unbounded: leave it out of",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence_before_any_weights(assignments: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        pipeline.prepare(recipe(*assignments))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        (("knights_knaves", {"form": "symbols"}), "has characters that the model made here has no tokens for ('ABC"),
        (("knights_knaves", {"form": "words"}), "demonstrate it, too (model.warm_start.also), or take another task"),
        # the same draw, more of which is held out: some of that the warm start learns
        (
            ("arithmetic", {"max_operand": 20, "rows": 20, "eval_share": 0.6}),
            "are learned from (model.warm_start.also; the first is arithmetic:",
        ),
        (("countdown", {"eval_share": 0.9}), "are learned from (task; the first is countdown:"),
    ],
)
def test_further_tasks_that_do_not_go_with_the_model(task: tuple[str, dict[str, Any]], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        pipeline.prepare(asking(task[0], **task[1]))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_prompts_that_no_policy_saw_are_asked() -> None:
    """More of the same draw is held out by the warm start, so a smaller share of it is unseen."""
    (asked,) = pipeline.prepare(asking("arithmetic", max_operand=20, rows=60, eval_share=0.2)).further.values()
    assert {row["key"] for row in asked.rows} <= {row["key"] for row in tasks.load(**SUMS).rows("eval")}


class Fake(tasks.BaseTask):
    """A task whose parts a test sets."""

    name = "fake"

    def __init__(self, verifier: Any = ("math", {}), template: str | None = None, **row: Any) -> None:
        self.judge, self.template, self.row = verifier, template, row

    @property
    def verifier(self) -> Any:
        return self.judge

    def rows(self, split: tasks.Split) -> list[tasks.Row]:
        return [{"prompt": [{"role": "user", "content": "1+1="}], "key": split, **self.row}]

    @property
    def alphabet(self) -> str:
        return "1+=^?"

    @property
    def chat_template(self) -> str | None:
        return self.template


def as_fake(monkeypatch: pytest.MonkeyPatch, fake: Fake) -> None:
    """Let the name `fake` load this task."""
    load = tasks.load
    monkeypatch.setattr(tasks, "load", lambda name, options=None: fake if name == "fake" else load(name, options))


@pytest.mark.parametrize(
    ("fake", "sentence"),
    [
        (Fake(verifier=None), "has nothing that decides what is correct"),
        (Fake(verifier=("format", {})), "does not say whether an answer is correct"),
        (Fake(), "lacks the column 'answer', which evaluation with the reward 'math' needs"),
        (Fake(answer="2", template="other"), "has another chat template than the model that is made here"),
    ],
)
def test_further_tasks_that_cannot_be_judged_or_read(
    monkeypatch: pytest.MonkeyPatch, fake: Fake, sentence: str
) -> None:
    as_fake(monkeypatch, fake)
    with pytest.raises(UserError, match=sentence):
        pipeline.prepare(asking("fake"))


def test_images_are_for_models_that_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(answer="2")
    monkeypatch.setattr(Fake, "images", True)
    as_fake(monkeypatch, fake)
    with pytest.raises(UserError, match="has images, but the model that is made here for 'countdown' reads text alone"):
        pipeline.prepare(asking("fake"))


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("other", "'countdown' and 'fake' write conversations in different chat templates"),
        (tasks.load("countdown").chat_template, "The task 'fake' has no solver"),
    ],
)
def test_tasks_that_cannot_be_demonstrated_beside_countdown(
    monkeypatch: pytest.MonkeyPatch, template: str, sentence: str
) -> None:
    as_fake(monkeypatch, Fake(template=template))
    with pytest.raises(UserError, match=sentence):
        demonstrated(start({"name": "fake"}), tasks.load("countdown"))


# ---------------------------------------------------------------------- warm starts


def key(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def test_models_that_are_in_the_cache_already_keep_their_key() -> None:
    """The keys that the recipes had before a warm start could learn several tasks."""
    countdown = recipes.load("dph_rl/countdown3")
    assert countdown.model.warm_start is not None
    task = tasks.load(countdown.task.name, countdown.task.options)
    assert key(identity_of(countdown.model.warm_start, [task], dtype="float32")) == "1368e8bc58f074c3"
    few = tasks.load("countdown", {"rows": 24, "eval_share": 0.4})
    assert key(identity_of(WarmStart(), [few], dtype="float32")) == "343d55416059335f"


def test_every_task_of_a_warm_start_is_part_of_its_key() -> None:
    def made(*also: dict[str, Any]) -> str:
        settings = start(*also)
        return key(identity_of(settings, demonstrated(settings, tasks.load("countdown")), dtype="float32"))

    keys = [made(), made(SUMS), made({**SUMS, "share": 0.3}), made({"name": "arithmetic"}), made(SUMS, SUMS)]
    assert len(set(keys)) == len(keys)


def test_demonstrations_are_of_all_tasks_in_their_shares() -> None:
    settings = start({**SUMS, "share": 0.25}, steps=10, batch_size=16)
    several = demonstrated(settings, tasks.load("countdown"))
    found = _demonstrations(settings, several)
    # 160 in all, a quarter of them sums
    kinds = [row["key"].partition(":")[0] for row, _ in found]
    assert (kinds.count("countdown"), kinds.count("arithmetic")) == (120, 40)
    held_out = {row["key"] for task in several for row in task.rows("eval")}
    assert not held_out & {row["key"] for row, _ in found}
    assert {row["answer"] for row, answer in found if "answer" in row and row["answer"] != answer} == set()


def test_the_alphabet_is_the_main_task_s_and_then_what_others_add() -> None:
    puzzles = {"name": "knights_knaves", "options": {"form": "symbols"}}
    several = demonstrated(start(puzzles), tasks.load("countdown"))
    assert alphabet_of(several) == "0123456789+-*=^?" + "ABCDEFGHKN!&|>#:;"
    settings = start(puzzles, hidden_size=16, intermediate_size=16, heads=2, layers=1, steps=2, batch_size=4)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(warm_start(settings, tasks.load("countdown"), dtype="float32"))
    assert tokenizer.convert_ids_to_tokens(range(3, 3 + 16)) == list("0123456789+-*=^?")
    for task in several:
        assert tokenizer.unk_token_id not in tokenizer(str(task.alphabet))["input_ids"]


def test_sequences_are_as_long_as_the_longest_task_needs(tiny_model: str) -> None:
    def needed(*tasks_: tuple[Sequence[tasks.Row], int]) -> int:
        rows = [{"prompt": [{"role": "user", "content": "123=4"}]}]
        return Engines(recipe(), tiny_model, rows, Workers(0, 1), further=tasks_).needed_length

    longer = [{"prompt": [{"role": "user", "content": "12+34+56="}]}, {"prompt": [{"role": "user", "content": "1"}]}]
    # ^123=4? and 8 tokens of answer; ^12+34+56=? and 4; one position for scoring
    assert needed() == 7 + 8 + 1
    assert needed((longer, 4)) == 7 + 8 + 1
    assert needed((longer, 5)) == 11 + 5 + 1


# ---------------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    pipeline.run(recipe(), out, resume=False, command="posttrain run small.yaml")
    return out


def test_a_run_evaluates_every_policy_on_every_task(finished: Path) -> None:
    models = set()
    for label in ("base", "grpo"):
        main = evaluate.load(finished / label / "evaluation")
        there = evaluate.load(finished / label / "evaluation" / "further" / "sums")
        assert there.label == f"{label} on sums"
        identity = {name: there.identity[name] for name in ("task", "n", "problems", "max_tokens", "seed", "model")}
        assert identity == {
            "task": "arithmetic", "n": 4, "problems": 6, "max_tokens": 4, "seed": main.seed,
            "model": main.identity["model"],
        }  # fmt: skip
        assert there.identity["verifier"] != main.identity["verifier"]
        assert there.n.tolist() == [4] * 6
        assert all(key.startswith("arithmetic:") for key in there.keys)
        models.add(there.identity["model"])
    assert len(models) == 2
    assert not list(finished.rglob("parts"))
    comparison = json.loads((finished / "comparison.json").read_text())
    sums = comparison["further"]["sums"]
    assert (sums["task"], sums["k"], sums["n"], set(sums["runs"])) == ("arithmetic", [1, 2], 4, {"base", "grpo"})
    # the mean of c / n over problems, from the samples themselves
    result = evaluate.load(finished / "grpo" / "evaluation" / "further" / "sums")
    assert sums["runs"]["grpo"]["pass_at_k"]["1"]["value"] == pytest.approx(result.c.mean() / 4, rel=1e-12)
    assert [change["run"] for change in sums["differences"]] == ["grpo", "grpo"]
    assert comparison["verdict"][-1].startswith("On sums, against base: grpo ")
    assert "<h2>On other tasks</h2>" in (finished / "report.html").read_text()


def test_an_interrupted_run_goes_on_where_a_further_task_stopped(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished / "grpo" / "evaluation"
    there = folder / "further" / "sums"
    before = (there / "samples.parquet").read_bytes()
    (there / "evaluation.json").unlink()
    (there / "samples.parquet").unlink()
    asked: list[int] = []
    sample = TransformersEngine.sample

    def counted(self: Any, prompts: Any, params: Any) -> Any:
        asked.append(len(prompts))
        return sample(self, prompts, params)

    monkeypatch.setattr(TransformersEngine, "sample", counted)
    pipeline.run(recipe(), finished, resume=True, command="")
    # the six sums, and nothing of the main task; drawn again as they were
    assert sum(asked) == 6
    assert (there / "samples.parquet").read_bytes() == before
    assert "On sums" in capsys.readouterr().out


def test_evaluate_asks_further_tasks_too(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.run_evaluate(recipe(), str(finished / "grpo" / "model"), tmp_path)
    ours, again = (
        evaluate.load(folder / "further" / "sums") for folder in (finished / "grpo" / "evaluation", tmp_path)
    )
    assert (ours.answers, ours.label) == (again.answers, again.label)
    out = capsys.readouterr().out
    assert "countdown: what each policy solves" in out
    assert "On sums" in out
    assert not (tmp_path / "measures").exists()


def test_the_report_draws_what_a_trainer_names(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles = {"completions/max_length": "longest answer, tokens"}
    monkeypatch.setattr(registry.load("method", "grpo").Trainer, "curves", titles, raising=False)
    pipeline.run(recipe(), finished, resume=True, command="")
    drawn = re.findall(r'aria-label="([^"]*) by step', (finished / "report.html").read_text())
    assert "mean reward" in drawn
    assert drawn[-1] == "longest answer, tokens"


def test_check_prints_further_tasks_and_names_mistakes(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from posttrain.cli import app

    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    done = CliRunner().invoke(app, ["check", str(path)])
    assert done.exit_code == 0, done.output
    printed = yaml.safe_load(done.output.partition("\n#")[0])
    assert printed["evaluation"]["further"]["sums"]["task"] == SUMS
    assert printed["model"]["warm_start"]["also"] == [{**SUMS, "share": None}]
    wrong = CliRunner().invoke(app, ["check", str(path), "--set", "evaluation.further.sums.task.name=aritmetic"])
    assert wrong.exit_code == 2
    assert "There is no task 'aritmetic'; did you mean 'arithmetic'?" in wrong.output
