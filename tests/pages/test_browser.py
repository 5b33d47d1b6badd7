"""The pages in a real browser, where one is installed: no error, no request, sorting and filtering at work."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from made import run

from psc_lightning.pages.jobs import find_jobs
from psc_lightning.pages.pareto import write_pareto

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome is installed")


def rendered(page: Path, profile: Path, fragment: str = "") -> tuple[str, str]:
    """The document as the browser has it after its scripts, and what was logged on its console."""
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += [
        "--enable-logging=stderr",
        "--v=0",
        "--virtual-time-budget=3000",
        "--dump-dom",
        page.as_uri() + fragment,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def shown(dom: str) -> list[str]:
    """The names of the rows that are not hidden, in their order."""
    rows = re.findall(r'<tr id="j(\d+)" class="[^"]*"( hidden="")?>', dom)
    return [number for number, hidden in rows if not hidden]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    for index, size in enumerate((300, 100, None, 200)):
        status = "failed" if size is None else "completed"
        run(
            tmp_path / "sweep" / str(index),
            f"t={index}",
            "name=<b>",
            size=size,
            status=status,
            accuracy=0.9 + index / 100,
        )
    write_pareto(find_jobs([tmp_path / "sweep"]), tmp_path / "sweep")
    return tmp_path / "sweep/pareto.html"


@needs_browser
def test_it_sorts_and_filters_without_an_error(page: Path, tmp_path: Path) -> None:
    dom, console = rendered(page, tmp_path / "profile")
    assert console == ""
    assert shown(dom) == ["0", "1", "2", "3"]
    assert dom.count('role="link"') == 2 * 3  # three marks, in a wide and in a narrow picture
    assert 'aria-label="t=1: 100 bytes, 100.0 times smaller, accuracy 0.91, −4.00 to dense"' in dom
    dom, console = rendered(page, tmp_path / "profile", "#sort=bytes")
    assert (shown(dom), console) == (["1", "3", "0", "2"], "")  # what has no size comes last
    assert 'aria-sort="ascending"' in dom
    dom, console = rendered(page, tmp_path / "profile", "#filter=T%3D3+completed")
    assert (shown(dom), console) == (["3"], "")
    assert '<span id="shown">1</span>' in dom
    assert dom.count('class="faded"') == 2 * 2


CLICKS = """
const clipboard = { writeText: async (text) => { document.body.dataset.copied = text; } };
Object.defineProperty(navigator, "clipboard", { value: clipboard });
document.querySelector("#j1 button.copy").click();
const mark = document.querySelector("#all-wide-front use[aria-label]");
mark.dispatchEvent(new MouseEvent("mouseenter"));
document.body.dataset.tip = document.getElementById("tip").innerText;
mark.dispatchEvent(new PointerEvent("click", { bubbles: true, pointerType: "touch" }));
document.body.dataset.link = document.querySelector("#tip a").getAttribute("href");
"""


@needs_browser
def test_a_mark_says_what_it_is_and_a_command_is_copied(page: Path, tmp_path: Path) -> None:
    clicked = page.with_name("clicked.html")
    clicked.write_text(page.read_text().replace("</body>", f"<script>{CLICKS}</script></body>"))
    dom, console = rendered(clicked, tmp_path / "profile")
    assert console == ""
    body = html.unescape(re.search("<body[^>]*>", dom)[0])  # type: ignore[index]
    assert "data-copied=\"python train.py t=1 'name=<b>'\"" in body
    assert 'data-tip="t=1\n100 bytes, 100.0 times smaller, accuracy 0.91, −4.00 to dense"' in body
    assert 'data-link="1/report.json"' in body


@needs_browser
def test_a_mark_beyond_the_axes_is_not_to_be_reached(tmp_path: Path) -> None:
    for index, accuracy in enumerate((0.5, 0.94, 0.95)):
        run(tmp_path / "sweep" / str(index), f"t={index}", size=100 + index, accuracy=accuracy)
    write_pareto(find_jobs([tmp_path / "sweep"]), tmp_path / "sweep")
    dom, console = rendered(tmp_path / "sweep/pareto.html", tmp_path / "profile")
    assert console == ""
    assert "near dense</button>" in dom
    assert dom.count('role="link"') == 2 * 3 + 2 * 2


@needs_browser
def test_an_error_on_the_console_would_be_seen(page: Path, tmp_path: Path) -> None:
    broken = page.with_name("broken.html")
    broken.write_text(page.read_text().replace('"use strict";', '"use strict"; nothing();'))
    assert "nothing is not defined" in rendered(broken, tmp_path / "profile")[1]
