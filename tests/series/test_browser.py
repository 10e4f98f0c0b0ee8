"""The notebooks as a person runs them: a real browser opens JupyterLab and presses Run All.

`make test-browser`.
"""

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import Request, urlopen

import nbformat
import pytest
from conftest import ROOT, make, profile_parameters

from tabletune.run.parameters import PARAMETERS

pytestmark = pytest.mark.browser
SCREENSHOTS = ROOT / "runs" / "browser"
SHOWN = {  # what a reader of each notebook must get to see among the outputs, at least: tables and plots
    "01_format_dataset": {"tables": 3, "plots": 1},
    "02_finetune_qlora": {"tables": 2, "plots": 1},
    "03_merge_adapter": {"tables": 1, "plots": 0},
    "04_evaluate": {"tables": 2, "plots": 1},
    "05_baselines": {"tables": 4, "plots": 1},
    "06_trust": {"tables": 2, "plots": 0},
}
SETTINGS = {
    # by default JupyterLab takes cells that are off screen out of the page, where no test could see
    # them
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none", "scrollPastEnd": False},
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
}
RUN_MINUTES = 5  # for one notebook
# What the page shows of the notebook in front, in one object.
LOOK = """
const panel = document.querySelector(".jp-NotebookPanel:not(.lm-mod-hidden)");
if (!panel) return null;
const all = selector => [...panel.querySelectorAll(selector)];
const texts = selector => all(selector).map(element => element.innerText.trim());
const seen = element => element.offsetWidth > 0 && element.offsetHeight > 0;
return {
    status: panel.querySelector(".jp-Notebook-ExecutionIndicator")?.dataset.status,
    prompts: texts(".jp-CodeCell .jp-InputPrompt"),
    stderr: texts(`.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]`),
    cutOff: all(".jp-OutputArea-output").filter(output => output.scrollWidth > output.clientWidth + 1)
        .map(output => output.innerText.slice(0, 100)),
    bars: all(".jp-OutputArea-output progress").map(bar => bar.value + "/" + bar.max),
    tables: all(".jp-OutputArea-output table").filter(table => seen(table) && table.rows.length > 1).length,
    plots: all(".jp-OutputArea-output img").filter(img => seen(img) && img.naturalWidth > 300).length,
};
"""


def wait_for(condition, what, seconds):
    """Call `condition` until it returns something true, and return that.

    Fails, saying `what` did not come.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.5)
    raise AssertionError(f"waited {seconds} s for {what}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The five notebooks, each with the tiny profile's parameters in a cell of their own, as
    Papermill would do it.
    """
    folder = tmp_path_factory.mktemp("lab")
    values = profile_parameters("tiny", folder / "run")
    for stage in SHOWN:
        notebook = nbformat.read(ROOT / "notebooks" / f"{stage}.ipynb", 4)
        known = next(
            cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])
        )
        lines = [
            f"{name} = {value!r}" for name, value in values.items() if name in PARAMETERS[stage]
        ]
        injected = nbformat.v4.new_code_cell("\n".join(lines))
        notebook.cells.insert(notebook.cells.index(known) + 1, injected)
        nbformat.write(notebook, folder / f"{stage}.ipynb")
    return folder


