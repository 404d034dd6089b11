import json
from pathlib import Path

import chart

ROOT = Path(chart.__file__).parent.parent


def row(first, second=None):
    return {state: {"first_gb_per_s": first, "second_gb_per_s": second} for state in chart.STATES}


RESULT = {
    "rows": {
        "roofline": row(4.0),
        "a peer": row(1.0, 1.5),
        "a peer, mapped": row(20.0, 40.0),
        "flashpack, into tensors that are there": row(5.0, 5.0),
        "flashpack, verified": row(3.0, 3.5),
    }
}


def test_the_fastest_comes_first_and_the_roofline_is_no_bar():
    assert chart.bars(RESULT, "cold") == [("flashpack, verified", 3.0, 3.5), ("a peer", 1.0, 1.5)]


def test_our_loads_have_a_colour_of_their_own_and_other_versions_have_not():
    assert chart.is_ours("flashpack") and chart.is_ours("flashpack, verified")
    assert not chart.is_ours("flashpack 0.4.5, parallel")


def test_the_chart_is_drawn(tmp_path):
    chart.draw(json.loads(json.dumps(RESULT)), tmp_path / "chart.svg")
    assert "<svg" in (tmp_path / "chart.svg").read_text()


def test_the_table_of_the_readme_has_the_figures_of_the_run_that_the_chart_shows():
    rows = json.loads((ROOT / "bench" / "compare.json").read_text())["rows"]
    names = {
        "**flashpack**, safetensors files": "flashpack",
        "**flashpack**, its own format, every byte verified": "flashpack, file of its own, verified",
        "flashpack 0.4.5, parallel, 8 threads, no probe": next(name for name in rows if "no probe" in name),
        "Run:ai 0.17.0, buffered, 2 threads": "Run:ai 0.17.0, sync_buffered, 2 threads, chunks of 8 MiB",
    }
    keys = [("cold", key) for key in ("first_gb_per_s", "second_gb_per_s", "cpu_s_per_gb", "peak_of_bytes")]
    keys += [("page cache", key) for key in ("first_gb_per_s", "second_gb_per_s")]
    shown = 0
    for line in (ROOT / "README.md").read_text().splitlines():
        name, *cells = line.strip("| ").split(" | ")
        row = rows.get(names.get(name, name))
        if row is not None and len(cells) == len(keys):
            assert cells == [f"{row[state][key]:.2f}" for state, key in keys], name
            shown += 1
    assert shown == 11
