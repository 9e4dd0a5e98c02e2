"""Two processes give what one gives: losses and gradients, pre-sampling, evaluation, and the whole job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from transformers import TrainerControl

from posttrain.seams.callbacks import StopOnInterrupt
from tests.oracle import make_store
from tests.patience import eventually
from tests.processes import ROOT, launch
from tests.test_pipeline import write


@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo"])
def test_gradient_of_two_processes_equals_that_of_one(tiny_model: str, tmp_path: Path, loss_type: str) -> None:
    """Rollouts and stored rows are split over the ranks; the averaged gradient and every metric stay the same."""
    store = make_store(tiny_model, tmp_path / "store")
    results: list[dict[str, Any]] = []
    for processes in (1, 2):
        output = tmp_path / f"{processes}.pt"
        launch(processes, ["-m", "tests.two_processes", tiny_model, str(store.path), str(output), loss_type])
        results.append(torch.load(output, weights_only=True))
    one, two = results
    assert (one["world"], two["world"]) == (1, 2)
    assert one["gradient"].abs().max() > 1e-3
    torch.testing.assert_close(two["loss"], one["loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(two["gradient"], one["gradient"], rtol=1e-4, atol=1e-6)
    assert set(one["metrics"]) == set(two["metrics"])
    assert one["metrics"]["pef/divergence"] > 0
    for name, value in one["metrics"].items():
        assert two["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-7), name


def test_engines_of_two_processes_are_measured_together(tiny_model: str, tmp_path: Path) -> None:
    launch(2, ["-m", "tests.two_rollouts", tiny_model, str(tmp_path / "out.pt"), "agree"])
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert [(said, step) for said, step, _ in found["everyone"]] == [("", 3), ("", 3)]
    assert torch.equal(found["everyone"][0][2], found["everyone"][1][2])
    for entry in found["history"][:3]:
        assert 0.1 < entry["sampler/gap_mean"] < 0.3, "the mean over both"
        assert entry["sampler/gap_max"] == pytest.approx(0.3, abs=1e-5)
        assert entry["sampler/gap_p99"] == pytest.approx(0.3, abs=1e-5)


def test_an_engine_that_fails_in_one_process_stops_both_at_the_same_step(tiny_model: str, tmp_path: Path) -> None:
    launch(2, ["-m", "tests.two_rollouts", tiny_model, str(tmp_path / "out.pt"), "fail"])
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    (first, one, _), (second, two, _) = found["everyone"]
    assert (one, two) == (1, 1)
    assert "The engine of process 1 could not sample (EngineError: out of breath)" in first
    assert second == "out of breath"


def test_whole_job_in_two_processes(tmp_path: Path) -> None:
    """`accelerate launch -m posttrain.train` and `posttrain run` are one job: same store, same base evaluation."""
    path = write(tmp_path)
    settings = ["--set", "method.args.per_device_train_batch_size=4"]
    environment = {"POSTTRAIN_CACHE": str(tmp_path / "cache")}
    launch(
        2,
        [
            *["-m", "posttrain.train", str(path), *settings],
            *["--output-dir", str(tmp_path / "two")],
        ],
        **environment,
    )
    done = subprocess.run(
        [sys.executable, "-m", "posttrain", "run", str(path), *settings, "--output-dir", str(tmp_path / "one")],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("manifest.json", "prompts.parquet", "samples.parquet", "answers.parquet"):
        assert (tmp_path / "one/store" / name).read_bytes() == (tmp_path / "two/store" / name).read_bytes(), name
    base = [pq.read_table(tmp_path / f"{run}/base/evaluation/samples.parquet") for run in ("one", "two")]
    assert base[0].equals(base[1])
    for run, processes in (("one", 1), ("two", 2)):
        assert json.loads((tmp_path / run / "provenance.json").read_text())["machine"]["processes"] == processes
        assert (tmp_path / run / "report.html").is_file()
        history = json.loads((tmp_path / run / "dph_rl/history.json").read_text())
        assert [entry["step"] for entry in history if "reward" in entry] == [1, 2, 3]


def test_a_signal_that_comes_while_processes_agree_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vote of a step is cast before the signal and counted after it: the next step must stop."""
    stop = StopOnInterrupt()
    votes: list[int] = []

    def all_reduce(vote: torch.Tensor, op: object) -> None:
        votes.append(int(vote))
        if len(votes) == 1:
            stop._handle(signal.SIGINT, None)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    arguments = SimpleNamespace(device="cpu")
    stopped = []
    for _ in range(2):
        control = TrainerControl()
        stop.on_step_end(arguments, None, control)
        stopped.append((control.should_training_stop, control.should_save, stop.interrupted))
    assert votes == [0, 1]
    assert stopped == [(False, False, False), (True, True, True)]


def test_signal_to_one_process_stops_both_at_the_same_step(tmp_path: Path) -> None:
    """Ctrl-C reaches processes at different moments: they agree on a step, save once, and none is left waiting."""
    path = write(tmp_path, {"baselines": []})
    settings = ["method.args.per_device_train_batch_size=4", "method.args.max_steps=2000", "launch.processes=2"]
    settings.append("method.args.save_total_limit=1")
    command = [sys.executable, "-m", "posttrain", "run", str(path), "--output-dir", str(tmp_path / "out")]
    for setting in settings:
        command += ["--set", setting]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "POSTTRAIN_CACHE": str(tmp_path / "cache")}
    log = tmp_path / "log"
    with log.open("w") as stream, subprocess.Popen(command, env=environment, cwd=ROOT, stderr=stream) as process:
        checkpoints = tmp_path / "out/dph_rl/checkpoints"
        assert eventually(lambda: bool(list(checkpoints.glob("*/complete"))) or process.poll() is not None, 900)
        workers = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if child.environ().get("RANK") == "1" and "posttrain.train" in child.cmdline()
        ]
        assert len(workers) == 1, log.read_text()[-2000:]
        workers[0].send_signal(signal.SIGINT)
        process.wait(timeout=300)
    saved = [marker.parent for marker in checkpoints.glob("checkpoint-*/complete")]
    assert len(saved) == 1, log.read_text()[-2000:]
    assert (saved[0] / "rng_state_0.pth").is_file()
    assert (saved[0] / "rng_state_1.pth").is_file()
