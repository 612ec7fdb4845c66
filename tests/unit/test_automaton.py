"""Stop strings and grammars on token ids: whatever the tokens, the text is what counts."""

import json
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paravt_jax.protocol import CROP_VIDEO_TOOL, parse_tool_calls
from paravt_jax.structure import token_bytes
from paravt_jax.windows import GROUNDING_SCHEMA
from pipelines.needle.tokenizer import train_tokenizer
from pipelines.needle.world import NeedleWorld
from rollout.engine.automaton import (
    FREE,
    STOPPED,
    NoRoom,
    TokenAutomata,
    advance,
    allowed_tokens,
    has_stopped,
)
from rollout.engine.grammar import DEAD, call_grammar, finder, response_grammar
from rollout.engine.sampler import Draw, SamplingConfig, draw_tokens, row_keys

CONSTRAINED = SamplingConfig(constrain="calls")
RICH_TOOL = {
    "name": 'a "<tool"',
    "parameters": {
        "type": "object",
        "properties": {
            "note": {"type": "string", "description": "any text"},
            "unit": {"enum": ["s", "<min>", 3, None]},
            "spans": {"type": "array", "items": {"type": "integer"}},
            "deep": {
                "type": "object",
                "properties": {"yes": {"type": "boolean"}, "no": {"type": ["null", "number"]}},
            },
        },
        "required": ["unit", "spans"],
    },
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(NeedleWorld())


@pytest.fixture(scope="module")
def contents(tokenizer):
    """Bytes of each id, and three ids more than the tokenizer has, as in a padded embedding."""
    added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
    return token_bytes(tokenizer.get_vocab(), added, size=tokenizer.get_vocab_size() + 3)


@pytest.fixture(scope="module")
def eos(tokenizer):
    return tokenizer.token_to_id("<|im_end|>")


@pytest.fixture(scope="module")
def automata(contents, eos):
    tools = [CROP_VIDEO_TOOL, RICH_TOOL]
    return TokenAutomata(contents, [eos], {"calls": response_grammar(tools)})


def random_cut(text, contents, rng):
    """Token ids of the text, cut in a random one of all possible ways."""
    ids_of, rest, ids = {}, text.encode(), []
    for index, content in enumerate(contents):
        ids_of.setdefault(content, index)
    while rest:
        lengths = [n for n in range(1, 16) if rest[:n] in ids_of and len(rest) >= n]
        ids.append(ids_of[rest[: rng.choice(lengths)]])
        rest = rest[len(contents[ids[-1]]) :]
    return ids


def first_stop(ids, contents, strings):
    """Number of tokens up to the first end of a stop string; None if there is none."""
    text = b""
    for count, index in enumerate(ids, 1):
        text += contents[index]
        if any(string.encode() in text for string in strings):
            return count
    return None


@pytest.mark.parametrize(
    "strings",
    [("</tool_call>",), ("red", "ed s", "d"), ("aab", "ab", "aaab"), ("é\n", "打"), ("\n\n",)],
)
def test_a_stop_string_is_found_however_it_is_cut(automata, contents, strings):
    rng = random.Random(0)
    snippets = [*strings, *(s[:-1] for s in strings), *(s[1:] for s in strings)]
    snippets += ["a", "aa", "</tool", "_call>", "<", "red square", "\n", " ", "é", "b"]
    texts = ["".join(rng.choices(snippets, k=6)) for _ in range(300)]
    streams = [random_cut(text, contents, rng) for text in texts]
    table = np.asarray(automata.table if automata.start(SamplingConfig(stop=strings)) else 0)
    found = []
    for ids in streams:
        state, counts = automata.start(SamplingConfig(stop=strings))[0], None
        for count, index in enumerate(ids, 1):
            state = table[state, index]
            counts = count if state == STOPPED and counts is None else counts
        found.append(counts)
    expected = [first_stop(ids, contents, strings) for ids in streams]
    assert found == expected
    assert 20 < expected.count(None) < 280


def test_rows_stop_at_what_their_own_request_names(automata, contents, eos):
    rng = random.Random(1)
    ids = random_cut("a red square", contents, rng)
    requests = [
        SamplingConfig(),
        SamplingConfig(stop=("red",)),
        SamplingConfig(stop=("square",), stop_ids=(ids[0],)),
        SamplingConfig(stop_ids=(eos + 1,)),
    ]
    states = jnp.array([automata.start(request) for request in requests])
    stopped = []
    for index in [*ids, eos]:
        states = advance(automata.table, states, jnp.full(4, index))
        stopped.append(np.asarray(has_stopped(states)))
    counts = (~np.array(stopped)).sum(0) + 1
    assert counts.tolist() == [len(ids) + 1, first_stop(ids, contents, ["red"]), 1, len(ids) + 1]


def test_new_stop_strings_do_not_recompile(contents, eos):
    automata, step = TokenAutomata(contents, [eos], reserve=64), jax.jit(advance)
    for strings in [(), ("</tool_call>",), ("a", "b"), ("x" * 30,)]:
        states = jnp.array([automata.start(SamplingConfig(stop=strings))] * 2)
        step(automata.table, states, jnp.array([3, 4]))
    assert step._cache_size() == 1
    automata.start(SamplingConfig(stop=("y" * 30,)))
    assert automata.table.shape == (128, len(contents))
    assert automata.table is automata.table


def random_turns(automata, contents, eos, prefix, rows, steps, seed):
    """Constrained draws from logits that know nothing but like tags and JSON."""
    liked = re.compile(rb'</?[\w]*>?|[{}":,\\\[\]]|"?(name|arguments|\w+_time)"?|\d')
    bias = np.array([3.0 * bool(liked.fullmatch(content)) for content in contents])
    bias[eos] = 5.0
    tags = [i for i, content in enumerate(contents) if content in (b"<tool_call>", b"</tool_call>")]
    bias[tags] = 6.0
    given = [contents.index(prefix)] if prefix else []
    states = jnp.array([automata.start(CONSTRAINED, given)] * rows)
    draw = jax.tree.map(jnp.asarray, Draw.of([CONSTRAINED] * rows, range(rows), [steps] * rows))

    @jax.jit
    def step(carry, at):
        states, stopped = carry
        noise = jax.random.normal(jax.random.key(seed * steps + at), (rows, len(contents)))
        logits = bias[None] + noise
        keys = row_keys(draw.seeds, jnp.full(rows, at))
        allowed = allowed_tokens(automata.table, states)
        drawn = draw_tokens(logits.astype(jnp.float32), keys, draw, None, allowed)
        tokens = jnp.where(stopped, eos, drawn.tokens)
        states = jnp.where(stopped[:, None], states, advance(automata.table, states, tokens))
        return (states, has_stopped(states)), (tokens, drawn.constrained & ~stopped, ~stopped)

    stop = jnp.zeros(rows, bool)
    _, (tokens, changed, going) = jax.lax.scan(step, (states, stop), jnp.arange(steps))
    share = float(changed.sum() / going.sum())
    tokens, going = np.asarray(tokens).T, np.asarray(going).T
    ended = ~going[:, -1] | (tokens[:, -1] == eos)
    turns = [given + own[live].tolist() for own, live in zip(tokens, going, strict=True)]
    return [turn for turn, done in zip(turns, ended, strict=True) if done], share


def check_value(value, schema):
    """A validator of the part of JSON Schema that the grammar knows."""
    if "enum" in schema:
        return any(value == one and type(value) is type(one) for one in schema["enum"])
    kinds = {
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "null": type(None),
        "array": list,
        "object": dict,
    }
    named = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    fits = any(
        isinstance(value, kinds[kind]) and isinstance(value, bool) == (kind == "boolean")
        for kind in named
    )
    if fits and isinstance(value, list):
        return all(check_value(item, schema["items"]) for item in value)
    if fits and isinstance(value, dict):
        known = schema["properties"]
        inside = set(schema.get("required", ())) <= set(value) <= set(known)
        return inside and all(check_value(item, known[name]) for name, item in value.items())
    return fits


@pytest.mark.slow
@pytest.mark.parametrize("prefix", [b"", pytest.param(b"<think>", marks=pytest.mark.study)])
def test_every_constrained_draw_parses_and_obeys_the_schema(
    automata, contents, eos, tokenizer, prefix
):
    turns, share = random_turns(automata, contents, eos, prefix, rows=64, steps=600, seed=5)
    tools = {tool["name"]: tool for tool in (CROP_VIDEO_TOOL["function"], RICH_TOOL)}
    calls = []
    for turn in turns:
        text = tokenizer.decode(turn, skip_special_tokens=False)
        assert text.startswith("<think>") and text.endswith("<|im_end|>")
        bodies = re.findall(r"<tool_call>(.*?)</tool_call>", text, re.DOTALL)
        assert len(bodies) == text.count("<tool_call>") == text.count("</tool_call>")
        assert all(set(json.loads(body)) == {"name", "arguments"} for body in bodies)
        # The parser reads behind the thinking only; the grammar holds everywhere.
        parsed = parse_tool_calls(text.replace("</think>", ""))
        assert len(parsed) == len(bodies)
        calls += parsed
    for call in calls:
        assert call.error is None
        assert check_value(call.arguments, tools[call.name]["parameters"]), call
    assert len(turns) > 20 and len(calls) > 60
    assert {call.name for call in calls} == set(tools)
    assert {"note", "deep"} <= {name for call in calls for name in call.arguments}
    assert 0.05 < share < 0.95


CROP = '<think><tool_call>{"name":"crop_video","arguments":{%s}}</tool_call>'
RICH = '<think><tool_call>{"name":"a \\"\\u003ctool\\"","arguments":{%s}}</tool_call>'
PRETTY = """<think>
<tool_call>
{"name": "crop_video", "arguments": {"start_time": 1.5, "end_time": -0.2e+10}}
</tool_call>
<tool_call"""
RIGHT = [
    "<think>a</think>\n<answer>B</answer>",
    "<think>",
    "<think><<tool_call",
    PRETTY,
    CROP % '"start_time":1,"end_time":2',
    2 * (CROP % '"start_time":1,"end_time":2'),
    RICH % '"note":"é打\\u00e9","unit":"\\u003cmin>","spans":[1, 2],"deep":{"no":null}',
    RICH % '"unit":null,"spans":[],"deep":{}',
]
WRONG = [
    "think",
    " <think>",
    "<think>a</tool_call>",
    "<think><tool_call>",
    "<think><tool_call></tool_call>",
    (CROP % '"start_time":1,"end_time":2').removesuffix(">"),
    (CROP % '"start_time":1,"end_time":2').replace("crop_video", "crop"),
    CROP % '"start_time":1',
    CROP % '"end_time":2,"start_time":1',
    CROP % '"start_time":01,"end_time":2',
    CROP % '"start_time":1,"end_time":"2"',
    CROP % '"start_time":1,"end_time":2,"end_time":3',
    RICH % '"note":"<","unit":3,"spans":[]',
    RICH % '"note":"\n","unit":3,"spans":[]',
    RICH % '"unit":3,"spans":[1.5]',
    RICH % '"spans":[]',
]


@pytest.mark.parametrize("text", RIGHT + WRONG)
def test_the_grammar_takes_what_is_right_and_nothing_else(automata, contents, eos, text):
    rng = random.Random(3)
    table, first = np.asarray(automata.table), automata.start(CONSTRAINED)[1]
    for _ in range(10):
        state = first
        for index in [*random_cut(text, contents, rng), eos]:
            state = table[state, index] if state != DEAD else DEAD
        assert (state == STOPPED) == (text in RIGHT)


def test_given_tokens_are_the_head_of_the_response(automata, tokenizer):
    def state(text):
        return automata.start(CONSTRAINED, tokenizer.encode(text).ids)[1]

    tool_turn = "<|im_end|>\n<|im_start|>user\n<tool_call></tool_call><|im_end|>\n"
    assert state("<think>\n") == state(tool_turn + "<|im_start|>assistant\n<think>\n")
    assert state("") == state(tool_turn + "<|im_start|>assistant\n") != state("<think>\n")
    with pytest.raises(ValueError, match="constrain='calls': the response cannot begin"):
        state("think")


ONE = '{"name":"crop_video","arguments":{%s}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (ONE % '"start_time":1,"end_time":2', True),
        (ONE % '"start_time":1', False),
        ("I look. " + ONE % '"start_time":1,"end_time":2', False),
        ((ONE % '"start_time":1,"end_time":2').replace("crop", "zoom"), False),
        (ONE % '"start_time":1,"end_time":2' + " ", False),
        ((ONE % '"start_time":1,"end_time":2').removesuffix(">"), False),
    ],
)
def test_a_call_that_must_be_made_is_all_that_can_be_said(contents, eos, text, right):
    lent = TokenAutomata(contents, [eos], room=256)
    table, rng = np.asarray(lent.table), random.Random(3)
    assert (table[2:258] == DEAD).all() and lent.constrains
    first = lent.borrow(lent.lift_grammar("own", call_grammar([CROP_VIDEO_TOOL])))
    table = np.asarray(lent.table)
    for _ in range(10):
        state = first
        for index in [*random_cut(text, contents, rng), eos]:
            state = table[state, index] if state != DEAD else DEAD
        assert (state == STOPPED) == right


