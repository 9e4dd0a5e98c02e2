"""The engine of a real vLLM server on this machine: weights, log-probs, versions, and what happens when it fails."""

from __future__ import annotations

import contextlib
import json
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.errors import UserError
from posttrain.launch.serve import ServerProcess, members
from posttrain.launch.warm_start import character_tokenizer, small_model
from posttrain.recipe import Lora, Server, Vllm, WarmStart
from posttrain.rollouts import vllm_server
from posttrain.rollouts.engine import EngineError, Sample, SamplingParams, Score
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.rollouts.vllm_server import VLLMServerEngine
from posttrain.rollouts.weights import full_weights
from posttrain.tasks import load

pytest.importorskip("vllm")

LENGTH = 128
EOS = 1


def chat(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


PROMPTS = [chat("337=24"), chat("1=1"), chat("1234567=99"), chat("12=3")]


def make_model(folder: Path, *, tied: bool, alphabet: str | None = None, hidden: int = 64) -> str:
    """A random model over the alphabet of countdown, with attention heads that vLLM can run on a CPU."""
    task = load("countdown")
    assert task.alphabet is not None and task.chat_template is not None
    tokenizer = character_tokenizer(alphabet or task.alphabet, task.chat_template)
    settings = WarmStart(hidden_size=hidden, intermediate_size=64, layers=2, heads=hidden // 32)
    model: Any = small_model(settings, tokenizer, "float32")
    model.config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(model.config)
    perturb(model, 0.02)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def perturb(model: Any, scale: float = 0.1, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module", params=["tied", "untied"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """With tied embeddings and a prefix cache, and with neither."""
    tied = request.param == "tied"
    folder = make_model(tmp_path_factory.mktemp("served") / request.param, tied=tied)
    settings = Vllm(max_model_len=LENGTH, max_num_seqs=32, prefix_caching=tied)
    with ServerProcess(folder, vllm=settings, lora=Lora(r=5)) as process:
        yield process
        group = process.pid
    assert group is not None and not members(group)


@pytest.fixture
def connect(server: ServerProcess) -> Iterator[Callable[..., VLLMServerEngine]]:
    """Makes engines of the server, which is as freshly started for each test."""
    made: list[VLLMServerEngine] = []

    def make(**arguments: Any) -> VLLMServerEngine:
        settings = Server(**{"timeout": 60.0, "start_timeout": 10.0, **arguments.pop("settings", {})})
        arguments = {"path": server.model, **arguments}
        made.append(VLLMServerEngine.connect(server.url, settings=settings, **arguments))
        return made[-1]

    yield make
    restorer = make()
    restorer.switch(server.model)
    restorer._rpc("posttrain_set_version", {"version": ""})
    for engine in made:
        engine.close()
        assert not leftovers(engine)


def leftovers(engine: VLLMServerEngine) -> list[str]:
    """Files that an engine has put where its server can read them."""
    roots = ("/dev/shm", tempfile.gettempdir())  # noqa: S108 - looked at, not written
    return [str(path) for root in roots for path in Path(root).glob(f"posttrain-{engine._id}-*")]


@pytest.fixture
def model(server: ServerProcess) -> Any:
    return AutoModelForCausalLM.from_pretrained(server.model)


def reference(server: ServerProcess, model: Any) -> TransformersEngine:
    return TransformersEngine(model, AutoTokenizer.from_pretrained(server.model))


def random_sequences(count: int = 64, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 24, (count, 2), generator=generator).tolist()
    return [
        (
            torch.randint(0, 19, (prompt,), generator=generator).tolist(),
            torch.randint(0, 19, (answer,), generator=generator).tolist(),
        )
        for prompt, answer in lengths
    ]


def flat(samples: Sequence[Sequence[Sample]]) -> list[Sample]:
    return [sample for group in samples for sample in group]


def largest_gap(one: Sequence[Score], two: Sequence[Score]) -> float:
    return max(abs(a - b) for x, y in zip(one, two, strict=True) for a, b in zip(x.logprobs, y.logprobs, strict=True))


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("kind", ["full", "merged"])
def test_every_synced_weight_counts(
    server: ServerProcess, connect: Any, model: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_server, "_SHARD_BYTES", 20_000)  # several files
    engine, sequences = connect(), random_sequences()
    before = engine.score(sequences)
    assert largest_gap(before, reference(server, model).score(sequences)) < 1e-5
    if kind == "merged":
        targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=5, lora_alpha=10, target_modules=targets))
    perturb(model)
    engine.sync(full_weights(model), version=3)
    after, wanted = engine.score(sequences), reference(server, model).score(sequences)
    assert largest_gap(before, after) > 1.0, "the perturbation must have mattered"
    assert largest_gap(after, wanted) < 1e-5
    samples = flat(engine.sample(PROMPTS, SamplingParams(max_tokens=12, n=8)))
    assert {sample.policy_version for sample in samples} == {3}
    scores = engine.score([(sample.prompt_ids, sample.token_ids) for sample in samples])
    for sample, score in zip(samples, scores, strict=True):
        assert score.logprobs == pytest.approx(sample.logprobs, abs=1e-5)
    assert not leftovers(engine), "weights are deleted once they are loaded"


def test_an_adapter_beside_the_weights(server: ServerProcess, connect: Any, model: Any) -> None:
    engine, sequences = connect(lora=Lora(r=5)), random_sequences()
    base = engine.score(sequences)
    adapted = get_peft_model(model, LoraConfig(r=5, lora_alpha=10, target_modules="all-linear"))
    config = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in adapted.peft_config["default"].to_dict().items()
    }
    for version in (4, 5):
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if ".lora_" in name:
                    parameter.normal_(0.0, 0.02 * version)
        tensors = {n.replace(".default", ""): p for n, p in adapted.named_parameters() if ".lora_" in n}
        engine.sync_adapter(tensors, config, version)
        found = engine.score(sequences)
        assert largest_gap(found, base) > 0.1
        assert largest_gap(found, reference(server, adapted).score(sequences)) < 1e-5
        samples = flat(engine.sample(PROMPTS, SamplingParams(max_tokens=5)))
        assert {sample.policy_version for sample in samples} == {version}
        assert len(leftovers(engine)) == 1, "the newest adapter alone"
    other = connect()
    assert largest_gap(other.score(sequences), base) == 0.0, "the weights below have not moved"
    other.expect(engine.token(), 5)
    assert largest_gap(other.score(sequences), found) < 1e-6
    with pytest.raises(EngineError, match="came from a trainer"):
        _ = other.fingerprint
    with pytest.raises(UserError, match=r"up to rank 8.*rank is 9.*lora_sync: merge"):
        engine.sync_adapter(tensors, {**config, "r": 9}, 6)
    with pytest.raises(EngineError, match=r"answered [45]\d\d: .*POST /v1/load_lora_adapter"):
        engine.sync_adapter({"base_model.model.nothing.lora_A.weight": torch.zeros(5, 64)}, config, 6)
    assert engine.policy_version is None
    engine.sync_adapter(tensors, config, 6)
    assert largest_gap(engine.score(sequences), found) < 1e-6
    engine._call("POST", "/v1/unload_lora_adapter", {"lora_name": engine._adapter}, raw=False)
    with pytest.raises(EngineError, match="no longer has our adapter, so it was restarted"):
        engine.score(sequences)
    engine.sync(full_weights(adapted), version=7)
    assert largest_gap(engine.score(sequences), found) < 1e-5
    assert not leftovers(engine)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda weights: {**weights, "model.z": torch.zeros(2)}, "no parameter 'model.z'"),
        (lambda weights: {k: v for k, v in weights.items() if "norm" not in k}, "norm.weight' .* did not come"),
        (lambda weights: {**weights, "model.norm.weight": torch.zeros(1)}, r"has shape \(1,\).*\(64,\)"),
    ],
)
def test_what_is_not_the_model_s_is_refused(connect: Any, model: Any, spoil: Any, message: str) -> None:
    engine = connect()
    with pytest.raises((KeyError, ValueError), match=message):
        engine.sync(spoil(dict(full_weights(model))).items(), version=7)
    assert engine.policy_version is None
    with pytest.raises(EngineError, match="cannot sample, because a sync failed half-way"):
        engine.sample(PROMPTS, SamplingParams(max_tokens=4))
    engine.sync(full_weights(model), version=8)
    assert {s.policy_version for s in flat(engine.sample(PROMPTS, SamplingParams(max_tokens=4)))} == {8}


def test_no_room_and_no_way_are_said_before_anything_is_sent(
    connect: Any, model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    missing = connect(settings={"folder": str(tmp_path / "missing")})
    with pytest.raises(UserError, match=r"missing is no folder to write to: set rollout.server.folder"):
        missing.sync(full_weights(model), version=1)
    monkeypatch.setattr(vllm_server, "_is_here", lambda host: False)
    with pytest.raises(UserError, match=r"on another machine.*rollout.server.folder"):
        connect().sync(full_weights(model), version=1)
    shared = connect(settings={"folder": str(tmp_path)})
    shared.sync(full_weights(model), version=1)
    assert shared.policy_version == 1 and not list(tmp_path.iterdir())


def test_addresses_of_this_machine_are_known() -> None:
    assert vllm_server._is_here("127.0.0.1") and vllm_server._is_here("localhost")
    assert not vllm_server._is_here("192.0.2.1"), "an address that is kept for documentation"


def test_fingerprint_and_files_are_those_of_the_folder(server: ServerProcess, connect: Any, tmp_path: Path) -> None:
    engine = connect()
    wanted = TransformersEngine.load(server.model, device="cpu")
    assert (engine.fingerprint, engine.files) == (wanted.fingerprint, wanted.files)
    perturb(wanted.model)
    wanted.model.save_pretrained(tmp_path)
    engine.switch(str(tmp_path))
    other = TransformersEngine.load(server.model, device="cpu")
    other.switch(str(tmp_path))
    assert engine.policy_version == 0
    assert (engine.fingerprint, engine.files) == (other.fingerprint, other.files)
    assert largest_gap(engine.score(random_sequences()), other.score(random_sequences())) < 1e-5
    rank = connect()
    rank.expect(engine.token(), 0)
    assert (rank.fingerprint, rank.files) == (other.fingerprint, other.files)
    engine.sync(full_weights(other.model), version=1)
    assert engine.files is None
    with pytest.raises(EngineError, match=r"came from a trainer \(policy version 1\)"):
        _ = engine.fingerprint


# ---------------------------------------------------------------- sampling and scoring


@pytest.fixture
def sharp(server: ServerProcess, connect: Any, model: Any) -> tuple[VLLMServerEngine, TransformersEngine]:
    """Both engines with a policy that is far from uniform."""
    perturb(model)
    engine = connect()
    engine.sync(full_weights(model), version=1)
    return engine, reference(server, model)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 5, 0.8), (0.0, 0, 1.0)]
)
def test_log_probs_are_those_of_what_is_drawn_from(sharp: Any, temperature: float, top_k: int, top_p: float) -> None:
    engine, wanted = sharp
    params = SamplingParams(max_tokens=16, n=8, temperature=temperature, top_k=top_k, top_p=top_p)
    groups = engine.sample(PROMPTS, params)
    assert [len(group) for group in groups] == [8] * len(PROMPTS)
    if temperature == 0.0:
        greedy = wanted.sample(PROMPTS, params)
        assert [[s.token_ids for s in group] for group in groups] == [[s.token_ids for s in group] for group in greedy]
    plain = top_k == 0 and top_p == 1.0
    samples = flat(groups)
    assert {sample.finish_reason for sample in samples} == {"stop", "length"} or not plain or temperature == 0.0
    scores = wanted.score([(s.prompt_ids, s.token_ids) for s in samples], temperature=temperature or 1.0)
    for sample, score in zip(samples, scores, strict=True):
        if plain:
            assert sample.logprobs == pytest.approx(score.logprobs, abs=1e-5)
        else:
            assert all(a >= b - 1e-5 for a, b in zip(sample.logprobs, score.logprobs, strict=True))
        assert len(sample.logprobs) == len(sample.token_ids) <= 16
        assert (sample.token_ids[-1] == EOS) == (sample.finish_reason == "stop")
        assert EOS not in sample.token_ids[:-1]
        assert sample.text == engine.tokenizer.decode(sample.token_ids, skip_special_tokens=True)
    rendered = wanted.sample(PROMPTS, SamplingParams(max_tokens=1))
    assert [group[0].prompt_ids for group in groups] == [group[0].prompt_ids for group in rendered]


def test_a_seed_gives_the_same_samples_and_no_two_prompts_share_them(sharp: Any) -> None:
    engine, _ = sharp
    prompts = [PROMPTS[0]] * 20

    def ids(seed: int | None) -> list[list[list[int]]]:
        drawn = engine.sample(prompts, SamplingParams(max_tokens=24, n=3, seed=seed))
        return [[sample.token_ids for sample in group] for group in drawn]

    one = ids(1)
    assert one == ids(1)
    assert one != ids(2)
    assert ids(None) != ids(None)
    answers = [tuple(answer) for group in one for answer in group if len(answer) == 24]
    assert len(answers) > 10 and len(set(answers)) == len(answers)


def test_scores_with_the_most_likely_tokens(sharp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "_SCORES_AT_A_TIME", 300)  # many requests
    engine, wanted = sharp
    sequences = [*random_sequences(40), ([3, 4], []), ([5] * 60, [6] * (LENGTH - 61))]
    for top_k in (0, 3, 50):
        found, expected = engine.score(sequences, top_k=top_k), wanted.score(sequences, top_k=top_k)
        assert largest_gap(found, expected) < 1e-5
        for one, two in zip(found, expected, strict=True):
            assert [len(x) for x in one.top_ids] == [len(x) for x in two.top_ids]
            for a, b in zip(one.top_logprobs, two.top_logprobs, strict=True):
                assert a == pytest.approx(b, abs=1e-5) and a == sorted(a, reverse=True)
            if top_k == 3:
                assert one.top_ids == two.top_ids
    assert engine.score([]) == [] == engine.sample([], SamplingParams(max_tokens=3))


def test_what_a_server_cannot_do_is_one_sentence(sharp: Any) -> None:
    engine, _ = sharp
    with pytest.raises(UserError, match=r"temperature 1 alone, and 0.7 .*transformers or vllm_colocate"):
        engine.score(random_sequences(1), temperature=0.7)
    with pytest.raises(UserError, match="empty prompt"):
        engine.score([([], [3])])
    with pytest.raises(UserError, match=f"sequence of {LENGTH} tokens and 1 to come"):
        engine.score([([3], [4] * (LENGTH - 1))])
    with pytest.raises(UserError, match="100 tokens and 100 to come"):
        engine.sample([[3] * 100], SamplingParams(max_tokens=100))


# ---------------------------------------------------------------- whose weights


def test_another_run_s_sync_is_noticed(connect: Any, model: Any) -> None:
    ours, rank, theirs = connect(), connect(), connect()
    ours.sync(full_weights(model), version=2)
    with pytest.raises(EngineError, match=r"cannot score: it holds the weights .*/2.1 of another run"):
        rank.score(random_sequences(1))
    rank.expect(ours.token(), 2)
    assert flat(rank.sample(PROMPTS, SamplingParams(max_tokens=2)))[0].policy_version == 2
    theirs.sync(full_weights(model), version=2)
    for engine in (ours, rank):
        with pytest.raises(
            EngineError, match=r"cannot sample: it holds the weights .* of another run.*last policy version 2"
        ):
            engine.sample(PROMPTS, SamplingParams(max_tokens=2))
        assert engine.policy_version is None
    late = connect()
    assert late.policy_version is None
    with pytest.raises(EngineError, match="another run has replaced them"):
        late.sample(PROMPTS, SamplingParams(max_tokens=2))


@pytest.mark.parametrize(("version", "message"), [("", "it was restarted"), ("unknown", "being replaced")])
def test_a_restart_and_a_sync_under_way_are_noticed(connect: Any, model: Any, version: str, message: str) -> None:
    engine = connect()
    engine.sync(full_weights(model), version=2)
    engine._rpc("posttrain_set_version", {"version": version})
    with pytest.raises(EngineError, match=message):
        engine.sample(PROMPTS, SamplingParams(max_tokens=2))
    engine.sync(full_weights(model), version=3)
    assert engine.sample(PROMPTS, SamplingParams(max_tokens=2))


def test_a_sync_while_another_process_samples_is_an_error_there(connect: Any, model: Any) -> None:
    sampler, trainer = connect(), connect()
    caught: list[BaseException] = []

    def sample() -> None:
        try:
            while True:
                sampler.sample(PROMPTS * 16, SamplingParams(max_tokens=100, n=4))
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=sample)
    thread.start()
    trainer.sync(full_weights(model), version=1)
    thread.join(timeout=60)
    assert not thread.is_alive() and isinstance(caught[0], EngineError), caught
    assert flat(trainer.sample(PROMPTS, SamplingParams(max_tokens=2)))[0].policy_version == 1


# ---------------------------------------------------------------- the wrong server, a dead one, a slow one


def test_a_server_that_does_not_fit_is_refused(server: ServerProcess, connect: Any, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", tied=True)
    with pytest.raises(
        UserError, match=f"serves {server.model}, but the model here is .*other: start it with: posttrain"
    ):
        connect(path=other)
    with pytest.raises(UserError, match=f"takes {LENGTH} tokens .* but 200 are needed"):
        connect(needed_length=200)
    with pytest.raises(UserError, match=r"computes in float32, not in bfloat16.*--dtype bfloat16"):
        connect(dtype="bfloat16")
    with pytest.raises(UserError, match=r"nccl goes from GPU to GPU, and there is none .*set transfer: auto"):
        connect(settings={"transfer": "nccl"})
    with pytest.raises(UserError, match=r"up to rank 8, and here their rank is 9"):
        connect(lora=Lora(r=9))


def test_another_tokenizer_is_refused(server: ServerProcess, connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load("countdown")
    assert task.alphabet is not None and task.chat_template is not None
    for alphabet in (task.alphabet[::-1], task.alphabet + "&"):
        spoiled = character_tokenizer(alphabet, task.chat_template)
        monkeypatch.setattr(vllm_server.AutoTokenizer, "from_pretrained", lambda *a, t=spoiled, **k: t)
        with pytest.raises(UserError, match=r"has another tokenizer than .* there and .* here"):
            connect()


class Stub:
    """A server that answers some paths and lets all others wait for ever."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers = answers
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self._open.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        while True:
            try:
                head = connection.recv(2**16).decode()
            except OSError:
                return
            if not head:
                return
            path = head.split()[1].partition("?")[0]
            if path in self.answers:
                status, content = self.answers[path]
                text = json.dumps(content)
                connection.sendall(f"HTTP/1.1 {status} X\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())

    def close(self) -> None:
        for one in (self._socket, *self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for it
            one.close()


@pytest.fixture
def stub() -> Iterator[Callable[[dict[str, Any]], Stub]]:
    made: list[Stub] = []

    def make(answers: dict[str, Any]) -> Stub:
        made.append(Stub(answers))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("stub") / "model", tied=True)


def fast(**settings: Any) -> Server:
    return Server(**{"timeout": 0.7, "start_timeout": 0.7, **settings})


def test_a_server_that_never_answers_is_an_error_in_time(folder: str, stub: Any) -> None:
    started = monotonic()
    silent = stub({})
    with pytest.raises(EngineError, match=rf"{silent.url} did not answer within .*GET /health, after .* version None"):
        VLLMServerEngine.connect(silent.url, path=folder, settings=fast())
    half = stub({"/health": (200, None)})
    with pytest.raises(EngineError, match=rf"{half.url} did not answer within 0.7 s \(GET /v1/models, after 0.7 s"):
        VLLMServerEngine.connect(half.url, path=folder, settings=fast())
    half.close()
    with pytest.raises(EngineError, match=r"could not be reached .*Connection refused.*GET /health"):
        VLLMServerEngine.connect(half.url, path=folder, settings=fast())
    assert monotonic() - started < 10.0


def test_a_server_without_what_we_need_is_refused(folder: str, stub: Any) -> None:
    models = (200, {"data": [{"id": folder, "root": folder, "max_model_len": 64, "parent": None}]})
    with pytest.raises(EngineError, match=r"answered 404.*that is no vLLM server"):
        VLLMServerEngine.connect(stub({"/health": (404, {})}).url, path=folder, settings=fast())
    plain = stub({"/health": (200, None), "/v1/models": models, "/server_info": (404, {"detail": "Not Found"})})
    with pytest.raises(UserError, match=f"without VLLM_SERVER_DEV_MODE=1.*posttrain serve {folder}"):
        VLLMServerEngine.connect(plain.url, path=folder, settings=fast())
    info = {"model_config": {"logprobs_mode": "raw_logprobs"}}
    raw = stub({"/health": (200, None), "/v1/models": models, "/server_info": (200, {"vllm_config": info})})
    with pytest.raises(UserError, match="reports raw_logprobs"):
        VLLMServerEngine.connect(raw.url, path=folder, settings=fast())
    with pytest.raises(UserError, match=r"'127.0.0.1:80' is no address of a server"):
        VLLMServerEngine.connect("127.0.0.1:80", path=folder, settings=fast())


def test_without_our_extension_a_server_samples_but_takes_no_weights(
    connect: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, **_: Any) -> str:
        raise vllm_server.Failure("answered 500: 'CPUWorker' object has no attribute 'posttrain_version'", 500)

    monkeypatch.setattr(VLLMServerEngine, "_served", refuse)
    engine = connect()
    assert engine.sample(PROMPTS, SamplingParams(max_tokens=2))
    with pytest.raises(UserError, match=r"without our worker extension.*start it with: posttrain serve"):
        engine.sync(full_weights(model), version=1)
    assert engine.policy_version == 0
    monkeypatch.undo()


def test_a_server_that_falls_silent_or_dies_is_an_error_with_all_requests_ended(
    server: ServerProcess, connect: Any, stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = connect()
    slow = stub({"/collective_rpc": (200, {"results": [""]})})
    monkeypatch.setattr(engine, "_http", vllm_server.Http(slow.url))
    monkeypatch.setattr(engine, "url", slow.url)
    monkeypatch.setattr(engine, "settings", fast())
    started, threads = monotonic(), threading.active_count()
    with pytest.raises(
        EngineError, match=rf"{slow.url} did not answer within 0.7 s \(POST /v1/completions, .* version 0\)"
    ):
        engine.sample(PROMPTS * 20, SamplingParams(max_tokens=4))
    assert monotonic() - started < 3.0
    slow.close()
    with pytest.raises(EngineError, match="could not be reached"):
        engine.score(random_sequences())
    assert threading.active_count() <= threads + 100
    monkeypatch.undo()
    assert engine.score(random_sequences(1))
