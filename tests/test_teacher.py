"""Teachers in this process, in an engine and behind a server: what they say, what they refuse, what they hold."""

from __future__ import annotations

import copy
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from posttrain.errors import UserError
from posttrain.launch.spawn import leave
from posttrain.launch.warm_start import character_tokenizer
from posttrain.rollouts import teacher as teacher_module
from posttrain.rollouts.engine import Score
from posttrain.rollouts.teacher import (
    EngineTeacher,
    ModelTeacher,
    Reprompted,
    Routed,
    Teacher,
    TeacherScores,
    check_teacher,
    hint,
    require_effect,
    unpadded,
)
from posttrain.rollouts.tokens import render
from posttrain.rollouts.transformers_engine import TransformersEngine
from posttrain.tasks import Row, shown
from tests.processes import finish
from tests.tiny_vision import FAMILIES, Seeing, colour, tiny_vision

ALPHABET = "0123456789+-*=^?"  # with <pad>, <eos> and <unk>: 19 tokens
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}={{ message['content'] }}="
    "{% elif message['role'] == 'user' %}^{{ message['content'] }}?{% endif %}{% endfor %}"
    "{% if closed is defined %}={% endif %}"
)
EOS = 1


def make_tokenizer(alphabet: str = ALPHABET, template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    return character_tokenizer(alphabet, template)


def make_model(kind: str = "qwen2", rows: int = 19, seed: int = 0, **changes: Any) -> Any:
    """A random model whose distributions are far from uniform."""
    settings = {
        "vocab_size": rows,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**settings, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def save(folder: Path, model: Any = None, tokenizer: Any = None) -> str:
    (model or make_model()).save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return str(folder)


def sequences(count: int = 11, words: int = 19, seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of 1 to 12 tokens and completions of 0 to 15; one is empty and one has 16."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        drawn: list[int] = torch.randint(0, words, (length,), generator=generator).tolist()
        return drawn

    lengths = torch.randint(1, 13, (count, 2), generator=generator).tolist()
    completions = [draw(length + 3) for _, length in lengths]
    completions[0], completions[1] = draw(16), []
    return [draw(length) for length, _ in lengths], completions


def plain(model: Any, prompt: Sequence[int], completion: Sequence[int], temperature: float = 1.0) -> Tensor:
    """Log-probs [T, V] of a completion in float64: one unpadded forward."""
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        logits = exact(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : len(prompt) + len(completion) - 1] / temperature, dim=-1)


def gap(one: TeacherScores, two: TeacherScores) -> float:
    assert torch.equal(one.mask, two.mask)
    return float((one.logps - two.logps).abs().max())


# ---------------------------------------------------------------- what they say


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen2", {"tie_word_embeddings": True}),
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 3.0}),
        ("gpt2", {"n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 64}),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_are_the_plain_log_softmax(
    kind: str, changes: dict[str, Any], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_module, "_TILE_BYTES", 4 * 19 * 5)  # five tokens at a time
    if kind == "gpt2":  # no such names there
        config = AutoConfig.for_model("gpt2", vocab_size=19, **changes)
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config).eval()
    else:
        model = make_model(kind, **changes)
    prompts, completions = sequences()
    ids = torch.randint(0, 19, (11, 16, 3), generator=torch.Generator().manual_seed(3))
    teacher = ModelTeacher(model, batch_size=4)
    given = teacher.score(prompts, completions, temperature=temperature, ids=ids)
    best = teacher.score(prompts, completions, temperature=temperature, top_k=4)
    assert given.logps.shape == (11, 16) and given.top_logps.shape == (11, 16, 3)
    assert best.top_ids.shape == (11, 16, 4) and torch.equal(best.logps, given.logps)
    assert given.mask.sum(dim=1).tolist() == [len(completion) for completion in completions]
    assert not given.logps[~given.mask].any() and not given.top_logps[~given.mask].any()
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        wanted, length = plain(model, prompt, completion, temperature), len(completion)
        own = wanted.gather(1, torch.tensor(completion, dtype=torch.long)[:, None])[:, 0]
        torch.testing.assert_close(given.logps[row, :length].double(), own, atol=1e-5, rtol=0)
        asked = wanted.gather(1, ids[row, :length])
        torch.testing.assert_close(given.top_logps[row, :length].double(), asked, atol=1e-5, rtol=0)
        values, words = wanted.topk(4, dim=-1)
        torch.testing.assert_close(best.top_logps[row, :length].double(), values, atol=1e-5, rtol=0)
        assert torch.equal(best.top_ids[row, :length], words)
        assert torch.equal(given.top_ids[row, :length], ids[row, :length])


