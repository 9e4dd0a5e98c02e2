"""SFT on verified answers: which are learned, what their loss is, and whole runs beside other methods."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from datasets.table import InMemoryTable
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from posttrain import recipe as recipes
from posttrain.cli.check import batch_identity
from posttrain.errors import UserError
from posttrain.evaluation import evaluate
from posttrain.launch import pipeline
from posttrain.launch.resolve import every_run, resolve
from posttrain.rollouts.answers import AnswerSet, from_store
from posttrain.rollouts.store import Store
from posttrain.rollouts.tokens import encode
from posttrain.seams.callbacks import StopOnInterrupt
from posttrain.tasks import Row
from posttrain.trainers.sft import VerifiedSFTConfig, VerifiedSFTTrainer
from tests import small
from tests.processes import finish
from tests.test_pairs import Answer, rows_of, write_store


@pytest.fixture(scope="module")
def tokenizer(tiny_model: str) -> PreTrainedTokenizerBase:
    """One token per character, so an answer of n characters that ended has n + 1 tokens."""
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_model)
    return loaded


# ------------------------------------------------------------------ which answers

DRAWN: list[list[Answer]] = [
    [("1", 1.0), ("22", 1.0), ("1", 1.0), ("3", 0.0), ("44", None), ("55", 1.0, "length")],
    [("6", 0.0), ("7", 0.0, "length"), ("8", 0.5), ("9", 0.0), ("9", 0.0), ("9", 0.0)],
    [("1234", 1.0), ("5", 1.0), ("5", 1.0), ("5", 1.0), ("2", 1.0), ("2", 1.0)],
]
"""Three prompts of six answers: 2, 0 and 3 correct ones that ended and differ; four copies of others."""


def write(folder: Path, tokenizer: PreTrainedTokenizerBase, drawn: Sequence[Sequence[Answer]] = DRAWN) -> Store:
    return write_store(folder, rows_of(len(drawn)), drawn, tokenizer)


def texts(answers: AnswerSet, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Prompt and answer of every row, special tokens written out, as `prompt|answer`."""
    found = []
    for row in answers.table.to_pylist():
        start = row["completion_mask"].index(1)
        assert row["completion_mask"] == [0] * start + [1] * (len(row["input_ids"]) - start)
        prompt, answer = row["input_ids"][:start], row["input_ids"][start:]
        found.append(f"{tokenizer.decode(prompt)}|{tokenizer.decode(answer)}")
    return found


