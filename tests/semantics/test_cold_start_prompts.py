"""The cold start's prompts are those of RL, token for token, for the same question and frames."""

import functools

import numpy as np
import pytest

from paravt_jax.records import Conversation, Message, Row, VideoRef
from pipelines.conversation import ConversationRenderer, FrameRate, pack
from pipelines.tokenizer import open_tokenizer
from tests.support.readers import StillReader
from train.recipes import get_recipe
from train.recipes.needle import COLD_START
from train.settings.override import override
from train.setup import open_renderer, system_notes

READER = StillReader((64, 32), 1.5, lambda video, count: ord(video.path[1]))
"""The frames of each video differ."""

VIDEO, OTHER = VideoRef("/a.mp4", 9.0), VideoRef("/b.mp4", 9.0)
THOUGHT = "<think>\nI see.\n</think>\n\n<answer>red</answer>"


@pytest.fixture(params=["instruct_folder", "thinking_folder", "needle"])
def folder(request) -> str:
    if request.param == "needle":
        return str(COLD_START)
    return str(request.getfixturevalue(request.param))


TOKENIZERS = functools.cache(open_tokenizer)
"""A released tokenizer takes a second to load."""


@pytest.fixture(autouse=True)
def load_once(monkeypatch):
    monkeypatch.setattr("pipelines.render.open_tokenizer", TOKENIZERS)


def renderer(recipe: str, folder: str, *settings: str) -> tuple:
    config = override(get_recipe(recipe), list(settings))
    return config, open_renderer(config, folder)


@pytest.mark.parametrize("system", [None, "You are a helpful assistant."])
@pytest.mark.parametrize("videos", [(VIDEO,), (VIDEO, OTHER)])
@pytest.mark.parametrize(
    "settings", [(), ("data.frames_as=video",), ("agent.dispatch=sequential",)]
)
def test_prompts_of_paravt_sft_are_those_of_paravt_rl(folder, system, videos, settings):
    row = Row("r", videos[0], "What colour is it?", "red", more_videos=videos[1:])
    _, asks = renderer("paravt_rl", folder, *settings)
    prompt = asks.main_prompt(row, [READER.overview(video, 4) for video in videos], tools=True)

    config, says = renderer("paravt_sft", folder, *settings)
    messages = [Message("user", (*videos, row.question)), Message("assistant", (THOUGHT,))]
    if system:
        messages.insert(0, Message("system", (system,)))
    own = config.sft.packing
    render = ConversationRenderer(
        says, READER, FrameRate(most=4), own.learn, own.system, config.agent.offers_tools
    )
    packed = pack([render(Conversation("c", tuple(messages)))])
    head = len(prompt.tokens)
    np.testing.assert_array_equal(packed.stream.tokens[:head], prompt.tokens)
    np.testing.assert_array_equal(packed.stream.positions[:head], prompt.positions)
    np.testing.assert_array_equal(packed.stream.vision_index[:head], prompt.vision_index)
    np.testing.assert_array_equal(packed.stream.patches.values, prompt.patches.values)
    first = head + len(says.encode(says.opening))
    assert not packed.weights[:first].any() and packed.weights[first]


def test_other_system_messages_are_replaced_and_that_is_said():
    config, _ = renderer("paravt_sft", str(COLD_START))
    said = (Message("user", ("Q",)), Message("assistant", ("A",)))
    plain = Conversation("p", said)
    other = Conversation("o", (Message("system", ("Be kind.",)), *said))
    assert system_notes(config, [plain]) == []
    (line,) = system_notes(config, [plain, other])
    assert "1 of 2 conversations" in line and "sft.packing.system=own" in line
    kept = override(config, ["sft.packing.system=own"])
    assert system_notes(kept, [other]) == []


def test_a_system_message_of_ones_own_can_be_kept():
    config, says = renderer("paravt_sft", str(COLD_START), "sft.packing.system=own")
    chat = (Message("system", ("Be kind.",)), Message("user", ("Q",)), Message("assistant", ("A",)))
    render = ConversationRenderer(says, READER, system=config.sft.packing.system)
    assert says.decode(render(Conversation("c", chat)).tokens) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
        "<|im_start|>assistant\nA<|im_end|>\n"
    )
    with pytest.raises(ValueError, match=r"sft\.packing\.system=mine: choose agent or own"):
        override(config, ["sft.packing.system=mine"])


def test_conversations_that_are_too_long_are_named():
    _, says = renderer("paravt_sft", str(COLD_START))
    chat = Conversation("c", (Message("user", ("Q " * 50,)), Message("assistant", ("A " * 50,))))
    whole = ConversationRenderer(says, READER)(chat)
    prompt, length = int(np.argmax(whole.weights > 0)), len(whole.tokens)
    ConversationRenderer(says, READER, most=(prompt, length))(chat)
    for most, named in (
        ((prompt - 1, length), r"data\.max_prompt_tokens"),
        ((prompt, length - 1), "max_position_embeddings"),
    ):
        with pytest.raises(ValueError, match=f"row c: .*{named}"):
            ConversationRenderer(says, READER, most=most)(chat)
