"""VITAL (arXiv 2508.04416): GRPO that weighs prompts by difficulty, and a tool that gives frames.

DGRPO multiplies the advantages of a group by how hard the group found its prompt
(`advantages.difficulty_weighted`); rewards add the scaled accuracy, the format, and half a point
for each of two tool calls that ran (`rewards.scheme=vital`). This is its fourth stage, RL with the
tool, which follows three others of its own: SFT, RL without a tool, SFT with the tool.

From the source (its code): 8 rollouts of 64 prompts in one optimiser step, AdamW with learning rate
1e-6, cosine decay and weight decay 0.01, 0.01 of k3 in the loss, no entropy term, repetition
penalty 1.05, 1024 tokens a turn, one call of `get_video_clip_frame`, 2 frames a second, at most 64
frames of 4 to 64 vision tokens, one epoch of its 16,000 questions. Left open there and chosen here:
temperature 1, the default of its trainer, and 32 frames of overview, which fit its prompts of 3072
tokens. The learner computes log-probabilities under the penalty too (`docs/adr/0020`).

Different here: Qwen3-VL instead of Qwen2.5-VL, so that a vision token is 32 x 32 pixels instead of
28 x 28; responses come through the chat template; what the paper writes as a weight of rewards acts
on advantages, as in its code (on rewards it would cancel).
"""

from train.config import Config
from train.recipes.base import own_videos
from train.recipes.needle import needle_frames
from train.settings.override import based_on

TOKEN_PIXELS = 32 * 32
"""Pixels of one vision token of Qwen3-VL."""


def vital_rl() -> Config:
    """VITAL's RL with the tool on a Qwen3-VL folder, best after its earlier stages.

    `python train/main.py --recipe vital_rl --model QWEN3_VL --data QUESTIONS.jsonl
    --mesh data:1,fsdp:-1,tensor:1`. For its chapters `--set rewards.iou_scale=0,0.5`.
    """
    return based_on(
        own_videos(),
        {
            "steps": 250,
            "data.frame_budgets": (32,),
            "data.crop_fps": 2.0,
            "data.crop_frames": 64,
            "data.min_pixels": 4 * TOKEN_PIXELS,
            "data.max_pixels": 64 * TOKEN_PIXELS,
            "agent.tools": ("get_video_clip_frame",),
            "agent.dispatch": "sequential",
            "agent.evidence": "frames",
            "agent.think_prefix": "",
            "agent.max_tool_rounds": 1,
            "agent.turn_tokens": 1024,
            "agent.answer_tokens": 1024,
            "agent.response_tokens": 256,
            "agent.sampling.temperature": 1.0,
            "agent.sampling.repetition_penalty": 1.05,
            "rewards.scheme": "vital",
            "advantages.difficulty_weighted": True,
            "objective.kl_weight": 0.01,
            "optimizer.learning_rate": 1e-6,
            "optimizer.weight_decay": 0.01,
            "optimizer.decay": "cosine",
            "rl.prompts_per_step": 64,
            "rl.group_size": 8,
            "output.checkpoint_every": 50,
        },
    )


def needle_vital() -> Config:
    """VITAL on the needle world, from the committed cold start, for trying it out:
    `python train/main.py --recipe needle_vital`.

    The cold start knows another tool; the grammar lets it write calls of this one only. What the
    grammar wrote in the policy's place is not learned (`tokens/not_chosen` of `metrics.jsonl`).
    Without the repetition penalty of `vital_rl`, which would punish the short words of this world;
    `--set agent.sampling.repetition_penalty=1.05` brings it back.
    """
    return based_on(
        needle_frames(),
        {
            "agent.tools": ("get_video_clip_frame",),
            "agent.sampling.constrain": "calls",
            "rewards.scheme": "vital",
            "advantages.difficulty_weighted": True,
            "objective.kl_weight": 0.01,
        },
    )
