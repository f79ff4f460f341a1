"""What the web server lets in: the page, clips to whom they were dealt, an export to whoever runs it."""

import asyncio
import io
import json
import logging
import os
import re
import socket
import zipfile
from pathlib import Path

import httpx
import pytest
import soundfile
from page_server import served
from stores import add_pair, hear_and_vote, join, open_desk

from musicrl_hf.collect.server import listen, uvicorn_config
from musicrl_hf.collect.service import ListeningService
from musicrl_hf.collect.store import VoteStore
from musicrl_hf.preferences import load_preferences


@pytest.fixture
def page(tmp_path, clock):
    """A served page and its desk."""
    store = VoteStore(tmp_path / "store")
    desk = open_desk(store, clock)
    with served(ListeningService(desk)) as address, httpx.Client(base_url=address) as client:
        yield client, desk
    store.close()


def component_of(client) -> int:
    return next(part["id"] for part in client.get("config").json()["components"] if part["type"] == "html")


def asked(client, question, data):
    body = {"session_hash": "s", "component_id": component_of(client), "fn_name": question, "data": data}
    return client.post("gradio_api/component_server", json=body)


def test_the_page_answers_as_its_script_asks(page):
    client, desk = page
    add_pair(desk.store, "jazz")
    first = client.get("")
    assert first.status_code == 200
    assert "default-src 'self'" in first.headers["content-security-policy"]
    assert first.headers["referrer-policy"] == "no-referrer"
    code = asked(client, "consent", {"consent_id": desk.rules.consent_id}).json()["code"]
    deal = asked(client, "next", {"code": code}).json()["deal"]
    assert deal["prompt"] == "jazz"
    config = client.get("config").text
    assert '"api_visibility":"public"' not in config
    assert not json.loads(config)["analytics_enabled"]


