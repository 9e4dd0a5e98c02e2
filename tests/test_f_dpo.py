"""f-DPO: equal to TRL's DPOTrainer where that is sound, finite where it is not, the same over several processes."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import create_model_from_path

from posttrain import recipe as recipes
from posttrain import registry
from posttrain.seams.preference import IDS, PreferenceTrainer
from posttrain.trainers.f_dpo import FDPOConfig, FDPOTrainer
from tests.preference_steps import PAIRS, STEPS, VARIANTS, arguments, lora, pairs, steps
from tests.processes import finish as run
from tests.test_sharding import launcher, partitioning
from tests.tiny_vision import colour, tiny_vision


def reference(folder: str) -> PreTrainedModel:
    """A model some nats per answer away from the policy, so that no log-ratio is zero."""
    model = create_model_from_path(folder)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


GIVEN = ("peft_config", "ref_model", "train_dataset", "eval_dataset")


def build(kind: type[DPOTrainer], model: str, folder: Path, **changes: Any) -> Any:
    """A trainer of either kind; what is `GIVEN` goes to it, other changes to its config."""
    given = {name: changes.pop(name) for name in GIVEN if name in changes}
    if kind is DPOTrainer:
        changes = {"optim": "rmsprop", **changes}
    config = DPOConfig if kind is DPOTrainer else FDPOConfig
    args = config(**arguments(folder, **changes))
    return kind(model, args=args, **{"train_dataset": pairs(), **given})


def both(model: str, folder: Path, ours: dict[str, Any], theirs: dict[str, Any], **common: Any) -> list[Any]:
    """Our trainer and TRL's on the same model, data, seed and (its own copy of the) reference."""
    made = []
    for kind, changes in ((FDPOTrainer, ours), (DPOTrainer, theirs)):
        ref = {} if "peft_config" in common else {"ref_model": reference(model)}
        made.append(build(kind, model, folder, **ref, **changes, **common))
    return made


def weights(trainer: Any) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in trainer.model.parameters()]).clone()


def trained(trainer: Any) -> tuple[Tensor, list[dict[str, float]]]:
    """Weights after training, which must have moved, and what was logged per step."""
    before = weights(trainer)
    trainer.train()
    assert (weights(trainer) - before).abs().max() > 1e-3
    return weights(trainer), [entry for entry in trainer.state.log_history if "loss" in entry]


def inputs_of(trainer: Any, rows: int) -> dict[str, Any]:
    batch: dict[str, Any] = trainer.data_collator([trainer.train_dataset[row] for row in range(rows)])
    return batch


def exact_logps(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    """log π(y|x) of every answer, chosen ones first, by a forward of our own."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logps = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
    return (logps * batch["completion_mask"][:, 1:]).sum(dim=1)


def with_log_ratios(folder: str, batch: dict[str, Any], chosen: list[float], rejected: list[float]) -> dict[str, Any]:
    """`batch` with the reference log-probs that make these the log-ratios of the policy in `folder`."""
    with torch.no_grad():
        logps = exact_logps(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), batch)
    first, second = (logps - torch.tensor(chosen + rejected)).float().chunk(2)
    return {**batch, "ref_chosen_logps": first, "ref_rejected_logps": second}


def value_and_gradient(trainer: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.precompute_ref_logps = "ref_chosen_logps" in batch
    loss = trainer._compute_loss(trainer.model, batch, False)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.reshape(-1) for p in trainer.model.parameters() if p.grad is not None])


# ------------------------------------------------------------------ equal to TRL where TRL is sound

SOUND = {
    "reverse_kl": ({"divergence": "reverse_kl"}, {}),
    "js": ({"divergence": "js"}, {"f_divergence_type": "js_divergence"}),
    "forward_kl": ({"divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    "alpha 0.3": (
        {"divergence": "alpha", "alpha": 0.3},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    ),
    "alpha 0.5": (
        {"divergence": "alpha", "alpha": 0.5},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    ),
}


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", SOUND)
def test_training_steps_equal_trl(tiny_model: str, tmp_path: Path, name: str, adapters: bool) -> None:
    """Real optimiser steps of two micro-batches each: loss, gradient norm, metrics and weights are TRL's."""
    common: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    if adapters:
        common["peft_config"] = lora()
    (ours, our_log), (theirs, their_log) = map(trained, both(tiny_model, tmp_path, *SOUND[name], **common))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert len(our_log) == len(their_log) == STEPS
    for mine, trl in zip(our_log, their_log, strict=True):
        assert set(mine) == set(trl)
        for metric in set(mine) if name == "reverse_kl" else {key for key in mine if not key.startswith("rewards/")}:
            later = metric == "grad_norm" and mine["step"] > 1  # of weights that differ by rounding
            assert mine[metric] == pytest.approx(trl[metric], rel=1e-4 if later else 1e-6, abs=1e-6), metric
    assert abs(our_log[0]["loss"] - math.log(2.0)) > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["hinge"]},
        {"loss_type": ["ipo"]},
        {"loss_type": ["robust"], "label_smoothing": 0.1},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"ld_alpha": 0.5},
        {"use_weighting": True},
    ],
    ids=lambda options: next(iter(options)) + "=" + str(next(iter(options.values()))),
)
def test_under_reverse_kl_all_losses_of_trl_are_its_own(
    tiny_model: str, tmp_path: Path, options: dict[str, Any]
) -> None:
    (ours, our_log), (theirs, their_log) = map(trained, both(tiny_model, tmp_path, {}, {}, max_steps=1, **options))
    assert torch.equal(ours, theirs)
    assert our_log == their_log


