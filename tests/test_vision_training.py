"""On-policy methods on prompts with images: the loss is TRL's, stored answers keep theirs, and the rest is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.distributed
from datasets import Dataset
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, ProcessorMixin, Trainer
from trl import GRPOConfig
from trl import GRPOTrainer as TRLTrainer
from trl.trainer import utils as trl_utils
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from posttrain import recipe as recipes
from posttrain import tasks
from posttrain.errors import UserError
from posttrain.launch import pipeline
from posttrain.launch.pipeline import _dataset
from posttrain.launch.spawn import leave
from posttrain.objectives.divergences import token_divergence
from posttrain.recipe import Pairs, Presample
from posttrain.rewards import RewardFunction, Verdict
from posttrain.rollouts import pairs
from posttrain.rollouts.presample import presample
from posttrain.rollouts.store import Store, prompt_id
from posttrain.rollouts.teacher import ModelTeacher
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.seams.vision import VISION, joined, stored_fields
from posttrain.tasks import shown
from posttrain.trainers.apo import AsymmetricPOConfig, AsymmetricPOTrainer
from posttrain.trainers.dph_rl import DPHConfig, DPHTrainer
from posttrain.trainers.f_dpg import FDPGConfig, FDPGTrainer, _fingerprints
from posttrain.trainers.grpo import GRPOTrainer
from posttrain.trainers.kdrl import KDRLConfig, KDRLTrainer
from posttrain.trainers.rlad import RLADConfig, RLADTrainer
from tests.oracle import PROMPTS, StartsWithDigit, arguments, length_reward, perturb, value_and_gradient
from tests.processes import launch
from tests.tiny_vision import FAMILIES, Seeing, colour, tiny_vision

PAINTED = [range(number, number + 1 + number % 2) for number in range(len(PROMPTS))]
"""The numbers of the colours that a prompt shows: one picture or two."""

ROWS: list[tasks.Row] = [
    {**row, "images": [colour(number) for number in numbers]} for row, numbers in zip(PROMPTS, PAINTED, strict=True)
]

CLASSES: dict[type[TRLTrainer], type[GRPOConfig]] = {
    GRPOTrainer: GRPOConfig,
    TRLTrainer: GRPOConfig,
    AsymmetricPOTrainer: AsymmetricPOConfig,
    DPHTrainer: DPHConfig,
    FDPGTrainer: FDPGConfig,
    KDRLTrainer: KDRLConfig,
    RLADTrainer: RLADConfig,
}


SGD = {"optim": "sgd", "learning_rate": 0.05}
"""Adam makes as much of rounding as of a gradient where that is zero, as it is for some biases of vision towers."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Seeing]:
    folder = tmp_path_factory.mktemp("vision")
    return {family: tiny_vision(folder / family, family, seed=1, deviation=0.2) for family in FAMILIES}


def build(kind: Any, model: Seeing, folder: Path, rows: Sequence[tasks.Row] = ROWS, **changes: Any) -> Any:
    given = {name: changes.pop(name) for name in ("store", "teacher", "reward_funcs") if name in changes}
    return kind(
        model=model.path,
        processing_class=model.processor,
        args=CLASSES[kind](**arguments(folder, **changes)),
        train_dataset=_dataset(rows),
        **{"reward_funcs": length_reward, **given},
    )


def generated(trainer: Any, count: int = 8, first: int = 0) -> dict[str, Any]:
    """The batch that TRL makes of answers to prompts from the `first` on, `count` answers in groups."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    group = trainer.num_generations
    rows = [trainer.train_dataset[first + index // group] for index in range(count)]
    return trainer._generate_and_score_completions(rows)


def logps_of(trainer: Any, inputs: Mapping[str, Any]) -> Tensor:
    """What TRL's own forward says of a batch."""
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
            **{name: inputs[name] for name in VISION if name in inputs},
        )
    return logps


def noisy(trainer: Any, inputs: dict[str, Any], beta: float) -> dict[str, Any]:
    """The batch with advantages and log-probs such that every part of the loss counts."""
    generator = torch.Generator().manual_seed(5)
    logps = logps_of(trainer, inputs)
    inputs["advantages"] = torch.randn(len(logps), generator=generator)
    inputs["old_per_token_logps"] = logps + 0.3 * torch.randn(logps.shape, generator=generator)
    if beta:
        inputs["ref_per_token_logps"] = logps + 0.5 * torch.randn(logps.shape, generator=generator)
    return inputs


