"""Find the files of recipes/ and configs/, which come with the package.

In a clone, the two folders are next to the package. A wheel has them inside the package, see package_dir in setup.cfg.
"""

import os
import re
import shutil
import textwrap
from pathlib import Path

from .fields import nearest


def packaged(name):
    """Return the path of a packaged file or folder, such as recipes/gpt2.yaml or configs.

    If the file is below the current folder, the path is relative, so that messages in a clone show configs/fsdp2.yaml.
    """
    package = Path(__file__).resolve().parents[1]
    path = package / name if (package / name).exists() else package.parent / name
    try:
        return path.relative_to(os.getcwd())
    except (ValueError, OSError):  # OSError: the current folder was deleted
        return path


def find_packaged(folder, name):
    """Return the path of the packaged file NAME.yaml. folder: recipes or configs.

    Raises:
        ValueError: there is no such file; the message suggests the most similar name.
    """
    paths = {path.stem: path for path in list_packaged(folder)}
    if name.removesuffix(".yaml") not in paths:
        hint = nearest(name, paths) or f"; `nanogpt-accel {folder}` lists them"
        raise ValueError(f"{name}: no such file in the {folder} of this package{hint}")
    return paths[name.removesuffix(".yaml")]


def list_packaged(folder):
    """Return the paths of the YAML files in recipes or configs, sorted by name."""
    return sorted(packaged(folder).glob("*.yaml"))


def summary(path):
    """Return the first sentences of the comment at the top of a YAML file, up to the first empty line."""
    text = re.sub(r"^# yaml-language-server:.*\n", "", path.read_text(encoding="utf-8"))
    return " ".join(re.match(r"(# .*\n)*", text)[0].replace("# ", "").split())


def list_entry(name, *lines):
    """Return an entry for a list in the terminal: a name, and below it, indented lines that are wrapped at words."""
    options = {"width": shutil.get_terminal_size().columns, "break_long_words": False, "break_on_hyphens": False}
    return "\n".join(
        [name, *(textwrap.fill(line, **options, initial_indent="    ", subsequent_indent="    ") for line in lines)]
    )
