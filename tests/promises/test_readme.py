"""The promise that every command of the documentation works.

Every command in the *.md pages and in the headers of recipes and configs is parsed and checked by the command itself,
up to the start of its work. Every command of the pages is also run: here (RUN, slow), by another test (RUN_ELSEWHERE),
or NOT_RUN gives the reason. The placeholders of the pages (RECIPE, MODEL, runs/NAME, FOLDER, ...) are real files with
these names in the folder of the tests.
"""

import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launching import package_env, parse_launch, run_python, torchrun_variables
from runs import write_finished_run
from shared import FAST, REPOSITORY

from nanogpt_accel.__main__ import COMMANDS, import_command, main
from nanogpt_accel.commands.bench import BenchOptions
from nanogpt_accel.commands.sample import SampleOptions
from nanogpt_accel.models.find import find_model
from nanogpt_accel.recipe import FIELDS, SECTION_OF
from nanogpt_accel.utils.packaged import find_packaged

PAGES = [
    str(path.relative_to(REPOSITORY))
    for folder in ("", "recipes", "configs", "benchmarks", "tests", "nanogpt_accel/commands", "nanogpt_accel/data")
    for path in sorted((REPOSITORY / folder).glob("*.md"))
]
HEADERS = sorted(
    str(path.relative_to(REPOSITORY))
    for pattern in ("recipes/*.yaml", "configs/*.yaml", "configs/slurm/*")
    for path in REPOSITORY.glob(pattern)
)
COMMAND = re.compile(
    r"(\w+=\S+ )*(nanogpt-accel|accelerate (launch|config)|python -m nanogpt_accel|"
    r"python (benchmarks|tests)/|pytest|ruff|sbatch|pip install)"
)

