"""vLLM in this process, on a CPU: its log-probs after every kind of sync, what it draws, and what it leaves behind."""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.errors import UserError
from posttrain.launch.spawn import leave
from posttrain.launch.warm_start import character_tokenizer, small_model
from posttrain.recipe import Lora, Vllm, WarmStart
from posttrain.rollouts.engine import EngineError, Sample, SamplingParams
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.rollouts.vllm_colocate import VLLMColocateEngine
from posttrain.rollouts.vllm_common import CPU_HEAD_SIZES, check_model
from posttrain.rollouts.weights import full_weights
from posttrain.tasks import load

pytest.importorskip("vllm")

ROOT = Path(__file__).parent.parent
EXACT = 1e-5
"""Nats; both sides compute in float32."""

CHUNK = 64
"""Tokens that go through the engine's model at a time."""

LORA = Lora(r=4, alpha=8)


def save_model(folder: Path, *, tied: bool) -> str:
    """A model with random weights whose heads vLLM can run on a CPU."""
    task = load("countdown")
    assert task.alphabet is not None and task.chat_template is not None
    tokenizer = character_tokenizer(task.alphabet, task.chat_template)
    made = small_model(WarmStart(hidden_size=64, intermediate_size=96, layers=2, heads=2), tokenizer, "float32")
    if not tied:
        config = copy.deepcopy(made.config)
        config.tie_word_embeddings = False
        made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp(request.param), tied=request.param == "tied")


@pytest.fixture(scope="module")
def engine(folder: str) -> Iterator[VLLMColocateEngine]:
    """One vLLM for all tests of a model; they put its files' weights back."""
    made = VLLMColocateEngine.load(
        folder, settings=Vllm(max_model_len=480, max_num_seqs=16), max_num_batched_tokens=CHUNK
    )
    yield made
    made.close()


@pytest.fixture(scope="module")
def adapter_engine(folder: str) -> Iterator[VLLMColocateEngine]:
    made = VLLMColocateEngine.load(folder, settings=Vllm(max_num_seqs=64), lora=LORA)
    yield made
    made.close()


@pytest.fixture
def reference(folder: str) -> TransformersEngine:
    return TransformersEngine.load(folder, device="cpu")


def sequences(count: int = 64, longest: int = 30) -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, longest, (count, 2), generator=generator).tolist()
    return [
        (
            torch.randint(0, 19, (p,), generator=generator).tolist(),
            torch.randint(0, 19, (a,), generator=generator).tolist(),
        )
        for p, a in lengths
    ]


def gap(
    engine: Any, reference: TransformersEngine, given: list[tuple[list[int], list[int]]] | None = None, **options: Any
) -> float:
    """Largest difference of two engines' log-probs of the same sequences, in nats."""
    given = given or sequences()
    pairs = zip(engine.score(given, **options), reference.score(given, **options), strict=True)
    return max(abs(a - b) for one, two in pairs for a, b in zip(one.logprobs, two.logprobs, strict=True))


