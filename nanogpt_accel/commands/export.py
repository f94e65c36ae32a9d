"""Write a model as a folder of a stock architecture, which any tool loads with no code of ours.

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

    to: str = Field("", description="the folder to write; it must not exist yet, or be empty")
    form: Literal["stock", "custom"] = Field(
        "stock",
        description="stock: GPT2LMHeadModel, LlamaForCausalLM, Qwen3ForCausalLM or NanoChatForCausalLM, "
        "whichever computes exactly the same; custom: GPT with its model.py, for trust_remote_code=True",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the weights, rounded to it")
    vocab: Literal["cut", "keep"] = Field(
        "cut",
        description="the rows of the vocabulary that only round it up: most tools want as many rows as the "
        "tokenizer has symbols",
    )


def main(argv):
    if cli.wants_help(argv):
        return cli.show_help(
            "nanogpt-accel export MODEL --to FOLDER [key=value ...]",
            "Write a model in a form that vLLM, llama.cpp, PEFT, TRL, lm-eval and `transformers "
            "serve` load. Its logits on a text are compared with the source's before it is done.\n"
            "MODEL is a run folder (its best checkpoint), a checkpoint folder, or any other model "
            "that `sample` takes.",
            {"options": ExportOptions},
        )
    target, options, problems = cli.parse_options(argv, ExportOptions)
    to = os.path.expanduser(options.to)
    if target is None:
        problems.append("which model? nanogpt-accel export runs/NAME --to FOLDER")
    else:
        problems += check_model(target)
    if not options.to:
        problems.append("where to? nanogpt-accel export runs/NAME --to FOLDER")
    else:
        problems += check_empty(to, "to")
    raise_problems(problems)
    report = Console(stderr=True)
    source = find_model(target, warn=report)
    name, difference, tokens = export(source, to, options.form, options.vocab == "keep", options.dtype, report)
    print(f"{to}: {name}, largest difference of a logit from {source} over {tokens:,} tokens: {difference:.1e}")
