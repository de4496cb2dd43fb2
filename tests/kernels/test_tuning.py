"""Measured tiles: which are tried, which is chosen, how they are kept, and that they are the ones launched."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux")
from megalite_kernels import attention, grouped_gemm
from megalite_kernels.gpu import tune
from megalite_kernels.gpu.chips import CHIPS
from megalite_kernels.gpu.interpret import arrange
from megalite_kernels.gpu.launch import recording
from megalite_kernels.tuning import OPTIONS, Tuned, part

SIZES = {"attention": (128, 128, 4096, 4096), "grouped_gemm": (16384, 8, 4096, 14336)}
CPU = torch.device("cpu")
NEW = Tuned("a GPU, Triton 3.7.1", {})


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
@pytest.mark.parametrize("op", OPTIONS)
def test_candidates_begin_with_the_default_and_fit(op: str, chip: object) -> None:
    for number, names in enumerate(OPTIONS[op]):
        found = tune.candidates(op, number, chip, torch.bfloat16, SIZES[op])
        assert found[0] == tune.defaults(op, chip, torch.bfloat16, SIZES[op])[number]
        assert 4 < len(found) < 100 and all(tuple(config) == names for config in found)
        assert len({tuple(config.values()) for config in found}) == len(found)
        needed = [tune.shared_bytes(op, number, config, torch.bfloat16, SIZES[op]) for config in found[1:]]
        assert max(needed) <= chip.shared_bytes


def test_what_a_candidate_keeps_in_shared_memory() -> None:
    """Two stages of 64 keys and values of 128 columns, and 128 queries, in two bytes each."""
    config = {"M": 128, "N": 64, "num_warps": 8, "num_stages": 2}
    sizes = SIZES["attention"]
    assert tune.shared_bytes("attention", 0, config, torch.bfloat16, sizes) == 2 * 256 * (2 * 64 + 128)
    assert tune.shared_bytes("attention", 1, config, torch.bfloat16, sizes) == 2 * 256 * (2 * 128 + 64)


def test_the_fastest_is_chosen_for_each_kernel_in_turn() -> None:
    """Times that tell the three kernels apart; two fail; the earlier of equal ones stays."""
    op, chip, asked = "attention", CHIPS["sm_90"], []
    want = [(64, 32, 4, 2), (32, 64, 8, 1), (128, 128, 8, 3)]

    def seconds(tiles: list[int]) -> float:
        asked.append(tuple(tiles))
        if tiles[0] == 32:
            return float("inf")
        return 1.0 + sum(tuple(tiles[4 * n : 4 * n + 4]) != best for n, best in enumerate(want))

    sizes = (64, 64, 1024, 1024)
    assert tune.tune(op, chip, torch.bfloat16, sizes, seconds) == [x for best in want for x in best]
    assert len(asked) == sum(len(tune.candidates(op, n, chip, torch.bfloat16, sizes)) for n in range(3))
    default = tune.flat(op, tune.defaults(op, chip, torch.bfloat16, sizes))
    assert tune.tune(op, chip, torch.bfloat16, sizes, lambda tiles: 1.0) == default
    with pytest.raises(ValueError, match="none of 2 candidates ran"):
        tune.fastest([{"M": 1}, {"M": 2}], [float("inf")] * 2)


def test_a_file_gives_back_what_was_saved_and_keeps_other_machines(tmp_path: Path) -> None:
    path, tiles = tmp_path / "tuned.json", list(range(1, 13))
    assert Tuned.load(path, CPU).entries == {}
    there = NEW.with_tiles("attention", torch.bfloat16, SIZES["attention"], tiles)
    there.save(path)
    here = Tuned.load(path, CPU)
    assert here.tiles("attention", torch.bfloat16, SIZES["attention"]) is None
    here.with_tiles("attention", torch.bfloat16, SIZES["attention"], tiles[::-1]).save(path)
    again = Tuned.load(path, CPU)
    assert again.tiles("attention", torch.bfloat16, (128, 100, 4000, 2049)) == tiles[::-1]
    for other in ((128, 128, 4096, 4097), (64, 128, 4096, 4096)):
        assert again.tiles("attention", torch.bfloat16, other) is None
    assert again.tiles("attention", torch.float16, SIZES["attention"]) is None
    assert Tuned(there.machine, again.entries).tiles("attention", torch.bfloat16, SIZES["attention"]) == tiles


@pytest.mark.parametrize(
    "text, why",
    [
        ("{", "Expecting property name"),
        ("[1]", "it holds no object"),
        ('{"attention | x": [1, 2]}', "attention has 12 whole numbers above 0, not \\[1, 2\\]"),
        ('{"grouped_gemm | x": [0, 1, 1, 1, 1, 1, 1, 1, 1, 1]}', "grouped_gemm has 10 whole numbers above 0"),
        ('{"softmax | x": []}', "'softmax' is no op that is tuned"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "tuned.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"tuned.json: no record of tuned tiles .*{why}.*delete it") as caught:
        Tuned.load(path, CPU)
    assert "\n" not in str(caught.value)


def test_tuned_attention_is_what_runs_both_ways() -> None:
    q, k, v = (torch.randn(1, 64, 2, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    tuned = Tuned.load(Path("none.json"), CPU).with_tiles(
        "attention", torch.float32, (16, 16, 64, 64), [16, 32, 4, 1, 32, 16, 4, 1, 64, 16, 4, 1]
    )
    programs = []

    def count(found: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        programs.append(len(found))
        return found

    results = []
    token = arrange.set(count)
    for one in (tuned, None):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, scale=0.25, backend="triton", tuned=one)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    arrange.reset(token)
    assert programs == [8, 2, 8, 2, 4, 2, 4, 4]  # forward, deltas, by keys, by queries; two heads each
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_tuned_products_are_what_is_launched() -> None:
    x, w = torch.randn(40, 32, requires_grad=True), torch.randn(2, 32, 48, requires_grad=True)
    offsets = torch.tensor([0, 17, 40], dtype=torch.int32)
    tiles = [16, 16, 32, 2, 4, 16, 32, 16, 8, 1]
    tuned = Tuned.load(Path("none.json"), CPU).with_tiles("grouped_gemm", torch.float32, (40, 2, 32, 48), tiles)
    with recording() as launches:
        y = grouped_gemm(x, w, offsets, backend="triton", tuned=tuned)
        torch.autograd.grad(y, (x, w), torch.ones_like(y))
    seen = [{**launch.arguments, "num_warps": launch.num_warps, "num_stages": launch.num_stages} for launch in launches]
    for launch, number in zip(seen, (0, 0, 1), strict=True):
        expected = part("grouped_gemm", tiles, number)
        assert {name: launch[name] for name in expected} == expected
