"""`megalite bench` as a user types it: a run that is saved, and a later one held against it."""

import json
import subprocess
import sys
from pathlib import Path


def test_a_saved_run_and_one_that_is_held_against_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megalite", "bench", "rms_norm", "--shapes", "tiny", "--against", "torch"]
    command += ["--seq", "16", "--mode", "forward", "--seconds", "0.01", "--rounds", "2"]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *words], capture_output=True, text=True, timeout=240, cwd=tmp_path)

    first = run("--json", "saved.json", "--csv", "rows.csv", "--plot", "speed.png")
    assert first.returncode == 0, first.stderr
    assert "rms_norm, tiny: hidden=64; float32 on" in first.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"saved.json", "rows.csv", "speed.png"}
    saved = json.loads((tmp_path / "saved.json").read_text())
    for row in saved["rows"]:
        row["median"] /= 1e6
    (tmp_path / "saved.json").write_text(json.dumps(saved))
    slower = run("--baseline", "saved.json")
    assert slower.returncode == 1
    assert slower.stderr.splitlines()[-1].startswith("megalite bench: rms_norm seq=16 forward, megalite ")
