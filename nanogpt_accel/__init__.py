"""nanoGPT, rebuilt on Hugging Face Accelerate: one recipe, one plain training loop, one model that any tool can load.

To train from Python, use `from nanogpt_accel.train import train`. GPT and the other public names are imported on first
use, so that `nanogpt-accel --help` does not wait for torch.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {"GPT": "model", "GPTConfig": "model", "Recipe": "recipe", "load_recipe": "recipe"}  # name -> module
__all__ = list(_PUBLIC)


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
