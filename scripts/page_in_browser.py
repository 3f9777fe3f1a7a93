"""Makes the picture of the page in the documentation; its functions drive the page for the tests, too.

    python scripts/page_in_browser.py --output docs/page.png

Starts `mindiffedit ui`, edits the sample picture in a headless Chromium (Debian, Ubuntu: `apt install chromium`, and
`pip install playwright`), and writes the page at two widths, light and dark.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from PIL import Image  # noqa: E402

from mindiffedit import demo  # noqa: E402
from mindiffedit.images.writing import atomic_path  # noqa: E402

WIDE, NARROW = (1280, 1600), (400, 1600)
"""Width and height of the two screens, in pixels."""

# Nothing is asked of other servers, and no one's profile is used.
_FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
_GAP = 24  # pixels between the two screens
PATIENCE = 120_000  # milliseconds, at most: the first edit compiles the model


def chromium() -> str | None:
    """The path of a Chromium or Chrome that is installed; None without."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


@contextlib.contextmanager
def served(*options: str) -> Iterator[str]:
    """The address of `mindiffedit ui`, from when the page is there to the end of the block."""
    command = [sys.executable, "-m", "mindiffedit", "ui", *options]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        try:
            said = []
            for line in process.stderr:
                said.append(line)
                if address := re.search(r"the page is at (\S+)", line):
                    break
            else:
                raise RuntimeError("the page did not start: " + "".join(said))
            threading.Thread(target=process.stderr.read, daemon=True).start()  # nobody waits for a reader
            yield address[1]
        finally:
            process.terminate()


@contextlib.contextmanager
def browser():
    """A headless browser, by Playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        program = playwright.chromium.launch(executable_path=chromium(), args=_FLAGS)
        try:
            yield program
        finally:
            program.close()


def opened(program, address: str, size: tuple[int, int] = WIDE, colours: str = "light"):
    """The page in a tab of its own, when its buttons work."""
    context = program.new_context(viewport=dict(zip(("width", "height"), size)), color_scheme=colours)
    tab = context.new_page()
    tab.set_default_timeout(PATIENCE)
    tab.goto(address)
    tab.locator("#edit").wait_for()
    return tab


def choose_example(tab) -> None:
    """The first example: its picture and both sentences."""
    tab.locator("table tbody tr").first.click()
    tab.locator("#picture img").wait_for()


def edit(tab) -> None:
    """Press Edit and wait for the result, until the page could begin the next."""
    tab.locator("#edit").click()
    tab.locator("#cancel").wait_for()
    tab.locator("#cancel").wait_for(state="hidden")
    tab.locator("#line", has_text="in the mask").wait_for()
    tab.locator("#edit:enabled").wait_for()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "page.png", help="(default: %(default)s)")
    output = parser.parse_args(argv).output
    with tempfile.TemporaryDirectory() as folder, served() as address, browser() as program:
        tab = opened(program, address)  # the first edit compiles the model, and would say how long that took
        choose_example(tab)
        edit(tab)
        screens = []
        for size, colours in ((WIDE, "light"), (NARROW, "dark")):
            tab = opened(program, address, size, colours)
            choose_example(tab)
            edit(tab)
            tab.mouse.move(0, 0)
            tab.wait_for_timeout(1000)  # until colours and pictures have faded in
            path = Path(folder) / f"{colours}.png"
            tab.screenshot(path=path)
            screens.append(Image.open(path).convert("RGB"))
    sheet = Image.new("RGB", (sum(screen.width for screen in screens) + _GAP, WIDE[1]), "white")
    left = 0
    for screen in screens:
        sheet.paste(screen, (left, 0))
        left += screen.width + _GAP
    with atomic_path(output) as draft:
        sheet.quantize(256, method=Image.Quantize.MEDIANCUT).save(draft, optimize=True)
    print(f"{output}: {sheet.width} x {sheet.height}, {demo.SAMPLE_PROMPTS['target']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
