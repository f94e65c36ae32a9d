"""Generate text with a trained model.

nanogpt-accel sample runs/shakespeare_char --prompt "ROMEO:"
nanogpt-accel sample gpt2-xl --start=FILE:prompt.txt num_samples=3 temperature=1.0
nanogpt-accel sample runs/gpt2 prompts=questions.txt batch_size=16 num_samples=1
"""

import json
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field

from ..data.losses import describe_losses
from ..data.readers import how_to_convert
from ..data.tokenizer import Tokenizer
from ..models.find import check_model, find_model
from ..models.load import check_tokenizer, load_model, read_config
from ..tracking.console import Console
from ..utils import cli
from ..utils.fields import Device, Float, Int, Section, raise_problems, validate
from ..utils.text import printable, quoted


class SampleOptions(Section):
    """The options of `sample`. The defaults are the same as in nanoGPT's sample.py."""

    prompt: str = Field(
        "\n",
        validation_alias=AliasChoices("prompt", "start"),
        description="text to continue, or FILE:path to read the text from a file; alias: start, as in nanoGPT. The "
        "default is a line end, or the first token if the vocabulary has no line end",
    )
    prompts: str | None = Field(None, description="text file with one prompt per line, instead of prompt=...")
    num_samples: Int = Field(10, ge=1, description="number of samples per prompt")
    batch_size: Int = Field(
        1,
        ge=1,
        description="samples per batch; large batches are faster, but only batch_size=1 prints text during generation",
    )
    max_new_tokens: Int = Field(500, ge=1, description="number of tokens to generate per sample")
    temperature: Float = Field(0.8, ge=0, description="below 1: less random; above 1: more random; 0: greedy decoding")
    top_k: Int = Field(200, ge=0, description="sample from the k most likely tokens; 0: from all tokens")
    top_p: Float = Field(1.0, gt=0, le=1, description="sample from the most likely tokens up to this total probability")
    overflow: Literal["slide", "stop", "extend"] = Field(
        "slide",
        description="what to do when the text reaches block_size tokens. slide: continue with the last half of the "
        "text as context; stop: end the text; extend: use positions beyond block_size (rotary positions only)",
    )
    stop_at_eos: bool | None = Field(
        None,
        description="end a sample at the end-of-text token; default: true if the tokenizer has such a token",
    )
    stop: str | None = Field(
        None,
        description=r"end a sample before this text, such as stop='\n\n' (\n is a line end, \t a tab). For several "
        r"""texts, give a JSON list, such as stop='["\n\n", "User:"]'""",
    )
    special_tokens: Literal["text", "tokens"] | None = Field(
        None,
        description="how to encode special tokens, such as <|endoftext|>, in the prompt. text: as ordinary text; "
        "tokens: as their ids; default: the value used for the model's training data, or tokens if this is unknown",
    )
    seed: Int = Field(1337, ge=0, lt=2**63 - 2**32, description="random seed; sample i uses seed + i")
    device: Device = Field("auto", description="device to use: auto, cpu, cuda, cuda:N or mps")
    json_output: bool = Field(False, alias="json", description="print each sample as a JSON object: prompt, text, seed")


def main(argv):
    if cli.wants_help(argv):
        return cli.show_help(
            "nanogpt-accel sample MODEL [key=value ...]",
            "Generate text with a model: a run folder (its best checkpoint), a checkpoint folder, gpt2 to gpt2-xl, or "
            "another folder or Hub id of a GPT-2, Llama, Qwen3 or NanoChat model.",
            {"options": SampleOptions},
        )
    fields = SampleOptions.model_fields
    target, given = cli.parse(argv, {**fields, "start": fields["prompt"], "json": fields["json_output"]})
    # nanoGPT's sample.py names the model with these options; the error below shows the usage of this command
    nanogpt_target = [given.pop(key) for key in ("out_dir", "init_from") if key in given]
    options, problems, _ = validate(SampleOptions, given)
    if "prompts" in given and not {"prompt", "start"}.isdisjoint(given):
        problems.append(f"prompts={options.prompts}: cannot be combined with prompt; remove one of them")
    if target is None or nanogpt_target:
        problems.append(f"MODEL is missing; usage: nanogpt-accel sample {quoted((nanogpt_target or ['runs/NAME'])[0])}")
    else:
        problems += check_model(target)
    prompts = []
    try:
        prompts = read_prompts(options)
        stop_texts(options.stop)
    except ValueError as error:
        problems.append(str(error))
    raise_problems(problems)
    console = Console(stderr=True)
    folder = find_model(target, warn=console)
    tokenizer = Tokenizer.load(folder)
    tokenizer.special_tokens = options.special_tokens or tokenizer.special_tokens
    if {"prompt", "start", "prompts"}.isdisjoint(given):
        prompts = [tokenizer.default_prompt()]
    raise_problems(check_prompts(folder, tokenizer, prompts, options))
    for prompt in prompts:
        if lost := describe_losses(prompt, tokenizer):
            console.say(f"warning: prompt={prompt[:40]!r}: with the tokenizer of {folder}, {lost}")
    write_texts(folder, tokenizer, prompts, options)


