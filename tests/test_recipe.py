"""recipe.py: valid keys and values, which value wins, and that all problems are reported together."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub.errors import StrictDataclassClassValidationError

from nanogpt_accel.recipe import FIELDS, SECTION_OF, SECTIONS, Recipe, find_recipe, load_recipe, schema
from nanogpt_accel.utils import cli
from nanogpt_accel.utils.aliases import ALIASES, NANOGPT_KEYS

RECIPES = Path(__file__).parents[1] / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))

# nanoGPT's config_keys, in the order of its train.py, and their defaults where ours are the same
NANOGPT_DEFAULTS = {
    "eval_interval": 2000,
    "log_interval": 1,
    "eval_iters": 200,
    "eval_only": False,
    "init_from": "scratch",
    "gradient_accumulation_steps": 40,
    "batch_size": 12,
    "block_size": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "dropout": 0.0,
    "bias": False,
    "learning_rate": 6e-4,
    "max_iters": 600000,
    "weight_decay": 1e-1,
    "beta1": 0.9,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "warmup_iters": 2000,
    "lr_decay_iters": 600000,
    "min_lr": 6e-5,
}
NANOGPT_OTHERS = [
    "out_dir",
    "always_save_checkpoint",
    "wandb_log",
    "wandb_project",
    "wandb_run_name",
    "dataset",
    "decay_lr",
    "backend",
    "device",
    "dtype",
    "compile",
]


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(text="", check=None, **overrides):
    Path("mine.yaml").write_text(text)
    return load_recipe("mine.yaml", overrides, check)


def value(recipe, key):
    """Return the value of a key, as the run uses it."""
    if key in ("min_lr", "lr_decay_iters", "save_interval"):
        return getattr(recipe, key)
    return getattr(getattr(recipe, SECTION_OF[key]) if SECTION_OF[key] else recipe, key)


def problems(text="", **overrides):
    with pytest.raises(ValueError) as caught:
        load(text, **overrides)
    assert type(caught.value) is ValueError and cli._raised_here(caught.value)
    return str(caught.value).splitlines()


# ---- the fields


def test_every_key_is_unique_and_described():
    leaves = [key for section in SECTIONS.values() for key in section.model_fields]
    leaves += [key for key in Recipe.model_fields if key not in SECTIONS]
    assert len(leaves) == len(set(leaves)) == len(SECTION_OF) > 40
    assert not set(leaves) & set(SECTIONS)  # no key has the name of a section
    for key in leaves:
        assert len(FIELDS[key].description or "") > 8, key
        assert not FIELDS[key].description.endswith("."), key
    assert set(FIELDS) == set(leaves) | {f"{home}.{key}" for key, home in SECTION_OF.items() if home}


def test_a_recipe_is_frozen():
    recipe = load()
    for section, key in ((recipe, "seed"), (recipe.model, "n_layer")):
        with pytest.raises(
            AttributeError, match=rf"^{key}: a recipe cannot be changed .*load_recipe\(PATH, ..{key}.: 1"
        ):
            setattr(section, key, 1)


def test_defaults_equal_nanogpt():
    recipe = load()
    assert {key: value(recipe, key) for key in NANOGPT_DEFAULTS} == pytest.approx(NANOGPT_DEFAULTS)
    # every other key of nanoGPT is a key here, or explained
    assert set(NANOGPT_OTHERS) - set(SECTION_OF) == set(NANOGPT_KEYS)
    assert not set(NANOGPT_KEYS) & set(SECTION_OF)


# ---- the shape of the model


def test_model_defaults_equal_gpt_config():
    """The defaults are in two files, so that a recipe can be read without torch."""
    from nanogpt_accel.model import GPTConfig

    config, model = GPTConfig(), load().model
    fields = {field.name: field.default for field in dataclasses.fields(GPTConfig)}
    shared = fields.keys() & SECTIONS["model"].model_fields.keys()
    assert len(shared) == 22 and shared >= load().shape.keys()  # every key of the shape is a field of GPTConfig
    assert {key: getattr(model, key) for key in shared} == {key: fields[key] for key in shared}
    assert {key: getattr(config, key) for key in load().shape} == load().shape


def test_shape_is_resolved_as_in_gpt_config():
    from nanogpt_accel.model import GPTConfig

    given = {"n_layer": "3", "n_head": "6", "n_embd": "96", "position": "rotary", "norm": "rmsnorm"}
    shape = load(**given).shape
    assert (shape["n_kv_head"], shape["head_dim"], shape["n_inner"]) == (6, 16, 384)
    set_ones = {"n_kv_head": "2", "head_dim": "20", "n_inner": "256", "qk_norm": "true", "logit_softcap": "15"}
    other = load(**given, **set_ones).shape
    assert (other["n_kv_head"], other["head_dim"], other["n_inner"]) == (2, 20, 256)
    for resolved in (shape, other):
        config = GPTConfig(vocab_size=100, **resolved)
        assert {key: getattr(config, key) for key in resolved} == resolved
    # not in the shape: may differ between runs
    assert not {"init_from", "dropout", "pad_vocab_to_multiple_of", "initializer_range", "zero_init"} & shape.keys()
    assert load(**given, n_kv_head="none", head_dim="none", n_inner="none").shape == load(**given).shape


def test_widths_may_be_none_in_yaml():
    for nothing in ("none", "null", "~", "", "None"):
        model = load(
            f"model:\n  n_kv_head: {nothing}\n  head_dim: {nothing}\n  n_inner: {nothing}\n  logit_softcap: {nothing}\n"
        ).model
        assert (model.n_kv_head, model.head_dim, model.n_inner, model.logit_softcap) == (None,) * 4


@pytest.mark.parametrize(
    ("given", "words", "fixes"),
    [
        (
            {"n_head": 12, "n_kv_head": 5},
            ["model.n_head=12", "model.n_kv_head=5", "set n_kv_head=1 or 2 or 3 or 4 or 6 or 12"],
            [{"n_kv_head": n} for n in (1, 2, 3, 4, 6, 12)],
        ),
        (
            {"n_head": 4, "n_kv_head": 8},
            ["model.n_head=4", "model.n_kv_head=8", "set n_kv_head=1 or 2 or 4"],
            [{"n_kv_head": n} for n in (1, 2, 4)],
        ),
        (
            {"n_embd": 36, "position": "rotary"},
            ["model.head_dim=3 ", "position=rotary", "even", "(n_embd / n_head)", "set head_dim=4"],
            [{"n_embd": 48}, {"position": "learned"}, {"head_dim": 4}],
        ),
        (
            {"head_dim": 63, "position": "rotary"},
            ["model.head_dim=63 ", "position=rotary", "even", "set head_dim=64"],
            [{"head_dim": 64}],
        ),
        (
            {"n_embd": 100},
            ["model.n_embd=100", "model.n_head=12", "set n_embd=108", "change n_head"],
            [{"n_embd": 108}, {"n_head": 10}, {"head_dim": 16}],
        ),
    ],
)
def test_invalid_shape_gets_one_message_with_a_fix_that_works(given, words, fixes):
    from nanogpt_accel.model import GPTConfig

    (line,) = problems(**{key: str(number) for key, number in given.items()})
    assert all(word in line for word in words) and ("(n_embd / n_head)" in line) == ("(n_embd / n_head)" in words)
    with pytest.raises(StrictDataclassClassValidationError):
        GPTConfig(**given)
    for fix in fixes:
        GPTConfig(**load(**{key: str(number) for key, number in (given | fix).items()}).shape)


@pytest.mark.parametrize("n_embd", [12, 14, 30])
def test_recipe_and_gpt_config_accept_the_same_shapes(n_embd):
    from nanogpt_accel.model import GPTConfig

    different = []
    for n_head, n_kv_head, head_dim, position in itertools.product(
        (2, 4), (None, 1, 2, 3), (None, 4, 7), ("learned", "rotary")
    ):
        shape = {"n_embd": n_embd, "n_head": n_head, "n_kv_head": n_kv_head, "head_dim": head_dim, "position": position}
        accepted = []
        for make in (lambda: load(**shape), lambda: GPTConfig(**shape)):  # noqa: B023 (called immediately)
            try:
                make()
                accepted.append(True)
            except (ValueError, StrictDataclassClassValidationError):
                accepted.append(False)
        if accepted[0] != accepted[1]:
            different.append(shape)
    assert different == []


# ---- the recipes of the repository


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_loads(name):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert recipe.out_dir == str(Path("runs") / name)
    text = (RECIPES / f"{name}.yaml").read_text()
    # the values are those of the file, as YAML reads them
    for section, keys in yaml.safe_load(text).items():
        for key, written in (keys if section in SECTIONS else {section: keys}).items():
            used = value(recipe, key)
            if key in ("mix", "stages"):  # lists of sections
                used = [item.model_dump() for item in used]
            assert used == (float(written) if isinstance(used, float) else type(used)(written)), key


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_unchanged_by_to_yaml(name):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    Path("run.yaml").write_text(recipe.to_yaml())
    assert load_recipe("run.yaml") == recipe


def test_unusual_values_are_unchanged_by_to_yaml():
    recipe = load(
        sample_prompt="true",
        project="1e3",
        run_name="no: [1]",
        out_dir="räume/ß",
        learning_rate="3e-7",
        trackers="wandb,tensorboard",
        min_lr="0",
        corpus="~",
        seed=str(2**62),
        mixed_precision="no",
        compile="no",
        eval_iters="all",
        lr_decay_iters="none",
    )
    assert (recipe.train.sample_prompt, recipe.tracking.project, recipe.tracking.run_name, recipe.data.corpus) == (
        "true",
        "1e3",
        "no: [1]",
        "~",
    )
    for prompt in ("\n", "", " ", "ROMEO:", "日本\t\n", "null", "- a", "'", "\u2028"):
        one = recipe.model_copy(update={"train": recipe.train.model_copy(update={"sample_prompt": prompt})})
        Path("run.yaml").write_text(one.to_yaml(), encoding="utf-8")
        assert load_recipe("run.yaml") == one


SHAKESPEARE_CHAR = {  # nanoGPT's config/train_shakespeare_char.py
    "eval_interval": 250,
    "eval_iters": 200,
    "log_interval": 10,
    "gradient_accumulation_steps": 1,
    "batch_size": 64,
    "block_size": 256,
    "n_layer": 6,
    "n_head": 6,
    "n_embd": 384,
    "dropout": 0.2,
    "learning_rate": 1e-3,
    "max_iters": 5000,
    "lr_decay_iters": 5000,
    "min_lr": 1e-4,
    "beta2": 0.99,
    "warmup_iters": 100,
}
ON_A_CPU = {  # the command line of nanoGPT's README for a computer without a GPU
    "device": "cpu",
    "compile": False,
    "eval_iters": 20,
    "log_interval": 1,
    "block_size": 64,
    "batch_size": 12,
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "max_iters": 2000,
    "lr_decay_iters": 2000,
    "dropout": 0.0,
}
TRAIN_GPT2 = {  # config/train_gpt2.py
    "batch_size": 12,
    "block_size": 1024,
    "gradient_accumulation_steps": 5 * 8,
    "max_iters": 600000,
    "lr_decay_iters": 600000,
    "eval_interval": 1000,
    "eval_iters": 200,
    "log_interval": 10,
    "weight_decay": 1e-1,
}


@pytest.mark.parametrize(
    ("name", "changes", "corpus", "tokenizer"),
    [
        ("shakespeare_char", SHAKESPEARE_CHAR, "shakespeare", "char"),
        ("shakespeare_char_cpu", SHAKESPEARE_CHAR | ON_A_CPU, "shakespeare", "char"),
        ("gpt2", TRAIN_GPT2, "openwebtext", "gpt2"),
    ],
)
def test_recipes_have_the_values_of_nanogpts_configs(name, changes, corpus, tokenizer):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    wanted = NANOGPT_DEFAULTS | changes
    wanted.pop("compile", None)
    assert {key: value(recipe, key) for key in wanted} == wanted
    assert recipe.train.compile in (False, "auto")  # auto does not compile on a CPU
    assert (recipe.data.corpus, recipe.data.tokenizer, recipe.data.sampling) == (corpus, tokenizer, "random")
    assert recipe.model.activation == "gelu" and recipe.optimizer.algorithm == "adamw"
    # nanoGPT pads only GPT-2's vocabulary, from 50,257 to 50,304; ours has one more entry, for a padding token
    assert recipe.model.pad_vocab_to_multiple_of == (64 if tokenizer == "gpt2" else 2)
    assert recipe.optimizer.schedule == "cosine"


def test_command_line_of_nanogpts_readme_works_unchanged():
    words = [
        "--device=cpu",
        "--compile=False",
        "--eval_iters=20",
        "--log_interval=1",
        "--block_size=64",
        "--batch_size=12",
        "--n_layer=4",
        "--n_head=4",
        "--n_embd=128",
        "--max_iters=2000",
        "--lr_decay_iters=2000",
        "--dropout=0.0",
    ]
    target, options = cli.parse([str(RECIPES / "shakespeare_char.yaml"), *words], FIELDS)
    recipe = load_recipe(target, options)
    assert {key: value(recipe, key) for key in ON_A_CPU} == ON_A_CPU
    assert value(recipe, "learning_rate") == 1e-3


# ---- which value wins


def test_command_line_overrides_the_file_and_the_file_the_defaults():
    text = "model:\n  n_layer: 3\n  n_embd: 96\nseed: 5\n"
    assert (load(text).model.n_layer, load(text).model.n_head, load(text).seed) == (3, 12, 5)
    recipe = load(text, n_layer="4", seed="6")
    assert (recipe.model.n_layer, recipe.model.n_embd, recipe.seed) == (4, 96, 6)


@pytest.mark.parametrize(
    "words",
    [
        ["n_layer=6"],
        ["model.n_layer=6"],
        ["--n_layer", "6"],
        ["--n-layer=6"],
        ["--n-layer", "6"],
        ["--model.n_layer=6"],
        ["n_layer=3", "--n_layer=6"],
        ["model.n_layer=3", "n_layer=6"],
    ],
)
def test_key_can_be_spelled_in_all_ways(words):
    Path("mine.yaml").touch()
    target, options = cli.parse(["mine.yaml", *words], FIELDS)
    assert target == "mine.yaml" and load_recipe(target, options).model.n_layer == 6


def test_derived_defaults():
    assert load().out_dir == str(Path("runs/mine")) and load(out_dir="x").out_dir == "x"
    recipe = load(learning_rate="1e-3", max_iters="9000")
    assert recipe.min_lr == pytest.approx(1e-4) and recipe.lr_decay_iters == 9000
    assert load(eval_interval="7").save_interval == 7 and load(eval_interval="7", save_interval="3").save_interval == 3
    assert load(min_lr="0").min_lr == 0  # 0 is not a missing value
    assert load(max_iters="0", warmup_iters="0").lr_decay_iters >= 1


# ---- types


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("learning_rate", "3e-4", 3e-4),
        ("learning_rate", "1", 1.0),
        ("weight_decay", ".5", 0.5),
        ("max_iters", "1e4", 10_000),
        ("max_iters", "6e5", 600_000),
        ("max_iters", "20_000", 20_000),
        ("max_iters", "2000.0", 2000),
        ("n_layer", "007", 7),
        ("bias", "true", True),
        ("bias", "True", True),
        ("bias", "yes", True),
        ("bias", "on", True),
        ("bias", "1", True),
        ("bias", "no", False),
        ("bias", "False", False),
        ("bias", "off", False),
        ("bias", "0", False),
        ("compile", "auto", "auto"),
        ("compile", "False", False),
        ("compile", "true", True),
        ("compile", "no", False),
        ("mixed_precision", "no", "no"),
        ("mixed_precision", "bf16", "bf16"),
        ("eval_iters", "all", "all"),
        ("eval_iters", "1e2", 100),
        ("eval_iters", "20", 20),
        ("min_lr", "none", None),
        ("min_lr", "None", None),
        ("min_lr", "null", None),
        ("lr_decay_iters", "none", None),
        ("data_dir", "none", None),
        ("run_name", "none", None),
        ("save_interval", "none", None),
        ("data_dir", "nonesuch", "nonesuch"),
        ("trackers", "none", []),
        ("trackers", "", []),
        ("trackers", "[]", []),
        ("trackers", "wandb", ["wandb"]),
        ("trackers", "wandb,tensorboard", ["wandb", "tensorboard"]),
        ("trackers", "[wandb, tensorboard]", ["wandb", "tensorboard"]),
        ("n_kv_head", "none", None),
        ("head_dim", "null", None),
        ("n_inner", "None", None),
        ("logit_softcap", "none", None),
        ("n_kv_head", "4", 4),
        ("head_dim", "64", 64),
        ("n_inner", "2_048", 2048),
        ("logit_softcap", "15", 15.0),
        ("rope_theta", "1e6", 1e6),
        ("norm_eps", "1e-6", 1e-6),
        ("norm", "rmsnorm", "rmsnorm"),
        ("qk_norm", "yes", True),
        ("position", "rotary", "rotary"),
        ("activation", "swiglu", "swiglu"),
        ("tie_word_embeddings", "false", False),
        ("norm_weight", "no", False),
        ("embd_norm", "true", True),
        ("device", "cuda:3", "cuda:3"),
        ("sample_prompt", "true", "true"),
        ("corpus", "none", "none"),
    ],
)
def test_text_is_read_by_the_declared_type(key, text, expected):
    found = getattr(getattr(load(**{key: text}), SECTION_OF[key]), key)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("line", "key", "expected"),
    [
        ("max_iters: 6e5", "max_iters", 600_000),  # PyYAML reads 6e5 as text
        ("max_iters: 5.0e+4", "max_iters", 50_000),
        ("max_iters: 20_000", "max_iters", 20_000),
        ("mixed_precision: no", "mixed_precision", "no"),  # PyYAML reads no as false
        ("compile: no", "compile", False),
        ("compile: auto", "compile", "auto"),
        ("compile: 'false'", "compile", False),
        ("eval_iters: all", "eval_iters", "all"),
        ("eval_only: yes", "eval_only", True),
    ],
)
def test_yaml_is_read_by_the_declared_type(line, key, expected):
    found = getattr(load(f"train:\n  {line}\n").train, key)
    assert found == expected and type(found) is type(expected)


def test_yaml_lists_numbers_and_empty_values():
    assert load("tracking:\n  trackers: [wandb, tensorboard]").tracking.trackers == ["wandb", "tensorboard"]
    assert load("tracking:\n  trackers: wandb, tensorboard").tracking.trackers == ["wandb", "tensorboard"]
    assert load("tracking:\n  trackers:\n").tracking.trackers == []
    assert load("optimizer:\n  learning_rate: 3e-4\n  min_lr: null").optimizer.learning_rate == 3e-4
    assert load("") == load("model:\n") == load("# nothing\n")


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("n_layer", "six", "model.n_layer=six: must be an integer"),
        ("n_layer", "1.5", "model.n_layer=1.5: must be an integer"),
        ("n_layer", "", "model.n_layer=: must be an integer"),
        ("n_layer", "0", "model.n_layer=0: must be greater than or equal to 1"),
        ("n_layer", True, "model.n_layer=true: must be an integer, not true or false"),
        ("learning_rate", "fast", "optimizer.learning_rate=fast: must be a valid number"),
        ("learning_rate", True, "optimizer.learning_rate=true: must be a number, not true or false"),
        ("learning_rate", "nan", "optimizer.learning_rate=nan: must be a finite number"),
        ("learning_rate", "inf", "optimizer.learning_rate=inf: must be a finite number"),
        ("learning_rate", "0", "optimizer.learning_rate=0: must be greater than 0"),
        ("dropout", "1", "model.dropout=1: must be less than 1"),
        ("bias", "maybe", "model.bias=maybe: must be a valid boolean"),
        ("mixed_precision", "fp8", "train.mixed_precision=fp8: must be 'auto', 'no', 'fp16' or 'bf16'"),
        ("sampling", "shufle", "data.sampling=shufle: must be 'shuffle' or 'random'"),
        ("device", "gpu", "train.device=gpu"),
        ("device", "cuda:x", "train.device=cuda:x"),
        ("eval_iters", "0", "train.eval_iters=0: must be at least 1, or all"),
        ("eval_iters", "some", "train.eval_iters=some: must be 'all'"),
        ("compile", "maybe", "train.compile=maybe: must be 'auto'"),
        ("seed", "-1", "seed=-1: must be greater than or equal to 0"),
        ("val_fraction", "1", "data.val_fraction=1: must be less than 1"),
        ("n_kv_head", "0", "model.n_kv_head=0: must be greater than or equal to 1"),
        ("n_inner", "wide", "model.n_inner=wide: must be an integer"),
        ("norm", "batchnorm", "model.norm=batchnorm: must be 'layernorm' or 'rmsnorm'"),
        ("position", "alibi", "model.position=alibi: must be 'learned' or 'rotary'"),
        ("activation", "silu", "model.activation=silu: must be 'gelu', 'gelu_new', 'relu2' or 'swiglu'"),
        ("logit_softcap", "0", "model.logit_softcap=0: must be greater than or equal to 1"),
        ("rope_theta", "0", "model.rope_theta=0: must be greater than or equal to 1"),
        ("norm_eps", "-1", "model.norm_eps=-1: must be greater than or equal to 0"),
        ("qk_norm", "maybe", "model.qk_norm=maybe: must be a valid boolean"),
        ("vocab_size", "256", "data.vocab_size=256: must be greater than or equal to 257"),
    ],
)
def test_invalid_value_is_refused_with_the_constraint(key, text, words):
    (line,) = problems(**{key: text})
    assert line.startswith(words)


# ---- unknown and misplaced keys


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("n_layr", "unknown key n_layr (did you mean n_layer?)"),
        ("model.n_layr", "unknown key model.n_layr (did you mean n_layer?)"),
        ("lerning_rate", "(did you mean learning_rate?)"),
        ("data.n_layer", "unknown key data.n_layer"),
        ("zzz", "unknown key zzz"),
        ("model", "unknown key model"),
        ("seed.seed", "unknown key seed.seed"),
    ],
)
def test_unknown_keys_on_the_command_line_are_refused(key, words):
    (line,) = problems(**{key: "6"})
    assert words in line
    assert ("did you mean" in line) == (key not in ("zzz", "model"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("n_layer: 6", "mine.yaml: n_layer is in the wrong place; move n_layer to the section model"),
        (
            "model:\n  learning_rate: 1",
            "mine.yaml: model.learning_rate is in the wrong place; move learning_rate to the section optimizer",
        ),
        ("model:\n  seed: 1", "mine.yaml: model.seed is in the wrong place; move seed to the top level"),
        ("model:\n  n_layr: 6", "mine.yaml: unknown key model.n_layr (did you mean n_layer?)"),
        ("modle:\n  n_layer: 6", "mine.yaml: unknown key modle"),
        ("zzz: 1", "mine.yaml: unknown key zzz"),
        ("model: 6", "mine.yaml: model=6: write the keys of this section"),
        ("model: [n_layer]", "write the keys of this section"),
        ("model: []", "write the keys of this section"),
        (
            "train:\n  dtype: bfloat16",
            "mine.yaml: unknown key train.dtype; instead of nanoGPT's dtype, use mixed_precision",
        ),
    ],
)
def test_unknown_and_misplaced_keys_of_a_file_are_refused(text, words):
    (line,) = problems(text)
    assert words in line


@pytest.mark.parametrize("key", sorted(ALIASES))
def test_names_of_other_programs_get_a_hint(key):
    (line,) = problems(**{key: "1"})
    assert line == f"unknown key {key}; use {ALIASES[key]}" and key not in SECTION_OF
    named = re.findall(r"\b([a-z]+_[a-z_]+|[a-z]+(?==)|schedule|algorithm|corpus|trackers)\b", ALIASES[key])
    assert named and set(named) <= set(SECTION_OF), named


@pytest.mark.parametrize("key", sorted(NANOGPT_KEYS))
def test_keys_of_nanogpt_that_we_lack_are_explained(key):
    for lines in (problems(**{key: "x"}), problems(f"{key}: x")):
        (line,) = lines
        assert f"unknown key {key}; instead of nanoGPT's {key}, use " in line
    # the keys that the message names exist
    named = re.findall(r"\b([a-z_]+)=", NANOGPT_KEYS[key])
    assert all(name in SECTION_OF for name in named) and (named or key in ("backend", "always_save_checkpoint"))


# ---- all problems together


def test_all_problems_are_reported_together():
    text = """
