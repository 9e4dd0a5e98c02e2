"""Real vLLM, in the trainers' processes and in a server, under DDP, ZeRO-2 and ZeRO-3: one loss, and no stale weights.

Two processes each. The answers are given, so that nothing but the engine and the launcher differs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.launch.serve import ServerProcess
from posttrain.launch.warm_start import character_tokenizer, small_model
from posttrain.recipe import Vllm, WarmStart
from posttrain.tasks import load
from tests.oracle import make_store
from tests.processes import ROOT, finish
from tests.test_sharding import launcher as command_of
from tests.test_sharding import partitioning

LAUNCHERS = [
    pytest.param(("zero3",), id="zero3"),  # where most can go wrong: weights are in pieces
    pytest.param(("ddp", "zero2", "zero3"), id="all", marks=pytest.mark.slow),
]


def save(folder: Path, seed: int) -> None:
    """A model with heads that vLLM has kernels for, sharp enough for log-probs to tell models apart."""
    task = load("countdown")
    tokenizer = character_tokenizer(task.alphabet or "", task.chat_template or "")
    model = small_model(WarmStart(hidden_size=64, intermediate_size=96, heads=2, seed=seed), tokenizer, "float32")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("across")
    save(folder / "engine", seed=1)
    save(folder / "policy", seed=2)
    make_store(str(folder / "policy"), folder / "store")
    weights = [
        dict(AutoModelForCausalLM.from_pretrained(folder / name).named_parameters()) for name in ("engine", "policy")
    ]
    assert all((weights[0][name] - weights[1][name]).abs().max() > 0.05 for name in weights[0]), "every weight differs"
    return folder


@pytest.fixture(scope="module", params=LAUNCHERS)
def results(prepared: Path, request: pytest.FixtureRequest) -> Iterator[dict[str, dict[str, Any]]]:
    """What was logged, by launcher and by method and engine."""
    found: dict[str, dict[str, Any]] = {}
    with ServerProcess(str(prepared / "engine"), vllm=Vllm(max_model_len=64, max_num_seqs=64)) as server:
        for launcher in request.param:
            # As shipped, ZeRO-3 leaves parameters as small as all of these are whole.
            file = partitioning(prepared) if launcher == "zero3" else ROOT / f"recipes/accelerate/{launcher}.yaml"
            command = [*command_of(file), "-m", "tests.across_engines"]
            finish([*command, str(prepared), server.url], timeout=400, DS_ACCELERATOR="cpu", PYTHONHASHSEED="0")
            found[launcher] = json.loads((prepared / "results.json").read_text())
    yield found


def test_the_launcher_is_what_trains(results: dict[str, dict[str, Any]]) -> None:
    for launcher, runs in results.items():
        assert {run["active"] for run in runs.values()} == {launcher}


@pytest.mark.parametrize("method", ["grpo", "dph_rl", "lora"])
def test_losses_agree_across_engines_and_launchers(results: dict[str, dict[str, Any]], method: str) -> None:
    expected = next(iter(results.values()))[f"{method} transformers"]["log"]
    assert [entry["step"] for entry in expected] == [1, 2, 3]
    assert all(abs(entry["loss"]) > 1e-3 for entry in expected)
    for launcher, runs in results.items():
        for name, run in runs.items():
            if name.startswith(method):
                for wanted, entry in zip(expected, run["log"], strict=True):
                    for key in ("loss", "grad_norm", "entropy", "reward"):
                        assert entry[key] == pytest.approx(wanted[key], abs=1e-5, rel=1e-5), (launcher, name, key)


def test_every_engine_has_the_trained_weights(results: dict[str, dict[str, Any]]) -> None:
    for launcher, runs in results.items():
        for name, run in runs.items():
            if run["distance"] is not None:
                assert run["distance"] < 1e-5, (launcher, name)
                assert all(entry["sampler/gap_max"] < 1e-5 for entry in run["log"]), (launcher, name)
