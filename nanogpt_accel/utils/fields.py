"""Types of settings: how a value on a command line or in YAML is read, checked and shown."""

import difflib
import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError


def _whole_number(value):
    """Read 1e3, "1e3" and "1_000" as whole numbers (YAML hands 6e5 over as text), and refuse true and false."""
    if isinstance(value, bool):
        raise ValueError("must be a whole number, not true or false")
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            try:
                value = float(value)
            except ValueError:
                raise ValueError("must be a whole number") from None
    if isinstance(value, float) and not value.is_integer():
        raise ValueError("must be a whole number")
    return value


def _number(value):
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


def _device_name(value):
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
        raise ValueError("must be auto, cpu, cuda, cuda:N or mps")
    return value


def _split_words(value):
    """Read `wandb,tensorboard` or `[wandb, tensorboard]` as a list; none or nothing as an empty one."""
    if isinstance(value, str):
        words = [word.strip() for word in value.strip("[]").split(",")]
        return [word for word in words if word and word != "none"]
    return [] if value is None else value


class Section(BaseModel):
    """A group of settings: a section of a recipe, or the options of a command. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Device = Annotated[str, AfterValidator(_device_name)]
Int = Annotated[int, BeforeValidator(_whole_number)]
Float = Annotated[float, BeforeValidator(_number)]
Words = Annotated[list[str], BeforeValidator(_split_words)]


def validate(section, values, where=""):
    """Build a pydantic `section` from `values`, and say everything that is wrong with them.

    Args:
        section: a pydantic model class. values: {leaf key: value or text}. where: prefix for the keys
            in messages, such as "model.".

    Returns:
        (object, problems, wrong): the section with its defaults in place of what was refused, one line for
        each problem, and the set of the refused keys.
    """
    problems, wrong = [], set()
    try:
        return section(**values), problems, wrong
    except ValidationError as error:
        messages = {}  # key -> what is wrong; a union reports once for each of its members
        for item in error.errors():
            message = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
            message = message.split(", unable to parse")[0]
            messages.setdefault(str(item["loc"][0]), []).append("" if item["type"] == "extra_forbidden" else message)
        for key, found in messages.items():
            wrong.add(key)
            if "" in found:
                problems.append(f"unknown key {where}{key}{nearest(key, section.model_fields)}")
            else:
                problems.append(f"{where}{key}={show_value(values[key])}: {' or '.join(dict.fromkeys(found))}")
    return section(**{k: v for k, v in values.items() if k not in wrong}), problems, wrong


def type_name(annotation):
    """A field's type as a user would write it: int, float, `a|b`, list."""
    arguments = getattr(annotation, "__args__", None)
    if arguments is None:
        names = {type(None): "none", str: "TEXT", bool: "true|false"}
        return names.get(annotation, getattr(annotation, "__name__", str(annotation)))
    if getattr(annotation, "__origin__", None) in (list, tuple):
        return "A,B,..."
    parts = [a if isinstance(a, str) else type_name(a) for a in arguments if a is not Ellipsis]
    return "|".join(dict.fromkeys(parts))


def show_value(value):
    """A default as a user would type it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value)) or "none"
    return str(value)


def nearest(name, names):
    """The closest of `names` as ` (did you mean X?)`, or nothing."""
    match = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f" (did you mean {match[0]}?)" if match else ""


def raise_problems(problems):
    """Raise a ValueError with all problems, one per line, if there are any."""
    if problems:
        raise ValueError("\n".join(problems))
