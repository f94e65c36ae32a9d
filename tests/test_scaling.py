"""The rules that scale a recipe to another depth."""

from pathlib import Path

import pytest

from nanogpt_accel.model import GPT, GPTConfig
from nanogpt_accel.planning import sizing
from nanogpt_accel.recipe import load_recipe
from nanogpt_accel.scaling import scaling_params

# nanochat at commit 92d63d4, run outside of this project: the lines of scripts/base_train.py from build_model_meta to
# weight_decay_scaled, with its defaults, vocab_size 50257 and window_pattern L.
# depth: (n_embd, n_head, tokens per step, steps, factor of Muon's rate, factor of AdamW's rate, factor of weight decay)
NANOCHAT = {
    4: (256, 2, 262144, 733, 0.7071067811865476, 1.2247448713915892, 1.52683084206345 / 0.28),
    12: (768, 6, 524288, 2828, 1.0, 1.0, 1.0),
    20: (1280, 10, 1048576, 5236, 1.4142135623730951, 1.0954451150103324, 0.10692739855904043 / 0.28),
    26: (1664, 13, 1048576, 10844, 1.4142135623730951, 0.9607689228305228, 0.05163621352864723 / 0.28),
}
TINY = """
model: {n_layer: 2, n_head: 4, n_embd: 64, n_kv_head: 2, n_inner: 128, block_size: 32}
data: {tokenizer: bpe, vocab_size: 300, corpus: python}
optimizer: {learning_rate: 1e-3, weight_decay: 0.1, min_lr: 1e-4, warmup_iters: 10, lr_decay_iters: 80}
train: {batch_size: 6, gradient_accumulation_steps: 2, max_iters: 100}
"""


@pytest.fixture
def load(tmp_path):
    def load(**overrides):
        Path(tmp_path, "tiny.yaml").write_text(TINY)
        return load_recipe(tmp_path / "tiny.yaml", overrides)

    return load


@pytest.mark.parametrize("depth", NANOCHAT)
def test_gpt2_depth_scales_as_nanochat(depth):
    reference, recipe = (load_recipe("gpt2_depth", {"depth": str(d)}) for d in (12, depth))
    n_embd, n_head, batch, steps, muon, adamw, decay = NANOCHAT[depth]
    model, optimizer, before = recipe.model, recipe.optimizer, reference.optimizer
    assert (model.n_layer, model.n_embd, model.n_head, recipe.tokens_per_step) == (depth, n_embd, n_head, batch)
    assert recipe.train.max_iters == pytest.approx(steps, abs=1)  # nanochat also counts the gates of value embeddings
    assert optimizer.muon_learning_rate == pytest.approx(before.muon_learning_rate * muon, rel=1e-5)
    assert optimizer.learning_rate == pytest.approx(before.learning_rate * adamw, rel=1e-5)
    assert optimizer.muon_weight_decay == pytest.approx(before.muon_weight_decay * decay, rel=1e-3)


def test_the_depth_of_the_recipe_changes_nothing(load):
    for name in ("gpt2", "gpt2_depth", "python_depth", "quickstart", "llama"):
        plain = load_recipe(name)
        scaled = load_recipe(name, {"depth": str(plain.model.n_layer)})
        assert scaled.model_dump() == plain.model_dump() | {"expect": scaled.expect.model_dump()}
        assert scaled.derived == ()


@pytest.mark.parametrize(
    "model",
    [
        "{n_layer: 4, n_head: 8, n_embd: 256, head_dim: 64}",  # the queries are wider than the residual stream
        "{n_layer: 4, n_head: 4, n_embd: 100, head_dim: 32}",
        "{n_layer: 4, n_head: 4, n_embd: 128, n_inner: 100, activation: swiglu}",
        "{n_layer: 99, n_head: 2047, n_embd: 2047}",  # 99 * (2047 / 99) is above 2047
    ],
)
def test_the_depth_of_the_recipe_changes_nothing_for_unusual_sizes(model, tmp_path):
    path = tmp_path / "odd.yaml"
    for max_iters in range(1000, 1010):  # with floating-point errors, some of them would be one step shorter
        path.write_text(f"model: {model}\ntrain: {{max_iters: {max_iters}, batch_size: 3}}")
        plain = load_recipe(path)
        assert load_recipe(path, {"depth": plain.model.n_layer}).model_dump() == plain.model_dump()


