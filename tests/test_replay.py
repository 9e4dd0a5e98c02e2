"""Which stored answers a step rehearses: every one once per pass, spread over slots, a function of the step alone."""

from __future__ import annotations

import pytest

from posttrain.rollouts.replay import Replay, StoredAnswer

STORE = [StoredAnswer([100 + i], [i] * (i % 4 + 1), [-0.5] * (i % 4 + 1)) for i in range(10)]
"""Ten answers of 1 to 4 tokens; the first token tells them apart."""


def numbers(answers: list[StoredAnswer]) -> list[int]:
    """The answers by their number in the store."""
    return [answer.token_ids[0] for answer in answers]


def step_rows(replay: Replay, step: int, rows: int) -> list[int]:
    """All rows of a step, drawn in one slot."""
    return numbers(replay.draw(step=step, rows=rows, slot=0, slots=1).answers)


@pytest.mark.parametrize("rows", [1, 3, 4, 10])
def test_every_answer_comes_once_per_pass_and_each_pass_is_shuffled_anew(rows: int) -> None:
    replay = Replay(STORE, seed=0)
    steps = -(-40 // rows)
    sequence = [number for step in range(steps) for number in step_rows(replay, step, rows)][:40]
    passes = [sequence[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len({tuple(one) for one in passes}) == 4, "four passes, four orders"
    assert list(range(10)) not in passes, "shuffled from the first pass on"


def test_the_seed_decides_the_order() -> None:
    assert step_rows(Replay(STORE, seed=0), 0, 10) != step_rows(Replay(STORE, seed=1), 0, 10)


@pytest.mark.parametrize(("rows", "slots"), [(8, 4), (7, 4), (3, 4), (1, 4), (9, 2), (25, 6), (0, 3)])
def test_the_slots_share_the_rows_of_a_step(rows: int, slots: int) -> None:
    replay = Replay(STORE, seed=5)
    for step in range(4):
        draws = [replay.draw(step=step, rows=rows, slot=slot, slots=slots) for slot in range(slots)]
        together = [number for draw in draws for number in numbers(draw.answers)]
        assert together == step_rows(replay, step, rows), "disjoint, and nothing is lost"
        sizes = [len(draw.answers) for draw in draws]
        assert max(sizes) - min(sizes) <= 1
        spread = sum(len(answer.token_ids) for draw in draws for answer in draw.answers)
        assert [draw.tokens for draw in draws] == [spread] * slots, "every slot knows the tokens of the whole step"


def test_a_draw_depends_on_nothing_but_the_step() -> None:
    replay = Replay(STORE, seed=2)
    onward = [replay.draw(step=step, rows=7, slot=1, slots=2) for step in range(12)]
    backward = [replay.draw(step=step, rows=7, slot=1, slots=2) for step in reversed(range(12))]
    resumed = [Replay(STORE, seed=2).draw(step=step, rows=7, slot=1, slots=2) for step in range(12)]
    assert onward == backward[::-1] == resumed


def test_a_step_may_rehearse_more_rows_than_the_store_has() -> None:
    drawn = step_rows(Replay(STORE, seed=0), 1, 25)
    # Step 1 holds positions 25 … 49: the second half of pass 2, then passes 3 and 4 whole.
    assert len(drawn) == 25
    assert sorted(drawn[5:15]) == sorted(drawn[15:]) == list(range(10))
    assert len(set(drawn[:5])) == 5


def test_one_answer_is_drawn_again_and_again() -> None:
    assert step_rows(Replay(STORE[:1], seed=0), 3, 4) == [0, 0, 0, 0]


def test_images_are_looked_up_for_the_answers_of_the_share_alone() -> None:
    asked: list[int] = []

    def images(answer: StoredAnswer) -> list[str]:
        asked.append(answer.token_ids[0])
        return [f"of {answer.token_ids[0]}"] * (answer.token_ids[0] % 2)

    replay = Replay(STORE, seed=4, images=images)
    assert not asked
    draw = replay.draw(step=0, rows=6, slot=1, slots=3)
    assert asked == numbers(draw.answers)
    assert len(asked) == 2, "a third of 6"
    assert draw.images == [[f"of {number}"] * (number % 2) for number in asked]
    assert Replay(STORE, seed=4).draw(step=0, rows=6, slot=1, slots=3).images == [(), ()]


def test_no_answers_are_refused() -> None:
    with pytest.raises(ValueError, match="no stored answers"):
        Replay([], seed=0)


def test_a_slot_that_a_step_does_not_have_is_refused() -> None:
    replay = Replay([StoredAnswer((1,), (2,), (0.0,))], seed=0)
    with pytest.raises(ValueError, match="slot 2 is none of the 2 shares of step 7"):
        replay.draw(step=7, rows=4, slot=2, slots=2)
