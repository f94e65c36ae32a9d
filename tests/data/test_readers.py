"""readers.py: the documents and token ids of every format, and one-line errors for damaged files."""

import csv
import gzip
import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import (
    DOCS,
    FORMATS,
    GOOD,
    documents_found,
    error_line,
    expect,
    ids,
    packed,
    refusal,
    section,
    small_corpus_and_recipe,
    text_with_spaces,
    texts,
)

from nanogpt_accel.__main__ import main
from nanogpt_accel.data import dataset, foreign_tokens, prepare, readers, sources


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_corpus_and_recipe()
    return tmp_path


# ---- documents of a file


def test_a_document_keeps_its_line_ends_and_delimiters():
    texts = ["a\r\nb\n\n", 'say "x, y"\r', "\n", "tab\there ", "  two  spaces  "]
    for name in ("x.csv", "x.tsv", "x.jsonl", "x.parquet"):
        FORMATS[name](name, texts)
        assert list(sources.find_corpus(name).documents()) == texts, name
    Path("x.txt").write_bytes(b"a\r\n\r\n b \xe2\x80\xa8c\x0cd\nlast")  # a line ends at \n and nowhere else
    assert list(sources.find_corpus("x.txt", lines=True).documents()) == ["a", " b \u2028c\x0cd", "last"]


def test_compressed_files_of_several_members_are_read_to_the_end():
    """pigz, bgzip and `cat a.gz b.gz` write such files."""
    raw = [b'{"text": "a"}\n', b'{"text": "b"}\n{"te', b'xt": "c"}\n']
    for name in ("x.jsonl.gz", "x.jsonl.zst"):
        Path(name).write_bytes(b"".join(packed(name, part) for part in raw))
        assert list(sources.find_corpus(name).documents()) == ["a", "b", "c"]


def test_a_csv_with_a_byte_order_mark():
    Path("x.csv").write_bytes("\ufefftext,n\r\na,1\r\nb,2\r\n".encode())
    assert list(sources.find_corpus("x.csv").documents()) == ["a", "b"]


def test_csv_rows_are_those_of_dictreader():
    """The same rows as csv.DictReader, with every kind of quotes that the csv module writes."""
    rows = [(i, text) for i, text in enumerate(["a", "b,c", '"q"', "x\ny", " s ", "\t", "'", "é\u2028", '""', "\\"])]
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC):
        for end in ("\n", "\r\n"):
            with open("t.csv", "w", encoding="utf-8", newline="") as file:
                csv.writer(file, quoting=quoting, lineterminator=end).writerows([("n", "text"), *rows])
            with open("t.csv", encoding="utf-8", newline="") as file:
                assert texts("t.csv") == [row["text"] for row in csv.DictReader(file)] == [text for _, text in rows]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_every_kind_of_text_of_arrow_is_text(kind):
    values = ["a", "ж€", "a", "", "b" * 100]
    column = pa.array(values).dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else pa.array(values, kind)
    pq.write_table(pa.table({"text": column}), "t.parquet")
    assert pq.read_schema("t.parquet").field("text").type == kind
    assert texts("t.parquet") == [text for text in values if text]


def test_a_byte_order_mark_is_no_text():
    mark = b"\xef\xbb\xbf"
    Path("t.txt").write_bytes(mark + "ж text\ufeff\n".encode())
    Path("t.jsonl").write_bytes(mark + b'{"text": "a"}\n{"text": "b"}\n')
    Path("t.tsv").write_bytes(mark + b"text\na\n")
    assert texts("t.txt") == ["ж text\ufeff\n"] and texts("t.txt", lines=True) == ["ж text\ufeff"]
    assert texts("t.jsonl") == ["a", "b"] and texts("t.tsv") == ["a"]


# ---- JSON, nested columns, and formats that their names do not tell


