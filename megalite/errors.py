"""The two errors a user can meet, and the exit codes they become. Nothing else is reported without a traceback."""


class UserError(Exception):
    """Bad input: one line that names the key or file, what is wrong, and what to do. The command exits with 2.

    `lines` holds every violated rule when several were found at once; `str(error)` joins them.
    """

    exit_code = 2
    on_every_rank = False  # raised on all ranks alike, so that one of them speaks for all

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class RunError(UserError):
    """A failure while running that the user can act on (lost rank, full disk). The command exits with 1."""

    exit_code = 1
