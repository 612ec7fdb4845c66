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

import dataclasses

from paravt_jax.objectives import ObjectiveConfig
from paravt_jax.rewards import RewardRules
from rollout.engine.sampler import SamplingConfig
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
from train.sft.settings import PackSettings, SftSettings


def paravt_rl() -> Config:
    """PARA-GRPO on a Qwen3-VL folder.

    `python train/main.py --recipe paravt_rl --model QWEN3_VL --data QUESTIONS.csv
    --mesh data:1,fsdp:-1,tensor:1`. The paper trains 54 steps from an SFT checkpoint.
    """
    return Config(
        recipe="paravt_rl",
        needs=("--model", "--data"),
        stage=Stage.RL,
        steps=54,
        model=ModelSettings(compute_dtype="bfloat16", remat=True),
        data=DataSettings(),
        agent=_agent(),
        objective=ObjectiveConfig(anchor="position"),
        optimizer=OptimizerSettings(learning_rate=2e-6, weight_decay=0.01),
        rl=RlSettings(prompts_per_step=8, group_size=8, micro_groups=1, warm_up=True),
        output=OutputSettings(checkpoint_every=5),
    )


def _agent() -> AgentConfig:
    """The agent that is trained; its prompts are those of the cold start, too."""
    sampling = SamplingConfig(temperature=0.7)
    return AgentConfig(
        sampling=sampling,
        subagent_sampling=sampling,
        max_tool_rounds=3,
        turn_tokens=2048,
        answer_tokens=2048,
        subagent_tokens=512,
        response_tokens=512,
        subagent_batch=32,
    )


def paravt_sft() -> Config:
    """The cold start before it, on conversations of your own or ParaVT-Parquet's `sft` files.

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
    return Config(
        recipe="paravt_sft",
        needs=("--model", "--data"),
        stage=Stage.SFT,
        steps=1500,
        model=ModelSettings(compute_dtype="bfloat16", remat=True, train_vision=True),
        data=DataSettings(),
        agent=_agent(),
        optimizer=OptimizerSettings(
            learning_rate=2e-5, warmup_steps=75, decay="cosine", weight_decay=0.01
        ),
        sft=SftSettings(packing=PackSettings(), micro_rows=8),
        output=OutputSettings(checkpoint_every=100),
    )


def paravt_grpo() -> Config:
    """Vanilla GRPO beside it: `python train/main.py --recipe paravt_grpo ...`.

    No anchor, no frame gating and no forced `<think>`, as in the released vanilla recipe.
    """
    base = paravt_rl()
    return dataclasses.replace(
        base,
        recipe="paravt_grpo",
        data=dataclasses.replace(base.data, frame_budgets=(64,)),
        agent=dataclasses.replace(base.agent, think_prefix=""),
        rewards=RewardRules(anchor_weight=0.0, answer_suffix=False),
        objective=dataclasses.replace(base.objective, anchor="sequence"),
    )
