"""Export a model for other tools: to a stock architecture of transformers, to llama.cpp, or back to nanoGPT.

nanogpt-accel export runs/gpt2 --to my-gpt
nanogpt-accel export runs/odd --to my-gpt form=custom
nanogpt-accel export runs/gpt2 --to my-gpt.gguf dtype=q8_0
nanogpt-accel export runs/gpt2 --to nanoGPT/out/ckpt.pt
"""

import os
from importlib.util import find_spec
from typing import Literal

from pydantic import Field

from ..checkpoint.run_folder import check_empty, check_new_file
from ..models.export import export, export_gguf, export_nanogpt
from ..models.find import check_model, find_model
from ..tracking.console import Console
from ..utils import cli
from ..utils.fields import Section, raise_problems
from ..utils.text import printable

FILE_FORMS = {".pt": "nanogpt", ".gguf": "gguf"}  # file name extension -> form


class ExportOptions(Section):
    """The options of `export`."""

    to: str = Field("", description="output folder (empty or new), or a new file NAME.gguf or NAME.pt")
    form: Literal["auto", "stock", "custom", "nanogpt", "gguf"] = Field(
        "auto",
        description="stock: transformers' GPT-2, Llama, Qwen3 or NanoChat; custom: this package's GPT with model.py; "
        "nanogpt: a ckpt.pt; gguf: a file for llama.cpp; auto: nanogpt for *.pt, gguf for *.gguf, otherwise stock",
    )
    dtype: Literal["float32", "bfloat16", "float16", "q8_0"] = Field(
        "float32", description="dtype of the exported weights; q8_0: 8 bits per weight, only for gguf"
    )
    vocab: Literal["cut", "keep"] = Field(
        "cut",
        description="cut: remove the padding entries of the vocabulary, because most tools expect the vocabulary size "
        "of the tokenizer; a stock model also keeps the padding token, unless the tokenizer is GPT-2's. keep: export "
        "all entries",
    )


def main(argv):
    if cli.wants_help(argv):
        return cli.show_help(
            "nanogpt-accel export MODEL --to FOLDER|NAME.gguf|ckpt.pt [key=value ...]",
            "Write a model as a folder for vLLM, PEFT, TRL, lm-eval and `transformers serve`, or as a file for "
            "llama.cpp (*.gguf) or nanoGPT (*.pt). Then check that the exported model computes the same logits.\n"
            "MODEL is a run folder (its best checkpoint), a checkpoint folder, or any model that `sample` accepts.",
            {"options": ExportOptions},
        )
    target, options, problems = cli.parse_options(argv, ExportOptions)
    to = os.path.expanduser(options.to)
    usage = "nanogpt-accel export runs/NAME --to FOLDER"
    problems += [f"MODEL is missing; usage: {usage}"] if target is None else check_model(target)
    to, form, found = check_output(to, options) if to else (to, "", [f"--to is missing; usage: {usage}"])
    raise_problems(problems + found)
    report = Console(stderr=True)
    source = find_model(target, warn=report)
    keep_padding, notes = options.vocab == "keep", []
    if form == "nanogpt":
        name, difference, tokens, notes = export_nanogpt(source, to, keep_padding, options.dtype, report)
    elif form == "gguf":
        name, difference, tokens, notes = export_gguf(source, to, keep_padding, options.dtype, report)
    else:
        name, difference, tokens = export(source, to, form, keep_padding, options.dtype, report)
    notes = [f"{to}: {name}, largest logit difference from {source} over {tokens:,} tokens: {difference:.1e}", *notes]
    print(printable("\n".join(notes)))


def check_output(to, options):
    """Return (to, form, problems): the output folder or file, its form, and a list of problems with the options."""
    implied = next((form for extension, form in FILE_FORMS.items() if to.lower().endswith(extension)), None)
    form = options.form if options.form != "auto" else implied or "stock"
    if form == "nanogpt" and implied is None:
        to, implied = os.path.join(to, "ckpt.pt"), "nanogpt"
    if form in ("stock", "custom"):
        problems = check_empty(to, "to")
    else:
        problems = check_new_file(to, "to")
    if form == "nanogpt" and not problems:
        problems += check_new_file(os.path.join(os.path.dirname(to), "meta.pkl"), "to")
    if implied != (form if form in FILE_FORMS.values() else None):
        problems = [f"to={to}: the name does not fit form={form}; a gguf file is named *.gguf, a nanogpt file *.pt"]
    if form == "gguf" and not problems and find_spec("gguf") is None:
        problems.append("form=gguf requires the package gguf; install it with: pip install gguf")
    if options.dtype == "q8_0" and form != "gguf":
        problems.append(f"dtype=q8_0 requires form=gguf, not {form}; set `to` to a file NAME.gguf")
    return to, form, problems