def test_temperature_and_words_by_hand() -> None:
    """Logits (0, ln 3, ln 4) everywhere: p = 1/8, 3/8, 4/8; at temperature ½ they are 1, 9, 16 of 26."""
    model = make_model(rows=3)
    head = torch.nn.Linear(64, 3)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([1.0, 3.0, 4.0]).log())
    model.lm_head = head
    score = ModelTeacher(model).score([[2]], [[0, 1, 2]], top_k=2)
    torch.testing.assert_close(score.logps.exp(), torch.tensor([[0.125, 0.375, 0.5]]))
    assert score.top_ids.tolist() == [[[2, 1]] * 3]
    score = ModelTeacher(model).score([[2]], [[0, 1, 2]], temperature=0.5, ids=torch.tensor([[[0], [2], [3]]]))
    torch.testing.assert_close(score.logps.exp(), torch.tensor([[1.0, 9.0, 16.0]]) / 26)
    assert score.top_logps.flatten().tolist() == pytest.approx([math.log(1 / 26), math.log(16 / 26), -math.inf])


def test_an_engine_says_what_the_model_says() -> None:
    model, (prompts, completions) = make_model(), sequences()
    engine = EngineTeacher(TransformersEngine(copy.deepcopy(model), make_tokenizer()), vocabulary=19)
    for top_k in (0, 3):
        found = engine.score(prompts, completions, temperature=0.8, top_k=top_k)
        wanted = ModelTeacher(model).score(prompts, completions, temperature=0.8, top_k=top_k)
        assert gap(found, wanted) < 1e-5
        assert torch.equal(found.top_ids, wanted.top_ids) and found.top_ids.size(2) == top_k
        torch.testing.assert_close(found.top_logps, wanted.top_logps, atol=1e-5, rtol=0)
    nothing = engine.score([[1], [2]], [[], []])
    assert nothing.logps.shape == (2, 0) and nothing.top_logps.shape == (2, 0, 0)
    with pytest.raises(UserError, match=r"^The engine transformers does not score words of our choice: take the .*\.$"):
        engine.score(prompts, completions, ids=torch.zeros(11, 16, 1, dtype=torch.long))
    engine.engine.sync(model.state_dict().items(), version=3)
    with pytest.raises(UserError, match=r"^The engine transformers holds version 3 of a policy in training, not a "):
        EngineTeacher(engine.engine, vocabulary=19)


def test_a_loaded_teacher_is_frozen_and_has_its_own_dtype(tmp_path: Path) -> None:
    model, (prompts, completions) = make_model(), sequences()
    path = save(tmp_path, model)
    whole = ModelTeacher.load(path, device="cpu")
    half = ModelTeacher.load(path, dtype="bfloat16", device_map={"": "cpu"})
    for teacher in (whole, half):
        assert not teacher.model.training and not any(p.requires_grad for p in teacher.model.parameters())
        assert teacher.concurrent and not teacher.score(prompts, completions).logps.requires_grad
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    wanted = ModelTeacher(model).score(prompts, completions)
    assert gap(whole.score(prompts, completions), wanted) == 0.0
    score = half.score(prompts, completions)
    assert score.logps.dtype == torch.float32 and 1e-5 < gap(score, wanted) < 0.2
    with pytest.raises(ValueError, match="device and device_map both say where the teacher lives"):
        ModelTeacher.load(path, device="cpu", device_map="auto")


