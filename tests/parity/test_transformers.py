"""Every supported family against transformers in float64: logits, all gradients, folders both ways, greedy tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.overrides import TorchFunctionMode

transformers = pytest.importorskip("transformers", reason="in the test extra: pip install megalite[test]")

from megalite.checkpoint.huggingface.folder import export_huggingface, open_huggingface  # noqa: E402
from megalite.checkpoint.huggingface.names import rules_for  # noqa: E402
from megalite.checkpoint.huggingface.write import write_config  # noqa: E402
from megalite.checkpoint.model_folder import load_model, save_model  # noqa: E402
from megalite.checkpoint.stored_model import StoredModel, empty_model  # noqa: E402
from megalite.config.build import build as build_config  # noqa: E402
from megalite.config.schema import ModelConfig, RopeConfig  # noqa: E402
from megalite.model.cache import KVCache  # noqa: E402
from megalite.model.size import parameter_counts  # noqa: E402
from megalite.model.transformer import Transformer  # noqa: E402
from megalite.parallel.parameter import materialize  # noqa: E402

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
VOCAB, LENGTH = 96, 24
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,  # a square: transformers keeps Gemma's sqrt(hidden) in float32
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **values}}


LLAMA3 = {"factor": 4.0, "original_max_position_embeddings": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 25, "sliding_window": 5}
GPT2 = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT2 |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "gpt2-gelu": ("GPT2", GPT2 | {"activation_function": "gelu", "n_inner": 96}),
    "llama2": ("Llama", SMALL | {"num_key_value_heads": 4}),
    "llama3": ("Llama", SMALL | rope("llama3", **LLAMA3)),
    "llama-biases-tied": ("Llama", SMALL | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-linear": ("Llama", SMALL | rope("linear", factor=3.0) | {"head_dim": 24}),
    "llama-yarn": ("Llama", SMALL | rope("yarn", **YARN)),
    "llama-yarn-factors": ("Llama", SMALL | rope("yarn", **YARN, attention_factor=1.3, beta_fast=16.0, beta_slow=2.0)),
    "llama-yarn-mscale": ("Llama", SMALL | rope("yarn", **YARN, mscale=1.0, mscale_all_dim=0.5)),
    "mistral": ("Mistral", SMALL | {"sliding_window": 7}),
    "mistral-no-window": ("Mistral", SMALL | {"sliding_window": None}),
    "qwen2": ("Qwen2", SMALL | {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", SMALL | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}),
    "qwen3": ("Qwen3", SMALL | {"head_dim": 32}),
    "gemma": ("Gemma", SMALL | {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2", SMALL | GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2-no-caps": ("Gemma2", SMALL | GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": ("Gemma3Text", SMALL | GEMMA | {"num_hidden_layers": 7}),
    "gemma3-linear": (
        "Gemma3Text",
        SMALL
        | GEMMA
        | {"num_hidden_layers": 3, "sliding_window_pattern": 3}
        | {"rope_theta": 5000.0, "rope_local_base_freq": 100.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
}


class Double(TorchFunctionMode):
    """transformers computes norms, softmax and rotary tables in float32 whatever the model's dtype; here in float64."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.float:
            function = Tensor.double
        widened = [torch.float64 if value is torch.float32 else value for value in args]
        return function(*widened, **{k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()})


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


def build(kind: str, values: dict[str, Any]) -> Any:
    """The family's model in transformers with every parameter random, norms and biases too."""
    torch.manual_seed(0)
    architecture = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}.get(kind, f"{kind}ForCausalLM")
    with Double():
        config = getattr(transformers, f"{kind}Config")(**values)
        config._attn_implementation = config._experts_implementation = "eager"
        model = getattr(transformers, architecture)(config)
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    for parameter in [*model.parameters(), *biases]:
        torch.nn.init.normal_(parameter, 0.0 if parameter.dim() > 1 else 0.5, 0.2)
    return model.eval()


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def greedy(model: Transformer, prompt: Tensor, count: int, cached: bool) -> Tensor:
    """`count` most likely tokens after each prompt, with the cache and without."""
    seen, new = prompt, prompt
    cache = KVCache(model.config, len(prompt), prompt.shape[1] + count, dtype=torch.float64) if cached else None
    with torch.no_grad():
        for _ in range(count):
            hidden = model(new if cached else seen, cache=cache)
            new = model.logits(hidden[:, -1]).argmax(-1, keepdim=True)
            seen = torch.cat([seen, new], dim=1)
    return seen


