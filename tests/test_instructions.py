"""Instruction following: every constraint by examples, IFEval's columns, guards against gaming, and the task."""

from __future__ import annotations

import json
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import registry, rewards, tasks
from posttrain.errors import UserError
from posttrain.rewards import Verdict
from posttrain.rewards._scripts import language_of, sentences, words
from posttrain.rewards.instructions import NAMES, constraints_of
from posttrain.tasks import Split

STRICT = rewards.load("instructions")
LOOSE = rewards.load("instructions", {"mode": "loose"})
SPLITS: tuple[Split, ...] = ("train", "eval")
AT_LEAST, LESS = "at least", "less than"


def row(name: str, **given: Any) -> dict[str, Any]:
    return {"instruction_id_list": [name], "kwargs": [given]}


def kept(name: str, text: str, **given: Any) -> bool:
    (constraint,) = constraints_of([name], [given])
    return constraint.kept_by(text)


EXAMPLES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    (
        "keywords:existence",
        {"keywords": ["sun", "c++"]},
        ["Sunday with C++"],
        ["Sunday with C", ""],
    ),
    (
        "keywords:frequency",
        {"keyword": "sun", "frequency": 2, "relation": AT_LEAST},
        ["Sun, sun", "sunsun"],
        ["sun", "moon"],
    ),
    ("keywords:frequency", {"keyword": "sun", "frequency": 2, "relation": LESS}, ["one sun", "none"], ["sun and Sun"]),
    ("keywords:forbidden_words", {"forbidden_words": ["sun"]}, ["Sunday", "moon"], ["The SUN.", "sun-lit"]),
    (
        "keywords:letter_frequency",
        {"letter": "e", "let_frequency": 3, "let_relation": AT_LEAST},
        ["Eleven e"],
        ["Even"],
    ),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 2, "let_relation": LESS}, ["a!"], ["a!!"]),
    ("language:response_language", {"language": "de"}, ["Das ist nicht der Hund."], ["That is not the dog.", "Hm"]),
    ("language:response_language", {"language": "zh-cn"}, ["这是一个房子。"], ["これは家です。", "a house"]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": AT_LEAST}, ["A b. C d!"], ["A b, c d."]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": LESS}, ["See Dr. Who."], ["Who? Me."]),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "***a***b***"],
        ["a\n\nb", "a***b***c", "a*** ***b"],
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": AT_LEAST}, ["it's so", "a b c"], ["a b"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": LESS}, ["a b"], ["it's so"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weekend"},
        ['Hello.\n\n"Weekend, at last.'],
        ["Hello.\n\nA weekend.", "Hello.\n\nWeekend.\n\nBye.", "Weekend."],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[a] [b]", "[]\n[x[y]"], ["[a]", "[a\nb] ["]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["Bye. P.S. More", "p. s. x"], ["PS more"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P.P.S more", "p. p. s"], ["P.S. more"]),
    ("detectable_content:postscript", {"postscript_marker": "NB:"}, ["nb: more"], ["nb more"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n* b", " - a\n\n*b", "x\n- a\n---"],
        ["* a", "** a\n* b", "* a\n* b\n- c"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is yes.", "Well: My answer is maybe. So."],
        ["My answer is Yes.", "yes"],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and *b*", "*a* **b**"],
        ["*a*", "** ** *a*", "*a\nb* *c*"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb"],
        ["SECTION 1\na", "Section 1 Section 2"],
    ),
    ("detectable_format:json_format", {}, ['{"a": [1]}', '```json\n{"a": 1}\n```'], ["{a: 1}", "", "[" * 100_000]),
    ("detectable_format:title", {}, ["<<Poem>>", "x\n<<a <b>>> y"], ["<<>>", "<< >>", "<<a\nb>>", ">>a<<"]),
    (
        "combination:two_responses",
        {},
        ["one******two", "******one******two"],
        ["one", "one******one", "a******b******c"],
    ),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say Hi."}, ["say hi. Hi!"], ["Hi! Say hi."]),
    ("startend:end_checker", {"end_phrase": "The End."}, ['Well. "the end."', "The end. "], ["The end. Really."]),
    ("startend:quotation", {}, ['"a b"', ' "a" and "b" '], ['"', 'say "a"', "a"]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": AT_LEAST},
        ["I am OK", "STATE-OF-THE-ART AI"],
        ["OK then", "Not So"],
    ),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": LESS}, ["OK then"], ["OK, AI"]),
    ("change_case:english_capital", {}, ["THE DOG IS OUT", "HELLO"], ["The dog", "DER HUND IST DA", "狗"]),
    ("change_case:english_lowercase", {}, ["the dog is out", "hello"], ["The dog", "der hund ist da", "1"]),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b"]),
]


PUBLISHED: dict[str, tuple[dict[str, Any], str]] = {
    "change_case:capital_word_frequency": ({"capital_frequency": 3, "capital_relation": AT_LEAST}, "AN OLD DOG ran"),
    "change_case:english_capital": ({}, "THE DOG IS HERE"),
    "change_case:english_lowercase": ({}, "the dog is here"),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Write a poem."}, "Write a poem. The sea is blue"),
    "combination:two_responses": ({}, "Rex is a dog ****** Tom is a cat"),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "Dear [name] of [town]"),
    "detectable_content:postscript": ({"postscript_marker": "P.P.S"}, "So long. P.P.S Come back"),
    "detectable_format:constrained_response": ({}, "My answer is maybe."),
    "detectable_format:json_format": ({}, '{"a dog": "named Rex"}'),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\nDogs\nSection 2\nCats",
    ),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* a dog\n* a cat"),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*a dog* and *a cat*"),
    "detectable_format:title": ({}, "<<Of dogs>> They run"),
    "keywords:existence": ({"keywords": ["talented", "tianjin"]}, "A talented dog of Tianjin"),
    "keywords:forbidden_words": ({"forbidden_words": ["field", "thanks"]}, "The dog ran off"),
    "keywords:frequency": ({"keyword": "fiesta", "frequency": 2, "relation": AT_LEAST}, "Fiesta after fiesta came"),
    "keywords:letter_frequency": (
        {"letter": "#", "let_frequency": 2, "let_relation": AT_LEAST},
        "Of #dogs and #cats here",
    ),
    "language:response_language": ({"language": "de"}, "Der Hund ist da und die Katze nicht"),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weekend"},
        "A dog ran.\n\nWeekend came.",
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "A dog ran\n***\nA cat slept"),
    "length_constraints:number_sentences": ({"num_sentences": 3, "relation": LESS}, "A dog ran. A cat slept."),
    "length_constraints:number_words": ({"num_words": 4, "relation": AT_LEAST}, "A dog ran off"),
    "punctuation:no_comma": ({}, "A dog ran off"),
    "startend:end_checker": ({"end_phrase": "Peace!"}, "The dog ran off. Peace!"),
    "startend:quotation": ({}, '"The dog ran off"'),
}
"""What published rows give each constraint, and an answer that keeps it."""
KEYS = {key for given, _ in PUBLISHED.values() for key in given}


