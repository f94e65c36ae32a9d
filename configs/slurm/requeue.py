"""Exit with status 0 if a SLURM job that reached its time limit should be requeued. The .sbatch scripts call it.

    python configs/slurm/requeue.py RECIPE.yaml|RUN_FOLDER [key=value ...]
    python configs/slurm/requeue.py sweep RECIPE.yaml key=VALUE,VALUE index=N [key=value ...]

Without a new checkpoint or newly prepared documents, the next attempt would probably not get further either. So after
TRIES such attempts in a row, the job is not requeued. .requeue-JOBID.json stores the attempts, in the current folder.
For the first attempt of a job, checkpoints and documents of an earlier job also count as progress.
"""

import json
import os
import sys
from pathlib import Path

from nanogpt_accel.checkpoint.layout import list_checkpoints
from nanogpt_accel.commands import sweep
from nanogpt_accel.data.dataset import data_folder
from nanogpt_accel.data.manifest import is_data_folder
from nanogpt_accel.data.token_files import earlier_attempt
from nanogpt_accel.recipe import FIELDS, load_recipe
from nanogpt_accel.utils import cli

TRIES = 3


def progress(argv):
    """Return what a run has done so far: [step of the latest checkpoint or -1, documents prepared]."""
    if argv[0] == "sweep":
        options, (point,) = sweep.parse(argv[1:])
        sweep.load([point], options)
        recipe = point.recipe
    else:
        target, options = cli.parse(argv, FIELDS)
        if Path(target).is_dir():
            target, options["out_dir"] = Path(target) / "run.yaml", target
        recipe = load_recipe(target, options)
    checkpoints = list_checkpoints(recipe.out_dir)
    folder = data_folder(recipe.data)
    documents = sys.maxsize if is_data_folder(folder) else earlier_attempt(folder)[1]
    return [int(checkpoints[-1].name.rpartition("-")[2]) if checkpoints else -1, documents]


def main(argv):
    file = Path(f".requeue-{os.environ.get('SLURM_JOB_ID', 'job')}.json")
    before, tries = json.loads(file.read_text(encoding="utf-8")) if file.exists() else ([-1, 0], 0)
    now = progress(argv)
    tries = 0 if now > before else tries + 1
    if tries == TRIES:
        file.unlink()
        sys.exit(
            f"error: not requeued: {TRIES} attempts in a row without a new checkpoint or newly prepared documents; set "
            "a longer --time, or more seconds in --signal"
        )
    file.write_text(json.dumps([now, tries]), encoding="utf-8")
    note = f" (attempts without progress: {tries} of {TRIES})" if tries else ""
    print(f"requeued: resume=auto resumes from the latest valid checkpoint{note}")


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
