"""Tokenize the corpus of a recipe. `train` does this automatically if the data is not prepared yet.

The data folder contains train.bin and val.bin in nanoGPT's format, the tokenizer and a manifest.json. The name of
the folder depends on every setting that affects the tokens.
"""

from ..data import dataset, run_data
from ..data.manifest import describe_split
from ..data.prepare import ready
from ..distributed.launcher import is_main
from ..recipe import FIELDS, SECTIONS, load_recipe
from ..tracking.console import Console
from ..utils import cli


def main(argv):
    if cli.wants_help(argv):
        return cli.show_help("nanogpt-accel prepare RECIPE [key=value ...]", __doc__, {"data": SECTIONS["data"]})
    target, options = cli.parse(argv, FIELDS)
    if target is None:
        raise ValueError("RECIPE is missing; usage: nanogpt-accel prepare shakespeare_char")
    recipe = load_recipe(target, options, check=lambda recipe: run_data.check(recipe.data))
    for name, section in run_data.sections(recipe.data).items():
        was_prepared = dataset.is_prepared(section)
        block_size = recipe.model.block_size if run_data.uses_val(recipe.data, name) else 0
        _, found = ready(section, Console(is_main()), block_size)
        manifest = found.manifest
        if was_prepared:
            print(f"{found.folder}: already prepared")
            for split in manifest["splits"]:
                print(f"{split}: {describe_split(manifest, split)}")
        print(f"tokenizer: {manifest['tokenizer']['kind']}, vocabulary size {manifest['tokenizer']['vocab_size']:,}")
