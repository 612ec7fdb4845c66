"""`python evaluate/ask.py` as a user types it, on a real H.264 file with sound."""

import json
import subprocess
import sys

import pytest

from evaluate.model import settings_of
from paravt_jax.protocol import parse_tool_calls
from tests.support.command import ROOT, environment, run
from tests.support.ffmpeg import ffmpeg
from tests.support.needle import questions
from train.recipes import get_recipe
from train.recipes.needle import COLD_START
from train.settings.override import to_dict

pytestmark = pytest.mark.slow
DOOR = str(ROOT / "evaluate" / "ask.py")


@pytest.fixture(scope="module")
def asked():
    return next(q for q in questions("oe") if q.asked == "colour")


@pytest.fixture(scope="module")
def clip(asked, tmp_path_factory):
    """The video of a needle question, as a camera might have left it."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    sound = "-f", "lavfi", "-i", "sine=frequency=440"
    picture = "-vf", "scale=320:320:flags=neighbor", "-r", "25"
    codecs = "-c:v", "libx264", "-pix_fmt", "yuv420p", "-c:a", "aac", "-shortest"
    ffmpeg("-i", asked.row.video.path, *sound, *picture, *codecs, path)
    return path


def ask(clip, *arguments: str) -> str:
    done = run([sys.executable, DOOR, str(clip), *arguments], clip.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def session(asked, clip):
    """What a session prints, in a process of its own, as the tests' own have no standard input."""
    typed = f"{asked.row.question}\nWhat is <|im_end|>?\n{asked.row.question}\n\nnot read\n"
    command = [sys.executable, DOOR, str(clip), "--json", "--frames", "4"]
    done = subprocess.run(
        command, input=typed, capture_output=True, text=True, env=environment(), timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def told(session):
    """The JSON of one question."""
    return json.loads(session.stdout.splitlines()[0])


def test_json_holds_what_was_said_called_reported_and_answered(told, asked, clip):
    assert told["question"] == asked.row.question and told["video"] == str(clip)
    texts = [turn["text"] for turn in told["turns"]]
    calls = parse_tool_calls(texts[0])
    assert calls and len(texts) == 2 and texts[0].startswith("<think>\n")
    assert [call["arguments"] for call in told["calls"]] == [call.arguments for call in calls]
    assert all(call["executed"] and call["report"] and not call["error"] for call in told["calls"])
    assert f"<answer>{told['answer']}</answer>" in texts[1]
    tokens = told["tokens"]
    assert tokens["subagents"] == sum(call["subagent_tokens"] for call in told["calls"]) > 0
    assert min(tokens["given"], tokens["generated"], told["seconds"]) > 0


def test_the_transcript_shows_the_same_as_it_happens(told, asked, clip):
    said = ask(clip, asked.row.question, "--frames", "4")
    first, last = (turn["text"].removesuffix("<|im_end|>") for turn in told["turns"])
    at = said.index(first.partition("<tool_call>")[0].rstrip())
    for number, call in enumerate(told["calls"], start=1):
        start = json.dumps(call["arguments"]["start_time"])
        at = said.index(f"-> {number}  crop_video(start_time={start}", at)
    for number, call in enumerate(told["calls"], start=1):
        assert f"<- {number}  {call['report']}" in said[at:]
    at = said.index(last, at)
    assert f"answer  {told['answer']}" in said[at:] and "<tool_call>" not in said


def test_a_session_answers_line_by_line_and_survives_a_bad_one(session):
    assert "control token" in session.stderr
    first, second = map(json.loads, session.stdout.splitlines())
    assert first.pop("seconds") > second.pop("seconds"), "video and programs are kept"
    assert first == second, "the same question is answered alike, whatever came before"


def test_without_tools_it_answers_at_once(asked, clip):
    told = json.loads(ask(clip, asked.row.question, "--json", "--no-tools"))
    assert len(told["turns"]) == 1 and told["answer"] and not told["calls"]


def test_any_qwen3_vl_folder_is_asked(instruct_folder, clip):
    flags = "--model", str(instruct_folder), "--frames", "2", "--max-tokens", "8"
    told = json.loads(ask(clip, "What happens?", "--json", *flags))
    assert told["tokens"]["generated"] == 8 and told["turns"][0]["stop_reason"] == "length"


def test_settings_are_those_of_the_run_that_left_the_model(tmp_path):
    run, frames = tmp_path / "run", (3, 5)
    config = to_dict(get_recipe("needle_rl"))
    config["data"]["frame_budgets"] = list(frames)
    run.mkdir()
    (run / "config.json").write_text(json.dumps(config))
    (run / "hf").symlink_to(COLD_START)
    for model in (run, run / "hf"):
        found = settings_of(str(model))
        assert found.data.frame_budgets == frames
        assert found.model.folder == str((run / "hf").absolute())
    assert settings_of(str(run), "needle_grpo").data.frame_budgets == (4,)
    assert settings_of(None).recipe == settings_of(str(COLD_START)).recipe == "needle_rl"
    assert settings_of(str(tmp_path)).recipe == "paravt_rl"


def test_attention_is_that_of_the_run_unless_a_flag_names_another(tmp_path, monkeypatch):
    config = to_dict(get_recipe("needle_rl"))
    config["model"] |= {"attention": "cudnn", "compute_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "hf").symlink_to(COLD_START)
    assert settings_of(str(tmp_path)).model.attention == "auto", "float32 has no other"
    monkeypatch.setattr("jax.default_backend", lambda: "tpu")
    assert settings_of(str(tmp_path)).model.attention == "cudnn"
    assert settings_of(str(tmp_path), None, "splash").model.attention == "splash"
    with pytest.raises(ValueError, match="cudnn is computed on a gpu"):
        settings_of(str(tmp_path), None, "cudnn")
