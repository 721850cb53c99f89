"""The web page in Chromium, as a visitor uses it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import torch

from audioldm2 import QUALITIES, read_wav, write_wav
from tests.helpers import HANGS_AFTER, noise
from tests.web_server import LONG, Server, tiny_server, wait_until

pytest.importorskip("gradio", reason='needs gradio: the extra "web"')
import httpx  # one of gradio's dependencies

sync_api = pytest.importorskip("playwright.sync_api", reason='needs playwright: the extra "test"')
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs the program chromium (on Debian: apt install chromium)"
)
# Decodes a file of the page as a player does, and measures it.
DECODED = """
async url => {
    const data = await (await fetch(url)).arrayBuffer();
    const sound = await new OfflineAudioContext(1, 1, 16000).decodeAudioData(data);
    return [sound.duration, Math.max(...sound.getChannelData(0).map(Math.abs))];
}
"""
# Keeps the element that plays, which is not in the document.
PLAYED = """
const play = HTMLMediaElement.prototype.play;
HTMLMediaElement.prototype.play = function () {
    window.played = this;
    return play.call(this);
};
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tiny_server() as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def page(server: Server, browser: Any) -> Any:
    """The page in one tab, for all tests in turn: to open it takes more time than most of them."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    tab.set_default_timeout(HANGS_AFTER * 1000)
    tab.requested = set()
    tab.errors = []
    tab.on("request", lambda request: tab.requested.add(urlparse(request.url)))
    tab.on("pageerror", lambda error: tab.errors.append(str(error)))
    tab.add_init_script(PLAYED)
    tab.goto(server.url)
    return tab


def fill(page: Any, **fields: Any) -> None:
    for name, value in fields.items():
        entry = page.locator(f"#{name} textarea, #{name} input:not([type=range])").first
        entry.fill(str(value))
        entry.press("Tab")


def generate(page: Any, **fields: Any) -> None:
    fill(page, **fields)
    page.click("#run:enabled")
    page.wait_for_selector("#stop:enabled")


def status(page: Any, text: str) -> str:
    """Wait until the status contains a text; returns all of it, without Gradio's own clock above it."""
    found: str = page.locator("#status .status", has_text=re.compile(text)).inner_text()
    return found


def test_a_prompt_becomes_a_sound_that_plays_with_its_picture(page: Any, tmp_path: Path) -> None:
    generate(page, prompt="A bell", candidates=2)
    line = status(page, "made in")
    assert re.search(
        r"2 candidates; 0\.6\d s at 16 kHz; tiny, DPM-Solver\+\+, 2 steps, guidance 2, seed", line
    )
    scores = []
    for number in range(2):
        label = page.locator(f"#audio-{number} label").inner_text()
        scores.append(float(re.fullmatch(rf"\s*{number + 1} of 2, score (-?\d\.\d\d)", label)[1]))  # type: ignore[index]
        picture = page.locator(f"#picture-{number} img")
        picture.wait_for()
        wait_until(lambda picture=picture: picture.evaluate("image => image.naturalWidth") > 600)
        with page.expect_download() as download:
            page.click(f"#download-{number}")
        path = tmp_path / download.value.suggested_filename
        assert re.fullmatch(rf"A-bell-seed-\d+-{number + 1}\.wav", path.name)
        download.value.save_as(path)
        waveform, rate = read_wav(path)
        assert (len(waveform), rate) == (1, 16000)
        seconds, peak = page.evaluate(DECODED, download.value.url)
        assert seconds == pytest.approx(waveform.shape[1] / rate)
        assert peak == pytest.approx(waveform.abs().max().item(), abs=1e-4)
        assert peak > 0.01
    assert scores == sorted(scores, reverse=True)
    assert not page.locator("#sound-2").is_visible()
    page.locator("#audio-0 [aria-label=Play]").click()
    wait_until(lambda: page.evaluate("window.played?.ended"))
    assert page.evaluate("[played.error, played.currentTime]") == [None, pytest.approx(seconds, abs=0.01)]


def test_what_cannot_be_made_is_said_in_words(page: Any) -> None:
    generate(page, duration="")
    assert status(page, "length") == "The length is empty; enter a number."
    assert page.get_by_role("alert").is_visible()
    assert not page.locator("#sound-0").is_visible()
    page.wait_for_selector("#run:enabled")
    for fields, message in (
        ({"duration": 0}, "The length must be a number of seconds, more than 0 and at most 30, got 0"),
        ({"duration": 31}, "at most 30, got 31"),
        ({"duration": 1, "prompt": " "}, "The prompt is empty; describe the sound"),
    ):
        generate(page, **fields)
        status(page, re.escape(message))
        page.wait_for_selector("#run:enabled")


def test_a_stop_ends_a_long_run_and_shows_no_sound(page: Any, server: Server) -> None:
    generate(page, prompt="A bell", **LONG)
    line = status(page, r"Denoising, step \d+ of 1000")
    assert page.locator("#status progress").get_attribute("max") == "1000"
    assert server.studio.busy, line
    page.click("#stop")
    assert wait_until(lambda: not server.studio.busy) < 60
    assert status(page, "Stopped") == "Stopped"
    page.wait_for_selector("#run:enabled")
    assert not page.locator("#sound-0").is_visible()
    assert server.log[-1] == "tiny: stopped"


