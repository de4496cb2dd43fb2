"""`megalite doctor`: what is on this machine, what works, what to install. Exit code 1: cannot train."""

import dataclasses
import json
import sys

from rich.console import Console
from rich.text import Text

from megalite.config.options import HelpRequested
from megalite.errors import UserError
from megalite.train.doctor import Check, run_checks

USAGE = """Usage: megalite doctor [--json]

Look at versions, devices, compiler, optional packages, folders, stale lock files and the matmul speed, and let two
processes talk to each other. Takes about ten seconds. Exit code 1 when something keeps megalite from training.

  --json   one JSON object instead of lines"""
STYLES = {"ok": "green", "note": "bright_black", "warn": "yellow", "fail": "bold red"}


def run(arguments: list[str]) -> int:
    if any(word in ("-h", "--help") for word in arguments):
        raise HelpRequested(USAGE)
    unknown = [word for word in arguments if word != "--json"]
    if unknown:
        raise UserError(*(f"{word}: unknown option; doctor knows --json" for word in unknown))
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    checks: list[Check] = []
    for check in run_checks():
        checks.append(check)
        if not arguments:
            show(console, check)
    failed = [check.name for check in checks if check.state == "fail"]
    if arguments:
        rows = [dataclasses.asdict(check) for check in checks]
        print(json.dumps({"ok": not failed, "checks": rows}, indent=2))
    else:
        console.print(f"not ready: {', '.join(failed)}" if failed else "ready to train", markup=False)
    return 1 if failed else 0


def show(console: Console, check: Check) -> None:
    """`ok    torch          2.13.0`, and the cure on a line of its own."""
    console.print(Text(f"{check.state:<5}", STYLES[check.state]).append(f" {check.name:<15}{check.text}", "default"))
    if check.cure:
        console.print(Text(f"{'':<21}-> {check.cure}"))
