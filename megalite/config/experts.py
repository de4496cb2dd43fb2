"""Rules of mixture-of-experts layers: what a router can choose, and experts over ranks."""

from collections.abc import Iterator

from megalite.config.rules import Job, Rules, divisors, divisors_near, nearest_numbers
from megalite.config.schema import MoEConfig

RULES = Rules()
CHOICE = ("model.moe.experts", "model.moe.top_k", "model.moe.groups", "model.moe.top_groups", "model.moe.router")


@RULES.reads("parallel.ep", "parallel.etp", "model.moe.experts")
def expert_ranks_need_experts(job: Job) -> Iterator[str]:
    parallel = job.config.parallel
    for axis in ("ep", "etp"):
        value = getattr(parallel, axis)
        if value > 1 and job.config.model.moe.experts == 0:
            yield f"parallel.{axis}={value}: spreads experts, and the model has none; set 1, or model.moe.experts"


@RULES.reads(
    "parallel.ep", "parallel.etp", "model.moe.experts", "model.moe.ffn", "model.ffn", "parallel.dp", "parallel.cp",
    "parallel.tp", "parallel.pp",
)  # fmt: skip
def expert_ranks_divide(job: Job) -> Iterator[str]:
    parallel, model = job.config.parallel, job.config.model
    experts, ffn = model.moe.experts, model.moe.ffn or model.ffn
    if experts == 0:
        return
    if experts % parallel.ep:
        legal = divisors_near(parallel.ep, experts)
        yield f"parallel.ep={parallel.ep}: does not divide model.moe.experts {experts}; nearest: {legal}"
    if ffn % parallel.etp:
        legal = divisors_near(parallel.etp, ffn)
        yield f"parallel.etp={parallel.etp}: does not divide the {ffn} inner values of an expert; nearest: {legal}"
    ranks = job.dp * parallel.cp * parallel.tp
    if job.counts_ranks and job.knows_dp and ranks % (parallel.ep * parallel.etp):
        axis, other = ("ep", parallel.etp) if parallel.ep > 1 else ("etp", parallel.ep)
        legal = nearest_numbers(getattr(parallel, axis), [n for n in divisors(ranks) if ranks % (n * other) == 0])
        yield (
            f"parallel.{axis}={getattr(parallel, axis)}: ep {parallel.ep} x etp {parallel.etp} does not divide the"
            f" {ranks} ranks of a stage (dp {job.dp} x cp {parallel.cp} x tp {parallel.tp}); nearest: {legal or 1}"
        )


@RULES.reads(*CHOICE)
def router_can_choose(job: Job) -> Iterator[str]:
    moe = job.config.model.moe
    if moe.experts == 0:
        return
    if moe.experts % moe.groups:
        legal = divisors_near(moe.groups, moe.experts)
        yield f"model.moe.groups={moe.groups}: does not divide model.moe.experts {moe.experts}; nearest: {legal}"
        return
    if moe.top_groups > moe.groups:
        yield f"model.moe.top_groups={moe.top_groups}: there are {moe.groups} groups (model.moe.groups); at most that"
        return
    of = moe.experts // moe.groups * moe.top_groups
    if moe.top_k > of:
        yield f"model.moe.top_k={moe.top_k}: a token chooses among {of} experts; at most that"
    if moe.groups > 1 and moe.router not in ("softmax", "sigmoid"):
        yield f"model.moe.groups={moe.groups}: of router softmax or sigmoid (this is {moe.router}); set 1"


