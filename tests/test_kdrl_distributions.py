"""KDRL by whole distributions: the trainer's loss is the one that logits would give, from one forward of each model.

The divergences by themselves are in tests/test_distillation.py and tests/test_vocabulary.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

from posttrain import recipe as recipes
from posttrain.errors import UserError
from posttrain.launch.pipeline import _dataset
from posttrain.objectives.vocabulary import Head
from posttrain.rollouts.teacher import EngineTeacher, ModelTeacher, Reprompted, Routed, hint
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.trainers.grpo import GRPOTrainer
from posttrain.trainers.kdrl import KDRLConfig, KDRLTrainer
from tests.oracle import PROMPTS, arguments, batch, dataset, length_reward, value_and_gradient
from tests.processes import finish
from tests.teachers import Shifted, other_model
from tests.test_kdrl import annotated, build, measured
from tests.test_sharding import launcher, partitioning
from tests.test_teacher import looked_at
from tests.tiny_vision import colour, tiny_vision
from tests.two_teachers import train

COEFFICIENT = 3.0


def inputs_of(trainer: Any, seed: int, **changes: Any) -> dict[str, Any]:
    return annotated(trainer, batch(trainer, seed=seed, beta=0.0, sampler=False), **changes)


def logps_by_token(model: Any, inputs: Mapping[str, Tensor], words: int | None, temperature: float) -> Tensor:
    """Of the completions' next-token distributions [B, T, V] in float64, from the logits of a plain forward."""
    logits = model(
        input_ids=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
    ).logits
    width = inputs["completion_ids"].size(1)
    return torch.log_softmax(logits[:, -width - 1 : -1, :words].double() / temperature, dim=-1)


