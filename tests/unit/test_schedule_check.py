"""The checker finds every fault that is put into a sound schedule, and its line names the rank and the op."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.pipeline.schedule import NAMES, Kind, Op, Schedule, default_chunks, lower, make_schedule
from megalite.pipeline.schedule.check import problems
from megalite.pipeline.schedule.simulate import simulate

F, B, I, W = Kind.F, Kind.B, Kind.I, Kind.W  # noqa: E741


def sound(name: str = "1f1b", microbatches: int = 4) -> Schedule:
    return lower(make_schedule(name, 4, default_chunks(name), microbatches), gather=True, recompute=True)


def changed(schedule: Schedule, rank: int, row: list[Op]) -> Schedule:
    return replace(schedule, rows=(*schedule.rows[:rank], tuple(row), *schedule.rows[rank + 1 :]))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NAMES), st.randoms(use_true_random=False))
def test_an_op_left_out_or_written_twice_is_named(name: str, choice: random.Random) -> None:
    schedule = sound(name)
    rank = choice.randrange(4)
    row = list(schedule.rows[rank])
    place = choice.choice([at for at, op in enumerate(row) if op.kind not in (Kind.GATHER, Kind.RESHARD)])
    op = row[place]
    if op.kind != Kind.OPTIMIZER:
        lines = problems(changed(schedule, rank, row[:place] + row[place + 1 :]))
        assert any(line.startswith(f"rank {rank}: {op.stage}") for line in lines), lines
    twice = [*row[: place + 1], replace(op, overlaps_next=False), *row[place + 1 :]]
    lines = problems(changed(schedule, rank, twice))
    assert any(line.startswith(f"rank {rank}: {op.stage}") and "2 times" in line for line in lines), lines


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NAMES), st.randoms(use_true_random=False))
def test_two_messages_of_one_channel_in_the_other_order_are_named(name: str, choice: random.Random) -> None:
    schedule = lower(make_schedule(name, 4, default_chunks(name), 6))
    rank = choice.randrange(4)
    row = list(schedule.rows[rank])
    kind = choice.choice([op.kind for op in row if op.kind.startswith("RECV")])
    places = [at for at, op in enumerate(row) if op.kind == kind and op.stage == row[row.index(op)].stage]
    first, second = places[:2]
    row[first], row[second] = row[second], row[first]
    lines = problems(changed(schedule, rank, row))
    assert any(f"rank {rank} " in f"{line} ".replace(":", " ") for line in lines), lines


def test_each_order_within_a_row() -> None:
    schedule = sound("zb_h1")
    row = list(schedule.rows[1])

    def moved(before: Kind, after: Kind) -> list[str]:
        """The last `after` goes before the first `before`."""
        op = next(op for op in reversed(row) if op.kind == after)
        left = [each for each in row if each != op]
        place = next(at for at, each in enumerate(left) if each.kind == before)
        return problems(changed(schedule, 1, [*left[:place], op, *left[place:]]))

    assert any("1REDUCE_GRAD stands before 1W0" in line for line in moved(W, Kind.REDUCE_GRAD))
    assert any("1OPTIMIZER stands before 1REDUCE_GRAD" in line for line in moved(Kind.REDUCE_GRAD, Kind.OPTIMIZER))
    assert any("1W3 stands before 1I3" in line for line in moved(I, W))
    assert any("1I3 stands before 1F3" in line for line in moved(F, I))
    assert any("1SEND_F3 stands before 1F3" in line for line in moved(F, Kind.SEND_F))
    assert any("1F3 stands before 1RECV_F3" in line for line in moved(Kind.RECV_F, F))
    assert any("sharded there" in line for line in moved(F, Kind.RESHARD))


def test_a_deadlock_under_blocking_sends_alone() -> None:
    """Two ranks that both send first: fine with buffers, stuck without."""
    schedule = make_schedule("1f1b", 2, 1, 2)
    rows = (
        (Op(F, 0, 0), Op(Kind.SEND_F, 0, 0), Op(F, 0, 1), Op(Kind.SEND_F, 0, 1), Op(Kind.RECV_B, 0, 0), Op(B, 0, 0),
         Op(Kind.RECV_B, 0, 1), Op(B, 0, 1)),
        (Op(Kind.RECV_F, 1, 0), Op(F, 1, 0), Op(B, 1, 0), Op(Kind.SEND_B, 1, 0), Op(Kind.RECV_F, 1, 1), Op(F, 1, 1),
         Op(B, 1, 1), Op(Kind.SEND_B, 1, 1)),
    )  # fmt: skip
    schedule = replace(schedule, rows=rows)
    assert problems(schedule, blocking=False) == []
    assert problems(schedule) == [
        "rank 0: 0SEND_F1 waits for rank 1, which stands at 1SEND_B0: a deadlock",
        "rank 1: 1SEND_B0 waits for rank 0, which stands at 0SEND_F1: a deadlock",
    ]


def test_a_deadlock_of_the_computation_names_what_each_rank_waits_for() -> None:
    schedule = make_schedule("gpipe", 2, 1, 2)
    row = [Op(F, 1, 0), Op(F, 1, 1), Op(B, 1, 0), Op(B, 1, 1)]
    first = [Op(F, 0, 0), Op(B, 0, 0), Op(F, 0, 1), Op(B, 0, 1)]
    stuck = replace(schedule, rows=(tuple(first), tuple(row)))
    assert problems(stuck) == [
        "rank 0: 0B0 waits for 1I0, which never comes",
        "rank 1: 1F1 waits for 0F1, which never comes",
    ]
    with pytest.raises(ValueError, match="rank 1: 1F1 waits for 0F1"):
        simulate(stuck)
    with pytest.raises(ValueError, match="never comes"):
        lower(stuck)


def test_ops_on_the_wrong_rank_and_pairs_that_need_each_other() -> None:
    schedule = make_schedule("1f1b", 2, 1, 1)
    swapped = replace(schedule, rows=schedule.rows[::-1])
    assert problems(swapped)[0] == "rank 0: 1F0 belongs to rank 1, which holds stage 1"
    pair = changed(schedule, 1, [Op(F, 1, 0, overlaps_next=True), Op(B, 1, 0)])
    assert problems(pair) == ["rank 1: 1B0 stands before 1F0, which it needs"]
    alone = changed(schedule, 1, [Op(F, 1, 0), Op(B, 1, 0, overlaps_next=True)])
    assert problems(alone) == ["rank 1: 1B0 overlaps with nothing"]