def test_padded_vocabularies_are_scored_as_far_as_the_teacher_reaches(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    folders = {rows: save(tmp_path / str(rows), make_model(rows=rows)) for rows in (128, 136)}
    for folder in folders.values():
        check_teacher(folder, tokenizer, length=64)
    small, large = (ModelTeacher.load(folders[rows], device="cpu") for rows in (128, 136))
    prompts, completions = [[3, 4], [5, 6, 7]], [[8, 130, 9, EOS], [127, EOS]]
    ids = torch.tensor([[8, 127], [3, 135], [0, 1], [0, 1]]).expand(2, 4, 2)
    score = small.score(prompts, completions, ids=ids)
    assert score.mask.tolist() == [[True, False, False, False], [True, True, False, False]]
    alone = plain(small.model, prompts[0], [8])[0]
    assert score.logps[0].tolist() == pytest.approx([float(alone[8]), 0, 0, 0], abs=1e-5)
    assert score.top_logps[1, 1].tolist() == [
        pytest.approx(float(plain(small.model, [5, 6, 7], [127, 1])[1, 3])),
        -math.inf,
    ]
    assert large.score(prompts, completions).mask.sum() == 6
    engine = EngineTeacher(TransformersEngine(small.model, tokenizer), vocabulary=128)
    assert gap(engine.score(prompts, completions), small.score(prompts, completions)) < 1e-6


def test_what_cannot_be_scored_is_one_sentence() -> None:
    teacher = ModelTeacher(make_model())
    with pytest.raises(UserError, match=r"^A sequence with an empty prompt cannot be scored: its first token follows"):
        teacher.score([[]], [[3]])
    with pytest.raises(
        UserError, match=r"^The teacher reads 64 tokens, and a prompt with its completion has 65: short"
    ):
        teacher.score([[3] * 60], [[3] * 5])
    assert teacher.score([[3] * 60], [[3] * 4]).mask.all()
    for ids, top_k in ((torch.zeros(1, 2, 1), 0), (torch.zeros(1, 1, 1), 2)):
        with pytest.raises(ValueError, match="come without top_k, and for"):
            teacher.score([[3]], [[3]], ids=ids, top_k=top_k)
    forward = teacher.model.forward

    def twice(**arguments: Any) -> Any:
        output = forward(**arguments)
        output.logits = 2.0 * output.logits
        return output

    teacher.model.forward = twice
    with pytest.raises(UserError, match=r"^Qwen2ForCausalLM makes its logits in a way that is not known here: choose"):
        teacher.score([[3]], [[3]])


def test_logits_of_all_tokens_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """B · T · V = 4 · 40 · 5000 numbers are 3.2 MB; a tile of 8 tokens is 160 kB, and one forward serves all four."""
    monkeypatch.setattr(teacher_module, "_TILE_BYTES", 4 * 5000 * 8)
    model = make_model(rows=5000)
    teacher = ModelTeacher(model)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: list[int] = []
    forwards: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            for each in result if isinstance(result, tuple | list) else (result,):
                if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in own:
                    sizes.append(each.untyped_storage().nbytes())
            return result

    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    watch: Any = Watch
    prompts, completions = [[7] * 5] * 4, [list(range(100, 140))] * 4
    ids = torch.zeros(4, 40, 2, dtype=torch.long)
    with watch():
        teacher.score(prompts, completions, ids=ids)
    assert 4 * 5000 * 8 <= max(sizes) < 4 * 5000 * 9, "a tile, and nothing beyond it"
    assert len(forwards) == 1
    sizes.clear()
    with watch(), torch.no_grad():
        model(input_ids=torch.tensor([[7] * 45] * 4))
    assert max(sizes) == 4 * 45 * 5000 * 4, "the watch sees what a plain forward makes"


# ---------------------------------------------------------------- the student as its own teacher


def lora(model: Any, **settings: Any) -> Any:
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0.0, 0.1)
    return adapted


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}])
def test_the_base_of_a_lora_student_is_the_base_model(settings: dict[str, Any]) -> None:
    model, (prompts, completions) = make_model(tie_word_embeddings=False), sequences()
    wanted = ModelTeacher(copy.deepcopy(model)).score(prompts, completions)
    student = lora(model, lora_dropout=0.5, **settings).train()
    trained = [parameter.requires_grad for parameter in student.parameters()]
    if settings:
        with torch.no_grad():
            student.get_output_embeddings().weight.add_(1.0)
    base = ModelTeacher(student, base=True)
    assert not base.concurrent, "it is busy as the student"
    assert gap(base.score(prompts, completions), wanted) == 0.0
    assert student.training, "as it was"
    assert [parameter.requires_grad for parameter in student.parameters()] == trained
    assert gap(ModelTeacher(student).score(prompts, completions), wanted) > 0.1, "adapters are on again"
    now = ModelTeacher(student).score(prompts, completions)
    assert gap(now, ModelTeacher(student).score(prompts, completions)) == 0.0, "no dropout"
    with pytest.raises(UserError, match=r"^The student has no adapters, so its base is not there to teach it: name a "):
        ModelTeacher(make_model(), base=True)


QUESTIONS = ["337=24", "1=1", "12=3"]
ROWS: list[dict[str, Any]] = [
    {"prompt": [{"role": "user", "content": question}], "solution": solution, "teacher": name}
    for question, solution, name in zip(QUESTIONS, ["3*7+3", "1", "1+2"], ["one", "two", "one"], strict=True)
]


def ids_of(text: str) -> list[int]:
    vocabulary = make_tokenizer().get_vocab()
    return [vocabulary[character] for character in text]


COMPLETIONS = [[*ids_of("3*7+3"), EOS], ids_of("1"), [*ids_of("1-2"), EOS]]
PROMPT_IDS = [ids_of(f"^{question}?") for question in QUESTIONS]


@pytest.mark.parametrize(
    ("text", "role", "rendered"),
    [
        ("{solution}", "system", ["=3*7+3=^337=24?", "=1=^1=1?", "=1+2=^12=3?"]),
        ("-{solution}-", "user", ["^-3*7+3-337=24?", "^-1-1=1?", "^-1+2-12=3?"]),
    ],
)
def test_privileged_context_is_a_longer_prompt(text: str, role: Any, rendered: list[str]) -> None:
    inner = ModelTeacher(make_model())
    teacher = Reprompted(inner, make_tokenizer(), hint(text, role=role))
    found = teacher.score(PROMPT_IDS, COMPLETIONS, ROWS, top_k=2)
    wanted = inner.score([ids_of(prompt) for prompt in rendered], COMPLETIONS, top_k=2)
    assert gap(found, wanted) == 0.0 and torch.equal(found.top_logps, wanted.top_logps)
    assert gap(found, inner.score(PROMPT_IDS, COMPLETIONS)) > 0.01, "the context counts"
    assert found.mask.sum(dim=1).tolist() == [6, 1, 4], "the completion alone is scored"