@pytest.fixture(scope="module")
def lab(folder, tmp_path_factory):
    """A JupyterLab server on a free port that knows nothing of the user's settings.

    Returns `address(path)`.
    """
    import matplotlib.font_manager  # noqa: F401  it looks for fonts once, and would say so in the first notebook

    home, token = tmp_path_factory.mktemp("home"), os.urandom(16).hex()
    overrides = home / "config" / "labconfig" / "default_setting_overrides.json"
    overrides.parent.mkdir(parents=True)
    overrides.write_text(json.dumps(SETTINGS))
    # what the Makefile silences for papermill is not silent for someone who opens a notebook
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    for name in ("CONFIG", "DATA", "RUNTIME"):
        environment[f"JUPYTER_{name}_DIR"] = str(home / name.lower())
    environment["IPYTHONDIR"] = str(home / "ipython")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def address(path):
        return f"http://localhost:{port}/{path}{'&' if '?' in path else '?'}token={token}"

    def answers():
        assert server.poll() is None, log.read_text()
        try:
            return urlopen(address("api/status"), timeout=5).status == 200
        except (URLError, OSError):
            return False

    log = home / "server.log"
    command = [
        sys.executable,
        "-m",
        "jupyter",
        "lab",
        "--no-browser",
        "--allow-root",
        "--ip=localhost",
    ]
    command += [f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, f"--ServerApp.root_dir={folder}"],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(answers, "JupyterLab to start", 60)
        yield address
    finally:
        server.terminate()  # it ends its kernels, too
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium without a window."""
    from selenium import webdriver  # here, as the other tests do without the package

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--window-size=1400,1000",
    ):
        options.add_argument(flag)
    home = {**os.environ, "HOME": str(tmp_path_factory.mktemp("browser"))}
    driver = webdriver.Chrome(
        options, webdriver.ChromeService(shutil.which("chromedriver"), env=home)
    )
    yield driver
    driver.quit()


def visible(browser, selector, text=""):
    """The elements of the page that a person could see, with this text if one is given."""
    script = """
        const [selector, text] = arguments;
        const seen = element => element.getClientRects().length && (!text || element.innerText.trim() === text);
        return [...document.querySelectorAll(selector)].filter(seen);
    """
    return browser.execute_script(script, selector, text)


def choose(browser, menu, command):
    """Choose a command from a menu of the menu bar with the mouse."""
    from selenium.webdriver import ActionChains

    wait_for(lambda: visible(browser, ".lm-MenuBar-itemLabel", menu), f"the menu {menu}", 30)[
        0
    ].click()
    item = f'.lm-Menu-item[data-command="{command}"]:not(.lm-mod-disabled)'
    target = wait_for(lambda: visible(browser, item), f"{command} in the menu {menu}", 30)[0]
    ActionChains(browser).move_to_element(target).perform()
    wait_for(
        lambda: visible(browser, item + ".lm-mod-active"), f"{command} to light up", 30
    )  # or the click is lost
    target.click()
    wait_for(lambda: not visible(browser, ".lm-Menu"), f"the menu {menu} to close", 30)


def look(browser):
    """What the page shows of the notebook in front, or None if there is none yet."""
    return browser.execute_script(LOOK)


def sessions(lab):
    """The server's list of notebooks that have a kernel."""
    return json.load(urlopen(lab("api/sessions")))


def ready(browser, lab):
    """Whether the notebook is there and its kernel idle.

    A dialog about the kernel gets its suggestion accepted.
    """
    for button in visible(browser, ".jp-Dialog .jp-mod-accept"):
        button.click()
    # the page says idle even before there is a kernel, so the server is asked, too
    kernels = [session["kernel"] for session in sessions(lab)]
    connected = any(
        kernel["execution_state"] == "idle" and kernel["connections"] for kernel in kernels
    )
    page = look(browser)
    return connected and page and page["prompts"] and page["status"] == "idle"


def begun(page):
    """Whether a cell runs, waits or has run."""
    return any(prompt != "[ ]:" for prompt in page["prompts"])


def ended(page):
    """Whether no cell runs or waits any more."""
    return page["status"] == "idle" and not any("*" in prompt for prompt in page["prompts"])


def take_screenshot(browser, file):
    """Save a picture of the whole notebook, which is higher than any window: one strip after
    another, put together.
    """
    from PIL import Image

    panel = """
        const panel = document.querySelector(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-WindowedPanel-outer");
        const {x, y} = panel.getBoundingClientRect();
        const {clientWidth: width, clientHeight: height, scrollHeight} = panel;
    """
    browser.execute_cdp_cmd(
        "Input.dispatchMouseEvent", {"type": "mouseMoved", "x": 0, "y": 0}
    )  # it colours rows
    box = browser.execute_script(
        panel + "return {clip: {x, y, width, height, scale: 1}, scrollHeight};"
    )
    picture = Image.new("RGB", (box["clip"]["width"], box["scrollHeight"]))
    edge = 8  # the toolbar's shadow falls on the top of each strip, where the one before ends clean
    for top in range(0, picture.height, box["clip"]["height"] - edge):
        at = browser.execute_script(
            panel + "panel.scrollTop = arguments[0]; return panel.scrollTop;", top
        )
        time.sleep(0.2)  # for what is drawn late
        data = browser.execute_cdp_cmd(
            "Page.captureScreenshot", {"format": "png", "clip": box["clip"]}
        )["data"]
        strip = Image.open(io.BytesIO(base64.b64decode(data)))
        skip = edge if top else 0
        picture.paste(strip.crop((0, skip, strip.width, strip.height)), (0, round(at) + skip))
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)


