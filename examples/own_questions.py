"""A data set of your own: a function from its records to questions.

    python train/main.py --model QWEN3_VL_FOLDER --recipe paravt_rl --data quiz.jsonl \\
        --set data.reader=examples/own_questions.py:question

Each line of `quiz.jsonl`: {"clip": "a.mp4", "ask": "...", "choices": ["...", "..."], "correct": 1}
`python pipelines/describe.py quiz.jsonl --reader examples/own_questions.py:question` shows what
becomes of them.
"""

from paravt_jax.records import Row


def question(record, row_id, media):
    """A multiple-choice question. A record without these fields is rejected and counted."""
    options = [
        f"({letter}) {text}" for letter, text in zip("ABCDEFGH", record["choices"], strict=False)
    ]
    return Row(
        row_id=row_id,
        video=media.video(record["clip"]),
        question="\n".join([record["ask"], *options]),
        answer="ABCDEFGH"[record["correct"]],
        question_type="mcq",
    )
