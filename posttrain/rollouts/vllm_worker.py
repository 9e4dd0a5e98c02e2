"""What vLLM runs inside its workers for us: new weights, and the version of the policy that they are.

Loaded by vLLM through `worker_extension_cls`, in this process (colocated) or in a server's. Methods are called through
vLLM's `collective_rpc`.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable
from typing import Any

import torch

EXTENSION = "posttrain.rollouts.vllm_worker.PolicyWorker"
"""The value of vLLM's `worker_extension_cls`."""

UNKNOWN = "unknown"
"""Version while weights are being replaced, and after that failed."""


class PolicyWorker:
    """Mixed into vLLM's worker class: replaces weights and remembers which policy they are.

    `version` is whatever string the caller gives; it is lost with the process, so that a server that was restarted is
    recognised by its version, "" (the weights it was started with).
    """

    model_runner: Any
    _posttrain_version = ""

    def posttrain_version(self) -> str:
        """Version of the weights in this worker."""
        return self._posttrain_version

    def posttrain_set_version(self, version: str) -> None:
        """Name weights that arrived on another way (vLLM's own weight transfer); `UNKNOWN` before they do."""
        if version != UNKNOWN:
            _refresh_tied_head(self.model_runner.model)
        self._posttrain_version = version

    def posttrain_load(
        self,
        version: str,
        weights: Iterable[tuple[str, torch.Tensor]] | None = None,
        folder: str | None = None,
    ) -> None:
        """Replace all weights by `weights`, or by the safetensors files in `folder`."""
        self._posttrain_version = UNKNOWN
        # "Failed to load weights" of a tied head, which has none, at every sync.
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
        try:
            self.model_runner.reload_weights(weights_iterator=weights, weights_path=folder)
        except BaseException:
            # Layers of which only a part has come would count it as theirs in the next load, and take the rest of that
            # for more than they need.
            reload: Any = importlib.import_module("vllm.model_executor.model_loader.reload")
            reload.finalize_layerwise_reload(self.model_runner.model, self.model_runner.model_config)
            raise
        _refresh_tied_head(self.model_runner.model)
        self._posttrain_version = version


def _refresh_tied_head(model: torch.nn.Module) -> None:
    """Repack a CPU's output head that shares the embedding: vLLM repacks every layer that new weights name, but a tied
    head is not named by any, and would go on with its packed copy of the old embedding without a word.
    """
    for module in model.modules():
        if type(module).__name__ == "ParallelLMHead" and hasattr(module, "cpu_linear"):
            from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
