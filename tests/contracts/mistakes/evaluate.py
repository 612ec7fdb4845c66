"""Evaluations that cannot be made: no such benchmark, protocol, mode, shard or data."""

from __future__ import annotations

from tests.contracts.mistakes import Mistake

DOOR = "evaluate/main.py"
NEEDLE = "--benchmarks needle_held_out --protocol needle"


def evaluate(arguments: str, *named: str, code: int = 1, **more) -> Mistake:
    """One evaluation."""
    return Mistake(arguments, named, code, door=DOOR, **more)


OWN = "video,question,answer\n"

ROWS = [
    evaluate("--benchmarks videomme --protocol none", "--protocol none", "lmms-eval"),
    evaluate("--benchmarks videommme", "--benchmarks videommme", "videomme"),
    evaluate("--benchmarks videomme --mode fast", "--mode fast", "agentic"),
    evaluate("--benchmarks videomme --data .", "--data", "videomme"),
    evaluate(f"{NEEDLE} --model nowhere", "nowhere", "does not exist"),
    evaluate(f"{NEEDLE} --recipe needle", "--recipe needle", "needle_rl"),
    evaluate(
        "--benchmarks q.csv --protocol needle",
        *("q.csv", "no row can be used", "answer"),
        files={"q.csv": "video,question\na.mp4,What?\n"},
    ),
    evaluate(
        "--benchmarks q.csv --protocol q.toml",
        *("q.toml", "decoding.temperature"),
        files={"q.csv": OWN, "q.toml": 'extends="needle"\n[all.decoding]\ntemperature=-1.0\n'},
    ),
    evaluate("", "--benchmarks", code=2),
    evaluate(f"{NEEDLE} --shard 5/4 --workdir w", "--shard", "5/4", code=2),
    evaluate(f"{NEEDLE} --shard 1/2", "--shard", "--workdir", code=2),
    evaluate(f"{NEEDLE} --limit 0", "--limit", code=2),
    evaluate(f"{NEEDLE} --frames many", "--frames", "many", code=2),
    evaluate(f"{NEEDLE} --judge http://here/v1", "--judge-model", code=2),
    evaluate(f"{NEEDLE} --judge-key KEY", "--judge-key", "--judge-model", code=2),
    evaluate(f"{NEEDLE} --judge here --judge-model m", "--judge", "http://"),
    evaluate(f"{NEEDLE} --sight all", "--sight", "all", code=2),
    evaluate(f"{NEEDLE} --attention flash", "--attention", "flash", "splash"),
    evaluate(f"{NEEDLE} --attention splash", "attention=splash", "float32"),
    evaluate("--benchmarks mlvu,mlvu_dev", "--benchmarks", "mlvu_dev twice", "once"),
    evaluate("--benchmarks ''", "--benchmarks", "empty", code=2),
]
