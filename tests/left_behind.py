"""``python -m tests.left_behind FOLDER NAME...``: what public calls leave behind, by name, as JSON.

Twenty repetitions of what scripts/leaks.py has; that measures memory too, over a thousand of them.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile

import torch

from scripts import leaks


def main(folder: str, *names: str) -> None:
    """See the module."""
    torch.set_num_threads(1)
    logging.getLogger("ntkgp").setLevel(logging.ERROR)
    tempfile.tempdir = folder
    print(json.dumps({name: leaks.measure(name, 14, 2)["grown"] for name in names}))


if __name__ == "__main__":
    main(*sys.argv[1:])
