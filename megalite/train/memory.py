"""How much memory a training process will need, by arithmetic alone: said before the first allocation can fail.

Counts what is alive at the peak, which is the moment the last microbatch's loss has run and its backward begins:
weights, gradients of the microbatches before, optimizer state, every layer's kept activations, and the largest
transient; or the end of backward, where gradients alone take more. Follows the ops of megalite_kernels; a test
compares the activation part with what autograd really keeps.
"""

import ctypes
import resource
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from megalite_kernels.capability import emulate_bf16_on_cpu
from megalite_kernels.loss import CHUNK_LOGITS, CHUNK_ROWS, GPU_CHUNK_LOGITS

from megalite.config.schema import Config, ModelConfig
from megalite.model.size import (
    ParameterCounts,
    expert_ffn,
    gated,
    head_dim,
    kv_heads,
    latent,
    moe_layers,
    parameter_counts,
    query_dim,
    rotary_dim,
    value_dim,
)
from megalite.precision import Precision

COMPILER_BYTES = 0.15e9 + (0.073e9 if find_spec("triton") else 0.0)
"""PyTorch's compiler, with Triton where it is installed: train.compile takes it, and so does FSDP2."""
PROCESS_BYTES = {"cpu": 0.365e9, "cuda": 0.0}
"""Interpreter, libraries and allocator reserve of a CPU process (resident after imports); CUDA counts tensors alone."""

PRODUCTS_BYTES = 0.3e9
"""Half-precision products that oneDNN has compiled and keeps, up to 1,024, where experts make their sizes many."""