def test_hints_join_what_is_there() -> None:
    row: dict[str, Any] = {
        "prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1"}],
        "gold": 2,
    }
    told: Any = hint("It is {gold}.")(row)
    assert told == [{"role": "system", "content": "Add.\n\nIt is 2."}, {"role": "user", "content": "1+1"}]
    assert row["prompt"][0] == {"role": "system", "content": "Add."}, "the row is as it was"
    dialogue = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    last: Any = hint("({x}) ", role="user")({"prompt": dialogue, "x": 1})
    assert [message["content"] for message in last] == ["a", "b", "(1) c"]
    assert hint("{x}: ", role="user")({"prompt": "text", "x": 7}) == "7: text"
    with pytest.raises(
        UserError, match=r"^The teacher's hint names the field 'solutoin', which .* mean 'solution'\?\.$"
    ):
        hint("{solutoin}")(ROWS[0])
    with pytest.raises(
        UserError, match=r"^The prompts are plain text without a system message: give the hint role = u"
    ):
        hint("{x}")({"prompt": "text", "x": 7})


def test_a_teacher_can_read_its_own_chat_template() -> None:
    inner, student = ModelTeacher(make_model()), make_tokenizer()
    other = make_tokenizer(template="{% for message in messages %}*{{ message['content'] }}={% endfor %}")
    found = Reprompted(inner, student, tokenizer=other).score(PROMPT_IDS, COMPLETIONS, ROWS)
    wanted = inner.score([ids_of(f"*{question}=") for question in QUESTIONS], COMPLETIONS)
    assert gap(found, wanted) == 0.0
    with pytest.raises(ValueError, match="changes nothing without prompt or tokenizer"):
        Reprompted(inner, student)


def test_the_context_is_all_that_a_privileged_teacher_reads_more() -> None:
    inner, student = ModelTeacher(make_model()), make_tokenizer()
    closed = [[*prompt, *ids_of("=")] for prompt in PROMPT_IDS]  # what `closed` does in this template
    with pytest.raises(
        UserError, match=r"^The student's prompt is rendered otherwise for the teacher.*chat_template_kw"
    ):
        Reprompted(inner, student, hint("{solution}")).score(closed, COMPLETIONS, ROWS)
    same = Reprompted(inner, student, hint("{solution}"), template_kwargs={"closed": True})
    found = same.score(closed, COMPLETIONS, ROWS)
    assert (
        gap(
            found,
            inner.score(
                [ids_of(f"={r['solution']}=^{q}?=") for r, q in zip(ROWS, QUESTIONS, strict=True)], COMPLETIONS
            ),
        )
        == 0.0
    )
    with pytest.raises(ValueError, match="3 completions came with 0 task rows: give each its row"):
        same.score(closed, COMPLETIONS)


# ---------------------------------------------------------------- several, and meanwhile


