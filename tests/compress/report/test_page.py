"""The page of a compression report: well-formed, complete, safe, and legible at 14 matrices as at 560."""

import html
import json
import math
import random
import re
import shlex
import shutil
import subprocess
import time
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest
import torch

from cluscomp_peft.cli import _parser
from cluscomp_peft.compress.report.page import OTHERS, render_report

SHAPES = {
    "self_attn.q_proj": [512, 512],
    "self_attn.k_proj": [128, 512],
    "self_attn.v_proj": [128, 512],
    "self_attn.o_proj": [512, 512],
    "mlp.gate_proj": [1792, 512],
    "mlp.up_proj": [1792, 512],
    "mlp.down_proj": [512, 1792],
}
VOID = {"meta"}


def invented(blocks):
    """A full report with 7 matrices in each block."""
    draw = random.Random(0)
    matrices = {}
    for block in range(blocks):
        for kind, shape in SHAPES.items():
            bits, error = draw.uniform(2.5, 3.0), draw.uniform(0.15, 0.3)
            matrices[f"model.layers.{block}.{kind}"] = {
                "shape": shape,
                "spec": {"group_size": 4, "num_clusters": 1024, "scale_in": True, "scale_out": True},
                "true_bits": bits,
                "bytes": int(bits * math.prod(shape) / 8),
                "relative_error": error,
                "output_error": {"clustered": error / 2, "feedback": error / 3},
                "sensitivity": draw.random() * 1e-3,
                "seconds": draw.random() * 5,
            }
    errors = {"error_before": 0.09, "error_after": 0.03}
    return {
        "summary": {
            "source": "org/model",
            "bits": 3.0,
            "true_bits": 2.98,
            "relative_error": 0.21,
            "bytes": sum(entry["bytes"] for entry in matrices.values()) + 1_000_000,
            "source_bytes": 99_000_000,
            "seconds": 512.3,
            "peak_memory": 812_345_678,
            "calibration": "text.jsonl",
            "sequences": 128,
            "tokens": 262_144,
            "dtype": "bfloat16",
            "settings": {"bits": 3.0, "scales": True, "feedback": False, "calibration": "my text.jsonl"},
            "versions": {"torch": "2.13.0"},
            "stages": {"calibrate": 12.3, "allocate": 0.4, "cluster": 100.0, "feedback": 80.0, "write": 5.0},
        },
        "matrices": matrices,
        "blocks": {f"model.layers.{block}": {**errors, "epochs": 12, "seconds": 33.0} for block in range(blocks)},
        "losses": {"dense": 3.70, "compressed": 3.75},
    }


