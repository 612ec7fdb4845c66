"""Subtitles: what is read of SubRip files, and where it stands in prompts."""

import numpy as np
import pytest

from paravt_jax.records import Conversation, Frames, Message, Row, VideoRef
from pipelines.conversation import ConversationRenderer
from pipelines.render import ChatRenderer, PromptTexts
from pipelines.subtitles import has_subtitles, read_srt, subtitle_text
from tests.support.needle import processor_folder
from tests.support.readers import StillReader

SRT = """\
1
00:00:01,500 --> 00:00:03,000
<i>Hello</i>,
world.

3
01:00:02,250 --> 01:00:03,000 X1:0 X2:9
{\\an8}Later <|im_end|>.

2
0:05.5 --> 0:07.000
Short.

4
00:00:09,000 --> 00:00:10,000
<b></b>
"""


@pytest.fixture
def video(tmp_path):
    (tmp_path / "film.srt").write_text(SRT.replace("\n", "\r\n"), encoding="utf-8-sig", newline="")
    return VideoRef(str(tmp_path / "film.mp4"), 2.0)


def test_cues_in_order_of_time_without_markup(video):
    cues = read_srt(video.path.replace("mp4", "srt"))
    assert cues == [
        (1.5, 3.0, "Hello, world."),
        (5.5, 7.0, "Short."),
        (3602.25, 3603.0, "Later ."),
    ]


def test_a_video_without_a_file_has_none(tmp_path):
    alone = VideoRef(str(tmp_path / "alone.mp4"), 2.0)
    assert not has_subtitles(alone) and subtitle_text(alone) == ""


@pytest.mark.parametrize("content", [b"no cues at all", b"\xff\xfe\x00"], ids=["words", "bytes"])
def test_what_is_no_subrip_is_refused(tmp_path, content):
    (tmp_path / "bad.srt").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.srt: .*remove"):
        subtitle_text(VideoRef(str(tmp_path / "bad.mp4"), 1.0))


def test_a_link_that_leads_out_of_the_folder_of_the_video_is_not_read(tmp_path):
    """A data set from elsewhere must not put other files of this machine into prompts."""
    (tmp_path / "secret.txt").write_text(SRT)
    folder = tmp_path / "videos"
    (folder / "texts").mkdir(parents=True)
    (folder / "texts" / "b.srt").write_text(SRT)
    (folder / "a.srt").symlink_to(tmp_path / "secret.txt")
    (folder / "b.srt").symlink_to(folder / "texts" / "b.srt")
    a, b = (VideoRef(str(folder / f"{name}.mp4"), 2.0) for name in "ab")
    with pytest.raises(ValueError, match=r"a\.srt: the link leads out of .*videos; put the file"):
        subtitle_text(a)
    assert "Hello, world." in subtitle_text(b)
    renderer = ChatRenderer.from_folder(processor_folder(), "image", subtitles=True)
    with pytest.raises(ValueError, match=r"a\.srt: the link"):
        renderer.check_question(Row("a", a, "What is said?", "Hello", "oe"))
    renderer.check_question(Row("b", b, "What is said?", "Hello", "oe"))


def test_they_stand_in_prompts_and_conversations_when_asked_for(video):
    shown, plain = (
        ChatRenderer.from_folder(processor_folder(), texts=PromptTexts("", ""), subtitles=wanted)
        for wanted in (True, False)
    )
    frames = Frames(np.zeros((1, 32, 32, 3), np.uint8), np.zeros(1))
    row = Row("r", video, "What?", "x")
    words = "Subtitles:\n<1.5 seconds> Hello, world.\n<5.5 seconds> Short.\n<3602.2 seconds> Later"
    prompt = shown.decode(shown.main_prompt(row, frames, tools=False).tokens)
    assert f"<|vision_end|>{words} .\nWhat?<|im_end|>" in prompt
    bare = plain.decode(plain.main_prompt(row, frames, tools=False).tokens)
    assert "<|vision_end|>What?" in bare

    class Reader(StillReader):
        def overview(self, video, count):
            return frames

    talk = Conversation("t", (Message("user", (video, "What?")), Message("assistant", ("Hello.",))))
    assert prompt in shown.decode(ConversationRenderer(shown, Reader())(talk).tokens)
