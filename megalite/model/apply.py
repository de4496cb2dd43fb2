"""What is done to a built model before training, one short function each: recompute, compile."""

from megalite.model.transformer import Block, Transformer


def apply_recompute(model: Transformer, mode: str) -> None:
    """Chooses what backward computes again instead of keeping.

    "full": whole blocks; only their inputs are kept. "selective": attention probabilities and the MLP's activation,
    large to keep and cheap to repeat; no weight matmul runs twice. The results are the same bits in every mode.
    """
    assert mode in ("none", "selective", "full"), mode
    for block in model.blocks:
        assert isinstance(block, Block)
        block.recompute = mode == "full"
        block.attention.recompute = block.mlp.recompute = mode == "selective"


def apply_compile(model: Transformer) -> None:
    """torch.compile of each block alone: equal blocks share their compiled code, and a break stays inside one."""
    for block in model.blocks:
        block.compile()
