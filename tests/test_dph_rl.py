"""DPH-RL: what is rehearsed, what it weighs, what it costs, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from trl import GRPOConfig
from trl import GRPOTrainer as TRLTrainer

from posttrain.errors import UserError
from posttrain.objectives.divergences import token_divergence
from posttrain.rollouts.replay import StoredAnswer
from posttrain.rollouts.store import Store
from posttrain.trainers import DPHConfig, DPHTrainer
from posttrain.trainers.grpo import GRPOTrainer
from tests.oracle import PROMPTS, arguments, batch, dataset, length_reward, make_store, perturb, value_and_gradient


@pytest.fixture(scope="module")
def store(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Store:
    made = make_store(tiny_model, tmp_path_factory.mktemp("dph") / "store")
    assert made.counts["pef"] >= 3
    assert made.counts["explore"] >= 2
    return made


def build(model: Any, folder: Path, store: Store | None, peft_config: Any = None, **changes: Any) -> DPHTrainer:
    settings = arguments(folder, **{"divergence": "forward_kl", "eta": 0.5, "replay_ratio": 0.5, **changes})
    return DPHTrainer(
        model=model,
        reward_funcs=length_reward,
        args=DPHConfig(**settings),
        train_dataset=dataset(PROMPTS),
        store=store,
        peft_config=peft_config,
    )


def stored_part(trainer: DPHTrainer, answers: list[StoredAnswer]) -> torch.Tensor:
    """Σ l / Σ tokens over stored answers, each in a forward of its own, with gradient: the definition of L_pef."""
    total, tokens = torch.zeros(()), 0
    for answer in answers:
        ids = torch.tensor([[*answer.prompt_ids, *answer.token_ids]])
        width = len(answer.token_ids)
        logits = trainer.model(input_ids=ids).logits[0, -width - 1 : -1]
        logps = torch.log_softmax(logits, -1)[torch.arange(width), ids[0, -width:]]
        d = logps - torch.tensor(answer.logps)
        total = total + token_divergence(trainer.args.divergence, d, alpha=trainer.args.alpha).sum()
        tokens += width
    return total / tokens


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha", "chi2"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_loss_is_policy_term_plus_eta_times_stored_token_mean(
    tiny_model: str, tmp_path: Path, store: Store, divergence: str, loss_type: str
) -> None:
    alpha = 0.5 if divergence == "alpha" else None
    trainer = build(tiny_model, tmp_path, store, divergence=divergence, alpha=alpha, loss_type=loss_type)
    perturb(trainer)
    trainer.current_gradient_accumulation_steps = 1
    inputs = batch(trainer, seed=5, beta=0.0, sampler=False)
    joined = value_and_gradient(trainer, inputs)

    replay, trainer.replay = trainer.replay, None
    policy = value_and_gradient(trainer, inputs)
    assert replay is not None
    answers = replay.draw(step=1, rows=trainer.replay_rows, slot=0, slots=1).answers
    assert len(answers) == 4  # half of 8 rollouts
    trainer.model.zero_grad()
    pef = stored_part(trainer, answers)
    pef.backward()
    gradient = torch.cat([p.grad.reshape(-1) for p in trainer.model.parameters() if p.grad is not None])

    torch.testing.assert_close(joined[0], policy[0] + 0.5 * pef.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(joined[1], policy[1] + 0.5 * gradient, rtol=1e-4, atol=1e-6)
    assert (0.5 * gradient).abs().max() > 1e-3


def test_token_mean_spans_the_whole_optimiser_step(tiny_model: str, tmp_path: Path, store: Store) -> None:
    """Two micro-batches: their stored parts add up to one token mean, however the rows fall."""
    trainer = build(tiny_model, tmp_path, store, gradient_accumulation_steps=2, replay_ratio=0.3)
    assert trainer.replay_rows == 5  # 0.3 × 16 rollouts, split 2 + 3
    perturb(trainer)
    trainer.current_gradient_accumulation_steps = 2
    inputs = batch(trainer, seed=6, beta=0.0, sampler=False)
    inputs["advantages"] = torch.zeros_like(inputs["advantages"])
    total = sum(value_and_gradient(trainer, inputs)[0] for _ in range(2))
    assert trainer.replay is not None
    answers = trainer.replay.draw(step=1, rows=5, slot=0, slots=1).answers
    torch.testing.assert_close(total, 0.5 * stored_part(trainer, answers).detach(), rtol=1e-5, atol=1e-6)


def test_paper_scaling_multiplies_by_stored_rows_per_rollout(tiny_model: str, tmp_path: Path, store: Store) -> None:
    direct = build(tiny_model, tmp_path, store, eta=0.2, replay_ratio=0.25)
    paper = build(tiny_model, tmp_path, store, eta=0.2, replay_ratio=0.25, eta_scaling="paper")
    assert direct.rehearsal_weight == pytest.approx(0.2)
    assert paper.rehearsal_weight == pytest.approx(0.2 * 2 / 8)  # 2 stored rows to 8 rollouts


def test_near_perfect_prompts_are_never_rolled_out(tiny_model: str, tmp_path: Path, store: Store) -> None:
    trainer = build(tiny_model, tmp_path, store)
    assert len(trainer.train_dataset) == store.counts["explore"]
    seen: set[str] = set()
    original = trainer._generate

    def recorded(prompts: list[Any]) -> Any:
        seen.update(prompt[0]["content"] for prompt in prompts)
        return original(prompts)

    trainer._generate = recorded
    trainer.train()
    explored = {PROMPTS[i]["prompt"][0]["content"] for i in store.exploration([row["prompt"] for row in PROMPTS])}
    assert seen
    assert seen <= explored


def test_stored_rows_never_touch_advantages(tiny_model: str, tmp_path: Path, store: Store) -> None:
    """The objective for rollouts sees rollouts only, with TRL's advantages, in every micro-batch."""
    trainer = build(tiny_model, tmp_path, store, gradient_accumulation_steps=2)
    rows, original = [], trainer.objective

    def recorded(tokens: Any) -> Any:
        rows.append((tokens.logps.shape, tokens.advantages.shape))
        return original(tokens)

    trainer.objective = recorded
    trainer.train()
    assert len(rows) == 4
    assert all(logps[0] == 8 and advantages == (8, 1) for logps, advantages in rows)