def test_more_layers_keep_the_width_of_the_queries(tmp_path):
    (tmp_path / "wide.yaml").write_text("model: {n_layer: 4, n_head: 8, n_embd: 256, head_dim: 64, n_kv_head: 2}")
    model = load_recipe(tmp_path / "wide.yaml", {"depth": "6"}).model
    assert (model.n_embd, model.n_head, model.head_dim, model.n_kv_head) == (384, 12, 64, 3)


def test_stages_start_at_the_same_share_of_the_run(tmp_path):
    mix = "[{corpus: python, weight: 1}, {corpus: shakespeare, weight: 1}]"
    later = "{from: 0.9, mix: [{name: shakespeare, weight: 1}]}"
    text = f"data: {{mix: {mix}, stages: [{{from: 300, mix: [{{name: python, weight: 1}}]}}, {later}]}}"
    (tmp_path / "staged.yaml").write_text(f"{text}\ntrain: {{max_iters: 400}}")
    recipe = load_recipe(tmp_path / "staged.yaml", {"depth": "4"})
    steps = recipe.train.max_iters
    assert [start for start, _ in recipe.stages] == [0, round(0.75 * steps), round(0.9 * steps)] and steps != 400
    (line,) = [line for line in recipe.derived if line.startswith("stages")]
    assert "corpus" not in line and f"[{round(0.75 * steps)}.0, 0.9]" in line


def test_every_setting_that_depends_on_the_size_is_scaled(load):
    recipe = load(depth="4")
    model, train, optimizer = recipe.model, recipe.train, recipe.optimizer
    assert (model.n_layer, model.n_embd, model.n_head, model.n_kv_head, model.n_inner) == (4, 128, 8, 4, 256)
    shapes = [load().shape | {"vocab_size": 320}, recipe.shape | {"vocab_size": 320}]
    growth = scaling_params(shapes[1]) / scaling_params(shapes[0])  # of N and of D
    assert growth**0.383 == pytest.approx(2, abs=0.1)  # so the tokens per step double
    assert (train.batch_size, train.gradient_accumulation_steps) == (6, 4)
    assert train.max_iters == int(100 * growth / 2)
    assert optimizer.learning_rate == pytest.approx(1e-3 * 2**0.5 * 2**-0.5)
    assert optimizer.min_lr == pytest.approx(1e-4)
    assert optimizer.warmup_iters == round(0.1 * train.max_iters)
    assert optimizer.lr_decay_iters == round(0.8 * train.max_iters)
    # the time scale of the moving average, 1 / (learning rate * weight decay) steps, is the same share of the run
    assert optimizer.learning_rate * optimizer.weight_decay * train.max_iters == pytest.approx(0.01, rel=1e-5)
    names = [line.partition("=")[0] for line in recipe.derived]
    assert {"n_layer", "n_embd", "max_iters", "weight_decay"} <= set(names) and "learning_rate" not in names
    assert all(line.endswith(")") and "(" in line for line in recipe.derived)


def test_mup_replaces_the_rule_for_the_width(load):
    plain, scaled = load(depth="4"), load(depth="4", mup_base_width="64")
    assert scaled.optimizer.learning_rate == pytest.approx(plain.optimizer.learning_rate * (128 / 64) ** 0.5, rel=1e-5)
    assert scaled.optimizer.muon_learning_rate == plain.optimizer.muon_learning_rate
    assert [line for line in scaled.derived if line.startswith("learning_rate=") and "n_embd" in line] == []


def test_a_smaller_batch_has_fewer_micro_batches_and_then_fewer_sequences(load):
    train = load(depth="1", batch_exponent="1").train  # an eighth of the tokens, so an eighth of the batch if possible
    assert (train.batch_size, train.gradient_accumulation_steps) == (3, 1)


def test_settings_on_the_command_line_are_kept(load):
    given = {"n_embd": "96", "learning_rate": "5e-4", "max_iters": "7", "gradient_accumulation_steps": "2"}
    recipe = load(depth="4", **given)
    assert (recipe.model.n_embd, recipe.model.n_head) == (96, 6)  # heads keep their size
    assert (recipe.optimizer.learning_rate, recipe.optimizer.min_lr) == (5e-4, pytest.approx(5e-5))
    assert (recipe.train.max_iters, recipe.train.gradient_accumulation_steps) == (7, 2)
    assert recipe.optimizer.warmup_iters == 1
    assert not set(given) & {line.partition("=")[0] for line in recipe.derived}


