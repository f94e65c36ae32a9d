"""report: the page, read by an HTML parser and, in a slow test, by a real browser."""

import base64
import errno
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import filelock
import pytest
import yaml
from runs import LAW, write_finished_run, write_grid

import nanogpt_accel
from nanogpt_accel.__main__ import main
from nanogpt_accel.checkpoint.finished_runs import read_ladder
from nanogpt_accel.commands import report
from nanogpt_accel.planning import law_figure, scaling_law
from nanogpt_accel.planning.sizing import flops_per_token
from nanogpt_accel.recipe import load_recipe

WRITE_IMAGES = report.write_images
STEPS, TOKENS = 40, 2 * 3 * 16  # tokens per step
NAUGHTY = "</script><script>alert(1)</script>&amp;<b>\x00\x1b[31m </pre> {{ data }} {% if %} {# @DATA@"


def make_run(folder, lines=None, samples=(), **keys):
    """Write a run folder. lines: the content of metrics.jsonl."""
    folder.mkdir(parents=True)
    recipe = load_recipe(
        None,
        {
            "batch_size": 2,
            "gradient_accumulation_steps": 3,
            "block_size": 16,
            "warmup_iters": 5,
            "max_iters": STEPS,
            "out_dir": str(folder),
            **keys,
        },
    )
    (folder / "run.yaml").write_text(recipe.to_yaml())
    lines = curve() if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if samples:
        (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    return folder


def curve(steps=STEPS, every=2):
    """Return lines like those of train: step 0, then every second step, at 96 tokens/s, so a step takes a second."""
    lines = [{"step": 0, "train_loss": 4.0, "val_loss": 4.1}]
    for step in range(0, steps, every):
        lines.append(
            {
                "step": step,
                "loss": 4 * math.exp(-step / 20),
                "learning_rate": 1e-3,
                "grad_norm": 1.5,
                "tokens_per_second": float(TOKENS),
                "peak_memory": 3 * 2**30,
            }
        )
    return [*lines, {"step": steps, "train_loss": 1.0, "val_loss": 1.25}]


class Page(HTMLParser):
    """The text of a page, its elements, and the data of its script."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.text, self.cells, self.script, self._open = [], "", [], "", []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        self.data = json.loads(re.search(r"const runs = (.*), colors = ", self.script)[1])

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._open.append(tag)
        if tag == "tr":
            self.cells.append([])
        elif tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if "script" in self._open:
            self.script += data
        elif "style" not in self._open:
            self.text += data
            if {"td", "th"} & set(self._open):
                self.cells[-1][-1] += data

    def figures(self):
        return [attributes["id"] for tag, attributes in self.elements if tag == "figure"]


@pytest.fixture(autouse=True)
def work(monkeypatch, tmp_path):
    """Change to a new folder. Only one test writes images, because they take most of the time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "write_images", lambda runs, out: [])


def read(*words):
    assert main(["report", *map(str, words)]) == 0
    out = next((word[4:] for word in map(str, words) if word.startswith("out=")), None)
    return Page(Path(out) if out else Path(words[0], "report.html") if len(words) == 1 else Path("report.html"))


def test_the_curves_match_the_log(capsys, monkeypatch):
    monkeypatch.setattr(report, "write_images", WRITE_IMAGES)
    run = make_run(Path("runs/a"))
    page = read(run)
    assert page.figures() == ["loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory"]
    (one,) = page.data
    assert one["name"] == "a" and one["tokens"] == TOKENS
    loss = one["series"]["loss"]
    assert loss["step"] == list(range(0, STEPS, 2))
    assert loss["value"] == pytest.approx([4 * math.exp(-step / 20) for step in range(0, STEPS, 2)], rel=1e-5)
    # a step takes a second: after the line of step s, s + 1 steps are done
    assert loss["seconds"] == pytest.approx([step + 1 for step in range(0, STEPS, 2)])
    val = one["series"]["val_loss"]
    assert (val["step"], val["value"], val["seconds"]) == ([0, STEPS], [4.1, 1.25], [0, STEPS - 1])
    assert set(one["series"]["peak_memory"]["value"]) == {3.0}  # GiB
    row = dict(zip(*page.cells[:2], strict=True))
    assert row["best validation loss"] == f"1.2500 at step {STEPS}" and row["steps"] == f"{STEPS} steps"
    assert row["tokens"] == f"{STEPS * TOKENS:,}" and row["training time"] == "0:39"
    for key in page.figures():
        image = (run / f"report-{key}.png").read_bytes()
        assert image[:8] == b"\x89PNG\r\n\x1a\n" and len(image) > 5000
    assert capsys.readouterr().out.splitlines()[-1] == "wrote runs/a/report.html and 5 PNGs: report-*.png"


