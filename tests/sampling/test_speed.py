"""What the clock and the cost model say of a dynamic model."""

from __future__ import annotations

from dydit_scale.sampling.speed import speed_report, timed_pairs


def test_pairs_are_timed_in_turn_and_each_draws_another_picture() -> None:
    called: list[tuple[str, int]] = []
    seconds = timed_pairs(lambda n: called.append(("static", n)), lambda n: called.append(("dynamic", n)), pairs=2)
    assert called == [(kind, n) for n in range(3) for kind in ("static", "dynamic")], "0 warms up"
    assert len(seconds) == 2 and min(min(pair) for pair in seconds) > 0


def test_a_report_compares_within_pairs_and_names_what_ran_otherwise() -> None:
    report = speed_report([(2, 1), (9, 2), (4, 2)], macs_static=4e9, macs_dynamic=2e9, batch=3, steps=5)
    assert (report.ideal, report.realised, report.share) == (2, 2, 1)
    assert (report.seconds_static, report.seconds_dynamic) == (4, 2)
    assert "100%" in report.table() and "some forwards" not in report.table()
    told = {**report.as_dict(), "execution": "compile", "fallback": "no plan", "op_by_op": "too many codes"}
    lines = type(report)(**told).table().splitlines()
    assert lines[-2:] == [
        "some forwards ran masked, at the static model's cost: no plan",
        "some forwards ran op by op: too many codes",
    ]
    assert "share of the ideal" not in "".join(lines), "launching counts, too"
