"""The dashboard in a real browser."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from support import SAGE, SAMPLES, engine_of, free_port, make_tiny_model, sage, wait_for

pytestmark = pytest.mark.skipif(
    not ("CI" in os.environ or (shutil.which("chromium") and shutil.which("chromedriver"))),
    reason="needs chromium and chromedriver",
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1300,900",
)  # fmt: skip


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[WebDriver]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(shutil.which("chromedriver"))))
    yield driver
    driver.quit()


def test_a_run_is_followed_and_stopped_in_the_browser(browser: WebDriver, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model", width=384, layers=12)
    run = engine_of(sage(
        "llm", "engine", "start", str(tmp_path / "model"), "--engine-kind", "finetune", "--dataset", str(SAMPLES),
        "--output", str(tmp_path / "out"), "--num-epochs", "50",
    ))  # fmt: skip
    port = free_port()
    env = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST")
    }  # with these variables, NiceGUI would run in its test mode
    studio = subprocess.Popen([*SAGE, "studio", "--port", str(port)], env=env)
    try:
        wait_for(lambda: _answers(port), "the dashboard")
        browser.get(f"http://127.0.0.1:{port}/")

        def text() -> str:
            return browser.find_element(By.TAG_NAME, "body").text

        wait_for(lambda: run in text() and "running" in text(), "the run in the table")
        wait_for(lambda: " %" in text(), "its progress")
        browser.find_element(By.CSS_SELECTOR, "tbody .q-checkbox").click()
        wait_for(lambda: "Tokens per second: " in text(), "its figures")
        wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, "canvas, svg path[stroke]"), "the loss curve")
        browser.save_screenshot(str(tmp_path / "studio.png"))
        next(b for b in browser.find_elements(By.TAG_NAME, "button") if b.text.lower() == "stop").click()
        wait_for(lambda: "is stopped" in text(), "the stop")
        assert "is stopped at step" in sage("llm", "engine", "stop", run).stdout
        sage("gateway", "stop")
        wait_for(lambda: "does not answer" in text(), "the error on the page")
        browser.save_screenshot(str(tmp_path / "error.png"))
    finally:
        studio.terminate()
        studio.wait(timeout=20)


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/").status_code == 200
    except httpx.HTTPError:
        return False
