"""Find the token ids in files of other projects. The ids are read in place and never copied.

The layouts, with their sources (all numbers are little-endian):

- .bin of nanoGPT (karpathy/nanoGPT, data/openwebtext/prepare.py): only ids.
- .bin of llm.c and modded-nanogpt (karpathy/llm.c, dev/data/data_common.py): a header of 256 int32 (magic number,
  version, number of ids, zeros), then the ids. Magic number 20240520 and version 1 mean uint16 ids, and magic number
  20240801 and version 7 mean uint32 ids.
- .bin and .idx of Megatron-LM (NVIDIA/Megatron-LM, megatron/core/datasets/indexed_dataset.py): the .bin file has only
  ids. The .idx file has "MMIDIDX" and two zero bytes, version 1 (uint64), the code of the dtype (uint8), the number of
  sequences S (uint64), the number of document ends D (uint64), S lengths (int32), S offsets in bytes (int64), D
  document ends (int64), and optionally S modes (int8).
- .ds of datatrove (huggingface/datatrove, src/datatrove/pipeline/tokens/tokenizer.py): only ids, uint16 or uint32.
  NAME.ds.index has the position after each document (uint64). NAME.ds.metadata starts with a line such as `gpt2|2`: the
  tokenizer and the bytes per id.
- .npy (numpy, lib/format.py): one integer array, written by numpy.save.

If neither a header nor an index gives the type of the ids, it depends on the vocabulary size: uint16 up to 65,536,
otherwise uint32.
"""

import itertools
import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..utils.text import counted, one_line
from .corpus import location
from .file_splits import no_splits, splits_by_name
from .token_files import TokenFile

SUFFIXES = (".bin", ".npy", ".ds")
COMPANIONS = (".idx", ".ds.index", ".ds.metadata", ".ds.loss")  # files next to token files that contain no ids
LLMC = {20240520: (1, "uint16"), 20240801: (7, "uint32")}  # magic number -> version and dtype
LLMC_EVALUATION = 20240522  # magic number of files with multiple-choice questions, which are not supported
MEGATRON = b"MMIDIDX\0\0"
MEGATRON_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}  # other codes: floats
OTHER_TOKENIZER = "set tokenizer to the folder of the tokenizer.json that the ids were made with"
RESTORE = "restore the file, or use another one"
IDS_AT_ONCE = 2**22  # token ids per read


@dataclass(frozen=True)
class Layout:
    """The position and type of the token ids in a file."""

    dtype: str
    offset: int  # bytes before the first id
    tokens: int


def is_token_file(path):
    """Return whether a path has the suffix of a token file: .bin, .npy or .ds."""
    return str(path).lower().endswith(SUFFIXES)


def without_companions(paths):
    """Return the paths that are not index or metadata files of token files."""
    return [path for path in paths if not path.lower().endswith(COMPANIONS)]


def natural_order(name):
    """Return a key that sorts names by the numbers in them: 2.bin before 10.bin."""
    return [part.zfill(20) if part.isdigit() else part for part in re.split(r"(\d+)", str(name))]


def find_token_files(folder):
    """Return the .bin, .npy and .ds files of a folder, in order, or [] if they may not be token files.

    They are token files if one of them has the header or the index of a token file, or if their names define train and
    validation splits.
    """
    try:
        names = sorted((name for name in os.listdir(folder) if not name.startswith(".")), key=natural_order)
    except OSError:
        return []
    paths = [Path(folder) / name for name in names if is_token_file(name) and (Path(folder) / name).is_file()]
    # .bin files next to a tokenizer.json may be from Writer.finish(), which moves manifest.json to the folder last
    is_certain = "tokenizer.json" not in names and _are_named(paths)
    return paths if is_certain or any(map(_has_known_content, paths)) else []


def find_unexpected(folder):
    """Return a token file that does not belong in a folder of text, or None.

    nanoGPT writes train.bin and val.bin next to the text, so .bin files without a header do not count. .npy files count
    only if their names define train and validation splits.
    """
    paths = find_token_files(folder)
    arrays = [path for path in paths if path.suffix.lower() == ".npy"]
    if _are_named(arrays):
        return arrays[0]
    return next((path for path in paths if path not in arrays and _has_known_content(path)), None)


def _has_known_content(path):
    try:
        return find_layout(path) is not None
    except ValueError:  # a damaged file; find_layout reports it when the folder is opened
        return path.suffix.lower() != ".npy"


