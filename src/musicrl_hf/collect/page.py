"""The page that listeners see: one Gradio component of our own, and the questions that it may ask the server."""

import re
from html import escape
from importlib.resources import files
from typing import Any

import gradio as gr

from ..evaluation.page import figure_style
from .service import METHODS, ListeningService

# What the page calls itself, and what it says of itself where somebody shows a link to it.
TITLES = {False: "Which one sounds better?", True: "How good is each of these?"}  # in a study
DESCRIPTIONS = {
    False: "Hear two pieces of music that computers made for one prompt, and say which you prefer.",
    True: "Hear pieces of music that computers made for a prompt, and rate each from 1 to 5.",
}
_PREVIEW = re.compile(r"<meta\s+(?:property=\"og:|name=\"twitter:)[^>]*>\s*")


def build_page(service: ListeningService) -> gr.Blocks:
    """The page as Gradio blocks, without telemetry and without named endpoints.

    Args:
        service: answers it.
    """
    with gr.Blocks(title=TITLES[service.desk.rules.study], analytics_enabled=False, fill_width=True) as page:
        gr.HTML(
            html_template=_text("page.html"),
            js_on_load=f"{_text('player.js')}\n{_text('page.js')}",
            apply_default_css=False,
            server_functions=[_question(service, method) for method in METHODS],
            settings=service.settings,
        )
    return page


def page_head() -> str:
    """What Gradio's script puts into the head of the page: its style."""
    board = f".listening .board {{\n{figure_style()}\n}}"
    return f"<style>{_text('page.css')}\n{board}</style>"


def own_preview(html: str, study: bool) -> str:
    """The page with a title and a link preview of its own, in the place of Gradio's name and picture.

    They stand in what the server sends, for who reads them runs no script.
    """
    title, description = escape(TITLES[study]), escape(DESCRIPTIONS[study])
    tags = {"property": {"og:title": title, "og:description": description, "og:type": "website"}}
    tags["name"] = {"description": description, "twitter:card": "summary", "robots": "noindex"}
    own = [f'<meta {kind}="{name}" content="{text}">' for kind, named in tags.items() for name, text in named.items()]
    head = "".join([f"<title>{title}</title>", *own])
    return _PREVIEW.sub("", html).replace("<head>", f"<head>{head}", 1)


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
