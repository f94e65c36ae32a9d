"""files.py: hashes, atomic writes, and messages about permissions."""

import hashlib
import os
import shlex
import tracemalloc

import pytest
from permissions import modes_apply

from nanogpt_accel.utils.files import atomic_path, permission_denied, sha256, write_atomically


@pytest.mark.parametrize("name", ["plain", "with space", "it's", "$HOME", "a;b"])
@pytest.mark.parametrize("mode", [0o000, 0o400, None])
def test_hint_about_permissions_can_be_pasted(tmp_path, name, mode):
    """The file cannot be read, or cannot be written, or is in a folder that cannot be opened."""
    folder = tmp_path / name
    folder.mkdir()
    file = folder / "a file"
    file.touch()
    (folder if mode is None else file).chmod(mode or 0)
    with modes_apply():
        words = shlex.split(permission_denied(file).partition("can run ")[2])
    folder.chmod(0o700)
    permission = {0o000: "a+r", 0o400: "u+w", None: "a+rx"}[mode]
    assert words == ["chmod", permission, str(folder if mode is None else file)]


@pytest.mark.skipif(os.name == "nt", reason="links require a privilege")
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_atomic_write_replaces_links_and_does_not_follow_them(tmp_path, link):
    victim, file = tmp_path / "victim", tmp_path / "file"
    temporary = tmp_path / f"file.tmp-{os.getpid()}"
    for path in (file, temporary):
        victim.write_text("important")
        link(victim, path)
        write_atomically(file, "new")
        assert victim.read_text() == "important" and file.read_text() == "new" and not file.is_symlink()
        os.symlink(tmp_path / "gone", temporary)
        with atomic_path(file) as opened:
            assert opened == temporary and opened.read_bytes() == b""
            opened.write_text("newer")
        assert file.read_text() == "newer" and sorted(os.listdir(tmp_path)) == ["file", "victim"]
        file.unlink()


def test_hashing_needs_a_small_buffer(tmp_path):
    """A new buffer of 4 MiB per file made the heap grow by 41 MB."""
    content = os.urandom(2**20) * 9
    (tmp_path / "x").write_bytes(content)
    tracemalloc.start()
    digests = [sha256(tmp_path / "x"), sha256(tmp_path / "x", 5, 2**20), sha256(tmp_path / "x", len(content))]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    parts = content, content[5 : 5 + 2**20], b""
    assert digests == [hashlib.sha256(part).hexdigest() for part in parts] and peak < 2**18
