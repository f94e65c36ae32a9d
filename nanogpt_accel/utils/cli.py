"""Parse command lines, print help pages, and turn exceptions into messages and exit statuses, for all commands."""

import errno
import os
import re
import sys
import time
import traceback
from pathlib import Path
from typing import Literal, get_args, get_origin

from . import startup
from .fields import raise_problems, show_value, type_name, unknown_key, validate
from .files import permission_denied
from .text import counted, encoding_problem, one_line, printable

# error codes of the operating system; these errors are not bugs, and their messages name the file
_SYSTEM_ERRORS = "ENOSPC EDQUOT EFBIG EROFS EIO EACCES EPERM ENAMETOOLONG ELOOP EMFILE ENFILE ESTALE ENOTCONN ENOMEM"
_SYSTEM_ERRORS = {getattr(errno, name) for name in _SYSTEM_ERRORS.split()}
_NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"  # in a RuntimeError of torch
_THREADS_FIX = "raise the limit on processes and threads (ulimit -u, or that of the container), or end other processes"
_INVALID_NAME = 123  # Windows' ERROR_INVALID_NAME, for a colon or a question mark in a file name
# `key=value` is an option; a path such as runs/a=b or ./a=b is not, because a key has no slash
_ASSIGNMENT = re.compile(r"^(?:--)?([A-Za-z][\w.-]*)=(.*)$", re.DOTALL)
_LONGEST_ERROR, _MOST_ERRORS = 1000, 50  # maximum characters per line, and maximum lines, of a message for the user
_BOOLEANS = {"true", "false", "yes", "no", "on", "off", "1", "0"}


def _flag_values(field):
    """Return the words that may follow `--key` if the field is a boolean, otherwise an empty set."""
    members = get_args(field.annotation) or (field.annotation,)
    literals = {word for member in members if get_origin(member) is Literal for word in get_args(member)}
    return _BOOLEANS | literals if bool in members else set()


def parse(argv, fields, n_targets=1):
    """Split a command line into its target and its options. If an option is repeated, the last value wins.

    Args:
        argv: the arguments after the command name.
        fields: {key: pydantic FieldInfo} of the known options, with keys such as n_layer or model.n_layer.
        n_targets: the maximum number of positional arguments.

    Returns:
        (target, options). target: the positional argument or None; a list if n_targets is above 1. options: {key as
        typed: text}, which `validate` converts to values.

    A boolean option without a value means true, and --no_KEY means false.

    Raises:
        ValueError: too many positional arguments, an option without a value, or an argument that is not UTF-8. The
            message also names unknown options, because they may be the cause. Unknown options alone are no error here:
            `validate` reports them.
    """
    targets, options, words = [], {}, list(argv)
    problems = [f"{word}: {problem}" for word in words if (problem := encoding_problem(word))]
    while words:
        word = words.pop(0)
        if match := _ASSIGNMENT.match(word):
            options[match[1].replace("-", "_")] = match[2]
        elif word.startswith("-") and word.strip("-"):
            key = word.lstrip("-").replace("-", "_")
            values, positive = _flag_values(fields[key]) if key in fields else set(), key.removeprefix("no_")
            if key not in fields and positive in fields and _flag_values(fields[positive]):
                options[positive] = "false"
            elif values and (not words or words[0].lower() not in values):
                options[key] = "true"
            elif words and not (key not in fields and words[0].startswith("-")):
                options[key] = words.pop(0)
            elif key in fields:
                problems.append(f"--{key}: the value is missing; use --{key}=VALUE")
            else:
                options[key] = ""
        else:
            targets.append(word)
    if len(targets) > n_targets:
        most, typed = counted(n_targets, "target"), " ".join(targets)
        problems.append(f"expected at most {most}, got {len(targets)}: {typed}; quote arguments that contain spaces")
    if problems:
        problems[:0] = [unknown_key(key, fields) for key in options if key not in fields]
    raise_problems(problems)
    return (targets if n_targets > 1 else next(iter(targets), None)), options


def parse_with_recipe(argv, own, fields, n_targets=1):
    """Parse the arguments of a command that has its own options and also accepts the keys of a recipe.

    Args:
        own: Section class of the command's options. If a field has an alias, the alias is the key of the option.
        fields: {recipe key: pydantic FieldInfo}; see `parse`.

    Returns:
        (target, options, settings, problems). options: an instance of `own`. settings: {recipe key: text}. problems:
        one line for each invalid option.
    """
    names = {field.alias or name: field for name, field in own.model_fields.items()}
    target, settings = parse(argv, {**fields, **names}, n_targets)
    options, problems, _ = validate(own, {key: settings.pop(key) for key in names if key in settings})
    return target, options, settings, problems


