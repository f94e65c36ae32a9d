"""Write text with a trained model.

    nanogpt-accel sample runs/shakespeare_char --prompt "ROMEO:"
    nanogpt-accel sample runs/shakespeare_char --start=FILE:prompt.txt num_samples=3 temperature=1.0
"""

import sys
from pathlib import Path

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from . import checkpoint, cli
from .cli import Device, Float, Int


class SampleOptions(BaseModel):
    """The options of `sample`; the defaults are nanoGPT's."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    prompt: str = Field("\n", validation_alias=AliasChoices("prompt", "start"),
                        description='what the text begins with, or FILE:path; nanoGPT\'s name, start, works too')
    num_samples: Int = Field(10, ge=1, description="number of texts")
    max_new_tokens: Int = Field(500, ge=1, description="tokens of each text after the prompt")
    temperature: Float = Field(0.8, ge=0, description="below 1 less random, above 1 more; 0 takes the likeliest token")
    top_k: Int = Field(200, ge=0, description="draw from this many of the likeliest tokens; 0: from all")
    top_p: Float = Field(1.0, gt=0, le=1, description="draw from the likeliest tokens that make up this share")
    seed: Int = Field(1337, ge=0, lt=2**63 - 2**32, description="of the draws; sample number i uses seed + i")
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:N or mps")


def main(argv):
    if cli.wants_help(argv):
        return cli.show_help("nanogpt-accel sample MODEL [key=value ...]",
                             "Write text with a model: a run folder (its best checkpoint), a checkpoint folder or a "
                             "Hub id.", {"options": SampleOptions})
    target, given = cli.parse(argv, {**SampleOptions.model_fields, "start": SampleOptions.model_fields["prompt"]})
    options, problems, _ = cli.validate(SampleOptions, given)
    if target is None:
        problems.append("which model? nanogpt-accel sample runs/NAME")
    prompt = options.prompt
    if prompt.startswith("FILE:"):
        try:
            prompt = Path(prompt[5:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"prompt={options.prompt}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}")
    if problems:
        raise ValueError("\n".join(problems))

    # what the tokenizer and the config say is checked before torch is imported
    from .tokenizer import Tokenizer

    folder = checkpoint.find_model(target, warn=lambda line: print(line, file=sys.stderr))
    tokenizer = Tokenizer.load(folder)
    problems = tokenizer.check_prompt(prompt, checkpoint.read_config(folder)["block_size"], "prompt")
    if problems:
        raise ValueError("\n".join(problems))
    prompt_ids = tokenizer.encode_prompt(prompt)

    from transformers.utils import logging as transformers_logging

    from . import launch
    from .generation import generate
    from .model import GPT

    transformers_logging.disable_progress_bar()
    model = GPT.from_pretrained(folder).to(launch.pick_device(options.device)).eval()
    for i in range(options.num_samples):
        print(prompt, end="")
        generate(model, prompt_ids, tokenizer.decode, lambda text: print(text, end="", flush=True),
                 vocab_size=tokenizer.vocab_size, max_new_tokens=options.max_new_tokens,
                 temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed + i)
        print("\n---------------", flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:]))
