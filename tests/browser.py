"""A browser without a window, driven through a pair of pipes."""

import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from base64 import b64decode
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--remote-debugging-pipe", "--host-resolver-rules=MAP * ~NOTFOUND"),
)
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Escape": 27, "Enter": 13, "Tab": 9}


def find_browser() -> str | None:
    """Chromium or Chrome: what CHROME names, or the first on the path."""
    given = os.environ.get("CHROME")
    return shutil.which(given) if given else next(filter(None, map(shutil.which, NAMES)), None)


def _high(descriptor: int) -> int:
    copy = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return copy


class Browser:
    """One page; what it says on its console is collected in `messages`.

    Args:
        executable: From `find_browser`.
        width: Of the page, in pixels.
        height: Of the page, in pixels.
    """

    def __init__(self, executable: str, width: int = 1280, height: int = 900) -> None:
        self._home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        # descriptors from 10 on, so that none is in the way of 3 and 4
        to_it, self._write, self._read, from_it = map(_high, (*os.pipe(), *os.pipe()))
        command = [executable, *FLAGS, f"--user-data-dir={self._home.name}", "about:blank"]
        # it reads commands from descriptor 3 and answers on descriptor 4; the shell puts them there
        wiring = f'exec "$@" 3<&{to_it} 4>&{from_it}'
        self._process = subprocess.Popen(
            ["bash", "-c", wiring, "browser", *command],
            pass_fds=(to_it, from_it),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_it)
        os.close(from_it)
        self._rest, self._told, self._n = b"", deque[dict[str, Any]](), 0
        self._session: str | None = None
        self.messages: list[str] = []
        """Warnings, errors and exceptions of the page, and everything it wrote to its console."""
        self.requests: list[str] = []
        """Addresses it asked for."""
        try:
            target = self._call("Target.createTarget", url="about:blank")["targetId"]
            attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self._call(f"{domain}.enable")
            self.resize(width, height)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Browser":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it, and wipe its profile."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)
        os.close(self._write)
        self._home.cleanup()

    def open(self, path: Path, address: str = "", whole: bool = True) -> None:
        """Load a file anew.

        Args:
            path: The file.
            address: What comes behind its name, from `#` on.
            whole: Wait until all of it is there.
        """
        self._call("Page.navigate", url="about:blank")
        self._call("Page.navigate", url=path.resolve().as_uri() + address)
        if not whole:
            return
        self.wait("location.protocol === 'file:' && document.readyState === 'complete'")

    def resize(self, width: int, height: int = 900) -> None:
        """Change the size of the page."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def dark(self, on: bool) -> None:
        """Whether the system prefers a dark page."""
        value = "dark" if on else "light"
        features = [{"name": "prefers-color-scheme", "value": value}]
        self._call("Emulation.setEmulatedMedia", features=features)

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page, promises awaited.

        Raises:
            RuntimeError: It threw.
        """
        answer = self._call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:2000])
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 30) -> None:
        """Until an expression is true.

        Raises:
            TimeoutError: It never was.
        """
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                if self.evaluate(f"Boolean({script})"):
                    return
            except RuntimeError as e:
                # the page is being replaced
                if "TypeError" not in str(e) and "ReferenceError" not in str(e):
                    raise
            time.sleep(0.02)
        raise TimeoutError(f"not true after {seconds} s: {script}; {self.messages}")

    def press(self, key: str) -> None:
        """A key going down and up."""
        code = KEYS.get(key, ord(key[0].upper()))
        text = {"text": "\r" if key == "Enter" else key} if key == "Enter" or len(key) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            self._call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                windowsVirtualKeyCode=code,
                **(text if kind == "keyDown" else {}),
            )

    def type(self, text: str) -> None:
        """Text into what has the focus."""
        self._call("Input.insertText", text=text)

    def move(self, x: float, y: float) -> None:
        """Point at a place."""
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, path: Path) -> None:
        """The visible part of the page, as PNG."""
        path.write_bytes(b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._n += 1
        message = {"id": self._n, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        raw = json.dumps(message).encode() + b"\0"
        while raw:
            raw = raw[os.write(self._write, raw) :]
        while True:
            answer = self._next()
            if answer.get("id") != self._n:
                self._note(answer)
            elif "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']['message']}")
            else:
                result: dict[str, Any] = answer["result"]
                return result

    def _next(self, seconds: float = 60) -> dict[str, Any]:
        while not self._told:
            if not select.select([self._read], [], [], seconds)[0]:
                raise TimeoutError(f"the browser said nothing for {seconds} s")
            raw = os.read(self._read, 1 << 20)
            if not raw:
                raise RuntimeError("the browser ended")
            *whole, self._rest = (self._rest + raw).split(b"\0")
            self._told.extend(map(json.loads, whole))
        return self._told.popleft()

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        match event.get("method"):
            case "Runtime.consoleAPICalled":
                values = [str(a.get("value", a.get("description"))) for a in params["args"]]
                self.messages.append(f"{params['type']}: {' '.join(values)}")
            case "Runtime.exceptionThrown":
                self.messages.append(f"exception: {json.dumps(params['exceptionDetails'])[:2000]}")
            case "Log.entryAdded":
                entry = params["entry"]
                self.messages.append(f"{entry['level']}: {entry['text']} {entry.get('url', '')}")
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