STORIES = ["One day.", 'ж€\n"quoted"', "The end."]
JSON = {
    "array": [{"story": text, "n": 1} for text in STORIES],
    "nested": [{"content": {"story": text}} for text in STORIES],
    "key with a dot": [{"content.story": text} for text in STORIES],
    "in an object": {"version": 1, "data": [{"story": text} for text in STORIES]},
    "nested in an object": {"data": [{"a": {"story": text}} for text in STORIES]},
    "columns": {"n": [1, 2, 3], "story": STORIES},
    "rows of pandas": {str(i): {"story": text, "n": 1} for i, text in enumerate(STORIES)},
    "columns of pandas": {"n": {"0": 1, "1": 2, "2": 3}, "story": dict(zip("012", STORIES, strict=True))},
}
COLUMNS = ["story", "content.story", "content.story", "data.story", "data.a.story", "story", "story", "story"]


@pytest.mark.parametrize(("form", "column"), list(zip(JSON, COLUMNS, strict=True)))
@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_a_json_array_of_objects(form, column, suffix):
    for indent, mark in ((None, b""), (2, b"\xef\xbb\xbf")):
        Path(f"a{suffix}").write_bytes(packed(suffix, mark + json.dumps(JSON[form], indent=indent).encode()))
        assert texts(f"a{suffix}", text_column=column) == STORIES
    assert sources.find_corpus(f"a{suffix}", text_column=column).source["column"] == column
    if suffix == ".json":
        with pytest.raises(ValueError) as caught:
            texts("a.json", text_column="wrong")
        problem, columns = str(caught.value).split("; set text_column to one of ")
        assert problem == "corpus=a.json: no column wrong"
        assert set(columns.split(", ")) - {"version", "n"} == {column}


def test_other_json_files():
    Path("a.json").write_text(json.dumps(STORIES))
    assert texts("a.json") == STORIES
    Path("a.json").write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES))
    assert texts("a.json") == STORIES
    Path("a.json").write_text(json.dumps({"text": STORIES[0]}, indent=1))
    assert texts("a.json") == STORIES[:1]
    Path("a.json").write_text(json.dumps({"text": {"title": "a", "body": "b"}}))  # not rows
    with pytest.raises(ValueError, match="set text_column to one of text.title, text.body$"):
        texts("a.json")
    Path("a.json").write_text("1\n2\n")
    assert texts("a.json") == ["1\n2\n"] and sources.find_corpus("a.json").is_single


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b'[{"text": "a"}, {"text": "b"', ["a.json: not JSON"]),
        (b'[{"text": "a"}, {"text": 1}]', ["a.json, item 2", "under the key text"]),
        (b'[{"text": "a"}, {"text": "\\ud800"}]', ["a.json, item 2"]),
        (b'{"text": "a"}\n{"text": "b"}\n{"te', ["a.json, line 3", "not JSON"]),
        (b"{}", ["a.json: no column text; it has no columns"]),
        (b'[{"text": "\xe9"}]', ["a.json: not UTF-8", "iconv -f WINDOWS-1252"]),
    ],
)
def test_an_invalid_json_file(capsys, raw, words):
    Path("a.json").write_bytes(raw)
    expect(error_line(capsys, "corpus=a.json"), "corpus=", *words)


def test_json_in_a_text_file_is_reported():
    for text in (json.dumps(JSON["array"]), '{"text": "a"}\n{"text": "b"}\n'):
        Path("a.txt").write_text(text)
        corpus = sources.find_corpus("a.txt")
        assert list(corpus.documents()) == [text]
        assert "corpus=a.txt: is read as plain text, but contains JSON" in corpus.notes[0]
    Path("a.txt").write_text("[a note]\n{a set}\n")
    assert sources.find_corpus("a.txt").notes == ()


