import dataclasses
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import vl_convert

from decef.plans import layer_names
from decef.results.claims import FAILS, HOLDS, MIXED, NOT_TESTED, REFUTED, UNDECIDED, Verdict, judge, load_claims
from decef.results.look import look_of
from decef.results.report import VERDICTS, build
from decef.training.record import to_record

DENSE = {"params": 1000, "macs": 4000, "flops": 8000, "trainable_params": 1000}
HOSTILE = '</script><script>window.entered = 1</script><img src=x onerror="window.entered=1">\'&{{ 7*7 }}'
SVG = "{http://www.w3.org/2000/svg}"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--virtual-time-budget=10000", "--dump-dom"]
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the PATH")


def run(layer, seed, top1, dataset="cifar10", share=0.667, **text):
    """A finished run; `text` gives its id, network and the like."""
    config = {
        "dataset": {"name": dataset},
        "model": {"name": text.get("model", "resnet20"), "dense_stem": True},
        "layer": {"name": layer, **({} if layer == "conv2d" else {"flops": share})},
        "train": {"name": text.get("schedule", "standard"), "epochs": 48, "batch_size": 128, "lr": 0.1},
        "seed": seed,
    }
    config["train"]["decay"] = None if layer == "conv2d" else "factors"
    summary = {
        "id": text.get("id", f"{dataset}-{layer}-{share}-s{seed}"),
        "test_top1": top1,
        "images_per_second": 100.0,
        "dense": DENSE,
        **{key: int(value * (1 if layer == "conv2d" else share)) for key, value in DENSE.items()},
        "device": "cpu",
        "machine": text.get("machine", "test machine"),
        "git_commit": "0123456789abcdef",
        "git_dirty": False,
        "epochs": 3,
    }
    epochs = [{"epoch": e, "test_top1": top1 - 30 / e, "train_loss": 2.0 / e, "val_top1": None} for e in (1, 2, 3)]
    return to_record(config, summary, epochs)


def page(*records):
    return build(records, [(claim, judge(claim, records)) for claim in load_claims()])


def grid():
    top1 = {"conv2d": (90.0, 91.0, 92.0), "decef": (89.0, 90.1, 90.9), "cpac": (80.0,)}
    cifar = [run(layer, seed, value) for layer, values in top1.items() for seed, value in enumerate(values)]
    return [*cifar, run("rank1", 0, 95.0, "digits"), run("rank1", 0, 97.0, "digits", share=0.75)]


class Parsed(HTMLParser):
    """Every address that a page names, its scripts, its style and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.scripts, self.ids = [], [], [], []
        self.words = self.style = self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.inside = tag
        self.scripts += [""] if tag == "script" else []
        for key, value in attributes:
            self.addresses += [value] if key in ("src", "href", "xlink:href", "srcset", "action", "data") else []
            self.ids += [value] if key == "id" else []
            self.style += value if key == "style" else ""

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside == "style":
            self.style += data
        else:
            self.words += data

    @property
    def data(self):
        return json.loads(self.scripts[0])


class Drawn:
    """A chart as Vega-Lite draws it with these parameters, without a browser: its marks by layer."""

    def __init__(self, spec, **parameters):
        known = {parameter["name"]: parameter["value"] for parameter in spec["params"]}
        assert parameters.keys() <= known.keys()
        values = [{"name": name, "value": value} for name, value in {**known, **parameters}.items()]
        spec = {**spec, "width": 400, "params": values}
        self.svg = ElementTree.fromstring(vl_convert.vegalite_to_svg(spec, show_warnings=True, allowed_base_urls=[]))
        self.words = [text.text for text in self.svg.iter(f"{SVG}text")]

    def marks(self, layer):
        groups = [group for group in self.svg.iter(f"{SVG}g") if f"{layer}_marks" in group.get("class", "").split()]
        return [mark for group in groups for mark in group]

    def paths(self, layer):
        return [path for group in self.marks(layer) for path in group.iter(f"{SVG}path")]

    def points(self):
        """Where every row's point is, by the beginning of its label."""
        return {mark.get("aria-label").split(";")[0]: place(mark) for mark in self.marks("points")}


def place(mark):
    return tuple(numbers(mark.get("transform")))


def numbers(text):
    return [float(number) for number in re.findall(r"-?[\d.]+", text)]


def charts(*records):
    """Of every table its charts: top-1 against FLOPs, against parameters, training."""
    found = {}
    for name, spec in Parsed(build(records, [])).data["charts"].items():
        found.setdefault(name.partition("-")[0], []).append(spec)
    return list(found.values())


