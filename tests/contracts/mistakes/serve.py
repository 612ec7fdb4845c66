"""Servers that cannot be: flags that do not fit, no model, an address that is taken."""

from __future__ import annotations

from tests.contracts.mistakes import Mistake

DOOR = "evaluate/serve.py"


def serve(arguments: str, *named: str, code: int = 1, **more) -> Mistake:
    """One server, at a free port."""
    return Mistake(f"--port 0 {arguments}", named, code, door=DOOR, **more)


ROWS = [
    serve("--model nowhere", "nowhere", "does not exist"),
    serve("--model {videos}", "config.json", "Hugging Face"),
    serve("--recipe needle", "--recipe needle", "needle_rl"),
    serve("--max-prompt-tokens 5000", "--max-prompt-tokens 5000", "max_position_embeddings=4096"),
    serve("--host 203.0.113.7", "--host 203.0.113.7", "--port 0"),
    serve("--rows 0", "--rows 0", code=2),
    serve("--queue -1", "--queue -1", code=2),
    serve("--timeout nan", "--timeout nan", code=2),
    serve("--drain inf", "--drain inf", code=2),
    serve("--port 70000", "--port 70000", code=2),
    serve("--media-root nowhere", "--media-root nowhere", "no such folder", code=2),
    serve("--model ''", "--model", "empty", code=2),
]
