"""Run `nanogpt-accel COMMAND ...`. Only the module of the selected command is imported, to start fast."""

import sys
from importlib import import_module

from . import __version__
from .distributed.rendezvous import share_failures
from .utils import cli, startup
from .utils.fields import nearest

COMMANDS = {
    "recipes": "list the recipes of this package, or copy one to change it",
    "configs": "list the configs for `accelerate launch`, or print the path of one",
    "prepare": "tokenize the corpus of a recipe; train does this automatically",
    "data": "show the contents of a data folder",
    "plan": "estimate parameters, memory and time of a recipe, and suggest a launch config",
    "bench": "measure how fast a recipe trains, and compare variants",
    "train": "train a recipe, or resume a run",
    "sweep": "train all combinations of several settings, and compare the losses",
    "sample": "generate text with a model: a run folder, a checkpoint folder or a Hub id",
    "evaluate": "compute loss, perplexity and bits per byte of a model on a validation split",
    "report": "write an HTML page about one or more runs: curves, samples, recipes",
    "export": "convert a model to a stock transformers architecture, which other tools can load",
    "import": "convert a nanoGPT checkpoint to a model folder",
    "push": "push a model to the Hugging Face Hub",
    "doctor": "check this machine and the launcher settings, and suggest fixes",
}
USES_TORCH = {
    "train",
    "sample",
    "evaluate",
    "export",
}  # not bench: the profiler prints an error if a thread loads torch


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    return cli.run(_dispatch, argv)


def _dispatch(argv):
    if argv[:1] == ["--version"]:
        print(f"nanogpt-accel {__version__}")
    elif not argv or argv[0] in ("-h", "--help", "help"):
        print("usage: nanogpt-accel COMMAND [TARGET] [key=value ...]\n")
        for name, meaning in COMMANDS.items():
            print(f"  {name:<10}{meaning}")
        print("\n`nanogpt-accel COMMAND --help` lists a command's options. Start with:")
        print("  nanogpt-accel train quickstart")
    elif argv[0] not in COMMANDS:
        raise ValueError(f"unknown command {argv[0]!r}{nearest(argv[0], COMMANDS)}; commands: {', '.join(COMMANDS)}")
    else:
        if argv[0] in USES_TORCH and not cli.wants_help(argv):
            startup.preload_torch()
        share_failures(import_command(argv[0]).main)(argv[1:])


def import_command(name):
    """Import and return the module of a command."""
    module = {"train": "train", "import": "commands.import_nanogpt"}.get(name, f"commands.{name}")
    return import_module(f".{module}", __package__)


if __name__ == "__main__":
    sys.exit(main())
