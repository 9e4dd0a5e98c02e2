"""What each of two processes does in tests/test_across_engines.py: train on given answers, with every engine in turn.

Arguments: folder (with `engine`, `policy` and `store`), address of a server. The engines start with the weights of
another model than the policy's, so that whatever a sync leaves out shows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig

from posttrain.launch.spawn import leave
from posttrain.recipe import Server, Vllm
from posttrain.rollouts.engine import Sample, SamplingParams
from posttrain.rollouts.vllm_colocate import VLLMColocateEngine
from posttrain.rollouts.vllm_server import VLLMServerEngine
from posttrain.seams.sharding import RequireSharding, active, release
from posttrain.trainers.dph_rl import DPHConfig, DPHTrainer
from posttrain.trainers.grpo import GRPOTrainer
from tests.oracle import PROMPTS, arguments, dataset, length_reward

STEPS, VOCABULARY = 3, 19


def answers(prompts: Sequence[Sequence[int]], step: int) -> list[list[int]]:
    """Answers that depend on prompt, place in the group and step alone: 1 to 6 tokens, every third one finished."""
    made = []
    for prompt, same in groupby(prompts):
        for place, _ in enumerate(same):
            generator = torch.Generator().manual_seed(hash((tuple(prompt), place, step)) % 2**31)
            length = int(torch.randint(1, 7, (1,), generator=generator))
            ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
            made.append([*ids[:5], 1] if place % 3 == 0 else ids)
    return made


class Given:
    """A real engine that is synced and scores, and whose answers are given."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def sample(self, prompts: Sequence[Any], params: SamplingParams) -> list[list[Sample]]:
        repeated = [ids for ids in prompts for _ in range(params.n)]
        given = answers(repeated, self.engine.policy_version)
        scores = self.engine.score(list(zip(repeated, given, strict=True)))
        drawn = [
            Sample(list(ids), tokens, score.logprobs, "", "length", self.engine.policy_version)
            for ids, tokens, score in zip(repeated, given, scores, strict=True)
        ]
        return [drawn[i * params.n : (i + 1) * params.n] for i in range(len(prompts))]


def train(folder: Path, method: str, engine: Any, *, lora: bool = False) -> dict[str, Any]:
    """Three steps on given answers; what was logged, and how far the engine is from the trained policy after a sync."""
    settings = arguments(
        folder / "checkpoints",
        per_device_train_batch_size=4,
        max_steps=STEPS,
        learning_rate=1e-2,
        adam_epsilon=1e-3,  # so that a gradient of nothing but rounding moves nothing
        max_grad_norm=0.5,
        use_cpu=True,
    )
    common: dict[str, Any] = {
        "model": str(folder / "policy"),
        "reward_funcs": length_reward,
        "train_dataset": dataset(PROMPTS),
        "callbacks": [RequireSharding()],
        "rollouts": None if engine is None else Given(engine),
    }
    if lora:
        common["peft_config"] = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(5)  # of the adapters
    trainer: Any
    if method == "grpo":
        trainer = GRPOTrainer(args=GRPOConfig(**settings), **common)
    else:
        args = DPHConfig(**settings, divergence="js", eta=5.0, replay_ratio=0.5)
        trainer = DPHTrainer(args=args, store=folder / "store", **common)
    if engine is None:
        trainer._generate_single_turn = lambda prompts, *_, **__: (answers(prompts, trainer.state.global_step), None)
    look = Look(trainer, engine)
    trainer.add_callback(look)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    release(trainer)
    return {**look.seen, "log": log}


class Look(TrainerCallback):
    """Looks at trainer and engine after the last step, while DeepSpeed still holds the model."""

    def __init__(self, trainer: Any, engine: Any) -> None:
        self.trainer, self.engine = trainer, engine
        self.seen: dict[str, Any] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == STEPS:
            self.seen["active"] = active(self.trainer.model, self.trainer.optimizer)
            self.seen["distance"] = None if self.engine is None else distance(self.trainer, self.engine)


def distance(trainer: Any, engine: Any) -> float:
    """Largest difference of log-probs (nats) between trainer and synced engine, over 64 random sequences."""
    trainer._rollouts._sync(STEPS)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (64, 12), generator=generator)
    scores = engine.score([(row[:4], row[4:]) for row in ids.tolist()])
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model_wrapped, ids, torch.ones_like(ids), 8, batch_size=64
        )
    found = torch.tensor([score.logprobs for score in scores])
    assert found.std() > 0.3, "random sequences under a sharp policy differ"
    return float((found - logps).abs().max())


def main() -> None:
    """See above."""
    folder, url = Path(sys.argv[1]), sys.argv[2]
    from accelerate import PartialState

    state = PartialState()
    engines: dict[str, Any] = {"transformers": None}
    start = str(folder / "engine")
    engines["vllm_colocate"] = VLLMColocateEngine.load(start, settings=Vllm(max_model_len=64, max_num_seqs=64))
    engines["vllm_server"] = VLLMServerEngine.connect(url, path=start, settings=Server(timeout=120))
    results = {
        f"{method} {name}": train(folder, method, engine)
        for method in ("grpo", "dph_rl")
        for name, engine in engines.items()
    }
    for name, engine in engines.items():
        results[f"lora {name}"] = train(folder, "grpo", engine, lora=True)
    for engine in engines.values():
        if engine is not None:
            engine.close()
    if state.is_main_process:
        (folder / "results.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    leave(0)