def test_each_row_has_the_teacher_that_it_names() -> None:
    one, two = ModelTeacher(make_model(seed=1)), ModelTeacher(make_model(seed=2))
    both = Routed({"one": one, "two": two}, column="teacher")
    ids = torch.randint(0, 19, (3, 6, 2), generator=torch.Generator().manual_seed(0))
    found = both.score(PROMPT_IDS, COMPLETIONS, ROWS, temperature=0.9, ids=ids)
    for row, teacher in enumerate([one, two, one]):
        length = len(COMPLETIONS[row])
        wanted = teacher.score([PROMPT_IDS[row]], [COMPLETIONS[row]], temperature=0.9, ids=ids[row : row + 1, :length])
        torch.testing.assert_close(found.logps[row, :length], wanted.logps[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(found.top_logps[row, :length], wanted.top_logps[0], atol=1e-6, rtol=0)
    assert found.logps.shape == (3, 6) and found.mask.sum(dim=1).tolist() == [6, 1, 4]
    both.check(ROWS)
    with pytest.raises(UserError, match=r"^There is no teacher 'too' \(column 'teacher'\); did you mean 'two'\?\.$"):
        both.check([*ROWS, {**ROWS[0], "teacher": "too"}])
    with pytest.raises(UserError, match=r"^A task row does not say .* no column 'techer'; did you mean 'teacher'\?\.$"):
        Routed({"one": one}, column="techer").score(PROMPT_IDS, COMPLETIONS, ROWS)
    with pytest.raises(ValueError, match="3 completions came with 1 task rows"):
        both.score(PROMPT_IDS, COMPLETIONS, ROWS[:1])


class Waiting:
    """An engine that answers when it is let."""

    name, policy_version = "waiting", 0

    def __init__(self) -> None:
        self.go = threading.Event()

    def score(self, asked: Any, *, temperature: float, top_k: int) -> list[Score]:
        assert self.go.wait(10.0)
        if temperature != 1.0:
            raise UserError("no")
        return [Score([-1.0] * len(completion)) for _, completion in asked]


def test_scoring_runs_while_verifiers_do() -> None:
    engine: Any = Waiting()
    served = EngineTeacher(engine, vocabulary=19)
    local = ModelTeacher(make_model())
    future, failing = served.submit([[3]], [[4, 5]]), served.submit([[3]], [[4]], temperature=0.5)
    assert not future.done() and not failing.done()
    engine.go.set()
    assert future.result(10.0).logps.tolist() == [[-1.0, -1.0]]
    with pytest.raises(UserError, match="no"):
        failing.result(10.0)
    student = local.submit(PROMPT_IDS, COMPLETIONS)
    assert student.done(), "a student that teaches itself is not free for it"
    assert gap(student.result(), local.score(PROMPT_IDS, COMPLETIONS)) == 0.0
    tokenizer = make_tokenizer()
    assert Reprompted(served, tokenizer, hint("")).concurrent and not Reprompted(local, tokenizer, hint("")).concurrent
    assert Routed({"a": served}, "t").concurrent and not Routed({"a": served, "b": local}, "t").concurrent


def test_one_model_under_several_names_scores_for_one_at_a_time() -> None:
    """Two threads' forwards at once would be scored by each other's hooks."""
    inside: list[int] = []
    most: list[int] = []

    def enter(*_: Any) -> None:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)

    def leave(*_: Any) -> None:
        inside.pop()

    model = make_model()
    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave)
    teachers: dict[str, Teacher] = {name: ModelTeacher(model) for name in ("one", "two")}
    for teacher in teachers.values():
        teacher.concurrent = True
    found = Routed(teachers, column="teacher").score(PROMPT_IDS, COMPLETIONS, ROWS)
    assert most == [1, 1]
    assert gap(found, ModelTeacher(make_model()).score(PROMPT_IDS, COMPLETIONS)) < 1e-6


def test_batches_of_the_trainer_go_in_and_come_out() -> None:
    """Prompts are padded on the left, completions on the right; one completion is masked whole, as TRL does."""
    batch = {
        "prompt_ids": torch.tensor([[0, 0, 3], [4, 5, 6]]),
        "prompt_mask": torch.tensor([[0, 0, 1], [1, 1, 1]]),
        "completion_ids": torch.tensor([[7, 8, 1, 0], [9, 9, 9, 9]]),
        "completion_mask": torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]]),
    }
    prompts, completions = unpadded(batch)
    assert (prompts, completions) == ([[3], [4, 5, 6]], [[7, 8, 1], []])
    score = ModelTeacher(make_model()).score(prompts, completions, top_k=2)
    fitted = score.fitted(batch["completion_ids"])
    assert torch.equal(fitted.logps, torch.cat([score.logps, torch.zeros(2, 1)], dim=1))
    assert fitted.top_ids.shape == fitted.top_logps.shape == (2, 4, 2) and fitted.mask.dtype == torch.bool
    assert torch.equal(fitted.mask, batch["completion_mask"].bool())
    with pytest.raises(ValueError, match="scores of 3 tokens do not fit into a batch of 2"):
        score.fitted(torch.zeros(2, 2))


# ---------------------------------------------------------------- images


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seeing]:
    folder = tmp_path_factory.mktemp("seeing")
    return {family: tiny_vision(folder / family, family, deviation=0.3) for family in FAMILIES}


def loaded(seeing: Seeing) -> ModelTeacher:
    """As `ModelTeacher.load`; the Qwen of tests has a processor that is not one of transformers'."""
    model: Any = AutoModelForImageTextToText.from_pretrained(seeing.path)
    return ModelTeacher(model, batch_size=4, processor=seeing.processor)


def pictures(processor: Any) -> tuple[list[Row], list[list[int]], list[list[int]]]:
    """Rows with no picture, one and two, one of them twice; their prompts as the student reads them; answers."""
    rows: list[Row] = [
        {"prompt": [{"role": "user", "content": question}], "images": [colour(each) for each in shown]}
        for question, shown in (("12=3", [1]), ("1=1", []), ("337=24", [2, 3]), ("4=4", [0]))
    ]
    rows.insert(1, rows[0])
    prompts = [render(processor, shown(row)).ids for row in rows]
    answers = ["337", "1", "12-3", "", "*4=16"]
    return rows, prompts, [processor.tokenizer.convert_tokens_to_ids(list(answer)) for answer in answers]