def find_layout(path, spec=None):
    """Return the Layout of a file from its header or index, or None if the file has neither.

    spec: the corpus setting, for messages. Raises ValueError if the file cannot be read, if its header or index is
    damaged, or if the file does not have the size that the header or index requires.
    """
    path = Path(path)
    place = _place(path, spec)
    try:
        layout = _read_layout(path, place)
        size = path.stat().st_size
    except OSError as error:
        raise ValueError(f"{place}: {error.strerror or error}; {RESTORE}") from None
    expected = layout and layout.offset + layout.tokens * np.dtype(layout.dtype).itemsize
    if layout and size != expected:
        raise ValueError(
            f"{place}: {size:,} bytes, but its header or index requires {expected:,} "
            f"({counted(layout.tokens, 'token')} as {layout.dtype}); {RESTORE}"
        )
    return layout


def _place(path, spec):
    return location(spec, str(path)) if spec else str(path)


def _read_layout(path, place):
    if path.suffix.lower() == ".npy":
        return _read_npy(path, place)
    if path.suffix.lower() == ".ds":
        return _read_datatrove(path, place)
    with open(path, "rb") as file:
        head = file.read(1024)
    if len(head) >= 4 and int.from_bytes(head[:4], "little") in (*LLMC, LLMC_EVALUATION):
        return _read_llmc(head, place)
    index = path.with_suffix(".idx")
    if index.is_file():
        return _read_megatron(index, place)
    _refuse_other_header(head, path.stat().st_size, place)
    return None


