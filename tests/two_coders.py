"""What each of two processes judges in tests/test_code.py, at the same time as the other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from posttrain import rewards
from posttrain.launch.spawn import leave
from tests.patience import unhurried

TESTS = ["assert f(2) == 4", "assert f(7) == 14"]
PROGRAMS = {
    "def f(x): return 2 * x": "ok",
    "import os\nwhile True: os.fork()": "wrong",
    "def f(x): return x + 2": "wrong",
    "x = bytearray(2**40)": "resource",
    "def f(x):\n    while True: pass  # late": "timeout",
    "def f(x): return x + x": "ok",
}


def main(folder: Path) -> None:
    """Judge, and write down what came of it."""
    from accelerate import PartialState

    state = PartialState(cpu=True)
    verifier = rewards.load("code", {"deadline": 3.0})
    completions = [f"```python\n{program}\n```" for program in PROGRAMS]
    found = verifier.score(completions, [{"tests": TESTS}] * len(completions))
    state.wait_for_everyone()
    (folder / f"{state.process_index}.json").write_text(json.dumps([verdict.status for verdict in found]))
    state.destroy_process_group()


if __name__ == "__main__":
    with unhurried():
        main(Path(sys.argv[1]))
    leave(0)