def shut_down_kernels(lab):
    """As a person would before the next notebook: an idle kernel keeps its model in memory."""
    for session in sessions(lab):
        urlopen(Request(lab(f"api/sessions/{session['id']}"), method="DELETE"))


@pytest.mark.parametrize("stage", SHOWN)
def test_run_all_cells(folder, lab, browser, stage):
    file = folder / f"{stage}.ipynb"
    cells = [cell for cell in nbformat.read(file, 4).cells if cell.cell_type == "code"]
    browser.get(lab(f"lab/tree/{file.name}?reset"))  # reset: without the notebook before
    wait_for(lambda: ready(browser, lab), "the notebook and its kernel", 90)
    choose(browser, "Run", "runmenu:run-all")
    wait_for(lambda: begun(look(browser)), "the first cell to start", 30)
    try:
        wait_for(lambda: ended(look(browser)), "the last cell to end", RUN_MINUTES * 60)
    finally:
        take_screenshot(browser, SCREENSHOTS / f"{stage}.png")
    page = look(browser)
    choose(browser, "File", "docmanager:save")

    def saved():
        try:
            found = [cell for cell in nbformat.read(file, 4).cells if cell.cell_type == "code"]
        except ValueError:  # it is being written
            return False
        return [f"[{cell.execution_count or ' '}]:" for cell in found] == page["prompts"] and found

    outputs = [
        output
        for cell in wait_for(saved, "the notebook to be saved", 30)
        for output in cell.outputs
    ]
    shut_down_kernels(lab)

    # on the page an error looks like any other text on red; the file says that it is one
    errors = [
        f"{output.ename}: {output.evalue}" for output in outputs if output.output_type == "error"
    ]
    assert not errors, errors[0]
    assert page["prompts"] == [f"[{number}]:" for number in range(1, len(cells) + 1)]
    for line in "\n".join(page["stderr"]).splitlines():
        assert "100%|" in line, f"on red, and not a progress bar that has ended: {line}"
    assert all(value == end for value, end in (bar.split("/") for bar in page["bars"])), page[
        "bars"
    ]
    assert not page["cutOff"], f"wider than the page: {page['cutOff'][0]}"
    for what, least in SHOWN[stage].items():
        assert page[what] >= least, f"{page[what]} {what} are shown, and there should be {least}"


def test_the_report_fits_a_phone_and_paper(tmp_path, browser):
    """At 390 pixels nothing moves the page sideways, the disclaimer stays in view, and markup in
    answers stays text.
    """
    from test_report import MARKUP, a_run

    run = a_run(tmp_path / "run")
    done = make("report", f"RUN_DIR={run}")
    assert done.returncode == 0, done.stderr
    try:
        for name, width in (("desktop", 1300), ("phone", 390)):
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            browser.get(f"file://{run}/report.html")
            page = "const page = document.documentElement;"
            wide, high = browser.execute_script(
                page + "return [page.scrollWidth, page.scrollHeight]"
            )
            clip = {"x": 0, "y": 0, "width": width, "height": min(high, 16000), "scale": 1}
            shot = {"format": "png", "captureBeyondViewport": True, "clip": clip}
            SCREENSHOTS.mkdir(parents=True, exist_ok=True)
            data = browser.execute_cdp_cmd("Page.captureScreenshot", shot)["data"]
            (SCREENSHOTS / f"report_{name}.png").write_bytes(base64.b64decode(data))
            assert wide <= width, f"{name}: the page is {wide} pixels wide"
            stuck = """
                const head = document.querySelector("table.answers thead tr:first-child th");
                document.querySelector("table.answers tbody tr:last-child").scrollIntoView();
                const {top, bottom} = head.getBoundingClientRect();
                return top >= -1 && bottom <= innerHeight && head.innerText.includes("not medical advice");
            """
            assert browser.execute_script(stuck), f"{name}: the disclaimer is out of view"
            assert MARKUP in browser.execute_script("return document.body.innerText")
            assert browser.title.startswith("report: ")
            loaded = browser.execute_script(
                "return performance.getEntriesByType('resource').map(e => e.name)"
            )
            assert all(address.startswith("data:") for address in loaded), loaded
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    paper = browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"]
    (SCREENSHOTS / "report.pdf").write_bytes(base64.b64decode(paper))
    assert (SCREENSHOTS / "report.pdf").read_bytes().startswith(b"%PDF")
