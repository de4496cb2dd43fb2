"""Every configuration key: its type, default, meaning and legal choices. Plain data; imports neither torch nor Hydra.

Rules that join several keys live in `validate.py`; composing from YAML and overrides lives in `load.py`.
"""

from dataclasses import dataclass, field
from typing import Any


def key(default: Any, help: str, *, choices: tuple[Any, ...] = (), minimum: float | None = None) -> Any:
    """A documented field. `choices` and `minimum` are checked for this key alone; `help` becomes docs/config.md."""
    metadata = {"help": help, "choices": choices, "minimum": minimum}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class RunConfig:
    name: str = key("default", "Name of the run; its folder is runs/<name> unless run.dir is set.")
    dir: str | None = key(None, "Folder of this run (checkpoints, metrics, report); null: runs/<run.name>.")


@dataclass
class TrainConfig:
    steps: int = key(1000, "Optimizer steps in the whole run.", minimum=1)
    seed: int = key(1234, "Fixes initial weights and data order, whatever the layout; below 2**32.", minimum=0)
    micro_batch: int = key(4, "Sequences a rank computes at once.", minimum=1)
    global_batch: int = key(8, "Sequences a step over all ranks; accumulation is derived.", minimum=1)
    deterministic: str = key(
        "true",
        "'true': the same bits on every run of the same layout; 'layout': on every layout with the same tp, cp and pp too, whatever dp, zero and buckets (slower); 'false': any algorithm.",
        choices=("true", "false", "layout"),
    )
    z_loss: float = key(0.0, "Weight of the squared log-partition penalty on the logits.", minimum=0)
    kernels: str = key("auto", "Kernels; auto: the best for device and dtype (triton on a CPU is interpreted, to test).", choices=("auto", "triton", "reference"))
    compile: bool = key(False, "torch.compile each transformer block (slow first step, faster later ones).")
    threads: int = key(0, "CPU threads a process; 0: this host's cores divided by its local ranks.", minimum=0)
    dry_run: bool = key(True, "Run one throw-away batch before step 1, so memory and shape errors come at once.")
    nonfinite_limit: int = key(10, "Stop after this many skipped steps in a row (loss or gradient not finite).", minimum=1)
    spike_rewinds: int | None = key(None, "Loss spikes after which the run goes back to its last checkpoint and skips the data since; others are only said, with 0 all; null: not looked for.", minimum=0)
    eval_every: int = key(0, "Steps between evaluations on the validation sets; 0: only at the end.", minimum=0)
    eval_batches: int = key(0, "Global batches an evaluation reads; 0: the whole validation set.", minimum=0)
    final_eval: bool = key(True, "Evaluate the whole validation set after the last step.")
    profile_step: int = key(0, "Step to record with torch's profiler into timeline.json; 0: none.", minimum=0)


@dataclass
class DataConfig:
    path: str = key("embedded", "Prefix of a .bin/.idx pair, or 'embedded': the standard library source of this Python.")
    blend: dict[str, float] = key({}, "Weighted mixture {prefix: weight}; replaces data.path.")
    validation: dict[str, str] = key({}, "Named validation sets {name: prefix}; empty: the validation part of data.split.")
    split: str = key("0.95,0.05", "Shares of the documents for training and validation, when both come from one prefix.")
    tokenizer: str = key("bpe", "'bpe' (trained on the corpus), 'bytes', or the path of a tokenizer.json.")
    vocab: int = key(4096, "Vocabulary of a BPE trained on the spot, end-of-document included.", minimum=257)
    sequence_length: int = key(512, "Tokens in a training sequence.", minimum=1)
    packing: str = key(
        "cross",
        "'cross': samples run over document ends, as in Megatron; 'documents': the same with attention kept inside a document.",
        choices=("cross", "documents"),
    )
    cache: str | None = key(None, "Folder for tokenized corpora and index maps; null: beside the dataset, or ~/.cache/megalite.")
    max_bytes: int = key(0, "Use only the first bytes of the embedded corpus's training part (tests); 0: all.", minimum=0)