def test_a_column_of_a_struct():
    rows = [{"content": {"text": text, "meta": {"title": text[::-1], "n": 1}}, "n": 2} for text in STORIES]
    Path("x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist([*rows, {"content": None, "n": 3}]), "x.parquet")
    problems = []
    for name in ("x.jsonl", "x.parquet"):
        for column, expected in (("content.text", STORIES), ("content.meta.title", [text[::-1] for text in STORIES])):
            found = sources.find_corpus(name, text_column=column)
            assert list(found.documents(bad=problems.append)) == expected
        for column in ("content", "content.meta", "content.x"):
            with pytest.raises(ValueError) as caught:
                texts(name, text_column=column)
            names = "content.text, content.meta.title, content.meta.n, n"
            assert set(str(caught.value).split("set text_column to one of ")[1].split(", ")) == set(names.split(", "))
    assert len(problems) == 2 and all("x.parquet, row 4" in problem for problem in problems)


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("x.csv", b"n;text\n1;a\n2;b, c\n"),
        ("x.csv", b'\xef\xbb\xbftext;n\r\na;1\r\n"b, c";2\r\n'),
        ("x.csv", b"n\ttext\n1\ta\n2\tb, c\n"),
        ("x.csv", b"n|text\n1|a\n2|b, c\n"),
        ("x.tsv", b'n,text\n1,a\n2,"b, c"\n'),
    ],
)
def test_a_table_with_another_delimiter(name, raw):
    Path(name).write_bytes(raw)
    assert texts(name) == ["a", "b, c"]
    with pytest.raises(ValueError) as caught:
        texts(name, text_column="story")
    assert str(caught.value).split(" one of ")[1] in ("n, text", "text, n")


def test_a_column_name_with_another_delimiter():
    Path("x.csv").write_text("text,a|text|b\na,1\nb c,2\n")
    assert texts("x.csv") == ["a", "b c"] and texts("x.csv", text_column="a|text|b") == ["1", "2"]


def test_column_names_in_messages_can_be_copied():
    Path("x.csv").write_text("n, text\n1,a\n")
    Path("many.json").write_text(json.dumps({f"c{i}": i for i in range(1000)}))
    for name, names in (("x.csv", "n, ' text'"), ("many.json", ", ".join(f"c{i}" for i in range(20)) + ", ...")):
        with pytest.raises(ValueError) as caught:
            texts(name)
        assert str(caught.value).split("set text_column to one of ")[1] == names
    assert texts("x.csv", text_column=" text") == ["a"]


def test_compressed_files_with_another_name():
    rows = "".join(json.dumps({"text": text}) + "\n" for text in STORIES).encode()
    for name, raw in (("x.jsonl", rows), ("x.csv", b"text\na\n"), ("x.txt", b"a text"), ("x.json", b'["a"]')):
        plain = texts_of(name, raw)
        for packer in (".gz", ".zst"):
            assert texts_of(name, packed(packer, raw)) == plain


def texts_of(name, raw):
    Path(name).write_bytes(raw)
    return texts(name)


@pytest.mark.skipif(not shutil.which("iconv"), reason="the messages recommend iconv")
@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16"])
@pytest.mark.parametrize("name", ["x.txt", "x y.txt", "x.txt.gz", "x.jsonl", "x.csv"])
def test_the_command_that_converts_a_file_works(capsys, name, encoding):
    text = "Größe: é\nна" if encoding == "utf-16" else "Größe: é\n"
    content = {".jsonl": json.dumps({"text": text}, ensure_ascii=False) + "\n", ".csv": f'text\n"{text}"\n'}
    content = content.get(Path(name).suffix, text)
    Path(name).write_bytes(packed(name, content.encode(encoding)))
    line = error_line(capsys, f"corpus={name}")
    command = line.split("convert it with `")[1].split("`")[0]
    subprocess.run(command, shell=True, check=True)
    assert texts(name) == [text]


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz"])
@pytest.mark.parametrize("chunk", [4, 5, 64, 1000, 2**20])
def test_plain_text_is_read_in_chunks_that_end_at_the_end_of_a_word(monkeypatch, name, chunk):
    monkeypatch.setattr(readers, "CHUNK", chunk)
    for text in (text_with_spaces(300), "ж€𝄞" * 100, "\ufeff \n", "\ufeffa b", "", "a" * 64, "é" * 32, " " * 64):
        Path(name).write_bytes(packed(name, text.encode()))
        parts = list(readers.read_text(name, name))
        assert "".join(parts) == text.removeprefix("\ufeff")
        assert all(part[-1:].strip() and after[:1] in " \t\r\n" for part, after in itertools.pairwise(parts) if after)
        if " " in text.strip() and len(text) > 300:
            assert (len(parts) > 1) == (chunk < len(text.encode()))
            assert max(map(len, parts)) < chunk + 199  # a chunk is longer if it ends in such white space
        assert list(readers.read_file(name, name, "text", False, pytest.fail)) == [text.removeprefix("\ufeff")]


