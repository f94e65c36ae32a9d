"""Write model cards: the README.md of checkpoints, exported models and repositories on the Hub."""

import json
import math
import platform
import re
import sys
from pathlib import Path

from .. import __version__
from .transfer import is_model_id

# built-in corpus -> metadata for the Hub; the Hub's list of licenses does not contain Python's license
CORPUS_METADATA = {
    "python": {"language": "code", "license": "other", "license_name": "psf-2.0"},
    "shakespeare": {"language": "en"},  # in the public domain
    "openwebtext": {"language": "en", "license": "cc0-1.0"},
    "bookcorpus": {"language": "en", "license": "unknown"},
    "wikitext2": {"language": "en", "license": "cc-by-sa-4.0"},
    "fineweb_edu": {"language": "en", "license": "odc-by"},
    "tinystories": {"language": "en", "license": "cdla-sharing-1.0"},
}
_LOADING_CODE = re.compile(r"^path = .*\nmodel = .*\ntokenizer = .*$", re.MULTILINE)


def checkpoint_card(recipe, data, trainer, num_parameters):
    """Return the text of a checkpoint's README.md. data: the RunData. trainer: the content of trainer.json."""
    tokenizer, init_from, block_size = data.tokenizer, recipe.model.init_from, recipe.model.block_size
    corpora, steps = {n: s.manifest["corpus"] for n, s in data.sources.items()}, f"after {trainer['step']:,} steps"
    loss = trainer["val_loss"] if trainer["evaluated"] else None  # if not evaluated, val_loss is from an earlier step
    is_hub_id = init_from not in ("scratch", "resume") and not Path(init_from).exists() and is_model_id(init_from)
    base_model = init_from.partition("@")[0] if is_hub_id else None
    start = f", starting from [{base_model}](https://huggingface.co/{base_model})" if base_model else ""
    names = {name: _corpus_link(corpus) for name, corpus in corpora.items()}
    corpus_names = f"{'corpora' if len(names) > 1 else 'corpus'} {', '.join(names.values())}"
    text = (
        f"A GPT language model with {num_parameters:,} parameters and a context length of {block_size:,} tokens. It "
        f"was trained with nanogpt_accel on the {corpus_names}{start}. Its tokenizer is `{tokenizer.kind}`, "
        f"with {tokenizer.vocab_size:,} tokens."
    )
    evaluation = f"This checkpoint was saved {steps} and has not been evaluated."
    if loss is not None:
        evaluation = f"Validation loss {steps}: {loss:.4f} nats per token."
        lines = [f"- {name.removeprefix('val_loss/')}: {score:.4f}" for name, score in trainer["named_scores"].items()]
        evaluation += "\n\nBy validation set and task:\n\n" * bool(lines) + "\n".join(lines)
    training_data = [
        f"{names[name]}: {len(source.train):,} tokens for training, {len(source.val):,} for validation."
        for name, source in data.sources.items()
    ]
    if len(names) > 1:
        training_data = [f"- {line}" for line in training_data]
    versions = {"nanogpt_accel": __version__, "python": platform.python_version()}
    packages = ("torch", "transformers", "accelerate")
    versions |= {name: sys.modules[name].__version__ for name in packages if name in sys.modules}
    sections = {
        "Training data": "\n".join(training_data),
        "Evaluation": evaluation,
        "Training recipe": f"Settings with default values are omitted.\n\n```yaml\n{recipe.to_yaml(brief=True)}```",
        "Framework versions": "\n".join(f"- {name} {version}" for name, version in versions.items()),
    }
    name, more = " ".join(Path(recipe.out_dir).resolve().name.split()), {"base_model": base_model, "sections": sections}
    corpora = list(corpora.values())
    return model_card(name, text, tokenizer, block_size, needs_code=True, corpora=corpora, val_loss=loss, **more)


def _corpus_link(corpus):
    """Return the name of a corpus in Markdown."""
    if corpus.get("id"):
        return f"[{corpus['id']}](https://huggingface.co/datasets/{corpus['id']})"
    return f"`{corpus.get('name', 'unknown')}`"


