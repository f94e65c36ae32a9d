"""Paths and constants for tests in several folders."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
# start of a script in which this package cannot be imported, although it is installed
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

# files with the marker `fast`, below tests/; together they take about a minute of one core
FAST = [
    "test_model.py",
    "test_model_document_mask.py",
    "test_optim.py",
    "test_batches.py",
    "test_recipe.py",
    "test_evaluation.py",
    "utils/*.py",
    "tracking/*.py",
    "distributed/test_launcher.py",
    "distributed/test_accelerator.py",
    "data/test_sources.py",
    "data/test_token_files.py",
    "planning/test_hardware.py",
    "checkpoint/test_layout.py",
    "checkpoint/test_resume.py",
    "checkpoint/test_run_folder.py",
    "checkpoint/test_save.py",
    "checkpoint/test_verify.py",
    "promises/test_bad_input.py",
    "promises/test_imports.py",
]
DATA = Path(os.environ.get("NANOGPT_ACCEL_TEST_DATA") or REPOSITORY.parent / "shared" / "data")