@pytest.mark.parametrize("chunk", [4, 7, 2**20])
@pytest.mark.parametrize(
    "raw",
    [b"\xff", b"abc \xe4\xf6", b"ab c\xe2\x82", "aé ".encode() * 99 + b"\xe2", b"a " * 99 + b"\xc3 b", b"abc\xe2"],
)
def test_the_first_invalid_byte_is_named(monkeypatch, refused, chunk, raw):
    monkeypatch.setattr(readers, "CHUNK", chunk)
    Path("x.txt").write_bytes(raw)
    with pytest.raises(UnicodeDecodeError) as whole:
        raw.decode()
    with refused(ValueError, f"corpus=x.txt: not UTF-8 text at byte {whole.value.start}; ", "iconv"):
        list(readers.read_text("x.txt", "x.txt"))
    problems = []
    assert list(readers.read_file("x.txt", "x.txt", "text", False, problems.append)) == [] and len(problems) == 1


@pytest.mark.skipif(os.name == "nt", reason="names on Windows are Unicode")
def test_the_row_groups_of_a_parquet_file_that_were_read_are_freed():
    """pyarrow counts the memory that it has allocated."""
    pq.write_table(pa.table({"text": [os.urandom(1000).hex() for _ in range(10_000)]}), "x.parquet", row_group_size=500)
    before = pa.total_allocated_bytes()
    documents = readers.read_file("x.parquet", "x.parquet", "text", lines=False, bad=readers.refuse)
    most = max(pa.total_allocated_bytes() - before for _ in documents)
    assert os.path.getsize("x.parquet") > 20_000_000 and most < 10_000_000


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".jsonl.zst", ".parquet"])
def test_files_whose_names_are_not_utf8_are_read(suffix):
    Path("corpus").mkdir()
    pq.write_table(pa.table({"text": ["é"]}), "x.parquet")
    raw = b'{"text": "\xc3\xa9"}' if "json" in suffix else "é".encode()
    raw = Path("x.parquet").read_bytes() if suffix == ".parquet" else packed(f"x{suffix}", raw)
    Path("corpus", os.fsdecode(b"\xff") + suffix).write_bytes(raw)
    Path("corpus/a.txt").write_text("a")
    assert texts("corpus") == ["a", "é"]


@pytest.mark.parametrize("count", [1, 2])
def test_a_text_that_is_larger_than_the_memory(monkeypatch, refused, count):
    """Arrow raises a special exception for this, which must not be reported as a damaged file."""
    for number in range(count):
        Path(f"{number}.txt.gz").write_bytes(packed("x.txt.gz", b"abc" * 99))
    corpus = sources.find_corpus("*.txt.gz")

    def fail(*args):
        raise pa.ArrowMemoryError("malloc of size 99 failed")

    monkeypatch.setattr(pa, "CompressedInputStream", fail)
    with refused(ValueError, "corpus=*.txt.gz: 0.txt.gz: is larger than the memory", "split it"):
        list(corpus.documents())


def test_an_encoding_that_is_not_known(capsys):
    Path("x.txt").write_text("日本、語", encoding="shift_jis")
    line = error_line(capsys, "corpus=x.txt")
    assert "its encoding (such as GB18030) as ENCODING" in line
    assert "iconv -f ENCODING -t UTF-8 x.txt > x.txt.new" in line


@pytest.mark.parametrize(
    ("raw", "fix"),
    [
        (b"PK\x03\x04\xff", "zip archive, so unpack it"),
        (b"BZh9\xff", "bzip2 data, so decompress it"),
        (b"PAR1\xff", "parquet data, so give it the suffix .parquet"),
        (b"%PDF\xff", "PDF document, so convert it to text"),
    ],
)
def test_another_format_under_the_name_of_a_text(capsys, raw, fix):
    for name in ("x.txt", "x.jsonl"):
        Path(name).write_bytes(raw)
        line = error_line(capsys, f"corpus={name}")
        assert fix in line and "iconv" not in line


