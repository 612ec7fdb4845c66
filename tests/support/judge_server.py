"""An LLM judge behind a real HTTP server, which answers as a test says."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from paravt_jax.rewards import JudgeSettings


def completion(text):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


class Service(ThreadingHTTPServer):
    """A server that answers as a test says: `behave(request, number) -> (status, body, pause)`."""

    daemon_threads = True

    def __init__(self, behave):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave, self.requests, self.lock = behave, [], threading.Lock()
        self.busy = self.most_busy = 0

    def settings(self, **changes):
        url = f"http://127.0.0.1:{self.server_port}/v1"
        given = {"url": url, "model": "judge-1", "timeout": 5.0, "backoff": 0.0, **changes}
        return JudgeSettings(**given)


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        service = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with service.lock:
            service.requests.append((self.path, dict(self.headers), body))
            number = len(service.requests)
            service.busy += 1
            service.most_busy = max(service.most_busy, service.busy)
        status, reply, pause = service.behave(body, number)
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            pieces = [reply[i : i + 1] for i in range(len(reply))] if pause else [reply]
            for piece in pieces:
                time.sleep(pause)
                self.wfile.write(piece)
                self.wfile.flush()
        except OSError:
            pass
        with service.lock:
            service.busy -= 1

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def running():
    """What starts services; they end with the context."""
    services = []

    def start(behave):
        service = Service(behave)
        services.append(service)
        threading.Thread(target=service.serve_forever, args=(0.01,), daemon=True).start()
        return service

    yield start
    for service in services:
        service.shutdown()
        service.server_close()