SPANS = 8
"""Bytes a token: the first and the last key that its query sees."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one process. `late`: gradients take none of them until backward gives activations' back; `end`: what is
    there beside all of them, when backward ends or the optimizer runs."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    transient: float
    process: float = 0.0
    late: bool = False
    end: float = 0.0

    @property
    def total(self) -> float:
        passing = self.activations + self.transient
        forward = passing if self.late else self.gradients + passing
        return self.weights + self.optimizer + self.process + max(forward, self.gradients + self.end)


@dataclass(frozen=True)
class Share:
    """What one rank has of a job: `parameters` of its stages; `kept_layers`: blocks (those of multi-token modules too)
    whose activations wait for backward at once, summed over microbatches in flight; `last`: whether it computes the
    loss; `replicas`: ranks that ZeRO shares over; `experts` of the parameters have replicas of their own;
    `microbatches` of a step."""

    parameters: int
    kept_layers: float
    last: bool = True
    replicas: int = 1
    experts: int = 0
    expert_replicas: int = 1
    microbatches: int = 1

    def left(self, shared: bool) -> float:
        """Parameters of which this rank keeps something that ZeRO has `shared` out, or not."""
        if not shared:
            return self.parameters
        return (self.parameters - self.experts) / self.replicas + self.experts / self.expert_replicas


def whole(config: Config, vocab: int) -> Share:
    """The share of a process that holds the whole model."""
    positions = config.model.max_positions or config.data.sequence_length
    microbatches = config.train.global_batch // config.train.micro_batch
    parameters, layers = parameter_counts(config.model, vocab, positions).total, config.model.layers + config.model.mtp
    return Share(parameters, layers, microbatches=microbatches)


def predict(
    config: Config,
    vocab: int,
    precision: Precision,
    device: str = "cpu",
    share: Share | None = None,
) -> Memory:
    """Memory of a process with that share of the job (default: of one that holds the whole model).

    `device`: cpu or cuda.
    """
    compute, main = precision.compute, precision.main
    share, parallel = share or whole(config, vocab), config.parallel
    model, tokens = config.model, config.train.micro_batch * config.data.sequence_length // parallel.cp
    counts = parameter_counts(model, vocab, model.max_positions or config.data.sequence_length)
    states, sums, weights = (share.left(parallel.zero >= stage) for stage in (1, 2, 3))
    shards_weights = parallel.zero == 3 and share.replicas > 1
    second = 0.0 if config.optim.name == "sgd" else 1.0
    if config.optim.name == "muon":  # matrices keep one moment, everything else AdamW's two
        second = 1 - (counts.matrices + counts.experts) / counts.total
    moments = precision.moment_bytes(0) + second * precision.moment_bytes(1)
    copies = 0 if compute == main else main.itemsize
    layer = kept_per_token(model, compute.itemsize, config.recompute.mode, parallel.tp, parallel.sp, parallel.etp)
    kept = share.kept_layers * layer
    ends = 2 * model.hidden * compute.itemsize + 3 * 8  # final norm's input and output; tokens, targets
    if model.position == "rope":
        ends += (2 if model.mtp else 1) * 2 * 4 * rotary_dim(model)  # float32 tables that all layers share
    if share.last:
        kept += model.mtp * _module_kept(model, compute.itemsize, parallel.tp if parallel.sp else 1)
    compiler = config.train.compile or shards_weights
    native = compute.itemsize == 2 and config.precision.fp8 == "none" and not emulate_bf16_on_cpu()
    products = PRODUCTS_BYTES * (device == "cpu" and moe_layers(model) > 0 and native)
    in_fp8 = _fp8_copies(config) * (counts.matrices + counts.experts) / counts.total
    held = weights * main.itemsize if shards_weights else share.parameters * (compute.itemsize + in_fp8)
    return Memory(
        weights=held,
        gradients=sums * precision.accumulate.itemsize,
        optimizer=states * (copies * (not shards_weights) + moments),
        activations=tokens * (kept + ends),
        transient=_transient(config, -(-vocab // parallel.tp), tokens, compute, share.last, device == "cuda"),
        process=PROCESS_BYTES.get(device, 0.0) + COMPILER_BYTES * (compiler and device == "cpu") + products,
        end=_end(config, -(-vocab // parallel.tp), tokens, compute, sums * precision.accumulate.itemsize, counts),
        late=share.microbatches == 1 and parallel.zero < 2 and config.train.deterministic != "layout",
    )


def _end(
    config: Config, vocab: int, tokens: int, compute: torch.dtype, gradients: float, counts: ParameterCounts
) -> float:
    """The first layer's activations while backward goes through it, then the embedding's gradient before it is added
    (and the head's before it, where they are one); Muon's momenta and updates of matrices."""
    model, parallel, mode = config.model, config.parallel, config.recompute.mode
    layer = tokens * kept_per_token(
        model, compute.itemsize, "none" if mode == "full" else mode, parallel.tp, parallel.sp, parallel.etp
    )
    embedding = (1 + model.tied_embeddings) * vocab * model.hidden * compute.itemsize
    matrices = (counts.matrices + counts.experts) / counts.total
    return max(layer, embedding, 2 * gradients * matrices * (config.optim.name == "muon"))


def _fp8_copies(config: Config) -> float:
    """Bytes that a step keeps of a number of the blocks' matrices: in FP8 as it is, and transposed."""
    return (
        2 * (config.precision.fp8 not in ("none", "nvfp4")) * (1 - sum(config.precision.fp8_skip) / config.model.layers)
    )


def kept_per_token(model: ModelConfig, size: int, recompute: str, tp: int = 1, sp: bool = False, etp: int = 1) -> float:
    """Bytes that one layer keeps for backward, a token; `size`: bytes of an activation element.

    The residual stream before each sublayer, each projection's input (unless norms give it again), queries, keys and
    values after RoPE, the MLP's inner values; float32 statistics of norms and attention.
    """
    hidden, stream = model.hidden, model.hidden / (tp if sp else 1)  # the residual stream is spread with sp only
    again = recompute in ("activation", "selective")
    if recompute == "full":
        return stream * size
    heads = model.heads / tp
    before, after = model.norm_place != "post", model.norm_place != "pre"
    statistics = 8 if model.norm == "layernorm" else 4
    elements, other = (_latent_attention_kept if latent(model) else _attention_kept)(model, tp, tp if sp else 1)
    elements += hidden + 2 * stream * (before + after)  # the MLP's input; a norm keeps its own
    if again and before and stream == hidden:  # both sublayers' inputs, which the norms give again
        elements -= 2 * hidden
    other += 2 * statistics * (before + after) + SPANS
    sparse = moe_layers(model) / model.layers
    inner = (1 - sparse) * _mlp_kept(model, model.ffn, again) / tp
    if sparse:
        routed, notes = _experts_kept(model, size, again, tp, etp)
        inner, other = inner + sparse * routed, other + sparse * notes
    attention_statistics: float = 4 * heads
    if model.attention_sinks:  # what the sinks take their share of
        attention_statistics += heads * (4 + value_dim(model) * size)
    if recompute == "selective":
        attention_statistics = 0
    return (elements + inner) * size + other + attention_statistics


def _module_kept(model: ModelConfig, size: int, spread: int) -> float:
    """Bytes that a multi-token module keeps a token, without its block: the embedding, both norms' outputs joined, the
    final norm's input and output; statistics, tokens and targets."""
    statistics = 8 if model.norm == "layernorm" else 4
    return (5 * model.hidden * size + 3 * statistics) / spread + 2 * 8


def _attention_kept(model: ModelConfig, tp: int, spread: int) -> tuple[float, float]:
    """Elements: the input of the projections; q, k, v and the heads' output. Bytes: of the head norms' statistics."""
    heads, key_heads = model.heads / tp, max(1.0, kv_heads(model) / tp)
    queries, keys = heads * head_dim(model), key_heads * head_dim(model)
    elements, statistics = model.hidden + 2 * queries + 2 * keys, 0.0
    if model.qk_norm:
        elements, statistics = elements + queries + keys, 4 * (heads + key_heads)
    return elements, statistics


def _latent_attention_kept(model: ModelConfig, tp: int, spread: int) -> tuple[float, float]:
    """The same: the latents before their norms on this rank's tokens of the residual stream (all, / `spread`), and
    behind them on all."""
    mla, each = model.mla, 2 * (query_dim(model) + value_dim(model))
    elements = (model.hidden + mla.kv_rank) / spread + mla.kv_rank + mla.rope_dim + model.heads / tp * each
    if mla.q_rank:
        return elements + mla.q_rank / spread + mla.q_rank, 8 / spread
    return elements + model.hidden * (spread > 1), 4 / spread


def _mlp_kept(model: ModelConfig, ffn: int, again: bool) -> float:
    """Elements: what the activation reads, and what it hands to the down projection unless that is computed `again`."""
    kept = 3 if gated(model) or model.activation == "relu2" else 2  # relu2: max(x, 0) is kept by the square besides
    return (kept - again) * ffn


def _experts_kept(model: ModelConfig, size: int, again: bool, tp: int, etp: int) -> tuple[float, float]:
    """Elements: rows as experts get them and give them back, and their inner values; the shared expert's. Bytes: of
    the router's input and scores, in its own precision, and its choice. With an even load, whatever ep is."""
    moe, wide = model.moe, max(size, 8 if model.moe.router_dtype == "fp64" else 4)
    rows = moe.top_k / tp * (2 * model.hidden * etp + _mlp_kept(model, expert_ffn(model), again))
    scores = 1 + bool(moe.aux_loss) + bool(moe.z_loss)
    notes = (wide > size) * model.hidden * wide + scores * moe.experts * wide + moe.top_k * (8 + 4 + 2 * wide)
    return rows + _mlp_kept(model, moe.shared_ffn, again) / tp, notes / tp


def _transient(config: Config, vocab: int, tokens: int, compute: torch.dtype, last: bool, on_gpu: bool) -> float:
    """The widest moment beyond what is kept: the loss with its gradients, or a layer computed again."""
    model, parallel = config.model, config.parallel
    gradients = (tokens + vocab) * model.hidden * 4  # of the last hidden states and of the head, float32
    logits, size = (GPU_CHUNK_LOGITS, compute.itemsize) if on_gpu else (CHUNK_LOGITS, 4)
    chunk = min(tokens, max(CHUNK_ROWS, logits // vocab)) * vocab * size
    chunk += vocab * model.hidden * compute.itemsize * on_gpu  # of the head's gradient, before it is added
    handed_on = (tokens + vocab) * model.hidden * compute.itemsize
    again = 0.0
    if config.recompute.mode == "full":
        again = tokens * kept_per_token(model, compute.itemsize, "none", parallel.tp, parallel.sp, parallel.etp)
    return max(((1 + model.mtp) * gradients + max(chunk, handed_on)) * last, again)


def begin_measuring(device: torch.device) -> None:
    """Forget the peak so far and hand back what is freed: tokenizing a corpus leaves more than training may need."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):  # not glibc, not Linux: the peak is the process's own
        return


def measured_memory(device: torch.device) -> int:
    """Peak bytes this process has used on `device` since `begin_measuring` (of the CPU: resident)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):  # not Linux: there a launcher's own peak may be counted in
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
