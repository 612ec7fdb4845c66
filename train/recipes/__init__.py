"""Recipes: functions that return a complete configuration. Add yours to `RECIPES`."""

from collections.abc import Callable

from train.config import Config
from train.recipes import deepvideo_r1, longvt, needle, paravt, video_o3, visd, vital

RECIPES: dict[str, Callable[[], Config]] = {
    "needle_rl": needle.needle_rl,
    "needle_grpo": needle.needle_grpo,
    "needle_sft": needle.needle_sft,
    "paravt_rl": paravt.paravt_rl,
    "paravt_grpo": paravt.paravt_grpo,
    "paravt_sft": paravt.paravt_sft,
    "longvt_rl": longvt.longvt_rl,
    "needle_longvt": longvt.needle_longvt,
    "vital_rl": vital.vital_rl,
    "needle_vital": vital.needle_vital,
    "video_o3_rl": video_o3.video_o3_rl,
    "needle_video_o3": video_o3.needle_video_o3,
    "needle_video_o3_sft": video_o3.needle_video_o3_sft,
    "visd_rl": visd.visd_rl,
    "needle_visd": visd.needle_visd,
    "deepvideo_r1_rl": deepvideo_r1.deepvideo_r1_rl,
    "needle_deepvideo_r1": deepvideo_r1.needle_deepvideo_r1,
}


def get_recipe(name: str) -> Config:
    """The configuration of a recipe.

    Raises:
      ValueError: no recipe has this name.
    """
    if name not in RECIPES:
        raise ValueError(f"--recipe {name} is unknown; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]()