def looked_at(model: Any, processor: Any, row: Row, completion: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Log-probs [T, V] of a completion and states before the head [T, E]: one forward on the processor's output."""
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in row["prompt"]]
    made = processor.apply_chat_template(
        shown(row) if row["images"] else parts,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    length = made["input_ids"].size(1)
    ids = torch.cat([made.pop("input_ids"), torch.tensor([list(completion)], dtype=torch.long)], dim=1)
    made.pop("attention_mask")
    for name in {"token_type_ids", "mm_token_type_ids"} & made.keys():
        made[name] = torch.nn.functional.pad(made[name], (0, len(completion)))
    entering: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: entering.append(given[0]))
    with torch.no_grad():
        logits = model(input_ids=ids, **made).logits[0]
    hook.remove()
    told = slice(length - 1, length + len(completion) - 1)
    return torch.log_softmax(logits[told].double(), dim=-1), entering[0][0, told]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_to_prompts_with_images(seeing: dict[str, Seeing], family: str) -> None:
    """Prompts without a picture, with one and with two in one batch, padded to one length."""
    teacher, processor = loaded(seeing[family]), seeing[family].processor
    rows, prompts, completions = pictures(processor)
    score = teacher.score(prompts, completions, rows, hidden=True)
    assert teacher.reads_images and score.hidden is not None
    for row, completion in enumerate(completions):
        wanted, states = looked_at(teacher.model, processor, rows[row], completion)
        own = wanted.gather(1, torch.tensor(completion, dtype=torch.long)[:, None])[:, 0]
        torch.testing.assert_close(score.logps[row, : len(completion)].double(), own, atol=1e-5, rtol=0)
        torch.testing.assert_close(score.hidden[row, : len(completion)], states, atol=1e-5, rtol=1e-4)
    other = [{**row, "images": [colour(9 + 3 * i) for i, _ in enumerate(row["images"])]} for row in rows]
    if family == "llava":  # pictures of other sizes take another number of tokens elsewhere
        moved = (teacher.score(prompts, completions, other).logps - score.logps).abs().amax(dim=1)
        assert (moved[[0, 1, 4]] > 1e-3).all() and moved[2] == 0.0, "the row without a picture stays"


def test_a_loaded_teacher_that_reads_images(seeing: dict[str, Seeing]) -> None:
    """From its folder, by rows that name it, and in an engine; prompts without pictures need no rows."""
    teacher = ModelTeacher.load(seeing["llava"].path, device="cpu")
    rows, prompts, completions = pictures(seeing["llava"].processor)
    wanted = loaded(seeing["llava"]).score(prompts, completions, rows)
    assert teacher.reads_images
    assert gap(teacher.score(prompts, completions, rows), wanted) < 1e-5
    both = Routed({"a": teacher, "b": teacher}, "teacher")
    named = [{**row, "teacher": "ab"[place % 2]} for place, row in enumerate(rows)]
    assert both.reads_images and gap(both.score(prompts, completions, named), wanted) < 1e-5
    engine = EngineTeacher(TransformersEngine.load(seeing["llava"].path, batch_size=1), teacher.vocabulary)
    assert engine.reads_images and gap(engine.score(prompts, completions, rows), wanted) < 1e-5
    text = teacher.score(prompts[2:3], completions[2:3])
    torch.testing.assert_close(text.logps[0], wanted.logps[2, : len(completions[2])], atol=1e-5, rtol=0)


def test_images_that_a_teacher_does_not_read_are_refused(seeing: dict[str, Seeing]) -> None:
    rows, prompts, completions = pictures(seeing["llava"].processor)
    text = ModelTeacher(make_model(rows=40))
    assert not text.reads_images
    with pytest.raises(
        UserError, match=r"^The prompts hold images, and the teacher Qwen2ForCausalLM reads text alone: c"
    ):
        text.score(prompts, completions, rows)
    told = Reprompted(loaded(seeing["llava"]), make_tokenizer(), hint("{solution}"))
    assert not told.reads_images
    with pytest.raises(
        UserError, match=r"^The prompts hold images, which a teacher with a prompt of its own does not "
    ):
        told.score(prompts, completions, rows)
    with pytest.raises(
        UserError, match=r"^The teacher LlavaForConditionalGeneration does not read images as the student"
    ):
        loaded(seeing["llava"]).score([prompts[4]], [[3]], [rows[3]])
    with pytest.raises(ValueError, match="5 completions came with 2 task rows: give each its row"):
        loaded(seeing["llava"]).score(prompts, completions, rows[:2])

    class Blind(Waiting):
        def score(self, asked: Any, *, images: Any = None, **options: Any) -> list[Score]:
            assert images == [row["images"] for row in rows]
            raise UserError("The engine waiting reads text alone.")

    engine: Any = Blind()
    assert not EngineTeacher(engine, vocabulary=40).reads_images
    with pytest.raises(UserError, match="reads text alone"):
        EngineTeacher(engine, vocabulary=40).score(prompts, completions, rows)


