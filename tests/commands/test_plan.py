"""plan: its figures against the real model, the file in configs/ that it suggests, errors, the table of SCALE.md."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import config_of, counted_by_part
from runs import LAW, write_finished_run, write_grid

from nanogpt_accel.__main__ import main
from nanogpt_accel.commands import plan
from nanogpt_accel.model import GPT, GPTConfig
from nanogpt_accel.planning.scaling_law import expected_loss
from nanogpt_accel.planning.sizing import COUNTED, flops_per_token
from nanogpt_accel.recipe import Recipe, load_recipe
from nanogpt_accel.scaling import scaling_params

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without prepared data


def planned(*words, capsys):
    """Return the output of `nanogpt-accel plan WORDS --json`."""
    assert main(["plan", *map(str, words), "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return json.loads(printed.out)


def test_a_setting_that_plan_does_not_know_is_named(monkeypatch, capsys):
    """A user has added a switch to the recipe and to GPTConfig for an experiment."""
    assert Recipe().shape.keys() <= COUNTED
    shape = Recipe.shape.fget
    words = [ROOT / "recipes" / "gpt2.yaml"]
    known = planned(*words, capsys=capsys)
    monkeypatch.setattr(Recipe, "shape", property(lambda recipe: shape(recipe) | {"value_residual": True, "gate": 0}))
    found = planned(*words, capsys=capsys)
    (line,) = [line for line in found.pop("assumed") if line not in known["assumed"]]
    assert "value_residual=true" in line and "does not change the estimates" in line
    assert found == {key: value for key, value in known.items() if key != "assumed"}


# ---- parameters


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_parameters_of_every_recipe_are_exact(path, capsys):
    recipe, found = load_recipe(path), planned(path, capsys=capsys)
    init_from = recipe.model.init_from
    if init_from == "scratch":
        shape = recipe.shape
    else:  # the shapes of OpenAI's models in nanoGPT's model.py
        n_layer, n_head, n_embd = {
            "gpt2": (12, 12, 768),
            "gpt2-medium": (24, 16, 1024),
            "gpt2-large": (36, 20, 1280),
            "gpt2-xl": (48, 25, 1600),
        }[init_from]
        shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": 1024, "bias": True}
        assert found["vocab_size"] == 50257
    expected = counted_by_part(GPTConfig(**{**shape, "vocab_size": found["vocab_size"]}))
    total = found["parameters"].pop("total")
    assert found["parameters"] == expected and total == sum(expected.values())
    with torch.device("meta"):
        model = GPT(GPTConfig(**{**shape, "vocab_size": found["vocab_size"]}))
    config = model.config
    n_matmul = total - expected["position"] - (0 if config.tie_word_embeddings else expected["embedding"])
    attention = 12 * config.n_layer * config.n_head * config.head_dim * config.block_size
    assert found["flops_per_token"] == flops_per_token(config.resolved()) == 6 * n_matmul + attention


@pytest.mark.parametrize(
    ("words", "vocab_size"),
    [
        (["tokenizer=gpt2"], 50304),
        (["tokenizer=gpt2", "pad_vocab_to_multiple_of=1"], 50257),
        (["tokenizer=char", "corpus=shakespeare"], 128),
        (["tokenizer=bpe", "vocab_size=1000"], 1024),
    ],
)
def test_vocabulary_is_padded(words, vocab_size, capsys):
    assert planned(ROOT / "recipes" / "gpt2.yaml", *words, capsys=capsys)["vocab_size"] == vocab_size


def test_prepared_data_replace_the_guessed_vocabulary(tmp_path, capsys):
    Path("text.txt").write_text("abcdefghij" * 500)
    words = [
        ROOT / "recipes" / "shakespeare_char.yaml",
        "corpus=text.txt",
        "block_size=16",
        "device=cpu",
        "pad_vocab_to_multiple_of=1",
    ]
    assert planned(*words, capsys=capsys)["vocab_size"] == 256  # plan assumes this size
    assert main(["prepare", *map(str, words)]) == 0
    capsys.readouterr()
    words += ["max_iters=10", "batch_size=9", "gradient_accumulation_steps=1"]
    found = planned(*words, "mixed_precision=no", capsys=capsys)
    assert found["vocab_size"] == 10 and found["train_tokens"] == 4500 and found["assumed"] == []
    (assumed,) = planned(*words, capsys=capsys)["assumed"]  # plan does not look for AMX
    assert "AMX" in assumed
    assert found["tokens"] == 1440 and found["epochs"] == pytest.approx(0.32)


def test_a_folder_of_weights_has_its_own_shape(tmp_path, capsys):
    config = config_of("llama")
    GPT(config).save_pretrained("weights")
    capsys.readouterr()
    found = planned(ROOT / "recipes" / "finetune_shakespeare.yaml", "init_from=weights", "block_size=32", capsys=capsys)
    expected = counted_by_part(config)
    assert found["parameters"] == {**expected, "total": sum(expected.values())} and found["block_size"] == 32


def test_days_match_nanogpts_notebook(capsys):
    # 8 A100 at 30 % MFU, 300B tokens: 3.46 days for 6 N D FLOPs, which exclude attention
    found = planned(ROOT / "recipes" / "gpt2.yaml", "gpus=8", "gpu=a100", "mfu=0.3", capsys=capsys)
    six_n_d = 6 * 124_337_664 * 300e9 / (312e12 * 8 * 0.3) / 86400
    assert f"{six_n_d:.2f}" == "3.46"
    per_token = 875_062_886_400 / 1024 / (6 * 124_337_664)  # PaLM's count relative to 6 N
    assert found["days"] == pytest.approx(six_n_d * per_token * found["tokens"] / 300e9, rel=1e-3)


def test_the_quickstart_trains_for_a_minute_on_the_slowest_machine_seen(capsys):
    # 2 cores with AVX2 needed 120 ms for 8.9e9 FLOPs of the first version of this recipe
    found = planned(ROOT / "recipes" / "quickstart.yaml", capsys=capsys)
    assert found["flops"] / (8.9e9 / 0.12) < 60


def test_a_checkpoint_on_disk_has_the_size_that_was_planned(capsys):
    Path("text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 300)
    words = [
        ROOT / "recipes" / "shakespeare_char_cpu.yaml",
        "corpus=text.txt",
        "max_iters=2",
        "eval_iters=1",
        "sample_tokens=0",
        "out_dir=run",
        "warmup_iters=0",
        "lr_decay_iters=2",
    ]
    assert main(["train", *map(str, words)]) == 0
    capsys.readouterr()
    found = planned(*words, capsys=capsys)
    on_disk = sum(file.stat().st_size for file in Path("run/checkpoint-000002").rglob("*.safetensors"))
    assert on_disk == pytest.approx(found["checkpoint_bytes"], rel=0.01)  # the estimate does not count names and shapes


def test_step_takes_as_long_as_computation_or_communication(capsys):
    words = ["batch_size=1", "gradient_accumulation_steps=1024"]
    near = planned(ROOT / "recipes" / "gpt2.yaml", *words, "gpus=8", capsys=capsys)
    far = planned(ROOT / "recipes" / "gpt2.yaml", *words, "gpus=1024", capsys=capsys)
    assert near["seconds_per_step"] == near["computing_seconds"] > near["exchange_seconds"]
    assert far["seconds_per_step"] == far["exchange_seconds"] > far["computing_seconds"]
    for found in (near, far):
        assert found["tokens_per_second_per_gpu"] * found["gpus"] * found["days"] * 86400 == pytest.approx(
            found["tokens"]
        )


# ---- the command


def test_plan_does_not_import_torch(ladder):
    script = (
        "import sys; from nanogpt_accel.__main__ import main; "
        f"assert main(['plan', {str(ROOT / 'recipes' / 'gpt2.yaml')!r}]) == 0; "
        f"assert main(['plan', 'python_depth', 'fit={ladder}']) == 0; "
        "assert not {'torch', 'transformers', 'accelerate', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_text_output_has_the_figures(capsys):
    words = ["plan", str(ROOT / "recipes" / "gpt2.yaml"), "gpus=8", "gpu=A100", "mfu=0.37"]
    assert main(words) == 0
    text = capsys.readouterr().out
    for part in (
        "124,373,760",
        "491,520 tokens",
        "294,912,000,000 tokens",
        "32.64 epochs",
        "1.49 GB",
        "8 x A100",
        "configs/multi_gpu.yaml",
        "; also fsdp2.yaml",
        "tokens/s per GPU",
        "tokens per parameter",
        "vocabulary size 50,304",
        "fits into 72.0 GiB (90% of the GPU's memory): ",
        "ZeRO-3",
        "as counted by nanoGPT",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("words", "config"),
    [
        (["gpus=1"], "single_gpu.yaml"),
        (["gpus=8"], "multi_gpu.yaml"),
        (["gpus=40"], "multi_node.yaml"),
        (["device=cpu"], "cpu.yaml"),
        (["gpus=8", "gpu_memory=8"], "fsdp2.yaml"),  # DDP needs 7.5 GiB, FSDP2 5.4 GiB, and 7.2 GiB are usable
        (["gpus=40", "gpu_memory=8"], "fsdp2_multi_node.yaml"),
        (["gpus=8", "gpu_memory=7.5", "algorithm=muon"], "fsdp2.yaml"),
    ],
)
def test_the_config_that_fits(words, config, capsys):
    assert planned(ROOT / "recipes" / "gpt2.yaml", *words, capsys=capsys)["config"] == config


def test_muon_is_not_planned_with_deepspeed_and_takes_less_than_a_twentieth_of_a_step(capsys):
    for gpus in (1, 8, 16, 64):
        words = (f"gpus={gpus}", "gradient_accumulation_steps=64")
        found = planned(ROOT / "recipes" / "gpt2_fast.yaml", *words, capsys=capsys)
        assert list(found["memory"]) == (["ddp", "fsdp2"] if gpus > 1 else ["ddp"])
        assert 0 < found["muon_seconds"] < 0.05 * found["seconds_per_step"]
    assert planned(ROOT / "recipes" / "gpt2.yaml", capsys=capsys)["muon_seconds"] == 0


@pytest.mark.parametrize(
    "words",
    [
        ["gpu_memory=6"],
        ["gpu_memory=4"],
        ["gpus=8", "gpu_memory=5"],
        ["n_layer=48", "n_head=25", "n_embd=1600", "gpu=a40"],
        ["gpus=8", "gpu_memory=2", "activation_checkpointing=true"],
    ],
)
def test_the_suggested_fix_fits(words, capsys):
    recipe = ROOT / "recipes" / "gpt2.yaml"
    found = planned(recipe, *words, capsys=capsys)
    assert found["config"] is None
    settings = [word for word in found["remedy"].split() if "=" in word]
    fixed = planned(recipe, *words, *settings, capsys=capsys)
    assert fixed["config"] is not None and fixed["tokens_per_step"] == found["tokens_per_step"]


def test_fix_if_no_setting_helps(capsys):
    found = planned(ROOT / "recipes" / "gpt2.yaml", "gpu_memory=1", capsys=capsys)
    assert found["config"] is None and found["remedy"].startswith("use more GPUs")


def test_logits_on_mps_have_the_limit_of_gpus(capsys):
    words = [ROOT / "recipes" / "gpt2.yaml", "batch_size=2", "mixed_precision=no"]  # 2**24 < logits < 2**27
    on_cpu, on_mps, on_gpu = (
        planned(*words, word, capsys=capsys)["memory"]["ddp"]["logits"]
        for word in ("device=cpu", "device=mps", "gpu=h100")
    )
    assert on_mps == on_gpu == 3 * 4 * 2 * 1024 * 50304 > on_cpu


def test_an_evaluation_needs_no_gradients(capsys):
    found = planned(ROOT / "recipes" / "eval_gpt2_xl.yaml", "gpu=l4", capsys=capsys)
    needed = found["memory"]["ddp"]
    assert needed["gradients"] == needed["optimizer"] == found["tokens"] == 0
    assert found["config"] == "single_gpu.yaml"


@pytest.mark.parametrize(
    ("words", "precision"),
    [
        (["gpu=a100"], "bf16"),
        (["gpu=t4"], "fp16"),
        (["device=cpu"], "no"),
        (["gpu=t4", "mixed_precision=bf16"], "bf16"),
    ],
)
def test_auto_precision_of_the_planned_gpu(words, precision, capsys):
    assert planned(ROOT / "recipes" / "gpt2.yaml", *words, capsys=capsys)["mixed_precision"] == precision


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["gpu=h1000"], ["gpu=h1000", "did you mean h100"]),
        (["gpus=7"], ["train.gradient_accumulation_steps=40: not divisible by gpus=7", "35 or 42"]),
        (["gpus=20"], ["gpus=20: not a multiple of gpus_per_node=8"]),
        (["mfu=40"], ["mfu=40"]),
        (["gpus=0"], ["gpus=0"]),
        (["init_from=someone/model"], ["init_from=someone/model", "n_layer"]),
        (["gpuz=8"], ["gpuz"]),
    ],
)
def test_wrong_options_get_one_line(words, parts, capsys):
    assert main(["plan", str(ROOT / "recipes" / "gpt2.yaml"), *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert [part for part in parts if part not in printed.err] == [], printed.err


def test_a_missing_target_gets_a_usage_hint(capsys):
    assert main(["plan"]) == 2
    assert "RECIPE is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "config"),
    [
        (["device=cpu"], "cpu.yaml"),
        (["device=cpu", "gpus=2"], "cpu_2proc.yaml"),
        (["device=cpu", "gpus=4"], "cpu_2proc.yaml --num_processes 4"),
        (["device=mps"], "mps.yaml"),
    ],
)
def test_config_for_a_launch_without_a_gpu(words, config, capsys, monkeypatch):
    assert main(["plan", str(ROOT / "recipes" / "gpt2.yaml"), *words]) == 0
    printed = capsys.readouterr().out
    assert f"launch with {ROOT}/configs/{config}\n" in printed
    monkeypatch.chdir(ROOT)
    assert main(["plan", "gpt2", *words]) == 0
    assert f"launch with configs/{config}\n" in capsys.readouterr().out
    assert (ROOT / "configs" / config.split()[0]).is_file()


@pytest.mark.parametrize("typed", ["rtx4090", "RTX 4090", "rtx_4090", "rtx-4090"])
def test_spellings_of_a_gpu(typed, capsys):
    assert planned(ROOT / "recipes" / "gpt2.yaml", f"gpu={typed}", capsys=capsys)["gpu"] == "RTX 4090"


def test_a_run_folder_has_a_recipe(capsys):
    Path("runs/mine").mkdir(parents=True)
    recipe = load_recipe(ROOT / "recipes" / "shakespeare_char_cpu.yaml", {"n_layer": 3, "out_dir": "runs/mine"})
    Path("runs/mine/run.yaml").write_text(recipe.to_yaml())
    assert load_recipe("runs/mine") == recipe
    one, other = (planned(target, capsys=capsys) for target in ("runs/mine", "runs/mine/run.yaml"))
    assert one["parameters"] == other["parameters"]


@pytest.mark.parametrize("command", ["plan", "prepare", "train"])
def test_a_launch_configuration_is_not_a_recipe(command, capsys):
    path = str(ROOT / "configs" / "fsdp2.yaml")
    assert main([command, path]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path}: this is a launch configuration" in line and f"accelerate launch --config_file {path}" in line


def test_memory_of_small_models_is_in_mib(capsys):
    words = [str(ROOT / "recipes" / "shakespeare_char_cpu.yaml")]
    needed = planned(*words, capsys=capsys)["memory"]["ddp"]
    assert main(["plan", *words]) == 0
    rows = capsys.readouterr().out.splitlines()
    at = next(i for i, row in enumerate(rows) if row.startswith("MiB"))
    figures = dict(zip(rows[at].split()[1:], map(float, rows[at + 1].split()[2:]), strict=True))
    assert figures == {key: pytest.approx(needed[key] / 2**20, abs=0.006) for key in figures} and figures["weights"] > 1


# ---- scaling laws

BY_COMPUTE = {"E": 1.5, "K": 2.0 * 1e11**0.2, "c": 0.2}


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Finished runs whose tokens per parameter differ."""
    return write_grid(tmp_path_factory.mktemp("plan") / "grid")


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """Finished runs with the same number of tokens per parameter, 2.6."""
    folder = tmp_path_factory.mktemp("plan") / "ladder"
    for depth in (2, 3, 4, 5, 6):
        write_finished_run(folder / f"depth={depth}", BY_COMPUTE, error=0.001 * (-1) ** depth, depth=depth)
    return folder


