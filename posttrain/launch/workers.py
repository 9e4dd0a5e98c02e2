"""The processes of a launch, and what they agree on."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from posttrain.errors import UserError


@dataclass
class Workers:
    """The processes of this launch."""

    rank: int = field(default_factory=lambda: int(os.environ.get("RANK", "0")))
    world: int = field(default_factory=lambda: int(os.environ.get("WORLD_SIZE", "1")))

    @property
    def first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world == 1:
            return
        import torch
        from accelerate import PartialState

        # Sampling and warm starts on the first process can take hours: nobody may give up waiting before. Without a GPU
        # accelerate meets over gloo when it is told so, and not at all otherwise.
        PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=2)).wait_for_everyone()

    def share(self, make: Callable[[], Any]) -> Any:
        """What `make` returns in the first process, in every one.

        Raises:
            UserError: it failed there, in every process alike.
        """
        if self.world == 1:
            return make()
        from accelerate.utils import broadcast_object_list

        self.barrier()
        made: list[Any] = [None, None]
        if self.first:
            try:
                made = [make(), None]
            except UserError as error:
                made = [None, str(error)]
        broadcast_object_list(made, from_process=0)
        if made[1] is not None:
            failure = UserError(made[1])
            failure.told = not self.first
            raise failure
        return made[0]


def launched(name: str) -> bool:
    """Whether an environment variable is one by which a launcher tells its processes who they are."""
    return _LAUNCHED.fullmatch(name) is not None


_LAUNCHED = re.compile(
    r"RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|GROUP_WORLD_SIZE|ROLE_.*|MASTER_ADDR|MASTER_PORT|"
    r"NODE_RANK|ACCELERATE_.*|TORCHELASTIC_.*|TORCH_NCCL_.*|FSDP_.*|PET_.*"
)
