"""files.py: messages about permissions."""

import shlex

import pytest
from permissions import modes_apply

from nanogpt_accel.utils.files import permission_denied


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
