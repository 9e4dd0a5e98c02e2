"""`posttrain run` on real vLLM: colocated, and on a server that the run starts, that dies and is started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from posttrain import recipe as recipes
from posttrain.launch import pipeline
from posttrain.launch.engines import Engines
from tests.patience import eventually, gone
from tests.test_pipeline import SMALL, cache, write

__all__ = ["cache"]

HEADS = ["--set", "model.warm_start.heads=1"]  # of size 32, which vLLM has a kernel for on a CPU


def finished(out: Path, label: str) -> list[dict[str, Any]]:
    """The logged steps of a finished run."""
    history = json.loads((out / label / "history.json").read_text())
    return [entry for entry in history if "reward" in entry]


LORA = ["model.lora={r: 4, alpha: 8}", "rollout.lora_sync=adapter"]


@pytest.mark.parametrize("lora", [pytest.param([], id="full"), pytest.param(LORA, id="lora", marks=pytest.mark.slow)])
def test_a_run_on_colocated_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: list[str]) -> None:
    """Two methods and three evaluations on one engine, which changes weights between them."""
    path, out = write(tmp_path), tmp_path / "out"
    settings = [*HEADS, "--set", "rollout.engine=vllm_colocate"]
    settings += [part for setting in lora for part in ("--set", setting)]
    command = [sys.executable, "-m", "posttrain", "run", str(path), *settings, "--output-dir", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr and "INFO" not in done.stderr, done.stderr
    for label in ("base", "grpo", "dph_rl"):
        identity = json.loads((out / label / "evaluation/evaluation.json").read_text())["identity"]
        assert identity["engine"] == "vllm_colocate"
    for label in ("grpo", "dph_rl"):
        steps = finished(out, label)
        assert [entry["step"] for entry in steps] == [1, 2, 3]
        assert all(entry["sampler/gap_max"] < 1e-4 for entry in steps)
        assert all(entry["rollout/sync_seconds"] > 0 for entry in steps)

    def never(self: Engines) -> None:
        raise AssertionError("nothing is left to sample")

    monkeypatch.setattr(Engines, "_start", never)
    pipeline.run(recipes.load(str(path), settings[1::2]), out, resume=False, command="")


@pytest.mark.slow
def test_a_server_that_dies_costs_nothing(tmp_path: Path) -> None:
    """Two processes on it: one sentence with address, call and version, a checkpoint, and `--resume` ends the run."""
    long = json.loads(json.dumps(SMALL["method"]))
    long["args"] |= {"max_steps": 2000, "save_steps": 1000, "logging_steps": 1, "per_device_train_batch_size": 4}
    path, out = write(tmp_path, {"baselines": [], "method": long}), tmp_path / "out"
    command = [sys.executable, "-m", "posttrain", "run", str(path), *HEADS]
    command += ["--set", "rollout.engine=vllm_server", "--set", "launch.processes=2", "--output-dir", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        said = ""
        assert process.stderr is not None
        for line in process.stderr:
            said += line
            if "train dph_rl" in line and "steps" in line:  # the progress of a run under way
                break
        servers = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if any("api_server" in part for part in child.cmdline())
        ]
        assert servers, said
        server = servers[0]
        group = [server, *server.children(recursive=True)]
        os.killpg(server.pid, signal.SIGKILL)
        started = time.monotonic()
        said += process.stderr.read()
        process.wait(timeout=300)
    assert process.returncode == 2, said[-3000:]
    assert time.monotonic() - started < 200  # and not the 600 s that a server may take to answer
    (error,) = (line for line in said.splitlines() if line.startswith("error:"))
    assert "Traceback" not in said, said
    assert "http://127.0.0.1:" in error and "policy version" in error, error
    assert "is saved. Continue with --resume." in error, error
    assert eventually(lambda: all(gone(member.pid) for member in group))
    (saved,) = (out / "dph_rl/checkpoints").glob("checkpoint-*/complete")
    step = int(saved.parent.name.rpartition("-")[2])
    assert 0 < step < 2000
    for file in (path, out / "recipe.yaml"):  # make the end near, so that the test is short
        content = yaml.safe_load(file.read_text())
        content["method"]["args"]["max_steps"] = step + 2
        file.write_text(yaml.safe_dump(content, sort_keys=False))
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [entry["step"] for entry in finished(out, "dph_rl")][-2:] == [step + 1, step + 2]
    left = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
    assert left == []
