"""run_data.py: the sources, stages and validation sets of a run, from the recipe to losses, resume and evaluation."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from runs import SMALL, losses, make_text, numbers, trainer, write_recipe

from nanogpt_accel.data import run_data
from nanogpt_accel.data.token_files import TokenFile
from nanogpt_accel.recipe import load_recipe
from nanogpt_accel.tracking.metrics_log import read_metrics
from nanogpt_accel.train import TrainState, train
from nanogpt_accel.training import find_checkpoint

SETTINGS = SMALL | {
    "n_layer": 1,
    "max_iters": 8,
    "eval_interval": 4,
    "eval_iters": 2,
    "tokenizer": "bpe",
    "vocab_size": 260,
}
MIX = [{"corpus": "a.txt", "weight": 6}, {"corpus": "b.txt", "weight": 3}, {"corpus": "c.txt", "weight": 1}]
STAGES = [{"from": 0.5, "mix": [{"name": "a", "weight": 0.2}, {"name": "c", "weight": 0.8}]}]
VALIDATION = {
    "held": {"corpus": "held.txt", "split": "all"},
    "tail": {"corpus": "held.txt"},
    "head": {"corpus": "held.txt", "split": "train"},
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mix")
    for seed, (name, letters) in enumerate(
        {"a": "etaoinsh", "b": "etaoincm", "c": "etaoinvb", "held": "etaoinsh"}.items()
    ):
        (folder / f"{name}.txt").write_text(make_text(2500, letters, seed))
    return folder


@pytest.fixture(autouse=True)
def in_work(work, monkeypatch):
    monkeypatch.chdir(work)


def recipe_of(name="mix.yaml", **settings):
    return str(write_recipe(Path(), name, **SETTINGS | {"corpus": None, "mix": MIX, "stages": STAGES} | settings))


@pytest.fixture(scope="module")
def run(work):
    """A run of three sources, two stages and three validation sets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        train(recipe_of(validation=VALIDATION), out_dir="full")
    return work / "full"


# ---- the sources


def test_each_source_has_its_own_data_folder_and_the_tokenizer_of_the_first(run):
    found = yaml.safe_load((run / "run.yaml").read_text())["data"]
    folders = [Path(member["data_dir"]) for member in (*found["mix"], *found["validation"].values())]
    assert [folder.name.partition("_")[0] for folder in folders] == ["a", "b", "c", "held", "held", "held"]
    assert len(set(folders)) == 4  # a corpus is prepared once
    assert len({(folder / "tokenizer.json").read_bytes() for folder in folders}) == 1
    # the folder is shared with a run that only has this source
    assert run_data.sections(load_recipe(recipe_of(stages=None, mix=[MIX[0]])).data)["a"].data_dir is None
    alone = load_recipe(recipe_of(stages=None, mix=None, corpus="a.txt"))
    assert run_data.dataset.data_folder(alone.data) == folders[0]


def test_a_mix_of_one_source_trains_as_the_source_alone(work):
    one = recipe_of(mix=[MIX[0]], stages=None)
    train(one, out_dir="one")
    train(recipe_of(mix=None, stages=None, corpus="a.txt"), out_dir="alone")
    assert numbers("one") == numbers("alone")
    assert trainer("one", 8)["data"] == trainer("alone", 8)["data"]


def test_the_tokens_of_a_step_come_from_the_mix(run):
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    shares = [[line[f"share/{name}"] for name in "abc"] for line in lines]
    for part, wanted in ((shares[:4], (0.6, 0.3, 0.1)), (shares[4:], (0.2, 0, 0.8))):
        for values, share in zip(zip(*part, strict=True), wanted, strict=True):
            assert abs(sum(values) * 16 - 64 * share) < 2  # of 64 sequences


def test_source_names(work):
    for source, name in (
        ({"corpus": "hub:me/My-Set.v2"}, "My-Set"),
        ({"corpus": "/texts/wiki.train.jsonl.gz"}, "wiki"),
        ({"data_dir": "data/some folder/"}, "some_folder"),
        ({"corpus": "python", "name": "code"}, "code"),
    ):
        data = load_recipe(None, {"mix": [source | {"weight": 1}]}).data
        assert list(data.sources) == [name]


