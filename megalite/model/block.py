"""One layer: attention and an MLP or experts, each added to the residual stream."""

from torch import Tensor, nn

from megalite.config.schema import ModelConfig
from megalite.model import recompute
from megalite.model.attention import Attention, Context, Core
from megalite.model.latent_attention import LatentAttention
from megalite.model.mlp import MLP
from megalite.model.moe import MoE
from megalite.model.norm import make_norm
from megalite.model.size import is_moe, latent


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream; norms before a sublayer, on its output, or both."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        std = config.init_std / (2 * config.layers) ** 0.5 if config.init_output_scale else config.init_std
        before, after = config.norm_place != "post", config.norm_place != "pre"
        self.attention_norm = make_norm(config) if before else nn.Identity()
        self.attention: Core = (LatentAttention if latent(config) else Attention)(config, layer, std)
        self.attention_post_norm = make_norm(config) if after else nn.Identity()
        self.mlp_norm = make_norm(config) if before else nn.Identity()
        self.mlp = MoE(config, layer, std) if is_moe(config, layer) else MLP(config, std, config.ffn)
        self.mlp_post_norm = make_norm(config) if after else nn.Identity()
        self.keeping = recompute.Keeping()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.keeping.run(self.sublayers, x, context)

    def sublayers(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.attention_post_norm(self.keeping.normed(self.attention_norm, self.attention, x, context))
        return x + self.mlp_post_norm(self.keeping.normed(self.mlp_norm, self.mlp, x, context))