def model_card(
    name, text, tokenizer, block_size, *, needs_code, corpora=(), val_loss=None, base_model=None, sections=None
):
    """Return the text of a model card: metadata for the Hub, a description, and code that generates text.

    Args:
        name: the title. text: the first paragraph, in Markdown.
        tokenizer, block_size: tokenizer and context length of the model. The prompt in the code depends on the
            tokenizer, and the number of tokens to generate depends on block_size.
        needs_code: whether loading the model requires the model.py in its folder.
        corpora: dictionaries that describe the training corpora: "kind", "name", "id", "config". All are optional.
        val_loss: validation loss on the corpora in nats per token; omitted if it is None, NaN or Inf.
        base_model: Hub id of the model that training started from.
        sections: {title: Markdown} of sections after the code.
    """
    from huggingface_hub import EvalResult, ModelCardData

    corpus, metadata = (corpora[0] if len(corpora) == 1 else {}), {}  # the license of a mix is unknown
    corpus_name = ", ".join(corpus.get("name") or "unknown" for corpus in corpora or [{}])
    if corpus.get("kind") in ("hub", "url", "python"):  # a local file may have the same name as a built-in corpus
        metadata |= CORPUS_METADATA.get(corpus_name, {})
    if val_loss is not None and math.isfinite(val_loss):
        result = EvalResult(
            task_type="text-generation",
            dataset_type=corpus.get("id") or "text",  # a local file may have the name of a dataset
            dataset_name=corpus_name,
            dataset_config=corpus.get("config"),
            dataset_split="validation",
            metric_type="loss",
            metric_value=val_loss,
        )
        metadata |= {"model_name": name, "eval_results": [result]}
    if ids := [corpus["id"] for corpus in corpora if corpus.get("id")]:
        metadata["datasets"] = ids
    metadata |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["nanogpt_accel", "gpt"]}
    data = ModelCardData(base_model=base_model, **metadata)
    sections = {"Usage": f"```python\n{_usage_code(tokenizer, block_size, needs_code)}```", **(sections or {})}
    body = "\n\n".join(f"## {title}\n\n{content.strip()}" for title, content in sections.items())
    return f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n{text}\n\n{body}\n"


def _usage_code(tokenizer, block_size, needs_code):
    """Return Python code that loads a model from the current folder and generates text."""
    prompt = "The"
    if tokenizer.kind == "char":  # it cannot encode characters that are not in the vocabulary
        characters = tokenizer.vocab.keys() - tokenizer.special
        prompt = "".join(c for c in prompt if c in characters) or min(characters, default="")
    elif tokenizer.check_prompt(prompt, None, "prompt"):  # the tokenizer cannot encode this word
        prompt = tokenizer.default_prompt()
    return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

{_loading_code(needs_code)}
inputs = tokenizer({json.dumps(prompt, ensure_ascii=False)}, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens={max(1, min(50, block_size - 4))})
print(tokenizer.decode(output[0]))
"""


def _loading_code(needs_code, repo=None, branch=None):
    options = f', revision="{branch}"' if branch else ""
    # AutoTokenizer also reads config.json, and asks whether to trust its code
    options += ", trust_remote_code=True" if needs_code else ""
    return f"""path = {f'"{repo}"' if repo else '"."  # this folder'}
model = AutoModelForCausalLM.from_pretrained(path{options})
tokenizer = AutoTokenizer.from_pretrained(path{options})"""


def adapt_usage(card, needs_code, repo=None, branch=None):
    """Return a card whose code loads the model from a Hub repository, or from the current folder if `repo` is None."""
    return _LOADING_CODE.sub(lambda match: _loading_code(needs_code, repo, branch), card, count=1)


def converted_card(source, name, tokenizer, block_size, *, needs_code, repo=None, branch=None):
    """Return the model card of a model that was converted from the folder `source`. If `source` has a model card that
    nanogpt_accel wrote, only adapt its code (see adapt_usage). Otherwise, write a short card with the title `name`."""
    readme = Path(source) / "README.md"
    card = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    if "nanogpt_accel" not in card.split("\n---", 1)[0]:  # not in the tags, so the card has another author
        text = "A language model, exported by nanogpt_accel."
        card = model_card(name, text, tokenizer, block_size, needs_code=needs_code)
    return adapt_usage(card, needs_code, repo, branch)
