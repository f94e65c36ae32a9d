"""Compare the result of a run with the `expect` section of its recipe."""

from contextlib import suppress
from pathlib import Path

from ..recipe import SECTIONS
from ..utils.files import write_atomically
from ..utils.text import to_json


def report_expectation(recipe, last, best, console):
    """Print whether the run reproduced the expected validation loss. If the user changed the data, print nothing,
    because the losses cannot be compared. After training, also write the comparison to expect.json.

    last, best: the last and the lowest validation loss of the run in nats per token, None without an evaluation.
    """
    expect, max_iters = recipe.expect, recipe.train.max_iters
    got = best if expect.evaluation == "best" else last
    if expect.val_loss is None or got is None:
        return
    steps, outcome, condition = max_iters if expect.steps is None else expect.steps, None, ""
    if expect.changed:
        condition = " for the unmodified recipe"
    elif steps != max_iters and not recipe.train.eval_only:
        condition = f" after {steps:,} steps"
    elif expect.tolerance is not None:
        difference = got - expect.val_loss
        outcome = "reproduced"
        if abs(difference) > expect.tolerance + 1e-9:
            outcome = f"not reproduced, {abs(difference):.3f} {'higher' if difference > 0 else 'lower'}"
    tolerance = f" +- {expect.tolerance:g}" if expect.tolerance is not None else ""
    line = f"expected {expect.val_loss:.3f}{tolerance}{condition}, got {got:.3f}"
    if not set(expect.changed) & set(SECTIONS["data"].model_fields):  # losses on other data cannot be compared
        console.say(f"{line}: {outcome}" if outcome else line, always=True)
    if recipe.train.eval_only:
        return
    result = {"expected": expect.val_loss, "tolerance": expect.tolerance, "evaluation": expect.evaluation, "got": got}
    result |= {"step": max_iters, "verdict": outcome, "changed": expect.changed, "source": expect.source}
    with suppress(OSError):
        write_atomically(Path(recipe.out_dir) / "expect.json", to_json(result, indent=1) + "\n")
