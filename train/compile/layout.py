"""Where rollouts lay out the weights: a mesh of their own over the devices of the learner's.

Learning wants weights split over all devices (`fsdp`), which gather them once for thousands of
tokens. Decoding would gather them for every token: it wants them shared by heads (`tensor`) and
experts, over as many devices as make a token fastest (one reads less then, but waits for the others
in each layer), and the remaining factor of devices to take other rows (`data`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from models import ModelPolicy
from paravt_jax.mesh import AXES, AnyMesh, parse_mesh, reshape_mesh
from rollout.engine.engine import SlotPool
from train.compile.chips import CHIPS, Chip
from train.compile.footprint import local_bytes, rollout_bytes
from train.hosts.cluster import max_over_hosts

FLAG = "--rollout-mesh"
SHARE = 0.85
"""Of a device's memory: the rest is for what programs of rollouts need besides."""
WAIT = 5e-6
"""Seconds for which a layer waits for the sum of a few rows over devices, twice in each: assumed.
At twice that, 8B takes the same meshes."""


def rollout_sizes(text: str, policy: ModelPolicy, devices: int) -> dict[str, int]:
    """The mesh that `--rollout-mesh` names.

    Raises:
      ValueError: it does not fit the devices, or does not divide heads or experts, which would
        stay whole everywhere.
    """
    sizes, flag = parse_mesh(text, devices, FLAG), f"{FLAG} {text}:"
    heads, keys, experts = policy.splits
    tensor, context, expert = sizes["tensor"], sizes["context"], sizes["expert"]
    if heads % (tensor * context) or keys % (tensor * context):
        named = f"tensor:{tensor}" + f" times context:{context}" * (context > 1)
        raise ValueError(
            f"{flag} {named} does not divide the {heads} heads and {keys} key heads of "
            f"this model; choose a divisor of {math.gcd(heads, keys)}"
        )
    if experts % expert:
        raise ValueError(
            f"{flag} expert:{expert} does not divide the {experts} experts of this model; choose "
            "a divisor"
        )
    return sizes


def planned_rollouts(
    text: str | None, policy: ModelPolicy, learner: AnyMesh, apart: int = 0
) -> AbstractMesh | None:
    """The mesh that `--rollout-mesh` names, of devices that need not be there: those of the
    learner, or `apart` others. None for the learner's."""
    if apart:
        sizes = rollout_sizes(text or f"data:{apart}", policy, apart)
        return AbstractMesh(tuple(sizes.values()), AXES)
    if text is None:
        return None
    sizes = rollout_sizes(text, policy, learner.size)
    return None if sizes == dict(learner.shape) else AbstractMesh(tuple(sizes.values()), AXES)


def open_layout(
    policy: ModelPolicy,
    learner: Mesh,
    given: str | None,
    compute_dtype: str,
    kept: Any,
    apart: Mesh | None = None,
    sets: int = 1,
) -> RolloutLayout:
    """Where engines lay out weights, so many `sets` at once: beside what a learner on its mesh
    keeps, or on devices `apart` from it."""
    resident = local_bytes(kept) if apart is None else 0
    return RolloutLayout(policy, learner, given, compute_dtype, resident, apart, sets)


@dataclasses.dataclass(frozen=True, eq=False)
class RolloutLayout:
    """The mesh of an engine."""

    policy: ModelPolicy
    learner: Mesh
    """That of `--mesh`."""
    given: str | None
    """That of `--rollout-mesh`, if it was given."""
    compute_dtype: str
    resident: int
    """Bytes that the learner keeps on each device during rollouts."""
    apart: Mesh | None = None
    """That of `--rollout-devices`, if there are any."""
    sets: int = 1
    """How many versions of the weights are there at once."""

    def __call__(self, pools: Mapping[str, SlotPool]) -> Mesh | None:
        """The mesh for an engine with these slots; None for the learner's."""
        base = self.apart or self.learner
        if self.given is not None:
            sizes = rollout_sizes(self.given, self.policy, base.size)
        else:
            sizes = self._chosen(base, pools, memory_limit(base))
        mesh = reshape_mesh(base, sizes)
        return None if mesh is self.learner else mesh

    def _chosen(
        self, base: Mesh, pools: Mapping[str, SlotPool], limit: int | None
    ) -> dict[str, int]:
        """Of the meshes over the devices of `base` that hold weights and caches together within
        the limit, the one that is soonest done with a token: the one of fewest devices where the
        chip is not known. `base` itself where the limit is unknown or none do."""
        least, chosen = math.inf, dict(base.shape)
        if limit is None:
            return chosen
        chip = CHIPS.get(base.devices.flat[0].device_kind)
        for sizes in candidates(self.policy, base.size):
            mesh = reshape_mesh(base, sizes)
            needed = rollout_bytes(self.policy, self.compute_dtype, mesh, pools, self.sets)
            seconds = token_seconds(self.policy, self.compute_dtype, mesh, chip) if chip else 0.0
            if self.resident + needed <= SHARE * limit and seconds < least:
                least, chosen = seconds, sizes
        return chosen


def token_seconds(policy: ModelPolicy, compute_dtype: str, mesh: AnyMesh, chip: Chip) -> float:
    """What a token takes on a mesh of rollouts, besides reading caches, which all meshes share
    alike: to read the weights of a device, and to wait for others."""
    weights = rollout_bytes(policy, compute_dtype, mesh, {}) / chip.bandwidth
    together = mesh.shape["tensor"] * mesh.shape["expert"] > 1
    stacked = [own.layers or () for own in policy.table.values() if own.is_stacked]
    return weights + 2 * len(set().union(*stacked)) * WAIT * together


def candidates(policy: ModelPolicy, devices: int) -> Iterator[dict[str, int]]:
    """Meshes that share the weights, fewest devices first, rather by experts than by heads."""
    heads, keys, experts = policy.splits
    ways = [ways for ways in range(1, devices + 1) if devices % ways == 0]
    tensors = [n for n in ways if heads % n == keys % n == 0]
    shared = [n for n in ways if experts % n == 0] if experts else [1]
    for tensor, expert in sorted(
        itertools.product(tensors, shared), key=lambda pair: (math.prod(pair), pair)
    ):
        if devices % (tensor * expert) == 0:
            rows = devices // (tensor * expert)
            yield dict.fromkeys(AXES, 1) | {"data": rows, "expert": expert, "tensor": tensor}


def memory_limit(mesh: Mesh) -> int | None:
    """Bytes of the smallest device of any host; None where a device does not tell, as on CPU."""
    limits = [_device_memory(device) for device in mesh.local_devices]
    # In MiB, of which hosts compare 32 bits.
    smallest = min((limit or 0) >> 20 for limit in limits)
    smallest = -max_over_hosts([-smallest])[0]
    return smallest << 20 or None


def _device_memory(device: Any) -> int | None:
    """What a device says; of one that is elsewhere what is known of its kind."""
    if device in jax.local_devices():
        return (device.memory_stats() or {}).get("bytes_limit")
    chip = CHIPS.get(device.device_kind)
    return int(chip.memory) if chip else None
