import html
import json
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import yaml

from decef.results.claims import FAILS, HOLDS, MIXED, NOT_TESTED, UNDECIDED, Verdict, judge, load_claims
from decef.results.report import VERDICTS, build
from decef.results.tables import Record

DENSE = {"params": 1000, "macs": 4000, "flops": 8000, "trainable_params": 1000}
HOSTILE = '</script><script>window.entered = 1</script><img src=x onerror="window.entered=1">\'&{{ 7*7 }}'
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--virtual-time-budget=10000", "--dump-dom"]
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the PATH")


def run(layer, seed, top1, dataset="cifar10", share=0.667, **text):
    """A finished run and its epochs; `text` gives its id, network and the like."""
    config = {
        "dataset": {"name": dataset},
        "model": {"name": text.get("model", "resnet20"), "dense_stem": True},
        "layer": {"name": layer, **({} if layer == "conv2d" else {"flops": share})},
        "train": {"name": text.get("schedule", "quick"), "epochs": 3, "batch_size": 128, "schedule": "onecycle"},
        "seed": seed,
    }
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
    return Record(config, summary), epochs


def page(*runs):
    records = [record for record, _ in runs]
    verdicts = [(claim, judge(claim, records)) for claim in load_claims()]
    return build(records, {record.summary["id"]: epochs for record, epochs in runs}, verdicts)


def grid():
    top1 = {"conv2d": (90.0, 91.0, 92.0), "decef": (89.0, 90.2, 90.8), "cpac": (80.0,)}
    cifar = [run(layer, seed, value) for layer, values in top1.items() for seed, value in enumerate(values)]
    return [*cifar, run("rank1", 0, 95.0, "digits"), run("rank1", 0, 97.0, "digits", share=0.75)]


class Parsed(HTMLParser):
    """Every address that a page names, its scripts and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.scripts, self.words, self.ids, self.inside = [], [], [], "", [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.inside = tag
        for key, value in attributes:
            self.addresses += [value] if key in ("src", "href", "xlink:href", "srcset", "action", "data") else []
            self.ids += [value] if key == "id" else []

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append(data)
        else:
            self.words += data

    @property
    def data(self):
        return json.loads(self.scripts[0])


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
    assert "url(" not in text
    assert "@import" not in text


def test_tables_claims_and_records_stand_in_the_html_itself():
    text = page(*grid())
    words = " ".join(Parsed(text).words.split())
    assert "91.00 ± 1.00" in words
    assert "[88.52, 93.48]" in words
    assert "-1.00 [-1.50, -0.50]" in words
    assert "91.73" in words  # published
    for claim in load_claims():
        assert f'id="claim-{claim.id}"' in text
    untested = next(claim for claim in load_claims() if claim.id == "cpac-significance")
    assert untested.experiment in words
    assert 'href="runs/cifar10-decef-0.667-s1/metrics.jsonl"' in text
    assert (
        yaml.safe_dump(grid()[0][0].config, sort_keys=False).split()
        == words[words.index("dataset: name: cifar10") : words.index("seed: 0") + 7].split()
    )


def test_verdicts_stand_with_how_many_comparisons_were_decided():
    claims = dict(zip((HOLDS, MIXED, FAILS, UNDECIDED, NOT_TESTED), load_claims(), strict=False))
    text = build([], {}, [(claim, Verdict(verdict)) for verdict, claim in claims.items()])
    words = " ".join(Parsed(text).words.split())
    assert " ".join(f"1 {verdict}" for verdict in VERDICTS) in words
    for verdict, claim in claims.items():
        assert (claim.experiment in words) == (verdict in (UNDECIDED, NOT_TESTED))
    assert all(f".pill.{name} {{" in text for name in ("holds", "holds-in-some-not-in-others", "doesn-t-hold"))

    words = " ".join(Parsed(page(*grid())).words.split())
    assert "1 of 1 comparison decided: 0 hold, 1 doesn't doesn't hold" in words  # decef-two-thirds-resnet
    assert "0 of 2 comparisons decided; 2 need more seeds too few seeds to say" in words  # fair-fight
    assert "; more than 1000 seeds needed)" in words  # exactly at its margin
    assert "one seed" in words


def test_foreign_text_stays_text():
    names = {key: f"{key} {HOSTILE}" for key in ("id", "model", "machine", "schedule")}
    record, epochs = run("decef", 0, 90.0, f"dataset {HOSTILE}", **names)
    parsed = Parsed(page((record, epochs)))
    assert parsed.tags.count("script") == 2
    assert "img" not in parsed.tags
    ((row,),) = parsed.data["groups"]
    assert (row["dataset"], row["schedule"]) == (f"dataset {HOSTILE}", names["schedule"])
    assert all(text in parsed.words for text in (*names.values(), HOSTILE))


def test_what_json_lacks_is_left_out():
    record, epochs = run("decef", 0, 90.0)
    epochs[1]["train_loss"] = float("nan")
    ((row,),) = Parsed(page((record, epochs))).data["groups"]
    assert row["runs"][0]["train_loss"] == [2.0, None, pytest.approx(0.666667)]
    assert row["numbers"]["top1_low"] is None
    assert "val_top1" not in row["runs"][0]


def test_no_runs_and_no_epochs_make_a_page_too():
    assert "0 finished runs" in Parsed(page()).words
    record, _ = run("conv2d", 0, 90.0)
    assert Parsed(build([record], {}, [])).data["metrics"] == []


STEPS = """
const all = (selector, where = document) => [...where.querySelectorAll(selector)];
const seen = (selector) => all(selector).filter((e) => !e.closest("[hidden]"));
const layers = () =>
  all("[data-group='0'] tbody tr", document.getElementById("results")).map((row) => row.cells[1].textContent.trim());