def untied(path: str, folder: Path) -> str:
    """The same model with an output head of its own."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.get_input_embeddings().weight)
    model.save_pretrained(folder / "untied")
    AutoTokenizer.from_pretrained(path).save_pretrained(folder / "untied")
    return str(folder / "untied")


Divergence = Callable[[Tensor, Tensor], Tensor]
"""(log π_θ, log π_T) [B, T, V] → [B, T]."""


def reverse_kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def forward_kl(p: Tensor, q: Tensor) -> Tensor:
    return reverse_kl(q, p)


def js(p: Tensor, q: Tensor) -> Tensor:
    m = torch.logaddexp(p, q) - torch.tensor(2.0).log()
    return 0.5 * reverse_kl(p, m) + 0.5 * reverse_kl(q, m)


def plain(
    trainer: Any, inputs: Mapping[str, Tensor], divergence: Divergence, *, words: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """GRPO's loss plus β times the divergence, over all tokens, its gradient by autograd through logits, and the
    mean of the divergence over the tokens that are distilled."""
    trainer.model.train()
    trainer.model.zero_grad()
    own = logps_by_token(trainer.model, inputs, words, trainer.temperature)
    with torch.no_grad():
        theirs = logps_by_token(trainer.teacher.model, inputs, words, trainer.temperature)
    mask = inputs["completion_mask"]
    logps = logps_by_token(trainer.model, inputs, None, trainer.temperature)
    logps = logps.gather(2, inputs["completion_ids"][..., None])[..., 0]
    ratio, advantages = (logps - inputs["old_per_token_logps"]).exp(), inputs["advantages"][:, None]
    policy = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    kd, weights = divergence(own, theirs), inputs["kd_weights"]
    loss = ((policy + COEFFICIENT * weights * kd) * mask).sum() / mask.sum()
    loss.backward()  # type: ignore[no-untyped-call]
    gradient = torch.cat([p.grad.reshape(-1) for p in trainer.model.parameters() if p.grad is not None])
    kept = weights > 0
    return loss.detach().float(), gradient.clone(), kd[kept].mean().detach()


def require_equal(trainer: Any, inputs: dict[str, Any], divergence: Divergence, *, words: int | None = None) -> None:
    found = value_and_gradient(trainer, inputs)
    *wanted, mean = plain(trainer, inputs, divergence, words=words)
    grpo = value_and_gradient(trainer, {**inputs, "kd_weights": torch.zeros_like(inputs["kd_weights"])})
    assert (found[1] - grpo[1]).norm() > 0.05 * found[1].norm(), "the teacher counts"
    torch.testing.assert_close(found, tuple(wanted), rtol=1e-4, atol=2e-6)
    value_and_gradient(trainer, inputs)
    assert measured(trainer)["kd/divergence"] == pytest.approx(float(mean), rel=1e-4)


# ---------------------------------------------------------------- full


@pytest.mark.parametrize(
    ("name", "divergence", "temperature"),
    [
        ("reverse_kl", reverse_kl, 1.0),
        ("forward_kl", forward_kl, 0.7),
        ("js", js, 1.0),
        ("reverse_kl", reverse_kl, 1.4),
    ],
)
def test_full_is_what_logits_give(
    tiny_model: str, tmp_path: Path, name: str, divergence: Divergence, temperature: float
) -> None:
    """Value and gradient of the whole loss for every parameter, off-policy, with half of the answers distilled."""
    trainer = build(
        tiny_model,
        tmp_path,
        kd_estimator="full",
        kd_divergence=name,
        kd_coef=COEFFICIENT,
        kd_mask="response",
        temperature=temperature,
    )
    inputs = inputs_of(trainer, seed=1, rewards=(0.0, 1.0) * 4)
    assert inputs["teacher_hidden"].shape == (8, 6, 32)
    require_equal(trainer, inputs, divergence)
    assert 0.1 < measured(trainer)["kd/mask_fraction"] < 0.9


def test_alpha_lies_between_the_two_kl(tiny_model: str, tmp_path: Path) -> None:
    """(Σ p^{1−α} q^α − 1)/(α(α − 1)) with α = 0.3."""
    trainer = build(
        tiny_model, tmp_path, kd_estimator="full", kd_divergence="alpha", kd_divergence_alpha=0.3, kd_coef=COEFFICIENT
    )
    require_equal(
        trainer,
        inputs_of(trainer, seed=2),
        lambda p, q: ((0.7 * p + 0.3 * q).exp().sum(-1) - 1.0) / (0.3 * (0.3 - 1.0)),
    )


def test_distillation_alone_by_full_vocabulary(tiny_model: str, tmp_path: Path) -> None:
    """`kd_only` with `full` is the token mean of the divergence, whatever the advantages are."""
    trainer = build(tiny_model, tmp_path, kd_estimator="full", kd_divergence="forward_kl", kd_only=True)
    inputs = inputs_of(trainer, seed=3)
    loss, gradient = value_and_gradient(trainer, inputs)
    other = value_and_gradient(trainer, {**inputs, "advantages": -3 * inputs["advantages"]})
    torch.testing.assert_close(other, (loss, gradient), rtol=0, atol=0)
    with torch.no_grad():
        own, theirs = (logps_by_token(each, inputs, None, 1.0) for each in (trainer.model, trainer.teacher.model))
    mask = inputs["completion_mask"]
    wanted = float((forward_kl(own, theirs) * mask).sum() / mask.sum())
    assert float(loss) == pytest.approx(wanted, rel=1e-5)
    assert measured(trainer)["kd/divergence"] == pytest.approx(wanted, rel=1e-5)
    assert measured(trainer)["kd/coef"] == 1.0


def test_heads_padded_to_different_sizes_are_compared_over_the_tokenizers_words(
    tiny_model: str, tmp_path: Path
) -> None:
    """128 rows against 136, as Qwen's sizes differ; what both models say of their padding rows does not count."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    words = max(tokenizer.get_vocab().values()) + 1
    assert words < 128
    models = {}
    for rows in (128, 136):
        torch.manual_seed(rows)
        models[rows] = other_model(tiny_model, seed=rows)
        models[rows].resize_token_embeddings(rows)
    models[128].save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    settings: dict[str, Any] = {"kd_estimator": "full", "kd_coef": COEFFICIENT, "learning_rate": 1e-2}
    trainer = build(str(tmp_path / "student"), tmp_path, Shifted(models[136]), **settings)
    inputs = batch(trainer, seed=4, beta=0.0, sampler=False)
    for name in ("prompt_ids", "completion_ids"):
        inputs[name] = inputs[name].clamp(max=words - 1)
    with torch.no_grad():  # of the tokens as they are now
        inputs["old_per_token_logps"] = (
            logps_by_token(trainer.model, inputs, None, 1.0)
            .float()
            .gather(2, inputs["completion_ids"][..., None])[..., 0]
            * inputs["completion_mask"]
        )
    require_equal(trainer, annotated(trainer, inputs), reverse_kl, words=words)
    trainer.model.generation_config.suppress_tokens = list(range(words, 128))
    trainer.train()
    assert trainer.state.global_step == 2
    assert all(log["kd/divergence"] > 0 for log in trainer.state.log_history if "kd/coef" in log)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 3.0}),
    ],
)
def test_heads_that_scale_or_cap_their_logits(
    tiny_model: str, tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = AutoConfig.for_model(
        kind,
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **changes,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    path = str(tmp_path / "student")
    teacher = Shifted(other_model(path, scale=0.3))
    trainer = build(path, tmp_path, teacher, kd_estimator="full", kd_divergence="js", kd_coef=COEFFICIENT)
    require_equal(trainer, inputs_of(trainer, seed=5), js)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_students(tiny_model: str, tmp_path: Path, checkpointing: bool) -> None:
    """Only adapters have a gradient, and it is the plain one."""
    trainer = KDRLTrainer(
        model=tiny_model,
        reward_funcs=length_reward,
        args=KDRLConfig(
            **arguments(tmp_path, kd_estimator="full", kd_coef=COEFFICIENT, gradient_checkpointing=checkpointing)
        ),
        train_dataset=dataset(PROMPTS),
        teacher=Shifted(other_model(tiny_model)),
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0),
    )
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(1))
    require_equal(trainer, inputs_of(trainer, seed=6), reverse_kl)
    assert all((".lora_" in name) == (p.grad is not None) for name, p in trainer.model.named_parameters())