@dataclass
class RopeScaling:
    """What model.rope.scaling may hold, in the spelling of Hugging Face."""

    rope_type: str = key("default", "Rule.", choices=("default", "linear", "ntk", "yarn", "llama3"))
    factor: float = key(1.0, "Length multiplication.", minimum=1)
    original_max_position_embeddings: int = key(8192, "Sequence length before scaling.", minimum=1)
    low_freq_factor: float = key(1.0, "llama3: wavelengths above the original length divided by this are fully scaled.")
    high_freq_factor: float = key(4.0, "llama3: wavelengths below the original length divided by this are kept.")
    beta_fast: float = key(32.0, "yarn: rotations above which a frequency is kept.")
    beta_slow: float = key(1.0, "yarn: rotations below which a frequency is fully scaled.")
    truncate: bool = key(True, "yarn: round the two limits to whole frequencies (gpt-oss: false).")
    attention_factor: float | None = key(None, "yarn: multiplies cos and sin; null: 0.1*ln(factor)+1.")


@dataclass
class RopeConfig:
    theta: float = key(10000.0, "Base of the rotary frequencies.", minimum=1)
    fraction: float = key(1.0, "Share of each head's dimensions that is rotated.", minimum=0)
    scaling: dict[str, Any] = key({}, "How positions beyond the original length are squeezed, as rope_scaling of a Hugging Face config.json: rope_type (linear, ntk, yarn, llama3; default: not at all), factor, original_max_position_embeddings; llama3: low_freq_factor, high_freq_factor; yarn: beta_fast, beta_slow, truncate, attention_factor.")
    local_theta: float | None = key(None, "Base used in sliding-window layers (Gemma 3), without scaling; null: theta.")


@dataclass
class MLAConfig:
    kv_rank: int = key(0, "Multi-head latent attention: width that keys and values are compressed to; 0: plain attention.", minimum=0)
    q_rank: int | None = key(None, "Width that queries are compressed to; null: not compressed.", minimum=1)
    rope_dim: int = key(64, "Dimensions of a head that are rotated, beside its head_dim others; all heads share the key's.", minimum=2)
    value_dim: int | None = key(None, "Size of a value head; null: head_dim.", minimum=1)


@dataclass
class MoEConfig:
    experts: int = key(0, "Experts of a layer; 0: every MLP is dense.", minimum=0)
    top_k: int = key(2, "Experts that compute a token.", minimum=1)
    ffn: int | None = key(None, "Inner width of an expert; null: model.ffn.", minimum=1)
    shared_ffn: int = key(0, "Inner width of the shared expert, which computes every token; 0: none.", minimum=0)
    shared_gate: bool = key(False, "A learned gate on the shared expert.")
    dense_layers: int = key(0, "First layers that keep a dense MLP.", minimum=0)
    router: str = key(
        "softmax",
        "How tokens and experts are matched: a token's best by softmax or sigmoid of its scores; by Sinkhorn-balanced scores; or each expert takes its best tokens, which looks at later ones.",
        choices=("softmax", "sigmoid", "sinkhorn", "expert_choice"),
    )
    normalize: bool = key(True, "Divide a token's chosen scores by their sum.")
    scale: float = key(1.0, "Multiplies the chosen scores.", minimum=0)
    groups: int = key(1, "Groups of experts (such as those of a node) of which a token chooses some first.", minimum=1)
    top_groups: int = key(1, "Groups that a token chooses.", minimum=1)
    router_bias: bool = key(False, "A learned bias on the router's scores (gpt-oss).")
    router_dtype: str = key("fp32", "Precision of the router.", choices=("fp32", "fp64"))
    bias_rate: float | None = key(None, "Balance without a loss (DeepSeek-V3): after each step a bias that counts for the choice alone moves so far towards less loaded experts; null: no bias.", minimum=0)
    aux_loss: float = key(0.0, "Weight of the load-balancing loss.", minimum=0)
    aux_scope: str = key("microbatch", "Load that aux_loss evens out: of a microbatch, of each sequence, or of the last step's global batch.", choices=("microbatch", "sequence", "global"))
    z_loss: float = key(0.0, "Weight of the squared log-partition of the router's scores.", minimum=0)
    jitter: float = key(0.0, "Noise on the router's input in training: a factor in 1-jitter..1+jitter.", minimum=0)
    capacity: float | None = key(None, "An expert takes at most this many times its even share of a microbatch, other tokens pass by; null: all.", minimum=0)
    drop: str = key("probability", "Which tokens an over-full expert keeps: the most probable or the first.", choices=("probability", "position"))
    pad: bool = key(False, "With capacity: experts are filled up to it, so that their products are of the same size in every step.")
    force_balance: bool = key(False, "Every expert gets the same number of tokens, whatever the scores (benchmarks).")


