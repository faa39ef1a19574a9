"""What people see: TensorBoard's pages and the report, in a browser."""

import gzip
import json
import shutil
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import report
from profiled import profiled  # noqa: F401
from ranks import free_port

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def server(profiled, tmp_path_factory):  # noqa: F811
    """The address of a TensorBoard that shows two runs."""
    runs = tmp_path_factory.mktemp("runs")
    shutil.copytree(profiled, runs / "first")
    # The same events under another name are a second run to TensorBoard.
    shutil.copytree(profiled / "tensorboard", runs / "second" / "tensorboard")
    port = free_port()
    command = ["-m", "tensorboard.main", "--host", "127.0.0.1", "--load_fast=false"]
    process = subprocess.Popen(
        [sys.executable, *command, "--port", str(port), "--logdir", str(runs)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: len(answer(f"{address}/data/runs")) == 2)
        yield address
    finally:
        process.terminate()
        process.wait()


def answer(address):
    with urlopen(address, timeout=60) as response:
        return json.loads(response.read())


def wait_until(holds, seconds=120.0):
    end = time.monotonic() + seconds
    while True:
        try:
            if holds():
                return
        except (URLError, ConnectionError):
            pass  # not listening yet
        assert time.monotonic() < end, "not in time"
        time.sleep(0.3)


def test_the_profiler_plugin_answers_with_the_data_of_the_run(server):
    pytest.importorskip("torch_tb_profiler", reason="torch-tb-profiler is not installed")
    plugin = f"{server}/data/plugin/pytorch_profiler"

    def loaded():
        told = answer(f"{plugin}/runs")
        return told["runs"] and not told["loading"]

    wait_until(loaded)
    run = "first/profile"
    assert answer(f"{plugin}/runs")["runs"] == [run]
    views = answer(f"{plugin}/views?{urlencode({'run': run})}")
    assert {"Overview", "Operator", "Trace", "Distributed", "Memory"} <= set(views)
    assert answer(f"{plugin}/workers?{urlencode({'run': run, 'view': 'Overview'})}") == [
        "rank_0", "rank_1",
    ]  # fmt: skip

    def of_rank(what, **more):
        query = urlencode({"run": run, "worker": "rank_0", "span": "1", **more})
        with urlopen(f"{plugin}/{what}?{query}", timeout=60) as response:
            body = response.read()
        return json.loads(gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body)

    assert len(of_rank("overview")["steps"]["rows"]) == 2
    operators = json.dumps(of_rank("operation/table", group_by="Operation"))
    assert "aten::addmm" in operators
    assert "aten::" in json.dumps(of_rank("memory"))
    events = of_rank("trace")["traceEvents"]
    assert {"product", "inner step", "solve"} <= {e["name"] for e in events}


@pytest.fixture(scope="module")
def page():
    """A page of a browser that reaches this machine only, and the addresses it asked for."""
    if CHROMIUM is None:
        pytest.skip("no chromium here; apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        yield page
        browser.close()


TABS = {
    "scalars&tagFilter=inner_loss": ["train/inner_loss", "first/tensorboard", "second/tensorboard"],
    "images": ["dev example_f1_at_0.5", "solver convergence", "learned label interactions"],
    "text": ["config/text_summary", "warmup_rounds: 2"],
    "hparams": ["best_dev/example_f1_at_0.5", "solver.max_steps", "train.warmup_rounds"],
}


@pytest.mark.parametrize("tab", TABS)
def test_tensorboard_shows_the_records_of_runs_side_by_side(tab, server, page):
    page.goto("about:blank")
    page.goto(f"{server}/#{tab}")
    for words in TABS[tab]:
        # Looks into the shadow trees that TensorBoard is made of.
        page.get_by_text(words).first.wait_for(state="visible", timeout=60_000)
    if tab == "images":
        loaded = "images => images.filter(i => i.naturalWidth > 300).length"
        wait_until(lambda: page.locator("img").evaluate_all(loaded) >= 4)


def test_the_report_shows_all_its_pictures_and_asks_nobody(profiled, tmp_path, page):  # noqa: F811
    (tmp_path / "limits.json").write_text('{"flops": 5e10, "read_bytes": 1e10}')
    path = tmp_path / "report.html"
    limits = ["--limits", str(tmp_path / "limits.json")]
    assert report.main([str(profiled), *limits, "--output", str(path)]) == 0
    page.asked.clear()
    page.goto(path.as_uri())
    widths = page.locator("img").evaluate_all("images => images.map(i => i.naturalWidth)")
    assert len(widths) == 5
    assert min(widths) > 300
    assert page.get_by_text("Time by phase").is_visible()
    assert page.get_by_text("The largest costs").is_visible()
    assert [url for url in page.asked if not url.startswith("data:")] == [path.as_uri()]