@RULES.reads(
    "model.moe.experts", "model.moe.router", "model.moe.bias_rate", "model.moe.aux_loss", "model.moe.jitter",
    "model.moe.dense_layers", "model.layers", "model.moe.shared_gate", "model.moe.shared_ffn", "model.moe.capacity",
    "model.moe.pad", "model.moe.top_k", "model.moe.normalize", "model.moe.drop", "model.moe.aux_scope", "log.sample",
)  # fmt: skip
def expert_options_fit(job: Job) -> Iterator[str]:
    moe, layers = job.config.model.moe, job.config.model.layers
    if moe.experts == 0:
        return
    if moe.dense_layers >= layers:
        yield f"model.moe.dense_layers={moe.dense_layers}: leaves no layer of {layers} for experts; below that"
    if moe.shared_gate and not moe.shared_ffn:
        yield "model.moe.shared_gate=true: there is no shared expert; set model.moe.shared_ffn, or false"
    if moe.capacity == 0:
        yield "model.moe.capacity=0.0: no expert would take a token; null takes all, usual are 1.0 to 2.0"
    if moe.pad and moe.capacity is None:
        yield "model.moe.pad=true: fills experts up to model.moe.capacity, which is null; set it, or false"
    if moe.drop != MoEConfig.drop and moe.capacity is None:
        yield f"model.moe.drop={moe.drop}: nothing is dropped without model.moe.capacity; set it, or leave this out"
    if moe.aux_scope != MoEConfig.aux_scope and not moe.aux_loss:
        yield f"model.moe.aux_scope={moe.aux_scope}: has no effect with model.moe.aux_loss=0; set that, or leave it out"
    if not moe.normalize and moe.router == "expert_choice":
        yield "model.moe.normalize=false: router=expert_choice never divides scores by their sum; leave it out"
    if moe.jitter >= 1:
        yield f"model.moe.jitter={moe.jitter}: factors in 1 - jitter to 1 + jitter; below 1, such as 0.01"
    if moe.bias_rate is not None and moe.router not in ("softmax", "sigmoid"):
        yield f"model.moe.bias_rate={moe.bias_rate}: of router softmax or sigmoid (this is {moe.router}); set null"
    if job.trains and moe.top_k == 1 and moe.normalize and moe.router in ("softmax", "sigmoid"):
        yield "model.moe.normalize=true: with top_k 1 every weight is 1, and the router learns nothing of it; set false"
    if moe.router == "expert_choice" and job.config.log.sample is not None:
        yield "log.sample: router=expert_choice looks at later tokens and cannot generate; set null"
    if moe.aux_loss and moe.router == "expert_choice":
        yield f"model.moe.aux_loss={moe.aux_loss}: router=expert_choice is balanced by itself; set 0"


@RULES.reads(
    "model.moe.experts", "parallel.tp", "parallel.cp", "train.micro_batch", "data.sequence_length", "parallel.sp"
)
def routers_share_the_tokens(job: Job) -> Iterator[str]:
    parallel, train = job.config.parallel, job.config.train
    tokens = train.micro_batch * job.config.data.sequence_length // parallel.cp
    if job.config.model.moe.experts and not parallel.sp and tokens % parallel.tp:
        yield (
            f"parallel.tp={parallel.tp}: does not divide the {tokens} tokens of a microbatch, which tp ranks share at"
            f" routers; nearest: {divisors_near(parallel.tp, tokens)}"
        )


@RULES.reads("parallel.dispatcher", "parallel.node_ranks", "parallel.ep", "parallel.etp")
def nodes_divide_the_experts_ranks(job: Job) -> Iterator[str]:
    parallel = job.config.parallel
    size, ranks = parallel.node_ranks, parallel.ep * parallel.etp
    if size and parallel.dispatcher != "node":
        yield f"parallel.node_ranks={size}: only of parallel.dispatcher=node (now {parallel.dispatcher}); set 0"
    elif parallel.dispatcher == "node" and ranks > 1 and (size == 0 or ranks % size):
        yield (
            f"parallel.node_ranks={size}: parallel.dispatcher=node needs how many of the {ranks} ranks of ep x etp are"
            f" on a node; legal: {', '.join(map(str, divisors(ranks)))}"
        )


@RULES.reads(
    "model.moe.experts", "parallel.engine", "parallel.shard_ranks", "train.deterministic", "parallel.ep",
    "parallel.etp",
)  # fmt: skip
def experts_meet_what_they_can(job: Job) -> Iterator[str]:
    config = job.config
    if config.model.moe.experts == 0:
        return
    if config.parallel.engine == "deepspeed":
        yield "parallel.engine=deepspeed: spreads no experts (model.moe.experts); legal: megalite"
    if config.parallel.shard_ranks:
        yield f"parallel.shard_ranks={config.parallel.shard_ranks}: experts are shared by all their replicas; set 0"
    if config.train.deterministic == "layout" and config.parallel.ep * config.parallel.etp > 1:
        yield "train.deterministic=layout: not with parallel.ep or etp, which change the order of sums; set true"
