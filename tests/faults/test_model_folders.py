"""Damaged and hostile model folders: either the model that was stored, or one clear error; never anything else."""

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megalite.checkpoint.huggingface.folder import export_huggingface
from megalite.checkpoint.model_folder import load_model, save_model
from megalite.config.schema import MLAConfig, ModelConfig, MoEConfig, RopeConfig
from megalite.errors import UserError
from tests.unit.test_model_folders import TINY, stored

NASTY: list[Any] = [None, 0, -1, 1, 3, 2**31, 2**62, 10**30, 1e308, float("inf"), float("nan"), True, False, 0.5]
NASTY += ["", "x", "1", "../x", "/etc/passwd", "full_attention", [], [1], ["sliding_attention"], {}, {"a": 1}]
NASTY += [{"rope_type": "yarn"}, {"rope_type": "yarn", "factor": 0.5}, {"type": "llama3", "factor": 0}]
NASTY += [{"full_attention": None}, {"full_attention": {}}]
GEMMA3 = dataclasses.replace(
    TINY, family="gemma3", norm_place="sandwich", norm_zero_centered=True, activation="geglu", qk_norm=True,
    window=4, window_pattern=2, embedding_scale=4.0, attention_softcap=3.0,
    rope=RopeConfig(local_theta=5.0, scaling={"rope_type": "yarn", "factor": 4.0}),
)  # fmt: skip
GPT2 = ModelConfig(
    family="gpt2", layers=1, hidden=16, heads=2, ffn=24, position="learned", norm="layernorm", activation="gelu_tanh",
    qkv_bias=True, output_bias=True, mlp_bias=True, tied_embeddings=True,
)  # fmt: skip
EXPERTS = MoEConfig(experts=4, ffn=8)
MIXTRAL = dataclasses.replace(TINY, family="mixtral", moe=EXPERTS)
QWEN3_MOE = dataclasses.replace(
    TINY, family="qwen3_moe", qk_norm=True, moe=dataclasses.replace(EXPERTS, dense_layers=1)
)  # fmt: skip
GPT_OSS = dataclasses.replace(
    TINY, family="gpt_oss", qkv_bias=True, output_bias=True, mlp_bias=True, attention_sinks=True, window=4,
    window_pattern=2, activation="swiglu_clamped", moe=dataclasses.replace(EXPERTS, router_bias=True),
    rope=RopeConfig(scaling={"rope_type": "yarn", "factor": 4.0, "truncate": False}),
)  # fmt: skip
DEEPSEEK = dataclasses.replace(
    TINY, family="deepseek_v3", norm_eps=1e-6, mla=MLAConfig(kv_rank=8, q_rank=6, rope_dim=4), mtp=1,
    attention_scale=0.4, rope=RopeConfig(scaling={"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0}),
    moe=dataclasses.replace(
        EXPERTS, router="sigmoid", bias_rate=0.001, shared_ffn=16, groups=2, top_groups=1, dense_layers=1, scale=2.5
    ),
)  # fmt: skip
WITH_EXPERTS = {"mixtral": MIXTRAL, "qwen3_moe": QWEN3_MOE, "gpt_oss": GPT_OSS, "deepseek_v3": DEEPSEEK}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base = tmp_path_factory.mktemp("folders")
    export_huggingface(stored(TINY, base), base / "llama", shard_bytes=4000)
    export_huggingface(stored(GEMMA3, base), base / "gemma3")
    export_huggingface(stored(GPT2, base), base / "gpt2")
    save_model(stored(TINY, base), base / "native")
    for name, config in WITH_EXPERTS.items():
        export_huggingface(stored(config, base), base / name)
    return sorted(base.iterdir())


def damage(folder: Path, chance: random.Random) -> None:
    """One nasty value somewhere in a description, or a few wrong bytes somewhere in a file."""
    path = chance.choice(sorted(folder.iterdir()))
    if path.suffix == ".safetensors" or chance.random() < 0.3:
        content = bytearray(path.read_bytes())
        for _ in range(chance.randint(1, 4)):
            content[chance.randrange(min(len(content), chance.choice([8, 200, 10**6])))] = chance.randrange(256)
        path.write_bytes(content)
        return
    document: Any = yaml.safe_load(path.read_text())
    place, name = document, chance.choice(list(document))
    while isinstance(place[name], dict) and place[name] and chance.random() < 0.8:
        place, name = place[name], chance.choice(list(place[name]))
    place[name] = chance.choice(NASTY)
    path.write_text(yaml.safe_dump(document) if path.suffix == ".yaml" else json.dumps(document))


def test_damaged_folders_load_or_explain(folders: list[Path], tmp_path: Path) -> None:
    refused = 0
    for seed in range(500):
        chance = random.Random(seed)
        copy = tmp_path / "copy"
        shutil.copytree(chance.choice(folders), copy)
        damage(copy, chance)
        try:
            model, _ = load_model(copy)
            with torch.no_grad():
                model(torch.zeros(1, 4, dtype=torch.int64))
        except UserError:
            refused += 1
        shutil.rmtree(copy)
    assert 100 < refused < 500
