"""Batches through all stages, without gradients and without a schedule: evaluation."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megalite.comm import Communicator, Handle
from megalite.data.batch import Batch
from megalite.model.transformer import Losses, Transformer
from megalite.pipeline.schedule import Schedule


class Forward:
    """`stages`: this rank's, by number; `compute`: the dtype of what passes between them."""

    def __init__(
        self, stages: Mapping[int, Transformer], schedule: Schedule, comm: Communicator, compute: torch.dtype
    ) -> None:
        self.stages, self.schedule, self.comm, self.compute = stages, schedule, comm, compute

    @torch.no_grad()
    def losses(self, batch: Batch) -> Losses:
        """Summed losses of a batch; zero except on the rank of the last stage."""
        losses, passed = Losses(*torch.zeros(2, dtype=torch.float64)), None
        sent: list[Handle] = []
        for number, stage in self.stages.items():
            if number > 0 and self.schedule.crosses(number - 1):
                passed = self.room(stage, batch)
                self.comm.receive(passed, "pp", self.schedule.placement[number - 1]).wait()
            if stage.last:
                losses = stage.loss(batch.tokens, batch.targets, batch.documents, x=passed)
                break
            passed = stage(batch.tokens, batch.documents, x=passed)
            if self.schedule.crosses(number):
                sent.append(self.comm.send(passed, "pp", self.schedule.placement[number + 1]))
        for handle in sent:
            handle.wait()
        return losses

    def room(self, stage: Transformer, batch: Batch) -> Tensor:
        """An empty residual stream of this rank for `batch`."""
        rows, length = batch.tokens.shape
        tokens, hidden = rows * length // self.comm.mesh.size("cp"), stage.config.hidden
        shape = (tokens // stage.tp.size, hidden) if stage.tp.sp else (rows, tokens // rows, hidden)
        return torch.empty(shape, dtype=self.compute, device=next(stage.parameters()).device)
