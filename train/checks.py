"""Checks of a run before anything is allocated, and what a dry run prints."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
from etils import epath

from models import ModelPolicy
from models.common import cudnn
from models.common.adapter import check_adapter_config
from paravt_jax.interfaces import routing_of
from paravt_jax.mesh import HOST, AnyMesh, axes_text, batch_shards, make_mesh, parse_mesh
from paravt_jax.params import format_table
from paravt_jax.protocol import THINK_OPEN
from paravt_jax.records import Conversation, Row, VideoRef
from paravt_jax.remote import check_url, is_remote
from paravt_jax.settings import placed
from pipelines.datasets import Found
from pipelines.media_check import check_media
from pipelines.video import VideoReader
from train import setup
from train.compile.footprint import (
    checkpoint_bytes,
    footprint,
    format_checkpoint,
    format_footprint,
    planned_mesh,
)
from train.compile.layout import planned_rollouts, rollout_sizes
from train.compile.measure import devices_of, measure
from train.compile.program import Program
from train.compile.programs import programs_of
from train.compile.report import Report, misfit_line
from train.config import Config, Stage
from train.data.questions import read_questions, split_sets
from train.methods.hindsight import open_feedback
from train.optimizer import check_continued, make_optimizer, warm_up_note
from train.rl.batches import LENGTH_UNIT
from train.rl.scoring import Scorer
from train.rl.settings import staleness_note
from train.settings.override import to_dict
from train.state import trainable_names
from train.workdir.checkpoints import check_resume
from train.workdir.config_file import (
    changed_own_files,
    check_same_run,
    differences,
    read_settings,
    younger_settings,
)
from train.workdir.files import write_atomically

EXAMPLE = Row("example", VideoRef("", 1.0), "When is the yellow triangle visible?", "")
"""As long as the needle world's questions, which a dry run does not write."""


def check(config: Config, here: bool = True, planned: bool = False) -> None:
    """Refuse what cannot run, before anything is allocated.

    Args:
      here: the run is for the devices of this machine (not compiled ahead for others).
      planned: it is only looked at, and may be for a mesh of other devices."""
    paths = {"--model": config.model.folder, "--data": config.data.path}
    missing = [flag for flag in config.needs if paths[flag] is None]
    if missing and here:
        raise ValueError(f"--recipe {config.recipe} needs {' and '.join(missing)}")
    if is_remote(config.model.folder):
        check_url(str(config.model.folder), "--model")
    parts = setup.Parts(config)
    check_model(config, here)
    if here:
        # These refuse a judge whose key is not in the environment.
        with placed("rewards.judge."):
            Scorer(config.rewards)
        with placed("teacher.judge."):
            open_feedback(config.teacher.judge)
    mixed = [("data.mixture", path) for path in config.data.mixture]
    for name, path in [("--data", config.data.path), *mixed]:
        if is_remote(path):
            check_url(str(path), name)
        elif path is not None and not Path(path).exists():
            raise ValueError(f"{name} {path}: no such file or folder; check the path")
    if here:
        devices = config.mesh, config.rollout_devices
        mesh = planned_mesh(*devices) if planned else setup.open_mesh(config)
        check_rows_fit(config, mesh)
        check_context(config, parts.policy, mesh)
        check_rollout_mesh(config, mesh)
        check_staleness(config, mesh)
        if not planned:
            check_reference(config)
    elif config.rollout_devices:
        raise ValueError(
            f"--rollout-devices {config.rollout_devices}: --compile-only compiles for devices that "
            "all do the same; leave it out"
        )
    if not planned:
        # What is compiled ahead is for TPUs.
        check_attention(config, jax.default_backend() if here else "tpu")
    if here and config.model.folder is not None:
        parts.renderer  # noqa: B018  refuses a folder without tokenizer or processor


