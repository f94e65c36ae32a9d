"""Compare the result of a run with what its recipe expects."""

import json
from contextlib import suppress
from pathlib import Path


def verdict(got, expected, tolerance):
    """Return whether a validation loss is the expected one within its tolerance, in words; nats per token."""
    if abs(got - expected) <= tolerance + 1e-9:
        return "reproduced"
    return f"not reproduced, {abs(got - expected):.3f} {'higher' if got > expected else 'lower'}"


def report_expectation(recipe, last, best, console):
    """Print how the validation loss compares with the recipe's `expect` block, and write it to expect.json.

    last, best: validation losses in nats per token; None if nothing was evaluated.
    """
    expect, max_iters = recipe.expect, recipe.train.max_iters
    got = best if expect.evaluation == "best" else last
    if expect.val_loss is None or got is None:
        return
    steps, outcome, condition = max_iters if expect.steps is None else expect.steps, None, ""
    if expect.changed:
        condition = f" for the unchanged recipe (changed here: {', '.join(expect.changed)})"
    elif steps != max_iters and not recipe.train.eval_only:
        condition = f" after {steps:,} steps (this run: {max_iters:,})"
    elif expect.tolerance is not None:
        outcome = verdict(got, expect.val_loss, expect.tolerance)
    expected = f"{expect.val_loss:.3f}" + (f" +- {expect.tolerance:g}" if expect.tolerance is not None else "")
    source = f" ({expect.source})" if expect.source else ""
    console.say(
        f"expected {expected}{source}{condition}, got {got:.3f}" + (f": {outcome}" if outcome else ""), always=True
    )
    if recipe.train.eval_only:
        return
    found = {
        "expected": expect.val_loss,
        "tolerance": expect.tolerance,
        "evaluation": expect.evaluation,
        "got": got,
        "step": max_iters,
        "verdict": outcome,
        "changed": expect.changed,
        "source": expect.source,
    }
    with suppress(OSError):
        (Path(recipe.out_dir) / "expect.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