def test_a_character_that_the_tokenizer_of_another_run_lacks(capsys):
    for name, text in (("a.txt", "abc "), ("b.txt", "abcé ")):
        Path(name).write_text(f"{text * 100}\n" * 2)
    assert main(["prepare", "r.yaml", "corpus=a.txt", "lines=true", "tokenizer=char", "data_dir=first"]) == 0
    for words in ([], ["lines=true"]):
        line = error_line(capsys, "corpus=b.txt", *words, "tokenizer=first", "data_dir=second")
        expect(line, "tokenizer=first", "corpus=b.txt", "'é' (U+00E9)", "set tokenizer to gpt2 or bpe")
    assert main(["prepare", "r.yaml", "corpus=b.txt", "tokenizer=char", "data_dir=second"]) == 0


# ---- bad documents


def parquet(columns):
    pq.write_table(pa.table(columns), "t.parquet")
    return Path("t.parquet").read_bytes()


LONG = "".join(json.dumps({"text": text}) + "\n" for text in DOCS).encode()


BAD = [
    # the column is missing
    ("x.jsonl", lambda: b'{"story": "a", "n": 1}\n', ["no column text", "story, n", "text_column"]),
    ("x.csv", lambda: b"story,n\na,1\n", ["no column text", "story, n", "text_column"]),
    ("x.tsv", lambda: b"story\tn\na\t1\n", ["no column text", "story, n", "text_column"]),
    ("x.csv", lambda: b"", ["empty", "column names, such as text"]),
    ("x.parquet", lambda: parquet({"story": ["a"], "n": [1]}), ["no column text", "story, n", "text_column"]),
    # an invalid line
    ("x.jsonl", lambda: b'{"text": "a"}\n{"text": "b"\n', ["x.jsonl, line 2", "not JSON", "skip_bad_documents=true"]),
    ("x.jsonl.gz", lambda: gzip.compress(b'{"text": "a"}\n\n{"text": "b"\n'), ["x.jsonl.gz, line 3", "not JSON"]),
    (
        "x.jsonl",
        lambda: b'{"text": "a"}\n["b"]\n',
        ["x.jsonl, line 2", "not a JSON object with a string under the key text"],
    ),
    ("x.jsonl", lambda: b'{"text": "a"}\n"text"\n', ["x.jsonl, line 2", "not a JSON object"]),
    ("x.jsonl", lambda: b'{"text": "a"}\n{"n": 1}\n', ["x.jsonl, line 2", "not a JSON object"]),
    ("x.jsonl", lambda: b'{"text": "a"}\n{"text": null}\n', ["x.jsonl, line 2", "not a JSON object"]),
    ("x.jsonl", lambda: b'{"text": 3}\n', ["x.jsonl, line 1", "not a JSON object with a string under the key text"]),
    ("x.csv", lambda: b"n,text\n1,a\n2\n", ["x.csv, line 3", "the row has no value in column text"]),
    # not UTF-8
    ("x.jsonl", lambda: b'{"text": "a"}\n{"text": "b\xff"}\n', ["x.jsonl, line 2", "not UTF-8", "byte 11"]),
    ("x.csv", lambda: b"text\na\nb\xff\n", ["x.csv", "line 3", "not UTF-8"]),
    # a file that is cut off
    *[
        (
            f"x.jsonl{suffix}",
            lambda suffix=suffix, cut=cut: packed(suffix, LONG)[:cut],
            [f"x.jsonl{suffix}", f"not a complete {kind} file"],
        )
        for suffix, kind in ((".gz", "gzip"), (".zst", "zstd"))
        for cut in (1, 1000, -1)
    ],
    ("x.jsonl.gz", lambda: LONG, ["x.jsonl.gz", "not a complete gzip file"]),
    ("x.jsonl.zst", lambda: LONG, ["x.jsonl.zst", "not a complete zstd file"]),
    ("x.txt.gz", lambda: gzip.compress(LONG)[:-5], ["x.txt.gz", "not a complete gzip file"]),
    ("x.parquet", lambda: parquet({"text": DOCS})[:-1], ["x.parquet", "not a complete parquet file"]),
    ("x.parquet", lambda: parquet({"text": DOCS})[:1000], ["x.parquet", "not a complete parquet file"]),
    ("x.parquet", lambda: b"", ["x.parquet", "not a complete parquet file"]),
    ("x.parquet", lambda: LONG, ["x.parquet", "not a complete parquet file"]),
    # no text
    ("x.parquet", lambda: parquet({"text": [1, 2]}), ["x.parquet", "text contains int64, not text", "text_column"]),
    ("x.parquet", lambda: parquet({"text": [["a"]]}), ["x.parquet", "text contains list<", "not text"]),
    ("x.parquet", lambda: parquet({"text": ["a", None, "b"]}), ["x.parquet, row 2", "column text is null"]),
    ("x.parquet", lambda: parquet({"text": ["", ""]}), ["corpus=x.parquet", "contains no text"]),
    ("x.jsonl", lambda: b"\n\n", ["corpus=x.jsonl", "contains no text"]),
    ("x.csv", lambda: b"text\n", ["corpus=x.csv", "contains no text"]),
    ("x.jsonl.gz", lambda: b"", ["corpus=x.jsonl.gz", "contains no text"]),
    # only one document
    ("x.jsonl", lambda: b'{"text": "a"}\n{"text": ""}\n', ["corpus=x.jsonl", "1 characters, so the train split would"]),
]


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [pytest.param(*row, id=f"{i}-{row[0]}-{row[2][1]}".replace("/", " ")) for i, row in enumerate(BAD)],
)
@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_one_line_for_bad_input(capsys, name, make, words, tokenizer):
    Path(name).write_bytes(make())
    line = refusal(capsys, f"corpus={name}", f"tokenizer={tokenizer}", "vocab_size=300")
    assert [word for word in words if word not in line] == [], line


