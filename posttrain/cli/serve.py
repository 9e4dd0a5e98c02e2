"""`posttrain serve`: a vLLM server for a model, in the foreground, that a run can train, sample and score with."""

from __future__ import annotations

from time import sleep
from typing import Annotated, Literal

import typer

from posttrain.cli.console import reported, warn

EXAMPLES = """Examples

[cyan]posttrain serve runs/base[/]                        a folder
[cyan]posttrain serve Qwen/Qwen3-1.7B --devices 7[/]      on GPU 7, beside a run
[cyan]posttrain serve runs/base --lora-rank 16[/]         for lora_sync: adapter
"""


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Folder of a saved model, or its name on the hub: a run's model.path.",
            show_default=False,
        ),
    ],
    revision: Annotated[
        str | None,
        typer.Option(
            "--revision", metavar="NAME", help="Of a model on the hub: branch, tag or commit.", show_default="main"
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option("--host", help="Where to listen. Whoever reaches the port can replace the weights."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 8000,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option("--dtype", help="In which it computes; the run's model.dtype must be the same."),
    ] = "float32",
    max_model_len: Annotated[
        int | None,
        typer.Option(
            "--max-model-len",
            metavar="TOKENS",
            min=1,
            help="Longest prompt and answer together.",
            show_default="what the model allows",
        ),
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option("--max-num-seqs", metavar="N", min=1, help="Sequences that are decoded at a time.")
    ] = 256,
    tensor_parallel: Annotated[
        int, typer.Option("--tensor-parallel", metavar="GPUS", min=1, help="GPUs that share one copy of the model.")
    ] = 1,
    gpu_memory_utilization: Annotated[
        float,
        typer.Option(
            "--gpu-memory-utilization", metavar="SHARE", min=0.01, max=1.0, help="Share of a GPU's memory to use."
        ),
    ] = 0.9,
    devices: Annotated[
        str | None,
        typer.Option("--devices", metavar="LIST", help="GPUs to use, as in 6,7.", show_default="$CUDA_VISIBLE_DEVICES"),
    ] = None,
    lora_rank: Annotated[
        int | None,
        typer.Option(
            "--lora-rank",
            metavar="RANK",
            min=1,
            help="Take LoRA adapters up to this rank (rollout.lora_sync: adapter).",
            show_default="none",
        ),
    ] = None,
    no_prefix_caching: Annotated[
        bool, typer.Option("--no-prefix-caching", help="Read every prompt anew, also what prompts share.")
    ] = False,
    start_timeout: Annotated[
        float, typer.Option("--start-timeout", metavar="SECONDS", min=1.0, help="Longest time until it answers.")
    ] = 600.0,
) -> None:
    """Serve a model with vLLM until Ctrl-C, for runs and evaluations with the engine vllm_server.

    The server can sample, score and take new weights. Start it, put the lines that it prints into a recipe, and run the
    recipe from another terminal.
    """
    from posttrain.http import is_loopback
    from posttrain.launch.serve import ServerProcess
    from posttrain.recipe import Lora, Vllm

    settings = Vllm(
        gpu_memory_utilization=gpu_memory_utilization,
        tensor_parallel=tensor_parallel,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        prefix_caching=not no_prefix_caching,
    )
    with reported("stopped"):
        server = ServerProcess(
            model,
            host=host,
            port=port,
            dtype=dtype,
            revision=revision,
            vllm=settings,
            devices=devices,
            lora=None if lora_rank is None else Lora(r=lora_rank),
            timeout=start_timeout,
        )
        if not is_loopback(host):
            warn(f"{host} is more than this machine: whoever reaches port {port} can replace the weights.")
        typer.echo(f"starting vLLM for {model}; its log is {server.log}", err=True)
        server.launch()
        try:
            seconds = server.wait()
            typer.echo(_usage(model, revision, server.url, dtype, lora_rank, seconds))
            while (dead := server.death()) is None:
                sleep(0.5)
            from posttrain.rollouts.engine import EngineError

            raise EngineError(f"{dead}.")
        finally:
            server.stop()


def _usage(model: str, revision: str | None, url: str, dtype: str, lora_rank: int | None, seconds: float) -> str:
    named = f"{model}, revision: {revision}" if revision is not None else model
    lora = "\n  lora_sync: adapter" if lora_rank is not None else ""
    body = f'{{"model": "{model}", "prompt": "1 + 1 =", "max_tokens": 8}}'
    return f"""{model} is served at {url} ({seconds:.0f} s). In a recipe:

model: {{path: {named}, dtype: {dtype}}}
rollout:
  engine: vllm_server{lora}
  server: {{url: "{url}"}}

Try it:

curl {url}/v1/completions -H 'Content-Type: application/json' -d '{body}'

Ctrl-C stops it."""
