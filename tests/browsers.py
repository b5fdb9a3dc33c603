"""A real browser for the tests of pages: the system's Chromium, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium, Chrome or chromium-browser is installed")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
ARGUMENTS += ["--disable-sync", "--no-first-run"]
CONTRAST = """(boxes) => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = (box) => {
    const color = parse(getComputedStyle(box).backgroundColor);
    return color.length < 4 || color[3] > 0.99 ? color : behind(box.parentElement);
  };
  const shown = [...document.querySelectorAll(boxes)].filter((box) => box.offsetParent && box.textContent.trim());
  return Math.min(...shown.map((box) => {
    const [dim, bright] = [light(parse(getComputedStyle(box).color)), light(behind(box))].sort((x, y) => x - y);
    return (bright + 0.05) / (dim + 0.05);
  }));
}"""


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of its own, which is closed at the end."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield started
        started.close()


def least_contrast(tab: Any, boxes: str) -> float:
    """The least contrast of text and what is behind it, among what a CSS selector names and is shown (WCAG 2)."""
    return float(tab.evaluate(CONTRAST, boxes))