def plain_logps(model: Any, processor: ProcessorMixin, row: tasks.Row, prompt: Any, answer: Sequence[int]) -> Tensor:
    """log π of one answer [T] in a forward of its own, the prompt rendered anew; with gradient."""
    pictures = [{"type": "image", "image": image} for image in row["images"]]
    message = {"role": "user", "content": [*pictures, {"type": "text", "text": row["prompt"][0]["content"]}]}
    made = processor.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert made["input_ids"][0].tolist() == list(prompt)
    ids = torch.cat([made.pop("input_ids"), torch.tensor([list(answer)])], dim=1)
    del made["attention_mask"]
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in made:
            made[name] = torch.nn.functional.pad(made[name], (0, len(answer)))
    logits = model(input_ids=ids, **made).logits[0, -len(answer) - 1 : -1]
    return torch.log_softmax(logits, -1)[torch.arange(len(answer)), list(answer)]


def each_alone(model: Any, processor: ProcessorMixin, rows: Sequence[tasks.Row], inputs: Mapping[str, Any]) -> Tensor:
    """log π [B, T] of a batch, one plain forward per answer; 0 beyond its end."""
    found = torch.zeros(inputs["completion_ids"].shape)
    for index, kept in enumerate(inputs["completion_mask"].bool()):
        prompt = inputs["prompt_ids"][index][inputs["prompt_mask"][index].bool()].tolist()
        answer = inputs["completion_ids"][index][kept].tolist()
        with torch.no_grad():
            found[index, : len(answer)] = plain_logps(model, processor, rows[index], prompt, answer)
    return found


# ------------------------------------------------------------------ GRPO


@pytest.mark.parametrize(
    ("family", "loss_type", "beta"),
    [
        *(("llava", loss_type, beta) for loss_type in ("dapo", "grpo") for beta in (0.0, 0.1)),
        ("llava_next", "dapo", 0.1),
        ("qwen2_5_vl", "dapo", 0.1),
    ],
)
def test_value_and_gradient_equal_trl(
    models: Mapping[str, Seeing], tmp_path: Path, family: str, loss_type: str, beta: float
) -> None:
    ours, theirs = (
        build(kind, models[family], tmp_path, beta=beta, loss_type=loss_type) for kind in (GRPOTrainer, TRLTrainer)
    )
    inputs = noisy(ours, generated(ours), beta)
    assert inputs["num_images"] == [1] * 4 + [2] * 4
    results = []
    for trainer in (ours, theirs):
        trainer.current_gradient_accumulation_steps = 2
        trainer._metrics["train"].clear()
        results.append(value_and_gradient(trainer, inputs))
    (our_loss, our_gradient), (their_loss, their_gradient) = results
    assert their_gradient.abs().max() > 1e-3
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-5, atol=1e-6)
    for name, values in ours._metrics["train"].items():
        assert values[-1] == pytest.approx(theirs._metrics["train"][name][-1], rel=1e-5), name

    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1) + 0.5}
    assert abs(value_and_gradient(ours, other)[0] - our_loss) > 1e-4, "the policy does not see"


