"""Where a recipe's teacher can live, and what it reads: values against plain forwards, and what is refused when."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from posttrain import recipe as recipes
from posttrain.errors import UserError
from posttrain.launch import pipeline
from posttrain.launch.teaching import require_rows
from posttrain.rollouts.teacher import EngineTeacher, ModelTeacher, Reprompted, Routed
from posttrain.rollouts.tokens import encode
from tests.oracle import arguments, batch, dataset, length_reward, perturb, value_and_gradient
from tests.processes import finish
from tests.teachers import other_model
from tests.test_sharding import launcher, partitioning
from tests.test_vllm_server import make_model
from tests.two_places import taught

QUESTIONS = ["337=24", "1=1", "1234567=99", "12=3"]
ANSWERS = ["3*7+3", "1", "9*9+18", "1+2"]
ARGS: dict[str, Any] = {
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "max_steps": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "report_to": [],
}
LORA = {"r": 4, "alpha": 16}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The options of a task of eight rows, which teachers 'one' and 'two' share; the last has no note."""
    folder = tmp_path_factory.mktemp("rows")
    pairs = [*zip(QUESTIONS, ANSWERS, strict=True)] * 2
    lines = [
        {"prompt": f"{index}{question}", "answer": answer, "expert": "one" if index % 3 else "two", "note": None}
        for index, (question, answer) in enumerate(pairs)
    ]
    for line in lines[:-1]:
        line["note"] = "7"
    for name, content in (("train", lines), ("eval", [{**line, "prompt": f"9{line['prompt']}"} for line in lines[:3]])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))
    fields = {name: name for name in ("prompt", "answer", "expert", "note")}
    named = {name: str(folder / f"{name}.jsonl") for name in ("train", "eval")}
    return {**named, "fields": fields, "verifier": "exact"}


