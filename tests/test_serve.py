"""`posttrain serve` and the process behind it: bad input at once, a real server, and nothing left of it afterwards."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.errors import UserError
from posttrain.http import is_loopback
from posttrain.launch import serve
from posttrain.launch.serve import ServerProcess, environment, last_words, members
from posttrain.launch.warm_start import character_tokenizer, small_model
from posttrain.recipe import Lora, Rollout, Server, Vllm, WarmStart
from posttrain.rollouts.engine import EngineError, SamplingParams
from posttrain.rollouts.vllm_server import VLLMServerEngine
from tests.patience import eventually

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("serve") / "model"
    tokenizer = character_tokenizer("0123456789+-=", "{{ messages[0]['content'] }}")
    settings = WarmStart(hidden_size=64, intermediate_size=64, layers=1, heads=2)
    small_model(settings, tokenizer, "float32").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["serve", *arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})
    return result.exit_code, result.output


# ---------------------------------------------------------------- what is wrong is said at once


def test_bad_input_is_one_sentence(folder: str, tiny_model: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, message in (
            ([str(tmp_path / "no")], "There is no folder"),
            ([str(tmp_path)], "holds no config.json"),
            (["no-such-model"], "cannot be read as a folder or from the hub"),
            ([tiny_model], "attention heads of .* have size 16"),
            ([folder, "--port", port], f"cannot listen on port {port} of 127.0.0.1 .*in use.*choose another port"),
            ([folder, "--port", "0"], "Invalid value for '--port'"),
            ([folder, "--dtype", "int8"], "Invalid value for '--dtype'"),
            ([folder, "--lora-rank", "513"], "up to rank 512, not 513"),
        ):
            code, output = invoke(*arguments)
            assert code == 2 and re.search(message, output.replace("\n", " ")), output


def test_an_address_that_others_reach_is_warned_of(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any) -> None:
        raise UserError("far enough")

    monkeypatch.setattr(ServerProcess, "launch", refuse)
    warning = "whoever reaches port .* can replace the weights"
    port = str(free_port())
    assert re.search(warning, invoke(folder, "--host", "0.0.0.0", "--port", port)[1])  # noqa: S104 - never listens
    assert not re.search(warning, invoke(folder, "--port", port)[1])
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost") and not is_loopback("10.0.0.1")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def test_the_surrounding_launch_does_not_reach_the_server() -> None:
    launch = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "ACCELERATE_USE_DEEPSPEED": "true", "LOCAL_RANK": "1"}
    found = environment({**launch, "TORCHELASTIC_RUN_ID": "x", "HOME": "/h"}, devices="6,7", lora=True)
    assert found["HOME"] == "/h" and found["CUDA_VISIBLE_DEVICES"] == "6,7"
    assert found["VLLM_SERVER_DEV_MODE"] == found["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert not {*launch, "TORCHELASTIC_RUN_ID"} & set(found)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in environment({}, devices=None, lora=False)


def test_settings_become_flags(folder: str) -> None:
    vllm = Vllm(max_model_len=64, max_num_seqs=8, prefix_caching=False, enforce_eager=True)
    flags = ServerProcess(folder, vllm=vllm, lora=Lora(r=9), dtype="bfloat16")._arguments
    for pair in (
        ("--max-model-len", "64"),
        ("--max-num-seqs", "8"),
        ("--max-lora-rank", "16"),
        ("--dtype", "bfloat16"),
    ):
        assert flags[flags.index(pair[0]) + 1] == pair[1]
    assert {"--no-enable-prefix-caching", "--enforce-eager", "--enable-lora"} < set(flags)
    shares = serve._arguments(folder, "::1", 1, "float32", Vllm(), None, None, on_cpu=False)
    assert shares[shares.index("--gpu-memory-utilization") + 1] == "0.9" and "--enforce-eager" not in shares
    assert '{"backend": "nccl"}' in shares


def test_the_reason_is_found_in_a_log() -> None:
    log = """(APIServer pid=1) INFO 11-21 04:58:21 [launcher.py:69] Route
