"""Running a launch to its end, in the checkout and on one thread per process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def finish(command: list[str], *, timeout: float = 300, **environment: str) -> None:
    """Run a command, which must succeed within `timeout` seconds."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]


def launch(processes: int, arguments: list[str], **environment: str) -> None:
    """Run Python with `arguments` in as many processes as accelerate starts, which must all succeed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    if processes > 1:
        # torchrun, with gloo where there is no GPU, at any free port: tests run side by side
        command += ["--multi_gpu", "--main_process_port", "0"]
    finish([*command, *arguments], **environment)
