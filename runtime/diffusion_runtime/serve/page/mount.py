"""The page in the application, after all other routes."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from diffusion_runtime.serve.page import layout
from diffusion_runtime.serve.page.gate import Gate
from diffusion_runtime.serve.service import Service


def mount(app: FastAPI, service: Service, most: int) -> None:
    """``most`` bytes of a request. Whoever runs the application runs its lifespan, too."""
    page = layout.blocks(service, most)
    import gradio as gr

    sans, mono = layout.FONTS  # those of Gradio's own theme come from elsewhere
    gr.mount_gradio_app(
        app,
        page,
        "/",
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Default(font=list(sans), font_mono=list(mono)),
        css_paths=layout.HERE / "style.css",
    )
    mounted: Any = app.routes[-1]
    service.engine.on_drain.append(mounted.app.stop_event.set)  # else the tabs that are open keep the server up
    mounted.app = Gate(mounted.app)
