"""Several stages on one rank: the same step as one stage, also for fewer microbatches than the schedule's own."""

import pytest
import torch

from megalite.comm import Communicator
from megalite.mesh import AXES, Mesh
from megalite.pipeline.runtime import Pipeline
from megalite.precision import PRESETS
from megalite.train import build
from tests.parity.layouts import VOCAB, Layout, Task, configuration, global_batch, microbatches


def sums_of_one_microbatch(chunks: int, schedule: str) -> torch.Tensor:
    config = configuration(Layout(chunks=chunks, schedule=schedule), Task(layers=4))
    comm = Communicator(Mesh(dict.fromkeys(AXES, 1)))
    made = build.make_schedule(config, comm.mesh)
    stages = build.make_stages(config, comm, VOCAB, made.placement, PRESETS["fp64"], torch.device("cpu"))
    gradients = build.make_gradients(config, comm, stages, PRESETS["fp64"])
    pipeline = Pipeline(stages, made, comm, gradients, z_loss=0.0).shortened(1)
    batches = microbatches(global_batch(1, packed=True), comm.mesh)[:1]
    return torch.cat([pipeline.train(batches, 1.0)[0], gradients.global_norm()[None]])


@pytest.mark.parametrize(("chunks", "schedule"), [(2, "interleaved"), (2, "zbv"), (4, "looped_bfs")])
def test_a_dry_run_of_several_stages_on_one_rank(chunks: int, schedule: str) -> None:
    torch.testing.assert_close(sums_of_one_microbatch(chunks, schedule), sums_of_one_microbatch(1, "1f1b"))
