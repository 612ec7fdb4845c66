"""Notices that a machine is about to be taken away, taken as SIGTERM is: save, and end.

Schedulers send SIGTERM themselves. A machine of Google Cloud asks its metadata server: it says that
a spot machine is being preempted, and 60 seconds before maintenance that the machine will be
stopped; the latter only to who has asked before
(cloud.google.com/compute/docs/metadata/getting-live-migration-notice, .../instances/spot).
"""

from __future__ import annotations

import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

HOST = "GCE_METADATA_HOST"
"""Environment variable: where the metadata server is, as Google's own libraries have it."""
MACHINE = Path("/sys/class/dmi/id/product_name")
NOTICES = {
    "preempted": ("TRUE", "this machine is being preempted"),
    "maintenance-event": ("TERMINATE_ON_HOST_MAINTENANCE", "this machine will be stopped"),
}
"""Values below `instance/` that tell of an end, and what they say."""
SECONDS = 5.0
"""Between two questions."""


def watch_for_notices() -> None:
    """Ask all the time where there is somebody to ask; a notice is a SIGTERM to this process."""
    if HOST in os.environ or _is_google():
        threading.Thread(target=_watch, args=(_end,), daemon=True).start()


def _is_google() -> bool:
    try:
        return MACHINE.read_text().strip() == "Google Compute Engine"
    except OSError:
        return False


def _watch(act: Callable[[str], object]) -> None:
    while True:
        for key, (ending, words) in NOTICES.items():
            if _value(key) == ending:
                act(words)
                return
        time.sleep(SECONDS)


def _value(key: str) -> str:
    """What the metadata server says; nothing where it does not answer."""
    host = os.environ.get(HOST, "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/{key}"
    try:
        asked = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(asked, timeout=SECONDS) as answer:
            return answer.read().decode().strip()
    except (OSError, ValueError):
        return ""


def _end(words: str) -> None:
    os.write(2, f"notice: {words}\n".encode())
    os.kill(os.getpid(), signal.SIGTERM)