def check_model(config: Config, here: bool) -> None:
    """Refuse a model folder that cannot be read, and adapters that do not fit the model."""
    model = config.model
    if model.lora.rank and model.folder is None and here:
        raise ValueError(
            f"model.lora.rank={model.lora.rank} trains beside weights that stay as they are: give "
            "--model, or set it to 0 to train from random weights"
        )
    policy = setup.Parts(config).policy
    policy.table  # noqa: B018  the table refuses what the model lacks
    if model.router_balance and not policy.experts_per_token:
        raise ValueError(
            f"model.router_balance={model.router_balance} balances experts, and this model has "
            "none; set it to 0"
        )
    if config.rl.routing_replay and routing_of(policy) is None:
        raise ValueError(
            "rl.routing_replay=true replays which experts served a token, and this model has none; "
            "set it to false"
        )
    _check_parts(config, policy)
    if model.adapter is not None:
        check_adapter_config(model.adapter, model.lora, policy.table)


def _check_parts(config: Config, policy: ModelPolicy) -> None:
    """Refuse parts that the model does not have, and a run in which nothing trains."""
    frozen, there = config.model.frozen, {spec.part for spec in policy.table.values()}
    for flag, parts in (("model.frozen", frozen), ("optimizer.groups", config.optimizer.groups)):
        if absent := [part for part in parts if part not in there]:
            raise ValueError(
                f"{flag}={','.join(parts)}: this model has no {' and no '.join(absent)} of its "
                f"own; choose from {', '.join(sorted(there))}"
            )
    if not trainable_names(policy.table, config.model):
        raise ValueError(f"model.frozen={','.join(frozen)} leaves nothing to train; leave one out")


def check_rows_fit(config: Config, mesh: AnyMesh) -> None:
    """The rows of a gradient micro-batch must divide over the mesh, or devices repeat each other.

    Raises:
      ValueError: they do not.
    """
    ways = batch_shards(dict(mesh.shape))
    rl = config.rl
    rows = rl.micro_groups * rl.group_size
    settings = f"rl.micro_groups={rl.micro_groups} x rl.group_size={rl.group_size}"
    if config.packs_conversations:
        rows, settings = config.sft.micro_rows, "sft.micro_rows"
    elif config.stage is Stage.SFT:
        return  # tasks of the needle world have too few rows for many devices
    if rows % ways:
        raise ValueError(
            f"--mesh splits rows {ways} ways, but a micro-batch has {rows} ({settings}); make it a "
            "multiple"
        )


def check_context(config: Config, policy: ModelPolicy, mesh: AnyMesh) -> None:
    """Tokens of rows must divide over `context`, and heads over `tensor` and `context`, or devices
    repeat each other.

    Raises:
      ValueError: they do not.
    """
    ways, heads = mesh.shape["context"], policy.splits[0]
    together = ways * mesh.shape["tensor"]
    if ways > 1 and heads % together:
        raise ValueError(
            f"--mesh context:{ways}: attention shares the {heads} heads of this model among the "
            f"{together} devices of tensor and context; choose a divisor"
        )
    rows = {"what rows are multiples of": LENGTH_UNIT}
    if config.stage is Stage.SFT:
        rows = {f"sft.tasks, {name}": task.length for name, task in config.sft.tasks.items()}
    if config.packs_conversations:
        rows = {"sft.packing.tokens": config.sft.packing.tokens}
    for named, tokens in rows.items():
        if tokens % ways:
            raise ValueError(
                f"--mesh context:{ways} does not divide {tokens} tokens ({named}); choose a divisor"
            )


def check_rollout_mesh(config: Config, mesh: AnyMesh) -> None:
    """Refuse a mesh of rollouts that does not fit the devices or the model.

    Raises:
      ValueError: naming the flag.
    """
    if config.rollout_mesh is not None:
        devices = config.rollout_devices or mesh.size
        rollout_sizes(config.rollout_mesh, setup.Parts(config).policy, devices)


def check_attention(config: Config, platform: str) -> None:
    """Refuse a kernel that these devices, or this jax, do not have."""
    kernels = config.model.attention
    needed = {"splash": "tpu", "cudnn": "gpu"}.get(kernels, platform)
    if needed != platform:
        raise ValueError(
            f"model.attention={kernels} is computed on a {needed}, and this run's devices are of "
            f"the kind {platform}; set it to auto"
        )
    if kernels == "cudnn":
        cudnn.library()


