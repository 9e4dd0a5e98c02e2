"""A trainer's rollouts from an engine: weights go out before answers come in, and every answer says which made it.

Metrics logged here while an engine generates: `sampler/gap_mean`, `sampler/gap_p99`, `sampler/gap_max` (|log π_old −
log π_sampler| in nats, over the completion tokens of all processes, before any correction; p99 is rounded up by at most
12 %), `sampler/unknown` (share of tokens for which the engine gave no log-prob), `sampler/ratio_mean` (of the
correction), `rollout/sync_seconds`, `rollout/sample_seconds` and `rollout/tokens_per_second` (of the first process).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from time import monotonic
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from posttrain.errors import UserError
from posttrain.recipe import Server, Vllm
from posttrain.rollouts.engine import Engine, EngineError, SamplingParams
from posttrain.rollouts.weights import Gather, full_weights

DEFAULT_GAP_LIMIT = {"float32": 0.05, "half": 0.3}
"""Largest 99th percentile of |log π_trainer − log π_sampler| before the first update (nats per token)."""

_EDGES = torch.logspace(-8, 2, 201)
"""Bins of absolute differences, a twentieth of a decade wide: processes add their counts up."""


class Rollouts:
    """An engine in the service of one trainer.

    Args:
        trainer: an `OnPolicyTrainer`.
        engine: this process's, or every process's connection to one that they share.
        lora_sync: `merge` sends whole weights with the adapters merged in; `adapter` sends the adapters alone.

    Raises:
        UserError: the trainer asks for something that no engine does.
    """

    def __init__(self, trainer: Any, engine: Engine, lora_sync: str = "merge") -> None:
        self.trainer, self.engine, self.lora_sync = trainer, engine, lora_sync
        self._synced: int | None = None
        self._calls = 0
        for name, neutral in (("min_p", (None, 0.0)), ("repetition_penalty", (None, 1.0))):
            value = getattr(trainer, name)
            if value not in neutral:
                raise UserError(
                    f"{name} = {value} is not known to a rollout engine, which samples by temperature, top_p and top_k "
                    "alone: remove it, or let the policy generate itself (engine transformers)."
                )
        if trainer.args.generation_kwargs:
            raise UserError("generation_kwargs do not reach a rollout engine: remove them.")
        if trainer._is_vlm:
            raise UserError("Rollout engines take no images yet: let the policy generate itself (engine transformers).")
        if lora_sync == "adapter" and not hasattr(trainer.model, "peft_config"):
            raise UserError("lora_sync = adapter needs a LoRA model: set model.lora, or lora_sync = merge.")
        if lora_sync == "adapter" and trainer.model.peft_config["default"].modules_to_save:
            raise UserError("lora_sync = adapter sends adapters alone, and modules_to_save are none: use merge.")

    def generate(self, prompts: Sequence[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
        """One answer for each of this process's prompts (token ids), in order, and its log-probs (nats).

        Collective: every process calls it, and either all succeed or all raise.
        """
        step = self.trainer.state.global_step
        self.engine.wake()
        if self._synced != step or self.engine.policy_version is None:
            self._sync(step)
        started = monotonic()
        with self._together("sample"):
            answers = self._sample(prompts, step)
        seconds = monotonic() - started
        self.engine.sleep()
        self._log("rollout/sample_seconds", seconds)
        self._log("rollout/tokens_per_second", sum(len(ids) for ids, _ in answers) / max(seconds, 1e-9))
        return [ids for ids, _ in answers], [logps for _, logps in answers]

    def _sample(self, prompts: Sequence[list[int]], step: int) -> list[tuple[list[int], list[float]]]:
        trainer = self.trainer
        # TRL repeats a prompt for each of its answers: ask for them together, so that the prompt is read once.
        runs = [(ids, len(list(same))) for ids, same in groupby(prompts)]
        counts = {count for _, count in runs}
        n = counts.pop() if len(counts) == 1 else 1
        self._calls += 1
        entropy = [trainer.args.seed, step, trainer.accelerator.process_index, self._calls]
        # A shared engine's samples depend on what else it is asked at the time: a seed would cost and promise nothing.
        seed = None if self.engine.shared else int(np.random.SeedSequence(entropy).generate_state(1)[0])
        params = SamplingParams(
            max_tokens=trainer.max_completion_length,
            n=n,
            temperature=trainer.temperature,
            top_p=trainer.top_p or 1.0,
            top_k=max(0, trainer.top_k or 0),
            seed=seed,
        )
        drawn = self.engine.sample([ids for ids, _ in runs] if n > 1 else prompts, params)
        samples = [sample for group in drawn for sample in group]
        stale = {sample.policy_version for sample in samples} - {step}
        if stale or len(samples) != len(prompts):
            found = f"of policy version {min(stale)}" if stale else f"{len(samples)} in number"
            raise EngineError(
                f"The engine {self.engine.name} returned answers {found}, but {len(prompts)} of version {step} were "
                "asked for: another process has changed its weights; give every run an engine of its own."
            )
        return [(sample.token_ids, sample.logprobs) for sample in samples]

    def _sync(self, version: int) -> None:
        """Send the policy as it is now. Every process takes part in gathering it; only owners of an engine send."""
        started = monotonic()
        self._synced, self._calls = None, 0
        trainer, engine = self.trainer, self.engine
        sends = not engine.shared or trainer.accelerator.is_main_process
        with self._together("sync"):
            if self.lora_sync == "adapter":
                tensors = dict(_adapter_weights(trainer.model, gather(trainer)))
                if sends:
                    engine.sync_adapter(tensors, adapter_config(trainer.model), version)
            else:
                weights = full_weights(trainer.model, gather(trainer))
                try:
                    if sends:
                        engine.sync(weights, version)
                finally:
                    for _ in weights:  # the other processes wait in the same collectives, whatever happened here
                        pass
        if engine.shared and trainer.accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            tokens = [engine.token()]
            broadcast_object_list(tokens, from_process=0)
            if not sends:
                engine.expect(tokens[0], version)
        self._synced = version
        self._log("rollout/sync_seconds", monotonic() - started)

    @contextmanager
    def _together(self, call: str) -> Iterator[None]:
        """Either every process gets through, or every one raises: nobody is left waiting in a collective."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        if self.trainer.accelerator.num_processes > 1:
            rank = self.trainer.accelerator.process_index
            mine = "" if error is None else f"{type(error).__name__}: {error}"
            theirs = {r: text for r, text in gather_object([(rank, mine)]) if text}
            if error is None and theirs:
                first, text = next(iter(theirs.items()))
                failure = EngineError(f"The engine of process {first} could not {call} ({text}).")
                failure.told = True
                raise failure
        if error is not None:
            raise error

    def _log(self, name: str, value: float) -> None:
        mode = "train" if self.trainer.model.training else "eval"
        self.trainer._metrics[mode][name].append(value)