def test_evaluation_equals_trl(tiny_model: str, tmp_path: Path) -> None:
    ours, theirs = both(tiny_model, tmp_path, *SOUND["js"], eval_dataset=pairs().select(range(6)))
    mine, trl = ours.evaluate(), theirs.evaluate()
    assert mine["eval_loss"] == pytest.approx(trl["eval_loss"], rel=1e-6)
    assert mine["eval_loss"] != pytest.approx(math.log(2.0), rel=1e-3)
    assert mine["eval_rewards/margins"] != pytest.approx(trl["eval_rewards/margins"], rel=1e-2)


def test_the_logits_for_compute_metrics_are_another_forward(tiny_model: str, tmp_path: Path) -> None:
    ours, _ = both(tiny_model, tmp_path, *SOUND["js"])
    batch = inputs_of(ours, 2)
    plain = ours._compute_loss(ours.model, batch, False)
    with pytest.warns(FutureWarning, match="return_outputs"):
        loss, outputs = ours._compute_loss(ours.model, batch, True)
    assert torch.equal(loss, plain)
    assert outputs.logits.shape[:2] == batch["input_ids"].shape


def test_the_router_loss_of_a_mixture_of_experts_is_added_as_in_trl(tiny_model: str, tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.3,
    )
    folder = tmp_path / "experts"
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ours, theirs = both(str(folder), tmp_path, *SOUND["js"])
    batch = inputs_of(ours, 4)
    found, wanted = value_and_gradient(ours, batch), value_and_gradient(theirs, batch)
    assert theirs._metrics["train"]["aux_loss"][-1] > 0.5
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    ours.router_aux_loss_coef = 0.0
    assert value_and_gradient(ours, batch)[0] < found[0] - 0.1


# ------------------------------------------------------------------ where it differs from TRL


def test_a_collapsed_rejected_answer_is_no_nan(tiny_model: str, tmp_path: Path) -> None:
    """d = −120: TRL's e^120 is infinite and its gradient NaN; the pair is won, so here the others train on."""
    ours, theirs = both(tiny_model, tmp_path, *SOUND["forward_kl"])
    chosen, rejected = [0.5, -1.0, 0.2, 1.0], [0.3, 0.1, -0.4, -120.0]
    batch = with_log_ratios(tiny_model, inputs_of(ours, 4), chosen, rejected)
    assert value_and_gradient(theirs, batch)[1].isnan().any()
    loss, gradient = value_and_gradient(ours, batch)
    others = with_log_ratios(tiny_model, inputs_of(ours, 3), chosen[:3], rejected[:3])
    their_loss, their_gradient = value_and_gradient(theirs, others)
    torch.testing.assert_close(loss, 0.75 * their_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, 0.75 * their_gradient, rtol=1e-4, atol=1e-6)


