"""Calls that must be made: `tool_choice` as a grammar that the answer obeys."""

from __future__ import annotations

import collections
import json
import threading

from evaluate.serving.errors import ApiError
from evaluate.serving.prompts import must_call
from evaluate.serving.schemas import ChatRequest, OfferedTool
from rollout.engine.automaton import TokenAutomata, TokenGrammar
from rollout.engine.grammar import call_grammar

KEPT = 4
"""Grammars that are remembered for the next request with the same tools."""
LONGEST_SCHEMA = 2**14
"""Characters of the schemas that are made into one."""


class CallGrammars:
    """Grammars of requests, made where a request must call. Used by several threads."""

    def __init__(self, automata: TokenAutomata) -> None:
        self._automata, self._lock = automata, threading.Lock()
        self._kept: collections.OrderedDict[str, TokenGrammar] = collections.OrderedDict()

    def __call__(self, request: ChatRequest) -> TokenGrammar | None:
        """The grammar of the call that must be made; None if none must be.

        Raises:
          ApiError: a schema says what cannot be promised.
        """
        wanted = must_call(request)
        if not wanted:
            return None
        if not self._automata.room:
            raise ApiError(
                "tool_choice: this server cannot make the model call (--grammar-states 0); leave "
                "it out, or say auto",
                "tool_choice",
            )
        key = json.dumps([tool.function.model_dump(include=MEANT) for tool in wanted])
        if len(key) > LONGEST_SCHEMA:
            raise _refused(f"schemas of more than {LONGEST_SCHEMA} characters")
        # One at a time: they cost seconds of a core, and those who ask for the same wait for one.
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._made(wanted)
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return self._kept[key]

    def _made(self, tools: list[OfferedTool]) -> TokenGrammar:
        schemas = [tool.function.model_dump(include=MEANT) for tool in tools]
        for schema in schemas:
            if (schema["parameters"] or {}).get("type", "object") != "object":
                raise _refused(f'parameters of {schema["name"]} are not of type "object"')
        try:
            grammar = call_grammar(schemas, most=self._automata.room)
            return self._automata.lift_grammar("tool_choice", grammar)
        except ValueError as error:
            raise _refused(str(error)) from error
        # What is no JSON schema at all: a name where a list belongs, a word for a number.
        except (TypeError, AttributeError, KeyError, RecursionError) as error:
            raise _refused("a schema of tools cannot be read") from error


MEANT = {"name", "parameters"}
"""What of a function its calls must obey."""


def _refused(why: str) -> ApiError:
    return ApiError(
        f'tool_choice: {why}; or say tool_choice: "auto", which promises nothing', "tool_choice"
    )
