"""`benchmarks/scale.py`: cases that are compiled a few programs at a time, and the page of them."""

import subprocess
import sys

import pytest

from benchmarks import scale
from tests.support.command import ROOT
from train.compile.step import REACHED, step_by_share

CALLS = {"decode main": 1000.0, "step": 1.0}
CHIP = {"name": "paper", "flops": 1e12, "memory": 64e9, "bandwidth": 1e11, "links": 1e10}
CASE, *_ = scale.CASES


def program(name: str, seconds: float) -> dict:
    """Figures of one program."""
    decodes = name.startswith("decode")
    return {
        "calls": CALLS[name],
        "part": "rollout" if decodes else "learner",
        "spoken": decodes,
        "tokens": 64,
        "model_flops": 1e9,
        "seconds_to_compile": 60.0,
        "fits": True,
        "needed_bytes": None,
        "memory": {"arguments": 2.0**30, "temporaries": 2.0**31, "together": 3 * 2.0**30},
        "flops": 1e9,
        "bytes": 2e9,
        "collectives": {},
        "seconds": seconds,
        "seconds_by_limit": {"products": seconds / 2, "memory": seconds},
    }


def figures(**programs: float) -> dict:
    """What `compile.json` has where these programs took so many seconds."""
    named = {name.replace("_", " "): seconds for name, seconds in programs.items()}
    return {
        "topology": "v5p:2x2x2",
        "rollout_mesh": {"data": 1, "tensor": 8},
        "chips": 8,
        "chip": CHIP,
        "rollouts": 64,
        "generated": 1000,
        "calls": CALLS,
        "programs": {name: program(name, seconds) for name, seconds in named.items()},
    }


@pytest.fixture(autouse=True)
def origin(monkeypatch):
    monkeypatch.setattr(scale, "_versions", lambda: "jax 1, libtpu 2")


def test_programs_of_several_runs_come_together():
    first = scale.merged(CASE, None, figures(step=2.0), "step", "step does not fit")
    assert not step_by_share(first) and first["errors"] == {"step": "step does not fit"}
    page = scale.page({CASE.name: first})
    assert "Not compiled: decode main." in page and "* step does not fit" in page
    both = scale.merged(CASE, first, figures(decode_main=0.001), "decode main", "")
    both = scale.merged(CASE, both, figures(step=3.0), "step", "")
    assert [*both["programs"]] == ["decode main", "step"] and not both["errors"]
    step = step_by_share(both)[0.25]
    assert step["seconds"] == pytest.approx(0.25 + 3) and step["rollout"] == pytest.approx(0.25)
    expected = {"step": 3.0 / REACHED["other"], "decode main": 0.25 / REACHED["decode"]}
    assert step["expected_by_program"] == pytest.approx(expected)
    page = scale.page({CASE.name: both})
    assert "Not compiled" not in page and "step 6.00 + decode main 0.62" in page
    assert page.count(f"| {CASE.name} | 64 | 2 |") == 1  # growth


def test_other_settings_begin_anew():
    before = scale.merged(CASE, None, figures(step=2.0), "step", "")
    after = scale.merged(CASE, before | {"flags": ["--mesh", "fsdp:4"]}, figures(), "step", "")
    assert after["programs"] == {} and after["flags"] == CASE.flags
    # One that got nowhere loses nothing.
    stopped = scale.merged(CASE, before, {"programs": {}}, "decode main", "")
    assert [*stopped["programs"]] == ["step"]


def test_what_the_compiler_gave_up_is_bold():
    found = figures(decode_main=0.001, step=1.0)
    kept = ("calls", "part", "spoken", "tokens", "model_flops", "seconds_to_compile", "fits")
    own = {name: found["programs"]["step"][name] for name in kept}
    found["programs"]["step"] = own | {"fits": False, "needed_bytes": 41.5 * 2**30}
    page = scale.page({CASE.name: scale.merged(CASE, None, found, "all", "step does not fit")})
    assert "**needs 41.5**" in page and "at least 1.0 s a step at the roofline" in page


def test_a_case_of_which_nothing_was_compiled_says_why():
    found = scale.merged(CASE, None, {"programs": {}}, "step", "error: no such topology")
    assert "* error: no such topology" in scale.page({CASE.name: found})


@pytest.mark.slow
def test_it_starts_without_the_packages_of_the_tests():
    """`make scale` has an environment of its own: requirements-scale.txt."""
    absent = "pytest", "imageio_ffmpeg", "hypothesis", "moto", "torch", "torchvision", "playwright"
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import benchmarks.scale"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
