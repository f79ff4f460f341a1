"""The page in a real browser, as listeners use it."""

import signal
import subprocess
import sys
import time

import pytest
from hub_stand_in import HubStandIn
from page_server import BROWSER, agree, launched, play, served
from playwright.sync_api import expect
from sqlalchemy import select
from stores import add_pair, votes_in
from tiny import tiny_generator

from musicrl_hf.collect import tables
from musicrl_hf.collect.desk import Desk
from musicrl_hf.collect.leaderboard import Leaderboard
from musicrl_hf.collect.maker import PairMaker
from musicrl_hf.collect.pool import PairPool
from musicrl_hf.collect.rules import Rules
from musicrl_hf.collect.service import ListeningService
from musicrl_hf.collect.store import VoteStore
from musicrl_hf.preferences import load_preferences

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium here; .ci/chromium brings one")

ATTACK = 'slow <img src=x onerror=alert(1)> & "air" {{x}} ${y}'
PHONE = {"viewport": {"width": 400, "height": 800}, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="module")
def browser():
    with launched() as browser:
        yield browser


@pytest.fixture
def store(tmp_path):
    store = VoteStore(tmp_path / "store")
    yield store
    store.close()


@pytest.fixture
def open_page(browser, store):
    """Opens pages on one server; an error in the page's script fails the test."""
    contexts, stack, wrong = [], [], []

    def open_(rules=None, pool=None, context=None, **options):
        if not stack:
            desk = Desk(store, Rules(**{"min_seconds": 1.0, "check_every": 0, **(rules or {})}))
            server = served(ListeningService(desk, pool and pool(desk), Leaderboard(store)))
            stack.append((server, server.__enter__()))
        if context is None:
            context = browser.new_context(**options)
            contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.goto(stack[0][1])
        page.locator(".listening").wait_for()
        return page

    yield open_
    for context in contexts:
        context.close()
    for server, _ in stack:
        server.__exit__(None, None, None)
    assert not wrong


def test_consent_listen_vote(open_page, store):
    pair = add_pair(store, ATTACK)
    page = open_page()
    start = page.get_by_role("button", name="Start listening")
    expect(start).to_be_disabled()
    expect(page.locator(".terms")).to_contain_text(
        "published as a data set under the licence Creative Commons Attribution"
    )
    expect(page.locator(".pair")).to_be_hidden()
    code = agree(page)
    expect(page.get_by_role("heading", name=ATTACK)).to_be_visible()
    choices = page.locator(".choices button")
    expect(choices).to_have_count(4)
    for n in range(4):
        expect(choices.nth(n)).to_be_disabled()
    play(page, "A")
    expect(choices.first).to_be_disabled()  # one clip is not a comparison
    play(page, "B")
    expect(choices.first).to_be_enabled()
    assert votes_in(store) == []
    page.get_by_role("button", name="B is better").click()
    expect(page.get_by_text("1 vote of yours is kept")).to_be_visible()
    expect(page.get_by_role("heading", name="That was the last pair")).to_be_visible()
    (row,) = votes_in(store)
    assert (row.pair, row.preference) == (pair, "b")
    assert 0.9 <= min(row.seconds_a, row.seconds_b) <= max(row.seconds_a, row.seconds_b) < 3
    assert code.replace("-", "") not in str(row)


def test_a_browser_that_keeps_nothing_can_vote(open_page, browser, store):
    """It throws as soon as it is asked for its storage: the private code then lasts until the page is closed."""
    add_pair(store, "jazz")
    context = browser.new_context()
    context.add_init_script(
        "for (const name of ['localStorage', 'sessionStorage']) Object.defineProperty(window, name, "
        "{ get() { throw new DOMException('no site data', 'SecurityError'); } });"
    )
    page = open_page(context=context)
    agree(page)
    play(page, "A")
    play(page, "B")
    page.get_by_role("button", name="A is better").click()
    expect(page.get_by_text("1 vote of yours is kept")).to_be_visible()
    assert [row.preference for row in votes_in(store)] == ["a"]
    context.close()


def test_one_clip_sounds_at_a_time(open_page, store):
    add_pair(store, "jazz")
    page = open_page()
    agree(page)
    page.get_by_role("button", name="Play clip A").click()
    expect(page.locator(".clip.sounding")).to_have_attribute("data-side", "a")
    page.get_by_role("button", name="Play clip B").click()
    expect(page.locator(".clip.sounding")).to_have_count(1)
    expect(page.locator(".clip.sounding")).to_have_attribute("data-side", "b")
    expect(page.get_by_role("button", name="Play clip A")).to_have_attribute("aria-pressed", "false")
    page.get_by_role("button", name="Withdraw", exact=True).click()  # nothing sounds from a part that is not shown
    expect(page.locator(".clip.sounding")).to_have_count(0)


