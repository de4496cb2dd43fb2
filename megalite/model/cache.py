"""Keys and values of tokens already seen, so that generation computes only the new ones."""

import torch
from torch import Tensor

from megalite.config.schema import ModelConfig
from megalite.model.size import head_dim, kv_heads


class KVCache:
    """Room for `capacity` tokens of `batch` sequences of equal length.

    A layer's keys, and its values: [batch, capacity, kv_heads, head_dim].
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (batch, capacity, kv_heads(config), head_dim(config))
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.layers)]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.layers)]
        self.capacity = capacity
        self.length = 0
        """Tokens held; the next ones start at this position."""

    def extend(self, layer: int, k_BSKD: Tensor, v_BSKD: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new tokens of one layer behind the held ones; returns all keys and values up to and with them."""
        end = self.length + k_BSKD.shape[1]
        if end > self.capacity:
            raise ValueError(f"KV cache: {end} tokens do not fit its capacity of {self.capacity}")
        self.keys[layer][:, self.length : end] = k_BSKD
        self.values[layer][:, self.length : end] = v_BSKD
        return self.keys[layer][:, :end], self.values[layer][:, :end]

    def advance(self, tokens: int) -> None:
        """Counts tokens as held, once every layer has written them."""
        self.length += tokens