# ---- losses


def test_val_loss_is_the_mean_over_the_sources_weighted_by_the_first_mix(run):
    for line in [line for line in numbers(run) if "val_loss" in line]:
        by_name = [line[f"val_loss/{name}"] for name in "abc"]
        assert line["val_loss"] == pytest.approx(0.6 * by_name[0] + 0.3 * by_name[1] + 0.1 * by_name[2], rel=1e-12)
        assert line["val_loss/held"] != line["val_loss/tail"] != line["val_loss/head"]


def test_losses_of_a_source_and_a_validation_set_equal_those_of_evaluate(run, call):
    """`evaluate` computes the loss of each window instead of each batch."""
    out = json.loads(call("evaluate", run / "checkpoint-000008", "eval_iters=2", "device=cpu", "--json"))
    last = numbers(run)[-1]
    assert len(out["sets"]) == 6
    for found, name in zip(out["sets"], ("a", "b", "c", *sorted(VALIDATION)), strict=True):
        assert found["val_loss"] == pytest.approx(last[f"val_loss/{name}"], rel=1e-5)


def test_all_tokens_of_a_validation_set(run):
    data = run_data.open_run_data(load_recipe(run / "run.yaml"), 8)
    lengths = {name: len(tokens) for name, tokens in data.validation.items()}
    assert lengths["held"] == lengths["head"] + lengths["tail"]
    held, head = data.validation["held"], data.validation["head"]
    text = data.tokenizer.decode(held.rows([0], len(held))[0])
    assert text == Path("held.txt").read_text() and isinstance(head, TokenFile)


def test_best_names_the_loss_that_selects_the_checkpoint():
    state, key = TrainState(), load_recipe(recipe_of(validation=VALIDATION), {"best": "tail"}).best_loss
    assert key == "val_loss/tail" and load_recipe(recipe_of()).best_loss == "val_loss"
    best = []
    for step, (own, tail) in enumerate(((3.0, 2.0), (2.5, 2.1), (2.7, 1.9), (2.0, 1.9))):
        state.step = step
        best.append(state.record({"val_loss": own, "val_loss/tail": tail, "perplexity": 9.0}, key))
    assert best == [True, False, True, False] and (state.best_step, state.best_val_loss) == (2, 1.9)
    assert state.val_loss == 2.0 and state.named_scores == {"val_loss/tail": 1.9}


# ---- resume


def test_resume_in_a_later_stage_is_bitwise_equal(run, work):
    train(recipe_of(), out_dir="part", max_iters=6, lr_decay_iters=8, stages=[STAGES[0] | {"from": 4}])
    train("part/run.yaml", out_dir="part", init_from="resume", max_iters=8)
    assert losses("part") == losses(run) and trainer("part", 8)["data"] == trainer(run, 8)["data"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stages": []}, ["the mix is a 0.6, b 0.3, c 0.1 from step 0 instead of", "c 0.8 from step 4"]),
        ({"mix": [*MIX[:2], {"corpus": "c.txt", "weight": 2}]}, ["b 0.2727"]),
        ({"mix": [*MIX, {"corpus": "held.txt", "weight": 1}]}, ["the source held is new"]),
        ({"mix": [MIX[1], MIX[0], MIX[2]]}, ["another order"]),
        ({"val_fraction": 0.2}, ["the source a has other tokens"]),
    ],
)
def test_a_changed_mix_is_refused_with_the_differences(run, changes, words, refused):
    tokenizer = {"tokenizer": str(Path(yaml.safe_load((run / "run.yaml").read_text())["data"]["mix"][0]["data_dir"]))}
    recipe = load_recipe(recipe_of(**tokenizer, **changes), {"out_dir": str(run), "init_from": "resume"})
    data = run_data.open_run_data(recipe, 8, report=lambda line: None)

    with refused(ValueError, "checkpoint-000008: trained on different data", "set mix_change=true", *words):
        find_checkpoint(recipe, data, lambda line: None)


