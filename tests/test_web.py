"""The web page without a browser: requests, stopping, errors, the HTTP API, and `audioldm2 serve`."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from audioldm2 import (
    QUALITIES,
    CheckpointError,
    DPMSolverMultistepScheduler,
    FeatureCaching,
    cli,
    read_wav,
    write_wav,
)
from audioldm2.checkpoints.hub import TINY_FOLDER
from audioldm2.cli import serve
from audioldm2.web.files import save_sounds
from audioldm2.web.requests import MAX_SEED, Checkpoint, Limits, read_request
from audioldm2.web.studio import Progress, Refused, Sounds, Stopped, Studio
from tests.helpers import HANGS_AFTER, ROOT, load_pipeline, noise, seeded
from tests.web_server import LONG, Server, free_port, tiny_server, wait_until

pytest.importorskip("gradio", reason='needs gradio: the extra "web"')
import httpx  # one of gradio's dependencies

STEPS = {"dpmsolver++": 20, "unipc": 20, "ddim": 200}
TINY = Checkpoint("tiny", 5.12, STEPS, 2.0, "", False, [("A bell", "")])
SPEAKER = Checkpoint("speaker", 10.24, STEPS, 3.5, "Low quality", True, [])
# One, because each costs much time. The server closes some connections after errors, so none is used again.
HTTP = httpx.Client(timeout=HANGS_AFTER, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))
CHECKPOINTS = {"tiny": TINY, "speaker": SPEAKER}


# --- requests


def test_what_is_left_out_is_the_checkpoints_default() -> None:
    request = read_request({"prompt": "A bell", "steps": None}, CHECKPOINTS, Limits())
    assert (request.checkpoint, request.duration, request.steps, request.guidance) == ("tiny", 5.12, 20, 2.0)
    assert (request.negative, request.candidates, request.sampler) == ("", 1, "dpmsolver++")
    assert 0 <= request.seed < 2**32
    other = {"prompt": "A voice", "checkpoint": "speaker", "sampler": "ddim", "speech": "Hello", "seed": 7.0}
    request = read_request(other, CHECKPOINTS, Limits())
    assert (request.negative, request.steps, request.speech, request.seed) == ("Low quality", 200, "Hello", 7)


def test_a_preset_settles_what_is_not_given() -> None:
    draft = QUALITIES["draft"]

    def sampling(**values: Any) -> dict[str, Any]:
        request = read_request({"prompt": "A bell", **values}, CHECKPOINTS, Limits())
        given = {name: value for name, value in request.sampling.items() if value is not None}
        return {**given, "sampler": request.sampler, "taken": request.steps}

    rest = {"guidance_scale": 2.0, "guidance_rescale": 0.0, "unconditional": "text"}
    assert sampling() == {**rest, "num_inference_steps": 20, "sampler": "dpmsolver++", "taken": 20}
    settled = {"sampler": draft.sampler, "taken": draft.steps}
    assert sampling(quality="draft") == {**rest, "quality": draft, **settled}
    assert sampling(quality="draft", steps=7, sampler="ddim", cache=1, guidance_interval="0-0.5") == {
        **rest,
        "quality": replace(draft, sampler="ddim"),
        "num_inference_steps": 7,
        "feature_cache": 1,
        "guidance_interval": (0.0, 0.5),
        "sampler": "ddim",
        "taken": 7,
    }
    request = request_of(
        cache="0,2", guidance_rescale=0.7, unconditional="zeros", checkpoint="speaker", speech="a"
    )
    assert request.negative == "", "zeros take its place"
    assert request.sampling["feature_cache"] == FeatureCaching(steps=(0, 2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": ""}, "the prompt is empty; describe the sound"),
        ({"prompt": None}, "the prompt is empty"),
        ({"prompt": 5}, "the prompt must be text, got 5"),
        ({"prompt": ["A bell", "A dog"]}, "the prompt must be text"),
        ({"prompt": "a" * 2001}, "the prompt has 2001 characters; write at most 2000"),
        ({"prompt": "\ud800"}, "the prompt is not valid UTF-8"),
        ({"negative": 1}, "the negative prompt must be text"),
        ({"duration": 0}, "the length must be a number of seconds, more than 0 and at most 30, got 0"),
        ({"duration": 30.1}, "at most 30, got 30.1"),
        ({"duration": float("nan")}, "the length must be a number of seconds"),
        ({"duration": "5"}, "the length must be a number of seconds"),
        ({"steps": 0}, "the number of steps must be an integer from 1 to 200, got 0"),
        ({"steps": 201}, "the number of steps must be an integer from 1 to 200, got 201"),
        ({"steps": 2.5}, "the number of steps must be an integer"),
        ({"candidates": 5}, "the number of candidates must be an integer from 1 to 4, got 5"),
        ({"candidates": True}, "the number of candidates must be an integer"),
        ({"seed": -1}, "the seed must be an integer from 0 to"),
        ({"seed": MAX_SEED + 1}, "the seed must be an integer from 0 to"),
        ({"guidance": 101}, "the guidance must be from 0 to 100, got 101"),
        ({"guidance": "strong"}, "the guidance must be a finite number"),
        ({"sampler": "euler"}, "the sampler must be one of ddim, dpmsolver"),
        ({"sampler": {}}, "the sampler must be one of"),
        ({"checkpoint": "cvssp/audioldm2"}, "the checkpoint must be one of tiny, speaker"),
        ({"checkpoint": ["tiny"]}, "the checkpoint must be one of"),
        ({"speech": "Hello"}, "this checkpoint does not speak"),
        ({"checkpoint": "speaker"}, "the text to speak is empty"),
        ({"strength": 0.5}, "the strength goes with the sound"),
        ({"keep": "0-1"}, "the part to keep goes with the sound"),
        ({"extend": 1}, "the time to add goes with the sound"),
        ({"audio": "a", "strength": 2}, "the strength must lie between 0"),
        ({"audio": "a", "strength": "x"}, "the strength must be a finite number, got 'x'"),
        ({"audio": "a", "keep": "1"}, "the part to keep must be seconds, as in 0-2.5 or 4-, got '1'"),
        ({"audio": "a", "keep": [0, 1]}, "the part to keep must be text"),
        ({"audio": "a", "keep": "0-1", "replace": "1-2"}, "the part to keep and the part to replace say the"),
        ({"audio": "a", "extend": 31}, "the time to add must be a number of seconds, more than 0 and at mo"),
        ({"audio": "a", "extend": 1, "duration": 3}, "with a time to add, leave out the length"),
        ({"audio": "a", "loop": "yes"}, "the loop must be True or False, got 'yes'"),
        ({"quality": "fast"}, "the quality must be one of draft, normal, best; got 'fast'"),
        ({"quality": 3}, "the quality must be one of"),
        ({"quality": "draft", "audio": "a", "invert": "ddpm"}, "the quality cannot be used with the in"),
        ({"cache": "often"}, "the cache must be an interval such as 3, or a list of the steps"),
        ({"cache": 0}, "the cache must be an interval such as 3"),
        ({"cache": "0,9", "steps": 3}, "the cache lists step 9, but the last of the run's 3 steps is 2"),
        ({"guidance_interval": "1-0"}, "the guidance interval must be START-END, two fractions"),
        (
            {"guidance_interval": "0-0.5", "guidance": 1},
            "the guidance interval has no effect without guidance; pass a guidance greater than 1",
        ),
        ({"guidance_rescale": 2}, "the guidance rescale must be a number from 0 to 1, got 2"),
        ({"guidance_rescale": "x"}, "the guidance rescale must be a number from 0 to 1"),
        ({"unconditional": "noise"}, "the unconditional side must be one of text, zeros; got 'noise'"),
        ({"unconditional": {}}, "the unconditional side must be one of"),
        ({"unconditional": "zeros", "negative": "rain"}, "cannot be combined with a neg"),
    ],
)
def test_what_is_not_allowed_is_refused_in_words(values: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(message)) as error:
        read_request({"prompt": "A bell", **values}, CHECKPOINTS, Limits())
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


# --- generations


class Stub:
    """A pipeline that waits for `go` at each step."""

    def __init__(self, error: Exception | None = None) -> None:
        self.scheduler = DPMSolverMultistepScheduler()
        self.device = torch.device("cpu")
        self.go = threading.Semaphore(0)
        self.steps = 0
        self.error = error

    def __call__(self, prompt: str, *, callback_on_step_end: Any, num_inference_steps: int, **_: Any) -> Any:
        if self.error is not None:
            raise self.error
        for step in range(num_inference_steps):
            assert self.go.acquire(timeout=HANGS_AFTER)
            self.steps += 1
            callback_on_step_end(self, step, torch.tensor(1), {})
        return SimpleNamespace(audios=noise(1, 800).numpy(), sampling_rate=16000, scores=None)


def studio_of(pipe: Any, log: list[str] | None = None) -> Studio:
    return Studio(lambda name: pipe, CHECKPOINTS, Limits(), [].append if log is None else log.append)


def request_of(**values: Any) -> Any:
    return read_request({"prompt": "A bell", **values}, CHECKPOINTS, Limits())


def test_a_stop_takes_effect_within_a_step() -> None:
    pipe, stop = Stub(), threading.Event()
    studio = studio_of(pipe)
    messages = studio.run(request_of(steps=100), stop)
    assert next(messages) == Progress("Waiting for the device")
    pipe.go.release(2)
    seen = next(message for message in messages if isinstance(message, Progress) and message.step == 2)
    assert seen == Progress("Denoising", 2, 100)
    stop.set()
    pipe.go.release(50)
    with pytest.raises(Stopped):
        for _ in messages:
            pass
    wait_until(lambda: not studio.busy)
    assert pipe.steps == 3  # the step that was running


def test_a_visitor_who_is_gone_stops_the_generation() -> None:
    pipe = Stub()
    studio = studio_of(pipe)
    messages = studio.run(request_of(steps=100), threading.Event())
    next(messages)
    wait_until(lambda: studio.busy)
    messages.close()  # what Gradio does when the client disconnects
    pipe.go.release(50)
    wait_until(lambda: not studio.busy)
    assert pipe.steps == 1


def test_one_generation_at_a_time_also_after_a_stop() -> None:
    pipe, stop = Stub(), threading.Event()
    studio = studio_of(pipe)
    first = studio.run(request_of(steps=1), stop)
    next(first)
    wait_until(lambda: studio.busy)
    second = studio.run(request_of(steps=1), threading.Event())
    assert [next(second).text for _ in range(2)] == ["Waiting for the device"] * 2
    pipe.go.release(2)
    assert isinstance(list(first)[-1], Sounds)
    assert isinstance(list(second)[-1], Sounds)
    studio.close()


def test_closing_stops_what_runs() -> None:
    pipe = Stub()
    studio = studio_of(pipe)
    messages = studio.run(request_of(steps=100), threading.Event())
    next(messages)
    wait_until(lambda: studio.busy)
    pipe.go.release(50)
    studio.close()
    assert not studio.busy
    with pytest.raises(Stopped):
        list(messages)


@pytest.mark.parametrize(
    ("error", "message", "logged"),
    [
        (ValueError("num_inference_steps must be at most 9"), "the number of steps must be at most 9", False),
        (MemoryError(), "the server is out of memory; choose a shorter length or fewer candidates", False),
        (
            CheckpointError("/secret/x: broken"),
            "the checkpoint cannot be loaded; the server's log says",
            True,
        ),
        (RuntimeError("/secret/y"), "an error occurred; the server's log says why", True),
    ],
)
def test_errors_are_explained_and_the_servers_secrets_stay_in_its_log(
    error: Exception, message: str, logged: bool
) -> None:
    log: list[str] = []
    studio = studio_of(Stub(error), log)
    with pytest.raises(Refused, match=re.escape(message)) as refused:
        list(studio.run(request_of(), threading.Event()))
    assert "secret" not in str(refused.value)
    assert any("secret" in line for line in log) == logged
    assert not studio.busy


def test_one_checkpoint_is_in_memory() -> None:
    loaded: list[str] = []
    pipes = {"tiny": Stub(), "speaker": Stub()}

    def load(name: str) -> Any:
        loaded.append(name)
        if len(loaded) == 3:
            raise CheckpointError("gone")
        return pipes[name]

    studio = Studio(load, CHECKPOINTS, Limits(), [].append)
    for pipe in pipes.values():
        pipe.go.release(10)
    speaking = {"checkpoint": "speaker", "speech": "Hello"}
    for values in ({}, {}, speaking):
        messages = list(studio.run(request_of(steps=1, **values), threading.Event()))
        assert isinstance(messages[-1], Sounds)
    assert loaded == ["tiny", "speaker"]
    for _ in range(2):  # an error of loading is no pipeline
        with pytest.raises(Refused, match="cannot be loaded"):
            list(studio.run(request_of(steps=1), threading.Event()))
        loaded.pop()


def test_file_names_are_safe_and_cannot_be_guessed(tmp_path: Path) -> None:
    request = request_of(prompt="../../etc/Пароль \N{PILE OF POO}?*: A bell's " + "x" * 300, seed=3)
    sounds = Sounds(request, noise(2, 800).numpy() / 10, 16000, (0.5, 0.25), 1.0)
    first, second = save_sounds(sounds, tmp_path, pictures=False)
    assert (first.score, second.score, first.picture) == (0.5, 0.25, None)
    path = Path(first.wav)
    assert re.fullmatch(r"etc-Пароль-A-bell-s-x+-seed-3-1\.wav", path.name)
    assert len(path.name.encode()) < 100
    assert path.parent.parent == tmp_path
    assert len(path.parent.name) == 32
    assert Path(save_sounds(sounds, tmp_path, pictures=False)[0].wav).parent != path.parent


# --- the server and its API


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tiny_server() as running:
        yield running


def call(server: Server, body: Any, path: str = "call/v2/generate") -> httpx.Response:
    return HTTP.post(f"{server.url}/gradio_api/{path}", json=body)


def events(server: Server, identifier: str) -> Iterator[tuple[str, Any]]:
    """The events of a generation, until its end."""
    url = f"{server.url}/gradio_api/call/generate/{identifier}"
    name = ""
    with HTTP.stream("GET", url) as response:
        for line in response.iter_lines():
            field, _, value = line.partition(": ")
            if field == "event":
                name = value
            elif field == "data" and name != "heartbeat":
                yield name, json.loads(value)


def generate(server: Server, **values: Any) -> tuple[str, Any]:
    """The last event of a generation: "complete" or "error", and its data."""
    response = call(server, values)
    assert response.status_code == 200, response.text
    return list(events(server, response.json()["event_id"]))[-1]


def test_the_api_gives_what_the_pipeline_gives(server: Server, tmp_path: Path) -> None:
    values = {"prompt": "A bell", "negative": "rain", "guidance": 3, "candidates": 2, "seed": 5}
    response = call(server, values)
    *progress, (name, (result,)) = events(server, response.json()["event_id"])
    assert name == "complete"
    steps = [data[0] for event, data in progress if event == "generating"]
    assert {"status": "Waiting for the device", "step": 0, "steps": 0} in steps
    assert (result["seed"], result["checkpoint"], result["sampling_rate"]) == (5, "tiny", 16000)
    assert result["warnings"] == []
    pipe = load_pipeline("tiny")
    expected = pipe(
        "A bell",
        negative_prompt="rain",
        guidance_scale=3.0,
        num_waveforms_per_prompt=2,
        num_inference_steps=2,
        audio_length_in_s=0.64,
        generator=seeded(5),
    )
    assert [sound["score"] for sound in result["sounds"]] == pytest.approx(expected.scores.tolist(), abs=1e-4)
    for sound, audio in zip(result["sounds"], expected.audios, strict=True):
        (tmp_path / "sound.wav").write_bytes(HTTP.get(sound["file"]["url"]).content)
        waveform, rate = read_wav(tmp_path / "sound.wav")
        assert rate == 16000
        np.testing.assert_allclose(waveform[0].numpy(), audio, atol=1e-3)
    (preset,) = generate(
        server, prompt="A bell", quality="draft", cache="2", guidance_interval="0-0.5", seed=5
    )[1]
    expected = pipe(
        "A bell",
        quality="draft",
        feature_cache=2,
        guidance_interval=(0, 0.5),
        guidance_scale=2.0,
        audio_length_in_s=0.64,
        generator=seeded(5),
    )
    (tmp_path / "sound.wav").write_bytes(HTTP.get(preset["sounds"][0]["file"]["url"]).content)
    waveform, _ = read_wav(tmp_path / "sound.wav")
    np.testing.assert_allclose(waveform[0].numpy(), expected.audios[0], atol=1e-3)
    # With the sampler that was not the checkpoint's, and back; and a warning.
    (other,) = generate(server, prompt="A bell", sampler="ddim", seed=5)[1]
    (same,) = generate(server, prompt="A bell", negative="rain", guidance=1, seed=5)[1]
    assert other["sounds"][0]["score"] is None
    assert any("the negative prompt" in note for note in same["warnings"])


def upload(server: Server, content: bytes, name: str = "sound.wav") -> dict[str, Any]:
    """Upload a file. Returns what the API takes as one."""
    response = HTTP.post(f"{server.url}/gradio_api/upload", files={"files": (name, content)})
    assert response.status_code == 200, response.text
    return {"path": response.json()[0], "meta": {"_type": "gradio.FileData"}}


def test_an_uploaded_sound_is_edited(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "in.wav"
    write_wav(path, (0.1 * noise(6000)).clamp(-1, 1), 16000)
    sound = upload(server, path.read_bytes())
    pipe = load_pipeline("tiny")
    for values, arguments in (
        ({"strength": 0.5}, {"strength": 0.5}),
        ({"keep": "0-0.1, 0.3-"}, {"keep": [(0, 0.1), (0.3, None)]}),
        ({"extend": 0.3, "loop": True}, {"extend": 0.3, "loop": True}),
        ({"strength": 0.5, "word_weights": "rain: 2"}, {"strength": 0.5, "word_weights": {"rain": 2}}),
        ({"invert": "ddim", "source_prompt": "Wind", "skip": 0.5, "steps": 2}, {"skip": 0.5}),
    ):
        name, data = generate(server, prompt="Rain", audio=sound, seed=5, **values)
        assert name == "complete", data
        (tmp_path / "out.wav").write_bytes(HTTP.get(data[0]["sounds"][0]["file"]["url"]).content)
        waveform, _ = read_wav(tmp_path / "out.wav")
        given: dict[str, Any] = {"audio": path, "num_inference_steps": 2}
        if "invert" in values:
            found = pipe.invert(path, prompt="Wind", num_inference_steps=2, method="ddim")
            given = {"inverted": found}
        expected = pipe("Rain", guidance_scale=2.0, generator=seeded(5), **given, **arguments).audios[0]
        np.testing.assert_allclose(waveform[0].numpy(), expected, atol=1e-3)


def test_sounds_that_cannot_be_edited_are_explained(server: Server, tmp_path: Path) -> None:
    write_wav(tmp_path / "long.wav", noise(8000 * 31).clamp(-1, 1), 8000)
    write_wav(tmp_path / "silent.wav", 0 * noise(8000), 8000)
    write_wav(tmp_path / "in.wav", noise(8000).clamp(-1, 1), 8000)
    fetched = f"http://127.0.0.1:{free_port()}/in.wav"
    # A file of the server that no visitor uploaded.
    foreign = {"path": str(ROOT / "README.md"), "meta": {"_type": "gradio.FileData"}}
    sound = upload(server, (tmp_path / "in.wav").read_bytes())
    for audio, values, message in (
        (upload(server, b"not a sound"), {}, "the sound is not a sound file"),
        (upload(server, (tmp_path / "long.wav").read_bytes()), {}, "the sound is longer than 30 s"),
        (upload(server, (tmp_path / "silent.wav").read_bytes()), {}, "the sound is silent"),
        (sound, {"extend": 29.5}, "the sound would become longer than 30 s"),
        (sound, {"replace": "3-4"}, "the part to replace has the span from 3 to 4 s, but the sound is 1 s"),
        ({"path": foreign["path"]}, {}, "the sound must be an uploaded file"),
        (foreign, {}, None),
        ({**foreign, "path": fetched}, {}, None),
        ("/etc/passwd", {}, None),
    ):
        name, data = generate(server, prompt="Rain", audio=audio, **values)
        assert name == "error"
        assert message is None or message in data["error"]
        assert "gradio" not in json.dumps(data) or "handle_file" in data["error"]


def test_errors_of_the_api_are_words(server: Server) -> None:
    for values, message in (
        ({"prompt": ""}, "the prompt is empty; describe the sound"),
        ({"prompt": "A bell", "duration": 0}, "the length must be a number of seconds, more than 0"),
        ({"prompt": "A bell", "duration": 0.001}, "the length must be from"),
        ({"prompt": "A bell", "steps": 10**6}, "the number of steps must be an integer from 1 to 1000"),
        ({"prompt": "A bell", "checkpoint": "/etc"}, "the checkpoint must be one of tiny"),
    ):
        name, data = generate(server, **values)
        assert name == "error"
        assert message in data["error"]
        assert "audio_length_in_s" not in data["error"]


def test_malformed_calls_leave_it_serving(server: Server) -> None:
    for body in ([], {}, {"data": []}, {"data": ["A bell"] * 99}, {"data": "A bell"}, {"data": None}, 7):
        for path in ("call/generate", "call/v2/generate", "queue/join", "call/missing", "run/predict"):
            response = call(server, body, path)
            if "event_id" in response.text:
                assert list(events(server, response.json()["event_id"]))[-1][0] == "error"
    for content in (b"", b"{", b"\xff\xfe", b"[" * 10_000):
        HTTP.post(f"{server.url}/gradio_api/call/generate", content=content)
    for index in range(20):  # the page's own events, which are no part of the API
        body = {"fn_index": index, "data": [None, {}, "x"], "session_hash": f"abc{index}"}
        call(server, body, "queue/join")
    assert HTTP.get(f"{server.url}/gradio_api/file=/etc/passwd").status_code == 403
    upload = HTTP.post(f"{server.url}/gradio_api/upload", files={"files": b"x" * (Limits().upload + 1)})
    assert upload.status_code >= 400
    assert generate(server, prompt="A bell")[0] == "complete"
    assert HTTP.get(server.url).status_code == 200


def test_fifty_requests_at_once(server: Server) -> None:
    def visit(number: int) -> str:
        response = call(server, {"prompt": "A bell", "seed": number})
        if response.status_code == 503:
            assert "Queue is full" in response.json()["detail"]
            return "refused"
        return list(events(server, response.json()["event_id"]))[-1][0]

    with ThreadPoolExecutor(50) as pool:
        ends = Counter(pool.map(visit, range(50)))
    assert ends["complete"] >= 5  # one that ran and four that waited
    assert ends["refused"] >= 1
    assert ends.total() == ends["complete"] + ends["refused"]
    assert generate(server, prompt="A bell")[0] == "complete"


def test_a_client_that_is_gone_frees_the_device(server: Server) -> None:
    response = call(server, {"prompt": "A bell", **LONG})
    for name, data in events(server, response.json()["event_id"]):
        if name == "generating" and data[0]["step"] > 0:
            break
    assert server.studio.busy
    wait_until(lambda: not server.studio.busy)
    assert generate(server, prompt="A bell")[0] == "complete"
    assert server.log[-1].startswith("tiny: 1 x 0.64 s")
    assert not any("A bell" in line for line in server.log)


def test_the_page_has_no_telemetry_and_no_fonts_from_elsewhere(server: Server) -> None:
    config = HTTP.get(f"{server.url}/config").json()
    assert config["analytics_enabled"] is False
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    page = HTTP.get(server.url).text + HTTP.get(f"{server.url}/theme.css").text
    loaded = re.findall(r"(?:src=|href=|@import |url\()[\"']?(https?://[^\"') ]+)", page)
    assert [url for url in loaded if "127.0.0.1" not in url] == []
    public = HTTP.get(f"{server.url}/gradio_api/info").json()["named_endpoints"]
    assert list(public) == ["/generate"]


def test_the_documented_client_runs(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    text = (ROOT / "docs" / "web-page.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    assert len(code.splitlines()) <= 11
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("http://127.0.0.1:7860", server.url), "web-page.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r"-?\d\.\d\d", "N", line) for line in lines] == [
        f"sweep-{number}.wav: score N, seed 7" for number in (1, 2)
    ]
    for number in (1, 2):
        waveform, _ = read_wav(tmp_path / f"sweep-{number}.wav")
        assert waveform.shape[1] == pytest.approx(2.56 * 16000, rel=0.01)
    for option, default in re.findall(r"^\| `(--max-\w+)` \| (\d+) \|", text, re.M):
        assert f"{getattr(serve.parser().parse_args([]), option[2:].replace('-', '_')):g}" == default


# --- the command


def test_help_fits_80_columns_and_teaches(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        cli.main(["serve", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for word in ("examples:", "--public", "no password", "--max-steps", "exit codes:", "[web]"):
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "--host: other machines can reach 0.0.0.0"),
        (["--host", "::"], "add --public"),
        (["--host", "example.com", "--public"], "--host: must be an IP address of this machine"),
        (["--port", "0"], "--port: must be an integer from 1 to 65535, got '0'"),
        (["--max-candidates", "17"], "--max-candidates: must be an integer from 1 to 16"),
        (["--max-duration", "0"], "--max-duration: must be a number of seconds"),
        (["--max-que", "3"], "unrecognized argument: --max-que; did you mean --max-queue?"),
        (["A bell"], "unrecognized arguments: A bell; visitors write the prompts on the page"),
    ],
)
def test_invalid_arguments_exit_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["serve", *arguments])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("audioldm2 serve: error: ")
    assert len(err.splitlines()) == 1


def test_only_public_leaves_this_machine() -> None:
    def host(*arguments: str) -> str:
        found: str = serve.parse(serve.parser(), arguments).host
        return found

    assert host() == host("--host", "localhost") == "127.0.0.1"
    assert host("--host", "::1") == "::1"
    assert host("--public") == "0.0.0.0"
    assert host("--public", "--host", "192.0.2.1") == "192.0.2.1"
    options = serve.parse(serve.parser(), ["--model", "tiny", "--model", "x/y", "--model", "tiny"])
    assert options.model == ["tiny", "x/y"]
    assert serve.parse(serve.parser(), []).model == ["cvssp/audioldm2"]


def test_what_the_page_knows_of_a_checkpoint(tmp_path: Path) -> None:
    for name in ("other", "music", "speech"):
        configs = shutil.ignore_patterns("*.safetensors", "audioldm2.json")
        shutil.copytree(TINY_FOLDER, tmp_path / name, ignore=configs)
    index = tmp_path / "speech" / "model_index.json"
    index.write_text(index.read_text().replace("T5EncoderModel", "VitsModel"))
    tiny = serve.describe("tiny")
    assert (tiny.duration, tiny.steps, tiny.guidance) == (5.12, STEPS, 2.0)
    assert "A rising sweep" in dict(tiny.examples)
    other, music, speech = (serve.describe(str(tmp_path / name)) for name in ("other", "music", "speech"))
    assert (other.duration, other.guidance, other.speaks) == (5.12, 3.5, False)
    assert "A rising sweep" not in dict(other.examples)
    assert music.examples != other.examples
    assert speech.speaks
    assert all(prompt and spoken for prompt, spoken in speech.examples)
    with pytest.raises(CheckpointError, match="missing-folder"):
        serve.describe("./missing-folder")


def test_a_port_in_use_is_reported_before_anything_is_loaded(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("audioldm2.cli.serve.loader", None)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert cli.main(["serve", "--model", "tiny", "--port", port]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"audioldm2: error: cannot listen on 127.0.0.1, port {port} (")
    assert "choose another --port" in err


def test_without_gradio_the_error_says_what_to_install(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["serve", "--model", "tiny", "--port", str(free_port())]) == 1
    assert 'pip install "audioldm2-torch[web]"' in capsys.readouterr().err


def test_ctrl_c_ends_with_130(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    port = str(free_port())
    reached = []

    def interrupted(self: threading.Event) -> None:
        reached.append(HTTP.get(f"http://127.0.0.1:{port}").status_code)
        raise KeyboardInterrupt

    waiting = SimpleNamespace(wait=lambda: interrupted(waiting))
    monkeypatch.setattr(serve, "threading", SimpleNamespace(Event=lambda: waiting))
    arguments = ["serve", "--model", "tiny", "--port", port, "--public", "--host", "127.0.0.1"]
    assert cli.main([*arguments, "--device", "cpu", "--max-duration", "7"]) == 130
    assert reached == [200]
    out, err = capsys.readouterr()
    assert out == f"http://127.0.0.1:{port}/ serves the page; Ctrl-C ends it\n"
    lines = err.splitlines()
    assert lines[0] == "audioldm2: loading tiny"
    assert lines[1].startswith(f"audioldm2: public: everyone who can reach port {port} of this machine can")
    assert "up to 7 s, without a password" in lines[1]
    assert lines[2] == "audioldm2: error: interrupted; the server has ended"
    with pytest.raises(httpx.ConnectError):
        HTTP.get(f"http://127.0.0.1:{port}")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_generates_ends_at_once(number: signal.Signals) -> None:
    port = free_port()
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "audioldm2",
            "serve",
            "--model",
            "tiny",
            "--port",
            str(port),
            "--device",
            "cpu",
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert "serves the page" in process.stdout.readline()
    server = Server(f"http://127.0.0.1:{port}", None, [])  # type: ignore[arg-type]
    response = call(server, {"prompt": "A bell", "duration": 30, "steps": 200})
    for name, data in events(server, response.json()["event_id"]):
        if name == "generating" and data[0]["step"] > 0:
            break
    begin = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=HANGS_AFTER)
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    assert time.monotonic() - begin < 60
