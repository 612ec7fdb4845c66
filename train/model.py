"""The model of a run: which weights, in which precision."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from models.common.kernels import Kernels
from paravt_jax.lora import NO_LORA, LoraConfig
from paravt_jax.marks import Mark
from paravt_jax.parts import Part
from paravt_jax.ranges import at_least
from paravt_jax.settings import Settings


@dataclasses.dataclass(frozen=True)
class ModelSettings(Settings):
    """Which weights, in which precision."""

    folder: Annotated[str | None, Mark.PATH] = None
    """Hugging Face folder to start from; None starts the needle model from random weights."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of matrix products. `models/qwen3_vl/README.md` lists what stays float32."""
    cache_dtype: Literal["compute", "int8"] = "compute"
    """What rollouts keep keys and values in: `compute` (the type above) or `int8`, which takes some
    28 % of float32 and moves the needle model's log-probs by 2e-4 on average and 0.15 at most
    (`docs/log.md`)."""
    gradient_dtype: Literal["compute", "float32"] = "compute"
    """What gradients of weights are computed in and added up over devices: `compute` (the type of
    products) or `float32`. The optimiser gets float32 either way."""
    attention: Annotated[Kernels, Mark.SAME_RESULTS] = "auto"
    """What computes attention of whole rows in bfloat16: `splash`, a kernel for TPUs; `cudnn`, one
    for GPUs, which nobody has run on a card yet; `reference`, products that XLA compiles, which
    also take what the kernels do not. `auto`: splash on TPUs, elsewhere the reference."""
    train_vision: bool = False
    """Whether the vision tower trains. In RL it does not: its features are computed once."""
    frozen: tuple[Part, ...] = ()
    """Parts that do not train, and have neither gradients nor moments (`paravt_jax.parts`)."""
    remat: Annotated[bool, Mark.SAME_RESULTS] = False
    """Recompute each layer in the backward pass to save memory. A CPU recomputes what stands
    between `projections` anyway, as it is faster there."""
    remat_keeps: Annotated[Literal["nothing", "projections", "products"], Mark.SAME_RESULTS] = (
        "nothing"
    )
    """What a recomputed layer keeps besides its input: `nothing`; the results of `projections`,
    products with weights, and what plain attention mixed; or of all `products`, attention scores
    too."""
    remat_block: Annotated[int, at_least(1), Mark.SAME_RESULTS] = 1
    """Layers of which the input of the first alone waits for the backward pass, which computes the
    others a second time more: a forward pass for most of that memory."""
    router_balance: Annotated[float, at_least(0)] = 0.0
    """Weight of the loss that keeps the experts of a mixture evenly used (`load_balance`)."""
    lora: LoraConfig = NO_LORA
    """With a rank above 0, only adapters beside the language model's matrices train."""
    adapter: Annotated[str | None, Mark.PATH] = None
    """Folder of peft with the adapter to start from; None starts from a fresh one."""
