"""Images outside of training: a LLaVA from nothing, its engine, its store, its evaluation, and what is refused."""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from posttrain import recipe as recipes
from posttrain import rewards, tasks
from posttrain.errors import UserError
from posttrain.evaluation.compare import compare
from posttrain.evaluation.evaluate import evaluate, load
from posttrain.evaluation.report import write_report
from posttrain.launch import pipeline
from posttrain.launch import warm_start as warm_starts
from posttrain.launch.engines import Engines
from posttrain.launch.warm_start import character_tokenizer, small_processor, small_vision_model, warm_start
from posttrain.launch.workers import Workers
from posttrain.recipe import Evaluation, Presample, Vision, WarmStart
from posttrain.rollouts.engine import Sample, SamplingParams
from posttrain.rollouts.fingerprint import differs, fingerprint, images_fingerprint, tokenizer_fingerprint
from posttrain.rollouts.presample import presample
from posttrain.rollouts.store import prompt_id
from posttrain.rollouts.tokens import (
    batched,
    continuation_ids,
    encode,
    image_fields,
    load_processing_class,
    prompt_lengths,
    render,
)
from posttrain.rollouts.transformers_engine import TransformersEngine

OPTIONS: dict[str, Any] = {"size": 16, "max_shapes": 1, "rows": 24, "eval_share": 0.25}
SETTINGS = WarmStart(
    architecture="llava", hidden_size=32, intermediate_size=64, layers=2, heads=2, vision=Vision(layers=1)
)
PLACEHOLDER = 3
"""The id of `<image>` in the character tokenizer; an image of 16 × 16 pixels has (16 / 8)² = 4 of them."""


@pytest.fixture(scope="module")
def task() -> tasks.BaseTask:
    return tasks.load("shapes", OPTIONS)


