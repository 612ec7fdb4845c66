"""A tiny tokenizer and processor folder for the needle world.

Byte-level BPE with the word splitting and the special tokens of Qwen2's tokenizer, so that
everything downstream sees the structure it will see with Qwen3-VL. Trained at need on the
world's own texts: a small vocabulary keeps the embedding of a 1 M parameter model small.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as splits

from paravt_jax.protocol import CROP_VIDEO_TOOL
from pipelines.needle import traces
from pipelines.needle.world import COLOURS, SHAPES, Event, NeedleWorld
from pipelines.preprocess import ImageSpec
from pipelines.render import PromptTexts

VOCABULARY = 512
CONTROL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Special tokens of Qwen's tokenizer that this project uses; their ids come last."""
MARKUP = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
THOUGHT = ("<think>", "</think>")
"""Single tokens as well, but ordinary text to a decoder that skips special tokens."""

# The word splitting of Qwen2's tokenizer.json, single digits included. A part of the format.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{%- macro show(content) -%}
{%- if content is string -%}{{- content -}}
{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set system = show(messages[0].content) if messages[0].role == 'system' else '' -%}
{%- if system or tools -%}
{{- '<|im_start|>system\\n' + system -}}
{%- for tool in tools or [] -%}
{%- set it = tool.function or tool -%}
{{- 'Tool: ' + it.name + '(' + it.parameters.properties | join(', ') + ')' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages if message.role != 'system' -%}
{%- if message.role == 'tool' -%}
{%- if loop.previtem is not defined or loop.previtem.role != 'tool' -%}
{{- '<|im_start|>user' -}}
{%- endif -%}
{{- '\\n<tool_response>\\n' + show(message.content) + '\\n</tool_response>' -}}
{%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
{%- else -%}
{{- '<|im_start|>' + message.role + '\\n' + show(message.content) -}}
{%- for call in message.tool_calls or [] -%}
{%- set it = call.function or call -%}
{%- set given = it.arguments if it.arguments is string else it.arguments | tojson -%}
{{- '\\n' if not loop.first or message.content else '' -}}
{{- '<tool_call>\\n{"name": "' + it.name + '", "arguments": ' + given + '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""Qwen3-VL's message structure in few tokens: tools are listed by name and arguments only."""


def train_tokenizer(world: NeedleWorld) -> Tokenizer:
    """Train the tokenizer on the texts of the world; the same texts give the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splits.Sequence(
        [
            splits.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            splits.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(CONTROL + THOUGHT + MARKUP),
        min_frequency=1,
        initial_alphabet=sorted(splits.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(world), trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in CONTROL])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in THOUGHT + MARKUP])
    return tokenizer


def write_processor_folder(folder: str, world: NeedleWorld | None = None) -> None:
    """Write everything but the weights and config.json of a Hugging Face model folder:
    tokenizer, chat template, image, video and generation settings.

    A 32x32 frame of the needle world stays as it is and becomes one vision token.
    """
    # Imported here: it takes seconds, which an error in a setting need not wait for.
    from transformers import PreTrainedTokenizerFast

    world = world or NeedleWorld()
    os.makedirs(folder, exist_ok=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(world),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(folder)
    for name, settings in _settings(tokenizer, frame_spec(world)).items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            json.dump(settings, file, indent=2)


def frame_spec(world: NeedleWorld) -> ImageSpec:
    """How frames of the world become patches: unresized."""
    return ImageSpec(min_pixels=world.size**2, max_pixels=world.size**2)


def _settings(tokenizer: Any, spec: ImageSpec) -> dict[str, dict]:
    frames = {
        "patch_size": spec.patch_size,
        "merge_size": spec.merge_size,
        "temporal_patch_size": spec.temporal_patch_size,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }
    limits = {"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels}
    # The video processor counts the pixels of all frames together.
    all_frames = {"shortest_edge": spec.min_pixels, "longest_edge": 768 * spec.max_pixels}
    ends = [tokenizer.convert_tokens_to_ids(text) for text in ("<|im_end|>", "<|endoftext|>")]
    image = {"image_processor_type": "Qwen2VLImageProcessorFast", "size": limits, **frames}
    video = {
        "video_processor_type": "Qwen3VLVideoProcessor",
        "size": all_frames,
        "cap_pixels_per_frame": False,
        **frames,
    }
    return {
        "preprocessor_config.json": {**image, "processor_class": "Qwen3VLProcessor"},
        "video_preprocessor_config.json": {**video, "processor_class": "Qwen3VLProcessor"},
        "generation_config.json": {"eos_token_id": ends, "pad_token_id": ends[1]},
    }


def _texts(world: NeedleWorld) -> Iterator[str]:
    """Every phrase of the world, cut at control tokens, which are no subject of the training.

    What is frequent in episodes is frequent here. The default prompt texts come last, once, and
    fill up the vocabulary with common English.
    """
    cut = re.compile("|".join(map(re.escape, CONTROL + THOUGHT + MARKUP)))
    things = [Event(c, s, 4, 9, 0, 0, 0) for c, s in itertools.product(COLOURS, SHAPES)]
    phrases = [phrase for thing in things for phrase in _phrases(thing)]
    for text in [*len(things) * _fixed_phrases(world), *phrases, *_english()]:
        yield from filter(None, cut.split(text))


def _fixed_phrases(world: NeedleWorld) -> list[str]:
    """What is said in most episodes, whatever they are about."""
    times = range(0, world.duration, world.window)
    return [
        traces.call_turn(world.windows),
        traces.call_turn(world.windows[:1]),
        *(f"<{time}.0 seconds>" for time in times),
        *(traces.NEEDLE_TEXTS.subagent.format(start=t, end=t + world.window) for t in times),
        traces.FRAME_REQUEST,
        traces.report([], 0, 1),
        "system\nTool: crop_video(start_time, end_time)",
        "user\n",
        "assistant\n",
    ]


def _phrases(thing: Event) -> list[str]:
    """What is said and asked about one thing."""
    answers = [
        traces.AnswerTurn(" ".join(traces.statement("colour", thing, (4, 9))), thing.colour),
        traces.AnswerTurn(" ".join(traces.statement("shape", thing, (4, 9))), thing.shape),
        traces.AnswerTurn(" ".join(traces.statement("time", thing, (4, 9))), "4 to 9 seconds"),
        traces.AnswerTurn(" ".join(traces.statement("colour", thing, None)), thing.shape),
        traces.AnswerTurn("I can see it.", thing.colour),
        traces.AnswerTurn("I guess.", "4 to 9 seconds"),
    ]
    return [
        traces.caption(thing),
        traces.report([thing], 0, 16),
        *(traces.answer_turn(answer) for answer in answers),
        f"What colour is the {thing.shape}?\nA. {thing.colour}\nB. {thing.colour}\nC. D. ",
        f"What shape is the {thing.colour} thing?",
        f"When is the {thing.name} visible?",
    ]


def _english() -> list[str]:
    texts = PromptTexts()
    return [texts.system, texts.tools, texts.subagent, json.dumps(CROP_VIDEO_TOOL)]
