"""Values that hosts tell one another, over real connections within one process."""

import contextlib
import json
import os
import socket
import threading
import time
from concurrent.futures import Future
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client

import numpy as np
import pytest

from paravt_jax.patches import join_patches, largest, split_patches
from paravt_jax.records import Patches, Prompt
from train.hosts import exchange
from train.hosts.exchange import AT, Exchange
from train.hosts.share import host_of


class Store:
    """JAX's key-value store, as far as hosts use it here."""

    def __init__(self):
        self.values: dict[str, str] = {}

    def key_value_set(self, key, value):
        self.values[key] = value

    def blocking_key_value_get(self, key, milliseconds):
        end = time.monotonic() + milliseconds / 1000
        while key not in self.values and time.monotonic() < end:
            time.sleep(0.005)
        return self.values[key]


def begin(hosts, store):
    """All hosts find one another; what each of them raised."""
    errors = {}

    def work(number, own):
        try:
            own.begin(number, len(hosts), store, "127.0.0.1:1")
        except ValueError as error:
            errors[number] = str(error)

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(hosts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.fixture
def lost():
    """Hosts that others have noticed to be gone."""
    return []


@pytest.fixture
def three(lost):
    """Three hosts that have found one another."""
    hosts = [Exchange(lost.append) for _ in range(3)]
    for own in hosts:
        own.knows({"TimeoutError": TimeoutError})
    assert begin(hosts, Store()) == {}
    yield hosts
    for own in hosts:
        end(own)


def end(host):
    """As the system does it for a process that has ended."""
    for peer in host._peers.values():
        with socket.socket(fileno=os.dup(peer.fileno())) as own, contextlib.suppress(OSError):
            own.shutdown(socket.SHUT_RDWR)


def test_whoever_is_first_hears_it(three):
    one, two, third = three
    early = two.expect(("crop", 7))
    pixels = np.arange(2_000_000, dtype=np.uint8).reshape(-1, 4)
    one.tell(("crop", 7), pixels)
    np.testing.assert_array_equal(early.result(5), pixels)
    np.testing.assert_array_equal(third.expect(("crop", 7)).result(5), pixels)
    assert not two._values and not third._values, "what was heard is kept no longer"


def prompt(first: int) -> Prompt:
    values = np.arange(first, first + 2 * 4 * 6000).astype(np.uint8).reshape(2, 4, 6000)
    text = np.zeros(3, np.int32)
    shown = Patches(values, np.full((2, 2), 2, np.int32), ((0.5,), (0.5,)))
    return Prompt(text, np.zeros((3, 3), np.int32), text, shown)


def settle(holds) -> None:
    limit = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.005)


def test_pixels_go_to_those_alone_that_look_at_them(three):
    one, two, third = three
    one.tell(("prompt", 0), prompt(7))
    shown, unseen = (host.expect(("prompt", 0)).result(5).patches for host in (two, third))
    assert largest([shown, unseen]) == (2, 4) and one.loans.kept == 1
    assert 0 < one.take_sent() < 5000, "neither has been sent them"
    np.testing.assert_array_equal(shown.values, prompt(7).patches.values)
    np.testing.assert_array_equal(shown.values, prompt(7).patches.values)
    size = prompt(7).patches.values.size
    assert size < one.take_sent() < size + 5000, "once, to one of them"
    assert one.loans.kept == 1, "the third host has them yet to come"
    del unseen
    settle(lambda: one.loans.kept == 0)


def test_pixels_of_a_forgotten_stream_are_not_kept(three):
    one, two, third = three
    one.tell(("old", 0), prompt(0))
    settle(lambda: two._values and third._values)
    for host in (two, third):
        host.forget("old")
    settle(lambda: one.loans.kept == 0)


def test_frames_are_joined_and_split_without_pixels(three):
    one, two, _ = three
    one.tell((0,), prompt(3))
    one.tell((1,), prompt(60))
    here = [prompt(3).patches, prompt(60).patches]
    there = [two.expect((at,)).result(5).patches for at in range(2)]
    joined = join_patches(there)
    parts = split_patches(joined, [1, 3])
    assert one.loans.kept == 2 and [len(part.values) for part in parts] == [1, 3]
    np.testing.assert_array_equal(joined.values, join_patches(here).values)
    np.testing.assert_array_equal(parts[1].values, join_patches(here).values[1:])


def test_an_error_names_its_host_and_keeps_the_kind_that_matters(three):
    failed: Future = Future()
    failed.set_exception(OSError("no such file"))
    three[1].tell_outcome((1,), failed)
    three[1].tell_error((2,), TimeoutError("late"))
    told = three[2].expect((1,)).exception(5)
    assert (type(told), str(told), told.host) == (RuntimeError, "no such file", 1)
    assert isinstance(three[0].expect((2,)).exception(5), TimeoutError)


def test_what_nobody_asks_for_any_more_is_dropped(three):
    one, two, _ = three
    coming = two.expect(("old", 0))
    one.tell(("old", 1), "prompt")
    one.tell(("new", 0), "prompt")
    assert two.expect(("new", 0)).result(5) == "prompt"
    two.forget("old")
    assert coming.cancelled() and not two._values


def test_a_host_that_has_gone_is_noticed(three, lost):
    end(three[2])
    limit = time.monotonic() + 60
    while lost.count(2) < 2 and time.monotonic() < limit:
        time.sleep(0.01)
    assert lost.count(2) == 2, "both others notice"


def test_nobody_is_heard_without_the_key(monkeypatch):
    monkeypatch.setattr(exchange, "CONNECT_SECONDS", 0.5)
    store, told = Store(), []

    def join():
        with pytest.raises(
            ValueError, match=r"host 0 of 2: no connection with host 1 within 0\.5 s"
        ):
            Exchange().begin(0, 2, store, "127.0.0.1:1")
        told.append(True)

    waiting = threading.Thread(target=join)
    waiting.start()
    at = tuple(json.loads(store.blocking_key_value_get(f"{AT}0", 1000)))
    with pytest.raises((AuthenticationError, EOFError, OSError)):
        Client(at, authkey=b"guessed")
    waiting.join()
    assert told


@pytest.mark.parametrize(("rows", "hosts"), [(8, 2), (6, 4), (4, 16), (1, 3)])
def test_rows_are_parted_in_their_order(rows, hosts):
    owners = [host_of(at, rows, hosts) for at in range(rows)]
    counts = [owners.count(host) for host in range(hosts)]
    assert owners == sorted(owners) and max(counts) - min(counts) <= 1
