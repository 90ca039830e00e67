"""What people do on the page, for tests of it: fill the form in, paint, attach, brush.

Pictures are 32 x 32, so that a CPU paints one at once.
"""

from __future__ import annotations

import base64
import io

from PIL import Image
from playwright.sync_api import Locator, Page, expect

FILL = "(recipe) => import('/app.js').then(({ composer }) => composer.fill(recipe))"
LONG = {"steps": "150", "side": "256"}  # of a picture that nobody waits for


def set_up(page: Page, prompt: str, *, steps: str = "2", side: str = "32", seed: str = "") -> None:
    """Fills the form in, as somebody does who opens the other settings."""
    page.get_by_label("Prompt").fill(prompt)
    if page.locator("#details").is_hidden():
        page.get_by_label("More settings").click()
    for label, value in (("Steps", steps), ("Width", side), ("Height", side), ("Seed", seed)):
        page.get_by_label(label, exact=True).fill(value)


def names(page: Page) -> list[str]:
    """Finished pictures on the page, newest first."""
    items = page.locator("#pictures li")
    return [str(items.nth(k).get_attribute("data-name")) for k in range(items.count())]


def paint(page: Page, prompt: str, **settings: str) -> str:
    """Paints one picture and returns its name."""
    before = names(page)
    set_up(page, prompt, **settings)
    page.get_by_role("button", name="Paint", exact=True).click()
    return finished(page, before)


def finished(page: Page, before: list[str]) -> str:
    expect(page.locator("#pictures li")).to_have_count(len(before) + 1)
    expect(page.locator(".job")).to_have_count(0)
    (new,) = set(names(page)) - set(before)
    return new


def png(side: int = 32, colour: tuple[int, int, int] = (200, 60, 30)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(out, "PNG")
    return out.getvalue()


def attach(page: Page, data: bytes) -> None:
    page.locator("#file").set_input_files(
        {"name": "photo.png", "mimeType": "image/png", "buffer": data}
    )
    expect(page.locator(".attachment")).to_have_count(1)


def dropped(page: Page, kind: str, data: bytes) -> None:
    """A file that is dropped or pasted."""
    page.evaluate(
        """([kind, text]) => {
          const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
          const files = new DataTransfer();
          files.items.add(new File([bytes], "photo.png", { type: "image/png" }));
          const about = { bubbles: true, cancelable: true };
          document.body.dispatchEvent(kind === "paste"
            ? new ClipboardEvent("paste", { ...about, clipboardData: files })
            : new DragEvent(kind, { ...about, dataTransfer: files }));
        }""",
        [kind, base64.b64encode(data).decode()],
    )


def see(page: Page, *, is_hidden: bool) -> None:
    """Hides the page, as behind another tab, or shows it again."""
    page.evaluate(
        """(isHidden) => {
          Object.defineProperty(document, "hidden", { configurable: true, get: () => isHidden });
          document.dispatchEvent(new Event("visibilitychange"));
        }""",
        is_hidden,
    )


def until(page: Page, condition: str) -> None:
    """Waits until an expression of JavaScript holds.

    It travels as a function: Playwright evaluates a bare expression again at every look, and
    from the second look on the page's Content-Security-Policy refuses that.
    """
    page.wait_for_function(f"() => {condition}")


def pixel(page: Page, x: float, y: float) -> list[int]:
    """A colour of the canvas that is brushed on; `x` and `y` are of its width and height."""
    script = """([x, y]) => {
      const canvas = document.getElementById("mask-canvas");
      const at = [Math.floor(x * canvas.width), Math.floor(y * canvas.height)];
      return [...canvas.getContext("2d").getImageData(...at, 1, 1).data];
    }"""
    return list(page.evaluate(script, [x, y]))


def tab_to(page: Page, target: Locator) -> None:
    """By the Tab key alone."""
    for _ in range(60):
        if target.evaluate("(element) => element === document.activeElement"):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"Tab never comes to {target}")