# ---------------------------------------------------------------- before training


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A teacher's folder without weights: what it is refused for is known from its configuration and tokenizer."""
    path = tmp_path_factory.mktemp("teacher")
    make_model(rows=24).config.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


def refusal(folder: str, student: Any, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        check_teacher(folder, student, **{"length": 64, **settings})
    return str(caught.value)


def test_a_teacher_that_fits_is_taken(folder: str) -> None:
    assert check_teacher(folder, make_tokenizer(), length=64).get_vocab() == make_tokenizer().get_vocab()
    check_teacher(folder, make_tokenizer(ALPHABET[:-1]), length=64)  # a word that the student lacks cannot be emitted
    check_teacher(folder, make_tokenizer(), length=64, served=True)
    check_teacher(folder, make_tokenizer(), length=64, temperature=0.7)


def test_another_tokenizer_is_refused_with_the_first_two_differing_tokens(folder: str) -> None:
    swapped = make_tokenizer("0132456789+-*=^?")  # 3 and 2 have changed places: ids 5 and 6
    assert refusal(folder, swapped) == (
        f"The teacher {folder} has another tokenizer than the student (id 5 is '3' here and '2' there and id 6 is '2' "
        "here and '3' there; 2 differ in all): choose a teacher with the student's tokenizer."
    )
    longer = make_tokenizer(ALPHABET + "&")
    assert refusal(folder, longer) == (
        f"The teacher {folder} has another tokenizer than the student (id 19 is '&' here and nothing there; 1 differ "
        "in all): choose a teacher with the student's tokenizer."
    )


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    config = make_model().config
    config.vocab_size = 18
    config.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert refusal(str(tmp_path), make_tokenizer()) == (
        f"The student's largest token id is 18, but the teacher {tmp_path} has 18 rows in its embedding: choose a "
        "teacher whose vocabulary covers the student's."
    )


def test_another_end_of_sequence_is_refused_or_masked(folder: str) -> None:
    student = make_tokenizer()
    student.eos_token = "?"
    assert refusal(folder, student) == (
        f"The student ends its answers with '?' and the teacher {folder} with '<eos>', so it would be taught never to "
        "end: choose mask_eos, or a teacher that ends alike."
    )
    check_teacher(folder, student, length=64, mask_eos=True)


@pytest.mark.parametrize("template", ["student", "teacher"])
def test_another_chat_template_is_refused_or_chosen(folder: str, template: Any) -> None:
    student = make_tokenizer(template="{{ messages[0]['content'] }}")
    assert refusal(folder, student) == (
        f"The teacher {folder} has another chat template than the student: choose the template that renders its "
        "prompts, student or teacher."
    )
    check_teacher(folder, student, length=64, template=template)


def test_too_short_a_context_is_refused(folder: str) -> None:
    assert refusal(folder, make_tokenizer(), length=65) == (
        f"The teacher {folder} reads 64 tokens, but the longest prompt and completion have 65 together: shorten them, "
        "or choose a teacher with a longer context."
    )


def test_a_server_for_tempered_answers_is_refused(folder: str) -> None:
    assert refusal(folder, make_tokenizer(), served=True, temperature=0.7) == (
        "A vLLM server scores at temperature 1 alone, and the answers are drawn at 0.7: set temperature = 1, or load "
        "the teacher in the trainer's process."
    )


LOGPS = torch.tensor([[-1.0, -2.0, -0.5, -3.0]])


@pytest.mark.parametrize(
    "loss",
    [
        lambda teacher: 0.5 * (teacher - LOGPS).square().mean(),
        lambda teacher: 1.0 - 2e-3 * (teacher - LOGPS).mean(),  # moves that cancel in a mean would not do
        lambda teacher: (LOGPS - teacher + 5.0).clamp(-1.0, 1.0).mean(),  # five nats away: only 10 reach
        lambda teacher: (LOGPS - teacher)[0, 3] * 1e-3,
    ],
)
def test_a_loss_with_a_teacher_in_it_moves(loss: Callable[[Tensor], Tensor]) -> None:
    require_effect(loss, LOGPS)


@pytest.mark.parametrize(
    "loss",
    [
        lambda teacher: LOGPS.mean(),
        lambda teacher: LOGPS.mean() + 0.0 * teacher.square().mean(),
        lambda teacher: -(LOGPS - LOGPS).exp().mean() + ((teacher - teacher) * LOGPS).mean(),
    ],
)
def test_a_loss_that_ignores_its_teacher_is_refused(loss: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(
        UserError, match=r"^The teacher has no effect: its log-probs were moved by noise of up to 10 nats"
    ):
        require_effect(loss, LOGPS)


def test_noise_is_no_effect() -> None:
    noise = iter(range(10))
    with pytest.raises(
        UserError, match=r"^The loss is 0 and then 1 of the same teacher log-probs: it must be finite and"
    ):
        require_effect(lambda teacher: torch.tensor(float(next(noise))), LOGPS)
    with pytest.raises(UserError, match=r"^The loss is nan and then nan of the same"):
        require_effect(lambda teacher: teacher.sum() * torch.nan, LOGPS)
    with pytest.raises(
        UserError, match=r"^The teacher's log-probs are not finite: look at its weights and its dtype\.$"
    ):
        require_effect(lambda teacher: teacher.sum(), LOGPS * torch.nan)


# ---------------------------------------------------------------- two processes, and a real server


def partitioned(folder: str) -> None:
    """Of two processes with other sequences each: a teacher that is split over them, and a LoRA student that trains."""
    import deepspeed
    from torch import distributed

    deepspeed.init_distributed("gloo")
    rank = distributed.get_rank()
    zero3 = {"stage": 3, "stage3_param_persistence_threshold": 0}
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero3}
    adam = {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}}
    model = make_model()
    whole, split = ModelTeacher(model), ModelTeacher(copy.deepcopy(model), batch_size=4)
    split.model = deepspeed.initialize(model=split.model, config=settings)[0]
    student = lora(copy.deepcopy(model))
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=student, config={**settings, "optimizer": adam}, model_parameters=trained)
    base = ModelTeacher(student, base=True, batch_size=4)
    gaps, own = [], []
    for step in range(3):
        asked = sequences(11, seed=rank + 2 * step)
        wanted = whole.score(*asked)
        gaps += [gap(split.score(*asked), wanted), gap(base.score(*asked), wanted)]
        own.append(ModelTeacher(student).score(*sequences(11)).logps)
        engine.train()
        engine.backward(engine(input_ids=torch.tensor([[3, 4, 5, 6 + rank]])).logits.square().mean())
        engine.step()
    assert all(parameter.data.numel() == 0 for each in (split.model, student) for parameter in each.parameters())
    assert float((own[2] - own[0]).abs().max()) > 1e-3, "the student trains"
    Path(folder, str(rank)).write_text(str(max(gaps)))
    distributed.destroy_process_group()


