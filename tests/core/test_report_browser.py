"""The page of a run in a real browser: that it shows what it should and is legible, and asks for and runs nothing.

The browser is driven through its debugging pipe: JSON messages, each ended by a zero byte.
"""

import itertools
import json
import os
import pathlib
import re
import select
import shutil
import subprocess
import sys
from typing import Any

import pytest

from t5x_lite import report

pytestmark = pytest.mark.slow

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--remote-debugging-pipe"),
    *("--host-resolver-rules=MAP * ~NOTFOUND", "--no-first-run", "--disable-dev-shm-usage"),
)
# The browser expects the pipe at 3 (to read) and 4 (to write).
LAUNCH = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3), os.dup2(ends[1], 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""
EVIL = '<script>document.title = "taken"</script><img src=http://evil.test/x.png onerror="document.title = 1">'


class Browser:
    """One tab; `requests` and `complaints` are what it asked for, and what its console said, since `open`."""

    def __init__(self, program: str, profile: pathlib.Path):
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        command = [sys.executable, "-c", LAUNCH, str(theirs_in), str(theirs_out), program, *FLAGS]
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}"], pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL
        )
        os.close(theirs_in), os.close(theirs_out)
        self._unread, self._numbers, self._session = b"", itertools.count(1), None
        self.requests: dict[str, str] = {}
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to), os.close(self._from)

    def _next(self) -> dict:
        while b"\0" not in self._unread:
            assert select.select([self._from], [], [], 60)[0], "the browser has not answered for a minute"
            read = os.read(self._from, 1 << 16)
            assert read, "the browser has ended"
            self._unread += read
        message, self._unread = self._unread.split(b"\0", 1)
        found = json.loads(message)
        given = found.get("params", {})
        match found.get("method"):
            case "Network.requestWillBeSent":
                self.requests[given["requestId"]] = given["request"]["url"]
            case "Network.loadingFailed" if given.get("blockedReason") == "csp":
                del self.requests[given["requestId"]]  # never left the browser
            case "Log.entryAdded":
                self.complaints.append(given["entry"]["text"])
            case "Runtime.exceptionThrown" | "Runtime.consoleAPICalled":
                self.complaints.append(json.dumps(given))
        return found

    def call(self, method: str, **params: Any) -> dict:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path: pathlib.Path, width: int = 1100, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url="about:blank")
        self.requests.clear(), self.complaints.clear()
        self.call("Page.navigate", url=path.as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass
        self.run("new Promise(done => setTimeout(done, 100))")  # for what comes behind the load

    def run(self, script: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is on PATH")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> pathlib.Path:
    """Of a run on three tasks: classes, answers and one whose every text is hostile."""
    folder = tmp_path_factory.mktemp("runs") / "a run"
    (folder / "predictions").mkdir(parents=True)
    records: list[dict] = [{"step": s, "split": "train", "loss": 1 + 90 / (s + 9)} for s in range(1, 1001)]
    rows = {
        "glue_rte_v002": [("entailment", ("entailment", "not_entailment", "ent")[i % 3], "rte ...") for i in range(60)],
        "squad_v110": [(f"the {i} Denver Broncos", f"{i} Carolina Panthers", "question: " * 200) for i in range(40)],
        "a_task_with_a_very_long_name_indeed_v001": [(EVIL, f"{EVIL} {i}", EVIL) for i in range(3)],
    }
    for task, found in rows.items():
        for step in (250, 500, 750, 1000):
            value = 60 - abs(step - 750) / 50
            records.append({"step": step, "split": "validation", "task": task, "loss": 900 / step, "accuracy": value})
        lines = [json.dumps(dict(zip(("targets", "prediction", "inputs"), row, strict=True))) for row in found]
        (folder / "predictions" / f"{task}-1000.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rates = dict(zip(rows, (0.5, 0.3, 0.2), strict=True))
    return report.write_page(folder, report.About(EVIL, rates, {"squad_v110": {"loss": 3.0, "what": EVIL}}))


def test_it_asks_for_nothing_and_runs_nothing(browser, page, tmp_path):
    browser.open(page)
    assert list(browser.requests.values()) == [page.as_uri()]
    assert browser.complaints == []
    assert browser.run("document.title") == "a run"
    assert browser.run("document.scripts.length + document.images.length + document.links.length") == 3  # to tasks
    assert browser.run("document.body.innerText").count(EVIL) > 8

    # Escaping alone keeps hostile texts from running, and so does the policy alone.
    source = page.read_text()
    policy = re.search("<meta http-equiv=.*?>", source)
    assert policy
    escaped, with_policy, bare = (tmp_path / f"{name}.html" for name in ("escaped", "policy", "bare"))
    escaped.write_text(source.replace(policy[0], ""))
    with_policy.write_text(source.replace("<h1>", f"{EVIL}<h1>"))
    bare.write_text(source.replace(policy[0], "").replace("<h1>", f"{EVIL}<h1>"))
    for path, title in ((escaped, "a run"), (with_policy, "a run"), (bare, "1")):
        browser.open(path)
        assert browser.run("document.title") == title, path
        assert (list(browser.requests.values()) == [path.as_uri()]) == (title == "a run")


def test_it_shows_numbers_and_curves(browser, page):
    browser.open(page)
    scores = browser.run("document.querySelector('.scores tbody').innerText").split()
    assert scores == "glue_rte_v002 accuracy 55.00 60.00 750 loss 0.900 0.900 1,000".split()
    confusion = browser.run("document.querySelector('.confusion tbody').innerText").split()
    assert confusion == "entailment 20 40 60 33.3%".split()
    lines = "[...document.querySelectorAll('polyline')].map(line => line.points.length)"
    assert browser.run(lines) == [100, 4, 4, 4, 4, 4, 4]
    # In pixels: the curve is as wide as its plot, ends at its label, and is higher where the value is.
    box = "e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom] }"
    panel = "document.querySelector('.panels figure')"
    plot, line, label = (
        browser.run(f"({box})({panel}.querySelector('{part}'))") for part in ("svg", "polyline", ".end")
    )
    assert plot[2] - plot[0] > 150 and abs(line[2] - plot[2]) < 2 and label[0] > plot[2]
    last = browser.run(f"(p => p[3].y)({panel}.querySelector('polyline').points)")
    assert (label[1] + label[3]) / 2 == pytest.approx(plot[1] + last, abs=2)
    heights = browser.run(f"[...{panel}.querySelector('polyline').points].map(p => p.y)")
    assert heights[2] < heights[1] == heights[3] < heights[0]
    marked = "[...document.querySelectorAll('h3')].at(1).parentNode.querySelector('ins').innerText"
    assert browser.run(marked) == "Carolina Panthers"


# Each text and each curve against what is behind it, in WCAG's contrast; the canvas mixes what is transparent.
CONTRAST = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const light = colours => {
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1) }
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(
      x => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    const curve = element.matches("polyline");
    const text = [...element.childNodes].some(n => n.nodeType == 3 && n.data.trim());
    if (!curve && (element.closest("svg") || !text)) continue;
    const behind = [];
    for (let e = element; e; e = e.parentElement) behind.unshift(getComputedStyle(e).backgroundColor);
    const two = [light(behind), light([...behind, getComputedStyle(element)[curve ? "stroke" : "color"]])];
    found.push([Math.max(...two) / Math.min(...two), element.outerHTML.slice(0, 80)]);
  }
  return found.sort((a, b) => a[0] - b[0]);
})()
"""


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1100])
def test_it_is_legible(browser, page, width, dark):
    browser.open(page, width, dark)
    assert browser.run("document.documentElement.scrollWidth") <= width
    contrasts = browser.run(CONTRAST)
    assert len(contrasts) > 80
    assert contrasts[0][0] >= 4.5, contrasts[:3]
    background = browser.run("getComputedStyle(document.documentElement).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background))) < 60) == dark
    sizes = browser.run("[...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().width)")
    assert min(sizes) > 120, "a plot is too narrow to read"
    overlaps = browser.run("""
        [...document.querySelectorAll(".plot")].flatMap(plot => ["x", "y", "end"].map(kind => {
          const boxes = [...plot.querySelectorAll("." + kind)].map(e => e.getBoundingClientRect());
          return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(
            b => a.left < b.right && b.left < a.right && a.top + 1 < b.bottom && b.top + 1 < a.bottom)).length;
        }))""")
    assert sum(overlaps) == 0, "labels cover one another"
