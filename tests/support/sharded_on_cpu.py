"""Replaces `-m nanogpt_accel.train` in tests of FSDP2 and DeepSpeed over CPU processes.

Accelerate only shards on GPUs: on a CPU, it ignores the settings of FSDP and DeepSpeed. If distributed_type is
MULTI_GPU, it also shards over CPU processes, with gloo.
"""

import os
import sys

import accelerate
from accelerate import PartialState
from accelerate.utils import DistributedType

PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    wrapped = accelerate.Accelerator.__init__
    accelerate.Accelerator.__init__ = lambda self, **options: wrapped(self, **{**options, "cpu": False})

from nanogpt_accel import train  # noqa: E402
from nanogpt_accel.utils import cli  # noqa: E402

if __name__ == "__main__":
    sys.exit(cli.run(train.main, sys.argv[1:]))