# a model and a run so small that every command takes a second
CPU = "device=cpu"
TINY = (
    f"{CPU} n_layer=1 n_embd=32 n_head=2 block_size=16 batch_size=2 max_iters=2 warmup_iters=0 lr_decay_iters=2 "
    "eval_interval=1 eval_iters=1 sample_tokens=4 sample_prompt=RO"
)
ONE_MICRO_BATCH = "gradient_accumulation_steps=1"
TEXT = "corpus=text.txt tokenizer=char val_fraction=0.1"
# command that is run here -> (options that make it small, expected output). The last of two options wins
RUN = {
    "nanogpt-accel train recipes/quickstart.yaml": (
        f"{TINY} limit_documents=30 vocab_size=300",
        "The run is in runs/quickstart",
    ),
    "nanogpt-accel train recipes/shakespeare_char.yaml": (f"{TINY} {TEXT}", "The run is in runs/shakespeare_char"),
    "nanogpt-accel train recipes/shakespeare_char_cpu.yaml": (
        f"{TINY} {TEXT}",
        "The run is in runs/shakespeare_char_cpu",
    ),
    "nanogpt-accel sample runs/shakespeare_char_cpu --prompt ROMEO:": ("num_samples=1 max_new_tokens=4", "ROMEO:"),
    "nanogpt-accel train recipes/quickstart.yaml corpus=my_texts/ vocab_size=512 out_dir=runs/mine sample_prompt=The": (
        f"{TINY} vocab_size=300 sample_prompt=The",
        "The run is in runs/mine",
    ),
    "nanogpt-accel prepare recipes/shakespeare_char.yaml": ("corpus=text.txt", "train: "),
    "nanogpt-accel train recipes/shakespeare_char.yaml batch_size=32": (
        f"{TINY} {TEXT} batch_size=32 out_dir=runs/32",
        "batch: 32 sequences",
    ),
    "nanogpt-accel train runs/NAME": ("max_iters=3", "resuming runs/NAME"),
    "nanogpt-accel evaluate runs/NAME": (CPU, "perplexity"),
    "nanogpt-accel sample runs/NAME --start=ROMEO:": (f"{CPU} num_samples=1 max_new_tokens=4", "ROMEO:"),
    "nanogpt-accel import out/ckpt.pt --to FOLDER": ("to=imported tokenizer=MODEL", "7 steps"),
    "accelerate launch --config_file configs/cpu_2proc.yaml -m nanogpt_accel.train recipes/shakespeare_char_cpu.yaml "
    "gradient_accumulation_steps=2 batch_size=6 out_dir=runs/two": (f"{TINY} {TEXT}", "(2 processes "),
    "nanogpt-accel plan RECIPE gpus=8": ("", "configs/multi_gpu.yaml"),
    "nanogpt-accel plan RECIPE gpus=8 gpu=h100": ("", "H100"),
    "nanogpt-accel prepare RECIPE": (TEXT, "train: "),
    "nanogpt-accel data FOLDER": ("", "most common"),
    "nanogpt-accel data recipes/mixture.yaml": ("", "share 0.9, then 0.5"),
    "nanogpt-accel train RECIPE": (f"{TINY} {TEXT} {ONE_MICRO_BATCH}", "The run is in runs/RECIPE"),
    "nanogpt-accel sample MODEL": (f"{CPU} num_samples=1 max_new_tokens=4 start=ROMEO:", "ROMEO:"),
    "nanogpt-accel evaluate MODEL": (CPU, "perplexity"),
    "nanogpt-accel bench RECIPE": (f"{TINY} {ONE_MICRO_BATCH} steps=1 warmup=1", "tokens/s"),
    "nanogpt-accel report RUN [RUN ...]": ("out=both.html", "wrote both.html"),
    "nanogpt-accel sweep python_depth depth=3,4,5,6,7 seed=1,2 out_dir=runs/ladder jobs=2": (
        "limit_documents=30 vocab_size=300 max_iters=2 depth=1,2 seed=1 out_dir=runs/sizes",
        "wrote runs/sizes/results.csv",
    ),
    "nanogpt-accel report --fit runs/ladder": ("", "wrote runs/ladder/law.html and law.png"),
    "nanogpt-accel plan python_depth depth=9 fit=runs/ladder": ("", "90% interval of a run"),
    "nanogpt-accel plan python_depth flops=2e13 fit=runs/ladder --to large.yaml": ("", "wrote large.yaml"),
    "nanogpt-accel train quickstart": (
        f"{TINY} limit_documents=30 vocab_size=300 out_dir=runs/by_name",
        "The run is in runs/by_name",
    ),
    "nanogpt-accel recipes": ("", "\nquickstart\n"),
    "nanogpt-accel recipes --copy gpt2 --to mine.yaml": ("", "wrote mine.yaml"),
    "nanogpt-accel configs": ("", "\nfsdp2\n"),
    "nanogpt-accel doctor": ("", "torch"),
    "accelerate launch -m nanogpt_accel doctor": ("", "torch"),
    "nanogpt-accel export MODEL --to FOLDER": ("to=exported", "GPT2LMHeadModel"),
    "nanogpt-accel export runs/NAME --to my-gpt": ("", "GPT2LMHeadModel"),
    "nanogpt-accel export runs/NAME --to out-mine/ckpt.pt": ("", "nanoGPT checkpoint"),
    "nanogpt-accel import CKPT.pt --to FOLDER": ("to=imported2 tokenizer=MODEL", "7 steps"),
}
# start of a command -> the test that runs it, or one like it
RUN_ELSEWHERE = {
    "accelerate launch --config_file configs/multi_gpu.yaml": "promises/test_configs.py::test_config_launches_and_trains",  # noqa: E501
    "accelerate launch --config_file configs/fsdp2.yaml": "promises/test_configs.py::test_config_launches_and_trains",
    "accelerate launch --config_file $(nanogpt-accel configs --path fsdp2)": "promises/test_configs.py::test_config_launches_and_trains",  # noqa: E501
    "accelerate launch -m nanogpt_accel.train recipes/gpt2.yaml": "promises/test_configs.py::test_default_config_of_accelerate_is_used",  # noqa: E501
    "accelerate config": "promises/test_configs.py::test_default_config_of_accelerate_is_used",
    "sbatch configs/slurm/multi_node.sbatch": "promises/test_configs.py::test_slurm_job_of_two_machines_is_requeued_and_resumes",  # noqa: E501
    "sbatch --nodes=4 configs/slurm/multi_node.sbatch": "promises/test_configs.py::test_slurm_job_of_two_machines_is_requeued_and_resumes",  # noqa: E501
    "sbatch --array=1-6 configs/slurm/sweep.sbatch": "promises/test_configs.py::test_slurm_task_of_a_sweep_is_requeued_and_resumes_exactly",  # noqa: E501
    "nanogpt-accel sweep": "commands/test_sweep.py::test_each_point_is_a_normal_run",
    "sbatch configs/slurm/single_node.sbatch": "promises/test_configs.py::test_slurm_job_is_requeued_and_resumes_exactly",  # noqa: E501
    "CONFIG=configs/fsdp2.yaml sbatch configs/slurm/single_node.sbatch": "promises/test_configs.py::test_slurm_job_is_requeued_and_resumes_exactly",  # noqa: E501
    "sbatch configs/slurm/prepare.sbatch": "cluster/test_slurm.py::test_an_array_prepares_the_bytes_of_one_process",
    "sbatch --array=0-31 configs/slurm/prepare.sbatch": "cluster/test_slurm.py::test_an_array_prepares_the_bytes_of_one_process",  # noqa: E501
    "nanogpt-accel prepare RECIPE worker=0 workers=3": "data/test_parts.py::test_three_processes_of_which_one_is_killed_and_started_again",  # noqa: E501
    "nanogpt-accel plan recipes": "commands/test_plan.py::test_the_table_of_the_page_matches_plan",  # noqa: E501
    "nanogpt-accel bench RECIPE --coordinate-check": "commands/test_bench.py::test_changes_of_activations_do_not_depend_on_the_width_with_mup",  # noqa: E501
    "nanogpt-accel train RECIPE algorithm=torch.optim.Adafactor": "checkpoint/test_resume.py::test_the_state_of_an_optimizer_by_name_is_restored_exactly",  # noqa: E501
    "nanogpt-accel COMMAND --help": "utils/test_cli.py::test_help_shows_every_key",
    "nanogpt-accel train --help": "utils/test_cli.py::test_help_shows_every_key",
    "nanogpt-accel export runs/NAME --to my-gpt.gguf": "models/test_gguf.py::test_dtypes_round_the_matrices_and_nothing_else",  # noqa: E501
    "nanogpt-accel push": "hub/test_hub.py::test_push_writes_a_stock_model_and_its_card",
    "nanogpt-accel train recipes/gpt2.yaml push_to_hub=true": "hub/test_hub.py::test_every_checkpoint_is_a_commit_in_its_order",  # noqa: E501
    "nanogpt-accel sample gpt2-xl": "hub/test_hub.py::test_sample_accepts_a_hub_id",
    "nanogpt-accel train recipes/finetune_shakespeare.yaml": "hub/test_hub.py::test_init_from_accepts_a_hub_id",  # noqa: E501
    "python tests/support/torture.py": "promises/test_safety.py::test_run_survives_random_kills",
    "python tests/support/contract.py": "promises/test_contract.py::test_script_prints_a_table",
    "python -m nanogpt_accel.recipe": "test_recipe.py::test_schema_file_is_up_to_date",
}
# start of a command -> why no test runs it
NOT_RUN = {
    "pip install": "needs the network and gigabytes; `-e .` was tried by hand in an empty environment",  # noqa: E501
    "pytest": "these are the tests",
    "ruff": "run by .ci/run",
    "python benchmarks": "a measurement by hand, whose result is in the page",
    "nanogpt-accel train recipes/shakespeare_char_cpu.yaml max_iters=250": "a measurement by hand, as is the next one",  # noqa: E501
    "nanogpt-accel evaluate runs/NAME/checkpoint-002000": "of a run of 2,000 steps",
    "nanogpt-accel train recipes/gpt2.yaml n_layer=6": "OpenWebText needs the network",
    "nanogpt-accel train recipes/python_depth.yaml depth=7": "takes minutes; test_scaling.py checks its settings",
    "nanogpt-accel train RECIPE n_embd=1024": "OpenWebText needs the network; test_optim.py checks mup_base_width",
    "nanogpt-accel train recipes/eval_gpt2.yaml": "OpenAI's weights and OpenWebText need the network",  # noqa: E501
}