def check_staleness(config: Config, mesh: AnyMesh) -> None:
    """Refuse rollouts beside the learner where their programs could wait for one another.

    Raises:
      ValueError: on several devices that both use.
    """
    if config.rl.staleness and mesh.size > 1 and not config.rollout_devices:
        raise ValueError(
            f"rl.staleness={config.rl.staleness} on {mesh.size} devices: programs of rollouts and "
            "learner on the same ones could wait for one another for ever; give "
            "--rollout-devices, or set it to 0"
        )


def check_reference(config: Config) -> None:
    """Refuse to keep a reference in memory that the devices of this machine do not reach."""
    device = jax.local_devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if config.rl.reference_memory == "host" and HOST not in kinds:
        raise ValueError(
            f"rl.reference_memory=host: {device.device_kind} has no memory of the kind {HOST} (but "
            f"{', '.join(kinds)}); set it to device"
        )


def tell_changes(
    config: Config,
    workdir: Path,
    resume: str,
    tell: Callable[[str], None],
    checkpoints: Path | epath.Path | None = None,
) -> None:
    """Name what differs from the run that the workdir holds. Nothing is written yet.

    Args:
      checkpoints: where they are, if not in the workdir.

    Raises:
      ValueError: the run cannot go on like that.
    """
    resumes = check_resume(checkpoints or workdir / "checkpoints", resume)
    before = read_settings(workdir, Config)
    if before is None:
        return
    if resumes:
        changes = check_same_run(before, config, workdir)
        began = before.optimizer, before.optimizer_steps
        check_continued(*began, config.optimizer, config.optimizer_steps)
        younger = younger_settings(workdir, before)
        if younger:
            tell(f"{workdir} is older than these settings, which take their defaults: {younger}")
    else:
        changes = differences(before, config)
        tell(f"{workdir} holds a run without a checkpoint: it begins anew")
    changed = changed_own_files(workdir, config)
    if changed:
        tell(f"{workdir}: changed since the run was last started: {', '.join(changed)}")
    for key, (old, new) in changes.items():
        tell(f"{workdir}: {key} was {old!r} and is {new!r} from now on")


def notes(config: Config) -> list[str]:
    """What a user should know of settings that do what they say, and perhaps not what was meant."""
    lines = (
        warm_up_note(config.optimizer, config.optimizer_steps),
        staleness_note(config.rl, config.objective),
    )
    return [note for note in lines if note]


def whole_notes(policy: ModelPolicy, mesh: AnyMesh) -> list[str]:
    """What `--mesh` splits in fewer parts than it says: `partition` leaves whole what an axis does
    not divide."""
    ways = mesh.shape["tensor"]
    cache = jax.eval_shape(lambda: policy.init_cache(1, 1, 1, 1))
    heads = cache.keys.shape[2]
    if heads % ways == 0:
        return []
    return [
        f"--mesh tensor:{ways} does not divide the {heads} heads of keys: the KV cache and "
        f"attention to it are whole on each of the {ways} devices; tensor:{math.gcd(heads, ways)} "
        "splits them"
    ]


def memory_remedies(config: Config, ways: int = 1) -> list[str]:
    """Settings with which this run would need less memory on its devices, the cheapest first;
    `ways`: what the rows of a micro-batch are split over, if that is known."""
    model, rl, sft = config.model, config.rl, config.stage is Stage.SFT
    micro = "sft.micro_rows" if sft else "rl.micro_groups"
    now, rows = (config.sft.micro_rows, 1) if sft else (rl.micro_groups, rl.group_size)
    # Fewer rows than devices are refused.
    remedies = {
        f"a smaller {micro} than {now}": any(n * rows % ways == 0 for n in range(1, now)),
        "model.remat=true": not model.remat,
        "model.remat_keeps=nothing": model.remat and model.remat_keeps != "nothing",
        "model.remat_block=6": model.remat and model.remat_block == 1,
        "model.compute_dtype=bfloat16": model.compute_dtype == "float32",
        "rl.staleness=0": not sft and config.rl.staleness > 0,
        "rl.reference_memory=host": not sft and config.rl.reference_memory == "device",
        "optimizer.moments=int8": config.optimizer.moments != "int8",
        "model.cache_dtype=int8": not sft and model.cache_dtype == "compute",
        f"a smaller agent.subagent_batch than {config.agent.subagent_batch}": not sft,
        "a larger tensor in --rollout-mesh": not sft,
        "a smaller agent.turn_tokens or agent.response_tokens": not sft,
        "fewer data.frame_budgets or a smaller data.max_pixels": True,
        "a smaller sft.packing.tokens": config.packs_conversations,
        f"a smaller rl.prompts_per_step than {rl.prompts_per_step}": not sft,
        "more devices on fsdp in --mesh, or on context, which share long rows": True,
    }
    helping = [remedy for remedy, helps in remedies.items() if helps]
    return [f"what helps: {', '.join(helping)}; --dry-run shows what each device holds"]


