"""Host-side data: videos to frames, frames and words to prompts, rows to batches. NumPy only."""

import os

# Read by OpenCV when it is imported: what is wrong with a file is told once, by our own error.
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