(EngineCore pid=2) ERROR 11-21 04:58:22 [core.py:1] ValueError: no room for a cache
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.
"""
    assert last_words(log) == "ValueError: no room for a cache"
    assert last_words("one\ntwo\n\nthree\nfour\n") == "two three four"
    assert last_words("") == ""


# ---------------------------------------------------------------- processes


def test_a_server_that_dies_while_it_starts_says_why_and_leaves_nothing(folder: str, tmp_path: Path) -> None:
    server = ServerProcess(folder, vllm=Vllm(max_model_len=10**6), log=tmp_path / "log")
    server.launch()
    group = server.pid
    assert group is not None
    with pytest.raises(EngineError, match=r"ended with exit code 1 \(.*max_model_len.*\); its log is .*log$"):
        server.wait()
    assert not members(group) and server.pid is None
    server.stop()


def test_it_ends_with_the_process_that_started_it(folder: str) -> None:
    code = f"""
import os, signal
from posttrain.launch.serve import ServerProcess
server = ServerProcess({folder!r})
server.launch()
print(server.pid, server.log, flush=True)
signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        group, log = parent.stdout.readline().split()
        assert eventually(lambda: bool(members(int(group))))
        parent.kill()
    assert eventually(lambda: not members(int(group)))
    Path(log).unlink()


def test_the_command_serves_until_ctrl_c_and_leaves_nothing(folder: str) -> None:
    port = free_port()
    command = [sys.executable, "-m", "posttrain", "serve", folder, "--port", str(port), "--max-num-seqs", "8"]
    environ = {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ, start_new_session=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        said = ""
        while "Ctrl-C" not in said:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            said += line
        lines = said.split("In a recipe:")[1].split("Try it:")[0]
        rollout = yaml.safe_load(lines)["rollout"]
        assert Rollout.model_validate(rollout).server.url == f"http://127.0.0.1:{port}"
        assert yaml.safe_load(lines)["model"] == {"path": folder, "dtype": "float32"}
        curl = re.search(r"^curl (\S+) .* -d '(.*)'$", said, re.MULTILINE)
        assert curl is not None
        request = urllib.request.Request(curl[1], curl[2].encode(), {"Content-Type": "application/json"})  # noqa: S310
        with urllib.request.urlopen(request, timeout=300) as answer:  # noqa: S310 - our own server
            assert b'"choices"' in answer.read()
        children = [
            int(pid)
            for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            if int(pid) in members(int(pid))
        ]
        assert len(children) == 1, "a process group of its own"
        engine = VLLMServerEngine.connect(f"http://127.0.0.1:{port}", path=folder, settings=Server(timeout=300.0))
        caught: list[Exception] = []

        def sample() -> None:
            try:
                while True:
                    engine.sample(["1+1="] * 64, SamplingParams(max_tokens=200, n=2))
            except EngineError as error:
                caught.append(error)

        sampling = threading.Thread(target=sample)
        sampling.start()
        sleep(1.0)
        shared = serve._shared_memory(children[0])
        assert shared, "vLLM's processes share memory"
        os.kill(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=300)
    sampling.join(timeout=300)
    assert re.search(f"The vLLM server at http://127.0.0.1:{port} .*last policy version 0", str(caught[0]))
    engine.close()
    assert process.returncode == 130
    assert "stopped" in errors and "Traceback" not in errors + output and "warning" not in errors
    assert re.search(r"starting the vLLM server of .*  [1-9]\d+ s", errors), "progress every ten seconds"
    assert not members(children[0]) and not any(Path(path).exists() for path in shared)
    log = re.search(r"its log is (\S+)", errors)
    assert log is not None and not Path(log[1]).exists()
    with socket.create_server(("127.0.0.1", port)):
        pass
