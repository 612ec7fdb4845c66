"""Evaluations against one question at a time, and against `transformers` in a loop.

    python benchmarks/evaluation.py [--model runs/demo] [--mode direct] [--questions 64]
    python benchmarks/evaluation.py --size 40M

The same questions of the needle world, prompts made and videos decoded in each run, all in one
process in turns; ratios are those of neighbouring runs, with their spread. `transformers` answers
in the mode direct alone: nobody replies to calls there. Its answers must be ours, word for word.
`--size` takes random weights, larger than the demo's: each of their answers has 32 tokens.
"""

import os.path
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.rollout import compare, ratio
from evaluate.benchmarks.protocol import load
from evaluate.benchmarks.sample import OK, SampleResult
from evaluate.evaluation import open_asked
from evaluate.model import Opened, open_model
from evaluate.runner import Questions, SampleRunner
from paravt_jax.mesh import make_mesh, parse_mesh
from paravt_jax.patches import normalised
from paravt_jax.protocol import TURN_END
from paravt_jax.records import Prompt
from pipelines.video import VideoReader
from rollout.limits import turn_head
from train.compile.cache import keep_compiled
from train.recipes.needle import COLD_START

NEW = 32
"""Tokens of an answer of random weights, which know no end."""
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8}
SIZES = {
    "1M": {},
    "40M": HEADS | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10},
}
"""What differs from the cold start's `text_config`."""


def random_folder(size: str, folder: Path) -> str:
    """A model folder like the cold start's with random weights of this size."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    shutil.copytree(COLD_START, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["text_config"] |= SIZES[size]
    config["vision_config"]["out_hidden_size"] = config["text_config"]["hidden_size"]
    Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config)).save_pretrained(folder)
    return str(folder)


def questions_of(model: Opened, a: argparse.Namespace) -> Questions:
    """The first open questions about the test videos of the needle world."""
    world = dataclasses.replace(model.config.data, cache_dir=a.data)
    asked = open_asked(load("needle"), ["needle_test"], a.mode, "", None, world)
    (task,) = asked.tasks
    kind = next(iter(task.rules))
    samples = [sample for sample in task.loaded.samples if sample.kind == kind]
    rules = task.rules[kind]
    if a.size:
        decoding = dataclasses.replace(rules.decoding, max_new_tokens=NEW)
        rules = dataclasses.replace(rules, decoding=decoding)
    return Questions(rules, tuple(samples[: a.questions]))


def runner_of(model: Opened, questions: Questions, batch: int) -> SampleRunner:
    """Decodes every video in each run anew."""
    runner = SampleRunner(model, questions, batch)
    reader = VideoReader(cache_bytes=0, spec=runner.prompts.renderer.spec)
    runner.prompts = dataclasses.replace(runner.prompts, reader=reader)
    return runner


def answers_of(runner: SampleRunner, questions: Questions) -> Callable[[], dict[str, SampleResult]]:
    """A run of all questions; gives their results."""

    def run() -> dict[str, SampleResult]:
        found = {result.sample_id: result for result in runner(questions.samples)}
        assert all(result.status == OK for result in found.values())
        return found

    return run


class Torch:
    """`transformers` on the same weights and prompts, one question after the other."""

    def __init__(self, model: Opened, runner: SampleRunner, questions: Questions):
        import torch
        from transformers import Qwen3VLForConditionalGeneration

        self._torch, folder = torch, model.config.model.folder
        loaded: Any = Qwen3VLForConditionalGeneration.from_pretrained(folder)
        self._model = loaded.eval()
        self._make, self._rules = runner.prompts, runner.agent_rules
        self._questions, self._renderer = questions, model.agents.renderer

    def __call__(self) -> dict[str, str]:
        """What it answers, by sample."""
        return {sample.sample_id: self._answer(sample) for sample in self._questions.samples}

    def _answer(self, sample) -> str:
        prompt = self._make(sample).item[2]
        head = turn_head(self._rules, self._renderer)
        tokens = np.concatenate([prompt.tokens, np.array(head, prompt.tokens.dtype)])
        with self._torch.no_grad():
            said = self._model.generate(
                **self._inputs(tokens, prompt),
                do_sample=False,
                max_new_tokens=self._rules.answer_tokens,
                eos_token_id=list(self._renderer.eos_ids),
                pad_token_id=self._renderer.pad_id,
            )
        own = said[0, len(prompt.tokens) :].tolist()
        return self._renderer.decode(own).partition(TURN_END)[0]

    def _inputs(self, tokens: np.ndarray, prompt: Prompt) -> dict:
        torch, patches = self._torch, prompt.patches
        assert patches is not None, "a prompt of this benchmark shows frames"
        ids = torch.tensor(tokens[None].astype(np.int64))
        grids = np.concatenate([np.ones((len(patches.grids), 1), np.int64), patches.grids], axis=1)
        return {
            "input_ids": ids,
            "mm_token_type_ids": (ids == self._model.config.image_token_id).long(),
            "pixel_values": torch.tensor(normalised(patches).reshape(-1, patches.values.shape[-1])),
            "image_grid_thw": torch.tensor(grids),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluations against their alternatives.")
    parser.add_argument("--model", help="as of evaluate/main.py")
    parser.add_argument("--size", choices=SIZES, help="random weights in place of --model")
    parser.add_argument("--data", default="data", help="where the world's videos are kept")
    parser.add_argument("--mode", choices=("direct", "agentic", "sequential"), default="direct")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    a = parser.parse_args()
    keep_compiled("~/.cache/paravt_jax/compiled", 4.0)
    mesh = make_mesh(parse_mesh(None, 1), jax.devices()[:1])
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as below:
        folder = random_folder(a.size, Path(below) / "model") if a.size else a.model
        recipe = "needle_rl" if a.size else None
        measure(open_model(folder, recipe, lambda rules: rules, mesh), a)


def measure(model: Opened, a: argparse.Namespace) -> None:
    """Print seconds and ratios."""
    questions = questions_of(model, a)
    many, one = (runner_of(model, questions, batch) for batch in (a.batch, 1))
    runs: dict[str, Callable[[], object]] = {
        "side by side": answers_of(many, questions),
        "one at a time": answers_of(one, questions),
    }
    if a.mode == "direct":
        theirs = Torch(model, many, questions)
        runs["transformers"] = theirs
        ours = {name: result.response for name, result in answers_of(many, questions)().items()}
        same = np.mean([ours[name] == text for name, text in theirs().items()])
        print(f"{same:.1%} of {len(ours)} answers are the same text")
    many.waits.total = many.waits.idle = 0.0
    seconds = compare(runs, a.repeats)
    for slow in list(runs)[1:]:
        ratio(seconds, slow, "side by side")
    rate = a.questions / np.median(seconds["side by side"])
    print(
        f"{rate:.1f} questions a second, the device waits {many.waits.idle / many.waits.total:.1%}"
    )


if __name__ == "__main__":
    main()
