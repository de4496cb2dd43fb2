"""`megalite report RUN_DIR`: (re)write a run's report.html from what lies in its folder; also while it still trains."""

from dataclasses import dataclass
from pathlib import Path

from megalite.config.options import parse_options, required

USAGE = """Usage: megalite report RUN_DIR

Write RUN_DIR/report.html: one self-contained page with curves, facts, validation bits per byte and a text sample."""


@dataclass
class ReportOptions:
    run: str = required("Folder of the run, such as runs/quickstart.")


def run(arguments: list[str]) -> int:
    options = parse_options(ReportOptions, arguments, USAGE, positional=("run",))
    from megalite.report.run_report import summary, write_report

    path = write_report(Path(options.run))
    print(*summary(Path(options.run)), f"report: {path}", sep="\n")
    return 0
