"""`benchmarks/frame_budgets.py`: what stands in the table and in the picture."""

import json
from xml.etree import ElementTree

from benchmarks import frame_budgets
from benchmarks.frame_budgets import MODES

SVG = "{http://www.w3.org/2000/svg}"
NAMES = ("accuracy", "accuracy/open", "accuracy/grounding")


def reports(workdir):
    """Evaluations of three modes at two K; of the last one there is no report yet."""
    for number, mode in enumerate(MODES):
        for frames in (4, 8):
            own = frame_budgets.folder(workdir, mode, frames)
            own.mkdir()
            value = 0.1 * number + 0.05 * frames
            row = {"value": value, "low": value - 0.1, "high": value + 0.1}
            rows = [row | {"name": name, "samples": 512, "clusters": 107} for name in NAMES]
            (own / "report.json").write_text(json.dumps({"rows": rows}))
    (own / "report.json").unlink()
    return frame_budgets.read(workdir, (4, 8))


def test_the_table_has_a_row_for_each_report(tmp_path):
    lines = frame_budgets.table(reports(tmp_path)).splitlines()
    assert len(lines) == 2 + 5
    assert lines[2] == "| 4 | crops, parallel |" + 3 * " 0.200 (0.10 to 0.30) |"


def test_the_picture_is_drawn_to_scale(tmp_path):
    drawn = ElementTree.fromstring(frame_budgets.picture(reports(tmp_path)))
    lines = [line.attrib["points"].split() for line in drawn.iter(f"{SVG}polyline")]
    assert list(map(len, lines)) == [2, 2, 1]
    heights = [[float(point.split(",")[1]) for point in line] for line in lines]
    rises = [first - second for first, second in heights[:2]]
    assert abs(rises[0] - rises[1]) < 0.2 and rises[0] > 0, "0.2 higher at K = 8, in both modes"
    assert {text.text for text in drawn.iter(f"{SVG}text")} >= {*MODES.values(), "4", "8"}