def test_no_reference_model_and_no_reference_forward(tiny_model: str, tmp_path: Path, store: Store) -> None:
    trainer = build(tiny_model, tmp_path, store, max_steps=3)
    assert trainer.ref_model is None
    policies: list[bool] = []
    original = trainer._get_per_token_logps_and_entropies

    def counted(model: Any, *args: Any, **kwargs: Any) -> Any:
        policies.append(model is trainer.model)
        return original(model, *args, **kwargs)

    backbone: list[bool] = []
    trainer.model.model.register_forward_hook(lambda *_: backbone.append(torch.is_grad_enabled()))
    trainer._get_per_token_logps_and_entropies = counted
    trainer.train()
    assert policies == [True] * 3  # one per optimiser step, stored rows included
    assert sum(backbone) == 3  # every other pass of the backbone is a token of `generate`, without gradient


def test_eta_zero_is_grpo_on_the_exploration_prompts(tiny_model: str, tmp_path: Path, store: Store) -> None:
    dph = build(tiny_model, tmp_path, store, eta=0.0, max_steps=3)
    assert dph.replay is None
    dph.train()
    explored = [PROMPTS[i] for i in store.exploration([row["prompt"] for row in PROMPTS])]
    settings = {"epsilon_high": 0.28, "delta": 3.0, "weight_decay": 0.01, "max_steps": 3}
    grpo = GRPOTrainer(
        model=tiny_model,
        reward_funcs=length_reward,
        args=GRPOConfig(**arguments(tmp_path, **settings)),
        train_dataset=dataset(explored),
    )
    before = [p.detach().clone() for p in grpo.model.parameters()]
    grpo.train()
    for (name, ours), theirs, start in zip(dph.model.named_parameters(), grpo.model.parameters(), before, strict=True):
        assert torch.equal(ours, theirs), name
        assert not torch.equal(ours, start), name