def engine_of(args: Any, model: Any) -> Engine:
    """The engine that TRL's own options ask for (`use_vllm`, `vllm_mode`, `vllm_server_…`), for a trainer's model.

    Raises:
        UserError: an option that the engine would ignore.
    """
    ignored = {"vllm_structured_outputs_regex": None, "vllm_model_impl": "vllm", "vllm_tensor_parallel_size": 1}
    for name, neutral in ignored.items():
        value = getattr(args, name)
        if value not in (neutral, type(args).__dataclass_fields__[name].default):
            raise UserError(f"{name} = {value!r} would be ignored by the rollout engine: remove it.")
    path = model.config._name_or_path
    dtype = str(model.dtype).removeprefix("torch.")
    if args.vllm_mode == "server":
        from posttrain.rollouts.vllm_server import VLLMServerEngine

        url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
        server = Server(url=url, start_timeout=args.vllm_server_timeout)
        return VLLMServerEngine.connect(url, path=path, dtype=dtype, settings=server)
    from posttrain.rollouts.vllm_colocate import VLLMColocateEngine

    settings = Vllm(
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        max_model_len=args.vllm_max_model_length,
        sleep=args.vllm_enable_sleep_mode,
    )
    return VLLMColocateEngine.load(path, dtype=dtype, settings=settings)


