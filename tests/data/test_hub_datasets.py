"""hub_datasets.py, with the real `datasets` library and a local server as the Hub."""

import io
import json
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import DOCS, ENV, GOOD, ROWS, dealt, texts
from hub_server import HubServer

from nanogpt_accel.data import hub_datasets, sources
from nanogpt_accel.data.sources import find_corpus

# In a separate process, because the libraries read HF_ENDPOINT when they are imported. All cases share it, because the
# imports take seconds. The revisions of the built-in sets are replaced by commits of the local server.
SCRIPT = """
import contextlib, dataclasses, io, json, os, sys
from nanogpt_accel.data import prepare, sources as corpus
from nanogpt_accel.__main__ import main
prepare.FOLDER_CACHE_S, answers = -1, {}
for name, (token, revisions, *words) in json.load(sys.stdin).items():
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    table = dict(corpus.HUB)
    for builtin, revision in revisions.items():
        corpus.HUB[builtin] = dataclasses.replace(corpus.HUB[builtin], revision=revision)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        for worker in (["worker=1"], ["worker=0"]) if "workers=2" in words else ([],):
            status = main(["prepare", "r.yaml", *words, *worker, f"data_dir={name}"])
    corpus.HUB.update(table)
    answers[name] = status, out.getvalue(), err.getvalue()
print(json.dumps(answers))
"""


def parquet(texts, column="text", **options):
    raw = io.BytesIO()
    pq.write_table(pa.table({"n": list(range(len(texts))), column: texts}), raw, **options)
    return raw.getvalue()


# `prepare` twice: the first attempt fails after a few commits, and the second starts after the branch has moved
MOVING = """
import contextlib, sys
from nanogpt_accel.data import encoding, token_files as tokens
from nanogpt_accel.__main__ import main
encoding.CHUNK, encoding.AHEAD, tokens.COMMIT_SECONDS = 300, 0, 0
commit, count = tokens.Writer.commit, 0
class Stop(BaseException):
    pass
def failing(self, position):
    global count
    commit(self, position)
    count += 1
    if count % 3 == 0:
        raise Stop
words = ["prepare", "r.yaml", "corpus=hub:me/branch"]
cases = [[*words, f"tokenizer={kind}", f"data_dir={kind}"] for kind in sys.argv[1:]]
tokens.Writer.commit = failing
for words in cases:
    with contextlib.suppress(Stop):
        main(words)
print("moved?", flush=True)
sys.stdin.readline()
tokens.Writer.commit = commit
sys.exit(max(main(words) for words in cases))
"""


def yaml(*configs):
    """A README.md that names configurations: (name, {split: path})."""
    lines = ["---", "configs:"]
    for name, files in configs:
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, path in files.items():
            lines += [f"  - split: {split}", f"    path: {path}"]
    return "\n".join([*lines, "---", "# words"]).encode()


