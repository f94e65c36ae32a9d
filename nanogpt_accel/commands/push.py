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
        description="stock: exported first, so that any tool loads it with no code of ours; custom: GPT with "
        "its model.py, for trust_remote_code=True",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the weights, rounded to it")
    private: bool = Field(False, description="a repository that is made is private")
    branch: str | None = Field(None, description="branch to push to, made where it is missing; none: main")


def main(argv):
    if cli.wants_help(argv):
        return cli.show_help(
            "nanogpt-accel push MODEL USER/NAME [key=value ...]",
            "Push a model to the Hugging Face Hub: a run folder (its best checkpoint), a checkpoint "
            "folder, or any other model that `sample` takes. NAME alone is one of the token's "
            "user. What the Hub holds already is not sent "
            "again, so a push that broke off goes on when it is repeated.\nThe token is that of "
            "`hf auth login`, or HF_TOKEN.",
            {"options": PushOptions},
        )
    targets, options, problems = cli.parse_options(argv, PushOptions, 2)
    if len(targets) < 2:
        problems.append("what, and where to? nanogpt-accel push runs/NAME USER/NAME")
    else:
        problems += check_push(targets[1], "push")
        problems += check_model(targets[0])
    raise_problems(problems)
    report = Console(stderr=True)
    source = find_model(targets[0], warn=report)
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / targets[1].rpartition("/")[2]
        # before the export, which is slow for a large model
        repo = create(targets[1], options.private, options.branch)
        name, difference, _ = export(source, to, options.form, dtype=options.dtype, report=report)
        report(f"{name}, largest difference of a logit from {source}: {difference:.1e}")
        local = Path(targets[0])
        title = f"{local.resolve().name}, {source.name}" if local.is_dir() else f"the model of {targets[0]}"
        print(upload(to, repo, title, options.branch, report, bars=True))
