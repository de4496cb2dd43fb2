"""`megalite generate`: continue a prompt with a run, one of its checkpoints, or a model folder, printed as it comes."""

import codecs
import sys
from dataclasses import dataclass
from pathlib import Path

from megalite.config.options import parse_options, required
from megalite.config.schema import key
from megalite.errors import UserError

USAGE = """Usage: megalite generate checkpoint=PATH [prompt=TEXT] [key=value ...]

  megalite generate checkpoint=runs/quickstart prompt="def " max_tokens=200
  megalite generate checkpoint=exported/model temperature=0

Sampling starts at an end-of-document token, then the prompt.
The text goes to stdout, prompt included. The same seed gives the same text."""


@dataclass(kw_only=True)
class GenerateOptions:
    checkpoint: str = required("Run folder (its newest checkpoint), a step_... folder in it, or a model folder.")
    prompt: str = key("", "Text to continue; empty: a new document.")
    max_tokens: int = key(200, "New tokens at most; generation also ends at an end of document.", minimum=1)
    temperature: float = key(0.8, "Below 1 bolder, above 1 more varied; 0 always takes the likeliest token.", minimum=0)
    top_k: int = key(50, "Draw from this many likeliest tokens; 0: all.", minimum=0)
    top_p: float = key(0.95, "Draw from the fewest tokens whose probabilities reach this sum; 1: all.", minimum=0)
    seed: int = key(0, "Fixes the random draws.", minimum=0)
    tokenizer: str = key("", "'bytes' or a tokenizer.json; empty: the one saved with the checkpoint.")
    threads: int = key(0, "CPU threads; 0: one a core.", minimum=0)


def run(arguments: list[str]) -> int:
    options = parse_options(GenerateOptions, arguments, USAGE, positional=("checkpoint",))
    if not 0 < options.top_p <= 1:
        raise UserError(f"top_p={options.top_p:g}: must lie above 0 and not above 1; 1 leaves all tokens in")
    path = Path(options.checkpoint)
    if not path.is_dir():
        raise UserError(f"checkpoint: {path} is no folder; give a run, a checkpoint or a model folder")
    import torch

    from megalite.checkpoint.model_folder import load_model
    from megalite.data.tokenizer import load_tokenizer
    from megalite.train.sampling import stream

    if options.threads:
        torch.set_num_threads(options.threads)
    model, stored = load_model(path)
    beside = stored.tokenizer
    if not options.tokenizer and beside is None:
        raise UserError(f"tokenizer: no tokenizer.json beside {path}; give tokenizer=PATH or tokenizer=bytes")
    tokenizer = load_tokenizer(options.tokenizer or str(beside))
    if tokenizer.vocab > model.vocab:
        raise UserError(f"tokenizer: it has {tokenizer.vocab} tokens but the model {model.vocab}; give the model's own")
    start = [tokenizer.eod, *tokenizer.encode(options.prompt)]
    write = sys.stdout.write
    write(options.prompt)
    text = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span several tokens
    for token in stream(
        model,
        start,
        options.max_tokens,
        options.temperature,
        options.top_k,
        options.top_p,
        options.seed,
        stop=tokenizer.eod,
        vocab=tokenizer.vocab,
    ):
        write(text.decode(tokenizer.decode_bytes([token])))
        sys.stdout.flush()
    write(text.decode(b"", final=True) + "\n")
    return 0
