"""Reading a file never runs code from it: every unpickler refuses everything except plain values."""

import ast
from pathlib import Path

import nanogpt_accel


def test_nothing_is_unpickled():
    """Only two files name pickle: meta.py, to refuse everything but plain values, and nanogpt.py, for the name of the
    error that torch raises. nanogpt.py reads nanoGPT's ckpt.pt, and weight_files.py reads a model's .bin files, both
    with weights_only. numpy, in parts.py, refuses pickled arrays by default."""
    loaders = {"torch", "pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "np", "numpy"}
    uses = []
    for file in sorted(Path(nanogpt_accel.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = {alias.name.partition(".")[0] for alias in node.names}
                uses += [(file.name, f"import {name}") for name in names & (loaders - {"torch", "np", "numpy"})]
            elif isinstance(node, ast.ImportFrom):
                module = (node.module or "").partition(".")[0]
                if module in loaders - {"torch", "np", "numpy"}:
                    uses.append((file.name, f"from {module}"))
                if module in loaders:
                    uses += [
                        (file.name, f"from {module} import {alias.name}")
                        for alias in node.names
                        if alias.name in ("load", "loads")
                    ]
            elif isinstance(node, ast.Attribute):
                owner = node.value.id if isinstance(node.value, ast.Name) else None
                if (
                    owner in loaders
                    and node.attr in ("load", "loads")
                    or node.attr in ("Unpickler", "load_state", "fromfile_pickle", "__reduce__")
                ):
                    uses.append((file.name, f"{owner}.{node.attr}"))
            elif isinstance(node, ast.keyword):
                allows = node.arg == "allow_pickle" or (
                    node.arg == "weights_only" and not getattr(node.value, "value", False)
                )
                if allows:
                    uses.append((file.name, node.arg))
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert [ast.unparse(k.value) for k in node.keywords if k.arg == "weights_only"] == ["True"]
    assert sorted(uses) == [
        ("meta.py", "import pickle"),
        ("meta.py", "pickle.Unpickler"),
        ("nanogpt.py", "import pickle"),
        ("nanogpt.py", "torch.load"),
        ("parts.py", "np.load"),
        ("weight_files.py", "torch.load"),
    ]