def test_a_jump_is_not_listening(open_page, store):
    add_pair(store, "jazz")
    page = open_page()
    agree(page)
    slider = page.get_by_role("slider", name="Position in clip A")
    slider.fill("0.9")
    expect(slider).to_have_attribute("aria-valuetext", "0.9 of 1.0 seconds")
    page.get_by_role("button", name="Play clip A").click()
    page.wait_for_timeout(600)
    expect(page.locator(".clip[data-side=a] .heard")).to_have_text("1 s to hear")


def test_keyboard_alone(open_page, store):
    for number in range(2):
        add_pair(store, f"jazz {number}")
    page = open_page()
    for _ in range(10):  # from the top of the page to the box
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.name") == "agree":
            break
    page.keyboard.press("Space")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Your private code")).to_be_focused()
    for _ in range(2):  # past "Copy"
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.press("3")  # too early
    for key, side in ("a", "a"), ("B", "b"):
        page.keyboard.press(key)
        page.locator(f".clip[data-side={side}] .heard.enough").wait_for()
    assert votes_in(store) == []
    page.keyboard.press("3")
    expect(page.get_by_text("1 vote of yours is kept")).to_be_visible()
    expect(page.locator("#prompt")).to_be_focused()  # where a screen reader goes on
    assert [row.preference for row in votes_in(store)] == ["tie"]
    page.get_by_label("Keyboard:").uncheck()
    page.keyboard.press("a")
    page.wait_for_timeout(200)
    expect(page.locator(".clip.sounding")).to_have_count(0)


def test_two_tabs_are_one_listener_and_give_one_vote(open_page, store):
    for number in range(2):
        add_pair(store, f"jazz {number}")
    first = open_page()
    agree(first)
    prompt = first.locator("#prompt").inner_text()
    second = open_page(context=first.context)
    expect(second.locator("#prompt")).to_have_text(prompt)
    for page in (first, second):
        play(page, "A")
        play(page, "B")
    first.get_by_role("button", name="A is better").click()
    expect(first.get_by_text("1 vote of yours is kept")).to_be_visible()
    second.get_by_role("button", name="B is better").click()
    expect(second.get_by_text("You had voted on this pair before")).to_be_visible()
    expect(second.locator("#prompt")).not_to_have_text(prompt)
    assert [row.preference for row in votes_in(store)] == ["a"]


def test_a_reload_in_the_middle_goes_on_where_it_was(open_page, store):
    for number in range(3):
        add_pair(store, f"jazz {number}")
    page = open_page()
    agree(page)
    prompt = page.locator("#prompt").inner_text()
    play(page, "A")
    page.reload()
    expect(page.locator("#prompt")).to_have_text(prompt)
    expect(page.locator(".clip[data-side=a] .heard")).to_have_text("heard")
    expect(page.locator(".clip[data-side=b] .heard")).to_have_text("1 s to hear")
    play(page, "B")
    page.get_by_role("button", name="Both are bad").click()
    expect(page.get_by_text("1 vote of yours is kept")).to_be_visible()
    assert [row.preference for row in votes_in(store)] == ["both_bad"]


def test_withdrawal_and_another_device(open_page, store):
    for number in range(2):
        add_pair(store, f"jazz {number}")
    page = open_page()
    code = agree(page)
    play(page, "A")
    play(page, "B")
    page.get_by_role("button", name="A is better").click()
    expect(page.get_by_text("1 vote of yours is kept")).to_be_visible()

    other = open_page()  # without what the first browser keeps
    other.get_by_text("I took part before").click()
    other.get_by_label("Private code").first.fill("AAAA-BBBB")
    other.get_by_role("button", name="Go on").click()
    expect(other.get_by_text("This is not a private code")).to_be_visible()
    other.get_by_label("Private code").first.fill(code.lower())
    other.get_by_role("button", name="Go on").click()
    expect(other.get_by_text("1 vote of yours is kept")).to_be_visible()

    page.get_by_role("button", name="Withdraw", exact=True).click()
    expect(page.get_by_label("Private code").last).to_have_value(code)
    gone = page.get_by_role("button", name="Withdraw my votes")
    expect(gone).to_be_disabled()
    page.get_by_label("Delete everything of mine.").check()
    gone.click()
    expect(page.get_by_text("1 vote is deleted")).to_be_visible()
    assert votes_in(store) == []
    page.get_by_role("button", name="Listen", exact=True).click()
    expect(page.get_by_role("button", name="Start listening")).to_be_visible()
    other.reload()
    expect(other.get_by_text("Please agree to the text on this page first.")).to_be_visible()


