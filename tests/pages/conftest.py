"""A headless Chromium, driven through its own pipe: no driver and no library."""

import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import time

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
  *("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"),
  *("--no-first-run", "--disable-extensions", "--disable-component-update"),
  *("--disable-background-networking", "--window-size=1280,900"),
)
PATIENCE_S = 30


class Browser:
  """One page.

  Attributes:
    requests: addresses of everything that was asked for.
    logs: what the console and the page's errors said.
  """

  def __init__(self, process, write, read):
    self._process, self._write, self._read = process, write, read
    self._ids, self._buffer = itertools.count(1), b""
    self.requests, self.logs = [], []
    target = self._send("Target.createTarget", url="about:blank")["targetId"]
    self._session = None
    attached = self._send("Target.attachToTarget", targetId=target, flatten=True)
    self._session = attached["sessionId"]
    for domain in ("Page", "Network", "Runtime", "Log"):
      self._send(f"{domain}.enable")

  def _send(self, method, **params):
    number = next(self._ids)
    message = {"id": number, "method": method, "params": params}
    if getattr(self, "_session", None):
      message["sessionId"] = self._session
    os.write(self._write, json.dumps(message).encode() + b"\0")
    deadline = time.monotonic() + PATIENCE_S
    while True:
      answer = self._next(deadline)
      if answer.get("id") == number:
        assert "error" not in answer, answer
        return answer["result"]

  def _next(self, deadline):
    while b"\0" not in self._buffer:
      left = deadline - time.monotonic()
      assert left > 0 and select.select([self._read], [], [], left)[0], "no answer"
      self._buffer += os.read(self._read, 1 << 20)
    line, _, self._buffer = self._buffer.partition(b"\0")
    message = json.loads(line)
    params = message.get("params", {})
    if message.get("method") == "Network.requestWillBeSent":
      self.requests.append(params["request"]["url"])
    if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
      self.logs.append(params)
    return message

  def open(self, address):
    """Loads a page and waits until it is there."""
    self._send("Page.navigate", url="about:blank")
    self._send("Page.navigate", url=address)
    self.wait("document.readyState === 'complete'")

  def js(self, expression):
    """What an expression is in the page."""
    answer = self._send("Runtime.evaluate", expression=expression, returnByValue=True)
    assert "exceptionDetails" not in answer, answer
    return answer["result"].get("value")

  def wait(self, expression):
    """Waits until an expression is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not self.js(expression):
      assert time.monotonic() < deadline, expression
      time.sleep(0.02)

  def click(self, selector):
    """Clicks the middle of an element with the mouse."""
    box = self.js(
      f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
      "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
      "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
    )
    place = {"x": box[0], "y": box[1], "button": "left", "clickCount": 1}
    for kind in ("mousePressed", "mouseReleased"):
      self._send("Input.dispatchMouseEvent", type=kind, **place)

  def type(self, text):
    """Types into what has the focus."""
    self._send("Input.insertText", text=text)

  def key(self, name):
    """Presses a key such as ArrowRight or Escape."""
    code = {"ArrowLeft": 37, "ArrowRight": 39, "Escape": 27, "Enter": 13}[name]
    keys = {"key": name, "code": name, "windowsVirtualKeyCode": code}
    for kind in ("rawKeyDown", "keyUp"):
      self._send("Input.dispatchKeyEvent", type=kind, **keys)

  def dark(self, on=True):
    """Asks for the dark colours."""
    feature = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
    self._send("Emulation.setEmulatedMedia", features=[feature])

  def screenshot(self):
    """What is to be seen, as base64 of a PNG."""
    return self._send("Page.captureScreenshot", format="png")["data"]


@pytest.fixture
def browser(tmp_path):
  """A browser that was just started; without one on the machine the test is skipped."""
  program = next(filter(None, map(shutil.which, NAMES)), None)
  if program is None:
    pytest.skip("no Chromium on this machine: what a page does is not checked")
  to_read, to_write = os.pipe()
  from_read, from_write = os.pipe()
  # It reads file 3 and writes file 4. Moved out of the way first: one may be the other.
  moves = f'exec 8<&{to_read} 9>&{from_write}; exec 3<&8 4>&9 8<&- 9>&-; exec "$@"'
  process = subprocess.Popen(
    [
      "bash",
      "-c",
      moves,
      "-",
      program,
      *FLAGS,
      f"--user-data-dir={tmp_path / 'profile'}",
    ],
    pass_fds=(to_read, from_write),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
    start_new_session=True,
  )
  os.close(to_read)
  os.close(from_write)
  try:
    yield Browser(process, to_write, from_read)
  finally:
    os.close(to_write)  # the end of its pipe is the end of the browser
    os.close(from_read)
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(5)
    if process.poll() is None:
      os.killpg(process.pid, 9)
      process.wait()
