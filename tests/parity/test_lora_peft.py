"""Our adapters are peft's: same names, same logits beside the base and merged into it."""

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from models.common.adapter import load_adapter, read_adapter_config, save_adapter  # noqa: E402
from models.qwen3_vl import Pretrained, Qwen3VLPolicy, from_pretrained, read_config  # noqa: E402
from paravt_jax.lora import LoraConfig, adapter_table  # noqa: E402
from paravt_jax.params import initialise  # noqa: E402
from tests.support.qwen3_vl_torch import mixed_inputs, torch_logits, torch_model  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    # Of transformers, in peft's calls.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

SOME = LoraConfig(rank=3, alpha=7, targets=("q_proj", "down_proj"))
ALL = LoraConfig(rank=4, alpha=8)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a random torch model."""
    folder = tmp_path_factory.mktemp("base")
    torch_model().save_pretrained(folder)
    return folder


def adapted(base, lora):
    """Our model with adapters that are far from zero."""
    policy = Qwen3VLPolicy(read_config(base), lora=lora)
    adapters = initialise(adapter_table(policy.table), jax.random.key(1))
    shifted = {
        name: value + 0.1 * jax.random.normal(jax.random.key(number), value.shape)
        for number, (name, value) in enumerate(adapters.items())
    }
    params = from_pretrained(base).params | shifted
    return Pretrained(params, policy.config, policy)


def assert_close(got, want):
    real = mixed_inputs()["attention_mask"].astype(bool)
    got, want = got[real], want[real]
    gap = np.abs(got - want).max() / np.abs(want).max()
    print(f"logits differ by {gap:.1e} of the largest")
    assert gap <= 1e-5


def peft_logits(base, adapter):
    """Logits of peft's model with the adapter; every tensor of it must have found its module."""
    model = peft.PeftModel.from_pretrained(torch_model(), adapter).eval()
    report = model.load_adapter(adapter, adapter_name="again")
    assert not report.unexpected_keys and not [k for k in report.missing_keys if "lora" in k]
    model.set_adapter("default")
    modules = {name for name, _ in model.named_modules() if name.endswith("lora_A.default")}
    logits = torch_logits(model, mixed_inputs())
    return logits, modules


@pytest.mark.parametrize("lora", [SOME, ALL], ids=["some", "all"])
def test_peft_computes_what_we_compute(base, tmp_path, lora):
    ours = adapted(base, lora)
    save_adapter(ours.params, ours.policy.table, lora, tmp_path, base)
    want, modules = peft_logits(base, tmp_path)
    assert len(modules) == len(lora.targets) * ours.config.text.num_hidden_layers
    assert all("language_model" in name for name in modules)
    got = ours.logits(**mixed_inputs())
    assert_close(got, want)
    plain = from_pretrained(base).logits(**mixed_inputs())
    assert np.abs(got - plain).max() > 0.05 * np.abs(plain).max(), "the adapters must matter"


def test_merged_weights_compute_the_same(base):
    ours = adapted(base, ALL)
    merged = dict(ours.policy.merge(ours.params))
    assert merged.keys() == ours.policy.without_lora.table.keys()
    plain = Pretrained(merged, ours.config, ours.policy.without_lora)
    assert_close(plain.logits(**mixed_inputs()), ours.logits(**mixed_inputs()))


def test_an_adapter_of_peft_is_read(base, tmp_path):
    """Targets as a list of names, as people write them; weights as peft saves them."""
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(torch_model(), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    ours = adapted(base, SOME)
    assert read_adapter_config(tmp_path, ours.policy.table) == SOME
    ours.params |= load_adapter(tmp_path, ours.policy.table, SOME)
    assert_close(ours.logits(**mixed_inputs()), torch_logits(model, mixed_inputs()))


def test_fresh_adapters_are_distributed_as_in_peft(base):
    """A uniform within 1 / sqrt(inputs), B zero."""
    policy = Qwen3VLPolicy(read_config(base), lora=LoraConfig(rank=16))
    ours = initialise(adapter_table(policy.table), jax.random.key(0))
    config = peft.LoraConfig(r=16, target_modules=["o_proj"])
    theirs = dict(peft.get_peft_model(torch_model(), config).named_parameters())
    a = [p.detach().numpy() for name, p in theirs.items() if "o_proj.lora_A" in name]
    mine = np.asarray(ours["text.layers.attention.out.lora.a"])
    assert np.abs(mine).max() == pytest.approx(np.abs(a).max(), rel=0.02)
    assert mine.std() == pytest.approx(np.std(a), rel=0.05)
    for name, value in ours.items():
        assert bool(np.any(value)) == name.endswith(".a")


def test_written_settings_are_those_that_peft_reads(base, tmp_path):
    ours = adapted(base, SOME)
    save_adapter(ours.params, ours.policy.table, SOME, tmp_path, "some/base")
    read = peft.PeftConfig.from_pretrained(tmp_path)
    assert (read.r, read.lora_alpha, read.peft_type) == (3, 7, "LORA")
    assert read.base_model_name_or_path == "some/base" and read.task_type == "CAUSAL_LM"
    assert read_adapter_config(tmp_path, ours.policy.table) == SOME
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**raw, "use_rslora": True}))
    with pytest.raises(ValueError, match="use_rslora=True"):
        read_adapter_config(tmp_path, ours.policy.table)
