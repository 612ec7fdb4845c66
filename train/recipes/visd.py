"""VISD (arXiv 2605.06094): GRPO whose updates are spread over tokens by a teacher that knows the
outcome.

From its release (91bb992): teacher, rewards, learning rate, four rollouts of at most 768 tokens,
16 prompts a step, mean over rollouts of their mean over tokens, no divergence term, gradients
clipped at 5. Different here:

* The feedback that the teacher reads is made of our own reward terms. The source asks a language
  model for two to four sentences.
* No boxes: rows hold windows, so spatial rewards and key-frame boxes of the hint are left out.
* The paper trains one epoch of its own data and does not say at which temperature, nor how many
  frames are shown: here 1000 steps (600 with the teacher, then plain GRPO), 1.0 and 16 frames.
* Every answer is scored in one turn without tools, as in the paper; on the needle world, which
  cannot be solved without, the agent crops.
"""

import dataclasses

from paravt_jax.advantages import AdvantageConfig
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
from train.methods.settings import TeacherSettings
from train.recipes.needle import needle_grpo

_ADVANTAGES = AdvantageConfig(eps=1e-4)
_OBJECTIVE = ObjectiveConfig(aggregation="sequence")


def visd_rl() -> Config:
    """VISD on a Qwen3-VL folder: `python train/main.py --recipe visd_rl --model QWEN3_VL
    --data QUESTIONS.csv --mesh data:1,fsdp:-1,tensor:1`.

    Questions with evidence windows teach most: `thk_temporal_point` and the hint read them.
    """
    return Config(
        recipe="visd_rl",
        needs=("--model", "--data"),
        stage=Stage.RL,
        steps=1000,
        model=ModelSettings(compute_dtype="bfloat16", remat=True),
        data=DataSettings(frame_budgets=(16,), instructions="timed"),
        agent=AgentConfig(max_tool_rounds=0, turn_tokens=768, answer_tokens=768),
        rewards=RewardRules(scheme="visd"),
        advantages=_ADVANTAGES,
        objective=_OBJECTIVE,
        optimizer=OptimizerSettings(
            learning_rate=1e-6, decay="cosine", weight_decay=0.01, clip_norm=5.0
        ),
        rl=RlSettings(prompts_per_step=16, group_size=4),
        teacher=TeacherSettings(strength=0.5),
        output=OutputSettings(checkpoint_every=50),
    )


def needle_visd() -> Config:
    """VISD's teacher on the needle world: `python train/main.py --recipe needle_visd`.

    Rewards, agent and optimiser are those of `needle_grpo`: the tiny model knows no `<t>`. The
    teacher is annealed over the 40 steps.
    """
    base = needle_grpo()
    return dataclasses.replace(
        base,
        recipe="needle_visd",
        advantages=_ADVANTAGES,
        objective=_OBJECTIVE,
        teacher=TeacherSettings(strength=0.5, anneal_steps=base.steps),
    )
