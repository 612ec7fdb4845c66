"""LongVT (arXiv 2511.20785): one crop at a time, whose frames the agent sees itself.

The model thinks, crops, is shown the frames of the crop, thinks again, and answers. Its reward
joins answer, format and the overlap of the last crop with the evidence (`rewards.scheme=longvt`),
so rows need `evidence`. GRPO with a small divergence in the loss.

From the source (its launch script and tool server at 08d755b): 16 rollouts of 16 prompts, two
optimiser steps per batch, learning rate 1e-6, 0.001 of k3 in the loss, no entropy term, at most 5
turns of the assistant in 16384 tokens, crops of 1 frame a second, 1 to 128 frames of at most 224 x
224 pixels. Left open there and chosen here: temperature 1 and clip 0.2, which its trainer has by
default; 512 frames of overview, as in its SFT; 2048 tokens for a turn; one epoch of its 1,667
questions.

Different here: Qwen3-VL instead of Qwen2.5-VL; without a judge open answers are scored by F1 (for
the source's judge: `--set rewards.mode=llm` with `rewards.judge`); a crop that leaves the video is
clamped to it and not refused; responses come through the chat template; and when turns or tokens
run out, the last turn must answer instead of being cut off.
"""

from train.config import Config
from train.recipes.base import own_videos
from train.recipes.needle import needle_frames
from train.settings.override import based_on


def longvt_rl() -> Config:
    """LongVT's RL on a Qwen3-VL folder, best after its SFT.

    `python train/main.py --recipe longvt_rl --model QWEN3_VL --data QUESTIONS.jsonl
    --mesh data:1,fsdp:-1,tensor:1`.
    """
    return based_on(
        own_videos(),
        {
            "steps": 104,
            "data.frame_budgets": (512,),
            "data.crop_fps": 1.0,
            "data.crop_frames": 128,
            "data.max_pixels": 224 * 224,
            "agent.dispatch": "sequential",
            "agent.evidence": "frames",
            "agent.think_prefix": "",
            "agent.max_tool_rounds": 4,
            "agent.turn_tokens": 2048,
            "agent.answer_tokens": 2048,
            "agent.response_tokens": 256,
            "agent.episode_tokens": 16384,
            "agent.sampling.temperature": 1.0,
            "rewards.scheme": "longvt",
            "objective.kl_weight": 0.001,
            "optimizer.learning_rate": 1e-6,
            "rl.prompts_per_step": 16,
            "rl.group_size": 16,
            "rl.minibatches": 2,
            "output.checkpoint_every": 10,
        },
    )


def needle_longvt() -> Config:
    """LongVT on the needle world, from the committed cold start, for trying it out:
    `python train/main.py --recipe needle_longvt`.

    The cold start calls several crops in a turn and was never shown frames in a response.
    """
    return based_on(
        needle_frames(),
        {
            "rewards.scheme": "longvt",
            "objective.kl_weight": 0.001,
            "rl.minibatches": 2,
        },
    )