def point_of(figures):
    return {"n_params": figures["prediction"]["n_params"], "tokens": figures["tokens"], "flops": figures["flops"]}


def test_the_loss_is_predicted(grid, ladder, capsys):
    found = planned("python_depth", "depth=10", "max_iters=2000", f"fit={grid}", capsys=capsys)
    assert found["prediction"]["n_params"] == 10 * 12 * 80**2 + 576 * 80
    assert found["prediction"]["loss"] == pytest.approx(expected_loss(LAW, point_of(found)), rel=1e-3)
    assert found["prediction"]["warnings"] == []
    found = planned("python_depth", "depth=9", f"fit={ladder}", capsys=capsys)
    truth = expected_loss(BY_COMPUTE, point_of(found))
    assert found["prediction"]["low"] < truth < found["prediction"]["high"] < 1.03 * truth
    largest = planned("python_depth", "depth=6", capsys=capsys)["flops"]
    assert found["prediction"]["times_largest_compute"] == pytest.approx(found["flops"] / largest)
    assert main(["plan", "python_depth", "depth=9", f"fit={ladder}"]) == 0
    assert f"loss         {found['prediction']['loss']:.3f} nats per token; 90% interval" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["depth=16"], ["times the FLOPs of the largest finished run; above 10"]),
        (["depth=6", "tokens_per_parameter=20"], ["tokens per parameter differ by a factor of"]),
        (["depth=6", "activation=gelu"], ["model.activation=relu2 instead of gelu"]),
    ],
)
def test_a_prediction_far_from_the_runs_has_a_warning(words, parts, ladder, capsys):
    (warning, *_) = planned("python_depth", *words, f"fit={ladder}", capsys=capsys)["prediction"]["warnings"]
    assert [part for part in parts if part not in warning] == []


