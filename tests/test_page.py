"""Tests of the page of sample.py --html, in Debian's chromium: python -m pytest -m browser."""

import math
import shutil

import pytest
import torch

from model import ModelConfig, ParallelEncoderDecoder
from prepare_shakespeare import Tokenizer
from view import page, see, show

CHARACTERS = "abcdefghijklmnopqrstuvwxyz ,.\n"
FIELDS = dict(
    block_size=32, vocab_size=len(CHARACTERS), n_layer=2, n_head=2, n_embd=16, n_expert=16,
    lateral=True, decoder_self_attention=False, shared_kv=True, position_embedding="rotary",
    router_input="encoder",
)  # fmt: skip
TEXT = "the quick brown fox,\njumps over the lazy dog. and again, and again."
SIZES = [(390, 844), (1280, 800)]

needs_chromium = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="no chromium and chromedriver on PATH: apt-get install chromium chromium-driver",
)
pytestmark = [pytest.mark.browser, needs_chromium]

# What is drawn under each text, by the alpha of all that lies below it; and the least contrast.
LEAST_CONTRAST = """
const parse = c => {
  const n = c.match(/[\\d.]+/g).map(Number);
  const rgb = c.startsWith("color(") ? n.slice(0, 3).map(x => 255 * x) : n.slice(0, 3);
  return [...rgb, n.length > 3 ? n[3] : 1];
};
const over = (a, b) => [0, 1, 2].map(i => a[3] * a[i] + (1 - a[3]) * b[i]).concat(1);
const below = e => {
  if (!e) return [255, 255, 255, 1];
  const own = parse(getComputedStyle(e).backgroundColor);
  return own[3] === 1 ? own : over(own, below(e.parentElement));
};
const luminance = c => [0.2126, 0.7152, 0.0722].reduce((sum, w, i) => {
  const x = c[i] / 255;
  return sum + w * (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
}, 0);
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const e = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !e.getClientRects().length) continue;
  const ground = below(e), text = over(parse(getComputedStyle(e).color), ground);
  const [a, b] = [luminance(text), luminance(ground)].sort((x, y) => y - x);
  const where = `${e.tagName}.${e.className}: ${e.textContent.slice(0, 20)}`;
  found.push([(a + 0.05) / (b + 0.05), where]);
}
return found.sort((a, b) => a[0] - b[0])[0];
"""


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with webdriver.Chrome(options=options, service=service) as browser:
        yield browser