def test_a_collapsed_chosen_answer_keeps_its_gradient(tiny_model: str, tmp_path: Path) -> None:
    """d_w = −120, d_l = 0, β = ½: L = −β s(d_w) = ½ (e^8 − 1 + 112 e^8) and ∇L = ½ (∇d_l − e^8 ∇d_w)."""
    ours, theirs = both(tiny_model, tmp_path, *SOUND["forward_kl"])
    batch = with_log_ratios(tiny_model, inputs_of(ours, 1), [-120.0], [0.0])
    assert not value_and_gradient(theirs, batch)[0].isfinite()
    loss, gradient = value_and_gradient(ours, batch)
    assert loss.item() == pytest.approx(0.5 * (113.0 * math.exp(8.0) - 1.0), rel=1e-5)
    exact = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    chosen, rejected = exact_logps(exact, batch)
    (0.5 * (rejected - math.exp(8.0) * chosen)).backward()
    wanted = torch.cat([parameter.grad.reshape(-1) for parameter in exact.parameters()])
    assert wanted.abs().max() > 1e3
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-2)


SCORES: dict[str, Callable[[float], float]] = {
    "reverse_kl": lambda d: d,
    "forward_kl": lambda d: 1.0 - math.exp(-d),
    "js": lambda d: math.log(2.0 / (1.0 + math.exp(-d))),
    "alpha": lambda d: (1.0 - math.exp(-0.3 * d)) / 0.3,
    "jeffreys": lambda d: d + 1.0 - math.exp(-d),
    "chi2_kl": lambda d: math.exp(d) - 1.0 + d,
}


@pytest.mark.parametrize("match_slope", [False, True])
@pytest.mark.parametrize("name", SCORES)
def test_loss_and_rewards_by_hand(tiny_model: str, tmp_path: Path, name: str, match_slope: bool) -> None:
    """Two pairs, d_w = 2 and −1, d_l = −3 and 0.5, β = 0.5 (js: 1 with match_slope; jeffreys and chi2_kl: ¼)."""
    alpha = 0.3 if name == "alpha" else None
    trainer = build(FDPOTrainer, tiny_model, tmp_path, divergence=name, alpha=alpha, match_slope=match_slope)
    batch = with_log_ratios(tiny_model, inputs_of(trainer, 2), [2.0, -1.0], [-3.0, 0.5])
    beta = 0.5 * {"js": 2.0, "jeffreys": 0.5, "chi2_kl": 0.5}.get(name, 1.0) if match_slope else 0.5
    chosen, rejected = ([beta * SCORES[name](d) for d in ratios] for ratios in ((2.0, -1.0), (-3.0, 0.5)))
    margins = [won - lost for won, lost in zip(chosen, rejected, strict=True)]
    loss, _ = value_and_gradient(trainer, batch)
    assert loss.item() == pytest.approx(sum(math.log1p(math.exp(-margin)) for margin in margins) / 2, rel=1e-5)
    logged = {key: values for key, values in trainer._metrics["train"].items() if key.startswith("rewards/")}
    assert logged == {
        "rewards/chosen": [pytest.approx(sum(chosen) / 2, rel=1e-4)],
        "rewards/rejected": [pytest.approx(sum(rejected) / 2, rel=1e-4)],
        "rewards/accuracies": [0.5],
        "rewards/margins": [pytest.approx(sum(margins) / 2, rel=1e-4)],
    }