def perturb(model: torch.nn.Module, seed: int = 0, scale: float = 0.1) -> None:
    """Move every weight, so that one that is left behind shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def adapt(reference: TransformersEngine) -> Any:
    """Put LoRA around the reference's model, as a trainer does, and move its A and B only."""
    settings = LoraConfig(r=LORA.r, lora_alpha=LORA.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(reference.model, settings).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    reference.model = model
    return model


def test_full_weights_arrive(engine: VLLMColocateEngine, reference: TransformersEngine, folder: str) -> None:
    """Every weight: a tied head on a CPU keeps a packed copy of the embedding, which would stay behind in silence."""
    engine.switch(folder)
    assert gap(engine, reference) < EXACT
    perturb(reference.model)
    assert gap(engine, reference) > 1.0
    engine.sync(full_weights(reference.model), 7)
    assert engine.policy_version == 7
    assert gap(engine, reference) < EXACT
    assert gap(engine, reference, temperature=0.7) < EXACT
    perturb(reference.model, seed=1, scale=0.01)
    engine.sync(full_weights(reference.model), 8)
    assert gap(engine, reference) < EXACT


def test_merged_adapters_arrive(engine: VLLMColocateEngine, reference: TransformersEngine) -> None:
    perturb(reference.model, seed=2)
    engine.sync(full_weights(reference.model), 1)
    model = adapt(reference)
    assert gap(engine, reference) > 0.5
    engine.sync(full_weights(model), 2)
    assert gap(engine, reference) < EXACT


def test_adapters_beside_the_weights(
    adapter_engine: VLLMColocateEngine, reference: TransformersEngine, folder: str
) -> None:
    """The base moves, then A and B twice; each version of the adapters replaces the one before, files included."""
    engine = adapter_engine
    perturb(reference.model, seed=3)
    engine.sync(full_weights(reference.model), 1)
    assert gap(engine, reference) < EXACT
    model = adapt(reference)
    config = model.peft_config["default"].to_dict()
    assert gap(engine, reference) > 0.5
    for version in (2, 3):
        engine.sync_adapter(get_peft_model_state_dict(model), config, version)
        assert gap(engine, reference) < EXACT
        assert gap(engine, reference, temperature=0.7) < EXACT
        sample = engine.sample([[5, 6, 7]], SamplingParams(max_tokens=8))[0][0]
        assert sample.policy_version == version
        expected = reference.score([(sample.prompt_ids, sample.token_ids)])[0].logprobs
        assert sample.logprobs == pytest.approx(expected, abs=EXACT)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter *= 1.1
    assert gap(engine, reference) > 0.01
    assert engine._adapter_folder is not None
    last = Path(engine._adapter_folder.name)
    assert last.is_dir()
    engine.sync(full_weights(model), 4)  # whole weights again: the adapters are gone
    assert not last.exists()
    assert gap(engine, reference) < EXACT
    with pytest.raises(EngineError, match="came from a trainer"):
        _ = engine.fingerprint
    engine.switch(folder)
    assert engine.policy_version == 0


def test_adapters_need_an_engine_for_them(engine: VLLMColocateEngine) -> None:
    with pytest.raises(UserError, match=r"set model\.lora"):
        engine.sync_adapter({}, {}, 1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probs(
    engine: VLLMColocateEngine, reference: TransformersEngine, folder: str, temperature: float
) -> None:
    """What sampling reports is what scoring and a plain forward pass find, at the same temperature."""
    perturb(reference.model, seed=4)
    engine.sync(full_weights(reference.model), 3)
    prompts = [[5, 6, 7], [8], list(range(3, 19))]
    groups = engine.sample(prompts, SamplingParams(max_tokens=24, n=6, temperature=temperature, seed=1))
    drawn = [sample for group in groups for sample in group]
    assert [sample.prompt_ids for sample in drawn] == [prompt for prompt in prompts for _ in range(6)]
    scores = engine.score([(s.prompt_ids, s.token_ids) for s in drawn], temperature=temperature)
    for sample, score in zip(drawn, scores, strict=True):
        with torch.no_grad():
            logits = reference.model(torch.tensor([[*sample.prompt_ids, *sample.token_ids]])).logits[0].float()
        logps = (logits / temperature).log_softmax(-1)[len(sample.prompt_ids) - 1 : -1]
        forward = logps.gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0].tolist()
        assert sample.logprobs == pytest.approx(forward, abs=EXACT)
        assert score.logprobs == pytest.approx(forward, abs=EXACT)
        assert sample.policy_version == 3
    assert all(len({tuple(sample.token_ids) for sample in group}) > 3 for group in groups), "answers differ"


def test_ends(engine: VLLMColocateEngine, folder: str) -> None:
    """The end token is kept in the ids and not in the text, as TransformersEngine has it."""
    engine.switch(folder)
    drawn = engine.sample([[5, 6, 7]], SamplingParams(max_tokens=12, n=64, seed=2))[0]
    assert {sample.finish_reason for sample in drawn} == {"stop", "length"}
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    for sample in drawn:
        stopped = sample.token_ids[-1] == tokenizer.eos_token_id
        assert sample.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(sample.token_ids) == 12
        assert tokenizer.eos_token_id not in sample.token_ids[:-1]
        assert sample.text == tokenizer.decode(sample.token_ids, skip_special_tokens=True)
        assert len(sample.logprobs) == len(sample.token_ids)


def test_greedy_and_truncated(engine: VLLMColocateEngine, reference: TransformersEngine) -> None:
    perturb(reference.model, seed=5)
    engine.sync(full_weights(reference.model), 1)
    prompts = [[5, 6, 7], [8, 9]]
    greedy = SamplingParams(max_tokens=10, temperature=0.0)
    assert tokens(engine.sample(prompts, greedy)) == tokens(reference.sample(prompts, greedy))
    for params in (
        SamplingParams(max_tokens=8, n=8, top_k=3, temperature=0.8),
        SamplingParams(max_tokens=8, n=8, top_p=0.5, temperature=0.8),
    ):
        for sample in engine.sample([[5, 6, 7]], params)[0]:
            ids = [*sample.prompt_ids, *sample.token_ids]
            with torch.no_grad():
                logits = reference.model(torch.tensor([ids])).logits[0, len(sample.prompt_ids) - 1 : -1]
            kept = truncate((logits / 0.8).softmax(-1), params)
            expected = kept.gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0].log().tolist()
            assert sample.logprobs == pytest.approx(expected, abs=EXACT)


