"""Processes that judge, for tests/test_workers.py: what each of two does, and what one does when it is interrupted."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

from posttrain.launch.spawn import leave
from posttrain.rewards import _workers
from tests.hostile import Hostile, Options, hangs
from tests.patience import patient

WORDS = ["a", "who", "power", "b", "kill SIGKILL", "c", "raise x", "d"] * 2


def judge_beside_another(folder: Path) -> None:
    """Judge the same words as the other process, at the same time, and again after both have met."""
    from accelerate import PartialState

    state = PartialState(cpu=True)
    found = [Hostile(Options()).score(WORDS, [{}] * len(WORDS)) for _ in range(2)]
    state.wait_for_everyone()
    answers = {
        "statuses": [[verdict.status for verdict in verdicts] for verdicts in found],
        "parents": sorted({verdicts[1].answer.split()[1] for verdicts in found if verdicts[1].answer}),
    }
    (folder / f"{state.process_index}.json").write_text(json.dumps(answers))
    state.destroy_process_group()


def judge_and_wait() -> None:
    """Say which processes judge, and then judge what never ends, in a thread."""
    verifier = Hostile(Options(deadline=600))
    (found,) = verifier.score(["who"], [{}])
    threading.Thread(target=verifier.score, args=(["loop", "power"], [{}] * 2), daemon=True).start()
    print(os.getpid(), found.answer, flush=True)
    time.sleep(600)


def judge_after_an_interrupt() -> None:
    """Be interrupted in the middle of judging, and judge again."""
    verifier = Hostile(Options(deadline=600))
    (before,) = verifier.score(["who"], [{}])
    try:
        print(before.answer, flush=True)
        verifier.score(["a", "loop", "sleep 60", "b"], [{}] * 4)
    except KeyboardInterrupt:
        (after,) = verifier.score(["who"], [{}])
        print(after.answer, flush=True)


def judge_in_a_child() -> None:
    """Fork with workers at hand; both processes judge, and the child has workers of its own."""
    verifier = Hostile(Options())
    (mine,) = verifier.score(["who"], [{}])
    child = os.fork()
    (found,) = verifier.score(["who"], [{}])
    same = (found.answer or "").split()[1] == (mine.answer or "").split()[1]
    if not child:
        _workers.close()
        os._exit(3 if same else 4)
    _, status = os.waitpid(child, 0)
    print(same, os.WEXITSTATUS(status), flush=True)


if __name__ == "__main__":
    _workers._Judgement = patient(hangs)  # type: ignore[misc]
    if sys.argv[1] == "wait":
        judge_and_wait()
    elif sys.argv[1] == "interrupt":
        judge_after_an_interrupt()
    elif sys.argv[1] == "fork":
        judge_in_a_child()
    else:
        judge_beside_another(Path(sys.argv[1]))
        leave(0)
