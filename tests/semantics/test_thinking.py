"""Templates that open `<think>` themselves, as that of Qwen3-VL-Thinking does.

1. Prompts end with the header; what the template puts after it is the head of the turn, once,
   whatever `agent.think_prefix` says. It is part of the scored text.
2. Prompt and rollout together are what the template writes of the whole conversation.
3. What a sub-agent thinks is not what it reports, and its thought has room of its own.
4. Supervised streams are those of rollouts: past thoughts stay, heads are not learned.
"""

import copy
import shutil

import numpy as np
import pytest

from paravt_jax.protocol import CROP_VIDEO_TOOL, parses_strictly, reported
from paravt_jax.records import Conversation, Message, Row, VideoRef
from pipelines.conversation import ConversationRenderer, FrameRate
from pipelines.render import ChatRenderer
from rollout.agent import Agent
from rollout.limits import AgentConfig, slot_pools, token_budget, turn_head
from tests.support.needle import CHATML, processor_folder
from tests.support.readers import StillReader
from tests.support.rollout_fakes import ToyRenderer
from tests.support.scripted_engine import ScriptedEngine
from train import main
from train.recipes.needle import COLD_START

READER = StillReader(clip_frames=2)

OPENED = CHATML.replace("<|im_start|>assistant\n{%", "<|im_start|>assistant\n<think>\n{%")
VIDEO = VideoRef("/own.mp4", 64.0)
ROW = Row("r", VIDEO, "What colour?", "red")
CALL = '<tool_call>\n{"name": "crop_video", "arguments": {"start_time": 0, "end_time": 8}}\n'
CALL += "</tool_call>"
TURNS = (f"I must look.\n</think>\n\n{CALL}<|im_end|>", "Red.\n</think>\n\n<answer>red</answer>")
THOUGHT = "Is it red?\n</think>\n\nA red circle.<|im_end|>"


@pytest.fixture(params=["released", "plain"])
def renderer(request) -> ChatRenderer:
    """The released Thinking folder, and ChatML that opens `<think>`."""
    tools = [CROP_VIDEO_TOOL]
    if request.param == "released":
        folder = request.getfixturevalue("thinking_folder")
        return ChatRenderer.from_folder(str(folder), pixels=(784, 50176), tools=tools)
    plain = ChatRenderer.from_folder(processor_folder(), tools=tools)
    tokenizer = copy.deepcopy(plain.tokenizer)
    tokenizer.chat_template = OPENED
    return ChatRenderer(tokenizer, plain.spec, tools=tools)


def roll_out(renderer, *turns, report=THOUGHT, **settings):
    """One scripted rollout, and the streams that the engine saw."""
    config = AgentConfig(turn_tokens=400, answer_tokens=200, response_tokens=200, **settings)
    shapes = slot_pools(config, renderer, prompts=1, copies=1, prompt_tokens=2000, crop_tokens=2000)
    engine = ScriptedEngine(shapes, [turns], lambda prompt: report, renderer=renderer)
    agent = Agent(engine.session, renderer, READER, config=config, crop_tokens=2000)
    prompt = renderer.main_prompt(ROW, READER.overview(VIDEO, 2), tools=True)
    (group,) = agent.run({}, [(ROW, 2, prompt)], 1, seed=0)
    return group.trajectories[0], engine.sessions[0]


@pytest.mark.parametrize("prefix", ["<think>\n", "", "<think>", "<think>\nHm."])
def test_the_templates_think_is_the_head_of_every_turn_and_stands_there_once(renderer, prefix):
    rollout, session = roll_out(renderer, *TURNS, think_prefix=prefix)
    assert [turn.text.count("<think>") for turn in rollout.turns] == [1, 1]
    assert all(parses_strictly(turn.text) for turn in rollout.turns)
    assert rollout.executed == 1 and rollout.scored_text.startswith("<think>\n")
    assert ("Hm." in rollout.scored_text) is ("Hm." in prefix)
    (seen,) = session.of("main")
    assert seen.tokens == [*rollout.prompt.tokens.tolist(), *rollout.tokens.tolist()]
    assert renderer.decode(seen.tokens).count("<|im_start|>assistant\n<think>\n") == 2


def test_what_is_read_is_what_the_template_writes(renderer):
    rollout, _ = roll_out(renderer, *TURNS)
    ask = renderer.prompt(READER.overview(VIDEO, 2), "What colour?")
    asked = {"role": "user", "content": [*renderer.frame_parts(np.array([0.0, 1.0]))]}
    asked["content"].append({"type": "text", "text": "What colour?"})
    said = [f"<think>\n{turn}".removesuffix("<|im_end|>") for turn in TURNS]
    chat = [
        asked,
        {"role": "assistant", "content": said[0]},
        {"role": "tool", "content": "A red circle."},
        {"role": "assistant", "content": said[1]},
    ]
    whole = renderer.tokenizer.apply_chat_template(chat, tokenize=False)
    ours = renderer.decode(ask.tokens) + renderer.decode(rollout.tokens)
    assert ours == whole.removesuffix("<|im_end|>\n")