def tokens(groups: list[list[Sample]]) -> list[list[list[int]]]:
    return [[sample.token_ids for sample in group] for group in groups]


def truncate(probabilities: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities [T, V] after top-k and the nucleus, renormalised."""
    ordered, order = probabilities.sort(dim=-1, descending=True)
    kept = torch.zeros_like(ordered)
    kept[:, : params.top_k or ordered.size(-1)] = 1
    kept[ordered.cumsum(-1) - ordered >= params.top_p] = 0
    ordered = ordered * kept
    return torch.zeros_like(probabilities).scatter(-1, order, ordered / ordered.sum(-1, keepdim=True))


def test_seeds(engine: VLLMColocateEngine, folder: str) -> None:
    """A seed decides, whatever was cached before; None leaves it to chance; the process's own state is not touched."""
    engine.switch(folder)
    prompts = [list(range(3, 19)) * 20, [5, 6]]  # more than one step, and more than one block of the cache
    params = SamplingParams(max_tokens=10, n=4, seed=3)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = engine.sample(prompts, params)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    assert engine.sample(prompts, params) == first
    engine.sample([[7, 8] * 90], SamplingParams(max_tokens=2))
    assert engine.sample(prompts, params) == first
    other = engine.sample(prompts, SamplingParams(max_tokens=10, n=4, seed=4))
    assert tokens(other) != tokens(first)
    chance = SamplingParams(max_tokens=10, n=4, seed=None)
    assert tokens(engine.sample(prompts, chance)) != tokens(engine.sample(prompts, chance))


def test_top_k_scores(engine: VLLMColocateEngine, reference: TransformersEngine) -> None:
    perturb(reference.model, seed=6)
    engine.sync(full_weights(reference.model), 1)
    given = [*sequences(8), ([5, 6], [])]
    for asked, found in ((1, 1), (5, 5), (100, 19)):  # no more than the vocabulary has
        for temperature in (1.0, 0.7):
            ours = engine.score(given, top_k=asked, temperature=temperature)
            theirs = reference.score(given, top_k=asked, temperature=temperature)
            for one, two in zip(ours, theirs, strict=True):
                assert one.top_ids == two.top_ids
                assert all(len(ids) == found for ids in one.top_ids)
                assert one.logprobs == pytest.approx(two.logprobs, abs=EXACT)
                for mine, other in zip(one.top_logprobs, two.top_logprobs, strict=True):
                    assert mine == pytest.approx(other, abs=EXACT)
    assert engine.score([]) == []
    assert gap(engine, reference) < EXACT, "scoring at a temperature leaves nothing behind"


def test_long_sequences_and_the_prefix_cache(engine: VLLMColocateEngine, reference: TransformersEngine) -> None:
    """Sequences of several steps and of several cached blocks, before and after the weights move."""
    generator = torch.Generator().manual_seed(8)
    prompt = torch.randint(0, 19, (6 * CHUNK + 5,), generator=generator).tolist()
    long = [(prompt, [5, 6, 7]), (prompt[:40], prompt[40:]), (prompt, prompt[:30])]
    for seed in (0, 1):
        perturb(reference.model, seed=seed, scale=0.05)
        engine.sync(full_weights(reference.model), seed)
        for _ in range(2):
            assert gap(engine, reference, long) < EXACT
            for sample in engine.sample([prompt], SamplingParams(max_tokens=6, n=4, seed=None))[0]:
                expected = reference.score([(prompt, sample.token_ids)])[0].logprobs
                assert sample.logprobs == pytest.approx(expected, abs=EXACT)


def missing(weights: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    return weights[:4]  # in the middle of a layer that vLLM keeps in one piece


def unknown(weights: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    return [*weights[:5], ("model.layers.9.weight", torch.zeros(2)), *weights[5:]]


def misshapen(weights: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    return [(name, tensor[:-1] if index == 6 else tensor) for index, (name, tensor) in enumerate(weights)]


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (missing, KeyError, "did not come"),
        (unknown, KeyError, "has no parameter"),
        (misshapen, ValueError, "has shape"),
    ],
)
def test_failed_sync(
    engine: VLLMColocateEngine,
    reference: TransformersEngine,
    break_it: Callable[[list[tuple[str, Tensor]]], list[tuple[str, Tensor]]],
    error: type[Exception],
    message: str,
) -> None:
    """No weights to trust until the next sync, which finds nothing left of the failed one."""
    with pytest.raises(error, match=message):
        engine.sync(iter(break_it(list(full_weights(reference.model)))), 5)
    assert engine.policy_version is None
    with pytest.raises(EngineError, match="sync again"):
        engine.sample([[5]], SamplingParams(max_tokens=1))
    with pytest.raises(EngineError, match="sync again"):
        engine.score([([5], [6])])
    perturb(reference.model, seed=9)
    engine.sync(full_weights(reference.model), 6)
    assert engine.policy_version == 6
    assert gap(engine, reference) < EXACT


def test_streamed_tensors_may_go(engine: VLLMColocateEngine, reference: TransformersEngine) -> None:
    """A tensor is gone when the next one comes, as where processes each hold a part of it; a tied head may come too."""
    perturb(reference.model, seed=10)

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in reference.model.named_parameters(remove_duplicate=False):
            lent = parameter.detach().clone()
            yield name, lent
            lent.zero_()

    engine.sync(stream(), 1)
    assert gap(engine, reference) < EXACT


def test_fingerprint(engine: VLLMColocateEngine, reference: TransformersEngine, folder: str, tmp_path: Path) -> None:
    engine.switch(folder)
    assert engine.fingerprint == reference.fingerprint
    assert engine.files == reference.files
    perturb(reference.model)
    engine.sync(full_weights(reference.model), 1)
    assert engine.files is None
    with pytest.raises(EngineError, match="came from a trainer"):
        _ = engine.fingerprint
    reference.model.save_pretrained(tmp_path)
    engine.switch(str(tmp_path))
    assert engine.policy_version == 0
    assert engine.fingerprint == TransformersEngine(reference.model, reference.tokenizer).fingerprint
    assert gap(engine, reference) < EXACT


def test_limits(engine: VLLMColocateEngine, folder: str) -> None:
    engine.switch(folder)
    engine.sample([[5] * 470], SamplingParams(max_tokens=10))
    with pytest.raises(UserError, match="a sequence of 470 tokens and 11 to come, because it was started for 480"):
        engine.sample([[5] * 470], SamplingParams(max_tokens=11))
    assert len(engine.score([([5] * 400, [6] * 80)])[0].logprobs) == 80  # all that can be sampled can be scored
    with pytest.raises(UserError, match="max_model_len"):
        engine.score([([5] * 400, [6] * 81)])
    with pytest.raises(UserError, match="token id 19 is none of the model's 19"):
        engine.sample([[5, 19]], SamplingParams(max_tokens=1))
    assert engine.policy_version == 0


def test_interrupt_leaves_no_requests(engine: VLLMColocateEngine, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.switch(folder)
    expected = engine.sample([[5, 6]], SamplingParams(max_tokens=4))

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine._llm.llm_engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.sample([[7, 8], [9]], SamplingParams(max_tokens=4, n=2))
    assert engine.sample([[5, 6]], SamplingParams(max_tokens=4)) == expected


def test_failure_of_vllm(engine: VLLMColocateEngine, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.switch(folder)

    def fails() -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine._llm.llm_engine, "step", fails)
        with pytest.raises(EngineError, match=r"vllm_colocate engine failed in sample: .*out of memory.*version.* 0"):
            engine.sample([[7, 8]], SamplingParams(max_tokens=4))
    assert engine.policy_version is None
    engine.switch(folder)
    assert engine.sample([[5, 6]], SamplingParams(max_tokens=4))


def test_sleep_does_nothing_on_a_cpu(engine: VLLMColocateEngine, folder: str) -> None:
    engine.switch(folder)
    engine.sleep()
    assert engine.policy_version == 0
    engine.wake()
    assert engine.sample([[5]], SamplingParams(max_tokens=1))


def test_head_sizes(tmp_path: Path, tiny_model: str) -> None:
    """Refused before anything slow, with vLLM's own list of sizes."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert list(CPU_HEAD_SIZES) == CPUAttentionBackend.get_supported_head_sizes()
    with pytest.raises(UserError, match=r"have size 16, .* 32, 64, 80, .*model\.warm_start\.heads"):
        VLLMColocateEngine.load(tiny_model)
    check_model(tiny_model, on_cpu=False)


def test_import_is_light() -> None:
    code = "import sys, posttrain.rollouts.vllm_colocate; sys.exit('vllm' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def run_here(*arguments: str, launcher: tuple[str, ...] = ()) -> str:
    """Run a part of this file in a fresh process, with warnings as errors as here."""
    command = [sys.executable, "-W", "error", *launcher, "-m", "tests.test_vllm_colocate", *arguments]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the launcher and what it started
        said, _ = process.communicate()
    assert process.returncode == 0, said[-6000:]
    return said


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """Three engines in one process, two of them at a time: the process is as before, and vLLM says nothing."""
    said = run_here("cycles", save_model(tmp_path / "model", tied=True))
    assert "vllm" not in said.lower(), said
    assert "as before" in said


def cycles(folder: str) -> None:
    import psutil

    process = psutil.Process()

    def held() -> dict[str, Any]:
        mapped = [part.path for part in process.memory_maps()]  # tqdm has a semaphore for as long as the process lives
        return {
            "threads": {thread.name for thread in threading.enumerate()} - {"tqdm_monitor"},
            "children": [child.name() for child in process.children(recursive=True)],
            "ports": [connection.laddr for connection in process.net_connections()],
            "files": process.num_fds(),
            "shared memory": [path for path in mapped if path.startswith("/dev/shm") and "/sem." not in path],  # noqa: S108
            "process group": torch.distributed.is_initialized(),
        }

    def state() -> list[Any]:
        return [
            random.getstate(),
            str(numpy.random.get_state()),
            torch.get_rng_state().tolist(),
            torch.get_num_threads(),
            torch.set_num_threads,
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
            os.sched_getaffinity(0),
            {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")},
        ]

    torch.set_num_threads(2)
    before, sizes, first = held(), [], None
    for _ in range(3):
        state_before = state()
        engine = VLLMColocateEngine.load(folder, settings=Vllm(max_num_seqs=16), lora=LORA)
        assert state() == state_before, [a for a, b in zip(state(), state_before, strict=True) if a != b]
        if first is None:
            other = VLLMColocateEngine.load(folder)
            other.close()
        drawn = engine.sample([[5, 6, 7]], SamplingParams(max_tokens=4, n=2))
        first = first or drawn
        assert drawn == first
        engine.score([([5], [6])])
        engine.sync(full_weights(AutoModelForCausalLM.from_pretrained(folder)), 1)
        assert engine.sample([[5, 6, 7]], SamplingParams(max_tokens=4, n=2))[0][0].token_ids == first[0][0].token_ids
        adapted = adapt(TransformersEngine.load(folder, device="cpu"))
        engine.sync_adapter(get_peft_model_state_dict(adapted), adapted.peft_config["default"].to_dict(), 2)
        assert engine._adapter_folder is not None
        adapters = Path(engine._adapter_folder.name)
        assert adapters.is_dir()
        state_before = state()  # making adapters draws
        engine.close()
        engine.close()
        assert not adapters.exists()
        try:
            engine.sample([[5]], SamplingParams(max_tokens=1))
        except EngineError as error:
            assert "was closed" in str(error)
        else:
            raise AssertionError("a closed engine sampled")
        assert state() == state_before
        sizes.append(process.memory_info().rss / 2**20)
        assert held() == before, (held(), before)
    assert sizes[-1] < sizes[0] + 50, sizes  # MiB; the cache of one engine alone has 1024
    print("as before")


def test_two_processes(tmp_path: Path) -> None:
    """Each rank has its own engine and goes its own way; their process group outlives the engines."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no_python", sys.executable)
    run_here("ranks", save_model(tmp_path / "model", tied=True), launcher=launcher)


def ranks(folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    total = torch.tensor(rank + 1)
    for _ in range(2):
        places = {
            name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        }
        engine = VLLMColocateEngine.load(folder)
        assert places == {name: os.environ.get(name) for name in places}
        reference = TransformersEngine.load(folder, device="cpu")
        for _ in range(1 + 2 * rank):  # not in step with the other
            engine.sample([[5, 6, 7]], SamplingParams(max_tokens=4 + rank, seed=rank))
        perturb(reference.model, seed=rank)
        engine.sync(full_weights(reference.model), 1)
        assert gap(engine, reference) < EXACT
        engine.close()
        assert torch.distributed.group.WORLD is group
        torch.distributed.all_reduce(total)
    assert total == 6, total  # 1 + 2, then 3 + 3
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    {"cycles": cycles, "ranks": ranks}[sys.argv[1]](sys.argv[2])
    leave(0)
