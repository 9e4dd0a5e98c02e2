"""What each of two processes does in tests/test_erpd.py: train on fixed rollouts, each on its share of every step."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed
from datasets import Dataset
from datasets.table import InMemoryTable

from posttrain.launch.spawn import leave
from posttrain.trainers.erpd import ERPDConfig, ERPDTrainer
from tests.oracle import arguments

CASES: dict[str, dict[str, Any]] = {
    "sapo": {"extract_loss": "sapo"},
    "mse": {"extract_loss": "mse", "implicit_beta": 1.0},
    "distil": {"phase": "distil", "dead_zone": 0.1, "verifier_gate": True, "kl_coef": 0.1},
}


def settings(folder: Any, **changes: Any) -> dict[str, Any]:
    """ERPDConfig arguments of a small run on a CPU: steps of eight answers in two micro-batches."""
    known = {name: value for name, value in arguments(folder).items() if name != "num_generations"}
    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 3}
    return {**known, **batch, **changes}


def train(model: str, table: pa.Table, folder: Path, case: str) -> dict[str, Any]:
    """The weights and the log of three steps of SGD, the same number of answers in each whatever the processes."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    changes = {"per_device_train_batch_size": 4 // world, "optim": "sgd", "learning_rate": 0.1, **CASES[case]}
    trainer = ERPDTrainer(
        model, args=ERPDConfig(**settings(folder / case, **changes)), train_dataset=Dataset(InMemoryTable(table))
    )
    trainer.train()
    weights = torch.cat([parameter.detach().reshape(-1) for parameter in trainer.model.parameters()])
    kept = ("loss", "grad_norm", "entropy", "kl/", "log_ratio/", "clip_ratio/", "signal/")
    log = [{key: entry[key] for key in entry if key.startswith(kept)} for entry in trainer.state.log_history[:3]]
    return {"weights": weights, "log": log, "world": trainer.accelerator.num_processes}


def main() -> None:
    """Arguments: model, Parquet file of the rollouts, output file."""
    model, rollouts, output = sys.argv[1:]
    table = pq.read_table(rollouts)
    found = {case: train(model, table, Path(output).parent / "two", case) for case in CASES}
    if torch.distributed.get_rank() == 0:
        torch.save(found, output)
    torch.distributed.barrier()  # nobody leaves while another still writes
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    leave(0)