def test_a_sub_agent_reports_what_follows_its_thought(renderer):
    rollout, session = roll_out(renderer, *TURNS, subagent_tokens=30, subagent_thought_tokens=70)
    assert "A red circle." in rollout.full_text and "Is it red?" not in rollout.full_text
    (seen,) = session.of("crop")
    (subagent,) = rollout.subagents
    assert seen.limits == [100]
    assert subagent.full_text == f"<think>\n{THOUGHT}"
    assert seen.tokens == [*subagent.prompt.tokens.tolist(), *subagent.tokens.tolist()]
    assert not subagent.generated[: len(renderer.encode(renderer.opening))].any()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["needle_rl", "needle_sft"])
def test_the_dry_run_says_that_the_template_thinks(recipe, tmp_path, capsys):
    folder, flags = tmp_path / "thinking", ["--dry-run", "--recipe", recipe]
    assert main.main([*flags, "--model", str(COLD_START)]) == 0
    assert "by itself" not in capsys.readouterr().out
    shutil.copytree(COLD_START, folder)
    template = folder / "chat_template.jinja"
    header = "{{- '<|im_start|>assistant\\n"
    assert template.read_text().count(header) == 1
    template.write_text(template.read_text().replace(header, header + "<think>\\n"))
    assert main.main([*flags, "--model", str(folder)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "by itself" in line)
    assert "'<think>\\n'" in line
    named = ("agent.think_prefix", "agent.subagent_thought_tokens=1024")
    assert all((name in line) is (recipe == "needle_rl") for name in named)


def test_a_thought_without_an_end_is_no_report(renderer):
    rollout, _ = roll_out(renderer, *TURNS, report="Is it red? Is it")
    assert "Error: the sub-agent reported nothing" in rollout.full_text


def test_other_templates_leave_head_and_limits_to_the_settings():
    config = AgentConfig(subagent_tokens=30)
    toy = ToyRenderer()
    assert turn_head(config, toy) == toy.encode("<think>\n")
    assert token_budget(config, toy).prefix == len("<think>\n")
    shape = slot_pools(config, toy, prompts=1, copies=1, prompt_tokens=9, crop_tokens=9)
    assert shape["crop"].suffix == 30


@pytest.mark.parametrize(
    ("text", "report"),
    [
        ("red", "red"),
        ("<think>\nno\n</think>\nred", "\nred"),
        ("no</think>red", "red"),
        (" <think>never closed", ""),
        ("<think>a</think><think>b", ""),
    ],
)
def test_reports(text, report):
    assert reported(text) == report


def talk(*messages: tuple[str, str]) -> Conversation:
    return Conversation("c", tuple(Message(role, (words,)) for role, words in messages))


def learned(renderer, conversation):
    """All tokens of a conversation, and the stretches that are learned as texts."""
    draft = ConversationRenderer(renderer, READER, FrameRate(most=2))(conversation)
    edges = np.flatnonzero(np.diff(draft.weights, prepend=0, append=0)).reshape(-1, 2)
    return draft.tokens, [renderer.decode(draft.tokens[a:b]) for a, b in edges]


def test_supervised_streams_are_those_of_rollouts(renderer):
    rollout, _ = roll_out(renderer, *TURNS)
    said = [f"<think>\n{turn}".removesuffix("<|im_end|>") for turn in TURNS]
    trace = [("user", "What colour?"), ("assistant", said[0]), ("tool", "A red circle.")]
    tokens, texts = learned(renderer, talk(*trace, ("assistant", said[1])))
    asked = renderer.encode("<|im_start|>user\nWhat colour?<|im_end|>\n<|im_start|>assistant\n")
    stream = [*asked, *rollout.tokens.tolist()]
    assert tokens[: len(stream)].tolist() == stream
    assert texts == [TURNS[0], f"{TURNS[1]}<|im_end|>"]


def test_past_thoughts_stay_where_rollouts_keep_them(thinking_folder):
    """The released template drops them once another question follows."""
    own = ChatRenderer.from_folder(str(thinking_folder))
    said = "<think>\nHm.\n</think>\n\nred"
    chat = talk(("user", "A?"), ("assistant", said), ("user", "B?"), ("assistant", "blue"))
    tokens, texts = learned(own, chat)
    assert texts == ["Hm.\n</think>\n\nred<|im_end|>", "\n</think>\n\nblue<|im_end|>"]
    assert own.decode(tokens) == (
        "<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\n<think>\nHm.\n</think>\n\nred"
        "<|im_end|>\n<|im_start|>user\nB?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>"
        "\n\nblue<|im_end|>\n"
    )