class TestConstraints:
    @pytest.mark.parametrize(
        ("name", "given", "good", "bad"), EXAMPLES, ids=lambda value: value if isinstance(value, str) else ""
    )
    def test_by_example(self, name: str, given: dict[str, Any], good: list[str], bad: list[str]) -> None:
        assert [text for text in good if not kept(name, text, **given)] == []
        assert [text for text in bad if kept(name, text, **given)] == []

    def test_all_25_have_an_example(self) -> None:
        assert len(NAMES) == 25
        assert {name for name, *_ in EXAMPLES} == set(NAMES)

    def test_a_keyword_is_no_pattern(self) -> None:
        assert not kept("keywords:existence", "aaaa", keywords=["a+$"])
        assert kept("keywords:forbidden_words", "abc", forbidden_words=["a.c"])

    @pytest.mark.parametrize(
        ("text", "count"),
        [
            ("", 0),
            ("...", 0),
            ("No end", 1),
            ("One. Two! Three?", 3),
            ("Wait... what? Yes!", 3),
            ("Dr. Smith met Mr. J. Doe at 5 p.m. on Monday. They left.", 2),
            ("We met at 5 p.m. They left.", 2),
            ("It costs 3.50 e.g. here.", 1),
            ('He said "Hi." Then he left.', 2),
            ("A line\nthat goes on.", 1),
            ("你好。再见！", 2),
        ],
    )
    def test_sentences(self, text: str, count: int) -> None:
        assert sentences(text) == count

    @pytest.mark.parametrize(
        ("language", "text"),
        [
            ("ar", "هذا البيت في المدينة وهو جميل جدا."),
            ("bg", "Кучето не е в къщата и това е добре."),
            ("bn", "এটি একটি সুন্দর বাড়ি।"),
            ("de", "Der Hund ist nicht da und die Katze auch nicht."),
            ("en", "The dog is here and the cat is not."),
            ("es", "El perro está en la casa y no se va."),
            ("fa", "این خانه در شهر است و بسیار زیبا است."),
            ("fi", "Koira on talossa ja se ei ole ulkona."),
            ("fr", "Le chien est dans la maison avec les enfants."),
            ("gu", "આ એક સુંદર ઘર છે."),
            ("he", "זה בית יפה."),
            ("hi", "यह एक अच्छा घर है और मैं खुश हूँ।"),
            ("it", "Il cane è nella casa con i bambini."),
            ("ja", "これは良い家です。"),
            ("kn", "ಇದು ಒಂದು ಸುಂದರ ಮನೆ."),
            ("ko", "이것은 좋은 집입니다."),
            ("ml", "ഇതൊരു നല്ല വീടാണ്."),
            ("mr", "हे एक चांगले घर आहे आणि मी आनंदी आहे."),
            ("ne", "यो एउटा राम्रो घर हो र म खुसी छु।"),
            ("pa", "ਇਹ ਇੱਕ ਸੁੰਦਰ ਘਰ ਹੈ।"),
            ("pl", "Pies jest w domu i nie wychodzi na dwór."),
            ("pt", "O cão está na casa com as crianças e não sai."),
            ("ru", "Собака не в доме, и это хорошо. Мы были там."),
            ("sw", "Mbwa yuko nyumbani na watoto wa jirani kwa sababu ya mvua."),
            ("ta", "இது ஒரு அழகான வீடு."),
            ("te", "ఇది ఒక అందమైన ఇల్లు."),
            ("th", "บ้านหลังนี้สวย"),
            ("uk", "Собака не в домі, і це добре. Ми були там."),
            ("ur", "یہ گھر شہر میں ہے اور بہت خوبصورت ہے۔"),
            ("vi", "Đây là một ngôi nhà đẹp và tôi rất vui."),
            ("zh", "这是一个很好的房子。"),
            (None, "12345 !"),
            (None, "Zyx qwv."),
            (None, ""),
        ],
    )
    def test_languages(self, language: str | None, text: str) -> None:
        """All that IFEval asks for, and Chinese."""
        assert language_of(text) == language

    def test_words_of_scripts_without_spaces_are_letters(self) -> None:
        assert words("It's 你好 ok") == ["It", "s", "你", "好", "ok"]


