"""The plan page, from the JSON of ``medllm plan`` to the HTML a reader opens."""

from __future__ import annotations

import html
import itertools
import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from medllm.errors import UserError
from medllm.plan import mesh_picture, page
from tests.plans import a_plan, a_plan_that_does_not_fit, a_search

ATTACK = "<script>alert('x')</script> & <img src=https://example.org/x.png>"
MESHES = [
    {"fsdp": 4},
    {"fsdp": 8, "tensor": 2},
    {"fsdp": 256},
    {"fsdp": 128, "tensor": 2},
    {"data": 2, "fsdp": 4, "tensor": 2},
    {"data": 1, "fsdp": 1},
    {"data": 32, "fsdp": 2, "tensor": 2, "sequence": 2},
    {"fsdp": 17},
    {},
]
PLANS = {
    "four GPUs": a_plan({"fsdp": 4}, "a100-80g", ""),
    "a slice": a_plan({"fsdp": 8, "tensor": 2}),
    "a pod": a_plan({"fsdp": 256}, topology="16x16"),
    "three axes": a_plan({"data": 2, "fsdp": 4, "tensor": 2}),
    "one device": a_plan({}, "a100-80g", "", collectives=[]),
    "misfit": a_plan_that_does_not_fit(),
    "search": a_search(),
    "vain search": a_search(fitting=False),
}


