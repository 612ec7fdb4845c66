"""Episodes: think, call tools side by side, answer from what came back.

An agent turns prompts into rollouts over one session of the engine. Every rollout is a program
of its own (`rollout.episode`); one scheduler (`rollout.tasks`) drives all of them, so that the
crops of one are decoded and reported on while others still think.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence

from paravt_jax.interfaces import FrameReader, Params, Renderer
from paravt_jax.records import Prompt, RolloutGroup, Row, Trajectory
from rollout.episode import Episodes, Rollout
from rollout.evidence import Kit, Toolbox
from rollout.limits import MAIN, AgentConfig, token_budget
from rollout.record import derive_seed
from rollout.tasks import EngineSession, Program, Scheduler, SyncErrors
from rollout.tools import TOOLS, Tools
from rollout.workers import Workers

Item = tuple[Row, int, Prompt]
"""A question, the number of frames that its prompt shows, and the prompt."""


class Agent:
    """Runs episodes of a policy."""

    def __init__(
        self,
        open_session: Callable[[Params], EngineSession],
        renderer: Renderer,
        reader: FrameReader,
        tools: Tools = TOOLS,
        config: AgentConfig = AgentConfig(),
        crop_tokens: int | None = None,
        sync_errors: SyncErrors = list,
        before_step: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            open_session: a session under these weights, of an engine with the slot pools that
                `rollout.limits.slot_pools` computes.
            tools: what calls may name; prompts must offer their schemas.
            crop_tokens: most tokens of a crop: of a sub-agent's prompt, or of its frames in a tool
                response. A larger one is answered with an error. Needed where frames are shown.
            sync_errors: what counts as a tool's failure where several hosts run the same tools.
                What tools find must be the same on all of them anyway.
            before_step: called before each step of the engine; what it raises ends `run`.

        Raises:
            ValueError: frames are the evidence and `crop_tokens` is missing, or `episode_tokens`
                is too small.
        """
        if config.evidence == "frames" and crop_tokens is None:
            raise ValueError("evidence='frames' needs crop_tokens: the room that a crop takes")
        self._open_session = open_session
        self._sync_errors, self._before_step = sync_errors, before_step
        room = token_budget(config, renderer, crop_tokens or 0)
        self._kit = Kit(renderer, reader, tools, config, room, crop_tokens)
        self.figures: dict[str, float] = {}
        """What the last run cost on the host, for `metrics.jsonl`."""
        self.ended: Callable[[], object] = lambda: None
        """Called whenever an episode has ended: how far a run is."""

    def run(
        self,
        params: Params,
        items: Sequence[Item],
        copies: int,
        seed: int,
        policy_version: int = 0,
    ) -> list[RolloutGroup]:
        """Roll out every prompt `copies` times.

        A rollout depends on `seed`, its row id and its number, not on the rest of the batch.
        """
        session = self._open_session(params)
        scheduler = Scheduler(session, self._sync_errors, self._before_step)
        with Workers(self._kit.config.decode_threads) as workers:
            toolbox = Toolbox(self._kit, session, workers, policy_version)
            episodes = Episodes(self._kit, session, toolbox, policy_version)
            rollouts = _open_rollouts(session, items, copies, seed)
            programs = [_told(episodes.program(rollout), self.ended) for rollout in rollouts]
            done = scheduler.run(programs)
        self.figures = _figures(done, scheduler, workers)
        return [
            RolloutGroup(row, budget, tuple(done[at * copies : (at + 1) * copies]))
            for at, (row, budget, _) in enumerate(items)
        ]


def _told(program: Program, ended: Callable[[], object]) -> Program:
    """The program, and a word when it has ended."""
    result = yield from program
    ended()
    return result


def _open_rollouts(
    session: EngineSession, items: Sequence[Item], copies: int, seed: int
) -> Iterator[Rollout]:
    """Rollouts in prompt-major order. A row that comes twice in a batch is drawn twice."""
    seen: collections.Counter[str] = collections.Counter()
    for row, _, prompt in items:
        numbers = range(copies)
        seeds = [derive_seed(seed, row.row_id, seen[row.row_id], copy) for copy in numbers]
        streams = session.open(MAIN, prompt, seeds)
        seen[row.row_id] += 1
        for own, stream in zip(seeds, streams, strict=True):
            yield Rollout(row, prompt, own, stream)


def _figures(
    rollouts: Sequence[Trajectory], scheduler: Scheduler, workers: Workers
) -> dict[str, float]:
    """Turns of an episode, and what its tools cost."""
    return {
        "episode/turns": sum(len(t.turns) for t in rollouts) / max(len(rollouts), 1),
        "episode/visits": float(scheduler.steps),
        "tool/jobs": float(workers.jobs),
        "tool/jobs_shared": float(workers.submitted - workers.jobs),
        "time/tool_wait": scheduler.wait_seconds,
    }
