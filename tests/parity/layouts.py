"""The engine on any layout and on one process, in float64, over the same global batch: what the parity tests compare.

The batch is packed documents with unequal numbers of valid tokens in every sample, some microbatches without any. A
rank returns its parts of gradients and weights with the boxes they fill; `joined` puts the logical tensors together
here, so the engine's own gathering is not what is trusted.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import torch
from megalite_kernels import loss

from megalite.comm import Call, Communicator
from megalite.config.rules import Job
from megalite.config.schema import Config, MLAConfig, ModelConfig, MoEConfig, OptimConfig
from megalite.config.validate import violations
from megalite.data.batch import Batch
from megalite.mesh import Mesh
from megalite.optim.optimizer import Optimizer
from megalite.parallel.parameter import declared_parameters, local, placement
from megalite.pipeline.runtime import Pipeline
from megalite.precision import choose_precision
from megalite.train import build
from megalite.train.balance import Balance
from megalite.train.fp8_steps import Fp8Steps
from tests.ranks import joined_world, run_ranks
from tests.thread_ranks import run_threads

VOCAB, SEQUENCE, SAMPLES = 37, 16, 8
PATIENCE_S = 120.0
USUAL_CHUNKS = (loss.CHUNK_LOGITS, loss.CHUNK_ROWS)


@dataclass(frozen=True)
class Layout:
    """One composition; the names are those of the configuration."""

    dp: int = 1
    tp: int = 1
    sp: bool = False
    cp: int = 1
    cp_kind: str = "ring"
    pp: int = 1
    chunks: int = 1
    schedule: str = "1f1b"
    zero: int = 0
    shard_ranks: int = 0
    order: str = "pp,dp,cp,tp"
    overlap: bool = False
    ep: int = 1
    etp: int = 1
    layers: str | None = None
    dispatcher: str = "all_to_all"
    node_ranks: int = 0

    @property
    def world(self) -> int:
        return self.dp * self.tp * self.cp * self.pp

    def __str__(self) -> str:
        said = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return " ".join(f"{name}={value}" for name, value in said) or "one process"


MODELS = {
    "tied": ModelConfig(layers=2, hidden=16, heads=4, kv_heads=2, ffn=24, qk_norm=True, tied_embeddings=True),
    "untied": ModelConfig(layers=2, hidden=16, heads=4, kv_heads=2, ffn=24, qk_norm=True),
    "one kv head": ModelConfig(layers=2, hidden=16, heads=4, kv_heads=1, ffn=24, qk_norm=True, tied_embeddings=True),
    "gpt2": ModelConfig(
        layers=2, hidden=16, heads=4, ffn=24, position="learned", norm="layernorm", activation="gelu", qkv_bias=True,
        output_bias=True, mlp_bias=True, tied_embeddings=True,
    ),
    "gemma": ModelConfig(
        layers=2, hidden=16, heads=4, kv_heads=2, ffn=24, norm_place="sandwich", norm_zero_centered=True,
        activation="geglu", embedding_scale=4.0, attention_softcap=5.0, logit_softcap=3.0, window=5, window_pattern=2,
        tied_embeddings=True,
    ),
    "sinks": ModelConfig(
        layers=2, hidden=16, heads=4, kv_heads=2, ffn=24, qkv_bias=True, output_bias=True, attention_sinks=True,
        window=5, window_pattern=2,
    ),
    "experts": ModelConfig(
        layers=2, hidden=16, heads=4, kv_heads=2, ffn=24, tied_embeddings=True,
        moe=MoEConfig(experts=8, top_k=2, ffn=12, aux_loss=0.1, z_loss=0.01, bias_rate=0.01),
    ),
    "deepseek": ModelConfig(
        layers=2, hidden=16, heads=4, kv_heads=2, ffn=24, qk_norm=True,
        moe=MoEConfig(
            experts=8, top_k=3, ffn=8, shared_ffn=12, shared_gate=True, dense_layers=1, router="sigmoid", scale=2.5,
            groups=4, top_groups=2, bias_rate=0.05, aux_loss=0.1, aux_scope="sequence",
        ),
    ),
    "gpt-oss": ModelConfig(
        layers=2, hidden=16, heads=4, kv_heads=2, ffn=24, activation="swiglu_clamped", qkv_bias=True, output_bias=True,
        mlp_bias=True, tied_embeddings=True, attention_sinks=True, window=5, window_pattern=2,
        moe=MoEConfig(
            experts=4, top_k=2, ffn=16, router_bias=True, aux_loss=0.1, aux_scope="global", jitter=0.05,
        ),
    ),
    "dropping": ModelConfig(
        layers=2, hidden=16, heads=4, kv_heads=2, ffn=24, tied_embeddings=True,
        moe=MoEConfig(experts=4, top_k=2, ffn=16, capacity=0.9, aux_loss=0.1, pad=True),
    ),
    "expert choice": ModelConfig(
        layers=2, hidden=16, heads=4, kv_heads=2, ffn=24, tied_embeddings=True,
        moe=MoEConfig(experts=4, top_k=2, ffn=16, router="expert_choice", z_loss=0.1),
    ),
    "sinkhorn": ModelConfig(
        layers=2, hidden=16, heads=4, kv_heads=2, ffn=24, tied_embeddings=True,
        moe=MoEConfig(experts=4, top_k=1, ffn=16, router="sinkhorn", capacity=1.1, drop="position"),
    ),
    "mla": ModelConfig(
        layers=2, hidden=16, heads=4, head_dim=3, ffn=24,
        mla=MLAConfig(kv_rank=6, q_rank=10, rope_dim=4, value_dim=5), attention_sinks=True, tied_embeddings=True,
    ),
    "mla, queries whole": ModelConfig(layers=2, hidden=16, heads=4, ffn=24, mla=MLAConfig(kv_rank=6, rope_dim=2)),
    "deepseek-v3": ModelConfig(
        layers=2, hidden=16, heads=4, head_dim=3, ffn=24, mtp=1, mla=MLAConfig(kv_rank=6, q_rank=10, rope_dim=4),
        moe=MoEConfig(
            experts=4, top_k=2, ffn=8, shared_ffn=12, dense_layers=1, router="sigmoid", scale=2.5, groups=2,
            bias_rate=0.05, aux_loss=0.1, aux_scope="sequence",
        ),
    ),
    "mtp": ModelConfig(layers=2, hidden=16, heads=4, kv_heads=2, ffn=24, qk_norm=True, mtp=2, window=6),
    "eight heads": ModelConfig(layers=2, hidden=32, heads=8, kv_heads=4, ffn=24, qk_norm=True, tied_embeddings=True),
}  # fmt: skip
WIDE = "eight heads"
"""For what four heads are too few for."""
SPARSE = tuple(name for name, model in MODELS.items() if model.moe.experts)
DENSE = tuple(name for name in MODELS if name not in (*SPARSE, WIDE))
"""Models with experts, and without."""

OPTIMIZERS = {
    "sgd": OptimConfig(name="sgd", lr=0.1, momentum=0.9, clip=0.0, schedule="constant"),
    # Its default eps would blow the rounding of a gradient that is zero in mathematics up to a visible update.
    "adamw": OptimConfig(name="adamw", lr=0.01, eps=1e-4, clip=0.05, schedule="constant"),
    "muon": OptimConfig(name="muon", lr=0.01, eps=1e-4, clip=0.0, schedule="constant"),
}


@dataclass(frozen=True)
class Task:
    """What is trained besides the layout. `packed`: several documents a row. `micro`, `samples`: rows of a microbatch,
    and of all of a step."""

    model: str = "tied"
    optim: str = "sgd"
    steps: int = 5
    layers: int = 0
    packed: bool = True
    micro: int = 1
    samples: int = SAMPLES
    z_loss: float = 0.01
    recompute: str = "activation"
    recompute_layers: int = 1
    offload: bool = False
    bucket_mb: float = 0.002
    deterministic: str = "true"
    precision: str = "fp64"
    fp8: str = "none"
    states: str = "auto"
    communicate: str = "auto"
    fp8_dispatch: bool = False
    loss_scale: float = 1.0
    check: bool = False
    chunk_rows: int = 0
    """Rows of a chunk of the loss; 0: as many as the engine takes, which is all of so few."""


def configuration(layout: Layout, task: Task) -> Config:
    config = Config()
    for field in fields(layout):
        setattr(config.parallel, field.name, getattr(layout, field.name))
    config.parallel.bucket_mb = task.bucket_mb
    layers = max(2, layout.pp * layout.chunks, task.layers)
    config.model = replace(MODELS[task.model], vocab=VOCAB, init_std=0.2, layers=layers)
    config.optim = replace(OPTIMIZERS[task.optim])
    config.data.sequence_length = SEQUENCE
    config.train.micro_batch, config.train.global_batch, config.train.z_loss = task.micro, task.samples, task.z_loss
    config.train.steps, config.train.seed, config.train.deterministic = task.steps, 3, task.deterministic
    config.recompute.mode, config.recompute.layers = task.recompute, task.recompute_layers
    config.recompute.offload, config.precision.name = task.offload, task.precision
    config.precision.fp8, config.precision.states = task.fp8, task.states
    config.precision.communicate = task.communicate
    config.precision.fp8_dispatch = task.fp8_dispatch
    return config


def global_batch(step: int, packed: bool, samples: int = SAMPLES) -> Batch:
    """[samples, SEQUENCE]: sample i has 2·i targets less than the sequence is long; samples 2, 3 and 5 have none, so
    that a microbatch of two rows may have none either."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (SAMPLES, SEQUENCE), generator=generator)
    targets = torch.randint(VOCAB, (SAMPLES, SEQUENCE), generator=generator)
    documents = (torch.rand(SAMPLES, SEQUENCE, generator=generator) < 0.2).int().cumsum(1).int()
    for row in range(SAMPLES):
        targets[row, torch.randperm(SEQUENCE, generator=generator)[: 2 * row]] = -100
    targets[[2, 3, 5]] = -100
    return Batch(tokens[:samples], targets[:samples], documents[:samples] if packed else None)