def test_a_line_of_text_that_is_not_utf8(capsys):
    Path("x.txt").write_bytes(b"a\nb\xff\nc\n")
    line = refusal(capsys, "corpus=x.txt", "lines=true")
    assert "x.txt, line 2: not UTF-8 text at byte 1 of the line" in line


@pytest.mark.parametrize(
    "text",
    [r'"\ud83d x"', '"x", "n": ' + "9" * 5000, '"x", "n": ' + "[" * 200_000],
    ids=["half a surrogate pair", "a number of 5000 digits", "200,000 brackets"],
)
def test_json_that_python_stumbles_over(capsys, text):
    Path("x.jsonl").write_text(f'{{"text": "a"}}\n{{"text": {text}}}\n{{"text": "b"}}\n')
    assert "x.jsonl, line 2" in refusal(capsys, "corpus=x.jsonl")
    assert main(["prepare", "r.yaml", "corpus=x.jsonl", "skip_bad_documents=true"]) == 0


@pytest.mark.parametrize(
    ("name", "raw", "bad"),
    [
        (
            "x.jsonl",
            b'{"text": "a text"}\n{"text": 1}\n{"text": "b text"}\n{"te\n{"text": "\xff"}\n[]\n{"text": "c text"}\n'
            b'{"text": ""}\n{"text": "d text"}\n',
            4,
        ),
        ("x.txt", b"a text\nb text\n\xff\xff\n\nc text\nd\xe4\nd text", 2),
        ("x.csv", b'n,text\n1,a text\n2\n3,"b text"\n4,\n5,c text\n6\n7,d text\n', 2),
        ("x.parquet", {"text": ["a text", None, "b text", "", "c text", None, None, "d text"]}, 3),
    ],
)
@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_bad_documents_are_skipped_and_counted(capsys, name, raw, bad, tokenizer):
    Path(name).write_bytes(parquet(raw) if isinstance(raw, dict) else raw)
    words = [f"corpus={name}", "lines=true", f"tokenizer={tokenizer}", "vocab_size=300", "val_fraction=0.25"]
    refusal(capsys, *words)
    assert main(["prepare", "r.yaml", *words, "skip_bad_documents=true"]) == 0
    out, err = capsys.readouterr()
    assert f"\n{bad} bad documents skipped\n" in out and err == ""
    assert out.count("skipped: ") == min(bad, 3) and name in out
    ours = dataset.open_dataset(section(corpus=name, tokenizer=tokenizer, vocab_size=300, val_fraction=0.25))
    texts = [
        text for file in (ours.train, ours.val) for text in ours.tokenizer.decode(ids(file)).split("<|endoftext|>")[:-1]
    ]
    assert sorted(texts) == GOOD
    assert sum(counts["documents"] for counts in ours.manifest["splits"].values()) == len(GOOD)