def test_an_accepted_change_is_recorded_in_every_later_checkpoint(run, work):
    train(recipe_of(), out_dir="changed", max_iters=4, lr_decay_iters=8, stages=[])
    again = {"out_dir": "changed", "init_from": "resume"}
    stages = [{"from": 4, "mix": [{"name": "b", "weight": 1}]}]
    train("changed/run.yaml", **again, max_iters=6, stages=stages, mix_change=True)
    train("changed/run.yaml", **again, max_iters=8)  # the change is not repeated
    (change,) = trainer("changed", 8)["data_changes"]
    assert change == {"step": 4, "data_before": trainer("changed", 4)["data"]}
    assert [line["share/b"] for line in numbers("changed") if "loss" in line][4:] == [1] * 4


# ---- problems


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"mix": [{"corpus": "a.txt", "weight": 1}, {"corpus": "nowhere.txt", "weight": 1}]},
            ["data.mix: nowhere: corpus=nowhere.txt"],
        ),
        ({"validation": {"wiki": {"corpus": "nowhere.txt"}}}, ["data.validation.wiki: corpus=nowhere.txt"]),
        ({"mix": [{"corpus": "nowhere.txt", "weight": 1}, {"corpus": "a.txt", "weight": 1}]}, ["corpus=nowhere.txt"]),
        ({"corpus": "a.txt"}, ["data.corpus=a.txt: not used with data.mix"]),
        ({"stages": [{"from": 2, "mix": [{"name": "d", "weight": 1}]}]}, ["no source is named d"]),
        ({"stages": [STAGES[0], {"from": 2, "mix": MIX}]}, ["in increasing order", "4,2"]),
        ({"mix": [MIX[0], MIX[0]]}, ["a is twice in the same mix"]),
        ({"mix": [MIX[0], {"corpus": "b.txt", "name": "a", "weight": 1}]}, ["two different sources are named a"]),
        ({"validation": {"b": {"corpus": "held.txt"}}}, ["data.validation.b: a source has the same name"]),
        ({"validation": {"wiki": {}}}, ["data.validation.wiki: set its corpus or data_dir"]),
        ({"mix": [MIX[0], {"corpus": ".", "weight": 1}]}, ["data.mix: the source with corpus=. has no name"]),
        (
            {"stages": [{"from": 2, "mix": [{"name": "b", "weight": 1, "lines": True}]}]},
            ["data.stages: b is defined in an earlier mix, so lines cannot be set here"],
        ),
        # otherwise, a typing error would download OpenWebText
        (
            {"mix": [MIX[0], {"data_dir": "typo", "weight": 1}]},
            ["data.mix: typo: data_dir=typo: contains no train.bin"],
        ),
        ({"validation": {"v": {"data_dir": "typo"}}}, ["data.validation.v: data_dir=typo: contains no train.bin"]),
        ({"stages": STAGES, "max_iters": 1}, ["data.stages: start steps must be", "max_iters=1", "stages=none"]),
        ({"best": "tial", "validation": VALIDATION}, ["checkpoint.best=tial", "did you mean tail?"]),
        ({"tasks_interval": 6}, ["train.tasks_interval=6: must be a multiple of eval_interval=4"]),
    ],
)
def test_problems_of_a_mix_are_one_line_each(settings, words, refused):
    with refused(ValueError, *words):
        recipe = recipe_of("bad.yaml", **{"stages": None, **settings})
        load_recipe(recipe, check=lambda recipe: run_data.check(recipe.data, 8))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "mix: [{corpus: a.txt, weihgt: 1}]",
            ["data.mix.0.weight is missing", "unknown key data.mix.0.weihgt (did you mean weight?)"],
        ),
        ("mix: [{corpus: a.txt, weight: 0}]", ["data.mix.0.weight=0: must be greater than 0"]),
        ("mix: [{corpus: a.txt, weight: 1, limit_tokens: x}]", ["data.mix.0.limit_tokens=x: must be an integer"]),
        (
            "stages: [{from: 2.5, mix: [{corpus: a.txt, weight: 1}]}]",
            ["data.stages.0.from=2.5: must be a step, or a share"],
        ),
        ("stages: [{from: 2, mix: []}]", ["data.stages.0.mix=none: must not be empty"]),
        ("stages: [{from: 1e300, mix: [{corpus: a.txt, weight: 1}]}]", ["data.stages.0.from=1e300: must be less than"]),
        (
            "stages: [{start: 2, mix: [{corpus: a.txt, weight: 1}]}]",
            ["data.stages.0.from is missing", "unknown key data.stages.0.start"],
        ),
        ("mix: [a.txt]", ["data.mix.0=a.txt: must have the form {KEY: VALUE}"]),
        ("validation: {v: {corpus: a.txt, split: tset}}", ["data.validation.v.split=tset: must be 'val', 'test'"]),
        (
            "validation: {a/b: {corpus: a.txt}}",
            ["data.validation.a/b={corpus: a.txt}: must consist of letters, digits"],
        ),
    ],
)
def test_problems_inside_a_list_are_reported_with_their_place(text, words):
    Path("bad.yaml").write_text("data:\n  " + text)
    with pytest.raises(ValueError) as caught:
        load_recipe("bad.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) == len(words)
    for line, word in zip(sorted(lines), sorted(words), strict=True):
        assert word in line


def test_sources_with_another_tokenizer_are_refused(work, refused, run):
    folder = yaml.safe_load((run / "run.yaml").read_text())["data"]["mix"][0]["data_dir"]
    other = run_data.sections(load_recipe(recipe_of(mix=None, stages=None, corpus="b.txt", tokenizer="char")).data)[
        "corpus"
    ]
    run_data.ready(other, report=lambda line: None)
    mix = [{"data_dir": folder, "weight": 1}, {"data_dir": str(run_data.dataset.data_folder(other)), "weight": 1}]
    recipe = load_recipe(recipe_of(mix=mix, stages=None, tokenizer=None, vocab_size=None))
    with refused(ValueError, "data.mix: b_char", "has a char tokenizer", "same tokenizer"):
        run_data.open_run_data(recipe, 8)


def test_prepared_sources_may_have_the_tokenizer_that_a_mix_trains(work):
    """A mix trains a char or bpe tokenizer on its first source. A source that is already prepared may have the same
    tokenizer."""
    alone = recipe_of(mix=None, stages=None, tokenizer="char", vocab_size=None, corpus="a.txt", data_dir="apart")
    run_data.open_run_data(load_recipe(alone), 8, report=lambda line: None)
    mix = [MIX[0], {"data_dir": "apart", "weight": 1}]
    recipe = load_recipe(recipe_of(mix=mix, stages=None, tokenizer="char", vocab_size=None))
    assert run_data.check(recipe.data, 8) == []
    opened = run_data.open_run_data(recipe, 8, report=lambda line: None)
    assert opened.sources["a"].train.rows([0], 99).tolist() == opened.sources["apart"].train.rows([0], 99).tolist()
    assert run_data.check(opened.pin(recipe.data), 8) == [] and run_data.is_prepared(opened.pin(recipe.data))


def test_all_splits_need_enough_tokens(run):
    recipe = load_recipe(run / "run.yaml")
    opened = run_data.open_run_data(recipe, 8)
    size = len(opened.validation["tail"])
    assert run_data.require_blocks(recipe.data, opened, 8) == []
    problems = run_data.require_blocks(recipe.data, opened, size)
    (tail,) = [problem for problem in problems if "tail" in problem]
    assert tail.startswith(f"data.validation.tail: split=val has {size:,} tokens, but a sample has {size + 1:,}")
    problems = run_data.require_blocks(recipe.data, opened, 10**6)
    assert len(problems) == 9 and problems[0].startswith(
        "data.mix: a: block_size=1000000: a sample has 1,000,001 tokens"
    )


def test_a_short_validation_split_of_a_source_is_made_larger(work):
    """As for a single corpus, val_fraction is increased unless it is set. run.yaml contains the fraction that was
    used."""
    mix = [MIX[0], MIX[1] | {"val_fraction": 0.2}]
    recipe = load_recipe(recipe_of(mix=mix, stages=None, val_fraction=None))
    lines = []
    opened = run_data.open_run_data(recipe, 32, report=lines.append)
    assert any(line.startswith("val_fraction=0.01 instead of 0.0005") for line in lines)
    saved = opened.pin(recipe.data)
    assert [source.val_fraction for source in saved.mix] == [0.01, 0.2]
    again = recipe.model_copy(update={"data": saved})
    assert run_data.open_run_data(again, 32).identity == opened.identity
    assert run_data.require_blocks(saved, opened, 32) == run_data.check(saved, 32) == []


# ---- the recipe and the commands


def test_overrides(work):
    mix = recipe_of(validation=VALIDATION)
    assert list(load_recipe(mix, {"corpus": "c.txt"}).data.sources) == ["corpus"]  # a corpus replaces mix and stages
    one = load_recipe(mix, {"mix": "[{corpus: b.txt, weight: 1}]", "stages": "none", "validation": "none"})
    assert list(one.data.sources) == ["b"] and one.data.validation == {} and len(one.stages) == 1
    again = load_recipe(None, {"stages": "[{from: 3, mix: [{corpus: b.txt, weight: 1}, {name: corpus, weight: 1}]}]"})
    assert [list(shares) for _, shares in again.stages] == [["corpus"], ["b", "corpus"]]


def test_run_yaml_is_an_equal_recipe_with_stages_at_steps(run):
    recipe = load_recipe(run / "run.yaml")
    assert recipe.stages == load_recipe(recipe_of()).stages and recipe.data.stages[0].start == 4
    Path("again.yaml").write_text(recipe.to_yaml())
    assert load_recipe("again.yaml") == recipe
    brief = yaml.safe_load(recipe.to_yaml(brief=True))["data"]
    assert brief["mix"] == MIX and brief["stages"] == [STAGES[0] | {"from": 4}] and brief["validation"] == VALIDATION


def test_plan_and_data_show_the_mix(run, call):
    data = json.loads(call("data", run / "run.yaml", "--json"))
    rows = {row["source"]: row for row in data["sources"]}
    per_step = 4 * 4 * 32
    used = {"a": 4 * 0.6 + 4 * 0.2, "b": 4 * 0.3, "c": 4 * 0.1 + 4 * 0.8}
    for name, steps in used.items():
        folder = data["folders"][name]
        n_tokens = json.loads((Path(folder) / "manifest.json").read_text())["splits"]["train"]["tokens"]
        assert abs(rows[name]["tokens"] - steps * per_step) <= 1 and rows[name]["train_tokens"] == n_tokens
        assert rows[name]["epochs"] == pytest.approx(steps * per_step / n_tokens, rel=1e-3)
    assert data["starts"] == [0, 4] and rows["b"]["shares"] == [0.3, 0]
    figures = json.loads(call("plan", run / "run.yaml", "--json"))
    assert figures["sources"] == data["sources"]
    out = call("plan", run / "run.yaml", "max_iters=800")
    assert out.count("warning: ") == 2 and "the shares change at step 4" in out and "(Muennighoff et al. 2023)" in out
    assert "share 0.3, then 0: 614 tokens of the run, 0.0" in call("data", run / "run.yaml")


def test_prepare_prepares_all_sources(work, call, tmp_path, monkeypatch):
    recipe = recipe_of("fresh.yaml", validation=VALIDATION, val_fraction=0.15)
    assert call("plan", recipe).count("not prepared") == 3
    call("prepare", recipe)
    assert run_data.is_prepared(load_recipe(recipe).data)
    assert asdict(run_data.open_run_data(load_recipe(recipe), 8))["stages"][1][0] == 4


def test_data_shows_a_recipe_by_its_name(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("data", "quickstart").splitlines()[-1] == "corpus: not prepared"
    assert "data_dir=gone" in call("data", "gone", status=2)