class TestReward:
    def test_columns_as_they_are_published(self) -> None:
        """Every mapping has every key there, those of other constraints as null; numbers may be floats."""
        given = {"num_words": 3.0, "relation": AT_LEAST, "keywords": None, "num_bullets": None}
        published = {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [given]}
        assert STRICT.verify("one two three", published) == Verdict(1.0, "ok", "1/1")
        assert STRICT.verify("The answer", {**published, "kwargs": [{**given, "num_words": 9}]}).reward == 0.0

    @pytest.mark.parametrize("name", NAMES)
    def test_published_rows_of_every_constraint(self, name: str) -> None:
        """As `load_dataset("google/IFEval")` gives them, every mapping with all 24 keys, and as its JSON has them."""
        given, text = PUBLISHED[name]
        assert len(KEYS) == 24
        for shape in (given, {**dict.fromkeys(KEYS), **given}):
            published = {"key": 1000, "prompt": "Go on.", "instruction_id_list": [name], "kwargs": [shape]}
            assert STRICT.verify(text, published) == Verdict(1.0, "ok", "1/1")
            assert STRICT.verify("<think>Well</think>" + text, published).reward == 1.0

    def test_all_or_a_share(self) -> None:
        names = ["punctuation:no_comma", "startend:quotation", "detectable_format:title"]
        three = {"instruction_id_list": names, "kwargs": [{}, None, {"keywords": None}]}
        share = rewards.load("instructions", {"score": "fraction"})
        text = '"A story of the sea"'
        found = STRICT.verify(text, three)
        assert found == Verdict(0.0, "wrong", "2/3", "broken: detectable_format:title")
        assert share.verify(text, three).reward == pytest.approx(2 / 3)
        assert (STRICT.accuracy, share.accuracy) == (True, False)
        assert (STRICT.column, share.column) == ("instructions", "instructions_fraction")

    def test_loose_leaves_out_a_greeting_and_emphasis(self) -> None:
        quoted = row("startend:quotation")
        text = 'Sure, here it is:\n"A story of the sea"\nI hope that helps!'
        assert (STRICT.verify(text, quoted).reward, LOOSE.verify(text, quoted).reward) == (0.0, 1.0)
        starred = '*"A story of the sea"*'
        assert (STRICT.verify(starred, quoted).reward, LOOSE.verify(starred, quoted).reward) == (0.0, 1.0)
        middle = 'Sure\n\n"A story\nof the sea\n"\nBye\nnow'
        assert LOOSE.verify(middle, quoted).reward == 0.0  # only one line at each end

    @pytest.mark.parametrize("text", ["", " \n", "<think>no comma here at all", "<think>words and words</think>\n"])
    def test_an_empty_answer_keeps_nothing(self, text: str) -> None:
        assert STRICT.verify(text, row("punctuation:no_comma")) == Verdict(0.0, "no_answer")

    def test_only_the_answer_counts(self) -> None:
        comma = row("punctuation:no_comma")
        assert STRICT.verify("<think>a, b</think>No comma here", comma).reward == 1.0
        assert STRICT.verify("<think>a</think>So, <answer>no comma here</answer>", comma).reward == 1.0

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("ok", "guard: fewer than 3 words"),
            (". ! ? ; :", "guard: fewer than 3 words"),
            ("ha " * 50, "guard: 98% of it is repetition"),  # 47 4-grams, one distinct: 46/47
            ("I like it a lot. " * 20, "guard: 95% of it is repetition"),  # 97 4-grams, 5 distinct: 92/97
            ("你" * 30, "guard: 96% of it is repetition"),  # 27 4-grams, one distinct: 26/27
        ],
    )
    def test_guards(self, text: str, reason: str) -> None:
        found = STRICT.verify(text, row("punctuation:no_comma"))
        assert (found.reward, found.status, found.detail) == (0.0, "wrong", reason)

    def test_guards_leave_room_for_what_is_asked(self) -> None:
        two_words = row("length_constraints:number_words", num_words=3, relation=LESS)
        assert STRICT.verify("Two words", two_words).reward == 1.0
        assert STRICT.verify("My answer is no.", row("detectable_format:constrained_response")).reward == 1.0
        lenient = rewards.load("instructions", {"min_words": 1, "max_repeated": 1.0})
        assert lenient.verify("ha " * 50, row("punctuation:no_comma")).reward == 1.0

    @pytest.mark.parametrize(
        ("names", "given", "message"),
        [
            ([], [], "no list of constraints"),
            ("punctuation:no_comma", [{}], "no list of constraints"),
            (["punctuation:no_coma"], [{}], "did you mean 'punctuation:no_comma'"),
            (["punctuation:no_comma"], [], "not one mapping for each of 1"),
            (["punctuation:no_comma"], ["{}"], "no mapping"),
            (["punctuation:no_comma"], [{"num_words": 3}], "does not take num_words"),
            (["keywords:existence"], [{"keywords": None}], "lacks keywords"),
            (["keywords:existence"], [{"keywords": "sun"}], "not a list of texts"),
            (
                ["keywords:letter_frequency"],
                [{"letter": "ab", "let_frequency": 1, "let_relation": LESS}],
                "one character",
            ),
            (["length_constraints:number_words"], [{"num_words": 2.5, "relation": LESS}], "not a whole number"),
            (["length_constraints:number_words"], [{"num_words": 2, "relation": "more than"}], "'at least'"),
            (["language:response_language"], [{"language": "xx"}], "known here"),
        ],
    )
    def test_a_row_that_cannot_be_judged_has_no_reward(self, names: Any, given: Any, message: str) -> None:
        found = STRICT.verify("A good answer.", {"instruction_id_list": names, "kwargs": given})
        assert (found.reward, found.status) == (None, "unparseable_gold")
        assert message in found.detail

    def test_published_data_is_read_by_the_task_files(self, tmp_path: Path) -> None:
        lines = [
            {
                "key": 1000 + i,
                "prompt": f"Write about {i} in lower case. No commas.",
                "instruction_id_list": ["change_case:english_lowercase", "punctuation:no_comma"],
                "kwargs": [{}, {"num_words": None}],
            }
            for i in range(20)
        ]
        path = tmp_path / "ifeval.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
        columns = ["key", "prompt", "instruction_id_list", "kwargs"]
        fields = {"fields": {column: column for column in columns}, "verifier": "instructions"}
        task = tasks.load("files", {"train": str(path), **fields})
        rows = [row for split in SPLITS for row in task.rows(split)]
        assert len(rows) == 20
        assert STRICT.verify("all of it is small", rows[0]).reward == 1.0
        lines[3]["instruction_id_list"] = ["change_case:english_lowercase", "no_such:thing"]
        path.write_text("\n".join(map(json.dumps, lines)))
        with pytest.raises(UserError, match=r"line 4: .*there is no constraint 'no_such:thing'"):
            tasks.load("files", {"train": str(path), **fields}).rows("train")

    @settings(deadline=None)
    @given(st.text(max_size=200), st.sampled_from(EXAMPLES), st.sampled_from([STRICT, LOOSE]))
    def test_no_text_makes_it_fail(self, text: str, example: Any, verifier: Any) -> None:
        (found,) = verifier.score([text], [row(example[0], **example[1])])
        assert found.reward in (0.0, 1.0) and found.status in ("ok", "wrong", "no_answer")

    def test_it_is_listed_and_pickles(self) -> None:
        assert registry.entry("reward", "instructions").summary.startswith("Instructions: ")
        copy = pickle.loads(pickle.dumps(LOOSE))  # noqa: S301 - our own bytes
        assert copy.identity == LOOSE.identity


