"""Recognize training, validation and test files by their names, as `datasets` does: train.txt, wiki.valid.tokens,
test-00000-of-00002.parquet, or the folders train/ and dev/.
"""

import re
from pathlib import PurePosixPath

from .readers import suffix_of

# the words of datasets.data_files.DEFAULT_SPLIT_KEYWORDS
WORDS = {
    "train": ("train", "training"),
    "val": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF = {word: split for split, words in WORDS.items() for word in words}
PART_OF_WORD = re.compile("train|val|dev|test", re.IGNORECASE)  # a fast first test: each word in WORDS has one of these
# For these files, only folder names define a split, because train.py and docs/test.md usually belong to a program.
CODE_SUFFIXES = tuple(".md .rst .tex .html .py .c .h .cc .cpp .hpp .cu .rs .go .java .js .ts .sh .sql .r .jl".split())
# names of files that describe the data
ABOUT = re.compile(r"(readme|licen[sc]e|changelog|citation|notice|authors)\b", re.IGNORECASE)


def splits_by_name(sizes, is_asked=False):
    """Assign files to splits by the words in their names. A folder name has priority over the name of the file.

    The names define splits only if there are a training file and a file of another split. If some files have no split
    word, two more conditions apply: a training file and a validation or test file have the same name except for the
    split word, and the files with a split word contain more than half of the bytes. Without these conditions, a text
    such as training_day.txt in a folder of texts could define a split. Files that describe the data, such as README.md,
    do not need a split word.

    Args:
        sizes: {path relative to the corpus folder, with slashes: bytes}.
        is_asked: whether the user set split_by=name. If so, the two conditions do not apply.

    Returns:
        {split: [path, ...]}, "train" first, or {} if the names do not define splits.
    """
    for use_folders in (True, False):  # second attempt without folder names, for test/train.txt and test/val.txt
        found = {name: word for name in sizes if (word := _find_word(name, use_folders))}
        splits = {split: [name for name in sizes if name in found and found[name][0] == split] for split in WORDS}
        splits = {split: names for split, names in splits.items() if names}
        if "train" in splits and len(splits) > 1 and (is_asked or _are_splits(sizes, found)):
            return splits
    return {}


def no_splits(place):
    """Return the message for split_by=name if the names do not define splits. place: the setting and its value."""
    fix = "use names such as train.txt and valid.txt, or set split_by=auto"
    return f"split_by=name: the names of the files in {place} do not define splits; {fix}"


def is_about(name):
    """Return whether a file describes the data, such as README.md."""
    return bool(ABOUT.match(PurePosixPath(name).name))


def _are_splits(sizes, found):
    others = [name for name in sizes if name not in found]
    if all(is_about(name) for name in others):
        return True
    rests = {
        split: {rest for name, (of, rest) in found.items() if of == split and not _is_code(name)} for split in WORDS
    }
    has_pair = any(rests["train"] & rests[split] for split in ("val", "test"))
    return has_pair and sum(sizes[name] for name in found) > sum(sizes[name] for name in others)


def _find_word(name, use_folders):
    """Return (split, other words) for the first folder or file name in a path that has a split word, else None."""
    if not PART_OF_WORD.search(name):
        return None
    *folders, file = PurePosixPath(name).parts
    parts = folders if use_folders else []
    parts = parts if _is_code(name) else [*parts, _stem(file)]
    return next(filter(None, map(_split_of, parts)), None)


def _split_of(part):
    """Return (split, other words) of a name without suffix, or None if its words do not name exactly one split."""
    words = re.findall(r"[^\W\d_]+", re.sub(r"-\d+-of-\d+", "", part.lower()))
    splits = {SPLIT_OF[word] for word in words if word in SPLIT_OF}
    if len(splits) != 1:  # no split, or several as in train_test.txt
        return None
    return splits.pop(), tuple(word for word in words if word not in SPLIT_OF)


def _stem(file):
    stem, suffix = re.sub(r"\.(gz|zst)$", "", file.lower()), suffix_of(file)
    # keep the suffix of data.train, because it is a split word
    return stem if suffix.lstrip(".") in SPLIT_OF else stem.removesuffix(suffix)


def _is_code(name):
    return suffix_of(name) in CODE_SUFFIXES
