"""Flags: unknown, incomplete, of the wrong kind, that do not go together."""

from tests.contracts.mistakes import Mistake

DESCRIBE, CONVERT = "pipelines/describe.py", "models/convert.py"

ROWS = [
    Mistake("--frobnicate", ("--frobnicate", "--help")),
    Mistake("train", "train"),
    Mistake("--step 3", "--step"),
    Mistake("--steps", "--steps"),
    Mistake("--steps many", ("--steps", "many")),
    Mistake("--steps 1.5", ("--steps", "1.5")),
    Mistake("--steps 0", "--steps"),
    Mistake("--steps -4", "--steps"),
    Mistake("--seed -1", "--seed"),
    Mistake("--seed one", ("--seed", "one")),
    Mistake("--resume maybe", ("--resume", "auto")),
    Mistake("--set", "--set"),
    Mistake("--recipe needel_rl", ("needel_rl", "needle_rl")),
    Mistake("--recipe ''", "--recipe"),
    Mistake("--recipe paravt_rl", "--model and --data"),
    Mistake("--recipe paravt_rl --data {questions}", "--model"),
    Mistake("--recipe paravt_sft --model {model}", "--data"),
    Mistake("--model no/such/folder", "no/such/folder"),
    Mistake("--model {questions}", "questions.csv"),
    Mistake("--data no/such/data.csv", ("--data", "no/such/data.csv")),
    Mistake("--recipe needle_sft --data {questions}", ("--data", "paravt_sft")),
    Mistake("--compile-only v9:2x2", ("--compile-only v9:2x2", "v5p:2x2x2"), code=1),
    Mistake("--programs step", ("--programs", "--compile-only")),
    Mistake("--compile-only here --programs stop", ("--programs stop", "step"), code=1),
    # The mesh.
    Mistake("--mesh pipeline:2", ("--mesh", "pipeline", "tensor")),
    Mistake("--mesh data:2 --devices 2", "--devices"),
    Mistake("--mesh ''", "--mesh"),
    Mistake("--mesh data", "--mesh data"),
    Mistake("--mesh data:two", ("--mesh", "two")),
    Mistake("--mesh data:0", ("--mesh", "positive")),
    Mistake("--mesh data:-2", ("--mesh", "-1")),
    Mistake("--mesh data:2,data:4", ("--mesh", "twice")),
    Mistake("--mesh data:-1,fsdp:-1", ("--mesh", "only one")),
    Mistake("--mesh data:3", ("--mesh", "4 devices"), devices=4),
    Mistake("--mesh data:3,fsdp:-1", ("--mesh", "4 devices"), devices=4),
    Mistake("--rollout-mesh data:3", ("--rollout-mesh data:3", "4 devices"), devices=4),
    Mistake("--rollout-mesh tensor:4", ("--rollout-mesh", "2 key heads"), devices=4),
    Mistake("--rollout-mesh rows:4", ("--rollout-mesh", "rows"), devices=4),
    Mistake(
        "--set rl.staleness=1", ("rl.staleness=1", "4 devices", "--rollout-devices"), devices=4
    ),
    Mistake("--rollout-devices 1", ("--rollout-devices 1", "rl.staleness"), devices=4),
    Mistake(
        "--rollout-devices 4 --set rl.staleness=1", ("--rollout-devices 4", "4 devices"), devices=4
    ),
    Mistake(
        "--rollout-devices 1 --set rl.staleness=1 --compile-only here",
        ("--rollout-devices 1", "--compile-only"),
        devices=4,
    ),
    Mistake("--set rollout_mesh=data:3", ("--rollout-mesh data:3", "4 devices"), devices=4),
    Mistake(
        "--mesh fsdp:-1 --set rl.micro_groups=1 --set rl.group_size=3",
        ("--mesh", "rl.group_size"),
        devices=4,
    ),
    # The other two commands.
    Mistake("--budget 4", "--budget", door=DESCRIBE),
    Mistake("no/such/folder", "no/such/folder", code=1, door=DESCRIBE),
    Mistake("{questions} --budgets 4,many", "--budgets 4,many", code=1, door=DESCRIBE),
    Mistake("{questions} --budgets 0", "--budgets 0", code=1, door=DESCRIBE),
    Mistake("{questions} --pixels 784", "--pixels 784", code=1, door=DESCRIBE),
    Mistake("{questions} --frames-as gif", ("--frames-as", "video"), door=DESCRIBE),
    Mistake("{questions} --model no/such", "no/such", code=1, door=DESCRIBE),
    Mistake("{questions} --root no/such", "no/such", code=1, door=DESCRIBE),
    Mistake("", "command", door=CONVERT),
    Mistake("to-gguf a b", "to-gguf", door=CONVERT),
    Mistake("to-hf {run}", "OUT", door=CONVERT),
    Mistake("to-hf no/run out", "no/run", code=1, door=CONVERT, prefix="models/convert.py: "),
    Mistake("from-hf no/model out", "no/model", code=1, door=CONVERT, prefix="models/convert.py: "),
    Mistake(
        "from-hf {model} taken",
        "taken",
        code=1,
        files={"taken/here.txt": "mine"},
        door=CONVERT,
        prefix="models/convert.py: ",
    ),
]
