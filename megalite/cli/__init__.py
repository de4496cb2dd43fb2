"""The `megalite` command: finds the verb, runs it, and turns errors into one line and an exit code.

Nothing heavy is imported here: a verb's module is loaded when it is called.
"""

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from megalite.config.options import HelpRequested
from megalite.config.tree import nearest
from megalite.errors import UserError

VERBS = {
    "train": ("megalite.cli.train", "pretrain; resumes by itself from the newest complete checkpoint"),
    "eval": ("megalite.cli.eval", "validation loss and perplexity of a checkpoint"),
    "generate": ("megalite.cli.generate", "sample text from a checkpoint or an exported model"),
    "data": ("megalite.cli.data", "build, inspect: text, JSONL or Parquet into an indexed dataset; train a tokenizer"),
    "checkpoint": ("megalite.cli.checkpoint", "inspect, verify, import from and export to Hugging Face folders"),
    "schedule": ("megalite.cli.schedule", "draw, check, simulate a pipeline schedule"),
    "bench": ("megalite.cli.bench", "time an op's kernels beside other packages, at a model's shapes"),
    "report": ("megalite.cli.report", "self-contained HTML report of a run"),
    "config": ("megalite.cli.config", "the resolved configuration, where each value came from, every violated rule"),
    "doctor": ("megalite.cli.doctor", "what is on this machine, what works, what to install"),
}
PROMISED = ("rehearse", "plan", "sweep", "launch")
USER_ERRNOS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "ENOTDIR", "EISDIR", "ENOENT", "ENAMETOOLONG")
    if hasattr(errno, name)
}
"""File system failures that are the user's to solve; any other OSError keeps its traceback."""


def command() -> NoReturn:
    """`main` as a process; one rank of several ends by `world.end`, also where it fails."""
    try:
        code = main()
    except Exception:
        if not _one_of_several():
            raise
        traceback.print_exc()
        code = 1
    if _one_of_several():
        from megalite.world import end

        end(code)
    sys.exit(code)


def _one_of_several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1") and "torch.distributed" in sys.modules


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if words[0] in ("-V", "--version", "version"):
        from megalite import __version__

        print(f"megalite {__version__}")
        return 0
    verb, arguments = words[0], words[1:]
    if verb not in VERBS:
        return _fail("", _unknown_verb(verb), UserError.exit_code)
    try:
        return int(importlib.import_module(VERBS[verb][0]).run(arguments))
    except HelpRequested as text:
        print(text)
        return 0
    except UserError as error:
        if _traceback_wanted(verb, arguments):
            traceback.print_exception(error)
        return _fail(verb, error.lines, error.exit_code)
    except BrokenPipeError:  # the reader of our output (head, less) has left; writing on exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in USER_ERRNOS or error.strerror is None:
            raise
        where = error.filename or "while writing"
        return _fail(verb, [f"{where}: {error.strerror}; free space there or choose another path"], UserError.exit_code)
    except KeyboardInterrupt:
        return _fail(verb, ["interrupted"], 130)


def help_text() -> str:
    width = max(map(len, VERBS))
    return "\n".join(
        [
            "megalite: pretraining of language models.",
            "",
            "Usage: megalite VERB [key=value ...]",
            "",
            *(f"  {verb:<{width}}  {help}" for verb, (_, help) in VERBS.items()),
            "",
            "megalite VERB --help tells more. First steps: megalite train experiment=quickstart",
        ]
    )


def _unknown_verb(verb: str) -> list[str]:
    if verb in PROMISED:
        return [f"{verb}: planned, not in this version; it has {', '.join(VERBS)}"]
    return [f"{verb}: unknown verb; nearest: {', '.join(nearest(verb, VERBS))}"]


def _traceback_wanted(verb: str, arguments: Sequence[str]) -> bool:
    """By log.traceback, as a word or in the user's file; where nothing can be composed, only the word is known."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        return True
    words = [word.partition("=")[2] for word in arguments if word.startswith("log.traceback=")]
    if words:
        return words[-1].strip("\"'").lower() in ("true", "yes", "on")
    if verb not in ("train", "config"):
        return False
    from megalite.cli.job import parse_job
    from megalite.config.compose import compose

    try:
        job = parse_job(arguments, "")
        asked = compose(job.overrides, job.config_dir, job.config_name).values["log"]["traceback"]
    except (UserError, LookupError, TypeError):
        return False
    return str(asked).lower() in ("true", "yes", "on")


def _fail(verb: str, lines: Sequence[str], code: int) -> int:
    for line in lines:
        print(f"megalite {verb}:" if verb else "megalite:", " ".join(line.split()), file=sys.stderr)
    return code
