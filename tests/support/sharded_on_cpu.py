"""What the tests launch in place of `-m nanogpt_accel.train` to shard over CPU processes, where Accelerate otherwise
trains unsharded: it shards on GPUs alone, and takes gloo's processes for such here."""

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
