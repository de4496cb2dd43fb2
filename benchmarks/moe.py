"""An MoE layer beside transformers' (Mixtral's, each of its experts' implementations) and a dense layer of equal FLOPs.

    python benchmarks/moe.py [rounds=5] [threads=1] [precision=fp32,bf16] [experts=8,64,128] [top_k=1,2,8] [tokens=2048]

Router, dispatch, experts and combine of one layer (hidden 384, experts 512 wide, SwiGLU), forward and backward into
input and weights. The dense layer is an MLP as wide as a token's experts together, so that it computes as much. All
take turns in every round; tokens a second are of processor time, so that other guests of the machine count little, and
a ratio is taken within a round: above 1 ours is faster. All run with freed memory kept (`tune_allocator`).
"""

import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megalite_kernels import tune_allocator
from peers.options import given
from torch import Tensor, nn

from megalite.config import schema
from megalite.config.schema import ModelConfig, MoEConfig
from megalite.model.attention import Context
from megalite.model.mlp import MLP
from megalite.model.moe import MoE
from megalite.parallel.parameter import materialize

HIDDEN, FFN = 384, 512
THEIRS = ("eager", "batched_mm", "grouped_mm")
SLOW_S = 5.0
"""Whoever needs longer for a step has one turn."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(kw_only=True)
class Options:
    rounds: int = schema.key(5, "Turns of each.", minimum=1)
    threads: int = schema.key(1, "Threads.", minimum=1)
    precision: list[str] = schema.key(["fp32", "bf16"], "Precisions.", choices=("fp32", "bf16"))
    experts: list[int] = schema.key([8, 64, 128], "Numbers of experts.")
    top_k: list[int] = schema.key([1, 2, 8], "Experts a token.")
    tokens: int = schema.key(2048, "Tokens of a step.", minimum=1)


Step = Callable[[], object]


def both_ways(run: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], x: Tensor) -> Step:
    upstream = torch.randn_like(x)

    def step() -> None:
        torch.autograd.grad(run(x), [x, *parameters], upstream)

    return step


def ours(experts: int, top_k: int, x: Tensor) -> Step:
    config = ModelConfig(hidden=HIDDEN, heads=6, ffn=FFN, moe=MoEConfig(experts=experts, top_k=top_k))
    with torch.device("meta"):
        layer = MoE(config, 0, 0.02)
    materialize(layer, x.device, 0, x.dtype)
    context = Context(1, torch.zeros(1, x.shape[1], dtype=torch.int64), None, None, None, None)
    return both_ways(lambda x: layer(x, context), list(layer.parameters()), x)


def dense(_: int, top_k: int, x: Tensor) -> Step:
    config = ModelConfig(hidden=HIDDEN, heads=6)
    with torch.device("meta"):
        layer = MLP(config, 0.02, FFN * top_k)
    materialize(layer, x.device, 0, x.dtype)
    return both_ways(layer, list(layer.parameters()), x)


def theirs(implementation: str) -> Callable[[int, int, Tensor], Step]:
    def make(experts: int, top_k: int, x: Tensor) -> Step:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        config = MixtralConfig(
            hidden_size=HIDDEN, intermediate_size=FFN, num_local_experts=experts, num_experts_per_tok=top_k,
        )  # fmt: skip
        config._experts_implementation = implementation
        layer = MixtralSparseMoeBlock(config).to(x.dtype)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, 0.0, 0.02)

        def run(x: Tensor) -> Tensor:
            y = layer(x)
            out: Tensor = y[0] if isinstance(y, tuple) else y
            return out

        return both_ways(run, list(layer.parameters()), x)

    return make


LAYERS: dict[str, Callable[[int, int, Tensor], Step]] = {
    "megalite": ours,
    "dense, equal FLOPs": dense,
    **{f"transformers {name}": theirs(name) for name in THEIRS},
}


def race(options: Options, experts: int, top_k: int, dtype: torch.dtype) -> None:
    x = torch.randn(1, options.tokens, HIDDEN, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    steps: dict[str, Step] = {}
    failures: dict[str, str] = {}
    for name, make in LAYERS.items():
        try:
            steps[name] = make(experts, top_k, x)
            started = time.process_time()
            steps[name]()
            if time.process_time() - started > SLOW_S:
                failures[name] = f"{options.tokens / (time.process_time() - started):,.0f} in its only turn"
                del steps[name]
        except (ImportError, RuntimeError, NotImplementedError, MemoryError) as error:
            steps.pop(name, None)
            failures[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            started = time.process_time()
            step()
            taken[name].append(time.process_time() - started)
    for name in LAYERS:
        if name in failures:
            print(f"  {name:26}{failures[name]}")
            continue
        speed = options.tokens / statistics.median(taken[name])
        ratios = [theirs_s / ours_s for theirs_s, ours_s in zip(taken[name], taken["megalite"], strict=True)]
        ratio = "" if name == "megalite" else f"{statistics.median(ratios):8.2f}  {min(ratios):.2f}-{max(ratios):.2f}"
        print(f"  {name:26}{speed:12,.0f}{ratio}", flush=True)


def main() -> None:
    options = given(Options, __doc__)
    # Who wants more memory than there is (batched_mm, a copy of its experts a token) fails alone and at once.
    most = int(0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    torch.set_num_threads(options.threads)
    tune_allocator()
    for precision in options.precision:
        for experts in options.experts:
            for top_k in options.top_k:
                print(f"{precision}, {experts} experts, top {top_k}: tokens/cpu-s, ours faster by (median, range)")
                race(options, experts, top_k, DTYPES[precision])


if __name__ == "__main__":
    main()