def test_a_full_queue_is_said_and_a_stop_leaves_it(page: Any, server: Server) -> None:
    call = f"{server.url}/gradio_api/call/v2/generate"
    with httpx.Client(trust_env=False, timeout=HANGS_AFTER) as client:

        def begin() -> str:
            identifier: str = client.post(call, json={"prompt": "A bell", **LONG}).json()["event_id"]
            return f"{server.url}/gradio_api/call/generate/{identifier}"

        with client.stream("GET", begin()):
            wait_until(lambda: server.studio.busy)
            generate(page, prompt="A bell", duration=0.64)
            status(page, "Waiting in the queue")
            page.click("#stop")
            page.wait_for_selector("#run:enabled")
            # Gradio says "Error" for a moment: to it, what was stopped in the queue has failed.
            wait_until(lambda: status(page, "Stopped") == "Stopped")
            wait_until(lambda: client.get(f"{server.url}/gradio_api/queue/status").json()["queue_size"] == 0)
            with ExitStack() as waiting:
                for _ in range(4):
                    waiting.enter_context(client.stream("GET", begin()))
                page.click("#run")
                status(page, "The generation could not begin: the queue is full; try again in a minute")
                page.wait_for_selector("#run:enabled")
    wait_until(lambda: not server.studio.busy)


def test_a_seed_can_be_kept_and_an_old_sound_shown_again(page: Any) -> None:
    page.uncheck("#reroll input")
    fields = {"prompt": "A siren", "duration": 0.64, "steps": 2, "candidates": 1, "seed": 77}
    sounds = []
    for _ in range(2):
        generate(page, **fields)
        status(page, "1 sound; .* seed 77")
        page.wait_for_selector("#run:enabled")
        with page.expect_download() as download:
            page.click("#download-0")
        sounds.append(Path(download.value.path()).read_bytes())
    assert sounds[0] == sounds[1]
    rows = page.locator("#history tbody tr")
    assert rows.count() == 3
    assert "seed 77" in rows.nth(0).inner_text()
    rows.nth(2).click()
    status(page, "A bell")
    assert page.locator("#audio-1").is_visible()
    assert page.locator("#prompt textarea").input_value() == "A bell"


def test_an_example_fills_the_prompt_and_the_sampler_its_steps(page: Any) -> None:
    page.locator("#examples button", has_text="A slow drum beat").click()
    wait_until(lambda: page.locator("#prompt textarea").input_value() == "A slow drum beat")
    page.click("#sampler input")
    page.get_by_role("option", name="DDIM").click()
    wait_until(lambda: page.locator("#steps input[type=number]").input_value() == "3")


def test_a_preset_settles_fields_and_an_inversion_has_none(page: Any) -> None:
    steps = page.locator("#steps input[type=number]")
    page.locator("#advanced button").first.click()
    page.locator("#quality").get_by_text("Draft", exact=True).click()
    wait_until(lambda: steps.input_value() == str(QUALITIES["draft"].steps) and steps.is_disabled())
    wait_until(lambda: not page.locator("#cache").is_visible())
    assert page.locator("#sampler input").is_disabled()
    assert page.locator("#guidance-rescale").is_visible()
    generate(page, prompt="A bell", candidates=1)
    assert "quality draft" in status(page, "made in")
    page.locator("#edit button").first.click()
    page.locator("#invert").get_by_text("Inversion", exact=True).click()
    wait_until(lambda: steps.input_value() == "3" and steps.is_enabled())
    assert page.locator("#quality input").first.is_disabled()
    page.locator("#invert").get_by_text("Variation", exact=True).click()
    wait_until(lambda: page.locator("#quality input").first.is_enabled())
    page.locator("#edit button").first.click()
    generate(page, prompt="A bell", cache="0,5")
    status(page, "The cache lists step 5, but the last of the run's 2 steps is 1")
    generate(page, cache="2")
    assert "cache 2" in status(page, "made in")
    fill(page, cache="")
    page.locator("#advanced button").first.click()


def test_a_reload_starts_a_new_visit_and_frees_the_device(page: Any, server: Server) -> None:
    generate(page, prompt="A bell", **LONG)
    status(page, "Denoising")
    page.reload()
    wait_until(lambda: not server.studio.busy)
    assert status(page, "Ready") == "Ready"
    assert page.locator("#prompt textarea").input_value() == ""
    assert page.locator("#duration input").input_value() == "0.64"
    assert not page.locator("#history").is_visible()
    generate(page, prompt="A bell")
    status(page, "made in")


def test_a_sound_is_uploaded_and_edited_on_a_phone(page: Any, tmp_path: Path) -> None:
    path = tmp_path / "in.wav"
    write_wav(path, (0.1 * noise(6000)).clamp(-1, 1), 16000)
    page.set_viewport_size({"width": 390, "height": 844})
    page.locator("#edit button").first.click()
    page.locator("#audio input[type=file]").set_input_files(path)
    page.wait_for_selector("#audio button[aria-label=Play]")
    fill(page, keep="0-0.1")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    generate(page, prompt="Rain", steps=2, candidates=1)
    assert "0.38 s at 16 kHz" in status(page, "made in")  # the sound's length
    assert "an edited sound" in page.locator("#history tbody tr").first.inner_text()
    with page.expect_download() as download:
        page.click("#download-0")
    kept, _ = read_wav(download.value.path())
    assert torch.equal(kept[:, :1000], read_wav(path)[0][:, :1000])
    generate(page, keep="3-4")
    status(page, "The part to keep has the span from 3 to 4 s, but the sound is 0.375 s long")


def test_nothing_is_asked_of_other_machines(page: Any, server: Server) -> None:
    assert {url.hostname for url in page.requested if url.scheme not in ("data", "blob")} == {"127.0.0.1"}
    assert page.errors == []
