"""The tokenizer of a model folder, and how its turns begin and end."""

from __future__ import annotations

import json
import os
from typing import Any

from paravt_jax.protocol import THINK_OPEN


def open_tokenizer(folder: str) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ValueError: its files are missing, damaged, or without a chat template.
    """
    # Imported here: it takes seconds, which an error in a setting need not wait for.
    from transformers import AutoTokenizer

    files = ("tokenizer.json", "vocab.json", "tokenizer.model")
    remedy = "fetch tokenizer.json, tokenizer_config.json and chat_template.json again"
    if not any(os.path.isfile(os.path.join(folder, name)) for name in files):
        raise ValueError(f"{folder} holds no tokenizer ({', '.join(files)}): {remedy}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises whatever damaged files bring about
        raise ValueError(f"{folder}: no tokenizer to load ({error!r}); {remedy}") from error
    if not tokenizer.chat_template:
        raise ValueError(f"{folder}: the tokenizer has no chat template; {remedy}")
    return tokenizer


def template_opening(tokenizer: Any) -> str:
    """What a chat template puts at the head of the assistant's turn when it asks for one: from
    `<think>` on where it writes that (Thinking models), else nothing.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    asked, said = (
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "?"}], add_generation_prompt=ask, tokenize=False
        )
        for ask in (True, False)
    )
    _, opened, rest = asked.removeprefix(said).partition(THINK_OPEN)
    return opened + rest


def end_tokens(folder: str) -> tuple[int, ...]:
    """`eos_token_id` of the folder's generation_config.json; empty if there is none."""
    path = os.path.join(folder, "generation_config.json")
    if not os.path.isfile(path):
        return ()
    with open(path, encoding="utf-8") as file:
        ids = json.load(file).get("eos_token_id", ())
    return (ids,) if isinstance(ids, int) else tuple(ids)
