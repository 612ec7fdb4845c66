"""One episode, from top to bottom as the protocol goes: think, call, read, answer.

Streams grow by concatenation only: no token is ever rendered or tokenised twice.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Generator, Sequence
from typing import Any

from paravt_jax.blocks import join_blocks, text_block
from paravt_jax.protocol import parse_tool_calls
from paravt_jax.records import Prompt, Row, Trajectory, Turn
from rollout.engine.slots import Generated, Stream
from rollout.evidence import Kit, Toolbox, ToolRequest, ToolResult
from rollout.limits import turn_head
from rollout.record import TrajectoryBuilder, derive_seed, generated_turn, was_cut_off
from rollout.responses import response_turn
from rollout.tasks import EngineSession, Generate, Given, Need, Parallel


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One attempt at a question."""

    row: Row
    prompt: Prompt
    seed: int
    stream: Stream


class Episodes:
    """Programs of rollouts that share an agent and a session."""

    def __init__(
        self, kit: Kit, session: EngineSession, toolbox: Toolbox, policy_version: int
    ) -> None:
        self._kit, self._session, self._toolbox = kit, session, toolbox
        self._policy_version = policy_version
        self._prefix = turn_head(kit.config, kit.renderer)
        self._end = kit.renderer.eos_ids[0]

    def program(self, rollout: Rollout) -> Generator[Need, Any, Trajectory]:
        """The program of one rollout; it ends with its record."""
        config, record = self._kit.config, TrajectoryBuilder(rollout.prompt)
        record.add_given(self._prefix)
        given: Given = self._prefix
        for number in itertools.count():
            final = number == config.rounds or not self._another_round_fits(record)
            limit = config.answer_tokens if final else config.turn_tokens
            generated = yield Generate(rollout.stream, given, config.sampling, limit)
            turn = self._turn(generated)
            if final or not turn.calls:
                record.add_turn(turn)
                break
            requests = self._tool_requests(rollout, turn, number + 1)
            results = yield Parallel([self._toolbox.answer(request) for request in requests])
            executed = sum(result.executed for result in results)
            record.add_turn(dataclasses.replace(turn, executed=executed))
            given = self._respond(record, turn, results)
        self._session.close(rollout.stream)
        done = record.finish(self._kit.renderer, self._policy_version)
        return dataclasses.replace(done, call_syntax=config.call_syntax)

    def _another_round_fits(self, record: TrajectoryBuilder) -> bool:
        """Whether a turn with calls, its responses and the forced answer fit what is left. The
        prefix of the turn is on the record already."""
        room = self._kit.room
        return len(record) - room.prefix + room.turn + room.answer <= room.suffix

    def _turn(self, generated: Generated) -> Turn:
        turn = generated_turn(generated, self._prefix, self._kit.renderer)
        if was_cut_off(turn):
            return turn
        syntax = self._kit.config.call_syntax
        return dataclasses.replace(turn, calls=parse_tool_calls(turn.text, syntax=syntax))

    def _tool_requests(self, rollout: Rollout, turn: Turn, turns: int) -> list[ToolRequest]:
        """The calls of the rollout's `turns`-th turn, each with a seed of its own."""
        return [
            ToolRequest(
                call=call,
                number=number,
                video=rollout.row.video,
                seed=derive_seed(rollout.seed, "subagent", turns, number),
            )
            for number, call in enumerate(turn.calls)
        ]

    def _respond(
        self, record: TrajectoryBuilder, ended: Turn, results: Sequence[ToolResult]
    ) -> Given:
        """Put responses and the next turn's prefix on record; what the stream must be given.

        Responses follow the template's end of turn, whatever ended this one.
        """
        end = [] if ended.tokens[-1] == self._end else [self._end]
        record.subagents += [result.subagent for result in results if result.subagent]
        responses = [result.response for result in results]
        most, room = self._kit.config.calls_run, self._kit.room.response - len(end)
        turn = response_turn(self._kit.renderer, responses, room, most)
        if isinstance(turn, Prompt):
            record.add_given(end)
            record.add_frames(turn)
            record.add_given(self._prefix)
            return join_blocks([text_block(end), turn, text_block(self._prefix)])
        given = [*end, *turn, *self._prefix]
        record.add_given(given)
        return given
