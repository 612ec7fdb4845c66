"""Host-side data: videos to frames, frames and words to prompts, rows to batches. NumPy only."""

import os

# Read by OpenCV when it is imported: what is wrong with a file is told once, by our own error.
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
# A file of a data set is a video and never names other files, as playlists would.
_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,h264,hevc,mjpeg,m4v,mxf,rm,ivf"
os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", f"format_whitelist;{_FORMATS}")
# transformers says on stderr that torch is missing, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
