"""A mixture-of-experts layer in the place of an MLP: router, dispatcher, experts, and a shared expert beside them."""

from megalite_kernels import linear
from torch import Tensor, nn

from megalite.config.schema import ModelConfig
from megalite.errors import UserError
from megalite.model.attention import Context
from megalite.model.experts import Experts
from megalite.model.matching import capacity_rows
from megalite.model.mlp import MLP
from megalite.model.router import Router
from megalite.parallel.context import ContextParallel
from megalite.parallel.experts import Dispatcher
from megalite.parallel.parameter import declare
from megalite.parallel.tensor import ALONE, TensorParallel
from megalite.parallel.tokens import own_tokens


class MoE(nn.Module):
    """Residual stream to residual stream. Each rank routes tokens of its own, also where tp ranks hold the same ones;
    the shared expert is spread over tp as any MLP and computed while tokens travel (but all-gather's)."""

    def __init__(self, config: ModelConfig, layer: int, output_std: float) -> None:
        super().__init__()
        moe = config.moe
        self.experts = Experts(config, output_std)
        self.router = Router(config, layer)
        self.shared = MLP(config, output_std, moe.shared_ffn) if moe.shared_ffn else None
        gate = declare(1, config.hidden, role="router", std=config.init_std) if moe.shared_gate else None
        self.shared_gate = gate
        self.config = moe
        self.tp: TensorParallel = ALONE
        self.cp: ContextParallel | None = None
        self.dispatcher = Dispatcher(ALONE.comm, moe.experts)

    @property
    def recompute(self) -> bool:
        """Whether activations' outputs are computed again in backward."""
        return self.experts.recompute

    @recompute.setter
    def recompute(self, again: bool) -> None:
        self.experts.recompute = again
        if self.shared is not None:
            self.shared.recompute = again

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if context.cache is not None and self.config.router == "expert_choice":
            raise UserError(
                "model.moe.router=expert_choice: looks at later tokens and cannot generate; evaluate instead"
            )
        own = self.tp.own(x)
        tokens = own_tokens(self.tp, self.cp, context.batch, len(own), own.device)
        routing = self.router(own, tokens, context.tokens_BS)
        arrived = self.dispatcher.begin(own, routing.indices_NK, routing.probs_NK)
        beside = None if self.shared is None else self._shared(x)
        work, combine = arrived()
        y = self.tp.joined(combine(self.experts(work, self._room(tokens.total))), x)
        return y if beside is None else y + beside

    def _shared(self, x: Tensor) -> Tensor:
        assert self.shared is not None
        y: Tensor = self.shared(x)
        return y if self.shared_gate is None else y * linear(x, self.shared_gate).sigmoid()

    def _room(self, tokens: int) -> int | None:
        """Rows of an expert where they are padded: its capacity, of every microbatch whose tokens come here."""
        if not self.config.pad:
            return None
        moe, mesh = self.config, self.tp.comm.mesh
        together = {mesh.coordinates(rank)["dp"] for rank in mesh.ranks("ep", "etp")}
        return capacity_rows(moe, tokens) * len(together)
