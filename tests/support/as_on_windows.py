"""Run commands of the package on Linux with the restrictions of Windows, as far as Linux can imitate them.

    python -X warn_default_encoding tests/support/as_on_windows.py '[["plan", "recipe.yaml"], ["train", "recipe.yaml"]]'

For the modules of the package, `os`, `signal` and `sys` lack the names that Windows lacks, POSIX modules cannot be
imported, and text files have CR LF line ends. For all code, there are no symbolic links, and a file that is open or
mapped cannot be renamed, replaced or deleted, nor its folder renamed. Opening a text file in the default encoding is an
error. The last line of standard output is a JSON list of the exit statuses of the commands.
"""

import builtins
import errno
import importlib
import json
import os
import pathlib
import pkgutil
import shutil
import signal
import sys
import types
import warnings

import filelock
import psutil

POSIX_MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix"}
# the names of `os` and `signal` that their documentation marks as Unix
POSIX_OS = {
    "chown",
    "chroot",
    "confstr",
    "ctermid",
    "eventfd",
    "fchdir",
    "fchmod",
    "fchown",
    "fdatasync",
    "fork",
    "forkpty",
    "fpathconf",
    "fstatvfs",
    "getegid",
    "geteuid",
    "getgid",
    "getgroups",
    "getloadavg",
    "getpgid",
    "getpgrp",
    "getpriority",
    "getresuid",
    "getsid",
    "getuid",
    "getxattr",
    "initgroups",
    "killpg",
    "lchown",
    "lockf",
    "major",
    "memfd_create",
    "minor",
    "mkfifo",
    "mknod",
    "nice",
    "openpty",
    "pathconf",
    "pidfd_open",
    "pipe2",
    "posix_fadvise",
    "posix_fallocate",
    "posix_spawn",
    "pread",
    "preadv",
    "pwrite",
    "pwritev",
    "readv",
    "register_at_fork",
    "sched_getaffinity",
    "sched_setaffinity",
    "sched_yield",
    "sendfile",
    "seteuid",
    "setpgid",
    "setpriority",
    "setsid",
    "setuid",
    "setxattr",
    "splice",
    "statvfs",
    "sync",
    "sysconf",
    "tcgetpgrp",
    "ttyname",
    "uname",
    "wait",
    "wait3",
    "wait4",
    "waitid",
    "writev",
    "PRIO_PROCESS",
    "O_DIRECTORY",
    "O_NOFOLLOW",
    "O_CLOEXEC",
    "O_NONBLOCK",
    "O_SYNC",
    "kill",  # exists on Windows, but ends the process for any signal number
}
WINDOWS_SIGNALS = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIGBREAK"}


class Without(types.ModuleType):
    """A wrapper of a module that hides some of its names and replaces others."""

    def __init__(self, module, missing, **own):
        super().__init__(module.__name__)
        self.__dict__.update(_module=module, _missing=missing, **own)

    def __getattr__(self, name):
        if name in self._missing:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} under Windows")
        return getattr(self._module, name)


def is_ours(depth):
    """Whether the caller at this depth is a module of the package."""
    return sys._getframe(depth + 1).f_globals.get("__name__", "").startswith("nanogpt_accel")


def refused(path, number=errno.EACCES):
    return PermissionError(
        number, "The process cannot access the file because it is being used by another process", str(path)
    )


def check_free(path):
    """Raise a PermissionError if this process has opened or mapped the file `path`, or a file in the folder `path`."""
    path = os.path.realpath(os.path.dirname(path) or ".") + os.sep + os.path.basename(path)
    with open("/proc/self/maps", encoding="utf-8") as file:
        busy = {line.split(maxsplit=5)[5].strip() for line in file if len(line.split(maxsplit=5)) == 6}
    for handle in os.listdir("/proc/self/fd"):
        try:
            busy.add(os.readlink(f"/proc/self/fd/{handle}"))
        except OSError:  # the handle of listdir itself, which is closed now
            pass
    if any(name == path or name.startswith(path + os.sep) for name in busy):
        raise refused(path)


