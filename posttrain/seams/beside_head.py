"""What an objective makes of whole next-token distributions, inside the one forward that TRL runs.

TRL's fused head turns the policy's last hidden states into log-probs of the sampled tokens; no logits come out. Here
the same hidden states, with their graph, go to a second function beside it. It runs before the policy's forward ends,
because only until then is an output head whole that ZeRO-3 or FSDP2 keep in parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from posttrain.errors import UserError
from posttrain.objectives.vocabulary import Head, HeadLayer, head_factors


@dataclass
class _Output(FusedCausalLMOutput):
    """TRL's, and what was computed beside it: for what is not among the outputs, FSDP2 makes no weights whole again."""

    beside: dict[str, Tensor] | None = None


@contextmanager
def beside_head(
    model: Any, compute: Callable[[Tensor, Head, Head | None], dict[str, Tensor]], other: HeadLayer | None = None
) -> Iterator[dict[str, Tensor]]:
    """Inside, one forward of a policy with TRL's fused head; what `compute` gave is in the yielded dictionary after it.

    Args:
        model: the policy, unwrapped; as TRL has patched it, or a peft model around it.
        compute: (last hidden states [B, L, D] with their graph, the output head, `other` as it is then) → tensors.
        other: a further head that `compute` needs whole, such as a teacher's; where it lies on another device than the
            policy's it is copied there.

    Raises:
        UserError: FSDP keeps the policy's output head, which is trained, in parts even then.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    states: list[Tensor] = []
    found: dict[str, Tensor] = {}

    def keep(module: Any, arguments: Any, output: Any) -> None:
        states.append(output.last_hidden_state)

    def take(module: Any, arguments: Any, output: Any) -> Any:
        own = HeadLayer(causal.get_output_embeddings(), *head_factors(causal.config.get_text_config()))
        if hasattr(own.layer.weight, "full_tensor") and own.layer.weight.requires_grad:
            raise UserError(
                "FSDP keeps the policy's output head in parts while the policy runs, so its gradient would not be "
                "averaged: leave it out of the modules that are wrapped."
            )
        with maybe_gather_lm_head_ctx(*_split(own), *_split(other)):
            head = _kept(own.head())
            device = head.weight.device
            found.update(compute(states.pop().to(device), head, None if other is None else _kept(other.head(), device)))
        return _Output(**output, beside=found)

    hooks = [
        causal.base_model.register_forward_hook(keep),
        model.register_forward_hook(take, prepend=True),  # before those that split the weights again
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _split(head: HeadLayer | None) -> list[Any]:
    """The parameters of a head that ZeRO-3 has split."""
    parameters = [] if head is None else [getattr(head.layer, name, None) for name in ("weight", "bias")]
    return [parameter for parameter in parameters if hasattr(parameter, "ds_status")]


def _kept(head: Head, device: Any = None) -> Head:
    """The same weights under a name of our own: what ZeRO-3 takes from the parameter stays ours until backward."""
    bias = None if head.bias is None else _whole(head.bias).to(device)
    return replace(head, weight=_whole(head.weight).to(device), bias=bias)


def _whole(parameter: Any) -> Tensor:
    whole: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.view_as(parameter)
    return whole