@pytest.mark.parametrize("study", [False, True])
def test_a_link_to_the_page_is_shown_under_its_own_name(tmp_path, clock, study):
    """What a messenger reads runs no script: it has to stand in what the server sends."""
    store = VoteStore(tmp_path / "store")
    service = ListeningService(open_desk(store, clock, study=study))
    with served(service) as address, httpx.Client(base_url=address) as client:
        answer = client.get("")
        head = answer.text.partition("</head>")[0]
        named = re.findall(r'<meta\s+(?:property|name)="(og:[\w:]+|twitter:\w+|robots)"\s+content="([^"]*)"', head)
        title = "How good is each of these?" if study else "Which one sounds better?"
        assert dict(named) | {"og:description": ""} == {
            "og:title": title,
            "og:description": "",
            "og:type": "website",
            "twitter:card": "summary",
            "robots": "noindex",
        }
        assert len(named) == 5
        assert f"<title>{title}</title>" in head
        assert "to 5" in dict(named)["og:description"] if study else "which you prefer" in dict(named)["og:description"]
        assert "gradio.app" not in head.replace("\\", "")
        assert int(answer.headers["content-length"]) == len(answer.content)
        assert client.head("").status_code == 200
    store.close()


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost", "LOCALHOST.:1", "[::1]:7860", "192.168.1.5"])
def test_the_page_answers_to_addresses_and_to_its_own_names(page, host):
    assert page[0].get("health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "localhost.evil.example", "127.0.0.1.evil.example", "", "[", "a@b"]
)
def test_a_name_that_somebody_pointed_here_is_refused(page, host):
    """DNS rebinding: the browser asks this server for another site's name."""
    client, desk = page
    body = {"session_hash": "s", "component_id": component_of(client), "fn_name": "board", "data": {}}
    for answer in (
        client.get("", headers={"host": host}),
        client.get("config", headers={"host": host}),
        client.post("gradio_api/component_server", json=body, headers={"host": host}),
        client.get("export", headers={"host": host, "authorization": f"Bearer {desk.store.admin_token}"}),
    ):
        assert answer.status_code == 403
        assert "open it at its address, or start it with --hostnames NAME" in answer.text


def test_another_site_cannot_act_in_a_listeners_name(page):
    client, _ = page
    body = {"session_hash": "s", "component_id": component_of(client), "fn_name": "board", "data": {}}

    def status(origin):
        headers = {"host": "127.0.0.1:7860", "origin": origin}
        return client.post("gradio_api/component_server", json=body, headers=headers).status_code

    assert status("http://127.0.0.1:7860") == 200
    for origin in ("https://evil.example", "http://127.0.0.1:8000", "null", "http://[", ""):
        assert status(origin) == 403, origin


def test_a_page_behind_a_web_server_answers_to_the_names_that_it_is_given(tmp_path, clock):
    store = VoteStore(tmp_path / "store")
    config = uvicorn_config(ListeningService(open_desk(store, clock)), ["music.example.org"])

    async def statuses():
        transport = httpx.ASGITransport(config.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            hosts = ("Music.Example.org:443", "music.example.org", "example.org", "127.0.0.1")
            return [(await client.get("/health", headers={"host": host})).status_code for host in hosts]

    assert asyncio.run(statuses()) == [200, 200, 403, 200]
    store.close()


CLOSED = [
    ("POST", "gradio_api/upload"),
    ("POST", "gradio_api/queue/join"),
    ("POST", "gradio_api/run/predict"),
    ("POST", "gradio_api/call/consent"),
    ("GET", "gradio_api/file=/etc/passwd"),
    ("GET", "gradio_api/file/etc/passwd"),
    ("GET", "gradio_api/proxy=https://example.org"),
    ("GET", "gradio_api/openapi.json"),
    ("GET", "gradio_api/info"),
    ("GET", "gradio_api/heartbeat/x"),
    ("GET", "monitoring"),
    ("GET", "gradio_api/runs"),
    ("GET", "docs"),
    ("GET", "votes.db"),
    ("GET", "static/..%2f..%2f__init__.py"),
    ("GET", "assets/../../routes.py"),
]


def test_nothing_else_of_gradio_is_open(page):
    assert {page[0].request(*asked).status_code for asked in CLOSED} == {404}


def test_requests_are_limited_in_size_and_kind(page):
    client, _ = page
    assert client.post("gradio_api/component_server", content=b"x" * 40_000).status_code == 413
    assert client.post("gradio_api/component_server", content=iter([b"x"])).status_code == 411
    both = {"content-length": "5", "transfer-encoding": "chunked"}  # which a server reads by its pieces
    assert client.post("gradio_api/component_server", content=iter([b"x" * 40_000]), headers=both).status_code == 411
    assert client.delete("config").status_code == 405
    assert asked(client, "__init__", {}).status_code == 404  # only questions are answered


def test_clips_are_played_with_their_token_alone(page):
    client, desk = page
    add_pair(desk.store, "jazz")
    (_, one), (_, other) = join(desk), join(desk)
    deal, others = desk.deal(one), desk.deal(other)
    answer = client.get(f"clip/{deal.clip_token}/a")
    assert answer.headers["content-type"] == "audio/wav"
    assert answer.headers["cache-control"] == "private, no-store"
    assert soundfile.info(io.BytesIO(answer.content)).subtype == "PCM_16"
    for number, path in enumerate(desk.store.clip_folder.glob("*.wav")):
        os.utime(path, (1_700_000_000 + number, 1_700_000_000 + number))
    sides = [dict(client.get(f"clip/{deal.clip_token}/{side}").headers) for side in "ab"]
    assert {**sides[0], "date": 0} == {**sides[1], "date": 0}  # nothing says which was written first
    part = client.get(f"clip/{deal.clip_token}/a", headers={"range": "bytes=0-9"})
    assert (part.status_code, part.content) == (206, answer.content[:10])
    clips = {path.stem for path in desk.store.clip_folder.glob("*.wav")}
    assert not any(clip in str(answer.headers) for clip in clips)
    assert client.get(f"clip/{deal.token}/a").status_code == 403
    forged = others.clip_token.partition(".")[0] + "." + deal.clip_token.partition(".")[2]
    assert client.get(f"clip/{forged}/a").status_code == 403
    assert client.get(f"clip/{deal.clip_token}/c").status_code == 404
    for path in ("..%2f..%2fvotes.db/a", f"{deal.clip_token}/..%2fvotes.db", f"{next(iter(clips))}.wav/a"):
        assert client.get(f"clip/{path}").status_code in (403, 404)
    (desk.store.clip_file(next(iter(clips)))).unlink()
    assert {client.get(f"clip/{deal.clip_token}/{side}").status_code for side in "ab"} == {200, 404}


def test_the_export_needs_the_admin_token_and_has_who_did_not_withdraw(page, clock, tmp_path):
    client, desk = page
    add_pair(desk.store, "jazz")
    (code, leaver), (_, stays) = join(desk), join(desk)
    for listener in (leaver, stays):
        hear_and_vote(desk, clock, listener)
    admin = {"authorization": f"Bearer {desk.store.admin_token}"}
    for wrong in ({}, {"authorization": "Bearer x"}, {"authorization": desk.store.admin_token}):
        assert client.get("export", headers=wrong).status_code == 401
    listed = []
    for number in range(2):
        answer = client.get("export", headers=admin)
        assert answer.status_code == 200
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            archive.extractall(tmp_path / str(number))
        listed.append({row["listener"] for row in load_preferences(tmp_path / str(number) / "votes").to_list()})
        if number == 0:
            desk.withdraw(code)
    assert listed == [{leaver, stays}, {stays}]
    with desk.store.write() as connection:
        connection.exec_driver_sql("delete from votes")
    assert client.get("export", headers=admin).status_code == 404
    assert client.get("export?licence=mit", headers=admin).status_code == 404


def test_addresses_are_in_no_log_and_no_table(page, caplog, capfd):
    client, desk = page
    with caplog.at_level(logging.DEBUG, logger="uvicorn"):
        asked(client, "consent", {"consent_id": desk.rules.consent_id})
        client.get("clip/x/a")
    assert "127.0.0.1" not in caplog.text + "".join(capfd.readouterr())
    content = b"".join(path.read_bytes() for path in Path(desk.store.clip_folder).parent.glob("votes.db*"))
    assert b"127.0.0.1" not in content


def test_the_page_is_on_loopback_and_a_taken_port_is_told():
    with listen("127.0.0.1", 0) as taken:
        with pytest.raises(OSError, match=r"`host` and `port` are 127.0.0.1 and \d+: .*give others"):
            listen("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(OSError), socket.create_connection(("127.0.0.2", taken.getsockname()[1]), 1):
            pass
