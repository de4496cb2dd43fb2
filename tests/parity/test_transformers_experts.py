"""Families with experts against transformers in float64: the tests of the other families, and what experts add."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from megalite.checkpoint.huggingface.folder import export_huggingface, open_huggingface
from megalite.checkpoint.huggingface.names import rules_for
from megalite.checkpoint.model_folder import load_model, save_model
from megalite.checkpoint.stored_model import StoredModel, empty_model
from megalite.checkpoint.tensor_folder import SINGLE
from megalite.config.schema import ModelConfig, MoEConfig
from megalite.errors import UserError
from megalite.model.router import Router
from megalite.parallel.parameter import materialize
from megalite.parallel.tensor import ALONE
from megalite.parallel.tokens import own_tokens
from tests.parity.test_transformers import (
    LENGTH,
    SMALL,
    VOCAB,
    YARN,
    Double,
    build,
    double,  # noqa: F401 (a fixture)
    relative,
    rope,
    saved,
    test_folders_and_greedy_tokens,  # noqa: F401 (run on this module's folders)
    test_logits_and_gradients,  # noqa: F401
    tokens,
)

EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 6}
QWEN3 = SMALL | {"num_experts_per_tok": 3, "num_experts": 6, "moe_intermediate_size": 24, "head_dim": 32}
GPT_OSS = SMALL | EXPERTS | {"head_dim": 16, "sliding_window": 5}
DEEPSEEK = SMALL | {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "num_mtp_layers": 0,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", SMALL | EXPERTS),
    "mixtral-few-tokens": ("Mixtral", SMALL | {"num_experts_per_tok": 2, "num_local_experts": 64, "sliding_window": 7}),
    "qwen3_moe": ("Qwen3Moe", QWEN3 | {"norm_topk_prob": True}),
    "qwen3_moe-dense-layers": (
        "Qwen3Moe",
        QWEN3
        | {"num_hidden_layers": 3, "mlp_only_layers": [0, 1]}
        | {"tie_word_embeddings": True, "attention_bias": True},
    ),
    "gpt_oss": ("GptOss", GPT_OSS | rope("yarn", **YARN, truncate=False, beta_fast=32.0, beta_slow=1.0)),
    "gpt_oss-no-scaling": ("GptOss", GPT_OSS | rope("default") | {"layer_types": ["full_attention"] * 2}),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK),
    "deepseek_v3-yarn": (
        "DeepseekV3",
        DEEPSEEK
        | {"q_lora_rank": None, "norm_topk_prob": False}
        | rope("yarn", **YARN, mscale=1.0, mscale_all_dim=1.0),
    ),
    "deepseek_v3-mscale": (
        "DeepseekV3", DEEPSEEK | {"n_group": 1, "topk_group": 1} | rope("yarn", **YARN, mscale=0.7, mscale_all_dim=1.1)
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return saved(CASES[request.param], tmp_path_factory.mktemp("theirs") / request.param)


def test_packed_documents_and_experts_without_tokens(folder: tuple[Any, Path]) -> None:
    """A row of documents of uneven lengths: logits and gradients of transformers' runs over each document alone."""
    theirs, path = folder
    ours, stored = load_model(path)
    row, lengths = tokens().flatten()[:37], [1, 7, 16, 13]
    theirs.zero_grad()
    with Double():
        logits = torch.cat([theirs(input_ids=part[None]).logits[0] for part in row.split(lengths)])
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weights).sum().backward()
    documents = torch.arange(4).repeat_interleave(torch.tensor(lengths))
    mine = ours.logits(ours(row[None], documents[None])[0])
    (mine * weights).sum().backward()
    assert relative(mine, logits) <= 1e-10
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.requires_grad}
    wanted = dict(theirs.named_parameters())
    for rule in rules_for(stored.config, gradients, -1):
        gradient = rule.join([gradients[name] for name in rule.ours])
        assert relative(gradient, wanted[rule.theirs].grad) <= 1e-9, rule.theirs
    if stored.config.moe.experts == 64:
        idle = (ours.blocks["1"].mlp.experts.up.grad == 0).flatten(1).all(1)
        assert 10 < idle.sum() < 60


def test_stacked_tensors_are_the_same_model(folder: tuple[Any, Path], tmp_path: Path) -> None:
    """Folders with one tensor for all experts, named as transformers' parameters."""
    theirs, path = folder
    copy = shutil.copytree(path, tmp_path / "stacked")
    save_file({name: tensor.clone() for name, tensor in theirs.state_dict().items()}, copy / SINGLE)
    published, stacked = open_huggingface(path), open_huggingface(copy)
    assert stacked.config == published.config
    for name in published.shapes():
        assert torch.equal(stacked.tensor(name), published.tensor(name)), name


