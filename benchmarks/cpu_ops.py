"""Each op of the quickstart's step on a CPU: megalite_kernels beside plain PyTorch, eager and under torch.compile.

    python benchmarks/cpu_ops.py [rounds=15] [threads=1] [seconds=0.1] [ops=swiglu,rope]

Shapes are those of configs/experiment/quickstart.yaml on one of its two processes; float32; forward and backward
together, the optimizer's step alone. Milliseconds are of processor time, so that other guests of the machine count
little. The three take turns in every round; a ratio is taken within a round, and is above 1 where ours takes less.
Compiling is not counted. All three run with freed memory kept (`tune_allocator`), as a training run does.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import megalite_kernels as kernels
import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.config import schema
from megalite.config.options import HelpRequested, parse_options

BATCH, LENGTH, HIDDEN, HEADS, KV_HEADS, FFN, VOCAB, LAYERS = 4, 256, 192, 4, 2, 512, 4096, 4
DIM, TOKENS = HIDDEN // HEADS, BATCH * LENGTH


@dataclass(kw_only=True)
class Options:
    rounds: int = schema.key(15, "Turns of the three.", minimum=1)
    threads: int = schema.key(1, "Threads of each.", minimum=1)
    seconds: float = schema.key(0.1, "Processor time of a turn, about.", minimum=0.001)
    ops: str = schema.key("all", "Which of them, with commas between.")


Step = Callable[[], object]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def both_ways(op: Callable[..., Tensor], *inputs: Tensor) -> Step:
    """Forward, and backward from a fixed gradient into all inputs that want one."""
    upstream = torch.randn(op(*inputs).shape)
    wanted = [x for x in inputs if x.requires_grad]

    def step() -> None:
        torch.autograd.grad(op(*inputs), wanted, upstream)

    return step


def three(ours: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> list[Step]:
    return [both_ways(op, *inputs) for op in (plain, torch.compile(plain, dynamic=False), ours)]


def attention() -> list[Step]:
    inputs = (randn(BATCH, LENGTH, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))

    def plain(*x_BSHD: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in x_BSHD)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return three(lambda *x: kernels.attention(*x, scale=DIM**-0.5), plain, *inputs)


def linear_cross_entropy() -> list[Step]:
    targets = torch.randint(0, VOCAB, (TOKENS,))
    return three(
        lambda h, w: kernels.linear_cross_entropy(h, w, targets)[0],
        lambda h, w: F.cross_entropy(h @ w.T, targets, reduction="sum"),
        randn(TOKENS, HIDDEN),
        randn(VOCAB, HIDDEN),
    )


def rms_norm() -> list[Step]:
    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight

    return three(lambda x, w: kernels.rms_norm(x, w, 1e-6), plain, randn(BATCH, LENGTH, HIDDEN), randn(HIDDEN))


def swiglu() -> list[Step]:
    sides = (randn(BATCH, LENGTH, FFN) for _ in range(2))
    return three(kernels.swiglu, lambda gate, up: F.silu(gate) * up, *sides)


def rope() -> list[Step]:
    angle = torch.outer(torch.arange(LENGTH), 1e4 ** -torch.arange(0, 1, 2 / DIM)).repeat(1, 2).expand(BATCH, -1, -1)
    cos, sin = angle.cos().contiguous(), angle.sin().contiguous()

    def plain(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, :, None] + torch.cat((-second, first), dim=-1) * sin[:, :, None]

    return three(lambda x: kernels.apply_rope(x, cos, sin), plain, randn(BATCH, LENGTH, HEADS, DIM))


def embedding() -> list[Step]:
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH))
    return three(lambda w: kernels.embedding(tokens, w), lambda w: F.embedding(tokens, w), randn(VOCAB, HIDDEN))


def adamw() -> list[Step]:
    """All weights of the model, though the quickstart gives its matrices to Muon."""
    kv = DIM * KV_HEADS
    layer = [(HIDDEN, HIDDEN), (kv, HIDDEN), (kv, HIDDEN), (HIDDEN, HIDDEN), *[(FFN, HIDDEN)] * 2, (HIDDEN, FFN)]
    shapes = [(VOCAB, HIDDEN), (HIDDEN,), *([*layer, (HIDDEN,), (HIDDEN,), (DIM,), (DIM,)] * LAYERS)]

    def optimizer(**how: bool) -> torch.optim.AdamW:
        params = [randn(*shape) for shape in shapes]
        for param in params:
            param.grad = torch.randn_like(param)
        made = torch.optim.AdamW(params, 1e-3, weight_decay=0.1, **how)
        made.step()
        return made

    return [optimizer().step, torch.compile(optimizer(foreach=True).step), optimizer(fused=True).step]


OPS: dict[str, Callable[[], list[Step]]] = {
    op.__name__: op for op in (attention, linear_cross_entropy, adamw, rms_norm, swiglu, rope, embedding)
}


def processor_time(step: Step, count: int) -> float:
    started = time.process_time()
    for _ in range(count):
        step()
    return (time.process_time() - started) / count


def main() -> None:
    options = parse_options(Options, sys.argv[1:], __doc__ or "")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    kernels.tune_allocator()
    names = list(OPS) if options.ops == "all" else options.ops.split(",")
    if not OPS.keys() >= set(names):
        sys.exit(f"ops={options.ops}: there are {', '.join(OPS)}")
    print(f"{'ms of processor time':22}{'eager':>10}{'compiled':>10}{'ours':>10}", end="")
    print(f"{'eager/ours':>24}{'compiled/ours':>24}")
    for name in names:
        steps = OPS[name]()
        for step in steps * 3:  # compiles, and touches all memory
            step()
        counts = [max(1, round(options.seconds / max(processor_time(step, 3), 1e-6))) for step in steps]
        rounds = [
            [processor_time(step, n) for step, n in zip(steps, counts, strict=True)] for _ in range(options.rounds)
        ]
        cells = "".join(f"{statistics.median(column) * 1e3:10.3f}" for column in zip(*rounds, strict=True))
        for other in (0, 1):
            ratios = [turn[other] / turn[2] for turn in rounds]
            cells += f"{statistics.median(ratios):10.2f} ({min(ratios):.2f} to {max(ratios):.2f})".rjust(24)
        print(f"{name:22}{cells}")


if __name__ == "__main__":
    try:
        main()
    except HelpRequested as text:
        print(text)
