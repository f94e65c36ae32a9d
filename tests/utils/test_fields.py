"""fields.py: values by their declared type, and suggestions for unknown names."""

import pytest

from nanogpt_accel.recipe import FIELDS, SECTIONS
from nanogpt_accel.utils.fields import nearest, show_value, type_name, validate


def test_nearest_suggests_only_similar_names():
    assert nearest("n_layr", FIELDS) == " (did you mean n_layer?)"
    assert nearest("xyzzy", FIELDS) == ""


def test_validate_converts_by_the_declared_type_and_returns_all_problems():
    section, problems, _ = validate(SECTIONS["train"], {"max_iters": "1e3", "eval_only": "yes"})
    assert problems == [] and section.max_iters == 1000 and section.eval_only is True
    section, problems, wrong = validate(SECTIONS["train"], {"max_iters": "many", "batch_size": "0"}, "train.")
    assert {problem.partition(":")[0] for problem in problems} == {"train.batch_size=0", "train.max_iters=many"}
    assert wrong == {"batch_size", "max_iters"} and section == SECTIONS["train"]()  # with the defaults


@pytest.mark.parametrize(("key", "name"), [("bias", "true|false"), ("n_layer", "int"), ("sampling", "shuffle|random")])
def test_type_name_is_short(key, name):
    assert type_name(FIELDS[key].annotation) == name


@pytest.mark.parametrize(("value", "text"), [(None, "none"), (True, "true"), (0.0006, "0.0006"), ([], "none")])
def test_show_value_as_it_is_typed(value, text):
    assert show_value(value) == text
