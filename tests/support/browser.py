"""A headless Chromium, spoken to over pipes in its DevTools protocol."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TROUBLE = (
    "Runtime.consoleAPICalled",
    "Runtime.exceptionThrown",
    "Log.entryAdded",
    "Network.loadingFailed",
)
PATIENCE = 120
"""Seconds until a browser that says nothing is given up."""


def find_chromium():
    """Return the path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page; ``trouble`` and ``requests`` gather what happens in it."""

    def __init__(self, program, profile, width=1200, height=900):
        theirs_in, self.out = os.pipe()
        self.input, theirs_out = os.pipe()
        command = [
            program,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--remote-debugging-pipe",  # reads from 3, writes to 4
            f"--user-data-dir={profile}",
        ]
        shell = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.received, self.count, self.session = b"", 0, None
        self.trouble, self.requests, self.loaded = [], [], False
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        metrics = {"deviceScaleFactor": 1, "mobile": False}
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, **metrics
        )

    def send(self, method, **params):
        """Send a command and return its result."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]

    def receive(self):
        """Return the next message and keep what it tells."""
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self.received:
            ready, _, _ = select.select([self.input], [], [], 1)
            if ready:
                data = os.read(self.input, 1 << 16)
                assert data, "the browser has ended"
                self.received += data
            assert time.monotonic() < deadline, "the browser does not answer"
        text, _, self.received = self.received.partition(b"\0")
        message = json.loads(text)
        event = message.get("method")
        if event in TROUBLE:
            self.trouble.append(message)
        elif event == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        elif event == "Page.loadEventFired":
            self.loaded = True
        return message

    def open(self, url):
        """Load a page and wait until it is there."""
        self.loaded = False
        self.send("Page.navigate", url=url)
        while not self.loaded:
            self.receive()

    def evaluate(self, expression):
        """Return the value of a JavaScript expression in the page."""
        answer = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"]["value"]

    def close(self):
        """End the browser."""
        self.process.terminate()
        self.process.wait(PATIENCE)
        os.close(self.out)
        os.close(self.input)
