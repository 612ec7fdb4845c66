"""ParaVT's own recipe (arXiv 2605.20342) on a real Qwen3-VL and your videos.

Learning rate, rollouts, temperature, frame budgets and crop settings are the released
configuration's (`_base.yaml` at cf55249). Corrected where the release is broken: frames are gated
for real, the forced prefix is scored, the reference uses the sampler's temperature, weights and
moments are float32. Different by our choice: the anchor acts at positions, rewards are not scaled
and clipped, token advantages are not whitened, there is no KL term (the release has 0.01 of k1 in
the reward), and a step has 8 prompts instead of 7. On-policy: one step per batch, no staleness.
The release's own advantages: `--set advantages.reward_scale=10 --set advantages.reward_bias=-0.2
--set advantages.reward_clip=20 --set advantages.kl_weight=0.01 --set advantages.whiten_tokens=true
--set objective.anchor=sequence`.

Qwen3-VL-Thinking folders work as well: their template opens `<think>` itself, which then is the
head of every turn in place of `agent.think_prefix`. Their sub-agents think, too: a report is what
follows the thought, for which `agent.subagent_thought_tokens` gives room.
"""

from typing import Any

from train.config import Config, Stage
from train.recipes.base import own_videos
from train.settings.override import based_on

_AGENT: dict[str, Any] = {
    "agent.sampling.temperature": 0.7,
    "agent.subagent_sampling.temperature": 0.7,
    "agent.max_tool_rounds": 3,
    "agent.turn_tokens": 2048,
    "agent.answer_tokens": 2048,
    "agent.subagent_tokens": 512,
    "agent.response_tokens": 512,
    "agent.subagent_batch": 32,
}
"""The agent that is trained; its prompts are those of the cold start, too."""


def paravt_rl() -> Config:
    """ParaVT: PARA-GRPO on a Qwen3-VL folder and your questions.

    `python train/main.py --recipe paravt_rl --model QWEN3_VL --data QUESTIONS.csv
    --mesh data:1,fsdp:-1,tensor:1`. The paper trains 54 steps from an SFT checkpoint.
    """
    return based_on(
        own_videos(),
        {
            "steps": 54,
            **_AGENT,
            "objective.anchor": "position",
            "optimizer.learning_rate": 2e-6,
            "optimizer.weight_decay": 0.01,
            "rl.prompts_per_step": 8,
            "rl.group_size": 8,
            "rl.micro_groups": 1,
            "rl.warm_up": True,
            "output.checkpoint_every": 5,
        },
    )


def paravt_sft() -> Config:
    """The cold start of paravt_rl, on conversations of your own or ParaVT-Parquet's.

    `python train/main.py --recipe paravt_sft --model QWEN3_VL --data CONVERSATIONS
    --mesh fsdp:-1`. The release trains 1500 steps, its model card says 500, on 8 GPUs with 4 packs
    each. As there, the vision tower trains.

    Prompts are those of `paravt_rl` to the token: its system text and tools instead of the data's
    own system message ("You are a helpful assistant." in ParaVT-Parquet; `sft.packing.system=own`
    keeps it), and frames as images with their times (`data.frames_as=video` is the release's form,
    to be set for both stages). In the release cold start, RL and evaluation each have their own.

    Packs, rates, pixels and optimiser are the release's. Corrected: vision tokens have M-RoPE
    positions, as Qwen3-VL's processor has it and as rollouts do; paths with `file://` are read;
    only what the assistant wrote is learned (`sft.packing.learn=special` adds the special tokens of
    all turns, never tool responses); the loss is the mean over the tokens of the global batch, not
    of each device's; packing is first fit over 64 open rows instead of next fit; weights, moments
    and gradients are float32.
    """
    return based_on(
        own_videos(),
        {
            "stage": Stage.SFT,
            "steps": 1500,
            "model.train_vision": True,
            **_AGENT,
            "optimizer.learning_rate": 2e-5,
            "optimizer.warmup_steps": 75,
            "optimizer.decay": "cosine",
            "optimizer.weight_decay": 0.01,
            "sft.micro_rows": 8,
            "output.checkpoint_every": 100,
        },
    )


def paravt_grpo() -> Config:
    """The baseline of paravt_rl, vanilla GRPO: `python train/main.py --recipe paravt_grpo ...`.

    No anchor, no frame gating and no forced `<think>`, as in the released vanilla recipe.
    """
    return based_on(
        paravt_rl(),
        {
            "data.frame_budgets": (64,),
            "agent.think_prefix": "",
            "rewards.anchor_weight": 0.0,
            "rewards.answer_suffix": False,
            "objective.anchor": "sequence",
        },
    )