@pytest.mark.parametrize(
    ("name", "alpha", "slope"),
    [
        ("js", None, 0.5),
        ("forward_kl", None, 1.0),
        ("alpha", 0.5, 1.0),
        ("jeffreys", None, 2.0),
        ("chi2_kl", None, 2.0),
    ],
)
def test_with_match_slope_training_begins_with_the_gradient_of_dpo(
    tiny_model: str, tmp_path: Path, name: str, alpha: float | None, slope: float
) -> None:
    """At π_θ = π_ref every loss is log 2, and the gradient is the slope s'(0) times DPO's."""
    plain = build(FDPOTrainer, tiny_model, tmp_path)
    batch = inputs_of(plain, 4)
    wanted = value_and_gradient(plain, batch)[1]
    assert wanted.abs().max() > 0.1
    for matched, factor in ((False, slope), (True, 1.0)):
        trainer = build(FDPOTrainer, tiny_model, tmp_path, divergence=name, alpha=alpha, match_slope=matched)
        loss, gradient = value_and_gradient(trainer, batch)
        assert loss.item() == pytest.approx(math.log(2.0), rel=1e-6)
        torch.testing.assert_close(gradient, factor * wanted, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ references and data


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_one_forward_of_the_policy_and_one_of_the_reference(tiny_model: str, tmp_path: Path, adapters: bool) -> None:
    """Per micro-batch, in training; none of the reference when its log-probs were precomputed."""
    peft = {"peft_config": lora()} if adapters else {}
    for precomputed, wanted in ((False, [True, False]), (True, [True])):
        trainer = build(
            FDPOTrainer,
            tiny_model,
            tmp_path,
            divergence="js",
            max_steps=1,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=4,
            precompute_ref_log_probs=precomputed,
            **peft,
        )
        assert (trainer.ref_model is None) == (adapters or precomputed)
        calls: list[bool] = []

        def counted(*_: Any, calls: list[bool] = calls) -> None:
            calls.append(torch.is_grad_enabled())

        for model in (trainer.model, trainer.ref_model):
            for name, module in model.named_modules() if model is not None else ():
                if name.endswith("embed_tokens"):
                    module.register_forward_pre_hook(counted)
        trainer.train()
        assert sorted(calls) == sorted(2 * wanted)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_precomputed_reference_logps_give_the_same_training(tiny_model: str, tmp_path: Path, adapters: bool) -> None:
    results = []
    for precomputed in (False, True):
        given = {"peft_config": lora()} if adapters else {"ref_model": reference(tiny_model)}
        trainer = build(
            FDPOTrainer, tiny_model, tmp_path, divergence="js", precompute_ref_log_probs=precomputed, **given
        )
        results.append(trained(trainer))
    (on_line, first), (precomputed_, second) = results
    torch.testing.assert_close(on_line, precomputed_, rtol=1e-5, atol=1e-6)
    assert [entry["loss"] for entry in first] == pytest.approx([entry["loss"] for entry in second], rel=1e-5)


def test_token_ids_are_taken_as_they_are(tiny_model: str, tmp_path: Path) -> None:
    """TRL's own tokens as bare columns train the same; tokens that no text gives arrive as they were sampled."""
    text = build(FDPOTrainer, tiny_model, tmp_path, divergence="js")
    ids = Dataset.from_list([{name: row[name] for name in IDS} for row in text.train_dataset])
    assert (ids.column_names, len(ids)) == (list(IDS), PAIRS)
    tokens = build(FDPOTrainer, tiny_model, tmp_path, divergence="js", train_dataset=ids)
    assert torch.equal(trained(tokens)[0], trained(text)[0])

    unusual = {"prompt_ids": [4, 5], "chosen_ids": [6, 2, 2], "rejected_ids": [7]}  # ends twice, and not at all
    long = {"prompt_ids": [4] * 5, "chosen_ids": [6], "rejected_ids": [7]}  # nothing of its answers would remain
    data = Dataset.from_list([unusual, long])
    trainer = build(FDPOTrainer, tiny_model, tmp_path, train_dataset=data, max_length=5)
    assert trainer.train_dataset.to_list() == [unusual]
    batch, pad = inputs_of(trainer, 1), trainer._tokenizer.pad_token_id
    assert batch["input_ids"].tolist() == [[4, 5, 6, 2, 2], [4, 5, 7, pad, pad]]
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 1, 1], [0, 0, 1, 0, 0]]
    whole = build(FDPOTrainer, tiny_model, tmp_path, train_dataset=data, max_length=None)
    assert whole.train_dataset.to_list() == [unusual, long]


