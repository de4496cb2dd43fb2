"""Executes a schedule: the lowered rows are the program, and the log of what ran equals this rank's row.

Sends and receives are started where the row says and waited for where their tensor is needed. A stage whose neighbour
is on the same rank hands its tensor over without communication. One process runs the same way: its row has no sends.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megalite.comm import Communicator, Handle
from megalite.data.batch import Batch
from megalite.model.parallelize import defer_weights
from megalite.model.router import Router
from megalite.model.transformer import Transformer
from megalite.parallel.data import Gradients
from megalite.pipeline.forward import Forward
from megalite.pipeline.schedule import Kind, Op, Schedule, lower, make_schedule

BACKWARD = (Kind.B, Kind.I, Kind.W)


class Pipeline:
    """`stages`: this rank's, in the order of the layers. `schedule`: lowered; its last op, the optimizer's step, is the
    trainer's. `log`: the ops of the last run."""

    def __init__(
        self, stages: Sequence[Transformer], schedule: Schedule, comm: Communicator, gradients: Gradients, z_loss: float
    ) -> None:
        self.schedule, self.comm, self.gradients, self.z_loss = schedule, comm, gradients, z_loss
        self.row = [op for op in schedule.rows[comm.mesh.index("pp")] if op.kind != Kind.OPTIMIZER]
        self.halves = {(op.stage, op.microbatch) for op in self.row if op.kind == Kind.I}
        self.stages = dict(zip(schedule.stages_of(comm.mesh.index("pp")), stages, strict=True))
        self.chunk = {stage: chunk for chunk, stage in enumerate(self.stages)}
        split = {op.stage for op in self.row if op.kind == Kind.W}
        self.deferred = {stage: defer_weights(self.stages[stage]) for stage in split}
        self.routers = [m for stage in stages for m in stage.modules() if isinstance(m, Router)]
        self.forward = Forward(self.stages, schedule, comm, gradients.compute)
        self.evaluate = self.forward.losses
        self.log: list[Op] = []

    def train(self, batches: Sequence[Batch], tokens: float, ahead: Sequence[float] = (), scale: float = 1.0) -> Tensor:
        """Forward and backward of every microbatch, gradients reduced (not yet waited for).

        The loss is divided by `tokens`, the valid targets of the global batch, that of each multi-token module by its
        own number of them, in `ahead`. `scale` multiplies all that is differentiated, the routers' own losses too, and
        so the gradients; not what is returned. Returns float64 [microbatches, 2 + modules]: sums of nll, of squared
        log-partition and of the modules' nll, zero except on the rank of the last stage.
        """
        for router in self.routers:
            router.loss_scale = scale
        step = _Step(self, batches, tokens, ahead, scale)
        self.log = []
        for op in self.row:
            step.execute(op)
            self.log.append(op)
        step.finish()
        return step.sums

    @property
    def running(self) -> Op:
        """The op under way, inside `train`."""
        return self.row[len(self.log)]

    def shortened(self, microbatches: int) -> "Pipeline":
        """The same stages with fewer microbatches, for one rank along pp."""
        chunks = len(self.stages)
        schedule = make_schedule("1f1b" if chunks == 1 else "interleaved", 1, chunks, microbatches)
        return Pipeline(list(self.stages.values()), lower(schedule), self.comm, self.gradients, self.z_loss)