def further_targets(batch: Batch, depths: int) -> list[float]:
    """How many targets the multi-token modules of depth 1 to `depths` have in a global batch."""
    counts = []
    for depth in range(1, depths + 1):
        valid = batch.targets[:, depth:] >= 0
        if batch.documents is not None:
            valid &= batch.documents[:, depth:] == batch.documents[:, :-depth]
        counts.append(float(valid.sum()))
    return counts


def microbatches(batch: Batch, mesh: Mesh, micro: int = 1) -> list[Batch]:
    """Microbatch n belongs to dp rank n modulo dp, as the trainer shares them out."""
    parts = (None if x is None else x.split(micro) for x in (batch.tokens, batch.targets, batch.documents))
    tokens, targets, documents = (None if x is None else x[mesh.index("dp") :: mesh.size("dp")] for x in parts)
    assert tokens is not None
    assert targets is not None
    return [Batch(*of) for of in zip(tokens, targets, documents or [None] * len(tokens), strict=True)]


def train(layout: Layout, task: Task) -> dict[str, Any]:
    """What this rank ends up with."""
    world = joined_world()
    config = configuration(layout, task)
    loss.CHUNK_LOGITS, loss.CHUNK_ROWS = (0, task.chunk_rows) if task.chunk_rows else USUAL_CHUNKS
    calls: list[Call] = []
    comm = Communicator(build.make_mesh(config, world), ordered=task.deterministic == "layout", check=task.check)
    precision = choose_precision(config.precision, torch.device("cpu"))
    schedule = build.make_schedule(config, comm.mesh)
    stages = build.make_stages(config, comm, VOCAB, schedule.placement, precision, torch.device("cpu"))
    gradients = build.make_gradients(config, comm, stages, precision)
    pipeline = Pipeline(stages, schedule, comm, gradients, config.train.z_loss)
    optimizer = Optimizer(stages, gradients, config.optim, task.steps, precision, config.train.seed)
    balance, fp8 = (
        Balance(stages, comm, config.model),
        Fp8Steps(stages, comm, whole=not build.shards_weights(config, comm.mesh)),
    )
    initial = parts(stages, local)
    losses, norms, loads, first = [], [], [], {}
    for step in range(1, task.steps + 1):
        comm.record = calls.append if step == 2 else None
        batch = global_batch(step, task.packed, task.samples)
        valid = float((batch.targets >= 0).sum())
        gradients.zero()
        balance.begin()
        fp8.begin()
        ahead = further_targets(batch, config.model.mtp)
        with fp8.weights_kept():
            sums = pipeline.train(microbatches(batch, comm.mesh, task.micro), valid, ahead, task.loss_scale)
        gradients.finish()
        if task.loss_scale != 1.0:
            gradients.scale(1.0 / task.loss_scale)
        norm, routed = gradients.global_norm().item(), balance.measure()
        loads.append(routed.numpy())
        if step == 1:
            first = parts(stages, gradients.full, trained_only=True)
        if 0 < config.optim.clip < norm:
            gradients.scale(config.optim.clip / norm)
        optimizer.step(step)
        balance.update(routed)
        fp8.update(taken=True, rescaled=1.0)
        comm.record = None
        total = sums.sum(0) * (comm.mesh.index("tp") == 0)
        comm.all_reduce(total, "pp", "dp", "cp", "tp")
        further = sum(nll / count for nll, count in zip(total[2:].tolist(), ahead, strict=True))
        weight = config.model.mtp_weight / max(1, config.model.mtp)
        losses.append(((total[0] + task.z_loss * total[1]) / valid).item() + weight * further)
        norms.append(norm)
    optimizer.wait()
    return {
        "losses": losses,
        "norms": norms,
        "loads": loads,
        "initial": initial,
        "gradients": first,
        "weights": parts(stages, local),
        "calls": calls,
        "log": pipeline.log,
        "row": pipeline.row,
    }


