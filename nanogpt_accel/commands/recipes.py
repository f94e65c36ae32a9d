"""List the recipes that come with the package, or copy one to change it.

nanogpt-accel recipes
nanogpt-accel recipes --copy quickstart --to mine.yaml
"""

import re
from pathlib import Path

from pydantic import Field

from ..recipe import load_recipe
from ..utils import cli
from ..utils.fields import Section, raise_problems
from ..utils.packaged import find_packaged, list_entry, list_packaged, packaged, summary
from ..utils.text import first_line, quoted


class RecipesOptions(Section):
    """The options of `recipes`."""

    copy_name: str | None = Field(None, alias="copy", description="name of the recipe to copy")
    to: str | None = Field(None, description="file that --copy writes; default: NAME.yaml in the current folder")


def main(argv):
    if cli.wants_help(argv):
        return cli.show_help(
            "nanogpt-accel recipes [--copy NAME] [--to FILE]",
            "List the recipes that come with the package, with the task, hardware, time and expected loss of each. "
            "Other commands accept the names of recipes, for example: nanogpt-accel train quickstart.",
            {"options": RecipesOptions},
        )
    target, options, problems = cli.parse_options(argv, RecipesOptions)
    if target is not None:
        problems.append(f"{target}: `recipes` accepts only options; to copy a recipe, use --copy {target}")
    if options.to and not options.copy_name:
        problems.append(f"to={options.to}: the recipe to copy is missing; add --copy NAME")
    raise_problems(problems)
    if options.copy_name:
        copy(find_packaged("recipes", options.copy_name), options.to)
    else:
        print_list()


def print_list():
    """Print the name, task, hardware, time and expected loss of each recipe."""
    for path in list_packaged("recipes"):
        try:
            lines = [summary(path), expectation(load_recipe(path).expect)]
        except (OSError, ValueError) as error:  # in a clone, the folder may contain an unfinished recipe of the user
            lines = [first_line(error)]
        print(list_entry(path.stem, *lines))
    print("\nTrain a recipe:  nanogpt-accel train quickstart\nChange a copy:   nanogpt-accel recipes --copy quickstart")


def expectation(expect):
    """Return the hardware, time and validation loss of a recipe as one line of text."""
    best = "best " if expect.evaluation == "best" else ""
    loss = "unknown" if expect.val_loss is None else f"{expect.val_loss:g}"
    loss += f" +- {expect.tolerance:g}" if expect.tolerance else ""
    loss += f" ({expect.source})" if expect.source else ""
    needs = ", ".join(filter(None, (expect.hardware, expect.time)))
    return f"hardware: {needs or 'unknown'}; {best}validation loss: {loss}"


def copy(recipe, to):
    """Copy a packaged recipe to the file `to`.

    In the header of the copy, the train command uses the path `to`, and the path of the schema for editors is absolute.
    The copy has no expected loss, because the user will change its settings.

    Raises:
        FileExistsError: `to` exists. FileNotFoundError: the folder of `to` does not exist.
    """
    to = Path(to or recipe.name)
    schema = packaged("recipes/recipe.schema.json").absolute().as_uri()
    text = recipe.read_text(encoding="utf-8").replace("$schema=recipe.schema.json", f"$schema={schema}")
    text = text.replace(f"recipes/{recipe.name}", quoted(to)).replace(f"runs/{recipe.stem}", f"runs/{to.stem}")
    text = re.sub(r"\nexpect:\n(?:  .*\n)+", "", text)
    try:
        with open(to, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise FileExistsError(f"to={to}: already exists; set `to` to another file") from None
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"to={to}: the folder {to.parent} does not exist; create it") from None
    print(f"wrote {to}; to train it: nanogpt-accel train {quoted(to)}")
