"""Show the contents of a data folder, or the sources of a recipe.

nanogpt-accel data data/shakespeare_char-1234abcd
nanogpt-accel data mixture
"""

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
from pydantic import Field

from ..data import dataset, run_data
from ..data.manifest import describe_split
from ..recipe import SECTIONS, find_recipe, load_recipe
from ..utils import cli
from ..utils.fields import Int, Section, raise_problems
from ..utils.text import counted, printable

WIDTH = 100  # characters per line when text is shown
COUNTED = 50_000_000  # the most common tokens are determined from this many tokens per split


class DataOptions(Section):
    """The options of `data`."""

    peek: Int = Field(60, ge=0, description="number of tokens to show from the start of each split")
    tokenizer: str = Field(
        "gpt2",
        description="gpt2, or a folder with a tokenizer.json; only used for token files of other projects whose folder "
        "contains no tokenizer",
    )
    json_output: bool = Field(False, alias="json", description="print one JSON object and nothing else")


def main(argv):
    if cli.wants_help(argv):
        return cli.show_help(
            "nanogpt-accel data FOLDER | RECIPE [key=value ...]",
            "Show the contents of a data folder that this package or another project wrote: counts, bytes per token, "
            "the ten most common tokens, and the start of the text. If there is a manifest, its hashes are verified.\n"
            "For a recipe, show its sources: tokens, shares of the mix, and epochs over the run.",
            {"options": DataOptions},
        )
    target, options, problems = cli.parse_options(argv, DataOptions)
    if target is None:
        problems.append("FOLDER is missing; usage: nanogpt-accel data data/NAME")
    raise_problems(problems)
    recipe = target if target.endswith((".yaml", ".yml")) else None
    if not (recipe or Path(target).exists()):
        with suppress(FileNotFoundError):  # neither a folder nor a recipe; open_dataset raises the error
            recipe = find_recipe(target)
    if recipe:
        return show_sources(recipe, options)
    data = dataset.open_dataset(SECTIONS["data"](data_dir=target, tokenizer=options.tokenizer), verify=True)
    splits = {split: describe(data, split, options.peek) for split in data.splits}
    if options.json_output:
        print(json.dumps({"folder": target, "manifest": data.manifest, "splits": splits}))
        return
    corpus = data.manifest["corpus"]
    facts = [f"{key} {corpus[key]}" for key in ("id", "config", "revision", "commit") if corpus.get(key)]
    facts += [counted(corpus["files"], "file")] if corpus.get("files") else []
    eot = "no end-of-text token" if data.tokenizer.eot_id is None else f"end-of-text id {data.tokenizer.eot_id}"
    about = f"{target}: {', '.join([corpus['name'], *facts])}; tokenizer {data.tokenizer.kind}"
    print(printable(f"{about}, vocabulary size {data.tokenizer.vocab_size:,}, {eot}; {data.manifest['dtype']}"))
    for split, facts in splits.items():
        counts = data.manifest["splits"][split]
        print(f"\n{split}: {describe_split(data.manifest, split)}, {counted(len(counts['files']), 'file')}")
        print("  most common: " + ", ".join(f"{text!r} {share:.1%}" for text, share in facts["commonest"]))
        if options.peek:
            text = repr(facts["begins"])
            lines = [text[start : start + WIDTH] for start in range(0, len(text), WIDTH)]
            print("  text: " + "\n        ".join(lines))


def show_sources(target, options):
    """Print the sources of a recipe: their tokens, their shares of the mix, their epochs over the run, their folders.

    target: the path of the recipe.
    """
    recipe = load_recipe(target, check=lambda recipe: run_data.check(recipe.data))
    folders, train_tokens = {}, {}
    for name, section in run_data.sections(recipe.data).items():
        is_prepared = run_data.has_tokenizer(recipe.data, section) and dataset.is_prepared(section)
        folders[name] = str(dataset.data_folder(section)) if is_prepared else None
        if name in recipe.data.sources:
            manifest = dataset.manifest_of(section, folders[name]) if is_prepared else None
            train_tokens[name] = manifest and manifest["splits"]["train"]["tokens"]
    rows, starts = run_data.mix_table(recipe, train_tokens), [step for step, _ in recipe.stages]
    if options.json_output:
        print(json.dumps({"recipe": str(target), "starts": starts, "sources": rows, "folders": folders}))
        return
    print("\n".join(run_data.describe_mix(starts, rows)))
    for name, folder in folders.items():
        print(f"{name}: {folder or 'not prepared'}")


def describe(data, split, peek):
    """Return a dictionary about a split: its size, its most common tokens, and the text of its first `peek` tokens."""
    tokens, counts = data.splits[split], data.manifest["splits"][split]
    frequencies = np.zeros(data.tokenizer.vocab_size, np.int64)
    for start in range(0, min(len(tokens), COUNTED), 2**20):
        ids = tokens.rows([start], min(2**20, len(tokens) - start))[0]
        if ids.max() >= len(frequencies):
            raise ValueError(
                f"{tokens.paths[0]}: contains the token id {ids.max()}, but the vocabulary size of the tokenizer is "
                f"{len(frequencies):,}, so the file was made with another tokenizer; prepare the data again"
            )
        frequencies += np.bincount(ids, minlength=len(frequencies))
    common = [i for i in np.argsort(-frequencies, kind="stable")[:10] if frequencies[i]]
    return {
        "tokens": len(tokens),
        "documents": counts["documents"],
        "bytes_per_token": counts["bytes"] / len(tokens) if counts["bytes"] else None,
        "commonest": [(data.tokenizer.decode([i]), frequencies[i] / frequencies.sum()) for i in common],
        "begins": data.tokenizer.decode(tokens.rows([0], min(peek, len(tokens)))[0]),
    }
