"""Rollout engines: tokens per second of pre-sampling against raw vLLM, seconds per sync, seconds to start.

    python -m benchmarks.engines [--rounds 7] [--output benchmarks/results/engines.json]

Raw vLLM is `LLM.generate` over all prompts at once, with settings equal to our engine's and without log-probs: the most
that one could ask for. Ours is the whole of pre-sampling: the same number of answers in parts, with log-probs, decoded,
verified and written to disk. The two take turns in one process. Reported are medians over rounds, and the median of the
per-round ratios with its quartiles. A sync sends every parameter of a model that is already in memory.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from benchmarks.turns import quartiles, rotated, spread, timed
from posttrain import atomic, rewards, tasks
from posttrain.launch.pipeline import quiet_libraries
from posttrain.launch.provenance import machine
from posttrain.launch.serve import ServerProcess
from posttrain.launch.warm_start import character_tokenizer, small_model
from posttrain.progress import Bar
from posttrain.recipe import Presample, Server, Vllm, WarmStart
from posttrain.rollouts.presample import presample
from posttrain.rollouts.tokens import encode
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.rollouts.vllm_colocate import VLLMColocateEngine
from posttrain.rollouts.vllm_server import VLLMServerEngine
from posttrain.rollouts.weights import full_weights
from posttrain.versions import versions

MODELS = {
    "3 M parameters": (WarmStart(hidden_size=256, intermediate_size=688, layers=4, heads=4), 256),
    "25 M parameters": (WarmStart(hidden_size=512, intermediate_size=1376, layers=8, heads=8), 64),
}
"""Shape and number of prompts, by what the report calls it."""

ANSWERS, MAX_TOKENS = 8, 64
SETTINGS = Vllm(max_model_len=128, max_num_seqs=256)


def raw_vllm(model: str) -> Any:
    """vLLM as its own documentation starts it, with our engine's limits."""
    from vllm import LLM

    return LLM(
        model=model,
        dtype="float32",
        max_model_len=SETTINGS.max_model_len,
        max_num_seqs=SETTINGS.max_num_seqs,
        enforce_eager=not torch.cuda.is_available(),
        gpu_memory_utilization=0.3,
        disable_log_stats=True,
    )


def throughput(model: str, prompts_drawn: int, rounds: int, folder: Path, bar: Bar) -> dict[str, Any]:
    """Tokens per second of raw vLLM and of pre-sampling, in turns."""
    task = tasks.load("countdown", {})
    rows, verifier = task.rows("train")[:prompts_drawn], rewards.load(*task.verifier)
    ours = VLLMColocateEngine.load(model, settings=SETTINGS)
    theirs = raw_vllm(model)
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": encode(ours.tokenizer, row["prompt"])} for row in rows]

    def raw(seed: int) -> float:
        arguments = SamplingParams(n=ANSWERS, max_tokens=MAX_TOKENS, temperature=1.0)
        start = perf_counter()
        outputs = theirs.generate(prompts, arguments, use_tqdm=False)
        seconds = perf_counter() - start
        return sum(len(answer.token_ids) for output in outputs for answer in output.outputs) / seconds

    def presampled(seed: int) -> float:
        output = folder / f"store-{seed}"
        start = perf_counter()
        presample(
            ours,
            rows,
            verifier,
            Presample(samples_per_prompt=ANSWERS, top_p=1.0, seed=seed),
            max_tokens=MAX_TOKENS,
            training_temperature=1.0,
            output_dir=output,
            batch_size=4096,
        )
        seconds = perf_counter() - start
        drawn = pq.read_table(output / "samples.parquet")["token_ids"].to_pylist()
        return sum(len(ids) for ids in drawn) / seconds

    speeds: dict[str, list[float]] = {"raw vLLM": [], "pre-sampling": []}
    turns: list[tuple[str, Callable[[int], float]]] = [("raw vLLM", raw), ("pre-sampling", presampled)]
    for number in range(rounds + 1):
        for name, turn in rotated(turns, number):
            speed = turn(number)
            if number:  # round 0 warms up
                speeds[name].append(speed)
        bar.advance(1)
    ours.close()
    return {
        "tokens_per_second": {name: statistics.median(values) for name, values in speeds.items()},
        "ratio": quartiles(speeds["pre-sampling"], speeds["raw vLLM"]),
    }


def engines(model: str, rounds: int) -> dict[str, Any]:
    """Seconds to start and to sync, of every engine."""
    policy = AutoModelForCausalLM.from_pretrained(model)
    found: dict[str, Any] = {}

    def measure(name: str, started: float, engine: Any) -> None:
        seconds = [
            timed(lambda version=version: engine.sync(full_weights(policy), version))[0]
            for version in range(1, rounds + 2)
        ]
        found[name] = {"start_seconds": started, "sync_seconds": statistics.median(seconds[1:])}
        engine.close()

    measure("transformers", *timed(lambda: TransformersEngine.load(model)))
    measure("vllm_colocate", *timed(lambda: VLLMColocateEngine.load(model, settings=SETTINGS)))
    seconds, server = timed(lambda: ServerProcess.start(model, vllm=SETTINGS))
    try:
        engine = VLLMServerEngine.connect(server.url, path=model, settings=Server())
        measure("vllm_server", seconds, engine)
    finally:
        server.stop()
    return found


def main() -> None:
    """Run the benchmark, print tables, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (default 7)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/engines.json"))
    options = parser.parse_args()
    quiet_libraries()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch, Bar("engines", len(MODELS) * (options.rounds + 1), "rounds") as bar:
        for label, (settings, prompts) in MODELS.items():
            folder = Path(scratch) / label.replace(" ", "-")
            task = tasks.load("countdown", {})
            tokenizer = character_tokenizer(task.alphabet or "", task.chat_template or "")
            small_model(settings, tokenizer, "float32").save_pretrained(folder / "model")
            tokenizer.save_pretrained(folder / "model")
            model = str(folder / "model")
            results[label] = {"engines": engines(model, options.rounds)}
            results[label] |= throughput(model, prompts, options.rounds, folder, bar)
    result = {
        "benchmark": "engines",
        "rounds": options.rounds,
        "workload": f"{ANSWERS} answers to each prompt, of at most {MAX_TOKENS} tokens, float32",
        "prompts": {label: prompts for label, (_, prompts) in MODELS.items()},
        "threads": torch.get_num_threads(),
        "machine": machine(1),
        "versions": versions(),
        "models": results,
    }
    atomic.write_json(options.output, result)
    _show(result)
    print(f"written to {options.output}")


def _show(result: dict[str, Any]) -> None:
    speeds = Table("model", "raw vLLM, tokens/s", "pre-sampling, tokens/s", "ratio", "quartiles", title="throughput")
    times = Table("model", "engine", "start, s", "sync, ms", title="start and sync")
    for label, numbers in result["models"].items():
        raw, ours = numbers["tokens_per_second"].values()
        speeds.add_row(label, f"{raw:,.0f}", f"{ours:,.0f}", *spread(numbers["ratio"]))
        for engine, seconds in numbers["engines"].items():
            times.add_row(label, engine, f"{seconds['start_seconds']:.1f}", f"{1e3 * seconds['sync_seconds']:.1f}")
    console = Console()
    console.print(speeds)
    console.print(times)


if __name__ == "__main__":
    main()
