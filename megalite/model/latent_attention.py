"""Multi-head latent attention (arXiv:2405.04434): keys and values of all heads come from one narrow latent a token.

Of a head's queries and keys, head_dim dimensions come from the latents and are never rotated, rope_dim others carry the
position; the keys' rotated part is shared by all heads. Generation holds the latent and that part alone.
"""

import torch
from megalite_kernels import apply_rope
from torch import Tensor

from megalite.config.schema import ModelConfig
from megalite.model.attention import Context, Core
from megalite.model.cache import KVCache
from megalite.model.linear import Linear
from megalite.model.norm import RMSNorm
from megalite.model.size import head_dim, query_dim, value_dim


class LatentAttention(Core):
    """Causal self-attention of one layer.

    tp divides the heads; the latents are computed on the residual stream, by weights that every tp rank has whole.
    Dimensions, besides those of `Core`: N head_dim, R rope_dim, D = N + R, V value_dim, C kv_rank. A head's rows of the
    query weight are N and R, of the key and value weight N and V, of the latents' C and R.
    """

    def __init__(self, config: ModelConfig, layer: int, output_std: float) -> None:
        super().__init__(config, layer)
        mla, hidden, heads = config.mla, config.hidden, config.heads
        self.of_query = [head_dim(config), mla.rope_dim]
        self.of_key_value = [head_dim(config), value_dim(config)]
        self.of_latent = [mla.kv_rank, mla.rope_dim]
        rows, inputs = heads * query_dim(config), mla.q_rank or hidden

        def norm(size: int) -> RMSNorm:
            return RMSNorm(size, config.norm_eps, config.norm_zero_centered)

        def linear(inputs: int, outputs: int, *, whole: bool = False) -> Linear:
            return Linear(inputs, outputs, split=None if whole else "outputs", std=config.init_std, bias=False)

        self.compressed = mla.q_rank is not None
        if self.compressed:
            self.query_down = linear(hidden, inputs, whole=True)
            self.query_latent_norm = norm(inputs)
            self.query_up = linear(inputs, rows)
        else:
            self.query = linear(hidden, rows)
        self.key_value_down = linear(hidden, sum(self.of_latent), whole=True)
        self.key_value_norm = norm(mla.kv_rank)
        self.key_value_up = linear(mla.kv_rank, heads * sum(self.of_key_value))
        self.output = Linear(heads * value_dim(config), hidden, split="inputs", std=output_std, bias=config.output_bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if self.compressed:
            (q,) = self.tp.columns(self.query_latent_norm(self.query_down(x)), [self.query_up])
        else:
            (q,) = self.tp.columns(x, [self.query])
        qn_BSHN, qr_BSHR = _heads(q, context.batch, self.of_query)
        latent, shared = self.key_value_down(x).split(self.of_latent, dim=-1)
        entered = self.tp.enter(torch.cat((self.key_value_norm(latent), shared), dim=-1))
        c_BS1C, kr_BS1R = _heads(entered, context.batch, self.of_latent)
        rotation = context.rotation if self.window is None else context.local_rotation
        if rotation is not None:
            qr_BSHR, kr_BS1R = (apply_rope(part, *rotation, backend=self.backend) for part in (qr_BSHR, kr_BS1R))
        if context.cache is not None:
            out_BSHV = self._absorbed(qn_BSHN, qr_BSHR, c_BS1C, kr_BS1R, context.cache)
        else:
            kn_BSHN, v_BSHV = _heads(self.key_value_up(c_BS1C.squeeze(2)), context.batch, self.of_key_value)
            q_BSHD = torch.cat((qn_BSHN, qr_BSHR), dim=-1)
            k_BSHD = torch.cat((kn_BSHN, kr_BS1R.expand(-1, -1, kn_BSHN.shape[2], -1)), dim=-1)
            # A copy, so that backward does not keep the keys' half of the product beside it.
            out_BSHV = self.attend(q_BSHD, k_BSHD, v_BSHV.contiguous(), context.documents_BS)
        return self.output(out_BSHV.flatten(-2))

    def _absorbed(self, qn_BSHN: Tensor, qr_BSHR: Tensor, c_BS1C: Tensor, kr_BS1R: Tensor, cache: KVCache) -> Tensor:
        """The same output [B, S, H, V] with the key weight multiplied into the queries and the value weight after the
        sum, section 2.1 of the paper: attention over the held latents, which all heads share."""
        (k_BT1D,) = cache.extend(self.layer, torch.cat((c_BS1C, kr_BS1R), dim=-1))
        up = self.key_value_up.weight.unflatten(0, (-1, sum(self.of_key_value)))
        key_HNC, value_HVC = up.split(self.of_key_value, dim=1)
        q_BSHD = torch.cat((torch.einsum("bshn,hnc->bshc", qn_BSHN, key_HNC), qr_BSHR), dim=-1)
        out_BSHC = self.attend(q_BSHD, k_BT1D, k_BT1D[..., : self.of_latent[0]], None)
        return torch.einsum("bshc,hvc->bshv", out_BSHC, value_HVC)


def _heads(x: Tensor, batch: int, sizes: list[int]) -> tuple[Tensor, ...]:
    """[..., heads x sum(sizes)] of all tokens as [B, S, heads, size] for each of the parts of a head."""
    return x.reshape(batch, -1, x.shape[-1]).unflatten(-1, (-1, sum(sizes))).split(sizes, dim=-1)
