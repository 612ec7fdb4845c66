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

from typing import Any

from train.config import Config
from train.recipes.base import own_videos
from train.recipes.needle import needle_grpo
from train.settings.override import based_on

_VISD: dict[str, Any] = {
    "advantages.eps": 1e-4,
    "objective.aggregation": "sequence",
    "teacher.strength": 0.5,
}
"""What it learns from, on whatever videos."""


def visd_rl() -> Config:
    """VISD on a Qwen3-VL folder: `python train/main.py --recipe visd_rl --model QWEN3_VL
    --data QUESTIONS.csv --mesh data:1,fsdp:-1,tensor:1`.

    Questions with evidence windows teach most: `thk_temporal_point` and the hint read them.
    """
    return based_on(
        own_videos(),
        {
            "steps": 1000,
            **_VISD,
            "data.frame_budgets": (16,),
            "data.instructions": "timed",
            "agent.max_tool_rounds": 0,
            "agent.turn_tokens": 768,
            "agent.answer_tokens": 768,
            "rewards.scheme": "visd",
            "optimizer.learning_rate": 1e-6,
            "optimizer.decay": "cosine",
            "optimizer.weight_decay": 0.01,
            "optimizer.clip_norm": 5.0,
            "rl.prompts_per_step": 16,
            "rl.group_size": 4,
            "output.checkpoint_every": 50,
        },
    )


def needle_visd() -> Config:
    """VISD's teacher on the needle world: `python train/main.py --recipe needle_visd`.

    Rewards, agent and optimiser are those of `needle_grpo`: the tiny model knows no `<t>`. The
    teacher is annealed over the 40 steps.
    """
    base = needle_grpo()
    return based_on(
        base,
        {
            **_VISD,
            "objective.kl_weight": 0.0,
            "teacher.anneal_steps": base.steps,
        },
    )
