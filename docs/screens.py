"""Pictures of every tab of the page, at the width of a desk and of a phone, light and dark.

    python docs/screens.py FOLDER        # `make screens` writes to build/screens

Needs Chromium and Playwright. Makes a few small videos of `kinora-tiny` first, a minute's work.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

WIDTHS = {"desk": (1280, 900), "phone": (390, 844)}
PROMPT = "a red circle moving left over a black background"
SMALL = {"width": 96, "height": 96, "frames": 17, "steps": 12}
WAIT_MS = 240_000


def main(folder: Path) -> None:
    """Write TAB-WIDTH-SCHEME.png for each of them."""
    folder.mkdir(parents=True, exist_ok=True)
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as play:
        command = [sys.executable, "-m", "kinora.app", "ui", "--port", "0"]
        with subprocess.Popen(
            [*command, "--output", f"{scratch}/outputs"], stdout=subprocess.PIPE, text=True
        ) as server:
            assert server.stdout is not None
            address = server.stdout.readline().split()[0]
            browser = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
            try:
                for scheme in ("light", "dark"):
                    for width, size in WIDTHS.items():
                        viewport: Any = {"width": size[0], "height": size[1]}
                        tab = browser.new_page(viewport=viewport, color_scheme=scheme)
                        tab.goto(address)
                        shoot(tab, folder, f"{width}-{scheme}")
                        tab.close()
            finally:
                browser.close()
                server.kill()


def shoot(tab: Any, folder: Path, name: str) -> None:
    """All tabs of a page at work, each whole."""

    def picture(what: str) -> None:
        tab.wait_for_timeout(400)  # for what fades in
        tab.screenshot(path=str(folder / f"{what}-{name}.png"), full_page=True)

    def show(what: str) -> None:
        tab.click(f"#k-tabs button[data-tab-id={what}]")

    tab.wait_for_function("document.querySelector('#k-prediction')?.innerText.includes('tokens')")
    picture("start")
    tab.fill("#k-prompt textarea", PROMPT)
    for field, value in SMALL.items():
        tab.fill(f"#k-{field} input", str(value))
        tab.press(f"#k-{field} input", "Tab")
    tab.click("#k-generate")
    tab.wait_for_selector("#k-status [data-phase=running] progress[value]", timeout=WAIT_MS)
    picture("running")
    tab.wait_for_selector("#k-status [data-phase=done]", state="attached", timeout=WAIT_MS)
    picture("done")
    tab.fill("#k-frames input", "16")
    tab.press("#k-frames input", "Tab")
    tab.click("#k-generate")
    tab.wait_for_selector("#k-status [data-phase=failed]", timeout=WAIT_MS)
    picture("mistake")
    tab.fill("#k-frames input", "17")
    tab.press("#k-frames input", "Tab")
    show("compare")
    tab.click("#k-compare-start")
    tab.wait_for_selector("#k-compared .k-figures", timeout=WAIT_MS)
    tab.wait_for_timeout(1000)
    picture("compare")
    show("gallery")
    tab.wait_for_selector("#k-gallery .k-card")
    tab.wait_for_function(
        "[...document.querySelectorAll('#k-gallery img')].slice(0, 4).every(it => it.naturalWidth)"
    )
    picture("gallery")
    tab.click("#k-gallery .k-card")
    tab.wait_for_selector("#k-opened .k-times")
    picture("opened")
    show("evaluate")
    tab.wait_for_selector("#k-choices .k-card")
    for box in tab.locator("#k-choices input").all()[:4]:
        box.check()
    tab.click("#k-evaluate")
    tab.wait_for_selector("#k-evaluated .k-figures", timeout=WAIT_MS)
    tab.click("#k-evaluated summary")
    picture("evaluate")
    show("jobs")
    tab.wait_for_selector("#k-jobs li")
    picture("jobs")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