def with_sets(lines):
    """Add the losses of two validation sets, a task, the shares of two sources and a metric of a researcher."""
    named = {"val_loss/wiki": 2.0, "val_loss/code": 3.0, "arc_easy/acc": 0.25}
    steps = {"share/web": 0.75, "share/code": 0.25, "weight_norm": 7.0, "skipped_steps": 1, "spike": True}
    return [line | (named if "val_loss" in line else steps) for line in lines]


def test_every_metric_is_in_a_chart(monkeypatch):
    monkeypatch.setattr(report, "write_images", WRITE_IMAGES)
    save = report.save_figure  # one of the nine images is enough
    monkeypatch.setattr(report, "save_figure", lambda figure, path: "share" in path.name and save(figure, path))
    run = make_run(Path("runs/a"), with_sets(curve()))
    page = read(run)
    known = ["loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory"]
    assert page.figures() == [*known, "val_loss", "arc_easy", "share", "weight_norm"]
    series = page.data[0]["series"]
    assert series["val_loss/code"]["value"] == [3.0, 3.0] and series["share/web"]["value"] == [0.75] * (STEPS // 2)
    assert not {"perplexity", "skipped_steps", "spike", "step"} & series.keys()
    for title in ("Validation loss by set", "Sources", "weight norm"):
        assert title in page.source
    assert (run / "report-share.png").stat().st_size > 5000
    metrics = re.search(r"const metrics = (\{.*\})", page.source)[1]
    assert '"val_loss": ["val_loss/wiki", "val_loss/code"]' in metrics and '"loss": ["loss", "val_loss"]' in metrics


def test_the_page_makes_no_requests():
    page = read(make_run(Path("runs/a"), samples=[{"step": 1, "text": "x"}]))
    request_attributes = {"src", "href", "srcset", "data", "action", "poster", "background"}
    assert not [(tag, attributes) for tag, attributes in page.elements if request_attributes & attributes.keys()]
    assert not {"link", "img", "iframe", "object"} & {tag for tag, _ in page.elements}
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|WebSocket|import\(", page.source)
    assert set(re.findall(r"https?://[^\"' ]+", page.source)) == {
        "http://www.w3.org/2000/svg"
    }  # a namespace, not an address
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_two_runs_share_charts_and_a_table_of_differing_settings():
    a = make_run(Path("runs/a"), learning_rate=1e-3)
    b = make_run(Path("runs/b"), learning_rate=2e-3, n_layer=3, activation="swiglu")
    page = read(a, b, "out=both.html")
    assert [run["name"] for run in page.data] == ["a", "b"]
    rows = {cells[0]: cells[1:] for cells in page.cells}
    assert rows["key"] == ["a", "b"]
    assert {key: rows[key] for key in rows if "." in key} == {
        "optimizer.learning_rate": ["0.001", "0.002"],
        "model.n_layer": ["12", "3"],
        "model.activation": ["gelu", "swiglu"],
    }
    # one run: differences from the defaults
    rows = {cells[0]: cells[1:] for cells in read(b).cells}
    assert rows["key"] == ["default", "b"] and rows["model.n_layer"] == ["12", "3"]
    assert rows["optimizer.learning_rate"] == ["0.0006", "0.002"] and "out_dir" not in rows


def test_runs_with_the_same_name_are_shown_with_their_paths():
    page = read(make_run(Path("x/a")), make_run(Path("y/a")))
    assert [run["name"] for run in page.data] == ["x/a", "y/a"]


def test_names_have_as_many_parts_as_are_needed():
    runs = [make_run(Path(path)) for path in ("x/p/a", "y/p/a", "y/b")]
    assert [run["name"] for run in read(*runs).data] == ["x/p/a", "y/p/a", "b"]


def test_the_folder_of_a_sweep_stands_for_its_runs():
    for name in ("b", "a", "c"):
        make_run(Path("sweep") / name)
    Path("sweep/results.csv").write_text("point\n")
    Path("sweep/link").symlink_to("a")
    assert [run["name"] for run in read(Path("sweep")).data] == ["a", "b", "c"]
    assert Path("sweep/report.html").is_file()
    assert [run["name"] for run in read(Path("sweep"), Path("sweep/b"), "out=other.html").data] == ["a", "b", "c"]


def test_html_in_names_samples_and_settings_is_escaped():
    run = make_run(
        Path("runs") / "<b>a", samples=[{"step": 10, "text": NAUGHTY}, {"step": 20, "text": "last"}], corpus="<i>'\""
    )
    page = read(run)
    assert len([tag for tag, _ in page.elements if tag == "script"]) == 1
    assert "b" not in {tag for tag, _ in page.elements}
    assert NAUGHTY.replace("\x00", r"\x00").replace("\x1b", r"\x1b") in page.text
    assert "\x00" not in page.source and page.data[0]["name"] == "<b>a"
    details = [attributes for tag, attributes in page.elements if tag == "details"]
    assert ["open" in attributes for attributes in details[:2]] == [False, True]  # the last sample is open


def test_a_run_has_the_same_color_everywhere():
    page = read(make_run(Path("runs/a")), make_run(Path("runs/b"), samples=[{"step": 1, "text": "x"}]))
    name = f'<span class="name"><i style="background:{report.COLORS[1]}"></i><span>b</span></span>'
    assert f"<td>{name}</td>" in page.source and f"<h3>{name}</h3>" in page.source


def test_a_long_run_shows_evenly_spaced_samples():
    run = make_run(Path("runs/a"), samples=[{"step": step, "text": f"text {step}."} for step in range(1000)])
    page = read(run)
    shown = [int(step) for step in re.findall(r"text (\d+)\.", page.text)]
    assert len(shown) == report.MAX_SAMPLES and shown == sorted(shown) and (shown[0], shown[-1]) == (0, 999)
    assert all(30 <= b - a <= 36 for a, b in zip(shown, shown[1:], strict=False))


def test_a_long_run_is_downsampled_and_keeps_its_spikes():
    lines = [
        {"step": step, "loss": 9.0 if step == 11_415 else 2.0, "tokens_per_second": float(TOKENS)}
        for step in range(20_000)
    ]
    series = read(make_run(Path("runs/a"), lines)).data[0]["series"]["loss"]
    assert 400 <= len(series["step"]) <= report.MAX_POINTS and series["step"][-1] == 19_999
    at = next(i for i, step in enumerate(series["step"]) if step >= 11_415)
    assert series["high"][at] == 9 and series["low"][at] == 2 < series["value"][at] < 3
    assert all(high == 2 for i, high in enumerate(series["high"]) if i != at)
    assert series["seconds"][-1] == pytest.approx(20_000, rel=1e-5)


@pytest.mark.parametrize(
    "spoil, note, figures",
    [
        (
            lambda run: (run / "run.yaml").unlink(),
            "run.yaml is missing; the page shows no tokens, times or settings",
            5,
        ),
        (lambda run: (run / "run.yaml").write_text("model: {n_layers: 3}"), "unknown key model.n_layers", 5),
        (lambda run: (run / "run.yaml").write_text("{"), "invalid YAML", 5),
        (lambda run: (run / "metrics.jsonl").write_text(""), "metrics.jsonl is missing or empty", 0),
        (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl is missing or empty", 0),
        (lambda run: (run / "metrics.jsonl").write_text("{{{"), "metrics.jsonl has no valid lines", 0),
        (lambda run: os.truncate(run / "metrics.jsonl", 1000), "metrics.jsonl is damaged after step", 5),
    ],
)
def test_missing_or_damaged_files_are_noted(capsys, spoil, note, figures):
    run = make_run(Path("runs/a"))
    spoil(run)
    page = read(run)
    assert note in page.text and note in capsys.readouterr().out
    assert len(page.figures()) == figures
    assert bool(page.data[0]["tokens"]) == ("metrics.jsonl" in note)


def test_values_that_are_not_numbers_are_ignored():
    lines = [
        {"step": 0, "loss": None, "tokens_per_second": 96},
        {"step": 1, "loss": "3", "grad_norm": True, "mfu": 10**400},
        {"step": 3, "loss": 2.5, "tokens_per_second": 96},
    ]
    series = read(make_run(Path("runs/a"), lines)).data[0]["series"]
    assert series["loss"]["step"] == [3] and not {"grad_norm", "mfu"} & series.keys()
    assert series["loss"]["seconds"] == [None]  # the speed of one step is unknown


def test_a_run_is_running_while_another_process_has_its_lock():
    run = make_run(Path("runs/a"), curve(10))
    assert "10 of 40 steps, stopped" in read(run).text
    code = "import sys, time; from nanogpt_accel.checkpoint.run_folder import lock_run as lock\n"
    code += "run_lock = lock(sys.argv[1]); print(1)\n"
    with subprocess.Popen(
        [sys.executable, "-c", code + "sys.stdout.flush(); time.sleep(60)", str(run)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(nanogpt_accel.__file__).parents[1])},
    ) as process:
        try:
            process.stdout.readline()
            assert "of 40 steps, running" in read(run).text
        finally:
            process.kill()


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO])
def test_a_run_whose_lock_cannot_be_tried_is_not_called_running(monkeypatch, error):
    run = make_run(Path("runs/a"), curve(10))
    (run / ".lock").touch()

    def acquire(self, *args, **kwargs):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    assert f"10 of 40 steps, running or stopped (.lock: {os.strerror(error)})" in read(run).text