@pytest.mark.parametrize("tied", [False, True])
def test_multi_token_modules(tmp_path: Path, tied: bool) -> None:
    """Two modules of ours as transformers reads them: hidden states and all gradients; and back, bit for bit."""
    config = open_huggingface(_saved(DEEPSEEK | {"tie_word_embeddings": tied}, tmp_path / "theirs")).config
    config.mtp = 2
    ours = empty_model(config, VOCAB, 64)
    materialize(ours, torch.device("cpu"), 3, torch.float64)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, 0.0 if parameter.dim() > 1 else 0.5, 0.2)
    weights = dict(ours.named_parameters())
    export_huggingface(StoredModel(config, VOCAB, 64, torch.float64, weights.__getitem__, tmp_path), tmp_path / "out")
    again = open_huggingface(tmp_path / "out")
    assert again.config.mtp == 2 and all(torch.equal(again.tensor(name), weights[name]) for name in weights)

    with Double():
        main = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
        )
        # transformers knows the published model's layer 61 by its number.
        main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.3\.", r"model\.layers\.4\."]
        modules = MtpModel.from_pretrained(main)
        theirs = main.model(input_ids=tokens()).last_hidden_state
        hidden = ours(tokens())
        loss, wanted = 0.0, 0.0
        assert relative(hidden, theirs) <= 1e-10
        for depth in (1, 2):
            ahead, length = tokens()[:, depth:], LENGTH - depth
            positions = torch.arange(length)[None]
            cache = MtpCache(config=main.config.get_mtp_config())
            theirs = modules.forward_layer(depth - 1, theirs[:, :length], positions, cache, input_ids=ahead)
            context = ours._context(ahead, None, None, hidden)
            hidden = ours.mtp[str(depth)](hidden[:, :length], ours.embedding(ahead), context)
            assert relative(hidden, theirs) <= 1e-10
            loss = loss + (hidden * torch.arange(64.0)).sum()
            wanted = wanted + (theirs * torch.arange(64.0)).sum()
        wanted.backward()
    loss.backward()
    held = dict(main.named_parameters())
    for name, parameter in modules.layers.named_parameters():
        depth, _, rest = name.partition(".")
        rest = rest.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
        held[f"model.layers.{3 + int(depth)}.{rest}"] = parameter
    gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    rules = rules_for(config, gradients, -1)
    assert {name for rule in rules for name in rule.ours} == gradients.keys()
    for rule in rules:
        gradient = rule.join([gradients[name] for name in rule.ours])
        assert relative(gradient, held.pop(rule.theirs).grad) <= 1e-9, rule.theirs
    assert held.keys() <= {"lm_head.weight"}


