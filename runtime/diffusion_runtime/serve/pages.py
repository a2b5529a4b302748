"""/docs: the API reference as one page of HTML that loads nothing, from here or from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
code { font-family: ui-monospace, monospace }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; padding: .2rem .8rem .2rem 0; vertical-align: top; border-bottom: 1px solid #8884 }
h2 { margin-top: 2.5rem }
"""


def reference(document: Mapping[str, Any]) -> str:
    """The page for an OpenAPI document."""
    info = document["info"]
    title, told = escape(f"{info['title']} {info['version']}"), escape(info["description"])
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1><p>{told} As an OpenAPI document: "
        f'<a href="openapi.json">openapi.json</a>.</p>{"".join(_operations(document))}'
    )


def _operations(document: Mapping[str, Any]) -> Iterator[str]:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            yield f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
            yield f"<p>{escape(operation.get('description', ''))}</p>"
            for content in operation.get("requestBody", {}).get("content", {}).values():
                yield _table(document, content["schema"])


def _table(document: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    found = _resolved(document, schema)
    required = found.get("required", [])
    rows = ["<tr><th>field</th><th>type</th><th>default</th><th></th></tr>"]
    for name, field in found.get("properties", {}).items():
        shown = f"<code>{escape(name)}</code>{' *' if name in required else ''}"
        cells = (
            shown,
            escape(_kind(document, field)),
            escape(_default(field)),
            escape(field.get("description", "")),
        )
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _resolved(document: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" not in schema:
        return schema
    found: Mapping[str, Any] = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return found


def _kind(document: Mapping[str, Any], field: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_kind(document, one) for one in field["anyOf"] if one.get("type") != "null")
    found = _resolved(document, field)
    if "enum" in found or "const" in found:
        return " or ".join(json.dumps(value) for value in found.get("enum", [found.get("const")]))
    if found.get("type") == "array":
        return f"list of {_kind(document, found['items'])}"
    if "properties" in found:
        return f"{{{', '.join(found['properties'])}}}"
    return str(found.get("type", "anything"))


def _default(field: Mapping[str, Any]) -> str:
    return "" if field.get("default") is None else json.dumps(field["default"])
