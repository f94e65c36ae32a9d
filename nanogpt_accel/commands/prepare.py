"""Tokenize the corpus of a recipe. `train` does this automatically if the data is not prepared yet.

The data folder contains train.bin and val.bin in nanoGPT's format, the tokenizer and a manifest.json. The name of
the folder depends on every setting that affects the tokens.
"""

from pydantic import Field

from ..data import dataset, run_data
from ..data.manifest import describe_split
from ..data.prepare import MADE, prepare_parts, ready
from ..distributed.launcher import is_main, world_size
from ..recipe import FIELDS, SECTIONS, load_recipe
from ..tracking.console import Console
from ..utils import cli
from ..utils.fields import Int, Section, raise_problems


class PrepareOptions(Section):
    """The options of `prepare`, in addition to the keys of a recipe."""

    workers: Int = Field(1, ge=1, description="number of processes that divide the files of the corpus among them")
    worker: Int = Field(0, ge=0, description="number of this process, from 0 to workers - 1")


def main(argv):
    if cli.wants_help(argv):
        usage = "nanogpt-accel prepare RECIPE [worker=0 workers=4] [key=value ...]"
        return cli.show_help(usage, __doc__, {"options": PrepareOptions, "data": SECTIONS["data"]})
    target, options, settings, problems = cli.parse_with_recipe(argv, PrepareOptions, FIELDS)
    if target is None:
        problems.append("RECIPE is missing; usage: nanogpt-accel prepare shakespeare_char")
    raise_problems(problems)
    recipe = load_recipe(
        target, settings, check=lambda recipe: check_workers(recipe.data, options) + run_data.check(recipe.data)
    )
    for name, section in run_data.sections(recipe.data).items():
        was_prepared = dataset.is_prepared(section)
        report = Console(is_main())
        if options.workers > 1 and not prepare_parts(section, options.worker, options.workers, report):
            continue
        block_size = recipe.model.block_size if run_data.uses_val(recipe.data, name) else 0
        _, found = ready(section, report, block_size)
        manifest = found.manifest
        if was_prepared:
            print(f"{found.folder}: already prepared")
            for split in manifest["splits"]:
                print(f"{split}: {describe_split(manifest, split)}")
        print(f"tokenizer: {manifest['tokenizer']['kind']}, vocabulary size {manifest['tokenizer']['vocab_size']:,}")


def check_workers(data, options):
    """Check the options. data: the data section of the recipe. Return a list of problems."""
    worker, workers = options.worker, options.workers
    if worker >= workers:
        return [f"worker={worker}: must be below workers={workers}; workers are numbered from 0"]
    if workers > 1 and world_size() > 1:
        fix = "start each worker as a separate process, as in configs/slurm/prepare.sbatch"
        return [f"workers={workers}: not supported with accelerate launch or torchrun; {fix}"]
    if workers > 1 and data.tokenizer in MADE and len({**data.sources, **data.validation}) > 1:
        problem = (
            f"not supported for several sources with tokenizer={data.tokenizer}, because the tokenizer is made from "
            "the first source"
        )
        fix = "first prepare only the first source, then set tokenizer to the data folder of this source"
        return [f"workers={workers}: {problem}; {fix}"]
    return []
