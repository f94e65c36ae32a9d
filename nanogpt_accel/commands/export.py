"""Export a model to a stock architecture of transformers, which other tools load without this package.

nanogpt-accel export runs/gpt2 --to my-gpt
nanogpt-accel export runs/odd --to my-gpt form=custom
"""

import os
from typing import Literal

from pydantic import Field

from ..checkpoint.run_folder import check_empty
from ..models.export import export
from ..models.find import check_model, find_model
from ..tracking.console import Console
from ..utils import cli
from ..utils.fields import Section, raise_problems


class ExportOptions(Section):
    """The options of `export`."""

    to: str = Field("", description="output folder; must be empty or not exist yet")
    form: Literal["stock", "custom"] = Field(
        "stock",
        description="stock: transformers' GPT-2, Llama, Qwen3 or nanochat; custom: this package's GPT with its code",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of the exported weights")
    vocab: Literal["cut", "keep"] = Field(
        "cut",
        description="cut: remove the padding of the vocabulary, because most tools expect the tokenizer's size, except "
        "one entry for a padding token; keep: export all of it",
    )


def main(argv):
    if cli.wants_help(argv):
        return cli.show_help(
            "nanogpt-accel export MODEL --to FOLDER [key=value ...]",
            "Write a model in a format that vLLM, llama.cpp, PEFT, TRL, lm-eval and `transformers serve` load, and "
            "check that the exported model computes the same logits.\n"
            "MODEL is a run folder (its best checkpoint), a checkpoint folder, or any model that `sample` accepts.",
            {"options": ExportOptions},
        )
    target, options, problems = cli.parse_options(argv, ExportOptions)
    to = os.path.expanduser(options.to)
    usage = "nanogpt-accel export runs/NAME --to FOLDER"
    problems += [f"MODEL is missing; usage: {usage}"] if target is None else check_model(target)
    problems += check_empty(to, "to") if to else [f"--to is missing; usage: {usage}"]
    raise_problems(problems)
    report = Console(stderr=True)
    source = find_model(target, warn=report)
    name, difference, tokens = export(source, to, options.form, options.vocab == "keep", options.dtype, report)
    print(f"{to}: {name}, largest logit difference from {source} over {tokens:,} tokens: {difference:.1e}")
