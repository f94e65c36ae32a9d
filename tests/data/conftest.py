"""Folders of text that several test files use."""

import pytest


@pytest.fixture
def notes(tmp_path):
    """A folder of twelve documents of different lengths."""
    folder = tmp_path / "notes"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i:02}.txt").write_text(f"note {i}: " + "so it goes. " * i)
    return folder


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "my notes"
    (root / "b").mkdir(parents=True)
    (root / ".git").mkdir()
    files = {
        "b/2.md": "two",
        "b/1.txt": "one\r\n",
        "a.py": "\ufeffpass\n",
        "z.TXT": "ж€𝄞",
        "empty.txt": "",
        ".hidden.txt": "no",
        ".git/x.txt": "no",
        "picture.png": "no",
    }
    for name, text in files.items():
        (root / name).write_bytes(text.encode())
    return root
