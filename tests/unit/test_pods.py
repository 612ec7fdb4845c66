"""`benchmarks/pods.py`: a step on other numbers of chips than those that were compiled."""

import pytest

from benchmarks import pods
from train.compile.step import Step, Term

COSTS = pods.HostCosts(
    overview=4.0,
    crop=2.0,
    reward=0.5,
    overview_told=10**6,
    crop_told=10**5,
    overview_pixels=10**9,
    crop_pixels=10**8,
    send_byte=1e-9,
    receive_byte=2e-9,
    receive_message=0.0,
    row_call=1e-3,
    commit="0000000",
)


def steps(few: float, many: float) -> dict[int, Step]:
    """A learner's step of so many seconds on 8 and on 64 chips."""
    return {8: _step(8, few), 64: _step(64, many)}


def _step(chips: int, seconds: float) -> Step:
    terms = [
        Term("step", "learner", 1, seconds, spoken=False, tokens=1, model_flops=1),
        Term("decode main", "rollout", 1600, 0.0, spoken=True, tokens=1, model_flops=1),
    ]
    return Step(terms, chips, flops=1.0, rollouts=64, generated=8192)


@pytest.mark.parametrize(("chips", "seconds"), [(8, 90), (16, 50), (32, 30), (64, 20), (512, 20)])
def test_programs_pass_through_both_meshes_and_stay_as_on_the_larger(chips, seconds):
    """5 s that no chip shares and 320 that all do, at half of the roofline."""
    found = pods.point(chips, steps(5 + 320 / 8, 5 + 320 / 64), COSTS, threads=2, share=1.0)
    assert found["learner s"] == pytest.approx(seconds)
    assert found["rollouts"] == 64 * max(1, chips // 64)


def test_host_work_is_shared_and_grows_with_the_batch_alone():
    few, many = (pods.point(n, steps(1, 1), COSTS, threads=2, share=0.125) for n in (64, 1024))
    crops = 64 * pods.Sizes.of_recipe().crops * 0.125 / few["hosts"]
    assert few["crops, rewards"] == pytest.approx(-(-crops // 1) * 1.0 + 4 * 0.5)
    assert many["crops, rewards"] == few["crops, rewards"]
    assert many["unshared"] == pytest.approx(16 * few["unshared"], rel=0.01)


def test_every_host_keeps_the_rows_of_all():
    """100 calls of 16 tokens, a millisecond a row."""
    few, many = (pods.point(n, steps(1, 1), COSTS, threads=2, share=0.5) for n in (64, 1024))
    assert few["between calls"] == pytest.approx(50 * 64 * 1e-3)
    assert many["between calls"] == pytest.approx(50 * 1024 * 1e-3)


def test_a_host_takes_in_what_all_others_made():
    """Twice the hosts make twice as much, of which each takes in all but its own part."""
    told = [pods.point(n, steps(1, 1), COSTS, threads=2, share=0.125) for n in (512, 1024)]
    assert told[1]["exchange"] == pytest.approx(2 * told[0]["exchange"], rel=0.01)
    alone = pods.point(4, steps(1, 1), COSTS, threads=2, share=0.125)
    assert alone["exchange"] == alone["pixels"] == 0


def test_pixels_go_to_the_hosts_of_a_row_however_many_there_are():
    pixels = [pods.point(n, steps(1, 1), COSTS, threads=2, share=0.125) for n in (64, 1024)]
    sizes, hosts = pods.Sizes.of_recipe(), 16
    crops = sizes.prompts * sizes.group * sizes.crops * 0.125
    taken = (sizes.prompts * 10**9 + 2 * crops * 10**8) / hosts
    assert [own["pixels"] for own in pixels] == pytest.approx([2e-9 * taken] * 2)
