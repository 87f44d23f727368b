"""Prefect's pages as a person uses them: fill in a deployment's form, look at a run, open its menu, click."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from playwright.sync_api import Error, Locator, Page, expect

PATIENCE = 300_000
"""Milliseconds that a page may take on a busy machine."""
_CLICKS = 5


class PrefectPages:
    """Pages of a server, in one tab of a browser.

    Args:
        page: the tab.
        url: the server's, without a path.
        shots: where screenshots go.
    """

    def __init__(self, page: Page, url: str, shots: Path) -> None:
        self._page, self._url, self._shots = page, url, shots
        page.set_default_timeout(PATIENCE)

    def start(
        self,
        deployment: str,
        config: Path,
        overrides: Sequence[str] = (),
        choices: Mapping[str, str] | None = None,
        shot: str = "",
    ) -> None:
        """Fill in the form of a custom run, and submit it.

        Args:
            deployment: its id.
            choices: what to choose of the parameters that offer a choice.
        """
        page = self._page
        page.goto(f"{self._url}/v2/deployments/deployment/{deployment}/run")
        page.locator("textarea").first.fill(str(config))
        if overrides:
            page.get_by_role("tab", name="list").click()
        for override in overrides:
            page.get_by_role("button", name="Add item").click()
            page.locator("textarea").last.fill(override)
        for name, value in (choices or {}).items():
            page.get_by_role("button", name=f"Select {name}").click()
            option = page.get_by_role("option", name=value, exact=True)
            option.click()
            option.wait_for(state="hidden")  # a list closes slowly, and the next may have the same option
        self.shoot(shot)
        self._sent("create_flow_run", lambda: page.get_by_role("button", name="Submit").click())

    def open_run(self, run: str, tab: str = "") -> None:
        """A flow run's page, and one of its tabs."""
        self._page.goto(f"{self._url}/v2/runs/flow-run/{run}")
        if tab:
            self._page.get_by_role("tab", name=tab, exact=True).click()

    def shows(self, words: str) -> Locator:
        """The first place on the page that has these words, once it has."""
        found = self._page.get_by_text(re.compile(words)).first
        expect(found).to_be_visible(timeout=PATIENCE)
        return found

    def act(self, action: str, shot: str = "") -> None:
        """Choose something in the run's menu, and confirm it."""
        page = self._page
        page.locator("main button[aria-haspopup=menu], button[aria-haspopup=menu]").first.click()
        page.get_by_role("menuitem", name=action, exact=True).click()
        self.shoot(shot)
        dialog = page.get_by_role("dialog").or_(page.get_by_role("alertdialog")).first
        self._sent("set_state", lambda: dialog.get_by_role("button", name=action).last.click())

    def _sent(self, request: str, click: Callable[[], None]) -> None:
        """Click until the server has taken what the page sends: SQLite may be locked on a busy machine."""
        for _ in range(_CLICKS):
            with self._page.expect_response(lambda response: response.url.endswith(request)) as answer:
                click()
            if answer.value.ok:
                return
        raise AssertionError(f"{answer.value.status} from {answer.value.url}: {answer.value.text()}")

    def shoot(self, name: str) -> None:
        """Keep a picture of the page, if a name is given."""
        if name:
            with suppress(Error):  # what moves on the page may not come to rest
                self._page.wait_for_load_state("networkidle", timeout=5_000)
            self._page.screenshot(path=self._shots / f"{name}.png")


def chromium() -> str | None:
    """The distribution's Chromium, or the one that CHROMIUM names."""
    import shutil

    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
