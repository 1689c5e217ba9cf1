"""Processes beside the tests end with them."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.elsewhere import ROOT

KILLED = """
import os, signal
from tests import elsewhere
run = elsewhere.Elsewhere("timeit", "-n1", "-r1", "__import__('time').sleep(25)")
elsewhere.start([run])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nothing_is_left_of_what_killed_tests_had_begun(tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    # The end of what it writes is that of all processes it started.
    subprocess.run([sys.executable, "-c", KILLED], cwd=ROOT, env=environment, capture_output=True, timeout=15)
    assert not list(tmp_path.iterdir())
