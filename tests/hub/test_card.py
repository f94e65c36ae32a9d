"""Model cards: their metadata, the code in them, and how a conversion changes them."""

import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import card_errors
from huggingface_hub import ModelCard, ModelCardData
from runs import checkpoint, trainer, write_recipe
from shared import REPOSITORY, WITHOUT_THE_PACKAGE

from nanogpt_accel.__main__ import main
from nanogpt_accel.data.tokenizer import Tokenizer
from nanogpt_accel.hub.card import CORPUS_METADATA, adapt_usage, checkpoint_card, converted_card, model_card
from nanogpt_accel.recipe import load_recipe

TOKENIZER = Tokenizer.char(["Then abc"])


def card_of(needs_code=False, tokenizer=TOKENIZER, **options):
    return model_card("tiny", "A small GPT.", tokenizer, 16, needs_code=needs_code, **options)


def checkpoint_card_of(corpus, val_loss=3.25, evaluated=True, **settings):
    """The card of a checkpoint of a run in runs/tiny, trained on this corpus, or on a list of corpora."""
    corpora = corpus if isinstance(corpus, list) else [corpus]
    sources = [SimpleNamespace(manifest={"corpus": each}, train=range(9000), val=range(1000)) for each in corpora]
    data = SimpleNamespace(tokenizer=TOKENIZER, sources=dict(enumerate(sources)))
    recipe = load_recipe(None, {"out_dir": "runs/tiny", "n_layer": 3, "tokenizer": "char", **settings})
    trainer = {"step": 2000, "val_loss": val_loss, "evaluated": evaluated, "named_scores": {}}
    if len(corpora) > 1:
        trainer["named_scores"] = {"val_loss/wiki": 3.5, "arc_easy/acc": 0.25}
    return checkpoint_card(recipe, data, trainer, 1_234_567)


def metadata(card):
    """The metadata of a card, which must be valid."""
    assert card_errors(card) == []
    return ModelCardData(**ModelCard(card).data.to_dict()).to_dict()


# ---- contents


def test_a_card_has_metadata_a_description_and_code_that_loads_the_model():
    stock, custom = (card_of(needs_code, sections={"More": "The end."}) for needs_code in (False, True))
    for card in (stock, custom):
        assert metadata(card) == {
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["nanogpt_accel", "gpt"],
        }
        assert "# tiny\n\nA small GPT.\n" in card and card.endswith("## More\n\nThe end.\n")
    assert "trust_remote_code" not in stock and custom.count("trust_remote_code=True") == 2


@pytest.mark.parametrize(
    ("characters", "prompt"),
    [("The", '"The"'), ("ehx", '"he"'), ("bca\n", r'"\n"'), ("\u2028é", '"é"'), ('"\\', r'"\""')],
)
def test_the_prompt_has_only_characters_of_a_char_tokenizer(characters, prompt):
    tokenizer = Tokenizer.char([characters], add_eot=True)
    code = card_of(tokenizer=tokenizer).split("```")[1]
    assert f"tokenizer({prompt}, return_tensors" in code
    assert len(tokenizer.encode(json.loads(prompt))) > 0


def test_a_checkpoint_card_describes_the_training():
    source = {"kind": "hub", "name": "wikitext2", "id": "Salesforce/wikitext", "config": "wikitext-2-raw-v1"}
    card = checkpoint_card_of(source)
    found = metadata(card)
    assert (found["language"], found["license"], found["datasets"]) == ("en", "cc-by-sa-4.0", ["Salesforce/wikitext"])
    (model,) = found["model-index"]
    (result,) = model["results"]
    assert model["name"] == "tiny" and result["task"]["type"] == "text-generation"
    assert result["dataset"] == {
        "name": "wikitext2",
        "type": "Salesforce/wikitext",
        "config": "wikitext-2-raw-v1",
        "split": "validation",
    }
    assert result["metrics"] == [{"type": "loss", "value": 3.25}]
    for words in (
        "# tiny\n",
        "1,234,567 parameters",
        "1,024 tokens",
        "https://huggingface.co/datasets/Salesforce/wikitext",
        "9,000 tokens for training, 1,000 for validation",
        "after 2,000 steps: 3.2500 nats per token",
        "```yaml\ndata:\n  tokenizer: char\nmodel:\n  n_layer: 3\n```",
        f"- python {platform.python_version()}",
    ):
        assert words in card, words
    assert "base_model" not in found and "runs/" not in card


def test_a_card_of_a_mix_lists_its_corpora_and_scores():
    card = checkpoint_card_of([{"kind": "hub", "name": "wikitext2", "id": "Salesforce/wikitext"}, {"name": "mine.txt"}])
    found = metadata(card)
    assert found["datasets"] == ["Salesforce/wikitext"] and "license" not in found
    assert found["model-index"][0]["results"][0]["dataset"]["name"] == "wikitext2, mine.txt"
    link = "[Salesforce/wikitext](https://huggingface.co/datasets/Salesforce/wikitext)"
    assert f"on the corpora {link}, `mine.txt`." in card and "- wiki: 3.5000\n- arc_easy/acc: 0.2500" in card
    assert f"- {link}: 9,000 tokens for training, 1,000 for validation.\n- `mine.txt`: 9,000" in card


