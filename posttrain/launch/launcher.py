"""`python -m posttrain.launch.launcher …`: accelerate's own launcher, ending with a sentence, not a traceback.

A worker says itself what went wrong; what is left to say here is only which one was killed.
"""

from __future__ import annotations

import logging
import sys

from accelerate.commands.launch import main as launch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> None:
    """Launch, and exit with 2 when a worker did so for a mistake of the user's, with 1 for any other failure."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # tells every failure once more
    try:
        launch()
    except ChildFailedError as error:
        failures = error.failures.values()
        for rank, failure in sorted(error.failures.items()):
            if failure.exitcode < 0 and -failure.exitcode not in (2, 15):  # SIGINT and SIGTERM end the others
                print(
                    f"error: process {rank} was killed by signal {-failure.exitcode}"
                    f"{' (often for lack of memory)' if failure.exitcode == -9 else ''}.",
                    file=sys.stderr,
                )
        sys.exit(2 if any(failure.exitcode == 2 for failure in failures) else 1)


if __name__ == "__main__":
    main()
