"""Paths and constants that tests in several folders use."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
# how a script begins that must do without this package, though it is installed
WITHOUT_THE_PACKAGE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "nanogpt_accel":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
try:
    import nanogpt_accel
    sys.exit("the package is not hidden")
except ModuleNotFoundError:
    pass
"""

DATA = Path(os.environ.get("NANOGPT_ACCEL_TEST_DATA") or REPOSITORY.parent / "shared" / "data")