def test_modules_that_are_not_in_the_folder(tmp_path: Path) -> None:
    """transformers' own folders speak of one module and hold none; a copy of the embedding must be one."""
    model = open_huggingface(_saved(DEEPSEEK | {"num_mtp_layers": 1}, tmp_path / "theirs"))
    assert model.config.mtp == 0 and "1 multi-token modules, which are not in the folder" in model.notes[0]
    config = dataclasses.replace(model.config, mtp=1)
    made = empty_model(config, VOCAB, 64)
    materialize(made, torch.device("cpu"), 3, torch.float32)
    weights = dict(made.named_parameters())
    export_huggingface(StoredModel(config, VOCAB, 64, torch.float32, weights.__getitem__, tmp_path), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / SINGLE)
    assert torch.equal(tensors["model.layers.3.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    tensors["model.layers.3.shared_head.head.weight"] += 1
    save_file(tensors, tmp_path / "out" / SINGLE)
    with pytest.raises(UserError, match=r"unexpected model.layers.3.shared_head.head.weight"):
        open_huggingface(tmp_path / "out")


def _saved(values: dict[str, Any], path: Path) -> Path:
    build("DeepseekV3", values).save_pretrained(path)
    return path


def test_four_bits_become_what_transformers_makes_of_them(tmp_path: Path) -> None:
    """gpt-oss's experts in MXFP4, as published: bfloat16 by transformers' own function, and a note."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    build("GptOss", GPT_OSS | {"intermediate_size": 96}).to(torch.bfloat16).save_pretrained(tmp_path)
    tensors, plain = load_file(tmp_path / SINGLE), open_huggingface(tmp_path)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors[name].shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 130, blocks.shape[:3], dtype=torch.uint8)
        tensors[name] = convert_moe_packed_tensors(blocks, scales)
        (tmp_path / "bf16").mkdir(exist_ok=True)
        packed = {key: value for key, value in tensors.items() if key != name}
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        save_file(packed, tmp_path / SINGLE)
        shutil.copy(tmp_path / "config.json", tmp_path / "bf16")
        save_file(tensors, tmp_path / "bf16" / SINGLE)
        read, wanted = open_huggingface(tmp_path), open_huggingface(tmp_path / "bf16")
        assert read.notes == ("1 tensors in MXFP4 became bfloat16",) and not plain.notes
        for ours in read.shapes():
            assert torch.equal(read.tensor(ours), wanted.tensor(ours)), ours
    packed[f"{name}_scales"] = scales[:, 1:].clone()
    save_file(packed, tmp_path / SINGLE)
    with pytest.raises(UserError, match=f"{name}_scales does not fit its weight"):
        open_huggingface(tmp_path)


def test_eight_bits_become_what_transformers_makes_of_them(tmp_path: Path) -> None:
    """DeepSeek-V3's weights in FP8 with a scale for each square of 128, as published."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    wide = DEEPSEEK | {"hidden_size": 256, "intermediate_size": 128, "kv_lora_rank": 120, "moe_intermediate_size": 128}
    build("DeepseekV3", wide).to(torch.bfloat16).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    wanted = dict(tensors)
    for name, tensor in wanted.items():
        if tensor.shape in ((128, 256), (256, 128)):
            tensors[name] = (tensor * 8).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.rand(tensor.shape[0] // 128, tensor.shape[1] // 128)
            scaled = tensors[name], tensors[f"{name}_scale_inv"]
            wanted[name] = Fp8Dequantize(None)._dequantize_one(*scaled, torch.bfloat16)
    save_file(tensors, tmp_path / SINGLE)
    (tmp_path / "bf16").mkdir()
    shutil.copy(tmp_path / "config.json", tmp_path / "bf16")
    save_file(wanted, tmp_path / "bf16" / SINGLE)
    read, plain = open_huggingface(tmp_path), open_huggingface(tmp_path / "bf16")
    assert read.notes == (f"{len(tensors) - len(wanted)} tensors in FP8 became bfloat16",)
    for ours in read.shapes():
        assert torch.equal(read.tensor(ours), plain.tensor(ours)), ours
    document = json.loads((tmp_path / "config.json").read_text())
    document["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="quant_method=gptq is not supported; supported: mxfp4, fp8"):
        open_huggingface(tmp_path)


def test_expert_bias_stays_wide(tmp_path: Path) -> None:
    """A folder in bfloat16 keeps it in float32, both ways, and so does a model loaded in bfloat16."""
    build("DeepseekV3", DEEPSEEK).to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / SINGLE
    tensors = load_file(file)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[bias] = torch.rand(8, dtype=torch.float32)
    save_file(tensors, file)
    save_model(open_huggingface(tmp_path / "theirs"), tmp_path / "native")
    model, stored = load_model(tmp_path / "native")
    assert stored.dtype == model.embedding.weight.dtype == torch.bfloat16
    router = model.blocks["1"].mlp.router
    assert router.expert_bias.dtype == torch.float32 and not router.expert_bias.requires_grad
    export_huggingface(stored, tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / SINGLE)
    assert torch.equal(exported[bias], tensors[bias]) and torch.equal(router.expert_bias, tensors[bias])


@pytest.mark.parametrize("scope", ["microbatch", "sequence", "global"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_balancing_loss_written_out(score: str, scope: str) -> None:
    """E · sum of f_e · P_e, token by token: its value and its gradient on the router."""
    experts, top_k, batch, length = 6, 2, 3, 7
    moe = MoEConfig(experts=experts, top_k=top_k, router=score, aux_loss=0.3, aux_scope=scope, z_loss=0.05)
    router = Router(ModelConfig(hidden=8, moe=moe), 0)
    materialize(router, torch.device("cpu"), 0, torch.float64)
    x = torch.randn(batch * length, 8, generator=torch.Generator().manual_seed(4))
    load = torch.tensor([5.0, 0, 1, 9, 2, 3])
    if router.last_load is not None:
        router.last_load.data.copy_(load)
    positions = own_tokens(ALONE, None, batch, len(x), x.device)
    routing = router(x, positions, torch.zeros(batch, length, dtype=torch.int64))
    (routing.probs_NK * 0).sum().backward()
    weight = router.weight.detach().clone().requires_grad_()
    logits = x @ weight.T
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)

    def balance(rows: range) -> Tensor:
        total = torch.zeros(())
        for e in range(experts):
            chosen = sum(int(e in routing.indices_NK[n].tolist()) for n in rows)
            share = load[e] / load.sum() if scope == "global" else chosen / (top_k * len(rows))
            total = total + experts * share * sum(scores[n, e] for n in rows) / len(rows)
        return total

    whole = range(len(x))
    parts = [range(b * length, (b + 1) * length) for b in range(batch)] if scope == "sequence" else [whole]
    wanted = sum(balance(part) for part in parts) / len(parts)
    z = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.tolist()) / len(x)
    (0.3 * wanted + 0.05 * logits.logsumexp(-1).square().mean()).backward()
    assert relative(router.weight.grad, weight.grad) <= 1e-12
    seen = router.seen.take(experts)[experts:].tolist()
    assert seen[3] == pytest.approx(wanted.item(), rel=1e-12) and seen[4] == pytest.approx(z, rel=1e-12)