@pytest.fixture(scope="module")
def folder(task: tasks.BaseTask, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random LLaVA with its processor."""
    made = tmp_path_factory.mktemp("llava")
    assert task.alphabet is not None and task.chat_template is not None
    tokenizer = character_tokenizer(task.alphabet, task.chat_template, images=True)
    small_vision_model(SETTINGS, tokenizer, 16, "float32").save_pretrained(made)
    small_processor(SETTINGS, tokenizer, 16).save_pretrained(made)
    return str(made)


@pytest.fixture(scope="module")
def engine(folder: str) -> TransformersEngine:
    return TransformersEngine.load(folder, device="cpu")


@pytest.fixture(scope="module")
def prompts(task: tasks.BaseTask) -> list[Any]:
    """Of several lengths, with different images; one without any, and one with two."""
    rows = task.rows("train")
    kinds = {len(row["prompt"][0]["content"]): tasks.shown(row) for row in rows}
    both = {**rows[0], "images": [rows[0]["images"][0], rows[1]["images"][0]]}
    return [*kinds.values(), rows[0]["prompt"], tasks.shown(both)]


def pixels(images: list[Image.Image]) -> Tensor:
    """Values of the images as the processor scales them, (v / 255 − 0) / 0.5, [images, 3, H, W]."""
    values = [torch.tensor(np.asarray(image)) for image in images]
    return torch.stack(values).permute(0, 3, 1, 2) / 255 / 0.5


def images_of(prompt: Any) -> list[Image.Image]:
    content = prompt[0]["content"]
    return [part["image"] for part in content if part["type"] == "image"] if isinstance(content, list) else []


@torch.no_grad()
def log_probs(engine: TransformersEngine, prompt: Any, sample: Sample, temperature: float = 1.0) -> list[float]:
    """Log-probability of every token of a sample, placeholders excluded, by one unpadded pass over the sequence."""
    images = images_of(prompt)
    ids = [*sample.prompt_ids, *sample.token_ids]
    further = {"pixel_values": pixels(images)} if images else {}
    logits = engine.model(input_ids=torch.tensor([ids]), **further).logits[0] / temperature
    logits[:, PLACEHOLDER] = -torch.inf
    logps = logits.log_softmax(-1)
    start = len(sample.prompt_ids) - 1
    return [float(logps[start + place, token]) for place, token in enumerate(sample.token_ids)]


# ---------------------------------------------------------------- prompts and fields


def test_an_image_becomes_one_placeholder_per_patch(engine: TransformersEngine, task: tasks.BaseTask) -> None:
    row = task.rows("train")[0]
    rendered = render(engine.processing_class, tasks.shown(row))
    assert engine.tokenizer.decode(rendered.ids) == "^" + 4 * "<image>" + row["prompt"][0]["content"]
    assert torch.allclose(rendered.fields["pixel_values"], pixels(row["images"]))
    text = render(engine.processing_class, row["prompt"])
    assert engine.tokenizer.decode(text.ids) == "^" + row["prompt"][0]["content"]
    assert not text.fields


def test_the_prompt_is_left_as_it_was(engine: TransformersEngine, task: tasks.BaseTask) -> None:
    prompt = task.rows("train")[0]["prompt"]
    render(engine.processing_class, prompt)
    assert isinstance(prompt[0]["content"], str)


def test_fields_of_given_token_ids_are_those_of_the_prompt(engine: TransformersEngine, prompts: list[Any]) -> None:
    processor: Any = engine.processing_class
    for prompt in prompts:
        images = images_of(prompt)
        if images:
            rendered = render(processor, prompt)
            fields = image_fields(processor, images, rendered.ids)
            assert fields.keys() == rendered.fields.keys()
            assert torch.equal(fields["pixel_values"], rendered.fields["pixel_values"])
            with pytest.raises(UserError, match=f"take {4 * len(images)} placeholder tokens, .* hold 0"):
                image_fields(processor, images, [5, 6])


def test_lengths_of_prompts(engine: TransformersEngine, prompts: list[Any]) -> None:
    lengths = list(prompt_lengths(engine.processing_class, prompts))
    assert lengths == [len(encode(engine.processing_class, prompt)) for prompt in prompts]
    assert lengths[-1] - lengths[-2] == 8, "two images of four patches"


def test_fields_of_unequal_shape_are_one_batch() -> None:
    # Two tiles for the first prompt, one smaller tile for the second; types of tokens are padded on the left.
    first = {"pixel_values": torch.ones(2, 3, 4, 4), "mm_token_type_ids": torch.tensor([[0, 1, 1]])}
    second = {"pixel_values": torch.full((1, 3, 2, 4), 2.0), "mm_token_type_ids": torch.tensor([[1]])}
    batch = batched([first, {}, second], 4)
    assert batch["pixel_values"].shape == (3, 3, 4, 4)
    assert batch["pixel_values"].sum(dim=(1, 2, 3)).tolist() == [48.0, 48.0, 2 * 24.0]
    assert batch["pixel_values"][2, :, 2:].eq(0).all()
    assert batch["mm_token_type_ids"].tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert batched([{}, {}], 4) == {}


# ---------------------------------------------------------------- sampling and scoring


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_carry_the_log_probs_of_a_pass_over_pixels(
    engine: TransformersEngine, prompts: list[Any], temperature: float
) -> None:
    groups = engine.sample(prompts, SamplingParams(max_tokens=4, n=3, temperature=temperature))
    for prompt, group in zip(prompts, groups, strict=True):
        for sample in group:
            assert sample.prompt_ids == encode(engine.processing_class, prompt)
            assert sample.logprobs == pytest.approx(log_probs(engine, prompt, sample, temperature), abs=1e-5)


def test_samples_follow_the_picture_and_not_the_batch(engine: TransformersEngine, task: tasks.BaseTask) -> None:
    row, other = task.rows("train")[:2]
    one, two = tasks.shown(row), tasks.shown({**row, "images": other["images"]})
    params = SamplingParams(max_tokens=1, n=1, temperature=0.0)
    (together,) = engine.sample([one, two], params)[:1]
    (alone,), (elsewhere,) = engine.sample([one], params)[0], engine.sample([two], params)[0]
    assert together[0].logprobs == pytest.approx(alone.logprobs, abs=1e-5)
    assert abs(alone.logprobs[0] - elsewhere.logprobs[0]) > 1e-3


@pytest.mark.parametrize("batch_size", [256, 2])
def test_scores_are_those_of_the_samples(folder: str, prompts: list[Any], batch_size: int) -> None:
    engine = TransformersEngine.load(folder, device="cpu", batch_size=batch_size)
    samples = [
        (prompt, group[0])
        for prompt, group in zip(prompts, engine.sample(prompts, SamplingParams(max_tokens=5)), strict=True)
    ]
    scores = engine.score(
        [(sample.prompt_ids, sample.token_ids) for _, sample in samples],
        images=[images_of(prompt) for prompt, _ in samples],
        top_k=2,
    )
    for (prompt, sample), score in zip(samples, scores, strict=True):
        # The placeholder is part of the full softmax, and was not of the one that was drawn from.
        ids = [*sample.prompt_ids, *sample.token_ids]
        further = {"pixel_values": pixels(images_of(prompt))} if images_of(prompt) else {}
        with torch.no_grad():
            logps = engine.model(input_ids=torch.tensor([ids]), **further).logits[0].log_softmax(-1)
        start = len(sample.prompt_ids) - 1
        wanted = logps[start : start + len(sample.token_ids)]
        assert score.logprobs == pytest.approx(
            [float(row[token]) for row, token in zip(wanted, sample.token_ids, strict=True)], abs=1e-5
        )
        assert score.top_ids == wanted.topk(2).indices.tolist()


def test_a_placeholder_is_never_drawn(engine: TransformersEngine, prompts: list[Any]) -> None:
    head = engine.model.get_output_embeddings()
    wanted = torch.full((head.weight.size(0),), 0.0)
    wanted[PLACEHOLDER] = 50.0
    hook = head.register_forward_hook(lambda module, arguments, logits: logits + wanted)
    try:
        groups = engine.sample(prompts, SamplingParams(max_tokens=6, n=4))
    finally:
        hook.remove()
    assert not any(PLACEHOLDER in sample.token_ids for group in groups for sample in group)
    assert engine.model.generation_config.suppress_tokens == [PLACEHOLDER], "so TRL's own generation keeps from it, too"


def test_text_engines_refuse_images(tiny_model: str, prompts: list[Any]) -> None:
    engine = TransformersEngine.load(tiny_model, device="cpu")
    with pytest.raises(UserError, match="take a vision-language model"):
        engine.sample([prompts[0]], SamplingParams(max_tokens=1))
    with pytest.raises(UserError, match="the model reads text alone"):
        engine.score([([5], [6])], images=[images_of(prompts[0])])


def test_a_saved_policy_is_taken_over(folder: str, prompts: list[Any], tmp_path: Path) -> None:
    engine, other = (TransformersEngine.load(folder, device="cpu") for _ in range(2))
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.3)
    other.model.save_pretrained(tmp_path)
    params = SamplingParams(max_tokens=3, n=2)
    before = engine.sample(prompts, params)
    engine.switch(str(tmp_path))
    assert engine.sample(prompts, params) == other.sample(prompts, params) != before


def test_adapters_are_loaded_and_merged(folder: str, prompts: list[Any], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = TransformersEngine.load(folder, device="cpu")
    adapted: Any = get_peft_model(base.model, LoraConfig(r=2, target_modules=["q_proj", "linear_2"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
    adapted.save_pretrained(tmp_path)
    base.processing_class.save_pretrained(tmp_path)
    params = SamplingParams(max_tokens=3, n=2)
    wanted = TransformersEngine(adapted, base.processing_class).sample(prompts, params)
    beside = TransformersEngine.load(str(tmp_path), device="cpu")
    merged = TransformersEngine.load(folder, device="cpu")
    plain = merged.sample(prompts, params)
    merged.switch(str(tmp_path))
    for found in (beside.sample(prompts, params), merged.sample(prompts, params)):
        for one, other in zip(found, wanted, strict=True):
            assert [s.token_ids for s in one] == [s.token_ids for s in other]
            assert one[0].logprobs == pytest.approx(other[0].logprobs, abs=1e-5)
    assert plain != wanted


# ---------------------------------------------------------------- fingerprints and ids


def test_fingerprints_know_the_settings_of_images(folder: str, engine: TransformersEngine) -> None:
    processor: Any = load_processing_class(folder)
    own = fingerprint(engine.model, processor)
    assert own == engine.fingerprint
    processor.image_processor.image_std = [0.25] * 3
    assert differs(own, fingerprint(engine.model, processor)) == "the settings of images"
    processor.image_processor.image_std = [0.5] * 3
    assert fingerprint(engine.model, processor) == own
    processor.patch_size = 4
    assert differs(own, fingerprint(engine.model, processor)) == "the settings of images"


def test_a_run_on_text_alone_needs_no_processor(folder: str, engine: TransformersEngine, prompts: list[Any]) -> None:
    plain = TransformersEngine.load(folder, device="cpu", images=False)
    assert plain.processing_class is plain.tokenizer
    params = SamplingParams(max_tokens=3, n=2)
    text = prompts[-2]
    assert [s.token_ids for s in plain.sample([text], params)[0]] == [
        s.token_ids for s in engine.sample([text], params)[0]
    ]
    assert plain.fingerprint == engine.fingerprint.rpartition(".")[0]
    assert differs(plain.fingerprint, engine.fingerprint) is None
    with pytest.raises(UserError, match="which a tokenizer cannot render"):
        plain.sample([prompts[0]], params)


def test_fingerprints_are_the_same_before_and_after_saving(task: tasks.BaseTask, folder: str) -> None:
    tokenizer = character_tokenizer(task.alphabet or "", task.chat_template or "", images=True)
    made, loaded = small_processor(SETTINGS, tokenizer, 16), load_processing_class(folder)
    assert tokenizer_fingerprint(made) == tokenizer_fingerprint(loaded)
    assert images_fingerprint(made) == images_fingerprint(loaded)  # type: ignore[arg-type]


def test_fingerprints_of_text_stay(tiny_model: str) -> None:
    tokenizer: Any = load_processing_class(tiny_model)
    content = {"vocabulary": tokenizer.get_vocab(), "eos": 1, "template": tokenizer.chat_template}
    wanted = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    assert tokenizer_fingerprint(tokenizer) == wanted


def test_prompt_ids_tell_images_apart_and_keep_those_of_text(task: tasks.BaseTask) -> None:
    rows = task.rows("train")
    row, other = rows[:2]
    same_words = {**row, "images": other["images"]}
    ids = {prompt_id(tasks.shown(one)) for one in (row, same_words, other)} | {prompt_id(row["prompt"])}
    assert len(ids) == 4
    copied = {**row, "images": [image.copy() for image in row["images"]]}
    assert prompt_id(tasks.shown(copied)) == prompt_id(tasks.shown(row))
    messages = [{"role": "user", "content": "357=16"}]
    wanted = hashlib.sha256(b'[{"content": "357=16", "role": "user"}]').hexdigest()[:16]
    assert prompt_id(messages) == wanted
    assert prompt_id(tasks.shown({"prompt": messages})) == wanted


# ---------------------------------------------------------------- store, evaluation, report


def test_a_store_of_answers_to_images(engine: TransformersEngine, task: tasks.BaseTask, tmp_path: Path) -> None:
    rows = task.rows("train")
    words = rows[0]["prompt"]
    asked = [{**row, "prompt": words} for row in rows[:8]]  # told apart by their images alone

    class Any3(rewards.Verifier):
        name = "any"

        def verify(self, completion: str, row: Any) -> rewards.Verdict:
            return rewards.Verdict(1.0, "ok")

    store = presample(
        engine, asked, Any3(), Presample(samples_per_prompt=2), max_tokens=3, training_temperature=0.8,
        output_dir=tmp_path / "store", batch_size=8,
    )  # fmt: skip
    assert store.counts["pef"] == 8
    by_id = {prompt_id(tasks.shown(row)): row for row in asked}
    table = pq.read_table(tmp_path / "store" / "answers.parquet").to_pylist()
    assert [answer["prompt_id"] for answer in table] == list(by_id)
    for answer in table:
        images = by_id[answer["prompt_id"]]["images"]
        assert answer["prompt_token_ids"].count(PLACEHOLDER) == 4
        (score,) = engine.score([(answer["prompt_token_ids"], answer["token_ids"])], temperature=0.8, images=[images])
        assert answer["logps"] == pytest.approx(score.logprobs, abs=1e-5)


def test_an_evaluation_keeps_pictures_for_its_report(
    engine: TransformersEngine, task: tasks.BaseTask, tmp_path: Path
) -> None:
    rows = task.rows("eval")[:4]
    rows[1] = {**rows[1], "images": [Image.new("RGB", (900, 300), "red"), rows[1]["images"][0]]}
    verifier = rewards.load(*task.verifier)  # type: ignore[misc]
    result = evaluate(
        engine, "shapes", rows, verifier, Evaluation(n=4, k=[1, 2], resamples=50), max_tokens=3, batch_size=8,
        output_dir=tmp_path / "base", label="base",
    )  # fmt: skip
    assert result is not None and result.prompts[0] == rows[0]["prompt"][0]["content"]
    shown = [[Image.open(BytesIO(png)) for png in images] for images in load(tmp_path / "base").images]
    assert [[image.size for image in images] for images in shown] == [
        [(16, 16)], [(240, 80), (16, 16)], [(16, 16)], [(16, 16)]
    ]  # fmt: skip
    assert shown[0][0].tobytes() == rows[0]["images"][0].tobytes()

    lost, kept = (
        _with_correct(load(tmp_path / "base"), label, correct) for label, correct in (("grpo", 0), ("base", 4))
    )
    page = _page({"base": kept, "grpo": lost}, tmp_path)
    pictures = re.findall(
        r'<img src="data:image/png;base64,([^"]+)" width="(\d+)"( class="enlarged")?\s+alt="([^"]+)"', page
    )
    assert len(pictures) == 5
    assert [b64decode(source) for source, *_ in pictures] == [png for images in result.images for png in images]
    assert [(int(width), css) for _, width, css, _ in pictures[:2]] == [(128, ' class="enlarged"'), (240, "")]
    assert pictures[0][3] == f"Image 1 of the problem: {rows[0]['prompt'][0]['content']}"
    assert not re.search(r'(src|href)="(?!data:image/png;base64,|#)', page), "nothing is fetched"


def _with_correct(result: Any, label: str, correct: int) -> Any:
    """The same evaluation as if `correct` of the four answers to every problem had been right."""
    from dataclasses import replace

    problems = len(result.keys)
    flags = [[True] * correct + [False] * (4 - correct)] * problems
    return replace(
        result, label=label, correct=flags, answers=[["1"] * 4] * problems, identity={**result.identity, "model": label}
    )


def _page(results: dict[str, Any], folder: Path) -> str:
    write_report(
        compare(results, "base"), folder / "report.html", title="t", recipe_yaml="", provenance={}, histories={},
        command="",
    )  # fmt: skip
    return (folder / "report.html").read_text(encoding="utf-8")


# ---------------------------------------------------------------- the warm start


def test_rows_of_the_warm_start_are_those_of_trl(task: tasks.BaseTask, folder: str) -> None:
    """Tokens, labels and pixels of a batch equal those of TRL's own collator for images."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, DataCollatorForVisionLanguageModeling

    from posttrain.seams import supervised

    processor: Any = load_processing_class(folder)
    pairs = task.demonstrations(task.rows("train"), 6, seed=1)
    rows, prompts = supervised._tokenized(processor, warm_starts._shown(pairs))
    assert len(prompts) == len({id(row) for row, _ in pairs})
    labelled = [
        {
            "input_ids": row["input_ids"],
            "labels": [t if m else -100 for t, m in zip(row["input_ids"], row["completion_mask"], strict=True)],
            "prompt_number": row["prompt_number"],
        }
        for row in rows
    ]
    own = supervised._WithImages(DataCollatorForLanguageModeling(pad_token_id=0), prompts)(labelled)
    theirs = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)(
        [
            {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": answer}], "images": row["images"]}
            for row, answer in pairs
        ]
    )
    for name in ("input_ids", "attention_mask", "labels", "pixel_values"):
        assert torch.equal(own[name], theirs[name]), name
    assert continuation_ids(processor, tasks.shown(pairs[0][0]), "3") == [*encode(processor.tokenizer, "3"), 1]


def test_a_warm_start_learns_and_is_cached(task: tasks.BaseTask, own_cache: Path) -> None:
    settings = SETTINGS.model_copy(update={"steps": 40, "batch_size": 16})
    made = warm_start(settings, task, dtype="float32")
    identity = json.loads((made / "identity.json").read_text())
    assert identity["settings"]["vision"] == {"layers": 1, "patch": 8}
    assert identity["loss"] < 0.6, "ln 2 / 2 is a coin for the answer; all answers alike are ln 2 / 2 + ε"
    before = (made / "model.safetensors").stat().st_mtime_ns
    assert warm_start(settings, task, dtype="float32") == made
    assert (made / "model.safetensors").stat().st_mtime_ns == before
    assert warm_starts.identity_of(settings.model_copy(update={"vision": None}), [task], dtype="float32") == (
        warm_starts.identity_of(settings.model_copy(update={"vision": Vision()}), [task], dtype="float32")
    )
    engine = TransformersEngine.load(str(made), device="cpu")
    assert engine.sample([tasks.shown(task.rows("eval")[0])], SamplingParams(max_tokens=3))


def test_text_keeps_its_identity() -> None:
    """What a warm start on text is cached by does not know of images."""
    identity = warm_starts.identity_of(WarmStart(), [tasks.load("countdown")], dtype="float32")
    assert identity["format"] == 1
    assert identity["settings"] == {
        "architecture": "qwen2", "hidden_size": 64, "intermediate_size": 172, "layers": 2, "heads": 4, "steps": 1500,
        "batch_size": 128, "learning_rate": 2e-3, "seed": 0,
    }  # fmt: skip


# ---------------------------------------------------------------- what is refused, before anything is made

SMALL: dict[str, Any] = {
    "name": "small",
    "model": {"warm_start": {"architecture": "llava", "vision": {"patch": 8}}},
    "task": {"name": "shapes", "options": OPTIONS},
    "method": {"name": "grpo", "args": {"max_steps": 1, "num_generations": 4, "per_device_train_batch_size": 4}},
    "evaluation": {"prompts": 4, "n": 2, "k": [1]},
}


def prepared(**changes: Any) -> pipeline.Job:
    return pipeline.prepare(recipes.validate({**SMALL, **changes}, "small"))


def test_a_recipe_with_images_is_checked() -> None:
    job = prepared()
    assert job.task.images and job.train_rows[0]["images"]


COUNTDOWN = {"name": "countdown", "options": {}}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": {"warm_start": {}}}, "hold images, which a model of the architecture qwen2 cannot read"),
        ({"task": COUNTDOWN}, "hold no images, so there is nothing for llava to look at"),
        ({"model": {"warm_start": {"vision": {}}}}, "vision has no effect on the architecture qwen2"),
        (
            {"model": {"warm_start": {"architecture": "llava", "vision": {"patch": 5}}}},
            "cannot be cut into patches of 5",
        ),
        ({"rollout": {"engine": "vllm_colocate"}}, "which the engine vllm_colocate is not given here"),
        ({"rollout": {"engine": "vllm_server"}}, "which the engine vllm_server is not given here"),
        ({"model": {"path": "TINY"}}, "reads none: name a vision-language model (model.path)"),
        (
            {"evaluation": {"prompts": 4, "n": 2, "k": [1], "divergence": {}}},
            "evaluation.divergence reads tokens alone",
        ),
        (
            {"evaluation": {"prompts": 4, "n": 2, "k": [1], "calibration": {}}},
            "evaluation.calibration reads tokens alone",
        ),
        ({"method": {"name": "f_dpo"}}, "The run 'f_dpo' learns from pairs of tokens alone"),
        (
            {"model": {"warm_start": {"architecture": "llava", "also": [{"name": "countdown"}]}}},
            "in different chat templates",
        ),
        (
            {
                "task": COUNTDOWN,
                "model": {"path": "TINY"},
                "evaluation": {"prompts": 4, "n": 2, "k": [1], "further": {"eyes": {"task": SMALL["task"], "k": [1]}}},
            },
            "hold images, and the model",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(changes: dict[str, Any], sentence: str, tiny_model: str) -> None:
    changes = json.loads(json.dumps(changes).replace("TINY", tiny_model))
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        prepared(**changes)
    assert sentence in str(error.value)


def test_images_of_unequal_sizes_make_no_model(task: tasks.BaseTask) -> None:
    class Wide(type(task)):  # type: ignore[misc]
        def rows(self, split: tasks.Split) -> list[tasks.Row]:
            first, *rest = super().rows(split)
            return [{**first, "images": [Image.new("RGB", (16, 24))]}, *rest]

    with pytest.raises(UserError, match="16 × 16, 16 × 24"):
        warm_starts.demonstrated(SETTINGS, Wide(task.options))  # type: ignore[attr-defined]


def test_the_needed_length_counts_patches(task: tasks.BaseTask, folder: str) -> None:
    recipe = recipes.validate({**SMALL, "model": {"path": folder}, "rollout": {"max_tokens": 7}}, "small")
    rows = task.rows("train")
    longest = max(len("^") + 4 + len(row["prompt"][0]["content"]) for row in rows)
    assert Engines(recipe, folder, rows, Workers()).needed_length == longest + 7 + 1