class _Step:
    """Tensors of one step on their way between stages, by (stage, microbatch)."""

    def __init__(
        self, pipeline: Pipeline, batches: Sequence[Batch], tokens: float, ahead: Sequence[float], scale: float
    ) -> None:
        self.pipeline, self.batches, self.tokens, self.ahead, self.scale = pipeline, batches, tokens, ahead, scale
        self.sums = torch.zeros(len(batches), 2 + len(ahead), dtype=torch.float64, device=batches[0].tokens.device)
        self.entered: dict[tuple[int, int], Tensor] = {}  # a stage's input, until its gradient is out
        self.left: dict[tuple[int, int], Tensor] = {}  # its output or loss, until backward
        self.gradient: dict[tuple[int, int], Tensor] = {}  # of its output
        self.handles: dict[tuple[Kind, int, int], Handle] = {}
        self.remaining = Counter(op.stage for op in pipeline.row if op.kind in BACKWARD)

    def execute(self, op: Op) -> None:
        run: dict[Kind, Any] = {
            Kind.F: self._forward, Kind.B: self._backward, Kind.I: self._backward, Kind.W: self._weights,
            Kind.SEND_F: self._send_forward, Kind.RECV_F: self._receive_forward,
            Kind.SEND_B: self._send_backward, Kind.RECV_B: self._receive_backward,
        }  # fmt: skip
        if op.kind == Kind.REDUCE_GRAD:
            self.pipeline.gradients.reduce(self.pipeline.chunk[op.stage])
        else:
            run[op.kind](op.stage, op.microbatch)

    def finish(self) -> None:
        for handle in self.handles.values():
            handle.wait()
        leftover = {"inputs": self.entered, "outputs": self.left, "gradients": self.gradient}
        assert not any(leftover.values()), f"tensors left behind by the schedule: {leftover}"

    def _forward(self, number: int, microbatch: int) -> None:
        pipeline, batch, at = self.pipeline, self.batches[microbatch], (number, microbatch)
        stage = pipeline.stages[number]
        if number > 0:
            self._wait(Kind.RECV_F, *at)
            self.entered[at].requires_grad_()
        x = self.entered.get(at)
        if stage.last:
            losses = stage.loss(batch.tokens, batch.targets, batch.documents, z_loss=pipeline.z_loss, x=x, ahead=True)
            nll_sum, z_sum, ahead_sums = losses
            # Stays on its device: no wait in the middle of a step.
            self.sums[microbatch] = torch.stack([nll_sum, z_sum, *ahead_sums]).detach()
            loss = (nll_sum + pipeline.z_loss * z_sum) / self.tokens
            for total, count in zip(ahead_sums, self.ahead, strict=True):
                loss = loss + stage.config.mtp_weight / len(self.ahead) * (total / count)
            self.left[at] = loss * self.scale
            return
        self.left[at] = stage(batch.tokens, batch.documents, x=x)
        if not pipeline.schedule.crosses(number):
            self.entered[number + 1, microbatch] = self.left[at].detach()

    def _backward(self, number: int, microbatch: int) -> None:
        pipeline, at = self.pipeline, (number, microbatch)
        out, deferred = self.left.pop(at), pipeline.deferred.get(number)
        self.remaining[number] -= 1
        if not pipeline.stages[number].last:
            self._wait(Kind.RECV_B, *at)
            self._wait(Kind.SEND_F, *at)  # over, since its gradient has come; lets go of the output
        if deferred is not None:
            deferred.waiting = microbatch if at in pipeline.halves else None
        last, whole = self.remaining[number] == 0, at not in pipeline.halves
        with pipeline.gradients.accumulating(pipeline.chunk[number], last, complete=whole):
            torch.autograd.backward(out, self.gradient.pop(at, None))
        if number > 0:
            x = self.entered.pop(at)
            assert x.grad is not None
            if pipeline.schedule.crosses(number - 1):
                self.entered[at] = x.grad  # kept under the same name until it is sent
            else:
                self.gradient[number - 1, microbatch] = x.grad

    def _weights(self, number: int, microbatch: int) -> None:
        pipeline = self.pipeline
        self.remaining[number] -= 1
        with pipeline.gradients.accumulating(pipeline.chunk[number], self.remaining[number] == 0):
            pipeline.deferred[number].compute(microbatch, pipeline.gradients)

    def _send_forward(self, number: int, microbatch: int) -> None:
        place = self.pipeline.schedule.placement[number + 1]
        out = self.left[number, microbatch].detach()
        self.handles[Kind.SEND_F, number, microbatch] = self.pipeline.comm.send(out, "pp", place)

    def _receive_forward(self, number: int, microbatch: int) -> None:
        room = self.pipeline.forward.room(self.pipeline.stages[number], self.batches[microbatch])
        place = self.pipeline.schedule.placement[number - 1]
        self.entered[number, microbatch] = room
        self.handles[Kind.RECV_F, number, microbatch] = self.pipeline.comm.receive(room, "pp", place)

    def _send_backward(self, number: int, microbatch: int) -> None:
        place, gradient = self.pipeline.schedule.placement[number - 1], self.entered.pop((number, microbatch))
        # Lets go of gradients long sent: as many as 1f1b keeps activations may be on their way.
        self._wait(Kind.SEND_B, number, microbatch - self.pipeline.schedule.pp)
        self.handles[Kind.SEND_B, number, microbatch] = self.pipeline.comm.send(gradient, "pp", place)

    def _receive_backward(self, number: int, microbatch: int) -> None:
        room = torch.empty_like(self.left[number, microbatch], memory_format=torch.contiguous_format)
        place = self.pipeline.schedule.placement[number + 1]
        self.gradient[number, microbatch] = room
        self.handles[Kind.RECV_B, number, microbatch] = self.pipeline.comm.receive(room, "pp", place)

    def _wait(self, kind: Kind, number: int, microbatch: int) -> None:
        handle = self.handles.pop((kind, number, microbatch), None)
        if handle is not None:
            handle.wait()
