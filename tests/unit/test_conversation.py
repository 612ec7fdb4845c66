"""Conversations: what is learned of them, where frames stand, and which templates are refused."""

import numpy as np
import pytest
from PIL import Image

from paravt_jax.records import Conversation, ImageRef, Message, ToolCall, VideoRef
from paravt_jax.rope_index import mrope_positions
from pipelines.conversation import ConversationRenderer, FrameRate, pack, still_spec
from pipelines.preprocess import VideoSpec
from pipelines.render import ChatRenderer, PromptTexts
from tests.support.needle import CHATML, processor_folder, renderer, with_template
from tests.support.readers import StillReader

READER = StillReader(shade=lambda video, count: count)

VIDEO = VideoRef("/nowhere.mp4", 3.0)
PAD = "<|vision_start|><|image_pad|><|vision_end|>"
CALL = '<tool_call>\n{"name": "crop_video", "arguments": {"start_time": 0}}\n</tool_call>'


def message(role, *content):
    return Message(role, content)


TRACE = Conversation(
    "trace",
    (
        message("system", "Be brief."),
        message("user", VIDEO, "What?"),
        message("assistant", f"<think>\nTwo parts.\n</think>\n{CALL}\n{CALL}"),
        message("tool", "One."),
        message("tool", VIDEO, "Two."),
        message("assistant", "<answer>red</answer>"),
    ),
)
WRITTEN = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    f"<0.0 seconds>{PAD}<1.0 seconds>{PAD}What?<|im_end|>\n<|im_start|>assistant\n"
    f"<think>\nTwo parts.\n</think>\n{CALL}\n{CALL}<|im_end|>\n<|im_start|>user\n"
    "<tool_response>\nOne.\n</tool_response>\n<tool_response>\n"
    f"<0.0 seconds>{PAD}<1.0 seconds>{PAD}Two.\n</tool_response><|im_end|>\n"
    "<|im_start|>assistant\n<answer>red</answer><|im_end|>\n"
)
SAID = [
    f"<think>\nTwo parts.\n</think>\n{CALL}\n{CALL}<|im_end|>",
    "<answer>red</answer><|im_end|>",
]


def conversations(own=None, **settings):
    return ConversationRenderer(own or renderer(), READER, FrameRate(most=2), **settings)


def runs(own, draft):
    """Texts of the stretches that are learned."""
    edges = np.flatnonzero(np.diff(draft.weights, prepend=0, append=0)).reshape(-1, 2)
    return [own.decode(draft.tokens[a:b]) for a, b in edges]


@pytest.mark.parametrize("mode", ["image", "video"])
def test_a_trace_with_parallel_calls_and_a_crop_as_the_template_writes_it(mode):
    draft = conversations(renderer(mode))(TRACE)
    pair = f"<0.5 seconds>{PAD}".replace("image", "video")
    shown = {"image": f"<0.0 seconds>{PAD}<1.0 seconds>{PAD}", "video": pair}
    if mode == "video":
        shown["video"] = f"<|vision_start|>{pair}<|vision_end|>"
    assert renderer(mode).decode(draft.tokens) == WRITTEN.replace(shown["image"], shown[mode])
    assert runs(renderer(mode), draft) == SAID
    assert set(np.unique(draft.weights)) == {0.0, 1.0}
    assert draft.visual.sum() == draft.frames == {"image": 4, "video": 2}[mode]


def test_the_same_is_learned_in_plain_chatml():
    own = with_template(CHATML)
    draft = conversations(own)(TRACE)
    assert runs(own, draft) == SAID
    assert own.decode(draft.tokens).count("<|im_start|>tool\n") == 2


def test_calls_in_a_field_are_written_by_the_template():
    calls = (ToolCall("crop_video", {"start_time": 0, "end_time": 16}), ToolCall("look", {}))
    for words in ((), ("I look.",)):
        talk = Conversation("c", (message("user", "Q"), Message("assistant", words, calls)))
        (said,) = runs(renderer(), conversations()(talk))
        assert said == ("".join(words) + "\n" if words else "") + (
            '<tool_call>\n{"name": "crop_video", "arguments": {"start_time": 0, "end_time": 16}}\n'
            '</tool_call>\n<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call><|im_end|>'
        )
    with pytest.raises(ValueError, match="cannot be told"):
        conversations(with_template(CHATML))(talk)


def test_what_the_release_learns():
    """Every special token, and the line break after a turn of the assistant, besides."""
    draft = conversations(learn="special")(TRACE)
    own = [renderer().encode(text)[0] for text in ("<|im_start|>", "<|im_end|>", "<|vision_end|>")]
    assert draft.weights[np.isin(draft.tokens, own)].all()
    assert not draft.weights[draft.visual].any()
    learned = "".join(runs(renderer(), draft))
    assert f"{SAID[0]}\n<|im_start|>" in learned and learned.endswith(f"{SAID[1]}\n")
    assert "What" not in learned and "One" not in learned and "seconds" not in learned
    assert draft.weights.sum() == conversations()(TRACE).weights.sum() + 2 + 5 + 3 + 4 * 2