def test_grammars_of_single_requests_share_a_room_of_fixed_size(contents, eos):
    own = [finder([word]) for word in ("ab", "cd", "ef")]
    automata = TokenAutomata(contents, [eos], {"calls": own[0]}, room=6)
    one, two, three = (automata.lift_grammar("own", grammar) for grammar in own)
    size, first = automata.states, automata.borrow(one)
    assert automata.borrow(two) == first + 3 and automata.borrow(one) == first
    with pytest.raises(NoRoom):
        automata.borrow(three)
    automata.give_back(one)
    automata.give_back(two)
    with pytest.raises(NoRoom):
        automata.borrow(three)
    assert automata.borrow(two) == first + 3, "those that nobody uses are kept"
    automata.give_back(two)
    automata.give_back(one)
    assert automata.borrow(three) == first and automata.states == size
    table, letter = np.asarray(automata.table), contents.index(b"e")
    assert table[first, letter] == first + 1 and table[first, contents.index(b"a")] == first
    with pytest.raises(ValueError, match="a grammar of 9 states: room=6"):
        automata.borrow(automata.lift_grammar("own", finder(["abcdefgh"])))


@pytest.mark.slow
@pytest.mark.parametrize(
    "properties",
    [
        {"a": {"type": "array", "items": {"type": "null"}, "minItems": 10**12}},
        {"a": {"type": "array", "items": {"type": "null"}, "maxItems": 10**12}},
        {str(n): {"type": "string"} for n in range(40)},
        {"a": {"enum": [str(n) * 20 for n in range(40)]}},
    ],
)
def test_a_short_schema_that_asks_for_a_large_grammar_is_refused(properties):
    """Without building it: the first two would never be done."""
    tool = {"name": "f", "parameters": {"type": "object", "properties": properties}}
    with pytest.raises(ValueError, match="more than 256 states"):
        call_grammar([tool], most=256)


