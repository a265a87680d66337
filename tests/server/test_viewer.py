"""The viewer, in a browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import PROGRAM, Page, browser
from tests.live import served, wait_until
from ugicm.server.cache import bitstream_id

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no chromium")

SET = """(id, value) => {
    const control = document.getElementById(id);
    control.value = value;
    control.dispatchEvent(new Event("input"));
    control.dispatchEvent(new Event("change"));
}"""
SHOWN = "$('message').textContent.startsWith('Drag')"
FAILED = "$('message').className === 'error'"


@pytest.fixture(scope="module")
def browser_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("browser")) as page:
        page.resize(1200, 800)
        yield page


@pytest.fixture
def page(browser_page: Page, make_app: Any) -> Iterator[Page]:
    """The viewer of a service that asks for a key, which it has been told."""
    with served(make_app(warm_up=False, api_keys="secret-key")) as port:
        browser_page.open(f"http://127.0.0.1:{port}/")
        browser_page.until(f"{FAILED} && !$('key-label').hidden")
        browser_page.run(f"({SET})('key', 'secret-key')")
        browser_page.until("$('model').textContent.startsWith('fake')")
        yield browser_page


@pytest.fixture
def photo(tmp_path: Path, image_file: Any) -> Callable[..., Path]:
    """``photo(name, width, height)``: a picture's file."""

    def make(name: str = "photo.png", width: int = 60, height: int = 40) -> Path:
        path = tmp_path / name
        path.write_bytes(image_file(width, height))
        return path

    return make


def test_both_views_are_shown_and_can_be_saved(
    page: Page, photo: Callable[..., Path], tmp_path: Path
) -> None:
    page.choose("#file", photo())
    page.until(SHOWN)
    assert "60 \u00d7 40" in page.run("$('facts').innerText")
    assert page.run("$('human').naturalWidth") == page.run("$('machine').naturalWidth") == 60
    page.run(f"({SET})('strength', 0.5)")
    page.until("$('message').textContent.endsWith('0.50.')")
    page.command("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.run("[...$('facts').querySelectorAll('button')].forEach((button) => button.click())")
    id = page.run("state.result.id")[:8]
    names = (f"{id}.ugic", f"{id}-human.png", f"{id}-0.50.png")
    wait_until(lambda: all((tmp_path / name).is_file() for name in names))
    assert (tmp_path / names[0]).read_bytes().startswith(b"\x89UGIC")
    assert (tmp_path / names[1]).read_bytes() != (tmp_path / names[2]).read_bytes()


def test_what_failed_can_be_tried_again(page: Page, photo: Callable[..., Path], codec: Any) -> None:
    codec.fail = RuntimeError("broken")
    page.choose("#file", photo())
    page.until(f"{FAILED} && !$('again').hidden")
    codec.fail = None
    page.run("$('again').click()")
    page.until(SHOWN)
    assert page.run("$('again').hidden")


def test_what_is_no_picture_is_not_tried_again(page: Page, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    page.choose("#file", tmp_path / "text.png")
    page.until(FAILED)
    assert page.run("$('message').textContent").startswith("text.png is not a picture")
    assert page.run("$('again').hidden && $('stage').hidden")


def test_the_last_photo_is_the_one_that_is_shown(page: Page, photo: Callable[..., Path], codec: Any) -> None:
    codec.gate.clear()
    page.choose("#file", photo("first.png"))
    wait_until(lambda: codec.count("analyse") == 1)
    page.choose("#file", photo("last.png", 30, 20))
    page.until("state.file.name === 'last.png'")
    codec.gate.set()
    page.until(SHOWN)
    assert "30 \u00d7 20" in page.run("$('facts').innerText")
    assert page.run("$('human').naturalWidth") == 30


def test_a_photo_can_be_pasted(page: Page) -> None:
    page.run("""(async () => {
        const canvas = new OffscreenCanvas(20, 10);
        canvas.getContext("2d");
        const data = new DataTransfer();
        data.items.add(new File([await canvas.convertToBlob()], "pasted.png", { type: "image/png" }));
        document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true }));
    })()""")
    page.until(SHOWN)
    assert page.run("$('file').files[0].name") == "pasted.png"


def test_a_tall_photo_fits_the_window(page: Page, photo: Callable[..., Path]) -> None:
    page.choose("#file", photo(width=100, height=200))
    page.until(SHOWN)
    assert page.run("$('frame').getBoundingClientRect().height <= innerHeight")
    page.run("$('actual').click()")
    assert page.run("$('frame').getBoundingClientRect().width") == 100


def test_the_shown_bitstream_is_saved_while_another_is_made(
    page: Page, photo: Callable[..., Path], codec: Any, tmp_path: Path
) -> None:
    page.choose("#file", photo())
    page.until(SHOWN)
    id = page.run("state.result.id")
    page.command("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    codec.gate.clear()
    page.run(f"({SET})('quality', 20)")
    page.run("$('facts').querySelector('button').click()")
    saved = tmp_path / f"{id[:8]}.ugic"
    page.until(f"{FAILED} || performance.getEntriesByType('resource').some((e) => e.name.endsWith('{id}'))")
    codec.gate.set()
    page.until(SHOWN)
    assert page.run("state.result.id") != id
    wait_until(saved.is_file)
    assert bitstream_id(saved.read_bytes()) == id


def test_a_bitstream_that_is_gone_is_made_again(page: Page, photo: Callable[..., Path], codec: Any) -> None:
    page.choose("#file", photo())
    page.until(SHOWN)
    page.run("request(`bitstreams/${state.result.id}`, { method: 'DELETE' }).then(() => null)")
    page.run("$('facts').querySelector('button').click()")
    wait_until(lambda: codec.count("analyse") == 2)
    page.until(SHOWN)
    assert page.run("request(`bitstreams/${state.result.id}`).then(({ status }) => status)") == 200


def test_what_the_server_dropped_before_it_was_shown_can_be_tried_again(
    page: Page, photo: Callable[..., Path]
) -> None:
    page.run("""{
        const fetch = window.fetch;
        window.fetch = async (path, options) => {
            if (!path.includes("/image")) return fetch(path, options);
            window.fetch = fetch;
            return new Response('{"detail": "dropped"}', { status: 404 });
        };
    }""")
    page.choose("#file", photo())
    page.until(f"{FAILED} && !$('again').hidden")
    page.run("$('again').click()")
    page.until(SHOWN)