def read_prompts(options):
    """Return the list of prompts from prompt=..., prompt=FILE:... or prompts=FILE.

    Raises:
        ValueError: the file cannot be read, or prompts=FILE contains no prompts.
    """
    file = options.prompts or (options.prompt if options.prompt.startswith("FILE:") else None)
    if file is None:
        return [options.prompt]
    file = file.removeprefix("FILE:")
    try:
        text = Path(file).read_text(encoding="utf-8-sig")  # without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        key = f"prompts={file}" if options.prompts else f"prompt=FILE:{file}"
        problem = getattr(error, "strerror", None) or f"not UTF-8 text; {how_to_convert(Path(file).read_bytes(), file)}"
        raise ValueError(f"{key}: {problem}") from None
    if not options.prompts:
        return [text]
    if lines := [line for line in text.splitlines() if line]:
        return lines
    raise ValueError(f"prompts={file}: contains no prompts; write one prompt per line")


def stop_texts(stop):
    """Return the stop strings as a list. stop: one string, a JSON list of strings, or None.

    Raises:
        ValueError: `stop` looks like a JSON list of strings, but is not a valid one.
    """
    if not stop:
        return []
    texts = None
    with suppress(ValueError):  # stop=[INST], for example, is not JSON but a single string
        texts = json.loads(stop, strict=False)
    if isinstance(texts, list) and all(isinstance(text, str) and text for text in texts):
        return texts
    if re.match(r'\[\s*"', stop):
        raise ValueError(f'stop={stop}: not a JSON list of strings; use quotes such as stop=\'["a", "b"]\'')
    return [stop.replace("\\n", "\n").replace("\\t", "\t")]


def check_prompts(folder, tokenizer, prompts, options):
    """Check prompts and options against the model, before torch is imported. Return a list of problems."""
    config = read_config(folder)
    problems = check_tokenizer(tokenizer, config, folder)
    key = "prompts" if options.prompts else "prompt"
    max_tokens = config["block_size"] if options.overflow == "stop" else None  # slide and extend allow longer prompts
    for prompt in prompts:
        problems += tokenizer.check_prompt(prompt, max_tokens, key)
    if options.stop_at_eos and tokenizer.eot_id is None:
        fix = "remove stop_at_eos, or set stop to a text that ends a sample"
        problems.append(f"stop_at_eos=true: the tokenizer in {folder} has no end-of-text token; {fix}")
    if options.overflow == "extend" and config["position"] != "rotary":
        limit = f"block_size={config['block_size']}"
        problems.append(
            f"overflow=extend: {folder} has no position embeddings beyond {limit}; set overflow to slide or stop"
        )
    return problems


def write_texts(folder, tokenizer, prompts, options):
    """Generate and print num_samples texts per prompt. If a batch has only one text, print it during generation."""
    from transformers.utils import logging as transformers_logging

    from ..distributed import cpu
    from ..distributed.accelerator import pick_device
    from ..models.generation import generate, text_after

    transformers_logging.set_verbosity_error()  # transformers also warns about valid options
    model = load_model(folder).to(pick_device(options.device))
    cpu.tune_generation(model)
    settings = options.model_dump(include={"max_new_tokens", "temperature", "top_k", "top_p", "overflow"})
    settings |= {"vocab_size": tokenizer.vocab_size, "decode": tokenizer.decode}
    stop = stop_texts(options.stop)
    settings |= {"stop": stop, "eos_id": None if options.stop_at_eos is False else tokenizer.eot_id}
    prompts = [prompt for prompt in prompts for _ in range(options.num_samples)]
    is_terminal = sys.stdout.isatty()

    def write(text):
        print(printable(text) if is_terminal else text, end="", flush=True)

    for i in range(0, len(prompts), options.batch_size):
        batch = prompts[i : i + options.batch_size]
        prompt_ids = [tokenizer.encode_prompt(prompt) for prompt in batch]
        seeds = range(options.seed + i, options.seed + i + len(batch))
        is_streamed = len(batch) == 1 and not options.json_output
        on_text = write if is_streamed else None
        if is_streamed:
            on_text(batch[0])
        try:
            new_ids = generate(model, prompt_ids, seeds=seeds, on_text=on_text, **settings)
        except FloatingPointError as error:
            raise ValueError(f"{folder}: {error}") from None
        if is_streamed:
            write("\n---------------\n")
            continue
        for prompt, seed, before, ids in zip(batch, seeds, prompt_ids, new_ids, strict=True):
            text = text_after(tokenizer.decode, before, ids, stop)
            if options.json_output:
                print(json.dumps({"prompt": prompt, "text": text, "seed": seed}), flush=True)
            else:
                write(f"{prompt}{text}\n---------------\n")
