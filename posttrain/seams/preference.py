"""The seam with TRL's DPOTrainer: one trainer on which every method of preference pairs stands.

TRL prepares pairs, runs the reference, and logs; a method supplies an `objective` of the pairs' log-ratios. TRL's own
loss is worked out on the very same forward and dropped, a few numbers per pair, so that its metrics stay its own.

Metrics replaced here, each a mean over the pairs of all processes: `rewards/chosen` and `rewards/rejected` (the
method's implicit reward of an answer, without the constant that its prompt adds), `rewards/margins` (their difference)
and `rewards/accuracies` (fraction of pairs whose chosen answer has the larger one). TRL logs β·log-ratio there,
whatever the divergence. Everything else that TRL logs (entropy, logits, logps, …) is unchanged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from torch import Tensor
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import global_then_local_main_first

from posttrain.seams.checkpoints import RenamedCheckpoints
from posttrain.seams.sharding import RequireSharding

__all__ = ["DPOConfig", "PreferenceTrainer", "beyond_sigmoid"]

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
"""Columns of pairs that are tokenised already: lists of token ids."""


class PreferenceTrainer(RenamedCheckpoints, DPOTrainer):
    """DPOTrainer with the sigmoid loss replaced by `objective`.

    One forward of the policy per micro-batch, and one of the reference unless its log-probs were precomputed. With
    options that ask for another of TRL's losses (`beyond_sigmoid`) TRL's own loss is used untouched, so a method whose
    objective is more than DPO's refuses them.

    Args:
        model, ref_model, args, train_dataset, …: as `trl.DPOTrainer`. Data sets have TRL's formats, or columns
            prompt_ids, chosen_ids and rejected_ids, whose tokens are taken as they are. As with TRL's formats, a pair
            whose prompt alone fills max_length is dropped.
    """

    takes_pairs = True

    _tag_names = ["trl", "posttrain"]  # noqa: RUF012 - as TRL declares it
    _name = "posttrain"

    args: Any
    model: Any

    def __init__(self, model: Any, ref_model: Any = None, args: DPOConfig | None = None, **kwargs: Any) -> None:
        super().__init__(model, ref_model=ref_model, args=args, **kwargs)
        if not any(isinstance(callback, RequireSharding) for callback in self.callback_handler.callbacks):
            self.add_callback(RequireSharding())

    # ------------------------------------------------------------------ what a method supplies

    def objective(  # type: ignore[override]  # HF keeps a search score there
        self, chosen_log_ratios: Tensor, rejected_log_ratios: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss per pair [B], to be minimised, and the implicit rewards of the chosen and the rejected answers [B].

        Args:
            chosen_log_ratios, rejected_log_ratios: log π_θ(y|x) − log π_ref(y|x) of whole answers [B] in nats, float32,
                with gradient.
        """
        raise NotImplementedError(f"{type(self).__name__} has no objective.")

    # ------------------------------------------------------------------ the three methods of TRL that we override

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        first = next(iter(dataset))
        if not all(_is_tokens(first.get(name)) for name in IDS):
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if args.max_length is None or args.truncation_mode != "keep_start":
            return dataset
        limit = args.max_length  # alone in what datasets hashes, so that precomputed log-probs are found again
        with global_then_local_main_first():
            return dataset.filter(lambda row: len(row["prompt_ids"]) < limit)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if self.accelerator.num_processes > 1 and isinstance(dataset, Dataset) and not dataset.cache_files:
            # TRL's first process hands them to the others in a file beside the data set's, and in memory it has none.
            folder = Path(self.args.output_dir) / f"pairs_{name}"
            if self.accelerator.is_main_process:
                dataset.save_to_disk(folder)
            self.accelerator.wait_for_everyone()
            dataset = load_from_disk(folder)
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if beyond_sigmoid(self.args):
            return super()._compute_loss(model, inputs, return_outputs)  # type: ignore[no-untyped-call]
        precomputed = self.precompute_ref_logps
        if precomputed:
            reference = (inputs["ref_chosen_logps"], inputs["ref_rejected_logps"])
        else:
            reference = self.compute_ref_log_probs(self.ref_model or self.model, inputs)  # type: ignore[no-untyped-call]
            inputs = {**inputs, "ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}
        recorder = _Recorder(model)
        self.precompute_ref_logps = True  # they are in the batch now
        try:
            result = super()._compute_loss(recorder, inputs, return_outputs)  # type: ignore[no-untyped-call]
        finally:
            self.precompute_ref_logps = precomputed

        # Summed as TRL sums: prompts and padding are zero, and virtual tokens of prompt learning come first.
        logps = recorder.outputs.log_probs[:, 1 - inputs["completion_mask"].size(1) :].float().sum(dim=1)
        chosen, rejected = (logps - torch.cat(reference).float()).chunk(2)
        per_pair, chosen_rewards, rejected_rewards = self.objective(chosen, rejected)
        loss = per_pair.mean()
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * recorder.outputs.aux_loss
        self._measure(chosen_rewards.detach(), rejected_rewards.detach())
        return (loss, result[1]) if return_outputs else loss

    # ------------------------------------------------------------------ parts of the above

    def _measure(self, chosen: Tensor, rejected: Tensor) -> None:
        """Put the implicit rewards in the place of those that TRL has just logged, in one collective."""
        margins = chosen - rejected
        per_pair = torch.stack([chosen, rejected, (margins > 0).float(), margins], dim=1)
        means = self.accelerator.gather(per_pair).mean(dim=0).tolist()
        logged = self._metrics["train" if self.model.training else "eval"]
        for name, value in zip(("chosen", "rejected", "accuracies", "margins"), means, strict=True):
            logged[f"rewards/{name}"][-1] = value


class _Recorder:
    """A model in whose place it is called; keeps what the first call returned."""

    outputs: Any = None

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, **kwargs: Any) -> Any:
        outputs = self.model(**kwargs)
        if self.outputs is None:  # a second call is TRL's for the logits that compute_metrics asks for
            self.outputs = outputs
        return outputs


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(token, int) for token in value)


_BY_LENGTH = "it divides by the length of the answer after the divergence's non-linearity"

_NEUTRAL: dict[str, tuple[Any, str]] = {
    "loss_type": (["sigmoid"], "it is another loss than the sigmoid one"),
    "loss_weights": (None, "there is a single loss"),
    "ld_alpha": (None, "log-ratios are those of whole answers"),
    "use_weighting": (False, "pairs are not weighted"),
    "label_smoothing": (0.0, "labels are not smoothed"),
}


def beyond_sigmoid(args: DPOConfig) -> str | None:
    """The first option of `args` with which TRL computes another loss than DPO's sigmoid one, and what sets it apart.

    Returns:
        `option = value, but reason: set it to neutral`, or None.
    """
    for name, (neutral, reason) in _NEUTRAL.items():
        value = getattr(args, name)
        if value != neutral:
            by_length = name == "loss_type" and {"ipo", "sigmoid_norm"} & set(value)
            return f"{name} = {value!r}, but {_BY_LENGTH if by_length else reason}: set it to {neutral!r}"
    return None
