"""A vLLM server as an engine: over HTTP, with a deadline on every call and a check of which weights it serves.

The server is vLLM's own, started by `posttrain serve` (or by a run: `posttrain.launch.serve`) with our worker
extension (`posttrain.rollouts.vllm_worker`), which remembers the policy that its weights are. Every engine object asks
for that before and after each batch of requests, so that answers of other weights (the server was restarted, another
run synced) are an error and never data.

TRL's client is used for one thing, the transfer of weights from GPU to GPU: its requests have no deadline.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Protocol, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from posttrain.errors import UserError
from posttrain.http import Batch, Failure, Http
from posttrain.recipe import Lora, Server
from posttrain.rollouts.engine import EngineError, Images, Prompt, Sample, SamplingParams, Score, TokenIds
from posttrain.rollouts.fingerprint import files_fingerprint
from posttrain.rollouts.tokens import encode
from posttrain.rollouts.vllm_common import (
    answer_ends,
    check_lengths,
    check_model,
    local_folder,
    make_sample,
    refuse_images,
    sampling_arguments,
    saved_fingerprint,
    shapes_to_come,
    without_tied,
)
from posttrain.rollouts.vllm_worker import UNKNOWN
from posttrain.rollouts.weights import checked, saved_weights

_SHARD_BYTES = 2**30
"""Weights that are held on their way to a server, and the size of a file of them."""

_CONNECTIONS = 128
"""Most requests of one call that are under way at a time."""

_SCORES_AT_A_TIME, _SCORE_REQUESTS = 200_000, 8
"""Log-probs in one request for scores (a few tens of bytes each, as JSON), and requests under way."""

_EVERY_SECONDS = 10.0
"""Between two lines of progress while a server starts."""

_PROBE = "The 7 quick brown foxes = 3 * (4 + 15) - 28 / 6?\n"
"""Text that both tokenizers must cut alike."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Owned(Protocol):
    """A server process that an engine stops when it is closed (`posttrain.launch.serve.ServerProcess`)."""

    def stop(self) -> None:
        """End it, with everything that it started."""

    def death(self) -> str | None:
        """Why it ended, in a sentence; None while it runs."""


