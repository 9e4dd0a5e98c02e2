"""Teachers for tests: a student's own model with noise, whose log-probs can be moved and whose calls are counted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from posttrain.rollouts.teacher import ModelTeacher, TeacherScores


def other_model(path: str, seed: int = 11, scale: float = 0.1) -> Any:
    """The same model with noise on its weights."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model.eval()


class Shifted(ModelTeacher):
    """A model whose log-probs are moved by `shift` [B, 1] or a number, and which counts how often it is asked."""

    shift: Any = 0.0
    calls = 0

    def score(self, *arguments: Any, **options: Any) -> TeacherScores:
        self.calls += 1
        scores = super().score(*arguments, **options)
        return replace(scores, logps=(scores.logps + self.shift) * scores.mask)
