"""Protocols as files: what they say, what they refuse, which frames they show."""

import re
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluate.benchmarks import extraction, protocol, schemas, scoring
from evaluate.benchmarks.frames import FrameRules, TooFewFrames
from evaluate.benchmarks.sample import Kind, Sample


def write(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return str(path)


def choice(**more):
    options = more.pop("options", ("A. red", "B. blue", "C. green", "D. black"))
    fields = {"doc": {"answer": "B"}, "gold": "B", "options": options} | more
    return Sample(
        "videomme", "q", 0, fields.pop("doc"), Kind.CHOICE, "v.mp4", "?", cluster="v", **fields
    )


# --- Files ----------------------------------------------------------------------------------------


HARNESSES = [
    "vlmevalkit/1fps",
    "lmms-eval",
    "lmms-eval/qwen3_vl",
    "paravt",
    "paravt-release",
    "qwen-report",
    "vlmevalkit",
]


@pytest.mark.parametrize("name", protocol.names())
def test_shipped_protocols_say_what_they_are(name):
    loaded = protocol.load(name)
    assert loaded.name == name and loaded.about and loaded.source and loaded.tasks


@pytest.mark.parametrize("name", HARNESSES)
def test_harnesses_are_named_with_their_commit(name):
    loaded = protocol.load(name)
    assert re.search("[0-9a-f]{7}", loaded.source)
    assert protocol.OWN in loaded.tables["task"], "files of one's own"


def test_a_copy_may_change_one_word(tmp_path):
    path = write(tmp_path, 'extends = "lmms-eval"\n[task.lvbench.video]\nframes = 8\n')
    mine, theirs = protocol.load(path), protocol.load("lmms-eval")
    assert mine.rules("lvbench", Kind.CHOICE).video.frames == 8
    assert mine.rules("mlvu_dev", Kind.CHOICE).video.frames == 32
    assert mine.rules("lvbench", Kind.CHOICE).prompt == theirs.rules("lvbench", Kind.CHOICE).prompt
    assert mine.name == "mine"


def test_a_changed_copy_has_a_name_of_its_own(tmp_path):
    shipped, copy = protocol.SHIPPED / "paravt.toml", tmp_path / "paravt.toml"
    copy.write_text(shipped.read_text("utf-8"), "utf-8")
    assert protocol.load(str(copy)).name == protocol.load(str(shipped)).name == "paravt"
    copy.write_text(shipped.read_text("utf-8").replace("784", "1024"), "utf-8")
    with pytest.raises(ValueError, match=f"--protocol {copy}: paravt is a protocol of this"):
        protocol.load(str(copy))
    assert protocol.load(str(copy.rename(tmp_path / "mine.toml"))).name == "mine"


REFUSED = [
    ("[all.video]\nframs = 8\n[task.own]", "video.frams is unknown"),
    ("[all.vidoe]\nframes = 8\n", "all.vidoe is unknown"),
    ("[taks.lvbench]\n", "taks is unknown"),
    ("[all.video]\nframes = 0\n[task.own]", "video.frames=0: must be at least 1"),
    ('[all.video]\nframes = "8"\n[task.own]', "video.frames = '8': write an integer"),
    ('[all.video]\nsampling = "random"\n[task.own]', "video.sampling = 'random': write linspace"),
    ("[all.video]\nmin_pixels = 9\nmax_pixels = 8\n[task.own]", "min_pixels=9 is more than"),
    ('[all.prompt]\nuser = "{vidoe}{question}"\n[task.own]', "{vidoe}, which stands for nothing"),
    ('[all.scoring]\nextract = "gpt"\n[task.own]', "scoring.extract = 'gpt': write mcq"),
    ('[all.scoring]\nstrip = ["<think>"]\n[task.own]', "write a list of list of texts"),
    ("[mode.thinking.agent]\nrounds = 1\n", "mode.thinking is unknown"),
    ('modes = ["agentic", "fast"]\n', "list some of"),
    ('extends = "lmms"\n', "lmms.toml is not there"),
    ("all = 3\n", "all = 3: write a table"),
    ("[all\n", "no protocol can be read"),
]


@pytest.mark.parametrize(("text", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_refusals_name_file_key_and_remedy(text, said, tmp_path):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        protocol.load(path)
    assert path in str(error.value)


def test_a_protocol_that_extends_itself(tmp_path):
    (tmp_path / "a.toml").write_text('extends = "b.toml"\n')
    (tmp_path / "b.toml").write_text('extends = "a.toml"\n')
    with pytest.raises(ValueError, match="extends itself"):
        protocol.load(str(tmp_path / "a.toml"))


def test_what_it_does_not_know():
    loaded = protocol.load("vlmevalkit")
    with pytest.raises(ValueError, match="--benchmarks lvbench: the protocol vlmevalkit"):
        loaded.rules("lvbench", Kind.CHOICE)
    with pytest.raises(ValueError, match="--mode agentic: vlmevalkit knows direct"):
        loaded.rules("videomme", Kind.CHOICE, "agentic")
    with pytest.raises(ValueError, match="--protocol lmmseval"):
        protocol.load("lmmseval")


def test_files_are_in_the_repository():
    """A protocol that nobody added to git would be missing in every checkout but one."""
    where = protocol.SHIPPED
    listed = subprocess.run(["git", "ls-files", "."], cwd=where, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git here")
    assert {f"{name}.toml" for name in protocol.names()} <= set(listed.stdout.split())


# --- Modes ----------------------------------------------------------------------------------------


def test_the_release_swaps_the_instructions():
    release, mended = protocol.load("paravt-release"), protocol.load("paravt")
    task = ("videomme", Kind.CHOICE)
    assert "crop_video if needed" in release.rules(*task, "direct").prompt.instruction
    assert (
        release.rules(*task, "agentic").prompt.instruction == "Answer with the option letter only."
    )
    assert "crop_video" not in mended.rules(*task, "direct").prompt.instruction
    for loaded, rounds in ((release, 3), (mended, 3)):
        assert loaded.rules(*task, "agentic").agent.rounds == rounds
        assert loaded.rules(*task, "direct").agent.rounds == 0
    assert mended.rules(*task, "sequential").agent.dispatch == "sequential"
    assert mended.modes[0] == "agentic", "the default"


def test_tool_schemas_in_system_texts_are_json():
    for mode, kind in (("agentic", Kind.CHOICE), ("agentic", Kind.GROUNDING)):
        system = protocol.load("paravt-release").rules("videomme", kind, mode).prompt.system
        assert '<tools>\n{"type": "function"' in system and "{{" not in system
        assert not system.startswith("\n")


def test_defects_of_the_release():
    release, mended = protocol.load("paravt-release"), protocol.load("paravt")
    row = choice(doc={"answer": "B"}, options=("w", "x", "y", "z"))
    for loaded, right in ((release, 0.0), (mended, 1.0)):
        rules = loaded.rules("mlvu_dev", Kind.CHOICE, "agentic")
        assert scoring.score(rules, row, "<answer>B</answer>").score == right
    assert scoring.gold_letter(release.rules("mlvu_dev", Kind.CHOICE), row) == "?"
    words = Sample("mmvu_val", "q", 0, {}, Kind.OPEN, "v.mp4", "?", "burnt sienna", "v")
    for loaded, right in ((release, 0.0), (mended, 1.0)):
        rules = loaded.rules("mmvu_val", Kind.OPEN, "agentic")
        assert scoring.score(rules, words, "<answer>Burnt sienna</answer>").score == right


# --- Scoring --------------------------------------------------------------------------------------


def test_what_upstream_draws_is_seeded_and_named():
    rules = protocol.load("lmms-eval").rules("longvideobench_val_v", Kind.CHOICE)
    found = [scoring.score(rules, choice(), "no idea").prediction for _ in range(3)]
    assert len(set(found)) == 1 and found[0] in "ABCD"
    assert scoring.score(rules, choice(), "no idea").method == "drawn"
    others = [
        Sample("t", str(n), n, {}, Kind.CHOICE, "v", "?", "A", "v", ("a", "b")) for n in range(50)
    ]
    drawn = {scoring.drawn_letter(rules, sample) for sample in others}
    assert drawn == {"A", "B"}


def test_judges_are_asked_where_the_rules_fail_and_never_replaced():
    rules = protocol.load("lmms-eval").rules("mmvu_val", Kind.OPEN)
    words = Sample("mmvu_val", "q", 0, {}, Kind.OPEN, "v.mp4", "?", "burnt sienna", "v")
    asked = []

    def judge(message):
        asked.append(message)
        return "1.0"

    assert scoring.score(rules, words, "burnt sienna", judge).method == "rule" and not asked
    found = scoring.score(rules, words, "a brown", judge)
    assert (found.score, found.method) == (1.0, "judge") and "a brown" in asked[0]

    def away(message):
        raise ConnectionError("nobody there")

    for broken in (away, lambda message: "I cannot say"):
        with pytest.raises(scoring.JudgeFailed):
            scoring.score(rules, words, "a brown", broken)


def test_a_thought_is_not_an_answer():
    rules = protocol.load("lmms-eval").rules("videomme", Kind.CHOICE)
    found = scoring.score(rules, choice(), "<think>A man... so A</think><answer>B</answer>")
    assert (found.score, found.filtered) == (1.0, "<answer>B</answer>")


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("<think>perhaps B", None),
        ("<think>perhaps A <answer>B</answer>", "B"),
        ("<think>perhaps A</think>B", "B"),
        ("A man takes the cup", None),
        ("The answer is (B).", "B"),
        ("<answer>B. blue</answer>", "B"),
        ("", None),
    ],
)
def test_what_the_default_reads(said, read):
    rules = protocol.load("paravt").rules("videomme", Kind.CHOICE)
    assert scoring.score(rules, choice(), said).prediction == read


@settings(max_examples=300, deadline=None)
@given(st.text("ABCDEab <>/()[]{}.,:;-–—~!?\n0123456789tosendark答案是é", max_size=60))
def test_no_text_breaks_an_extractor(text):
    assert extraction.mcq(text) in ("", *"ABCD")
    assert extraction.longvideobench(text) in (None, *"ABCDE")
    assert extraction.vlmevalkit(text) in ("", *"ABCD")
    assert len(extraction.paravt_letter(text)) <= 1
    window = extraction.charades(text)
    assert window is None or window[0] <= window[1]
    for found in (extraction.paravt_window(text), *extraction.timelens(text)):
        assert found is None or len(found) == 2
    assert extraction.mmvu_open(text, text), "what is said is what is right"
    stripped = extraction.strip_reasoning(text, [("<t>", "</t>")])
    assert extraction.strip_reasoning(stripped, [("<t>", "</t>")]) == stripped


# --- Frames ---------------------------------------------------------------------------------------


def test_interior_frames_are_not_those_at_the_ends():
    assert FrameRules(sampling="interior", frames=4).indices(100, 25.0) == [20, 40, 60, 80]
    assert FrameRules(sampling="linspace", frames=4).indices(100, 25.0) == [0, 33, 66, 99]


def test_a_frame_a_second_from_the_first_one_on():
    rules = protocol.load("vlmevalkit/1fps").rules("videomme", Kind.CHOICE).video
    assert rules.indices(100, 25.0) == [0, 25, 50, 75]
    assert rules.indices(105, 29.97) == [0, 29, 59], "cut off, not rounded"
    assert rules.indices(10, 25.0) == [0]
    few = FrameRules(sampling="steps", fps=1.0, frames=3)
    assert few.indices(100, 25.0) == [25, 50, 75], "as `interior`, where there would be more"


def test_frames_by_length():
    rules = protocol.load("qwen-report").rules("videomme", Kind.CHOICE).video
    assert len(rules.indices(250, 25.0)) == 20
    assert len(rules.indices(25, 25.0)) == 4, "no fewer than four"
    assert len(rules.indices(25 * 3600, 25.0)) == 2048


def test_videos_that_are_too_short():
    shown = {
        name: protocol.load(name).rules("videomme", Kind.CHOICE).video
        for name in ("lmms-eval", "paravt-release", "paravt", "vlmevalkit")
    }
    with pytest.raises(TooFewFrames, match="31 frames and the protocol shows 32"):
        shown["lmms-eval"].indices(31, 25.0)
    assert shown["paravt-release"].indices(63, 25.0) == [], "silently"
    assert len(shown["paravt"].indices(63, 25.0)) == 62
    assert len(shown["vlmevalkit"].indices(10, 25.0)) == 10


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["linspace", "interior", "fps", "steps", "longvideobench"]),
    st.integers(1, 100),
    st.integers(1, 3),
    st.integers(1, 500),
    st.sampled_from([1.0, 6.0, 29.97]),
)
def test_indices_lie_in_the_video(sampling, frames, multiple, total, fps):
    rules = FrameRules(sampling=sampling, frames=frames, multiple=multiple)
    found = rules.indices(total, fps)
    assert found == sorted(found) and found and found[0] >= 0 and found[-1] < total


def test_the_document_names_every_task_and_protocol():
    text = (protocol.SHIPPED.parents[2] / "docs" / "evaluation.md").read_text("utf-8")
    for name in (*HARNESSES, *schemas.TASKS):
        assert f"`{name}`" in text, name
    for name in HARNESSES:
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        assert row.endswith(f"| {', '.join(protocol.load(name).modes)} |")
