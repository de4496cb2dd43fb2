"""Model folders: whole or absent, honest about what does not fit, deaf to hostile names."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalite.checkpoint import tensor_folder
from megalite.checkpoint.huggingface.folder import export_huggingface, open_huggingface
from megalite.checkpoint.huggingface.read import read_config
from megalite.checkpoint.huggingface.write import write_config
from megalite.checkpoint.model_folder import load_model, open_model, save_model
from megalite.checkpoint.stored_model import StoredModel, empty_model
from megalite.checkpoint.tensor_folder import INDEX, SINGLE, TensorFolder
from megalite.cli import main
from megalite.config.schema import MLAConfig, ModelConfig, MoEConfig, RopeConfig
from megalite.errors import UserError
from megalite.parallel.parameter import materialize

TINY = ModelConfig(layers=2, hidden=16, heads=2, ffn=24, vocab=32, max_positions=16)


def stored(config: ModelConfig, folder: Path, dtype: torch.dtype = torch.float32) -> StoredModel:
    model = empty_model(config, 32, 16)
    materialize(model, torch.device("cpu"), 0, dtype)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return StoredModel(config, 32, 16, dtype, weights.__getitem__, folder, {"eos_token_id": 7})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small Hugging Face folder in shards, with a tokenizer beside it."""
    (tmp_path / "origin").mkdir()
    (tmp_path / "origin" / "tokenizer.json").write_text("{}")
    export_huggingface(stored(TINY, tmp_path / "origin"), tmp_path / "source", shard_bytes=4000)
    return tmp_path / "source"


