"""The client: keys, hosts, settings of a panel's models, and pictures on the wire."""

import io
import threading
import time

import pytest
from client_bench import SENTINEL, ask, picture, texts
from fake_gemini import FakeGemini, after, says, verdict
from PIL import Image

from sifm_min.gemini import Client, Key, Request, Spec, ask_many
from sifm_min.judging import payload


def test_server_that_does_not_answer(bench):
    with FakeGemini() as gone:
        url = gone.base_url("openai")
    stop, calls = bench.stop([], "openai", base_url=url)
    assert (stop.reason, calls, bench.time.slept) == ("unreachable", 0, [])
    assert f"nothing answers at {url}: start the server there (ollama serve" in str(stop)


def test_a_local_server_needs_no_key_and_no_proxy(bench, monkeypatch):
    with FakeGemini() as proxy:
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, proxy.base_url())
        spec = Spec.from_json({"provider": "openai", "model": "m", "base_url": bench.server.base_url("openai")})
        assert Key.find(spec) is None and Client(spec).ask(ask()).ok
        assert proxy.calls == []


def test_a_netrc_does_not_replace_the_key(bench, monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1\nlogin someone\npassword else\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    bench.ask([verdict(True, True)], "openai")
    assert bench.server.calls[0].headers["Authorization"] == f"Bearer {SENTINEL}"


def test_sources_of_a_key(monkeypatch, tmp_path):
    google = Spec.from_json({"provider": "gemini", "model": "gemini-2.5-pro"})
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY", "OPENAI_API_KEY", "GEMINI_API_KEY_FILE", "GOOGLE_API_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="no key for generativelanguage.googleapis.com: set GEMINI_API_KEY or GOOGLE_API_KEY"):
        Key.find(google)
    monkeypatch.setenv("GOOGLE_API_KEY", f" {SENTINEL}\n")
    assert repr(Key.find(google)) == "Key(from GOOGLE_API_KEY)" and Key.find(google).redact(f"a{SENTINEL}b") == "a[key]b"
    path = tmp_path / "key"
    path.write_text(SENTINEL + "\n")
    path.chmod(0o600)
    monkeypatch.setenv("GEMINI_API_KEY_FILE", str(path))
    assert Key.find(google).source == str(path) and Key.find(google).headers(google) == {"x-goog-api-key": SENTINEL}
    path.chmod(0o640)
    with pytest.raises(ValueError, match="others may read the key; run chmod 600"):
        Key.find(google)
    monkeypatch.setenv("GEMINI_API_KEY_FILE", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="none: [Nn]o such file"):
        Key.find(google)
    elsewhere = Spec.from_json({"provider": "openai", "model": "m", "base_url": "https://judge.example/v1"})
    with pytest.raises(ValueError, match="judge.example: name the environment variable"):
        Key.find(elsewhere)


@pytest.mark.parametrize("value", ["", "  ", "with space", "new\nline", "zero\u200bwidth", "é"])
def test_a_key_that_is_none_is_refused_without_being_shown(value):
    with pytest.raises(ValueError, match="the key from X is empty, or has characters") as caught:
        Key(f"{SENTINEL}{value}{SENTINEL}" if value.strip() else value, "X")
    assert "sentinel" not in "".join(texts([caught.value]))


def test_a_key_is_not_written_down():
    import pickle
    key = Key(SENTINEL, "X")
    with pytest.raises(TypeError):
        pickle.dump(key, io.BytesIO())
    assert "sentinel" not in repr(key) + str(key) + f"{key}"
    assert key.redact(f"https://h/?key={SENTINEL.replace('+', '%2B').replace('/', '%2F')}") == "https://h/?key=[key]"


@pytest.mark.parametrize("given, words", [
    ({"provider": "gemini"}, "no model"), ({"provider": "vertex", "model": "m"}, "choose gemini or openai"),
    ({"modell": 1}, "modell, which is no setting"), ({"model": "gemini-flash-latest"}, "another model every few months"),
    ({"model": "../x"}, "no name of a model"), ({"model": "a?key=1"}, "no name of a model"),
    ({"base_url": "http://10.0.0.5/v1"}, "unencrypted"), ({"base_url": "https://a:b@h/"}, "no plain"),
    ({"base_url": "h/v1"}, "no plain"), ({"base_url": "https://h/?a=1"}, "no plain"),
    ({"base_url": "https://h:port/"}, "no plain"), ({"base_url": "http://[::/"}, "no plain"),
    ({"base_url": "https://h", "key_env": "GEMINI_API_KEY"}, "is the key for"),
    ({"base_url": "https://evilgoogleapis.com", "key_env": "GOOGLE_API_KEY"}, "is the key for"),
    ({"generation": {"thinkingLevel": "LOW"}}, "does not take thinkingLevel"),
    ({"generation": {"thinkingBudget": 0}}, "does not take"), ({"generation": {"thinkingBudget": 127}}, "does not take"),
    ({"generation": {"mediaResolution": "MEDIA_RESOLUTION_LOW"}}, "does not take"),
    ({"model": "gemini-3.8-flash", "generation": {"thinkingLevel": "MINIMAL"}}, "does not take"),
    ({"model": "gemini-3.8-flash", "generation": {"temperature": 0}}, "does not take temperature"),
    ({"model": "gemini-4-neon", "generation": {"thinkingBudget": -1}}, "does not take thinkingBudget"),
    ({"model": "gemini-9", "generation": {"temperature": 0}}, "its fields are none"), ({"generation": [1]}, "is not a dict"),
    ({"structured": "yes"}, "choose one of"), ({"rpm": 0}, "number above 0"), ({"timeout": "9"}, "number above 0"),
    ({"max_output_tokens": 1.5}, "number above 0"), ({"price": {"input": 1}}, "price of"),
    ({"price": {"input": 1, "output": -1}}, "price of")])