def test_same_records_same_page_that_loads_nothing():
    text = page(*grid())
    assert text == page(*grid())
    parsed = Parsed(text)
    assert not {"img", "link", "iframe", "object", "embed", "base"} & set(parsed.tags)
    assert all(address.startswith(("#", "runs/", "ranks/")) for address in parsed.addresses)
    fragments = {address[1:] for address in parsed.addresses if address.startswith("#")}
    assert fragments
    assert fragments <= set(parsed.ids)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert "url(" not in parsed.style
    assert "@import" not in parsed.style
    assert '"url"' not in parsed.scripts[0]  # where Vega-Lite would look for data
    assert "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'\"" in text  # and no eval
    assert len(text.encode()) < 3e6


def test_tables_claims_and_records_stand_in_the_html_itself():
    text = page(*grid())
    words = " ".join(Parsed(text).words.split())
    assert "91.00 ± 1.00" in words
    assert "[88.52, 93.48]" in words
    assert "-1.00 [-1.25, -0.75]" in words
    assert "91.73" in words  # published
    for claim in load_claims():
        assert f'id="claim-{claim.id}"' in text
    untested = next(claim for claim in load_claims() if claim.id == "cpac-significance")
    assert untested.experiment in words
    assert 'href="runs/cifar10-decef-0.667-s1/"' in text


def test_configurations_are_told_once_for_a_table_and_in_what_a_row_differs():
    records = [*grid(), run("decef", 3, 90.0, share=0.75)]
    words = " ".join(Parsed(page(*records)).words.split())
    assert words.count("dataset.crop_padding:") == 2  # of CIFAR-10 and of the digits
    own = re.findall(r"its own configuration, seeds? ([\d, ]+) layer\.name: (\w+)(?: layer\.flops: ([\d.]+))?", words)
    assert ("0, 1, 2", "conv2d", "") in own
    assert ("0, 1, 2", "decef", "0.667") in own
    assert ("3", "decef", "0.75") in own
    words = " ".join(Parsed(build([run("decef", 0, 90.0)], [])).words.split())
    assert "layer.name: decef layer.rank: null layer.flops: 0.667" in words
    assert "its own configuration" not in words


def test_verdicts_stand_with_how_many_comparisons_were_decided():
    claims = dict(zip((HOLDS, MIXED, REFUTED, FAILS, UNDECIDED, NOT_TESTED), load_claims(), strict=False))
    text = build([], [(claim, Verdict(verdict)) for verdict, claim in claims.items()])
    words = " ".join(Parsed(text).words.split())
    assert " ".join(f"1 {verdict}" for verdict in VERDICTS) in words
    for verdict, claim in claims.items():
        assert (claim.experiment in words) == (verdict in (REFUTED, UNDECIDED, NOT_TESTED))
    assert all(
        f".pill.{name} {{" in text
        for name in ("holds", "holds-in-some-not-in-others", "doesn-t-hold-in-some-others-open")
    )

    more = {"conv2d": (91.0, 90.0), "decef": (90.1, 88.9)}  # as many as the claims look at first
    seeds = [run(layer, seed, value) for layer, values in more.items() for seed, value in enumerate(values, start=3)]
    words = " ".join(Parsed(page(*grid(), *seeds)).words.split())
    assert "1 of 1 comparison decided: 0 hold, 1 doesn't doesn't hold" in words  # decef-two-thirds-resnet
    assert "0 of 2 comparisons decided; 1 needs more seeds; 1 has one seed too few seeds to say" in words  # fair-fight
    assert "; more than 50 seeds needed)" in words  # exactly at its margin
    assert "one seed" in words


def test_foreign_text_stays_text():
    names = {key: f"{key} {HOSTILE}" for key in ("id", "model", "machine")}
    parsed = Parsed(page(run("decef", 0, 90.0, f"dataset {HOSTILE}", **names)))
    assert parsed.tags.count("script") == 3
    assert "img" not in parsed.tags
    ((row,),) = parsed.data["groups"]
    assert row["dataset"] == f"dataset {HOSTILE}"
    assert all(text in parsed.words for text in (*names.values(), HOSTILE))


def test_what_json_lacks_is_left_out():
    record = run("decef", 0, 90.0)
    record.metrics[1]["train_loss"] = float("nan")
    flops, _, training = charts(record)[0]
    (curve,) = training["data"]["values"]
    assert curve["train_loss"] == [2.0, None, 0.6667]
    assert "val_top1" not in curve
    assert flops["data"]["values"][0]["low"] is None


