"""Checkpoints of models whose weights are saved under other names than they have in memory.

Models that read images mostly are: they are saved as the first releases of their families were. transformers 5.17 loads
a checkpoint into a training run by the names in memory, finds none of them, says so in a warning and goes on from the
initial weights with the optimiser state of trained ones.
"""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from posttrain.rollouts.weights import loaded_whole, saved_shapes


class RenamedCheckpoints(Trainer):
    """A Trainer that resumes from the weights of a checkpoint whatever their names in it are.

    DeepSpeed and FSDP keep checkpoints of their own, with the names in memory, and so do adapters.
    """

    model: Any

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        known = self.is_fsdp_enabled or hasattr(self.model, "peft_config")
        if known or set(saved_shapes(resume_from_checkpoint)) <= set(self.model.state_dict()):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_renamed(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        own = self.is_deepspeed_enabled or self.is_fsdp_enabled or hasattr(self.model, "peft_config")
        path = str(self.state.best_model_checkpoint)
        if not own and not set(saved_shapes(path)) <= set(self.model.state_dict()):
            self._load_renamed(path)

    def _load_renamed(self, path: str) -> None:
        with loaded_whole():
            saved = type(self.model).from_pretrained(path, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())
