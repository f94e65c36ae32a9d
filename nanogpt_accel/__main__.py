"""`nanogpt-accel COMMAND ...`: the table of commands. A command is imported only when it runs."""

import sys
from importlib import import_module

from . import __version__
from .utils import cli
from .utils.fields import nearest

COMMANDS = {
    "prepare": "turn a recipe's corpus into token files (train does it when needed)",
    "data": "show what is in a data folder",
    "plan": "what a recipe needs: parameters, memory, time, and which of configs/ fits",
    "bench": "how fast a recipe trains here, by part; variants side by side",
    "train": "train a recipe, or continue a run folder",
    "sample": "write text with a model: a run folder, a checkpoint folder or a Hub id",
    "evaluate": "loss, perplexity and bits per byte of a model on a validation set",
    "report": "a page about one run or several: curves, samples, recipes",
    "export": "write a model as a stock architecture that any tool loads",
    "import": "read a checkpoint of nanoGPT",
    "push": "push a model to the Hugging Face Hub",
    "doctor": "what this machine and this launch can do, and what to fix",
}


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
        print("  nanogpt-accel train recipes/quickstart.yaml")
    elif argv[0] not in COMMANDS:
        raise ValueError(f"unknown command {argv[0]!r}{nearest(argv[0], COMMANDS)}; there are: {', '.join(COMMANDS)}")
    else:
        import_command(argv[0]).main(argv[1:])


def import_command(name):
    """Return the module of a command."""
    module = {"train": "train", "import": "commands.import_nanogpt"}.get(name, f"commands.{name}")
    return import_module(f".{module}", __package__)


if __name__ == "__main__":
    sys.exit(main())
