"""Which head a folder has where its two `tie_word_embeddings` and its weights differ."""

import json

import pytest
from safetensors.numpy import load_file, save_file
from transformers import Qwen3VLForConditionalGeneration

from models.common.weights import load_params
from models.qwen3_vl import Qwen3VLPolicy, from_pretrained, read_config
from tests.support.qwen3_vl_torch import text_inputs, torch_logits, torch_model

pytestmark = pytest.mark.slow

HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Fields and tensors of a model whose head is not its embedding."""
    folder = tmp_path_factory.mktemp("saved")
    torch_model(
        {"num_hidden_layers": 1}, {"depth": 1, "deepstack_visual_indexes": [0]}
    ).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def write(folder, saved, top, text, head):
    raw, tensors = json.loads(json.dumps(saved[0])), dict(saved[1])
    for part, value in ((raw, top), (raw["text_config"], text)):
        part.pop("tie_word_embeddings", None)
        part.update({} if value is None else {"tie_word_embeddings": value})
    if head == "absent":
        del tensors[HEAD]
    if head == "embedding":
        tensors[HEAD] = tensors[EMBEDDING].copy()
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("head", ["absent", "embedding", "own"])
@pytest.mark.parametrize("text", [None, False, True])
@pytest.mark.parametrize("top", [None, False, True])
def test_the_head_is_that_of_transformers_or_refused(tmp_path, saved, top, text, head):
    """We refuse where transformers warns: of a missing head, which it draws at random, and of a
    tied model with a head of its own, which it does not tie."""
    write(tmp_path, saved, top, text, head)
    theirs, report = Qwen3VLForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    tied = theirs.lm_head.weight.data_ptr() == theirs.get_input_embeddings().weight.data_ptr()
    warned = report["missing_keys"] or (theirs.config.tie_word_embeddings and not tied)
    if warned:
        fault = r"missing \[lm_head.weight\]" if head == "absent" else "set it to false"
        with pytest.raises(ValueError, match=fault):
            load_params(tmp_path, Qwen3VLPolicy(read_config(tmp_path)).table)
        return
    ours = from_pretrained(tmp_path)
    assert ours.config.tie_word_embeddings == tied
    gap = abs(ours.logits(**text_inputs()) - torch_logits(theirs, text_inputs())).max()
    assert gap < 1e-5
