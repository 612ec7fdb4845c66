"""A tool of your own: a box of one frame, enlarged from the full-resolution file.

python train/main.py --set agent.tools=crop_video,examples/zoom_image.py:zoom_image
"""

import math

import cv2

from paravt_jax.records import Frames
from rollout.tools import ToolContext, ToolError


def zoom_image(time: float, box: tuple[float, float, float, float], context: ToolContext) -> Frames:
    """Enlarge a part of the frame that the video shows at one moment.

    Args:
        time: Seconds from the start of the video.
        box: Left, top, right and bottom edge, as shares of the frame's width and height.
    """
    left, top, right, bottom = box
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ToolError(f"box {list(box)} is empty or leaves the frame; all edges lie in 0 to 1")
    frame = context.frames_at(time)
    height, width = frame.pixels.shape[1:3]
    rows = slice(int(top * height), math.ceil(bottom * height))
    columns = slice(int(left * width), math.ceil(right * width))
    scale = min(1 / (right - left), 1 / (bottom - top))
    part = frame.pixels[0, rows, columns]
    enlarged = cv2.resize(part, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    return Frames(enlarged[None], frame.times)
