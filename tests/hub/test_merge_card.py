"""A push keeps what users wrote in the model card on the Hub."""

import re

import pytest
from hub_server import card_errors
from huggingface_hub import ModelCard, metadata_load

from nanogpt_accel.data.tokenizer import Tokenizer
from nanogpt_accel.hub.card import model_card
from nanogpt_accel.hub.merge_card import merge_card

CORPUS = {"kind": "hub", "name": "wikitext2", "id": "Salesforce/wikitext", "config": "wikitext-2-raw-v1"}


def card(loss=3.25, text="A small GPT.", **options):
    options = {"needs_code": False, "corpora": [CORPUS], "val_loss": loss} | options
    return model_card("tiny", text, Tokenizer.char(["The abc"]), 16, **options)


def push(current, new):
    """Return the card after a push, which must not change the text."""
    merged, note = merge_card(current, new)
    assert note == "" and merge_card(merged, new) == (merged, ""), "a second push changes the card"
    return merged


def data(text, tmp_path):
    (tmp_path / "README.md").write_bytes(text.encode())
    return metadata_load(tmp_path / "README.md")


def loss_of(text):
    return [result.metric_value for result in ModelCard(text).data.eval_results]


def test_a_card_that_was_not_edited_is_replaced(tmp_path):
    first = push("", card())
    assert card_errors(first) == [] and data(first, tmp_path) == ModelCard(card()).data.to_dict()
    visible = re.sub(r"<!--.*?-->\n", "", first)
    assert visible.split() == card().split(), "only comments are added"
    local = card(2.5, "Another GPT.", corpora=[{"name": "mine"}])
    second = push(first, local)
    assert second == push("", local) and "license" not in data(second, tmp_path)
    assert push(first.replace("\n", "\r\n"), local) == second  # as a git client on Windows commits it


EDITS = {
    "licence": lambda text: text.replace("license: cc-by-sa-4.0", "license: mit  # chosen by me"),
    "new metadata": lambda text: text.replace("---\n\n<!--", "inference: false\nlanguage: no\n---\n\n<!--"),
    "deleted metadata": lambda text: text.replace("license: cc-by-sa-4.0\n", ""),
    "tags": lambda text: text.replace("- gpt\n", "- mine\n"),
    "text before": lambda text: text.replace("<!--", "# My title\n\nRead this.\n\n<!--", 1),
    "text after": lambda text: text + "\n## Limits\n\nMany.\n",
    "both": lambda text: text.replace("<!--", "é\n<!--", 1) + "\ttext without line end",
    "line ends": lambda text: (text + "\n## Limits\n\nMany.\n").replace("\n", "\r\n"),
}


@pytest.mark.parametrize("kind", EDITS)
def test_edits_outside_the_section_are_kept(kind, tmp_path):
    edited = EDITS[kind](push("", card()))
    assert edited != push("", card())
    for new in (card(2.5, "A better GPT."), card(1.5, "The best GPT.")):
        pushed = push(edited, new)
        before, after = data(edited, tmp_path), data(pushed, tmp_path)
        assert loss_of(pushed) == loss_of(new) and card_errors(pushed.replace("\r", "")) == []
        assert {**after, "model-index": 0} == {**before, "model-index": 0}
        section = re.search(r"<!--.*?-->\s+(.*?)<!--", pushed, re.DOTALL)[1]
        assert section.split() == ModelCard(new).text.split()
        outside = [re.sub(r"(?s)model-index:.*?(?=\n[a-z]|---)|<!--.*-->", "", text) for text in (edited, pushed)]
        assert outside[0].split() == outside[1].split()
        edited = pushed


def test_other_evaluation_results_are_kept():
    own = """  - task:
      type: question-answering
    dataset: {name: mine, type: mine}
    metrics: [{type: accuracy, value: 0.5}]
"""
    edited = push("", card()).replace("  results:\n", "  results:\n" + own, 1)
    assert loss_of(edited) == [0.5, 3.25]
    assert loss_of(push(edited, card(2.5))) == [0.5, 2.5]
    unevaluated = push(edited, card(None))
    assert loss_of(unevaluated) == [0.5, 3.25]


@pytest.mark.parametrize("change", ["section", "comment", "deleted", "twice"])
def test_an_edited_section_keeps_its_text_and_gets_a_note(change, tmp_path):
    first = push("", card())
    edited = {
        "section": lambda: first.replace("A small GPT.", "My small GPT."),
        "comment": lambda: first.replace("<!-- nanogpt_accel: end of section -->\n", ""),
        "deleted": lambda: re.sub(r"<!--.*?-->\n", "", first),
        "twice": lambda: first + first.partition("---\n\n")[2],
    }[change]()
    merged, note = merge_card(edited, card(2.5, "A better GPT."))
    assert "edited" in note and loss_of(merged) == [2.5]
    assert ModelCard(merged).text == ModelCard(edited).text and "A better GPT." not in merged
    assert merge_card(merged, card(2.5)) == (merged, note)


@pytest.mark.parametrize(
    "theirs",
    [
        "---\nlicense: mit\n---\n",
        "---\n\n---\n",
        "---\nlicense: mit\ntags:\n- mine\n---\n# Mine\n\nText.",
        "# Mine\n\nText.\n",
        "Mine",
    ],
)
def test_a_card_of_another_origin_gets_the_section_and_missing_metadata(theirs, tmp_path):
    pushed = push(theirs, card())
    before, after = data(theirs, tmp_path) or {}, data(pushed, tmp_path)
    assert after == ModelCard(card()).data.to_dict() | before and card_errors(pushed) == []
    text = ModelCard(theirs).text.strip()
    assert ModelCard(pushed).text.strip().startswith(text) and pushed.count("A small GPT.") == 1
    pushed = push(pushed, card(2.5, "A better GPT."))
    assert ModelCard(pushed).text.strip().startswith(text) and "A small GPT." not in pushed
    assert "A better GPT." in pushed and loss_of(pushed) == [2.5]


@pytest.mark.parametrize(
    "metadata", ["license: [mit", "- a\n- b", "{license: mit}", "license: mit\nmodel-index: 3", "date: 2024-99-99", "a"]
)
def test_invalid_or_unusual_metadata_is_kept(metadata):
    theirs = f"---\n{metadata}\n---\n# Mine\n"
    merged, note = merge_card(theirs, card())
    assert note == "" and merged.startswith(f"---\n{metadata}") and "# Mine" in merged and "A small GPT." in merged
    assert merge_card(merged, card()) == (merged, "")


def test_a_copy_to_another_repository_and_back_has_one_section():
    """The card of a downloaded model contains the text of its user."""
    edited = push("", card()).replace("<!--", "# My title\n\n<!--", 1) + "\nMore.\n"
    copy = push("", edited)
    assert copy.count("nanogpt_accel: section") == 1 and "# My title" in copy and "More." in copy
    # the text is still there after a push of a run
    assert all(word in push(copy, card(2.5)) for word in ("# My title", "More."))
    assert push(edited, edited.replace("small", "smaller")).count("# My title") == 1
