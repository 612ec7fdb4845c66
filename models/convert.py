"""Convert weights between a Hugging Face folder and an Orbax checkpoint.

    python models/convert.py to-hf CHECKPOINT OUT [--base HF_DIR]
    python models/convert.py from-hf HF_DIR OUT

`to-hf` takes a run's folder (its latest checkpoint), one checkpoint folder, or what `from-hf`
wrote. config.json, tokenizer and processor files come from `--base`, else from the `model/`
folder of the checkpoint or of its run.
"""

import os
import os.path
import sys

if __name__ == "__main__":
    # Run as a script, `sys.path[0]` is this folder, where `import models` would find
    # somebody else's. Swap it for the repository root before any other import.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    # Weights pass through the host, and accelerators are left to those who compute on them.
    os.environ["JAX_PLATFORMS"] = "cpu"

import logging
from pathlib import Path

from models import open_policy
from models.common.adapter import checkpoint_lora
from models.common.folder import copy_model_files, whole_folder
from models.common.weights import FolderWeights
from paravt_jax.array_store import boxes
from paravt_jax.checkpoint import (
    MODEL_FILES,
    create_params,
    find_model_files,
    find_step,
    open_params,
    verify_params,
)
from paravt_jax.failures import attempt
from paravt_jax.flags import Parser


def to_hf(checkpoint: str, out: str, base: str | None = None) -> None:
    """Write the weights of a checkpoint as a Hugging Face folder, in the type they are stored in,
    adapters added. They are compared with their checksums first.

    Raises:
      ValueError: no checkpoint, a damaged one, no config.json for it, weights of another model,
        or `out` exists.
      OSError: the disk is full.
    """
    step, target = find_step(checkpoint), _new_folder(out)
    source = Path(base) if base is not None else find_model_files(step)
    if source is None:
        raise ValueError(
            f"no model/config.json in {step} or its run: pass --base HF_DIR, a "
            "Hugging Face folder of the same model"
        )
    lora = checkpoint_lora(find_model_files(step), open_policy(source).table)
    policy = open_policy(source, lora=lora)
    stored = open_params(step, policy.table)
    if not verify_params(step, stored):
        print(f"note: {step} holds no checksums; its weights are taken as they are")
    policy.without_lora.save_folder(policy.merge(stored), target, base=source)


def from_hf(folder: str, out: str) -> None:
    """Write a Hugging Face folder as a checkpoint: weights in `params/`, in the type they have,
    the rest in `model/`.

    Raises:
      ValueError: no such folder, another kind of model, damaged weights, or `out` exists.
      OSError: the disk is full.
    """
    source, target = Path(folder), _new_folder(out)
    table = open_policy(source).table
    weights = FolderWeights(source, table)
    with whole_folder(target) as temporary:
        for name, stored in create_params(temporary, table, weights.dtypes).items():
            for box in boxes(stored.shape, stored.chunk):
                stored[box] = weights.read(name, box, stored.dtype)
        copy_model_files(source, temporary / MODEL_FILES)


def _new_folder(out: str) -> Path:
    target = Path(out).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"OUT {out} exists and is not empty: choose another folder")
    return target


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0, or 1 with one line on stderr; misuse exits with 2."""
    parser = Parser(prog="models/convert.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("to-hf", help="checkpoint to Hugging Face folder")
    command.add_argument("checkpoint", metavar="CHECKPOINT")
    command.add_argument("out", metavar="OUT")
    command.add_argument("--base", metavar="HF_DIR")
    command.set_defaults(run=lambda a: to_hf(a.checkpoint, a.out, a.base))
    command = commands.add_parser("from-hf", help="Hugging Face folder to checkpoint")
    command.add_argument("folder", metavar="HF_DIR")
    command.add_argument("out", metavar="OUT")
    command.set_defaults(run=lambda a: from_hf(a.folder, a.out))
    parsed = parser.parse_args(arguments)
    code = attempt(lambda: parsed.run(parsed), prefix="models/convert.py")
    if code == 0:
        print(f"wrote {parsed.out}")
    return code


if __name__ == "__main__":
    # Orbax logs what it raises, with a traceback of every thread it passes through.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    sys.exit(main())
