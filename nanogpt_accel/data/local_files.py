"""A corpus of files: a file, a folder or a glob, on this machine or at a URL."""

import functools
import glob
import hashlib
import itertools
import os
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path

from ..utils.text import counted, data_size, file_name, quoted
from .corpus import Corpus, location
from .file_splits import CODE_SUFFIXES, is_about, no_splits, splits_by_name
from .foreign_tokens import (
    find_layout,
    find_token_files,
    find_unexpected,
    is_token_file,
    natural_order,
    open_splits,
    without_companions,
)
from .readers import READERS, file_state, has_rows, looks_like_json, read_file, read_text, suffix_of
from .remote import find, is_remote, name_of

# files in a folder are read if they have one of these suffixes; a single file or a glob may have any suffix
TEXT_SUFFIXES = (".txt", ".text", *CODE_SUFFIXES)
TABLE_SUFFIXES = tuple(READERS)  # each can be followed by .gz or .zst
MOST_PARTS = 1000  # maximum parts per split; small files are grouped into one part, because each part adds two files
# Unsupported formats. Without this list, the error for such a file would only name its first byte that is not UTF-8.
OTHER_SUFFIXES = tuple(
    ".zip .tar .tgz .bz2 .xz .7z .rar .lz4 .arrow .feather .orc .avro .pkl .pt "
    ".pdf .doc .docx .odt .epub .xls .xlsx".split()
)


def path_exists(spec):
    """Return whether a corpus setting is a URL, a glob or an existing path. A broken link counts as existing."""
    path = os.path.expanduser(spec)
    return is_remote(spec) or glob.has_magic(path) or os.path.lexists(path)


def base_name(spec):
    """Return the last part of a corpus setting, which is a URL or a path. A relative path is made absolute first."""
    return os.path.basename(os.path.abspath(os.path.expanduser(name_of(spec))))


def local_corpus(spec, column, lines, split_by="auto"):
    """Return the Corpus of a file, a folder or a glob. Files are read in the order of their names.

    column: the text column of .jsonl, .csv and similar files. lines: whether each line of a plain text is a document.
    split_by: see recipe.Data. Raises FileNotFoundError if no file matches, and ValueError if a file is not supported.
    """
    root, paths, skipped, outputs = _find_files(spec)
    _check_formats(spec, paths, lines)
    states = {path: file_state(path) for path in paths}
    splits, notes = _find_splits(spec, states, split_by)
    paths = list(itertools.chain.from_iterable(splits.values()))
    splits = {split: set(chosen) for split, chosen in splits.items()}
    notes += _describe_outputs(spec, outputs)
    files, listing = [], hashlib.sha256()
    for name, path in _sort(root, paths):
        n_bytes, changed = states[path]
        files.append((path, n_bytes, changed))
        listing.update(f"{name}\0{n_bytes}\0{changed}\n".encode("utf-8", "surrogateescape"))
    name = base_name(spec)
    stem = os.path.splitext(name)[0] if len(files) == 1 else name
    short = (file_name(stem).strip("-.") or "text")[:40]
    size = sum(n_bytes for _, n_bytes, _ in files)
    source = {"kind": "files", "name": name, "files": len(files), "bytes": size, "listing": listing.hexdigest()}
    source |= {"split_files": {split: len(names) for split, names in splits.items()}} if len(splits) > 1 else {}
    if is_token_file(files[0][0]):
        for path, _, _ in files:
            find_layout(path, spec)  # reports a damaged header
        source |= {"kind": "ids"}
        splits = {split: [path for path, _, _ in files if path in chosen] for split, chosen in splits.items()}
        open_ids = functools.partial(_open_ids, spec, files, splits)
        return Corpus(short, source, True, None, tuple(splits), bytes=size, notes=tuple(notes), ids=open_ids)
    tables = {path for path in paths if has_rows(path)}
    if files[0][0] not in tables and looks_like_json(files[0][0]):
        fix = "to read only the values of text_column, rename such files to .jsonl or .json"
        notes.append(f"{location(spec, files[0][0])}: is read as plain text, but contains JSON; {fix}")
    source |= {"column": column} if tables else {}
    source |= {"lines": True} if lines else {}
    is_single = len(files) == 1 and not tables and not lines

    # an empty file is not a document
    sizes = [n_bytes for path, n_bytes, _ in files if path in splits["train"] and n_bytes]
    sizes = None if tables or lines else sizes

    def read_one(path, bad):
        try:
            yield from read_text(spec, path) if is_single else read_file(spec, path, column, lines, bad)
        except OSError as error:  # for example, because the file is truncated or was deleted in the meantime
            problem = f"{location(spec, path)}: {error.strerror or error}"
            if is_single:
                raise ValueError(f"{problem}; restore the file, or set `corpus` to another path") from None
            bad(problem)
        except MemoryError:
            raise ValueError(
                f"{location(spec, path)}: is larger than the memory; split it into smaller files"
            ) from None

    def read(split, bad):
        return itertools.chain.from_iterable(read_one(path, bad) for path, _, _ in files if path in splits[split])

    def parts(split):
        chosen = [(path, n_bytes) for path, n_bytes, _ in files if path in splits[split]]
        least, size, groups = sum(n_bytes for _, n_bytes in chosen) / MOST_PARTS, 0, []
        for path, n_bytes in chosen:
            if not groups or size >= least:
                size = 0
                groups.append([])
            groups[-1].append(path)
            size += n_bytes
        return [lambda bad, group=group: (text for path in group for text in read_one(path, bad)) for group in groups]

    def first(bad):
        for number, (path, _, _) in enumerate(files):
            if number == 0 or path in tables:
                yield from itertools.islice(read_one(path, bad), 1)

    return Corpus(
        short,
        source,
        is_single,
        read,
        tuple(splits),
        parts=parts,
        bytes=_text_bytes(states, paths),
        sizes=sizes,
        first=first,
        skipped=skipped,
        notes=tuple(notes),
    )