@pytest.mark.parametrize("name", ["x.csv", "x.parquet"])
def test_a_row_that_is_not_utf8_is_skipped_too(name):
    if name == "x.csv":
        Path(name).write_bytes(b"text\na text\nb\xff\nc text\nd text\n")
    else:
        offsets, data = pa.array([0, 6, 8, 14], pa.int32()).buffers()[1], pa.py_buffer(b"a textb\xffc text")
        pq.write_table(pa.table({"text": pa.StringArray.from_buffers(3, offsets, data)}), name)
    assert main(["prepare", "r.yaml", f"corpus={name}", "skip_bad_documents=true"]) == 0


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"n,text\n1,a\n2,b, c\n3,d\n", ["line 3", "3 values", "2 columns", "skip_bad_documents"]),
        (b"text\na\nb, c\n", ["line 3", "2 values", "1 column "]),
        (b'n,text\n1,a\n2,"b\n3,c\n4,d\n', ["line 3", "not CSV", "quote", "skip_bad_documents"]),
        (b'n,text\n1,a\n2,"b"c\n3,d\n', ["line 3", "not CSV"]),
        (b"text,text\na,b\n", ["2 columns are named text", "rename", "text_column"]),
        (b"", ["line 1", "empty", "column names, such as text"]),
        (b"\ntext\na\n", ["line 1", "empty", "column names"]),
        (b"\xef\xbb\xbf", ["line 1", "empty", "column names"]),
    ],
)
def test_an_invalid_csv(capsys, raw, words):
    Path("t.csv").write_bytes(raw)
    expect(error_line(capsys, "corpus=t.csv"), "corpus=t.csv", "t.csv", *words)
    assert not Path("out").exists()


def test_the_rest_of_a_csv_outlives_its_bad_rows(capsys):
    Path("t.csv").write_bytes(
        b'n,text\n1,a text\n2,b,c\n3,"d"e\n\n4,"f ""text""\nin two lines"\n5\n6,g text\n7,"h\n8,i\n'
    )
    found = documents_found(capsys, "corpus=t.csv", "skip_bad_documents=true", "val_fraction=0.18")
    assert found == {"a text", 'f "text"\nin two lines', "g text"}  # what follows the open quote is part of it


def test_a_parquet_with_two_columns_of_that_name(capsys):
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), "t.parquet")
    expect(error_line(capsys, "corpus=t.parquet"), "corpus=t.parquet", "2 columns are named text", "text_column")


