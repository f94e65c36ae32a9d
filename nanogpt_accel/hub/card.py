"""Write model cards: the README.md of a checkpoint or of an exported model."""

from pathlib import Path


def model_card(name, text, needs_code, more=""):
    """Return the model card of a folder, with the metadata that the Hub reads.

    Args:
        name: the title. text: describes the model, in Markdown. more: follows the code that loads the model.
        needs_code: whether the model needs the model.py of its folder.
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
    """Return the card of a converted model: that of the source folder if this toolkit wrote it, else a short new one
    with `name` as its title."""
    own = Path(source) / "README.md"
    text = own.read_text(encoding="utf-8", errors="replace") if own.is_file() else ""
    if "tags: [nanogpt_accel]" not in text:
        return model_card(name, "Weights that nanogpt_accel converted from another form.", needs_code)
    plain, with_code = "ForCausalLM.from_pretrained(path)", "ForCausalLM.from_pretrained(path, trust_remote_code=True)"
    return text.replace(plain, with_code) if needs_code else text.replace(with_code, plain)