def test_the_terminal_shows_a_table_of_the_runs(capsys):
    runs = [
        make_run(Path("runs") / name, lines) for name, lines in (("a-long-name", None), ("b", curve(10)), ("c", []))
    ]
    read(*runs, "out=x.html")
    assert capsys.readouterr().out.splitlines()[:4] == [
        "run          steps                    best validation loss  last    training time",
        "a-long-name  40 steps                 1.2500 at step 40     1.2500  0:39",
        "b            10 of 40 steps, stopped  1.2500 at step 10     1.2500  0:09",
        "c            0 of 40 steps, stopped   -                     -       -",
    ]


def test_a_failed_png_is_a_warning(monkeypatch, capsys):
    """The page is complete without the PNGs."""

    def fail(runs, out):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(report, "write_images", fail)
    assert read(make_run(Path("runs/a"))).figures()
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "warning: the PNGs cannot be written (no fonts)",
        "wrote runs/a/report.html",
    ]


def test_the_result_of_expect_is_shown():
    run = make_run(Path("runs/a"))
    found = {"expected": 1.2, "tolerance": 0.1, "got": 1.25, "verdict": "reproduced", "changed": []}
    (run / "expect.json").write_text(json.dumps(found))
    assert "1.200 +- 0.1, got 1.250: reproduced" in read(run).text
    (run / "expect.json").write_text(json.dumps(found | {"got": None, "verdict": "not reproduced"}))
    assert "1.200 +- 0.1, got nan: not reproduced" in read(run).text
    for content in ("{", "[" * 100_000, json.dumps(found).replace("1.25", "9" * 400), json.dumps(found | {"got": "x"})):
        (run / "expect.json").write_text(content)
        assert "reproduced" not in read(run).text