def edit(path: Path, change: Any) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def error_line(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        model = open_model(path)
        for name in model.shapes():
            model.tensor(name)
    assert len(caught.value.lines) == 1 and "\n" not in str(caught.value)
    return str(caught.value)


def test_command_line_imports_and_exports(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    native, exported = tmp_path / "native", tmp_path / "exported"
    assert main(["checkpoint", "import", f"source={source}", f"output={native}"]) == 0
    assert main(["checkpoint", "export", f"checkpoint={native}", f"output={exported}", "shard_gb=4e-6"]) == 0
    assert f"{exported}: written (llama)" in capsys.readouterr().out
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    assert len(files) > 5 and files == {path.name: path.read_bytes() for path in exported.iterdir()}
    assert main(["checkpoint", "import", f"source={source}", f"output={native}"]) == 2
    assert f"{native}: exists already" in capsys.readouterr().err
    assert main(["checkpoint", "exprt"]) == 2
    assert "nearest: export" in capsys.readouterr().err


def test_a_loaded_model_knows_its_tokenizer(source: Path) -> None:
    model, known = load_model(source, dtype=torch.bfloat16)
    assert known.tokenizer == source / "tokenizer.json" and known.special_tokens == {"eos_token_id": 7}
    assert model.embedding.weight.dtype == torch.bfloat16 and known.dtype == torch.float32


def test_headless_names_old_constants_and_a_doubled_head_are_understood(tmp_path: Path) -> None:
    tied = ModelConfig(layers=1, hidden=16, heads=2, ffn=24, vocab=32, max_positions=16, tied_embeddings=True)
    export_huggingface(stored(tied, tmp_path), tmp_path / "source")
    tensors = load_file(tmp_path / "source" / SINGLE)
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    renamed["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    renamed["lm_head.weight"] = renamed["embed_tokens.weight"].clone()
    save_file(renamed, tmp_path / "source" / SINGLE)
    assert torch.equal(open_model(tmp_path / "source").tensor("embedding.weight"), renamed["embed_tokens.weight"])
    renamed["lm_head.weight"] += 1
    save_file(renamed, tmp_path / "source" / SINGLE)
    assert "unexpected lm_head.weight" in error_line(tmp_path / "source")


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/passwd", "..", "a/../b", "sub\\x", "", 7, None])
def test_an_index_cannot_name_files_outside(source: Path, place: object) -> None:
    (source.parent / "secret.safetensors").write_bytes(b"")
    edit(source / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": place}))
    assert "is no plain file name; refused" in error_line(source)


def test_links_out_of_the_folder_are_refused_but_a_cache_is_read(source: Path, tmp_path: Path) -> None:
    shard = next(source.glob("model-00001*"))
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(source.iterdir()):
        (blobs / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    assert open_model(snapshot).tensor("embedding.weight").shape == (32, 16)
    outside = tmp_path / "outside.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)
    assert "is a link out of its folder; refused" in error_line(source)


def test_what_does_not_fit_is_named(source: Path) -> None:
    edit(source / "config.json", lambda config: config.update(num_hidden_layers=3))
    assert "missing model.layers.2.input_layernorm.weight" in error_line(source)
    edit(source / "config.json", lambda config: config.update(num_hidden_layers=1))
    assert "unexpected model.layers.1." in error_line(source)
    edit(source / "config.json", lambda config: config.update(num_hidden_layers=2, intermediate_size=25))
    assert "mlp.gate_proj.weight [24, 16] instead of [25, 16]" in error_line(source)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model_type": "mamba"}, "model_type=mamba is not supported; supported: gpt2, llama"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "RoPE scaling longrope is not supported"),
        ({"hidden_act": "relu"}, "activation relu is not supported"),
        ({"hidden_size": "wide"}, "a value has the wrong type"),
        ({"hidden_size": None}, "has no 'hidden_size'"),
        ({"num_attention_heads": 3}, "model.kv_heads=2: does not divide model.heads 3"),
        ({"num_attention_heads": 0}, "wrong type or size"),
        ({"num_hidden_layers": 10**9}, "model.layers=1000000000: the folder has 21 tensors"),
        ({"vocab_size": 10**15}, "more parameters than any model has"),
        ({"num_hidden_layers": -1}, "model.layers=-1: too small"),
    ],
)
def test_configs_that_cannot_be_read(source: Path, change: dict[str, Any], line: str) -> None:
    edit(source / "config.json", lambda config: config.update(change))
    assert line in error_line(source)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000])
def test_broken_indices(source: Path, content: str) -> None:
    (source / INDEX).write_text(content)
    assert str(source / INDEX) in error_line(source)


def test_broken_and_missing_files(source: Path) -> None:
    shard = next(source.glob("model-00002*"))
    whole = shard.read_bytes()
    for broken in (b"", whole[:7], whole[:-1], b"\xff" * 100, whole + b"x"):
        shard.write_bytes(broken)
        assert f"{shard}: not a whole safetensors file" in error_line(source)
    shard.unlink()
    assert f"{shard}: no such file" in error_line(source)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "config.json").write_text(json.dumps(write_config(TINY, 32, 16)))
    assert "pickles, which can run code" in error_line(tmp_path)
    assert "no model, Hugging Face folder, run or checkpoint" in error_line(tmp_path / "absent")


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_folder, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_model(stored(TINY, tmp_path), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_shards_respect_their_size(source: Path) -> None:
    shards = sorted(source.glob("model-*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    tensors = TensorFolder(source)
    for shard in shards:
        held = [name for name, file in tensors.files.items() if file == shard]
        assert len(held) == 1 or sum(tensors[name].nbytes for name in held) <= 4000
    assert json.loads((source / INDEX).read_text())["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"family": "none"}, "model.family=none: has no Hugging Face form"),
        ({"activation": "relu2"}, "model.activation=relu2: a llama folder can only hold swiglu"),
        ({"window": 8}, "model.windows="),
        ({"qkv_bias": True}, "model.output_bias=False: a llama folder can only hold True"),
        ({"family": "gpt2"}, "model.position=rope: a gpt2 folder can only hold learned"),
        ({"rope": RopeConfig(fraction=0.5)}, "model.rope.fraction=0.5: a llama folder can only hold 1.0"),
        ({"norm_place": "post"}, "model.norm_place=post: a llama folder can only hold pre"),
        ({"family": "gemma", "embedding_scale": 2.0}, "model.embedding_scale=2.0: a gemma folder can only hold 4.0"),
        ({"family": "qwen3"}, "model.qk_norm=False: a qwen3 folder can only hold True"),
        ({"family": "mistral", "window": 8, "window_pattern": 2}, "model.windows="),
        ({"moe": MoEConfig(experts=4)}, "model.moe.experts=4: a llama folder can only hold 0"),
        ({"family": "mixtral"}, "model.moe.experts=0: a mixtral folder holds experts"),
        ({"family": "mixtral", "moe": MoEConfig(experts=4, scale=2.0)}, "model.moe.scale=2.0: a mixtral folder"),
        ({"family": "mixtral", "moe": MoEConfig(experts=4, dense_layers=1)}, "model.moe.dense_layers=1"),
        ({"family": "mixtral", "moe": MoEConfig(experts=4, bias_rate=0.1)}, "model.moe.bias_rate=0.001: a mixtral"),
        ({"family": "mixtral", "moe": MoEConfig(experts=4, router="sinkhorn")}, "can only hold softmax"),
        ({"family": "mixtral", "moe": MoEConfig(experts=4, force_balance=True)}, "model.moe.force_balance=True"),
        ({"family": "gpt_oss", "moe": MoEConfig(experts=4)}, "model.attention_sinks=False: a gpt_oss folder can only"),
        ({"family": "deepseek_v3", "moe": MoEConfig(experts=4)}, "model.mla.kv_rank=0: a deepseek_v3 folder holds"),
        (
            {"family": "deepseek_v3", "mla": MLAConfig(kv_rank=8), "moe": MoEConfig(experts=4, router="sigmoid")},
            "model.moe.bias_rate=None: a deepseek_v3 folder can only hold 0.001",
        ),
    ],
)
def test_what_a_family_cannot_hold_is_refused(tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    config = ModelConfig(**{"layers": 2, "hidden": 16, "heads": 2, "ffn": 24} | changes)
    with pytest.raises(UserError) as caught:
        export_huggingface(stored(config, tmp_path), tmp_path / "out")
    assert line in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_published_spellings_of_config() -> None:
    """Keys as they stand in folders on the hub, older and newer than ours."""
    base = {
        "vocab_size": 8,
        "hidden_size": 16,
        "intermediate_size": 4,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
    }
    llama2 = read_config(base | {"model_type": "llama", "rope_scaling": None, "head_dim": None}, "x")
    assert (llama2.rope.theta, llama2.kv_heads, llama2.head_dim, llama2.norm_eps) == (10000.0, 2, 8, 1e-6)
    nested = {"rope_type": "linear", "factor": 8.0, "rope_theta": 9.0}
    both = {"full_attention": nested, "sliding_attention": {"rope_type": "default", "rope_theta": 3.0}}
    gemma3 = read_config(
        base | {"model_type": "gemma3_text", "rope_parameters": both, "sliding_window_pattern": 2}, "x"
    )
    assert (gemma3.rope.theta, gemma3.rope.local_theta, gemma3.window_pattern) == (9.0, 3.0, 2)
    assert (gemma3.rope.scaling["rope_type"], gemma3.rope.scaling["factor"]) == ("linear", 8.0)
    gemma = read_config(base | {"model_type": "gemma", "hidden_act": "gelu"}, "x")
    assert (gemma.activation, gemma.tied_embeddings, gemma.embedding_scale) == ("geglu", True, 4.0)
    qwen = {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 28}
    assert read_config(base | qwen, "x").window is None
    with pytest.raises(UserError, match="layer_types is no repeated pattern"):
        read_config(base | qwen | {"use_sliding_window": True, "max_window_layers": 2}, "x")


MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN3_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 4}
DEEPSEEK = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 4, "kv_lora_rank": 8}
DEEPSEEK |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}