class Reader(HTMLParser):
    """Collects text, tags and attributes, and checks that every tag is closed where it should be."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.words, self.attributes = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, words):
        self.words.append(words)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def plots(page):
    """The SVG elements by their title."""
    root = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))
    return {svg.find("title").text: svg for svg in root.iter("svg")}


def headings(page):
    root = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))
    return [element.text for element in root.iter() if element.tag in ("h2", "summary")]


def boxes(svg):
    """(left, top, right, bottom) of every text, as wide as it is in a common font of 13 pixels."""
    found = []
    for text in svg.iter("text"):
        x, y, width = float(text.get("x")), float(text.get("y")), 7.1 * len(text.text or "")
        left = x - {"end": width, "mid": width / 2}.get(text.get("class").partition(" ")[0], 0)
        found.append((left, y - 10, left + width, y + 2))
    return found


def test_it_begins_with_the_verdict_and_ends_with_every_matrix():
    report = invented(3)
    reader = Reader(page := render_report("a model", report))
    order = [
        "Size",
        "Bits by block",
        "Error by block",
        "Error against bits",
        "The 10 worst matrices",
        "Command",
        "Load it",
    ]
    shown = headings(page)
    assert [heading for heading in shown if heading in order] == order
    assert shown.index("Every matrix (21)") > shown.index("Load it")
    verdict = "loss on held-out calibration text: 3.7500 nats per token, dense 3.7000 (perplexity 42.52, dense 40.45)"
    assert reader.text.index(verdict) < reader.text.index("true bits per weight")


@pytest.mark.parametrize("blocks", [1, 2, 80])
def test_a_full_report_is_well_formed_and_complete(blocks):
    report = invented(blocks)
    reader = Reader(page := render_report("a model", report))
    assert len(plots(page)) == 2
    assert set(reader.words) >= set(report["matrices"])
    for words in ("2.98", "of 3 allowed", "0.21", "8.538 min", "812.3 MB", "text.jsonl", "org/model", "262144 tokens"):
        assert words in reader.text
    assert 'from_pretrained("a model")' in reader.text
    assert "Findings of ACL 2025" in reader.text and "arXiv:2503.13089" in reader.text


@pytest.mark.parametrize(
    ("losses", "words", "bad"),
    [
        ({"dense": 3.0, "compressed": 3.1}, "3.1000 nats per token, dense 3.0000", False),
        ({"dense": 3.0, "compressed": 3.5}, "The model lost 0.50 nats", True),
        ({}, "What the model lost was not measured. This does: cluscomp evaluate a model --teacher org/model", True),
    ],
)
def test_a_verdict_that_is_bad_is_red(losses, words, bad):
    page = render_report("a model", {**invented(2), "losses": losses})
    assert words in Reader(page).text
    assert ('class="verdict bad"' in page) == bad


def test_560_matrices_are_quick_and_small():
    report = invented(80)
    started = time.perf_counter()
    page = render_report("70B", report)
    assert time.perf_counter() - started < 2
    assert len(page.encode()) < 2_000_000


@pytest.mark.parametrize("blocks", [1, 2, 32, 80, 126])
def test_everything_is_drawn_inside_and_no_text_covers_another(blocks):
    report = invented(blocks)
    report["matrices"]["lm_head"] = {"true_bits": 3.0, "bytes": 1, "relative_error": 0.1}
    page = render_report("a model", report)
    assert not re.search(r"\b(nan|inf)\b", page, re.IGNORECASE)
    for title, svg in plots(page).items():
        _, _, width, height = map(float, svg.get("viewBox").split())
        for element in svg.iter():
            for path in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", element.get("d", "")):
                assert 0 <= float(path[0]) <= width and 0 <= float(path[1]) <= height, title
            for name, limit in (("x", width), ("cx", width), ("y", height), ("cy", height)):
                assert 0 <= float(element.get(name, 0)) <= limit, title
        texts = boxes(svg)
        for index, (left, top, right, bottom) in enumerate(texts):
            assert 0 <= left and right <= width and 0 <= top and bottom <= height, title
            for other in texts[:index]:
                apart = right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
                assert apart, f"{title}: {texts[index]} covers {other}"


def test_a_map_shows_the_numbers_and_collapses_where_they_are_all_alike():
    report = {"summary": {}, "matrices": {f"h.{i}.fc": {"true_bits": bits} for i, bits in enumerate([1.0, 2.0, 4.0])}}
    page = render_report("a model", report)
    assert re.findall(r'--v:(\d+)%" title="([^"]*)"', page) == [
        ("0", "fc, block 0: 1"),
        ("33", "fc, block 1: 2"),
        ("100", "fc, block 2: 4"),
    ]
    for entry in report["matrices"].values():
        entry["true_bits"] = 3.0
    page = render_report("a model", report)
    assert "--v:3" not in page and "All matrices are alike: 3 true bits per weight." in Reader(page).text


def test_the_worst_matrices_come_first():
    matrices = {f"h.{i}.fc": {"true_bits": 3.0, "relative_error": 0.01 * i} for i in range(15)}
    text = Reader(render_report("a model", {"summary": {}, "matrices": matrices})).text
    worst = re.findall(r"h\.(\d+)\.fc 3 ", text[text.index("The 10 worst") : text.index("Load it")])
    assert worst == [str(i) for i in range(14, 4, -1)]


def test_the_command_is_one_that_the_command_line_takes():
    page = render_report("a model", invented(1))
    [command] = re.findall(r"<code>(cluscomp compress .*)\n", page)
    options = _parser().parse_args(shlex.split(html.unescape(command))[1:])
    assert (options.source, options.bits, options.scales, options.feedback) == ("org/model", 3.0, True, False)
    assert options.calibration == "my text.jsonl" and "Made with torch 2.13.0." in Reader(page).text


def test_other_methods_are_where_normal_weights_put_them():
    weights = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    least = weights.amin(1, keepdim=True)
    for bits in (2, 3, 4):
        step = (weights.amax(1, keepdim=True) - least) / (2**bits - 1)
        error = ((weights - least) / step).round() * step + least - weights
        assert OTHERS[f"RTN {bits}"] == (bits + 0.5, pytest.approx(float(error.norm() / weights.norm()), abs=0.003))


def test_values_of_different_magnitude_are_drawn_on_a_logarithmic_axis():
    blocks = {f"h.{i}": {"error_clustered": 10.0**-i} for i in range(4)}
    page = render_report("a model", {"summary": {}, "matrices": {}, "blocks": blocks})
    svg = plots(page)["Output error by block"]
    heights = [float(dot.get("cy")) for dot in svg.iter("circle")]
    steps = [low - high for high, low in pairwise(heights)]
    assert steps == pytest.approx([steps[0]] * 3, abs=0.2) and steps[0] > 20
    assert "logarithmic" in Reader(page).text


def test_the_bar_of_the_size_has_the_dense_part():
    report = invented(2)
    page = render_report("a model", report)
    bar = re.search(r"<strong>this model</strong><span>(.*?)</span>", page)[1]
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", bar)]
    clustered = sum(entry["bytes"] for entry in report["matrices"].values())
    assert widths == pytest.approx([100 * clustered / 99e6, 100 * 1e6 / 99e6], abs=0.01)


def test_experts_are_one_box_of_means():
    matrices = {f"model.layers.{b}.mlp.experts.{i}.up": {"true_bits": i + b} for b in (0, 1) for i in (2, 4)}
    page = render_report("a model", {"summary": {}, "matrices": matrices})
    assert "mlp.experts.*.up, block 0: 3" in page and "mlp.experts.*.up, block 1: 4" in page
    assert "a box is their mean" in Reader(page).text


def test_two_towers_are_told_apart():
    matrices = {name: {"true_bits": bits} for name, bits in (("text.layers.0.fc", 2), ("vision.blocks.0.fc", 3))}
    text = Reader(render_report("a model", {"summary": {}, "matrices": matrices})).text
    assert "text.layers.fc" in text and "vision.blocks.fc" in text


def test_a_hundred_kinds_stay_a_page():
    matrices = {f"h.0.m{i}": {"true_bits": 3.0 + i, "relative_error": 0.1, "bytes": 10} for i in range(100)}
    page = render_report("a model", {"summary": {}, "matrices": matrices})
    assert page.count('<div class="row">') == 24
    assert "other kinds" in page and set(Reader(page).words) >= set(matrices)


@pytest.mark.parametrize(
    "hostile", ['</title><script>alert("x")</script>', "a\x00b\ud800c\x1b", "&amp;<b>'\"", "é ‖ 模型 {}"]
)
def test_hostile_text_is_escaped(hostile):
    entry = {"true_bits": 3.0, "relative_error": 0.1, "bytes": 10, "shape": [hostile, 1]}
    report = {
        "summary": {"source": hostile, "dtype": hostile, "calibration": hostile, "stages": {hostile: 1.0}},
        "matrices": {f"h.0.{hostile}": {**entry, "spec": {"group_size": hostile}}, hostile: entry},
        "blocks": {"h.0": {f"error_{hostile}": 0.1}},
        "losses": {hostile: 3.0, hostile + "2": 4.0},
    }
    page = render_report(hostile, json.loads(json.dumps(report)))
    page.encode("utf-8")
    reader = Reader(page)
    assert not {"script", "b", "iframe"} & set(reader.tags)
    assert len(plots(page)) == 2
    assert re.sub("[\x00\ud800\x1b]", "\ufffd", hostile) in reader.words


def test_only_the_paper_is_linked_and_nothing_is_loaded():
    page = render_report("a model", invented(2))
    assert re.findall(r"\w+://[^\"'\s<)]+", page) == ["https://arxiv.org/abs/2503.13089"]
    reader = Reader(page)
    assert not {"script", "link", "img", "iframe", "image", "use", "object"} & set(reader.tags)
    assert not {"src", "onclick", "onload", "xlink:href"} & {name for name, _ in reader.attributes}
    assert "url(" not in page and "@import" not in page


def test_every_plot_has_a_title_and_numbers():
    reader = Reader(page := render_report("a model", invented(2)))
    assert reader.tags.count("svg") == 2 and reader.tags.count("details") == 5
    assert all(svg[0].tag == "title" for svg in plots(page).values())
    assert "prefers-color-scheme: dark" in page


@pytest.mark.parametrize("empty", [None, {}, [], "?", 3, math.nan])
@pytest.mark.parametrize("key", ["summary", "matrices", "blocks", "losses"])
def test_any_part_may_be_missing_or_damaged(key, empty):
    Reader(render_report("a model", {**invented(2), key: empty}))


@pytest.mark.parametrize("value", [None, "?", math.nan, math.inf, -1.0, 0, 1e300, 10**400, True, [], {}])
def test_any_number_may_be_missing_or_damaged(value):
    report = invented(2)
    for section in (report["summary"], report["summary"]["stages"], report["losses"], *report["blocks"].values()):
        section.update({key: value for key, old in section.items() if isinstance(old, int | float)})
    for entry in report["matrices"].values():
        entry.update(dict.fromkeys(entry, value))
    page = render_report("a model", report)
    Reader(page)
    assert not re.search(r"(?<![a-z])(nan|inf)(?![a-z])", page, re.IGNORECASE)


def test_a_report_of_an_older_version():
    keys = ("relative_error", "true_bits", "seconds")
    matrices = {name: {key: entry[key] for key in keys} for name, entry in invented(2)["matrices"].items()}
    page = render_report("a model", {"summary": {"true_bits": 3.9, "calibration": None}, "matrices": matrices})
    text = Reader(page).text
    assert "Command" not in headings(page) and "Size" not in headings(page)
    assert "3.9" in text and "None" not in text and "sensitivity" not in text


def test_an_empty_report_is_a_page():
    page = render_report("a model", {})
    assert not plots(page) and "from_pretrained" in Reader(page).text


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
MEASURE = """<body><iframe style="border:0;width:{width}px;height:900px" srcdoc="{page}"></iframe><script>
onload = () => {{
  const root = document.querySelector("iframe").contentDocument, wide = [];
  for (const e of root.querySelectorAll("body *")) {{
    const box = e.getBoundingClientRect(), inside = e.closest(".tall, .wide, details");
    if (!inside && box.width && (box.right > {width} + 1 || box.left < -1)) wide.push(e.tagName + e.className);
    const block = !e.closest("svg") && getComputedStyle(e).display == "block";
    if (!inside && block && e.scrollWidth > e.clientWidth + 1) wide.push(e.tagName);
  }}
  const found = [root.documentElement.scrollWidth, wide.length, ...wide.slice(0, 5)];
  document.title = "measured " + found.join(" ");
}}</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser here")
@pytest.mark.parametrize("width", [360, 390, 1280])
def test_nothing_is_cut_or_scrolled_sideways_in_a_browser(tmp_path, width):
    page = tmp_path / "page.html"
    page.write_text(MEASURE.format(width=width, page=html.escape(render_report("a model", invented(40)))))
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--dump-dom",
        f"file://{page}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert f"<title>measured {width} 0</title>" in done.stdout, done.stdout[-300:]
