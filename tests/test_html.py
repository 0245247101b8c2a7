"""The page writes what the model writes: its engine in Node, and the page itself in a browser."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_gguf import AWKWARD, BYTE_LEVEL, SHAPES, SMALL, changed, make_net, with_parts

from ant5m.cli import call
from ant5m.data.tokenizer import Tokenizer, train_tokenizer
from ant5m.errors import UserError
from ant5m.export.card import ModelCard
from ant5m.export.html import export_html
from ant5m.export.huggingface import export
from ant5m.model.config import PRESETS
from ant5m.model.generation import Sampling, find_loops, generate, process

NODE = shutil.which("node") or shutil.which("nodejs")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
LOOPING = ["the ant " * 20, "one two three four five six seven eight nine ten eleven", "a\n" * 30, ""]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([path.read_text() for path in Path(__file__).parent.glob("test_c*.py")], 600)


def ask(page: Path, ids: list[int], texts: list[str] = AWKWARD) -> dict:
    questions = page.with_suffix(".json")
    questions.write_text(json.dumps({"texts": texts, "ids": ids, "loops": LOOPING}))
    command = [NODE, str(Path(__file__).with_name("page.js")), str(page), str(questions)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, timeout=120).stdout)


@pytest.mark.skipif(NODE is None, reason="needs Node")
@pytest.mark.parametrize("name", [*SHAPES, "ant-5m"])
def test_in_node_everything_is_as_in_python(name, tokenizer, tmp_path):
    config = SHAPES[name] if name in SHAPES else PRESETS[name]
    net = make_net(changed(config, initializer_range=0.1, max_position_embeddings=96))
    export_html(net, tokenizer, tmp_path / "page.html", name, "f32")
    ids = tokenizer.encode(AWKWARD[1])
    answer = ask(tmp_path / "page.html", ids)
    assert answer["encoded"] == [tokenizer.encode(text) for text in AWKWARD]
    assert answer["decoded"] == AWKWARD
    with torch.inference_mode():
        ours = net(torch.tensor([ids]))[0]
    assert (torch.tensor(answer["logits"]) - ours).abs().max() < 1e-3
    written: list[int] = []
    (text,) = generate(
        net, tokenizer, [AWKWARD[1]], 200, temperature=0, on_token=lambda _, one: written.append(one)
    )
    assert answer["written"] == written and answer["text"] == text
    assert answer["loops"] == [find_loops(text).looping for text in LOOPING]


@pytest.mark.skipif(NODE is None, reason="needs Node")
def test_sampling_has_our_definitions(tokenizer, tmp_path):
    export_html(make_net(SMALL), tokenizer, tmp_path / "page.html", "small")
    counts = ask(tmp_path / "page.html", [5])["counts"]
    seen = torch.tensor([[False, True, False, False, False]])
    scores = process(torch.tensor([[1.0, 2, 0, -1, 2]]), seen, Sampling(0.7, 0, 0.9, 1.3))
    expected = scores.softmax(-1)[0]
    assert sum(counts.values()) == pytest.approx(1)
    for token, probability in enumerate(expected.tolist()):
        assert counts.get(str(token), 0) == pytest.approx(probability, abs=1e-3)


@pytest.mark.skipif(NODE is None, reason="needs Node")
@pytest.mark.parametrize("type, limit", [("int8", 2e-3), ("f16", 1e-5)])
def test_small_numbers_are_close(type, limit, tokenizer, tmp_path):
    net = make_net(changed(initializer_range=0.08))
    export_html(net, tokenizer, tmp_path / "page.html", "small", type)
    ids = tokenizer.encode(AWKWARD[0])
    # In double precision: so small a divergence drowns in the rounding of fp32, and came out below 0.
    theirs = torch.tensor(ask(tmp_path / "page.html", ids)["logits"], dtype=torch.float64).log_softmax(-1)
    with torch.inference_mode():
        ours = net(torch.tensor([ids]))[0].double().log_softmax(-1)
    divergence = (ours.exp() * (ours - theirs)).sum(-1).mean()
    assert 0 < divergence < limit


@pytest.mark.skipif(NODE is None, reason="needs Node")
def test_other_tokenizers(tokenizer, tmp_path):
    gpt2 = with_parts(tokenizer, pre_tokenizer=BYTE_LEVEL)
    gpt2.backend.add_tokens(["</script>", "<b>"])
    gpt2 = Tokenizer(gpt2.backend)
    texts = [*AWKWARD, "a </script><b><b>\n"]
    export_html(make_net(changed(vocab_size=602)), gpt2, tmp_path / "page.html", "<b>&")
    answer = ask(tmp_path / "page.html", [5], texts)
    assert answer["encoded"] == [gpt2.encode(text) for text in texts]
    assert answer["decoded"] == texts
    foreign = with_parts(tokenizer, normalizer={"type": "NFC"})
    with pytest.raises(UserError, match="its normalizer NFC"):
        export_html(make_net(SMALL), foreign, tmp_path / "other.html", "other")
    assert not (tmp_path / "other.html").exists()


def test_a_large_model_gets_a_warning(tokenizer, tmp_path):
    net = make_net(SMALL)
    net.large = torch.nn.Parameter(torch.empty(50_000_000, device="meta"))
    net.state_dict = dict
    with pytest.warns(UserWarning, match=r"about 67 MB and slow"):
        export_html(net, tokenizer, tmp_path / "page.html", "large")


def test_the_command(tokenizer, tmp_path, capsys):
    export(make_net(SMALL), tokenizer, tmp_path / "model", ModelCard("test"))
    out = tmp_path / "ants.html"
    assert call(["export", str(tmp_path / "model"), str(out), "--format", "html"]) == 0
    assert f"wrote {out} (0.2 MB)" in capsys.readouterr().out
    assert call(["export", str(tmp_path / "model"), str(out), "--format", "html"]) == 2
    assert call(["export", str(tmp_path / "model"), "x", "--format", "html", "--type", "q8_0"]) == 2


@pytest.mark.skipif(NODE is None or CHROMIUM is None, reason="needs Node and Chromium")
def test_qk_norm_has_the_logits_of_transformers_in_node_and_in_a_browser(tokenizer, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    transformers = pytest.importorskip("transformers")
    net = make_net(changed(SHAPES["QK-norm"], initializer_range=0.1))
    export_html(net, tokenizer, tmp_path / "page.html", "qwen3", "f32")
    export(net, tokenizer, tmp_path / "hf", ModelCard("test"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.config.model_type == "qwen3"
    ids = tokenizer.encode(AWKWARD[1])
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0].float()
    assert (torch.tensor(ask(tmp_path / "page.html", ids)["logits"]) - expected).abs().max() < 1e-3
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto((tmp_path / "page.html").as_uri())
        page.evaluate("model.length = 0")
        read = "(ids) => ids.map((id) => { model.read(id); return [...model.logits]; })"
        logits = torch.tensor(page.evaluate(read, ids))
        browser.close()
    assert (logits - expected).abs().max() < 1e-3


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_a_browser_it_writes_as_one_types_and_asks_nobody(tokenizer, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    hostile = Tokenizer(with_parts(tokenizer).backend)
    hostile.backend.add_tokens(["</script><img src=x onerror=alert(1)>"])
    hostile = Tokenizer(hostile.backend)
    page_file = tmp_path / "page.html"
    export_html(make_net(changed(vocab_size=601)), hostile, page_file, "<script>alert(1)</script>")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        complaints, requests = [], []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(page_file.as_uri())
        assert page.locator("h1").text_content() == "<script>alert(1)</script>"
        playwright.expect(page.locator("#next button")).to_have_count(10)
        page.get_by_label("Tokens").fill("20")
        page.get_by_label("Prompt").fill("the ant")
        playwright.expect(page.locator("#status")).to_contain_text("tokens/s. It stopped because")
        assert page.locator("#given").text_content() == "the ant"
        assert len(page.locator("#written").text_content()) > 20
        page.locator("#next button:enabled").first.click()
        assert len(page.get_by_label("Prompt").input_value()) > 20
        first = page.locator("#next button:enabled").first
        first.focus()
        page.keyboard.press("Enter")  # the keyboard stays where it is, though the buttons are new ones
        playwright.expect(page.locator("#next button:enabled").first).to_be_focused()
        page.get_by_label("Tokens").fill("90")
        page.get_by_label("Prompt").fill("the ant " * 100)  # longer than the context: nothing goes on
        playwright.expect(page.locator("#status")).to_contain_text("The prompt is too long")
        assert page.get_by_role("button", name="Stop").is_disabled()
        page.get_by_label("Prompt").fill("the ant")
        page.get_by_label("Temperature").fill("0")
        page.get_by_role("button", name="Write", exact=True).click()
        playwright.expect(page.locator("#status")).to_contain_text("It stopped because")
        browser.close()
    assert complaints == [] and requests == [page_file.as_uri()]