def jsonl(texts):
    return "".join(json.dumps({"n": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


@pytest.fixture(scope="module")
def hub():
    with HubServer({"hf_me": "me", "hf_other": "other"}) as server:
        server.add(
            "datasets/me/one",
            {
                "data/train-00000-of-00002.parquet": parquet(DOCS[:120], row_group_size=50),
                "data/train-00001-of-00002.parquet": parquet(DOCS[120:]),
            },
        )
        server.add(
            "datasets/me/three",
            {
                "train.jsonl": jsonl(DOCS[:100]),
                "validation.jsonl": jsonl(DOCS[100:103]),
                "test.jsonl": jsonl(DOCS[150:]),
            },
        )
        parts = DOCS[:20], [], DOCS[20:50], DOCS[50:]
        server.add("datasets/me/parts", {f"train/{number}.jsonl": jsonl(part) for number, part in enumerate(parts)})
        server.add("datasets/me/train_and_test", {"train.jsonl": jsonl(DOCS[:100]), "test.jsonl": jsonl(DOCS[100:])})
        server.add(
            "datasets/me/configs",
            {
                "README.md": yaml(
                    ("small", {"train": "small/*.parquet"}),
                    ("big", {"train": "big/train.parquet", "dev": "big/dev.parquet"}),
                ),
                "small/a.parquet": parquet(DOCS[:50]),
                "small/b.parquet": parquet(DOCS[50:60]),
                "big/train.parquet": parquet(DOCS[:150], "story"),
                "big/dev.parquet": parquet(DOCS[150:], "story"),
            },
        )
        server.add("datasets/me/gated", {"train.parquet": parquet(DOCS)}, gated=True)
        server.add("datasets/me/private", {"train.parquet": parquet(DOCS)}, private=True)
        server.add("datasets/me/bad", {"train.parquet": parquet([*GOOD, None, None])})
        server.add("datasets/me/numbers", {"train.parquet": parquet([1, 2, 3])})
        yield server


CASES = {  # name -> the token, revisions for the table, and the words after `prepare r.yaml`
    "one": (None, {}, "corpus=hub:me/one"),
    "parts": (None, {}, "corpus=hub:me/parts"),
    "two workers": (None, {}, "corpus=hub:me/parts", "workers=2"),
    "three": ("hf_me", {}, "corpus=hub:me/three"),
    "train and test": ("hf_me", {}, "corpus=hub:me/train_and_test"),
    "another split": ("hf_me", {}, "corpus=hub:me/three", "dataset_split=test"),
    "small": ("hf_me", {}, "corpus=hub:me/configs", "dataset_config=small"),
    "big": ("hf_me", {}, "corpus=hub:me/configs", "dataset_config=big", "text_column=story"),
    "gated mine": ("hf_me", {}, "corpus=hub:me/gated"),
    "private mine": ("hf_me", {}, "corpus=hub:me/private"),
    "skip": ("hf_me", {}, "corpus=hub:me/bad", "skip_bad_documents=true", "val_fraction=0.25"),
    "limit": ("hf_me", {}, "corpus=hub:me/three", "limit_documents=20"),
}


REFUSED = [
    ("hf_me", ["hub:me/bad"], ["corpus=hub:me/bad: row 5: no text in column text", "skip_bad_documents=true"]),
    ("hf_other", ["hub:me/gated"], ["me/gated", "gated", "hf auth login"]),
    (None, ["hub:me/gated"], ["me/gated", "hf auth login"]),
    ("hf_other", ["hub:me/private"], ["me/private", "check the name"]),
    ("hf_me", ["hub:me/absent"], ["me/absent", "check the name", "corpus=PATH"]),
    ("hf_me", ["hub:me/one", "dataset_split=dev"], ["me/one", "dev", "train", "dataset_split"]),
    ("hf_me", ["hub:me/one", "text_column=story"], ["me/one: no column story", "n, text", "text_column"]),
    ("hf_me", ["hub:me/configs", "dataset_config=medium"], ["medium", "big", "small", "dataset_config"]),
    ("hf_me", ["hub:me/configs"], ["me/configs", "big", "small", "dataset_config"]),
    ("hf_me", ["hub:me/one", "revision=" + "0" * 40], ["me/one", "0" * 40]),
    ("hf_me", ["hub:me/numbers"], ["me/numbers", "no text in column text"]),
    ("hf_me", ["wikitext2"], ["corpus=wikitext2", "Salesforce/wikitext", sources.HUB["wikitext2"].revision]),
    ("hf_me", ["hub:me/../one"], ["corpus=hub:me/../one", "hub:USER/SET"]),
]


@pytest.fixture(scope="module")
def answers(hub, gpt2_files, tmp_path_factory):
    """(folder, {name: (status, stdout, stderr)}) of all the cases."""
    work = tmp_path_factory.mktemp("hub")
    (work / "r.yaml").write_text("data: {tokenizer: gpt2, val_fraction: 0.2}\n")
    cases = dict(CASES) | {
        f"refused {i}": (token, {}, f"corpus={name}", *words) for i, (token, (name, *words), _) in enumerate(REFUSED)
    }
    first = hub.add("datasets/me/moving", {"train.jsonl": jsonl(DOCS[:20])})
    hub.add("datasets/me/moving", {"train.jsonl": jsonl(DOCS[20:])})
    hub.add("datasets/me/converted", {"train.jsonl": jsonl(["a script"])})
    hub.add("datasets/me/converted", {"train.jsonl": jsonl(DOCS[:70])}, revision="refs/convert/parquet")
    cases["branch"] = ("hf_me", {}, "corpus=hub:me/converted", "revision=refs/convert/parquet")
    cases["revision"] = ("hf_me", {}, "corpus=hub:me/moving", f"revision={first}")
    stored = "wikitext-2-raw-v1"
    files = {"train": f"{stored}/train-*", "validation": f"{stored}/validation-*", "test": f"{stored}/test-*"}
    rows = {"train": ROWS, "validation": ROWS[:11], "test": ROWS[11:]}
    pinned = hub.add(
        "datasets/Salesforce/wikitext",
        {
            "README.md": yaml(("wikitext-103-raw-v1", {"train": "wikitext-103-raw-v1/*"}), (stored, files)),
            "wikitext-103-raw-v1/train-00000-of-00001.parquet": parquet(["another"]),
            **{f"{stored}/{split}-00000-of-00001.parquet": parquet(rows[split]) for split in rows},
        },
    )
    hub.add("datasets/Salesforce/wikitext", {f"{stored}/train-00000-of-00001.parquet": parquet(["later"])})
    cases["wikitext2"] = ("hf_me", {"wikitext2": pinned}, "corpus=wikitext2")
    env = hub.env(work / "hf", token=None, PYTHONPATH=ENV["PYTHONPATH"])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(cases),
        cwd=work,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return work, json.loads(done.stdout)


def held(answers, name):
    """Return {split: ids} of a prepared folder, read directly from its files."""
    work, given = answers
    assert given[name][0] == 0, given[name]
    splits = json.loads((work / name / "manifest.json").read_text())["splits"]
    return {
        split: np.concatenate([np.fromfile(work / name / file["name"], "<u2") for file in counts["files"]]).tolist()
        for split, counts in splits.items()
    }


def tiktokens(**splits):
    """Return {split: ids} that tiktoken computes for documents."""
    import tiktoken

    gpt2 = tiktoken.get_encoding("gpt2")
    return {
        split: [i for text in texts for i in [*gpt2.encode_ordinary(text), gpt2.eot_token]]
        for split, texts in splits.items()
    }


def test_one_split(answers):
    train, val = dealt(DOCS)
    assert held(answers, "one") == tiktokens(train=train, val=val)
    work, given = answers
    source = json.loads((work / "one" / "manifest.json").read_text())["corpus"]
    assert (source["kind"], source["name"], source["id"]) == ("hub", "hub:me/one", "me/one")
    assert "train: " in given["one"][1] and f"{len(train)} documents" in given["one"][1]


def test_two_workers_read_different_files(answers):
    """One of the files may have no rows."""
    work, given = answers
    assert held(answers, "two workers") == held(answers, "parts") == held(answers, "one")
    assert given["two workers"][1].count("tokenized 2 parts, ") == 2
    one, two = ((work / name / "manifest.json").read_bytes() for name in ("parts", "two workers"))
    assert one == two


def test_text_is_streamed_and_never_stored(answers):
    work, _ = answers
    stored = sorted(path.name for path in (work / "hf").rglob("*") if path.is_file() and path.stat().st_size > 1000)
    assert not [name for name in stored if name.endswith((".parquet", ".jsonl", ".arrow", ".incomplete"))]


def test_splits_of_its_own_are_taken_as_they_are(answers):
    assert held(answers, "three") == tiktokens(train=DOCS[:100], val=DOCS[100:103], test=DOCS[150:])
    assert "\ntest: " in answers[1]["three"][1] and ", 3 documents" in answers[1]["three"][1]


def test_a_limit_of_documents_holds_for_each_split(answers):
    assert held(answers, "limit") == tiktokens(train=DOCS[:20], val=DOCS[100:103], test=DOCS[150:170])


def test_a_test_split_without_a_validation_split(answers):
    train, val = dealt(DOCS[:100])
    assert held(answers, "train and test") == tiktokens(train=train, val=val, test=DOCS[100:])


def test_another_split_to_train_on(answers):
    assert held(answers, "another split") == tiktokens(train=DOCS[150:], val=DOCS[100:103])


def test_a_configuration(answers):
    train, val = dealt(DOCS[:60])
    assert held(answers, "small") == tiktokens(train=train, val=val)
    assert held(answers, "big") == tiktokens(train=DOCS[:150], val=DOCS[150:])  # its "dev" is the validation split


def test_a_revision(answers):
    train, val = dealt(DOCS[:20])
    assert held(answers, "revision") == tiktokens(train=train, val=val)


def test_the_manifest_names_the_commit_that_was_read(answers, hub):
    def source(name):
        return json.loads((answers[0] / name / "manifest.json").read_text())["corpus"]

    assert source("one")["revision"] is None
    assert source("one")["commit"] == hub.commits("datasets/me/one")[-1][1]
    for name in ("revision", "wikitext2"):  # these cases already set a commit as revision
        assert len(source(name)["revision"]) == 40 and "commit" not in source(name)
    assert source("branch")["revision"] == "refs/convert/parquet"
    assert source("branch")["commit"] == hub.commits("datasets/me/converted", "refs/convert/parquet")[-1][1]


def test_a_branch_by_its_name(answers):
    train, val = dealt(DOCS[:70])
    assert held(answers, "branch") == tiktokens(train=train, val=val)


def test_an_interrupted_preparation_resumes_with_its_commit(hub, gpt2_files, tmp_path):
    """Meanwhile, the branch has moved. One of the cases trains a tokenizer on the text."""
    first = hub.add("datasets/me/branch", {"train.jsonl": jsonl(DOCS)})
    (tmp_path / "r.yaml").write_text("data: {val_fraction: 0.2}\n")
    with subprocess.Popen(
        [sys.executable, "-c", MOVING, "gpt2", "char"],
        cwd=tmp_path,
        text=True,
        env=hub.env(tmp_path / "hf", PYTHONPATH=ENV["PYTHONPATH"]),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        while (line := process.stdout.readline()) and line != "moved?\n":
            pass
        assert line, process.stderr.read()
        hub.add("datasets/me/branch", {"train.jsonl": jsonl(["Another text, with other characters: ~ ß"] * 200)})
        out, err = process.communicate("\n", timeout=100)
    assert process.returncode == 0, err
    assert out.count("resuming an interrupted preparation") == 2
    train, val = dealt(DOCS)
    assert held((tmp_path, {"gpt2": [0]}), "gpt2") == tiktokens(train=train, val=val)
    vocab = {character: i for i, character in enumerate(sorted(set("".join(DOCS))))}
    assert held((tmp_path, {"char": [0]}), "char")["val"] == [
        i for text in val for i in [*map(vocab.__getitem__, text), len(vocab)]
    ]
    for kind in ("gpt2", "char"):
        assert json.loads((tmp_path / kind / "manifest.json").read_text())["corpus"]["commit"] == first


@pytest.mark.parametrize("name", ["gated mine", "private mine"])
def test_own_gated_and_private_sets_are_read(answers, name):
    train, val = dealt(DOCS)
    assert held(answers, name) == tiktokens(train=train, val=val)


def test_rows_without_a_text_are_skipped_and_counted(answers):
    assert held(answers, "skip") == tiktokens(train=GOOD[:3], val=GOOD[3:])  # the last quarter of the text
    assert "\n2 bad documents skipped\n" in answers[1]["skip"][1]


def test_wikitext2_has_its_own_splits_and_whole_articles(answers):
    """All settings except the revision are those of the built-in data set."""
    articles = ["".join(ROWS[1:11]), "".join(ROWS[11:15]), "".join(ROWS[15:])]
    assert held(answers, "wikitext2") == tiktokens(train=articles, val=articles[:1], test=articles[1:])


def test_the_builtin_sets_ask_for_the_revision_of_the_table(answers, hub):
    """The local server does not have this commit, but the client asks for it."""
    revision = sources.HUB["wikitext2"].revision
    assert len(revision) == 40
    assert any("Salesforce/wikitext" in asked.path and revision in asked.path for asked in hub.requests)


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=[" ".join(words) for _, words, _ in REFUSED])
def test_unreadable_sets_are_one_line(answers, number):
    work, given = answers
    status, _, err = given[f"refused {number}"]
    assert status == 2 and err.count("\n") == 1, err
    assert err.startswith("error: ") and [word for word in REFUSED[number][2] if word not in err] == [], err
    assert not (work / f"refused {number}").exists()


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
        pytest.param({"HF_ENDPOINT": "http://127.0.0.1:9"}, "HF_ENDPOINT", marks=pytest.mark.slow),
    ],
)  # the client tries five times
def test_a_hub_out_of_reach(hub, tmp_path, more, word):
    (tmp_path / "r.yaml").write_text("data: {tokenizer: char, data_dir: out}\n")
    done = subprocess.run(
        [sys.executable, "-m", "nanogpt_accel", "prepare", "r.yaml", "corpus=hub:me/one"],
        cwd=tmp_path,
        env=hub.env(tmp_path, PYTHONPATH=ENV["PYTHONPATH"], **more),
        capture_output=True,
        text=True,
        timeout=100,
    )
    *tries, line = done.stderr.splitlines()
    assert done.returncode == 2 and not any("Traceback" in tried for tried in tries)
    assert tries == [] or "HF_ENDPOINT" in more  # messages of the client about repeated tries
    assert line.startswith("error: corpus=hub:me/one: cannot read me/one") and word in line
    assert not (tmp_path / "out").exists()


# ---- without the local server


def test_openwebtext_streams_the_rows_of_the_hub(monkeypatch):
    import datasets

    def load_dataset(path, config=None, **options):
        asked.append((path, config, options))
        return datasets.Dataset.from_dict({"n": [1, 2, 3], "text": ["a", "", "b"]}).to_iterable_dataset()

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = find_corpus("openwebtext")
    assert asked == [] and not corpus.is_single
    assert list(corpus.documents()) == ["a", "b"]
    assert asked == [
        (
            "Skylion007/openwebtext",
            "plain_text",
            {"split": "train", "revision": corpus.source["revision"], "streaming": True},
        )
    ]
    assert re.fullmatch("[0-9a-f]{40}", corpus.source["revision"]), "the same recipe means the same text"


def test_openwebtext_without_a_network(refused):
    with refused(ValueError, "corpus=openwebtext", "Skylion007/openwebtext", "HF_HUB_OFFLINE", "corpus=PATH"):
        texts("openwebtext")


def test_an_error_amid_the_stream(refused, monkeypatch):
    import datasets

    def rows():
        yield {"text": "a"}
        raise ConnectionResetError("reset by peer\nsecond line")

    features = datasets.Features({"text": datasets.Value("string")})
    stream = datasets.IterableDataset.from_generator(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, config, **options: stream)
    with refused(ValueError, "corpus=openwebtext", "ConnectionResetError: reset by peer"):
        texts("openwebtext")


# ---- rows to documents


def test_an_article_starts_at_a_heading_of_the_first_level():
    """Rows of WikiText: ` = Title = `, ` = = Section = = `, empty ones and lines of text."""
    articles = [text for text in hub_datasets.GROUPED["articles"](iter(ROWS)) if text]
    assert articles == ["".join(ROWS[1:11]), "".join(ROWS[11:15]), "".join(ROWS[15:])]
    assert [text for text in hub_datasets.GROUPED["articles"](iter([])) if text] == []


def test_wikitexts_validation_split_is_sixty_articles(shared_data):
    rows = (shared_data / "wikitext2" / "valid.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    rows = ["" if row == " \n" else row for row in rows]  # as the Hub has an empty line
    articles = list(hub_datasets.GROUPED["articles"](iter(rows)))
    assert len([*filter(None, articles)]) == 60, "as its paper says"
    assert "".join(articles) == "".join(rows) and articles[1].startswith(" = Homarus gammarus = \n")


def test_sentences_are_joined_to_documents():
    rows = [f"sentence {i} ." for i in range(2500)]
    texts = list(hub_datasets.GROUPED["sentences"](iter(rows)))
    assert [text.count("\n") + 1 for text in texts] == [1024, 1024, 452]
    assert "\n".join(texts).split("\n") == rows
