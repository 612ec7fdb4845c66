"""What tests of the server share: to compile its model takes seconds."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def asked():
    """A question about a video of the needle world."""
    from tests.support.needle import questions

    return next(q for q in questions("oe") if q.asked == "colour").row


@pytest.fixture(scope="session")
def server(asked):
    """A server of a tiny model; whatever it was asked, in the end it is idle and well."""
    from tests.support.chat_server import Server, tiny_model

    server = Server(tiny_model(), Path(asked.video.path).parent)
    yield server
    assert server.idle() and server.service.worker.error is None
    server.service.close()
