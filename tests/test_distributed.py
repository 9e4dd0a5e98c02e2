"""Two processes give what one gives: losses and gradients, pre-sampling, evaluation, and the whole job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from tests.oracle import make_store
from tests.test_pipeline import write

ROOT = Path(__file__).parent.parent


def launch(processes: int, arguments: list[str], **environment: str) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--cpu"]
    done = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


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
    assert one["gradient"].abs().max() > 1e-3
    torch.testing.assert_close(two["loss"], one["loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(two["gradient"], one["gradient"], rtol=1e-4, atol=1e-6)
    assert set(one["metrics"]) == set(two["metrics"])
    assert one["metrics"]["pef/divergence"] > 0
    for name, value in one["metrics"].items():
        assert two["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-7), name


def test_whole_job_in_two_processes(tmp_path: Path) -> None:
    """`accelerate launch -m posttrain.train` and `posttrain run` are one job: same store, same base evaluation."""
    path = write(tmp_path)
    settings = ["--set", "method.args.per_device_train_batch_size=4"]
    environment = {"POSTTRAIN_CACHE": str(tmp_path / "cache")}
    launch(
        2,
        [
            *["-m", "posttrain.train", str(path), *settings, "--set", "launch.processes=2"],
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
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("manifest.json", "prompts.parquet", "samples.parquet", "answers.parquet"):
        assert (tmp_path / "one/store" / name).read_bytes() == (tmp_path / "two/store" / name).read_bytes(), name
    base = [pq.read_table(tmp_path / f"{run}/base/evaluation/samples.parquet") for run in ("one", "two")]
    assert base[0].equals(base[1])
    for run in ("one", "two"):
        assert (tmp_path / run / "report.html").is_file()
        history = json.loads((tmp_path / run / "dph_rl/history.json").read_text())
        assert [entry["step"] for entry in history if "reward" in entry] == [1, 2, 3]