def test_a_panel_that_makes_no_sense(given, words):
    given = given if "provider" in given else {"provider": "gemini", "model": "gemini-2.5-pro", **given}
    with pytest.raises(ValueError, match=words):
        Spec.from_json(given)


def test_every_family_has_its_own_request():
    def of(model, **more):
        return Spec.from_json({"provider": "gemini", "model": model, **more})
    for field, models in {"thinkingBudget": "gemini-2.5-pro gemini-2.5-flash-lite",
                          "thinkingLevel": "gemini-3-flash-preview gemini-3.1-pro-preview gemini-3.8-flash "
                                           "gemini-4-argon"}.items():
        for model in models.split():
            assert [name for name in of(model).profile.allowed if name.startswith("thinking")] == [field]
    assert of("gemini-2.5-flash", generation={"thinkingBudget": 0}).generation == {"thinkingBudget": 0}
    assert (of("gemini-4-neon").timeout, of("gemini-2.5-pro").timeout, of("gemini-3.8-flash").generation) == (900, 300, {})
    assert of("gemini-4-neon", generation={"thinkingLevel": "XHIGH"}).record()["model"] == "gemini-4-neon"


def test_a_rate_per_minute_spaces_the_calls(bench):
    client = bench.client(rpm=20)
    for _ in range(3):
        client.ask(ask())
    assert bench.time.slept == [3, 3]


def test_tokens_are_counted_by_the_service_or_bounded_here(bench):
    client = bench.client()
    assert client.count_tokens(ask()) == 1234
    assert "generateContentRequest" in bench.server.calls[0].body
    assert bench.client("openai").count_tokens(ask()) is None
    tokens, cost = client.estimate(ask("x" * 100, picture(size=(512, 512))))
    assert 100 + 1120 <= tokens < 2000 and cost == pytest.approx((tokens * 1.25 + 8192 * 10) / 1e6)
    assert client.estimate(ask(picture(size=(4000, 3000))))[0] > 24 * 258
    assert bench.client(price=None).estimate(ask())[1] is None


@pytest.mark.slow
def test_many_calls_at_once_take_as_long_as_the_slowest(bench):
    client = bench.client()
    client.ask(ask())
    bench.server.script("gemini-2.5-pro", [after(0.5, verdict(True, True))])
    started = time.monotonic()
    assert len(list(ask_many([(client, [ask()] * 16)], concurrency=16))) == 16
    assert time.monotonic() - started < 4, "one after the other they take eight seconds"


def test_a_request_without_a_schema_is_answered_by_its_text(bench):
    answer, _ = bench.ask([says("hello")], request=Request("rules", ["hi"]))
    assert (answer.status, answer.text) == ("ok", "hello")


@pytest.mark.slow
def test_a_picture_is_encoded_once_for_all_threads(monkeypatch):
    encoded, frombytes = [], Image.frombytes
    monkeypatch.setattr(payload.Image, "frombytes", lambda *given: (
        encoded.append(given[1]), time.sleep(0.05 if given[1] != (2, 2) else 0), frombytes(*given))[2])
    payload._png.cache_clear()
    wide, high = Image.new("RGB", (64, 32)), Image.new("RGB", (32, 64))      # of the same bytes
    threads = [threading.Thread(target=payload.encoded, args=(["?", wide.copy()],)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert encoded == [(64, 32)]
    (_, first), (_, second) = payload.encoded([wide, high])
    assert encoded == [(64, 32), (32, 64)] and first != second
    wide.putpixel((0, 0), (255, 0, 0))                       # the same object, another picture
    assert payload.encoded([wide])[0][1] not in (first, second)
    for i in range(100):
        payload.encoded([Image.new("RGB", (2, 2), (i, 0, 0))])
    assert payload._png.cache_info().currsize <= 16