def test_the_base_of_a_lora_student_teaches_it(tiny_model: str, tmp_path: Path) -> None:
    """The KL to the initial policy, exactly, without a second model; the head is trained whole, and the base keeps its
    own."""
    path = untied(tiny_model, tmp_path)
    trainer = KDRLTrainer(
        model=path,
        reward_funcs=length_reward,
        args=KDRLConfig(**arguments(tmp_path, kd_estimator="full", kd_coef=COEFFICIENT)),
        train_dataset=dataset(PROMPTS),
        teacher=ModelTeacher(AutoModelForCausalLM.from_pretrained(path)),
        peft_config=LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"]),
    )
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    inputs = inputs_of(trainer, seed=7)
    wanted = value_and_gradient(trainer, inputs)
    trainer.teacher = ModelTeacher(trainer.model, base=True)
    found = inputs_of(trainer, seed=7)
    torch.testing.assert_close(found["teacher_hidden"], inputs["teacher_hidden"])
    torch.testing.assert_close(value_and_gradient(trainer, found), wanted)
    heads = [trainer.teacher.head.layer.weight, trainer.model.get_output_embeddings().weight]
    assert (heads[0] - heads[1]).abs().max() > 0.1


# ---------------------------------------------------------------- topk


def of_student(k: int, tail: bool) -> Divergence:
    """Reverse KL over the student's k most probable words, and the others as one more outcome or not at all."""

    def divergence(p: Tensor, q: Tensor) -> Tensor:
        ids = p.topk(k, dim=-1).indices
        p, q = (each.gather(-1, ids).exp() for each in (p, q))
        if tail:
            p, q = (torch.cat([each, 1.0 - each.sum(-1, keepdim=True)], dim=-1) for each in (p, q))
        else:
            p, q = (each / each.sum(-1, keepdim=True) for each in (p, q))
        return (p * (p / q).log()).sum(-1)

    return divergence