def test_wrong_arguments_are_refused(refused, tmp_path):
    run = make_run(Path("runs/a"))
    Path("empty").mkdir()
    with refused(ValueError, "RUN is missing; usage: nanogpt-accel report"):
        report.main([])
    with refused(ValueError, "empty: contains no run", "metrics.jsonl or run.yaml"):
        report.main(["empty"])
    with refused(ValueError, "runs/b: no such folder"):
        report.main(["runs/b"])
    with refused(ValueError, "out=a.pdf", "must end with .html"):
        report.main([str(run), "out=a.pdf"])
    with refused(ValueError, "out=nowhere/a.html", "no such folder nowhere"):
        report.main([str(run), "out=nowhere/a.html"])
    with refused(ValueError, f"9 runs: at most {report.MAX_RUNS} fit on a page", "add --fit"):
        report.main([str(make_run(Path(f"many/{i}"))) for i in range(9)])
    Path("a.html").mkdir()
    with refused(OSError, "out=a.html: cannot be written"):
        report.main([str(run), "out=a.html"])


# ---- scaling laws


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder of nine finished runs, without noise, and an unfinished one."""
    folder = write_grid(tmp_path_factory.mktemp("fit") / "ladder")
    write_finished_run(folder / "stopped", LAW, depth=9, trainer={"step": 1})
    return folder


def test_fit_shows_the_law_of_finished_runs(finished, capsys):
    assert main(["report", str(finished), "--fit", "out=law.html"]) == 0
    printed = capsys.readouterr().out
    found = {name: float(re.search(rf"^  {name} +(\S+)", printed, re.MULTILINE)[1]) for name in LAW}
    assert found == pytest.approx(LAW, rel=2e-3)
    assert "stopped: not used" in printed and printed.splitlines()[-1] == "wrote law.html and law.png"
    source = Path("law.html").read_text(encoding="utf-8")
    for text in ("Scaling law of 9 runs", "<td>depth=4,300</td>".replace("<td>", '<td data-title="run">'), "(10x)"):
        assert text in source, text
    assert "stopped: not used" in source and "http" not in source.replace("http-equiv", "")
    image = Path("law.png").read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n" and base64.b64encode(image).decode() in source


@pytest.mark.parametrize(
    "runs",
    [
        pytest.param([(depth, 1e9 * depth**4) for depth in range(2, 7)], id="a line"),
        pytest.param([(2, 1e12), (3, 1e12), (4, 1e12), (3, 1e13), (4, 1e13), (6, 1e13), (2, 4e10)], id="isoFLOP"),
    ],
)
def test_every_kind_of_figure_is_drawn(runs, tmp_path):
    for depth, flops in runs:
        recipe = load_recipe("python_depth", {"depth": depth})
        per_step = recipe.tokens_per_step * flops_per_token(recipe.shape | {"vocab_size": 576})
        write_finished_run(tmp_path / f"{depth}-{flops:g}", LAW, depth=depth, max_iters=round(flops / per_step))
    law = scaling_law.fit(read_ladder([tmp_path]).runs, n_draws=50)
    figure = law_figure.draw(law)
    figure.canvas.draw()
    left, right = figure.axes
    assert "compute" in left.get_xlabel() and "parameters" in right.get_xlabel()


def test_the_page_of_a_law_does_not_need_its_picture(finished, monkeypatch, capsys):
    def fail(law):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(law_figure, "draw", fail)
    assert main(["report", "--fit", str(finished), "out=law.html"]) == 0
    assert "warning: the PNG cannot be written (no fonts)" in capsys.readouterr().out
    assert "<img" not in Path("law.html").read_text() and not Path("law.png").exists()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["missing", "--fit"], ["missing: no such folder"]),
        (["{}/depth=2,100", "{}/depth=4,100", "--fit"], ["different amounts of compute, but the runs have 2"]),
    ],
)
def test_runs_without_a_law_are_refused(words, parts, finished, capsys):
    assert main(["report", *(word.format(finished) for word in words)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and [part for part in parts if part not in printed.err] == [], printed.err


# ---- a real browser

BROWSER = os.environ.get("NANOGPT_ACCEL_BROWSER") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
TRY = """<script>
const seen = []
for (const axis of ["step", "tokens", "seconds"]) for (const log of [false, true]) {
  form.elements.axis.value = axis
  form.elements.log.checked = log
  form.dispatchEvent(new Event("change"))
  const svg = document.querySelector("#loss svg"), box = svg.getBoundingClientRect()
  svg.dispatchEvent(new MouseEvent("mousemove", {clientX: box.left + box.width / 2, clientY: box.top + 50}))
  seen.push({axis, log, tip: document.querySelector("#loss .tip").innerText,
             curves: [...document.querySelectorAll("figure")].map(f => f.querySelectorAll("polyline").length),
             ends: [...document.querySelectorAll("#loss polyline")].map(
               p => p.getAttribute("points").split(" ").at(-1)),
             box: [box.width, box.height]})
}
document.querySelector("#legend input").click()
seen.push(document.querySelectorAll("#loss polyline").length)
const out = document.createElement("pre")
out.id = "seen"
out.textContent = JSON.stringify(seen)
document.body.append(out)
</script></body>"""


PHONE = """<iframe src="page.html" width=390 height=4000></iframe><script>
addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument, lines = element => element.getClientRects().length
  const texts = [...page.querySelectorAll(".name > span, h1 span, th .name")]
  document.body.append(JSON.stringify({
    width: page.documentElement.scrollWidth,
    cut: [...page.querySelectorAll("*")].filter(e => e.getBoundingClientRect().right > 390).map(e => e.outerHTML),
    broken: texts.filter(e => e.textContent.length < 30 && lines(e) > 1).map(e => e.textContent),
  }))
})</script>"""


def browse(file, *words):
    """Open a file in the browser, after a check that its console has no errors. Return the finished process."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1200,1600"]
    options += ["--allow-file-access-from-files", f"--user-data-dir={file.parent / 'profile'}"]
    command = [BROWSER, *options, *words, f"file://{file}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert "CONSOLE" not in shown.stderr, shown.stderr  # no errors and no violations of the policy
    return shown


needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium here: install one, or set NANOGPT_ACCEL_BROWSER to its path"
)