const view = () => ({rows: seen("tr[data-row]").length, runs: seen(".run").length, curves: seen("[data-curve]").length,
  points: seen("[data-chart=flops] [data-point]").length, address: decodeURIComponent(location.hash),
  count: document.querySelector("output").value});
const form = document.querySelector(".controls");
const choose = (key, value) => { form.querySelector(`[name=${key}]`).value = value;
  form.dispatchEvent(new Event("change", {bubbles: true})); return view(); };
const found = {first: layers(), start: view()};
const head = all("#results th").find((th) => th.textContent === "top-1 %");
for (const key of ["once", "twice"]) {
  head.querySelector("button").click();
  found[key] = [layers(), head.getAttribute("aria-sort")];
}
const height = (id) => document.querySelector(`[data-chart=params] [data-point="${id}"]`).getBoundingClientRect().top;
found.higher = height("0-0") < height("0-2");
const point = document.querySelector("[data-point='0-1']");
point.focus();
found.tip = document.getElementById("tip").hidden ? "" : document.getElementById("tip").textContent;
found.bands = seen(".band").length;
found.lines = choose("seeds", "lines");
found.loss = [choose("metric", "train_loss"), seen("[data-chart=curves] figcaption").map((e) => e.textContent)];
found.digits = choose("dataset", "digits");
choose("dataset", "");
form.querySelector("[value=decef]").click();
found.layer = view();
const link = document.querySelector(".claim a[href='#run-cifar10-decef-0.667-s0']");
link.click();
found.run = [document.getElementById("run-cifar10-decef-0.667-s0").open, view()];
location.hash = "#dataset=digits&seeds=lines&network=unknown";
addEventListener("hashchange", () => {
  found.shared = view();
  form.querySelector("[name=reset]").click();
  found.reset = view();
  report({...found, errors, entered: window.entered === undefined});
});
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
        .replace("<head>", f"<head>{WATCH}")
        .replace("</body>", f"<script>{STEPS}</script></body>")
    )
    found = browse(text, tmp_path)
    assert found["errors"] == []
    assert found["entered"]
    assert found["first"] == ["conv2d", "decef", "cpac"]
    assert found["once"] == [["conv2d", "decef", "cpac"], "descending"]
    assert found["twice"] == [["cpac", "decef", "conv2d"], "ascending"]
    assert found["higher"]
    assert "resnet20, decef" in found["tip"]
    assert "90.00 ± 0.92 %" in found["tip"]
    counts = ("rows", "points", "curves", "runs")
    assert [found["start"][key] for key in counts] == [6, 6, 6, 10]
    assert (found["start"]["address"], found["start"]["count"]) == ("", "10 of 10 runs")
    assert found["bands"] == 2
    assert [found["lines"][key] for key in counts] == [6, 6, 10, 10]
    assert found["loss"][0]["address"] == "#metric=train_loss&seeds=lines"
    assert set(found["loss"][1]) == {"Training: training loss"}
    assert [found["digits"][key] for key in counts] == [2, 2, 2, 2]
    assert found["digits"]["address"] == "#dataset=digits&metric=train_loss&seeds=lines"
    assert [found["layer"][key] for key in counts] == [5, 5, 7, 7]
    assert "layer=conv2d,basisconv,cpac,rank1" in found["layer"]["address"]
    opened, after = found["run"]
    assert opened
    assert after["rows"] == 6  # its filter would have hidden the run
    assert after["address"].endswith("at=run-cifar10-decef-0.667-s0")
    assert [found["shared"][key] for key in counts] == [2, 2, 2, 2]
    assert found["reset"]["count"] == "10 of 10 runs"


@needs_browser
def test_no_sideways_scrolling_on_a_phone(tmp_path):
    phone = f"""<!doctype html><head>{WATCH}</head><body><iframe style="width:360px;height:700px;border:0"
      srcdoc="{html.escape(page(*grid()))}"></iframe><script>
      onload = () => {{
        const inner = document.querySelector("iframe").contentWindow, root = inner.document.documentElement;
        for (const details of root.querySelectorAll("details")) details.open = true;
        const table = root.querySelector("#results .scroll"), plots = root.querySelectorAll(".plot svg");
        report({{window: inner.innerWidth, page: root.scrollWidth, table: table.scrollWidth > table.clientWidth,
          charts: Math.max(...Array.from(plots, (e) => e.getBoundingClientRect().right))}});
      }};</script></body>"""
    found = browse(phone, tmp_path)
    assert found["window"] == 360
    assert found["page"] <= 360
    assert found["table"]  # the table is wider, and scrolls in its own box
    assert 200 < found["charts"] <= 360
