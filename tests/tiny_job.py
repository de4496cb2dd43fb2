"""A job of a second: two small layers on a slice of the embedded corpus, as raw bytes."""

DEFAULTS = {
    "train.steps": "4",
    "train.micro_batch": "4",
    "train.global_batch": "8",
    "train.threads": "1",
    "train.final_eval": "false",
    "data.sequence_length": "32",
    "data.tokenizer": "bytes",
    "data.max_bytes": "200000",
    "model.layers": "2",
    "model.hidden": "32",
    "model.heads": "2",
    "model.ffn": "64",
    "log.report": "false",
    "log.progress": "none",
}


def tiny_job(*words: str) -> list[str]:
    """Overrides for `load_config` or the command line: the defaults above, changed and added to by `words`."""
    chosen = dict(DEFAULTS)
    for word in words:
        key, _, value = word.partition("=")
        chosen[key] = value
    return [f"{key}={value}" for key, value in chosen.items()]
