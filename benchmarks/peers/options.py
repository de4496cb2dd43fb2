"""Options of a benchmark from its command line."""

import sys
from typing import TypeVar

from megalite.config.options import HelpRequested, parse_options
from megalite.errors import UserError

T = TypeVar("T")


def given(options: type[T], about: str | None) -> T:
    """The words of the command line as `options`; help is printed and a mistake said, and the program ends."""
    try:
        return parse_options(options, sys.argv[1:], about or "")
    except HelpRequested as help:
        print(help)
        sys.exit()
    except UserError as error:
        sys.exit("\n".join(error.lines))