foo: 1
seed: x
model: {n_embd: ten, n_head: 5, n_layr: 2, learning_rate: 1}
optimizer: {min_lr: 1, learning_rate: x}
train: {eval_iters: -1, batch_size: 0}
"""
    Path("mine.yaml").write_text(text)
    with pytest.raises(ValueError) as caught:
        load_recipe("mine.yaml", {"dropot": "1", "beta1": "2"}, check=lambda recipe: ["corpus=x: not there"])
    lines = str(caught.value).splitlines()
    for words in (
        "unknown key foo",
        "unknown key model.n_layr",
        "move learning_rate to the section optimizer",
        "unknown key dropot (did you mean dropout?)",
        "optimizer.beta1=2",
        "model.n_embd=ten",
        "optimizer.learning_rate=x",
        "seed=x",
        "train.batch_size=0",
        "train.eval_iters=-1",
        "corpus=x: not there",
    ):
        assert sum(words in line for line in lines) == 1, words
    assert len(lines) == 11  # no message about n_head or min_lr, because the values they are compared with are invalid


def test_checks_across_sections():
    assert problems(n_embd="100")[0].startswith("model.n_embd=100 is not divisible by model.n_head=12")
    assert "set n_embd=108" in problems(n_embd="100")[0]
    assert load(n_embd="108").model.n_embd == 108  # the suggested value is valid
    (line,) = problems(mup_base_width="256", norm_weight="false")
    assert line.startswith("model.mup_base_width=256: muP with tied embeddings")
    load(mup_base_width="256", norm_weight="false", tie_word_embeddings="false")
    (line,) = problems(mup_base_width="256", n_head="4")
    assert "model.mup_base_width=256 is not a multiple of head_dim=192 (n_embd / n_head)" in line
    assert line.endswith("set n_head=3 or a multiple of it")
    load(mup_base_width="256", n_head="3")
    (line,) = problems(min_lr="0.1", learning_rate="0.01")
    assert "optimizer.min_lr=0.1 is greater than optimizer.learning_rate=0.01; " in line
    assert line.endswith("lower min_lr or raise learning_rate")
    (line,) = problems(warmup_iters="500", max_iters="100")
    assert "warmup_iters=500 is too long for schedule=cosine with lr_decay_iters=100; set warmup_iters to 100" in line
    load(warmup_iters="500", max_iters="100", schedule="constant")
    load(warmup_iters="100", max_iters="100")
    trapezoid = {"schedule": "warmup_stable_decay", "max_iters": "100", "decay_fraction": "0.9"}
    (line,) = problems(warmup_iters="11", **trapezoid)
    assert "schedule=warmup_stable_decay with lr_decay_iters=100 and decay_fraction=0.9" in line
    assert "set warmup_iters to 10 or less" in line
    load(warmup_iters="10", **trapezoid)
    assert len(problems(n_embd="100", min_lr="1", warmup_iters="1e9")) == 3


def test_warm_up_that_the_user_did_not_set_is_shortened():
    assert load(max_iters="2000").warmup_iters == 2000
    assert load(max_iters="1999").warmup_iters == 199  # a tenth of max_iters
    assert load(max_iters="9").warmup_iters == 0
    assert load(max_iters="9", schedule="constant").warmup_iters == 2000
    assert load(max_iters="100", lr_decay_iters="5000").warmup_iters == 2000
    trapezoid = {"schedule": "warmup_stable_decay", "max_iters": "1000"}
    assert load(**trapezoid, decay_fraction="0.2").warmup_iters == 100
    assert load(**trapezoid, decay_fraction="0.95").warmup_iters == 50  # until the decay starts
    recipe = load(max_iters="1999")
    assert recipe.lr_schedule["warmup_iters"] == 199 and recipe.optimizer.warmup_iters == 2000


def test_check_of_a_command_gets_the_recipe():
    seen = []
    load(n_layer="5", check=lambda recipe: seen.append(recipe.model.n_layer) or [])
    assert seen == [5]


# ---- files that are not recipes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nseed: 2\n", ["line 2", "duplicate key seed"]),
        ("model:\n  n_layer: 1\n  bias: no\n  n_layer: 2\n", ["line 4", "duplicate key n_layer"]),
        ("model:\n  bias: [1\n", ["invalid YAML", "line 3"]),
        ("model:\n\tn_layer: 6\n", ["invalid YAML", "line 2", r"'\t'"]),
        ("seed: 1\nx: !!python/object/apply:os.mkdir ['hacked']\n", ["invalid YAML", "line 2"]),
        ("seed: {[a, b]: 1}\n", ["invalid YAML", "line 1"]),
        ("- a\n- b\n", ["a recipe must contain sections with keys, but this is a list"]),
        ("just text", ["this is a str"]),
    ],
)
def test_files_that_are_not_recipes_are_refused(refused, text, words):
    with refused(ValueError, "mine.yaml", *words):
        load(text)
    assert not Path("hacked").exists()


def test_binary_file_is_refused(refused):
    Path("mine.yaml").write_bytes(b"seed: \xff")
    with refused(ValueError, "mine.yaml: not a UTF-8 text file (invalid byte at position 6)"):
        load_recipe("mine.yaml")


# ---- names


@pytest.mark.parametrize("target", ["gpt2", "gpt2.yaml", "recipes/gpt2.yaml", "recipes/gpt2", Path("gpt2")])
def test_packaged_recipe_is_found_by_its_name_in_any_folder(target):
    assert find_recipe(target).samefile(RECIPES / "gpt2.yaml")
    assert load_recipe(target) == load_recipe(RECIPES / "gpt2.yaml") and load_recipe(target).out_dir == "runs/gpt2"


@pytest.mark.parametrize("name", NAMES)
def test_every_packaged_recipe_has_a_name(name):
    assert find_recipe(name).samefile(RECIPES / f"{name}.yaml")


def test_path_that_exists_takes_precedence_over_a_name(refused):
    Path("gpt2.yaml").write_text("seed: 1")
    assert find_recipe("gpt2") == find_recipe("gpt2.yaml") == Path("gpt2.yaml")
    Path("recipes").mkdir()
    Path("recipes/llama.yaml").write_text("seed: 2")
    assert find_recipe("recipes/llama") == find_recipe("recipes/llama.yaml") == Path("recipes/llama.yaml")
    assert find_recipe("llama").samefile(RECIPES / "llama.yaml")
    with refused(FileNotFoundError, "recipes/gpt2.yaml: no such recipe"):  # the folder of the user has no such file
        find_recipe("recipes/gpt2.yaml")

    Path("gpt2").mkdir()
    with refused(ValueError, "gpt2: not a run folder, because it has no run.yaml", "for the recipe, use gpt2.yaml"):
        find_recipe("gpt2")
    with refused(ValueError, "recipes: not a run folder", "use a recipe or a run folder"):
        find_recipe("recipes")
    Path("gpt2/run.yaml").write_text("seed: 3")
    assert find_recipe("gpt2") == Path("gpt2/run.yaml")
    Path("qwen3").write_text("seed: 4")
    assert find_recipe("qwen3") == Path("qwen3") and load_recipe("qwen3").seed == 4


@pytest.mark.parametrize("target", ["./gpt2.yaml", "../gpt2", "folder/gpt2.yaml", "/gpt2.yaml", "recipes/../gpt2"])
def test_path_is_not_a_name(refused, target):
    with refused(FileNotFoundError, f"{target}: no such recipe or run folder"):
        find_recipe(target)


def test_missing_recipe_is_refused_with_the_nearest_name(refused):
    with refused(FileNotFoundError, "quikstart: no such recipe or run folder", "(did you mean quickstart?)"):
        load_recipe("quikstart")
    with refused(FileNotFoundError, "recipes/quikstart.yaml: no such recipe", "did you mean quickstart.yaml?"):
        load_recipe("recipes/quikstart.yaml")
    with refused(FileNotFoundError, "zzzzz: no such recipe", "`nanogpt-accel recipes` lists"):
        load_recipe("zzzzz")
    Path("mine/poems").mkdir(parents=True)
    Path("mine/poems/run.yaml").touch()
    Path("mine/essays.yaml").touch()
    with refused(FileNotFoundError, "mine/poem: no such recipe", "did you mean poems?"):
        load_recipe("mine/poem")
    with refused(FileNotFoundError, "mine/esays.yaml: no such recipe", "did you mean essays.yaml?"):
        load_recipe("mine/esays.yaml")
    with refused(FileNotFoundError, "nowhere/x.yaml: no such recipe"):
        load_recipe("nowhere/x.yaml")


# ---- for trackers


def test_flat_returns_plain_values():
    flat = load(trackers="wandb", n_layer="3").flat()
    assert set(flat) == {key for key, section in SECTION_OF.items() if section != "expect"}
    assert flat["n_layer"] == 3 and flat["learning_rate"] == 6e-4
    assert all(isinstance(value, (bool, int, float, str)) for value in flat.values())


# ---- for editors


def test_schema_file_is_up_to_date():
    assert (RECIPES / "recipe.schema.json").read_text(encoding="utf-8") == schema(), (
        "python -m nanogpt_accel.recipe > recipes/recipe.schema.json"
    )


@pytest.mark.parametrize("name", NAMES)
def test_recipe_names_its_schema_and_follows_it(name):
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.splitlines()[0] == "# yaml-language-server: $schema=recipe.schema.json"
    found = json.loads(schema())
    for section, values in yaml.safe_load(text).items():
        if section in SECTIONS:
            known = found["$defs"][section.capitalize()]["properties"]
            assert values.keys() <= known.keys()
            assert all(known[key]["description"] for key in values)
        else:
            assert section in found["properties"]


# ---- data_dir on the command line


PREPARED = {
    "ours": ("manifest.json", "train.bin", "val.bin", "tokenizer.json"),
    "shards": ("manifest.json", "train-00000.bin", "val.bin"),
    "refers to other files": ("manifest.json", "tokenizer.json"),
    "nanogpt": ("train.bin", "val.bin", "meta.pkl"),
    "Megatron-LM": ("x_text_document.bin", "x_text_document.idx"),
    "datatrove": ("00000_train.ds", "00000_train.ds.index"),
    "numpy": ("edufineweb_train_000001.npy", "edufineweb_val_000000.npy"),
}


@pytest.mark.parametrize("files", PREPARED.values(), ids=PREPARED)
@pytest.mark.parametrize("key", ["data_dir", "data.data_dir"])
def test_prepared_data_on_the_command_line_replace_the_corpus(tmp_path, files, key):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "data: {corpus: python, tokenizer: bpe, vocab_size: 300, val_fraction: 0.02, sampling: random, lines: true}\n"
    )
    for name in files:
        (tmp_path / name).touch()
    loaded = load_recipe(recipe, {key: str(tmp_path)})
    val_fraction = {} if "manifest.json" in files else {"val_fraction": 0.02}  # these files may have no val split
    assert loaded.data == SECTIONS["data"](data_dir=str(tmp_path), sampling="random", **val_fraction)
    assert load_recipe(recipe, {key: str(tmp_path), "tokenizer": "char"}).data.tokenizer == "char"
    new = load_recipe(recipe, {key: str(tmp_path / "new")}).data  # the recipe's corpus is prepared there
    assert (new.corpus, new.tokenizer, new.val_fraction) == ("python", "bpe", 0.02)
    assert load_recipe(recipe, {key: "none"}).data.corpus == "python"
    recipe.write_text(f"data: {{corpus: python, data_dir: {tmp_path}}}\n")
    assert load_recipe(recipe, {}).data.corpus == "python", "a recipe that sets both means both"


def test_files_of_another_project_are_read_with_the_tokenizer_folder_of_the_recipe(tmp_path):
    recipe, folder = tmp_path / "r.yaml", tmp_path / "ids"
    recipe.write_text(f"data: {{corpus: python, tokenizer: {tmp_path}}}\n")
    folder.mkdir()
    (folder / "x_train.bin").touch()
    assert load_recipe(recipe, {"data_dir": str(folder)}).data.tokenizer == str(tmp_path)
    (folder / "manifest.json").touch()
    assert load_recipe(recipe, {"data_dir": str(folder)}).data.tokenizer == "gpt2"


def test_a_corpus_on_the_command_line_keeps_the_tokenizer(tmp_path):
    """data_dir may contain a .bin file that is not a token file."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data: {tokenizer: char, val_fraction: 0.02}\n")
    (tmp_path / "model.bin").touch()
    loaded = load_recipe(recipe, {"data_dir": str(tmp_path), "corpus": "x.txt"}).data
    assert (loaded.corpus, loaded.tokenizer, loaded.val_fraction) == ("x.txt", "char", 0.02)


@pytest.mark.parametrize("key", ["corpus", "data.tokenizer", "data_dir"])
def test_settings_that_the_file_chose_for_its_corpus_are_not_explicit_for_another(tmp_path, key):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data: {corpus: python, val_fraction: 0.02}\ntrain: {sample_prompt: def}\n")
    for overrides, is_explicit in (({}, True), ({key: "x"}, False)):
        loaded = load_recipe(recipe, overrides)
        assert (loaded.data.val_fraction, loaded.train.sample_prompt) == (0.02, "def")
        assert ("val_fraction" in loaded.data.model_fields_set) == is_explicit
        assert ("sample_prompt" in loaded.train.model_fields_set) == is_explicit
    loaded = load_recipe(recipe, {key: "x", "data.val_fraction": "0.5", "sample_prompt": "a"})
    assert {"val_fraction"} <= loaded.data.model_fields_set and {"sample_prompt"} <= loaded.train.model_fields_set


def test_the_expected_loss_is_then_for_other_data(tmp_path):
    (tmp_path / "train.bin").touch()
    recipe = load_recipe(RECIPES / "quickstart.yaml", {"data_dir": str(tmp_path)})
    assert {"corpus", "tokenizer", "data_dir"} <= set(recipe.expect.changed)
