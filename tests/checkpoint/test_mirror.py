"""mirror.py: checkpoints are copied to another place while a run trains, and restored from there."""

import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from launching import TIMEOUT_S, free_port, package_env
from runs import SMALL, numbers, weights, write_recipe

from nanogpt_accel.checkpoint.mirror import BackgroundMirror, Mirror, check_mirror, clear_mirror, prepare_mirror
from nanogpt_accel.checkpoint.verify import find_corruption
from nanogpt_accel.recipe import load_recipe

URLS = ["memory://bucket/run", "file://{}/mirror", "{}/mirror"]


@pytest.fixture(params=URLS)
def url(request, tmp_path):
    from fsspec.implementations.memory import MemoryFileSystem

    MemoryFileSystem.store.clear()
    return request.param.format(tmp_path)


def steps(mirror):
    return list(mirror.checkpoints())


def test_a_restored_checkpoint_is_the_saved_one(url, folder, tmp_path):
    (folder / "metrics.jsonl").write_text("{}\n")
    mirror, said = Mirror(url), []
    assert steps(mirror) == []
    for step in (20, 10):
        mirror.upload(folder / f"checkpoint-{step:06d}", f"checkpoint-{step:06d}", folder)
    assert steps(mirror) == [10, 20]
    new = tmp_path / "new"
    new.mkdir()
    mirror.restore(new, said.append)
    names = sorted(path.relative_to(new).as_posix() for path in new.rglob("*") if path.is_file())
    assert "metrics.jsonl" in names and names == sorted(
        ["metrics.jsonl"]
        + [path.relative_to(folder).as_posix() for path in folder.glob("checkpoint-*/**/*") if path.is_file()]
    )
    assert all((new / name).read_bytes() == (folder / name).read_bytes() for name in names)
    assert said == [f"restored {new}/checkpoint-000020 from {url}"]


def test_incomplete_and_corrupted_checkpoints_are_not_restored(url, folder, tmp_path):
    mirror, said = Mirror(url), []
    for step in (10, 20):
        mirror.upload(folder / f"checkpoint-{step:06d}", f"checkpoint-{step:06d}", folder)
    mirror.upload(folder / "checkpoint-000020", "checkpoint-000030", folder)
    mirror.fs.rm(f"{mirror.root}/checkpoint-000030/state/index.json")  # as if the upload had been killed
    mirror.fs.pipe(f"{mirror.root}/checkpoint-000020/model.safetensors", b"damaged")
    assert steps(mirror) == [10, 20]
    new = tmp_path / "new"
    new.mkdir()
    mirror.restore(new, said.append)
    assert [path.name for path in new.iterdir()] == ["checkpoint-000010"]
    assert find_corruption(new / "checkpoint-000010") is None and "corrupted; skipping" in said[0]


def test_the_mirror_keeps_the_same_checkpoints_as_the_run_folder(url, run):
    mirror, said = BackgroundMirror(url, run.folder, said_fails := [], 2), []
    mirror.warn = said.append
    for step in (10, 20, 30, 40):
        path = run.save(step, best_step=10, keep_last=2)
        mirror.push(path, path.name)
        mirror.wait()
    assert steps(Mirror(url)) == [10, 30, 40] == run.steps()
    assert said == said_fails == [] and run.leftovers() == [] and mirror.pushed.name == "checkpoint-000040"


def test_a_store_that_refuses_to_delete_gets_all_checkpoints(run, monkeypatch, tmp_path):
    said = []
    mirror = BackgroundMirror(f"{tmp_path}/mirror", run.folder, said.append, 1)

    def delete(self, path):
        raise ConnectionError("not permitted")

    monkeypatch.setattr(Mirror, "delete", delete)
    for step in (10, 20, 30):
        path = run.save(step)
        mirror.push(path, path.name)
        mirror.wait()
    assert steps(Mirror(f"{tmp_path}/mirror")) == [10, 20, 30] and mirror.pushed.name == "checkpoint-000030"
    assert said == ["warning: older checkpoints are not deleted from the mirror: not permitted"]