def _refuse_other_header(head, size, place):
    """Raise ValueError if a file of `size` bytes starts with a header like llm.c's, but with another magic number.

    Such a header has 256 int32, most of them 0. In addition, the first number looks like a date, such as 20240326 in
    llm.c's model files, or the third number is the number of ids in the file.
    """
    numbers = np.frombuffer(head[: len(head) // 4 * 4], "<i4")
    if len(numbers) < 256 or numbers[32:].any():
        return
    magic, count = int(numbers[0]), int(numbers[2])
    if 20240000 <= magic < 20300000 or (count and size in (1024 + 2 * count, 1024 + 4 * count)):
        known = " or ".join(map(str, LLMC))
        raise ValueError(
            f"{place}: starts like a file of llm.c, but its magic number {magic} is not that of token files "
            f"({known}); use another file, or remove the header"
        )


def _read_llmc(head, place):
    magic, version, tokens = struct.unpack("<3i", head[:12].ljust(12, b"\0"))
    if magic == LLMC_EVALUATION:
        raise ValueError(f"{place}: contains multiple-choice questions of llm.c, not training data; use another file")
    expected, dtype = LLMC[magic]
    if len(head) < 1024 or version != expected or tokens <= 0:
        raise ValueError(
            f"{place}: the llm.c header (magic {magic}) is damaged: it has {len(head):,} bytes, version {version} and "
            f"{tokens:,} tokens, but 1,024 bytes, version {expected} and at least 1 token are required; {RESTORE}"
        )
    return Layout(dtype, 1024, tokens)


def _read_megatron(index, place):
    size = index.stat().st_size
    with open(index, "rb") as file:
        head = file.read(34)
        if len(head) < 34 or not head.startswith(MEGATRON):
            raise ValueError(f"{place}: {index.name} is not a Megatron-LM index (MMIDIDX); restore or remove it")
        version, code, sequences, documents = struct.unpack("<QBQQ", head[9:])
        dtype = MEGATRON_DTYPES.get(code)
        if version != 1 or dtype is None:
            problem = f"{index.name} has version {version} and dtype code {code}"
            raise ValueError(f"{place}: {problem}, but version 1 and an integer dtype are required; {RESTORE}")
        expected = 34 + 12 * sequences + 8 * documents
        if size not in (expected, expected + sequences):
            problem = f"{index.name} has {size:,} bytes, but its header requires {expected:,}"
            raise ValueError(f"{place}: {problem} ({sequences:,} sequences, {documents:,} document ends); {RESTORE}")
        lengths = np.fromfile(file, "<i4", sequences).astype(np.int64)
        offsets = np.fromfile(file, "<i8", sequences)
    ends = np.cumsum(lengths) * np.dtype(dtype).itemsize
    if not sequences or lengths.min() < 0 or offsets[0] != 0 or (offsets[1:] != ends[:-1]).any():
        raise ValueError(f"{place}: the sequences in {index.name} are not stored one after the other; {RESTORE}")
    return Layout(dtype, 0, int(lengths.sum()))


def _read_datatrove(path, place):
    """Return the Layout of a .ds file, or None if no index or metadata file gives the number of bytes per id."""
    size = path.stat().st_size
    index, metadata = (path.with_name(f"{path.name}.{end}") for end in ("index", "metadata"))
    if index.is_file():
        ends = np.fromfile(index, "<u8")
        tokens = int(ends[-1]) if len(ends) else 0
        is_sorted = index.stat().st_size % 8 == 0 and not (ends[1:] < ends[:-1]).any()
        if not is_sorted or size not in (2 * tokens, 4 * tokens):
            raise ValueError(
                f"{place}: has {size:,} bytes, and {index.name} lists {counted(tokens, 'token')}, but 2 or 4 bytes per "
                f"token and increasing document offsets are required; {RESTORE}"
            )
        return Layout("uint16" if size == 2 * tokens else "uint32", 0, tokens)
    if metadata.is_file():
        with open(metadata, "rb") as file:
            n_bytes = file.readline(1000).strip().rpartition(b"|")[2]
        if n_bytes in (b"2", b"4"):
            return Layout("uint16" if n_bytes == b"2" else "uint32", 0, size // int(n_bytes))
    return None


def _read_npy(path, place):
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with open(path, "rb") as file:
            shape, is_fortran, dtype = read_header[np.lib.format.read_magic(file)](file)
            offset = file.tell()
    except OSError:
        raise
    except Exception as error:  # a damaged header can raise almost any exception
        raise ValueError(f"{place}: not a numpy.save file ({one_line(error, 80)}); {RESTORE}") from None
    is_sequence = dtype.kind in "iu" and dtype.byteorder != ">" and (len(shape) == 1 or (shape and not is_fortran))
    if not is_sequence or min(shape) < 0:
        problem = f"an array of {dtype} with shape {shape}, not a sequence of ids"
        raise ValueError(
            f"{place}: {problem}; save a little-endian integer array in C order, such as ids.astype('<u2')"
        )
    return Layout(dtype.name, offset, math.prod(shape))


def open_splits(splits, tokenizer_size, val_fraction, spec=None):
    """Return {"train": TokenFile, "val": TokenFile, optionally "test": TokenFile} for token files.

    If there are no files for val, the last part of the training ids is val, as in nanoGPT.

    Args:
        splits: {split: paths of its token files, in order}.
        tokenizer_size: vocabulary size, which determines the dtype of files without a header or index.
        val_fraction: share of the ids that val gets if there are no files for val.
        spec: the corpus setting, for messages.
    """
    paths = [Path(path) for path in itertools.chain.from_iterable(splits.values())]
    suffixes = sorted({path.suffix.lower() for path in paths})
    place = f"corpus={spec}" if spec else str(paths[0].parent)
    if len(suffixes) > 1:
        problem = f"contains token files with the suffixes {', '.join(suffixes)}, which may store the same ids twice"
        raise ValueError(f"{place}: {problem}; set corpus to the files with one suffix, such as '*{suffixes[0]}'")
    layouts = {path: find_layout(path, spec) or _headerless(path, tokenizer_size, spec) for path in paths}
    paths = [path for path in paths if layouts[path].tokens]  # skip empty files, which datatrove may write
    if not any(layouts[Path(path)].tokens for path in splits["train"]):
        raise ValueError(f"{place}: the training files contain no token ids; use other files")
    if len(dtypes := sorted({layouts[path].dtype for path in paths})) > 1:
        raise ValueError(
            f"{place}: the token files have different types ({', '.join(dtypes)}); set corpus to files of one type"
        )
    found = {}
    for split, chosen in splits.items():
        chosen = [path for path in map(Path, chosen) if path in paths]
        spans = [(layouts[path].offset, layouts[path].tokens) for path in chosen]
        if chosen:
            found[split] = TokenFile(chosen, dtypes[0], spans)
    if "val" not in found:
        train = found["train"]
        cut = cut_index(len(train), val_fraction, "token ids", place)
        found |= {"train": part_of(train, 0, cut), "val": part_of(train, cut, len(train))}
    return {split: found[split] for split in ("train", "val", "test") if split in found}


def _headerless(path, tokenizer_size, spec):
    """Return the Layout of a file that contains only ids."""
    dtype, size = np.dtype(np.uint16 if tokenizer_size <= 2**16 else np.uint32), path.stat().st_size
    place = _place(path, spec)
    form = f"{dtype.name} ids of a tokenizer with vocabulary size {tokenizer_size:,}"
    if size == 0 or size % dtype.itemsize:
        raise ValueError(f"{place}: {size:,} bytes cannot be {form} ({dtype.itemsize} bytes per id); {RESTORE}")
    ids, other = np.fromfile(path, dtype, 4096), None
    if ids.nbytes > 64 and not ids.tobytes().translate(None, bytes(range(32, 127)) + b"\t\r\n"):
        other = "text"
    elif len(ids) > 64 and np.count_nonzero(ids[::2]) > len(ids) // 8 and not ids[1::2].any():
        other = f"integers of more than {8 * dtype.itemsize} bits (every second id is 0)"
    if other:
        raise ValueError(f"{place}: looks like {other}, not like {form}; write the ids as {dtype.name}")
    return Layout(dtype.name, 0, size // dtype.itemsize)


def find_splits(paths, split_by="auto"):
    """Return {split: paths} for the files of a folder. If the file names do not define splits, all files are train.

    split_by: see recipe.Data. Raises ValueError if it is "name", and the file names do not define splits.
    """
    sizes = {path.name: path.stat().st_size for path in paths}
    found = splits_by_name(sizes, is_asked=split_by == "name") if split_by != "val_fraction" else {}
    if split_by == "name" and not found:
        raise ValueError(no_splits(f"data_dir={paths[0].parent}"))
    return {split: [path for path in paths if path.name in names] for split, names in found.items()} or {"train": paths}


def _are_named(paths):
    """Return whether the file names define a training and a validation split."""
    return {"train", "val"} <= find_splits(paths).keys()


def cut_index(length, val_fraction, unit, place):
    """Return the index where val starts in a text or sequence of ids, as in nanoGPT.

    unit: "characters" or "token ids". place: prefix of the message. Raises ValueError if a split would be empty.
    """
    cut = int(length * (1 - val_fraction))  # nanoGPT's int(n*0.9)
    for split, size in (("train", cut), ("val", length - cut)):
        if not size:
            raise ValueError(
                f"{place}: has {length:,} {unit}, so the {split} split would be empty with "
                f"val_fraction={val_fraction}; use a larger corpus or change val_fraction"
            )
    return cut


def part_of(tokens, start, end):
    """Return the part of a TokenFile from the id at `start` to the id at `end` - 1, as a TokenFile."""
    paths, spans, first = [], [], 0
    for path, (offset, count) in zip(tokens.paths, tokens.spans, strict=True):
        low, high = max(start - first, 0), min(end - first, count)
        if low < high:
            paths.append(path)
            spans.append((offset + low * tokens.dtype.itemsize, high - low))
        first += count
    return TokenFile(paths, tokens.dtype, spans)


def read_ids(spec, tokens, vocab_size):
    """Yield all ids of a TokenFile as arrays. spec: the corpus setting, for messages.

    Raises ValueError if a file cannot be read or has an id that is not in the vocabulary.
    """
    for path, (offset, count) in zip(tokens.paths, tokens.spans, strict=True):
        part, place = TokenFile(path, tokens.dtype, [(offset, count)]), location(spec, str(path))
        for start in range(0, count, IDS_AT_ONCE):
            try:
                (ids,) = part.rows([start], min(IDS_AT_ONCE, count - start))
            except OSError as error:
                raise ValueError(f"{place}: {error.strerror or error}; {RESTORE}") from None
            if ids.min() < 0 or ids.max() >= vocab_size:
                i = int(np.argmax((ids < 0) | (ids >= vocab_size)))
                position = offset + (start + i) * tokens.dtype.itemsize
                raise ValueError(
                    f"{place}: contains the id {ids[i]:,} at byte {position:,}, but the tokenizer has vocabulary size "
                    f"{vocab_size:,}; {OTHER_TOKENIZER}"
                )
            yield ids


def file_entries(tokens, folder=None):
    """Return the list "files" that the manifest stores for a split. It contains absolute paths if `folder` is None.
    Otherwise, all files are in `folder`, and the list contains their names."""
    names = [path.name if folder else os.path.abspath(path) for path in tokens.paths]
    return [
        {"name": name, "tokens": count} | ({"offset": offset} if offset else {})
        for name, (offset, count) in zip(names, tokens.spans, strict=True)
    ]