def test_no_runs_and_no_epochs_make_a_page_too():
    assert "0 finished runs" in Parsed(page()).words
    record = dataclasses.replace(run("conv2d", 0, 90.0), metrics=())
    assert len(charts(record)[0]) == 2  # no training curves


def test_layer_types_look_the_same_in_tables_charts_and_figures():
    names = layer_names()
    records = [run(layer, 0, 90.0 + i) for i, layer in enumerate(names)]
    text = page(*records)
    looks = {layer: look_of(layer) for layer in names}
    assert len({found.color for found in looks.values()}) == len({found.dark for found in looks.values()}) == len(names)
    for colors in ({k: found.color for k, found in looks.items()}, {k: found.dark for k, found in looks.items()}):
        assert ":root {" + "".join(f" --{layer}: {color};" for layer, color in colors.items()) in text
    flops, _, training = charts(*records)[0]
    points = {mark.get("aria-label").split(",")[1].split(";")[0].strip(): mark for mark in Drawn(flops).marks("points")}
    for layer, found in looks.items():
        mark = f'style="color: var(--{layer})" aria-hidden="true"><path d="{found.path}"/></svg>{layer}</td>'
        assert mark in text
        assert points[layer].get("fill") == f"var(--{layer}, {found.color})"
    assert len({mark.get("d") for mark in points.values()}) == len(names)
    shapes = flops["layer"][-1]["layer"][-1]["encoding"]["shape"]["scale"]
    assert dict(zip(shapes["domain"], shapes["range"], strict=True)) == {k: found.path for k, found in looks.items()}
    assert {mark.get("stroke") for mark in Drawn(training).paths("lines")} == {p.get("fill") for p in points.values()}


def test_accuracy_against_cost_has_points_intervals_and_the_front(capfd):
    (flops, params, _), _ = charts(*grid())
    for spec, title in ((flops, "FLOPs"), (params, "parameters")):
        chart = Drawn(spec)
        assert title in chart.words
        points = chart.points()
        assert list(points) == ["resnet20, conv2d", "resnet20, decef, 0.667 of FLOPs", "resnet20, cpac, 0.667 of FLOPs"]
        dense, decef, cpac = points.values()
        assert dense[1] < decef[1] < cpac[1]  # the more accurate, the higher
        assert decef[0] == cpac[0] < dense[0]
        bars = chart.marks("intervals")  # cpac has one seed
        assert [place(bar)[0] for bar in bars] == [dense[0], decef[0]]
        assert [place(bar)[1] + float(bar.get("y2")) / 2 for bar in bars] == pytest.approx([dense[1], decef[1]])
        (front,) = chart.paths("front")
        steps = [*decef, dense[0], decef[1], *dense]
        assert numbers(front.get("d")) == pytest.approx(steps, abs=0.01)
    label = chart.marks("points")[1].get("aria-label")
    assert "top-1 90.00 ± 0.95 % [87.63, 92.37], n = 3" in label
    assert "against Conv2d -1.00 [-1.25, -0.75]; 667 parameters, 0.01 MFLOPs" in label
    assert "WARN" not in capfd.readouterr().err


def test_points_that_would_lie_on_better_ones_are_moved_aside():
    spread = {
        "decef": (89.0, 90.0, 91.0),
        "cpac": (88.9, 89.9, 90.9),
        "basisconv": (88.8, 89.8, 90.8),
        "rank1": (20.0,),
    }
    records = [run(layer, seed, value) for layer, values in spread.items() for seed, value in enumerate(values)]
    spec = charts(*records)[0][0]
    left, best, right, low = (
        Drawn(spec).points()[f"resnet20, {x}, 0.667 of FLOPs"][0] for x in ("basisconv", "decef", "cpac", "rank1")
    )
    assert (left, right) == (best - 12, best + 12)
    assert low == best  # far below, it is in nobody's way
    alone = Drawn(spec, shown=["0-1"]).points()
    assert [x for x, _ in alone.values()] == [best]


def test_costs_far_apart_stand_on_a_logarithmic_axis():
    records = [run("decef", 0, 80.0, share=0.01), run("decef", 0, 85.0, share=0.1), run("conv2d", 0, 90.0)]
    chart = Drawn(charts(*records)[0][0])
    dense, small, medium = (x for x, _ in chart.points().values())
    assert dense - medium == pytest.approx(medium - small, rel=0.05)
    assert "FLOPs, logarithmic" in chart.words


