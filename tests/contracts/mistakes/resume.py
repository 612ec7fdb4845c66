"""Workdirs that hold another run, none, or something else."""

from tests.contracts.mistakes import Mistake

ROWS = [
    Mistake("--resume must --workdir empty", ("--workdir", "--resume must"), code=1),
    Mistake("{small} --steps 2 --resume never --workdir {run}", "--resume never", code=1),
    Mistake("{small} --steps 2 --seed 7 --workdir {run}", ("seed", "--workdir"), code=1),
    Mistake(
        "{small} --steps 2 --set optimizer.b2=0.5 --workdir {run}",
        "optimizer.b2",
        code=1,
    ),
    Mistake("{small} --steps 2 --recipe needle_grpo --workdir {run}", "recipe", code=1),
    Mistake("{small} --steps 2 --set rl.group_size=4 --workdir {run}", "rl.group_size", code=1),
    Mistake("{small} --steps 2 --workdir file", "file", 1, {"file": "no folder"}),
    Mistake("--workdir old", "old/config.json", files={"old/config.json": "{"}),
    Mistake("--workdir old", "old/config.json", files={"old/config.json": '{"steps": 2}'}),
    Mistake(
        "--workdir old", ("old/config.json", "gravity"), files={"old/config.json": '{"gravity": 2}'}
    ),
    Mistake("--set output.keep_checkpoints=0", "output.keep_checkpoints"),
    Mistake("--set output.checkpoint_minutes=-1", "output.checkpoint_minutes"),
    Mistake("--set output.checkpoint_every=-1", "output.checkpoint_every"),
]
