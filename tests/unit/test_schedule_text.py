"""Schedules as CSV: read back as written, the same rows as torch's own generators, one line for each mistake."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed.pipelining.schedules as torch_schedules
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.errors import UserError
from megalite.pipeline.schedule import NAMES, Kind, default_chunks, lower, make_schedule, schedule_problems
from megalite.pipeline.schedule.lower import add_sends
from megalite.pipeline.schedule.text import load_csv, read_csv, write_csv

TORCH = {"interleaved": "Interleaved1F1B", "zb_h1": "InterleavedZeroBubble", "zbv": "ZBVZeroBubble"}
SAME = [*TORCH.items(), ("dualpipev", "DualPipeV")]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NAMES), st.integers(1, 6), st.integers(1, 12), st.booleans())
def test_a_schedule_is_read_back_as_it_was_written(name: str, pp: int, microbatches: int, lowered: bool) -> None:
    schedule = make_schedule(name, pp, default_chunks(name), microbatches)
    if lowered:
        schedule = lower(schedule, gather=True, recompute=True)
    assert read_csv(write_csv(schedule), name) == schedule


def torch_rows(name: str, pp: int, chunks: int, microbatches: int) -> list[list[Any]]:
    """The compute order that torch lists, without its empty entries."""
    cls: Any = getattr(torch_schedules, f"Schedule{name}")
    rounds = max(1, microbatches // pp)
    plan = cls.__new__(cls)
    plan.__dict__ |= {
        "pp_group_size": pp, "n_local_stages": chunks, "_n_microbatches": microbatches, "num_stages": pp * chunks,
        "_num_stages": pp * chunks, "number_of_rounds": rounds, "microbatches_per_round": microbatches // rounds,
    }  # fmt: skip
    rows = [plan._calculate_single_rank_operations(rank) for rank in range(pp)]
    return [[action for action in row if action is not None] for row in rows]


@pytest.mark.parametrize(("ours", "theirs"), SAME)
@pytest.mark.parametrize(("pp", "microbatches"), [(1, 2), (2, 4), (3, 9), (4, 8), (4, 16), (6, 12)])
def test_the_same_rows_as_torch(ours: str, theirs: str, pp: int, microbatches: int) -> None:
    rows = torch_rows(theirs, pp, 2, microbatches)
    text = "\n".join(",".join(map(str, row)) for row in rows)
    assert write_csv(make_schedule(ours, pp, 2, microbatches)).strip() == text
    assert read_csv(text, "torch").rows == make_schedule(ours, pp, 2, microbatches).rows


def test_torch_lists_forwards_that_do_not_exist_on_the_last_rank_of_1f1b() -> None:
    """It executes other code than it lists, so nobody saw; our checker does, and what we list is what runs."""
    plan: Any = torch_schedules.Schedule1F1B.__new__(torch_schedules.Schedule1F1B)
    plan.__dict__ |= {"_num_stages": 4, "_n_microbatches": 8}
    listed = plan._get_pipeline_order()
    rows = [",".join(str(action) for action in listed[rank] if action is not None) for rank in range(4)]
    rows = [row.removesuffix(f",{rank}REDUCE_GRAD") for rank, row in enumerate(rows)]
    ours = write_csv(make_schedule("1f1b", 4, 1, 8)).split()
    assert rows[:3] == ours[:3]
    assert ours[3].startswith("3F0,3B0,3F1,3B1")
    if rows[3] == ours[3]:
        pytest.skip("this torch lists the right order")
    assert rows[3].startswith("3F1,3B0,3F2,3B1")
    with pytest.raises(UserError, match="rank 3: 3F0 stands there 0 times"):
        read_csv("\n".join(rows), "torch")


@pytest.mark.parametrize("name", ["interleaved", "zbv", "looped_bfs"])
def test_torch_runs_our_sends_and_receives(name: str) -> None:
    """Its simulator of lowered rows steps through ours to the end: the names of the ops mean the same."""
    schedule = add_sends(make_schedule(name, 4, 2, 8))
    rows = {
        rank: [torch_schedules._Action.from_str(entry) for entry in line.split(",")]
        for rank, line in enumerate(write_csv(schedule).split())
    }
    steps = torch_schedules._simulate_comms_compute(rows, lambda stage: schedule.placement[stage], schedule.stages)
    assert [sum(action is not None for action in steps[rank]) for rank in range(4)] == [*map(len, schedule.rows)]


def test_a_file_of_our_own_takes_the_place_of_a_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("0F0, 0F1,,0B0,0B1\n\n1F0,1B0,1F1,1I1,1W1\n")
    schedule = make_schedule(str(path), 2, 1, 2)
    assert [str(op) for op in schedule.rows[1]] == ["1F0", "1B0", "1F1", "1I1", "1W1"]
    assert default_chunks(str(path)) == 1
    batch = "set train.global_batch to 2 x train.micro_batch x dp"
    assert schedule_problems(str(path), 4, 2, 3) == [
        f"parallel.pp=4: parallel.schedule={path} is written for 2; set 2",
        f"parallel.chunks=2: parallel.schedule={path} is written for 1; set 1",
        f"train.global_batch: makes 3 microbatches a step, parallel.schedule={path} is written for 2; {batch}",
    ]
    sent = lower(schedule)
    path.write_text(write_csv(sent))
    assert lower(make_schedule(str(path), 2, 1, 2)).rows == sent.rows
    assert sum(op.kind == Kind.SEND_F for op in sent.rows[0]) == 2


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "has no forward; a line a rank"),
        ("0F0,0X0", "line 1, entry 2, '0X0': not an op; write stage, kind and microbatch"),
        ("0F0,0B", "line 1, entry 2, '0B': B has a microbatch"),
        ("0F0,0B0,0REDUCE_GRAD0", "'0REDUCE_GRAD0': REDUCE_GRAD has no microbatch"),
        ("0F0,0B0\n2F0,2B0", "no rank has a forward of stage 1; stages count from 0"),
        ("0F0,0B0\n0F1,0B1", "stage 0 is on ranks 0 and 1; keep one"),
        ("0F0,1F0,1B0,0B0,2F0,2B0\n3F0,3B0", "4 stages on 2 ranks; every rank needs as many"),
        ("0F0,0F1,0B0,0B1\n1F0,1B0,1F1", "rank 1: 1I1 (or 1B1) stands there 0 times; once is right"),
        ("0B0,0F0", "rank 0: 0B0 stands before 0F0, which it needs"),
        ("0F0,0B0\n1B0,1F0", "rank 1: 1B0 stands before 1F0"),
        ("(0B0;0F0)OVERLAP_F_B", "an overlapped pair is a forward and then a backward"),
        ("(0F0;0B0)OVERLAP_F_B", "rank 0: 0B0 stands before 0F0, which it needs"),
        ("0F0,0SEND_F0,0B0\n1F0,1B0", "rank 1: 1RECV_F0 stands there 0 times"),
        ("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1", "rank 0: 0B0 waits for 1I0, which never comes"),
    ],
)
def test_a_mistake_is_one_line_that_says_where(text: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        read_csv(text, "mine.csv")
    assert any(each.startswith("mine.csv: ") and line in each for each in caught.value.lines), caught.value.lines


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_csv(tmp_path / "none.csv")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe0F0")
    with pytest.raises(UserError, match="not text"):
        load_csv(tmp_path / "bytes.csv")
    assert schedule_problems(str(tmp_path / "none.csv"), 2, 1, 2)[0].startswith("parallel.schedule=")


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123FBIW,\n();SENDRCV_OLAP ", max_size=60))
def test_any_text_is_a_schedule_or_a_user_error(text: str) -> None:
    try:
        schedule = read_csv(text, "any.csv")
    except UserError:
        return
    lower(schedule)
