"""The beginning of the small recipes that whole runs are made of: countdown, on a model of 20,000 parameters."""

from __future__ import annotations

from typing import Any

WARM_START: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "heads": 2,
    "steps": 250,
    "batch_size": 64,
    "learning_rate": 1e-2,
}
BEGINNING: dict[str, Any] = {
    "name": "small",
    "model": {"warm_start": WARM_START},
    "task": {"name": "countdown", "options": {"rows": 24, "eval_share": 0.4}},
    "rollout": {"max_tokens": 8, "batch_size": 64},
}
