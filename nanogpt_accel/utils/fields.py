"""Types of settings: how a value on a command line or in YAML is parsed, checked and shown."""

import difflib
import json
import re
from contextlib import suppress
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError

from .aliases import ALIASES, NANOGPT_KEYS
from .text import encoding_problem


def _integer(value):
    """Check an integer setting. Accept strings such as "6e5", because YAML reads 6e5 as a string. Reject booleans."""
    if isinstance(value, bool):
        raise ValueError("must be an integer, not true or false")
    for convert in (int, float) if isinstance(value, str) else ():
        with suppress(ValueError):
            value = convert(value)
            break
    if isinstance(value, str) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError("must be an integer")
    return value


def _number(value):
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


def _device_name(value):
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
        raise ValueError("must be auto, cpu, cuda, cuda:N or mps")
    return value


def _usable_name(value):
    if problem := encoding_problem(value):
        raise ValueError(problem)
    return value


def _split_words(value):
    """Read `wandb,tensorboard` or `[wandb, tensorboard]` as a list, and `none` or an empty text as an empty list."""
    if isinstance(value, str):
        words = [word.strip() for word in value.strip("[]").split(",")]
        return [word for word in words if word and word != "none"]
    return [] if value is None else value


class Section(BaseModel):
    """A group of settings: a section of a recipe, or the options of a command. Unknown keys are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def __setattr__(self, key, value):
        if not key.startswith("_"):  # a private attribute is not a setting
            raise AttributeError(how_to_override({key: value}))
        super().__setattr__(key, value)


Device = Annotated[str, AfterValidator(_device_name)]
Int = Annotated[int, BeforeValidator(_integer)]
Name = Annotated[str, AfterValidator(_usable_name)]  # a path or the name of a file
Float = Annotated[float, BeforeValidator(_number)]
Words = Annotated[list[str], BeforeValidator(_split_words)]
Ints = Annotated[list[Int], BeforeValidator(_split_words)]


def how_to_override(values):
    """Return the message for an attempt to change a recipe. values: the changed settings as a dictionary."""
    arguments = ", ".join(f"{key}={value!r}" for key, value in values.items())
    return (
        f"{', '.join(values)}: a recipe cannot be changed after it is loaded; override settings with "
        f"load_recipe(PATH, {values}), or train with train(PATH, {arguments})"
    )


def validate(section, values, where=""):
    """Build a pydantic `section` from `values`, and collect all problems.

    Args:
        section: a pydantic model class. values: {key without section: value or text}.
        where: prefix of the keys in messages, such as "model.".

    Returns:
        (object, problems, invalid). object: an instance of the class, with defaults instead of invalid values.
        problems: a list with one line per problem. invalid: the set of invalid keys.
    """
    try:
        return section(**values), [], set()
    except ValidationError as error:
        messages = {}  # path of a value -> [message, ...]; a union type has one message per member
        for item in error.errors():
            message = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
            message = "" if item["type"] == "extra_forbidden" else message.split(", unable to parse")[0]
            message = "missing" if item["type"] == "missing" else message
            message = "must not be empty" if item["type"] == "too_short" else message
            message = "must have the form {KEY: VALUE}" if item["type"] in ("dict_type", "model_type") else message
            messages.setdefault(_path_in(values, item["loc"]), []).append(message)
    problems, invalid = [], {str(path[0]) for path in messages}
    for path, texts in messages.items():
        key = where + ".".join(map(str, path))
        value = values
        for part in path if texts != ["missing"] else ():
            value = value[part]
        if "" in texts:
            problems.append(unknown_key(key, _fields_at(section, path[:-1])))
        elif texts == ["missing"]:
            problems.append(f"{key} is missing")
        else:
            problems.append(f"{key}={show_value(value)}: {' or '.join(dict.fromkeys(texts))}")
    return section(**{key: value for key, value in values.items() if key not in invalid}), problems, invalid


def _path_in(values, location):
    """Convert the location in a pydantic error, which may contain names of types, to the path of the value."""
    path = ()
    for part in location:
        if isinstance(values, dict) and part != "[key]":
            path, values = (*path, part), values.get(part)
        elif isinstance(values, list) and isinstance(part, int):
            path, values = (*path, part), values[part]
    return path


def _fields_at(section, path):
    """Return the keys of the Section that is nested in `section` at `path`, for example at ("mix", 0) in Data."""
    for part in path:
        if isinstance(part, str) and part in section.model_fields:
            section = _section_in(section.model_fields[part].annotation) or section
    return [field.alias or name for name, field in section.model_fields.items()]


def _section_in(annotation):
    """Return the Section class in a type such as list[Source], or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_in, getattr(annotation, "__args__", ()))), None)


def type_name(annotation):
    """Return the type of a field for a help page, such as int, TEXT, `true|false` or `A,B,...` for a list."""
    arguments = getattr(annotation, "__args__", None)
    if arguments is None:
        names = {type(None): "none", str: "TEXT", bool: "true|false", dict: "{KEY: VALUE}"}
        return names.get(annotation, getattr(annotation, "__name__", str(annotation)))
    if _section_in(annotation):
        return "YAML"
    if getattr(annotation, "__origin__", None) in (list, tuple):
        return "A,B,..."
    parts = [a if isinstance(a, str) else type_name(a) for a in arguments if a is not Ellipsis]
    return "|".join(dict.fromkeys(parts))


def show_value(value):
    """Return a value as a user would write it on the command line."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if any(isinstance(item, dict) for item in items):
        return json.dumps(value)  # JSON is also valid YAML
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {item}" for key, item in value.items()) + "}"
    return str(value)


def nearest(name, names):
    """Return a hint ` (did you mean X?)` with the most similar of `names`, or "" if none is similar."""
    match = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f" (did you mean {match[0]}?)" if match else ""


def unknown_key(key, names):
    """Return the message about a key that is not in `names`. If possible, suggest a key that is in `names`."""
    leaf = key.rpartition(".")[2]
    hint = NANOGPT_KEYS.get(leaf) or ALIASES.get(leaf, "")
    if hint and re.match(r"\w*", hint)[0] in ("", *names):
        instead = f"instead of nanoGPT's {leaf}, " * (leaf in NANOGPT_KEYS)
        return f"unknown key {key}; {instead}use {hint}"
    return f"unknown key {key}{nearest(leaf, names)}"


def raise_problems(problems):
    """Raise a ValueError with all problems, one per line, if there are any."""
    if problems:
        raise ValueError("\n".join(problems))