def describe(config: Config) -> None:
    """Print the resolved configuration, the mesh and the parameter table; allocate nothing."""
    print(json.dumps(to_dict(config), indent=2))
    mesh, apart = planned_mesh(config.mesh, config.rollout_devices), config.rollout_devices
    rollouts = f" and {apart} for rollouts" * (apart > 0)
    devices = f"{mesh.size} devices{rollouts} ({jax.device_count()} here)"
    print(f"mesh {axes_text(mesh)}: {devices}")
    parts = setup.Parts(config)
    for note in whole_notes(parts.policy, mesh):
        print(f"note: {note}")
    print(format_table(parts.policy.table, mesh))
    table = parts.policy.table
    trained = sum(math.prod(table[name].shape) for name in trainable_names(table, config.model))
    print(f"{trained:,} of the parameters train")
    rows = describe_data(parts)
    for note in thinking_note(config, parts.renderer.opening):
        print(note)
    print(format_footprint(planned_footprint(parts, mesh, rows), apart > 0))
    optimizer = make_optimizer(config.optimizer, config.optimizer_steps, parts.policy.table)
    copies = config.teacher.strength > 0, config.rl.staleness
    size = checkpoint_bytes(parts.policy, optimizer, config.model, *copies)
    print(format_checkpoint(size))


def planned_footprint(
    parts: setup.Parts, mesh: AnyMesh, rows: Sequence[Row] = ()
) -> dict[str, int]:
    """See `footprint`. Without questions, room is reckoned for one of `EXAMPLE`'s length."""
    config, policy = parts.config, parts.policy
    optimizer = make_optimizer(config.optimizer, config.optimizer_steps, policy.table)
    pools = parts.pools(rows or [EXAMPLE]) if config.stage is Stage.RL else None
    taught, meshes = config.teacher.strength > 0, (config.rollout_mesh, policy, mesh)
    rollouts = planned_rollouts(*meshes, config.rollout_devices)
    reference = config.rl.reference_memory == "device"
    copies = reference, config.rl.staleness
    return footprint(policy, optimizer, config.model, mesh, taught, pools, rollouts, *copies)


def compile_only(
    config: Config,
    topologies: str,
    target: Path,
    tell: Callable[[str], None],
    programs: str | None = None,
) -> None:
    """Compile every program of a run, or the named ones (`decode main,step`), for each of some
    topologies (`v5p:2x2x2,v5e:4x8`), tell what each will cost, and write the same as JSON.

    Raises:
      ValueError: libtpu is missing, a topology or program is unknown, the run would refuse the
        mesh, or a program does not fit the chips.
    """
    names = [name.strip() for name in programs.split(",")] if programs else []
    target.parent.mkdir(parents=True, exist_ok=True)
    done: list[Report] = []
    for topology in (part.strip() for part in topologies.split(",")):
        for report in _compile_for(config, topology, names, tell):
            reports = [one.json() for one in [*done, report]]
            write_atomically(target, json.dumps(reports, indent=2) + "\n")
        tell(report.text())
        done.append(report)
    tell(f"the figures are in {target}")
    misfits = [misfit_line(one, report.topology) for report in done for one in report.misfits]
    if misfits:
        ways = min(batch_shards(dict(report.mesh.shape)) for report in done if report.misfits)
        raise ValueError("; ".join([*misfits, *memory_remedies(config, ways)]))


