"""Video-o3 (arXiv 2601.23224): looks again and again, each time as closely as it wants.

The model thinks and writes `<grounding>` with a part of the video and one of three strategies; it
is shown that part in as many vision tokens as the strategy has, up to five times, and answers. The
reward of a right and well-formed rollout grows with how well its looks hit the clues
(`rewards.scheme=video_o3`), so rows need `evidence`. Before that, SFT with task-decoupled attention
masks (`paravt_jax.task_masks`): `needle_video_o3_sft`.

From the source (the scripts of its Qwen3-VL-4B at a6e0973): 8 rollouts of 32 prompts in one
optimiser step, learning rate 1e-6, no divergence, token mean, groups of equal rewards filtered out,
temperature 1, 6 turns, 32768 tokens in all; an overview of 128 frames in 6144 vision tokens, clips
of 2 frames a second in 1024, 2048 or 3072. Its clip range of 0.2 and 0.3 has no effect there, with
one step per batch, and is left out here; with `--set rl.minibatches=2 --set
objective.clip_high=0.3` it has. Left open there and chosen here: 1024 tokens a turn, 128 frames a
clip, and the number of steps.

Over-turn: there a rollout that still calls in its last turn is cut off and masked out of the
loss. Here its calls are not run either, and the turn before it told it nothing of the end, so a
rollout that does not answer on its own is over-turn in the same sense; `rl.mask_over_turn` gives it
no weight in the loss nor, as there, a say in the choice of groups. Its reward counts in its group.

Different here: at most 256 vision tokens for a pair of frames instead of 768, because every frame
of a run is padded to the largest; no least number for a clip as a whole; an unreadable call is
answered with an error and may be tried again; responses come through the chat template; the masks
also act on the token that predicts the first word of a span (the source's: `--set
sft.mask_predictor=false`).
"""

from typing import Any

from train.config import Config, Stage
from train.recipes.base import own_videos
from train.recipes.needle import needle_frames, needle_sft
from train.settings.override import based_on
from train.sft.settings import SftPhase, TaskShape

PAIR_TOKEN_PIXELS = 32 * 32
"""Pixels of one vision token of Qwen3-VL, in each of the two frames that it spans."""

_LOOKS: dict[str, Any] = {
    "agent.tools": ("grounding",),
    "agent.call_syntax": "grounding",
    "rewards.scheme": "video_o3",
}
"""How it calls, and what that earns."""

_NEEDLE_LOOKS = {**_LOOKS, "agent.clip_tokens": (4, 8, 16), "agent.turn_tokens": 96}
"""The same on the needle world, where a frame is one vision token."""


def video_o3_rl() -> Config:
    """Video-o3's RL on a Qwen3-VL folder that its SFT has taught to call.

    `python train/main.py --recipe video_o3_rl --model QWEN3_VL --data QUESTIONS.jsonl
    --mesh data:1,fsdp:-1,tensor:1`.
    """
    return based_on(
        own_videos(),
        {
            "steps": 200,
            "data.frame_budgets": (128,),
            "data.frames_as": "video",
            "data.overview_tokens": 6144,
            "data.crop_fps": 2.0,
            "data.crop_frames": 128,
            "data.min_pixels": 4 * PAIR_TOKEN_PIXELS,
            "data.max_pixels": 256 * PAIR_TOKEN_PIXELS,
            **_LOOKS,
            "agent.clip_tokens": (1024, 2048, 3072),
            "agent.dispatch": "sequential",
            "agent.evidence": "frames",
            "agent.think_prefix": "",
            "agent.max_tool_rounds": 5,
            "agent.turn_tokens": 1024,
            "agent.answer_tokens": 1024,
            "agent.response_tokens": 256,
            "agent.episode_tokens": 24576,
            "agent.sampling.temperature": 1.0,
            "optimizer.learning_rate": 1e-6,
            "rl.prompts_per_step": 32,
            "rl.group_size": 8,
            "rl.filter_groups": "total",
            "rl.mask_over_turn": True,
            "output.checkpoint_every": 10,
        },
    )


def needle_video_o3_sft() -> Config:
    """The cold start of needle_video_o3, with task-decoupled masks on a tenth of the rows:
    `python train/main.py --recipe needle_video_o3_sft --workdir runs/looks`.

    From the committed cold start, which knows the world but neither this syntax nor frames in a
    response. On two x86-64 cores beside other jobs a step takes 1.4 s, and the loss of episodes
    falls from 9.4 to 0.07 in 100 steps.
    """
    sft = needle_sft()
    return based_on(
        needle_frames(),
        {
            "stage": Stage.SFT,
            "steps": 150,
            "model.train_vision": True,
            **_NEEDLE_LOOKS,
            "optimizer": sft.optimizer,
            "optimizer.learning_rate": 1e-3,
            "optimizer.warmup_steps": 10,
            "sft.phases": (SftPhase(0, {"clip": 8, "looks": 16}),),
            "sft.tasks": {
                "clip": sft.sft.tasks["clip"],
                "looks": TaskShape(length=512, learned=192, frames=8),
            },
            "sft.task_masks": 0.1,
        },
    )


def needle_video_o3() -> Config:
    """Video-o3 on the needle world, from the weights of needle_video_o3_sft:
    `python train/main.py --recipe needle_video_o3 --model runs/looks/hf`.

    Two optimiser steps per batch, so that the source's clip range acts.
    """
    return based_on(
        needle_frames(),
        {
            "needs": ("--model",),
            "model.folder": None,
            **_NEEDLE_LOOKS,
            "objective.clip_high": 0.3,
            "rl.minibatches": 2,
            "rl.filter_groups": "total",
            "rl.mask_over_turn": True,
        },
    )
