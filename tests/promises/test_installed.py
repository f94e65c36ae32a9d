"""The promise that the package works the same from a clone, from a wheel and from an editable install.

A wheel is a copy of the package with recipes/ and configs/ inside it. The slow tests build it and install it in a new
virtual environment, in which only the packages that it requires come from the environment of the tests.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from launching import TIMEOUT_S
from runs import losses
from shared import REPOSITORY

FOLDERS = ("nanogpt_accel", "recipes", "configs")
SMALL = (
    "n_layer=1 n_embd=32 n_head=2 n_inner=32 block_size=16 batch_size=2 max_iters=3 eval_interval=3 eval_iters=1 "
    "limit_documents=30 vocab_size=300 sample_tokens=8 log_interval=1"
).split()


def expected_files():
    """Return the paths in the wheel of every file that the package needs."""
    patterns = ("nanogpt_accel/**/*.py", "nanogpt_accel/**/*.html", "recipes/*.yaml", "recipes/*.json")
    patterns += ("configs/*.yaml", "configs/slurm/*")
    files = [path.relative_to(REPOSITORY) for pattern in patterns for path in REPOSITORY.glob(pattern)]
    return {str(path if path.parts[0] == "nanogpt_accel" else "nanogpt_accel" / path) for path in files}


def test_setup_cfg_names_every_file(monkeypatch, tmp_path):
    """A new folder of the package needs a line in setup.cfg; this asks setuptools what it would install."""
    distribution = pytest.importorskip("setuptools").Distribution({"script_name": "setup.py"})
    monkeypatch.chdir(REPOSITORY)
    distribution.parse_config_files(["setup.cfg"])
    command = distribution.get_command_obj("build_py")
    command.build_lib = str(tmp_path)
    command.ensure_finalized()
    files = {str(Path(path).relative_to(tmp_path)) for path in command.get_outputs(include_bytecode=False)}
    assert files == expected_files() and len(files) > 80


# ---- slow tests


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what the build reads, because setuptools writes into the folder."""
    folder = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    return folder


@pytest.fixture(scope="module")
def venv(tmp_path_factory):
    """Return run(program, *words, cwd) for programs of a new virtual environment."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=TIMEOUT_S)
    bin = folder / ("Scripts" if os.name == "nt" else "bin")
    # sys.path gets these folders, but their .pth files, which may install this clone, are not read
    paths = "\n".join(dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")))
    purelib = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    (Path(purelib) / "requirements.pth").write_text(paths)
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env |= {"PATH": os.pathsep.join([str(bin), env["PATH"]]), "OMP_NUM_THREADS": "1"}

    def run(program, *words, cwd, status=0):
        done = subprocess.run(
            [bin / program, *map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, timeout=TIMEOUT_S
        )
        assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout if status == 0 else done.stderr

    return run


def build(folder, kind):
    """Build a wheel, sdist or editable wheel of a folder without the network, as pip and `python -m build` do."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}('dist'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    return folder / "dist" / done.stdout.splitlines()[-1]


def installed_files(wheel):
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


@pytest.mark.slow
def test_quickstart_of_a_wheel_runs_in_an_empty_folder(source, venv, tmp_path):
    pytest.importorskip("setuptools")
    wheel = build(source, "wheel")
    assert installed_files(wheel) == expected_files()
    venv("python", "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    code = "import nanogpt_accel; print(nanogpt_accel.__file__)"
    assert "site-packages" in venv("python", "-c", code, cwd=tmp_path)

    assert "\nquickstart\n" in venv("nanogpt-accel", "recipes", cwd=tmp_path)
    assert "The run is in runs/quickstart" in venv("nanogpt-accel", "train", "quickstart", *SMALL, cwd=tmp_path)
    # the README's command: no clone, so no folder recipes/
    again = venv("nanogpt-accel", "train", "recipes/quickstart.yaml", *SMALL, "overwrite=true", cwd=tmp_path)
    assert "The run is in runs/quickstart" in again
    assert "perplexity" in venv("nanogpt-accel", "evaluate", "runs/quickstart", cwd=tmp_path)
    venv("nanogpt-accel", "recipes", "--copy", "quickstart", "--to", "mine.yaml", cwd=tmp_path)
    assert "The run is in runs/mine" in venv("nanogpt-accel", "train", "mine.yaml", *SMALL, cwd=tmp_path)
    config = venv("nanogpt-accel", "configs", "--path", "cpu", cwd=tmp_path).strip()
    words = ["-m", "accelerate.commands.launch", "--config_file", config, "-m", "nanogpt_accel.train", "quickstart"]
    launched = venv("python", *words, *SMALL, "out_dir=runs/launched", cwd=tmp_path)
    assert "The run is in runs/launched" in launched
    options = dict(word.split("=") for word in SMALL)
    code = f"from nanogpt_accel.train import train; train('quickstart', out_dir='runs/api', **{options})"
    assert "The run is in runs/api" in venv("python", "-c", code, cwd=tmp_path)
    message = venv("nanogpt-accel", "train", "quikstart", cwd=tmp_path, status=2)
    assert message == "error: quikstart: no such recipe or run folder (did you mean quickstart?)\n"
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "data", "mine.yaml"}
    first, *others = (losses(tmp_path / "runs" / name) for name in ("quickstart", "mine", "launched", "api"))
    assert len(first) == 3 and others == [first] * 3


@pytest.mark.slow
def test_sdist_builds_the_same_wheel(source, tmp_path):
    pytest.importorskip("setuptools")
    with tarfile.open(build(source, "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    assert installed_files(build(folder, "wheel")) == expected_files()


@pytest.mark.slow
def test_editable_install_uses_the_files_of_the_clone(source, venv, tmp_path):
    pytest.importorskip("setuptools")
    wheel = build(source, "editable")
    venv("python", "-m", "pip", "install", "--no-deps", "--no-index", "--force-reinstall", wheel, cwd=tmp_path)
    (source / "recipes" / "new.yaml").write_text((source / "recipes" / "quickstart.yaml").read_text())
    assert "\nnew\n" in venv("nanogpt-accel", "recipes", cwd=tmp_path)
    assert venv("nanogpt-accel", "configs", "--path", "fsdp2", cwd=tmp_path) == f"{source}/configs/fsdp2.yaml\n"
    assert "The run is in runs/new" in venv("nanogpt-accel", "train", "new", *SMALL, cwd=tmp_path)