def parse_options(argv, own, n_targets=1):
    """Parse the arguments of a command that accepts only its own options; return (target, options, problems)."""
    target, options, unknown, problems = parse_with_recipe(argv, own, {}, n_targets)
    return target, options, problems + validate(own, unknown)[1]


class Stopped(Exception):
    """Raised if a run was stopped and can be resumed. The exit status is 75 (EX_TEMPFAIL in sysexits.h)."""


def wants_help(argv):
    """Return whether the arguments request the help page."""
    return "--help" in argv or "-h" in argv or argv[:1] == ["help"]


def show_help(usage, text, sections):
    """Print the help page of a command.

    Args:
        usage: the usage line. text: a description of the command.
        sections: {title: pydantic model class of the options}, in the order of the page.
    """
    print(f"usage: {usage}\n\n{text.strip()}\n\nOptions are key=value, --key=value or --key value.")
    for title, section in sections.items():
        print(f"\n{title}:")
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                continue  # a nested section has its own heading
            default = show_value(field.get_default(call_default_factory=True)).encode("unicode_escape").decode()
            shown = f" [{default}]" if default else ""
            print(f"  {field.alias or name}={type_name(field.annotation)}{shown}\n      {field.description}")


def run(command, argv):
    """Run `command(argv)` and return the exit status of the process.

    Two kinds of errors are messages for the user: a ValueError or OSError that this package raises, and an error of the
    system, such as a full disk or too little memory. These are printed without a traceback, one line per problem, and
    the exit status is 2. Other errors are bugs and keep their traceback. NANOGPT_ACCEL_DEBUG=1 keeps every traceback.
    """
    startup.limit_openmp_spinning()
    startup.pause_gc()
    _open_missing_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # print ? if the terminal cannot encode a character
    rank = os.environ.get("RANK", "0")
    is_main = rank == "0"
    try:
        command(argv)
        return 0
    except BrokenPipeError:  # `nanogpt-accel sample ... | head` is not an error
        return 1
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        message = _message(error)
        if os.environ.get("NANOGPT_ACCEL_DEBUG") == "1" or message is None:
            raise
        if not is_main:
            time.sleep(3)  # if rank 0 prints the same error, the launcher ends this process before this rank prints it
        _print_lines(message, f"{'' if is_main else f'rank {rank}: '}error: ")
        return 2
    except (Stopped, FloatingPointError) as error:  # raised on all ranks, so only rank 0 reports it
        is_stopped = isinstance(error, Stopped)
        if is_main:
            _print_lines(str(error), "" if is_stopped else "error: ")
        else:
            time.sleep(1)  # a launcher ends all processes when the first one exits, so let rank 0 print first
        return 75 if is_stopped else 1
    except KeyboardInterrupt as interrupt:
        if is_main:
            print(file=sys.stderr)
            _print_lines(": ".join(filter(None, ("interrupted", str(interrupt)))))
        return 130
    finally:
        startup.resume_gc()


def _open_missing_streams():
    """Open the null device for each standard stream that is closed, for example by `>&-` or by pythonw.

    Open them in the order of their descriptors. Otherwise, a file that is opened later, such as a checkpoint, would get
    the descriptor of a closed stream, and a C library that prints would write to this file.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (open until the end)


def _print_lines(message, prefix=""):
    """Print the lines of a message to stderr. Shorten the message if it quotes a very long argument or file."""
    lines = message.rstrip().split("\n")
    if len(lines) > _MOST_ERRORS:
        lines = [*lines[:_MOST_ERRORS], f"... and {len(lines) - _MOST_ERRORS:,} more"]
    for line in lines:
        if len(line) > _LONGEST_ERROR:  # the problem is at the start, the fix at the end
            line = f"{line[: _LONGEST_ERROR // 2]} [...] {line[-_LONGEST_ERROR // 2 :]}"
        print(prefix + printable(line).replace("\r", "\\r"), file=sys.stderr)


def _message(error):
    """Return the message for the user about an error, or None if the error is a bug."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _NO_MEMORY in str(error):
        reason = one_line(error).removesuffix(".")
        return f"not enough memory ({reason}); free memory, or set a smaller batch_size, block_size or model"
    if isinstance(error, RuntimeError):
        return f"{error}; {_THREADS_FIX}" if str(error) == "can't start new thread" else None
    number = getattr(error, "errno", None)
    if number == errno.EACCES and error.filename is not None:
        return permission_denied(error.filename)
    is_of_system = number in _SYSTEM_ERRORS or getattr(error, "winerror", None) == _INVALID_NAME
    return (str(error) or type(error).__name__) if is_of_system or _raised_here(error) else None


def _raised_here(error):
    """Return whether the innermost frame of the traceback is in a file of this package."""
    innermost = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    return Path(__file__).resolve().parents[1] in innermost.parents
