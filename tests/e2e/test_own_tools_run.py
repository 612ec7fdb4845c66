"""Tools in files of the user's, through the real command, from the user's own folder."""

import json

import pytest

from tests.support.command import ROOT, metrics, start

pytestmark = pytest.mark.slow

MINE = '''
from paravt_jax.records import Frames
from rollout.tools import ToolContext

def crop_video(start_time: float, end_time: float, context: ToolContext) -> Frames:
    """Watch one part of the video closely and get a description of it.

    Args:
        start_time: Start of the part, in seconds.
        end_time: End of the part, in seconds.
    """
    with open("calls.txt", "a") as file:
        print(start_time, end_time, file=file)
    return context.clip(start_time, end_time).frames
'''


def test_a_run_with_tools_of_ones_own(tmp_path):
    """The committed cold start calls the user's `crop_video` as it calls ours."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "zoom_image.py").write_text((ROOT / "examples" / "zoom_image.py").read_text())
    own = "agent.tools=mine.py:crop_video,zoom_image.py:zoom_image"
    settings = [own, "evaluation.rows=0", "output.export_hf=false", "data.question_types=oe"]
    done = start(tmp_path / "run", tmp_path, "--steps", "1", settings=settings)
    assert done.returncode == 0, done.stderr[-3000:]
    (record,) = metrics(tmp_path / "run")
    assert record["tool/success_rate"] > 0 and (tmp_path / "calls.txt").read_text()
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["agent"]["tools"]
    assert kept == [f"{tmp_path}/mine.py:crop_video", f"{tmp_path}/zoom_image.py:zoom_image"]

    again = start(tmp_path / "run", tmp_path, "--steps", "2", settings=settings)
    assert again.returncode == 0 and len(metrics(tmp_path / "run")) == 2, again.stderr[-3000:]
    settings[0] = "agent.tools=crop_video,zoom_image.py:zoom_image"
    other = start(tmp_path / "run", tmp_path, "--steps", "3", settings=settings)
    assert other.returncode and "agent.tools" in other.stderr