def test_free_rows_are_free_and_padding_ids_write_nothing(automata, contents):
    states = jnp.array([automata.start(SamplingConfig()), automata.start(CONSTRAINED)])
    assert states[0].tolist() == [FREE, FREE]
    allowed = np.asarray(allowed_tokens(automata.table, states))
    assert allowed[0].all()
    openings = {content for content, ok in zip(contents, allowed[1], strict=True) if ok}
    assert {b"<", b"<think>"} <= openings <= {b"<think>"[:n] for n in range(1, 8)}
    assert not allowed[1][-3:].any()


@pytest.mark.slow
def test_the_table_of_qwen_fits():
    contents = [bytes([n % 256]) for n in range(151_936)]
    automata = TokenAutomata(contents, [7], {"calls": response_grammar([CROP_VIDEO_TOOL])})
    assert automata.table.dtype == jnp.int16 and automata.table.nbytes == 256 * 151_936 * 2


def schema(**parameters):
    return {"name": "f", "parameters": {"type": "object", **parameters}}


@pytest.mark.parametrize(
    ("tools", "named"),
    [
        ([], "at least one schema"),
        ([schema(properties={"a": {"type": "number", "minimum": 0}})], "minimum"),
        ([schema(properties={"a": {"type": "date"}})], "f.a: type 'date'"),
        ([schema(properties={"a": {}})], 'f.a: say its "type"'),
        ([schema(properties={"a": {"type": "array"}})], 'f.a: an array needs "items"'),
        ([schema(required=["b"])], r"\['b'\] are not among"),
        (
            [schema(properties={"a": {"type": "array", "items": {"type": "null"}, "maxItems": 0}})],
            "maxItems=0",
        ),
    ],
)
def test_schemas_that_cannot_be_promised_are_refused(tools, named):
    with pytest.raises(ValueError, match=named):
        response_grammar(tools)