def trained(
    layout: Layout, task: Task, function: Callable[..., Any] = train, *more: Any, threads: bool = False
) -> list[dict[str, Any]]:
    """What every rank ends up with. `function`: runs `train` on each rank, maybe otherwise. `threads`: ranks are not
    gloo processes but threads of this one; such a function must change nothing that they share."""
    arguments = (layout.world, function, layout, task, *more)
    ranks = _trained_on_threads(*arguments) if threads else run_ranks(*arguments, timeout=PATIENCE_S)
    assert all(rank["log"] == rank["row"] for rank in ranks), f"{layout}: what ran is not what the schedule says"
    return ranks


def _trained_on_threads(*arguments: Any) -> list[dict[str, Any]]:
    try:
        return run_threads(*arguments)
    finally:
        loss.CHUNK_LOGITS, loss.CHUNK_ROWS = USUAL_CHUNKS


@cache
def _one_process(task: Task) -> dict[str, Any]:
    return trained(Layout(), task, threads=True)[0]


def alone(layout: Layout, task: Task) -> dict[str, Any]:
    """One process with as many layers as `layout` has, and what does not matter there at its default."""
    layers = configuration(layout, task).model.layers
    return _one_process(replace(task, layers=layers, bucket_mb=Task.bucket_mb, check=False, micro=1, chunk_rows=0))