def test_who_agreed_twice_withdraws_everything(open_page, browser, store):
    """Under a new text a listener is given a new code: the old one is kept, shown and withdrawn with it."""
    for number in range(2):
        add_pair(store, f"jazz {number}")

    def agree_and_vote(page):
        code = agree(page)
        play(page, "A")
        play(page, "B")
        page.get_by_role("button", name="A is better").click()
        expect(page.get_by_text("1 vote of yours is kept")).to_be_visible()
        return code

    page = open_page()
    first = agree_and_vote(page)
    with store.write() as connection:  # as if they had agreed to an earlier text
        row = {"id": "0" * 64, "text": "an earlier text", "licence": "cc0-1.0"}
        connection.execute(tables.consents.insert().values(row))
        connection.execute(tables.listeners.update().values(consent=row["id"]))
    page.reload()
    expect(page.get_by_text("The text that you agreed to has changed")).to_be_visible()
    second = agree_and_vote(page)
    assert len(votes_in(store)) == 2
    page.get_by_role("button", name="Show my private code").click()
    expect(page.locator(".secret code")).to_have_text(second)
    expect(page.locator(".earlier")).to_contain_text(first)
    page.get_by_role("button", name="Withdraw", exact=True).click()
    expect(page.get_by_label("Private code").last).to_have_value(f"{first}\n{second}")
    page.get_by_label("Delete everything of mine.").check()
    page.get_by_role("button", name="Withdraw my votes").click()
    expect(page.get_by_text("2 votes are deleted. Nothing of yours is kept any more.")).to_be_visible()
    assert votes_in(store) == []
    page.reload()
    expect(page.get_by_role("button", name="Start listening")).to_be_visible()
    page.get_by_role("button", name="Withdraw", exact=True).click()
    expect(page.get_by_label("Private code").last).to_have_value("")


def test_on_a_phone_everything_fits(open_page, store):
    add_pair(store, "a very long prompt " * 12 + "x" * 60)
    page = open_page(**PHONE)
    agree(page)
    expect(page.locator("#prompt")).to_be_visible()
    for part in ("Ranking", "Withdraw", "Listen"):
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        page.get_by_role("button", name=part, exact=True).click()
    play(page, "A")
    play(page, "B")
    sizes = [button.bounding_box() for button in page.locator(".choices button, .play").all()]
    assert len(sizes) == 6
    assert all(box["width"] >= 44 and box["height"] >= 44 for box in sizes)
    page.get_by_role("button", name="A tie").tap()
    expect(page.get_by_role("heading", name="That was the last pair")).to_be_visible()


def test_a_study_takes_a_rating_of_each_clip(open_page, store):
    for number in range(3):
        add_pair(store, f"jazz {number}")
    page = open_page({"study": True})
    agree(page)
    expect(page.locator(".asked .label")).to_have_text("Prompt · pair 1 of 3")
    expect(page.locator(".choices")).to_be_hidden()
    play(page, "A")
    play(page, "B")
    send = page.get_by_role("button", name="Send both ratings")
    page.get_by_role("group", name="How good is clip A").get_by_text("2").click()
    expect(send).to_be_disabled()
    page.get_by_role("group", name="How good is clip B").get_by_role("radio", name="5 excellent").focus()
    page.keyboard.press("Space")
    send.click()
    expect(page.locator(".asked .label")).to_have_text("Prompt · pair 2 of 3")
    expect(page.locator("#prompt")).to_have_accessible_description("· pair 2 of 3")
    (row,) = votes_in(store)
    assert (row.preference, row.score_a, row.score_b) == ("b", 2, 5)


def test_a_typed_prompt_is_played_to_who_typed_it(open_page, store):
    """With a real, tiny generator behind the page, which makes pairs while somebody listens."""
    models = {
        name: tiny_generator(seed=seed, sampling_rate=8000) for seed, name in enumerate("xy")
    }  # browsers play 8 kHz
    made = []

    def pool(desk):
        maker = PairMaker(store, models, ["jazz"], duration_s=1.0, check_every=0)
        made.append(PairPool(desk, maker, ahead=2))
        made[0].start()
        return made[0]

    page = open_page(pool=pool)
    agree(page)
    expect(page.locator("#prompt")).to_have_text("jazz")
    box = page.get_by_label("Or hear a prompt of your own")
    box.fill("!!!")
    page.get_by_role("button", name="Make a pair").click()
    expect(page.get_by_text("in words")).to_be_visible()
    box.fill("a slow air")  # keys in the box are no shortcuts
    box.press("a")
    expect(page.locator(".clip.sounding")).to_have_count(0)
    box.press("Backspace")
    page.get_by_role("button", name="Make a pair").click()
    expect(page.get_by_text("Your pair is ready: it comes after this one.")).to_be_visible()
    expect(page.locator("#prompt")).to_have_text("jazz")  # nobody is interrupted
    play(page, "A")
    play(page, "B")
    page.get_by_role("button", name="A is better").click()
    expect(page.locator("#prompt")).to_have_text("a slow air")
    play(page, "A")
    play(page, "B")
    page.get_by_role("button", name="A is better").click()
    expect(page.get_by_text("2 votes of yours are kept")).to_be_visible()
    made[0].stop()
    with store.read() as connection:
        owners = dict(tuple(row) for row in connection.execute(select(tables.pairs.c.prompt, tables.pairs.c.owner)))
        (listener,) = connection.scalars(select(tables.listeners.c.id))
    assert owners == {"jazz": None, "a slow air": listener}


