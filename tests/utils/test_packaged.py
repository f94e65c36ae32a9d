"""packaged.py: the files of recipes/ and configs/, in a clone and in a wheel."""

import shutil
from pathlib import Path

import pytest
from shared import REPOSITORY

from nanogpt_accel.utils import packaged as module
from nanogpt_accel.utils.packaged import find_packaged, list_packaged, packaged, summary


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Move the module into a folder with the layout of a wheel, with one recipe."""
    package = tmp_path / "site-packages" / "nanogpt_accel"
    (package / "utils").mkdir(parents=True)
    (package / "recipes").mkdir()
    shutil.copy(REPOSITORY / "recipes" / "gpt2.yaml", package / "recipes")
    (package.parent / "recipes").mkdir()  # of another package
    (package.parent / "recipes" / "soup.yaml").touch()
    monkeypatch.setattr(module, "__file__", str(package / "utils" / "packaged.py"))
    return package


def test_in_a_clone_the_folders_are_next_to_the_package(monkeypatch, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    assert packaged("configs/cpu.yaml") == Path("configs/cpu.yaml")
    assert [path.stem for path in list_packaged("configs")] == sorted(p.stem for p in Path("configs").glob("*.yaml"))
    monkeypatch.chdir(tmp_path)
    assert packaged("configs/cpu.yaml") == REPOSITORY / "configs" / "cpu.yaml"


def test_in_a_wheel_the_folders_are_inside_the_package(wheel, monkeypatch):
    assert list_packaged("recipes") == [wheel / "recipes" / "gpt2.yaml"]
    assert find_packaged("recipes", "gpt2") == wheel / "recipes" / "gpt2.yaml"
    monkeypatch.chdir(wheel.parents[1])  # as in a project with a .venv
    assert packaged("recipes/gpt2.yaml") == Path("site-packages/nanogpt_accel/recipes/gpt2.yaml")


def test_deleted_current_folder_does_not_matter(monkeypatch, tmp_path):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert packaged("recipes/gpt2.yaml").is_file()


def test_unknown_name_gets_the_nearest_one(refused):
    assert find_packaged("configs", "fsdp2.yaml").samefile(REPOSITORY / "configs" / "fsdp2.yaml")
    with refused(ValueError, "fsdp: no such file in the configs", "(did you mean fsdp2?)"):
        find_packaged("configs", "fsdp")
    with refused(ValueError, "quikstart.yaml: no such file in the recipes", "(did you mean quickstart?)"):
        find_packaged("recipes", "quikstart.yaml")
    with refused(ValueError, "../setup: no such file in the configs", "`nanogpt-accel configs` lists them"):
        find_packaged("configs", "../setup")


@pytest.mark.parametrize("path", [path for folder in ("recipes", "configs") for path in list_packaged(folder)], ids=str)
def test_every_file_opens_with_a_summary(path):
    text = summary(path)
    assert 20 < len(text) < 300 and text.endswith((".", "`.")) and "yaml-language-server" not in text
    assert " ".join(text.split()[:3]) in path.read_text(encoding="utf-8")