@pytest.mark.parametrize(
    ("name", "values", "line"),
    [
        ("mixtral", {"num_experts_per_tok": 2}, "has no 'num_local_experts'"),
        ("mixtral", MIXTRAL | {"num_local_experts": "many"}, "wrong type"),
        ("qwen3_moe", QWEN3_MOE | {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported; supported: 1"),
        ("qwen3_moe", QWEN3_MOE | {"mlp_only_layers": [2]}, "mlp_only_layers=[2] is not supported; only the first"),
        ("gpt_oss", MIXTRAL | {"swiglu_limit": 5.0}, "swiglu_limit=5.0 is not supported; supported: 7.0"),
        ("deepseek_v3", DEEPSEEK | {"scoring_func": "softmax"}, "scoring_func=softmax is not supported"),
        ("deepseek_v3", DEEPSEEK | {"rope_interleave": False}, "rope_interleave=False is not supported"),
        ("deepseek_v3", DEEPSEEK | {"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05 is not supported; supported: 1e-06"),
    ],
)
def test_experts_that_cannot_be_read(name: str, values: dict[str, Any], line: str) -> None:
    base = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 4, "num_hidden_layers": 4}
    with pytest.raises(UserError) as caught:
        read_config(base | {"num_attention_heads": 2, "model_type": name} | values, "config.json")
    assert len(caught.value.lines) == 1 and line in str(caught.value)


def test_settings_of_training_do_not_hinder_an_export(tmp_path: Path) -> None:
    """Losses that balance, capacity and jitter; and the load that a global balancing loss remembers is left behind."""
    moe = MoEConfig(experts=4, aux_loss=0.1, aux_scope="global", z_loss=0.1, jitter=0.1, capacity=1.5, pad=True)
    model = stored(ModelConfig(family="mixtral", layers=1, hidden=16, heads=2, ffn=24, moe=moe), tmp_path)
    assert "blocks.0.mlp.router.last_load" in model.shapes()
    export_huggingface(model, tmp_path / "out")
    held = open_huggingface(tmp_path / "out")
    assert held.shapes().keys() == model.shapes().keys() - {"blocks.0.mlp.router.last_load"}
    assert held.config.moe == MoEConfig(experts=4)


def test_gpt2_stacks_and_transposes(tmp_path: Path) -> None:
    gpt2 = ModelConfig(family="gpt2", layers=1, hidden=16, heads=2, ffn=24, position="learned", norm="layernorm")
    gpt2.qkv_bias = gpt2.output_bias = gpt2.mlp_bias = gpt2.tied_embeddings = True
    gpt2.activation = "gelu_tanh"
    export_huggingface(stored(gpt2, tmp_path), tmp_path / "out")
    whole = load_file(tmp_path / "out" / SINGLE)["transformer.h.0.attn.c_attn.weight"]
    parts = [
        open_huggingface(tmp_path / "out").tensor(f"blocks.0.attention.{n}.weight") for n in ("query", "key", "value")
    ]
    assert whole.shape == (16, 48) and torch.equal(torch.cat(parts).T, whole)
