"""Prompts that are too long are rejected rows; folders without a tokenizer are refused."""

import shutil

import pytest

from paravt_jax.records import Row, VideoRef
from pipelines.faults import Unusable
from pipelines.render import ChatRenderer
from pipelines.sizes import PromptLimit, prompt_tokens
from pipelines.tokenizer import open_tokenizer
from tests.support.needle import processor_folder, renderer
from train.data.questions import question_check, read_questions
from train.recipes import get_recipe
from train.settings.override import override
from train.setup import prompt_room

VIDEO = VideoRef("/a.mp4", 9.0)
ROWS = [
    Row("short", VIDEO, "What?", "red"),
    Row("long", VIDEO, "What is it, there? " * 40, "red"),
    Row("two", VIDEO, "Which? π\n", "red", more_videos=(VIDEO,)),
]


@pytest.mark.parametrize("mode", ["image", "video"])
@pytest.mark.parametrize("quota", [None, 8])
def test_lengths_are_those_of_the_prompts(mode, quota):
    own = ChatRenderer.from_folder(
        processor_folder(), mode, pixels=(784, 50176), tools=renderer().tools
    )
    limit = PromptLimit(own, 8, quota, 1, "why")
    for row in [*ROWS, *ROWS[::-1]]:
        assert limit.tokens(row) == prompt_tokens(own, [row], 8, quota)


def test_the_limit_is_the_last_that_fits():
    own = renderer()
    tokens = PromptLimit(own, 4, None, 1, "").tokens(ROWS[1])
    PromptLimit(own, 4, None, tokens, "")(ROWS[1])
    with pytest.raises(Unusable, match=rf"{tokens} tokens .* {tokens - 1} \(because\)") as refusal:
        PromptLimit(own, 4, None, tokens - 1, "because")(ROWS[1])
    assert refusal.value.kind == "long prompt"


def check(config, positions):
    room = prompt_room(config, renderer(), positions)
    return question_check(config.data, config.evaluation, renderer(), room)


def test_rows_with_long_prompts_are_rejected_and_counted(tmp_path, monkeypatch):
    """A question of 60,000 tokens or more."""
    from pipelines.media import Media

    monkeypatch.setattr(Media, "probe", lambda self, paths: None)
    monkeypatch.setattr(Media, "video", lambda self, path: VIDEO)
    lines = [f"a.mp4,{words},red,oe" for words in ("What?", "x1? " * 15_000, "Which?")]
    data = tmp_path / "q.csv"
    data.write_text("\n".join(["video,question,answer,question_type", *lines]))
    (tmp_path / "a.mp4").touch()
    some = (f"data.path={data}", "data.max_rejected=0.5", "data.frame_budgets=4")
    config = override(get_recipe("needle_rl"), [*some, "evaluation.rows=0"])
    (found,) = read_questions(config.data, config.evaluation, check(config, 4096))
    assert [row.question for row in found.rows] == ["What?", "Which?"]
    assert "max_position_embeddings=4096" in found.rejected[0].reason
    (found,) = read_questions(config.data, config.evaluation, check(config, 2**20))
    assert len(found.rows) == 3
    tight = override(config, ["data.max_prompt_tokens=1"])
    with pytest.raises(ValueError, match=r"data\.max_prompt_tokens=1\b"):
        read_questions(tight.data, tight.evaluation, check(tight, 4096))


def test_an_episode_must_fit_the_model():
    config = get_recipe("needle_rl")
    most, _ = prompt_room(config, renderer(), 4096)
    asked = override(config, [f"data.max_prompt_tokens={most}"])
    assert prompt_room(asked, renderer(), 4096)[0] == most
    with pytest.raises(ValueError, match=r"data\.max_prompt_tokens.*max_position_embeddings=4095"):
        prompt_room(asked, renderer(), 4095)
    with pytest.raises(ValueError, match=r"max_position_embeddings=100; lower"):
        prompt_room(config, renderer(), 100)


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        (("tokenizer.json",), "holds no tokenizer"),
        (("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"), "holds no tokenizer"),
        (("chat_template.jinja", "chat_template.json", "tokenizer_config.json"), "no chat templ"),
    ],
)
def test_folders_without_a_tokenizer_are_refused_in_one_line(gone, named, tmp_path):
    folder = shutil.copytree(processor_folder(), tmp_path / "model")
    for name in gone:
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=named) as refusal:
        open_tokenizer(str(folder))
    assert "fetch tokenizer.json" in str(refusal.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {"type": "BPE"}}'])
def test_damaged_tokenizers_are_refused_in_one_line(content, tmp_path):
    folder = shutil.copytree(processor_folder(), tmp_path / "model")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="no tokenizer to load"):
        open_tokenizer(str(folder))