def gather(trainer: Any) -> Gather:
    """How a trainer's parameters become whole: not at all, from ZeRO-3 partitions, or from FSDP2 shards.

    Raises:
        UserError: FSDP1, whose parameters have no names of their own.
    """
    accelerator = trainer.accelerator
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        import deepspeed

        @contextmanager
        def from_partitions(parameters: Sequence[Any]) -> Iterator[list[Tensor]]:
            with deepspeed.zero.GatheredParameters(list(parameters)):
                # Copies: the engine may keep a tensor until its whole layer is there, and these are about to go.
                yield [parameter.detach().clone() for parameter in parameters]

        return from_partitions

    if getattr(accelerator.state, "fsdp_plugin", None) is not None and accelerator.fsdp_version != 2:
        raise UserError("A rollout engine cannot follow FSDP 1: use FSDP 2 (fsdp_version: 2) or DeepSpeed.")

    @contextmanager
    def whole(parameters: Sequence[Any]) -> Iterator[list[Tensor]]:
        yield [
            parameter.detach().full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()
            for parameter in parameters
        ]

    return whole


def _adapter_weights(model: Any, whole: Gather) -> Iterator[tuple[str, Tensor]]:
    """LoRA's tensors under the names of a peft checkpoint, as copies on the CPU."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            with whole([parameter]) as (tensor,):
                yield name.replace(".default", ""), tensor.cpu().clone()


def adapter_config(model: Any) -> dict[str, Any]:
    """What peft writes into adapter_config.json."""
    settings = model.peft_config["default"].to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}


class Gap:
    """The difference between the log-probs of trainer and engine, over processes, and the check of the first step.

    Args:
        accelerator: whose processes are joined.
        limit: largest 99th percentile before the first update (nats per token); None for no check.
    """

    def __init__(self, accelerator: Any, limit: float | None) -> None:
        self.accelerator, self.limit = accelerator, limit

    def measure(
        self, old_logps: Tensor, sampler_logps: Tensor, mask: Tensor, ratio: Tensor | None, engine: str
    ) -> dict[str, float]:
        """The metrics `sampler/…` of one micro-batch; [B, T] each, the ratio [B, T] or [B, 1]. Collective.

        Raises:
            EngineError: the first call found a 99th percentile above the limit, in every process alike.
        """
        written = mask.bool()
        gaps = (old_logps.detach().float() - sampler_logps.float()).abs()[written]
        known = gaps[~gaps.isnan()]
        counts = torch.bincount(torch.bucketize(known.cpu(), _EDGES), minlength=len(_EDGES) + 1)
        ratios = known.new_ones(1) if ratio is None else ratio.float().expand_as(mask)[written]
        own = [
            known.sum().item(),
            known.numel(),
            gaps.numel(),
            ratios.sum().item(),
            ratios.numel(),
            known.max().item() if known.numel() else 0.0,
        ]
        packed = torch.cat([torch.tensor(own, dtype=torch.float64), counts.double()]).to(
            self.accelerator.device, torch.float32
        )
        everyone = self.accelerator.gather(packed[None]).cpu().double()
        total, number, tokens, ratio_sum, ratio_number, _ = everyone[:, :6].sum(dim=0).tolist()
        largest = everyone[:, 5].max().item()
        p99 = min(largest, _quantile(everyone[:, 6:].sum(dim=0), 0.99))
        limit, self.limit = self.limit, None
        if limit is not None and number and not p99 <= limit:
            raise EngineError(
                f"Before the first update the log-probs of the engine {engine} and of the trainer differ by {p99:.3g} "
                f"nats per token (99th percentile; mean {total / number:.3g}, largest {largest:.3g}), more than "
                f"sampler_gap_limit = {limit:g}: the engine holds other weights, another dtype, or samples otherwise "
                "than it says. That is a bug, not noise; raise the limit only if you know where it comes from."
            )
        found = {
            "sampler/unknown": 1.0 - number / max(tokens, 1.0),
            "sampler/ratio_mean": ratio_sum / max(ratio_number, 1.0),
        }
        if number:
            found |= {"sampler/gap_mean": total / number, "sampler/gap_p99": p99, "sampler/gap_max": largest}
        return found


def _quantile(counts: Tensor, q: float) -> float:
    """The `q` quantile of what `counts` counts, rounded up to the edge of its bin."""
    index = int(torch.searchsorted(counts.cumsum(0), q * counts.sum()))
    return 0.0 if index == 0 else float(_EDGES[min(index, len(_EDGES) - 1)])