@pytest.mark.parametrize("tail", [True, False])
def test_topk_is_over_the_students_words(tiny_model: str, tmp_path: Path, tail: bool) -> None:
    trainer = build(
        tiny_model, tmp_path, kd_estimator="topk", kd_topk=4, kd_topk_tail=tail, kd_coef=COEFFICIENT, temperature=0.8
    )
    require_equal(trainer, inputs_of(trainer, seed=8), of_student(4, tail))


@pytest.mark.parametrize("tail", [True, False])
def test_topk_of_all_words_is_full(tiny_model: str, tmp_path: Path, tail: bool) -> None:
    size = AutoConfig.from_pretrained(tiny_model).vocab_size
    found = []
    for settings in ({"kd_estimator": "full"}, {"kd_estimator": "topk", "kd_topk": size, "kd_topk_tail": tail}):
        trainer = build(tiny_model, tmp_path, kd_coef=COEFFICIENT, kd_divergence="js", **settings)
        found.append(value_and_gradient(trainer, inputs_of(trainer, seed=9)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_a_teacher_in_an_engine_chooses_the_words(tiny_model: str, tmp_path: Path) -> None:
    """Of 40 rows it gives its five best, which the student may lack; the others are one outcome."""
    teacher = other_model(tiny_model)
    student_rows = teacher.config.vocab_size
    teacher.resize_token_embeddings(student_rows + 6)
    with torch.no_grad():  # so that a word which the student does not have is among the five
        teacher.get_output_embeddings().weight[-1] *= 5.0
    teacher.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "teacher")
    engine = EngineTeacher(TransformersEngine.load(str(tmp_path / "teacher")), student_rows + 6)
    trainer = build(tiny_model, tmp_path, engine, kd_estimator="topk", kd_topk=5, kd_coef=COEFFICIENT)
    inputs = inputs_of(trainer, seed=10)
    assert "teacher_hidden" not in inputs
    assert (inputs["teacher_top_ids"] >= student_rows).any()

    def divergence(p: Tensor, q: Tensor) -> Tensor:
        ids = q.topk(5, dim=-1).indices
        p = torch.nn.functional.pad(p.exp(), (0, 6)).gather(-1, ids)
        q = q.gather(-1, ids).exp() * (ids < student_rows)
        p, q = (torch.cat([each, 1.0 - each.sum(-1, keepdim=True)], dim=-1) for each in (p, q))
        return torch.where(p > 0, p * (p / q).log(), 0.0).sum(-1)

    engine.model = teacher  # for the plain loss
    require_equal(trainer, inputs, divergence)


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize("settings", [{"kd_estimator": "full"}, {"kd_estimator": "topk", "kd_topk": 5}])
def test_a_teacher_that_is_the_student_adds_nothing(tiny_model: str, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Of one and the same hidden states, exactly nothing; of the same model in another batch, nothing but rounding."""
    same = Shifted(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))
    trainer = build(tiny_model, tmp_path, same, kd_coef=1.0, **settings)
    inputs = inputs_of(trainer, seed=11)
    grpo = value_and_gradient(trainer, {**inputs, "kd_weights": torch.zeros_like(inputs["kd_weights"])})
    near = value_and_gradient(trainer, inputs)
    assert abs(float(near[0] - grpo[0])) < 1e-6
    assert float((near[1] - grpo[1]).abs().max()) < 1e-5 * float(grpo[1].abs().max())
    original = trainer.from_hidden

    def own(hidden: Tensor, head: Head, teacher_head: Head, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = original(hidden, head, teacher_head, {**inputs, "teacher_hidden": hidden.detach()})
        assert (found["kd_divergence"] == 0).all()
        return found

    trainer.from_hidden = own
    torch.testing.assert_close(value_and_gradient(trainer, inputs), grpo, rtol=0, atol=1e-8)


@pytest.mark.parametrize("settings", [{"kd_estimator": "full"}, {"kd_estimator": "topk", "kd_topk": 5}])
def test_masked_rows_are_insensitive_to_the_teacher(tiny_model: str, tmp_path: Path, settings: dict[str, Any]) -> None:
    """`response` leaves out the correct answers 1, 5 and 6: value and gradient stay, bit for bit; others move."""
    trainer = build(tiny_model, tmp_path, kd_coef=0.1, kd_mask="response", **settings)
    inputs = inputs_of(trainer, seed=12, rewards=(0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0))
    before = value_and_gradient(trainer, inputs)
    for rows, moves in (([1, 5, 6], False), ([0], True)):
        hidden = inputs["teacher_hidden"].clone()
        hidden[rows] += torch.randn(hidden[rows].shape, generator=torch.Generator().manual_seed(0))
        after = value_and_gradient(trainer, {**inputs, "teacher_hidden": hidden})
        assert bool((after[1] != before[1]).any()) == moves
        assert bool(after[0] != before[0]) == moves


def test_a_batch_without_a_distilled_token_is_grpo(tiny_model: str, tmp_path: Path) -> None:
    trainer = build(tiny_model, tmp_path, kd_estimator="full", kd_mask="response")
    inputs = inputs_of(trainer, seed=13, rewards=(1.0,) * 8)
    loss, gradient = value_and_gradient(trainer, inputs)
    assert "kd/divergence" not in measured(trainer)
    trainer.args.distil_then_rl, trainer.state.global_step = 1, 1
    assert not trainer.asks_hidden()
    torch.testing.assert_close((loss, gradient), value_and_gradient(trainer, inputs), rtol=0, atol=0)


# ---------------------------------------------------------------- one forward each


def test_one_forward_of_each_model(tiny_model: str, tmp_path: Path) -> None:
    """Three steps of two micro-batches at rate 0: the policy's backbone runs as often as GRPO's, the teacher's once a
    rollout batch."""
    teacher = Shifted(other_model(tiny_model), batch_size=64)
    asked: list[int] = []
    teacher.model.base_model.register_forward_hook(lambda *_: asked.append(1))
    settings: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_steps": 3, "learning_rate": 0.0}
    trainer = build(tiny_model, tmp_path, teacher, kd_estimator="full", **settings)
    grpo = GRPOTrainer(
        model=tiny_model,
        reward_funcs=length_reward,
        args=GRPOConfig(**arguments(tmp_path, **settings)),
        train_dataset=dataset(PROMPTS),
    )
    counts = []
    for each in (trainer, grpo):
        calls: list[bool] = []
        each.model.base_model.register_forward_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
        each.train()
        counts.append((sum(calls), len(calls)))
    assert counts[0] == counts[1]
    assert counts[0][0] == 6
    assert (teacher.calls, len(asked)) == (3, 3)


@pytest.mark.parametrize("steps_per_generation", [2, 4])
def test_what_is_carried_is_what_the_teacher_says_of_the_row(
    tiny_model: str, tmp_path: Path, steps_per_generation: int
) -> None:
    """Through generation, padding, shuffling and splitting; 4 micro-batches of a generation serve two updates."""
    trainer = build(
        tiny_model,
        tmp_path,
        kd_estimator="full",
        gradient_accumulation_steps=2,
        steps_per_generation=steps_per_generation,
        max_steps=2,
        temperature=0.7,
    )
    teacher = Shifted(trainer.teacher.model)
    original, rows = trainer._compute_loss, []

    def recorded(model: Any, inputs: dict[str, Any]) -> Tensor:
        for row in range(len(inputs["completion_ids"])):
            prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()].tolist()
            answer = inputs["completion_ids"][row][inputs["completion_mask"][row].bool()].tolist()
            expected = teacher.score([prompt], [answer], hidden=True).hidden
            torch.testing.assert_close(inputs["teacher_hidden"][row][: len(answer)], expected[0], rtol=1e-3, atol=1e-5)
            rows.append(len(answer))
        loss: Tensor = original(model, inputs)
        return loss

    trainer._compute_loss = recorded
    trainer.train()
    assert len(rows) == 32
    assert trainer.teacher.calls == 4 // steps_per_generation


def test_logits_of_all_tokens_never_exist(tiny_model: str, tmp_path: Path) -> None:
    """N · V = 1,200 · 9,000 numbers are 43 MB; a tile of 1,024 · 4,096 is 17 MB, forward and backward."""
    trainer = build(tiny_model, tmp_path, kd_estimator="full")
    generator = torch.Generator().manual_seed(0)
    heads = [Head(torch.randn(9000, 16, generator=generator)) for _ in range(2)]
    hidden = torch.randn(8, 150, 16, generator=generator, requires_grad=True)
    inputs = {"kd_weights": torch.ones(8, 150), "teacher_hidden": torch.randn(8, 150, 16, generator=generator)}
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            for each in result if isinstance(result, tuple | list) else (result,):
                if isinstance(each, Tensor):
                    sizes.append(each.untyped_storage().nbytes())
            return result

    watch: Any = Watch
    with watch():
        trainer.from_hidden(hidden, *heads, inputs)["kd_divergence"].sum().backward()
    assert hidden.grad is not None and hidden.grad.abs().max() > 0
    assert max(sizes) == 1024 * 4096 * 4


def test_distillation_brings_the_student_to_the_teacher(tiny_model: str, tmp_path: Path) -> None:
    trainer = build(
        tiny_model,
        tmp_path,
        kd_estimator="full",
        kd_divergence="js",
        kd_only=True,
        max_steps=25,
        learning_rate=3e-3,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
    )
    trainer.train()
    gaps = [log["kd/divergence"] for log in trainer.state.log_history if "kd/divergence" in log]
    assert len(gaps) == 25
    assert sum(gaps[-5:]) < 0.5 * sum(gaps[:5])


def test_evaluation_measures_the_divergence_too(tiny_model: str, tmp_path: Path) -> None:
    trainer = build(tiny_model, tmp_path, kd_estimator="full")
    found = trainer.evaluate(dataset(PROMPTS))
    assert found["eval_kd/divergence"] > 0


@pytest.fixture(scope="module")
def alone(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Path]]:
    """A student with a head of its own and one with tied weights: rollouts, a teacher, and what one process makes of
    them in three steps."""
    found = {}
    for name, student in (("untied", untied(tiny_model, tmp_path_factory.mktemp("student"))), ("tied", tiny_model)):
        folder = tmp_path_factory.mktemp(name)
        trainer = build(student, folder / "unused", kd_estimator="full")
        torch.save(batch(trainer, seed=15, beta=0.0, sampler=False), folder / "batch.pt")
        trainer.teacher.model.save_pretrained(folder / "teacher")
        train(student, ModelTeacher.load(str(folder / "teacher"), device="cpu"), folder)
        found[name] = (student, folder)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "heads"), [("zero2", "untied"), ("zero3", "untied"), ("zero3", "tied"), ("fsdp2", "untied")]
)
def test_split_students_train_as_whole_ones(
    alone: dict[str, tuple[str, Path]], tmp_path: Path, kind: str, heads: str
) -> None:
    """The head of a split student is whole where the divergence needs it, forward and backward, and its gradient is
    that of all processes."""
    student, one_process = alone[heads]
    shutil.copy(one_process / "batch.pt", tmp_path)
    config = partitioning(tmp_path) if kind == "zero3" else recipes.RECIPES / "accelerate" / f"{kind}.yaml"
    teacher = str(one_process / "teacher")
    finish([*launcher(config), "-m", "tests.two_teachers", student, teacher, str(tmp_path)])
    one, two = (json.loads((folder / "trained.json").read_text()) for folder in (one_process, tmp_path))
    assert two["active"] == kind
    for first, second in zip(one["log"], two["log"], strict=True):
        for name in set(first) - {"step_time"}:
            assert second[name] == pytest.approx(first[name], rel=1e-5, abs=1e-5), name
    before, whole, split = (
        dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
        for folder in (student, one_process / "trained", tmp_path / "trained")
    )
    assert max((whole[name] - before[name]).abs().max() for name in whole) > 1e-3
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_prompts_with_images(tmp_path: Path) -> None:
    """A small LLaVA learns from another, both shown the rows' pictures: as forwards of one row each say."""
    student, other = (tiny_vision(tmp_path / name, seed=seed, deviation=0.3) for seed, name in enumerate("so"))
    rows: list[dict[str, Any]] = [{**row, "images": [colour(place)]} for place, row in enumerate(PROMPTS)]

    def trainer(teacher: Any, **changes: Any) -> Any:
        return KDRLTrainer(
            model=student.path,
            processing_class=student.processor,
            reward_funcs=length_reward,
            args=KDRLConfig(**arguments(tmp_path, kd_only=True, max_steps=1, **changes)),
            train_dataset=_dataset(rows),
            teacher=teacher,
        )

    teacher = ModelTeacher.load(other.path, device="cpu")
    with pytest.raises(
        UserError, match=r"^The prompts hold images, and the teacher reads text alone: choose a vision-"
    ):
        trainer(ModelTeacher(teacher.model))
    for settings in ({"kd_estimator": "full"}, {"kd_estimator": "k2"}):
        ours = trainer(teacher, **settings)
        ours.model.train()
        ours.current_gradient_accumulation_steps = 1
        shown_rows = [ours.train_dataset[place // 4] for place in range(8)]
        inputs = ours._generate_and_score_completions(shown_rows)
        wanted, count = 0.0, 0
        for place, row in enumerate(shown_rows):
            completion = inputs["completion_ids"][place][inputs["completion_mask"][place].bool()].tolist()
            own, theirs = (
                looked_at(model, student.processor, row, completion)[0] for model in (ours.model, teacher.model)
            )
            said = theirs.gather(1, torch.tensor(completion)[:, None])[:, 0]
            torch.testing.assert_close(
                inputs["teacher_logps"][place, : len(completion)].double(), said, atol=1e-5, rtol=0
            )
            gap = said - own.gather(1, torch.tensor(completion)[:, None])[:, 0]
            wanted += float(reverse_kl(own, theirs).sum() if "full" in settings.values() else 0.5 * gap.square().sum())
            count += len(completion)
        assert float(value_and_gradient(ours, inputs)[0]) == pytest.approx(wanted / count, rel=1e-4)
        ours.train()
        assert ours.state.global_step == 1


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("settings", [{"kd_estimator": "full"}, {"kd_estimator": "topk", "kd_topk": 5}])
def test_a_teacher_without_effect_is_refused(tiny_model: str, tmp_path: Path, settings: dict[str, Any]) -> None:
    class Deaf(KDRLTrainer):
        def from_hidden(self, hidden: Tensor, head: Head, *arguments: Any) -> dict[str, Tensor]:
            return {"kd_divergence": hidden.sum(dim=-1)}

    with pytest.raises(UserError, match="The teacher has no effect"):
        Deaf(
            model=tiny_model,
            reward_funcs=length_reward,
            args=KDRLConfig(**arguments(tmp_path, **settings)),
            train_dataset=dataset(),
            teacher=Shifted(other_model(tiny_model)),
        )


def test_teachers_that_give_too_little_are_refused(tiny_model: str, tmp_path: Path) -> None:
    engine = EngineTeacher(TransformersEngine.load(tiny_model), 20)
    student = AutoTokenizer.from_pretrained(tiny_model)
    told = Reprompted(engine, student, hint("{solution}"))
    for teacher in (engine, told, Routed({"a": Shifted(other_model(tiny_model))}, "teacher")):
        for settings in ({"kd_estimator": "full"}, {"kd_estimator": "topk", "kd_topk_tail": False}):
            with pytest.raises(UserError, match=rf"^{type(teacher).__name__} gives no hidden states, only log-probs"):
                build(tiny_model, tmp_path, teacher, **settings)
    with pytest.raises(UserError, match=r"^The engine transformers gives no hidden states: take the teacher's own top"):
        engine.score([[3]], [[4]], hidden=True)
    with pytest.raises(UserError, match=r"^Teachers chosen by row \(column 'teacher'\) have no common output head"):
        Routed({}, "teacher").score([[3]], [[4]], hidden=True)
    away = other_model(tiny_model)
    away.set_output_embeddings(torch.nn.Linear(32, 19, bias=False, device="meta"))
    with pytest.raises(UserError, match=r"^The teacher's output head is offloaded, and whole distributions need it"):
        build(tiny_model, tmp_path, Shifted(away), kd_estimator="full")
    with pytest.raises(ValueError, match=r"kd_topk = 64 exceeds the \d+ words of the vocabulary: lower it"):
        build(tiny_model, tmp_path, kd_estimator="topk")


def test_a_student_that_teaches_itself_is_updated_once_per_batch(tiny_model: str, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)

    def trainer(**changes: Any) -> Any:
        return KDRLTrainer(
            model=model,
            reward_funcs=length_reward,
            args=KDRLConfig(**arguments(tmp_path, kd_estimator="full", **changes)),
            train_dataset=dataset(PROMPTS),
            teacher=ModelTeacher(model),
        )

    with pytest.raises(ValueError, match=r"each rollout batch serves 2 updates, so it would not be the head that scor"):
        trainer(num_iterations=2)
    own = trainer()
    inputs = inputs_of(own, seed=14)
    grpo = value_and_gradient(own, {**inputs, "kd_weights": torch.zeros_like(inputs["kd_weights"])})
    torch.testing.assert_close(value_and_gradient(own, inputs), grpo, rtol=1e-4, atol=1e-6)


def test_a_head_that_is_more_than_its_weights_is_refused(tiny_model: str, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(untied(tiny_model, tmp_path))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"]))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    teacher = ModelTeacher(adapted)
    assert teacher.score([[3]], [[4]]).mask.all()
    with pytest.raises(UserError, match=r"^The output head of PeftModel is more than its weights \(an adapter on it"):
        teacher.score([[3]], [[4]], hidden=True)
    base = ModelTeacher(adapted, base=True).score([[3]], [[4]], hidden=True)
    assert base.hidden is not None and base.hidden.shape == (1, 1, 32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kd_divergence": "js"}, "kd_divergence = 'js' has no effect on kd_estimator = k2: remove it"),
        ({"kd_topk": 5}, "kd_topk = 5 has no effect on kd_estimator = k2"),
        ({"kd_estimator": "full", "kd_topk_tail": False}, "kd_topk_tail = False has no effect on kd_estimator = full"),
        ({"kd_estimator": "full", "kd_log_ratio_clamp": 5.0}, "kd_log_ratio_clamp = 5.0 has no effect on kd_estimator"),
        ({"kd_estimator": "full", "kd_form": "advantage"}, "kd_estimator = 'full' has no effect on kd_form = advantag"),
        ({"kd_estimator": "full", "kd_divergence": "kl"}, "unknown divergence 'kl'; known: forward_kl"),
        ({"kd_estimator": "full", "kd_divergence": "total_variation"}, "'total_variation' is no objective: f' takes"),
        ({"kd_estimator": "full", "kd_divergence": "alpha"}, "'alpha' needs alpha"),
        ({"kd_estimator": "full", "kd_divergence_alpha": 0.5}, "alpha = 0.5 has no effect on the divergence 'reverse"),
        ({"kd_estimator": "topk", "kd_topk": 0}, "kd_topk must be at least 1, got 0"),
        ({"kd_estimator": "topk", "kd_topk": 1, "kd_topk_tail": False}, "kd_topk must be at least 2, got 1"),
    ],
)
def test_settings_without_meaning_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KDRLConfig(**arguments(tmp_path, **settings))


def test_fsdp_1_is_refused(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.trainers.kdrl.requested", lambda args: "fsdp1")
    with pytest.raises(ValueError, match="kd_estimator = full needs whole output heads, which FSDP 1 keeps in parts"):
        build(tiny_model, tmp_path, kd_estimator="full")