class Reader(HTMLParser):
    """What a page says, what it would fetch or run, and whether its tags nest."""

    VOID = frozenset(("meta", "br", "wbr", "img"))
    INLINE = frozenset(("b", "code", "wbr"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.faults: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self.part(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def part(self, tag):
        if tag not in self.INLINE:
            self.words.append(" ")

    def handle_endtag(self, tag):
        self.part(tag)
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def classed(self, name: str) -> list[dict[str, str]]:
        return [attributes for _, attributes in self.tags if name in attributes.get("class", "").split()]


def percents(attributes: list[dict[str, str]]) -> list[float]:
    """The percentages that the elements' styles give."""
    return [float(re.search(r"([\d.]+)%", one["style"]).group(1)) for one in attributes if "style" in one]


def section(text: str, name: str) -> Reader:
    """One section of a page."""
    return Reader(re.search(rf'<section id="{name}">.*?</section>', text, re.DOTALL).group(0))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_page_is_well_formed_and_asks_nothing_of_the_network(plan):
    text = page.render(plan)
    read = Reader(text)
    assert read.faults == []
    assert read.open == []
    assert {"script", "link", "img", "iframe", "object", "a", "image", "use"}.isdisjoint(tag for tag, _ in read.tags)
    assert "default-src 'none'" in text
    assert "url(" not in text
    assert "@import" not in text
    assert not re.search("https?://", text)
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_every_drawing_is_well_formed_and_named(plan):
    drawings = re.findall(r"<svg.*?</svg>", page.render(plan), re.DOTALL)
    assert bool(drawings) == bool(plan.get("best", True))
    for drawing in drawings:
        assert ElementTree.fromstring(drawing).attrib["aria-label"]


def test_the_page_says_whether_it_fits_and_what_the_figures_are():
    text = Reader(page.render(a_plan({"fsdp": 8, "tensor": 2}))).text
    for words in (
        "qwen2.5-72b fits on 16 × v5e (4x4)",
        "Fits. Each of the 16 devices needs 9.00 GiB of the 15.75 GiB that a program can have; 6.75 GiB (43 %) stay free.",
        "Research software",
        "a roofline, not a measurement",
        "72.7 billion parameters",
        "≥ 4.60 s",
        "bound by compute",
        "≤ 7,120",
        "32,768 tokens a step",
        "910 TFLOP at 197 TFLOP/s",
        "420 GB at 819 GB/s",
        "Google Cloud's TPU documentation",
        "200 GB/s between devices",
        "libtpu 0.0.51",
        "quantization nf4",
    ):
        assert words in text


def test_what_does_not_fit_is_said_in_words_with_what_would_help():
    text = Reader(page.render(a_plan_that_does_not_fit())).text
    assert "qwen2.5-72b does not fit on 16 × v5e" in text
    assert "Each of the 16 devices would need 18.20 GiB, and a program can have 15.75 GiB: 2.45 GiB too much." in text
    assert "Most of it is activations and temporaries, 15.50 GiB. What would make it less: fewer or shorter rows" in text
    assert "too much 2.45 GiB 16 %" in text


def test_the_memory_bar_is_as_long_as_what_is_needed():
    read = section(page.render(a_plan({"fsdp": 16})), "memory")
    shares = percents(read.classed("part"))
    assert shares == pytest.approx([100 * gib / 15.75 for gib in (2.4, 0.05, 0.1, 0.05, 6.3, 0.1)], abs=1e-3)
    assert not read.classed("limit")
    for words in (
        "as they are stored 2.40 GiB 15 %",
        "the LoRA matrices 0.05 GiB < 1 %",
        "included 6.30 GiB 40 %",
        "free 6.75 GiB 43 %",
        "gradients 2.50 GiB 6.30 GiB 0.15 GiB 34.2 s",
    ):
        assert words in read.text
    assert "cache" not in read.text  # nothing of it is there


def test_a_bar_that_is_too_long_shows_where_the_memory_ends():
    read = section(page.render(a_plan_that_does_not_fit()), "memory")
    assert sum(percents(read.classed("part"))) == pytest.approx(100, abs=0.01)
    assert percents(read.classed("limit")) == pytest.approx([100 * 15.75 / 18.2], abs=1e-3)
    assert percents(read.classed("over")) == pytest.approx([100 - 100 * 15.75 / 18.2], abs=1e-3)


def test_a_kind_of_memory_the_page_does_not_know_is_shown_by_its_name():
    read = section(page.render(a_plan({"fsdp": 16}, by_kind={"base": 8.5, "scratch": 0.5})), "memory")
    assert "scratch 0.50 GiB 3 %" in read.text
    assert read.classed("paint-other")


def test_communication_is_a_bar_a_kind_the_most_bytes_first():
    read = section(page.render(a_plan({"fsdp": 16})), "communication")
    assert percents(read.classed("part")) == pytest.approx([100 * b / 40.1 for b in (36, 4.1, 19, 0.24)], abs=1e-3)
    assert "59.3 GB a device and step" in read.text
    names = ["all-gather", "all-reduce", "reduce-scatter"]
    assert sorted(names, key=read.text.index) == names
    assert "40.1 GB · 572 times, 200 ms u8 36.0 GB, bf16 4.10 GB" in read.text
    paints = [next(name for name in one["class"].split() if name.startswith("paint")) for one in read.classed("part")]
    assert paints[2] == paints[3]  # one dtype, one colour
    assert len(set(paints)) == 3


def test_one_device_exchanges_nothing():
    assert "None: there is one device." in section(page.render(PLANS["one device"]), "communication").text


def test_times_are_bars_and_the_longest_is_said():
    read = section(page.render(a_plan({"fsdp": 16})), "time")
    assert percents(read.classed("part")) == pytest.approx([100, 100 * 0.5 / 4.6, 100 * 0.3012 / 4.6], abs=1e-3)
    assert "4.60 s · the longest" in read.text


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_device_is_drawn_once_where_the_mesh_has_it(mesh):
    numbers = np.random.default_rng(0).permutation(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    picture = mesh_picture.draw(mesh, numbers.tolist())
    outer = [size for size in mesh.values() if size > 1][:-2]
    assert len(picture.panels) == min(mesh_picture.PANELS, math.prod(outer))
    assert len(picture.panels) + picture.hidden == math.prod(outer)
    for panel in picture.panels:
        assert len({(cell.x, cell.y) for cell in panel.cells}) == len(panel.cells)
        for cell in panel.cells:
            at = dict(word.split() for word in cell.place.split(", ") if word)
            assert cell.device == numbers[tuple(int(at.get(name, 0)) for name in mesh)]
            assert 0 <= cell.x < picture.width <= 16
            assert 0 <= cell.y <= picture.height - 1
    drawn = [cell.device for panel in picture.panels for cell in panel.cells]
    assert len(set(drawn)) == len(drawn) == picture.drawn
    assert picture.hidden or sorted(drawn) == list(range(numbers.size))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_devices_hold_one_piece_just_when_they_are_at_one_place_on_the_axes_it_is_cut_over(mesh):
    for length in range(len(mesh) + 1):
        for over in itertools.combinations(mesh, length):
            picture = mesh_picture.draw(mesh, cut_over=over)
            held: dict[tuple[str, ...], set[int]] = {}
            for cell in itertools.chain.from_iterable(panel.cells for panel in picture.panels):
                place = tuple(word for word in cell.place.split(", ") if word.split() and word.split()[0] in over)
                held.setdefault(place, set()).add(cell.piece)
            assert all(len(pieces) == 1 for pieces in held.values())
            assert len(set().union(*held.values())) == len(held)
            pieces, copies = mesh_picture.pieces_and_copies(mesh, over)
            assert pieces * copies == math.prod(mesh.values())
            assert picture.hidden or pieces == len(held)


@pytest.mark.parametrize(
    ("mesh", "over", "sides"),
    [
        ({"fsdp": 8, "tensor": 2}, (), 2 * (8 + 2)),
        ({"fsdp": 8, "tensor": 2}, ("fsdp",), 2 * (8 + 2) + 7 * 2),
        ({"fsdp": 8, "tensor": 2}, ("tensor",), 2 * (8 + 2) + 8),
        ({"fsdp": 8, "tensor": 2}, ("fsdp", "tensor"), 9 * 2 + 3 * 8),
        ({"fsdp": 256}, (), 4 * 16),
        ({"fsdp": 256}, ("fsdp",), 2 * 17 * 16),
        ({"fsdp": 32, "tensor": 2}, (), 2 * 2 * (16 + 2)),
    ],
)
def test_lines_are_drawn_around_what_is_cut_and_nowhere_else(mesh, over, sides):
    (panel,) = mesh_picture.draw(mesh, cut_over=over).panels
    drawn = re.findall(r"M[\d.]+ [\d.]+[hv]1", panel.edges)
    assert "".join(drawn) == panel.edges
    assert len(set(drawn)) == len(drawn) == sides


def test_the_longer_axis_runs_across_and_a_long_one_goes_on_below():
    flat = mesh_picture.draw({"tensor": 2, "fsdp": 8})
    assert (flat.across, flat.down, flat.width, flat.height) == ("fsdp", "tensor", 8, 2)
    assert flat.columns == tuple("01234567")
    pod = mesh_picture.draw({"fsdp": 256})
    assert (pod.width, pod.height, pod.rows[1]) == (16, 16, (1.5, "fsdp 16–31"))


def test_every_array_stands_under_its_placement_with_its_shape_and_size():
    plan = a_plan({"fsdp": 8, "tensor": 2})
    read = section(page.render(plan), "placement")
    assert all(read.text.count(array["name"]) == 1 for array in plan["parameters"])
    cut = [array for array in plan["parameters"] if array["name"] != "norm.scale"]
    total = sum(array["gib"] for array in cut)
    assert (
        f"Cut over fsdp and tensor 16 pieces, each on one device. {len(cut)} arrays, {total:.2f} GiB on each device."
        in read.text
    )
    assert "Whole on every device One piece, and each of the 16 devices holds all of it. 1 array, 16.0 KiB" in read.text
    assert "layers.mlp.gate_proj.codes 0.56 GiB 80 × 29,568 ÷ 16 tensor · fsdp × 4,096 uint8 base weights" in read.text
    assert "layers.mlp.down_proj.codes 0.56 GiB 80 × 8,192 ÷ 8 fsdp × 14,784 ÷ 2 tensor uint8" in read.text


def test_a_search_shows_the_ranking_before_the_best_plan():
    text = page.render(a_search())
    assert text.index('id="candidates"') < text.index('id="memory"')
    read = section(text, "candidates")
    assert "3 of 12 candidates fit. The best by predicted tokens a second: fsdp=16, remat layer, rows 1." in Reader(text).text
    assert "1 best fsdp=16 layer 1 7,120 4.60 s 9.00 GiB 31.5 s" in read.text
    assert len(read.classed("fails")) == 8
    assert "? not known fsdp=8,tensor=2 none 2 – the compiler gave up: RESOURCE_EXHAUSTED" in read.text
    assert "✗ no tensor=16 none 2 27.10 GiB 27.1 GiB estimated before compiling; 15.75 are there" in read.text


def test_a_search_in_vain_shows_why_and_no_plan():
    text = page.render(a_search(fitting=False))
    assert (
        "None of 12 candidates fits in the 15.75 GiB that a program can have on one v5e; the smallest needs 16.10 GiB" in text
    )
    assert 'id="memory"' not in text
    assert 'id="mesh"' not in text
    assert "16.1 GiB estimated before compiling" in text


def test_a_plan_whose_program_the_compiler_refused_has_a_page():
    whole = a_plan_that_does_not_fit()
    kept = "ok fits model stage target device devices memory_gib mesh gib_per_device headroom_gib".split()
    read = Reader(page.render({key: whole[key] for key in kept}))
    assert "18.20 GiB" in read.text
    assert "its time and communication are not known" in read.text
    assert read.faults == []


def test_what_a_file_or_a_setting_says_is_shown_as_text_and_never_as_markup():
    plan = a_plan({ATTACK: 4, "fsdp": 2}, ATTACK, ATTACK, rules=ATTACK, stage=ATTACK, bound=ATTACK)
    plan["model"] = plan["model"] | {"name": ATTACK}
    plan["settings"] = {ATTACK: ATTACK}
    plan["versions"] = {ATTACK: ATTACK, "compiler": ATTACK}
    plan["rates"] = plan["rates"] | {"source": ATTACK}
    plan["by_kind"] = {ATTACK: 9.0}
    plan["seconds"] = {ATTACK: 1.0}
    plan["programs"] = [plan["programs"][0] | {"name": ATTACK}]
    plan["collectives"] = [plan["collectives"][0] | {"kind": ATTACK, "dtype": ATTACK}]
    plan["parameters"] = [{"name": ATTACK, "kind": ATTACK, "shape": [8], "dtype": ATTACK, "spread": [[ATTACK]], "gib": 1.0}]
    found = a_search()["candidates"][-1] | {"mesh": {ATTACK: 4}, "remat": ATTACK, "why": ATTACK}
    for shown in (plan, plan | {"candidates": [found], "best": plan}):
        text = page.render(json.loads(json.dumps(shown)))
        read = Reader(text)
        assert {"script", "img"}.isdisjoint(tag for tag, _ in read.tags)
        assert read.faults == []
        assert read.text.count(ATTACK) >= 20
        assert all(not name.startswith("on") for _, attributes in read.tags for name in attributes)
        assert ATTACK not in html.unescape("".join(attributes.get("style", "") for _, attributes in read.tags))


def test_the_same_plan_gives_the_same_bytes():
    assert page.render(a_search()) == page.render(a_search())


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    page.write_page(tmp_path / "deep" / "plan.html", a_plan({"fsdp": 4}))
    assert (tmp_path / "deep" / "plan.html").read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["plan.html"]
    with pytest.raises(UserError, match="is a folder"):
        page.write_page(tmp_path / "deep", a_plan({"fsdp": 4}))
    with pytest.raises(KeyError):
        page.write_page(tmp_path / "other" / "plan.html", {})
    assert [file.name for file in tmp_path.iterdir()] == ["deep"]


def test_a_pod_of_thousands_of_devices_is_a_page_of_bearable_size():
    text = page.render(a_plan({"data": 4, "fsdp": 512, "tensor": 4}, "v5p", "16x16x32"))
    assert "8192 × v5p" in text
    assert len(text) < 2e6


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (page.gib(15.75), "15.75 GiB"),
        (page.gib(0.0), "0.00 GiB"),
        (page.gib(1.25 / 1024), "1.25 MiB"),
        (page.gib(16 / 2**20), "16.0 KiB"),
        (page.gib(12 / 2**30), "12 B"),
        (page.whole_gib(0.001), "< 0.01 GiB"),
        (page.amount(9.1e14, "FLOP"), "910 TFLOP"),
        (page.amount(1.234e16, "FLOP"), "12,340 TFLOP"),
        (page.amount(3.6e10, "B"), "36.0 GB"),
        (page.amount(999.96e6, "B"), "1.00 GB"),
        (page.amount(12, "B"), "12 B"),
        (page.seconds(0), "0 µs"),
        (page.seconds(4.6), "4.60 s"),
        (page.seconds(0.18), "180 ms"),
        (page.seconds(0.0012), "1.20 ms"),
        (page.seconds(9.996), "10.0 s"),
        (page.seconds(125), "2 min 05 s"),
        (page.seconds(7384), "2 h 03 min"),
        (page.rate(7123.478), "7,120"),
        (page.rate(41.24), "41.2"),
        (page.percent(0.001), "< 1 %"),
        (page.mesh_words({"fsdp": 8, "tensor": 2}), "fsdp=8,tensor=2"),
        (page.mesh_words({}), "one device"),
    ],
)
def test_amounts_are_written_in_the_unit_that_suits_them(written, expected):
    assert written == expected


def test_a_program_that_cannot_be_read_has_no_communication_rather_than_none():
    plan = a_plan({"fsdp": 4})
    del plan["collectives"], plan["bytes"]
    plan |= {"seconds": {"compute": 2.0}, "bound": "compute", "step_s": 2.0}
    shown = page.render(plan)
    assert "Not known, nor is the traffic of the memory" in shown
    assert "no device needs what another has" not in shown
