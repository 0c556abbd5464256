"""A client of servers with OpenAI's HTTP API, by the standard library alone."""

import http.client
import json
import logging
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from prefix_sharing.errors import ConfigError, UserError

log = logging.getLogger(__name__)

_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0
"""Seconds before a request is made again, doubled each time."""


@dataclass(frozen=True)
class Server:
    """A server, and how patient one is with it.

    Attributes:
        base_url (str): such as ``http://127.0.0.1:8000/v1``, to which ``/completions`` and the like are added.
        api_key_env (str | None): environment variable with the key that the server asks for. Default: None, no key.
        concurrency (int): requests under way at the same time. Default: 8.
        retries (int): how often a request is made again after status 429, 5xx, or no answer at all. Default: 5.
        timeout (float): seconds to wait for an answer. Default: 600.0.

    Raises:
        ConfigError: if one of them is out of range.
    """

    base_url: str
    api_key_env: str | None = None
    concurrency: int = 8
    retries: int = 5
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if not is_url(self.base_url):
            raise ConfigError("base_url", f"'{self.base_url}' is no URL; it must be like http://127.0.0.1:8000/v1")
        for key, least in (("concurrency", 1), ("retries", 0)):
            if getattr(self, key) < least:
                raise ConfigError(key, f"must be {least} or more, not {getattr(self, key)}")

    def post_all(self, path: str, bodies: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Makes many requests, some at a time.

        Args:
            path (str): such as ``/completions``.
            bodies (Sequence[Mapping[str, Any]]): what is sent, as JSON.

        Yields:
            tuple[int, dict[str, Any]]: index of a body and the answer to it, as answers come.

        Raises:
            UserError: as for ``post``; requests that have not begun are not made then.
        """
        pool, stop = ThreadPoolExecutor(self.concurrency), threading.Event()
        try:
            numbers = {pool.submit(self._post, path, body, stop): i for i, body in enumerate(bodies)}
            for future in as_completed(numbers):
                yield numbers[future], future.result()
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Makes a request.

        Args:
            path (str): such as ``/completions``.
            body (Mapping[str, Any]): what is sent, as JSON.

        Returns:
            dict[str, Any]: the answer.

        Raises:
            UserError: if the server refuses it, cannot be reached, or answers something else than JSON.
        """
        return self._post(path, body, threading.Event())

    def get(self, path: str) -> dict[str, Any]:
        """As ``post``, for what is only read, such as ``/models``."""
        url = self.base_url.rstrip("/") + path
        return _object(url, self._request(url, None, threading.Event()))

    def _post(self, path: str, body: Mapping[str, Any], stop: threading.Event) -> dict[str, Any]:
        url = self.base_url.rstrip("/") + path
        return _object(url, self._request(url, json.dumps(body).encode(), stop))

    def _request(self, url: str, data: bytes | None, stop: threading.Event) -> bytes:
        """Makes a request until there is an answer; not again once ``stop`` is set."""
        request = urllib.request.Request(url, data, {"Content-Type": "application/json", **self._authorization()})
        wait = _FIRST_WAIT
        for left in range(self.retries, -1, -1):
            asked_for = 0.0
            try:
                with _opener(url).open(request, timeout=self.timeout) as response:
                    return response.read()
            except urllib.error.HTTPError as error:
                problem = f"{url} answers with status {error.code}: {_message(error)}"
                if error.code != 429 and error.code < 500:
                    raise UserError(f"{problem}.") from error
                asked_for = _seconds(error.headers.get("Retry-After"))
                cause: Exception = error
            # A server that goes away while it answers makes any of these.
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None) or error
                problem = f"{url} cannot be reached ({type(reason).__name__}: {reason})"
                problem += "; start the server there or correct base_url"
                cause = error
            if left == 0:
                break
            seconds = min(max(wait, asked_for), _LONGEST_WAIT)
            log.warning("%s; trying again in %.0f s", problem, seconds)
            _pause(stop, seconds)
            wait *= 2
            if stop.is_set():
                break
        raise UserError(f"{problem} (tried {self.retries + 1 - left} times).") from cause

    def _authorization(self) -> dict[str, str]:
        if self.api_key_env is None:
            return {}
        key = os.environ.get(self.api_key_env)
        if not key:
            raise ConfigError("api_key_env", f"the environment has no variable {self.api_key_env}; set it to the key")
        return {"Authorization": f"Bearer {key}"}


def _pause(stop: threading.Event, seconds: float) -> None:
    stop.wait(seconds)


def is_url(text: str) -> bool:
    """Whether a text is the URL of a server."""
    parts = urlsplit(text)
    return parts.scheme in ("http", "https") and bool(parts.hostname)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected request would lose its body, and hand the key to whoever it is redirected to."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _opener(url: str) -> urllib.request.OpenerDirector:
    # A proxy of the environment cannot reach this machine's own servers.
    is_local = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
    proxies = [urllib.request.ProxyHandler({})] if is_local else []
    return urllib.request.build_opener(_NoRedirects, *proxies)


def _object(url: str, content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{url} answers with something else than a JSON object: {content[:100]!r}; correct base_url.")
    return found


def _message(error: urllib.error.HTTPError) -> str:
    """What a server says about an error, in a line."""
    try:
        content = error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        content = ""
    return " ".join(content.split())[:300].rstrip(".") or error.reason


def _seconds(retry_after: str | None) -> float:
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() else 0.0
