"""Every rule of the configuration, checked together: a violation is a line with key, value, reason and legal values.

A key's own limits stand in the schema, the layout's rules in `layout.py` and `stages.py`; the others are here.
"""

import math
from collections.abc import Iterator
from typing import Any

from megalite.config import experts, layout, precision, rope, stages, watch
from megalite.config.rules import Job, Rules, around, divisors_near
from megalite.config.schema import Config
from megalite.config.tree import leaves, outside, value_at
from megalite.errors import UserError

RULES = Rules()
ROOMS = (layout.RULES, experts.RULES, stages.RULES, precision.RULES, watch.RULES, rope.RULES, RULES)
LARGEST_SEED = 2**32 - 1
"""Of numpy's legacy generator, which shuffles as Megatron does."""


def validate(config: Config, world_size: int | None = None) -> None:
    """Raises UserError with all violated rules."""
    problems = violations(config, world_size)
    if problems:
        raise UserError(*problems)


def violations(config: Config, world_size: int | None = None, trains: bool = True) -> list[str]:
    """A line for each violated rule. A rule is skipped when one of its keys is already outside its own limits."""
    bad = {path: line for path, leaf in leaves(Config).items() if (line := outside(leaf, value_at(config, path)))}
    job = Job(config, world_size, trains)
    return [
        *bad.values(),
        *(line for room in ROOMS for keys, rule in room if not bad.keys() & set(keys) for line in rule(job)),
    ]


@RULES.reads("model.hidden", "model.heads", "model.head_dim")
def heads_divide_hidden(job: Job) -> Iterator[str]:
    model = job.config.model
    if model.head_dim is None and model.hidden % model.heads:
        yield (
            f"model.heads={model.heads}: does not divide model.hidden {model.hidden}; nearest:"
            f" {divisors_near(model.heads, model.hidden)}; or set model.head_dim"
        )


@RULES.reads("model.heads", "model.kv_heads")
def kv_heads_divide_heads(job: Job) -> Iterator[str]:
    model = job.config.model
    if model.kv_heads is not None and model.heads % model.kv_heads:
        legal = divisors_near(model.kv_heads, model.heads)
        yield f"model.kv_heads={model.kv_heads}: does not divide model.heads {model.heads}; nearest: {legal}"


@RULES.reads("model.mtp", "data.sequence_length", "parallel.engine")
def multi_token_modules_have_targets(job: Job) -> Iterator[str]:
    mtp, length = job.config.model.mtp, job.config.data.sequence_length
    if mtp >= length:
        yield f"model.mtp={mtp}: looks past the end of a sequence (data.sequence_length {length}); at most {length - 1}"
    if mtp and job.config.parallel.engine == "deepspeed":
        yield f"model.mtp={mtp}: not built for parallel.engine=deepspeed; set 0, or parallel.engine=megalite"


@RULES.reads(
    "model.mla.kv_rank", "model.mla.q_rank", "model.mla.rope_dim", "model.mla.value_dim", "model.heads",
    "model.kv_heads", "model.qk_norm", "model.qkv_bias", "model.rope.fraction",
)  # fmt: skip
def latent_attention_is_whole(job: Job) -> Iterator[str]:
    model, mla = job.config.model, job.config.model.mla
    if mla.kv_rank == 0:
        for name in ("q_rank", "value_dim"):
            if getattr(mla, name) is not None:
                yield f"model.mla.{name}={getattr(mla, name)}: has no effect without model.mla.kv_rank; set it, or null"
        return
    if mla.rope_dim % 2:
        yield f"model.mla.rope_dim={mla.rope_dim}: is rotated in pairs; nearest: {around(mla.rope_dim, 2)}"
    if model.kv_heads not in (None, model.heads):
        yield f"model.kv_heads={model.kv_heads}: model.mla gives every head keys of its own; null or {model.heads}"
    for name in ("qk_norm", "qkv_bias"):
        if getattr(model, name):
            yield f"model.{name}=true: not with model.mla, whose latents have a norm and no bias; set false"
    if model.rope.fraction != 1:
        yield f"model.rope.fraction={model.rope.fraction}: model.mla rotates model.mla.rope_dim dimensions; set 1"