def test_a_store_that_is_down_for_a_while_loses_nothing(run, monkeypatch, tmp_path):
    said, down = [], [True]
    monkeypatch.setattr(BackgroundMirror, "retry_s", 0.05)
    real = Mirror.upload

    def upload(self, *words):
        with self._errors():
            if down[0]:
                raise TimeoutError("no answer")
        real(self, *words)

    monkeypatch.setattr(Mirror, "upload", upload)
    mirror = BackgroundMirror(f"{tmp_path}/mirror", run.folder, said.append, 2)
    for step in (10, 20):
        path = run.save(step)
        mirror.push(path, path.name)
        time.sleep(0.2)
    down[0] = False
    mirror.wait()
    assert steps(Mirror(f"{tmp_path}/mirror")) == [20] and run.leftovers() == []
    (line,) = said
    assert line.startswith("warning: checkpoint-000010 is not copied to the mirror yet: ") and "no answer" in line


def recipe_for(url, folder, **settings):
    checkpoint = {"mirror": url, "resume": settings.get("resume", "no")}
    return SimpleNamespace(
        out_dir=str(folder),
        overwrite=settings.get("overwrite", False),
        checkpoint=SimpleNamespace(**checkpoint),
        model=SimpleNamespace(init_from="scratch"),
    )


def test_a_mirror_of_another_run_is_not_overwritten(url, folder, tmp_path):
    Mirror(url).upload(folder / "checkpoint-000020", "checkpoint-000020", folder)
    (problem,) = check_mirror(recipe_for(url, tmp_path / "new"))
    assert problem.startswith(f"checkpoint.mirror={url}: already contains a run (step 20); to resume it, set resume=")
    assert check_mirror(recipe_for(url, tmp_path / "new", resume="auto")) == []
    replacing = recipe_for(url, tmp_path / "new", overwrite=True)
    assert check_mirror(replacing) == []
    prepare_mirror(replacing, pytest.fail)
    assert steps(Mirror(url)) == [20], "deleted only when the new run starts"
    clear_mirror(replacing)
    assert steps(Mirror(url)) == []


def test_a_local_checkpoint_comes_before_the_mirror(url, folder, tmp_path):
    mirror = Mirror(url)
    mirror.upload(folder / "checkpoint-000020", "checkpoint-000020", folder)
    shutil.rmtree(folder / "checkpoint-000020")
    prepare_mirror(recipe_for(url, folder, resume="auto"), pytest.fail)
    assert not (folder / "checkpoint-000020").exists()
    for path in folder.glob("checkpoint-*"):
        (path / "config.json").unlink()
    (folder / "checkpoint-000010").rename(folder / "checkpoint-000020")  # corrupted, with a name as in the mirror
    prepare_mirror(recipe_for(url, folder, resume="auto", overwrite=True), lambda line: None)
    assert find_corruption(folder / "checkpoint-000020") is None and steps(Mirror(url)) == [20]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nosuch://bucket/run", "Protocol not known: nosuch"),
        ("gs://bucket/run", "gs:// is not installed; run `pip install gcsfs`"),
        ("ssh://host/run", "ssh:// is not installed; "),
        ("/tmp/mirror", "check the URL"),
    ],
)
def test_a_mirror_that_cannot_be_used_is_refused_in_one_line(url, words, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    if url.startswith("/"):
        monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.ls", lambda *a, **k: [][0])
    (problem,) = check_mirror(recipe_for(url, tmp_path))
    assert problem.startswith(f"checkpoint.mirror={url}: ") and words in problem and "\n" not in problem


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("run", "in out_dir=run; set mirror to a folder on another disk"),
        ("file://{}/run/mirror", "in out_dir=run"),
        ("text.txt", "is a file; set `checkpoint.mirror` to another folder"),
        ("/proc/mirror", "cannot write to /proc"),
        ("/", "no folder"),
        ("memory://", "no folder"),
        ("../run", None),
    ],
)
@pytest.mark.parametrize("init_from", ["scratch", "resume"])
def test_a_mirror_that_would_protect_nothing_is_refused(url, words, init_from, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "text.txt").touch()
    recipe = recipe_for(url.format(tmp_path / "here"), "run")
    recipe.model.init_from = init_from
    problems = check_mirror(recipe)
    assert problems == [] if words is None else len(problems) == 1 and words in problems[0]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["here", "text.txt"]