def test_the_page_loads_nothing_from_elsewhere_and_has_a_name_for_everything(open_page, store, browser):
    add_pair(store, "jazz")
    context = browser.new_context()
    asked = []
    context.on("request", lambda request: asked.append(request.url))
    page = open_page(context=context)
    agree(page)
    expect(page.locator("#prompt")).to_be_visible()
    page.wait_for_load_state("networkidle")
    here = page.url
    assert len(asked) > 10
    assert not [url for url in asked if not url.startswith((here, f"blob:{here}", "data:"))]
    # Elements that can be used and have no accessible name; Chromium says what a screen reader would read.
    session = context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    used = [node for node in nodes if node.get("role", {}).get("value") in ("button", "checkbox", "textbox", "slider")]
    assert len(used) > 8
    assert not [node for node in used if not node["name"]["value"].strip()]
    roles = {node["role"]["value"] for node in nodes if "role" in node}
    assert {"main", "heading", "navigation", "status"} <= roles
    context.close()


def test_a_server_that_is_gone_is_told_and_found_again(open_page, store):
    add_pair(store, "jazz")
    page = open_page()
    agree(page)
    play(page, "A")
    play(page, "B")
    page.context.set_offline(True)
    page.get_by_role("button", name="A tie").click()
    expect(page.get_by_text("The server does not answer.")).to_be_visible()
    page.context.set_offline(False)
    time.sleep(0.2)
    page.get_by_role("button", name="A tie").click()
    expect(page.get_by_text("1 vote of yours is kept")).to_be_visible()
    assert len(votes_in(store)) == 1


@pytest.mark.slow
def test_the_command_makes_pairs_takes_a_vote_and_publishes_it(browser, tmp_path):
    """`musicrl collect` as it is typed, with the bundled model, against a stand-in for the Hub; Ctrl+C ends it."""
    words = "collect --port 0 --duration_s 1 --min_seconds 1 --store store --every 10s --out votes --push tester/votes"
    command = [sys.executable, "-m", "musicrl_hf.cli", *words.split()]
    with (
        HubStandIn() as hub,
        subprocess.Popen(
            command, cwd=tmp_path, env=hub.environment(tmp_path / "hf"), stdout=subprocess.PIPE, text=True
        ) as process,
    ):
        try:
            rest = vote_and_fetch(browser, hub, process)
        finally:
            process.kill()  # does nothing where it has ended
    assert process.returncode == 0
    assert "Closing the page." in rest
    assert "Wrote the votes to store; `musicrl export`" in rest
    assert len(load_preferences(tmp_path / "votes")) == 1


def vote_and_fetch(browser, hub, process) -> str:
    """One vote, its publication, its export; what the command says from there to its end."""
    lines = iter(process.stdout.readline, "")
    address = next(line for line in lines if line.startswith("Listening page: ")).split()[-1]
    assert address.startswith("http://127.0.0.1:")
    token = next(lines).partition("Bearer ")[2].partition('"')[0]
    page = browser.new_page()
    page.goto(address)
    page.get_by_label("I have read this, and I agree.").check(timeout=60_000)
    page.get_by_role("button", name="Start listening").click()
    page.get_by_role("button", name="I have kept it").click()
    page.locator("#prompt").wait_for(timeout=120_000)
    play(page, "A")
    play(page, "B")
    page.get_by_role("button", name="A is better").click()
    expect(page.get_by_text("1 vote of yours is kept")).to_be_visible()
    exported = next(line for line in lines if line.startswith("Exported"))
    assert "votes: 1 rows (train); pushed to http" in exported
    assert any(path.endswith(".parquet") for path in hub.files("dataset", "tester/votes"))
    answer = page.request.get(f"{address}export", headers={"authorization": f"Bearer {token}"})
    assert answer.status == 200
    page.close()
    process.send_signal(signal.SIGINT)
    rest = "".join(lines)
    process.wait(timeout=60)
    return rest
