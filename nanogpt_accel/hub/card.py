"""Model cards: the README.md of a checkpoint or of a pushed model."""

from pathlib import Path


def model_card(name, text, needs_code, more=""):
    """README.md of a model folder in the Hub's form.

    Args:
        name: its title. text: what the model is, in Markdown; more: what comes after how to load it.
        needs_code: whether it loads with the model.py beside it only.
    """
    remote = ", trust_remote_code=True" if needs_code else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [nanogpt_accel]
---
# {name}

{text}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
path = "."  # this folder, or its id on the Hub
model = AutoModelForCausalLM.from_pretrained(path{remote})
tokenizer = AutoTokenizer.from_pretrained(path)
print(tokenizer.decode(model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=20)[0]))
```

{more}"""


def converted_card(source, name, needs_code):
    """The card of a model that was converted: the source folder's where this toolkit wrote it, else a short one with
    `name` as its title."""
    own = Path(source) / "README.md"
    text = own.read_text(encoding="utf-8", errors="replace") if own.is_file() else ""
    if "tags: [nanogpt_accel]" not in text:
        return model_card(name, "Weights that nanogpt_accel converted from another form.", needs_code)
    plain, with_code = "ForCausalLM.from_pretrained(path)", "ForCausalLM.from_pretrained(path, trust_remote_code=True)"
    return text.replace(plain, with_code) if needs_code else text.replace(with_code, plain)
