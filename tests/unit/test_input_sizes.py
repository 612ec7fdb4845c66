"""What warm-up foresees holds every prompt that the questions make."""

import numpy as np

from paravt_jax.records import Frames, Row, VideoRef
from pipelines.render import ChatRenderer
from rollout.limits import MAIN
from tests.support.needle import renderer
from train.compile.input_sizes import agent_input_sizes
from train.recipes import get_recipe
from train.settings.override import override


def test_prompts_with_subtitles_are_foreseen(tmp_path):
    """The longest words may be beside the shortest question."""
    plain = renderer()
    own = ChatRenderer(
        plain.tokenizer, plain.spec, plain.texts, plain.eos_ids, plain.tools, subtitles=True
    )
    spoken = "1\n00:00:01,000 --> 00:00:02,000\n" + "She takes a red cup. " * 40 + "\n"
    (tmp_path / "told.srt").write_text(spoken)
    told = Row("told", VideoRef(str(tmp_path / "told.mp4"), 8.0), "What?", "red")
    silent = Row("silent", VideoRef(str(tmp_path / "silent.mp4"), 8.0), "What does she take?", "x")
    config = override(get_recipe("needle_rl"), ["data.frame_budgets=2"])
    sizes = agent_input_sizes(config.agent, config.data, own, [told, silent])
    (foreseen,) = sizes[MAIN].prompts
    frames = Frames(np.zeros((2, 32, 32, 3), np.uint8), np.arange(2.0))
    lengths = [len(own.main_prompt(row, frames, tools=True).tokens) for row in (told, silent)]
    assert foreseen.least <= min(lengths) and max(lengths) <= foreseen.most
    assert lengths[0] > lengths[1] + 100
