"""The client of servers: it waits and asks again, and says in one sentence what is wrong."""

import http.client
import pickle
import socket
import threading
import time

import pytest

from prefix_sharing import served
from prefix_sharing.errors import ConfigError, UserError
from prefix_sharing.served import Server
from servers import serve

PAUSE = served._pause


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    found = []
    monkeypatch.setattr(served, "_pause", lambda stop, seconds: found.append(seconds))
    return found


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_answers_come_with_the_index_of_what_was_asked():
    with serve(lambda path, body, number: {"path": path, "twice": 2 * body["x"]}) as stub:
        found = dict(Server(stub.base_url + "/", concurrency=3).post_all("/double", [{"x": x} for x in range(20)]))
    assert found == {x: {"path": "/v1/double", "twice": 2 * x} for x in range(20)}


def test_no_more_requests_than_allowed_are_under_way():
    barrier = threading.Barrier(3, timeout=10)

    def answer(path, body, number):
        barrier.wait()  # three are under way, or this breaks
        return {}

    with serve(answer) as stub:
        assert len(list(Server(stub.base_url, concurrency=3).post_all("/x", [{}] * 9))) == 9
        assert stub.most_at_once == 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(status, waits, caplog):
    with serve(lambda path, body, number: (status, "busy", {}) if number < 3 else {"ok": 1}) as stub:
        assert Server(stub.base_url).post("/x", {}) == {"ok": 1}
        assert len(stub.requests) == 4
    assert waits == [1.0, 2.0, 4.0]
    assert f"/v1/x answers with status {status}: busy; trying again in 1 s" in caplog.text


def test_a_server_says_how_long_to_wait(waits):
    headers = [{"Retry-After": "7"}, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, {"Retry-After": "9999"}]
    with serve(lambda path, body, number: (429, "", headers[number]) if number < 3 else {}) as stub:
        Server(stub.base_url).post("/x", {})
    assert waits == [7.0, 2.0, 60.0]


def test_patience_ends(waits):
    with serve(lambda path, body, number: (503, '{"error":\n "full"}', {})) as stub:
        with pytest.raises(UserError) as caught:
            Server(stub.base_url, retries=2).post("/x", {})
        assert len(stub.requests) == 3
        expected = f'{stub.base_url}/x answers with status 503: {{"error": "full"}} (tried 3 times).'
        assert str(caught.value) == expected


def test_a_server_that_is_not_there_is_named(waits):
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(UserError, match=rf"{url}/x cannot be reached \(ConnectionRefusedError.*tried 2 times"):
        Server(url, retries=1).post("/x", {})
    assert waits == [1.0]


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_what_is_refused_is_not_asked_again(status):
    with serve(lambda path, body, number: (status, "no such model", {})) as stub:
        with pytest.raises(UserError, match=f"/v1/x answers with status {status}: no such model.$"):
            Server(stub.base_url).post("/x", {})
        assert len(stub.requests) == 1


def test_a_redirect_is_not_followed(monkeypatch):
    monkeypatch.setenv("MY_KEY", "k")
    with serve(lambda path, body, number: {}) as other:
        redirect = (302, "", {"Location": other.base_url})
        with (
            serve(lambda path, body, number: redirect) as stub,
            pytest.raises(UserError, match="answers with status 302"),
        ):
            Server(stub.base_url, api_key_env="MY_KEY").post("/x", {})
        assert other.requests == []


@pytest.mark.parametrize("text", ["<html>", "[1]", ""])
def test_what_is_no_json_object_is_named(text):
    with (
        serve(lambda path, body, number: (200, text, {})) as stub,
        pytest.raises(UserError, match="/v1/x answers with something else than a JSON object"),
    ):
        Server(stub.base_url).post("/x", {})


def test_a_server_that_breaks_off_is_asked_again():
    def answer(path, body, number):
        return (200, "{}", {"Content-Length": "100"}) if number == 0 else {"ok": 1}

    with serve(answer) as stub:
        assert Server(stub.base_url, timeout=5).post("/x", {}) == {"ok": 1}
        assert len(stub.requests) == 2
    assert issubclass(http.client.IncompleteRead, http.client.HTTPException)


def test_after_an_error_nothing_more_is_asked():
    with serve(lambda path, body, number: (400, "no", {})) as stub:
        with pytest.raises(UserError):
            list(Server(stub.base_url, concurrency=1).post_all("/x", [{}] * 50))
        assert len(stub.requests) < 50


def test_after_an_error_nobody_waits_for_a_busy_server(monkeypatch):
    monkeypatch.setattr(served, "_pause", PAUSE)
    monkeypatch.setattr(served, "_FIRST_WAIT", 60.0)
    waiting = threading.Event()

    def answer(path, body, number):
        if body["busy"]:
            waiting.set()
            return 503, "busy", {}
        waiting.wait(10)
        return 400, "no", {}

    with serve(answer) as stub:
        before = threading.active_count()
        with pytest.raises(UserError, match="status 400"):
            list(Server(stub.base_url, concurrency=2).post_all("/x", [{"busy": True}, {"busy": False}]))
        until = time.monotonic() + 10
        while threading.active_count() > before and time.monotonic() < until:
            time.sleep(0.01)
        assert threading.active_count() <= before
        assert len(stub.requests) == 2  # the busy one is not asked again


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    with serve(lambda path, body, number: {}) as stub:
        server = Server(stub.base_url, api_key_env="MY_KEY")
        server.post("/x", {})
        Server(stub.base_url).get("/models")
        assert [headers.get("Authorization") for _, headers, _ in stub.requests] == ["Bearer secret", None]
        assert b"secret" not in pickle.dumps(server)
        monkeypatch.delenv("MY_KEY")
        with pytest.raises(ConfigError, match="'api_key_env': the environment has no variable MY_KEY"):
            server.post("/x", {})


def test_loopback_is_reached_without_the_proxy(monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    with serve(lambda path, body, number: {"ok": 1}) as stub:
        assert Server(stub.base_url, retries=0).post("/x", {}) == {"ok": 1}


@pytest.mark.parametrize(
    ("key", "kwargs"),
    [
        ("base_url", {"base_url": "127.0.0.1:8000"}),
        ("base_url", {"base_url": "file:///etc/passwd"}),
        ("concurrency", {"concurrency": 0}),
        ("retries", {"retries": -1}),
    ],
)
def test_what_is_out_of_range_is_refused(key, kwargs):
    with pytest.raises(ConfigError, match=f"'{key}'"):
        Server(**{"base_url": "http://127.0.0.1:1/v1", **kwargs})