@pytest.mark.slow
@needs_browser
def test_nothing_is_cut_off_and_no_name_is_broken_on_a_phone(tmp_path):
    runs = [make_run(Path("runs") / name) for name in ("a", "modern-rotary-lr_0.002", "a-" * 50 + "long-name")]
    read(*runs, "out=page.html")
    Path("phone.html").write_text(PHONE)
    shown = browse(tmp_path / "phone.html", "--dump-dom").stdout
    assert json.loads(shown[shown.index('{"width') : shown.rindex("}") + 1]) == {"width": 390, "cut": [], "broken": []}


@pytest.mark.slow
@needs_browser
def test_curves_and_controls_work_in_a_browser(tmp_path):
    draw = random.Random(0)
    noisy = [{**line, "loss": line["loss"] + draw.random()} if "loss" in line else line for line in curve()]
    make_run(Path("runs/a"), with_sets(curve()), samples=[{"step": 10, "text": NAUGHTY}])
    make_run(Path("runs/b"), noisy, learning_rate=2e-3)
    read("runs/a", "runs/b", "out=both.html")
    source = Path("both.html").read_text()
    Path("tried.html").write_text(source.replace("</body>", TRY))

    browse(tmp_path / "both.html", f"--screenshot={tmp_path / 'page.png'}")
    assert (tmp_path / "page.png").stat().st_size > 30_000
    shown = browse(tmp_path / "tried.html", "--dump-dom")
    *seen, hidden = json.loads(re.search(r'<pre id="seen">(.*?)</pre>', shown.stdout, re.DOTALL)[1])
    assert len(seen) == 6 and hidden == 2  # training and validation of the other run
    for state in seen:
        # training and validation of two runs, then one curve per run, then the other metrics of run a
        assert state["curves"] == [4, 2, 2, 2, 2, 2, 1, 2, 1]
        assert all(re.search(rf"^{name} (training|validation) [\d.]+$", state["tip"], re.MULTILINE) for name in "ab")
        for x, y in (map(float, end.split(",")) for end in state["ends"]):
            assert 52 <= x <= state["box"][0] and 0 <= y <= state["box"][1]
    shown_text = shown.stdout.split("<script>")[0].replace("{{ data }} {% if %} {#", "")
    assert not any(mark in shown_text for mark in ("{{", "{%", "{#"))


def test_the_page_shows_the_full_recipe():
    run = make_run(Path("runs/a"))
    text = read(run).text
    shown = text[text.index("a: run.yaml") + len("a: run.yaml") :].strip()
    assert yaml.safe_load(shown) == yaml.safe_load((run / "run.yaml").read_text())