@pytest.mark.parametrize("family", FAMILIES)
def test_training_steps_equal_trl(models: Mapping[str, Seeing], tmp_path: Path, family: str) -> None:
    """Whole steps, generation included: images follow their answers through shuffling, splitting and two epochs."""
    settings = {"gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 2, "beta": 0.05, **SGD}
    weights = []
    for kind in (GRPOTrainer, TRLTrainer):
        trainer = build(kind, models[family], tmp_path, **settings)
        towers = [(n, p.detach().clone()) for n, p in trainer.model.named_parameters() if "vis" in n]
        trainer.train()
        now = dict(trainer.model.named_parameters())
        assert max((now[name] - before).abs().max() for name, before in towers) > 1e-4, "the vision tower learns"
        weights.append(torch.cat([p.detach().reshape(-1) for p in now.values()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)


def test_apo_without_its_shaping_is_grpo(models: Mapping[str, Seeing], tmp_path: Path) -> None:
    reward = {"reward_funcs": RewardFunction(StartsWithDigit())}
    plain = {"apo_dads": False, "apo_stcr": False, "apo_kl_reduction": "token"}
    apo = build(AsymmetricPOTrainer, models["llava"], tmp_path, beta=0.1, **plain, **reward)
    grpo = build(GRPOTrainer, models["llava"], tmp_path, beta=0.1, use_bias_correction_kl=False)
    grpo.current_gradient_accumulation_steps = 1
    inputs = noisy(apo, generated(apo), 0.1)
    torch.testing.assert_close(value_and_gradient(apo, inputs), value_and_gradient(grpo, inputs), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ rehearsal


def engine_of(model: Seeing) -> TransformersEngine:
    return TransformersEngine(AutoModelForImageTextToText.from_pretrained(model.path), model.processor, batch_size=8)


@pytest.fixture(scope="module")
def stores(models: Mapping[str, Seeing], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Store]:
    """Real stores; several prompts are near-perfect, some of them with one picture and some with two."""
    made = {
        family: presample(
            engine_of(model),
            ROWS,
            StartsWithDigit(),
            Presample(samples_per_prompt=4, pef_threshold=2, stored_per_prompt=1, seed=1),
            max_tokens=6,
            training_temperature=1.0,
            output_dir=tmp_path_factory.mktemp("stores") / family,
            batch_size=36,
        )
        for family, model in models.items()
    }
    for store in made.values():
        counts = {len(ROWS_BY_ID[answer.prompt_id]["images"]) for answer in store.answers}
        assert counts == {1, 2}
        assert store.counts["explore"] >= 4
    return made


ROWS_BY_ID = {prompt_id(shown(row)): row for row in ROWS}


def rehearsing(model: Seeing, folder: Path, store: Store, **changes: Any) -> DPHTrainer:
    settings = {"divergence": "forward_kl", "eta": 0.5, "replay_ratio": 0.5, **changes}
    trainer: DPHTrainer = build(DPHTrainer, model, folder, store=store, **settings)
    return trainer


@pytest.mark.parametrize("family", FAMILIES)
def test_a_joined_batch_is_rollouts_and_stored_answers_each_alone(
    models: Mapping[str, Seeing], stores: Mapping[str, Store], tmp_path: Path, family: str
) -> None:
    """L = L_exp + η Σ l / Σ tokens, where every stored answer has a forward of its own on what its row shows."""
    trainer = rehearsing(models[family], tmp_path, stores[family])
    perturb(trainer)
    inputs = noisy(trainer, generated(trainer), 0.0)
    together = value_and_gradient(trainer, inputs)

    replay, trainer.replay = trainer.replay, None
    policy = value_and_gradient(trainer, inputs)
    assert replay is not None
    answers = replay.draw(step=1, rows=trainer.replay_rows, slot=0, slots=1).answers
    assert {len(ROWS_BY_ID[answer.prompt_id]["images"]) for answer in answers} == {1, 2}
    trainer.model.zero_grad()
    total, tokens = torch.zeros(()), 0
    for answer in answers:
        row = ROWS_BY_ID[answer.prompt_id]
        logps = plain_logps(trainer.model, models[family].processor, row, answer.prompt_ids, answer.token_ids)
        total = total + token_divergence("forward_kl", logps - torch.tensor(answer.logps)).sum()
        tokens += len(answer.token_ids)
    pef = total / tokens
    pef.backward()
    gradient = torch.cat([p.grad.reshape(-1) for p in trainer.model.parameters() if p.grad is not None])
    assert (0.5 * gradient).abs().max() > 1e-3
    torch.testing.assert_close(together[0], policy[0] + 0.5 * pef.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together[1], policy[1] + 0.5 * gradient, rtol=1e-4, atol=1e-5)


def test_the_initial_policy_agrees_with_its_store(
    models: Mapping[str, Seeing], stores: Mapping[str, Store], tmp_path: Path
) -> None:
    """Engine and trainer read the same pixels: before the first update no stored token has moved."""
    for family, model in models.items():
        trainer = rehearsing(model, tmp_path, stores[family], max_steps=1)
        trainer.train()
        assert trainer.state.log_history[0]["pef/log_ratio_abs"] < 2e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_run_continues_as_the_uninterrupted_one(
    models: Mapping[str, Seeing], stores: Mapping[str, Store], tmp_path: Path, family: str
) -> None:
    """These models are saved under other names than they have in memory, and must be found all the same."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4, **SGD}
    store = stores[family]
    assert store.counts["explore"] >= 4, "within one epoch"
    whole = rehearsing(models[family], tmp_path / "whole", store, **settings)
    before = [parameter.detach().clone() for parameter in whole.model.parameters()]
    whole.train()
    again = rehearsing(models[family], tmp_path / "again", store, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert again.state.global_step == 4
    assert max((one - other).abs().max() for one, other in zip(before, again.model.parameters(), strict=True)) > 1e-3
    for (name, one), other in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", ["f_dpo", "sft"])
def test_a_resumed_run_on_pairs_or_answers_continues_too(
    models: Mapping[str, Seeing], tmp_path: Path, method: str
) -> None:
    resolved = importlib.import_module(f"posttrain.trainers.{method}")
    answers = ["3*7+3", "8*9", "7-5"]
    chosen = {"f_dpo": ("chosen", "rejected"), "sft": ("completion",)}[method]
    rows = [
        {
            "prompt": row["prompt"],
            "images": row["images"][:1],
            **{
                name: [{"role": "assistant", "content": answers[(number + shift) % 3]}]
                for shift, name in enumerate(chosen)
            },
        }
        for number, row in enumerate(ROWS)
    ]

    def make(folder: Path) -> Any:
        settings = arguments(folder, max_steps=4, save_strategy="steps", save_steps=2, **SGD)
        known = {field.name for field in dataclasses.fields(resolved.Config)}
        args = resolved.Config(**{name: value for name, value in settings.items() if name in known})
        return resolved.Trainer(
            models["llava"].path, args=args, processing_class=models["llava"].processor, train_dataset=_dataset(rows)
        )

    whole = make(tmp_path / "whole")
    before = [parameter.detach().clone() for parameter in whole.model.parameters()]
    whole.train()
    again = make(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert again.state.global_step == 4
    assert max((one - other).abs().max() for one, other in zip(before, again.model.parameters(), strict=True)) > 1e-3
    for (name, one), other in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_the_best_checkpoint_is_loaded_whatever_its_names_are(models: Mapping[str, Seeing], tmp_path: Path) -> None:
    trainer = build(GRPOTrainer, models["llava"], tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    wanted = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    perturb(trainer)
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    trainer._load_best_model()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, wanted[name]), name


def test_a_store_of_other_pictures_is_refused(
    models: Mapping[str, Seeing], stores: Mapping[str, Store], tmp_path: Path
) -> None:
    repainted = [{**row, "images": [colour(77) for _ in row["images"]]} for row in ROWS]
    with pytest.raises(UserError, match="9 of 9 training prompts are not in the store"):
        build(DPHTrainer, models["llava"], tmp_path, rows=repainted, store=stores["llava"])
    stored = {answer.prompt_id for answer in stores["llava"].answers}
    rest = [row for row in ROWS if prompt_id(shown(row)) not in stored]
    with pytest.raises(UserError, match=rf"rehearses {len(stored)} prompts that are not in the training data, so"):
        build(DPHTrainer, models["llava"], tmp_path, rows=rest, store=stores["llava"])


def test_images_of_another_prompt_are_refused(models: Mapping[str, Seeing]) -> None:
    processor = models["llava"].processor
    ids = processor.apply_chat_template(shown(ROWS[0]), add_generation_prompt=True, tokenize=True)[0]
    assert set(stored_fields(processor, ROWS[0]["images"], ids)) == {"pixel_values"}
    assert stored_fields(processor, (), [3, 4]) == {}
    with pytest.raises(UserError, match="2 images take 8 placeholder tokens, but the prompt's token ids hold 4"):
        stored_fields(processor, ROWS[1]["images"], ids)


def test_fields_that_trl_does_not_carry_are_refused(models: Mapping[str, Seeing], monkeypatch: Any) -> None:
    made = {"pixel_values": torch.zeros(1), "aspect_ratio_ids": torch.zeros(1)}
    monkeypatch.setattr("posttrain.seams.vision.image_fields", lambda *_: made)
    with pytest.raises(UserError, match="LlavaProcessor makes 'aspect_ratio_ids' of images, which TRL's batches do"):
        stored_fields(models["llava"].processor, ROWS[0]["images"], [3])


def rollouts(**fields: Any) -> dict[str, Any]:
    """Two answers: a prompt of three tokens and one of two, and completions of two."""
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    return {"prompt_ids": mask * 7, "prompt_mask": mask, "completion_ids": torch.ones(2, 2), **fields}


def test_layouts_are_joined_answer_by_answer() -> None:
    """The layouts of families that no small processor here makes, with numbers for pixels."""
    tiles = {"pixel_values": torch.arange(3.0).view(3, 1, 1, 1), "num_images": [1, 1], "num_tiles": [2, 1]}
    found = joined(rollouts(**tiles), [{"pixel_values": torch.full((4, 1, 1, 1), 9.0)}, {}], [1, 0], 4, 5)
    assert found["pixel_values"].flatten().tolist() == [0, 1, 2, 9, 9, 9, 9]
    assert (found["num_images"], found["num_tiles"]) == ([1, 1, 1, 0], [2, 1, 4, 0])

    # One row per answer, its pictures along the second dimension: Idefics, which masks what it filled up.
    answers = {"pixel_values": torch.ones(2, 2, 1, 2, 2), "pixel_attention_mask": torch.ones(2, 2, 2, 2)}
    stored = {"pixel_values": torch.full((1, 3, 1, 2, 1), 5.0), "pixel_attention_mask": torch.ones(1, 3, 2, 1)}
    found = joined(rollouts(**answers, num_images=[2, 1]), [stored], [3], 3, 2)
    assert found["pixel_values"].shape == (3, 3, 1, 2, 2)
    assert found["pixel_values"].sum(dim=(1, 2, 3, 4)).tolist() == [8, 8, 30]
    assert found["pixel_attention_mask"].sum(dim=(1, 2, 3)).tolist() == [8, 8, 6]

    # Types of tokens: padded on the left like prompts and on the right like completions.
    types = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 0, 0]])
    shown_types = {"pixel_values": torch.zeros(2, 1), "num_images": [1, 1], "token_type_ids": types}
    stored = {"pixel_values": torch.ones(1, 1), "token_type_ids": torch.tensor([[1, 1, 0, 1]])}
    found = joined(rollouts(**shown_types), [stored], [1], 4, 3)
    assert found["token_type_ids"].tolist() == [
        [0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
    ]


def test_either_side_may_be_text_alone() -> None:
    picture = {"pixel_values": torch.full((2, 1), 4.0)}
    assert joined(rollouts(), [{}, {}], [0, 0], 3, 2) == {}
    found = joined(rollouts(), [{}, picture], [0, 2], 3, 2)
    assert (found["pixel_values"].tolist(), found["num_images"]) == ([[4.0], [4.0]], [0, 0, 0, 2])
    found = joined(rollouts(**picture, num_images=[0, 2]), [{}], [0], 3, 2)
    assert (found["pixel_values"].tolist(), found["num_images"]) == ([[4.0], [4.0]], [0, 2, 0])


# ------------------------------------------------------------------ f-DPG


def test_f_dpg_tells_equal_questions_about_other_pictures_apart() -> None:
    ids, mask = torch.tensor([[5, 6]] * 4), torch.ones(4, 2)
    rows: list[dict[str, Any]] = [{"images": [colour(n)]} for n in (0, 0, 1)]
    one, same, other, none = _fingerprints(ids, mask, [*rows, {"images": []}]).tolist()
    assert one == same
    assert len({one, other, none}) == 3
    assert _fingerprints(ids[:1], mask[:1], [{}]).item() == none, "a checkpoint of a run on text is found again"


def test_f_dpg_sees_what_its_log_ratios_are_of(models: Mapping[str, Seeing], tmp_path: Path) -> None:
    """log π_θ/π_ref of whole answers, which Z and advantages are made of, are those of plain forwards on the images."""
    same = [{**ROWS[0], "images": row["images"]} for row in ROWS[:2]]
    trainer = build(FDPGTrainer, models["llava"], tmp_path, rows=same, divergence="forward_kl", target="filter")
    perturb(trainer)
    trainer.raw_rewards = torch.ones(8)
    inputs = generated(trainer)
    shown_rows = [same[index // 4] for index in range(8)]
    own, reference = (
        each_alone(model, models["llava"].processor, shown_rows, inputs) for model in (trainer.model, trainer.ref_model)
    )
    assert (own - reference).abs().max() > 1e-2
    found = (trainer._old_logps(inputs) - inputs["ref_per_token_logps"]) * inputs["completion_mask"]
    torch.testing.assert_close(found, own - reference, rtol=1e-4, atol=1e-5)
    assert len(trainer.partition._sums) == 2, "one question about two pictures has two Z"


# ------------------------------------------------------------------ teachers


def teacher_of(model: Seeing) -> tuple[ModelTeacher, Any]:
    """A teacher that sees, and its model: the student's with noise."""
    other: Any = AutoModelForImageTextToText.from_pretrained(model.path)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return ModelTeacher(other.eval(), processor=model.processor), other


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_distillation_from_a_teacher_that_sees(models: Mapping[str, Seeing], tmp_path: Path, family: str) -> None:
    """KDRL's k2 and RLAD's ratio of log-probs that plain forwards of both models give; other pixels, another loss."""
    teacher, model = teacher_of(models[family])
    rows = [ROWS[index // 4] for index in range(8)]
    kdrl = build(KDRLTrainer, models[family], tmp_path, teacher=teacher, kd_only=True)
    inputs = generated(kdrl)
    logps = each_alone(kdrl.model, models[family].processor, rows, inputs)
    teacher_logps = each_alone(model, models[family].processor, rows, inputs)
    mask = inputs["completion_mask"]
    expected = (0.5 * (teacher_logps - logps).square() * mask).sum() / mask.sum()
    assert expected > 0.01
    torch.testing.assert_close(value_and_gradient(kdrl, inputs)[0], expected, rtol=1e-4, atol=1e-6)

    rlad = build(RLADTrainer, models[family], tmp_path, teacher=teacher, loss_type="grpo")
    rlad.current_gradient_accumulation_steps = 1
    rlad._extra_keys = ("teacher_logps", "teacher_mask")
    given = {name: value for name, value in inputs.items() if not name.startswith("kd_")}
    given["advantages"] = torch.tensor([1.0, -1.0, 0.5, -0.5] * 2)
    ratio = (0.5 * (logps - teacher_logps).clamp(-1.0, 1.0)).exp()  # π_θ = π_old, α = ½, c = 1
    own = given["advantages"][:, None]
    surrogate = -torch.minimum(ratio * own, ratio.clamp(0.8, 1.28) * own)
    expected = ((surrogate * mask).sum(dim=1) / mask.sum(dim=1)).mean()
    torch.testing.assert_close(value_and_gradient(rlad, given)[0], expected, rtol=1e-4, atol=1e-6)

    repainted = [
        {**row, "images": [colour(number + 9) for number in PAINTED[index // 4]]} for index, row in enumerate(rows)
    ]
    other = {**inputs, **kdrl.annotate(inputs, repainted)}
    assert (other["teacher_logps"] - inputs["teacher_logps"]).abs().max() > 1e-3
    assert abs(value_and_gradient(kdrl, other)[0] - value_and_gradient(kdrl, inputs)[0]) > 1e-5


def test_a_teacher_that_reads_text_alone_is_refused(models: Mapping[str, Seeing], tmp_path: Path) -> None:
    blind = ModelTeacher(teacher_of(models["llava"])[1])
    for kind in (KDRLTrainer, RLADTrainer):
        with pytest.raises(
            UserError, match="The prompts hold images, and the teacher reads text alone: choose a vision"
        ):
            build(kind, models["llava"], tmp_path, teacher=blind)


# ------------------------------------------------------------------ two processes


def main(family: str, model: str, store: str, batch: str, output: str) -> None:
    """What each process does: the loss on its part of a batch, with what it rehearses, and then two steps of DDP."""
    rows = 8 // int(os.environ.get("WORLD_SIZE", "1"))
    seeing = Seeing(model, tiny_vision(Path(output + ".spare"), family).processor)
    settings = {"per_device_train_batch_size": rows, "max_steps": 2}
    trainer = rehearsing(seeing, Path(output + ".run"), Store.open(store), **settings)
    world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    assert world == 8 // rows
    perturb(trainer)
    trainer.current_gradient_accumulation_steps = 1
    parts = split_pixel_values_by_grid(torch.load(batch, weights_only=True))
    mine = {
        name: value[rank * rows : (rank + 1) * rows] if isinstance(value, list) or value.dim() else value
        for name, value in parts.items()
    }
    loss, gradient = value_and_gradient(trainer, unsplit_pixel_values_by_grid(mine))
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    if world > 1:
        for tensor in (loss, gradient):
            torch.distributed.all_reduce(tensor)
            tensor /= world
    trainer.args.reference_tolerance = 1e9  # it was moved on purpose
    trainer.train()
    weights = torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()])
    everyone = trainer.accelerator.gather(weights[None])
    if rank == 0:
        torch.save({"loss": loss, "gradient": gradient, "metrics": metrics, "weights": everyone}, output)
    if world > 1:
        torch.distributed.barrier()  # nobody leaves while another still writes
        torch.distributed.destroy_process_group()


def test_two_processes_give_what_one_gives(
    models: Mapping[str, Seeing], stores: Mapping[str, Store], tmp_path: Path
) -> None:
    """Rollouts and rehearsed answers are split over the ranks, each with its pictures; DDP keeps the weights equal."""
    family = "qwen2_5_vl"
    trainer = rehearsing(models[family], tmp_path, stores[family])
    perturb(trainer)
    torch.save(noisy(trainer, generated(trainer), 0.0), tmp_path / "batch.pt")
    given = [family, models[family].path, str(stores[family].path), str(tmp_path / "batch.pt")]
    main(*given, str(tmp_path / "1.pt"))
    launch(2, ["-m", "tests.test_vision_training", *given, str(tmp_path / "2.pt")])
    one, two = (torch.load(tmp_path / f"{processes}.pt", weights_only=True) for processes in (1, 2))
    assert one["gradient"].abs().max() > 1e-3
    assert one["metrics"]["pef/divergence"] > 1e-4
    torch.testing.assert_close(two["loss"], one["loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(two["gradient"], one["gradient"], rtol=1e-4, atol=1e-5)
    for name in ("pef/divergence", "pef/log_ratio", "entropy", "clip_ratio/region_mean"):
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-4, abs=1e-7), name
    assert len(two["weights"]) == 2
    assert torch.equal(*two["weights"])
    assert bool(two["weights"].isfinite().all())


# ------------------------------------------------------------------ data and refusals


def test_task_rows_keep_their_pixels_and_columns() -> None:
    """A photograph of great detail that a camera has turned: decoded, it is what the row shows, bit for bit."""
    file, turned = io.BytesIO(), Image.Exif()
    turned[0x0112] = 6
    Image.effect_noise((40, 24), 90).convert("RGB").save(file, "JPEG", quality=93, exif=turned)
    photograph = Image.open(file)
    grey = Image.effect_noise((5, 7), 90)
    rows = [
        {"prompt": PROMPTS[0]["prompt"], "images": [], "key": "a", "solution": "1"},
        {"prompt": PROMPTS[1]["prompt"], "images": [photograph, grey], "key": "b", "solution": "2"},
        {"prompt": PROMPTS[2]["prompt"], "key": "c", "solution": "3"},
    ]
    data = _dataset(rows)
    assert data.column_names == ["prompt", "images", "key", "solution"]
    assert data["solution"][:] == ["1", "2", "3"]
    assert [len(images) for images in data["images"]] == [0, 2, 0]
    found = data[1]["images"]
    assert [(image.mode, image.size) for image in found] == [("RGB", (40, 24)), ("L", (5, 7))]
    assert [image.tobytes() for image in found] == [photograph.tobytes(), grey.tobytes()]
    assert [prompt_id(shown(row)) for row in data] == [prompt_id(shown(row)) for row in rows]
    assert "images" not in _dataset(PROMPTS).column_names


def test_images_are_decoded_when_a_row_is_read(
    models: Mapping[str, Seeing], stores: Mapping[str, Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer: Any = rehearsing(models["llava"], tmp_path, stores["llava"])
    decoded, original = [], datasets.Image.decode_example
    monkeypatch.setattr(
        datasets.Image, "decode_example", lambda *given, **kw: decoded.append(1) or original(*given, **kw)
    )
    replay = trainer.replay
    assert not decoded
    drawn = replay.draw(step=0, rows=trainer.replay_rows, slot=0, slots=2)
    assert len(drawn.images) == 2
    assert len(decoded) == 2 + sum(map(len, drawn.images)), "the first of a list twice, which is datasets' own business"


def test_rewards_see_the_columns_that_they_need(models: Mapping[str, Seeing], tmp_path: Path) -> None:
    class Keyed(StartsWithDigit):
        requires = ("key",)

        def verify(self, completion: str, row: Mapping[str, Any]) -> Verdict:
            seen.append(dict(row))
            return super().verify(completion, row)

    seen: list[dict[str, Any]] = []
    trainer = build(GRPOTrainer, models["llava"], tmp_path, reward_funcs=RewardFunction(Keyed()), max_steps=1)
    trainer.train()
    assert len(seen) == 8
    assert all(set(row) == {"key"} for row in seen)
    assert {row["key"] for row in seen} <= {row["key"] for row in ROWS}
    assert trainer.state.log_history[0]["rewards/starts_with_digit/failures"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_with_and_without_pictures_train_together(
    models: Mapping[str, Seeing], tmp_path: Path, family: str
) -> None:
    mixed = [{**row, "images": row["images"] if number % 3 else []} for number, row in enumerate(ROWS)]
    trainer = build(GRPOTrainer, models[family], tmp_path, rows=mixed, max_steps=2, gradient_accumulation_steps=2)
    trainer.train()
    inputs = generated(trainer, count=16)
    assert inputs["num_images"] == [0] * 4 + [2] * 4 + [1] * 4 + [0] * 4
    alone = each_alone(trainer.model, models[family].processor, [mixed[index // 4] for index in range(16)], inputs)
    found = logps_of(trainer, inputs) * inputs["completion_mask"]
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)


def test_images_that_the_model_cannot_read_are_refused(
    models: Mapping[str, Seeing], tiny_model: str, tmp_path: Path
) -> None:
    def start(model: str, data: Any, **more: Any) -> None:
        GRPOTrainer(model, length_reward, GRPOConfig(**arguments(tmp_path)), data, **more)

    with pytest.raises(UserError, match=r"The prompts hold images, and the model .* reads text alone: take a vision-"):
        start(tiny_model, _dataset(ROWS))
    with pytest.raises(UserError, match="reads text alone"):
        start(tiny_model, _dataset(PROMPTS), eval_dataset={"seen": _dataset(ROWS)})
    bare = tmp_path / "bare"
    shutil.copytree(models["llava"].path, bare)
    (bare / "processor_config.json").unlink()
    with pytest.raises(UserError, match="bare comes without a processor that reads them: give processing_class"):
        start(str(bare), _dataset(ROWS))
    single = Dataset.from_list([{"prompt": row["prompt"], "image": row["images"][0]} for row in ROWS])
    with pytest.raises(UserError, match="have a column 'image': call it 'images', and make each row's a list"):
        start(models["llava"].path, single)


def test_engines_refuse_a_policy_that_sees(models: Mapping[str, Seeing], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Rollout engines take no images yet: let the policy generate itself"):
        GRPOTrainer(
            models["llava"].path,
            length_reward,
            GRPOConfig(**arguments(tmp_path)),
            _dataset(ROWS),
            rollouts=engine_of(models["llava"]),
        )


def test_pairs_are_not_made_of_prompts_with_images(
    models: Mapping[str, Seeing], stores: Mapping[str, Store], tmp_path: Path
) -> None:
    tokenizer = models["llava"].processor.tokenizer
    with pytest.raises(UserError, match="made of tokens alone, and 9 of 9 prompts hold images: take prompts of text"):
        pairs.build(stores["llava"], ROWS, tokenizer, Pairs(), output_dir=tmp_path / "pairs")
    assert not (tmp_path / "pairs").exists()


STANDS_ON = {
    (Trainer, "_load_best_model"): "0e183d55a9db7414",
    (Trainer, "_load_from_checkpoint"): "4711d0506786db15",
    (trl_utils, "split_pixel_values_by_grid"): "3aca66e33a7978d3",
}


@pytest.mark.parametrize(("owner", "name"), STANDS_ON, ids=lambda value: getattr(value, "__name__", value))
def test_what_we_stand_on_has_not_changed(owner: Any, name: str) -> None:
    found = hashlib.sha256(inspect.getsource(getattr(owner, name)).encode()).hexdigest()[:16]
    assert found == STANDS_ON[owner, name], f"{name} has changed: re-read it, then record {found}."


# ------------------------------------------------------------------ whole jobs

RECIPE: dict[str, Any] = {
    "name": "shapes",
    "model": {
        "warm_start": {
            "architecture": "llava",
            "hidden_size": 32,
            "intermediate_size": 64,
            "layers": 2,
            "heads": 2,
            "steps": 12,
            "batch_size": 32,
            "learning_rate": 5e-3,
            "vision": {"layers": 1},
        }
    },
    "task": {"name": "shapes", "options": {"rows": 40, "questions": ["colour"], "max_shapes": 4, "eval_share": 0.3}},
    "rollout": {"max_tokens": 4, "batch_size": 64},
    "presample": {"samples_per_prompt": 4, "pef_threshold": 1, "stored_per_prompt": 1},
    "evaluation": {"prompts": 4, "n": 4, "k": [1], "resamples": 50},
    "method": {
        "name": "dph_rl",
        "prompts_per_step": 2,
        "args": {
            "num_generations": 4,
            "per_device_train_batch_size": 8,
            "max_steps": 3,
            "learning_rate": 1e-3,
            "save_steps": 1,
            "logging_steps": 1,
            "report_to": [],
        },
    },
}


def test_a_whole_job_rehearses_what_it_has_seen(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after a step and continued: trained is what the recipe says, on the images of its task."""
    made: list[Any] = []

    class Stopping(DPHTrainer):
        def _measure(self, measured: Any, mode: str) -> None:
            super()._measure(measured, mode)
            if not made:
                made.append(self)
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("posttrain.trainers.dph_rl.Trainer", Stopping)
    recipe = recipes.validate(RECIPE, "test")
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(recipe, tmp_path / "out", resume=False, command="test")
    assert not (tmp_path / "out/dph_rl/history.json").exists()
    pipeline.run(recipe, tmp_path / "out", resume=True, command="test")
    history = json.loads((tmp_path / "out/dph_rl/history.json").read_text())
    assert [entry["step"] for entry in history if "reward" in entry] == [1, 2, 3]
    assert history[0]["pef/log_ratio_abs"] < 1e-5
    assert history[1]["pef/log_ratio_abs"] > 1e-5
    assert made[0].args.ddp_find_unused_parameters is True
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "out/dph_rl/model").state_dict()
    checkpoint = AutoModelForImageTextToText.from_pretrained(tmp_path / "out/dph_rl/checkpoints/checkpoint-3")
    assert all(torch.equal(saved[name], value) for name, value in checkpoint.state_dict().items())


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
