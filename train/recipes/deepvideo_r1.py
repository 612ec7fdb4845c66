"""DeepVideo-R1 (arXiv 2506.07464): advantages as the target of a regression, and prompts that are
made easier or harder by how a group does.

From the paper (no code is public): Reg-GRPO, divergence weight 0.1, the mean reward of the last 100
groups, eight rollouts, 16 frames of 252 x 252 pixels, no tool, some 2000 steps. Different here, or
left open there:

* The divergence is a penalty; the paper's formula subtracts it from a loss that is minimised.
* Each batch gets two optimiser steps: at the first all log-ratios are 0, and there is nothing to
  regress. How the sums, means and deviations are read is told in `paravt_jax.surrogates`.
* Learning rate 1e-6, temperature 1.0 and 8 prompts a step are ours: the paper gives none.
* How hints and noise grow, and when prompts are left alone: `train.methods.difficulty`.
"""

from typing import Any

from train.config import Config
from train.recipes.base import own_videos
from train.recipes.needle import needle_grpo
from train.settings.override import based_on

_DEEPVIDEO_R1: dict[str, Any] = {
    "objective.surrogate": "regression",
    "objective.ratio": "trajectory",
    "objective.aggregation": "sequence",
    "objective.kl_weight": 0.1,
    "rl.epochs": 2,
    "difficulty.window": 100,
}
"""What it learns from, on whatever videos."""


def deepvideo_r1_rl() -> Config:
    """DeepVideo-R1 on a Qwen3-VL folder: `python train/main.py --recipe deepvideo_r1_rl
    --model QWEN3_VL --data QUESTIONS.csv --mesh data:1,fsdp:-1,tensor:1`."""
    return based_on(
        own_videos(),
        {
            "steps": 2000,
            **_DEEPVIDEO_R1,
            "data.frame_budgets": (16,),
            "data.max_pixels": 252 * 252,
            "agent.max_tool_rounds": 0,
            "agent.turn_tokens": 1024,
            "agent.answer_tokens": 1024,
            "rewards.scheme": "deepvideo_r1",
            "optimizer.learning_rate": 1e-6,
            "rl.prompts_per_step": 8,
            "rl.group_size": 8,
            "output.checkpoint_every": 50,
        },
    )


def needle_deepvideo_r1() -> Config:
    """DeepVideo-R1 on the needle world: `python train/main.py --recipe needle_deepvideo_r1`.

    With the agent of the needle world, which crops, and its rewards, since the source's give
    nothing for calls. Half the learning rate of `needle_grpo`: a batch gets two steps.
    """
    base = needle_grpo()
    return based_on(
        base,
        {
            **_DEEPVIDEO_R1,
            "optimizer.learning_rate": base.optimizer.learning_rate / 2,
            "difficulty.hint_tokens": 64,
        },
    )
