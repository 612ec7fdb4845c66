"""Serve a model to OpenAI clients: `python evaluate/serve.py --model DIR`.

Chat completions with images, videos, tools and streams, at http://HOST:PORT/v1; docs/serving.md
shows requests and what comes back. SIGTERM lets requests under way end first.
"""

import os
import os.path
import sys

# Run as a script, `sys.path[0]` is this folder, where `import models` would find
# somebody else's. Swap it for the repository root before any other import.
if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from paravt_jax.failures import attempt
from paravt_jax.flags import Parser

if TYPE_CHECKING:
    from evaluate.serving.limits import Limits
    from evaluate.serving.service import Service


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser(prog="evaluate/serve.py", description=__doc__)
    add = parser.add_argument
    add("--model", help="Hugging Face folder, or workdir of a run (default: the demo's cold start)")
    add("--recipe", help="take the settings of this recipe, not those that go with the model")
    add("--name", help="what clients call the model (default: the name of its folder)")
    add("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    add("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    add("--rows", type=int, default=8, help="completions written at a time (default: 8)")
    add("--queue", type=int, default=64, help="requests that may wait beside them (default: 64)")
    add(
        "--max-prompt-tokens",
        type=int,
        metavar="N",
        help="longest prompt (default: as the model has room)",
    )
    add("--max-tokens", type=int, metavar="N", help="longest completion (default: 1024)")
    add("--max-frames", type=int, default=64, metavar="N", help="of a request (default: 64)")
    add(
        "--grammar-states",
        type=int,
        default=1024,
        metavar="N",
        help="room for the schemas of tools that must be called (default: 1024; 0: none can be)",
    )
    add("--max-body-mib", type=int, default=64, metavar="N", help="of a request (default: 64)")
    add("--timeout", type=float, default=600.0, help="seconds of a request (default: 600)")
    add("--drain", type=float, default=60.0, help="seconds that requests have at the end")
    add(
        "--key-variable",
        metavar="NAME",
        help="environment variable with the key that clients must send (default: none is asked)",
    )
    add("--media-root", metavar="DIR", help="requests may name files below it (default: none)")
    add("--warm-up", action="store_true", help="compile all that requests may need beforehand")
    add(
        "--fetch-media",
        action="store_true",
        help="fetch images and videos from http(s) addresses that are public",
    )
    add(
        "--fetch-hosts",
        metavar="HOST[,HOST...]",
        help="with --fetch-media: from these hosts alone, which may be in your own network",
    )
    return parser


MOST_STATES = 16384
"""States are numbered by 16 bits, and other ones need some."""
POSITIVE = ("rows", "max_prompt_tokens", "max_tokens", "max_frames", "max_body_mib", "timeout")


def check(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> None:
    """Refuse what no server can be."""
    for name in POSITIVE:
        value = getattr(flags, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')} {value}: give a number above 0")
    for name in ("queue", "drain", "grammar_states"):
        if not 0 <= getattr(flags, name) < float("inf"):
            parser.error(f"--{name.replace('_', '-')} {getattr(flags, name)}: give 0 or above")
    if flags.grammar_states > MOST_STATES:
        parser.error(f"--grammar-states {flags.grammar_states}: give {MOST_STATES} or less")
    if not 0 <= flags.port < 65536:
        parser.error(f"--port {flags.port}: give 0 to 65535")
    if flags.key_variable is not None and not os.environ.get(flags.key_variable):
        parser.error(f"--key-variable {flags.key_variable}: this variable is not set or is empty")
    if flags.fetch_hosts and not flags.fetch_media:
        parser.error(f"--fetch-hosts {flags.fetch_hosts}: give --fetch-media as well")
    if flags.media_root is not None and not os.path.isdir(flags.media_root):
        parser.error(f"--media-root {flags.media_root}: there is no such folder")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = make_parser()
    flags = parser.parse_args(argv)
    check(parser, flags)
    return attempt(lambda: serve(flags))


def limits_of(flags: argparse.Namespace) -> "Limits":
    """The bounds that the flags set; what they leave open stays."""
    from evaluate.serving.limits import Limits

    defaults = Limits()
    return Limits(
        rows=flags.rows,
        queue=flags.queue,
        prompt_tokens=flags.max_prompt_tokens or defaults.prompt_tokens,
        max_tokens=flags.max_tokens or defaults.max_tokens,
        frames=flags.max_frames,
        grammar_states=flags.grammar_states,
        body_bytes=flags.max_body_mib * 2**20,
        seconds=flags.timeout,
        drain_seconds=flags.drain,
        media_root=None if flags.media_root is None else Path(flags.media_root),
        fetch=flags.fetch_media,
        fetch_hosts=frozenset(filter(None, (flags.fetch_hosts or "").lower().split(","))),
    )


def open_service(flags: argparse.Namespace) -> "Service":
    """The model with its engine, nothing compiled yet."""
    from evaluate.model import changed_rules, open_model
    from evaluate.serving.service import Service
    from train.compile.cache import keep_compiled

    model = open_model(flags.model, flags.recipe, changed_rules)
    output = model.config.output
    keep_compiled(output.compile_cache, output.compile_cache_gb)
    return Service(model, limits_of(flags), flags.name)


def serve(flags: argparse.Namespace) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
      ValueError: the model cannot be opened, or does not fit the limits.
    """
    print("loading the model", flush=True)
    import uvicorn

    from evaluate.serving.app import make_app

    listening = listen(flags.host, flags.port)
    service = open_service(flags)
    if flags.warm_up:
        print("compiling what requests may need; this takes minutes", flush=True)
        print(f"{service.warm_up()} functions compiled", flush=True)
    config = uvicorn.Config(
        make_app(service, os.environ[flags.key_variable] if flags.key_variable else None),
        log_level="warning",
        access_log=False,
        # Requests under way have so long to end; nobody new is let in.
        timeout_graceful_shutdown=int(flags.drain),
    )
    # uvicorn hands on the signal that ended it when all is drained: that is no failure.
    signal.signal(signal.SIGTERM, lambda *_: None)
    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    print(f"serving {service.name} at {address}", flush=True)
    uvicorn.Server(config).run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address.

    Raises:
      ValueError: it cannot be had.
    """
    try:
        return socket.create_server((host, port), family=family(host), backlog=1024)
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: {error.strerror}; take another") from error


def family(host: str) -> socket.AddressFamily:
    """Of an address."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


if __name__ == "__main__":
    sys.exit(main())
