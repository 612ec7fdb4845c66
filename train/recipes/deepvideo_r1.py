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

import dataclasses

from paravt_jax.objectives import ObjectiveConfig
from paravt_jax.rewards import RewardRules
from rollout.limits import AgentConfig
from train.config import (
    Config,
    DataSettings,
    ModelSettings,
    OptimizerSettings,
    OutputSettings,
    RlSettings,
    Stage,
)
from train.methods.settings import DifficultySettings
from train.recipes.needle import needle_grpo

_PIXELS = 252 * 252
_OBJECTIVE = ObjectiveConfig(
    surrogate="regression", ratio="trajectory", aggregation="sequence", kl_weight=0.1
)


def deepvideo_r1_rl() -> Config:
    """DeepVideo-R1 on a Qwen3-VL folder: `python train/main.py --recipe deepvideo_r1_rl
    --model QWEN3_VL --data QUESTIONS.csv --mesh data:1,fsdp:-1,tensor:1`."""
    return Config(
        recipe="deepvideo_r1_rl",
        needs=("--model", "--data"),
        stage=Stage.RL,
        steps=2000,
        model=ModelSettings(compute_dtype="bfloat16", remat=True),
        data=DataSettings(frame_budgets=(16,), max_pixels=_PIXELS),
        agent=AgentConfig(max_tool_rounds=0, turn_tokens=1024, answer_tokens=1024),
        rewards=RewardRules(scheme="deepvideo_r1"),
        objective=_OBJECTIVE,
        optimizer=OptimizerSettings(learning_rate=1e-6),
        rl=RlSettings(prompts_per_step=8, group_size=8, epochs=2),
        difficulty=DifficultySettings(window=100),
        output=OutputSettings(checkpoint_every=50),
    )


def needle_deepvideo_r1() -> Config:
    """DeepVideo-R1 on the needle world: `python train/main.py --recipe needle_deepvideo_r1`.

    With the agent of the needle world, which crops, and its rewards, since the source's give
    nothing for calls. Half the learning rate of `needle_grpo`: a batch gets two steps.
    """
    base = needle_grpo()
    half = base.optimizer.learning_rate / 2
    return dataclasses.replace(
        base,
        recipe="needle_deepvideo_r1",
        objective=_OBJECTIVE,
        optimizer=dataclasses.replace(base.optimizer, learning_rate=half),
        rl=dataclasses.replace(base.rl, epochs=2),
        difficulty=DifficultySettings(window=100, hint_tokens=64),
    )
