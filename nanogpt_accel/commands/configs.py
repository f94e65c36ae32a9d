"""List the launch configs that come with the package, or print the path of one.

nanogpt-accel configs
accelerate launch --config_file "$(nanogpt-accel configs --path multi_gpu)" -m nanogpt_accel.train gpt2
"""

from pydantic import Field

from ..utils import cli
from ..utils.fields import Section, raise_problems
from ..utils.packaged import find_packaged, list_entry, list_packaged, packaged, summary
from ..utils.text import quoted


class ConfigsOptions(Section):
    """The options of `configs`."""

    path: str | None = Field(None, description="name of a config; print the path of its file instead of the list")


def main(argv):
    if cli.wants_help(argv):
        return cli.show_help(
            "nanogpt-accel configs [--path NAME]",
            "List the configs for `accelerate launch` that come with the package, or print the path of one.",
            {"options": ConfigsOptions},
        )
    target, options, problems = cli.parse_options(argv, ConfigsOptions)
    if target is not None:
        problems.append(f"{target}: `configs` accepts only options; for the path of a config, use --path {target}")
    raise_problems(problems)
    if options.path:
        print(find_packaged("configs", options.path).absolute())
        return
    for path in list_packaged("configs"):
        print(list_entry(path.stem, summary(path)))
    print('\nLaunch with a config:  accelerate launch --config_file "$(nanogpt-accel configs --path multi_gpu)" ...')
    print(f"To edit them, copy all configs and SLURM scripts:  cp -r {quoted(packaged('configs').absolute())} .")