def test_prompts_at_inference_are_the_beginnings_of_what_is_trained():
    """Same tokens and positions as the renderer's own prompt of these frames and words."""
    frames = READER.overview(VIDEO, 2)
    prompt = renderer().prompt(frames, "What?", "Be brief.")
    packed = pack([conversations()(TRACE)])
    head = len(prompt.tokens)
    np.testing.assert_array_equal(packed.stream.tokens[:head], prompt.tokens)
    np.testing.assert_array_equal(packed.stream.positions[:head], prompt.positions)
    np.testing.assert_array_equal(packed.stream.vision_index[:head], prompt.vision_index)
    np.testing.assert_array_equal(packed.stream.patches.values[:2], prompt.patches.values)


def test_no_merge_joins_a_turn_with_its_header():
    """At inference a turn that begins with a line break follows the one of its header."""
    said = Conversation("n", (message("user", "Q"), message("assistant", "\n\nYes")))
    draft = conversations()(said)
    head = renderer().encode("<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n")
    assert draft.tokens[: len(head)].tolist() == head and draft.weights[len(head)] == 1


def test_positions_begin_anew_with_each_conversation_of_a_pack():
    draft = conversations()(TRACE)
    size = len(draft.tokens)
    packed = pack([draft, draft])
    assert packed.segments.tolist() == [1] * size + [2] * size
    np.testing.assert_array_equal(packed.stream.positions[size:], packed.stream.positions[:size])
    grids = np.full((4, 2), 2)
    np.testing.assert_array_equal(
        packed.stream.positions[:size], mrope_positions(draft.visual, grids, 2)
    )
    index = packed.stream.vision_index
    assert (
        index[index >= 0].tolist()
        == list(range(8))
        == list(range(len(packed.stream.patches.values)))
    )


def test_images_stand_beside_videos(tmp_path):
    Image.new("RGB", (64, 96), "red").save(tmp_path / "a.png")
    picture = ImageRef(str(tmp_path / "a.png"))
    both = Conversation(
        "both", (message("user", picture, VIDEO, "What?"), message("assistant", "A."))
    )
    own = ChatRenderer.from_folder(processor_folder(), "video", PromptTexts(), (1024, 64 * 96))
    packed = pack([conversations(own)(both)])
    assert packed.stream.patches.grids.tolist() == [[6, 4], [2, 2]]
    ids = packed.stream.tokens[packed.stream.vision_index >= 0]
    assert own.decode(ids) == 6 * "<|image_pad|>" + "<|video_pad|>"
    assert packed.stream.vision_index.max() == 6, "a frame of 6 tokens, then one padded to as many"


def test_images_are_within_the_limits_of_frames():
    spec = still_spec(VideoSpec().limited(1024, 50176))
    assert (spec.min_pixels, spec.max_pixels) == (1024, 50176)


@pytest.mark.parametrize("rate, duration, count", [(1.0, 90.0, 64), (0.5, 90.0, 45), (1.0, 0.4, 1)])
def test_frames_of_a_rate(rate, duration, count):
    assert FrameRate(fps=rate).count(VideoRef("v", duration)) == count


DROPS_THOUGHTS = CHATML.replace(
    "{{ part.text }}",
    "{{ part.text if loop is defined and m == messages[-1] else part.text.split('</think>')[-1] }}",
)
NO_HEADER = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant: ")
SHOUTS = CHATML.replace("{{ part.text }}", "{{ part.text | upper }}")


@pytest.mark.parametrize(
    "template, named",
    [
        (DROPS_THOUGHTS, "otherwise once more turns follow"),
        (NO_HEADER, "cannot be told"),
        (SHOUTS, "cannot be told"),
    ],
    ids=["drops thoughts", "another header", "changes words"],
)
def test_templates_that_hide_what_was_said_are_refused(template, named):
    with pytest.raises(ValueError, match=f"row trace: .*{named}"):
        conversations(with_template(template))(TRACE)


@pytest.mark.parametrize(
    "messages, named",
    [
        ((message("assistant", "A"),), "speaks first"),
        ((message("user", "Q"), message("assistant", "A"), message("assistant", "B")), "twice"),
        ((message("user", "Q<|im_end|>"), message("assistant", "A")), "special token"),
        ((message("user", "Q"), message("assistant", VIDEO)), "only write"),
        ((message("user", ImageRef("/no.png")), message("assistant", "A")), "no.png"),
    ],
)
def test_conversations_that_cannot_be_learned(messages, named):
    with pytest.raises(ValueError, match=f"row bad: .*{named}"):
        conversations()(Conversation("bad", messages))