@pytest.fixture(scope="module")
def teacher(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a model that says other things than the student."""
    return saved(tiny_model, tmp_path_factory.mktemp("teacher"))


def saved(student: str, folder: Path, **changes: Any) -> str:
    model, tokenizer = other_model(student), AutoTokenizer.from_pretrained(student)
    for name, value in changes.items():
        setattr(tokenizer if name == "chat_template" else model.config, name, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def load(tiny_model: str, rows: dict[str, Any]) -> Any:
    def make(teacher: Any, **changes: Any) -> recipes.Recipe:
        content = {
            "name": "small",
            "model": {"path": tiny_model},
            "task": {"name": "files", "options": rows},
            "rollout": {"max_tokens": 6, "batch_size": 64},
            "evaluation": {"n": 4, "k": [1, 2], "resamples": 50},
            "method": {"name": "kdrl", "prompts_per_step": 2, "args": {**ARGS, "kd_coef": 0.5}},
            "teacher": teacher,
            **changes,
        }
        return recipes.validate(content, "small.yaml")

    return make


# ---------------------------------------------------------------- what the section cannot say


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({}, "teacher: name exactly one source"),
        ({"path": "a", "base": True}, "teacher: name exactly one source"),
        ({"self": True}, "teacher: the student has nothing to tell itself: give it a hint"),
        ({"base": True, "dtype": "float32"}, "teacher: dtype has no effect on the student's own model: remove it"),
        ({"base": True, "sharded": True}, "teacher: sharded has no effect on the student's own model"),
        ({"path": "a", "device": "cpu", "server": {}}, "teacher: device and server both say where the teacher is"),
        ({"path": "a", "device_map": "auto", "sharded": True}, "teacher: device_map and sharded both say where"),
        ({"path": "a", "device": "GPU 1"}, "teacher.device: string should match pattern"),
        ({"path": "a", "vllm": {"max_num_seqs": 8}}, "teacher: vllm settings are of a server that the run starts"),
        ({"path": "a", "server": {}, "vllm": {"sleep": True}}, "teacher: sleep is for vLLM beside a trainer"),
        (
            {"path": "a", "server": {"url": "http://x"}, "vllm": {"max_num_seqs": 8}},
            "teacher: vllm settings belong to the server that runs already",
        ),
        ({"path": "a", "server": {"url": "http://x", "devices": "1"}}, "teacher.server: devices are of a server that"),
        ({"path": "a", "server": {"transfer": "folder"}}, "teacher: a teacher's server takes no weights"),
        (
            {"path": "a", "server": {}, "batch_size": 2},
            "teacher: batch_size has no effect on a teacher behind a server",
        ),
        (
            {"warm_start": {}, "server": {"url": "http://x"}},
            "teacher: a server that runs already has no teacher that is made here",
        ),
        ({"path": "a", "by": "x"}, "teacher: by names the column that chooses among several teachers: give both or n"),
        ({"several": {"a": {"path": "a"}}}, "teacher: by names the column that chooses among several teachers"),
        (
            {"several": {"a": {"path": "a"}}, "by": "x", "dtype": "float32"},
            "teacher: dtype has no effect on several teachers: say it of each",
        ),
        (
            {"several": {"a": {"warm_start": {}}}, "by": "x"},
            "teacher: several teachers are there already: give 'a' a p",
        ),
        ({"several": {"a": {"path": "a", "sharded": True}}, "by": "x"}, "teacher: processes have different numbers of"),
        ({"several": {"a": {"pth": "a"}}, "by": "x"}, "unknown key 'teacher.several.a.pth'; did you mean 'path'?"),
        ({"path": "a", "hint": {"text": "{}"}}, "teacher.hint: '{}' names no column of the task rows"),
        ({"path": "a", "hint": {"text": "{answer.real}"}}, "teacher.hint: '{answer.real}' names no column"),
        ({"path": "a", "hint": {"text": "{answer"}}, "teacher.hint: the text is no template (expected '}' before end"),
        ({"base": True}, "recipe: teacher.base is the base of a LoRA student: set model.lora, or name a model (path)"),
        (
            {"path": "a", "sharded": True, "dtype": "bfloat16"},
            "a sharded teacher computes in the policy's dtype float32",
        ),
    ],
)
def test_the_section_contradicts_itself(load: Any, section: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load(section)
    assert str(caught.value).startswith("small.yaml: ") and sentence in str(caught.value)
    assert str(caught.value).count(". ") == 0, "one sentence"


def test_the_section_contradicts_the_rest(load: Any) -> None:
    with pytest.raises(UserError, match=r"a vLLM server scores at temperature 1 alone, and answers are drawn at 0\.7"):
        load({"path": "a", "server": {}}, rollout={"temperature": 0.7})
    for config in ("ddp", "zero2", "fsdp2"):
        with pytest.raises(UserError, match=f"by ZeRO-3, and launch.config is {config}: set it to zero3"):
            load({"path": "a", "sharded": True}, launch={"config": config, "processes": 2})
    with pytest.raises(UserError, match="two runs are called 'teacher-a'"):
        several = {"several": {"a": {"path": "a"}}, "by": "expert"}
        load(several, baselines=[{"name": "grpo", "called": "teacher-a"}])
    assert list(load(several).teachers) == ["teacher-a"]
    assert recipes.validate(load(several).model_dump(mode="json"), "again") == load(several)


@pytest.mark.parametrize(
    ("section", "changes", "sentence"),
    [
        (
            {"path": "TEACHER", "sharded": True},
            {},
            "and this is a launch with whole models: set launch.config to zero3",
        ),
        ({"path": "TEACHER", "device": "cuda:99"}, {}, "teacher.device is cuda:99, but this machine has "),
        ({"path": "TEACHER", "device": "toaster"}, {}, "teacher.device 'toaster' is not there ("),
        (
            {"path": "TEACHER", "server": {"url": "http://x"}},
            {"kd_estimator": "full"},
            r"'kdrl' compares whole distributions (kd_estimator = full), and a teacher behind a server gives only",
        ),
        (
            {"several": {"one": {"path": "TEACHER"}, "two": {"path": "TEACHER"}}, "by": "expert"},
            {"kd_estimator": "topk", "kd_topk_tail": False},
            "compares whole distributions (kd_estimator = topk), and several teachers give only",
        ),
        (
            {"several": {"one": {"path": "TEACHER"}}, "by": "expert"},
            {},
            "There is no teacher 'two' (column 'expert')",
        ),
        (
            {"several": {name: {"path": "TEACHER"} for name in ("one", "two", "three")}, "by": "expert"},
            {},
            "No row of the task 'files' is for the teacher 'three' (expert): remove it.",
        ),
        (
            {"several": {"one": {"path": "TEACHER"}}, "by": "experts"},
            {},
            "it has no column 'experts'; did you mean 'expert'?",
        ),
        (
            {"path": "TEACHER", "hint": {"text": "{anser}", "role": "user"}},
            {},
            "names the field 'anser', which the task's rows do not have; did you mean 'answer'?",
        ),
        (
            {"path": "TEACHER", "hint": {"text": "{note}", "role": "user"}},
            {},
            "The teacher's hint names the column 'note', which is empty in row 7 of the task 'files'",
        ),
    ],
)
def test_what_cannot_be_is_said_before_models_load(
    load: Any, teacher: str, section: dict[str, Any], changes: dict[str, Any], sentence: str
) -> None:
    content = json.loads(json.dumps(section).replace("TEACHER", teacher))
    method = {"name": "kdrl", "prompts_per_step": 2, "args": {**ARGS, **changes}}
    with pytest.raises(UserError) as caught:
        pipeline.prepare(load(content, method=method))
    assert sentence in str(caught.value)


def test_answers_are_drawn_of_one_whole_model_without_a_hint(load: Any, teacher: str) -> None:
    sft = {"name": "sft", "args": {"per_device_train_batch_size": 4, "max_steps": 1}}
    hinted = {"path": teacher, "hint": {"text": "{answer}", "role": "user"}}
    with pytest.raises(UserError, match=r"'sft' is fine-tuned on the answers .* drawn without teacher\.hint: remove"):
        pipeline.prepare(load(hinted, method=sft))
    with pytest.raises(UserError, match=r"'sft' is fine-tuned on the answers .* takes one whole model of its own"):
        pipeline.prepare(load({"base": True}, method=sft, model={"path": teacher, "lora": LORA}))


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("zero3", "has its own mixture of rows for several teachers"),
        ("fsdp2", "must score equally many rows with them"),
        ("fsdp1", "FSDP 1 keeps the student's weights in parts"),
        ("zero2", None),
    ],
)
def test_processes_that_share_the_student_stay_in_step(
    load: Any, teacher: str, monkeypatch: pytest.MonkeyPatch, kind: str, sentence: str | None
) -> None:
    from posttrain.launch import teaching

    monkeypatch.setattr(teaching, "requested", lambda: kind)
    section = {"several": {"one": {"path": teacher}, "two": {"base": True}}, "by": "expert"}
    recipe = load(section, model={"path": teacher, "lora": LORA})
    if sentence is None:
        pipeline.prepare(recipe)
        return
    with pytest.raises(UserError, match=sentence):
        pipeline.prepare(recipe)


def test_check_prints_what_is_wrong(load: Any, tmp_path: Path) -> None:
    from posttrain.cli import app

    recipe = tmp_path / "recipe.yaml"
    for section, sentence in (
        ({"path": "nowhere/at-all", "server": {}, "batch_size": 8}, "batch_size has no effect on a teacher behind"),
        ({"path": "nowhere/at-all", "server": {"url": "http://x"}}, "compares whole distributions"),
    ):
        method = {"name": "kdrl", "prompts_per_step": 2, "args": {**ARGS, "kd_estimator": "full"}}
        content = {**load({"path": "a"}, method=method).model_dump(mode="json"), "teacher": section}
        recipe.write_text(json.dumps(content))
        result = CliRunner().invoke(app, ["check", str(recipe)])
        assert result.exit_code and sentence in " ".join(result.output.split())


# ---------------------------------------------------------------- what they read and say


def plain(model: Any, prompt: list[int], completion: list[int]) -> Tensor:
    """log π [T] of a completion after a prompt."""
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
    logps = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
    return logps.gather(1, torch.tensor(completion)[:, None])[:, 0]


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def asked(trainer: Any) -> tuple[list[list[int]], list[list[int]], list[dict[str, Any]]]:
    """The student's prompts, completions and rows."""
    rows = list(trainer.train_dataset)
    tokenizer = trainer.processing_class
    return [encode(tokenizer, row["prompt"]) for row in rows], [ids(tokenizer, "1+23*4") for _ in rows], rows


def require_says(found: Tensor, models: list[Any], prompts: list[list[int]], completions: list[list[int]]) -> None:
    wanted = [plain(*each) for each in zip(models, prompts, completions, strict=True)]
    torch.testing.assert_close(found, torch.stack(wanted), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "place",
    [{"device": "cpu", "batch_size": 3}, {"device_map": {"": "cpu"}, "dtype": "float32"}, {"device_map": "auto"}],
)
def test_a_model_beside_the_trainer(load: Any, teacher: str, tmp_path: Path, place: dict[str, Any]) -> None:
    _, trainer = taught(load({"path": teacher, **place}), tmp_path)
    assert isinstance(trainer.teacher, ModelTeacher) and trainer.teacher.concurrent
    assert trainer.teacher.batch_size == place.get("batch_size", 64)
    prompts, completions, rows = asked(trainer)
    found = trainer.teacher.score(prompts, completions, rows).logps
    model = AutoModelForCausalLM.from_pretrained(teacher)
    require_says(found, [model] * 8, prompts, completions)


def test_the_base_of_a_lora_student(load: Any, tiny_model: str, tmp_path: Path) -> None:
    _, trainer = taught(load({"base": True}, model={"path": tiny_model, "lora": LORA}), tmp_path)
    perturb(trainer)  # adapters and base alike: what the adapters do is left out, whatever it is
    prompts, completions, rows = asked(trainer)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_" not in name:
                clean = name.removeprefix("base_model.model.").replace(".base_layer", "")
                base.get_parameter(clean).copy_(parameter)
    found = trainer.teacher.score(prompts, completions, rows).logps
    require_says(found, [base] * 8, prompts, completions)
    assert float((found[0] - plain(trainer.model, prompts[0], completions[0])).abs().max()) > 0.01, "adapters count"
    assert not trainer.teacher.concurrent


def test_the_student_with_a_hint_is_the_student_of_now(load: Any, tiny_model: str, tmp_path: Path) -> None:
    hint = {"text": "{answer}-", "role": "user"}
    _, trainer = taught(load({"self": True, "hint": hint}), tmp_path)
    prompts, completions, rows = asked(trainer)
    before = trainer.teacher.score(prompts, completions, rows).logps
    perturb(trainer)
    found = trainer.teacher.score(prompts, completions, rows).logps
    assert float((found - before).abs().max()) > 0.01, "it moves with the student"
    told = [ids(trainer.processing_class, f"^{row['answer']}-{row['prompt'][0]['content']}?") for row in rows]
    require_says(found, [trainer.model] * 8, told, completions)
    assert float((found - trainer.teacher.teacher.score(prompts, completions).logps).abs().max()) > 0.01


def test_each_of_several_reads_its_own_rows_and_hint(load: Any, tiny_model: str, teacher: str, tmp_path: Path) -> None:
    section = {
        "by": "expert",
        "several": {"one": {"path": teacher, "hint": {"text": "{answer}", "role": "user"}}, "two": {"base": True}},
    }
    teachers, trainer = taught(load(section, model={"path": tiny_model, "lora": LORA}), tmp_path)
    assert isinstance(trainer.teacher, Routed) and not trainer.teacher.concurrent
    prompts, completions, rows = asked(trainer)
    assert [row["expert"] for row in rows] == ["two", "one", "one", "two", "one", "one", "two", "one"]
    one, two = (AutoModelForCausalLM.from_pretrained(path) for path in (teacher, tiny_model))
    told = [
        ids(trainer.processing_class, f"^{row['answer']}{row['prompt'][0]['content']}?")
        if row["expert"] == "one"
        else p
        for row, p in zip(rows, prompts, strict=True)
    ]
    models = [one if row["expert"] == "one" else two for row in rows]
    require_says(trainer.teacher.score(prompts, completions, rows).logps, models, told, completions)
    assert sorted(teachers.paths) == ["teacher-one", "teacher-two"]


def test_a_teacher_of_another_chat_template(load: Any, tiny_model: str, tmp_path: Path) -> None:
    other = saved(
        tiny_model,
        tmp_path / "other",
        chat_template="{% for message in messages %}*{{ message['content'] }}={% endfor %}",
    )
    with pytest.raises(UserError, match="has another chat template than the student: choose the template"):
        taught(load({"path": other}), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(other)
    for template in ("student", "teacher"):
        _, trainer = taught(load({"path": other, "template": template}), tmp_path)
        prompts, completions, rows = asked(trainer)
        found = trainer.teacher.score(prompts, completions, rows).logps
        if template == "teacher":
            prompts = [ids(trainer.processing_class, f"*{row['prompt'][0]['content']}=") for row in rows]
        assert isinstance(trainer.teacher, Reprompted) == (template == "teacher")
        require_says(found, [model] * 8, prompts, completions)


def test_settings_without_effect_on_this_teacher_are_refused(load: Any, teacher: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"teacher\.template has no effect on the teacher .* the student's chat template"
    ):
        taught(load({"path": teacher, "template": "teacher"}), tmp_path)
    with pytest.raises(UserError, match=r"leaves the teacher's hint out of its prompts: set hint\.role to user"):
        taught(load({"path": teacher, "hint": {"text": "{answer}"}}), tmp_path)  # no system messages in this template


def test_the_context_must_hold_the_hint(load: Any, tiny_model: str, tmp_path: Path) -> None:
    """The longest: ^ 9 1234567=99 ? is 14 tokens for evaluation; with 9*9+18= in front of 2 1234567=99 it is 20."""
    hint = {"text": "{answer}=", "role": "user"}
    enough = saved(tiny_model, tmp_path / "enough", max_position_embeddings=20 + 6)
    short = saved(tiny_model, tmp_path / "short", max_position_embeddings=20 + 5)
    taught(load({"path": enough, "hint": hint}), tmp_path)
    taught(load({"path": short}), tmp_path)
    with pytest.raises(UserError, match=r"reads 25 tokens, but the longest prompt and completion have 26 together"):
        taught(load({"path": short, "hint": hint}), tmp_path)


@pytest.mark.parametrize("hidden", [32, 64])
def test_a_vllm_engine_of_the_policy_measures_teachers_of_its_shape_alone(
    load: Any, tiny_model: str, tmp_path: Path, hidden: int
) -> None:
    teachers, _ = taught(load({"path": make_model(tmp_path / "other", tied=True, hidden=hidden)}), tmp_path)
    assert teachers._why_unmeasured("teacher") is None, "transformers"
    for engine in ("vllm_colocate", "vllm_server"):
        rollout = recipes.Rollout(engine=engine)
        teachers.job = replace(teachers.job, recipe=teachers.job.recipe.model_copy(update={"rollout": rollout}))
        reason = f"the engine {engine} holds the policy, and takes other weights of its shape from a folder alone"
        assert teachers._why_unmeasured("teacher") == (None if hidden == 32 else reason)


def test_no_prompt_of_its_own_and_no_server_for_images(load: Any) -> None:
    task: Any = SimpleNamespace(name="shapes", images=True)
    for section, name in (
        ({"path": "a", "hint": {"text": "x"}}, "hint"),
        ({"path": "a", "server": {}}, "server"),
        ({"path": "a", "template": "teacher"}, "template"),
    ):
        with pytest.raises(
            UserError, match=rf"'shapes' hold images, which a teacher with {name} does not read: remove"
        ):
            require_rows(load(section), [{}], task)
    require_rows(load({"path": "a", "template": "student"}), [{}], task)


# ---------------------------------------------------------------- a whole run


def test_a_run_with_several_teachers(
    load: Any, tiny_model: str, teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = {
        "by": "expert",
        "several": {
            "one": {"path": teacher, "hint": {"text": "{answer}", "role": "user"}, "device": "cpu"},
            "two": {"base": True},
        },
    }
    evaluation = {"n": 4, "k": [1, 2], "resamples": 50, "divergence": {"names": ["reverse_kl"], "answers": 1}}
    recipe = load(section, model={"path": tiny_model, "lora": LORA}, evaluation=evaluation)
    pipeline.run(recipe, tmp_path / "out", resume=False, command="posttrain run small.yaml")
    history = json.loads((tmp_path / "out/kdrl/history.json").read_text())
    assert history[0]["kd/log_ratio_abs"] > 0.01
    comparison = json.loads((tmp_path / "out/comparison.json").read_text())
    assert list(comparison["runs"]) == ["base", "teacher-one", "kdrl"]
    assert comparison["runs"]["teacher-one"]["model"] != comparison["runs"]["base"]["model"]
    assert "teacher-two is not evaluated: it is the initial policy, base" in capsys.readouterr().err


# ---------------------------------------------------------------- behind a server


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, str]]:
    """Student, teacher and the teacher's server; the teacher is wider."""
    pytest.importorskip("vllm")
    from posttrain.launch.serve import ServerProcess
    from posttrain.recipe import Vllm

    folder = tmp_path_factory.mktemp("served")
    student = make_model(folder / "student", tied=False)
    teacher = make_model(folder / "teacher", tied=False, hidden=96)
    with ServerProcess(teacher, vllm=Vllm(max_model_len=64, max_num_seqs=16)) as process:
        yield student, teacher, process.url


@pytest.mark.parametrize("method", ["kdrl", "rlad"])
def test_losses_with_a_teacher_behind_a_server_are_those_with_it_here(
    served: tuple[str, str, str], tmp_path: Path, method: str
) -> None:
    from posttrain.rollouts.vllm_server import VLLMServerEngine
    from posttrain.trainers.kdrl import KDRLConfig, KDRLTrainer
    from posttrain.trainers.rlad import RLADConfig, RLADTrainer

    student, teacher, url = served
    engine = VLLMServerEngine.connect(url, path=teacher)
    local = ModelTeacher.load(teacher, device="cpu")
    found = {}
    try:
        for name, each in (("here", local), ("there", EngineTeacher(engine, local.vocabulary))):
            options: dict[str, Any] = {"model": student, "reward_funcs": length_reward, "train_dataset": dataset()}
            trainer: Any
            if method == "kdrl":
                args = KDRLConfig(**arguments(tmp_path, kd_coef=0.5, kd_estimator="k2"))
                trainer = KDRLTrainer(args=args, teacher=each, **options)
            else:
                trainer = RLADTrainer(args=RLADConfig(**arguments(tmp_path)), teacher=each, **options)
            perturb(trainer)
            trainer.current_gradient_accumulation_steps = 1
            inputs = batch(trainer, seed=5, beta=0.0, sampler=False)
            trainer.raw_rewards = torch.arange(8.0)
            with torch.no_grad():
                extra = trainer.annotate(inputs, [{}] * 8)
            trainer._extra_keys = tuple(extra)
            found[name] = (*value_and_gradient(trainer, {**inputs, **extra}), extra["teacher_logps"])
            without = {**extra, "teacher_logps": extra["teacher_logps"] - 0.5}
            moved, _ = value_and_gradient(trainer, {**inputs, **without})
            assert abs(float(moved - found[name][0])) > 1e-3, "the teacher counts"
    finally:
        engine.close()
    for one, two in zip(found["here"], found["there"], strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=0)


def test_a_run_with_a_teacher_behind_a_server(
    load: Any, served: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, teacher, url = served
    model, out = {"path": student}, tmp_path / "out"
    wrong = load({"path": student, "server": {"url": url, "start_timeout": 5.0}}, model=model)
    with pytest.raises(UserError, match=r"serves .*/teacher, but the model here is .*/student"):
        pipeline.run(wrong, tmp_path / "wrong", resume=False, command="")
    assert not (tmp_path / "wrong/base").exists(), "before anything slow"
    section = {"path": teacher, "server": {"url": url}, "hint": {"text": "{answer}", "role": "user"}}
    method = {"name": "rlad", "prompts_per_step": 2, "args": ARGS}
    pipeline.run(load(section, model=model, method=method), out, resume=False, command="")
    history = json.loads((out / "rlad/history.json").read_text())
    assert history[0]["trrd/log_ratio_abs"] > 0.01
    assert list(json.loads((out / "comparison.json").read_text())["runs"]) == ["base", "rlad"]
    assert "teacher is not evaluated: it is behind a vLLM server, and the others" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"takes 64 tokens \(prompt and answer together\), but 65 are needed"):
        taught(load(section, model=model, rollout={"max_tokens": 65 - 1 - 19}), tmp_path)


@pytest.mark.slow
def test_a_run_starts_and_stops_the_server_of_its_teacher(load: Any, own_cache: Path, tmp_path: Path) -> None:
    """Made here, then behind a server that samples, too: for the evaluation of a run on a server of its own."""
    pytest.importorskip("vllm")
    start = {"hidden_size": 64, "intermediate_size": 64, "heads": 2, "steps": 20, "batch_size": 16}
    section = {"warm_start": {**start, "layers": 3}, "server": {}, "vllm": {"max_num_seqs": 16}}
    countdown = {"name": "countdown", "options": {"rows": 24, "eval_share": 0.4}}
    rollout = {"max_tokens": 8, "engine": "vllm_server", "vllm": {"max_num_seqs": 16}}
    recipe = load(section, model={"warm_start": start}, task=countdown, rollout=rollout)
    out = tmp_path / "out"
    pipeline.run(recipe, out, resume=False, command="")
    assert json.loads((out / "kdrl/history.json").read_text())[0]["kd/log_ratio_abs"] > 0.01
    assert list(json.loads((out / "comparison.json").read_text())["runs"]) == ["base", "teacher", "kdrl"]
    logs = [(out / name).read_text() for name in ("server.log", "teacher.log")]
    assert all("Application startup complete" in log or "Started server process" in log for log in logs)
    for folder in ("kdrl", "teacher"):
        assert (out / folder).is_dir()
    shutil.rmtree(out / "base/evaluation/measures", ignore_errors=True)
    pipeline.run(recipe, out, resume=False, command="")  # all is there: no server is started


# ---------------------------------------------------------------- split over two processes


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zero3", "fsdp2"])
def test_split_teachers_say_what_whole_ones_say(
    load: Any, tiny_model: str, teacher: str, tmp_path: Path, kind: str
) -> None:
    """A teacher that is split as the student is, and the base of a student that is: each process has other rows."""
    method = {"name": "kdrl", "prompts_per_step": 2, "args": {**ARGS, "per_device_train_batch_size": 4}}
    shared = {"method": method, "launch": {"processes": 2}}
    adapted = {"model": {"path": tiny_model, "lora": LORA}, **shared}
    asked = {"base": load({"base": True, "batch_size": 4}, **adapted)}
    config = recipes.RECIPES / "accelerate" / "fsdp2.yaml"
    if kind == "zero3":
        config = partitioning(tmp_path)
        asked["sharded"] = load({"path": teacher, "sharded": True, "batch_size": 4}, **shared)
    files = [tmp_path / f"{name}.yaml" for name in asked]
    for file in files:
        file.write_text(asked[file.stem].to_yaml())
    finish([*launcher(config), "-m", "tests.two_places", *map(str, files)])
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*-[01].json")}
    assert set(found) == {f"{name}-{rank}" for name in asked for rank in "01"}
    for name, said in found.items():
        assert said["gap"] < 1e-5 < 0.1 < said["spread"], name
        assert said["share"] < 0.55, "half of the weights; FSDP2 leaves the embedding whole between forwards"
        assert kind != "zero3" or said["kept"] == 0, "released"
        first, second = said["log"]
        assert first < 1e-5 < second if name.startswith("base") else min(first, second) > 0.01
