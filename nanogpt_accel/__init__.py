"""nanoGPT done again on Hugging Face Accelerate: one recipe, one plain loop, one model anything can load."""

__version__ = "0.1.0"

# name -> module. Loaded on first use, so that `nanogpt-accel --help` does not wait for torch.
_PUBLIC = {"GPT": "model", "GPTConfig": "model", "Recipe": "recipe", "load_recipe": "recipe"}
__all__ = [*_PUBLIC, "train"]  # (a module that can be called, for `python -m nanogpt_accel.train` names it too)


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
