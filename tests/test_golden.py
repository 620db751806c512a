"""The cases with expected numbers of the published implementation, run as their own checker runs them."""

import os
import subprocess
import sys

from conftest import ROOT


def test_all_golden_cases_pass(shared):
    checker, cases = shared / "golden" / "check.py", shared / "golden" / "public"
    command = [sys.executable, str(checker), str(cases), "--repo", str(ROOT)]
    environment = {name: value for name, value in os.environ.items() if name != "HF_MODULES_CACHE"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " 0 failed" in done.stdout.splitlines()[-1]
    # Where the published code is defective, ours is corrected, and everywhere else it is the published code's equal.
    labels = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("PASS")}
    assert "PASS[reference]" not in labels and "PASS[raises]" not in labels