def _compile_for(
    config: Config, topology: str, names: Sequence[str], tell: Callable[[str], None]
) -> Iterator[Report]:
    """A report that grows by a program each time: some take long to compile."""
    devices = devices_of(topology)
    mesh = make_mesh(parse_mesh(config.mesh, len(devices)), devices)
    check_rows_fit(config, mesh)
    check_context(config, setup.Parts(config).policy, mesh)
    with jax.set_mesh(mesh):
        programs = programs_of(config, mesh, [EXAMPLE])
    rl, rollouts, generated = config.rl, 0, 0
    if config.stage is Stage.RL:
        rollouts, generated = rl.prompts_per_step * rl.group_size, config.agent.generated_tokens
    for note in whole_notes(setup.Parts(config).policy, mesh):
        tell(f"{topology}, note: {note}")
    calls = {program.name: program.calls for program in programs}
    rollout_mesh = next((program.mesh for program in programs if program.of_engine), None)
    report = Report(topology, mesh, (), rollouts, generated, calls, rollout_mesh)
    for program in _named(programs, names):
        figures = measure(program, lambda line: tell(f"{topology} {line}"))
        report = dataclasses.replace(report, measured=(*report.measured, figures))
        yield report


def _named(programs: list[Program], names: Sequence[str]) -> list[Program]:
    """Those of these names, in their order; all without any."""
    existing = [program.name for program in programs]
    unknown = [name for name in names if name not in existing]
    if unknown:
        raise ValueError(
            f"--programs {', '.join(unknown)}: this run has none of that name; choose from "
            f"{', '.join(existing)}"
        )
    return [programs[existing.index(name)] for name in names] or programs


def thinking_note(config: Config, opening: str) -> list[str]:
    """What follows from a chat template that opens turns with a thought (Thinking models)."""
    if not opening:
        return []
    note = f"the chat template opens {THINK_OPEN} by itself: every turn begins with {opening!r}"
    if config.stage is Stage.SFT:
        return [f"{note}, which is not learned"]
    agent = config.agent
    return [
        f"{note}, whatever agent.think_prefix={agent.think_prefix!r} says. Sub-agents think, "
        f"within agent.subagent_thought_tokens={agent.subagent_thought_tokens}, and report what "
        "follows"
    ]


def describe_data(parts: setup.Parts) -> list[Row]:
    """Print what `--data` and what is mixed with it hold; returns the questions."""
    config = parts.config
    if config.packs_conversations:
        data = parts.conversations()
        notes = setup.system_notes(config, data.rows)
        print(describe_conversations(data), *notes, sep="\n")
        try_media(config, data, "data.max_rejected")
        return []
    return describe_questions(parts) if config.data.path or config.data.mixture else []


def describe_questions(parts: setup.Parts) -> list[Row]:
    """Print how many questions there are, which cannot be used, and how they are split; returns
    those that can be used."""
    config, data, evaluation = parts.config, parts.config.data, parts.config.evaluation
    sets = read_questions(data, evaluation, parts.check)
    for part in sets:
        paths = {video.path for row in part.rows for video in row.videos}
        print(f"{len(part.rows)} questions about {len(paths)} videos", *part.report(), sep="\n")
        try_media(config, part, "data.max_bad_rows")
    if data.path:
        print(split_sets(data, evaluation, sets).report())
    return [row for part in sets for row in part.rows]


def try_media(config: Config, data: Found, setting: str) -> None:
    """Decode frames of the files of a data set and print which cannot be.

    Raises:
      ValueError: they are more than the setting allows.
    """
    reader = VideoReader(cache_bytes=0, decode_seconds=config.data.decode_seconds)
    media = check_media(data.rows, reader)
    print(*media.report(), sep="\n")
    media.check(setting, getattr(config.data, setting.removeprefix("data.")))


def describe_conversations(data: Found[Conversation]) -> str:
    """How many conversations there are, and which cannot be used."""
    videos = {video.path for row in data.rows for video in row.videos}
    first = f"{len(data.rows)} conversations, {len(videos)} videos"
    return "\n".join([first, *data.report()])
