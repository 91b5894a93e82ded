"""The page in a real browser: no errors, nothing from a network, and no sideways scroll on a phone."""

import http.server
import re
import shutil
import subprocess
import tempfile
import threading

import pytest
from report.report_runs import write_gap, write_numerics, write_record, write_run

from lightning_stable.cli.main import main

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
)
# The page in a frame, which may be narrower than a browser's window, and a look at it from outside.
FRAME = """<!DOCTYPE html><html><head><link rel="icon" href="data:,"></head><body>
<iframe src="/page" width="WIDTH" height="900" style="border: 0"></iframe>
<script>
window.onload = () => {
  const within = document.querySelector("iframe").contentWindow, page = within.document;
  const widths = [...page.querySelectorAll("svg")].map((svg) => svg.getBoundingClientRect().width);
  const split = [];
  for (const cell of page.querySelectorAll("th, td")) {
    const walker = page.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      for (const word of walker.currentNode.data.matchAll(/\\S+/g)) {
        const range = page.createRange();
        range.setStart(walker.currentNode, word.index);
        range.setEnd(walker.currentNode, word.index + word[0].length);
        if (new Set([...range.getClientRects()].map((lines) => lines.top)).size > 1) split.push(word[0]);
      }
    }
  }
  const found = {
    split: split.join(" "),
    width: within.innerWidth,
    scroll: page.documentElement.scrollWidth,
    shown: widths.filter((width) => width > 0).length,
    narrowest: Math.min(...widths.filter((width) => width > 0)),
    ground: within.getComputedStyle(page.body).backgroundColor,
    loaded: within.performance.getEntriesByType("resource").length,
  };
  Object.assign(document.body.dataset, found);
};
</script></body></html>"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium is installed: apt-get install chromium")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("browser") / "a_rather_long_name_of_a_run" / "version_12345")
    write_gap(folder)
    write_numerics(folder)
    write_record(folder)
    assert main(["report", str(folder)]) == 0
    return folder / "report.html"


@pytest.fixture(scope="module")
def server(page):
    """The address of a server of the page, and the paths that it was asked for."""
    asked = []
    content = page.read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            width = self.path.strip("/")
            self.wfile.write(content if width == "page" else FRAME.replace("WIDTH", width).encode())

        def log_message(self, *args):
            pass

    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=serving.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{serving.server_port}/", asked
    serving.shutdown()
    serving.server_close()
    thread.join()


def browse(url, *flags):
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [BROWSER, *FLAGS, f"--user-data-dir={profile}", *flags, url],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return done


def seen(done):
    return dict(re.findall(r'data-(\w+)="([^"]*)"', re.search(r"<body[^>]*>", done.stdout)[0]))


@pytest.mark.parametrize("width", [390, 1200])
def test_it_renders_without_errors_requests_or_sideways_scroll(width, page, server):
    url, asked = server
    asked.clear()
    done = browse(f"{url}{width}", "--window-size=1280,1000", "--dump-dom")
    assert "CONSOLE" not in done.stderr, done.stderr
    found = seen(done)
    assert int(found["width"]) == width
    assert int(found["scroll"]) <= width
    assert found["split"] == ""  # no word, and no number, goes on in the next line
    assert found["loaded"] == "0"
    assert asked == [f"/{width}", "/page"]
    # Of the two widths in which a picture of the whole page is there the one that fits, and every other picture.
    text = page.read_text(encoding="utf-8")
    assert int(found["shown"]) == text.count("<svg") - text.count('class="desk"')
    assert float(found["narrowest"]) > 300


def test_it_prints_and_is_dark_where_that_is_wanted(page, server, tmp_path):
    url, _ = server
    grounds = [seen(browse(f"{url}390", "--dump-dom", *flags))["ground"] for flags in ([], ["--force-dark-mode"])]
    assert grounds == ["rgb(243, 246, 248)", "rgb(16, 22, 29)"]
    browse(page.as_uri(), f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