def test_pairs_on_pictures_train_as_in_trl(tmp_path: Path) -> None:
    """A small LLaVA, pictures of one colour: three steps of JS are TRL's, and the vision tower learns."""
    model = tiny_vision(tmp_path / "model").path
    rows = pairs().select(range(4)).to_list()
    data = Dataset.from_list([{**row, "images": [colour(number)]} for number, row in enumerate(rows)])
    results = []
    for trainer in both(model, tmp_path, *SOUND["js"], train_dataset=data):
        tower = [(n, p.detach().clone()) for n, p in trainer.model.named_parameters() if "vision_tower" in n]
        results.append(trained(trainer))
        now = dict(trainer.model.named_parameters())
        assert max((now[name] - before).abs().max() for name, before in tower) > 1e-4
    (ours, our_log), (theirs, their_log) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert [entry["loss"] for entry in our_log] == pytest.approx([entry["loss"] for entry in their_log], rel=1e-6)


# ------------------------------------------------------------------ construction


def test_defaults_are_the_papers(tmp_path: Path) -> None:
    args = FDPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert (args.divergence, args.alpha, args.match_slope, args.edge, args.beta) == (
        "reverse_kl",
        None,
        False,
        8.0,
        0.1,
    )
    assert (args.optim, args.learning_rate, args.num_train_epochs) == ("rmsprop", 5e-7, 1)
    assert (args.lr_scheduler_type, args.warmup_steps) == ("constant_with_warmup", 150)


def test_the_method_is_found_and_takes_pairs() -> None:
    module = registry.load("method", "f_dpo")
    assert module.Trainer.takes_pairs and issubclass(module.Trainer, PreferenceTrainer)
    assert module.Config is FDPOConfig


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"divergence": "chi2"}, "'chi2' is not admissible for preferences: f'.0.. is finite"),
        ({"divergence": "total_variation"}, "'total_variation' is not admissible for preferences: f' takes two values"),
        ({"divergence": "hellinger"}, "'hellinger' is not admissible for preferences: it is 'alpha' with alpha = 0.5"),
        ({"divergence": "js_divergence"}, "unknown divergence 'js_divergence'; known: .*js"),
        ({"divergence": "alpha"}, "'alpha' needs alpha"),
        ({"divergence": "alpha", "alpha": -1.0}, "alpha must be a finite number ≥ 0, got -1"),
        ({"divergence": "alpha", "alpha": math.inf}, "alpha must be a finite number ≥ 0, got inf"),
        ({"divergence": "alpha", "alpha": math.nan}, "alpha must be a finite number ≥ 0, got nan"),
        ({"divergence": "js", "alpha": 0.5}, "alpha = 0.5 has no effect on the divergence 'js'"),
        ({"beta": 0.0}, "beta must be a positive finite number, got 0.0"),
        ({"beta": -0.1}, "beta must be a positive finite number, got -0.1"),
        ({"beta": math.nan}, "beta must be a positive finite number, got nan"),
        ({"beta": math.inf}, "beta must be a positive finite number, got inf"),
        ({"edge": 0.0}, "edge must be positive and at most 40, got 0.0"),
        ({"edge": 100.0}, "edge must be positive and at most 40, got 100.0"),
        ({"f_divergence_type": "js_divergence"}, "f_divergence_type = 'js_divergence' is TRL's .*: set divergence"),
        ({"f_alpha_divergence_coef": 0.7}, "set alpha = 0.3 instead, because TRL's coefficient is 1 − alpha"),
        (
            {"divergence": "js", "loss_type": "ipo"},
            "'js' is not defined with loss_type = .'ipo'., but it divides by the",
        ),
        ({"divergence": "js", "loss_type": ["sigmoid_norm"]}, "but it divides by the length of the answer after"),
        ({"divergence": "js", "loss_type": ["hinge"]}, "but it is another loss than the sigmoid one"),
        ({"divergence": "js", "loss_type": ["sigmoid", "sft"]}, "set it to ..sigmoid.."),
        (
            {"divergence": "js", "loss_weights": [0.5]},
            "loss_weights = .0.5., but there is a single loss: set it to None",
        ),
        ({"divergence": "js", "ld_alpha": 0.5}, "ld_alpha = 0.5, but log-ratios are those of whole answers"),
        ({"divergence": "js", "use_weighting": True}, "use_weighting = True, but pairs are not weighted: set it to F"),
        ({"divergence": "js", "label_smoothing": 0.1}, "label_smoothing = 0.1, but labels are not smoothed"),
    ],
    ids=str,
)
def test_refused_at_construction(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        FDPOConfig(**arguments(tmp_path, **settings))


def test_alpha_beyond_forward_kl_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="beyond forward KL"):
        FDPOConfig(**arguments(tmp_path, divergence="alpha", alpha=1.5))