def _text_bytes(states, paths):
    """Return the approximate bytes of text in some files, assuming that compression reduces a text to a third."""
    return sum(states[path][0] * (3 if _is_compressed(path) else 1) for path in paths)


def _find_splits(spec, states, split_by):
    """Return ({split: paths}, notes for the user). The only split is "train" if the file names do not define splits.

    states: {path: (bytes, modification time)}.

    Raises:
        ValueError: split_by=name is set, but the file names do not define splits; or split_by=auto is set, and the
            validation files are larger than the training files.
    """
    names = {_relative(path, _search_root(spec)): path for path in states}
    is_possible = split_by != "val_fraction" and len(states) > 1
    sizes = {name: states[path][0] for name, path in names.items()}
    found = splits_by_name(sizes, is_asked=split_by == "name") if is_possible else {}
    if split_by == "name" and not found:
        raise ValueError(no_splits(f"corpus={spec}"))
    if not found:
        possible = splits_by_name(sizes, is_asked=True) if is_possible else {}
        named = _some([name for split in possible.values() for name in split[:1]])
        note = f"corpus={spec}: file names such as {named} are not used as splits; to use them, set split_by=name"
        return {"train": list(states)}, [note] * bool(possible)
    splits = {split: [names[name] for name in chosen] for split, chosen in found.items()}
    sizes = {split: _text_bytes(states, chosen) for split, chosen in splits.items()}
    if split_by == "auto" and sizes.get("val", 0) > sizes["train"]:
        refuse_larger_val(f"corpus={spec}", data_size(sizes["val"]), data_size(sizes["train"]))
    notes = [
        f"corpus={spec}: {split} is {counted(len(chosen), 'file')} ({_some(chosen)})" for split, chosen in found.items()
    ]
    others = sorted(names.keys() - set(itertools.chain.from_iterable(found.values())))
    if others:
        left_out = f"skipping {counted(len(others), 'file')} without a split in the name ({_some(others)})"
        notes.append(f"corpus={spec}: {left_out}; set split_by=val_fraction to use all files")
    return splits, notes


def refuse_larger_val(place, val, train):
    """Raise ValueError, because val is larger than train. val, train: the sizes of these splits, as text."""
    raise ValueError(
        f"{place}: the validation files ({val}) are larger than the training files ({train}); rename the files, set "
        "split_by=name to use them as they are, or set split_by=val_fraction to ignore their names"
    )


def _some(names, limit=3):
    """Return the first `limit` names for a message, separated by commas."""
    return ", ".join(names[:limit]) + ", ..." * (len(names) > limit)


