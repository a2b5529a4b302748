"""Schemathesis against the server: requests as the OpenAPI document allows them and as it does not. No answer is a
5xx, and each is one that the document tells of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from serving import Served, serving

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]
EXAMPLES = 12
TAKING = (
    ("POST", "/score"),
    ("POST", "/v1/images/generations"),
    ("POST", "/v1/images/edits"),
    ("POST", "/sdapi/v1/txt2img"),
    ("POST", "/sdapi/v1/img2img"),
)
OTHERS = (
    ("GET", "/v1/models"),
    ("GET", "/sdapi/v1/progress"),
    ("POST", "/sdapi/v1/interrupt"),
    ("GET", "/sdapi/v1/options"),
    ("GET", "/sdapi/v1/sd-models"),
    ("GET", "/sdapi/v1/samplers"),
    ("GET", "/sdapi/v1/schedulers"),
    ("GET", "/controlnet/model_list"),
    ("GET", "/controlnet/module_list"),
    ("GET", "/health/live"),
    ("GET", "/health/ready"),
    ("GET", "/metrics"),
)
REQUESTS = [
    *((*one, GenerationMode.POSITIVE) for one in TAKING + OTHERS),
    *((*one, GenerationMode.NEGATIVE) for one in TAKING),
]
"""What takes nothing can be asked nothing wrong."""


@pytest.fixture(scope="module")
def served(toy_folder: Path, forked_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """With limits that keep the longest request short."""
    log = tmp_path_factory.mktemp("served") / "log.txt"
    with serving(log, f"toy={toy_folder}", "--max-steps", 60, "--max-pictures", 2, python=forked_python) as one:
        yield one


@pytest.fixture(scope="module")
def document(served: Served) -> dict[str, Any]:
    found: dict[str, Any] = served.client.get("/openapi.json").json()
    return found


def test_every_operation_is_asked(document: dict[str, Any]) -> None:
    told = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert told == {*TAKING, *OTHERS}


@pytest.mark.parametrize(("method", "path", "mode"), REQUESTS)
def test_answers_are_as_the_document_tells(
    served: Served,
    document: dict[str, Any],
    method: str,
    path: str,
    mode: GenerationMode,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    operation = schemathesis.openapi.from_dict(document)[path][method]

    # The web UI takes "5" and true for numbers, as its front ends rely on.
    checks = [check for check in CHECKS if check is not negative_data_rejection or "/sdapi/" not in path]

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case[Any]) -> None:
        case.call_and_validate(base_url=served.url, checks=checks)

    ask()
    assert "Traceback" not in served.log.read_text()