def test_filters_reach_the_charts():
    (flops, _, training), digits = charts(*grid())
    assert list(Drawn(flops, shown=["0-1", "1-0"]).points()) == ["resnet20, decef, 0.667 of FLOPs"]
    assert len(Drawn(digits[0]).points()) == 2
    nothing = Drawn(flops, shown=[])
    assert "nothing to draw" in nothing.words
    assert not nothing.points()
    assert "nothing to draw" not in Drawn(flops).words
    lines = Drawn(training, shown=["0-2"]).paths("lines")
    assert [line.get("aria-label") for line in lines] == ["resnet20, cpac, 0.667 of FLOPs, seed 0"]


def test_curves_are_of_the_metric_and_the_seeds_that_are_chosen(capfd):
    (_, _, training), _ = charts(*grid())
    mean, each = Drawn(training), Drawn(training, seeds="lines", metric="train_loss")
    assert [line.get("aria-label") for line in mean.paths("lines")] == [
        "resnet20, conv2d, mean of 3 seeds",
        "resnet20, decef, 0.667 of FLOPs, mean of 3 seeds",
        "resnet20, cpac, 0.667 of FLOPs, seed 0",
    ]
    assert (len(mean.paths("bands")), len(each.paths("bands"))) == (2, 0)
    assert len(each.paths("lines")) == 7
    assert mean.words == ["1", "2", "3", "epoch", *(str(value) for value in range(50, 90, 5))]
    assert each.words[4:] == ["0.6", "0.8", "1.0", "1.2", "1.4", "1.6", "1.8", "2.0"]
    assert "WARN" not in capfd.readouterr().err
    training["data"]["values"] = [{**run, "val_top1": [None] * 3} for run in training["data"]["values"]]
    assert "no such metric was recorded" in Drawn(training, metric="val_top1").words


def test_settings_of_a_layer_type_differ_by_their_lines():
    records = [run("decef", 0, 90.0, share=share) for share in (0.5, 0.667, 0.8)]
    lines = Drawn(charts(*records)[0][2]).paths("lines")
    dashes = [line.get("stroke-dasharray").replace(",", " ") for line in lines]
    assert len(set(dashes)) == 3
    assert all(f'stroke-dasharray="{dash}"' in page(*records) for dash in dashes)  # in the legend


STEPS = """
const all = (selector, where = document) => [...where.querySelectorAll(selector)];
const seen = (selector) => all(selector).filter((e) => !e.closest("[hidden]"));
const layers = () =>
  all("[data-group='0'] tbody tr", document.getElementById("results")).map((row) => row.cells[1].textContent.trim());
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const view = async () => { await sleep(300); return {rows: seen("tr[data-row]").length, runs: seen(".run[id]").length,
  curves: seen(".lines_marks path").length, points: seen("[data-chart$='-0'] .points_marks path").length,
  legend: seen(".legend li").length, address: decodeURIComponent(location.hash),
  count: document.querySelector("output").value}; };
const form = document.querySelector(".controls");
const choose = (key, value) => { form.querySelector(`[name=${key}]`).value = value;
  form.dispatchEvent(new Event("change", {bubbles: true})); return view(); };
(async () => {
await sleep(2000);
const found = {first: layers(), start: await view()};
const head = all("#results th").find((th) => th.textContent === "top-1 %");
for (const key of ["once", "twice"]) {
  head.querySelector("button").click();
  found[key] = [layers(), head.getAttribute("aria-sort")];
}
const point = document.querySelector(".points_marks [aria-label^='resnet20, decef']");
point.focus();
found.tip = document.querySelector("#vg-tooltip-element.visible")?.textContent;
point.blur();
found.left = document.querySelector("#vg-tooltip-element.visible") === null;
const curves = document.querySelector("[data-chart='0-2'] .spots_voronoi path");
curves.dispatchEvent(new PointerEvent("pointermove", {bubbles: true}));
found.near = document.querySelector("#vg-tooltip-element.visible")?.textContent;
found.bands = seen(".bands_marks path").length;
found.lines = await choose("seeds", "lines");
found.loss = [await choose("metric", "train_loss"), seen("figcaption[data-metric]").map((e) => e.textContent)];
found.digits = await choose("dataset", "digits");
await choose("dataset", "");
form.querySelector("[value=decef]").click();
found.layer = await view();
const link = document.querySelector(".claim a[href='#run-cifar10-decef-0.667-s0']");
link.click();
found.run = [document.getElementById("run-cifar10-decef-0.667-s0").open, await view()];
document.querySelector(".points_marks [aria-label^='resnet20, decef']")
  .dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", bubbles: true}));
found.point = await view();
location.hash = "#dataset=digits&seeds=lines&network=unknown";
addEventListener("hashchange", async () => {
  found.shared = await view();
  form.querySelector("[name=reset]").click();
  found.reset = await view();
  const widths = all(".plot svg").map((e) => e.getBoundingClientRect().width);
  report({...found, errors, entered: window.entered === undefined, widths: [Math.min(...widths), Math.max(...widths)]});
});
})();
"""
WATCH = """<script>const errors = [];
addEventListener("error", (event) => { errors.push(String(event.message)); report({errors}); });
addEventListener("securitypolicyviolation", (event) => errors.push(event.violatedDirective + " " + event.blockedURI));
const report = (found) => { const out = document.createElement("pre"); out.id = "found";
  out.textContent = JSON.stringify(found); document.body.append(out); };</script>"""