def test_the_losses_of_other_data_cannot_be_compared(ladder, capsys):
    for word, part in (
        ("corpus=text.txt", "data.corpus=text.txt, but the runs have python"),
        ("vocab_size=900", "900"),
    ):
        Path("text.txt").write_text("abc" * 9000)
        assert main(["plan", "python_depth", word, f"fit={ladder}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert part in line and "cannot be compared" in line
    assert main(["prepare", "python_depth", "corpus=text.txt", "data_dir=tokens", "tokenizer=char"]) == 0
    capsys.readouterr()
    assert main(["plan", "python_depth", "data_dir=tokens", f"fit={ladder}"]) == 2
    assert "the recipe and the runs have different validation data" in capsys.readouterr().err
    hashes = {
        name: split["sha256"] for name, split in json.loads(Path("tokens/manifest.json").read_text())["splits"].items()
    }
    for folder, data in (("same", hashes), ("other", hashes | {"train": "a" * 64})):
        for depth in (2, 3, 4, 5, 6):
            write_finished_run(f"{folder}/{depth}", BY_COMPUTE, depth=depth, data=data)
        found = planned("python_depth", "data_dir=tokens", "depth=4", f"fit={folder}", capsys=capsys)["prediction"]
        assert ("the recipe and the runs have different training data" in str(found["warnings"])) == (folder == "other")


def test_the_recipe_for_a_budget_has_the_depth_with_the_lowest_loss(grid, capsys):
    flops = 1e14
    found = planned("python_depth", f"fit={grid}", f"flops={flops:g}", "to=large.yaml", capsys=capsys)
    losses = {}
    for depth in range(2, 20):
        shape = load_recipe("python_depth", {"depth": depth}).shape | {"vocab_size": 576}
        n_params, tokens = scaling_params(shape), flops / flops_per_token(shape)
        losses[depth] = expected_loss(LAW, {"n_params": n_params, "tokens": tokens})
    assert min(losses.values()) == pytest.approx(found["prediction"]["loss"], rel=2e-3)
    written = load_recipe("large.yaml")
    assert written.model.n_layer == min(losses, key=losses.get) and written.train.max_iters == found["steps"]
    assert 0.99 * flops < found["flops"] <= flops
    assert written.expect.val_loss == pytest.approx(found["prediction"]["loss"], abs=1e-4)
    overrides = {
        "depth": written.model.n_layer,
        "tokens_per_parameter": found["tokens"] / found["prediction"]["n_params"],
    }
    scaled = load_recipe("python_depth", overrides)
    assert abs(scaled.train.max_iters - found["steps"]) <= 1
    ours, theirs = (recipe.replace(out_dir="", max_iters=0).flat() for recipe in (written, scaled))
    assert ours == theirs
    again = planned("large.yaml", f"fit={grid}", capsys=capsys)
    assert again["prediction"] == found["prediction"] and again["parameters"] == found["parameters"]


@pytest.mark.parametrize("words", [[], ["tokens_per_parameter=5"]])
def test_on_a_line_the_recipe_for_a_budget_keeps_the_tokens_per_parameter(words, ladder, capsys):
    found = planned("python_depth", f"fit={ladder}", "flops=1e14", *words, capsys=capsys)
    ratio = found["tokens"] / found["prediction"]["n_params"]
    assert ratio == pytest.approx(5 if words else 712_704 / 119_040, rel=0.2)  # depths are integers


def test_a_warm_up_on_the_command_line_is_compared_with_the_chosen_run(ladder, capsys):
    """At the first depths of the search, the runs are shorter than this warm-up."""
    plain, warm = (
        planned("python_depth", f"fit={ladder}/*", "flops=1e14", "schedule=cosine", *words, capsys=capsys)
        for words in ([], ["warmup_iters=300"])
    )
    assert warm["steps"] == plain["steps"] > 300


def test_the_cost_is_that_of_all_gpus(capsys):
    found = planned("gpt2", "gpus=8", "dollars_per_hour=2.5", capsys=capsys)
    assert found["dollars"] == pytest.approx(found["days"] * 24 * 8 * 2.5)
    assert planned("gpt2", capsys=capsys)["dollars"] is None


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["flops=1e15"], "flops=1e+15: needs a scaling law; set fit"),
        (["to=new.yaml"], "to=new.yaml: needs flops and fit"),
        (["fit=RUNS", "flops=1e15", "to=old.yaml"], "to=old.yaml: already exists"),
        (["fit=RUNS", "flops=1e15", "to=missing/new.yaml"], "to=missing/new.yaml: the folder missing does not exist"),
        (["fit=RUNS", "flops=1e15", "to=new.txt"], "to=new.txt: must end with .yaml"),
        (["fit=RUNS", "flops=1e15", "max_iters=5", "model.depth=3"], "remove max_iters, model.depth"),
        pytest.param(
            ["fit=RUNS", "flops=1e30"],
            "flops=1e+30: too many for the largest depth, 1000; set flops to a lower number",
            marks=pytest.mark.slow,  # tries 1,000 depths
        ),
        (["fit=RUNS", "flops=1e6", "to=new.yaml"], "flops=1e+06: too few for one step"),
        (["fit=missing"], "missing: no such folder"),
        (["fit=RUNS", "max_iters=0"], "fit: the recipe does not train"),
        (["fit=RUNS", "init_from=gpt2"], "fit: a scaling law only predicts runs from scratch"),
        (["dollars_per_hour=2"], "the duration of the run on device=cpu is unknown"),
    ],
)
def test_wrong_options_for_a_scaling_law_get_one_line(words, part, ladder, capsys):
    Path("old.yaml").touch()
    assert main(["plan", "python_depth", *(word.replace("RUNS", str(ladder)) for word in words)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and part in printed.err and len(printed.err.splitlines()) == 1, printed.err


# ---- the page


def scale_rows(capsys):
    """Compute the table of configs/SCALE.md from the commands below it."""
    page = (ROOT / "configs" / "SCALE.md").read_text(encoding="utf-8")
    for line in page.splitlines():
        if not line.startswith("nanogpt-accel plan "):
            continue
        _, _, recipe, *words = shlex.split(line)
        found = planned(ROOT / recipe, *words, capsys=capsys)
        layout = found["fitting"][0]
        speed = found["tokens_per_second_per_gpu"]
        cells = (
            plan.short(found["parameters"]["total"]),
            f"{found['gpus']:,}",
            found["config"],
            f"{found['batch_size']} x {found['block_size']:,}",
            f"{found['tokens_per_step']:,}",
            f"{found['memory'][layout]['total'] / plan.GIB:.1f}",
            f"{found['computing_seconds']:.3g}",
            f"{found['exchange_seconds']:.2g}",
            f"{speed:,.0f}",
            plan.short(speed * found["gpus"]),
            f"{found['days']:,.3g}",
            f"{found['checkpoint_bytes'] / 1e9:.3g} GB",
        )
        yield "| " + " | ".join(cells) + " |"


def test_the_table_of_the_page_matches_plan(capsys):
    page = (ROOT / "configs" / "SCALE.md").read_text(encoding="utf-8")
    rows = list(scale_rows(capsys))
    assert len(rows) == 9
    table = page.split("| --- |", 1)[1].split("\n\n")[0].splitlines()[1:]
    assert table == rows, "update the rows:\n" + "\n".join(rows)
