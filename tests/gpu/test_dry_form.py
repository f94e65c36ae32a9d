"""Run the GPU tests on a CPU. Otherwise, a changed interface could break them without notice, until somebody has a
GPU."""

import pytest
from launching import package_env, run_python
from shared import REPOSITORY


@pytest.mark.slow
def test_gpu_tests_pass_in_their_dry_form():
    done = run_python(
        "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", env=package_env(NANOGPT_ACCEL_GPU_DRY="1"), cwd=REPOSITORY
    )
    assert " passed" in done.stdout
