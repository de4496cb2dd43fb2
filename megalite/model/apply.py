"""What is done to a built model before training, one short function each: recompute, compile."""

from megalite.model.transformer import Block, Transformer


def apply_recompute(model: Transformer, mode: str) -> None:
    """Chooses what backward computes again instead of keeping.

    "activation": the output of the MLP's activation function, the cheapest memory there is. "selective": attention
    probabilities too; no weight matmul runs twice. "full": whole blocks; only their inputs are kept. Every mode gives
    the same bits.
    """
    assert mode in ("none", "activation", "selective", "full"), mode
    for block in model.blocks:
        assert isinstance(block, Block)
        block.recompute = mode == "full"
        block.attention.recompute = mode == "selective"
        block.mlp.recompute = mode in ("activation", "selective")


def apply_compile(model: Transformer) -> None:
    """torch.compile of each block alone: equal blocks share their compiled code, and a break stays inside one."""
    for block in model.blocks:
        block.compile()