def test_the_mirror_is_not_published(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, mirror="s3://secret/run"), {})
    assert recipe.checkpoint.mirror == "s3://secret/run" and "secret" not in recipe.to_yaml(brief=True)


# ---- a real S3 server and a spot instance


class Server:
    """moto's S3 server in another process, with an empty bucket."""

    def __init__(self, port, fs):
        words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while True:
            try:
                fs.mkdir("bucket")
                break
            except Exception:
                assert time.monotonic() < end
                time.sleep(0.2)

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start_s3(monkeypatch):
    """Return a function start_s3() that starts a Server. A second call starts an empty server on the same port."""
    s3fs = pytest.importorskip("s3fs", reason="pip install s3fs")
    pytest.importorskip("moto.server", reason="pip install 'moto[server]'")
    port, servers = free_port(), []
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # they may have the port of an earlier test

    def start():
        servers.append(Server(port, s3fs.S3FileSystem(skip_instance_cache=True)))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


def train(recipe, run, log, *options):
    with open(log, "ab") as output:
        words = [sys.executable, "-m", "nanogpt_accel.train", str(recipe), f"out_dir={run}", *options]
        return subprocess.Popen(words, env=package_env(), stdout=output, stderr=output)


def wait_for(condition, job, log):
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end and job.poll() is None, log.read_text()
        time.sleep(0.05)


@pytest.mark.slow
def test_a_spot_instance_resumes_from_s3_with_the_same_losses(start_s3, tmp_path):
    start_s3()
    settings = SMALL | {"max_iters": 600, "eval_interval": 50, "keep_last": 2}
    recipe, run, log = write_recipe(tmp_path, **settings), tmp_path / "run", tmp_path / "log"
    assert train(recipe, tmp_path / "undisturbed", tmp_path / "log0").wait(TIMEOUT_S) == 0
    mirror = Mirror("s3://bucket/run")
    for at_least in (50, 200):
        job = train(recipe, run, log, "mirror=s3://bucket/run", "resume=auto")
        wait_for(lambda: max(mirror.checkpoints(), default=0) >= at_least, job, log)  # noqa: B023
        job.send_signal(signal.SIGKILL)
        job.wait()
        shutil.rmtree(run)
        shutil.rmtree(tmp_path / "tokens")
    assert train(recipe, run, log, "mirror=s3://bucket/run", "resume=auto").wait(TIMEOUT_S) == 0, log.read_text()
    assert log.read_text().count("restored ") == 2
    assert numbers(run) == numbers(tmp_path / "undisturbed")
    assert weights(run, 600) == weights(tmp_path / "undisturbed", 600)
    assert max(mirror.checkpoints()) == 600


@pytest.mark.slow
def test_a_server_that_is_down_for_a_while_stops_nothing(start_s3, tmp_path):
    recipe = write_recipe(tmp_path, **SMALL, max_iters=1500, eval_interval=50)
    run, log, server = tmp_path / "run", tmp_path / "log", start_s3()
    job = train(recipe, run, log, "mirror=s3://bucket/run")
    wait_for(lambda: Mirror("s3://bucket/run").checkpoints(), job, log)
    server.kill()
    wait_for(lambda: "warning: " in log.read_text(), job, log)
    start_s3()
    assert job.wait(TIMEOUT_S) == 0, log.read_text()
    assert max(Mirror("s3://bucket/run").checkpoints()) == 1500
    text = log.read_text()
    assert text.count("warning: ") == 1 and text.count("saved ") == 30 and "Traceback" not in text
    server.kill()


@pytest.mark.slow
def test_a_server_that_is_down_at_the_start_is_an_error(start_s3, tmp_path):
    """Without this error, resume=auto would start a new run."""
    start_s3().kill()
    log = tmp_path / "log"
    job = train(write_recipe(tmp_path), tmp_path / "run", log, "mirror=s3://bucket/run", "resume=auto")
    assert job.wait(TIMEOUT_S) == 2
    assert "error: checkpoint.mirror=s3://bucket/run: " in log.read_text() and "Traceback" not in log.read_text()