@pytest.mark.parametrize("name", CORPUS_METADATA)
def test_the_metadata_of_every_built_in_corpus_is_valid(name):
    kind = {"python": "python", "shakespeare": "url"}.get(name, "hub")
    found = metadata(checkpoint_card_of({"kind": kind, "name": name}))
    assert found.items() >= CORPUS_METADATA[name].items()
    # a local file of this name is another text
    assert not {"language", "license"} & metadata(checkpoint_card_of({"kind": "files", "name": name})).keys()


@pytest.mark.parametrize(
    ("loss", "evaluated"), [(None, False), (2.5, False), (float("nan"), True), (float("inf"), True)]
)
def test_unknown_facts_are_left_out(loss, evaluated):
    card = checkpoint_card_of({}, val_loss=loss, evaluated=evaluated)
    assert ("saved after 2,000 steps and has not been evaluated" in card) == (not evaluated) and "2.5" not in card
    assert metadata(card).keys() == {"library_name", "pipeline_tag", "tags"}


@pytest.mark.parametrize(
    ("init_from", "base_model"),
    [
        ("gpt2", "gpt2"),
        ("me/model@main", "me/model"),
        ("scratch", None),
        ("resume", None),
        ("folder", None),
        ("/some/where", None),
    ],
)
def test_base_model_is_the_hub_id_that_the_run_started_from(tmp_path, monkeypatch, init_from, base_model):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert metadata(checkpoint_card_of({}, init_from=init_from)).get("base_model") == base_model


# ---- conversions and pushes


def convert(folder, **options):
    return converted_card(folder, "other", TOKENIZER, 16, **options)


def test_a_conversion_changes_only_the_code_that_loads_the_model(tmp_path):
    stock, custom = (card_of(needs_code, val_loss=1.5) for needs_code in (False, True))
    for source in (stock, custom):
        (tmp_path / "README.md").write_text(source)
        assert convert(tmp_path, needs_code=False) == stock
        assert convert(tmp_path, needs_code=True) == custom


def test_a_pushed_card_names_its_repository_and_branch(tmp_path):
    (tmp_path / "README.md").write_text(card_of(needs_code=True))
    card = convert(tmp_path, needs_code=True, repo="me/tiny", branch="dev")
    for line in (
        'path = "me/tiny"',
        'model = AutoModelForCausalLM.from_pretrained(path, revision="dev", trust_remote_code=True)',
        'tokenizer = AutoTokenizer.from_pretrained(path, revision="dev", trust_remote_code=True)',
    ):
        assert f"\n{line}\n" in card
    (tmp_path / "README.md").write_text(card)
    assert convert(tmp_path, needs_code=True) == card_of(needs_code=True)
    edited = "---\ntags: [nanogpt_accel]\n---\nmy own text"
    assert adapt_usage(edited, True, "me/tiny") == edited


def test_the_card_of_another_toolkit_is_replaced(tmp_path):
    (tmp_path / "README.md").write_bytes(b"# theirs, caf\xe9")
    for folder in (tmp_path, tmp_path / "nowhere"):
        card = convert(folder, needs_code=False)
        assert "# other\n" in card and "theirs" not in card and metadata(card)["tags"] == ["nanogpt_accel", "gpt"]


# ---- the card of a real checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps, and its stock export in `exported`."""
    folder = tmp_path_factory.mktemp("card")
    recipe = write_recipe(folder, max_iters=2, eval_interval=2)
    assert main(["train", str(recipe), f"out_dir={folder}/tiny"]) == 0
    assert main(["export", f"{folder}/tiny", f"to={folder}/exported"]) == 0
    return folder / "tiny"


def test_the_card_of_a_checkpoint_has_the_loss_of_its_trainer_json(run):
    card = ModelCard.load(checkpoint(run, 2) / "README.md")
    assert metadata(str(card)) == card.data.to_dict()
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("loss", trainer(run, 2)["val_loss"])
    assert f"\n- transformers {version('transformers')}\n" in card.text
    exported = ModelCard.load(run.with_name("exported") / "README.md")
    assert exported.data.to_dict() == card.data.to_dict()


@pytest.mark.skipif(os.name == "nt", reason="no pseudo-terminals")
@pytest.mark.parametrize(
    ("model", "is_importable", "is_reversed"),
    [("checkpoint", True, False), ("checkpoint", False, False), ("checkpoint", False, True), ("export", False, True)],
)
def test_the_code_of_a_card_runs_as_printed(run, tmp_path, model, is_importable, is_reversed):
    """The code runs in a terminal, where transformers would ask whether to run custom code. It also runs if the
    tokenizer is loaded first."""
    import pty

    folder = checkpoint(run, 2) if model == "checkpoint" else run.with_name("exported")
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    if is_reversed:
        code = re.sub(r"^(model = .*\n)(tokenizer = .*\n)", r"\2\1", code, flags=re.MULTILINE)
        assert code.index("tokenizer = ") < code.index("model = ")
    (tmp_path / "script.py").write_text(("import nanogpt_accel\n" if is_importable else WITHOUT_THE_PACKAGE) + code)
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    _, terminal = pty.openpty()
    script = [sys.executable, tmp_path / "script.py"]
    done = subprocess.run(script, cwd=folder, env=env, stdin=terminal, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "custom code" not in done.stdout + done.stderr
    prompt = json.loads(re.search(r'tokenizer\((".*?"), return_tensors', code)[1])
    assert done.stdout.startswith(prompt) and len(done.stdout) > len(prompt) + 5
    assert Path(folder, "README.md").is_file()