@pytest.mark.parametrize("beta", [0.3])
def test_reverse_kl_k3_is_trl_with_an_uncorrected_kl(tiny_model: str, tmp_path: Path, beta: float) -> None:
    """The released baseline, cross-checked: TRL's beta with use_bias_correction_kl off."""
    ours = build(tiny_model, tmp_path, None, divergence="reverse_kl_k3", eta=beta)
    assert ours.ref_model is not None
    settings = {"epsilon_high": 0.28, "delta": 3.0, "beta": beta, "use_bias_correction_kl": False}
    theirs = TRLTrainer(
        model=tiny_model,
        reward_funcs=length_reward,
        args=GRPOConfig(**arguments(tmp_path, **settings)),
        train_dataset=dataset(PROMPTS),
    )
    inputs = batch(ours, seed=8, beta=beta, sampler=False)
    for trainer in (ours, theirs):
        trainer.current_gradient_accumulation_steps = 1
    torch.testing.assert_close(
        value_and_gradient(ours, inputs), value_and_gradient(theirs, inputs), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("divergence", ["reverse_kl", "js_definition"])
def test_online_reference_pulls_towards_the_reference(
    tiny_model: str, tmp_path: Path, store: Store, divergence: str
) -> None:
    """Without any reward signal, training brings a perturbed policy back: the forward KL to the store falls."""
    trainer = build(
        tiny_model,
        tmp_path,
        store,
        divergence=divergence,
        eta=1.0,
        learning_rate=3e-3,
        max_steps=25,
        reference_tolerance=10.0,
    )
    trainer.reward_funcs = [lambda completions, **_: [1.0] * len(completions)]
    perturb(trainer, 0.1)

    def distance() -> float:
        total = 0.0
        with torch.no_grad():
            for answer in store.answers:
                ids = torch.tensor([[*answer.prompt_ids, *answer.token_ids]])
                width = len(answer.token_ids)
                logps = torch.log_softmax(trainer.model(input_ids=ids).logits[0, -width - 1 : -1], -1)
                d = logps[torch.arange(width), ids[0, -width:]] - torch.tensor(answer.logps)
                total += token_divergence("forward_kl", d).sum().item()
        return total

    before = distance()
    trainer.train()
    assert distance() < 0.6 * before


def test_lora_trains_against_the_store_of_its_base(tiny_model: str, tmp_path: Path, store: Store) -> None:
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = build(tiny_model, tmp_path, store, peft_config=lora)
    base = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_" not in n}
    trainer.train()
    metrics = [log for log in trainer.state.log_history if "pef/divergence" in log]
    assert metrics[0]["pef/log_ratio_abs"] < 1e-4  # a fresh adapter is the reference
    moved = [p for n, p in trainer.model.named_parameters() if "lora_B" in n and p.abs().max() > 0]
    assert moved
    assert all(torch.equal(p, base[n]) for n, p in trainer.model.named_parameters() if n in base)


def test_first_step_starts_at_the_reference_and_then_moves(tiny_model: str, tmp_path: Path, store: Store) -> None:
    trainer = build(tiny_model, tmp_path, store, max_steps=4)
    trainer.train()
    gaps = [log["pef/log_ratio_abs"] for log in trainer.state.log_history if "pef/log_ratio_abs" in log]
    assert len(gaps) == 4
    assert gaps[0] < 1e-5 < gaps[-1]


def test_store_that_does_not_match_its_log_probs_stops_the_run(tiny_model: str, tmp_path: Path, store: Store) -> None:
    trainer = build(tiny_model, tmp_path, store)
    assert trainer.replay is not None
    trainer.replay.answers = [
        StoredAnswer(a.prompt_ids, a.token_ids, [x - 0.2 for x in a.logps]) for a in trainer.replay.answers
    ]
    with pytest.raises(ValueError, match=r"differs from the store by 0\.2 nats"):
        trainer.train()


def test_store_of_another_temperature_is_refused(tiny_model: str, tmp_path: Path, store: Store) -> None:
    with pytest.raises(UserError, match=r"at temperature 1, but the run trains at 0\.7"):
        build(tiny_model, tmp_path, store, temperature=0.7)


def test_store_at_the_rollout_temperature_starts_at_the_reference(tiny_model: str, tmp_path: Path) -> None:
    trainer = build(tiny_model, tmp_path, make_store(tiny_model, tmp_path / "s", temperature=0.7), temperature=0.7)
    trainer.train()
    assert trainer.state.log_history[0]["pef/log_ratio_abs"] < 1e-5


def test_store_of_another_model_is_refused(
    tiny_model: str, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.get_input_embeddings().weight[3] += 0.1
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "other")
    with monkeypatch.context() as patched:  # by its files, before anything is loaded
        patched.setattr(TRLTrainer, "__init__", lambda *_, **__: pytest.fail("the model was loaded"))
        with pytest.raises(UserError, match=r"made by another model than .*: the files differ"):
            build(str(tmp_path / "other"), tmp_path, store)
    with pytest.raises(UserError, match="the weights differ"):  # by its weights, where there are no files
        build(AutoModelForCausalLM.from_pretrained(tmp_path / "other"), tmp_path, store)


def test_prompts_that_were_never_presampled_are_refused(tiny_model: str, tmp_path: Path, store: Store) -> None:
    unknown = [*PROMPTS, {"prompt": [{"role": "user", "content": "999=9"}], "key": "999"}]
    with pytest.raises(UserError, match="1 of 10 training prompts are not in the store"):
        DPHTrainer(
            model=tiny_model,
            reward_funcs=length_reward,
            args=DPHConfig(**arguments(tmp_path)),
            train_dataset=dataset(unknown),
            store=store,
        )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"divergence": "kl"}, "unknown divergence 'kl'; known: forward_kl, js"),
        ({"divergence": "alpha"}, "needs alpha"),
        ({"divergence": "alpha", "alpha": 1.0}, "strictly between 0 and 1"),
        ({"divergence": "js", "alpha": 0.5}, "has no effect"),
        ({"divergence": "none", "alpha": 0.5}, "has no effect"),
        ({"eta": -0.1}, "eta must be a finite number ≥ 0"),
        ({"eta": math.inf}, "eta must be a finite number ≥ 0"),
        ({"replay_ratio": 0.0}, "to rehearse nothing, set divergence = none"),
        ({"eta_scaling": "mean"}, "unknown eta_scaling 'mean'"),
        ({"beta": 0.1}, "would add a second KL"),
        ({"log_ratio_clamp": 0.0}, "log_ratio_clamp must be positive"),
        ({"log_ratio_clamp": math.inf}, "at most 40, got inf"),
        ({"reference_tolerance": 0.0}, "reference_tolerance must be positive"),
    ],
)
def test_config_refuses(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        DPHConfig(**arguments(tmp_path, **changes))


def test_rehearsal_without_a_store_is_refused(tiny_model: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rehearses stored answers: pass store="):
        build(tiny_model, tmp_path, None)


def test_defaults_are_the_papers(tmp_path: Path) -> None:
    config = DPHConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, per_device_train_batch_size=16)
    wanted = {
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "temperature": 1.0,
        "num_generations": 16,
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "delta": 3.0,
        "loss_type": "dapo",
        "beta": 0.0,
        "divergence": "js",
        "eta": 0.2,
        "replay_ratio": 256 / 2048,
        "log_ratio_clamp": 5.0,
    }
    assert {name: getattr(config, name) for name in wanted} == wanted


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_resumed_run_continues_as_the_uninterrupted_one(
    tiny_model: str, tmp_path: Path, store: Store, divergence: str
) -> None:
    """Steps 3 and 4 after a restart see the same rows, rollouts and updates as without one (within one epoch)."""
    settings = {"divergence": divergence, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    settings["per_device_train_batch_size"] = 4  # one prompt a step
    assert store.counts["explore"] >= 4
    whole = build(tiny_model, tmp_path / "whole", store, **settings)
    whole.train()
    again = build(tiny_model, tmp_path / "again", store, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert again.state.global_step == 4
    for (name, one), other in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
