"""A rank ends by `world.end`: everything that the interpreter does at its end, but not taking itself apart."""

import os
import subprocess
import sys

LAST_WORDS = """
import atexit, os, threading
class Torn:
    def __del__(self, write=os.write):
        write(1, b"torn down\\n")
torn = Torn()
atexit.register(os.write, 1, b"at exit\\n")
threading.Thread(target=os.write, args=(1, b"thread\\n")).start()
os.write(1, b"main\\n")
"""


def ended(code: str, **variables: str) -> tuple[int, list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True, timeout=120
    )
    assert not done.stderr, done.stderr
    return done.returncode, sorted(done.stdout.split("\n")[:-1])


def test_end_does_what_is_left_to_do_and_leaves_the_interpreter_standing() -> None:
    assert ended(LAST_WORDS + "raise SystemExit(7)") == (7, ["at exit", "main", "thread", "torn down"])
    assert ended(LAST_WORDS + "from megalite.world import end; end(7)") == (7, ["at exit", "main", "thread"])


def test_the_command_ends_so_as_one_rank_of_several_alone() -> None:
    command = LAST_WORDS + "import torch.distributed; from megalite.cli import command; command()"
    for ranks, teardown in (("", ["torn down"]), ("1", ["torn down"]), ("2", [])):
        code, said = ended(command, WORLD_SIZE=ranks)
        assert code == 0 and [line for line in said if line == "torn down"] == teardown
        assert {"at exit", "main", "thread", "megalite: pretraining of language models."} <= set(said)


def test_a_rank_that_fails_ends_so_too() -> None:
    command = (
        LAST_WORDS
        + """
import sys, torch.distributed, megalite.cli
sys.stderr = sys.stdout
def main():
    raise RuntimeError("connection closed by peer")
megalite.cli.main = main
megalite.cli.command()
"""
    )
    for ranks, torn in (("1", True), ("2", False)):
        code, said = ended(command, WORLD_SIZE=ranks)
        assert code == 1 and ("torn down" in said) == torn and "RuntimeError: connection closed by peer" in said


def test_without_torch_there_is_nothing_to_end() -> None:
    code, said = ended(
        "import sys; sys.modules['torch'] = None; from megalite.cli import command; command()", WORLD_SIZE="2"
    )
    assert code == 0 and "megalite: pretraining of language models." in said


def test_output_that_cannot_be_written_does_not_fail_a_rank() -> None:
    """Missing, or on a full disk; what a C library has printed is not lost."""
    code = "from megalite.world import end; import sys; sys.stdout = None; end(0)"
    assert ended(code) == (0, [])
    code = "from megalite.world import end; import sys; sys.stdout = open('/dev/full', 'w'); print('x'); end(0)"
    assert ended(code) == (0, [])
    code = "from megalite.world import end; import ctypes; ctypes.CDLL(None).printf(b'from C\\n'); end(3)"
    assert ended(code) == (3, ["from C"])