def commands(text, is_page=True):
    """Return the shell commands of a page (sh blocks and inline code) or of the header of a file, as lists of words."""
    if is_page:
        blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        lines += [
            " ".join(code.split()) for code in re.findall(r"`([^`]+)`", rest) if COMMAND.match(" ".join(code.split()))
        ]
    else:
        head = re.match(r"(#.*\n)*", text)[0]
        lines = [
            line
            for line in re.sub(r"^# ?", "", head, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
            if COMMAND.match(line.strip())
        ]
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        while "&&" in words:
            found.append(words[: words.index("&&")])
            words = words[words.index("&&") + 1 :]
        found.append(words)
    return [words for words in found if words]


def commands_of(page):
    return commands((REPOSITORY / page).read_text(encoding="utf-8"), page.endswith(".md"))


def is_only_a_name(words):
    """Return whether the words only name a command, like `nanogpt-accel train` and `accelerate launch`."""
    *program, name = words
    return " ".join(words) in ("accelerate launch", "accelerate launch -m nanogpt_accel.train") or (
        program in (["nanogpt-accel"], ["python", "-m"])
        and name.removeprefix("nanogpt_accel.") in COMMANDS.keys() - {"doctor", "recipes", "configs"}
    )  # which take no target


# ---- the folder with the placeholders


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with what the commands need: links to recipes/ and so on, a small run, a checkpoint of nanoGPT."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("recipes", "configs", "benchmarks", "tests"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "text.txt").write_text("ROMEO: The quick brown fox jumps over a lazy dog.\n" * 60)
    (folder / "my_texts").mkdir()
    for i in range(30):
        (folder / "my_texts" / f"{i}.txt").write_text(f"The text number {i} of them all.\n" * 30)
    (folder / "RECIPE").write_text((REPOSITORY / "recipes" / "gpt2.yaml").read_text())
    (folder / "FILE").write_text("a line\n")
    (folder / "out").mkdir()
    weights = nanogpt_weights(n_embd=32, block_size=16, vocab_size=len(set((folder / "text.txt").read_text())))
    for file in ("out/ckpt.pt", "CKPT.pt"):
        torch.save(weights, folder / file)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert (
            main(
                [
                    "train",
                    "RECIPE",
                    *TINY.split(),
                    *TEXT.split(),
                    ONE_MICRO_BATCH,
                    "data_dir=FOLDER",
                    "out_dir=runs/NAME",
                ]
            )
            == 0
        )
    for depth in (2, 3, 4, 5, 6):
        law = {"E": 1.5, "K": 2.0 * 1e11**0.2, "c": 0.2}
        write_finished_run(folder / f"runs/ladder/done{depth}", law, error=0.001 * (-1) ** depth, depth=depth)
    for name in ("MODEL", "RUN"):
        (folder / name).symlink_to(folder / "runs" / "NAME")
    return folder


def nanogpt_weights(n_embd, block_size, vocab_size):
    """Return a ckpt.pt of nanoGPT's train.py with one block and no biases."""
    block = {
        "ln_1": [n_embd],
        "attn.c_attn": [3 * n_embd, n_embd],
        "attn.c_proj": [n_embd, n_embd],
        "ln_2": [n_embd],
        "mlp.c_fc": [4 * n_embd, n_embd],
        "mlp.c_proj": [n_embd, 4 * n_embd],
    }
    shapes = {
        "wte": [vocab_size, n_embd],
        "wpe": [block_size, n_embd],
        "ln_f": [n_embd],
        **{f"h.0.{name}": shape for name, shape in block.items()},
    }
    weights = {f"transformer.{name}.weight": torch.full(shape, 0.1) for name, shape in shapes.items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return {
        "model": weights,
        "iter_num": 7,
        "best_val_loss": torch.tensor(3.0),
        "config": {"dataset": "text"},
        "model_args": {
            "n_layer": 1,
            "n_head": 2,
            "n_embd": n_embd,
            "block_size": block_size,
            "bias": False,
            "vocab_size": vocab_size,
            "dropout": 0.0,
        },
    }


# ---- parsed


class Reached(Exception):
    """Raised instead of the work of a command, to show that the checks of the command found no mistake."""


@pytest.fixture
def check(workplace, monkeypatch):
    """Return a function check(words) that raises a ValueError or OSError if the words are not a valid command."""
    monkeypatch.chdir(workplace)

    def reached(*args, **kwargs):
        raise Reached

    for target in (
        "train.run_training",
        "commands.bench.bench",
        "commands.bench.check_coordinates",
        "commands.evaluate.evaluate",
        "commands.evaluate.evaluate_tasks",
        "commands.recipes.copy",
        "commands.report.page",
        "commands.report.read_ladder",
        "commands.plan.read_ladder",
        "commands.doctor.examine",
        "commands.prepare.ready",
        "commands.sweep.prepare",
        "commands.prepare.prepare_parts",
        "commands.sample.load_model",
        "commands.export.export",
        "commands.export.export_gguf",
        "commands.export.export_nanogpt",
        "commands.push.export",
        "commands.push.create",
        "commands.import_nanogpt.read_nanogpt",
    ):
        monkeypatch.setattr(f"nanogpt_accel.{target}", reached)

    def find(target, warn=print, bars=True):  # MODEL replaces models of the Hub
        return find_model(target if Path(target).is_dir() else "MODEL", warn)

    for command in ("bench", "evaluate", "export", "plan", "push", "sample"):
        monkeypatch.setattr(f"nanogpt_accel.commands.{command}.find_model", find, raising=False)
    monkeypatch.setattr("nanogpt_accel.commands.export.find_spec", lambda name: name)  # gguf may be missing
    if find_spec("pytorch_optimizer") is None:
        monkeypatch.setitem(sys.modules, "pytorch_optimizer", SimpleNamespace(Lion=torch.optim.NAdam))
    for user in ("training", "commands.push"):  # it needs a token
        monkeypatch.setattr(f"nanogpt_accel.{user}.check_push", lambda name, key: [])

    def config_path(match):
        return str(find_packaged("configs", match[1]))

    def check_own(command, words):
        if command not in COMMANDS:
            raise ValueError(f"unknown command {command}")
        words = [re.sub(r"^runs/(?!ladder)\w+", "runs/NAME", word) for word in words if word not in ("[RUN", "...]")]
        if "--to" in words:
            to = Path(words[words.index("--to") + 1])
            words.append(f"to=new{to.suffix}")  # FOLDER is the existing folder of tokens
        try:
            import_command(command).main(words)
        except Reached:
            pass

    def check_launched(words):
        try:
            args = parse_launch(words)
        except SystemExit:
            raise ValueError(f"accelerate launch refuses {' '.join(words)}") from None
        with monkeypatch.context() as patch:
            for name, value in torchrun_variables(0, args.num_processes or 1).items():
                patch.setenv(name, value)
            if args.training_script == "nanogpt_accel":
                check_own(args.training_script_args[0], args.training_script_args[1:])
            else:
                check_own(args.training_script.removeprefix("nanogpt_accel."), args.training_script_args)

    def check_batch_job(config, words):
        """Check what the script launches under SLURM."""
        script = next(word for word in words if not word.startswith("--"))
        text = Path(script).read_text()
        if "nanogpt_accel prepare" in text:
            check_own("prepare", words[words.index(script) + 1 :])
            return
        asked = dict(re.findall(r"--([\w-]+)=(\d+)", text) + re.findall(r"--([\w-]+)=(\d+)", " ".join(words)))
        nodes, is_sweep = int(asked["nodes"]), script.endswith("sweep.sbatch")
        check_launched(
            [
                "--config_file",
                config or re.search(r"CONFIG:-(\S+)}", text)[1],
                "--num_machines",
                str(nodes),
                "--num_processes",
                str(nodes * int(asked["gpus-per-node"])),
                "-m",
                *(["nanogpt_accel", "sweep", "index=1"] if is_sweep else ["nanogpt_accel.train"]),
                *words[words.index(script) + 1 :],
            ]
        )

    def check(words):
        if is_only_a_name(words):
            return
        config = None
        words = [re.sub(r"\$\(nanogpt-accel configs --path (\w+)\)", config_path, word) for word in words]
        if words[0].startswith("CONFIG="):
            config, words = words[0].removeprefix("CONFIG="), words[1:]
        match words:
            case ["nanogpt-accel", "COMMAND", "--help"]:
                for command in COMMANDS:
                    check_own(command, ["--help"])
            case ["nanogpt-accel", command, *rest]:
                check_own(command, rest)
            case ["python", "-m", "nanogpt_accel.recipe"] | [
                "python",
                "-m",
                "nanogpt_accel.recipe",
                ">",
                _,
            ]:  # the schema
                pass
            case ["python", "-m", module, *rest]:
                check_own(module.removeprefix("nanogpt_accel."), rest)
            case ["accelerate", "launch", *rest]:
                check_launched(rest)
            case ["accelerate", "config"]:
                pass
            case ["sbatch", *rest]:
                check_batch_job(config, rest)
            case ["python", script, *_]:
                Path(script).stat()
            case ["pytest", *rest]:
                if "-m" in rest and not re.search(rf"^    {rest[rest.index('-m') + 1]}: ", setup_cfg(), re.MULTILINE):
                    raise ValueError(f"no marker of {rest}")
                for file in rest:
                    if "/" in file:
                        Path(file).stat()
            case ["ruff", "check", "."] | ["ruff", "format", "--check", "."]:
                pass
            case ["pip", "install", *rest]:
                for extra in re.findall(r"\[(\w+)\]", rest[-1]):
                    if not re.search(rf"^{extra} *=", setup_cfg(), re.MULTILINE):
                        raise ValueError(f"no extra {extra}")
            case _:
                raise ValueError(f"no test knows what to do with {' '.join(words)}")

    return check


def setup_cfg():
    return (REPOSITORY / "setup.cfg").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_are_valid(check, page):
    found = commands_of(page)
    assert len(found) > (1 if page.startswith("nanogpt_accel/") else 5)
    for words in found:
        check(words)


def test_commands_in_headers_of_recipes_and_configs_are_valid(check):
    for file in HEADERS:
        found = commands_of(file)
        assert found or file.endswith(("recipe.schema.json", "on_each_node.sh", "requeue.py")), file
        for words in found:
            check(words)
        if file.startswith("recipes"):
            assert any(file in words for words in found), f"{file} does not open with its command"


@pytest.mark.parametrize(
    ("page", "old", "new", "says"),
    [
        (
            "README.md",
            "shakespeare_char.yaml batch_size=32",
            "shakespeare_char.yaml batchsize=32",
            "unknown key batchsize",
        ),
        ("README.md", "batch_size=32", "batch_size=many", "train.batch_size=many"),
        ("README.md", '--start="ROMEO:"', '--begin="ROMEO:"', "unknown key begin"),
        ("README.md", "train recipes/quickstart.yaml\n", "train recipes/quikstart.yaml\n", "no such recipe"),
        ("README.md", "nanogpt-accel bench RECIPE", "nanogpt-accel benchmark RECIPE", "unknown command benchmark"),
        (
            "README.md",
            "nanogpt-accel import out/ckpt.pt",
            "nanogpt-accel import out/ckpt.bin",
            "ckpt.bin: no such file",
        ),
        ("README.md", "export MODEL --to FOLDER", "export MODEL --too FOLDER", "unknown key too"),
        ("README.md", "--config_file configs/fsdp2.yaml", "--config_file configs/fsdp.yaml", "fsdp.yaml"),
        (
            "README.md",
            "accelerate launch -m nanogpt_accel doctor",
            "accelerate launch -m nanogpt_accel doktor",
            "doktor",
        ),
        ("README.md", "gradient_accumulation_steps=2 batch_size=6", "gradient_accumulation_steps=3", "by 2 processes"),
        (
            "configs/README.md",
            "recipes/gpt2.yaml gradient_accumulation_steps=48",
            "recipes/gpt2.yaml",
            "by 16 processes",
        ),
        ("configs/README.md", "configs/slurm/multi_node.sbatch", "configs/slurm/many.sbatch", "many.sbatch"),
        (
            "nanogpt_accel/commands/README.md",
            "`python -m nanogpt_accel.train`",
            "`python -m nanogpt_accel.trian`",
            "unknown command trian",
        ),
        ("nanogpt_accel/commands/README.md", "configs --path fsdp2)", "configs --path fsdp)", "fsdp: no such file"),
        ("tests/README.md", "python tests/support/torture.py", "python tests/tortur.py", "tortur.py"),
        (
            "nanogpt_accel/commands/README.md",
            "pytest -m slow tests/models/test_clients.py",
            "pytest -m slow tests/models/test_client.py",
            "test_client.py",
        ),
        ("configs/README.md", "`pytest -m slow`", "`pytest -m slower`", "no marker"),
        ("CONTRIBUTING.md", "ruff check .", "ruff chek .", "no test knows"),
        ("CONTRIBUTING.md", '".[test]"', '".[tests]"', "no extra tests"),
        ("configs/README.md", "--num_processes 4", "--number_of_processes 4", "accelerate launch refuses"),
        ("configs/SCALE.md", "plan recipes/gpt2.yaml gpus=8\n", "plan recipes/gpt2.yaml gpu=8\n", "gpu=8"),
        ("recipes/wikitext2.yaml", "split=test", "splt=test", "unknown key splt"),
        ("configs/multi_node.yaml", "--machine_rank 0", "--machine 0", "accelerate launch refuses"),
    ],
)
def test_check_finds_a_wrong_command(check, page, old, new, says):
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    assert old in text
    known = commands_of(page)
    wrong = [words for words in commands(text.replace(old, new), page.endswith(".md")) if words not in known]
    assert wrong
    for words in wrong:
        with pytest.raises((ValueError, OSError), match=re.escape(says)):
            check(words)


@pytest.mark.parametrize(("page", "n_options"), [("README.md", 8), ("nanogpt_accel/commands/README.md", 20)])
def test_options_in_the_table_of_commands_exist(check, page, n_options):
    """In the row of a command, `key=value`, `--key value` and a key alone are options of that command."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    rows = re.search(r"^\| command \|.*\n\|.*\n((\|.*\n)+)", text, re.MULTILINE)[1].splitlines()
    assert {row.split()[2].strip("`") for row in rows} == COMMANDS.keys()
    seen = 0
    for row in rows:
        _, command, does, _ = re.split(r"(?<!\\)\|", row)
        (code,) = re.findall(r"`([^`]+)`", command)
        for option in re.findall(r"`([^`]+)`", does):
            if not COMMAND.match(option) and not option.endswith(("=", "=...")) and option != "configs/":
                values = {"prompts": "FILE", "text": "FILE"}
                word = option if re.match(r"--|\w+=", option) else f"{option}={values.get(option, 1)}"
                try:
                    check([*shlex.split(code), *shlex.split(word)])
                except ValueError as error:  # the value 1 may be refused, the key not
                    assert word != option and "unknown" not in str(error), f"{code}: {option}: {error}"
                seen += 1
    assert seen > n_options


@pytest.mark.parametrize("page", PAGES)
def test_keys_in_a_page_exist(page):
    """Inline code of the form key=value has a key of recipes or of some command."""
    options = [import_command(command) for command in COMMANDS]
    known = {
        field.alias or key
        for module in options
        for name, section in vars(module).items()
        if name.endswith("Options")
        for key, field in section.model_fields.items()
    }
    known |= {*FIELDS, "start", "key"}  # (the grammar itself is key=value)
    text = re.sub(r"^```.*?^```", "", (REPOSITORY / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    ours = re.sub(r"^\| `.*?` \|", "|", text, flags=re.MULTILINE)  # the first column may have nanoGPT's keys
    named = [
        key
        for code in re.findall(r"`([^`]+)`", ours)
        if not COMMAND.match(" ".join(code.split()))
        for key in re.findall(r"^(?:--)?([a-z]\w*)=", code)
    ]
    assert [key for key in named if key not in known] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_exist(page):
    """Every link leads to an existing local file, and to an existing heading if it has an anchor."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        file, _, anchor = link.partition("#")
        linked = (REPOSITORY / page).parent / file
        assert linked.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], link


# ---- running the commands


def group_of(command):
    """Return the entries of the three tables above for a command: the same command, or the longest start of it."""
    found = [command] if command in RUN else []
    starts = [key for key in (*RUN_ELSEWHERE, *NOT_RUN) if f"{command} ".startswith((f"{key} ", f"{key}/"))]
    return found + ([max(starts, key=len)] if starts and not found else [])


def test_every_command_is_run_or_has_a_reason():
    shown = [" ".join(words) for page in PAGES for words in commands_of(page) if not is_only_a_name(words)]
    assert [command for command in shown if not group_of(command)] == [], "not run by any test, see the tables above"
    used = {key for command in shown for key in group_of(command)}
    assert {*RUN, *RUN_ELSEWHERE, *NOT_RUN} - used == set(), "no page has it any more"
    assert group_of("nanogpt-accel train recipes/new.yaml") == group_of("nanogpt-accel plan RECIPE gpus=9") == []


@pytest.mark.parametrize("test", sorted(set(RUN_ELSEWHERE.values())))
def test_tests_named_in_run_elsewhere_exist(test):
    file, _, name = test.partition("::")
    assert f"\ndef {name}(" in (REPOSITORY / "tests" / file).read_text()


def test_files_of_the_marker_fast_exist():
    assert [pattern for pattern in FAST if not list((REPOSITORY / "tests").glob(pattern))] == []


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN)
def test_command_runs(workplace, tmp_path, command):
    """Run the command with additional options that make its work small."""
    words, (smaller, says) = shlex.split(command.replace("[RUN ...]", "RUN")), RUN[command]
    words = [re.sub(r"^runs/(?!ladder)\w+", "runs/NAME", word) for word in words]
    if words[0] == "nanogpt-accel":
        words[:1] = ["-m", "nanogpt_accel"]
    else:  # accelerate launch, with any free port
        words[:2] = ["-m", "accelerate.commands.launch", "--main_process_port=0"]
    done = run_python(*words, *smaller.split(), env=package_env(HF_HOME=str(tmp_path)), cwd=workplace)
    assert says in done.stdout, done.stdout