@RULES.reads(
    "model.position", "model.rope.fraction", "model.hidden", "model.heads", "model.head_dim", "model.mla.kv_rank"
)
def rotated_dimensions_are_even(job: Job) -> Iterator[str]:
    model = job.config.model
    if model.mla.kv_rank:
        return
    if model.position != "rope" or (model.head_dim is None and model.hidden % model.heads):
        return
    if model.rope.fraction > 1:
        yield f"model.rope.fraction={model.rope.fraction}: a share of the head; at most 1"
        return
    rotated = int(job.head_dim * model.rope.fraction)
    if rotated % 2 or rotated == 0:
        pairs = [n for n in (rotated // 2 * 2, rotated // 2 * 2 + 2) if 0 < n <= job.head_dim]
        legal = " or ".join(str(n / job.head_dim) for n in pairs)
        yield (
            f"model.rope.fraction={model.rope.fraction}: rotates {rotated} of {job.head_dim} head dimensions, which"
            f" must pair up; nearest: {legal or 'none, make the head larger (model.head_dim)'}"
        )


@RULES.reads("model.position", "model.max_positions", "data.sequence_length")
def learned_positions_suffice(job: Job) -> Iterator[str]:
    model, length = job.config.model, job.config.data.sequence_length
    if model.position == "learned" and model.max_positions is not None and length > model.max_positions:
        yield (
            f"data.sequence_length={length}: the model has {model.max_positions} learned positions"
            f" (model.max_positions); at most {model.max_positions}"
        )


@RULES.reads("model.window", "model.window_pattern", "model.norm", "model.norm_zero_centered")
def model_options_fit(job: Job) -> Iterator[str]:
    model = job.config.model
    if model.window_pattern > 1 and model.window is None:
        yield f"model.window_pattern={model.window_pattern}: has no effect without model.window; set it, or 1 here"
    if model.norm_zero_centered and model.norm != "rmsnorm":
        yield f"model.norm_zero_centered=true: needs model.norm=rmsnorm (it is {model.norm}); or set false"
    for name in ("attention_softcap", "logit_softcap"):
        if getattr(model, name) == 0:
            yield f"model.{name}=0.0: divides by zero; null turns it off, Gemma 2 uses 50 and 30"


@RULES.reads("train.steps", "optim.schedule", "optim.warmup_steps", "optim.decay_steps")
def schedule_fits_the_run(job: Job) -> Iterator[str]:
    optim, steps = job.config.optim, job.config.train.steps
    if optim.warmup_steps > steps:
        yield (
            f"optim.warmup_steps={optim.warmup_steps}: the run has {steps} steps (train.steps); at most {steps};"
            f" add for example optim.warmup_steps={steps // 10}"
        )
    elif optim.schedule == "wsd" and optim.warmup_steps + optim.decay_steps > steps:
        most = steps - optim.warmup_steps
        yield (
            f"optim.decay_steps={optim.decay_steps}: with optim.warmup_steps {optim.warmup_steps} more than train.steps"
            f" {steps}; at most {most}; add for example optim.decay_steps={most}"
        )
    if optim.decay_steps and optim.schedule != "wsd":
        yield f"optim.decay_steps={optim.decay_steps}: only optim.schedule=wsd has it (this is {optim.schedule}); set 0"


@RULES.reads("optim.min_lr_ratio", "optim.beta1", "optim.beta2", "optim.momentum")
def optimizer_shares(job: Job) -> Iterator[str]:
    optim = job.config.optim
    if optim.min_lr_ratio > 1:
        yield f"optim.min_lr_ratio={optim.min_lr_ratio}: a share of optim.lr; between 0 and 1"
    for name in ("beta1", "beta2", "momentum"):
        if getattr(optim, name) >= 1:
            yield f"optim.{name}={getattr(optim, name)}: a running average never forgets at 1; at least 0 and below 1"


@RULES.reads("data.split", "data.blend", "data.validation")
def data_shares(job: Job) -> Iterator[str]:
    data = job.config.data
    shares = split_shares(data.split)
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or shares[0] == 0:
        yield f"data.split={data.split}: expects shares of training and validation, at least 0, such as 0.95,0.05"
    for prefix, weight in data.blend.items():
        if not (math.isfinite(weight) and weight > 0):
            yield f"data.blend.{prefix}={weight}: a weight is a number above 0; leave the entry out to drop it"


@RULES.reads("run.name", "run.dir", "train.profile_step", "train.steps")
def run_is_nameable(job: Job) -> Iterator[str]:
    run, train = job.config.run, job.config.train
    if run.dir is None and (not run.name or run.name.startswith("/") or ".." in run.name.split("/")):
        yield f"run.name={run.name}: names a folder below runs/; letters, digits, - and _ (run.dir sets any folder)"
    if train.profile_step > train.steps:
        yield f"train.profile_step={train.profile_step}: the run has {train.steps} steps (train.steps); at most that"


@RULES.reads("train.seed")
def seed_fits_the_shuffle(job: Job) -> Iterator[str]:
    if job.config.train.seed > LARGEST_SEED:
        yield f"train.seed={job.config.train.seed}: the data order takes 32 bits of it; at most {LARGEST_SEED}"


def split_shares(text: str) -> list[float]:
    """The numbers of data.split; none when one of them is no finite number."""
    try:
        shares = [float(word) for word in text.split(",")]
    except ValueError:
        return []
    return shares if all(map(math.isfinite, shares)) else []


def derived(config: Config, world_size: int | None = None) -> dict[str, Any]:
    """What null and 0 stand for in this configuration: key -> value in force. Only for a valid configuration."""
    job, model, optim = Job(config, world_size), config.model, config.optim
    values: dict[str, Any] = {}
    if config.run.dir is None:
        values["run.dir"] = f"runs/{config.run.name}"
    if model.kv_heads is None:
        values["model.kv_heads"] = model.heads
    if model.head_dim is None:
        values["model.head_dim"] = job.head_dim
    if model.max_positions is None:
        values["model.max_positions"] = config.data.sequence_length
    if model.attention_scale is None:
        values["model.attention_scale"] = job.query_dim**-0.5
    if model.mla.kv_rank and model.mla.value_dim is None:
        values["model.mla.value_dim"] = job.head_dim
    values |= layout.derived(job)
    if optim.schedule == "wsd" and optim.decay_steps == 0:
        values["optim.decay_steps"] = config.train.steps // 5
    if optim.embedding_lr is None:
        values["optim.embedding_lr"] = optim.lr
    return values