@dataclass
class ModelConfig:
    name: str = key("custom", "Preset this model came from; only a label.")
    family: str = key(
        "llama",
        "Hugging Face architecture used by checkpoint export.",
        choices=("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "none"),
    )
    layers: int = key(8, "Transformer blocks.", minimum=1)
    hidden: int = key(384, "Width of the residual stream.", minimum=1)
    heads: int = key(6, "Query heads.", minimum=1)
    kv_heads: int | None = key(None, "Key and value heads (GQA); null: as many as heads.", minimum=1)
    head_dim: int | None = key(None, "Size of a head; null: hidden / heads.", minimum=1)
    ffn: int = key(1024, "Inner width of the MLP.", minimum=1)
    vocab: int | None = key(None, "Rows of the embedding; null: the tokenizer's vocabulary.", minimum=1)
    max_positions: int | None = key(None, "Longest sequence (size of learned positions); null: data.sequence_length.", minimum=1)
    position: str = key("rope", "How positions enter.", choices=("rope", "learned", "none"))
    rope: RopeConfig = field(default_factory=RopeConfig)
    norm: str = key("rmsnorm", "Normalisation.", choices=("rmsnorm", "layernorm"))
    norm_place: str = key("pre", "Before each sublayer, after it, or both (Gemma 2).", choices=("pre", "post", "sandwich"))
    norm_eps: float = key(1e-5, "Added to the variance.", minimum=0)
    norm_zero_centered: bool = key(False, "The norm's weight is stored as w and applied as 1+w (Gemma).")
    qk_norm: bool = key(False, "RMSNorm on each query and key head before RoPE.")
    qkv_bias: bool = key(False, "Bias on the query, key and value projections.")
    output_bias: bool = key(False, "Bias on the attention output projection.")
    mlp_bias: bool = key(False, "Bias on the MLP projections.")
    activation: str = key("swiglu", "MLP nonlinearity.", choices=("swiglu", "geglu", "swiglu_clamped", "gelu", "gelu_tanh", "relu2"))
    tied_embeddings: bool = key(False, "The head reuses the embedding matrix.")
    embedding_scale: float = key(1.0, "Multiplies the embedding's output (Gemma: sqrt(hidden)).")
    attention_scale: float | None = key(None, "Multiplies q·k; null: the size of a query head **-0.5.")
    attention_softcap: float | None = key(None, "Scores become cap*tanh(score/cap); null: off.", minimum=0)
    logit_softcap: float | None = key(None, "Logits become cap*tanh(logit/cap); null: off.", minimum=0)
    window: int | None = key(None, "Sliding window: a token sees this many latest tokens, itself included; null: all.", minimum=1)
    window_pattern: int = key(1, "Of every n layers the last one sees everything; 1: every layer uses the window.", minimum=1)
    attention_sinks: bool = key(False, "A learned score a head that softmax counts beside the keys' (gpt-oss).")
    mla: MLAConfig = field(default_factory=MLAConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    mtp: int = key(0, "Multi-token prediction: modules behind the last layer, each predicting one token further.", minimum=0)
    mtp_weight: float = key(0.3, "Weight of the mean loss of the multi-token modules.", minimum=0)
    init_std: float = key(0.02, "Standard deviation of initial weights.", minimum=0)
    init_output_scale: bool = key(True, "Divide the std of residual output projections by sqrt(2*layers), as GPT-2.")


@dataclass
class OptimConfig:
    name: str = key("adamw", "Update rule.", choices=("adamw", "muon", "sgd"))
    lr: float = key(3e-4, "Peak learning rate.", minimum=0)
    schedule: str = key("cosine", "Shape of the learning rate after warm-up.", choices=("cosine", "wsd", "linear", "inverse_sqrt", "constant"))
    warmup_steps: int = key(0, "Steps of linear warm-up.", minimum=0)
    decay_steps: int = key(0, "wsd: steps of the final decay; 0: a fifth of train.steps.", minimum=0)
    min_lr_ratio: float = key(0.1, "Final learning rate as a share of the peak.", minimum=0)
    beta1: float = key(0.9, "AdamW: decay of the first moment.", minimum=0)
    beta2: float = key(0.95, "AdamW: decay of the second moment.", minimum=0)
    eps: float = key(1e-8, "AdamW: added to the root of the second moment.", minimum=0)
    momentum: float = key(0.95, "sgd and muon: momentum.", minimum=0)
    weight_decay: float = key(0.1, "Decoupled decay: of matrices always; of embedding, head and positions with optim.decay_embeddings; of norms and biases never.", minimum=0)
    decay_embeddings: bool = key(True, "optim.weight_decay on embedding, head and learned positions too.")
    embedding_lr: float | None = key(None, "Learning rate of embedding and head; null: optim.lr. With muon: of all AdamW parameters.", minimum=0)
    clip: float = key(1.0, "Largest global gradient norm; 0: no clipping.", minimum=0)


@dataclass
class ParallelConfig:
    dp: int = key(-1, "Data-parallel ranks; -1: what the other axes leave.")
    tp: int = key(1, "Tensor-parallel ranks.", minimum=1)
    sp: bool = key(False, "Sequence parallelism: between the tp ranks' products, each holds a part of the sequence.")
    overlap: bool = key(False, "With sp: gather the sequence in pieces while the product runs.")
    cp: int = key(1, "Context-parallel ranks.", minimum=1)
    cp_kind: str = key(
        "ring",
        "How attention spans cp ranks: keys and values travel a ring, heads are spread by all-to-all (Ulysses), or both.",
        choices=("ring", "ulysses", "hybrid"),
    )
    ulysses: int = key(0, "hybrid: ranks of cp that spread heads, the rest is the ring; 0: as many as the heads allow.", minimum=0)
    pp: int = key(1, "Pipeline-parallel ranks.", minimum=1)
    chunks: int = key(1, "Pipeline stages a rank.", minimum=1)
    schedule: str = key("1f1b", "Pipeline schedule: a name, or the path of a .csv file as torch.distributed.pipelining writes them.")
    group_size: int = key(0, "interleaved, zb_h1: microbatches through a stage before the rank's next one; 0: as even as can be, at least pp.", minimum=0)
    in_flight: int = key(0, "zb_auto: microbatches whose activations a rank may keep; 0: twice parallel.pp.", minimum=0)
    layers: str | None = key(None, "Layers of each stage, such as 7,8,8,7 or 7,8*2,7; 'auto': by cost, with embedding and head counted; null: as even as can be.")
    order: str = key("pp,dp,cp,tp", "The axes over the ranks, outermost first: ranks of the last one are neighbours.")
    ep: int = key(1, "Expert-parallel ranks.", minimum=1)
    etp: int = key(1, "Tensor-parallel ranks inside an expert.", minimum=1)
    dispatcher: str = key(
        "all_to_all",
        "How tokens reach experts of other ranks: a copy to each rank that has one of them; all tokens to all; or a copy to each node, which hands it on.",
        choices=("all_to_all", "all_gather", "node"),
    )
    node_ranks: int = key(0, "dispatcher=node: how many neighbours of ep x etp are on one node.", minimum=0)
    engine: str = key("megalite", "Who spreads data parallelism and zero.", choices=("megalite", "deepspeed"))
    zero: int = key(0, "What data parallelism shards: 0 nothing, 1 optimizer, 2 and gradients, 3 and weights.", choices=(0, 1, 2, 3))
    shard_ranks: int = key(0, "zero 3: ranks of dp x cp that share one copy, such as those of a node (HSDP); 0: all.", minimum=0)
    offload: bool = key(False, "deepspeed: the optimizer's state and step on the host.")
    bucket_mb: float = key(25.0, "Size of a gradient bucket.", minimum=0)
    check: bool = key(False, "Compare each collective's op, shape and dtype across its ranks before it runs (slow; finds who differs).")


@dataclass
class PrecisionConfig:
    name: str = key("auto", "Preset; auto takes bf16 where the hardware multiplies it faster than fp32.", choices=("auto", "fp64", "fp32", "bf16", "bf16_pure", "fp16"))
    states: str = key(
        "auto",
        "The optimizer's moments: fp8: the first in e4m3, the second in fp16; int8: dynamic 8-bit codes; both with a scale for 256 of a row; auto: as the preset has them.",
        choices=("auto", "fp32", "bf16", "fp8", "int8"),
    )
    communicate: str = key("auto", "What gradients travel in to the ranks that add them up; auto: what they are summed in.", choices=("auto", "fp32", "bf16"))
    loss_scale: float = key(2.0**16, "fp16: what the loss is multiplied by at first, a power of two.", minimum=1)
    loss_scale_window: int = key(1000, "fp16: finite steps in a row after which the loss scale doubles.", minimum=1)
    loss_scale_hysteresis: int = key(2, "fp16: since it last doubled, the overflow from which on each halves the loss scale.", minimum=1)
    fp8: str = key(
        "none",
        "Products of the blocks' linear layers and experts in FP8: a scale a tensor from the steps before, or from its own values; a row; 1x128 of activations and 128x128 of weights; 1x32 (MX). nvfp4: linear layers in 4 bits, for research.",
        choices=("none", "delayed", "tensorwise", "rowwise", "blockwise", "mxfp8", "nvfp4"),
    )
    fp8_backward: str = key("auto", "FP8: format of gradients; auto: e5m2 with a scale a tensor, else e4m3.", choices=("auto", "e4m3", "e5m2"))
    fp8_skip: list[int] = key([0, 0], "FP8: so many first and so many last layers stay in the preset's dtype.")
    fp8_history: int = key(16, "fp8=delayed: steps whose largest value sets the scale.", minimum=1)
    fp8_dispatch: bool = key(False, "Tokens travel to experts in FP8, a scale for 128 numbers, and so do the gradients of what experts return.")


@dataclass
class RecomputeConfig:
    mode: str = key(
        "activation",
        "What backward computes again instead of keeping: norms and the MLP's activation function; with attention; whole blocks.",
        choices=("none", "activation", "selective", "full"),
    )
    layers: int = key(1, "Recompute in every n-th layer; 1: in all.", minimum=1)
    offload: bool = key(False, "Keep activations for backward in host memory.")


@dataclass
class CheckpointConfig:
    every: int | None = key(0, "Steps between checkpoints, with one after the last step; 0: only that one; null: none.", minimum=0)
    keep: int = key(2, "Newest complete checkpoints kept; 0: all.", minimum=0)
    resume: str = key("auto", "'auto': the run folder's newest complete checkpoint; 'none': refuse a used folder; or the path of a checkpoint, or of a model folder, whose weights start the run.")


@dataclass
class LogConfig:
    every: int = key(1, "Steps between rows of metrics.jsonl and progress lines.", minimum=1)
    progress: str = key("auto", "Live line, plain lines, or nothing; auto: live on a terminal.", choices=("auto", "bar", "lines", "none"))
    statistics: int = key(0, "Steps between measurements of what FP8 and 16 bits cost in every linear layer and every FP8 matrix of experts, which multiply a second time then; 0: none.", minimum=0)
    tensorboard: bool = key(False, "Write TensorBoard event files.")
    wandb: str = key("disabled", "Weights & Biases; online without a key becomes offline.", choices=("offline", "online", "disabled"))
    report: bool = key(True, "Write report.html at the end.")
    baselines: bool = key(False, "Compare bits per byte of the first validation set, evaluated whole, with gzip -9 and a Kneser-Ney 5-gram in the report.")
    sample: str | None = key(None, "Prompt continued at the end of training, shown in the report; null: none.")
    traceback: bool = key(False, "Show Python tracebacks of user errors.")


@dataclass
class DebugConfig:
    numerics: bool = key(False, "Count what is not finite in every module, forward and back, so that a skipped step names where it began (slow).")


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
