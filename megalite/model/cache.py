"""What attention needs of tokens already seen, so that generation computes only the new ones."""

import torch
from torch import Tensor

from megalite.config.schema import ModelConfig
from megalite.model.size import head_dim, kv_heads, latent


class KVCache:
    """Room for `capacity` tokens of `batch` sequences of equal length.

    A layer's keys, and its values: [batch, capacity, kv_heads, head_dim]; of latent attention one tensor
    [batch, capacity, 1, kv_rank + rope_dim], the latents and the rotated part of the keys.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        heads, size, tensors = kv_heads(config), head_dim(config), 2
        if latent(config):
            heads, size, tensors = 1, config.mla.kv_rank + config.mla.rope_dim, 1
        self.held = [
            [torch.empty(batch, capacity, heads, size, device=device, dtype=dtype) for _ in range(tensors)]
            for _ in range(config.layers)
        ]
        self.capacity = capacity
        self.length = 0
        """Tokens held; the next ones start at this position."""

    def extend(self, layer: int, *new_BSKD: Tensor) -> list[Tensor]:
        """Writes the new tokens of one layer behind the held ones; returns all up to and with them."""
        end = self.length + new_BSKD[0].shape[1]
        if end > self.capacity:
            raise ValueError(f"KV cache: {end} tokens do not fit its capacity of {self.capacity}")
        for held, new in zip(self.held[layer], new_BSKD, strict=True):
            held[:, self.length : end] = new
        return [held[:, :end] for held in self.held[layer]]

    def advance(self, tokens: int) -> None:
        """Counts tokens as held, once every layer has written them."""
        self.length += tokens