def made(kind):
    """A model, by what its page must make sense of."""
    torch.manual_seed(0)
    fields = FIELDS | {"no experts": dict(n_expert=0), "GPT": dict(arch="decoder_only")}.get(
        kind, {}
    )
    model = ParallelEncoderDecoder(ModelConfig(**fields)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if kind in ("varied", "GPT", "no experts"):
                p.add_(0.3 * torch.randn_like(p))
            elif kind == "all on" and "router" in name:
                p.zero_()  # so that m is 1
    return model


KINDS = ("varied", "as initialised", "all on", "no experts", "GPT")


@pytest.fixture(scope="module", params=KINDS)
def opened(request, browser, tmp_path_factory):
    """A model, and its page opened: (kind, model, what is seen)."""
    model, tokenizer = made(request.param), Tokenizer("char", CHARACTERS)
    seen = see(model, tokenizer, torch.tensor([tokenizer.encode(TEXT)]))
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(page([seen]), encoding="utf-8")
    browser.get(path.as_uri())
    assert not browser.get_log("browser")
    return request.param, model, seen


def masks_of(model, tokenizer):
    """m of each token, (T, L, stacks, G), by the window in which generation reads it."""
    ids, T, found = torch.tensor([tokenizer.encode(TEXT)]), model.config.block_size, []
    for end in range(1, ids.size(1) + 1):
        start = 0
        while end - start > T:
            start += T // 2
        found.append(model.expert_masks(ids[:, start:end]).learned[:, :, 0, -1])
    return torch.stack(found)


def test_the_page_stays_under_a_megabyte():
    model, tokenizer = made("varied"), Tokenizer("char", CHARACTERS)
    ids = torch.randint(len(CHARACTERS), (1, 2000), generator=torch.Generator().manual_seed(0))
    assert len(page([see(model, tokenizer, ids)]).encode()) < 1_000_000


def select(browser, value):
    from selenium.webdriver.support.ui import Select

    Select(browser.find_element("id", "by")).select_by_value(value)


def spans(browser):
    return browser.find_elements("css selector", ".token")


def test_one_expert_shades_the_tokens_that_have_it_on(opened, browser):
    kind, model, _ = opened
    options = browser.execute_script("return [...document.querySelectorAll('#by option')]"
                                     ".map(o => [o.value, o.textContent])")  # fmt: skip
    if kind == "no experts":
        assert [value for value, _ in options] == ["loss"]
        return
    m = masks_of(model, Tokenizer("char", CHARACTERS)).flatten(1)  # (T, all experts)
    on = m >= 0.5
    single = [int(value[1:]) for value, _ in options if value[0] == "e"]
    p = on.float().mean(dim=0)
    varies = (p * (1 - p) + 1e-3 * m.var(dim=0, correction=0)).tolist()
    assert sorted(single) == list(range(m.size(1)))
    ordered = [varies[e] for e in single]
    assert all(a >= b - 1e-4 for a, b in zip(ordered, ordered[1:], strict=False))
    for e in (single[0], single[-1]):
        select(browser, f"e{e}")
        shaded = browser.execute_script("return tokens.map(t => t.span.classList.contains('on'))")
        said = browser.find_element("css selector", ".legend").text
        if 0 < p[e] < 1:
            assert shaded == on[:, e].tolist() and f"on at {100 * p[e]:.0f} %" in said
        else:
            assert not any(shaded) and ("on" if p[e] else "off") + " at every token" in said
    if kind == "varied":
        assert 0 < p[single[0]] < 1
        select(browser, f"e{single[0]}")
        grounds = browser.execute_script(
            "return tokens.map(t => getComputedStyle(t.span).backgroundColor)"
        )
        assert len({g for g, x in zip(grounds, on[:, single[0]], strict=True) if x}) == 1
        assert len(set(grounds)) == 2
    select(browser, "all")
    said = browser.find_element("css selector", ".legend").text
    assert ("every token" in said) == bool(on.float().mean(dim=1).unique().numel() == 1)


def shown(browser):
    """What the card says of its token: the grid, and the likeliest next tokens."""
    return browser.execute_script(
        "return [[...document.querySelectorAll('#grid button')].map(b => [+b.dataset.expert, "
        "+b.dataset.m, b.classList.contains('on')]), "
        "[...document.querySelectorAll('#likely tr')].map(r => [...[...r.children].map("
        "c => c.textContent), r.className]), "
        "tokens.findIndex(t => t.span.classList.contains('pinned'))]"
    )


def assert_card(browser, model, seen, k, pinned):
    grid, likely, at = shown(browser)
    assert at == (k if pinned else -1)
    m = masks_of(model, Tokenizer("char", CHARACTERS))[k].flatten() if grid else []
    assert [e for e, *_ in grid] == list(range(len(m)))
    for (_, value, on), true in zip(grid, m, strict=True):
        assert abs(value - true) < 1 / 126 + 1e-6 and on == (true >= 0.5)
    names, expected, after = {" ": "␣", "\n": "↵"}, [*seen.likely[k]], TEXT[k + 1 : k + 2]
    if after and seen.came[k] < 0:  # what came is shown in any case
        expected.append((after, math.exp(-seen.loss[k + 1])))
    for (text, percent, *_), (true, p) in zip(likely, expected, strict=True):
        assert text == names.get(true, true)
        assert math.isclose(float(percent.split()[0]), 100 * p, abs_tol=0.51)
    came = [text for text, *_, name in likely if name == "next"]
    assert came == [names.get(character, character) for character in after]


def test_a_token_is_pinned_by_click_and_by_keyboard(opened, browser):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    kind, model, seen = opened
    if kind != "no experts":
        select(browser, "all")
    tokens = spans(browser)
    assert len(tokens) == len(TEXT)
    tokens[4].click()
    assert_card(browser, model, seen, 4, pinned=True)
    ActionChains(browser).move_to_element(tokens[9]).perform()
    assert_card(browser, model, seen, 4, pinned=True)  # the pointer moves no pin
    tokens[4].click()
    assert_card(browser, model, seen, 4, pinned=False)
    tokens[4].send_keys(Keys.ARROW_RIGHT)
    assert_card(browser, model, seen, 5, pinned=False)
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert_card(browser, model, seen, 5, pinned=True)
    browser.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    assert_card(browser, model, seen, 4, pinned=True)
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert_card(browser, model, seen, 4, pinned=False)
    browser.switch_to.active_element.send_keys(Keys.END)
    assert_card(browser, model, seen, len(TEXT) - 1, pinned=False)
    if kind == "varied":  # a cell of the grid chooses its expert
        cell = browser.find_elements("css selector", "#grid button")[17]
        browser.execute_script("arguments[0].click()", cell)
        assert browser.find_element("id", "by").get_attribute("value") == "e17"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_no_sideways_scroll_and_all_text_legible(opened, browser, size, scheme):
    width, height = size
    how = dict(width=width, height=height, deviceScaleFactor=1, mobile=False)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", how)
    feature = dict(name="prefers-color-scheme", value=scheme)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    values = browser.execute_script(
        "return [...document.querySelectorAll('#by option')].map(o => o.value)"
    )
    single = [value for value in values if value[0] == "e"]
    for value in dict.fromkeys((values[0], *single[:1], values[-1])):
        select(browser, value)
        wide, inner = browser.execute_script(
            "return [document.documentElement.scrollWidth, innerWidth]"
        )
        assert wide <= inner == width
        contrast, where = browser.execute_script(LEAST_CONTRAST)
        assert contrast >= 4.5, where


def test_a_notebook_shows_the_page_inline(browser, tmp_path):
    frame = show(made("varied"), Tokenizer("char", CHARACTERS), TEXT)._repr_html_()
    (tmp_path / "cell.html").write_text(f"<!doctype html><meta charset=utf-8>{frame}", "utf-8")
    browser.get((tmp_path / "cell.html").as_uri())
    browser.switch_to.frame(0)
    assert "".join(span.text for span in spans(browser))[:9] == "the quick"
    browser.switch_to.default_content()