# ------------------------------------------------------------------ several processes


@pytest.fixture(scope="module")
def alone(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process computes."""
    folder = tmp_path_factory.mktemp("alone")
    steps(folder, tiny_model, list(VARIANTS))
    return folder


@pytest.mark.parametrize(
    ("config", "kind", "variants"),
    [
        ("ddp", "ddp", ["full", "lora", "precomputed"]),
        ("zero2", "zero2", ["full"]),
        ("partitioning", "zero3", ["full"]),
        pytest.param("zero2", "zero2", ["lora", "precomputed"], marks=pytest.mark.slow),
        pytest.param("partitioning", "zero3", ["lora", "precomputed"], marks=pytest.mark.slow),
        pytest.param("fsdp2", "fsdp2", ["full", "lora", "precomputed"], marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_as_one_does(
    alone: Path, tiny_model: str, tmp_path: Path, config: str, kind: str, variants: list[str]
) -> None:
    """Jeffreys on the same pairs: loss, gradient norm, metrics and weights are the same."""
    file = partitioning(tmp_path) if config == "partitioning" else recipes.RECIPES / "accelerate" / f"{config}.yaml"
    run([*launcher(file), "-m", "tests.preference_steps", str(tmp_path), tiny_model, *variants])
    for name in variants:
        wanted, found = (json.loads((folder / f"{name}.json").read_text()) for folder in (alone, tmp_path))
        assert (found["active"], found["processes"]) == (kind, 2)
        assert (found["held"] == 0) == (config == "partitioning")
        assert len(wanted["log"]) == len(found["log"]) == STEPS
        for one, two in zip(wanted["log"], found["log"], strict=True):
            assert set(one) == set(two)
            # Before the first update both rewards are zero but for rounding, and so is which of them is larger.
            for metric in set(one) - ({"rewards/accuracies"} if one["step"] == 1 else set()):
                assert two[metric] == pytest.approx(one[metric], rel=1e-5, abs=1e-5), (name, metric)
        assert wanted["log"][-1]["rewards/margins"] > 0.05
        stored = "adapter_model.safetensors" if name == "lora" else "model.safetensors"
        first, second = (load_file(folder / name / stored) for folder in (alone, tmp_path))
        assert set(second) - set(first) <= {"lm_head.weight"}  # tied: DeepSpeed writes it twice
        for key, value in first.items():
            torch.testing.assert_close(second[key], value, rtol=0, atol=1e-5, msg=lambda text, n=key: f"{n}: {text}")
        shutil.rmtree(tmp_path / name)


# ------------------------------------------------------------------ upgrades

FINGERPRINTS = {
    "__init__": "632f447c71dcb043",
    "_compute_loss": "5e58a1699e0d76cd",
    "_precompute_ref_logps": "f2c098c7da6ca701",
    "_prepare_dataset": "35e349e8e8266df4",
    "compute_ref_log_probs": "90611af9cbadb8ec",
}


@pytest.mark.parametrize("method", FINGERPRINTS)
def test_trl_has_not_changed_under_us(method: str) -> None:
    source = inspect.getsource(getattr(DPOTrainer, method))
    found = hashlib.sha256(source.encode()).hexdigest()[:16]
    assert found == FINGERPRINTS[method], (
        f"TRL's DPOTrainer.{method} has changed: re-read it, run this file, then record {found} here."
    )