def saved(case: tuple[str, dict[str, Any]], path: Path) -> tuple[Any, Path]:
    """A model of transformers and the folder it saved."""
    torch.set_default_dtype(torch.float64)
    model = build(*case)
    model.save_pretrained(path)
    return model, path


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return saved(CASES[request.param], tmp_path_factory.mktemp("theirs") / request.param)


def test_logits_and_gradients(folder: tuple[Any, Path]) -> None:
    theirs, path = folder
    ours, stored = load_model(path)
    inputs, targets = tokens()[:, :-1], tokens()[:, 1:]
    with Double():
        logits = theirs(input_ids=inputs).logits
    theirs.zero_grad()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    losses = ours.loss(inputs, targets)
    losses.nll_sum.backward()
    assert relative(ours.logits(ours(inputs)), logits) <= 1e-10
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.requires_grad}
    for rule in rules_for(stored.config, gradients, -1):
        gradient = rule.join([gradients.pop(name) for name in rule.ours])
        assert relative(gradient, wanted.pop(rule.theirs)) <= 1e-9, rule.theirs
    assert not gradients and not wanted


def test_folders_and_greedy_tokens(folder: tuple[Any, Path], tmp_path: Path) -> None:
    """import -> export -> import is bit-equal; transformers loads the export, gives the first logits, and its
    generate picks the tokens that our model picks with the KV cache and without."""
    theirs, path = folder
    first = open_huggingface(path)
    save_model(first, tmp_path / "native", shard_bytes=50_000)
    model, native = load_model(tmp_path / "native")
    assert native.config == first.config
    export_huggingface(native, tmp_path / "exported", shard_bytes=50_000)
    again = open_huggingface(tmp_path / "exported")
    assert again.config == first.config
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, first.tensor(name))
        assert torch.equal(parameter, again.tensor(name))
    prompt = tokens()[:, :9]
    with Double(), torch.no_grad():
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "exported", dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
        )
        assert torch.equal(loaded(input_ids=tokens()).logits, theirs(input_ids=tokens()).logits)
        wanted = loaded.generate(prompt, max_new_tokens=10, do_sample=False, attention_mask=torch.ones_like(prompt))
    assert greedy(model, prompt, 10, cached=True).tolist() == wanted.tolist()
    assert greedy(model, prompt, 10, cached=False).tolist() == wanted.tolist()


def test_ntk_is_a_larger_base(tmp_path: Path) -> None:
    """transformers has no static NTK scaling: it gets the stretched base, and computes the same."""
    rope = RopeConfig(scaling={"rope_type": "ntk", "factor": 4.0})
    config = ModelConfig(layers=2, hidden=64, heads=4, ffn=80, rope=rope)
    ours = empty_model(config, VOCAB, 64)
    materialize(ours, torch.device("cpu"), 0, torch.float64)
    weights = dict(ours.named_parameters())
    export_huggingface(
        StoredModel(config, VOCAB, 64, torch.float64, weights.__getitem__, tmp_path), tmp_path / "theirs"
    )
    with Double(), torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "theirs", dtype=torch.float64, attn_implementation="eager"
        )
        assert relative(ours.logits(ours(tokens())), theirs(input_ids=tokens()).logits) <= 1e-10


PRESETS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_as_many_parameters_in_transformers(preset: str, tmp_path: Path) -> None:
    """Every preset's config.json, read by transformers, makes a model of our count."""
    config = build_config(ModelConfig, yaml.safe_load((CONFIGS / f"{preset}.yaml").read_text()))
    vocab, positions = config.vocab or 1000, config.max_positions or 512
    document = write_config(config, vocab, positions)
    (tmp_path / "config.json").write_text(json.dumps(document))
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    held = [*theirs.parameters(), *(bias for name, bias in theirs.named_buffers() if name.endswith("correction_bias"))]
    config.mtp = 0  # whose modules transformers makes of a folder, not of a config
    assert sum(parameter.numel() for parameter in held) == parameter_counts(config, vocab).total
