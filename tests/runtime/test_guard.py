"""What stands before the application of `coreml-sd serve`, without a server."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from diffusion_runtime.errors import InputError
from diffusion_runtime.serve import server
from diffusion_runtime.serve.app import build
from diffusion_runtime.serve.engine import Engine
from diffusion_runtime.serve.guard import Rules
from diffusion_runtime.serve.service import Service
from diffusion_runtime.serve.worker import Setup


def ask(rules: Rules, method: str, path: str, headers: dict[str, str]) -> httpx.Response:
    app: Any = build(Service(Engine([Setup("nowhere", "toy", {})])), rules)

    async def asked() -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://localhost:8000"
        ) as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(asked())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "["}, 421),
        ({"Host": "a@localhost"}, 421),
        ({"Origin": "http://["}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "ftp://localhost:8000"}, 403),
        ({"Origin": "http://localhost:9000"}, 403),
        ({"Origin": "http://localhost:8000"}, 200),
        ({"Origin": "https://localhost:8000"}, 200),
    ],
)
def test_names_that_are_none_are_refused(headers: dict[str, str], status: int) -> None:
    assert ask(Rules(), "GET", "/health/live", headers).status_code == status


def test_web_pages_of_an_allowed_origin_may_send_and_read() -> None:
    rules, page = Rules(origins=("http://page.example",), keys=("k" * 16,)), {"Origin": "http://page.example"}
    asking = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    may = ask(rules, "OPTIONS", "/score", {**page, **asking})
    assert may.status_code == 200 and may.headers["access-control-allow-origin"] == page["Origin"]
    assert may.headers["access-control-allow-headers"] == "authorization,content-type"
    for key, status in (("k", 200), ("x", 401)):
        answer = ask(rules, "GET", "/metrics", {**page, "Authorization": f"Bearer {key * 16}"})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, page["Origin"])
    other = {"Origin": "http://evil.example"}
    assert ask(rules, "OPTIONS", "/score", {**other, **asking}).status_code == 400
    refused = ask(rules, "GET", "/health/live", other)
    assert refused.status_code == 403 and "access-control-allow-origin" not in refused.headers


def test_rules_know_their_hosts() -> None:
    rules = Rules(hosts=("a.example",))
    assert rules.knows("a.example") and not rules.knows("192.0.2.1") and not rules.knows("b.example")
    assert Rules(any_address=True).knows("192.0.2.1")
    with pytest.raises(InputError, match="cannot be read"):
        server.read_keys(Path("nowhere"))
