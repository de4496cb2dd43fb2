"""The block of text a run begins with: what is trained, how it is spread, what the engine chose, what it will cost.

`facts` is the trainer's dictionary of that name (also stored in environment.json); missing facts are left out.

Keys read here: model, family, parameters, embedding_parameters, layers, hidden, layout, world_size, device, threads,
precision, precision_notes (lines), micro_batch, accumulation, global_batch, sequence_length, steps, data, tokenizer,
vocab, data_notes (lines), backends (lines), set_by_engine (lines), peak_flops (FLOP/s of one rank), flops_per_token,
predicted_memory_gb, predicted_step_s, run_dir, resumed_from.
"""

from typing import Any

from megalite.progress import duration, quantity


def header(facts: dict[str, Any]) -> str:
    """Aligned `label  text` lines, no colours, ending without a newline."""
    rows: list[tuple[str, str]] = [
        ("model", _model(facts)),
        ("data", _joined(facts, "{data}", "{tokenizer}", "vocabulary {vocab:,}")),
        *(("data", str(line)) for line in facts.get("data_notes", [])),
        ("layout", _layout(facts)),
        ("precision", str(facts.get("precision", ""))),
        *(("precision", str(line)) for line in facts.get("precision_notes", [])),
        ("batch", _batch(facts)),
        *(("backend", str(line)) for line in facts.get("backends", [])),
        *(("set itself", str(line)) for line in facts.get("set_by_engine", [])),
        ("memory", _memory(facts)),
        ("time", _time(facts)),
        ("run", _joined(facts, "{run_dir}", "resumed from {resumed_from}")),
    ]
    lines, previous = [], ""
    for label, text in rows:
        if text:
            lines.append(f"{'' if label == previous else label:<11}{text}")
            previous = label
    return "\n".join(lines)


def _joined(facts: dict[str, Any], *patterns: str) -> str:
    parts = []
    for pattern in patterns:
        name = pattern.split("{")[1].split("}")[0].split(":")[0]
        if facts.get(name) not in (None, ""):
            parts.append(pattern.format(**{name: facts[name]}))
    return ", ".join(parts)


def _layout(facts: dict[str, Any]) -> str:
    several = facts.get("world_size", 1) > 1
    return _joined(facts, "{layout}", *(["{world_size} processes"] if several else []), "threads {threads}", "{device}")


def _model(facts: dict[str, Any]) -> str:
    parameters = f"{quantity(facts['parameters'])} parameters" if facts.get("parameters") else ""
    if parameters and facts.get("embedding_parameters"):
        parameters += f" ({quantity(facts['parameters'] - facts['embedding_parameters'])} without embeddings)"
    shape = _joined(facts, "{layers} layers", "hidden {hidden}")
    return ", ".join(part for part in (str(facts.get("model", "")), parameters, shape) if part)


def _batch(facts: dict[str, Any]) -> str:
    if not (facts.get("global_batch") and facts.get("sequence_length")):
        return ""
    tokens = facts["global_batch"] * facts["sequence_length"]
    text = f"{tokens:,} tokens a step: {facts['global_batch']} sequences of {facts['sequence_length']}"
    if facts.get("micro_batch") and facts.get("accumulation"):
        ranks = facts["global_batch"] // (facts["micro_batch"] * facts["accumulation"])
        text += f" = micro {facts['micro_batch']} x accumulation {facts['accumulation']} x dp {ranks}"
    if facts.get("steps"):
        text += f"; {facts['steps']:,} steps, {quantity(tokens * facts['steps'])} tokens"
    return text


def _memory(facts: dict[str, Any]) -> str:
    gigabytes = facts.get("predicted_memory_gb")
    return f"{gigabytes:.2f} GB a process (predicted)" if gigabytes else ""


def _time(facts: dict[str, Any]) -> str:
    parts = []
    if facts.get("predicted_step_s"):
        step = facts["predicted_step_s"]
        parts.append(f"{step:.3g} s a step, {duration(step * facts.get('steps', 0))} in all (predicted)")
    if facts.get("peak_flops"):
        parts.append(f"measured matmul peak {facts['peak_flops'] / 1e12:.3g} TFLOP/s a process")
    return "; ".join(parts)