def browse(text, tmp_path):
    """What the page's script hands to `report`, once a browser has run it."""
    file = tmp_path / "page.html"
    file.write_text(text)
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'browser'}", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    _, mark, rest = done.stdout.partition('<pre id="found">')
    assert mark, f"the page's script did not come to its end: {done.stdout[-2000:]} {done.stderr[-2000:]}"
    return json.loads(html.unescape(rest.partition("</pre>")[0]))


@needs_browser
def test_sorting_filters_and_charts_in_a_browser(tmp_path):
    hostile = run("basisconv", 0, 50.0, "hostile", id=f"id {HOSTILE}", model=f"model {HOSTILE}")
    text = (
        page(*grid(), hostile)
        .replace("<head>", f"<head>{WATCH}", 1)
        .replace("</body>\n</html>", f"<script>{STEPS}</script></body></html>")
    )
    found = browse(text, tmp_path)
    assert found["errors"] == []
    assert found["entered"]
    assert found["first"] == ["conv2d", "decef", "cpac"]
    assert found["once"] == [["conv2d", "decef", "cpac"], "descending"]
    assert found["twice"] == [["cpac", "decef", "conv2d"], "ascending"]
    assert "resnet20, decef" in found["tip"]
    assert "90.00 ± 0.95 %" in found["tip"]
    assert found["left"]
    assert found["near"] == "resnet20, conv2dofmean of 3 seedsepoch1value61 (60 to 62)"
    counts = ("rows", "points", "curves", "legend", "runs")
    assert [found["start"][key] for key in counts] == [6, 6, 6, 6, 10]
    assert (found["start"]["address"], found["start"]["count"]) == ("", "10 of 10 runs")
    assert found["bands"] == 2
    assert [found["lines"][key] for key in counts] == [6, 6, 10, 6, 10]
    assert found["loss"][0]["address"] == "#metric=train_loss&seeds=lines"
    assert set(found["loss"][1]) == {"Training: training loss"}
    assert [found["digits"][key] for key in counts] == [2, 2, 2, 2, 2]
    assert found["digits"]["address"] == "#dataset=digits&metric=train_loss&seeds=lines"
    assert [found["layer"][key] for key in counts] == [5, 5, 7, 5, 7]
    assert "layer=conv2d,basisconv,cpac,rank1" in found["layer"]["address"]
    opened, after = found["run"]
    assert opened
    assert after["rows"] == 6  # its filter would have hidden the run
    assert after["address"].endswith("at=run-cifar10-decef-0.667-s0")
    assert found["point"]["address"].endswith("at=runs-0-1")
    assert [found["shared"][key] for key in counts] == [2, 2, 2, 2, 2]
    assert found["reset"]["count"] == "10 of 10 runs"
    assert 200 < found["widths"][0] == found["widths"][1]  # those that a filter had hidden too


@needs_browser
def test_no_sideways_scrolling_on_a_phone(tmp_path):
    phone = f"""<!doctype html><head>{WATCH}</head><body><iframe style="width:360px;height:700px;border:0"
      srcdoc="{html.escape(page(*grid()))}"></iframe><script>
      onload = () => setTimeout(() => {{
        const inner = document.querySelector("iframe").contentWindow, root = inner.document.documentElement;
        for (const details of root.querySelectorAll("details")) details.open = true;
        const table = root.querySelector("#results .scroll"), plots = root.querySelectorAll(".plot svg");
        report({{window: inner.innerWidth, page: root.scrollWidth, table: table.scrollWidth > table.clientWidth,
          charts: Math.max(...Array.from(plots, (e) => e.getBoundingClientRect().right))}});
      }}, 3000);</script></body>"""
    found = browse(phone, tmp_path)
    assert found["window"] == 360
    assert found["page"] <= 360
    assert found["table"]  # the table is wider, and scrolls in its own box
    assert 200 < found["charts"] <= 360
