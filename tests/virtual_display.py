"""A display that nobody sees, for tests of windows: an Xvfb server whose screen can be read, and keys pressed."""

import os
import shutil
import subprocess
import time

import numpy as np
import pytest


class VirtualDisplay:
    """An Xvfb server of its own; `screen` is what a user would see."""

    def __init__(self, folder):
        self._folder = folder

    def __enter__(self):
        read, write = os.pipe()
        command = ["Xvfb", "-displayfd", str(write), "-screen", "0", "1280x1024x24", "-nolisten", "tcp", "-noreset"]
        self._server = subprocess.Popen(
            [*command, "-fbdir", self._folder], pass_fds=[write], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        os.close(write)
        with os.fdopen(read) as pipe:
            self.name = f":{pipe.readline().strip()}"
        return self

    def __exit__(self, *_):
        self._server.terminate()
        self._server.wait()

    def screen(self):
        """uint8 [H, W, 3] BGR, from the frame buffer file: a header of big-endian uint32 (XWD), then pixels."""
        content = (self._folder / "Xvfb_screen0").read_bytes()
        header = np.frombuffer(content, ">u4", 25)
        size, width, height, line, colours = (int(header[index]) for index in (0, 4, 5, 12, 19))
        pixels = np.frombuffer(content, np.uint8, height * line, size + 12 * colours)
        return pixels.reshape(height, line // 4, 4)[:, :width, :3]

    def wait_for(self, process, condition, *, remap=None, press=None):
        """Waits until condition(screen), up to a minute; False if it does not come or the process ends before.

        `remap` is the title of a window to hide and show every three seconds: without a window manager, Qt now and
        then misses that its window is on the screen, and paints nothing. `press` is (title, key), sent every five
        seconds: a key that comes while the window is being opened is lost, and one that comes before the last is
        answered may be one too many.
        """
        for count in range(600):
            if condition(self.screen()):
                return True
            if process.poll() is not None:
                return False
            if press and count % 50 == 0:
                self._control(press[0], "windowfocus", "%1", "key", press[1])
            if remap and count % 30 == 29:
                self._control(remap, "windowunmap", "%1", "windowmap", "%1")
            time.sleep(0.1)
        return False

    def _control(self, title, *commands):
        environment = {**os.environ, "DISPLAY": self.name}
        subprocess.run(["xdotool", "search", "--name", title, *commands], env=environment, capture_output=True)


def shows(colour, *, pixels):
    return lambda screen: (screen == colour).all(axis=2).sum() >= pixels


needs_display = pytest.mark.skipif(
    not (shutil.which("Xvfb") and shutil.which("xdotool")), reason="needs Xvfb and xdotool (Debian: xvfb xdotool)"
)
