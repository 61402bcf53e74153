"""The page that writes, in a headless Chromium, and the mode that serves it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import signal
import socket
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import torch
from safetensors.torch import load_file, save_file

from charseq2seq.demo import PAGE
from charseq2seq.errors import ExitCode
from encoder_decoder_transformer import Transformer
from tests.browser import IDLE, WRITTEN, Browser, chromium, served
from tests.golden.make_golden import HERE, SHAPES
from tests.train_client import Trainee, finish, see

TEXT = "ROMEO: But soft, what light through yonder window breaks?\né"
Show = Callable[..., Browser]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser with a profile of its own."""
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sites, with one for each model of tests/golden, and `large` with a random one of default size."""
    root = tmp_path_factory.mktemp("sites")
    for shape in SHAPES:
        shutil.copytree(HERE / shape, root / shape)
    torch.manual_seed(0)
    model = Transformer(vocab_size=len(set(TEXT)) + 1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    model.vocab = {token: index for index, token in enumerate(["<start>", *sorted(set(TEXT))])}
    model.save_pretrained(root / "large")
    for site in root.iterdir():
        shutil.copytree(PAGE, site, dirs_exist_ok=True)
    return root


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    """Where the sites are served."""
    with served(root) as address:
        yield address


@pytest.fixture(scope="module")
def show(browser: Browser, address: str) -> Show:
    """Open a site, with these fields in the link if there are any; wait until the model is there, or is refused."""

    def show(site: str, **fields: Any) -> Browser:
        browser.open(f"{address}/{site}/" + (f"#{urlencode(fields)}" if fields else ""))
        browser.wait("document.getElementById('status').className !== 'loading'")
        return browser

    return show


def expected_of(shape: str) -> dict[str, Any]:
    """What PyTorch makes of a model of tests/golden."""
    return dict(json.loads((HERE / shape / "expected.json").read_text(encoding="utf-8")))


# --- the model in JavaScript

LOGITS = """
const [path, source, target] = arguments;
const read = readSafetensors(await (await fetch(path + "model.safetensors")).arrayBuffer());
const writer = new Writer(new Model(await (await fetch(path + "config.json")).json(), read), source, 0);
return target.map((token) => {
    const logits = Array.from(writer.logits(), (logit) => Number.isFinite(logit) ? logit : 0);
    writer.next({}, token);
    return logits;
});"""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_those_of_pytorch(show: Show, root: Path, shape: str, dtype: torch.dtype) -> None:
    name, expected = str(dtype).removeprefix("torch."), expected_of(shape)
    (root / shape / name).mkdir()
    shutil.copy(root / shape / "config.json", root / shape / name)
    weights = {name: weight.to(dtype) for name, weight in load_file(root / shape / "model.safetensors").items()}
    save_file(weights, root / shape / name / "model.safetensors")
    logits = torch.tensor(show(shape).run(LOGITS, f"{name}/", expected["source"], expected["target"]))
    model = Transformer.from_pretrained(root / shape)
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    source, target = (torch.tensor([expected[name]], dtype=torch.long) for name in ("source", "target"))
    torch.testing.assert_close(logits[:, 1:], model(source, target)[0, :, 1:], rtol=0, atol=1e-4)
    if dtype == torch.float32:
        torch.testing.assert_close(logits[:, 1:], torch.tensor(expected["logits"])[:, 1:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_random_numbers_become_the_same_tokens(show: Show, shape: str) -> None:
    page, expected = show(shape), expected_of(shape)
    script = "const [row, one] = arguments; row[0] = -Infinity; return sample(Float32Array.from(row), one.random, one)"
    for one in expected["sampled"]:
        assert page.run(script, expected["logits"][-1], one | {"top_p": one["top_p"] or 1}) == one["id"], one


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_text_is_that_of_pytorch_to_the_letter(show: Show, shape: str) -> None:
    expected = expected_of(shape)
    page = show(shape, prompt=expected["prompt"], length=expected["num_chars"], temperature=0, seed=1)
    assert page.written() == expected["prompt"] + expected["greedy"]


# --- the page


def test_a_typed_prompt_is_continued_stopped_and_continued(show: Show, root: Path) -> None:
    page = show("large")
    page.complaints()
    page.type("prompt", "ROMEO: what light\n")
    page.fill(length=20_000, seed=5)
    page.click("#write")
    first = len(page.wait(WRITTEN))
    page.wait(f"{WRITTEN}.length > {first}")
    assert page.text("write") == "Stop"
    page.click("#write")
    page.wait(IDLE)
    stopped = len(page.text("written"))
    assert first < stopped < 20_000
    page.fill(length=30)
    page.click("#continue")
    page.wait(f"{IDLE} && {WRITTEN}.length === {stopped + 30}")
    model = Transformer.from_pretrained(root / "large")
    expected = model.write("ROMEO: what light\n", stopped + 30, temperature=0.8, seed=5)
    assert page.text("written") == expected, "a seed writes what it writes in Python"
    assert re.match(r"30 characters, \d+ a second", page.text("status"))
    assert page.complaints() == [], "the policy of the page forbids nothing that it does"


def test_keys_write_and_stop(show: Show, root: Path) -> None:
    control, enter, escape = "\ue009", "\ue007", "\ue00c"
    page = show("large", length=20_000, seed=1)
    page.wait(WRITTEN)
    page.type("prompt", escape)
    page.wait(IDLE)
    page.type("prompt", "light" + control + enter + enter + control)  # the second while the first one's text is written
    page.wait(f"!({IDLE}) && {WRITTEN}")
    page.type("prompt", escape)
    written = page.written().removeprefix("light")
    expected = Transformer.from_pretrained(root / "large").write("light", len(written), temperature=0.8, seed=1)
    assert written == expected, "and nothing of the text before"


def test_a_shared_link_writes_the_same_text(show: Show) -> None:
    page = show("grouped_heads")
    page.type("prompt", "to be, & #\n")
    page.fill(length=60, temperature=1.5, top_p=0.9, seed=77)
    page.click("#write")
    text = page.written()
    page.click("#share")
    page.open(page.run("return document.getElementById('link').value"))
    page.wait(WRITTEN)
    assert page.written() == text and len(text) == len("to be, & #\n") + 60


def test_unknown_characters_are_marked_and_left_out(show: Show) -> None:
    page = show("grouped_heads", prompt="b→e", length=40, temperature=0)
    page.wait(IDLE)
    assert "never saw → (U+2192)." in page.text("unknown")
    marked = "return [...document.querySelectorAll('#prompted mark')].map((mark) => mark.textContent)"
    assert page.run(marked) == ["→"]
    assert page.text("written") == expected_of("grouped_heads")["greedy"], "as after `be`"
    show("grouped_heads", prompt="be\u0301", length=1)
    assert page.written().startswith("bé") and page.run(marked) == [], "é in two pieces, as some systems type it"


def test_colours_show_how_much_every_character_surprises(show: Show, root: Path) -> None:
    page = show("large", prompt="what light", length=30, seed=2)
    plain, count = page.written(), "return document.querySelectorAll('#text span span').length"
    assert page.run(count) == 0
    page.click("#colours")
    page.wait("document.querySelectorAll('#prompted span').length")
    facts = "[span.textContent, +span.style.getPropertyValue('--surprise'), getComputedStyle(span).backgroundColor]"
    shown = page.run(f"return [...document.querySelectorAll('#text span span')].map((span) => {facts})")
    characters, levels, colours = zip(*shown, strict=True)
    assert "".join(characters) == plain and len(set(colours)) > 5
    model = Transformer.from_pretrained(root / "large")
    prompt, written = (torch.tensor([[model.vocab[c] for c in part]]) for part in (plain[:10], plain[10:]))
    for source, target, told in ((prompt[:, :0], prompt, levels[:10]), (prompt, written, levels[10:])):
        logits = model(source, target)[0]
        logits[:, model.start_id] = -torch.inf
        bits = -logits.log_softmax(dim=1).gather(1, target[0][:, None])[:, 0] / torch.tensor(2.0).log()
        torch.testing.assert_close(torch.tensor(told), (bits / 8).clamp(max=1), atol=1e-3, rtol=0)
    page.click("#colours")
    assert page.written() == plain and page.run(count) == 0


def test_examples_are_what_the_model_begins_with(show: Show) -> None:
    page = show("large")
    page.wait("document.querySelector('#examples button')")
    place = "document.getElementById('examples').hidden = arguments[0];"
    place += "return document.getElementById('write').getBoundingClientRect().top + scrollY"
    assert page.run(place, True) == page.run(place, False), "nobody clicks beside a button because the examples came"
    example = page.run("return document.querySelector('#examples button').textContent")
    page.click("#examples button")
    assert page.written().startswith(example) and len(example) > 2


def in_bytes(path: Path) -> None:
    """Make the weights int8."""
    save_file({name: weight.to(torch.int8) for name, weight in load_file(path).items()}, path)


def without_shares(path: Path) -> None:
    """Take a tensor away."""
    save_file({name: weight for name, weight in load_file(path).items() if name != "embedding.shares"}, path)


MISFIT = "does not fit config.json: embedding.shares is missing, not 4 x 16. Take both from one model"
WEIGHTS, POINTER = "model.safetensors", "version https://git-lfs.github.com/spec/v1\n"


@pytest.mark.parametrize(
    ("name", "harm", "sentence"),
    [
        (WEIGHTS, Path.unlink, r"is not there \(status 404\)\. Put it into one folder with this page"),
        (WEIGHTS, lambda path: path.write_text(POINTER), "is only a pointer of Git LFS. Run `git lfs pull`"),
        (WEIGHTS, lambda path: path.write_bytes(b"PK" * 99), "is not a safetensors file"),
        (WEIGHTS, lambda path: path.write_bytes(path.read_bytes()[:-9]), "is cut off or damaged at"),
        (WEIGHTS, in_bytes, "is in I8. This page reads F32, BF16, F16"),
        (WEIGHTS, without_shares, MISFIT),
        ("config.json", lambda path: path.write_text("{"), "is not JSON. Take that of the published model"),
        ("config.json", lambda path: path.write_text('{"model_type": "gpt2"}'), "is not that of such a model"),
        ("vocab.json", lambda path: path.write_text('{"a": 0}'), "does not fit config.json. Take both"),
    ],
    ids=["absent", "pointer", "garbage", "cut", "format", "tensor", "no JSON", "another model", "vocabulary"],
)
def test_what_is_wrong_with_a_file_is_said_in_a_sentence(
    show: Show, root: Path, tmp_path: Path, name: str, harm: Callable[[Path], object], sentence: str
) -> None:
    site = shutil.copytree(root / "multi_head", root / tmp_path.name)
    harm(site / name)
    page = show(site.name)
    assert re.match(f"{re.escape(name)} {sentence}", page.text("status"))
    assert page.run("const write = document.getElementById('write'); return write.disabled && write.textContent")


def test_a_page_that_is_opened_as_a_file_says_what_to_do(browser: Browser) -> None:
    browser.open((PAGE / "index.html").as_uri())
    browser.wait("document.getElementById('status').className === 'bad'")
    assert "Run `python -m http.server` in its folder" in browser.text("status")


def test_it_fits_a_phone_and_says_what_its_fields_are(show: Show, browser: Browser) -> None:
    screen = {"width": 320, "height": 640, "deviceScaleFactor": 1, "mobile": True}
    browser.ask("POST", "/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=screen)
    show("large", prompt="what light" * 20, length=100).wait(IDLE)
    assert browser.run("return document.documentElement.scrollWidth") == 320
    browser.ask("POST", "/goog/cdp/execute", cmd="Emulation.clearDeviceMetricsOverride", params={})
    unnamed = "[...document.querySelectorAll('input, textarea')].filter((field) => !field.labels.length).length"
    assert browser.run(f"return {unnamed}") == 0


def test_it_asks_no_other_server_and_keeps_nothing(show: Show, address: str) -> None:
    page = show("large")
    page.wait("!document.getElementById('examples').hidden")
    names = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert names and all(name.startswith(address) for name in names)
    assert page.run("return document.cookie + localStorage.length + sessionStorage.length") == "00"


def test_the_policy_of_the_page_is_strict_and_names_its_style() -> None:
    page = (PAGE / "index.html").read_text(encoding="utf-8")
    style = re.search("<style>(.*)</style>", page, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}';" in page, "write this one there"
    assert "default-src 'none'; script-src 'self';" in page and "unsafe" not in page


def test_it_can_be_read() -> None:
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in PAGE.iterdir()) < 600


# --- --mode demo


def test_the_mode_serves_the_page_until_it_is_interrupted(trained: Trainee, browser: Browser, tmp_path: Path) -> None:
    process = trained.start("--mode", "demo", TMPDIR=str(tmp_path))
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address) and list(tmp_path.iterdir())
    browser.open(address + "#" + urlencode({"prompt": "ALL", "length": 20, "temperature": 0}))
    browser.wait(f"{IDLE} && {WRITTEN}")
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.code == ExitCode.INTERRUPTED and "Ctrl-C ends it." in done.log
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    written = trained.run("--mode", "generate", "--prompt", "ALL", "--num_chars", "20", "--temperature", "0").out
    assert browser.written() == written.removesuffix("\n")


def test_the_mode_needs_no_browser_but_a_model(trained: Trainee, user: Trainee, tmp_path: Path) -> None:
    process = trained.start("--mode", "demo", TMPDIR=str(tmp_path))
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    for name in ("", "demo.js", "model.safetensors", "config.json", "vocab.json"):
        with urllib.request.urlopen(address + name) as answer:
            assert answer.read()
    with pytest.raises(ConnectionRefusedError):  # at another address of this machine, as at those that others reach
        socket.create_connection(("127.0.0.2", int(address[:-1].rpartition(":")[2])))
    process.terminate()
    assert finish(process).code == ExitCode.TERMINATED
    see(user.run("--mode", "demo"), ExitCode.NO_INPUT, "train a model first")
