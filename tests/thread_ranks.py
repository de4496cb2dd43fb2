"""Ranks as threads of one process, under torch's own process-group interface: the engine runs on them as it is.

`run_threads` is `run_ranks` without processes, sockets and their cost. One rank runs at a time, until it must wait for
another; then the next one that need not. So a deadlock is seen at once, and reported with what every rank waits for.
Tensors move as late as they may: a send completes only when its receive was started, reads its tensor at the first wait
of either side, and what is received or reduced appears only on the wait. A sum is made in the order of the ranks.
What ranks share is theirs to leave alone: a patch or a module's global is every rank's. A rank that computes for ever
is not stopped, as a process would be.
"""

import sys
import threading
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.testing._internal.distributed.multi_threaded_pg import ThreadLocalWorld

from megalite.world import World, leave

MOST_RANKS = 16
FRAMES = 8
"""Of a rank that waits, so many of the innermost are shown."""
HERE = threading.local()
"""`rank`: which one this thread is, of which `turns`."""


class Stopped(Exception):
    """Another rank failed."""


class Deadlock(AssertionError):
    """Every rank waits for another."""


DEADLOCK = "no rank can go on"


class _Turns:
    """Whose turn it is among `size` ranks."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.waiting: dict[int, tuple[str, Callable[[], bool]]] = {
            rank: ("the start", lambda: True) for rank in range(size)
        }
        self.turn = [threading.Lock() for _ in range(size)]  # released: it is this rank's
        for lock in self.turn:
            lock.acquire()
        self.failure = ""
        self.rounds: dict[tuple[str, int], _Round] = {}
        self.letters: dict[tuple[str, int, int], list[_Letter]] = defaultdict(list)

    def until(self, rank: int, what: str, ready: Callable[[], bool]) -> None:
        """Return when `ready`, which may become so only while others run. Stopped: it will not."""
        if ready():
            return
        self.waiting[rank] = what, ready
        self.pass_on(rank)
        self.take(rank)

    def take(self, rank: int) -> None:
        """Wait for the turn that `pass_on` gives."""
        self.turn[rank].acquire()
        if self.failure:
            raise Stopped(f"rank {rank} waited for {self.waiting[rank][0]}")

    def pass_on(self, rank: int) -> None:
        """To the next rank around that has nothing to wait for."""
        if self.failure:
            return
        for candidate in ((rank + n) % self.size for n in range(1, self.size + 1)):
            if candidate in self.waiting and self.waiting[candidate][1]():
                del self.waiting[candidate]
                self.turn[candidate].release()
                return
        if self.waiting:
            self.stop(DEADLOCK)

    def stop(self, failure: str) -> None:
        """Every waiting rank ends."""
        if not self.failure:
            self.failure = failure
            for rank in self.waiting:
                self.turn[rank].release()


class _Round:
    """One collective of one group: what each place hands in, and what comes out for it."""

    def __init__(self, what: str, size: int) -> None:
        self.what, self.size = what, size
        self.handed: dict[int, Any] = {}
        self.results: list[Tensor] | None = None


class _Letter:
    """One message: announced by either side."""

    def __init__(self) -> None:
        self.sent: Tensor | None = None
        self.expected = False
        self.read: Tensor | None = None

    def content(self) -> Tensor:
        if self.read is None:
            assert self.sent is not None
            self.read, self.sent = self.sent.clone(), None
        return self.read


class _Work:
    """Something under way, done by `then` once it is `ready` and waited for."""

    def __init__(self, what: str, ready: Callable[[], bool], then: Callable[[], Any]) -> None:
        self.what, self.ready, self.then, self.done = what, ready, then, False

    def wait(self, timeout: Any = None) -> bool:
        if not self.done:
            HERE.turns.until(HERE.rank, self.what, self.ready)
            self.then()
            self.done = True
        return True


class ThreadGroup(dist.ProcessGroup):
    """The ranks `ranks` of the world, of which this is the one at `place`."""

    def __init__(self, name: str, ranks: Sequence[int], place: int) -> None:
        super().__init__(place, len(ranks))
        self.name, self.ranks, self.place = name, list(ranks), place
        self.turns: _Turns = HERE.turns
        self.rounds = 0
        self.roads: dict[tuple[int, int], int] = defaultdict(int)

    @property
    def group_name(self) -> str:
        return self.name

    def new_group(self, ranks: list[int], *, group_name: str, **_: Any) -> "ThreadGroup":
        return ThreadGroup(group_name, ranks, ranks.index(HERE.rank))

    def _meet(
        self, what: str, handed: Any, combine: Callable[[list[Any]], list[Tensor]], take: Callable[[Tensor], Any]
    ) -> _Work:
        key = self.name, self.rounds
        self.rounds += 1
        meeting = self.turns.rounds.setdefault(key, _Round(what, self.size()))
        assert meeting.what == what, f"ranks {self.ranks}: {what} here, {meeting.what} elsewhere"
        meeting.handed[self.place] = handed
        if len(meeting.handed) == meeting.size:
            del self.turns.rounds[key]
            meeting.results = combine([meeting.handed[place] for place in range(meeting.size)])

        def then() -> None:
            assert meeting.results is not None
            take(meeting.results[self.place])

        return _Work(f"{what} among {self.ranks}", lambda: meeting.results is not None, then)

    def allreduce(self, tensors: list[Tensor], options: Any) -> _Work:
        (tensor,) = tensors
        largest = options.reduceOp == dist.ReduceOp.MAX
        assert largest or options.reduceOp == dist.ReduceOp.SUM, "threads know sums and maxima"

        def combine(handed: list[Tensor]) -> list[Tensor]:
            total = handed[0].clone()
            for term in handed[1:]:
                torch.maximum(total, term, out=total) if largest else total.add_(term)
            return [total] * len(handed)

        return self._meet(f"all_reduce {_kind(tensor)}", tensor, combine, tensor.copy_)

    def all_gather_single(self, whole: Tensor, shard: Tensor, options: Any = None) -> _Work:
        def combine(handed: list[Tensor]) -> list[Tensor]:
            return [torch.cat([part.flatten() for part in handed])] * len(handed)

        return self._meet(
            f"all_gather {_kind(shard)}", shard, combine, lambda all_parts: whole.copy_(all_parts.view_as(whole))
        )

    def all_to_all_single(
        self, got: Tensor, tensor: Tensor, receive: list[int], send: list[int], options: Any = None
    ) -> _Work:
        def combine(handed: list[tuple[Tensor, list[int]]]) -> list[Tensor]:
            cut = [x.split(sizes) if sizes else x.chunk(self.size()) for x, sizes in handed]
            return [torch.cat([parts[place] for parts in cut]) for place in range(self.size())]

        return self._meet(f"all_to_all {_kind(tensor[:0])}", (tensor, send), combine, got.copy_)

    def broadcast(self, tensors: list[Tensor], options: Any) -> _Work:
        (tensor,), source = tensors, options.rootRank

        def combine(handed: list[Tensor]) -> list[Tensor]:
            return [handed[source].clone()] * len(handed)

        return self._meet(f"broadcast from {source} {_kind(tensor)}", tensor, combine, tensor.copy_)

    def send(self, tensors: list[Tensor], to: int, tag: int) -> _Work:
        letter = self._letter(self.place, to)
        (letter.sent,) = tensors
        return _Work(f"rank {self.ranks[to]} to receive", lambda: letter.expected, letter.content)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> _Work:
        (tensor,), letter = tensors, self._letter(source, self.place)
        letter.expected = True

        def then() -> None:
            content = letter.content()
            assert _kind(content) == _kind(tensor), f"{_kind(content)} sent where {_kind(tensor)} is expected"
            tensor.copy_(content)

        return _Work(
            f"rank {self.ranks[source]} to send", lambda: letter.sent is not None or letter.read is not None, then
        )

    def _letter(self, source: int, to: int) -> _Letter:
        """The next message on this road, of those that this rank has to do with."""
        road = self.turns.letters[self.name, source, to]
        number = self.roads[source, to]
        self.roads[source, to] += 1
        while len(road) <= number:
            road.append(_Letter())
        return road[number]


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _default_group(options: Any, _: Any) -> ThreadGroup:
    return ThreadGroup(options.group_id, range(options.group_size), options.group_rank)


@contextmanager
def _worlds_of_threads() -> Iterator[None]:
    """Every thread has process groups of its own."""
    before, c10d._world = c10d._world, ThreadLocalWorld()  # type: ignore[assignment]
    hook = sys.excepthook  # each process group puts a rank before every line that the one before writes
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    try:
        yield
    finally:
        c10d._world, sys.excepthook = before, hook
        torch._C._distributed_c10d._set_thread_isolation_mode(False)


@cache
def _threads() -> ThreadPoolExecutor:
    """Kept, for torch has caches that belong to a thread."""
    dist.Backend.register_backend("threads", _default_group, extended_api=True, devices=["cpu"])
    return ThreadPoolExecutor(MOST_RANKS)


def _rank(turns: _Turns, rank: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    HERE.turns, HERE.rank = turns, rank
    torch.set_num_threads(1)
    try:
        turns.take(rank)
        dist.init_process_group("threads", store=FakeStore(), rank=rank, world_size=turns.size)
        return function(*arguments)
    except BaseException:
        turns.stop(f"rank {rank} of {turns.size} failed:\n{traceback.format_exc()}")
        raise
    finally:
        leave()
        del HERE.turns, HERE.rank
        turns.pass_on(rank)


def _told(error: Stopped) -> str:
    """What a rank waited for, and where."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    return f"{error}\n{''.join(traceback.format_list(frames[-FRAMES:]))}"


def world_of_thread() -> World | None:
    """Which rank this thread is; None: no thread of `run_threads`."""
    return World(HERE.rank, HERE.turns.size, HERE.rank, HERE.turns.size) if hasattr(HERE, "rank") else None


def run_threads(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Results of `function(*arguments)` by rank; it finds its process group joined. AssertionError: what went
    wrong on a rank; Deadlock: nothing did, and each waits."""
    assert world <= MOST_RANKS, f"{world} ranks: there are {MOST_RANKS} threads"
    turns, threads = _Turns(world), _threads()
    with _worlds_of_threads():
        under_way = [threads.submit(_rank, turns, rank, function, arguments) for rank in range(world)]
        turns.pass_on(-1)
        errors = [future.exception() for future in under_way]
    if turns.failure:
        kind = Deadlock if turns.failure == DEADLOCK else AssertionError
        raise kind("\n".join([turns.failure, *(_told(of) for of in errors if isinstance(of, Stopped))]))
    return [future.result() for future in under_way]