def test_a_wrong_column_has_the_same_message_in_every_format(monkeypatch, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    Path("x.jsonl").write_text('{"story": "a", "n": 1}\n')
    Path("x.csv").write_text("story,n\na,1\n")
    pq.write_table(pa.table({"story": ["a"], "n": [1]}), "x.parquet")
    said = set()
    for name in ("x.jsonl", "x.csv", "x.parquet"):
        with pytest.raises(ValueError) as caught:
            texts(name)
        said.add(str(caught.value).replace(name, "FILE"))
    assert said == {"corpus=FILE: no column text; set text_column to one of story, n"}


def test_a_damaged_single_text_has_another_fix(capsys):
    Path("t.txt.gz").write_bytes(gzip.compress(b"text")[:-5])
    line = error_line(capsys, "corpus=t.txt.gz", "skip_bad_documents=true")
    expect(line, "corpus=t.txt.gz", "not a complete gzip file", "another path")
    assert "skip_bad_documents" not in line, "that is set, and does not help"


def test_the_first_error_is_reported_if_no_document_can_be_read(capsys):
    Path("t.jsonl").write_text('{"text": 1}\n[]\n')
    expect(
        error_line(capsys, "corpus=t.jsonl", "skip_bad_documents=true"),
        "corpus=t.jsonl",
        "contains no text",
        "t.jsonl, line 1: not a JSON object with a string under the key text",
    )


# ---- token ids


def one_wrong(dtype, at, value):
    ids = np.arange(3000, dtype=dtype)
    ids[at] = value
    return ids.tobytes()


@pytest.mark.parametrize(
    ("raw", "given", "words"),
    [
        (b"", [], ["0 bytes cannot be uint16 ids", "uint16", "vocabulary size 50,257", "use another one"]),
        (b"\0", [], ["1 bytes cannot be uint16 ids"]),
        (bytes(3001), [], ["3,001 bytes cannot be uint16 ids"]),
        (bytes(2), [], ["has 1 token ids, so the train split would be empty", "val_fraction=0.2"]),
        (bytes(6), ["val_fraction=0.9"], ["has 3 token ids, so the train split would be empty", "val_fraction=0.9"]),
        (
            one_wrong("<u2", 2345, 50257),
            [],
            ["the id 50,257 at byte 4,690", "vocabulary size 50,257", "set tokenizer to the folder"],
        ),
        (np.arange(1, 3000, dtype="<u4").tobytes(), [], ["every second id is 0", "more than 16 bits", "uint16"]),
        (np.arange(1, 3000, dtype="<i8").tobytes(), [], ["every second id is 0", "more than 16 bits", "uint16"]),
        (np.arange(1, 400, dtype="<u4").tobytes(), [], ["every second id is 0"]),
        (b"To be, or not to be:\n" * 100, [], ["looks like text"]),
        (one_wrong("<i4", 0, -1), [], ["the id 65,535 at byte 0"]),
        (
            bytes(6000),
            ["tokenizer=char"],
            ["tokenizer=char", "requires text", "corpus=a.bin contains token ids", "gpt2"],
        ),
        (
            bytes(6000),
            ["tokenizer=bpe"],
            ["tokenizer=bpe", "requires text", "corpus=a.bin contains token ids", "gpt2"],
        ),
        (bytes(6000), ["limit_tokens=50"], ["limit_tokens=50", "contains token ids", "remove the limit"]),
        (bytes(6000), ["limit_documents=5"], ["limit_documents=5", "contains token ids", "remove the limit"]),
    ],
)
def test_files_that_are_not_ids(capsys, gpt2_files, raw, given, words):
    Path("a.bin").write_bytes(raw)
    line = error_line(capsys, "corpus=a.bin", "tokenizer=gpt2", *given)
    expect(line, "corpus=a.bin", *words)
    assert "lines=true" not in line and not Path("out").exists()


def test_errors_name_the_file_of_ids(capsys, gpt2_files, monkeypatch):
    monkeypatch.setattr(foreign_tokens, "IDS_AT_ONCE", 3)
    for name in ("a.bin", "b.bin", "c.bin"):
        Path(name).write_bytes(one_wrong("<u2", 7, 60_000 if name == "b.bin" else 7))
    expect(
        error_line(capsys, "corpus=?.bin", "tokenizer=gpt2"),
        "corpus=?.bin: b.bin: contains the id 60,000 at byte 14,",
    )
    Path("c.bin").write_bytes(bytes(7))
    for command in ("prepare", "train"):
        line = error_line(capsys, "corpus=?.bin", "tokenizer=gpt2", command=command)
        expect(line, "corpus=?.bin: c.bin: 7 bytes cannot be uint16 ids")
    assert not Path("out").exists() and not Path("run").exists()


def test_a_file_of_ids_that_changes_or_goes(capsys, gpt2_files, monkeypatch):
    real = dataset.check_fits

    def meanwhile(data, corpus):
        real(data, corpus)
        changes.pop(0)()

    for module in (dataset, prepare):
        monkeypatch.setattr(module, "check_fits", meanwhile)
    file = Path("a.bin")
    for change in (
        lambda: os.truncate(file, 100),
        file.unlink,
        lambda: file.write_bytes(b"\1\0" * 3000),
    ):
        file.write_bytes(bytes(6000))
        changes = [lambda: None, change]  # the first call is the check of the recipe
        line = error_line(capsys, "corpus=a.bin", "tokenizer=gpt2")
        expect(line, "corpus=a.bin: was changed or removed", "run the command again")
        assert not Path("out").exists()
