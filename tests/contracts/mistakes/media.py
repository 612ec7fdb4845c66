"""Videos, images and subtitles that are there and cannot be read."""

from pathlib import Path

import numpy as np

from pipelines.needle.world import write_mp4
from tests.contracts.mistakes import Mistake

HEADER = "video,question,answer,question_type\n"


def overwritten(folder: Path) -> None:
    """`v.mp4` has its length and its index, and zeros where its pictures would be; half of
    `cut.mp4` is missing."""
    noise = np.random.default_rng(0).integers(0, 256, (80, 32, 32, 3), np.uint8)
    for name in ("v.mp4", "cut.mp4"):
        write_mp4(str(folder / name), noise, 10.0)
    data = bytearray((folder / "v.mp4").read_bytes())
    begin, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    data[begin:end] = bytes(end - begin)
    (folder / "v.mp4").write_bytes(data)
    whole = (folder / "cut.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])


def linked(folder: Path) -> None:
    """Subtitles that are a link to another file of the machine."""
    overwritten(folder)
    (folder / "secret").mkdir()
    (folder / "secret" / "text").write_text("0:00:01,000 --> 0:00:02,000\nwords\n")
    (folder / "own").mkdir()
    write_mp4(str(folder / "own" / "v.mp4"), np.zeros((20, 32, 32, 3), np.uint8), 10.0)
    (folder / "own" / "v.srt").symlink_to(folder / "secret" / "text")


def shown(path: str, arguments: str, *named: str, prepare=overwritten, **more) -> Mistake:
    """One question about one file."""
    files = {"q.csv": HEADER + f"{path},What?,red,oe\n"} | more.pop("files", {})
    return Mistake(arguments, named, 1, files, prepare, **more)


PLAYLIST = "#EXTM3U\n#EXTINF:4,\n{videos}/a.mp4\n#EXT-X-ENDLIST\n"
ROWS = [
    shown("v.mp4", "{own} --data q.csv --dry-run", "v.mp4", "data.max_bad_rows"),
    shown("v.mp4", "q.csv", "can be decoded", door="pipelines/describe.py"),
    shown("cut.mp4", "{own} --data q.csv", "cut.mp4"),
    shown("cut.mp4", "{own} --data q.csv --dry-run", "cut.mp4"),
    shown("list.mp4", "{own} --data q.csv", "list.mp4", files={"list.mp4": PLAYLIST}),
    shown(
        "list.mp4", "q.csv", "list.mp4", door="pipelines/describe.py", files={"list.mp4": PLAYLIST}
    ),
    shown(
        "own/v.mp4", "{own} --data q.csv --set data.subtitles=true", "v.srt", "link", prepare=linked
    ),
    shown(
        "{videos}/a.mp4",
        "{own} --data q.csv --dry-run --set data.decode_seconds=1e-6",
        "a.mp4",
        "data.decode_seconds",
    ),
    Mistake("{small} --set data.decode_seconds=0", "data.decode_seconds"),
    Mistake("{small} --set data.decode_seconds=-1", "data.decode_seconds"),
    Mistake("{small} --set data.decode_seconds=nan", "data.decode_seconds"),
]