# ---- nanoGPT's settings

# the globals of its scripts, which include those of config/*.py
NANOGPT = {
    "train.py": "out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from wandb_log "
    "wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size block_size n_layer n_head "
    "n_embd dropout bias learning_rate max_iters weight_decay beta1 beta2 grad_clip decay_lr warmup_iters "
    "lr_decay_iters min_lr backend device dtype compile",
    "sample.py": "init_from out_dir start num_samples max_new_tokens temperature top_k seed device dtype compile",  # noqa: E501
    "bench.py": "batch_size block_size bias real_data seed device dtype compile profile",
}
OURS = {
    "train.py": {f"{section}.{key}" if section else key for key, section in SECTION_OF.items()},
    "sample.py": set(SampleOptions.model_fields),
    "bench.py": {*BenchOptions.model_fields, *(f"{s}.{key}" if s else key for key, s in SECTION_OF.items())},
}


@pytest.mark.parametrize("script", NANOGPT)
def test_table_of_nanogpts_settings_is_complete(script):
    page = (REPOSITORY / "recipes" / "README.md").read_text(encoding="utf-8")
    table = page.split(f"\n### {script}\n\n")[1].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table]
    assert [theirs for theirs, _, _ in rows] == [f"`{name}`" for name in NANOGPT[script].split()]
    for theirs, ours, differs in rows:
        keys = re.findall(r"`([^`]+)`", ours)
        assert set(keys) <= OURS[script], theirs
        # a setting with another name, or none, has an explanation
        assert differs or [key.rpartition(".")[2] for key in keys] == [theirs.strip("`")], theirs
