"""Ranks as threads of one process: many small random cases in the time that one takes on processes."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import Any

import torch
from torch import Tensor

from megalite.mesh import Mesh

PATIENCE_S = 20.0


class _Boxes(dict[tuple[int, int, int], "Queue[Tensor]"]):
    """Tensors under way, by sender, receiver and how many went before on this road."""

    def __missing__(self, road: tuple[int, int, int]) -> "Queue[Tensor]":
        # Both ends may ask at once: setdefault gives them the same box.
        return self.setdefault(road, Queue())


class _Arriving:
    def __init__(self, tensors: Sequence[Tensor], boxes: Sequence[Queue[Tensor]]) -> None:
        self.pairs = list(zip(tensors, boxes, strict=True))

    def wait(self) -> None:
        for tensor, box in self.pairs:
            tensor.copy_(box.get(timeout=PATIENCE_S))


class ThreadCommunicator:
    """The part of a Communicator that context parallelism uses. Tensors under way fill only on the wait."""

    def __init__(self, mesh: Mesh, boxes: _Boxes) -> None:
        self.mesh, self.boxes = mesh, boxes
        self.sent: dict[int, int] = defaultdict(int)
        self.awaited: dict[int, int] = defaultdict(int)

    def rotate(self, tensors: Sequence[Tensor], axis: str) -> tuple[list[Tensor], _Arriving]:
        ranks, place = self.mesh.ranks(axis), self.mesh.index(axis)
        for tensor in tensors:
            self._send(tensor, ranks[(place + 1) % len(ranks)])
        incoming = [tensor.new_full(tensor.shape, float("nan")) for tensor in tensors]
        return incoming, _Arriving(incoming, [self._box_from(ranks[place - 1]) for _ in tensors])

    def all_to_all(self, tensor: Tensor, axis: str, send: None = None, receive: None = None) -> Tensor:
        ranks = self.mesh.ranks(axis)
        for rank, part in zip(ranks, tensor.chunk(len(ranks)), strict=True):
            self._send(part, rank)
        got = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        _Arriving(got.chunk(len(ranks)), [self._box_from(rank) for rank in ranks]).wait()
        return got

    def _send(self, tensor: Tensor, to: int) -> None:
        self.boxes[self.mesh.rank, to, self.sent[to]].put(tensor.clone())
        self.sent[to] += 1

    def _box_from(self, source: int) -> Queue[Tensor]:
        self.awaited[source] += 1
        return self.boxes[source, self.mesh.rank, self.awaited[source] - 1]


def on_threads(meshes: Sequence[Mesh], function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
    """Results of `function(communicator, …)` by rank, one thread for each mesh."""
    boxes = _Boxes()
    with ThreadPoolExecutor(len(meshes)) as pool:
        under_way = [pool.submit(function, ThreadCommunicator(mesh, boxes), *arguments, **options) for mesh in meshes]
        return [future.result() for future in under_way]