def _search_root(spec):
    """Return the folder that contains all files of a corpus setting: for a glob, the path before the first wildcard."""
    path = os.path.expanduser(spec)
    if os.path.isfile(path):
        return os.path.dirname(path) or "."
    while glob.has_magic(path) and not os.path.isdir(path):
        path = os.path.dirname(path)
    return path or "."


def _open_ids(spec, files, splits, tokenizer_size, val_fraction):
    """Return the splits of a corpus of token ids; see open_splits. files: [(path, bytes, modification time), ...]."""
    for path, *state in files:
        if file_state(path) != tuple(state):
            problem = "was changed or removed while the command was running"
            raise ValueError(f"{location(spec, path)}: {problem}; run the command again when the file is complete")
    return open_splits(splits, tokenizer_size, val_fraction, spec)


def _find_files(spec):
    """Return (root, paths, skipped, outputs) for a corpus setting.

    root: the folder that file names are relative to. paths: the files to read. skipped: {suffix: number of skipped
    files}. outputs: folders and files that are skipped because this package wrote them.
    """
    path = os.path.expanduser(spec)
    if is_remote(spec):
        paths, is_folder = find(spec)
        if not is_folder:
            return ".", without_companions(paths), {}, []
        names = {}
        for file in map(Path, paths):
            names.setdefault(file.parent, set()).add(file.name)
        paths, outputs = _without_outputs(spec, paths, lambda folder: names.get(folder, set()))
        outputs = [Path(folder).as_posix().replace(":/", "://", 1) for folder in outputs]
        return spec, *_find_text_files(spec, paths), outputs
    if os.path.isfile(path):
        path = re.sub(r"\.idx$", ".bin", path)  # the index of a Megatron-LM file
        return os.path.dirname(path), [path], {}, []
    if os.path.isdir(path):
        if os.path.isfile(os.path.join(path, "run.yaml")):
            raise ValueError(f"corpus={spec}: a run folder, not a text; set `corpus` to another path")
        paths, outputs = _without_outputs(path, walk(path))
        return path, *_find_text_files(spec, paths, path), outputs
    if glob.has_magic(path):
        files = without_companions(filter(_is_file, glob.glob(path, recursive=True)))
        files, outputs = _without_outputs(_search_root(spec), files)
        if not files:
            only = " except files that this package wrote" if outputs else ""
            raise FileNotFoundError(f"corpus={spec}: no file matches this glob{only}; set `corpus` to another path")
        return ".", files, {}, outputs
    problem = "pipes, devices and sockets are not supported; write the text to a file"
    if os.path.islink(path) and not os.path.exists(path):
        problem = "broken link; fix the link"
    raise ValueError(f"corpus={spec}: {problem}, or set `corpus` to another path")


def _find_text_files(spec, paths, folder=None):
    """Return (paths of the files to read, {suffix: number of skipped files}).

    paths: all files in the folder of the corpus and its subfolders. folder: this folder, or None if it is at a URL.
    """
    suffixes = TEXT_SUFFIXES + TABLE_SUFFIXES
    files = [file for file in paths if suffix_of(file) in suffixes and _is_file(file)]
    if files and folder and (token_file := find_unexpected(folder)):
        globs = " or ".join(quoted(os.path.join(spec, "*" + suffix_of(str(path)))) for path in (token_file, files[0]))
        raise ValueError(f"corpus={spec}: contains both text and token files ({token_file.name}); set corpus={globs}")
    if not files and folder and _is_prepared(os.listdir(folder)):
        raise ValueError(f"corpus={spec}: contains prepared data, not text; set data_dir={quoted(spec)} instead")
    if not files and folder and (token_files := find_token_files(folder)):
        return [str(path) for path in token_files], {}
    if all(map(is_about, files)):  # no text files; next to text files, .json files are probably settings
        files = [file for file in paths if suffix_of(file) == ".json" and _is_file(file) and has_rows(file)] or files
    if not files:
        raise ValueError(
            f"corpus={spec}: contains no text file ({' '.join(suffixes)}); for other suffixes use a glob such as "
            + quoted(os.path.join(spec, "*.log"))
        )
    skipped = Counter(map(suffix_of, paths)) - Counter(map(suffix_of, files))
    return files, {suffix or "without a suffix": count for suffix, count in skipped.items()}


