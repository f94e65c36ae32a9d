"""doctor: its findings against other sources, problems and their fixes, the exit status."""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import nanogpt_accel
from nanogpt_accel.__main__ import main
from nanogpt_accel.commands import doctor

SECRET = "hf_thisIsVerySecret0123456789abcdef"


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "ACCELERATE_USE_CPU", "MASTER_PORT", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def examine(capsys):
    """Return a function examine(*words, status) that runs `doctor --json`, which must print nothing else, and returns
    {what: [findings]}."""

    def examine(*words, status=0):
        capsys.readouterr()
        if status:
            with pytest.raises(SystemExit) as exit:
                main(["doctor", "--json", *words])
            assert exit.value.code == status
        else:
            assert main(["doctor", "--json", *words]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["ok"] == (status == 0)
        by_name = {}
        for finding in found["findings"]:
            assert set(finding) == {"what", "found", "state", "fix"} and finding["state"] in ("ok", "warning", "broken")
            by_name.setdefault(finding["what"], []).append(finding)
        return by_name

    return examine


def only(findings):
    (finding,) = findings
    return finding


def test_findings_match_other_sources(examine, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = examine()
    assert only(found["python"])["found"].startswith(platform.python_version())
    for name in ("torch", "accelerate", "transformers", "tiktoken", "datasets"):
        assert only(found[name])["found"] == metadata.version(name)
    assert f"{os.cpu_count()} cores" in only(found["processor"])["found"]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    assert f"{memory:.1f} GiB of memory" in only(found["processor"])["found"]
    assert only(found["trains on"])["found"].startswith("cuda" if torch.cuda.is_available() else "cpu")
    assert sum(name.startswith("cuda:") for name in found) == torch.cuda.device_count()
    disk = only(found["disk"])["found"]
    assert disk.startswith(str(tmp_path))
    assert float(disk.split(": ")[-1].split()[0]) == pytest.approx(shutil.disk_usage(tmp_path).free / 2**30, rel=0.2)
    assert "one" in only(found["processes"])["found"] and "math" in only(found["attention"])["found"]
    assert any(os.environ["NANOGPT_ACCEL_CACHE"] in finding["found"] for finding in found["cache"])
    assert {finding["state"] for findings in found.values() for finding in findings} <= {"ok", "warning"}


def test_text_output_has_a_line_per_finding(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["ok", "torch", metadata.version("torch")] for line in lines)
    assert all(line.startswith(("ok ", "warning ")) for line in lines)


def test_credentials_are_never_printed(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    for words in ([], ["--json"]):
        assert main(["doctor", *words]) == 0
        captured = capsys.readouterr()
        assert SECRET[3:12] not in captured.out + captured.err
        assert "Hugging Face: present" in captured.out and "wandb: present" in captured.out


def test_missing_credentials_show_how_to_log_in(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    hub, wandb = doctor.tokens()
    assert "none" in hub["found"] and "hf auth login" in hub["found"] and "wandb login" in wandb["found"]
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {SECRET}\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert doctor.tokens()[1]["found"] == "wandb: present"


def test_a_missing_package_is_broken_and_an_untested_version_a_warning(examine, monkeypatch):
    version = metadata.version

    def another(name):
        if name == "tiktoken":
            raise metadata.PackageNotFoundError(name)
        return "1.0.0" if name == "rich" else version(name)

    monkeypatch.setattr(metadata, "version", another)
    found = examine(status=1)
    assert only(found["tiktoken"])["state"] == "broken" and "pip install 'tiktoken>=" in found["tiktoken"][0]["fix"]
    assert only(found["rich"])["state"] == "warning" and "1.0.0" in found["rich"][0]["found"]
    assert "disk" not in found  # the other checks need the package


@pytest.mark.parametrize(
    "name, value, text",
    [
        ("WORLD_SIZE", "2", "launch with `accelerate launch` or torchrun"),
        ("PARALLELISM_CONFIG_TP_SIZE", "2", "only data-parallel sharding"),
    ],
)
def test_a_launch_that_cannot_train_is_broken(examine, monkeypatch, name, value, text):
    monkeypatch.setenv(name, value)
    found = only(examine(status=1)["launch"])
    assert found["state"] == "broken" and text in found["found"]


@pytest.mark.parametrize("free, state", [(2**40, "ok"), (2**29, "warning"), (2**20, "broken")])
def test_state_of_the_disk_follows_its_free_space(monkeypatch, free, state):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": free}))
    found = doctor.disk()
    assert found["state"] == state and bool(found["fix"]) == (state != "ok")


def test_folders_that_cannot_be_written_are_reported(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    assert not doctor.check_writable(tmp_path / "new" / "deeper") and doctor.check_writable(tmp_path / "file" / "below")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "file"))
    (finding,) = (finding for finding in doctor.caches() if finding["found"].startswith("TIKTOKEN"))
    assert finding["state"] == "warning" and finding["fix"] == "set TIKTOKEN_CACHE_DIR to a writable folder"
    if os.geteuid():  # root can write everywhere
        tmp_path.chmod(0o500)
        monkeypatch.chdir(tmp_path)
        assert doctor.disk()["state"] == "broken"


@pytest.mark.parametrize(
    "content, state, text",
    [
        (None, "ok", "does not exist; use accelerate launch --config_file"),
        (
            "distributed_type: MULTI_GPU\nnum_processes: 8\nmixed_precision: bf16\n",
            "ok",
            "distributed_type MULTI_GPU, num_processes 8, mixed_precision bf16",
        ),
        ("distributed_type: MULTI_CPU\nnum_processes: 2\n", "warning", "accelerate starts a single process"),
        ("{", "warning", "cannot be read"),
        ("- a list\n", "warning", "cannot be read"),
    ],
)
def test_default_config_of_accelerate_launch(monkeypatch, tmp_path, content, state, text):
    from accelerate.commands.config import config_args

    path = tmp_path / "default_config.yaml"
    if content:
        path.write_text(content)
    monkeypatch.setattr(config_args, "default_config_file", str(path))
    found = doctor.accelerate_config()
    assert found["state"] == state and text in found["found"] and str(path) in found["found"]


@pytest.mark.parametrize(
    "code, limit, state, text",
    [
        ("", 60, "ok", "works"),
        ("raise OSError('no compiler')", 60, "warning", "failed (OSError: no compiler)"),
        ("import time; time.sleep(60)", 1, "warning", "timed out after 1 s"),
    ],
)
def test_torch_compile_is_tried_in_a_subprocess(monkeypatch, code, limit, state, text):
    monkeypatch.setattr(doctor, "COMPILE", code)
    monkeypatch.setattr(doctor, "COMPILE_LIMIT_S", limit)
    found = doctor.compiling(torch.device("cpu"), full=True)
    assert found["state"] == state and text in found["found"]
    if state != "ok":  # compile is the default on GPUs, so training would fail
        assert doctor.compiling(torch.device("cuda"), full=True)["state"] == "broken"


def test_torch_compile_is_only_tried_with_full(examine, monkeypatch):
    started = []
    monkeypatch.setattr(
        subprocess, "run", lambda *args, **options: started.append(args) or SimpleNamespace(returncode=0)
    )
    assert "doctor --full" in only(examine()["torch.compile"])["found"] and not started
    for word in ("--full", "full=true"):
        assert only(examine(word)["torch.compile"])["found"].startswith("works")
    assert len(started) == 2 and started[0][0][:2] == [sys.executable, "-c"]


@pytest.mark.parametrize(
    "triton, compiler, state", [(True, "gcc", "ok"), (False, "gcc", "broken"), (True, "", "broken")]
)
def test_without_full_a_gpu_needs_triton_and_a_compiler(monkeypatch, triton, compiler, state):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(doctor, "find_spec", lambda name: triton or None)
    monkeypatch.setattr(shutil, "which", lambda name: name == compiler or None)
    found = doctor.compiling(torch.device("cuda"), full=False)
    assert found["state"] == state and ("set compile=false" in found["fix"]) == (state == "broken")
    assert doctor.compiling(torch.device("cpu"), full=False)["state"] == "ok"  # where compile is off
    monkeypatch.setenv("CC", "nvc")
    monkeypatch.setattr(shutil, "which", lambda name: name == "nvc" or None)
    assert doctor.compiling(torch.device("cuda"), full=False)["state"] == ("ok" if triton else "broken")


@pytest.mark.parametrize(
    ("device", "has_bf16", "text"),
    [
        ("cuda", True, "bf16 is native"),
        ("cpu", True, "bf16 is native"),
        ("cpu", False, "bf16 is emulated and slow"),
        ("mps", None, "selects no"),
    ],
)
def test_precision_shows_whether_bf16_is_native(monkeypatch, device, has_bf16, text):
    monkeypatch.setattr(doctor, "has_native_bf16", lambda kind: has_bf16 if kind == device else pytest.fail(kind))
    found = doctor.precision(SimpleNamespace(device=torch.device(device), mixed_precision="no"))
    assert found["state"] == "ok" and found["found"].endswith(text)


def test_attention_without_a_fused_kernel_is_a_warning(monkeypatch):
    def refuse(*arguments, **keywords):
        if not torch.backends.cuda.math_sdp_enabled():
            raise RuntimeError("no kernel")
        return sdpa(*arguments, **keywords)

    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
    found = doctor.attention(torch.device("cpu"))
    assert found["state"] == "warning" and "only the math kernel" in found["found"]


def test_wrong_arguments_are_refused(refused):
    with refused(ValueError, "runs/a: `doctor` accepts only options; remove this argument"):
        doctor.main(["runs/a"])
    with refused(ValueError, "full=2"):
        doctor.main(["full=2"])


# ---- slow tests


@pytest.mark.slow
def test_torch_compile_works_here():
    assert doctor.compiling(torch.device("cpu"), full=True)["state"] == "ok"


@pytest.mark.slow
def test_all_reduce_between_two_processes():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            f"--master_port={port}",
            "-m",
            "nanogpt_accel",
            "doctor",
            "--json",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(nanogpt_accel.__file__).parents[1],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)  # only the main process prints
    finding = only([each for each in found["findings"] if each["what"] == "processes"])
    assert finding["state"] == "ok" and finding["found"].startswith("gloo: 2 processes, all-reduce of 64 MiB at ")