def parts(
    stages: list[Any], value: Callable[[Any], torch.Tensor], trained_only: bool = False
) -> dict[str, tuple[Any, ...]]:
    """name -> (logical shape, offsets, this rank's part as an array, which crosses a pipe as plain bytes)."""
    return {
        name: (declared.shape, placement(parameter).offsets, value(parameter).detach().double().clone().numpy())
        for name, parameter, declared in declared_parameters(stages)
        if parameter.requires_grad or not trained_only
    }


def joined(ranks: Sequence[dict[str, Any]], kind: str) -> dict[str, np.ndarray]:
    """The logical tensors of `kind`. Every rank that holds a part must hold the same one."""
    whole: dict[str, np.ndarray] = {}
    for rank, result in enumerate(ranks):
        for name, (shape, offsets, part) in result[kind].items():
            tensor = whole.setdefault(name, np.full(shape, np.nan))
            box = tensor[tuple(slice(o, o + n) for o, n in zip(offsets, part.shape, strict=True))]
            if not np.isnan(box).any():
                same = np.allclose(part, box, rtol=1e-12, atol=1e-15)
                assert same, f"{kind} of {name}: rank {rank} differs from those before it"
            box[...] = part
    return whole


def errors(ranks: Sequence[dict[str, Any]], expected: dict[str, Any]) -> dict[str, float]:
    """The worst relative difference from one process, by quantity; tensors by their norm. NaN where anything is."""
    found = {
        kind: _worst(
            abs(mine - theirs) / abs(theirs)
            for rank in ranks
            for mine, theirs in zip(rank[kind], expected[kind], strict=True)
        )
        for kind in ("losses", "norms")
    }
    for kind in ("gradients", "weights"):
        mine, theirs = joined(ranks, kind), joined([expected], kind)
        assert mine.keys() == theirs.keys(), f"parameters differ: {mine.keys() ^ theirs.keys()}"
        smallest = SMALLEST * max(np.linalg.norm(tensor) for tensor in theirs.values())
        found[kind] = _worst(
            np.linalg.norm(mine[name] - tensor) / max(np.linalg.norm(tensor), smallest)
            for name, tensor in theirs.items()
        )
    return found