class VLLMServerEngine:
    """Sampling and scoring by a vLLM server; made by `connect`.

    Samples of a seed depend on (weights, prompts, params) up to rounding, which depends on what else the server does
    at the time. Of several processes that share a server one calls `sync`, and the others `expect` its `token`.
    """

    name = "vllm_server"
    shared = True

    def __init__(
        self,
        url: str,
        *,
        path: str,
        tokenizer: PreTrainedTokenizerBase,
        config: Any,
        dtype: str,
        settings: Server,
        revision: str | None,
        process: Owned | None,
    ) -> None:
        self.url = url.rstrip("/")
        self.tokenizer = tokenizer
        self.path, self.revision, self.dtype = path, revision, getattr(torch, dtype)
        self.policy_version: int | None = None
        self.files: str | None = None
        self.settings = settings
        self._config = config
        self._ends = answer_ends(path, tokenizer, config, revision)
        self._http = Http(self.url)
        self._process = process
        self._id = uuid.uuid4().hex[:12]
        self._count = 0
        self._last: int | None = None
        self._weights = ""
        self._adapter = ""
        self._source: str | None = None
        self._why = "nothing was synced yet"
        self._folders: list[Path] = []
        self._nccl: Any = None
        # What `_inspect` finds.
        self._model = path
        self._max_model_len = 0
        self._max_num_seqs = 256
        self._max_logprobs = -1
        self._max_lora_rank = 0
        self._extension = False
        self._takes_nccl = False

    @classmethod
    def connect(
        cls,
        url: str,
        *,
        path: str,
        dtype: str = "float32",
        settings: Server | None = None,
        needed_length: int | None = None,
        lora: Lora | None = None,
        revision: str | None = None,
        process: Owned | None = None,
    ) -> VLLMServerEngine:
        """The engine of a server, which is waited for and then checked before anything slow happens.

        Args:
            url: as in http://127.0.0.1:8000.
            path: the model that it must serve: a folder, or a name on the hub.
            dtype: in which it must compute.
            settings: deadlines (seconds) and how weights travel; its url and devices are not looked at.
            needed_length: longest prompt and answer together (tokens) that will be asked for.
            lora: the adapters that `sync_adapter` will send.
            revision: of a model on the hub.
            process: the server's process, when it ends with the engine.

        Raises:
            EngineError: nothing answers within `settings.start_timeout`, or a check within `settings.timeout`.
            UserError: it serves another model, tokenizer or dtype, or was started without what we need.
        """
        config = check_model(path, on_cpu=False, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
        engine = cls(
            url,
            path=path,
            tokenizer=tokenizer,
            config=config,
            dtype=dtype,
            settings=settings or Server(),
            revision=revision,
            process=process,
        )
        try:
            engine._wait()
            engine._inspect(needed_length, lora)
        except BaseException:
            engine._http.close()
            raise
        return engine

    # ------------------------------------------------------------ who serves what

    def _wait(self) -> None:
        """Until the server answers; a line of progress every ten seconds."""
        started = printed = monotonic()
        limit = self.settings.start_timeout
        while True:
            waited = monotonic() - started
            try:
                self._http.call("GET", "/health", timeout=max(0.1, min(10.0, limit - waited)))
                return
            except Failure as failure:
                dead = self._process.death() if self._process is not None else None
                if dead is not None:
                    raise EngineError(dead) from None
                if failure.status is not None and failure.status < 500:
                    raise EngineError(f"{self.url} {failure.reason} (GET /health): that is no vLLM server.") from None
                waited = monotonic() - started
                if waited >= limit:
                    raise self._error("GET /health", failure.reason, waited) from None
            if monotonic() - printed > _EVERY_SECONDS and os.environ.get("RANK", "0") == "0":
                printed = monotonic()
                print(f"waiting for the vLLM server at {self.url}  {waited:.0f} s", file=sys.stderr, flush=True)
            sleep(min(0.5, max(0.0, limit - waited)))

    def _inspect(self, needed_length: int | None, lora: Lora | None) -> None:
        start = f"start it with: posttrain serve {self.path}"
        served = [card for card in self._call("GET", "/v1/models")["data"] if card.get("parent") is None]
        if not any(_same(card["root"], self.path, self.revision) for card in served):
            roots = " and ".join(str(card["root"]) for card in served)
            raise UserError(f"The vLLM server at {self.url} serves {roots}, but the model here is {self.path}: {start}")
        card = next(card for card in served if _same(card["root"], self.path, self.revision))
        self._model, self._max_model_len = card["id"], int(card["max_model_len"])
        if needed_length is not None and self._max_model_len < needed_length:
            raise UserError(
                f"The vLLM server at {self.url} takes {self._max_model_len} tokens (prompt and answer together), but "
                f"{needed_length} are needed: start it with --max-model-len {needed_length}, or shorten the prompts or "
                "rollout.max_tokens."
            )
        asked = monotonic()
        try:
            found = self._call("GET", "/server_info?config_format=json", raw=True)["vllm_config"]
        except Failure as failure:
            if failure.status != 404:
                raise self._error("GET /server_info", failure.reason, monotonic() - asked) from None
            raise UserError(
                f"The vLLM server at {self.url} was started without VLLM_SERVER_DEV_MODE=1, so that neither its "
                f"settings nor its weights can be reached: {start}"
            ) from None
        model, lora_config = found["model_config"], found.get("lora_config")
        if model["logprobs_mode"] != "processed_logprobs":
            raise UserError(
                f"The vLLM server at {self.url} reports {model['logprobs_mode']}, which are not the log-probs of what "
                f"it draws from: start it with --logprobs-mode processed_logprobs, or {start}"
            )
        if self.path == card["root"] and not Path(self.path).is_dir() and model["revision"] != self.revision:
            raise UserError(
                f"The vLLM server at {self.url} serves revision {model['revision']} of {self.path}, not "
                f"{self.revision}: {start}{f' --revision {self.revision}' if self.revision else ''}"
            )
        wanted, its = str(self.dtype).removeprefix("torch."), str(model["dtype"]).removeprefix("torch.")
        if its != wanted:
            raise UserError(
                f"The vLLM server at {self.url} computes in {its}, not in {wanted}: {start} --dtype {wanted}"
            )
        self._max_logprobs = int(model["max_logprobs"])
        self._max_num_seqs = int(found["scheduler_config"]["max_num_seqs"])
        self._max_lora_rank = int(lora_config["max_lora_rank"]) if lora_config else 0
        self._takes_nccl = found.get("weight_transfer_config") is not None
        if self.settings.transfer == "nccl" and not (self._takes_nccl and torch.cuda.is_available()):
            where = "here" if self._takes_nccl else f"in the vLLM server at {self.url}, or it was started for none"
            raise UserError(f"transfer: nccl goes from GPU to GPU, and there is none {where}: set transfer: auto.")
        if lora is not None:
            self._takes_rank(lora.r)
        self._same_tokenizer()
        asked = monotonic()
        try:
            version = self._served(raw=True)
            self._extension = True
        except Failure as failure:
            if "posttrain_version" not in failure.reason:
                raise self._error("POST /collective_rpc", failure.reason, monotonic() - asked) from None
            version = ""
        if version == "":
            self._serves("", 0, source=self.path)
            return
        self._lost("its weights are not those that it was started with (another run has replaced them)")

    def _same_tokenizer(self) -> None:
        """Refuse a server whose tokenizer is another one, by texts, special tokens and ids from all over."""
        tokenizer = self.tokenizer
        text = _PROBE + "".join(tokenizer.all_special_tokens)
        ours = tokenizer(text, add_special_tokens=False)["input_ids"]
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        theirs = self._call("POST", "/tokenize", body)["tokens"]
        size = len(tokenizer)
        ids = sorted({*range(0, size, max(1, size // 64)), size - 1})
        our_text = tokenizer.decode(ids)
        try:
            answer = self._call("POST", "/detokenize", {"model": self._model, "tokens": ids}, raw=True)
            their_text = answer["prompt"]
        except Failure as failure:
            their_text = f"({failure.reason})"
        if theirs != ours:
            difference = f"{text!r} is {theirs} there and {ours} here"
        elif their_text != our_text:
            difference = f"{len(ids)} ids of all sizes are {their_text[:200]!r} there and {our_text[:200]!r} here"
        else:
            return
        raise UserError(
            f"The vLLM server at {self.url} has another tokenizer than {self.path} ({difference}): start it with: "
            f"posttrain serve {self.path}"
        )

    def _served(self, *, raw: bool = False) -> str:
        """What the workers say their weights are; `UNKNOWN` where they disagree."""
        answer = self._call("POST", "/collective_rpc", {"method": "posttrain_version"}, raw=raw)
        versions = set(answer["results"])
        return str(versions.pop()) if len(versions) == 1 else UNKNOWN

    def _serves(self, weights: str, version: int, *, source: str | None, adapter: str = "") -> None:
        self._weights, self._adapter, self._source = weights, adapter, source
        self.policy_version = self._last = version
        self.__dict__.pop("fingerprint", None)
        self.files = files_fingerprint(source) if source is not None else None

    def _lost(self, why: str) -> None:
        """There are no weights to trust."""
        self.policy_version, self.files, self._source, self._why = None, None, None, why
        self.__dict__.pop("fingerprint", None)

    def _usable(self, call: str) -> int:
        """The version that the server serves for us.

        Raises:
            EngineError: it serves other weights.
        """
        if self.policy_version is None:
            raise EngineError(
                f"The vLLM server at {self.url} cannot {call}, because {self._why} (last policy version {self._last}): "
                "sync first, or restart the server."
            )
        self._hold(call)
        return self.policy_version

    def _hold(self, call: str) -> None:
        """Raise `EngineError` unless the weights, adapters aside, are those that we know of."""
        found = self._served() if self._extension else ""
        if found != self._weights:
            described = {
                "": "the weights that it was started with, so it was restarted",
                UNKNOWN: "weights that are being replaced, or whose replacement failed",
            }.get(found, f"the weights {found} of another run or process")
            wanted = self._weights or "those that it was started with"
            last = self._last
            self._lost(f"it held {described}")
            raise EngineError(
                f"The vLLM server at {self.url} cannot {call}: it holds {described}, and wanted were {wanted} (last "
                f"policy version {last}); give every run its own server."
            )

    def token(self) -> str:
        """What identifies the weights that the server holds for this run, for `expect` in other processes."""
        return json.dumps({"weights": self._weights, "adapter": self._adapter, "source": self._source})

    def expect(self, token: str, version: int) -> None:
        """From now on, accept samples of the weights that `token` identifies only; they carry `version`."""
        self._serves(version=version, **json.loads(token))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of weights, tokenizer and chat template.

        Raises:
            EngineError: the weights came from a trainer, so that only the trainer knows them.
        """
        if self._source is None:
            raise EngineError(
                f"The weights of the vLLM server at {self.url} came from a trainer (policy version {self._last}): ask "
                "for the fingerprint of the trainer's model."
            )
        folder = local_folder(self._source, self.revision)
        return saved_fingerprint(folder, self.tokenizer, self.dtype, self._config)

    # ------------------------------------------------------------ calls

    def _call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        timeout: float | None = None,
        batch: Batch | None = None,
        raw: bool = False,
    ) -> Any:
        """One call with its deadline; `raw` leaves a failure to the caller."""
        started = monotonic()
        try:
            return self._http.call(method, path, body, timeout=timeout or self.settings.timeout, batch=batch)
        except Failure as failure:
            if raw:
                raise
            raise self._error(f"{method} {path}", failure.reason, monotonic() - started) from None

    def _error(self, call: str, reason: str, waited: float) -> EngineError:
        dead = self._process.death() if self._process is not None else None
        advice = (
            "if it is only slow, raise rollout.server.timeout"
            if "did not answer" in reason
            else "look at its log and start it again (posttrain serve)"
        )
        return EngineError(
            f"The vLLM server at {self.url} {reason} ({call}, after {waited:.1f} s, last policy version {self._last}): "
            f"{dead or advice}."
        )

    def _each(self, work: Callable[[Item, Batch], Result], items: Sequence[Item], at_a_time: int) -> list[Result]:
        """`work` on all items in threads, in order; the first error or Ctrl-C ends all requests at once."""
        batch = Batch()
        pool = ThreadPoolExecutor(max_workers=max(1, min(at_a_time, len(items), _CONNECTIONS)))
        try:
            futures = [pool.submit(work, item, batch) for item in items]
            return [future.result() for future in futures]
        except BaseException:
            batch.stop()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    # ------------------------------------------------------------ sampling and scoring

    def sample(self, prompts: Sequence[Prompt | TokenIds], params: SamplingParams) -> list[list[Sample]]:
        """`params.n` samples for each prompt, in order. A prompt of token ids is taken as it is."""
        version = self._usable("sample")
        encoded = [encode(self.tokenizer, prompt) for prompt in prompts]
        if not encoded:
            return []
        check_lengths([len(ids) for ids in encoded], params.max_tokens, self._max_model_len, call="sample")
        greedy = params.temperature == 0  # vLLM refuses more than one answer, which would all be alike
        arguments = sampling_arguments(params, self._ends)
        if greedy:
            arguments |= {"n": 1, "seed": None}
        n = arguments["n"]
        # A seed belongs to a whole request, so that a seeded one carries one prompt.
        size = 1 if arguments["seed"] is not None else max(1, min(64 // n, -(-len(encoded) // 8)))
        chunks = [range(start, min(start + size, len(encoded))) for start in range(0, len(encoded), size)]

        def draw(chunk: range, batch: Batch) -> list[list[Sample]]:
            seed = None if arguments["seed"] is None else _seed(arguments["seed"], chunk[0])
            body = {
                **arguments,
                "model": self._adapter or self._model,
                "prompt": [encoded[i] for i in chunk],
                "seed": seed,
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
            }
            choices = self._completions(body, batch)
            drawn = [self._read(encoded[chunk[i // n]], choice, version) for i, choice in enumerate(choices)]
            groups = [drawn[i * n : (i + 1) * n] for i in range(len(chunk))]
            return [group * params.n for group in groups] if greedy else groups

        # Over all processes twice what the server decodes at a time: it never waits for us, and a request waits for one
        # round of others at most, which a deadline has to cover.
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        at_a_time = max(2, 2 * self._max_num_seqs // (size * n * processes))
        samples = [group for groups in self._each(draw, chunks, at_a_time) for group in groups]
        self._usable("sample")
        return samples

    def _completions(self, body: dict[str, Any], batch: Batch) -> list[Any]:
        """The choices of one request, prompt by prompt."""
        started = monotonic()
        try:
            choices = self._call("POST", "/v1/completions", body, batch=batch, raw=True)["choices"]
        except Failure as failure:
            gone = self._adapter and failure.status == 404
            reason = "no longer has our adapter, so it was restarted" if gone else failure.reason
            raise self._error("POST /v1/completions", reason, monotonic() - started) from None
        wanted = len(body["prompt"]) * body.get("n", 1)
        if len(choices) != wanted or any(choice["finish_reason"] not in ("stop", "length") for choice in choices):
            reason = f"gave {len(choices)} whole answers of {wanted}, or aborted some (another process synced it)"
            raise self._error("POST /v1/completions", reason, 0.0)
        return list(choices)

    def _read(self, prompt_ids: list[int], choice: Any, version: int) -> Sample:
        logprobs = choice["logprobs"]["token_logprobs"]
        return make_sample(self.tokenizer, prompt_ids, choice["token_ids"], logprobs, self._ends, version)

    def score(
        self,
        sequences: Sequence[tuple[TokenIds, TokenIds]],
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        images: Sequence[Images] | None = None,
    ) -> list[Score]:
        """Log-probabilities of the answers of `(prompt_ids, answer_ids)`, full softmax.

        Raises:
            UserError: a temperature other than 1, a `top_k` for which the server was not started, or images.
        """
        refuse_images(self.name, images)
        if temperature != 1.0:
            raise UserError(
                f"A vLLM server scores at temperature 1 alone, and {temperature:g} was asked for: score with the "
                "engine transformers or vllm_colocate."
            )
        top_k = min(top_k, int(self._config.get_text_config().vocab_size))
        if 0 <= self._max_logprobs < top_k:
            raise UserError(
                f"The vLLM server at {self.url} gives at most {self._max_logprobs} log-probs a token, and top_k is "
                f"{top_k}: start it with --max-logprobs -1."
            )
        self._usable("score")
        if any(not len(prompt) for prompt, _ in sequences):
            raise UserError("A sequence with an empty prompt cannot be scored: its first token follows nothing.")
        asked = [i for i, (_, answer) in enumerate(sequences) if len(answer)]
        if not asked:
            return [Score([]) for _ in sequences]
        whole = {i: [*sequences[i][0], *sequences[i][1]] for i in asked}
        # vLLM generates at least one token.
        check_lengths([len(ids) for ids in whole.values()], 1, self._max_model_len, call="score")
        chunks: list[list[int]] = [[]]
        content = 0
        for i in asked:
            size = len(whole[i]) * (1 + top_k)
            if chunks[-1] and (content + size > _SCORES_AT_A_TIME or len(chunks[-1]) == 32):
                chunks.append([])
                content = 0
            chunks[-1].append(i)
            content += size

        def rate(chunk: list[int], batch: Batch) -> list[Score]:
            body = {
                "model": self._adapter or self._model,
                "prompt": [whole[i] for i in chunk],
                "max_tokens": 1,
                "prompt_logprobs": top_k,
            }
            choices = self._completions(body, batch)
            return [
                _score(whole[i], len(sequences[i][0]), choice["prompt_logprobs"], top_k)
                for i, choice in zip(chunk, choices, strict=True)
            ]

        rated = [score for scores in self._each(rate, chunks, _SCORE_REQUESTS) for score in scores]
        self._usable("score")
        found = dict(zip(asked, rated, strict=True))
        return [found.get(i, Score([])) for i in range(len(sequences))]

    # ------------------------------------------------------------ new weights

    def sync(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace the server's weights; samples made afterwards carry `version`.

        Raises:
            KeyError, ValueError: parameters that are not the model's.
            EngineError: the server failed, or could not read the folder.
            UserError: the server was started without our worker extension, or there is no room or way to send.
        """
        self._syncable()
        self._lost("a sync failed half-way")
        self._count += 1
        weights = f"{self._id}/{version}.{self._count}"
        named = checked(without_tied(iter(named_parameters), self._config), self._shapes, self.dtype)
        if self._transfer() == "nccl":
            self._send(named, weights)
        else:
            self._write_and_load(named, weights)
        if self._served() != weights:
            raise EngineError(f"The vLLM server at {self.url} did not take over the weights {weights}: sync again.")
        self._drop_adapter()
        self._serves(weights, version, source=None)

    def _syncable(self) -> None:
        if not self._extension:
            raise UserError(
                f"The vLLM server at {self.url} was started without our worker extension, so that it can sample and "
                f"score, but not take weights: start it with: posttrain serve {self.path}"
            )

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return shapes_to_come(local_folder(self.path, self.revision), self._config)

    def _transfer(self) -> str:
        if self.settings.transfer != "auto":
            return self.settings.transfer
        return "nccl" if torch.cuda.is_available() and self._takes_nccl else "folder"

    def _write_and_load(self, named: Iterator[tuple[str, Tensor]], weights: str) -> None:
        sizes = sum(torch.Size(shape).numel() for shape in self._shapes.values()) * self.dtype.itemsize
        with self._scratch(sizes) as folder:
            for index, shard in enumerate(_shards(named)):
                save_file(shard, folder / f"model-{index:05d}.safetensors")
            with self._paused():
                self._rpc("posttrain_load", {"version": weights, "folder": str(folder)})

    def _send(self, named: Iterator[tuple[str, Tensor]], weights: str) -> None:
        """From GPU to GPU by TRL's client. Never run in our tests, which have no GPU."""
        from trl.generation.vllm_client import VLLMClient

        if self._nccl is None:
            self._nccl = VLLMClient(base_url=self.url, group_port=_free_port(), connection_timeout=10.0)
            device = torch.device("cuda", torch.cuda.current_device())
            self._within("init_weight_transfer_engine", lambda: self._nccl.init_communicator(device))
        client = self._nccl
        with self._paused():
            with client.weight_update():
                for shard in _shards(named, device="cuda"):
                    metadata = [(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in shard.items()]
                    self._within("update_weights", partial(client.update_named_params, metadata, iter(shard.items())))
            self._rpc("posttrain_set_version", {"version": weights})

    def _within(self, call: str, work: Callable[[], Any]) -> None:
        """`work` in a thread that is left behind at the deadline: a collective cannot be interrupted."""
        caught: list[BaseException] = []
        device = torch.cuda.current_device()

        def run() -> None:
            try:
                torch.cuda.set_device(device)
                work()
            except BaseException as error:
                caught.append(error)

        thread = threading.Thread(target=run, daemon=True)
        started = monotonic()
        thread.start()
        thread.join(self.settings.timeout)
        if thread.is_alive() or caught:
            reason = f"failed ({caught[0]})" if caught else f"did not answer within {self.settings.timeout:g} s"
            raise self._error(f"POST /{call}", reason, monotonic() - started)

    def _rpc(self, method: str, arguments: dict[str, Any]) -> None:
        self._call("POST", "/collective_rpc", {"method": method, "kwargs": arguments})

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        """Nothing is generated while weights change: what other processes wait for is aborted, and they are told."""
        self._rpc("posttrain_set_version", {"version": UNKNOWN})
        self._call("POST", "/pause?mode=abort")
        try:
            yield
            if not self._call("POST", "/reset_prefix_cache")["success"]:
                raise self._error("POST /reset_prefix_cache", "kept its cache of the former weights", 0.0)
        except BaseException:
            with contextlib.suppress(Failure):  # what went wrong first is what counts
                self._call("POST", "/resume", raw=True, timeout=min(30.0, self.settings.timeout))
            raise
        self._call("POST", "/resume")

    @contextlib.contextmanager
    def _scratch(self, size: int, *, keep: bool = False) -> Iterator[Path]:
        """A private folder that the server can read, with room for `size` bytes; removed, also on failure.

        Raises:
            UserError: the server is elsewhere and no shared folder is named, or there is no room.
        """
        if self.settings.folder is not None:
            roots = [Path(self.settings.folder)]
        elif _is_here(self._http.host):
            roots = [Path("/dev/shm"), Path(tempfile.gettempdir())]  # noqa: S108 - mkdtemp makes a private one in it
        else:
            raise UserError(
                f"The vLLM server at {self.url} is on another machine, so that weights need a folder that both can "
                "read: set rollout.server.folder, or transfer: nccl between GPUs."
            )
        found = {root: shutil.disk_usage(root).free for root in roots if root.is_dir() and os.access(root, os.W_OK)}
        fitting = [root for root, free in found.items() if free > size * 1.02 + 2**20]
        if not fitting:
            rooms = ", ".join(f"{root} has {free / 2**30:.2f} GiB" for root, free in found.items())
            raise UserError(
                f"The weights take {size / 2**30:.2f} GiB, but {rooms or f'{roots[0]} is no folder to write to'}: set "
                "rollout.server.folder to one with more room."
            )
        folder = Path(tempfile.mkdtemp(prefix=f"posttrain-{self._id}-", dir=fitting[0]))
        done = False
        try:
            yield folder
            done = True
        finally:
            if done and keep:
                self._folders.append(folder)
            else:
                shutil.rmtree(folder, ignore_errors=True)

    def sync_adapter(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], version: int) -> None:
        """Replace the LoRA adapter that requests of this engine name; the weights below it stay as they are.

        Several runs can share a server in this way; it keeps the adapters of the one that asked last in its memory.

        Args:
            tensors: under their names in a peft checkpoint.
            config: the content of adapter_config.json.
            version: non-negative.

        Raises:
            UserError: the server takes no adapters, or only smaller ones.
            EngineError: the server failed, or does not hold the weights that the adapter belongs to.
        """
        self._takes_rank(int(config["r"]))
        self._hold("take an adapter")
        self._lost("a sync of its adapter failed half-way")
        self._count += 1
        name = f"{self._id}-{version}.{self._count}"
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        with self._scratch(size, keep=True) as folder:
            save_file({key: _portable(value) for key, value in tensors.items()}, folder / "adapter_model.safetensors")
            (folder / "adapter_config.json").write_text(json.dumps(dict(config), default=str), encoding="utf-8")
            self._call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        self._drop_adapter(newest=folder)
        self._serves(self._weights, version, source=None, adapter=name)

    def _takes_rank(self, rank: int) -> None:
        if rank > self._max_lora_rank:
            limit = f"only adapters up to rank {self._max_lora_rank}" if self._max_lora_rank else "no LoRA adapters"
            raise UserError(
                f"The vLLM server at {self.url} takes {limit}, and here their rank is {rank}: start it with: posttrain "
                f"serve {self.path} --lora-rank {rank}, or set lora_sync: merge."
            )

    def _drop_adapter(self, newest: Path | None = None) -> None:
        """Unload the former adapter and delete its files, which the server may read again as long as it is named."""
        if self._adapter:
            with contextlib.suppress(Failure):  # a server that was restarted knows nothing of it
                body = {"lora_name": self._adapter}
                self._call("POST", "/v1/unload_lora_adapter", body, raw=True, timeout=min(30.0, self.settings.timeout))
        self._adapter = ""
        for folder in [folder for folder in self._folders if folder != newest]:
            shutil.rmtree(folder, ignore_errors=True)
            self._folders.remove(folder)

    def switch(self, path: str) -> None:
        """Take over the policy saved in a folder, of the same architecture."""
        self.sync(saved_weights(path), 0)
        self._serves(self._weights, 0, source=path)

    def sleep(self) -> None:
        """Nothing: the server's memory is its own."""

    def wake(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Delete files, close connections, and stop the server if it was started for this engine."""
        if self._folders:  # empty in processes that only expect what another one synced
            self._drop_adapter()
        self._http.close()
        if self._nccl is not None:
            self._nccl.close_communicator()
            self._nccl = None
        if self._process is not None:
            self._process.stop()
        self._lost("it was closed")


def _same(root: str, path: str, revision: str | None) -> bool:
    """Whether a server's model is the one at `path`, by name or by folder."""
    if root == path:
        return True
    with contextlib.suppress(OSError):  # a hub model that is not in the cache has no folder
        return os.path.realpath(root) == os.path.realpath(local_folder(path, revision))
    return False


def _seed(seed: int, index: int) -> int:
    """A prompt's own seed. vLLM adds the answer's number to it: neighbours are far apart, so that no two meet."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


def _score(ids: Sequence[int], prompt_length: int, positions: Sequence[Any], top_k: int) -> Score:
    """The score of the answer in `ids`, from vLLM's `prompt_logprobs`."""
    own, top_ids, top_logprobs = [], [], []
    for position in range(prompt_length, len(ids)):
        found = positions[position]
        own.append(found[str(ids[position])]["logprob"])
        if top_k:
            best = sorted(((int(token), entry["logprob"]) for token, entry in found.items()), key=lambda x: -x[1])
            top_ids.append([token for token, _ in best[:top_k]])
            top_logprobs.append([logprob for _, logprob in best[:top_k]])
    return Score(own, top_ids, top_logprobs)


def _portable(tensor: Tensor, device: str = "cpu") -> Tensor:
    """A copy that shares no memory with anything, as files of tensors want them."""
    return tensor.detach().to(device, copy=True).contiguous()


def _shards(named: Iterator[tuple[str, Tensor]], device: str = "cpu") -> Iterator[dict[str, Tensor]]:
    """Copies of the tensors, about `_SHARD_BYTES` of them at a time."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in named:
        shard[name] = _portable(tensor, device)
        size += shard[name].nbytes
        if size >= _SHARD_BYTES:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


def _is_here(host: str) -> bool:
    """Whether an address is one of this machine's: only those can be bound to."""
    try:
        addresses = {(family, address[0]) for family, _, _, _, address in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    for family, address in addresses:
        with contextlib.suppress(OSError), socket.socket(family) as probe:
            probe.bind((address, 0))
            return True
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