@pytest.fixture(scope="module")
def task() -> tasks.BaseTask:
    return tasks.load("instructions", {"rows": 600})


class TestTask:
    def test_every_gold_keeps_its_constraints(self, task: tasks.BaseTask) -> None:
        rows = [row for split in SPLITS for row in task.rows(split)]
        assert len({row["key"] for row in rows}) == len(rows)
        for one in rows:
            gold = STRICT.gold(one)
            assert gold is not None and STRICT.verify(gold, one).reward == 1.0
            assert 1 <= len(one["instruction_id_list"]) == len(one["kwargs"]) <= 3
        pairs = task.demonstrations(task.rows("train"), 50, seed=0)
        assert pairs == task.demonstrations(task.rows("train"), 50, seed=0)
        assert [STRICT.verify(answer, one).reward for one, answer in pairs] == [1.0] * 50

    def test_the_constraints_ask_for_something(self, task: tasks.BaseTask) -> None:
        """The answer to another prompt keeps them seldom, and a word never."""
        rows = [one for one in task.rows("train") if len(one["instruction_id_list"]) == 3]
        others = [STRICT.verify(other["solution"], one).reward for one, other in pairwise(rows)]
        assert sum(others) / len(others) < 0.05  # type: ignore[arg-type]
        assert sum(STRICT.verify("ok", one).reward or 0.0 for one in rows) == 0.0

    def test_eighteen_constraints_occur(self, task: tasks.BaseTask) -> None:
        found = {name for one in task.rows("train") for name in one["instruction_id_list"]}
        assert len(found) == 18 and found <= set(NAMES)

    def test_the_alphabet_covers_prompts_and_answers(self, task: tasks.BaseTask) -> None:
        rows = [row for split in SPLITS for row in task.rows(split)]
        text = "".join(one["prompt"][0]["content"] + one["solution"] for one in rows)
        assert task.alphabet is not None and len(set(task.alphabet)) == len(task.alphabet)
        assert set(text) <= set(task.alphabet) - set("^?")

    def test_determinism_and_options(self) -> None:
        def load(**options: Any) -> tasks.BaseTask:
            return tasks.load("instructions", options)

        assert load(rows=20).rows("train") == load(rows=40).rows("train")[:20]
        assert load(rows=20).rows("train") != load(rows=20, seed=1).rows("train")
        threes = load(rows=30, min_constraints=3).rows("train")
        assert {len(one["instruction_id_list"]) for one in threes} == {3}
        with pytest.raises(UserError, match="min_constraints 3 exceeds max_constraints 1: exchange them"):
            load(min_constraints=3, max_constraints=1)

    def test_it_is_listed_with_a_summary(self) -> None:
        assert registry.entry("task", "instructions").summary.startswith("Instructions: ")