def imitate_windows():
    real = types.SimpleNamespace(
        **{name: getattr(os, name) for name in ("rename", "replace", "unlink", "remove", "open", "fsync")},
        signal=signal.signal,
        open_file=open,
        write_text=pathlib.Path.write_text,
        imported=builtins.__import__,
    )

    def rename(source, target, **folders):
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists", str(target))
        check_free(source)
        real.rename(source, target, **folders)

    def replace(source, target, **folders):
        if os.path.isdir(target):
            raise refused(target)
        check_free(source)
        check_free(target)
        real.replace(source, target, **folders)

    def unlink(path, **folders):
        if sys._getframe(1).f_globals.get("__name__") != "tempfile":  # Windows deletes its files at close
            check_free(os.fspath(path))
        real.unlink(path, **folders)

    def open_handle(path, *arguments, **more):
        if is_ours(1) and os.path.isdir(path):
            raise refused(path)
        return real.open(path, *arguments, **more)

    def fsync(handle):
        import fcntl

        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:  # as FlushFileBuffers on Windows
            raise OSError(errno.EBADF, "Bad file descriptor")
        real.fsync(handle)

    def symlink(*arguments, **more):
        raise OSError(errno.EINVAL, "A required privilege is not held by the client")  # WinError 1314

    def open_file(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *more):
        is_text = "b" not in mode and is_ours(1)
        if is_text and encoding is None:
            raise EncodingWarning(f"{file} is opened in the encoding of the machine")
        if is_text and newline is None and not {"w", "a", "x"}.isdisjoint(mode):
            newline = "\r\n"
        return real.open_file(file, mode, buffering, encoding, errors, newline, *more)

    def write_text(self, data, encoding=None, errors=None, newline=None):
        if is_ours(1) and newline is None:
            newline = "\r\n"
        return real.write_text(self, data, encoding, errors, newline)

    def set_handler(number, handler):
        if signal.Signals(number).name not in WINDOWS_SIGNALS | {"SIGUSR2"}:
            raise ValueError("invalid signal value")
        return real.signal(number, handler)

    os.rename, os.replace, os.unlink, os.remove, os.open, os.fsync, os.symlink = (
        rename,
        replace,
        unlink,
        unlink,
        open_handle,
        fsync,
        symlink,
    )
    os.supports_follow_symlinks = set()
    shutil._use_fd_functions = False
    builtins.open, pathlib.Path.write_text = open_file, write_text

    # libraries that behave differently on Windows
    released = filelock.FileLock._release

    def release(self):
        released(self)
        os.unlink(self.lock_file)  # filelock does so under Windows

    filelock.FileLock._release = release
    psutil.Process.memory_info = lambda self: types.SimpleNamespace(peak_wset=2**28)

    has_not = {name for name in dir(signal) if name.startswith("SIG") and not name.startswith("SIG_")}
    seen = {
        "os": Without(os, POSIX_OS, name="nt"),
        "sys": Without(sys, {"getdlopenflags"}, platform="win32"),
        # Linux has no SIGBREAK: use SIGUSR2, which a test can send
        "signal": Without(
            signal,
            has_not - WINDOWS_SIGNALS | {"alarm", "setitimer", "pthread_kill"},
            SIGBREAK=signal.SIGUSR2,
            signal=set_handler,
        ),
    }

    def imported(name, globals=None, locals=None, fromlist=(), level=0):
        if level == 0 and (globals or {}).get("__name__", "").startswith("nanogpt_accel"):
            if name.partition(".")[0] in POSIX_MODULES:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            if name in seen:
                return seen[name]
        return real.imported(name, globals, locals, fromlist, level)

    builtins.__import__ = imported
    warnings.simplefilter("ignore", EncodingWarning)  # other packages may use the default encoding
    warnings.filterwarnings("error", category=EncodingWarning, module="nanogpt_accel")


if __name__ == "__main__":
    imitate_windows()
    import nanogpt_accel
    from nanogpt_accel.__main__ import main

    for module in pkgutil.walk_packages(nanogpt_accel.__path__, "nanogpt_accel."):
        importlib.import_module(module.name)
    statuses = []
    for command in json.loads(sys.argv[1]):
        try:
            statuses.append(main(command))
        except SystemExit as end:
            statuses.append(end.code)
        sys.stdout.flush()
    print(json.dumps(statuses))
