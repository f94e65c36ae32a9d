"""Model cards, and what a conversion makes of them."""

from nanogpt_accel.hub.card import converted_card, model_card


def test_a_card_says_how_to_load_the_model(tmp_path):
    stock, custom = (model_card("tiny", "A small GPT.", needs_code, more="The end.") for needs_code in (False, True))
    for card in (stock, custom):
        assert card.startswith("---\nlibrary_name: transformers\n") and card.endswith("The end.")
        assert "# tiny\n\nA small GPT.\n" in card
    assert "trust_remote_code" not in stock and "trust_remote_code=True" in custom


def test_a_conversion_changes_only_how_to_load_the_model(tmp_path):
    stock, custom = (model_card("tiny", "A small GPT.", needs_code) for needs_code in (False, True))
    for source in (stock, custom):
        (tmp_path / "README.md").write_text(source)
        assert converted_card(tmp_path, "other", needs_code=False) == stock
        assert converted_card(tmp_path, "other", needs_code=True) == custom


def test_the_card_of_another_toolkit_is_replaced(tmp_path):
    (tmp_path / "README.md").write_bytes(b"# theirs, caf\xe9")
    for folder in (tmp_path, tmp_path / "nowhere"):
        card = converted_card(folder, "mine", needs_code=False)
        assert "# mine\n" in card and "theirs" not in card and "tags: [nanogpt_accel]" in card