def test_tokens_per_parameter_sets_the_number_of_steps(load):
    recipe = load(tokens_per_parameter="20")
    tokens = recipe.train.max_iters * recipe.tokens_per_step
    params = scaling_params(recipe.shape | {"vocab_size": 320})
    assert 20 * params - recipe.tokens_per_step < tokens <= 20 * params
    assert recipe.model.n_layer == 2 and recipe.scaling.tokens_per_parameter is None  # run.yaml has the results


def test_scaling_params_are_the_matrices_and_the_head():
    for tie in (True, False):
        config = GPTConfig(vocab_size=96, n_layer=2, n_head=2, n_embd=32, n_inner=48, tie_word_embeddings=tie)
        model = GPT(config)
        matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2] + [model.lm_head.weight]
        shape = config.resolved()
        assert scaling_params(shape) == sum(p.numel() for p in matrices)
        norms = sizing.parameters(shape)["norms"]
        assert scaling_params(shape) == sizing.num_matmul_params(shape) - norms


def test_run_yaml_has_the_derived_settings(load, tmp_path):
    recipe = load(depth="3")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text(recipe.to_yaml())
    again = load_recipe(tmp_path / "run")
    assert again.model_dump() == recipe.model_dump() and again.derived == ()
    with pytest.raises(ValueError, match=r"^model.depth=3: only for a new run; .* set max_iters$"):
        load_recipe(tmp_path / "run", {"depth": "3"})


def test_prepared_data_do_not_change_the_number_of_parameters(load, tmp_path):
    (tmp_path / "manifest.json").touch()  # with data_dir, the keys of the corpus have their default values
    assert load(depth="4", data_dir=str(tmp_path)).train == load(depth="4").train


def test_settings_that_were_chosen_for_other_data_may_still_be_replaced():
    scaled = load_recipe("quickstart", {"depth": "3", "corpus": "mine.txt"})
    assert "sample_prompt" not in scaled.train.model_fields_set and "val_fraction" not in scaled.data.model_fields_set


def test_what_cannot_be_scaled_is_refused():
    for name, depth, problem in (
        ("eval_gpt2", {"depth": "4"}, "model.depth=4: not possible with init_from=gpt2, because the size of"),
        ("finetune_shakespeare", {"tokens_per_parameter": "2"}, "scaling.tokens_per_parameter=2: not possible with"),
    ):
        with pytest.raises(ValueError) as error:
            load_recipe(name, depth)
        assert str(error.value).startswith(problem)


def test_a_recipe_without_training_has_nothing_to_scale(tmp_path):
    Path(tmp_path, "none.yaml").write_text("train: {max_iters: 0}")
    with pytest.raises(ValueError, match=r"^model.depth=4: the recipe does not train \(max_iters=0\)"):
        load_recipe(tmp_path / "none.yaml", {"depth": "4"})


def test_an_invalid_recipe_is_no_reference(tmp_path):
    (tmp_path / "invalid.yaml").write_text("model: {n_layer: 4, n_head: 400, n_embd: 128}")
    with pytest.raises(ValueError, match=r"^model.n_embd=128 is not divisible by model.n_head=400; [^\n]*$"):
        load_recipe(tmp_path / "invalid.yaml", {"depth": "3"})


def test_the_number_of_steps_is_set_once(load):
    with pytest.raises(ValueError, match=r"^tokens_per_parameter=20 and max_iters=5 both set the number of steps; "):
        load(tokens_per_parameter="20", max_iters="5")


def test_the_expected_loss_of_a_file_with_a_depth_is_for_this_depth(tmp_path):
    (tmp_path / "deep.yaml").write_text(f"{TINY.replace('model: {', 'model: {depth: 4, ')}expect: {{val_loss: 3}}")
    changed = [load_recipe(tmp_path / "deep.yaml", {key: "3"}).expect.changed for key in ("seed", "depth")]
    assert changed[0] == [] and {"n_layer", "n_embd"} <= set(changed[1])
