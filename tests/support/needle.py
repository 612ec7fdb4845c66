"""A small needle world shared by the tests of `pipelines`."""

from __future__ import annotations

import copy
import functools
import tempfile

from paravt_jax.protocol import CROP_VIDEO_TOOL
from pipelines.needle.questions import NeedleQuestion, ask
from pipelines.needle.tokenizer import write_processor_folder
from pipelines.needle.traces import NEEDLE_TEXTS
from pipelines.needle.world import NeedleWorld, videos
from pipelines.render import ChatRenderer, PromptTexts

WORLD = NeedleWorld(seed=1, train_videos=6, held_out_videos=2)


@functools.cache
def data_folder() -> str:
    """A folder that lives as long as the test process."""
    return tempfile.mkdtemp(prefix="needle-test-")


@functools.cache
def processor_folder() -> str:
    """Tokenizer and processor files of the needle world."""
    folder = f"{data_folder()}/processor"
    write_processor_folder(folder, WORLD)
    return folder


@functools.cache
def renderer(mode: str = "image") -> ChatRenderer:
    """The needle world's renderer."""
    return ChatRenderer.from_folder(
        processor_folder(), mode=mode, texts=NEEDLE_TEXTS, tools=[CROP_VIDEO_TOOL]
    )


@functools.cache
def questions(*types: str) -> list[NeedleQuestion]:
    """Questions about the training videos."""
    return ask(videos(WORLD, data_folder(), "train"), types or ("oe", "tvg", "mcq"))


CHATML = """\
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content -%}
{%- if part.type == 'text' %}{{ part.text }}
{%- else %}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>{% endif -%}
{%- endfor %}{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""
"""The plainest ChatML."""


def with_template(template, mode="image"):
    """The needle tokenizer under another chat template."""
    own = ChatRenderer.from_folder(processor_folder(), mode, PromptTexts())
    own.tokenizer = copy.deepcopy(own.tokenizer)
    own.tokenizer.chat_template = template
    return own
