"""A server on loopback with OpenAI's API, whose answers are a function of what it is asked."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Stub:
    """What a test sees of the server.

    Attributes:
        base_url: where it is.
        requests: path, headers and body of each request so far, in the order in which they came.
        most_at_once: the most requests that were under way at the same time.
    """

    def __init__(self, answer):
        self.answer, self.requests, self.most_at_once = answer, [], 0
        self._lock, self._under_way = threading.Lock(), 0

    @property
    def bodies(self):
        return [body for _, _, body in self.requests]

    def handle(self, path, headers, body):
        with self._lock:
            number = len(self.requests)
            self.requests.append((path, headers, body))
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
        try:
            return self.answer(path, body, number)
        finally:
            with self._lock:
                self._under_way -= 1


@contextlib.contextmanager
def serve(answer):
    """Serves ``answer(path, body, number)``, which returns a JSON object, or (status, text, headers)."""
    stub = Stub(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            found = stub.handle(self.path, dict(self.headers), json.loads(content) if content else None)
            status, text, headers = found if isinstance(found, tuple) else (200, json.dumps(found), {})
            self.send_response(status)
            for name, value in {"Content-Length": str(len(text.encode())), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST  # noqa: N815

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stub.base_url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def says(text):
    """A chat completion."""
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}
