"""The server's page in a headless Chromium."""

from __future__ import annotations

import base64
import shutil

import pytest
from PIL import Image

from rsnet.inference.classifier import SwitchableClassifier
from tests.helpers import releases
from tests.helpers.releases import CLASSES, SIZES
from tests.helpers.servers import encoded, photo, serving

CHROMIUM = shutil.which("chromium")
HOSTILE = "<img src=x onerror=\"document.title='hacked'\">"
TABLE = {
    64: {"median": 8.0, "p95": 9.0},
    48: {"median": 4.0, "p95": 5.0},
    32: {"median": 2.0, "p95": 3.0},
}

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium; apt has one"),
    pytest.mark.slow,  # a browser takes 6 s of CPU
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Of a release whose every class has a hostile name."""
    accuracy = {str(n): {"top1": 50.0, "top5": 90.0} for n in (*SIZES, "ensemble")}
    accuracy["64"]["top1"] = 60.0
    accuracy["48"]["top1"] = 55.0
    names = [f"{HOSTILE} {name}" for name in (*CLASSES, "hen")]
    folder = tmp_path_factory.mktemp("page") / "release"
    classifier = SwitchableClassifier.load(releases.write(folder, accuracy, classes=names))
    classifier._latencies = TABLE
    with serving(classifier, max_megabytes=0.1) as client:
        client.classifier = classifier
        yield client


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """Has `asked` for these addresses, and said these `errors`."""
    context = browser.new_context(viewport={"width": 360, "height": 740})
    page = context.new_page()
    page.asked, page.errors = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.append(message.text))
    page.goto(str(server.base_url))
    page.get_by_text("8 classes at 64, 48, 32 pixels.").wait_for()
    yield page
    assert page.errors == []
    assert all(url.startswith((str(server.base_url), "blob:")) for url in page.asked)
    context.close()


def _drop(page, name: str, data: bytes) -> None:
    transfer = page.evaluate_handle(
        """([name, data]) => {
            const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, { type: "image/png" }));
            return transfer;
        }""",
        [name, base64.b64encode(data).decode()],
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})


def _rows(page) -> list[list[str]]:
    rows = page.locator("#rows tr").all()
    return [[cell.inner_text().strip() for cell in r.locator("th, td").all()] for r in rows]


def test_a_dropped_image_shows_what_every_size_says(page, server):
    _drop(page, "ant.png", encoded(photo(1)))
    page.get_by_text("ant.png: 3 sizes.").wait_for()
    expected = [server.classifier.classify(photo(1), size)[0] for size in SIZES]
    for row, one, top1 in zip(_rows(page), expected, (60, 55, 50), strict=True):
        size, accuracy, name, confidence, ms = row
        assert size == f"{one.size} × {one.size}"  # noqa: RUF001
        assert accuracy == f"{top1:.1f} %"
        assert name == one.classes[0]
        assert confidence == f"{100 * one.probabilities[0]:.1f} %"
        assert ms == f"{TABLE[one.size]['p95']:g}"  # of a batch, as the budget is
    page.locator("summary").first.click()
    listed = page.locator("#rows tr").first.locator("li").all_inner_texts()
    pairs = zip(expected[0].classes, expected[0].probabilities, strict=True)
    assert listed == [f"{name} {100 * p:.1f} %" for name, p in pairs]


def test_an_image_is_shown_as_it_is_stored_whatever_its_exif_says(page):
    exif = Image.Exif()
    exif[0x0112] = 6  # EXIF's orientation: to be turned by a quarter
    _drop(page, "turned.jpg", encoded(photo(1, 60, 50), "JPEG", exif=exif))
    page.get_by_text("turned.jpg: 3 sizes.").wait_for()
    shown = page.get_by_alt_text("Your image turned.jpg").bounding_box()
    assert shown["width"] / shown["height"] == pytest.approx(60 / 50, rel=0.02)


def test_names_of_others_stay_text(page):
    _drop(page, f"{HOSTILE}.png", encoded(photo(1)))
    page.get_by_text("3 sizes.").wait_for()
    assert HOSTILE in page.locator("#rows").inner_text()
    assert HOSTILE in page.locator("#status").inner_text()
    assert page.locator("img").count() == 1
    assert page.title() == "One network, any resolution"


def test_the_slider_shows_which_size_its_milliseconds_buy(page):
    slider = page.get_by_label("Milliseconds that a batch of 8 may take:")
    chosen, marked = page.locator("#chosen"), page.locator("tr[aria-current]")
    seen = {}
    for value in range(0, 1001, 100):
        slider.fill(str(value))
        ms = float(page.locator("#budget-ms").inner_text().removesuffix(" ms"))
        seen[ms] = (chosen.inner_text(), [row.get_attribute("data-size") for row in marked.all()])
    assert min(seen) == 1.5
    assert max(seen) == 18.0
    for ms, (text, rows) in seen.items():
        size = next((s for s in SIZES if TABLE[s]["p95"] <= ms), None)
        assert text == (f"Size {size} would be chosen." if size else "No size is as fast as that.")
        assert rows == ([str(size)] if size else [])
    assert {text for text, _ in seen.values()} == {
        "No size is as fast as that.",
        *(f"Size {size} would be chosen." for size in SIZES),
    }


@pytest.mark.parametrize(
    ("ms", "text"), [(1234.5, "1230"), (123456, "123000"), (12.345, "12.3"), (0.01234, "0.0123")]
)
def test_milliseconds_have_three_digits(page, ms, text):
    assert page.evaluate("(ms) => milliseconds(ms)", ms) == text


def test_the_keyboard_reaches_the_file_and_the_slider(page):
    reached = []
    for _ in range(2):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert reached == ["file", "budget"]
    page.keyboard.press("ArrowLeft")
    assert page.locator("#budget").input_value() == "999"


def test_a_chosen_file_is_classified_and_a_wrong_one_is_said(page, tmp_path):
    (tmp_path / "bee.png").write_bytes(encoded(photo(2)))
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "large.png").write_bytes(bytes(100_001))
    field = page.get_by_label("Drop an image here, paste it, or choose one")
    field.set_input_files(tmp_path / "bee.png")
    page.get_by_text("bee.png: 3 sizes.").wait_for()
    field.set_input_files(tmp_path / "notes.txt")
    page.get_by_text("notes.txt: this is no image; send JPEG").wait_for()
    assert [row[2:4] for row in _rows(page)] == [["", ""]] * 3  # not those of the image before
    field.set_input_files(tmp_path / "large.png")
    page.get_by_text("The image is too large: 0.1 MB are allowed.").wait_for()
    assert page.get_by_alt_text("Your image large.png").count() == 1
    page.errors.clear()  # the browser's own, of the answer 415


def test_nothing_is_wider_than_a_phone(page):
    _drop(page, "ant.png", encoded(photo(1)))
    page.get_by_text("3 sizes.").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
