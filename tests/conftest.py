"""What every test runs under: no hub, one thread per worker, and shape annotations that are executed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch, transformers or trl are imported, by any test and by any process that a test starts.
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A job in a shell's background begins with Ctrl-C ignored, which every process that a test starts would inherit.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis
import jaxtyping

# Both measure the machine: how long an example takes, and how long it takes to draw one.
hypothesis.settings.register_profile(
    "posttrain", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("posttrain")

# Objectives only: in trainers the hook would type-check the configs too, and TRL passes ints to its own float fields.
jaxtyping.install_import_hook("posttrain.objectives", "beartype.beartype")


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty POSTTRAIN_CACHE for the tests of one module."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTTRAIN_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a model with random weights and its tokenizer, over the alphabet of countdown."""
    from posttrain.launch.warm_start import character_tokenizer, small_model
    from posttrain.recipe import WarmStart
    from posttrain.tasks import load

    task = load("countdown")
    assert task.alphabet is not None and task.chat_template is not None
    tokenizer = character_tokenizer(task.alphabet, task.chat_template)
    settings = WarmStart(hidden_size=32, intermediate_size=64, layers=2, heads=2, seed=0)
    folder: Path = tmp_path_factory.mktemp("tiny_model")
    small_model(settings, tokenizer, "float32").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
