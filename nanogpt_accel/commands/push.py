"""Push a model to the Hugging Face Hub.

nanogpt-accel push runs/gpt2 me/my-gpt
nanogpt-accel push runs/gpt2 me/my-gpt form=custom branch=step-5000 private=true
"""

import tempfile
from pathlib import Path
from typing import Literal

from pydantic import Field

from ..hub.transfer import check_push, create, upload
from ..models.export import export
from ..models.find import check_model, find_model
from ..tracking.console import Console
from ..utils import cli
from ..utils.fields import Section, raise_problems


class PushOptions(Section):
    """The options of `push`."""

    form: Literal["stock", "custom"] = Field(
        "stock",
        description="stock: transformers' GPT-2, Llama, Qwen3 or NanoChat; custom: this package's GPT with model.py",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of the pushed weights")
    private: bool = Field(False, description="if the repository does not exist, create it as private")
    branch: str | None = Field(None, description="branch to push to, created if it does not exist; default: main")


def main(argv):
    if cli.wants_help(argv):
        return cli.show_help(
            "nanogpt-accel push MODEL USER/NAME [key=value ...]",
            "Push a model to the Hugging Face Hub: a run folder (its best checkpoint), a checkpoint folder, or any "
            "other model that `sample` accepts. USER is optional and defaults to the user of the token.\n"
            "Files that the Hub already has are not uploaded again, so an interrupted push can be repeated.\n"
            "The token is read from HF_TOKEN or from `hf auth login`.",
            {"options": PushOptions},
        )
    targets, options, problems = cli.parse_options(argv, PushOptions, 2)
    if len(targets) < 2:
        problems.append("MODEL or USER/NAME is missing; usage: nanogpt-accel push runs/NAME USER/NAME")
    else:
        problems += check_push(targets[1], "push") + check_model(targets[0])
    raise_problems(problems)
    report = Console(stderr=True)
    source = find_model(targets[0], warn=report)
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / targets[1].rpartition("/")[2]
        # create the repository before the export: the Hub may refuse, and the export of a large model is slow
        repo = create(targets[1], options.private, options.branch)
        place = {"repo": repo, "branch": options.branch}
        name, difference, _ = export(source, to, options.form, dtype=options.dtype, report=report, **place)
        report(f"{name}, largest logit difference from {source}: {difference:.1e}")
        local = Path(targets[0])
        title = f"{local.resolve().name}, {source.name}" if local.is_dir() else f"copy of {targets[0]}"
        print(upload(to, repo, title, options.branch, warn=report, report=report, bars=True))
