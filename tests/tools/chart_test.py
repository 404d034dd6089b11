import json

import chart


def row(first, second=None):
    return {state: {"first_gb_per_s": first, "second_gb_per_s": second} for state in chart.STATES}


RESULT = {"rows": {"roofline": row(4.0), "a peer": row(1.0, 1.5), "flashpack, verified": row(3.0, 3.5)}}


def test_the_fastest_comes_first_and_the_roofline_is_no_bar():
    assert chart.bars(RESULT, "cold") == [("flashpack, verified", 3.0, 3.5), ("a peer", 1.0, 1.5)]


def test_our_loads_have_a_colour_of_their_own_and_other_versions_have_not():
    assert chart.is_ours("flashpack") and chart.is_ours("flashpack, verified")
    assert not chart.is_ours("flashpack 0.4.5, parallel")


def test_the_chart_is_drawn(tmp_path):
    chart.draw(json.loads(json.dumps(RESULT)), tmp_path / "chart.svg")
    assert "<svg" in (tmp_path / "chart.svg").read_text()