@pytest.mark.slow
def test_partitioned_weights_say_what_whole_ones_say(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finish([*command, "-m", "tests.test_teacher", str(tmp_path)], DS_ACCELERATOR="cpu")
    assert [float((tmp_path / rank).read_text()) for rank in "01"] == pytest.approx([0.0, 0.0], abs=1e-5)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    pytest.importorskip("vllm")
    from posttrain.launch.serve import ServerProcess
    from posttrain.recipe import Vllm

    path = save(tmp_path_factory.mktemp("served"), make_model())
    with ServerProcess(path, vllm=Vllm(max_model_len=64, max_num_seqs=32)) as process:
        yield path, process.url


@pytest.mark.slow
def test_a_server_says_what_the_model_says(served: tuple[str, str]) -> None:
    from posttrain.rollouts.vllm_server import VLLMServerEngine

    path, url = served
    engine = VLLMServerEngine.connect(url, path=path)
    try:
        remote, local = EngineTeacher(engine, vocabulary=19), ModelTeacher.load(path, device="cpu")
        prompts, completions = sequences(40)
        for top_k in (0, 3):
            found = remote.submit(prompts, completions, top_k=top_k).result(60.0)
            wanted = local.score(prompts, completions, top_k=top_k)
            assert gap(found, wanted) < 1e-4
            assert torch.equal(found.top_ids, wanted.top_ids)
            torch.testing.assert_close(found.top_logps, wanted.top_logps, atol=1e-4, rtol=0)
        told = [Reprompted(each, make_tokenizer(), hint("{solution}")) for each in (remote, local)]
        one, two = (each.score(PROMPT_IDS, COMPLETIONS, ROWS) for each in told)
        assert gap(one, two) < 1e-4
        both: Teacher = Routed({"one": remote, "two": local}, column="teacher")
        assert gap(both.score(PROMPT_IDS, COMPLETIONS, ROWS), local.score(PROMPT_IDS, COMPLETIONS)) < 1e-4
        with pytest.raises(UserError, match=r"temperature 1 alone, and 0.7"):
            remote.score(prompts, completions, temperature=0.7)
        assert AutoTokenizer.from_pretrained(path).get_vocab() == remote.engine.tokenizer.get_vocab()
    finally:
        engine.close()


if __name__ == "__main__":
    partitioned(sys.argv[1])
    leave(0)
