"""How much memory a training process will need, by arithmetic alone: said before the first allocation can fail.

Counts what is alive at the peak, which is the moment the loss has run and backward begins: weights, gradients,
optimizer state, every layer's kept activations, and the largest transient. Follows the ops of megalite_kernels; a test
compares the activation part with what autograd really keeps.
"""

from dataclasses import dataclass, fields

import torch

from megalite.config.schema import Config, ModelConfig
from megalite.model.size import gated, head_dim, kv_heads, parameter_counts

PROCESS_BYTES = {"cpu": 0.36e9, "cuda": 0.0}
"""Interpreter, libraries and allocator reserve of a CPU process (resident after imports); CUDA counts tensors alone."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one process."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    transient: float
    process: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))


def predict(config: Config, vocab: int, compute: torch.dtype, main: torch.dtype, device: str = "cpu") -> Memory:
    """Memory of one unsharded process with parameters and activations in `compute`, gradients and moments in `main`."""
    model, tokens = config.model, config.train.micro_batch * config.data.sequence_length
    counts = parameter_counts(model, vocab, model.max_positions or config.data.sequence_length)
    moments: float = 1 if config.optim.name == "sgd" else 2
    if config.optim.name == "muon":  # matrices keep one moment, everything else AdamW's two
        moments = 2 - counts.matrices / counts.total
    copies = 0 if compute == main else main.itemsize
    kept = model.layers * kept_per_token(model, config.data.sequence_length, compute.itemsize, config.recompute.mode)
    ends = (2 * model.hidden) * compute.itemsize + 3 * 8  # final norm's input and output; tokens, targets, positions
    return Memory(
        weights=counts.total * compute.itemsize,
        gradients=counts.total * main.itemsize,
        optimizer=counts.total * (copies + moments * main.itemsize),
        activations=tokens * (kept + ends),
        transient=_transient(config, vocab, tokens, compute.itemsize),
        process=PROCESS_BYTES.get(device, 0.0),
    )


def predicted_memory(
    config: Config, vocab: int, compute: torch.dtype, main: torch.dtype, data_parallel: int = 1, device: str = "cpu"
) -> float:
    """The same in GB (1e9 bytes) for the run's header. Plain data parallelism keeps a whole copy on each rank."""
    del data_parallel
    return predict(config, vocab, compute, main, device).total / 1e9


def kept_per_token(model: ModelConfig, sequence: int, size: int, recompute: str) -> float:
    """Bytes that one layer keeps for backward, a token; `size`: bytes of an activation element."""
    hidden = model.hidden
    if recompute == "full":
        return hidden * size
    queries, keys = model.heads * head_dim(model), kv_heads(model) * head_dim(model)
    norms = {"pre": 2, "post": 2, "sandwich": 4}[model.norm_place]
    residuals, normed = 2 * hidden, norms * hidden
    attention = queries + 2 * keys + queries
    if model.qk_norm:
        attention += queries + keys
    inner = (3 if gated(model) else 2) * model.ffn
    if recompute == "selective":
        inner -= model.ffn
    statistics = 4 * (norms + model.heads)
    return (residuals + normed + attention + inner) * size + statistics


def _transient(config: Config, vocab: int, tokens: int, size: int) -> float:
    """The widest moment beyond what is kept: a layer computed again, or the loss's chunk of logits."""
    model = config.model
    logits = min(tokens, 512) * vocab * 4 * 2
    again = 0.0
    if config.recompute.mode == "full":
        again = tokens * kept_per_token(model, config.data.sequence_length, size, "none")
    return max(logits, again)
