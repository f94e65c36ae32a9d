"""Show what is in a data folder.

nanogpt-accel data data/shakespeare_char-1234abcd
"""

import json

import numpy as np
from pydantic import Field

from ..data import dataset
from ..recipe import SECTIONS
from ..utils import cli
from ..utils.fields import Int, Section, raise_problems
from ..utils.text import counted

WIDTH = 100  # characters of a line of the text that is shown
COUNTED = 50_000_000  # tokens of a split that the commonest ones are counted in


class DataOptions(Section):
    """The options of `data`."""

    peek: Int = Field(60, ge=0, description="tokens shown from the beginning of each split")
    json_output: bool = Field(False, alias="json", description="print one JSON object and nothing else")


def main(argv):
    if cli.wants_help(argv):
        return cli.show_help(
            "nanogpt-accel data FOLDER [key=value ...]",
            "What is in a data folder, ours or nanoGPT's: counts, bytes a token, the ten commonest "
            "tokens, and a look at the text. All of ours is held against its manifest's hashes.",
            {"options": DataOptions},
        )
    target, options, problems = cli.parse_options(argv, DataOptions)
    if target is None:
        problems.append("which folder? nanogpt-accel data data/NAME")
    raise_problems(problems)
    found = dataset.open_dataset(SECTIONS["data"](data_dir=target), verify=True)
    shown = {split: describe(found, split, options.peek) for split in found.splits}
    if options.json_output:
        print(json.dumps({"folder": target, "manifest": found.manifest, "splits": shown}))
        return
    corpus = found.manifest["corpus"]
    facts = [f"{key} {corpus[key]}" for key in ("id", "config", "revision", "commit") if corpus.get(key)]
    facts += [counted(corpus["files"], "file")] if corpus.get("files") else []
    print(
        f"{target}: {', '.join([corpus['name'], *facts])}; tokenizer {found.tokenizer.kind}, "
        f"{found.tokenizer.vocab_size:,} symbols, end of text "
        f"{'none' if found.tokenizer.eot_id is None else found.tokenizer.eot_id}; {found.manifest['dtype']}"
    )
    for split, facts in shown.items():
        files = len(found.manifest["splits"][split]["files"])
        size = (
            f", {counted(facts['documents'], 'document')}, {facts['bytes_per_token']:.3f} bytes a token"
            if facts["bytes_per_token"]
            else ""
        )
        print(f"\n{split}: {counted(facts['tokens'], 'token')}{size}, {counted(files, 'file')}")
        print("  commonest: " + ", ".join(f"{text!r} {share:.1%}" for text, share in facts["commonest"]))
        if options.peek:
            begins = repr(facts["begins"])
            lines = [begins[start : start + WIDTH] for start in range(0, len(begins), WIDTH)]
            print("  begins: " + "\n          ".join(lines))


def describe(found, split, peek):
    """Counts, commonest tokens as (text, share), and the beginning of one split of a Dataset."""
    tokens, counts = found.splits[split], found.manifest["splits"][split]
    seen = np.zeros(found.tokenizer.vocab_size, np.int64)
    for start in range(0, min(len(tokens), COUNTED), 2**20):
        ids = tokens.rows([start], min(2**20, len(tokens) - start))[0]
        if ids.max() >= len(seen):
            raise ValueError(
                f"{tokens.paths[0]}: holds the id {ids.max()}, but the tokenizer has only {len(seen):,} "
                "symbols: these tokens are another tokenizer's"
            )
        seen += np.bincount(ids, minlength=len(seen))
    commonest = [
        (found.tokenizer.decode([i]), seen[i] / seen.sum()) for i in np.argsort(-seen, kind="stable")[:10] if seen[i]
    ]
    begins = tokens.rows([0], min(peek, len(tokens)))[0]
    return {
        "tokens": len(tokens),
        "documents": counts["documents"],
        "bytes_per_token": counts["bytes"] / len(tokens) if counts["bytes"] else None,
        "commonest": commonest,
        "begins": found.tokenizer.decode(begins),
    }
