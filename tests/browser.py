"""A real browser for tests: Chromium without a window, driven through chromedriver's WebDriver interface (W3C)."""

import base64
import json
import re
import shutil
import subprocess
import time
import urllib.request

import pytest

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element's id in answers, by the standard

needs_browser = pytest.mark.skipif(
    not (shutil.which("chromedriver") and shutil.which("chromium")),
    reason="needs chromium and chromedriver (Debian: chromium-driver)",
)


class Browser:
    """One page; ids are those of its HTML elements."""

    def __enter__(self):
        command = ["chromedriver", "--port=0"]
        self._driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        found = (re.search(r"started successfully on port (\d+)", line) for line in self._driver.stdout)
        self._url = f"http://127.0.0.1:{next(filter(None, found))[1]}/session"
        arguments = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        options = {"goog:chromeOptions": {"args": [*arguments, "--window-size=1000,1000"]}}
        session = self._post("", {"capabilities": {"alwaysMatch": options}})["sessionId"]
        self._url += f"/{session}"
        return self

    def __exit__(self, *_):
        try:
            self._request(urllib.request.Request(self._url, method="DELETE"))
        finally:
            self._driver.kill()
            self._driver.wait()

    def open(self, url):
        self._post("/url", {"url": url})

    def choose_file(self, id_, path):
        """What a user does with a file input."""
        element = self._post("/element", {"using": "css selector", "value": f"#{id_}"})[ELEMENT]
        self._post(f"/element/{element}/value", {"text": str(path)})

    def run(self, script):
        """The value that a piece of JavaScript returns."""
        return self._post("/execute/sync", {"script": script, "args": []})

    def wait_for(self, expression, seconds=60):
        """Waits until a JavaScript expression is true; fails after some time."""
        end = time.monotonic() + seconds
        while not self.run(f"return Boolean({expression})"):
            assert time.monotonic() < end, f"{expression} never came true"
            time.sleep(0.1)

    def screenshot(self):
        """The page as a PNG file: bytes."""
        return base64.b64decode(self._request(f"{self._url}/screenshot"))

    def _post(self, path, body):
        return self._request(urllib.request.Request(self._url + path, json.dumps(body).encode()))

    def _request(self, request):
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)["value"]
