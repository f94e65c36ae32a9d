"""The one grammar of every command, and how a command ends."""

import atexit
import errno
import gc
import os
import re
import sys
import time
import traceback
from pathlib import Path

from .fields import show_value, type_name, validate

GC_THRESHOLD = gc.get_threshold()  # how often Python looks for garbage by itself
# what the machine refuses whoever asks it; the text names the file
_SYSTEM_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EMFILE,
    errno.ENFILE,
    errno.ESTALE,
    errno.ENOTCONN,
}
_INVALID_NAME = 123  # Windows' ERROR_INVALID_NAME, for a colon or a question mark in a file's name
# `key=value` is an option; a path such as runs/a=b or ./a=b is not, because a key has no slash
_ASSIGNMENT = re.compile(r"^(?:--)?([A-Za-z][\w.-]*)=(.*)$", re.DOTALL)


def parse(argv, fields, n_targets=1):
    """Split a command line into its target and its options.

    Args:
        argv: the words after the command's name.
        fields: {key: pydantic FieldInfo}, the keys that the command knows, dotted or leaf.
        n_targets: how many positional words the command takes.

    Returns:
        (target, options): the positional word or None, or a list of those that are there where n_targets is more
        than one; and {key as typed: text}. Values stay text; the model they are meant for converts them by its
        declared types. A later word wins.

    Raises:
        ValueError: too many positional words, or an option without its value.
    """
    targets, options, problems = [], {}, []
    words = list(argv)
    while words:
        word = words.pop(0)
        if match := _ASSIGNMENT.match(word):
            options[match[1].replace("-", "_")] = match[2]
        elif word.startswith("--") and len(word) > 2:
            key = word[2:].replace("-", "_")
            field = fields.get(key)
            is_flag = field is not None and field.annotation is bool
            # a switch may stand alone: `--eval_only`
            if is_flag and (not words or words[0].lower() not in {"true", "false", "yes", "no", "on", "off", "1", "0"}):
                options[key] = "true"
            elif words:
                options[key] = words.pop(0)
            else:
                problems.append(f"--{key} needs a value: --{key}=VALUE")
        else:
            targets.append(word)
    if len(targets) > n_targets:
        taken = "one target is" if n_targets == 1 else f"{n_targets} targets are"
        problems.append(f"{taken} taken, got {len(targets)}: {' '.join(targets)} (quote what holds spaces)")
    if problems:
        raise ValueError("\n".join(problems))
    if n_targets > 1:
        return targets, options
    return (targets[0] if targets else None), options


def parse_with_recipe(argv, own, fields, n_targets=1):
    """Parse the words of a command that has options and also takes the keys of a recipe.

    Args:
        own: Section class of the options; an alias is the name that is typed.
        fields: the recipe's keys, as `parse` takes them.

    Returns:
        (target, options, given, problems): options as an `own`, the recipe's keys as text, and one line for each
        option that is wrong.
    """
    names = {field.alias or name: field for name, field in own.model_fields.items()}
    target, given = parse(argv, {**fields, **names}, n_targets)
    options, problems, _ = validate(own, {key: given.pop(key) for key in names if key in given})
    return target, options, given, problems


def parse_options(argv, own, n_targets=1):
    """Parse the words of a command that has only options of its own; return (target, options, problems)."""
    target, options, unknown, problems = parse_with_recipe(argv, own, {}, n_targets)
    return target, options, problems + validate(own, unknown)[1]


class Stopped(Exception):
    """A run that was told to stop and can be resumed: exit status 75, EX_TEMPFAIL of sysexits.h."""


def wants_help(argv):
    """True where the words ask for the help page."""
    return any(word in ("-h", "--help", "help") for word in argv[:1]) or "--help" in argv


def show_help(usage, text, sections):
    """Print a command's help from the fields themselves.

    Args:
        usage: the usage line. text: what the command does.
        sections: {title: pydantic model class} in the order in which to show them.
    """
    print(f"usage: {usage}\n\n{text.strip()}\n")
    print("Options are key=value, --key=value or --key value.")
    for title, section in sections.items():
        print(f"\n{title}:")
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                continue  # a nested section has its own heading
            name = field.alias or name
            default = show_value(field.get_default(call_default_factory=True)).encode("unicode_escape").decode()
            default = f" [{default}]" if default else ""
            print(f"  {name}={type_name(field.annotation)}{default}\n      {field.description}")


def run(command, argv):
    """Run `command(argv)` and return the process's exit status.

    A ValueError or OSError that this package raised is a message for the user: it is printed without a
    traceback, a line for each mistake, and the status is 2. So is what the machine refuses, such as room on a
    disk. Another one that comes out of a library is a defect of ours and keeps its traceback;
    NANOGPT_ACCEL_DEBUG=1 keeps every traceback.
    """
    # OpenMP's threads spin for long while they wait for each other. Where another program has the processor that one of
    # them wants, this holds up all: steps of 76 ms took 170 to 2,800. Alone they take as long with 1,000 spins
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when torch is imported
    # Python looks for garbage among all objects that torch and transformers make at import, every 700 new ones, which
    # takes 0.6 s in all, and once more when the process ends, 0.9 s. So it looks seldom, and not at the end
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal of another encoding shows ? rather than a traceback
    try:
        command(argv)
        return 0
    except BrokenPipeError:  # `nanogpt-accel sample ... | head` is no mistake and needs no words
        return 1
    except (ValueError, OSError) as error:
        is_answer = (
            _raised_here(error)
            or getattr(error, "errno", None) in _SYSTEM_ERRORS
            or (getattr(error, "winerror", None) == _INVALID_NAME)
        )
        if os.environ.get("NANOGPT_ACCEL_DEBUG") == "1" or not is_answer:
            raise
        if not _is_main():
            time.sleep(3)  # where the first process says the same, the launcher ends this one meanwhile
        where = "" if _is_main() else f"rank {os.environ['RANK']}: "
        for line in str(error).splitlines() or [type(error).__name__]:
            print(f"{where}error: {line}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        if _is_main():
            print(stopped, file=sys.stderr)
        return 75
    except FloatingPointError as error:  # the run was asked for rightly and went wrong
        if _is_main():  # every process met it
            print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        if _is_main():
            print("\n" + ": ".join(filter(None, ("interrupted", str(interrupt)))), file=sys.stderr)
        return 130
    finally:
        gc.set_threshold(*GC_THRESHOLD)


def _is_main():
    """True on the process that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def _raised_here(error):
    """Return whether the innermost frame of the traceback is in a file of this package."""
    innermost = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    return Path(__file__).resolve().parents[1] in innermost.parents
