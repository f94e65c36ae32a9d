"""Copy the checkpoints of a run to another place, such as s3://bucket/run, and restore them from there.

The mirror has the files of the run folder: checkpoint-N/, run.yaml and the logs. A checkpoint in the mirror is complete
if it has a state/index.json, which is written last. fsspec copies the files. data/remote.py lists the packages that
fsspec needs.
"""

import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from ..data.remote import FIXES, PACKAGES
from ..hub.background import BackgroundPush
from ..utils.files import flush_tree, remove_checkpoint, rename_folder
from ..utils.text import one_line
from .layout import CHECKPOINT_NAME, INDEX, checkpoint_path, read_trainer
from .run_folder import check_writable
from .verify import find_corruption, latest_valid

LOGS = ("run.yaml", "metrics.jsonl", "samples.jsonl")
FIX = "check the URL, the credentials and the network"


class Mirror:
    """A mirror of a run folder. url: a URL or path that fsspec supports, such as s3://bucket/run or /mnt/backup/run.

    All methods raise ConnectionError if the storage does not respond or refuses the request. They raise ValueError if
    the package for the protocol of the URL is not installed.
    """

    def __init__(self, url):
        from fsspec.core import url_to_fs

        self.url = url
        with self._errors():
            self.fs, self.root = url_to_fs(url)
            self.root = self.root.rstrip("/")
            if not self.root:  # "/" or "s3://"
                raise ValueError("contains no folder")

    def checkpoints(self):
        """Return {step: path} of the complete checkpoints, oldest first."""
        with self._errors():
            self.fs.invalidate_cache()
            try:
                entries = self.fs.ls(self.root, detail=False)
            except FileNotFoundError:
                return {}
            found = {}
            for path in entries:
                match = CHECKPOINT_NAME.match(path.rstrip("/").rpartition("/")[2])
                if match and self.fs.exists(f"{path}/{INDEX}"):
                    found[int(match[1])] = path.rstrip("/")
        return dict(sorted(found.items()))

    def upload(self, folder, name, run):
        """Copy the checkpoint files in `folder` to `name` in the mirror. Also copy the logs of the run folder `run`."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        pairs = [(file, f"{name}/{file.relative_to(folder).as_posix()}") for file in files]
        pairs += [(Path(run) / log, log) for log in LOGS if (Path(run) / log).is_file()]
        with self._errors():
            for file, target in sorted(pairs, key=lambda pair: pair[1] == f"{name}/{INDEX}"):  # the index last
                target = f"{self.root}/{target}"
                if "file" in self.fs.protocol:
                    self.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
                self.fs.put_file(str(file), target)

    def delete(self, path):
        """Delete a checkpoint from the mirror. Delete the index first, so that no partly deleted checkpoint is used."""
        with self._errors():
            self.fs.rm(f"{path}/{INDEX}")
            self.fs.rm(path, recursive=True)

    def download(self, run, step, path):
        """Copy a checkpoint from the mirror to a run folder. Return the new folder, or None if it is corrupted."""
        final = checkpoint_path(run, step)
        with tempfile.TemporaryDirectory(dir=run, prefix=".mirror-") as temporary:
            folder = Path(temporary) / final.name
            with self._errors():
                self.fs.get(path, str(folder), recursive=True)
            if find_corruption(folder) is not None:
                return None
            flush_tree(folder)
            if final.exists():
                remove_checkpoint(final)  # it is corrupted: a run that has a valid checkpoint is not restored
            rename_folder(folder, final)
        return final

    def restore(self, run, say):
        """Copy the latest valid checkpoint, the best checkpoint and the logs from the mirror to a run folder."""
        found = self.checkpoints()
        for step in reversed(found):
            latest = self.download(run, step, found[step])
            if latest is None:
                say(f"warning: {found[step]}: corrupted; skipping this checkpoint")
                continue
            best = read_trainer(latest)["best_step"]
            if best != step and best in found:
                self.download(run, best, found[best])
            with self._errors():
                for log in LOGS:
                    with suppress(FileNotFoundError):
                        self.fs.get_file(f"{self.root}/{log}", str(Path(run) / log))
            say(f"restored {latest} from {self.url}")
            return

    @contextmanager
    def _errors(self):
        """Convert errors of fsspec and its libraries, which have many types, to ConnectionError or ValueError."""
        protocol = self.url.partition("://")[0] if "://" in self.url else "file"
        try:
            yield
        except ImportError as error:
            package = PACKAGES.get(protocol)
            fix = f"run `pip install {package}`" if package else one_line(error)
            raise ValueError(f"checkpoint.mirror={self.url}: {protocol}:// is not installed; {fix}") from None
        except ValueError as error:  # an unknown protocol
            raise ValueError(f"checkpoint.mirror={self.url}: {one_line(error)}; check the URL") from None
        except Exception as error:
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise ConnectionError(f"checkpoint.mirror={self.url}: {reason}; {FIXES.get(protocol, FIX)}") from error


class BackgroundMirror(BackgroundPush):
    """Copies checkpoints to a mirror in a thread, one at a time. The mirror keeps the checkpoints that the run keeps.

    A failed copy is repeated. If a newer checkpoint is waiting, the newer checkpoint is copied instead. If several
    copies fail in a row, only the first failure causes a warning.
    """

    retry_s = 15

    def __init__(self, url, folder, warn, keep_last, collective_timeout=600):
        super().__init__(url, folder, warn)
        self.mirror, self.keep_last, self._can_delete = None, keep_last, True
        self.timeout_s = min(300, collective_timeout / 2)  # less than the other ranks wait at the end of the run

    def _files(self, checkpoint):
        return [file for file in checkpoint.rglob("*") if file.is_file()]

    def _send(self, links, checkpoint, message):
        if self.mirror is None:
            self.mirror = Mirror(self.repo)
        self.mirror.upload(links, checkpoint.name, self._folder)
        trainer = read_trainer(links)
        found = {step: path for step, path in self.mirror.checkpoints().items() if step <= trainer["step"]}
        kept = {trainer["best_step"], *list(found)[-self.keep_last :]}
        for step in found.keys() - kept if self._can_delete else ():
            try:
                self.mirror.delete(found[step])
            except ConnectionError as error:
                self._can_delete = False
                self.warn(f"warning: older checkpoints are not deleted from the mirror: {error}")

    def _report_failure(self, message, error):
        if not self._has_warned:
            self._has_warned = True
            self.warn(f"warning: {message} is not copied to the mirror yet: {error}. The run continues and tries again")


def check_mirror(recipe):
    """Check before a run that the mirror can be read, is not in out_dir, and does not contain another run. For a folder
    on this machine, also check that it can be written. Return a list of problems."""
    url = recipe.checkpoint.mirror
    if url is None:
        return []
    try:
        mirror = Mirror(url)
        if "file" in mirror.fs.protocol:
            if Path(mirror.root).resolve().is_relative_to(Path(recipe.out_dir).resolve()):
                return [f"checkpoint.mirror={url}: in out_dir={recipe.out_dir}; set mirror to a folder on another disk"]
            if problems := check_writable(mirror.root, "checkpoint.mirror"):
                return problems
        found = {} if recipe.model.init_from == "resume" else mirror.checkpoints()
    except (ValueError, ConnectionError) as error:
        return [str(error)]
    if not found or recipe.overwrite or recipe.checkpoint.resume == "auto":
        return []
    return [
        f"checkpoint.mirror={url}: already contains a run (step {max(found):,}); to resume it, set resume=auto; to "
        "replace it, set overwrite=true; or set mirror to another place"
    ]


def prepare_mirror(recipe, say):
    """Restore a run from its mirror if the recipe has resume=auto and out_dir has no valid checkpoint."""
    url, run = recipe.checkpoint.mirror, recipe.out_dir
    if url is None or recipe.checkpoint.resume == "no" or latest_valid(run, lambda line: None, thorough=False):
        return
    for leftover in Path(run).glob(".mirror-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    Mirror(url).restore(run, say)


def clear_mirror(recipe):
    """Delete the checkpoints in the mirror of a run that starts with overwrite=true."""
    if recipe.checkpoint.mirror is not None and recipe.overwrite:
        mirror = Mirror(recipe.checkpoint.mirror)
        for path in mirror.checkpoints().values():
            mirror.delete(path)
