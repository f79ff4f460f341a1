"""The page that listeners see: one Gradio component of our own, and the questions that it may ask the server."""

from importlib.resources import files
from typing import Any

import gradio as gr

from ..evaluation.page import figure_style
from .service import METHODS, ListeningService

TITLE = "Which one sounds better?"


def build_page(service: ListeningService) -> gr.Blocks:
    """The page as Gradio blocks, without telemetry and without named endpoints.

    Args:
        service: answers it.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        gr.HTML(
            html_template=_text("page.html"),
            js_on_load=f"{_text('player.js')}\n{_text('page.js')}",
            apply_default_css=False,
            server_functions=[_question(service, method) for method in METHODS],
            settings=service.settings,
        )
    return page


def page_head() -> str:
    """What goes into the head of the page: its style, and that search engines pass it over."""
    board = f".listening .board {{\n{figure_style()}\n}}"
    return f'<meta name="robots" content="noindex"><style>{_text("page.css")}\n{board}</style>'


def page_theme() -> gr.themes.Base:
    """A theme with the system's fonts, so that none is fetched."""
    return gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def _question(service: ListeningService, method: str):
    """A function that the page's script calls by the name of the method."""

    def answer(data: Any, request: gr.Request) -> dict[str, Any]:
        return service.answer(method, data, request.client.host if request.client else "")

    answer.__name__ = method
    return answer


def _text(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")