def _without_outputs(root, paths, names_in=os.listdir):
    """Return (paths that this package did not write, the folders and files that it wrote).

    root: the folder of the corpus, which never counts as output. names_in: function that returns the names of the files
    in a folder.
    """

    @functools.cache
    def output_folder(folder):
        if len(folder.parts) <= len(Path(root).parts) or folder == Path(root):
            return None
        return output_folder(folder.parent) or (folder if _is_output(set(names_in(folder))) else None)

    owners = [(path, output_folder(Path(path).parent) or (path if _is_report(path) else None)) for path in paths]
    return [path for path, owner in owners if not owner], sorted({str(owner) for _, owner in owners if owner})


def _is_report(path):
    """Return whether a local file is a page written by `nanogpt-accel report`, with images next to it."""
    stem, suffix = os.path.splitext(path)
    if suffix.lower() not in (".html", ".htm") or not os.path.isfile(f"{stem}-loss.png"):
        return False
    with suppress(OSError), open(path, "rb") as file:
        return b'content="nanogpt-accel report"' in file.read(1000)
    return False


def _is_output(names):
    """Return whether a folder with these files contains a run, prepared data, or the weights of a model."""
    has_weights = any(name.endswith((".bin", ".safetensors")) for name in names)
    return "run.yaml" in names or _is_prepared(names) or ("config.json" in names and has_weights)


def _is_prepared(names):
    """Return whether a folder with these files contains prepared data."""
    return "manifest.json" in names and any(name == "tokenizer.json" or name.endswith(".bin") for name in names)


def _describe_outputs(spec, outputs):
    """Return a list with one note about the skipped output of this package, or an empty list."""
    if not outputs:
        return []
    kinds = "such as runs, checkpoints, prepared data or reports"
    return [f"corpus={spec}: skipping {counted(len(outputs), 'output')} of nanogpt-accel, {kinds} ({_some(outputs)})"]


def walk(root, excluded=None):
    """Return the files in a folder and its subfolders, except hidden ones. excluded: regex for folder names to skip."""
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(".") and not (excluded and excluded.fullmatch(f))]
        paths += [os.path.join(folder, f) for f in files if not f.startswith(".")]
    return sorted(paths, key=lambda path: Path(path).parts)  # the same order on every system


def _check_formats(spec, files, lines):
    """Raise ValueError for unsupported formats, and for token files that are compressed or mixed with other files."""
    ids = [file for file in files if is_token_file(re.sub(r"\.(gz|zst)$", "", file))]
    if ids and (lines or len(ids) < len(files) or any(map(_is_compressed, ids))):
        raise ValueError(
            f"{location(spec, ids[0])}: contains token ids, which cannot be compressed or mixed with text; "
            "decompress .gz and .zst files, remove text files from the path, and do not set lines=true"
        )
    if ids and is_remote(ids[0]):
        raise ValueError(
            f"{location(spec, ids[0])}: token ids must be on this machine, because training reads them in random "
            "order; download the files, and set corpus to the copy"
        )
    if other := [file for file in files if suffix_of(file) in OTHER_SUFFIXES]:
        raise ValueError(
            f"{location(spec, other[0])}: {suffix_of(other[0])} is not supported; unpack the file, or convert it to "
            f"plain text or {', '.join(TABLE_SUFFIXES)}, optionally compressed (.gz, .zst)"
        )


def _relative(path, root):
    """Return a path relative to a folder, with slashes. On Windows, a path on another drive stays absolute."""
    with suppress(ValueError):
        path = os.path.relpath(path, root or ".")
    return Path(path).as_posix()


def _sort(root, paths):
    """Return [(name relative to the root, path), ...], sorted by name. For token files, 2.bin is before 10.bin."""
    named = sorted((_relative(path, root), path) for path in paths)
    return sorted(named, key=lambda file: natural_order(file[0])) if is_token_file(paths[0]) else named


def _is_file(path):
    """Return whether a path is a URL, a regular file or a broken link. A broken link is not skipped, so that reading it
    raises an error."""
    return is_remote(path) or os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))


def _is_compressed(path):
    return name_of(path).lower().endswith((".gz", ".zst", ".parquet"))