PAIR = '"temporal_segment": [%s], "sampling_strategy": "%s"'


@pytest.mark.parametrize(
    ("body", "complete"),
    [
        (PAIR % ("1, 2.5", "fine"), True),
        (PAIR % ("1", "fine"), False),
        (PAIR % ("", "fine"), False),
        (PAIR % ("1, 2, 3", "fine"), False),
        (PAIR % ("1, 2", "finest"), False),
        ('"name": "grounding", "arguments": {}', False),
    ],
)
def test_a_grounding_call_is_its_arguments_alone(body, complete):
    grammar = response_grammar([GROUNDING_SCHEMA], "grounding")
    text = f"<think>I look. <tool_call></think><grounding>{{{body}}}</grounding>"
    state = grammar.read(text.encode())
    assert (state != DEAD and bool(grammar.ends[state])) == complete
    if complete:
        (call,) = parse_tool_calls(text, syntax="grounding")
        assert call.error is None and call.arguments == json.loads(f"{{{body}}}")


def test_impossible_requests_are_refused(automata, contents):
    with pytest.raises(ValueError, match="constrain='calls': known are"):
        TokenAutomata(contents, [0]).start(SamplingConfig(constrain="calls"))
    with pytest.raises(ValueError, match="stop_ids="):
        automata.start(SamplingConfig(stop_ids=(len(contents),)))
    with pytest.raises(ValueError, match="eos_ids="):
        TokenAutomata(contents, [len(contents)])
    with pytest.raises(ValueError, match="needs the bytes"):
        TokenAutomata([b""] * 8, [1]).start(SamplingConfig(stop=("a",)))
    with pytest.raises(ValueError, match="no token of the vocabulary"):
        TokenAutomata([b"a", b"b"], [1], {"calls": response_grammar([CROP_VIDEO_TOOL])})
    with pytest.raises(ValueError, match="empty text"):
        finder([""])
