"""What each of two processes does in tests/test_teaching.py: learn from the teacher of a recipe, and hear it again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from posttrain import recipe as recipes
from posttrain.launch import pipeline
from posttrain.launch.resolve import trainer_config
from posttrain.launch.spawn import leave
from posttrain.launch.teaching import Teachers
from posttrain.launch.workers import Workers
from posttrain.rollouts.teacher import ModelTeacher
from posttrain.seams.sharding import release


def taught(recipe: recipes.Recipe, folder: Path, label: str = "kdrl") -> tuple[Teachers, Any]:
    """The teachers of a recipe, and the trainer that a run would give them to."""
    job, workers = pipeline.prepare(recipe), Workers()
    model = pipeline.initial_policy(job, workers)
    engines = job.engines(model, workers, folder / "server.log")
    teachers = Teachers(job, engines, workers, folder)
    teachers.require_fit()
    args = trainer_config(job.runs[label], folder / "checkpoints")
    data = pipeline.Data(teachers=teachers)
    return teachers, pipeline._trainer(job, job.runs[label], engines, data, model=model, args=args, callbacks=[])


def asked(rank: int) -> tuple[list[list[int]], list[list[int]]]:
    """Other sequences in each process, of other lengths."""
    generator = torch.Generator().manual_seed(rank)
    lengths = torch.randint(1, 9, (11, 2), generator=generator).tolist()
    drawn = [[torch.randint(0, 19, (n,), generator=generator).tolist() for n in both] for both in lengths]
    return [prompt for prompt, _ in drawn], [completion for _, completion in drawn]


def hear(trainer: Any, whole: str) -> dict[str, Any]:
    """What the teacher says after training, held to the model at `whole`, and how much of it this process holds."""
    sequences = asked(trainer.accelerator.process_index)
    found, wanted = (
        each.score(*sequences, temperature=0.7).logps for each in (trainer.teacher, ModelTeacher.load(whole))
    )
    parameters = list(trainer.teacher.model.parameters())
    numel = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    local = [p.to_local() if hasattr(p, "to_local") else getattr(p, "ds_tensor", p) for p in parameters]
    said = {
        "gap": float((found - wanted).abs().max()),
        "spread": float(wanted.std()),
        "share": sum(tensor.numel() for tensor in local) / numel,
        "log": [entry["kd/log_ratio_abs"] for entry in trainer.state.log_history if "kd/log_ratio_abs" in entry],
    }
    release(trainer)
    kept = sum(getattr(parameter, "ds_tensor", parameter).numel() for parameter in parameters)
    return {**said, "kept": kept}


def main() -> None:
    """Arguments: recipes, each beside whose file its report goes."""
    for name in sys.argv[1:]:
        recipe, file = recipes.load(name), Path(name)
        _, trainer = taught(recipe, file.parent / file.stem)
        trainer.train()
        assert recipe.teacher is not None
        said = hear(trainer, str(recipe.teacher.path or recipe.model.path))
        rank = torch.distributed.get_rank()
        file.with_name(f"{file.stem}-{rank}.json").write_text(json.dumps(said))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    leave(0)