def test_correct_answers_that_ended_are_taken_once(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    answers = from_store(write(tmp_path, tokenizer), rows_of(3), tokenizer)
    assert texts(answers, tokenizer) == [
        "^0?|1<eos>",
        "^0?|22<eos>",
        "^2?|1234<eos>",
        "^2?|5<eos>",
        "^2?|2<eos>",
    ]
    assert answers.counts == {
        "prompts": 3,
        "with_answers": 2,
        "answers": 18,
        "truncated": 2,
        "wrong": 7,
        "repeated": 4,
        "too_long": 0,
        "cut": 0,
        "taken": 5,
    }
    assert str(answers) == (
        "2 of 3 prompts have a correct answer; 5 of 18 answers kept (7 wrong, 2 cut off, 4 repeated)"
    )


def test_repeated_answers_can_be_kept(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Then they stand in the proportions in which they were drawn; those of the last prompt are 1, 3 and 2 of six."""
    store, rows = write(tmp_path, tokenizer), rows_of(3)
    answers = from_store(store, rows, tokenizer, keep_repeated=True)
    found = texts(answers, tokenizer)
    assert [found.count(f"^2?|{text}<eos>") for text in ("1234", "5", "2")] == [1, 3, 2]
    assert (answers.counts["taken"], answers.counts["repeated"]) == (9, 0)
    limited = from_store(store, rows, tokenizer, keep_repeated=True, per_prompt=4)
    assert (limited.counts["taken"], limited.counts["cut"]) == (7, 2)


def test_answers_are_the_tokens_that_were_drawn(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A token that its text does not show stays; the same text in other tokens is another answer."""
    store = write(tmp_path, tokenizer, [[("1", 1.0), ("1", 1.0)]])
    import pyarrow as pa
    import pyarrow.parquet as pq

    from posttrain import atomic

    one, end, hidden = tokenizer.convert_tokens_to_ids(["1", "<eos>", "<unk>"])
    table = pq.read_table(tmp_path / "samples.parquet")
    ids = pa.array([[hidden, one, end], [one, end]], pa.list_(pa.int32()))
    atomic.write_table(tmp_path / "samples.parquet", table.set_column(1, "token_ids", ids))
    answers = from_store(store, rows_of(1), tokenizer)
    prompt = encode(tokenizer, rows_of(1)[0]["prompt"])
    assert answers.table["input_ids"].to_pylist() == [[*prompt, hidden, one, end], [*prompt, one, end]]


def test_at_most_so_many_of_a_prompt(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Drawn by seed and prompt: over 300 seeds each of the prompt's three is taken about 200 times."""
    store, rows = write(tmp_path, tokenizer), rows_of(3)
    taken: dict[str, int] = {}
    for seed in range(300):
        answers = from_store(store, rows, tokenizer, per_prompt=2, seed=seed)
        assert answers.counts["cut"] == 1
        first, second, *others = texts(answers, tokenizer)
        assert (first, second) == ("^0?|1<eos>", "^0?|22<eos>")
        assert len(others) == 2
        for text in others:
            taken[text] = taken.get(text, 0) + 1
    assert len(taken) == 3
    assert all(abs(count - 200) < 41 for count in taken.values())  # five standard deviations of √(300·⅔·⅓) = 8.2
    again = from_store(store, rows[::-1], tokenizer, per_prompt=2, seed=299)
    assert texts(again, tokenizer) == [*others, first, second]


def test_what_is_too_long_is_left_out_and_never_cut(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Prompts have 3 tokens: within 6, answers of up to two characters and their end fit."""
    answers = from_store(write(tmp_path, tokenizer), rows_of(3), tokenizer, max_length=6)
    assert texts(answers, tokenizer) == ["^0?|1<eos>", "^0?|22<eos>", "^2?|5<eos>", "^2?|2<eos>"]
    assert (answers.counts["too_long"], answers.counts["with_answers"]) == (1, 2)


@pytest.mark.parametrize(
    ("drawn", "options", "sentence"),
    [
        ([[("1", 0.0), ("2", None)]], {}, r"from among 2 \(wrong or without a verdict: 2\): take an easier task"),
        (
            [[("1", 0.0), ("2", 1.0, "length"), ("3", 0.0, "length")]],
            {},
            r"\(cut off: 2, wrong or without a verdict: 1\): raise rollout.max_tokens",
        ),
        ([[("1", 1.0)]], {"max_length": 4}, r"longer than max_length with their prompt: 1\): raise method.args.max_l"),
    ],
)
def test_a_store_without_anything_to_learn_is_refused(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    drawn: list[list[Answer]],
    options: dict[str, Any],
    sentence: str,
) -> None:
    store = write(tmp_path, tokenizer, drawn)
    with pytest.raises(UserError, match=sentence):
        from_store(store, rows_of(1), tokenizer, **options)


def test_prompts_that_were_never_answered_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="1 of 4 training prompts are not in the store"):
        from_store(write(tmp_path, tokenizer), rows_of(4), tokenizer)


# ------------------------------------------------------------------ the loss


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 5,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        **changes,
    }


def build(model: str, folder: Path, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> VerifiedSFTTrainer:
    """A trainer on the five answers of `DRAWN`."""
    answers = from_store(write(folder / "store", tokenizer), rows_of(3), tokenizer)
    data = Dataset(InMemoryTable(answers.table))
    return VerifiedSFTTrainer(model, args=VerifiedSFTConfig(**arguments(folder, **changes)), train_dataset=data)


LENGTHS = [2, 3, 5, 2, 2]
"""Tokens of the five answers, the end included; their prompts have three each."""


def by_hand(folder: str, rows: Sequence[Sequence[int]], *, prompt: int) -> tuple[Tensor, Tensor]:
    """Mean of −log π over the tokens after the first `prompt` of every row, and its gradient, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    nll = []
    for row in rows:
        ids = torch.tensor([list(row)])
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        nll.append(-logps.gather(1, ids[0, 1:, None])[prompt - 1 :, 0])
    loss = torch.cat(nll).mean()
    loss.backward()
    return loss.detach(), torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()])


def test_the_loss_is_the_mean_over_answer_tokens_and_prompts_have_no_gradient(
    tmp_path: Path, tiny_model: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = build(tiny_model, tmp_path, tokenizer)
    rows = [trainer.train_dataset[i]["input_ids"] for i in range(5)]
    assert [len(row) - 3 for row in rows] == LENGTHS
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    loss.backward()
    gradient = torch.cat([parameter.grad.reshape(-1) for parameter in trainer.model.parameters()])
    wanted, wanted_gradient = by_hand(tiny_model, rows, prompt=3)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=1e-4, atol=1e-6)
    with_prompts, other_gradient = by_hand(tiny_model, rows, prompt=1)
    assert abs(with_prompts - wanted) > 1e-3
    assert (other_gradient - wanted_gradient).abs().max() > 1e-3


def test_a_step_of_several_micro_batches_weighs_all_tokens_alike(
    tmp_path: Path, tiny_model: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Five micro-batches of one answer each: the loss is that of all 14 tokens, not the mean of five means."""
    trainer = build(
        tiny_model, tmp_path, tokenizer, per_device_train_batch_size=1, gradient_accumulation_steps=5, optim="sgd"
    )
    rows = [trainer.train_dataset[i]["input_ids"] for i in range(5)]
    wanted, gradient = by_hand(tiny_model, rows, prompt=3)
    apart = torch.stack([by_hand(tiny_model, [row], prompt=3)[0] for row in rows]).mean()
    assert abs(apart - wanted) > 1e-3
    before = torch.cat([parameter.detach().reshape(-1).clone() for parameter in trainer.model.parameters()])
    trainer.train()
    after = torch.cat([parameter.detach().reshape(-1) for parameter in trainer.model.parameters()])
    (log,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert log["loss"] == pytest.approx(wanted.item(), rel=1e-5)
    assert log["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-4)
    clipped = gradient / gradient.norm().clamp(min=1.0)
    torch.testing.assert_close((before - after).double() / 1e-3, clipped, rtol=1e-2, atol=1e-3)


def test_fine_tuning_makes_the_answers_likely(
    tmp_path: Path, tiny_model: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Forty steps on five answers to two prompts, equally often: at best log 2 and log 3 nats per answer remain."""
    trainer = build(tiny_model, tmp_path, tokenizer, max_steps=40, learning_rate=1e-2)
    rows = [trainer.train_dataset[i]["input_ids"] for i in range(5)]
    assert by_hand(tiny_model, rows, prompt=3)[0] > 2.0
    trainer.train()
    trainer.save_model(str(tmp_path / "tuned"))
    least = (2 * math.log(2) + 3 * math.log(3)) / sum(LENGTHS)
    assert least < by_hand(str(tmp_path / "tuned"), rows, prompt=3)[0] < least + 0.05


def test_the_trainer_has_a_config_of_its_own(tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = VerifiedSFTConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert (config.answers_of, config.per_prompt, config.max_length, config.completion_only_loss) == (
        "teacher",
        None,
        None,
        True,
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"answers_of": "student"}, "unknown answers_of 'student'; known: teacher, policy"),
        ({"repeated": "twice"}, "unknown repeated 'twice'; known: drop, keep"),
        ({"per_prompt": 0}, "per_prompt must be at least 1, got 0"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"completion_only_loss": False}, "completion_only_loss = False, but prompts carry no loss: leave it at True"),
        ({"assistant_only_loss": True}, "assistant_only_loss = True, but the answer is all"),
        ({"eos_token": "<unk>"}, "eos_token = '<unk>', but answers end as they were drawn"),
        ({"chat_template_path": "other"}, "chat_template_path = 'other', but prompts are those that were answered"),
        ({"dataset_text_field": "answer"}, "dataset_text_field = 'answer', but answers are token ids"),
        ({"loss_type": "dapo"}, "unknown loss_type 'dapo'; known: nll, dft"),
        ({"packing": True, "max_length": 64, "packing_strategy": "wrapped"}, "parts answers from their prompts"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        VerifiedSFTConfig(**arguments(tmp_path, **changes))


# ------------------------------------------------------------------ whole runs

WARM_START = {**small.WARM_START, "steps": 150}
ON_POLICY: dict[str, Any] = {
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_steps": 1,
    "report_to": [],
}
SMALL: dict[str, Any] = {
    **small.BEGINNING,
    "model": {"warm_start": WARM_START},
    "presample": {"samples_per_prompt": 6},
    "evaluation": {"prompts": 4, "n": 4, "k": [1, 2], "resamples": 50},
    "method": {"name": "grpo", "prompts_per_step": 2, "args": ON_POLICY},
    "teacher": {"warm_start": {**WARM_START, "hidden_size": 48}},
    "sweep": {
        "method": [
            {"name": "sft", "prompts_per_step": 8},
            {"name": "sft", "prompts_per_step": 8, "called": "own", "args": {"answers_of": "policy", "per_prompt": 2}},
            {"name": "kdrl"},
        ]
    },
}
ALONE: dict[str, Any] = {
    "sweep": {},
    "method": {
        "name": "sft",
        "prompts_per_step": 8,
        "args": {name: value for name, value in ON_POLICY.items() if name != "num_generations"},
    },
}
"""The recipe with fine-tuning on the teacher's answers as its only method."""
LABELS = ["sft", "own", "kdrl"]


@pytest.fixture(scope="module", autouse=True)
def cache(own_cache: Path) -> Path:
    return own_cache


def load(changes: dict[str, Any] | None = None) -> recipes.Recipe:
    content = {key: value for key, value in {**SMALL, **(changes or {})}.items() if value is not None}
    return recipes.validate(content, "small.yaml")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The folder of a finished sweep over methods."""
    out: Path = tmp_path_factory.mktemp("tuned") / "out"
    pipeline.run(load(), out, resume=False, command="posttrain run small.yaml")
    return out


def learned(out: Path, store: str, **options: Any) -> tuple[AnswerSet, list[Row], PreTrainedTokenizerBase]:
    """What a run in `out` learned of a store, its rows, and the policy's tokenizer."""
    rows = pipeline.prepare(load()).train_rows
    tokenizer = AutoTokenizer.from_pretrained(str(out / "sft" / "model"))
    return from_store(Store.open(out / store), rows, tokenizer, **options), rows, tokenizer


def history(out: Path, label: str) -> list[dict[str, float]]:
    return [entry for entry in json.loads((out / label / "history.json").read_text()) if "loss" in entry]


def test_all_methods_are_measured_beside_base_and_teacher(finished: Path) -> None:
    comparison = json.loads((finished / "comparison.json").read_text())
    assert list(comparison["runs"]) == ["base", "teacher", *LABELS]
    models = {label: evaluate.load(finished / label / "evaluation").identity["model"] for label in comparison["runs"]}
    assert len(set(models.values())) == 5
    for label in ("sft", "own"):
        assert len(history(finished, label)) == 3
        assert "mean_token_accuracy" in history(finished, label)[0]


def test_each_run_learns_the_answers_of_its_own_source(finished: Path) -> None:
    """The teacher's from the teacher's weights, the policy's from the policy's; no fresh ones of the teacher."""
    identities = {}
    for label, folder in (("teacher", "teacher/store"), ("base", "store")):
        store = Store.open(finished / folder)
        identities[label] = store.identity["model"]
        assert identities[label] == evaluate.load(finished / label / "evaluation").identity["model"]
    assert identities["teacher"] != identities["base"]
    counts = Store.open(finished / "teacher" / "store").counts
    assert (counts["explore"], counts["stored_answers"]) == (24, 0)


def test_everything_that_is_learned_is_correct_and_was_drawn(finished: Path) -> None:
    answers, rows, tokenizer = learned(finished, "teacher/store")
    verifier = pipeline.prepare(load()).require_verifier()
    by_prompt = {tuple(encode(tokenizer, row["prompt"])): row for row in rows}
    found = answers.table.to_pylist()
    assert len({tuple(row["input_ids"]) for row in found}) == len(found) == answers.counts["taken"] > 10
    for entry in found:
        start = entry["completion_mask"].index(1)
        ids = entry["input_ids"][start:]
        assert ids[-1] == tokenizer.eos_token_id
        row = by_prompt[tuple(entry["input_ids"][:start])]
        (verdict,) = verifier.score([tokenizer.decode(ids, skip_special_tokens=True)], [row])
        assert verdict.reward == 1.0
    assert answers.counts["wrong"] > 0  # so that there was something to leave out


def test_the_second_time_nothing_is_done_again_and_what_was_kept_is_said(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from posttrain.rollouts.transformers_engine import TransformersEngine

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("work was done again")

    monkeypatch.setattr(TransformersEngine, "sample", never)
    monkeypatch.setattr(VerifiedSFTTrainer, "train", never)
    before = (finished / "comparison.json").read_bytes()
    pipeline.run(load(), finished, resume=False, command="posttrain run small.yaml")
    assert (finished / "comparison.json").read_bytes() == before
    said = " ".join(capsys.readouterr().err.split())
    assert "presample teacher" in said
    answers, *_ = learned(finished, "teacher/store")
    assert f"sft: {answers}" in said
    own, *_ = learned(finished, "store", per_prompt=2)
    assert own.counts["cut"] > 0
    assert f"own: {own}" in said
    assert "[12/12] report" in said


def test_training_that_was_interrupted_ends_at_the_same_weights(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the second of three steps."""
    step = StopOnInterrupt.on_step_end

    def interrupt(self: StopOnInterrupt, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._asked = state.global_step == 2
        step(self, args, state, control, **kwargs)

    recipe = load(ALONE)
    with monkeypatch.context() as patch:
        patch.setattr(StopOnInterrupt, "on_step_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(recipe, tmp_path / "out", resume=False, command="")
    assert not (tmp_path / "out" / "sft" / "model").exists()
    pipeline.run(recipe, tmp_path / "out", resume=True, command="")
    file = Path("sft", "model", "model.safetensors")
    ours, theirs = (load_file(folder / file) for folder in (tmp_path / "out", finished))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0)


@pytest.mark.slow
def test_two_processes_learn_the_same(tmp_path: Path, finished: Path) -> None:
    """The teacher's store is that of one process, and batches of eight answers give its losses."""
    method = json.loads(json.dumps(ALONE["method"]))
    method["args"]["per_device_train_batch_size"] = 4
    path, out = tmp_path / "small.yaml", tmp_path / "out"
    content = {**SMALL, **ALONE, "method": method, "launch": {"processes": 2}}
    path.write_text(yaml.safe_dump(content))
    finish([sys.executable, "-m", "posttrain", "run", str(path), "--output-dir", str(out)], timeout=600)
    ours, theirs = (folder / "teacher" / "store" / "samples.parquet" for folder in (out, finished))
    assert ours.read_bytes() == theirs.read_bytes()
    for mine, one in zip(history(out, "sft"), history(finished, "sft"), strict=True):
        assert mine["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert mine["mean_token_accuracy"] == pytest.approx(one["mean_token_accuracy"], rel=1e-4)


# ------------------------------------------------------------------ before anything slow


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"teacher": None}, "The run 'sft' distils and needs a teacher"),
        (
            {
                "method": {"name": "sft", "args": {"answers_of": "policy"}},
                "teacher": {"warm_start": WARM_START},
            },
            "No run learns from the teacher",
        ),
        (
            {"teacher": {"warm_start": WARM_START, "method": {"name": "sft", "args": {"answers_of": "policy"}}}},
            "teacher.method 'sft' needs more than prompts",
        ),
        ({"method": {"name": "sft", "args": {"loss_type": "grpo"}}}, "unknown loss_type 'grpo'"),
    ],
)
def test_what_fine_tuning_cannot_be(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        pipeline.prepare(load({**ALONE, **changes}))


def test_a_served_policy_cannot_lend_its_engine_to_a_teacher(tmp_path: Path, tiny_model: str) -> None:
    changes = {
        **ALONE,
        "teacher": {"path": tiny_model},
        "model": {"path": tiny_model},
        "rollout": {"max_tokens": 8, "engine": "vllm_server", "server": {"url": "http://127.0.0.1:1"}},
    }
    with pytest.raises(UserError, match="answers_of = teacher draws answers of the teacher, and vllm_server serves"):
        pipeline.prepare(load(changes))


def test_prompts_with_images_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    job = pipeline.prepare(load(ALONE))
    monkeypatch.setattr(type(job.task), "images", True)
    with pytest.raises(UserError, match="The run 'sft' is fine-tuned on tokens alone, and prompts of the task"):
        pipeline._require_answers(job)


def test_a_method_beside_others_counts_answers() -> None:
    """2 prompts × 4 generations are 8 answers; a baseline says so, and without it takes the main method's number."""
    runs = {label: resolve(run) for label, run in every_run(load()).items()}
    assert {label: run.batch.prompts for label, run in runs.items()} == {"sft": 8, "own": 8, "kdrl": 2}
    assert batch_identity(runs["sft"].batch, pairs=False, answers=True).endswith("accumulation 1 = 8 answers")
    silent = load({"sweep": {}, "baselines": [{"name": "sft"}]})
    with pytest.raises(UserError, match=r"2 × 1 = 2 is no multiple of world × per-device = 1 × 8"):
        pipeline.prepare(silent)