SMALLEST = 1e-6
"""Of the largest tensor's norm: a gradient that is zero in mathematics (of a bias that softmax ignores) is rounding."""


def _worst(numbers: Iterable[float]) -> float:
    """The largest, or NaN where there is one (`max` would lose it)."""
    listed = list(map(float, numbers))
    return math.nan if any(map(math.isnan, listed)) else max(listed)


BOUNDS = {"losses": 1e-11, "norms": 1e-11, "gradients": 1e-9, "weights": 1e-8}


def wrong(ranks: Sequence[dict[str, Any]], expected: dict[str, Any]) -> list[str]:
    """What exceeds its bound; empty when the layout computes what one process computes."""
    return [f"{kind} {error:.2e}" for kind, error in errors(ranks, expected).items() if not error <= BOUNDS[kind]]


def legal(layout: Layout, task: Task | None = None) -> bool:
    return not violations(configuration(layout, task or Task()), layout.world)


def all_layouts(world: int, model: str = "tied") -> Iterator[Layout]:
    """Every composition of `world` ranks with every schedule, kind of context parallelism, and zero stage, that is
    legal for `model`.

    The gather overlapped with the product is a matter of tp alone: it is taken once with each set of axes.
    """
    factors = [n for n in range(1, world + 1) if world % n == 0]
    for dp, tp, cp, pp in product(factors, repeat=4):
        if dp * tp * cp * pp != world:
            continue
        schedules = [("1f1b", 1)] if pp == 1 else SCHEDULES
        kinds = ["ring"] if cp == 1 else ["ring", "ulysses"] if cp == 2 else ["ring", "ulysses", "hybrid"]
        for sp, kind, (schedule, chunks), zero in product(
            [False, True] if tp > 1 else [False], kinds, schedules, ZERO if dp * cp > 1 else [0]
        ):
            layout = Layout(dp, tp, sp, cp, kind, pp, chunks, schedule, zero)
            for overlap in [False, True] if sp and zero == 0 and schedule in ("1f1b", "zb_h1") else [False]:
                if legal(layout, Task(model)):
                    yield replace(layout, overlap=overlap)


ZERO = [0, 1, 2, 3]

SCHEDULES = [
    ("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("looped_bfs", 2), ("zb_h1", 1), ("zb_h2", 1), ("zb_auto", 1),
    ("zbv", 2), ("v_half", 2), ("dualpipev", 2),
]  # fmt: skip


def job(layout: Layout, task: Task) -> Job:
    return Job(configuration(layout, task), layout.world)
