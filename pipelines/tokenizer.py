"""The tokenizer of a model folder, and how its turns begin and end."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from paravt_jax.protocol import THINK_OPEN

REMEDY = "fetch tokenizer.json, tokenizer_config.json and chat_template.json again"
QUESTION = "What is it?"
"""Something to say, to see what a chat template makes of it."""


def open_tokenizer(folder: str) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ValueError: its files are missing, damaged, or without a chat template.
    """
    # Imported here: it takes seconds, which an error in a setting need not wait for.
    from transformers import AutoTokenizer

    files = ("tokenizer.json", "vocab.json", "tokenizer.model")
    if not any(os.path.isfile(os.path.join(folder, name)) for name in files):
        raise ValueError(f"{folder} holds no tokenizer ({', '.join(files)}): {REMEDY}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises whatever damaged files bring about
        raise ValueError(f"{folder}: no tokenizer to load ({error!r}); {REMEDY}") from error
    if not tokenizer.chat_template:
        raise ValueError(f"{folder}: the tokenizer has no chat template; {REMEDY}")
    return tokenizer


def written(tokenizer: Any, messages: Sequence[Any], **settings: Any) -> str:
    """The text of a conversation by a tokenizer's chat template.

    Raises:
        ValueError: it has none, or one that fails.
    """
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **settings)
    except Exception as error:  # a template is a program of somebody else's
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"{_named(tokenizer)} cannot be used ({why}): {REMEDY}") from error


def _named(tokenizer: Any) -> str:
    return f"the chat template of {tokenizer.name_or_path or 'this tokenizer'}"


def template_opening(tokenizer: Any) -> str:
    """What a chat template puts at the head of the assistant's turn when it asks for one: from
    `<think>` on where it writes that (Thinking models), else nothing.

    Raises:
        ValueError: the tokenizer has no chat template, or one that writes no conversation.
    """
    with_prompt, without_prompt = (
        written(tokenizer, [{"role": "user", "content": QUESTION}], add_generation_prompt=ask)
        for ask in (True, False)
    )
    if QUESTION not in without_prompt:
        raise ValueError(f"{_named(tokenizer)} leaves out what users say: {REMEDY}")
    _, opened, rest = with_prompt.removeprefix(without_prompt).partition(THINK_OPEN)
    return opened + rest


def end_tokens(folder: str) -> tuple[int, ...]:
    """`eos_token_id` of the folder's generation_config.json; empty if there is none.

    Raises:
        ValueError: the file is damaged.
    """
    path = os.path.join(folder, "generation_config.json")
    if not os.path.isfile(path):
        return ()
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no JSON object ({error}): fetch it again") from error
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(index) is not int or index < 0 for index in ids):
        raise ValueError(f"{path}: eos_token_id={value!r}: give a token or a list of tokens")
    return tuple(ids)
