"""Continuing a sequence of tokens: temperature, top-k, top-p, a KV cache, and a random stream of its own."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megalite.model.cache import KVCache
from megalite.model.transformer import Transformer


def generate(
    model: Transformer,
    tokens: Sequence[int],
    n: int,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 0.95,
    seed: int = 0,
    stop: int | None = None,
    vocab: int | None = None,
) -> list[int]:
    """Up to `n` new tokens after `tokens` (not empty); the same seed gives the same ones. See `stream`."""
    return list(stream(model, tokens, n, temperature, top_k, top_p, seed, stop, vocab))


def stream(
    model: Transformer,
    tokens: Sequence[int],
    n: int,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 0.95,
    seed: int = 0,
    stop: int | None = None,
    vocab: int | None = None,
) -> Iterator[int]:
    """Yield the new tokens one by one; ends before `stop` (a token id such as end-of-document).

    `temperature` 0 takes the likeliest token always. `top_k` 0 and `top_p` 1 leave all tokens in. `vocab`: only ids
    below it are drawn (a model may have more rows than its tokenizer has tokens). Past the model's `max_positions` the
    older half of the context is forgotten and the rest computed anew.
    """
    if not tokens:
        raise ValueError("no tokens to continue; start with the end-of-document token")
    if not 0 < top_p <= 1 or top_k < 0 or temperature < 0:
        raise ValueError(f"need 0 < top_p <= 1, top_k >= 0, temperature >= 0; got {top_p}, {top_k}, {temperature}")
    device = model.embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    capacity = model.max_positions
    context = list(tokens)[-capacity:]
    cache, fresh = _new_cache(model, min(len(context) + n, capacity)), context
    training = model.training
    model.eval()
    try:
        for _ in range(n):
            if cache.length + len(fresh) > cache.capacity:
                context = context[-max(capacity // 2, 1) :]
                cache, fresh = _new_cache(model, capacity), context
            logits_V = _next_logits(model, fresh, cache)[:vocab]
            token = choose(logits_V, temperature, top_k, top_p, generator)
            if token == stop:
                return
            yield token
            context.append(token)
            fresh = [token]
    finally:
        model.train(training)


def choose(logits_V: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """One token id drawn from the filtered distribution, or the likeliest at temperature 0."""
    if temperature == 0:
        return int(logits_V.argmax())
    probabilities_V = torch.softmax(keep_likely(logits_V.float() / temperature, top_k, top_p), dim=-1)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))


def keep_likely(logits_V: Tensor, top_k: int, top_p: float) -> Tensor:
    """`logits` with -inf outside the `top_k` largest, then outside the fewest whose probabilities reach `top_p`.

    Ties are settled by token id, so exactly top_k stay. Holtzman et al. 2020 (arXiv:1904.09751) for top-p.
    """
    ordered_V, places_V = logits_V.sort(descending=True, stable=True)
    keep_V = torch.ones_like(ordered_V, dtype=torch.bool)
    if top_k:
        keep_V[top_k:] = False
    if top_p < 1:
        probabilities_V = torch.softmax(ordered_V.masked_fill(~keep_V, float("-inf")), dim=-1)
        before_V = probabilities_V.cumsum(-1) - probabilities_V
        keep_V &= before_V < top_p
        keep_V[0] = True  # rounding must not leave nothing
    kept_V = torch.zeros_like(keep_V).scatter(0, places_V, keep_V)
    return logits_V.masked_fill(~kept_V, float("-inf"))


@torch.no_grad()
def _next_logits(model: Transformer, tokens: list[int], cache: KVCache) -> Tensor:
    tokens_BS = torch.tensor([tokens], device=model.embedding.weight.device)
    hidden_BSE = model(tokens_BS, cache=cache)
    logits: Tensor = model.logits(hidden_BSE[0, -1])
    return logits


def _new_cache(model: Transformer, capacity: int) -> KVCache:
    weight = model.embedding.weight
    return KVCache(model.config, 1, capacity, weight.device, weight.dtype)
